"""From a pipeline's plain data to its spec: every wrong key and value is reported, with what to write instead."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from torchrelay.config.imports import resolve_inside, source_digest
from torchrelay.config.spec import PipelineSpec, StageConfig
from torchrelay.config.yaml_source import Place, Source
from torchrelay.errors import ConfigError


def read_spec(source: Source, overrides: Mapping[str, str]) -> PipelineSpec | None:
    """The spec, or None after reporting that nothing can be made of it; `overrides` map STAGE.KEY to YAML values."""
    if source.data is None:
        return None
    if not isinstance(source.data, dict):
        source.report((), "a pipeline file is a mapping with `pipeline:` and `stages:`")
        return None
    data = copy.deepcopy(source.data)
    changed = _apply(source, data, overrides)
    # Wrong keys are reported and taken out, so that what else is wrong with the file is reported in the same run.
    taken: set[Place] = set()
    for _ in range(8):
        try:
            return PipelineSpec.model_validate(data)
        except ValidationError as error:
            found = [(_place(e["loc"], data, e["type"] == "missing"), e) for e in error.errors()]
        for place, problem in found:
            if place not in taken:
                origin = next((f"--set {o}: " for at, o in changed.items() if place[: len(at)] == at), "")
                source.report(place, origin + _message(problem, place, data))
        for place, problem in found:
            # What lacks a part goes whole; without a stage, or the name of one, there is nothing to look at.
            missing = problem["type"] == "missing"
            whole = None if missing and len(place) <= 3 else _removable(place[:-1] if missing else place)
            if whole is None or not (whole in taken or _take_out(data, whole)):
                return None
            taken.add(whole)
    return None


def _place(loc: tuple[str | int, ...], data: Any, missing: bool) -> Place:
    """The path of keys in the file; pydantic's paths also hold words of its own, such as the form of `inputs`."""
    out: Place = ()
    for i, part in enumerate(loc):
        if _holds(data, part):
            out, data = (*out, part), data[part]
        elif missing and i == len(loc) - 1:
            out = (*out, part)
    return out


def _removable(place: Place) -> Place | None:
    """What goes when this is wrong: an item goes with its list. None when nothing sensible would be left."""
    while place and isinstance(place[-1], int):
        place = place[:-1]
    return None if place in ((), ("stages",)) or place[-1] == "after" else place


def _take_out(data: Any, place: Place) -> bool:
    for part in place[:-1]:
        data = data[part] if _holds(data, part) else None
    if not _holds(data, place[-1]):
        return False
    del data[place[-1]]
    return True


def _holds(data: Any, part: Any) -> bool:
    if isinstance(data, dict):
        return part in data
    return isinstance(data, list) and isinstance(part, int) and part < len(data)


def _apply(source: Source, data: Any, overrides: Mapping[str, str]) -> dict[Place, str]:
    """Puts `stage.batch.max_rows` into that stage's mapping; returns which places came from which override."""
    changed: dict[Place, str] = {}
    stages = data.get("stages")
    names = [s.get("name") if isinstance(s, dict) else None for s in stages] if isinstance(stages, list) else []
    for dotted, text in overrides.items():
        name, *keys = dotted.split(".")
        if name not in names or not all(keys) or not keys:
            near = difflib.get_close_matches(name, [n for n in names if isinstance(n, str)], 1)
            hint = f"did you mean {near[0]!r}?" if near else "write STAGE.KEY=VALUE"
            source.report((), f"--set {dotted:.120}: there is no such stage or key; {hint}")
            continue
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            source.report((), f"--set {dotted:.120}: {text!r:.80} is no YAML value; put quotes inside the quotes")
            continue
        place: Place = ("stages", names.index(name))
        inner = stages[place[1]]
        for key in keys[:-1]:
            if not isinstance(inner.get(key), dict):
                inner[key] = {}
            inner = inner[key]
        inner[keys[-1]] = value
        changed[(*place, *keys)] = dotted
    return changed


def _message(problem: Any, place: Place, data: Any) -> str:
    kind, value = problem["type"], problem.get("input")
    key = place[-1] if place else ""
    if kind == "extra_forbidden":
        return _unknown_key(str(key), place)
    if kind == "missing":
        return f"{_dotted(place, data)} is missing; add it"
    if kind == "string_pattern_mismatch":
        rule = "letters, digits and _, at most 64 (pipelines and stages: small letters, digits, - and _)"
        return f"{_dotted(place, data)}: {value!r:.80} is no allowed name; write {rule}"
    text = problem["msg"].removeprefix("Value error, ")
    if kind in ("model_type", "dict_type"):
        text = "a mapping of keys to values is expected"
    return f"{_dotted(place, data)}: {text}" + ("" if kind == "value_error" else f" ({value!r:.80} came)")


def _dotted(place: Place, data: Any) -> str:
    """`stage 'encode': batch.max_rows` rather than stages.0.batch.max_rows."""
    if place[:1] == ("stages",) and len(place) > 1:
        stage = data["stages"][place[1]]
        name = stage.get("name") if isinstance(stage, dict) else None
        who = f"stage {name!r:.80}" if isinstance(name, str) else f"stage number {int(place[1]) + 1}"
        return f"{who}: {'.'.join(map(str, place[2:]))}".removesuffix(": ")
    return ".".join(str(p) for p in place) or "the file"


def _fields(place: Place) -> list[str]:
    """The known keys beside the last one of a path, found by walking the models."""
    model: Any = PipelineSpec
    for part in place[:-1]:
        if isinstance(part, int):
            model = StageConfig
        elif isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            model = _model(model.model_fields[part].annotation)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _model(annotation: Any) -> Any:
    """The model in `Model | None`."""
    members = [a for a in get_args(annotation) if a is not type(None)]
    return members[0] if len(members) == 1 else annotation


def _unknown_key(key: str, place: Place) -> str:
    near = difflib.get_close_matches(key, _fields(place), 1)
    known = ", ".join(_fields(place))
    return f"unknown key {key!r:.80}; " + (f"did you mean {near[0]!r}?" if near else f"known keys: {known}")


def check_files(spec: PipelineSpec, base_dir: Path, source: Source) -> None:
    """Reports code and weights that are not where the stages say."""
    for i, stage in enumerate(spec.stages):
        try:
            if stage.use is not None:
                source_digest(stage.use, base_dir)
        except ConfigError as error:
            source.report(("stages", i, "use"), str(error))
        try:
            if stage.weights is not None:
                resolve_inside(stage.weights, base_dir, "weights")
        except ConfigError as error:
            source.report(("stages", i, "weights"), str(error))
