"""A pipeline as plain data that knows where each key stands. Reads YAML files, and refuses what YAML lets slip."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from torchrelay.errors import ConfigError

MAX_BYTES = 1 << 20
_TAGS = frozenset(f"tag:yaml.org,2002:{t}" for t in ("str", "int", "float", "bool", "null", "map", "seq"))
Place = tuple[str | int, ...]


@dataclass
class Source:
    """`data` as plain values; `marks` maps a path of keys to (line, column), from 1. `label` is the file."""

    label: str
    data: Any = None
    marks: dict[Place, tuple[int, int]] = field(default_factory=dict)
    problems: list[tuple[tuple[int, int], str]] = field(default_factory=list)

    def where(self, place: Place) -> tuple[int, int]:
        """The nearest known place: a missing key is reported where its parent stands."""
        while place and place not in self.marks:
            place = place[:-1]
        return self.marks.get(place, (1, 1))

    def report(self, place: Place, message: str) -> None:
        self.problems.append((self.where(place), message))

    def lines(self) -> tuple[str, ...]:
        """`file:line:column: message` of every problem, in the order of the file."""
        return tuple(f"{self.label}:{line}:{column}: {text}" for (line, column), text in sorted(set(self.problems)))


class PythonSource(Source):
    """Data that Python code gave: its places are stages, in their order. `label` is the pipeline."""

    def where(self, place: Place) -> tuple[int, int]:
        stage = place[1] if place[:1] == ("stages",) and len(place) > 1 else -1
        return int(stage) + 1, 0

    def report(self, place: Place, message: str) -> None:
        super().report(place, in_stage(message, self.data, place))

    def lines(self) -> tuple[str, ...]:
        """`pipeline name: stage 'x': message` of every problem, in the order of the stages."""
        return tuple(f"{self.label}: {text}" for _, text in sorted(set(self.problems)))


def in_stage(message: str, data: Any, place: Place) -> str:
    """The message with its stage's name in front, unless it says it."""
    stages = data.get("stages") if isinstance(data, Mapping) else None
    if place[:1] != ("stages",) or len(place) < 2 or not isinstance(stages, list):
        return message
    stage = stages[int(place[1])]
    name = stage.get("name") if isinstance(stage, dict) else None
    who = f"stage {name!r:.80}" if isinstance(name, str) else f"stage number {int(place[1]) + 1}"
    return message if who in message else f"{who}: {message}"


def read_source(path: Path) -> Source:
    """Reads the file; problems inside it are in `problems`. Raises ConfigError when it cannot be read at all."""
    source = Source(str(path))
    text = _text_of(path)
    try:
        loader = yaml.SafeLoader(text)
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        at = (before.count("\n") + 1, error.position - before.rfind("\n"))
        source.problems.append((at, f"not valid YAML: character {chr(error.character)!r} is not allowed; take it out"))
        return source
    try:
        node = loader.get_single_node()
        if node is not None:
            source.data = _Reader(source, loader).value(node, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        quotes = '; put a type with brackets in quotes: "uint8[H, W, 3]"' if "got '['" in str(error.problem) else ""
        source.problems.append((at, f"not valid YAML: {error.problem or error.context}{quotes}"))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        source.problems.append(((1, 1), f"not valid YAML: {str(error).splitlines()[0] if str(error) else 'too deep'}"))
    finally:
        loader.dispose()
    return source


def _text_of(path: Path) -> str:
    try:
        # Opened without waiting: a FIFO or a device must not hold the command.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r}: cannot be read: {getattr(error, 'strerror', error)}") from error
    # fdopen itself refuses a folder, and then leaves the descriptor open.
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConfigError(f"{path}: is no regular file; name a pipeline's YAML file")
    with os.fdopen(descriptor, "rb") as file:
        try:
            data = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: is over 1 MiB; a pipeline file is small, keep data in files beside it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from error


class _Reader:
    def __init__(self, source: Source, loader: yaml.SafeLoader) -> None:
        self._source = source
        self._loader = loader
        self._aliases = 0

    def value(self, node: yaml.Node, place: Place) -> Any:
        mark = node.start_mark
        self._source.marks.setdefault(place, (mark.line + 1, mark.column + 1))
        self._aliases += 1
        if self._aliases > 20_000 or len(place) > 64:
            raise yaml.YAMLError("too many or too deeply nested values")
        if node.tag not in _TAGS:
            return self._refused(node, place)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, place)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*place, i)) for i, item in enumerate(node.value)]
        if not isinstance(node, yaml.ScalarNode):
            return self._refused(node, place)
        try:
            return self._loader.construct_object(node)
        except (ValueError, KeyError):
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            self._source.report(place, f"{node.value!r:.80} cannot be read as {kind}; put it in quotes if it is text")
            return None

    def _refused(self, node: yaml.Node, place: Place) -> None:
        if node.tag == "tag:yaml.org,2002:timestamp":
            self._source.report(place, f"{node.value!r:.80} reads as a date; put it in quotes")
        else:
            tag = node.tag.removeprefix("tag:yaml.org,2002:")
            self._source.report(place, f"tag {tag!r:.80} is not allowed; write plain values")

    def _mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            mark = key_node.start_mark
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None or key_node.tag == "tag:yaml.org,2002:merge":
                self._source.problems.append(((mark.line + 1, mark.column + 1), "keys must be plain words"))
                continue
            here = (*place, key)
            if key in out:
                first = self._source.marks[here][0]
                text = f"key {key!r:.80} stands twice in one place (first on line {first}); keep one"
                self._source.problems.append(((mark.line + 1, mark.column + 1), text))
                continue
            self._source.marks[here] = (mark.line + 1, mark.column + 1)
            out[key] = self.value(value_node, here)
        return out
