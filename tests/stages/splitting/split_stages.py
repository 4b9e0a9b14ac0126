"""Stages whose models are cut into parts: each with a trait that parts must keep, or must refuse."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from torchrelay import Batch, Expand, StageContext, TorchStage

Tensor = torch.Tensor


class Net(nn.Module):
    """Linear layers one behind the other."""

    def __init__(self, width: int = 4, layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.gelu(layer(x))
        return x


class ByValues(Net):
    """Does not trace, since it looks at values."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) == 1e30:
            return x
        return super().forward(x)


class Base(TorchStage):
    """Random weights by one seed; `forward` returns what the model makes of x."""

    model_type: type[nn.Module] = Net

    def build(self, context: StageContext) -> nn.Module:
        torch.manual_seed(0)
        return self.model_type()

    def forward(self, batch: Batch) -> Any:
        return {"y": self.model(batch["x"])}


class Plain(Base):
    pass


class Chain(Base):
    model_type = ByValues


class Tokens(Base):
    """The mean over the tokens of a row, weighted by what forward makes of their number, and all of them."""

    def build(self, context: StageContext) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(50, 4), Net())

    def forward(self, batch: Batch) -> Any:
        seen = batch.mask("tokens").unsqueeze(-1)
        y = self.model(batch["tokens"])
        lengths = batch.lengths["tokens"]
        return {
            "mean": (y * seen).sum(1) / lengths[:, None],
            "each": [r[:n] for r, n in zip(y, lengths.tolist(), strict=True)],
        }


class Opens(Base):
    """As many rows as n says, `rows: expand`."""

    def forward(self, batch: Batch) -> Any:
        y, n = self.model(batch["x"]), batch["n"]
        return Expand({"y": y.repeat_interleave(n, 0), "number": [i for k in n.tolist() for i in range(k)]}, n)


class Rejects(Tokens):
    """Rows whose first token is 13; of none but such it returns nothing."""

    def forward(self, batch: Batch) -> Any:
        first = batch["tokens"][:, 0].tolist()
        made = super().forward(batch)
        for row, token in enumerate(first):
            if token == 13:
                batch.reject(row, f"row with {token}")
        return made if set(first) != {13} else None


class Twice(Base):
    def forward(self, batch: Batch) -> Any:
        return {"y": self.model(self.model(batch["x"]))}


class Never(Base):
    def forward(self, batch: Batch) -> Any:
        return {"y": batch["x"]}


class Raises(Base):
    def forward(self, batch: Batch) -> Any:
        raise ValueError("x must not be zero")


class Autocast(Base):
    def forward(self, batch: Batch) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return {"y": self.model(batch["x"]).float()}


class Kept(ByValues):
    """Adds up what its layers make of one and the same x."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) == 1e30:
            return x
        total = torch.zeros_like(x)
        for layer in self.layers:
            total = total + layer(x)
        return total


class Sums(Base):
    model_type = Kept


class Skips(ByValues):
    """Adds what the first layer made behind the last one."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) == 1e30:
            return x
        made = []
        for layer in self.layers:
            x = F.gelu(layer(x))
            made.append(x)
        return x + made[0]


class Skipping(Base):
    model_type = Skips


class Placed(nn.Module):
    """A layer that adds a vector for each place: x float [N, L, 4], places [L, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        return self.layer(x) + places


class PlacesNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(100, 4))
        self.layers = nn.ModuleList(Placed() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) == 1e30:
            return x
        for layer in self.layers:
            x = layer(x, self.places[: x.shape[1]])
        return x


class Places(Base):
    model_type = PlacesNet


class Inner(Net):
    """Computes one layer in bfloat16, and one without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        first, second, *rest = self.layers
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = first(x)
        x = x.float()
        with torch.no_grad():
            x = second(x)
        for layer in rest:
            x = layer(x)
        return x


class Inside(Base):
    model_type = Inner


class BuildRaises(Base):
    def build(self, context: StageContext) -> nn.Module:
        raise ValueError("no such model")


class TiedNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers[3].weight = self.layers[0].weight
        self.register_buffer("seen", torch.full((4,), 3.0), persistent=False)
        self.plain = torch.arange(4.0)

    def forward(self, x: Tensor) -> Any:
        n = x.shape[1]
        for layer in self.layers:
            x = layer(x) * self.seen + self.plain
        return {"y": x, "n": x.shape[0], "input": n, "none": None}


class Tied(Base):
    model_type = TiedNet

    def forward(self, batch: Batch) -> Any:
        made = self.model(batch["x"])
        assert (made["n"], made["input"], made["none"]) == (len(batch), 4, None)
        return {"y": made["y"]}


class TiedChainNet(TiedNet):
    def forward(self, x: Tensor) -> Any:
        if float(x.sum()) == 1e30:
            return x
        return super().forward(x)


class TiedChain(Tied):
    model_type = TiedChainNet
