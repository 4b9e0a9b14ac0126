"""Pipelines that are written in Python: the same data, checks, messages and versions as in a file."""

from __future__ import annotations

import enum
import functools
import json.decoder
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.config.conftest import Load
from torchrelay import Pipeline, StageSpec
from torchrelay.config.imports import import_use
from torchrelay.config.stage_spec import plain
from torchrelay.errors import ConfigError

YAML = """pipeline: ocr
input:
  image: uint8[H, W, 3]
  lang: str = en
output: [text]
limits: {rows_per_job: 5000}
stages:
  - name: detect
    use: s.py:Stage
    inputs: [image]
    outputs: {crop: "uint8[*, *, 3]", box: "float32[4, 2]"}
    rows: expand
    device: gpu
    args: {size: 3, rate: .inf, sizes: [1, 2]}
    weights: s.py
    torch: {dtype: float16, channels_last: true}
    wire: {dtype: float16, compress: zstd}
    batch: {max_rows: 8, max_wait_ms: 5, pad: {image: 0}}
    replicas: {min: 1, max: 4}
    retry: {attempts: 5, backoff_s: [0, 1.5]}
    timeout_s: 5
    queue: {max_rows: 10, max_bytes: 512MiB}
  - {name: read, use: "s.py:plain", inputs: {picture: crop, where: detect.box}, outputs: {text: "str?"}, when: lang,
     args: {size: 1}, replicas: 2}
  - {name: regroup, rows: {collapse: detect}}
"""


class Given:
    """Holds a method, which is no function of a module."""

    def method(self) -> None:
        pass


def here() -> None:
    """A function of this module."""


def full(folder: Path, **more: Any) -> Pipeline:
    return Pipeline(
        "ocr",
        input={"image": "uint8[H, W, 3]", "lang": "str = en"},
        output=("text",),
        limits={"rows_per_job": np.int64(5000)},
        stages=[
            StageSpec(
                "detect",
                use="s.py:Stage",
                inputs=("image",),
                outputs={"crop": "uint8[*, *, 3]", "box": "float32[4, 2]"},
                rows="expand",
                device="gpu",
                args={"size": 3, "rate": float("inf"), "sizes": (1, 2)},
                weights=Path("s.py"),
                torch={"dtype": "float16", "channels_last": True},
                wire={"dtype": "float16", "compress": "zstd"},
                batch={"max_rows": 8, "max_wait_ms": 5, "pad": {"image": 0}},
                replicas={"min": 1, "max": 4},
                retry={"attempts": 5, "backoff_s": (0, 1.5)},
                timeout_s=5,
                queue={"max_rows": 10, "max_bytes": "512MiB"},
            ),
            StageSpec(
                "read",
                use="s.py:plain",
                inputs={"picture": "crop", "where": "detect.box"},
                outputs={"text": "str?"},
                when="lang",
                args={"size": 1},
                replicas=2,
            ),
            StageSpec("regroup", rows={"collapse": "detect"}),
        ],
        base_dir=folder,
        **more,
    )


def test_as_in_a_file(load: Load, folder: Path) -> None:
    """Every key means what it means in YAML: the same spec, graph and version, and both are one value."""
    ours, file = full(folder), load(YAML)
    assert (ours.version, ours.spec, ours.graph) == (file.version, file.spec, file.graph)
    assert ours == file
    assert hash(ours) == hash(file)
    assert (ours.source, ours.path, ours.base_dir) == (None, None, folder)
    assert file.source == str(folder / "p.yaml")
    assert Pipeline.from_record(ours.record()).spec == ours.spec


