"""Finds the code that a stage names: a file beside the pipeline, or an installed module. Only the operator's own file
says what is imported; nothing that comes out of Redis does."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import sys
import traceback
import types
import typing
from collections.abc import Mapping
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from torchrelay.errors import ConfigError

MADE_UP = "_torchrelay_stages_"
"""How the names begin under which files are imported; nobody else can import them by these."""


def split_use(use: str) -> tuple[str, str]:
    """("file.py" or "package.module", "name"); raises ConfigError."""
    where, colon, name = use.rpartition(":")
    if not colon or not name.isidentifier() or not where:
        raise ConfigError(f"use {use!r:.120}: write file.py:Name for a file beside this one, or package.module:Name")
    if where.split(".")[0] == "__main__":
        raise ConfigError("use '__main__:...': workers import stages anew; put the class into a file and name that")
    if not where.endswith(".py") and not all(part.isidentifier() for part in where.split(".")):
        raise ConfigError(f"use {use!r:.120}: {where!r:.80} is neither a .py file nor a module's name")
    return where, name


def resolve_inside(name: str, base_dir: Path, what: str) -> Path:
    """A regular file within the pipeline's folder; raises ConfigError for what leads out of it or is not there."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ConfigError(f"{what} {name!r:.120}: must lie beside the pipeline file, without .. or an absolute path")
    path = base_dir / name
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{what} {name!r:.120}: there is no such file in {base_dir}") from error
    if not real.is_relative_to(base_dir.resolve()):
        raise ConfigError(f"{what} {name!r:.120}: is a link that leads out of {base_dir}")
    if not real.is_file():
        raise ConfigError(f"{what} {name!r:.120}: is no regular file")
    return real


def source_digest(use: str, base_dir: Path) -> bytes:
    """Digest of the source file that holds the stage, without importing it."""
    where, _ = split_use(use)
    if where.endswith(".py"):
        content = _bytes_of(resolve_inside(where, base_dir, "use"), use)
    else:
        spec = _find_module(where)
        if spec is None:
            raise ConfigError(f"use {use!r:.120}: module {where!r} is not found; is it installed here?")
        origin = Path(spec.origin) if spec.origin else None
        content = _bytes_of(origin, use) if origin and origin.is_file() else (spec.origin or where).encode()
    return hashlib.blake2b(content, digest_size=16).digest()


def _bytes_of(path: Path, use: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"use {use!r:.120}: {path} cannot be read: {error.strerror}") from error


def _find_module(where: str) -> ModuleSpec | None:
    """What importlib would find. Its own find_spec runs the parent packages of a dotted name: here nothing runs."""
    head, *rest = where.split(".")
    try:
        spec = importlib.util.find_spec(head)
        for i, _ in enumerate(rest, 2):
            if spec is None or spec.submodule_search_locations is None:
                return None
            spec = PathFinder.find_spec(".".join(where.split(".")[:i]), spec.submodule_search_locations)
    except (ImportError, ValueError, AttributeError):
        return None
    return spec


def module_origin(where: str) -> str | None:
    """Where a module would be imported from, by its name; None when it is not found. Nothing is run."""
    spec = _find_module(where)
    return None if spec is None else spec.origin or where


def import_use(use: str, base_dir: Path) -> Any:
    """The class or function; raises ConfigError with the reason when it cannot be imported."""
    found = import_named(use, base_dir)
    if not callable(found):
        raise ConfigError(f"use {use!r:.120}: {split_use(use)[1]} is {type(found).__name__}, not a stage class")
    return found


def import_named(use: str, base_dir: Path, what: str = "use ") -> Any:
    """What a module, or a file in the folder, holds under a name. `what` stands before it in errors (ConfigError)."""
    where, name = split_use(use)
    try:
        module = _load_file(where, base_dir) if where.endswith(".py") else importlib.import_module(where)
    except ConfigError:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"{what}{use!r:.120}: importing it raised {type(error).__name__}: {error} ({last.filename}:{last.lineno})"
        ) from error
    found = getattr(module, name, None)
    if found is None:
        public = [n for n in vars(module) if not n.startswith("_")]
        near = difflib.get_close_matches(name, public, 1)
        raise ConfigError(
            f"{what}{use!r:.120}: {where} has no {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return found


class _FromSource(SourceFileLoader):
    """Reads no cached bytecode: that is known by time and size alone, and an edit within a second would go unseen."""

    def get_code(self, fullname: str) -> types.CodeType:
        path = self.get_filename(fullname)
        code: types.CodeType = self.source_to_code(self.get_data(path), path)
        return code


def _load_file(where: str, base_dir: Path) -> Any:
    path = resolve_inside(where, base_dir, "use")
    # Of the content too: a file that was edited, in a notebook say, is another version and is imported anew.
    identity = os.fsencode(path) + b"\0" + _bytes_of(path, where)
    digest = hashlib.blake2b(identity, digest_size=6).hexdigest()
    name = f"{MADE_UP}{digest}_{path.stem}"
    known = sys.modules.get(name)
    if known is not None:
        return known
    spec = importlib.util.spec_from_file_location(name, path, loader=_FromSource(name, str(path)))
    if spec is None or spec.loader is None:
        raise ConfigError(f"use {where!r}: cannot be loaded as a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # The folder is on the path only while the file is imported: it finds its siblings, and shadows nothing later.
    sys.path.insert(0, str(base_dir.resolve()))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    finally:
        if str(base_dir.resolve()) in sys.path:
            sys.path.remove(str(base_dir.resolve()))
    return module


def bind_args(target: Any, args: Mapping[str, Any]) -> list[str]:
    """What is wrong with a stage's `args`: unknown, missing, or of another type than annotated. Empty when all fits."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return []
    parameters = list(signature.parameters.values())
    if not inspect.isclass(target):
        parameters = parameters[1:]
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    problems: list[str] = []
    for name in args:
        if name not in named and not takes_any:
            near = difflib.get_close_matches(name, list(named), 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(named) or 'none'}"
            problems.append(f"unknown argument {name!r}; {hint}")
    hints = _hints(target)
    for name, parameter in named.items():
        if name in args:
            problem = _wrong_type(name, hints.get(name, parameter.annotation), args[name])
            problems += [problem] if problem else []
        elif parameter.default is parameter.empty:
            problems.append(f"argument {name!r} is missing")
    return problems


def _hints(target: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError, AttributeError):
        return {}


def _wrong_type(name: str, annotation: Any, value: Any) -> str | None:
    if annotation in (inspect.Parameter.empty, Any) or isinstance(annotation, str):
        return None
    try:
        adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
        # Strict as for JSON, at any depth: 1 serves as a float and a list as a tuple, "1" does not serve as an int.
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        return f"argument {name!r}: {error.errors()[0]['msg']} ({value!r:.60} came)"
    except (PydanticSchemaGenerationError, PydanticUserError, TypeError, ValueError):
        return None
    return None
