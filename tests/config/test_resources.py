"""`resources` and `hosts` of a stage: what they may hold, and that they are tuning."""

from __future__ import annotations

import pytest

from tests.config.conftest import Load, Problems
from torchrelay.config.pipeline import Pipeline
from torchrelay.config.spec import HostsSpec, ResourcesSpec
from torchrelay.config.stage_spec import StageSpec

HEAD = "pipeline: p\nstages:\n"


def stage(name: str, **keys: str) -> str:
    options = "".join(f", {k}: {v}" for k, v in keys.items())
    return f"  - {{name: {name}, use: 's.py:Stage'{options}}}\n"


def test_all_keys_are_read(load: Load) -> None:
    """Sizes with their units; labels alone, or with `apart`."""
    text = HEAD + stage("a", device="gpu", resources="{compute: 0.5, memory: 2GiB, cpus: 2, host_memory: 4GiB}")
    a, b, c = load(
        text + stage("b", hosts="[fast, 'zone=1']") + stage("c", hosts="{labels: fast, apart: [a]}")
    ).spec.stages
    assert a.resources == ResourcesSpec(compute=0.5, memory=2 << 30, cpus=2.0, host_memory=4 << 30)
    assert (b.hosts, b.apart) == (HostsSpec(labels=["fast", "zone=1"]), frozenset())
    assert (c.hosts.labels, c.apart) == (["fast"], {"a"})


def test_apart_true_means_its_own_replicas(load: Load) -> None:
    assert load(HEAD + stage("a", hosts="{apart: true}")).spec.stages[0].apart == {"a"}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"device": "gpu", "resources": "{compute: 1.5}"}, "resources.compute: Input should be less than"),
        ({"device": "gpu", "resources": "{compute: 0}"}, "resources.compute: Input should be greater than 0"),
        ({"device": "gpu", "resources": "{memory: lots}"}, "resources.memory: 'lots' is no size"),
        ({"resources": "{cpus: -1}"}, "resources.cpus: Input should be greater than or equal to 0"),
        ({"resources": "{cpu: 1}"}, "unknown key 'cpu'; did you mean 'cpus'?"),
        ({"resources": "2"}, "resources: a mapping of keys to values is expected (2 came)"),
        ({"resources": "{compute: 0.5}"}, "resources.compute is a GPU's, and the stage "
         "runs on device: cpu; write device: gpu, or cpus"),
        ({"resources": "{memory: 1GiB}"}, "resources.memory is a GPU's, and the stage "
         "runs on device: cpu; write device: gpu, or host_memory"),
        ({"hosts": "['a b']"}, "a label is letters, digits and _.=:/-, at most 64; 'a b' came"),
        ({"hosts": "{apart: 3}"}, "hosts.apart: write true, or the names of stages; 3 came"),
        ({"hosts": "{apart: [second]}"}, "hosts.apart names the unknown stage 'second'; stages are first"),
        ({"hosts": "{apart: [frist]}"}, "hosts.apart names the unknown stage 'frist'; did you mean 'first'?"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_reported_with_its_place(problems: Problems, keys: dict[str, str], expected: str) -> None:
    (problem,) = problems(HEAD + stage("first", **keys))
    assert expected in problem
    assert problem.startswith("3:")


def test_fused_stages_are_never_apart(problems: Problems) -> None:
    text = "pipeline: p\ninput: {x: int64}\nstages:\n" + stage("a", outputs="{x: int64}")
    text += stage("b", outputs="{x: int64}", hosts="{apart: [a]}") + "fuse: [[a, b]]\n"
    (problem,) = problems(text)
    assert problem.endswith(
        "stage 'b': hosts.apart names 'a', and `fuse` puts both into one worker; take one of them out"
    )


def test_they_are_tuning(load: Load) -> None:
    """The version stays, in a file, by --set and in Python; and the registry's record holds them."""
    plain = load(HEAD + stage("a", device="gpu"))
    tuned = load(
        HEAD + stage("a", device="gpu", resources="{memory: 2GiB}", hosts="[fast]"), {"a.resources.compute": "0.5"}
    )
    assert tuned.version == plain.version
    spec = StageSpec("a", use="s.py:Stage", device="gpu", resources={"memory": "2GiB", "compute": 0.5}, hosts=["fast"])
    in_python = Pipeline("p", stages=[spec], base_dir=tuned.base_dir)
    assert in_python.version == plain.version
    assert in_python.spec == tuned.spec == Pipeline.from_record(tuned.record()).spec
