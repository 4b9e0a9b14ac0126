"""What users install and import: the wheel is the whole tree, the public names are what they are said to be, and a
producer needs no torch."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

import torchrelay

ROOT = Path(__file__).parent.parent
ROOMS = ("config", "coordinator", "queues", "producer", "stages", "workers")
PUBLIC = {
    "AsyncJobFuture",
    "AsyncRelay",
    "Batch",
    "Expand",
    "JobFuture",
    "Pipeline",
    "Priority",
    "Relay",
    "Stage",
    "StageContext",
    "StageSpec",
    "TorchStage",
    "__version__",
    "cutting",
    "errors",
    "testing",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> set[str]:
    """The names in a wheel, built from a copy so that no build folder is left in the tree."""
    copy = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        source, target = ROOT / name, copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
        elif source.is_file():
            target.write_bytes(source.read_bytes())
    # Without isolation nothing is fetched; where setuptools is missing, pip fetches it.
    flags = ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *flags, "-w", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return set(zipfile.ZipFile(built).namelist())


def _run(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_wheel_holds_every_module_of_the_tree_and_nothing_else(wheel):
    """Every .py of every room, every Lua script and py.typed are in the wheel; tests, examples and docs are not."""
    expected = {f"torchrelay/{p.name}" for p in (ROOT / "src/torchrelay").glob("*.py")} | {"torchrelay/py.typed"}
    expected |= {f"torchrelay/testing/{p.name}" for p in (ROOT / "src/torchrelay/testing").glob("*.py")}
    for room in ROOMS:
        found = [p for pattern in ("*.py", "*.lua") for p in (ROOT / room).rglob(pattern)]
        expected |= {f"torchrelay/{room}/{p.relative_to(ROOT / room)}" for p in found}
    packed = {n for n in wheel if ".dist-info/" not in n}
    assert expected == packed


def test_every_room_of_the_tree_is_known_to_this_test():
    """A folder linked into src/torchrelay is a room; a new one must be listed for the wheel as well."""
    linked = {p.name for p in (ROOT / "src/torchrelay").iterdir() if p.is_symlink()}
    assert set(ROOMS) == linked


def test_the_public_names_are_these():
    """A name is public when it is in `__all__`, and only then."""
    assert set(torchrelay.__all__) == PUBLIC
    assert set(dir(torchrelay)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_resolves_and_is_documented(name):
    """Each public name can be imported, and what can have a docstring has one."""
    value = getattr(torchrelay, name)
    assert isinstance(value, str) or (value.__doc__ or "").strip()


def test_every_error_is_listed_and_stands_in_the_one_tree():
    """`errors.__all__` is every class of the module, each a TorchrelayError with a docstring."""
    classes = {n: c for n, c in vars(torchrelay.errors).items() if isinstance(c, type)}
    assert set(classes) == set(torchrelay.errors.__all__)
    for cls in classes.values():
        assert issubclass(cls, torchrelay.errors.TorchrelayError)
        assert cls.__doc__


def test_an_unknown_name_is_an_attribute_error_that_names_it():
    """`torchrelay.Relai` fails as any module's missing attribute does."""
    with pytest.raises(AttributeError, match="'torchrelay' has no attribute 'Relai'"):
        torchrelay.Relai


BLOCK_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoTorch())
"""


def test_a_producer_works_where_torch_is_not_installed(server_url, namespace):
    """Relay, Pipeline and Stage work without torch, up to a round trip to the server."""
    done = _run(
        BLOCK_TORCH
        + textwrap.dedent(f"""
        import torchrelay
        from torchrelay import Batch, JobFuture, Pipeline, Priority, Relay, Stage, StageContext, errors
        with Relay({server_url!r}, namespace={namespace!r}) as relay:
            try:
                relay.submit("nobody", {{"text": "hi"}})
            except errors.PipelineNotFound:
                print("answered")
        """)
    )
    assert (done.returncode, done.stdout) == (0, "answered\n"), done.stderr


@pytest.mark.parametrize("name", ["TorchStage", "cutting"])
def test_what_needs_torch_is_a_named_error_without_it(name):
    """Where torch is missing, TorchStage and the helpers that cut models say what to install."""
    done = _run(
        BLOCK_TORCH
        + textwrap.dedent(f"""
        from torchrelay import errors
        try:
            from torchrelay import {name}
        except errors.ConfigError as error:
            print(error)
        """)
    )
    assert done.stdout == 'torch is missing: pip install "torchrelay[worker]"\n', done.stderr


def test_a_producer_does_not_import_torch_where_it_is_installed():
    """Importing every public name but TorchStage, and making a Relay, leaves torch unimported."""
    done = _run("""
        import sys
        from torchrelay import Batch, JobFuture, Pipeline, Priority, Relay, Stage, StageContext, errors
        import torchrelay.cli
        Relay("redis://localhost:6379/0")
        print(sorted({m.partition(".")[0] for m in sys.modules} & {"torch", "safetensors", "transformers"}))
    """)
    assert done.stdout == "[]\n", done.stderr


def test_importing_torchrelay_alone_imports_no_third_party_module():
    """Public names are imported at their first use, so that a small process stays small."""
    done = _run("""
        import sys
        import torchrelay
        heavy = {"redis", "numpy", "pydantic", "yaml", "msgpack", "typer"}
        print(sorted({m.partition(".")[0] for m in sys.modules} & heavy))
    """)
    assert done.stdout == "[]\n", done.stderr
