"""Layers that are cut for shards: together they make what the whole makes, and what cannot be cut is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from tests import models
from torchrelay import StageContext, TorchStage, cutting
from torchrelay.config.spec import StageConfig
from torchrelay.errors import ConfigError, StageLoadError
from torchrelay.stages import make_runner

Tensor = torch.Tensor


def shards(model: nn.Module, count: int, cut: Callable[[nn.Module, StageContext], object]) -> list[nn.Module]:
    """The model of each shard."""
    made = [copy.deepcopy(model) for _ in range(count)]
    for shard, one in enumerate(made):
        cut(one, StageContext(shard=shard, shards=count))
    return made


def whole(*layers: nn.Module) -> nn.Module:
    return models.fill(nn.Sequential(*layers)).requires_grad_(False)


def elements(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("count", [1, 2, 4])
def test_columns_then_rows_sum_to_the_whole(count: int) -> None:
    """Biases of the first are shared out, that of the second is there once; each shard has its share of the weights."""
    model = whole(nn.Linear(5, 16), nn.GELU(), nn.Linear(16, 3))

    def cut(one: nn.Module, context: StageContext) -> None:
        cutting.column_linear(one, context, "0")
        cutting.row_linear(one, context, "2")

    parts, x = shards(model, count, cut), torch.randn(7, 5)
    torch.testing.assert_close(sum(part(x) for part in parts), model(x), rtol=1e-5, atol=1e-6)
    assert sum(map(elements, parts)) == elements(model)
    assert {(p[0].out_features, p[2].in_features) for p in parts} == {(16 // count, 16 // count)}


@pytest.mark.parametrize("count", [2, 4])
def test_blocks_in_one_linear_are_cut_each_by_itself(count: int) -> None:
    """As gate and up of a gated layer in one: each shard has the halves that belong together."""
    model = whole(nn.Linear(5, 2 * 8), nn.GLU(), nn.Linear(8, 3, bias=False))

    def cut(one: nn.Module, context: StageContext) -> None:
        cutting.column_linear(one, context, "0", blocks=2)
        cutting.row_linear(one, context, "2")

    x = torch.randn(7, 5)
    made = sum(part(x) for part in shards(model, count, cut))
    torch.testing.assert_close(made, model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("by", ["features", "rows"])
def test_embeddings_are_concatenated_or_summed(by: str) -> None:
    """Without any rounding: each number comes of one shard."""
    model, numbers = whole(nn.Embedding(12, 8, padding_idx=0)), torch.randint(0, 12, (4, 9))
    parts = [p(numbers) for p in shards(model, 4, lambda m, c: cutting.embedding(m, c, "0", by=by))]
    made = torch.cat(parts, -1) if by == "features" else sum(parts)
    assert torch.equal(made, model(numbers))


def test_an_entry_that_no_shard_has_is_an_error_as_in_the_whole() -> None:
    part = shards(whole(nn.Embedding(12, 8)), 2, lambda m, c: cutting.embedding(m, c, "0", by="rows"))[0]
    with pytest.raises(IndexError, match="the embedding has 12"):
        part(torch.tensor([3, 12]))


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (4, 1)])
def test_heads_sum_to_the_whole_attention(count: int, heads: int, kv_heads: int) -> None:
    """Where there are fewer key and value heads than shards, some have the same one."""
    attention = models.fill(models.LlamaAttention(32, heads, kv_heads)).requires_grad_(False)

    def cut(one: nn.Module, context: StageContext) -> None:
        cutting.heads(one, context, "a", count=heads, kv_count=kv_heads, per_kv="copies")

    x = torch.randn(3, 6, 32)
    places = models.Rotary(32 // heads)(6, x)
    parts = shards(nn.ModuleDict({"a": attention}), count, cut)
    made = sum(part["a"](x, *places) for part in parts)
    torch.testing.assert_close(made, attention(x, *places), rtol=1e-5, atol=1e-5)


class Attention(nn.Module):
    """With one Linear for all, and its number of heads and their size in attributes."""

    def __init__(self, width: int = 32, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.all_heads = num_heads, width
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        made = functional.scaled_dot_product_attention(q, k, v)
        return self.out(made.transpose(1, 2).reshape(*x.shape[:2], self.all_heads))


def test_heads_in_one_linear_and_their_numbers_in_attributes() -> None:
    """The module goes on with this shard's numbers."""
    model, x = whole(Attention()), torch.randn(2, 5, 32)
    parts = shards(model, 4, lambda m, c: cutting.heads(m, c, "0", linears=("qkv", "out"), also=["all_heads"]))
    assert {(p[0].num_heads, p[0].all_heads) for p in parts} == {(1, 8)}
    torch.testing.assert_close(sum(p(x) for p in parts), model(x), rtol=1e-5, atol=1e-5)


