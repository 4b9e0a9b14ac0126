"""A split plan as text, and damaged ones."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from torchrelay.errors import DecodeError
from torchrelay.stages.splitting.calls import Call
from torchrelay.stages.splitting.modules import Form
from torchrelay.stages.splitting.plan import Part, SplitPlan

CALL = Call.of([(n, (torch.zeros(n, 4), None), {"k": [torch.zeros(n, n, dtype=torch.bool), "text"]}) for n in (5, 3)])
PARTS = tuple(Part(f"a.{i}", f"b.{i}", 0.25, 10, 40, 16 if i < 2 else 0) for i in range(3))
FORM = Form((0, 2, 0), ((0,), (0, 1), ()), frozenset("xy"))
GRAPH = SplitPlan("graph", "", CALL, "abc", (3, 8), PARTS)
CHAIN = SplitPlan(
    "modules", "it looks", CALL, "abc", (1, 2), PARTS, Form((0, 2, 0), ((0,), (0, 1), ()), frozenset("xy"))
)


@pytest.mark.parametrize("plan", [GRAPH, CHAIN], ids=["graph", "modules"])
def test_a_plan_comes_back(plan: SplitPlan) -> None:
    assert SplitPlan.decode(plan.encode()) == plan
    assert plan.count == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"form": 2}, "of form 2, which this version does not know"),
        ({"how": "guess"}, "which this version does not know"),
        ({"cuts": [3]}, r"of 3 parts with cuts at \(3,\)"),
        ({"cuts": [8, 3]}, r"of 3 parts with cuts at \(8, 3\)"),
        ({"cuts": [0, 3]}, r"of 3 parts with cuts at \(0, 3\)"),
        ({"cuts": [-1, 3]}, r"of 3 parts with cuts at \(-1, 3\)"),
        ({"cuts": [3, float("inf")]}, "no split plan: OverflowError"),
        ({"cuts": [3, "x"]}, "no split plan"),
        ({"parts": [{"first": "a"}]}, "no split plan"),
        ({"how": "modules"}, "without the form of its chain"),
        ({"call": {"spec": "", "leaves": [{"dtype": "int65", "shape": [], "varies": [], "rows": True}]}}, "no dtype"),
        ({"call": {"spec": 5}}, "no split plan"),
    ],
)
def test_another_text_is_no_plan(change: dict[str, Any], says: str) -> None:
    with pytest.raises(DecodeError, match=says):
        SplitPlan.decode(json.dumps({**json.loads(GRAPH.encode()), **change}))


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "[" * 100_000, GRAPH.encode()[:-9]])
def test_what_is_no_json_object_is_no_plan(text: str) -> None:
    with pytest.raises(DecodeError, match="no split plan"):
        SplitPlan.decode(text)
