"""Embeds the standard library's docstrings through three worker processes, then searches them by meaning.

Run it from the repository: `python -m examples.docsearch.demo`, with `--limit N` for fewer texts.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track
from rich.table import Table

from examples.docsearch.gather import Doc, gather
from torchrelay import Pipeline, Relay, terminal
from torchrelay.errors import StageLoadError, TorchrelayError
from torchrelay.queues import server
from torchrelay.up import Fleet
from torchrelay.workers.logs import set_up_logs

HERE = Path(__file__).parent
QUERIES = (
    "parse a date from a string",
    "run a command and capture its output",
    "find all files whose names match a pattern",
)
_TOP = 3
_LINES = 10
_WIDTH = 64
_HEARTBEATS_S = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; returns its exit status."""
    parser = argparse.ArgumentParser(description="Semantic search over the standard library's docstrings.")
    parser.add_argument("--limit", type=int, metavar="N", help="embed only N texts, spread evenly over all")
    parser.add_argument("--out", type=Path, default=Path("out/docsearch"), help="where results go (%(default)s)")
    options = parser.parse_args(arguments)
    if options.limit is not None and options.limit < 1:
        parser.error("--limit must be at least 1")
    try:
        run(options.out, gather(options.limit))
    except KeyboardInterrupt:
        terminal.err.print("interrupted")
        return 130
    except TorchrelayError as error:
        terminal.err.print(f"[red]error[/red] {terminal.clean(error)}", soft_wrap=True)
        return 1
    return 0


def run(folder: Path, docs: Sequence[Doc]) -> None:
    """Embeds the texts, saves them with their vectors, and answers the queries."""
    pipeline = Pipeline.load(HERE / "pipeline.yaml")
    terminal.err.print(f"{len(docs)} docstrings; starting a server and {len(pipeline.spec.stages)} workers")
    with scratch_server(folder) as url:
        fleet = Fleet(url, "docsearch", allow_cpu=True)
        fleet.add(pipeline)
        set_up_logs(fleet.settings.log)
        with fleet, Relay(url, namespace="docsearch") as relay:
            await_workers(fleet, pipeline)
            started = time.perf_counter()
            vectors = embed(relay, [doc["text"] for doc in docs])
            elapsed = time.perf_counter() - started
            stages = stage_table(fleet, len(docs), elapsed)
            save(folder, docs, vectors)
            answers = [(query, search(relay, vectors, query)) for query in QUERIES]
    for query, hits in answers:
        terminal.out.print(f"\n[bold]{query}[/bold]")
        rows = [(f"{cosine:.2f}", docs[i]["name"], first_line(docs[i])) for i, cosine in hits]
        terminal.out.print(terminal.table(["#cosine", "name", "docstring"], rows))
    terminal.out.print(f"\n{len(docs)} rows in {elapsed:.1f} s: [bold]{len(docs) / elapsed:.0f} rows/s[/bold]")
    terminal.out.print(stages)
    shape = "x".join(map(str, vectors.shape))
    terminal.out.print(f"\n{folder / 'vectors.npy'} ({shape}, float32) and {folder / 'docs.jsonl'}, row for row")


@contextmanager
def scratch_server(folder: Path) -> Iterator[str]:
    """The URL of an embedded server of the demo's own, whose files go when it ends."""
    state_dir = folder / server.FOLDER
    # Made here, so that the server of a folder further up is not taken for it.
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    embedded = server.find_or_start(folder)
    try:
        yield embedded.url
    finally:
        server.stop(folder)
        embedded.close()
        shutil.rmtree(state_dir)


def await_workers(fleet: Fleet, pipeline: Pipeline) -> None:
    """Returns when every stage is ready. Raises StageLoadError when one does not load."""
    while fleet.registry.wait_served(pipeline, timeout_s=0.5):
        if fleet.failed():
            raise StageLoadError("a stage did not load; its reason is logged above")


def embed(relay: Relay, texts: Sequence[str]) -> np.ndarray:
    """The vectors of all texts: float32 `[N, 384]`, in their order."""
    # Texts of like length share a batch, so that little of it is padding; the longest ones come first.
    order = sorted(range(len(texts)), key=lambda i: -about_tokens(texts[i]))
    rows = [np.empty(0)] * len(texts)
    with closing(relay.map("docsearch", ({"text": texts[i]} for i in order))) as results:
        for i, result in zip(order, with_progress(results, len(texts)), strict=True):
            rows[i] = result["vector"]
    return np.stack(rows)


def about_tokens(text: str) -> int:
    """Words and signs: near enough to the number of tokens to sort by."""
    return len(re.findall(r"[^\W_]+|\S", text))


def with_progress(results: Iterable[dict[str, Any]], total: int) -> Iterator[dict[str, Any]]:
    """Passes results on: a bar on a terminal, else a line now and then."""
    if terminal.err.is_terminal:
        yield from track(results, "embedding", total, console=terminal.err)
        return
    step = -(-total // _LINES)
    for done, result in enumerate(results, 1):
        yield result
        if done % step == 0 or done == total:
            terminal.err.print(f"embedded {done} of {total}")


def stage_table(fleet: Fleet, rows: int, elapsed: float) -> Table:
    """What each worker says of itself, once its heartbeat counts all rows."""
    deadline = time.monotonic() + _HEARTBEATS_S
    while any(w.rows < rows for w in fleet.registry.workers()) and time.monotonic() < deadline:
        time.sleep(0.1)
    reports = {w.node.rpartition("/")[2]: w for w in fleet.registry.workers()}
    cells = []
    for node in terminal.status_of(fleet.registry)["nodes"]:
        stage = node["node"].rpartition("/")[2]
        report = reports[stage]
        mean = report.rows / max(report.batches, 1)
        fill = f"{100 * (node['batch_fill'] or 0):.0f} %"
        cells.append((stage, report.batches, f"{mean:.1f}", fill, f"{100 * report.busy_s / elapsed:.0f} %"))
    return terminal.table(["stage", "#batches", "#rows each", "#batch fill", "#busy"], cells)


def save(folder: Path, docs: Sequence[Doc], vectors: np.ndarray) -> None:
    """`vectors.npy` and `docs.jsonl`: row i of one belongs to line i of the other."""
    np.save(folder / "vectors.npy", vectors)
    lines = (json.dumps(doc, ensure_ascii=False) + "\n" for doc in docs)
    (folder / "docs.jsonl").write_text("".join(lines), encoding="utf-8")


def search(relay: Relay, vectors: np.ndarray, query: str) -> list[tuple[int, float]]:
    """The best rows for a query with their cosines, best first. Vectors have length 1, so a product is a cosine."""
    scores = vectors @ relay.infer("docsearch", {"text": query})["vector"]
    return [(int(i), float(scores[i])) for i in np.argsort(-scores)[:_TOP]]


def first_line(doc: Doc) -> str:
    """The docstring's start, as much as a line of the terminal holds."""
    line = " ".join(doc["text"].split())
    return line if len(line) <= _WIDTH else line[: _WIDTH - 1] + "…"


if __name__ == "__main__":
    sys.exit(main())