class Experts(nn.Module):
    """A gate, experts as modules, and more of them in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 4)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x).softmax(-1)
        return sum(gates[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


@pytest.mark.parametrize("count", [2, 4])
def test_experts_sum_to_the_whole(count: int) -> None:
    """Each shard has its own, and the gate."""
    model, x = whole(Experts()), torch.randn(5, 6)
    parts = shards(model, count, lambda m, c: cutting.experts(m, c, "*.experts"))
    torch.testing.assert_close(sum(p(x) for p in parts), model(x), rtol=1e-5, atol=1e-6)
    gate = elements(model[0].gate)
    assert {elements(p) - gate for p in parts} == {(elements(model) - gate) // count}


def test_any_parameter_and_buffer_is_cut_along_a_dimension() -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.arange(24.0).view(2, 3, 4))
    model.register_buffer("b", torch.arange(4.0))
    first, second = shards(model, 2, lambda m, c: (cutting.parameter(m, c, "w", dim=-1), cutting.parameter(m, c, "b")))
    assert torch.equal(torch.cat([first.w, second.w], -1), model.w)
    assert torch.equal(second.b, torch.tensor([2.0, 3.0]))
    assert dict(second.named_buffers()).keys() == {"b"}


def test_the_state_of_the_whole_model_is_cut_as_the_model_was() -> None:
    """Built anew with other weights, each shard takes its own out of the whole's."""
    model = models.build("llama", layers=1)

    def cut(one: nn.Module, context: StageContext) -> None:
        cutting.heads(one, context, "*.self_attn", count=4, kv_count=2)
        cutting.column_linear(one, context, "*.gate_proj", "*.up_proj", "lm_head")
        cutting.row_linear(one, context, "*.down_proj")
        cutting.embedding(one, context, "model.embed_tokens", by="rows")

    expected = shards(model, 2, cut)
    for mine, part in zip(expected, shards(models.build("llama", seed=5, layers=1), 2, cut), strict=True):
        part.load_state_dict(cutting.cut_state(part, model.state_dict()))
        for name, value in mine.state_dict().items():
            assert torch.equal(part.state_dict()[name], value), name
    with pytest.raises(ConfigError, match=r"q_proj.weight' has shape \[16, 32\], and the whole model's has 32 in dim"):
        cutting.cut_state(expected[0], expected[0].state_dict())


class Up(TorchStage):
    """A model with every kind of cut, from a file with the whole one's weights."""

    def build(self, context: StageContext) -> nn.Module:
        made = nn.ModuleDict({"up": nn.Linear(5, 8), "down": nn.Linear(8, 3), "moe": Experts()})
        cutting.column_linear(made, context, "up")
        cutting.row_linear(made, context, "down")
        cutting.experts(made, context, "moe.experts")
        return made

    def forward(self, batch: Any) -> dict[str, Any]:
        return {"y": self.model["down"](self.model["up"](batch["x"]))}


def loaded(folder: Path, weights: str, shard: int) -> nn.Module:
    spec = StageConfig(name="up", use="a.py:Up", weights=weights)
    runner = make_runner(Up(), spec)
    runner.load(StageContext(shard=shard, shards=2, base_dir=folder))
    return runner.stage.model


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_are_those_of_the_whole_model_and_each_shard_takes_its_part(tmp_path: Path, suffix: str) -> None:
    """Whether they are read in parts or as a whole."""
    model = models.fill(Up().build(StageContext()))
    path = tmp_path / f"w.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(model.state_dict(), path)
    for shard in range(2):
        made = loaded(tmp_path, path.name, shard)
        assert torch.equal(made["up"].weight, model["up"].weight[4 * shard : 4 * shard + 4])
        assert torch.equal(made["down"].weight, model["down"].weight[:, 4 * shard : 4 * shard + 4])
        assert (made["down"].bias is None) == (shard == 1)
        assert torch.equal(made["moe"].experts[2 * shard].weight, model["moe"].experts[2 * shard].weight)
        assert not list(made["moe"].experts[2 - 2 * shard].parameters())