def test_value(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Equal parts are equal pipelines, also after a pickle; another folder, name or tuning is another value."""
    one = full(folder)
    assert one == full(folder) == pickle.loads(pickle.dumps(one))  # noqa: S301  # our own bytes
    assert len({one, full(folder)}) == 1
    assert repr(one) == f"<Pipeline {one.ref}: detect, read, regroup>"
    other = tmp_path_factory.mktemp("other")
    (other / "s.py").write_text((folder / "s.py").read_text())
    assert full(other).version == one.version
    assert full(other) != one
    with pytest.raises(AttributeError):
        one.name = "x"  # type: ignore[misc]


def test_stage_spec_is_a_value() -> None:
    """What was given is copied, compared, and shown as it would be written."""
    args = {"sizes": [1]}
    spec = StageSpec("a", use=here, args=args, after="input")
    args["sizes"].append(2)
    assert spec == StageSpec("a", use=here, args={"sizes": (1,)}, after="input")
    assert hash(spec) == hash(StageSpec("a", use=here))
    assert spec != StageSpec("a", use=here, after="input")
    assert repr(StageSpec("a", use="s.py:S", rows="expand")) == "StageSpec('a', use='s.py:S', rows='expand')"


def problems(folder: Path, *stages: Any, **keys: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        Pipeline(keys.pop("name", "p"), stages=list(stages), base_dir=folder, **keys)
    return list(caught.value.problems)


def test_problems(folder: Path) -> None:
    """All problems at once, in the order of the stages, each with its stage where a file has line and column."""
    found = problems(
        folder,
        StageSpec("a", use="nowhere.py:A", replicas={"min": 3, "max": 1}, after="input"),
        StageSpec("b", use="s.py:Stage", batch={"max_row": 2}, after="aa"),
        StageSpec("c", use="s.py:Stage", after="b", timeout_s=-1),
        input={"x": "flot32"},
    )
    assert found == [
        "pipeline 'p': input.x: type 'flot32': unknown dtype 'flot32'; did you mean 'float32'?",
        "pipeline 'p': stage 'a': replicas.max (1) is below replicas.min (3); raise max or lower min",
        f"pipeline 'p': stage 'a': use 'nowhere.py': there is no such file in {folder}",
        "pipeline 'p': stage 'b' comes after the unknown stage 'aa'; did you mean 'a'?",
        "pipeline 'p': stage 'b': unknown key 'max_row'; did you mean 'max_rows'?",
        "pipeline 'p': stage 'c': timeout_s: Input should be greater than 0 (-1 came)",
    ]


def test_unfit(folder: Path) -> None:
    """What is no list, no StageSpec, no name or no folder is a ConfigError too."""
    stage = StageSpec("a", use="s.py:Stage")
    assert problems(folder, {"name": "a"}) == ["pipeline 'p': stage number 1: a StageSpec is expected, dict came"]
    assert "1 to 30 stages" in problems(folder)[0]
    assert "'No Name' is no allowed name" in problems(folder, stage, name="No Name")[0]
    assert "pipeline: " in problems(folder, stage, name=5)[0]
    assert "input" in problems(folder, stage, input=5)[0]
    assert "output" in problems(folder, stage, output="x")[0]
    assert "did you mean 'rows_per_job'?" in problems(folder, stage, limits={"rows_per_jobs": 5})[0]
    assert "use is missing" in problems(folder, StageSpec("a"))[0]
    assert "is no folder" in problems(folder / "none", stage)[0]
    assert "stage number 1: name" in problems(folder, StageSpec(5, use="s.py:Stage"))[0]  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a list of StageSpec is expected, StageSpec came"):
        Pipeline("p", stages=stage, base_dir=folder)  # type: ignore[arg-type]


def local() -> Any:
    class Nested:
        pass

    return Nested


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (local(), "cannot be imported from .* put it into a file or module of its own"),
        (lambda batch: {}, "cannot be imported from .* put it into a file or module of its own"),
        (functools.partial(here), "a class, a function or a text is expected, partial came"),
        (Path("s.py"), "a class, a function or a text is expected, PosixPath came"),
        (5, "a class, a function or a text is expected, int came"),
        (Given.method, "cannot be imported from"),
    ],
)
def test_use_refused(folder: Path, use: Any, says: str) -> None:
    """What a worker could not import by name is refused, with its stage and what to do."""
    with pytest.raises(ConfigError, match="^pipeline 'p': stage 'a': use: .*" + says):
        Pipeline("p", stages=[StageSpec("a", use=use)], base_dir=folder)


def test_use_of_a_module(folder: Path) -> None:
    """A class or function of an installed module is named by it; one that a file elsewhere made is refused."""
    pipeline = Pipeline("p", stages=[StageSpec("a", use=json.decoder.JSONDecoder)], base_dir=folder)
    assert pipeline.spec.stages[0].use == "json.decoder:JSONDecoder"
    (folder / "sub").mkdir()
    (folder / "sub" / "other.py").write_text("class There: pass\n")
    there = import_use("other.py:There", folder / "sub")
    assert "which workers do not find; move it into" in problems(folder, StageSpec("a", use=there))[0]


MODULE = """
    from torchrelay import Batch, Pipeline, Stage, StageSpec

    class Upper(Stage):
        def forward(self, batch):
            return {"out": [t.upper() for t in batch["t"]]}

    def double(batch, *, times: int = 2):
        return {"twice": [o * times for o in batch["out"]]}

    pipeline = Pipeline(
        "loud",
        input={"t": "str"},
        stages=[
            StageSpec("upper", use=Upper, outputs={"out": "str"}),
            StageSpec("double", use=double, args={"times": 3}, outputs={"twice": "str"}),
        ],
    )
    other = 5
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    """A module that holds stages and their pipeline."""
    path = tmp_path / "loud.py"
    path.write_text(textwrap.dedent(MODULE))
    return path


def test_of_a_module(module: Path) -> None:
    """`module.py:name` gives the pipeline with files beside the module; YAML that says the same has its version."""
    pipeline = Pipeline.load(f"{module}:pipeline")
    assert [s.use for s in pipeline.spec.stages] == ["loud.py:Upper", "loud.py:double"]
    assert (pipeline.base_dir, pipeline.path, pipeline.source) == (module.parent, module, f"{module}:pipeline")
    (module.parent / "loud.yaml").write_text(
        "pipeline: loud\ninput: {t: str}\nstages:\n"
        "  - {name: upper, use: 'loud.py:Upper', outputs: {out: str}}\n"
        "  - {name: double, use: 'loud.py:double', args: {times: 3}, outputs: {twice: str}}\n"
    )
    assert Pipeline.load(module.parent / "loud.yaml").version == pipeline.version
    assert Pipeline.load(pipeline.source) == pipeline
    assert pipeline.where("stages", 0, "use") == pipeline.source
    assert pipeline.problem(("stages", 0, "use"), "is odd") == f"{pipeline.source}: stage 'upper': is odd"


def test_overrides(module: Path) -> None:
    """`--set` reaches stages of Python as those of a file, and leaves what the module holds alone."""
    name = f"{module}:pipeline"
    changed = Pipeline.load(name, {"upper.batch.max_rows": "7", "double.args.times": "4"})
    assert (changed.spec.stages[0].batch.max_rows, changed.spec.stages[1].args) == (7, {"times": 4})
    assert Pipeline.load(name).spec.stages[0].batch.max_rows == 32
    with pytest.raises(ConfigError, match=r"loud\.py:pipeline: --set uper.batch: .*did you mean 'upper'"):
        Pipeline.load(name, {"uper.batch": "7"})
    with pytest.raises(
        ConfigError, match=r"--set upper\.batch\.max_rows: stage 'upper': batch.max_rows: Input should be"
    ):
        Pipeline.load(name, {"upper.batch.max_rows": "0"})


def test_edited_module(module: Path) -> None:
    """In one process, an edited module gives another pipeline, and an edited stage file another version."""
    first = Pipeline.load(f"{module}:pipeline")
    module.write_text(module.read_text().replace('"times": 3', '"times": 5'))
    second = Pipeline.load(f"{module}:pipeline")
    assert second.spec.stages[1].args == {"times": 5}
    assert second.version != first.version


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("loud.py:other", "loud.py:other: other is int, not a torchrelay.Pipeline"),
        ("loud.py:Upper", "Upper is type, not a torchrelay.Pipeline"),
        ("loud.py:pipelin", "has no 'pipelin'; did you mean 'pipeline'"),
        ("loud.py:a b", "'a b' is no Python name; write module.py:name"),
        ("loud.py:", "'' is no Python name"),
        ("loud.py", "name the Pipeline in it: loud.py:NAME"),
        ("none.py:pipeline", "there is no file"),
        ("broken.py:pipeline", r"'broken.py:pipeline': importing it raised ZeroDivisionError: .*broken.py:1"),
        ("wrong.py:pipeline", "pipeline 'p': stage 'a': use is missing"),
    ],
)
def test_module_refused(module: Path, name: str, says: str) -> None:
    """A module without that pipeline is refused with the reason."""
    (module.parent / "broken.py").write_text("1 / 0\n")
    (module.parent / "wrong.py").write_text(
        "from torchrelay import *\npipeline = Pipeline('p', stages=[StageSpec('a')])\n"
    )
    with pytest.raises(ConfigError, match=says):
        Pipeline.load(f"{module.parent}/{name}")


