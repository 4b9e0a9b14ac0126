"""What this host offers to workers: its GPUs as NVML tells of them, the processors and the memory that it may use.

Bounds are those of this process: its processors (affinity, quota of the control group), its control group's memory, and
`CUDA_VISIBLE_DEVICES`. `--slots` says what of it is offered. GPUs are counted as torch counts them, in NVML's order.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torchrelay.config.fleet import CPU, Gpu
from torchrelay.errors import ConfigError

__all__ = ["ORDER", "Nvml", "Offer", "SlotReader", "open_nvml", "parse_slots"]

log = logging.getLogger("torchrelay.agent")
ORDER = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
"""For the environment of workers: without it, CUDA counts the fastest GPU first, and NVML does not."""
_SLOT = re.compile(r"(cpu)(?:=(\d+(?:\.\d+)?))?|cuda:(\d+)")


class Nvml(Protocol):
    """The part of the module `pynvml` that is asked."""

    NVMLError: type[Exception]
    NVML_P2P_CAPS_INDEX_NVLINK: int
    NVML_P2P_STATUS_OK: int

    def nvmlInit(self) -> object: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> Any: ...
    def nvmlDeviceGetUUID(self, handle: Any, /) -> str | bytes: ...
    def nvmlDeviceGetName(self, handle: Any, /) -> str | bytes: ...
    def nvmlDeviceGetMemoryInfo(self, handle: Any, /) -> Any: ...
    def nvmlDeviceGetUtilizationRates(self, handle: Any, /) -> Any: ...
    def nvmlDeviceGetP2PStatus(self, one: Any, other: Any, index: int, /) -> int: ...


def open_nvml() -> Nvml | None:
    """NVML, ready to be asked; None where there is none, and then there are no GPUs to offer."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        log.info("no GPU is offered: %s", error)
        return None
    found: Nvml = pynvml
    return found


@dataclass(frozen=True, slots=True)
class Offer:
    """What the host offers at the moment, in the words of `HostReport`."""

    cpus: float
    memory: int
    free_memory: int
    gpus: tuple[Gpu, ...] = ()
    links: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class _Chosen:
    """`--slots`, read: None stands for all that there is."""

    cpus: float | None = None
    gpus: frozenset[int] | None = None


def parse_slots(text: str) -> _Chosen:
    """`auto`, or what is offered and nothing else: `cpu=4,cuda:0`. Raises ConfigError."""
    if text == "auto":
        return _Chosen()
    cpus: float | None = 0.0
    gpus: list[int] = []
    for word in text.split(","):
        match = _SLOT.fullmatch(word.strip())
        if match is None:
            raise ConfigError(f"--slots {text!r:.80}: write auto, or for example cpu=4,cuda:0,cuda:1")
        if match[1]:
            cpus = None if match[2] is None else float(match[2])
        else:
            gpus.append(int(match[3]))
    return _Chosen(cpus, frozenset(gpus))


