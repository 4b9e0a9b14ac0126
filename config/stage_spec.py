"""`StageSpec`: a stage of a pipeline that is written in Python. It becomes the same plain data as a stage of a file."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from torchrelay.config.imports import MADE_UP, module_origin
from torchrelay.errors import ConfigError

_REMEDY = "put it into a file or module of its own, and give that: workers import stages anew"
_MAX_DEPTH = 64


class StageSpec:
    """One stage of a `Pipeline`. What is None stands at its default, and each key means what it means in a file.

    Args:
        name: what the stage is called.
        use: the stage's class or function, or its place: `file.py:Name` beside the pipeline, or `package.module:Name`.
            None only for a collapse, which then regroups rows without running code.
        after: the stages before it, or "input"; without any `after`, each stage follows the one above.
        inputs: the columns that it reads: a list, or its own names to `column` or `stage.column`; default all.
        outputs: the columns that it returns, and their types.
        rows: "same", "expand", or {"collapse": STAGE}.
        when: the column that says which rows enter; the others skip the stage.
        device: "cpu" or "gpu".
        args: for `__init__`, or for each call of a function; plain values, as a file could hold them.
        weights: a file beside the pipeline.
        torch: dtype, channels_last, compile and cuda_graphs, for a TorchStage.
        batch: max_rows, max_wait_ms, max_cost, pad, buckets, row_buckets, ahead and in_flight_rows.
        replicas: how many workers, or min and max.
        resources: compute, memory, cpus and host_memory that one worker takes.
        hosts: labels that its hosts have, or labels and apart.
        retry: attempts and backoff_s.
        timeout_s: seconds per forward.
        queue: max_rows and max_bytes.
        scale: delay_ms, how long jobs of each priority should wait at most.
        wire: dtype and compress, of what it sends to the next stages.
        handoff: "device" leaves what it made in its GPU's memory, for other GPUs of its host; default "host".
        shards: count and mode ("gather", "tensor" or "pipeline") of the parts that its model is cut into; combine, plan
            and balance say how.

    Raises ConfigError for a value that no file could hold; all else is checked when the Pipeline is made.
    """

    __slots__ = ("_given", "name", "use")

    def __init__(
        self,
        name: str,
        *,
        use: str | type | Callable[..., Any] | None = None,
        after: str | Sequence[str] | None = None,
        inputs: Sequence[str] | Mapping[str, str] | None = None,
        outputs: Mapping[str, str] | None = None,
        rows: Literal["same", "expand"] | Mapping[str, str] | None = None,
        when: str | None = None,
        device: Literal["cpu", "gpu"] | None = None,
        args: Mapping[str, Any] | None = None,
        weights: str | os.PathLike[str] | None = None,
        torch: Mapping[str, Any] | None = None,
        batch: Mapping[str, Any] | None = None,
        replicas: int | Mapping[str, int] | None = None,
        resources: Mapping[str, Any] | None = None,
        hosts: str | Sequence[str] | Mapping[str, Any] | None = None,
        retry: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
        queue: Mapping[str, Any] | None = None,
        scale: Mapping[str, Any] | None = None,
        wire: Mapping[str, Any] | None = None,
        handoff: Literal["host", "device"] | None = None,
        shards: Mapping[str, Any] | None = None,
    ) -> None:
        keys: dict[str, Any] = {
            "after": after,
            "inputs": inputs,
            "outputs": outputs,
            "rows": rows,
            "when": when,
            "device": device,
            "args": args,
            "weights": weights,
            "torch": torch,
            "batch": batch,
            "replicas": replicas,
            "resources": resources,
            "hosts": hosts,
            "retry": retry,
            "timeout_s": timeout_s,
            "queue": queue,
            "scale": scale,
            "wire": wire,
            "handoff": handoff,
            "shards": shards,
        }
        self.name = name
        self.use = use
        who = f"stage {name!r:.80}: "
        self._given = {key: plain(value, who + key) for key, value in keys.items() if value is not None}

    def data(self) -> dict[str, Any]:
        """The keys that were given, as a file would hold them, without `name` and `use`."""
        return {key: plain(value, key) for key, value in self._given.items()}

    def _all(self) -> dict[str, Any]:
        return ({} if self.use is None else {"use": self.use}) | self._given

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StageSpec) and (self.name, self._all()) == (other.name, other._all())

    def __hash__(self) -> int:
        return hash((self.name, self.use))

    def __repr__(self) -> str:
        return f"StageSpec({', '.join([repr(self.name), *(f'{k}={v!r}' for k, v in self._all().items())])})"


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy in dicts, lists, texts, numbers, bools and None; raises ConfigError for what is none of them."""
    if depth > _MAX_DEPTH:
        raise ConfigError(f"{where[:200]}: is nested too deeply, or in itself")
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        # Not str(): of a member of an Enum of texts, that is its name.
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, os.PathLike) and isinstance(os.fspath(value), str):
        return os.fspath(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"{where}: its key {key!r:.60} is no text")
        return {str.__str__(k): plain(v, f"{where}.{k}", depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]
    what = type(value).__qualname__
    raise ConfigError(
        f"{where}: {what} is no plain value; give text, numbers, lists and mappings, as a file holds them"
    )


def use_text(target: Any, base_dir: Path) -> str:
    """How a file in `base_dir` names this class or function: file.py:Name or package.module:Name."""
    if isinstance(target, str):
        return target
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
    if not callable(target) or not isinstance(module, str) or not isinstance(name, str):
        raise ConfigError(f"use: a class, a function or a text is expected, {type(target).__qualname__} came")
    if module in ("__main__", "__mp_main__"):
        raise ConfigError(f"use: {name} is of this script, notebook or prompt; {_REMEDY}")
    loaded = sys.modules.get(module)
    if not name.isidentifier() or getattr(loaded, name, None) is not target:
        raise ConfigError(f"use: {name} cannot be imported from {module} by that name; {_REMEDY}")
    file = getattr(loaded, "__file__", None)
    path = Path(inspect.getsourcefile(loaded) or file).resolve() if loaded is not None and file else None
    if path is not None and path.suffix == ".py" and path.parent == base_dir.resolve():
        return f"{path.name}:{name}"
    if module.startswith(MADE_UP) or module_origin(module) is None:
        raise ConfigError(f"use: {name} lies in {path or module}, which workers do not find; move it into {base_dir}")
    return f"{module}:{name}"
