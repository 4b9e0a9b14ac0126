"""From what `use:` names to a stage object: a class derived from Stage, or a plain function of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torchrelay.errors import ConfigError, StageLoadError
from torchrelay.stages.batch import Batch
from torchrelay.stages.stage import Stage

__all__ = ["Identity", "make_stage", "stage_target"]


class FunctionStage(Stage):
    """A plain function `f(batch, **args)` as a stage."""

    def __init__(self, function: Callable[..., Any], args: Mapping[str, Any]) -> None:
        self._function = function
        self._args = dict(args)

    def forward(self, batch: Batch) -> Any:
        return self._function(batch, **self._args)


class Identity(Stage):
    """A stage without code: a regrouping of rows alone."""

    def forward(self, batch: Batch) -> Mapping[str, Any]:
        return {}


def make_stage(obj: object, args: Mapping[str, Any] | None = None, name: str = "") -> Stage:
    """Build the stage.

    Args:
        obj: what `use:` names: a class derived from Stage, or a function of a batch.
        args: the stage's YAML `args`, for `__init__` or for each call of the function.
        name: the stage's name, for errors.

    Raises:
        ConfigError: `obj` is neither, or a class that does not define `forward`.
        StageLoadError: its `__init__` raised.
    """
    target = stage_target(obj, name)
    if not isinstance(target, type):
        return FunctionStage(target, args or {})
    try:
        stage: Stage = target(**(args or {}))
    except Exception as error:
        what = f"{target.__qualname__}.__init__ raised {type(error).__name__}: {error}"
        raise StageLoadError(_where(name) + what) from error
    return stage


def stage_target(obj: object, name: str = "") -> type[Stage] | Callable[..., Any]:
    """What `use:` names, if it can be a stage; raises ConfigError that says why not."""
    where = _where(name)
    if not isinstance(obj, type):
        return _function(obj, where)
    if not issubclass(obj, Stage):
        raise ConfigError(f"{where}class {obj.__qualname__!r} must derive from torchrelay.Stage or TorchStage")
    if obj.forward is Stage.forward:
        raise ConfigError(f"{where}class {obj.__qualname__!r} does not define forward(self, batch)")
    return obj


def _function(obj: object, where: str) -> Callable[..., Any]:
    if not callable(obj):
        what = f"{getattr(obj, '__name__', obj)!r:.80} is a {type(obj).__name__}"
        raise ConfigError(f"{where}{what}; `use` must name a class derived from torchrelay.Stage, or a function")
    shown = getattr(obj, "__qualname__", type(obj).__name__)
    if inspect.iscoroutinefunction(obj) or inspect.isasyncgenfunction(obj) or inspect.isgeneratorfunction(obj):
        raise ConfigError(f"{where}{shown!r} is an async function or a generator; write a plain def that returns")
    try:
        parameters = list(inspect.signature(obj).parameters.values())
    except (TypeError, ValueError):
        return obj  # one written in C does not say
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if not parameters or parameters[0].kind not in (*positional, inspect.Parameter.VAR_POSITIONAL):
        raise ConfigError(f"{where}{shown!r} takes no batch; write def {shown}(batch, *, your_arg=...)")
    return obj


def _where(name: str) -> str:
    return f"stage {name!r}: " if name else ""
