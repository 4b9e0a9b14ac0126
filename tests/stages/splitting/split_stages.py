"""Stages whose models are cut into parts, each with a trait that parts must keep or refuse."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from torchrelay import Batch, Expand, StageContext, TorchStage

Tensor = torch.Tensor


class Net(nn.Module):
    """Linear layers one behind the other. One that looks at values does not trace, and is cut between them."""

    looks = False

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Any:
        return self.compute(-x if self.looks and float(x.sum()) == 1e30 else x)

    def compute(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = F.gelu(layer(x))
        return x


class Stage(TorchStage):
    """Returns what the model makes of x. Random weights, the same ones each time."""

    model_type: type[nn.Module] = Net

    def build(self, context: StageContext) -> nn.Module:
        torch.manual_seed(0)
        return self.model_type()

    def forward(self, batch: Batch) -> Any:
        return {"y": self.model(batch["x"])}


class Tokens(Stage):
    """The sum over a row's tokens, and what the model makes of each. Refuses rows that begin with 13, and returns
    nothing where there are no others."""

    def build(self, context: StageContext) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(50, 4), Net())

    def forward(self, batch: Batch) -> Any:
        y = self.model(batch["tokens"])
        first, lengths = batch["tokens"][:, 0].tolist(), batch.lengths["tokens"].tolist()
        for row, token in enumerate(first):
            if token == 13:
                batch.reject(row, f"row of {lengths[row]}")
        if set(first) == {13}:
            return None
        total = (y * batch.mask("tokens")[..., None]).sum(1)
        return {"total": total, "each": [values[:n] for values, n in zip(y, lengths, strict=True)]}


class Opens(Tokens):
    """A row for each token."""

    def forward(self, batch: Batch) -> Any:
        y, lengths = self.model(batch["tokens"]), batch.lengths["tokens"]
        return Expand({"y": y[batch.mask("tokens")], "of": [i for n in lengths.tolist() for i in range(n)]}, lengths)


class AddsUp(Net):
    """All layers take the same x."""

    looks = True

    def compute(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for layer in self.layers:
            total = total + layer(x)
        return F.layer_norm(total, (4,))


class Total(Stage):
    model_type = AddsUp


class ComesBack(Net):
    """What the first layer made is added behind the second one."""

    looks = True

    def compute(self, x: Tensor) -> Tensor:
        made = []
        for number, layer in enumerate(self.layers):
            x = layer(x)
            made.append(x)
            if number == 1:
                x = x + made[0]
        return x


class Skip(Stage):
    model_type = ComesBack


class Lists(Net):
    """Returns what each layer made."""

    looks = True

    def compute(self, x: Tensor) -> Any:
        return [x := layer(x) for layer in self.layers]


class All(Stage):
    model_type = Lists

    def forward(self, batch: Batch) -> Any:
        return {"y": sum(self.model(batch["x"]))}


class Half(nn.Module):
    """Changes x, and returns nothing."""

    def forward(self, x: Tensor) -> None:
        x /= 2


class InPlace(Net):
    looks = True

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Half() for _ in range(4))

    def compute(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            layer(x)
        return x


class Halves(Stage):
    model_type = InPlace


class Add(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        return self.linear(x) + places


class Places(Net):
    """Layers are called with a tensor that has not the batch's rows; calls are counted, and weights are tied."""

    looks = True
    called: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(100, 4))
        self.layers = nn.ModuleList(Add() for _ in range(4))
        self.layers[3].linear.weight = self.layers[0].linear.weight
        self.register_buffer("called", torch.zeros(1), persistent=False)

    def compute(self, x: Tensor) -> Tensor:
        self.called += 1
        for layer in self.layers:
            x = layer(x, self.places[: x.shape[1]])
        return x + self.called


class Placed(Stage):
    model_type = Places


class Cast(Stage):
    def forward(self, batch: Batch) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return {"y": self.model(batch["x"]).float()}


class CastsItself(Net):
    def compute(self, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.layers[0](x)
        with torch.no_grad():
            x = self.layers[1](x.float())
        return {"y": self.layers[3](self.layers[2](x)), "rows": x.shape[0], "none": None}


class Inner(Stage):
    model_type = CastsItself

    def forward(self, batch: Batch) -> Any:
        made = self.model(batch["x"])
        assert (made["rows"], made["none"]) == (len(batch), None)
        return {"y": made["y"]}


class Broken(Stage):
    def build(self, context: StageContext) -> nn.Module:
        raise ValueError("no such model")
