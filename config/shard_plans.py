"""The words of a tensor-parallel plan: what a file may say of how a stage's modules are cut."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["PLANS", "STYLES", "Plan", "Style", "check_plan", "parse_style"]

Plan = str | Mapping[str, str] | None

STYLES = {
    "column": "a Linear cut by its outputs, which stay apart",
    "column_gather": "a Linear cut by its outputs, which are then put together on every rank",
    "row": "a Linear cut by its inputs; what the ranks make of theirs is summed",
    "embedding": "an Embedding cut by its vocabulary",
    "whole": "left whole on every rank",
    "divide": "a whole-number attribute of a module, such as its count of heads, divided by the number of shards",
}
PLANS = {
    "auto": "every block that is known by its modules' names and sizes",
    "llama": "q_proj k_proj v_proj o_proj, gate_proj up_proj down_proj, embed_tokens, lm_head",
    "bert": "self.query self.key self.value output.dense, intermediate.dense output.dense, word_embeddings",
    "vit": "attention.query or q_proj and their like, fc1 fc2 or intermediate.dense output.dense",
    "mlp": "pairs of Linear in a Sequential, or fc1 fc2",
    "own": "nothing: `build` makes each rank's own part, and its forward calls the collectives",
}
_BLOCKS = re.compile(r"(column|column_gather):([2-9]|[1-5][0-9]|6[0-4])")


@dataclass(frozen=True, slots=True)
class Style:
    """How one module is cut; a `column` consists of so many `blocks`, one above the other, each cut by itself."""

    kind: str
    blocks: int = 1


def parse_style(text: str) -> Style:
    """`column`, or `column:3` for queries, keys and values in one Linear; raises ValueError with what is possible."""
    if text in STYLES:
        return Style(text)
    found = _BLOCKS.fullmatch(text)
    if found is None:
        near = difflib.get_close_matches(text, STYLES, 1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"style {text!r:.80} must be one of {', '.join(STYLES)}, or column:BLOCKS{meant}")
    return Style(found[1], int(found[2]))


def check_plan(plan: Plan) -> None:
    """Raises ValueError for a name that is no plan's, a style that is none, and patterns that name nothing."""
    if isinstance(plan, str) and plan not in PLANS:
        near = difflib.get_close_matches(plan, PLANS, 1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"plan {plan!r:.80} must be one of {', '.join(PLANS)}, or {{PATTERN: STYLE}}{meant}")
    for pattern, style in {} if plan is None or isinstance(plan, str) else plan.items():
        try:
            parse_style(style)
        except ValueError as error:
            raise ValueError(f"{pattern!r:.120}: {error}") from error
        if not all(pattern.split(".")):
            raise ValueError(f"pattern {pattern!r:.120} has an empty name; write names with a dot between, * and **")
