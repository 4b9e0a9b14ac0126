"""Pipeline files: what is right loads, what is wrong is reported whole, with places and remedies."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.config.conftest import Load, Problems
from torchrelay.config import Pipeline
from torchrelay.errors import ConfigError

HEAD = "pipeline: p\nstages:\n"
ONE = HEAD + "  - name: a\n    use: s.py:Stage\n"
FULL = """pipeline: ocr
input:
  image: uint8[H, W, 3]
  lang: str = en
output: [text]
stages:
  - name: detect
    use: s.py:Stage
    inputs: [image]
    outputs: {crop: "uint8[*, *, 3]", box: "float32[4, 2]"}
    device: gpu
    args: {size: 3, rate: .inf}
    torch: {dtype: float16, channels_last: true}
    batch: {max_rows: 8, max_wait_ms: 5, pad: {image: 0}}
    replicas: {min: 1, max: 4}
    retry: {attempts: 5, backoff_s: [0, 1.5]}
    timeout_s: 5
    queue: {max_rows: 10, max_bytes: 512MiB}
  - {name: read, use: "s.py:Stage", inputs: {picture: crop, where: detect.box}, outputs: {text: str}, replicas: 2}
"""


def test_full(load: Load) -> None:
    """Every supported key is read with its unit and type."""
    pipeline = load(FULL)
    detect, read = pipeline.spec.stages
    assert pipeline.ref == f"ocr@{pipeline.version}"
    assert re.fullmatch("[0-9a-f]{8}", pipeline.version)
    assert list(map(str, pipeline.input.values())) == ["uint8[H, W, 3]", "str = en"]
    assert pipeline.output == ("text",)
    assert (detect.device, detect.torch.dtype, detect.batch.max_rows, detect.batch.pad) == (
        "gpu",
        "float16",
        8,
        {"image": 0},
    )
    assert (detect.queue.max_bytes, detect.retry.backoff_s) == (512 << 20, [0, 1.5])
    assert (read.replicas.min, read.replicas.max, read.batch.max_rows, read.timeout_s) == (2, 2, 32, 60)


def test_record(load: Load, folder: Path) -> None:
    """A record gives back the same pipeline without its files, infinite numbers included."""
    pipeline = load(FULL)
    (folder / "s.py").unlink()
    copy = Pipeline.from_record(pipeline.record())
    assert (copy.ref, copy.spec, copy.graph, copy.path) == (pipeline.ref, pipeline.spec, pipeline.graph, None)
    with pytest.raises(ConfigError, match="came from the registry"):
        _ = copy.base_dir


@pytest.mark.parametrize(
    "change",
    [
        {"format": 99},
        {"version": "zz"},
        {"version": None},
        {"spec": None},
        {"spec": {"pipeline": "p", "stages": []}},
        {"spec": {"pipeline": "p", "stages": [{"name": "a", "use": "s.py:A", "after": ["a"]}]}},
    ],
)
def test_record_refused(load: Load, change: dict[str, object]) -> None:
    """A record of another form is a ConfigError."""
    content = json.loads(load(ONE).record()) | change
    with pytest.raises(ConfigError, match="cannot be read"):
        Pipeline.from_record(json.dumps(content))


@pytest.mark.parametrize("text", ["", "5", "null", "[" * 100_000, "{", '{"format": 1}'])
def test_record_nonsense(text: str) -> None:
    """A record that is no JSON, or no object, is a ConfigError."""
    with pytest.raises(ConfigError):
        Pipeline.from_record(text)


def test_all_problems_at_once(problems: Problems) -> None:
    """One run reports wrong keys, wrong values, wrong order and missing files, each with its place."""
    text = """pipeline: p
input: {x: flot32}
stages:
  - name: a
    use: nowhere.py:A
    replica: 2
    replicas: {min: 3, max: 1}
    after: input
  - name: b
    use: s.py:Stage
    shards: {count: 2, mode: gater}
    after: aa
    timeout_s: -1
