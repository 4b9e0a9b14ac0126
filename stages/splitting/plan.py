"""Where a model is cut: a value that is made once, kept as text, and obeyed by every part."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

from torchrelay.errors import DecodeError
from torchrelay.stages.splitting.calls import Call
from torchrelay.stages.splitting.modules import Form

__all__ = ["Part", "SplitPlan"]


@dataclass(frozen=True, slots=True)
class Part:
    """One part, as measured when the plan was made.

    `first` and `last` name modules of the model; `seconds` is of one batch; `parameters` counts numbers, `weight_bytes`
    their bytes and those of buffers; `crossing_bytes` go to the next part for each row, 0 from the last one.
    """

    first: str
    last: str
    seconds: float
    parameters: int
    weight_bytes: int
    crossing_bytes: int


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """A model in parts.

    Args:
        how: whether the traced graph is cut between operations, or a chain of modules between modules.
        why: for modules, why the model was not traced.
        call: how `forward` calls the model.
        digest: of what is cut; a worker that finds another has other code or another torch.
        cuts: before which operation or module each part but the first begins, rising.
        parts: one more than cuts.
        form: of the chain of modules; None for a graph.
    """

    how: Literal["graph", "modules"]
    why: str
    call: Call
    digest: str
    cuts: tuple[int, ...]
    parts: tuple[Part, ...]
    form: Form | None = None

    @property
    def count(self) -> int:
        """How many parts."""
        return len(self.parts)

    def encode(self) -> str:
        """The plan as JSON."""
        plain: dict[str, Any] = {
            "form": 1,
            "how": self.how,
            "why": self.why,
            "call": self.call.plain(),
            "digest": self.digest,
        }
        if self.form is not None:
            plain["form_of_chain"] = {**asdict(self.form), "behind": sorted(self.form.behind)}
        return json.dumps({**plain, "cuts": self.cuts, "parts": [asdict(p) for p in self.parts]})

    @classmethod
    def decode(cls, text: str) -> SplitPlan:
        """The plan of such a text; raises DecodeError for any other."""
        try:
            plain: dict[str, Any] = json.loads(text)
            if plain["form"] != 1 or plain["how"] not in ("graph", "modules"):
                raise DecodeError(f"a split plan of form {plain['form']!r:.20}, which this version does not know")
            cuts, parts = tuple(map(int, plain["cuts"])), tuple(Part(**p) for p in plain["parts"])
            call, form = Call.from_plain(plain["call"]), _form(plain.get("form_of_chain"))
            plan = cls(plain["how"], plain["why"], call, plain["digest"], cuts, parts, form)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise DecodeError(f"no split plan: {type(error).__name__}: {error}", length=len(text)) from error
        if (plan.how == "graph") != (form is None):
            raise DecodeError("a split plan without the form of its chain", length=len(text))
        if len(parts) < 2 or len(cuts) != len(parts) - 1 or any(a >= b for a, b in pairwise((0, *cuts))):
            raise DecodeError(f"a split plan of {len(parts)} parts with cuts at {cuts!r:.80}", length=len(text))
        return plan


def _form(plain: dict[str, Any] | None) -> Form | None:
    if plain is None:
        return None
    return Form(tuple(plain["tuples"]), tuple(map(tuple, plain["leaves"])), frozenset(plain["behind"]))