def test_weights_that_were_cut_already_are_named(tmp_path: Path) -> None:
    """With the tensor, its shape and what is expected."""
    model = Up().build(StageContext(shards=2))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(StageLoadError, match=r"stage 'up': weights .* 'down.weight' has shape \[3, 4\], and the"):
        loaded(tmp_path, "w.safetensors", 0)


THREE = StageContext(shards=3)


@pytest.mark.parametrize(
    ("cut", "says"),
    [
        (
            lambda m, c: cutting.column_linear(m, c, "head"),
            "module 'head': out_features of 8 does not divide into 3 shards; set shards.count to 2 or 4 or 8, or pad",
        ),
        (lambda m, c: cutting.row_linear(m, c, "layers.*"), "module 'layers.0': in_features of 32 does not divide in"),
        (lambda m, c: cutting.column_linear(m, c, "heads"), "column_linear: 'heads' matches nothing in Mlp; did you m"),
        (
            lambda m, c: cutting.column_linear(m, c, "layers"),
            "column_linear: module 'layers' is a ModuleList, and column_linear cuts Linear; in it there are 0, 1",
        ),
        (lambda m, c: cutting.experts(m, c, "layers"), "module 'layers': the number of modules of 4 does not divide"),
        (
            lambda m, c: cutting.parameter(m, c, "head.weight", dim=2),
            "'head.weight' has shape [8, 32], and no dimension",
        ),
        (
            lambda m, c: cutting.parameter(m, c, "head.weigth"),
            "'head.weigth' matches nothing in Mlp; did you mean 'hea",
        ),
        (
            lambda m, c: cutting.embedding(m, c, "head", by="columns"),
            'embedding: by is "features" or "rows", \'columns\'',
        ),
        (lambda m, c: cutting.heads(m, c, "head"), "heads: module 'head' has no attribute 'num_heads' with its number"),
        (
            lambda m, c: cutting.heads(m, c, "head", count=4),
            "module 'head': a number of heads of 4 does not divide into",
        ),
        (
            lambda m, c: cutting.heads(m, c, "head", count=12, kv_count=4),
            "12 heads share 4 key and value heads, which 3",
        ),
        (
            lambda m, c: cutting.heads(m, c, "head", count=3),
            "heads: 'head.q_proj' is not there, and heads cuts nn.Linear",
        ),
        (
            lambda m, c: cutting.heads(m, c, "head", linears=("a", "b", "c")),
            "linears names 4 layers (query, key, value",
        ),
    ],
)
def test_what_cannot_be_cut_is_named_with_the_remedy(
    cut: Callable[[nn.Module, StageContext], object], says: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        cut(models.build("mlp", layers=4), THREE)
    assert says in str(raised.value)


def test_what_is_cut_or_tied_is_not_cut_again() -> None:
    """A second cut would take a part of the part; one of two that share a weight would no longer share it."""
    two = StageContext(shards=2)
    model = models.build("llama", tied=True)
    with pytest.raises(ConfigError, match=r"'lm_head.weight' is tied to 'model.embed_tokens.weight'; give one of them"):
        cutting.column_linear(model, two, "lm_head")
    cutting.column_linear(model, two, "*.up_proj")
    with pytest.raises(ConfigError, match=r"'model.layers.0.mlp.up_proj.weight' is cut already; name it once"):
        cutting.column_linear(model, two, "*.mlp.up*")


def test_an_error_of_a_cut_names_the_stage(tmp_path: Path) -> None:
    """A worker that cannot build its part says which stage it is, and does not try again."""

    class Odd(Up):
        def build(self, context: StageContext) -> nn.Module:
            model = nn.Sequential(nn.Linear(4, 5))
            cutting.column_linear(model, context, "0")
            return model

    runner = make_runner(Odd(), StageConfig(name="odd", use="a.py:Odd"))
    with pytest.raises(ConfigError, match=r"^stage 'odd': module '0': out_features of 5 does not divide into 2 shards"):
        runner.load(StageContext(shards=2, base_dir=tmp_path))