class SlotReader:
    """Reads what is offered; `read()` again and again, as memory and use change.

    Args:
        slots: `--slots`.
        nvml: None where there is none.
        environment: where `CUDA_VISIBLE_DEVICES` is looked up.
        files: the root of the file system that tells of processors and memory.
    """

    def __init__(
        self,
        slots: str = "auto",
        nvml: Nvml | None = None,
        environment: Mapping[str, str] | None = None,
        files: Path = Path("/"),
    ) -> None:
        self._chosen = parse_slots(slots)
        self._nvml = nvml
        self._visible = (os.environ if environment is None else environment).get("CUDA_VISIBLE_DEVICES")
        self._files = files
        self._told: set[str] = set()
        self._links: dict[tuple[str, ...], tuple[tuple[int, ...], ...]] = {}

    def check(self) -> None:
        """Raises ConfigError for a GPU that was named and is not there."""
        named, found = self._chosen.gpus or frozenset(), {gpu.index for gpu in self.read().gpus}
        if missing := sorted(named - found):
            why = 'install it: pip install "torchrelay[worker]"' if "pynvml" not in sys.modules else "see nvidia-smi"
            known = ", ".join(f"cuda:{i}" for i in sorted(found)) or "none"
            hint = why if self._nvml is None else "see nvidia-smi and CUDA_VISIBLE_DEVICES"
            raise ConfigError(f"--slots names cuda:{missing[0]}, and the GPUs here are {known} (by NVML); {hint}")

    def read(self) -> Offer:
        """What there is now. A GPU that NVML cannot tell of is left out, and the log says why."""
        handles = [] if self._nvml is None else self._handles(self._nvml)
        gpus = tuple(gpu for gpu, _ in handles)
        total, free = self._memory()
        cpus = self._cpus() if self._chosen.cpus is None else self._chosen.cpus
        return Offer(cpus, total, free, gpus, self._linked(handles))

    def _handles(self, nvml: Nvml) -> list[tuple[Gpu, Any]]:
        try:
            all_of_them = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
            uuids = [_text(nvml.nvmlDeviceGetUUID(handle)) for handle in all_of_them]
        except nvml.NVMLError as error:
            self._tell(f"the GPUs cannot be told of: {error}")
            return []
        found = []
        for index, place in enumerate(_visible(self._visible, uuids)):
            if self._chosen.gpus is not None and index not in self._chosen.gpus:
                continue
            try:
                found.append((self._gpu(nvml, index, uuids[place], all_of_them[place]), all_of_them[place]))
            except nvml.NVMLError as error:
                self._tell(f"cuda:{index} is not offered: {error}")
        return found

    def _gpu(self, nvml: Nvml, index: int, uuid: str, handle: Any) -> Gpu:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        utilisation = None
        try:
            utilisation = nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100.0
        except nvml.NVMLError:
            pass  # some devices do not tell
        name = _text(nvml.nvmlDeviceGetName(handle))
        return Gpu(index, uuid, name, int(memory.total), int(memory.free), utilisation)

    def _linked(self, handles: Sequence[tuple[Gpu, Any]]) -> tuple[tuple[int, ...], ...]:
        """Groups that reach each other over NVLink; asked once, as wires do not move."""
        nvml, key = self._nvml, tuple(gpu.uuid for gpu, _ in handles)
        if nvml is None or len(handles) < 2:
            return ()
        if key not in self._links:
            groups: list[set[int]] = []
            for gpu, handle in handles:
                mates = {other.index for other, h in handles if other is not gpu and self._reaches(nvml, handle, h)}
                joined = [group for group in groups if group & (mates | {gpu.index})]
                groups = [g for g in groups if g not in joined] + [set().union({gpu.index}, *joined)]
            self._links[key] = tuple(sorted(tuple(sorted(g)) for g in groups if len(g) > 1))
        return self._links[key]

    def _reaches(self, nvml: Nvml, one: Any, other: Any) -> bool:
        try:
            status = nvml.nvmlDeviceGetP2PStatus(one, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
        except nvml.NVMLError:
            return False
        return status == nvml.NVML_P2P_STATUS_OK

    def _tell(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            log.warning("%s", what)

    def _groups(self) -> list[Path]:
        """The control groups (version 2) of this process, the innermost first."""
        root = self._files / "sys/fs/cgroup"
        try:
            own = (self._files / "proc/self/cgroup").read_text().strip().rpartition("::")[2].lstrip("/")
        except (OSError, ValueError):
            return []
        folder = root / own
        groups = [folder, *folder.parents]
        # Inside a container the group's own folder is the root of what is mounted.
        return groups[: groups.index(root) + 1] if root in groups else []

    def _cpus(self) -> float:
        affinity = getattr(os, "sched_getaffinity", None)
        cpus = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
        for group in self._groups():
            quota, _, period = _read(group / "cpu.max").partition(" ")
            if quota.isdecimal() and period.isdecimal() and int(period):
                cpus = min(cpus, int(quota) / int(period))
        return cpus

    def _memory(self) -> tuple[int, int]:
        """In all, and free; 0 where nobody tells."""
        lines = (line.split() for line in _read(self._files / "proc/meminfo").splitlines())
        told = {
            words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) > 1 and words[1].isdecimal()
        }
        total, free = told.get("MemTotal", 0), told.get("MemAvailable", 0)
        for group in self._groups():
            limit, used = _read(group / "memory.max"), _read(group / "memory.current")
            if limit.isdecimal() and used.isdecimal():
                # What the group holds of files it gives back when asked.
                stats = dict(line.split(" ", 1) for line in _read(group / "memory.stat").splitlines() if " " in line)
                held = int(used) - int(stats.get("inactive_file", 0))
                total, free = min(total, int(limit)), max(min(free, int(limit) - held), 0)
        return total, free


def _visible(text: str | None, uuids: Sequence[str]) -> list[int]:
    """Places of the GPUs that CUDA shows, in its order: up to the first that it does not know."""
    if text is None:
        return list(range(len(uuids)))
    found: list[int] = []
    for word in text.split(","):
        name = word.strip()
        places = [int(name)] if name.isdecimal() else [i for i, u in enumerate(uuids) if name and u.startswith(name)]
        if len(places) != 1 or not 0 <= places[0] < len(uuids) or places[0] in found:
            break
        found += places
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def slot_device(slot: str) -> str:
    """The device of a worker on this slot, in the words of `--device`."""
    return "auto-cpu" if slot == CPU else slot
