"""`Pipeline`: a pipeline file, checked as a whole, with its version. It imports no stage: `check` and workers do."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from torchrelay.config.digest import version_of
from torchrelay.config.graph import Graph, build_graph
from torchrelay.config.imports import resolve_inside, split_use
from torchrelay.config.spec import COMING, PipelineSpec, StageSpec
from torchrelay.config.types import ColumnType
from torchrelay.config.yaml_source import Place, Source, read_source
from torchrelay.errors import ConfigError

RECORD_FORMAT = 1


@dataclass(frozen=True)
class Pipeline:
    """One version of a pipeline. `path` is None for one that came out of a namespace's registry."""

    name: str
    version: str
    spec: PipelineSpec
    graph: Graph
    path: Path | None = None
    marks: Mapping[Place, tuple[int, int]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, str] | None = None) -> Pipeline:
        """Reads and checks a file; `overrides` map STAGE.KEY to YAML values, as `--set` gives them.

        Raises ConfigError with every problem as `file:line:column: what; remedy`.
        """
        path = Path(path)
        source = read_source(path)
        spec = _validate(source, overrides or {})
        graph = None
        if spec is not None:
            wrong_keys = bool(source.problems)
            graph = build_graph(spec, source.report, columns=not wrong_keys)
            _check_files(spec, path.parent, source)
        if source.problems or spec is None or graph is None:
            lines = source.lines() or (f"{path}:1:1: the file is empty; a pipeline has `pipeline:` and `stages:`",)
            raise ConfigError("\n".join(lines), lines)
        return cls(spec.pipeline, version_of(spec, path.parent), spec, graph, path.resolve(), source.marks)

    @property
    def ref(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"

    @property
    def base_dir(self) -> Path:
        """The folder that files of the pipeline are relative to. ConfigError for one that came from the registry."""
        if self.path is None:
            raise ConfigError(f"{self.ref} came from the registry, without its files; load its YAML file")
        return self.path.parent

    def where(self, *place: str | int) -> str:
        """`file:line:column` of a path of keys, or of the nearest key above it."""
        while place and place not in self.marks:
            place = place[:-1]
        line, column = self.marks.get(place, (1, 1))
        return f"{self.path}:{line}:{column}"

    @cached_property
    def input(self) -> dict[str, ColumnType]:
        """The declared columns of a row; empty when anything is taken."""
        return self.graph.input

    @property
    def output(self) -> tuple[str, ...] | None:
        """Columns of the result; None for what the terminal stages return."""
        return None if self.spec.output is None else tuple(self.spec.output)

    def record(self) -> str:
        """What the registry keeps: enough for a producer without the files, and never an import path to follow."""
        content = {"format": RECORD_FORMAT, "version": self.version, "spec": self.spec.model_dump(mode="json")}
        return json.dumps(content, sort_keys=True)

    @classmethod
    def from_record(cls, text: str) -> Pipeline:
        """The pipeline of a registry record; raises ConfigError for a record that this version cannot read."""
        try:
            content = json.loads(text)
            spec = PipelineSpec.model_validate(content["spec"])
            problems: list[str] = []
            graph = build_graph(spec, lambda place, message: problems.append(message))
            if graph is None:
                raise ValueError("; ".join(problems))
            return cls(spec.pipeline, str(content["version"]), spec, graph)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"a registered pipeline cannot be read by this torchrelay: {error}") from error


def _validate(source: Source, overrides: Mapping[str, str]) -> PipelineSpec | None:
    if source.data is None:
        return None
    if not isinstance(source.data, dict):
        source.report((), "a pipeline file is a mapping with `pipeline:` and `stages:`")
        return None
    _apply(source, overrides)
    data = source.data
    # Wrong keys are reported and taken out, so that what else is wrong with the file is reported in the same run.
    for _ in range(8):
        try:
            return PipelineSpec.model_validate(data)
        except ValidationError as error:
            found = [(tuple(p for p in e["loc"] if _is_key(p)), e) for e in error.errors()]
        for place, problem in found:
            source.report(place, _message(problem, place))
        data = copy.deepcopy(data)
        # What is missing, or stands nowhere, leaves nothing to go on with.
        if not all(problem["type"] != "missing" and _take_out(data, place) for place, problem in found):
            return None
    return None


def _take_out(data: Any, place: Place) -> bool:
    for part in place[:-1]:
        data = data[part] if _holds(data, part) else None
    if not place or not _holds(data, place[-1]):
        return False
    if isinstance(data, dict):
        del data[place[-1]]
    else:
        data[place[-1]] = None
    return True


def _holds(data: Any, part: Any) -> bool:
    if isinstance(data, dict):
        return part in data
    return isinstance(data, list) and isinstance(part, int) and part < len(data)


def _is_key(part: str | int) -> bool:
    """pydantic puts names of union members into its paths; only keys of the file are places."""
    return isinstance(part, int) or (not part.startswith(("list[", "dict[", "function-")) and "[" not in part)


def _apply(source: Source, overrides: Mapping[str, str]) -> None:
    """`stage.batch.max_rows` -> the value in that stage's mapping."""
    stages = source.data.get("stages")
    for dotted, text in overrides.items():
        name, *keys = dotted.split(".")
        stage = next((s for s in stages or () if isinstance(s, dict) and s.get("name") == name), None)
        if stage is None or not keys:
            source.report((), f"--set {dotted}: there is no stage {name!r}")
            continue
        for key in keys[:-1]:
            inner = stage.get(key)
            stage[key] = inner = dict(inner) if isinstance(inner, dict) else {}
            stage = inner
        stage[keys[-1]] = yaml.safe_load(text)


def _message(problem: Any, place: Place) -> str:
    kind, value = problem["type"], problem.get("input")
    key = place[-1] if place else ""
    if kind == "extra_forbidden":
        return _unknown_key(str(key), place)
    if kind == "missing":
        return f"{key!r} is missing"
    if kind == "string_pattern_mismatch":
        return f"{value!r:.80} is no allowed name: letters, digits and _ (stages and pipelines: small letters, and -)"
    text = problem["msg"].removeprefix("Value error, ")
    return f"{_dotted(place)}: {text}" + ("" if kind == "value_error" else f" ({value!r:.80} came)")


def _dotted(place: Place) -> str:
    return ".".join(str(p) for p in place) or "file"


def _fields(place: Place) -> list[str]:
    """The known keys beside the last one of a path, found by walking the models."""
    model: Any = PipelineSpec
    for part in place[:-1]:
        if isinstance(part, int):
            model = StageSpec
        elif isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            model = model.model_fields[part].annotation
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _unknown_key(key: str, place: Place) -> str:
    if key in COMING:
        return f"key {key!r} is not supported by this version of torchrelay yet; take it out"
    near = difflib.get_close_matches(key, _fields(place), 1)
    known = ", ".join(_fields(place))
    return f"unknown key {key!r:.80}; " + (f"did you mean {near[0]!r}?" if near else f"known keys: {known}")


def _check_files(spec: PipelineSpec, base_dir: Path, source: Source) -> None:
    for i, stage in enumerate(spec.stages):
        try:
            where, _ = split_use(stage.use)
            if where.endswith(".py"):
                resolve_inside(where, base_dir, "use")
        except ConfigError as error:
            source.report(("stages", i, "use"), str(error))
        try:
            if stage.weights is not None:
                resolve_inside(stage.weights, base_dir, "weights")
        except ConfigError as error:
            source.report(("stages", i, "weights"), str(error))