"""
    assert problems(text) == [
        "2:9: input.x: type 'flot32': unknown dtype 'flot32'; did you mean 'float32'?",
        f"5:5: {problems(text)[1].partition(': ')[2]}",
        "6:5: unknown key 'replica'; did you mean 'replicas'?",
        "7:5: stage 'a': replicas.max (1) is below replicas.min (3); raise max or lower min",
        "11:24: stage 'b': shards.mode: Input should be 'gather', 'tensor' or 'pipeline' ('gater' came)",
        "12:5: stage 'b' comes after the unknown stage 'aa'; did you mean 'a'?",
        "13:5: stage 'b': timeout_s: Input should be greater than 0 (-1 came)",
    ]
    assert "no such file" in problems(text)[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["1:1: the file is empty; a pipeline has `pipeline:` and `stages:`"]),
        ("- a", ["1:1: a pipeline file is a mapping with `pipeline:` and `stages:`"]),
        ("pipeline: p", ["1:1: stages is missing; add it"]),
        ("pipeline: p\nstages: 5", ["2:1: stages: Input should be a valid list (5 came)"]),
        ("pipeline: p\nstages: []", ["2:1: stages: a pipeline has 1 to 30 stages, not 0"]),
        ("pipeline: p\nstages: [5]", ["2:10: stage number 1: a mapping of keys to values is expected (5 came)"]),
        (HEAD + "  - {name: a}", ["3:5: stage 'a': use is missing; add it"]),
        (ONE + "    name: b\n", ["5:5: key 'name' stands twice in one place (first on line 3); keep one"]),
        (ONE + "    batch: {pad: {x: foo}}\n", ["5:19: stage 'a': batch.pad.x: a number is expected, 'foo' came"]),
        (
            ONE + "    batch: {pad: {x: 0}, buckets: {x: [16, 8]}}\n",
            ["5:36: stage 'a': batch.buckets.x: sizes rise from one to the next, as in [8, 16]; [16, 8] came"],
        ),
        (
            ONE + "    batch: {buckets: {x: [8]}}\n",
            ["5:23: stage 'a': column 'x' has buckets and is not padded; add pad: {x: 0}"],
        ),
        (
            ONE + "    batch: {max_cost: {colum: x, total: 5, column: x}}\n",
            ["5:24: unknown key 'colum'; did you mean 'column'?"],
        ),
        (ONE + "    batch: {max_cost: {column: x}}\n", ["5:13: stage 'a': batch.max_cost.total is missing; add it"]),
        (ONE + "    batch: {max_cost: {column: x, total: 0}}\n", None),
        (ONE + "    batch: {max_cost: 5}\n", None),
        (ONE + "    batch: {in_flight_rows: 0}\n", None),
        (
            ONE + "    batch: {max_rows: 64, in_flight_rows: 63}\n",
            [
                "5:5: stage 'a': batch: in_flight_rows (63) is below the 64 rows that are taken at once (max_rows); "
                "raise it or lower max_rows (64)"
            ],
        ),
        (ONE + "    batch: {pad: {x: 0}, buckets: {x: []}}\n", None),
        (ONE + "    batch: {pad: {x: 0}, buckets: {x: [0, 5]}}\n", None),
        (ONE + "    batch: {pad: {x: 0}, buckets: {x: [5, 5]}}\n", None),
        (ONE + "    batch: {pad: {x: 0}, buckets: {x: [true]}}\n", None),
        (ONE + "    batch: {pad: {x: 0}, buckets: {x: 5}}\n", None),
        (ONE + "    torch: {cuda_graphs: 1}\n", None),
        (ONE + "    batch: 5\n", ["5:5: stage 'a': batch: a mapping of keys to values is expected (5 came)"]),
        (ONE + "    args: {x: 2024-01-01}\n", ["5:12: '2024-01-01' reads as a date; put it in quotes"]),
        (ONE + "    args: {<<: {a: 1}}\n", ["5:12: keys must be plain words"]),
        (HEAD + "  - {name: input, use: 's.py:Stage'}\n", None),
        (ONE + "output: []\n", None),
        (ONE + "output: [a b]\n", None),
        (ONE + "input: {a b: str}\n", None),
        (ONE + "    inputs: [b.x]\n", None),
        (ONE + "    inputs: 5\n", None),
        (ONE + "    replicas: true\n", None),
        (ONE + "    replicas: 0\n", None),
        (ONE + "    replicas: {min: -1}\n", None),
        (ONE + "    retry: {attempts: 1.5}\n", None),
        (ONE + "    retry: {backoff_s: [3, 1]}\n", None),
        (ONE + "    retry: {backoff_s: [1, .nan]}\n", None),
        (ONE + "    timeout_s: .nan\n", None),
        (ONE + "    batch: {max_rows: '3'}\n", None),
        (ONE + "    queue: {max_bytes: many}\n", None),
        (ONE + "    device: tpu\n", None),
        ("pipeline: P\nstages: []\n", None),
        ('pipeline: "a\\n"\n' + ONE.partition("\n")[2], None),
        ("pipeline: " + "x" * 65 + "\n" + ONE.partition("\n")[2], None),
    ],
)
def test_wrong(problems: Problems, text: str, expected: list[str] | None) -> None:
    """Each mistake is one problem at its own place; a cause is reported once."""
    found = problems(text)
    if expected is None:
        assert found
        assert len({p.partition(": ")[0] for p in found}) == len(found)
    else:
        assert found == expected


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system [ls]",
        "!!python/name:os.system ''",
        "!!python/tuple [1]",
        "!!binary gIGC",
        "!x 1",
    ],
)
def test_tags(problems: Problems, value: str) -> None:
    """Tags are refused on scalars, lists and mappings alike."""
    assert [p for p in problems(ONE + f"    args: {{x: {value}}}\n") if p.startswith("5:12: tag ")]
    assert [p for p in problems(ONE + "    args: !!python/object:os.A {a: 1}\n") if "not allowed" in p]


@pytest.mark.parametrize(
    "text",
    [
        "pipeline: p\x00\n",
        "pipeline: [",
        "a: &x [*x]",
        "a: " + "[" * 5000,
        "a: " + "{a: " * 200 + "1" + "}" * 200,
        "a: " + "1" * 5000,
        "--- 1\n--- 2\n",
        "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
        + "".join(f"{c}: &{c} [{','.join([f'*{p}'] * 10)}]\n" for p, c in zip("abcde", "bcdef", strict=True)),
    ],
)
def test_hostile_yaml(problems: Problems, text: str) -> None:
    """Broken, bottomless and exploding YAML is reported, quickly."""
    assert problems(text)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_mutations(problems: Problems, data: st.DataObject) -> None:
    """A damaged file is loaded or refused with a ConfigError; nothing else comes out."""
    at = data.draw(st.integers(0, len(FULL)))
    length = data.draw(st.integers(0, 12))
    problems(FULL[:at] + data.draw(st.text("[]{}:,-!&*'\"\n aZ5.\t#|>", max_size=4)) + FULL[at + length :])


def test_overrides(load: Load, problems: Problems) -> None:
    """`--set` reaches any key of a stage as YAML, leaves the file alone, and names itself when it is wrong."""
    pipeline = load(ONE, {"a.batch.max_rows": "7", "a.replicas": "3", "a.args.name": "'5'"})
    stage = pipeline.spec.stages[0]
    assert (stage.batch.max_rows, stage.replicas.max, stage.args) == (7, 3, {"name": "5"})
    assert load(ONE).spec.stages[0].batch.max_rows == 32
    assert problems(ONE, {"b.batch": "1"}) == [
        "1:1: --set b.batch: there is no such stage or key; write STAGE.KEY=VALUE"
    ]
    assert "--set a.batch.max_rows: stage 'a': batch.max_rows" in problems(ONE, {"a.batch.max_rows": "0"})[0]
    assert "no YAML value" in problems(ONE, {"a.batch.max_rows": "[1"})[0]
    assert "no such stage" in problems("pipeline: p\nstages: 5", {"a.batch": "1"})[0]
    assert "no such stage or key" in problems(ONE, {"a": "1"})[0]


def test_no_file(folder: Path) -> None:
    """A file that is missing, a folder, a FIFO, a device, too large or not text is refused without waiting."""
    os.mkfifo(folder / "fifo.yaml")
    (folder / "big.yaml").write_bytes(b"#" * (1 << 20) + b"\n")
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ["none.yaml", "fifo.yaml", "big.yaml", "binary.yaml", ".", "/proc/self/mem", "/dev/zero"]:
        with pytest.raises(ConfigError):
            Pipeline.load(folder / name)


@pytest.mark.parametrize(
    ("use", "says"),
    [
        ("../s.py:Stage", "beside the pipeline file"),
        ("/etc/s.py:Stage", "beside the pipeline file"),
        ("link.py:Stage", "link that leads out"),
        ("none.py:Stage", "no such file"),
        ("folder.py:Stage", "no regular file"),
        ("__main__:Stage", "workers import stages anew"),
        ("s.py", "write file.py:Name"),
        ("no.such.module:Stage", "not found"),
        ('"s\\0.py:Stage"', "no such file"),
    ],
)
def test_use_refused(
    problems: Problems, folder: Path, tmp_path_factory: pytest.TempPathFactory, use: str, says: str
) -> None:
    """`use` stays beside the file or names an installed module; what leads elsewhere is refused at its place."""
    outside = tmp_path_factory.mktemp("outside") / "s.py"
    outside.write_text("class Stage: pass")
    (folder / "link.py").symlink_to(outside)
    (folder / "folder.py").mkdir()
    (found,) = problems(HEAD + f"  - name: a\n    use: {use}\n")
    assert found.startswith("4:5: ")
    assert says in found


def test_weights_refused(problems: Problems) -> None:
    """Weights stay beside the file too."""
    assert "beside the pipeline file" in problems(ONE + "    weights: ../w.safetensors\n")[0]
    assert "no such file" in problems(ONE + "    weights: w.safetensors\n")[0]


def test_linked_file(load: Load, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A link to a pipeline file loads with the files beside its target."""
    pipeline = load(ONE)
    link = tmp_path_factory.mktemp("links") / "q.yaml"
    link.symlink_to(folder / "p.yaml")
    assert Pipeline.load(link).ref == pipeline.ref
    assert Pipeline.load(link).base_dir == folder.resolve()


