"""The standard library's own docstrings, as rows to search: real texts that every Python brings along.

Imports only modules that are safe to import, keeps each text once, and gives the same order on every run.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from types import ModuleType
from typing import Any, TypedDict

__all__ = ["Doc", "gather"]

# These open windows or browsers, print, patch other modules, need a display, or hold tests and tables only.
_SKIPPED = frozenset(
    ("antigravity", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "ntpath", "nturl2path",
     "pydoc_data", "rlcompleter", "site", "sitecustomize", "test", "tests", "this", "tkinter", "turtle",
     "turtledemo", "usercustomize", "xxlimited", "xxsubtype")
)  # fmt: skip
_SHORTEST = 20


class Doc(TypedDict):
    """One documented thing: its dotted name, `module`, `class` or `function`, and its docstring."""

    name: str
    kind: str
    text: str


def gather(limit: int | None = None) -> list[Doc]:
    """Every public module's, class's, function's and method's own docstring, each text once.

    Args:
        limit: keep at most so many, spread evenly over all of them.
    """
    found: dict[str, Doc] = {}
    # All are imported before the first is looked at: a submodule may take the place of a function (curses.has_key).
    for module in list(_modules()):
        for name, kind, thing in _members(module):
            text = _doc(thing)
            if len(text) >= _SHORTEST:
                found.setdefault(text, Doc(name=name, kind=kind, text=text))
    docs = list(found.values())
    if limit is None or limit >= len(docs):
        return docs
    return [docs[i * len(docs) // limit] for i in range(limit)]


def _modules() -> Iterator[ModuleType]:
    names = [n for n in sorted(sys.stdlib_module_names) if _is_wanted(n)]
    while names:
        module = _import(names.pop(0))
        if module is not None:
            yield module
            inner = sorted(m.name for m in pkgutil.iter_modules(getattr(module, "__path__", [])))
            names[:0] = [f"{module.__name__}.{n}" for n in inner if _is_wanted(n)]


def _is_wanted(name: str) -> bool:
    return not name.startswith("_") and name not in _SKIPPED


def _import(name: str) -> ModuleType | None:
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except (ImportError, OSError, AttributeError):
            return None  # of another platform, or left out of this build


def _members(module: ModuleType) -> Iterator[tuple[str, str, Any]]:
    yield module.__name__, "module", module
    for name in _public_names(module):
        thing = getattr(module, name, None)
        full = f"{module.__name__}.{name}"
        if inspect.isclass(thing):
            yield full, "class", thing
            for inner, member in sorted(vars(thing).items()):
                plain = getattr(member, "__func__", member)
                if not inner.startswith("_") and (inspect.isroutine(plain) or isinstance(member, property)):
                    yield f"{full}.{inner}", "function", member
        elif inspect.isroutine(thing):
            yield full, "function", thing


def _public_names(module: ModuleType) -> list[str]:
    """What it exports; without `__all__`, the public names that were defined in it and not imported."""
    exported = getattr(module, "__all__", None)
    if exported is not None:
        return sorted(exported)
    own = (module.__name__, "_" + module.__name__)
    names = (n for n in vars(module) if not n.startswith("_"))
    return sorted(n for n in names if getattr(getattr(module, n), "__module__", None) in own)


def _doc(thing: Any) -> str:
    text = getattr(thing, "__doc__", None)
    return inspect.cleandoc(text).strip() if isinstance(text, str) else ""
