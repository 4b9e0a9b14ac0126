"""Which errors say that a device's memory is full, or that the device is lost to this process."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from torchrelay.errors import DeviceError
from torchrelay.stages import Batch, Runner, Stage
from torchrelay.stages.faults import is_device_lost, is_out_of_memory, let_go


class OutOfResources(Exception):
    """As Triton's."""


OutOfResources.__module__ = "triton.runtime.errors"


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        OutOfResources("out of resource: shared memory, Required: 262144, Hardware limit: 232448"),
        caused(ValueError("the model failed"), torch.OutOfMemoryError("CUDA out of memory.")),
    ],
)
def test_memory_that_is_full_is_recognised(error: Exception) -> None:
    """Torch, its libraries and Triton each say it in their own words; the device stays usable."""
    assert is_out_of_memory(error)
    assert not is_device_lost(error)


def test_memory_of_the_host_is_recognised_too() -> None:
    """A stage on the CPU runs out in the same way."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: device-side assert triggered",
        "CUDA error: unspecified launch failure",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: misaligned address",
        "Triton Error [CUDA]: an illegal memory access was encountered",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`",
    ],
)
def test_a_lost_device_is_recognised(text: str) -> None:
    """Also as torch's own type, and behind an error that the stage raised upon it."""
    assert is_device_lost(RuntimeError(text))
    assert is_device_lost(getattr(torch, "AcceleratorError", RuntimeError)(text))
    assert not is_out_of_memory(RuntimeError(text))
    upon = KeyError("x")
    upon.__context__ = RuntimeError(text)
    assert is_device_lost(upon)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: invalid configuration argument"),
        RuntimeError("CUDA error: no kernel image is available for execution on the device"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        ValueError("the text was: CUDA out of memory; CUDA error: an illegal memory access was encountered"),
        MemoryError("an image bomb"),
        RuntimeError("an unknown error"),
    ],
)
def test_other_errors_say_nothing_of_the_device(error: Exception) -> None:
    """A stage's own errors, texts that quote, and CUDA errors that pass."""
    assert not is_out_of_memory(error)
    assert not is_device_lost(error)


def test_an_error_lets_go_of_what_its_calls_held() -> None:
    """Freed at once, while its traceback can still be printed."""

    class Held:
        pass

    refs: list[weakref.ref[Held]] = []

    def forward() -> None:
        held = Held()
        refs.append(weakref.ref(held))
        try:
            raise RuntimeError("one")
        except RuntimeError:
            raise ValueError("two")  # noqa: B904  # the first is its context

    try:
        forward()
    except ValueError as error:
        kept = error
    gc.collect()
    assert refs[0]() is not None
    let_go(kept)
    gc.collect()
    assert refs[0]() is None
    assert kept.__traceback__ is not None


def test_a_runner_tells_of_a_lost_device_before_anything_else_is_done() -> None:
    """Its hook is called first; where that returns, a DeviceError ends what called it."""

    class Lost(Stage):
        def forward(self, batch: Batch) -> Any:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    runner = Runner(Lost(), "lost")
    seen: list[BaseException] = []
    runner.on_device_lost = seen.append
    with pytest.raises(DeviceError, match="stage 'lost': device cpu is of no more use"):
        runner.run([{"x": np.arange(2)}], [2])
    assert "illegal" in str(seen[0])
