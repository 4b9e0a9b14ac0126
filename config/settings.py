"""Settings of a process: from arguments, else from `TORCHRELAY_*` in the environment, read in this one place."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from torchrelay.errors import ConfigError

_NAMESPACE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_BYTES = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([KMGT]i?B?|B)?\s*", re.IGNORECASE)
_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_bytes(value: int | str) -> int:
    """A number of bytes from 4096, "512MiB", "2GB" and the like; raises ConfigError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _BYTES.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ConfigError(f'{value!r:.60} is no size; write bytes or for example "512MiB"')
    unit = (match[2] or "").upper().removesuffix("B")
    return int(float(match[1]) * (_BINARY.get(unit) or _UNITS[unit]))


@dataclass(frozen=True)
class Settings:
    """How a process reaches Redis and treats jobs. Environment variables are `TORCHRELAY_` and the name in capitals."""

    redis_url: str | None = None
    """redis://, rediss:// or unix:// URL; None means the embedded server."""
    namespace: str = "default"
    """Separates users of one server: letters, digits, `_.-`, at most 64."""
    lanes: int = 1
    """Slices of the key space, fixed when the namespace is first used; more than one serves a Redis Cluster."""
    lease_ms: int = 15_000
    """How long a silent worker keeps its jobs."""
    priority_boost_ms_per_point: int = 600
    """How far ahead of its arrival each point of priority places a job; a point of 100 is `high`."""
    results_max_bytes: int = 1 << 30
    """Unread results beyond this make `submit` raise QueueFull."""
    arena_bytes: int | None = None
    """Shared memory that one process may take to hand large columns to others of its host; 0 turns that off. None
    means 1 GiB, or a 32nd of the tmpfs where that is more."""
    arena_dir: str = "/dev/shm"
    """The tmpfs that holds it."""
    device_arena_bytes: int = 2 << 30
    """Memory of its GPU that a worker may take to hand columns to other GPUs (`handoff: device`); 0 turns that off."""
    run_writer: str = ""
    """`file.py:Writer` that a worker of `@write` may import for runs with that format; what a job names is never."""
    group_address: str = ""
    """Where others reach this host's rank 0 of a group (`mode: tensor`); empty: by which it reaches Redis."""
    nursery: bool = True
    """Whether workers may be forked from a process that has imported what they need; 0: each a fresh interpreter."""
    log: Literal["text", "json"] = "text"
    """Form of the workers' logs."""

    def __post_init__(self) -> None:
        def need(name: str, ok: bool, what: str) -> None:
            if not ok:
                # A URL may hold a password, so it is never shown.
                value = "" if name == "redis_url" else f" {getattr(self, name)!r:.80}"
                raise ConfigError(f"{name}{value} must be {what} (argument, or TORCHRELAY_{name.upper()})")

        url = self.redis_url
        need(
            "redis_url",
            url is None or (isinstance(url, str) and url.startswith(("redis://", "rediss://", "unix://"))),
            "redis://, rediss:// or unix://",
        )
        need(
            "namespace",
            isinstance(self.namespace, str) and bool(_NAMESPACE.fullmatch(self.namespace)),
            "1 to 64 of A-Za-z0-9_.-",
        )
        need("lanes", _whole(self.lanes, 1, 62), "a whole number from 1 to 62")
        need("lease_ms", _whole(self.lease_ms, 500, 3_600_000), "a whole number from 500 to 3600000")
        need("priority_boost_ms_per_point", _whole(self.priority_boost_ms_per_point, 0, 10**8), "a whole number from 0")
        need("results_max_bytes", _whole(self.results_max_bytes, 1, 2**50), "a number of bytes from 1")
        need("arena_bytes", self.arena_bytes is None or _whole(self.arena_bytes, 0, 2**50), "a number of bytes from 0")
        need("arena_dir", isinstance(self.arena_dir, str) and self.arena_dir.startswith("/"), "an absolute path")
        need("device_arena_bytes", _whole(self.device_arena_bytes, 0, 2**50), "a number of bytes from 0")
        need("run_writer", isinstance(self.run_writer, str), "file.py:Writer, or empty")
        need("group_address", isinstance(self.group_address, str), "a host name or address, or empty")
        need("nursery", isinstance(self.nursery, bool), "0 or 1")
        need("log", self.log in ("text", "json"), "text or json")

    @property
    def url(self) -> str | None:
        return self.redis_url

    @classmethod
    def load(cls, environment: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
        """Arguments that are not None go before the environment; `url` is short for `redis_url`. Raises ConfigError."""
        environment = os.environ if environment is None else environment
        if "url" in overrides:
            overrides["redis_url"] = overrides.pop("url")
        known = [f.name for f in fields(cls)]
        for name in overrides:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"settings are {', '.join(known)}"
                raise ConfigError(f"unknown setting {name!r:.60}; {hint}")
        values: dict[str, Any] = {}
        for name in known:
            text = environment.get(f"TORCHRELAY_{name.upper()}")
            if text:
                values[name] = _from_text(name, text)
        values.update((k, v) for k, v in overrides.items() if v is not None)
        return cls(**values)


def _whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _from_text(name: str, text: str) -> Any:
    if name in ("lanes", "lease_ms", "priority_boost_ms_per_point"):
        try:
            return int(text)
        except ValueError:
            raise ConfigError(f"TORCHRELAY_{name.upper()} {text!r:.60} is not a whole number") from None
    if name in ("results_max_bytes", "arena_bytes", "device_arena_bytes"):
        try:
            return parse_bytes(int(text) if text.strip().isdecimal() else text)
        except (ConfigError, ValueError) as error:
            raise ConfigError(f"TORCHRELAY_{name.upper()}: {error}") from None
    if name == "nursery" and text in ("0", "1"):
        return text == "1"
    return text