def run_script(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(textwrap.dedent(text))
    command = [sys.executable, "script.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def test_script(folder: Path) -> None:
    """A script's files are looked for beside it; a stage class of its own is refused with advice."""
    script = """
        from torchrelay import Pipeline, Stage, StageSpec, errors
        import s
        class Mine(Stage):
            pass
        print(Pipeline("p", stages=[StageSpec("a", use=s.Stage)]).spec.stages[0].use)
        try:
            Pipeline("p", stages=[StageSpec("a", use=Mine)])
        except errors.ConfigError as error:
            print(error)
    """
    done = run_script(script, folder)
    assert done.stdout.splitlines() == [
        "s.py:Stage",
        "pipeline 'p': stage 'a': use: Mine is of this script, notebook or prompt; "
        "put it into a file or module of its own, and give that: workers import stages anew",
    ], done.stderr


def test_prompt(folder: Path) -> None:
    """Where the caller has no file, as in a notebook, files are looked for in the current folder."""
    text = "from torchrelay import *; print(Pipeline('p', stages=[StageSpec('a', use='s.py:Stage')]).base_dir)"
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"{folder}\n"


class Colour(enum.StrEnum):
    """A text with a name."""

    RED = "red"


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(PLAIN)
def test_plain(value: Any) -> None:
    """Plain values come out as they went in, as values of their own."""
    copy = plain({"x": value}, "args")["x"]
    assert copy == value
    assert type(copy) is type(value)
    if isinstance(value, list | dict):
        assert copy is not value


def test_plain_kinds() -> None:
    """Numbers of numpy, tuples, paths and texts of an Enum become what a file would hold."""
    given_ = {"n": np.float32(0.5), "t": (1, (2,)), "p": Path("a/b"), "c": Colour.RED, "b": np.True_}
    got = plain(given_, "args")
    assert got == {"n": 0.5, "t": [1, [2]], "p": "a/b", "c": "red", "b": True}
    assert [type(v) for v in got.values()] == [float, list, str, str, bool]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"x": object()}, "stage 'a': args.x: object is no plain value; give text, numbers"),
        ({"x": [1, {2}]}, r"stage 'a': args.x\[1\]: set is no plain value"),
        ({"x": {"y": np.zeros(2)}}, "stage 'a': args.x.y: ndarray is no plain value"),
        ({1: 2}, "stage 'a': args: its key 1 is no text"),
        ({"x": b"bytes"}, "bytes is no plain value"),
    ],
)
def test_not_plain(args: Any, says: str) -> None:
    """What no file could hold is refused where it stands."""
    with pytest.raises(ConfigError, match=says):
        StageSpec("a", use="s.py:Stage", args=args)
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ConfigError, match="nested too deeply, or in itself"):
        StageSpec("a", use="s.py:Stage", args={"x": endless})
