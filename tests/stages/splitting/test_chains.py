"""What parts keep of a model and its call, and models that cannot be cut without another result."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.stages.splitting.parts import Parts, assert_as_whole, cut
from torchrelay.config.shards import SIZES
from torchrelay.errors import DecodeError, StageLoadError

X, Y = {"x": "float32[4]"}, {"y": "float32[4]"}
BATCH = {"x": np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)}


@pytest.mark.parametrize("use", ["Total", "All"])
def test_code_that_keeps_what_modules_returned_is_refused(tmp_path: Path, use: str) -> None:
    """A later part does not have it, and would return something else without a word."""
    with pytest.raises(
        StageLoadError, match=r"between too few modules of layers can it be cut for 2 parts: code around"
    ):
        Parts(cut(tmp_path, use, X, Y))


def test_modules_that_return_nothing_are_no_chain(tmp_path: Path) -> None:
    with pytest.raises(StageLoadError, match="a module of layers returns nothing"):
        Parts(cut(tmp_path, "Halves", X, Y))


def test_a_chain_is_cut_where_nothing_is_kept(tmp_path: Path) -> None:
    """Behind a skip connection, though its parts are less even then. Damaged rows say so."""
    parts = Parts(cut(tmp_path, "Skip", X, Y, parts=3))
    assert_as_whole(parts, BATCH)
    damaged = {**parts.first(BATCH)[0], SIZES: np.zeros((3, 2), np.int64)}
    with pytest.raises(DecodeError, match="damaged: 0 tensors with 0 sizes, and 2 with 0 cross here"):
        parts.rest([damaged])
    with pytest.raises(StageLoadError, match="can it be cut for 4 parts"):
        Parts(cut(tmp_path, "Skip", X, Y, parts=4))


def test_an_argument_that_is_as_long_as_the_batch_by_chance_has_not_its_rows(tmp_path: Path) -> None:
    """Measured with 16 rows of 16 values. The model counts its own calls, which is no reason not to cut it."""
    shape = {"x": "float32[*, 4]"}
    pipeline = cut(tmp_path, "Placed", shape, {"y": "float32[*, 4]"}, batch={"max_rows": 16, "pad": {"x": 0}})
    rows = [np.full((5, 4), i, np.float32) for i in range(3)]
    assert_as_whole(Parts(pipeline), {"x": rows})


def test_autocast_round_the_model_is_refused_and_within_it_is_kept(tmp_path: Path) -> None:
    """Parts behind the first do not see what forward sets around its call."""
    with pytest.raises(StageLoadError, match=r"calls the model under torch\.autocast"):
        Parts(cut(tmp_path, "Cast", X, Y))
    parts = Parts(cut(tmp_path, "Inner", X, Y, parts=3))
    assert_as_whole(parts, BATCH, {"x": BATCH["x"][:1]})


def test_a_build_that_raises_is_told_with_the_stage(tmp_path: Path) -> None:
    with pytest.raises(StageLoadError, match="stage 'model' cannot be split: ValueError: no such model"):
        Parts(cut(tmp_path, "Broken", X, Y))


@pytest.mark.parametrize(
    ("use", "change", "says"),
    [
        ("Stage", {"digest": "0" * 16}, "stage 'model.0': the graph of its model is another than when it was split"),
        ("Skip", {"digest": "0" * 16}, "the chain of modules of its model is another than when it was split"),
        ("Stage", {"cuts": [10_000]}, "its kept split plan cuts where this worker's torch cannot"),
        ("Skip", {"cuts": [10_000]}, "its kept split plan cuts where its chain of modules has ended"),
        ("Stage", {"form": 9}, "stage 'model': its kept split plan cannot be read: .*of form 9"),
    ],
)
def test_a_kept_plan_of_another_model_is_refused(
    tmp_path: Path, use: str, change: dict[str, object], says: str
) -> None:
    """Workers with other code or another torch do not compute parts that do not fit together."""
    with pytest.raises(StageLoadError, match=says):
        Parts(cut(tmp_path, use, X, Y), lambda text: json.dumps({**json.loads(text), **change}))
