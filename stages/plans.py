"""Which modules of a model are cut, and how: from patterns of names, or from what its blocks look like.

Promise: what comes of it names modules that can be cut, and every pattern names one. Known blocks are cut only where
nothing of theirs lies between the cut layers that would need what other ranks have; any other is left whole.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from torchrelay.config.shard_plans import PLANS, Plan, Style, parse_style
from torchrelay.errors import StageLoadError
from torchrelay.stages.known_blocks import find_blocks, find_vocabularies

__all__ = ["Found", "find_plan"]

# They compute with their layers' weights themselves, and would not see that they are parts.
_CLOSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.RNNBase)
_SHOWN = 6


@dataclass(frozen=True, slots=True)
class Found:
    """Of each module, by name, how it is cut; and the attributes, as MODULE.ATTRIBUTE, that are divided."""

    modules: dict[str, Style]
    divided: list[str] = field(default_factory=list)


def find_plan(model: nn.Module, plan: Plan, count: int) -> Found:
    """What of a model is cut, and how.

    Args:
        plan: patterns of names with their styles; the name of a known plan; None is "auto".
        count: into how many parts.

    Raises:
        StageLoadError: nothing is known of the model, a pattern names nothing, or what cannot be cut so.
    """
    found = _by_pattern(model, plan, count) if isinstance(plan, Mapping) else _known(model, plan or "auto", count)
    kinds = {style.kind for style in found.modules.values()}
    if "column" in kinds and "row" not in kinds:
        first = next(name for name, style in found.modules.items() if style.kind == "column")
        raise StageLoadError(
            f"module {first!r} is cut by columns, and none by rows, so that the model would return a part of its "
            "outputs; write column_gather, or row for the layer that reads them"
        )
    return found


def _known(model: nn.Module, plan: str, count: int) -> Found:
    blocks = find_blocks(model, plan)
    if not blocks:
        other = next((name for name in PLANS if name not in (plan, "auto") and find_blocks(model, name)), None)
        meant = f"its blocks are those of the plan {other!r}" if other and plan != "auto" else "write a plan for it"
        raise StageLoadError(
            f"model {type(model).__name__} has no blocks of the plan {plan!r} ({PLANS[plan]}); {meant}: shards: "
            f"{{plan: {{PATTERN: STYLE}}}}, with its modules' names, such as {_some(_linears(model))}"
        )
    return Found(blocks | find_vocabularies(model, plan, count))


def _by_pattern(model: nn.Module, plan: Mapping[str, str], count: int) -> Found:
    modules = {name: m for name, m in model.named_modules(remove_duplicate=False) if name}
    chosen: dict[str, tuple[str, Style]] = {}
    divided: list[str] = []
    for pattern, text in plan.items():
        style = parse_style(text)
        if style.kind == "divide":
            divided += _attributes(modules, model, pattern, count)
            continue
        names = [name for name in modules if _matches(pattern, name)]
        if not names:
            raise StageLoadError(
                f"plan: {pattern!r} names no module of {type(model).__name__}{_near(pattern, modules)}"
            )
        for name in names:
            if style.kind != "whole":
                _must_be_cut(modules, name, style)
            chosen[name] = _stronger(name, chosen.get(name), (pattern, style))
    return Found({name: style for name, (_, style) in chosen.items() if style.kind != "whole"}, divided)


def _stronger(name: str, one: tuple[str, Style] | None, other: tuple[str, Style]) -> tuple[str, Style]:
    """A name without stars goes before patterns."""
    if one is None or one[1] == other[1] or ("*" in one[0] and "*" not in other[0]):
        return other
    if "*" in other[0] and "*" not in one[0]:
        return one
    raise StageLoadError(f"plan: {one[0]!r} and {other[0]!r} give {name!r} two styles; make one of them narrower")


def _matches(pattern: str, name: str) -> bool:
    """`*` stands for one name or a part of one, `**` for any number of them."""
    parts = []
    for part in pattern.split("."):
        text = re.escape(part).replace(r"\*", "[^.]*")
        parts.append(r"(?:[^.]+\.)*" if part == "**" else text + r"\.")
    return re.fullmatch("".join(parts), name + ".") is not None


def _must_be_cut(modules: Mapping[str, nn.Module], name: str, style: Style) -> None:
    module, wanted = modules[name], nn.Embedding if style.kind == "embedding" else nn.Linear
    for i in range(name.count(".")):
        around = name.rsplit(".", i + 1)[0]
        if isinstance(modules[around], _CLOSED):
            what = f"module {name!r} lies in {around!r}, a {type(modules[around]).__name__}, which computes with its"
            raise StageLoadError(f"{what} weights itself; leave it whole, or write it with Linear layers of its own")
    # A class derived from one may compute something else, which would be lost.
    if type(module) is not wanted:
        inner = [n for n, m in modules.items() if n.startswith(name + ".") and type(m) is wanted]
        within = f"; in it are {_some(inner)}" if inner else "; write another style for it, or whole"
        raise StageLoadError(
            f"plan: {name!r} is a {type(module).__name__}, and style {style.kind} is for nn.{wanted.__name__}{within}"
        )
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise StageLoadError(f"module {name!r} has max_norm, which changes its weights; leave it whole")


def _attributes(modules: Mapping[str, nn.Module], model: nn.Module, pattern: str, count: int) -> Iterator[str]:
    owner, _, attribute = pattern.rpartition(".")
    owners = {"": model} if not owner else {n: m for n, m in modules.items() if _matches(owner, n)}
    if not owners:
        raise StageLoadError(f"plan: {owner!r} names no module of {type(model).__name__}{_near(owner, modules)}")
    for name, module in owners.items():
        value = vars(module).get(attribute)
        if type(value) is not int:
            there = [a for a, v in vars(module).items() if type(v) is int and not a.startswith("_")]
            has = f"; whole numbers of it are {_some(there)}" if there else ""
            raise StageLoadError(f"plan: module {name!r} has no whole number {attribute!r} to divide{has}")
        if value % count:
            fits = ", ".join(str(n) for n in range(2, 65) if value % n == 0)
            remedy = f"choose a count of {fits}" if fits else "leave it whole"
            what = f"module {name!r}: its {attribute} of {value} does not divide by {count} shards"
            raise StageLoadError(f"{what}; {remedy}")
        yield f"{name}.{attribute}"


def _near(pattern: str, modules: Mapping[str, nn.Module]) -> str:
    """Names that may have been meant, with stars for numbers."""
    shown = {re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in modules}
    # A user may know the names without those of what the model lies in.
    last = pattern.rpartition(".")[2]
    same = sorted(name for name in shown if name.rpartition(".")[2] == last and last.strip("*"))
    near = same or difflib.get_close_matches(pattern, shown, 3, 0.5)
    return f"; did you mean {_some(near)}?" if near else f"; it has {_some(shown)}"


def _linears(model: nn.Module) -> list[str]:
    found = {re.sub(r"(?<![^.])\d+(?![^.])", "*", n) for n, m in model.named_modules() if type(m) is nn.Linear and n}
    return sorted(found) or sorted(name for name, _ in model.named_children())


def _some(names: object) -> str:
    ordered = sorted(names)  # type: ignore[call-overload]  # any iterable of names
    return ", ".join(map(repr, ordered[:_SHOWN])) + (" ..." if len(ordered) > _SHOWN else "")
