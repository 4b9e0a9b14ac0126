"""From what `use:` names to a stage object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchrelay.errors import ConfigError, StageLoadError
from torchrelay.stages.stage import Stage

__all__ = ["make_stage", "stage_class"]


def make_stage(obj: object, args: Mapping[str, Any] | None = None, name: str = "") -> Stage:
    """Build the stage.

    Args:
        obj: what `use:` names: a class derived from Stage.
        args: the stage's YAML `args`, for `__init__`.
        name: the stage's name, for errors.

    Raises:
        ConfigError: `obj` is no such class, or does not define `forward`.
        StageLoadError: its `__init__` raised.
    """
    cls = stage_class(obj, name)
    try:
        return cls(**(args or {}))
    except Exception as error:
        what = f"{cls.__qualname__}.__init__ raised {type(error).__name__}: {error}"
        raise StageLoadError(_where(name) + what) from error


def stage_class(obj: object, name: str = "") -> type[Stage]:
    """What `use:` names, if it is a class derived from Stage that defines `forward`; raises ConfigError."""
    where = _where(name)
    if not isinstance(obj, type):
        what = f"{getattr(obj, '__name__', obj)!r} is a {type(obj).__name__}"
        if callable(obj):
            raise ConfigError(
                f"{where}{what}; plain functions as stages are not supported by this version of torchrelay yet, "
                "make it the forward of a class derived from torchrelay.Stage"
            )
        raise ConfigError(f"{where}{what}; `use` must name a class derived from torchrelay.Stage")
    if not issubclass(obj, Stage):
        raise ConfigError(f"{where}class {obj.__qualname__!r} must derive from torchrelay.Stage or TorchStage")
    if obj.forward is Stage.forward:
        raise ConfigError(f"{where}class {obj.__qualname__!r} does not define forward(self, batch)")
    return obj


def _where(name: str) -> str:
    return f"stage {name!r}: " if name else ""
