"""`Pipeline`: a pipeline, checked as a whole, with its version. It imports no stage: `check` and workers do."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

from torchrelay.config.digest import version_of
from torchrelay.config.fusing import Group
from torchrelay.config.graph import Graph
from torchrelay.config.graph_build import build_spread
from torchrelay.config.imports import import_named
from torchrelay.config.run_graph import is_runs, run_ref, run_twin
from torchrelay.config.shards import parts_of
from torchrelay.config.spec import PipelineSpec
from torchrelay.config.stage_spec import StageSpec, plain, use_text
from torchrelay.config.types import ColumnType
from torchrelay.config.validation import check_files, read_spec
from torchrelay.config.yaml_source import Place, PythonSource, Source, in_stage, read_source
from torchrelay.errors import ConfigError, JobFailed

RECORD_FORMAT = 1
_VERSION = re.compile(r"[0-9a-f]{8}")


@dataclass(frozen=True, init=False, repr=False)
class Pipeline:
    """One version of a pipeline. Its parts mean what the keys of a file mean, and are checked in the same way.

    Args:
        name: what jobs are submitted to.
        stages: its stages; without any `after`, each follows the one above.
        input: column -> type of a row; without it, anything is taken as it comes.
        output: the columns of the result; default what the last stages return.
        limits: rows_per_job, what one job may grow to.
        fuse: lists of consecutive stages, by name, that one worker runs without leaving its device's memory.
        base_dir: the folder that files are relative to; default that of the file that calls this, else the current one.

    `written` is what its file says; `spec` and `graph` have every cut stage (`shards`) as the stages that it becomes.
    `path` is its file, `source` the text that loads it anew in a worker: a file, or module.py:name. Both are None for
    one that was only built in memory, or that came out of a namespace's registry.

    Raises ConfigError with every problem as `pipeline 'name': stage 'x': what; remedy`.
    """

    name: str
    version: str
    written: PipelineSpec
    spec: PipelineSpec
    graph: Graph
    _folder: Path | None
    path: Path | None = field(compare=False)
    source: str | None = field(compare=False)
    _data: Mapping[str, Any] = field(compare=False)
    _marks: Mapping[Place, tuple[int, int]] = field(compare=False)
    _base: Pipeline | None = field(compare=False)

    def __init__(
        self,
        name: str,
        *,
        stages: Sequence[StageSpec],
        input: Mapping[str, str] | None = None,
        output: Sequence[str] | None = None,
        limits: Mapping[str, int] | None = None,
        fuse: Sequence[Sequence[str]] | None = None,
        base_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        folder = Path(base_dir) if base_dir is not None else _folder_of(sys._getframe(1).f_globals.get("__file__"))
        source = PythonSource(f"pipeline {name!r:.80}")
        given = {"input": input, "output": output, "limits": limits, "fuse": fuse}
        try:
            top = {key: plain(value, key) for key, value in given.items() if value is not None}
        except ConfigError as error:
            raise ConfigError(f"{source.label}: {error}") from error
        source.data = {"pipeline": name, **top, "stages": []}
        if not folder.is_dir():
            source.report((), f"base_dir {str(folder)!r:.200} is no folder")
        if not isinstance(stages, list | tuple):
            source.report((), f"stages: a list of StageSpec is expected, {type(stages).__qualname__} came")
            stages = ()
        for i, stage in enumerate(stages):
            source.data["stages"].append({})
            if not isinstance(stage, StageSpec):
                source.report(("stages", i), f"a StageSpec is expected, {type(stage).__qualname__} came")
                continue
            source.data["stages"][i] = {"name": stage.name, **stage.data()}
            try:
                if stage.use is not None:
                    source.data["stages"][i]["use"] = use_text(stage.use, folder)
            except ConfigError as error:
                source.report(("stages", i), str(error))
        if source.problems:
            # The rest would be reported for stages that are not there.
            raise ConfigError("\n".join(source.lines()), source.lines())
        self._set(source, folder.resolve(), {})

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: Mapping[str, str] | None = None) -> Pipeline:
        """Reads and checks a YAML file, or `module.py:name`, a Pipeline that a Python file holds.

        `overrides` map STAGE.KEY to YAML values, as `--set` gives them. Raises ConfigError with every problem as
        `file:line:column: what; remedy`.
        """
        module = split_module(os.fspath(path))
        if module is not None:
            return cls._of_module(*module, overrides or {})
        file = Path(path)
        source = read_source(file)
        made = cls.__new__(cls)
        made._set(source, file.resolve().parent, overrides or {}, file.resolve(), str(file.resolve()))
        return made

    @classmethod
    def _of_module(cls, file: Path, name: str, overrides: Mapping[str, str]) -> Pipeline:
        where = file.resolve()
        label = f"{file}:{name}"
        if not where.is_file():
            raise ConfigError(f"{label}: there is no file {file}")
        found = import_named(f"{where.name}:{name}", where.parent, "")
        if not isinstance(found, Pipeline):
            raise ConfigError(f"{label}: {name} is {type(found).__qualname__}, not a torchrelay.Pipeline")
        # Made anew rather than taken: the module may be imported already, and stage files have changed since.
        source = PythonSource(label, found._data)
        made = cls.__new__(cls)
        made._set(source, found.base_dir, overrides, where, f"{where}:{name}")
        return made

    def _set(
        self,
        source: Source,
        base_dir: Path,
        overrides: Mapping[str, str],
        path: Path | None = None,
        text: str | None = None,
    ) -> None:
        spec = read_spec(source, overrides)
        built = None
        if spec is not None:
            wrong_keys = bool(source.problems)
            built = build_spread(spec, source.report, columns=not wrong_keys)
            check_files(spec, base_dir, source)
        if source.problems or spec is None or built is None:
            lines = source.lines()
            lines = lines or (f"{source.label}:1:1: the file is empty; a pipeline has `pipeline:` and `stages:`",)
            raise ConfigError("\n".join(lines), lines)
        self._fill(spec, version_of(spec, base_dir), built, base_dir)
        self.__dict__.update(path=path, source=text, _data=source.data, _marks=source.marks)

    def _fill(
        self, written: PipelineSpec, version: str, built: tuple[PipelineSpec, Graph], folder: Path | None
    ) -> None:
        # Frozen: only a constructor may, and by this way.
        spec, graph = built
        self.__dict__.update(name=spec.pipeline, version=version, spec=spec, graph=graph, _folder=folder)
        self.__dict__.update(written=written)
        self.__dict__.update(path=None, source=None, _data={}, _marks={}, _base=None)

    def __hash__(self) -> int:
        return hash((self.name, self.version))

    def __repr__(self) -> str:
        return f"<Pipeline {self.ref}: {', '.join(n.name for n in self.graph.nodes)}>"

    @property
    def ref(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"

    @property
    def base_dir(self) -> Path:
        """The folder that files of the pipeline are relative to. ConfigError for one that came from the registry."""
        if self._folder is None:
            raise ConfigError(f"{self.ref} came from the registry, without its files; load its YAML file")
        return self._folder

    def where(self, *place: str | int) -> str:
        """`file:line:column` of a path of keys, or of the nearest key above it; a name where there is no such file."""
        if not self._marks:
            return self.source or f"pipeline {self.name!r}"
        while place and place not in self._marks:
            place = place[:-1]
        line, column = self._marks.get(place, (1, 1))
        return f"{self.path}:{line}:{column}"

    def problem(self, place: Place, text: str) -> str:
        """A problem that was found later, as a line like those of ConfigError."""
        return f"{self.where(*place)}: {text if self._marks else in_stage(text, self._data, place)}"

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """What one worker serves each: a stage, or several that are fused. In the order of the file."""
        fused = {name: names for names in self.spec.fuse for name in names}
        found = {name: fused.get(name, [name]) for name in (s.name for s in self.spec.stages)}
        return tuple(Group.of(self.spec, self.graph, names) for name, names in found.items() if name == names[0])

    @property
    def of_runs(self) -> bool:
        """Whether it is the run graph of a pipeline."""
        return self._base is not None

    @property
    def base(self) -> Pipeline:
        """The pipeline whose run graph this is; of any other, itself."""
        return self._base or self

    @cached_property
    def twin(self) -> Pipeline | None:
        """Its run graph (`config.run_graph`), that the chunks of a run go through; None where it can have none."""
        made = run_twin(self.spec, self.graph)
        if self.of_runs or isinstance(made, str):
            return None
        twin = type(self).__new__(type(self))
        twin._fill(self.written, run_ref(self.version), made, self._folder)
        twin.__dict__.update(path=self.path, source=self.source, _data=self._data, _marks=self._marks, _base=self)
        return twin

    def for_runs(self) -> Pipeline:
        """Its run graph; raises ConfigError that says why it can have none."""
        if self.twin is None:
            raise ConfigError(f"{self.where('stages')}: {run_twin(self.spec, self.graph)}")
        return self.twin

    @property
    def stage_names(self) -> list[str]:
        """Everything that a worker may serve: its stages, and the two of its run graph."""
        return [s.name for s in (self.twin or self).spec.stages]

    def parts_of(self, stage: str) -> list[str]:
        """The stages that a worker may serve under this name: itself, or the parts of a stage that is cut (`shards`).
        None when there is no such stage."""
        if is_runs(stage):
            return [stage] if self.twin is not None else []
        return parts_of(self.spec, stage)

    def group_of(self, stage: str) -> Group:
        """The group that this stage is in; KeyError when there is no such stage."""
        if is_runs(stage) and self.twin is not None:
            return self.twin.group_of(stage)
        for group in self.groups:
            if stage in group.names:
                return group
        raise KeyError(stage)

    @cached_property
    def input(self) -> dict[str, ColumnType]:
        """The declared columns of a row; empty when anything is taken."""
        return self.graph.input

    @property
    def output(self) -> tuple[str, ...] | None:
        """Columns of the result; None for what the terminal stages return."""
        return None if self.spec.output is None else tuple(self.spec.output)

    @overload
    def run_local(
        self,
        rows: Iterable[Mapping[str, Any]],
        *,
        device: str = "auto-cpu",
        on_error: Literal["raise"] = "raise",
        meta: Mapping[str, Any] | None = None,
    ) -> list[dict[str, Any]]: ...

    @overload
    def run_local(
        self,
        rows: Iterable[Mapping[str, Any]],
        *,
        device: str = "auto-cpu",
        on_error: Literal["return"],
        meta: Mapping[str, Any] | None = None,
    ) -> list[dict[str, Any] | JobFailed]: ...

    def run_local(self, rows: Iterable[Mapping[str, Any]], **options: Any) -> list[Any]:
        """The results of all rows, in their order, computed in this process: no server, no workers.

        With the checks, batches and column rules of workers. Args, results and errors: `torchrelay.local.run_local`.
        """
        # The one import upwards, when it is called: producers and workers need none of it.
        from torchrelay.local import run_local

        return run_local(self, rows, **options)

    def record(self) -> str:
        """What the registry keeps: enough for a producer without the files, and never an import path to follow."""
        base = self.base
        # Not pydantic's JSON, which turns inf and nan into null.
        content = {"format": RECORD_FORMAT, "version": base.version, "spec": base.written.model_dump()}
        if self.of_runs:
            content["runs"] = True
        return json.dumps(content, sort_keys=True)

    @classmethod
    def from_record(cls, text: str) -> Pipeline:
        """The pipeline of a registry record; raises ConfigError for a record that this version cannot read."""
        try:
            content = json.loads(text)
            if content["format"] != RECORD_FORMAT or not _VERSION.fullmatch(content["version"]):
                raise ValueError("it is of another format")
            spec = PipelineSpec.model_validate(content["spec"])
            problems: list[str] = []
            built = build_spread(spec, lambda place, message: problems.append(message))
            if built is None:
                raise ValueError("; ".join(problems))
            made = cls.__new__(cls)
            made._fill(spec, content["version"], built, None)
            return made.for_runs() if content.get("runs") else made
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f"a registered pipeline cannot be read by this torchrelay: {error}") from error


def _folder_of(file: object) -> Path:
    folder = Path(file).parent if isinstance(file, str) else None
    return folder if folder is not None and folder.is_dir() else Path.cwd()


def split_module(text: str) -> tuple[Path, str] | None:
    """The parts of `module.py:name`; None for any other text. Raises ConfigError for a Python file without a name."""
    file, colon, name = text.rpartition(":")
    if colon and file.endswith(".py") and not os.path.exists(text):
        if not name.isidentifier():
            raise ConfigError(f"{text!r:.200}: {name!r} is no Python name; write module.py:name")
        return Path(file), name
    if text.endswith(".py"):
        raise ConfigError(f"{text!r:.200}: name the Pipeline in it: {os.path.basename(text)}:NAME")
    return None
