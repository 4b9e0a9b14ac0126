"""The version: what changes results changes it, tuning and defaults do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.conftest import Load
from torchrelay.errors import ConfigError

BASE = """pipeline: p
input: {x: "int64[*]"}
stages:
  - name: a
    use: s.py:Stage
"""


@pytest.mark.parametrize(
    "line",
    [
        "batch: {max_rows: 7, max_wait_ms: 3}",
        "batch: {max_cost: {column: x, total: 100}}",
        "batch: {ahead: 2, in_flight_rows: 64, row_buckets: [8, 32]}",
        "torch: {cuda_graphs: false}",
        "replicas: {min: 2, max: 3}",
        "retry: {attempts: 9, backoff_s: [1, 2]}",
        "timeout_s: 5",
        "queue: {max_rows: 5, max_bytes: 1GiB}",
        "device: gpu",
        "rows: same",
        "args: {}",
        "outputs: {}",
        "torch: {channels_last: false}",
        "wire: {}",
        "wire: {dtype: null, compress: null}",
        "# a comment",
    ],
)
def test_tuning(load: Load, line: str) -> None:
    """Tuning, and what is at its default, keeps the version."""
    assert load(BASE + f"    {line}\n").version == load(BASE).version


@pytest.mark.parametrize("limits", ["limits: {}", "limits: {rows_per_job: 5}"])
def test_limits(load: Load, limits: str) -> None:
    """How large a job may grow is tuning."""
    assert load(BASE + limits + "\n").version == load(BASE).version


def test_buckets(load: Load) -> None:
    """Padding further than to the longest row is tuning: what is padded is masked."""
    padded = BASE + "    batch: {pad: {x: 0}"
    assert load(padded + ", buckets: {x: [8, 16]}}\n").version == load(padded + "}\n").version


def test_kept(load: Load, folder: Path) -> None:
    """A file of an older torchrelay has the version that it had there."""
    (folder / "s.py").write_text("class Stage: pass\n")
    (folder / "w.bin").write_bytes(b"1")
    text = """pipeline: p
input: {x: "int64[*]"}
output: [y]
stages:
  - {name: a, use: "s.py:Stage", after: input, inputs: [x], outputs: {y: str}, args: {size: 2}, weights: w.bin,
     torch: {dtype: float16}}
  - {name: b, use: "s.py:Stage", after: a, inputs: {z: a.y}, batch: {pad: {}}}
"""
    assert load(text).version == "f6fef683"


def test_rows(load: Load) -> None:
    """How rows change, and which skip, are part of the version."""
    head = 'pipeline: p\ninput: {x: str}\noutput: [x]\nstages:\n  - {name: a, use: "s.py:Stage", outputs: {y: "str?"}'
    tails = [
        "}\n",
        ", rows: expand}\n",
        ", when: x}\n",
        ", when: input.x}\n",
        ", rows: expand}\n  - {name: b, rows: {collapse: a}}\n",
        ', rows: expand}\n  - {name: b, use: "s.py:Stage", outputs: {z: str}, rows: {collapse: a}}\n',
        ', rows: expand}\n  - {name: b, use: "s.py:Stage", outputs: {z: str}}\n',
    ]
    assert len({load(head + t).version for t in tails}) == len(tails)


def test_results(load: Load, folder: Path) -> None:
    """Everything that changes results gives a version of its own."""
    (folder / "w.bin").write_bytes(b"1")
    texts = [
        BASE,
        BASE.replace("pipeline: p", "pipeline: q"),
        BASE.replace("int64", "int32"),
        BASE.replace("name: a", "name: b"),
        BASE.replace(":Stage", ":plain"),
        BASE + "output: [x]\n",
        *(
            BASE + f"    {line}\n"
            for line in [
                "inputs: []",
                "inputs: [x]",
                "outputs: {y: str}",
                "args: {size: 2}",
                "args: {size: 3}",
                "torch: {dtype: float16}",
                "wire: {dtype: float16}",
                "wire: {dtype: bfloat16}",
                "wire: {compress: lz4}",
                "wire: {dtype: float16, compress: lz4}",
                "torch: {cuda_graphs: true}",
                "batch: {pad: {x: 0}}",
                "batch: {pad: {x: 1}}",
                "weights: w.bin",
            ]
        ),
    ]
    versions = [load(t).version for t in texts]
    assert len(set(versions)) == len(texts)
    (folder / "w.bin").write_bytes(b"2")
    assert load(texts[-1]).version != versions[-1]
    (folder / "s.py").write_text("class Stage: pass")
    assert load(BASE).version != versions[0]


def test_weights_in_several_files(load: Load, folder: Path) -> None:
    """What an index names counts like the index; one that names nothing is refused."""
    index, text = folder / "m.safetensors.index.json", BASE + "    weights: m.safetensors.index.json\n"
    index.write_text('{"weight_map": {"a": "m-1.safetensors"}}')
    (folder / "m-1.safetensors").write_bytes(b"1")
    before = load(text).version
    assert load(text).version == before
    (folder / "m-1.safetensors").write_bytes(b"2")
    assert load(text).version != before
    for wrong in ("[]", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../m"}}', '{"weight_map": {"a": "gone"}}'):
        index.write_text(wrong)
        with pytest.raises(ConfigError, match=r"weight_map|beside it|cannot be read"):
            load(text)


def test_stable(load: Load) -> None:
    """The order of keys and arguments does not count."""
    one = load(BASE + "    args: {size: 1, rate: 2}\n").version
    assert load(BASE + "    args: {rate: 2, size: 1}\n").version == one