def test_where(load: Load) -> None:
    """A loaded pipeline still knows where its keys stand."""
    pipeline = load(ONE)
    assert pipeline.where("stages", 0, "use").endswith("p.yaml:4:5")
    assert pipeline.where("stages", 0, "args", "x").endswith("p.yaml:3:5")


@pytest.mark.parametrize(
    ("wire", "expected"),
    [
        ("fp16", "6:5: stage 'a': wire: a mapping of keys to values is expected ('fp16' came)"),
        (
            "{dtype: float32}",
            "6:12: stage 'a': wire.dtype: Input should be 'float16', 'bfloat16', 'float8_e4m3fn' or 'float8_e5m2' "
            "('float32' came)",
        ),
        ("{compress: gzip}", "6:12: stage 'a': wire.compress: Input should be 'lz4' or 'zstd' ('gzip' came)"),
        ("{compres: lz4}", "6:12: unknown key 'compres'; did you mean 'compress'?"),
    ],
)
def test_wire(problems: Problems, wire: str, expected: str) -> None:
    """A wrong option of `wire` is told with its place and what may stand there."""
    text = "pipeline: p\ninput: {x: str}\nstages:\n  - name: a\n    use: s.py:Stage\n    wire: "
    assert problems(text + wire + "\n") == [expected]
