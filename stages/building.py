"""Models that are built without the memory of their parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

__all__ = ["parameters_on_meta"]


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """What is built inside has its parameters on the meta device, and everything else for real.

    So buffers that are computed and never saved, such as frequencies of rotary embeddings, are there, which on the meta
    device they would not be. A parameter's memory is taken for a moment, and not touched unless it is computed.
    """

    def moved(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if type(parameter) is not nn.Parameter or parameter.is_meta:
            return None
        return nn.Parameter(parameter.data.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(moved)  # type: ignore[no-untyped-call, arg-type, unused-ignore]
    try:
        with torch.no_grad():
            yield
    finally:
        hook.remove()
