"""What a failed forward says about its device: it is out of memory, or lost for this process. Imports no torch."""

from __future__ import annotations

import traceback
from collections.abc import Iterator

from torchrelay.errors import DeviceError

__all__ = ["DeviceLost", "blame", "blamed", "is_device_lost", "is_out_of_memory", "let_go"]

_LIBRARIES = ("torch", "triton", "cupy", "jaxlib")
_MEMORY_TYPES = ("OutOfMemoryError", "OutOfResources")
_MEMORY_TEXTS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "out of resource:",  # of Triton, whose compiler may raise it in an error of another type
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUFFT_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUSPARSE_STATUS_INSUFFICIENT_RESOURCES",
    "RESOURCE_EXHAUSTED: Out of memory",
    "DefaultCPUAllocator: can't allocate memory",
)
# After one of these every later call to CUDA fails in the same process; other "CUDA error"s leave it usable.
_LOST_MARKS = ("CUDA", "cuda", "CUBLAS_STATUS", "CUDNN_STATUS")
_LOST_TEXTS = (
    "illegal memory access",
    "illegal address",
    "illegal instruction",
    "misaligned address",
    "invalid address space",
    "invalid program counter",
    "hardware stack error",
    "unspecified launch failure",
    "launch timed out",
    "device-side assert",
    "uncorrectable",  # ECC and NVLink
    "unknown error",
    "GPU is lost",
    "fallen off the bus",
    "CUBLAS_STATUS_EXECUTION_FAILED",
    "CUDNN_STATUS_EXECUTION_FAILED",
)


class DeviceLost(DeviceError):
    """A CUDA error after which this process can compute nothing more on its device."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may pass: the device's memory, or a library's part of it, is full."""
    return any(_of_library(e, _MEMORY_TYPES) or _says(e, _MEMORY_TEXTS) for e in _causes(error))


def is_device_lost(error: BaseException) -> bool:
    """Whether the device is of no more use to this process; also when the stage raised something else upon that."""
    return any(_says(e, _LOST_TEXTS) and _says(e, _LOST_MARKS) for e in _chain(error))


def let_go(error: BaseException) -> None:
    """Frees what the ended calls of an error's traceback hold; its text stays. Call it outside the `except` block."""
    for e in _chain(error):
        traceback.clear_frames(e.__traceback__)


def _of_library(error: BaseException, names: tuple[str, ...]) -> bool:
    return any(t.__name__ in names and t.__module__.partition(".")[0] in _LIBRARIES for t in type(error).__mro__)


def _says(error: BaseException, texts: tuple[str, ...]) -> bool:
    # Torch raises its own types from RuntimeError. A stage's other errors may quote anything.
    if not isinstance(error, RuntimeError) and type(error).__module__.partition(".")[0] not in _LIBRARIES:
        return False
    try:
        said = str(error)
    except Exception:  # a stranger's __str__ may raise anything
        return False
    return any(text in said for text in texts)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from on purpose."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and everything that was being handled when it was raised."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        e = todo.pop()
        if e is not None and id(e) not in seen:
            seen.add(id(e))
            yield e
            todo += [e.__cause__, e.__context__]


_BLAMED = "_torchrelay_stage"


def blame(error: BaseException, stage: str) -> None:
    """Notes which of the stages that run as one raised it, unless that is known."""
    # Not setattr: a class may have one of its own.
    error.__dict__.setdefault(_BLAMED, stage)


def blamed(error: BaseException | None) -> str:
    """The stage that raised it, '' where only one could have."""
    return "" if error is None else str(error.__dict__.get(_BLAMED, ""))
