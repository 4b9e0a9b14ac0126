"""Stages whose model is cut (`shards`): what may be cut, and the stages that a cut stage becomes.

`gather`: N stages that each get the same input, and one that combines what they return. `pipeline`: N stages one behind
the other, of which each owns a part of the model. `tensor`: one stage still, whose worker is a group of processes.

The stages that come of it are ordinary ones to all that follows: they are placed, scaled and shown like any other. They
are called `STAGE.0`, `STAGE.1` ... and `STAGE.combine`; what a file says of STAGE behind it means the last of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, cast

from torchrelay.config.flow import Report
from torchrelay.config.spec import (
    MAX_STAGES,
    BatchSpec,
    CollapseSpec,
    HostsSpec,
    PipelineSpec,
    ResourcesSpec,
    StageConfig,
    TorchSpec,
    WireSpec,
)
from torchrelay.config.types import ColumnType, parse_type

__all__ = [
    "COMBINE",
    "PADDED",
    "SIZES",
    "STATE",
    "PartConfig",
    "check_shards",
    "combining",
    "parts_of",
    "shard_of",
    "spread",
    "written_names",
    "written_place",
]

STATE, SIZES, PADDED = "%state", "%sizes", "%padded"
"""What goes from a part of a model to the next: of each row the bytes of its tensors, the sizes that their shapes
depend on, and, from the first part to the last, to which sizes its columns were padded."""
BETWEEN: dict[str, str] = {STATE: "uint8[*]", SIZES: "int64[*]", PADDED: "int64[*]"}
COMBINE = "combine"
_COMBINER = "torchrelay.stages.combine:Combine"


class PartConfig(StageConfig):
    """One of the stages that a cut stage becomes.

    `of` is the stage as it is written, number `place` of its pipeline. `shard` of `count` is the part of the model; the
    stage that combines has the number `count`.
    """

    of: str
    place: int
    shard: int
    count: int

    @property
    def combines(self) -> bool:
        """Whether it owns no part of the model, and combines what the shards return."""
        return self.shard == self.count

    @property
    def cut(self) -> Literal["gather", "pipeline"]:
        """How the stage was cut."""
        return "gather" if self.shards is None or self.shards.mode == "gather" else "pipeline"


def spreads(stage: StageConfig) -> bool:
    """Whether it becomes several stages."""
    return stage.shards is not None and stage.shards.mode != "tensor" and not isinstance(stage, PartConfig)


def shard_of(stage: StageConfig) -> tuple[int, int]:
    """Which part of its model a worker of the stage builds, and of how many. Parts of a `pipeline` are cut out of the
    whole, and who combines owns none: 0 of 1."""
    if isinstance(stage, PartConfig) and stage.cut == "gather" and not stage.combines:
        return stage.shard, stage.count
    return 0, 1


def parts_of(spec: PipelineSpec, name: str) -> list[str]:
    """The stages of a spread spec that this name means: itself, or all that the cut stage of this name became."""
    mine = [s.name for s in spec.stages if isinstance(s, PartConfig) and s.of == name]
    return mine or [s.name for s in spec.stages if s.name == name]


def written_names(spec: PipelineSpec, names: Iterable[str]) -> list[str]:
    """The same stages in fewer words: where all parts of a cut stage are among them, its name stands for them."""
    found = list(dict.fromkeys(names))
    for of in dict.fromkeys(s.of for s in spec.stages if isinstance(s, PartConfig)):
        parts = parts_of(spec, of)
        if set(parts) <= set(found):
            first = min(map(found.index, parts))
            found = [*found[:first], of, *(name for name in found[first:] if name not in parts)]
    return found


def written_place(spec: PipelineSpec, index: int) -> int:
    """Where stage number `index` (from 0) of a spread spec stands in the file."""
    stage = spec.stages[index]
    if isinstance(stage, PartConfig):
        return stage.place
    return (
        index
        - sum(isinstance(s, PartConfig) for s in spec.stages[:index])
        + len({s.place for s in spec.stages[:index] if isinstance(s, PartConfig)})
    )


def spread(spec: PipelineSpec) -> PipelineSpec:
    """The same with every cut stage as the stages that it becomes. Takes what `check_shards` passed."""
    if not any(spreads(s) for s in spec.stages):
        return spec
    explicit = any(s.after is not None for s in spec.stages)
    found: list[StageConfig] = []
    for place, stage in enumerate(spec.stages):
        before = stage.after if explicit else [spec.stages[place - 1].name if place else "input"]
        lasting = stage.model_copy(update={"after": before})
        if explicit:
            followed = any(stage.name in (s.after or ()) for s in spec.stages)
        else:
            followed = stage is not spec.stages[-1]
        found += _parts(lasting, place, followed) if spreads(stage) else [lasting]
    parts: dict[str, list[str]] = {}
    for part in found:
        if isinstance(part, PartConfig):
            parts.setdefault(part.of, []).append(part.name)
    return spec.model_copy(update={"stages": [_renamed(s, parts) for s in found]})


def _parts(stage: StageConfig, place: int, followed: bool) -> list[StageConfig]:
    """`followed`: whether a stage comes behind it."""
    assert stage.shards is not None  # `spreads` said so
    if stage.shards.mode == "gather":
        return list(_gathered(stage, place, stage.shards.count))
    return list(_pipelined(stage, place, stage.shards.count, followed))


def _part(stage: StageConfig, place: int, shard: int, **changes: object) -> PartConfig:
    count = stage.shards.count if stage.shards is not None else 1
    name = f"{stage.name}.{COMBINE if shard == count else shard}"
    # Not validated again: the names of parts and of what goes between them are none that a file could give.
    values = dict(stage) | {"name": name} | changes
    return PartConfig.model_construct(**values, of=stage.name, place=place, shard=shard, count=count)


def _gathered(stage: StageConfig, place: int, count: int) -> Iterator[StageConfig]:
    whole = {column: parse_type(text) for column, text in stage.outputs.items()}
    rules = combining(stage)
    cut = {column: str(_cut(kind, rules[column], count)) for column, kind in whole.items()}
    near = WireSpec(compress=stage.wire.compress)
    for shard in range(count):
        yield _part(stage, place, shard, outputs=cut, wire=near)
    yield _part(
        stage,
        place,
        count,
        use=_COMBINER,
        after=[f"{stage.name}.{shard}" for shard in range(count)],
        inputs={f"{c}:{i}": f"{stage.name}.{i}.{c}" for c in whole for i in range(count)},
        args={"stage": stage.name, "shards": count, "rules": rules},
        weights=None,
        torch=TorchSpec(),
        device="cpu",
        batch=BatchSpec(max_rows=stage.batch.max_rows),
        resources=ResourcesSpec(),
        handoff="host",
        shards=None,
    )


def combining(stage: StageConfig) -> dict[str, int | None]:
    """Of each column that a gathered stage returns: the dimension, of a row's value, along which it is concatenated;
    None where it is summed."""
    rules = stage.shards.combine if stage.shards is not None else {}
    found: dict[str, int | None] = {}
    for column in stage.outputs:
        rule = rules.get(column, {"concat": -1})
        found[column] = None if rule == "sum" else cast(Mapping[str, int], rule)["concat"]
    return found


def _cut(kind: ColumnType, dim: int | None, count: int) -> ColumnType:
    """What a shard returns of a column of this type."""
    if dim is None:
        return kind
    shape = list(kind.shape)
    size = shape[dim]
    shape[dim] = size // count if isinstance(size, int) else None
    return replace(kind, shape=tuple(shape))


def _pipelined(stage: StageConfig, place: int, count: int, followed: bool) -> Iterator[StageConfig]:
    last = count - 1
    # What goes between the parts are bytes, which are not narrowed, and can be left on a device; `wire.dtype` and
    # `rows` are of what the last part returns, and may forbid it there.
    near = WireSpec(compress=stage.wire.compress)
    stays = followed and stage.rows == "same" and stage.wire.dtype is None
    for shard in range(count):
        changes: dict[str, object] = {}
        if shard:
            changes["after"] = [f"{stage.name}.{shard - 1}"]
            came = {STATE: STATE, SIZES: SIZES}
            changes["inputs"] = came if shard < last else _inputs(stage, {**came, PADDED: PADDED})
            pad = {STATE: 0, SIZES: 0, PADDED: 0} if shard == last else {STATE: 0, SIZES: 0}
            rules = stage.batch if shard == last else _rates(stage.batch)
            changes["batch"] = rules.model_copy(update={"pad": {**rules.pad, **pad}})
        if shard < last:
            changes |= {"outputs": _between(shard), "rows": "same", "wire": near}
        elif not stays:
            changes["handoff"] = "host"
        yield _part(stage, place, shard, **changes)


def _between(shard: int) -> dict[str, str]:
    return {c: kind for c, kind in BETWEEN.items() if c != PADDED or shard == 0}


def _inputs(stage: StageConfig, more: Mapping[str, str]) -> dict[str, str] | None:
    if stage.inputs is None:
        return None
    mine = stage.inputs if isinstance(stage.inputs, dict) else {c: c for c in stage.inputs}
    return {**mine, **more}


def _rates(batch: BatchSpec) -> BatchSpec:
    """Without what it says of columns."""
    return batch.model_copy(update={"pad": {}, "buckets": {}, "max_cost": None})


def _renamed(stage: StageConfig, parts: Mapping[str, Sequence[str]]) -> StageConfig:
    """With the last part of each cut stage where the file names the stage; with all, of those it must be apart from."""
    ends = {of: names[-1] for of, names in parts.items()}
    changes: dict[str, object] = {"after": [ends.get(name, name) for name in stage.after or ()]}
    if isinstance(stage.inputs, dict):
        changes["inputs"] = {local: _source(text, ends) for local, text in stage.inputs.items()}
    if stage.when is not None:
        changes["when"] = _source(stage.when, ends)
    if stage.collapses is not None:
        changes["rows"] = CollapseSpec(collapse=ends.get(stage.collapses, stage.collapses))
    if isinstance(stage.hosts.apart, list):
        apart = [name for other in stage.hosts.apart for name in _apart_from(stage, other, parts)]
        changes["hosts"] = HostsSpec(labels=stage.hosts.labels, apart=apart)
    return stage.model_copy(update=changes)


def _apart_from(stage: StageConfig, other: str, parts: Mapping[str, Sequence[str]]) -> Sequence[str]:
    """A stage that is apart from itself has each of its replicas on a host of its own, and those of a part too."""
    if isinstance(stage, PartConfig) and other == stage.of:
        return [stage.name]
    return parts.get(other, [other])


def _source(text: str, ends: Mapping[str, str]) -> str:
    stage, dot, column = text.rpartition(".")
    return f"{ends.get(stage, stage)}{dot}{column}"


def check_shards(spec: PipelineSpec, report: Report) -> None:
    """Reports every stage that cannot be cut as it says."""
    fused = {name for names in spec.fuse for name in names}
    for i, stage in enumerate(spec.stages):
        if stage.shards is None:
            continue
        for key, text in _problems(stage, stage.name in fused):
            report(("stages", i, *key), f"stage {stage.name!r}: {text}")
    total = sum(_stages_of(s) for s in spec.stages)
    if total > MAX_STAGES:
        cut = [i for i, s in enumerate(spec.stages) if spreads(s)]
        names = ", ".join(spec.stages[i].name for i in cut)
        text = (
            f"with the parts of {names} the pipeline has {total} stages, over the limit of {MAX_STAGES}; lower a count"
        )
        most = max(cut, key=lambda i: _stages_of(spec.stages[i]))
        report(("stages", most, "shards", "count"), f"stage {spec.stages[most].name!r}: {text}")


def _stages_of(stage: StageConfig) -> int:
    if stage.shards is None or not spreads(stage):
        return 1
    return stage.shards.count + (stage.shards.mode == "gather")


Problems = Iterator[tuple[Sequence[str | int], str]]


def _problems(stage: StageConfig, fused: bool) -> Problems:
    shards = stage.shards
    if shards is None:
        return
    if stage.use is None:
        yield ("shards",), "shards are parts of a model, and a stage without `use` has none; take them out"
        return
    if fused:
        yield ("shards",), "is fused, and one worker cannot own all shards; take it out of `fuse`, or its shards"
    if stage.collapses is not None and shards.mode != "tensor":
        text = f"collapses rows, which shards of mode {shards.mode} cannot; put a collapse without `use` before it"
        yield ("shards", "mode"), text
    yield from _gather_problems(stage) if shards.mode == "gather" else _only_gather(stage)
    if shards.mode != "tensor" and shards.plan is not None:
        yield ("shards", "plan"), f"shards.plan is for mode: tensor, and the mode is {shards.mode}; take it out"
    if shards.mode != "pipeline" and shards.balance != "time":
        yield ("shards", "balance"), f"shards.balance is for mode: pipeline, and the mode is {shards.mode}; take it out"


def _only_gather(stage: StageConfig) -> Problems:
    if stage.shards is not None and stage.shards.combine:
        text = f"shards.combine is for mode: gather, and the mode is {stage.shards.mode}; take it out"
        yield ("shards", "combine"), text


def _gather_problems(stage: StageConfig) -> Problems:
    shards = stage.shards
    if shards is None:
        return
    if stage.rows == "expand":
        text = "expands rows, and what shards make of one row cannot be combined; expand in a stage of its own"
        yield ("shards", "mode"), text
    if stage.handoff == "device":
        text = "has handoff: device, and what its shards make is combined on the host; take one of them out"
        yield ("handoff",), text
    if stage.when is not None and stage.when.rpartition(".")[2] in stage.outputs:
        text = f"when reads {stage.when!r}, which its shards make anew; return it under another name"
        yield ("when",), text
    if not stage.outputs:
        yield ("shards",), "shards of mode gather are combined, so what they return must be declared; add outputs"
    for column in shards.combine:
        if column not in stage.outputs:
            yield ("shards", "combine", column), f"shards.combine names {column!r}, which is no column of its outputs"
    for column, text in stage.outputs.items():
        yield from _column_problems(stage, column, parse_type(text), shards.count)


def _column_problems(stage: StageConfig, column: str, kind: ColumnType, count: int) -> Problems:
    place, dim = ("shards", "combine", column), combining(stage)[column]
    if not kind.is_numeric:
        yield place, f"column {column!r} is {kind}, and only numbers are combined; return it from a stage of its own"
    elif dim is None and kind.dtype == "bool":
        yield place, f"column {column!r} is {kind}, which is not summed; return numbers"
    elif dim is not None and not -len(kind.shape) <= dim < len(kind.shape):
        what = f"has no dimension {dim} along which the shards' could be concatenated"
        yield place, f"column {column!r} is {kind}, which {what}; write combine: {{{column}: sum}}, or another one"
    elif dim is not None and isinstance(size := kind.shape[dim], int) and size % count:
        text = f"column {column!r} is {kind}, whose dimension {dim} of {size} does not divide by {count} shards; "
        yield place, text + "change shards.count, or pad the layer"
