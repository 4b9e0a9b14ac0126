"""Plans: which modules are cut, and what is said of those that cannot be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from torch import nn

from tests.stages.parallel_models import FUSED, Bert, Fused, Llama, SelfAttention, mlp
from torchrelay.config.spec import ShardsSpec
from torchrelay.errors import StageLoadError
from torchrelay.stages.cuts import Cut
from torchrelay.stages.plans import find_plan
from torchrelay.stages.tensor_parallel import parallelize


def cut(model: nn.Module, plan: Any = None, count: int = 2, rank: int = 0) -> dict[str, Cut]:
    ranks: Any = SimpleNamespace(rank=rank, count=count)
    return parallelize(model, plan, ranks)


def styles(model: nn.Module, plan: Any = None, count: int = 2) -> dict[str, str]:
    return {name: style.kind for name, style in find_plan(model, plan, count).modules.items()}


def test_known_models() -> None:
    """Blocks are found by names and sizes; what is no block's is left whole."""
    assert styles(mlp()) == {"0": "column", "2": "row"}
    bert = styles(Bert())
    assert bert["layers.1.attention.self.key"] == "column"
    assert bert["layers.1.attention.output.dense"] == "row"
    assert (bert["word_embeddings"], bert["decoder"]) == ("embedding", "column_gather")
    assert "positions" not in bert
    assert styles(Llama(), "llama") == styles(Llama())
    with pytest.raises(StageLoadError, match=r"no blocks of the plan 'bert' .* those of the plan 'llama'"):
        styles(Llama(), "bert")
    with pytest.raises(StageLoadError, match=r"Fused has no blocks .* 'all3', 'back', 'out'"):
        styles(Fused())


def test_what_lies_between_leaves_a_block_whole() -> None:
    """A norm over all heads, a value for each head, and a width that is not what the row reads."""
    model = Llama()
    attention: Any = model.layers[0]
    attention["attention"].q_norm = nn.LayerNorm(64)
    attention = model.layers[1]
    attention["attention"].sinks = nn.Parameter(nn.Linear(1, 8).bias.data)
    assert not any("attention" in name for name in styles(model))
    model = Llama()
    attention = model.layers[0]
    attention["attention"].q_norm = nn.LayerNorm(8)
    assert "layers.0.attention.q_proj" in styles(model)
    attention["mlp"]["norm"] = nn.LayerNorm(40)
    assert "layers.0.mlp.up_proj" not in styles(model)
    encoder = nn.TransformerEncoderLayer(16, 4)
    with pytest.raises(StageLoadError, match="has no blocks"):
        styles(encoder)
    with pytest.raises(
        StageLoadError, match=r"linear1'.*TransformerEncoderLayer, which computes with its weights itself"
    ):
        styles(nn.ModuleList([encoder]), {"0.linear1": "column", "0.linear2": "row"})


def test_heads_and_widths_become_the_ranks_own() -> None:
    """Counts divide, sizes of heads stay; keys and values that are fewer than the ranks are several ranks'."""
    bert = Bert()
    cut(bert)
    parts: Any = bert.layers[0]
    attention = parts["attention"]["self"]
    assert (attention.num_attention_heads, attention.attention_head_size, attention.all_head_size) == (2, 4, 8)
    for rank, (first, last) in enumerate([(0, 8), (0, 8), (8, 16), (8, 16)]):
        llama = Llama(kv_heads=2)
        cuts = cut(llama, count=4, rank=rank)
        assert cuts["layers.0.attention.k_proj.weight"] == Cut(0, ((first, last),))
        assert cuts["layers.0.attention.q_proj.weight"] == Cut(0, ((16 * rank, 16 * rank + 16),))
        grouped: Any = llama.layers[0]
        assert (grouped["attention"].num_heads, grouped["attention"].num_key_value_heads) == (2, 1)


def test_a_plan_of_ones_own() -> None:
    """Blocks of one Linear are cut each by itself; an attribute is divided; an exact name goes before a pattern."""
    model = Fused()
    cuts = cut(model, FUSED, rank=1)
    assert cuts["all3.weight"] == cuts["all3.bias"] == Cut(0, ((8, 16), (24, 32), (40, 48)))
    assert cuts["back.weight"] == Cut(1, ((8, 16),))
    assert cuts["out.weight"] == Cut(0, ((4, 7),), 4)
    assert model.h == 2
    chosen = styles(Llama(), {"**.up_proj": "column", "**.gate_proj": "column", "layers.*.mlp.down_proj": "row"})
    assert len(chosen) == 6
    chosen = styles(mlp(), {"*": "whole", "0": "column", "2": "row"})
    assert chosen == {"0": "column", "2": "row"}


@pytest.mark.parametrize(
    ("model", "plan", "count", "match"),
    [
        (Llama, {"layers.*.mlp.up": "column"}, 2, r"did you mean .*'layers\.\*\.mlp\.up_proj'"),
        (Llama, {"up_proj": "column"}, 2, r"did you mean 'layers\.\*\.mlp\.up_proj'\?"),
        (Llama, {"layers.*.mlp": "column"}, 2, r"a ModuleDict, and style column is for nn.Linear; in it are .*gate"),
        (Llama, {"embed_tokens": "row"}, 2, "is a Embedding, and style row is for nn.Linear; write another"),
        (Llama, {"lm_head": "embedding"}, 2, "is a Linear, and style embedding is for nn.Embedding"),
        (mlp, {"0": "column"}, 2, "'0' is cut by columns, and none by rows.*column_gather"),
        (mlp, {"*": "column_gather"}, 2, "'1' is a GELU, and style column_gather is for nn.Linear"),
        (mlp, {"0*": "column", "*0": "row"}, 2, r"'0\*' and '\*0' give '0' two styles"),
        (mlp, None, 3, "module '0': its 32 outputs do not divide by 3 shards; choose another count"),
        (Bert, None, 8, "attention.self': its 4 heads do not divide by 8 shards; choose a count of 2, 4"),
        (lambda: Llama(kv_heads=4), None, 3, "8 heads do not divide by 3 shards; choose a count of 2, 4, 8"),
        (Fused, FUSED | {"w": "divide"}, 2, "module '' has no whole number 'w' to divide; whole numbers of it are 'h'"),
        (Fused, FUSED, 8, "module '': its h of 4 does not divide by 8 shards; choose a count of 2, 4"),
        (Fused, FUSED | {"block.h": "divide"}, 2, "'block' names no module"),
        (lambda: SelfAttention(16, 4), {"query": "column", "key": "row"}, 2, "query are cut and key, value not"),
        (lambda: nn.Sequential(nn.Embedding(5, 4)), {"0": "embedding"}, 4, "too few for 4 shards; choose a smaller"),
        (lambda: nn.Sequential(nn.Embedding(5, 4, max_norm=1)), {"0": "embedding"}, 2, "max_norm"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut(model: Any, plan: Any, count: int, match: str) -> None:
    """Each error names the module, the sizes and what to do."""
    with pytest.raises(StageLoadError, match=match):
        cut(model(), plan, count)


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        ("lama", "did you mean 'llama'"),
        ({"a": "colum"}, "'a': style 'colum' must be one of .* did you mean 'column'"),
        ({"a": "column:1"}, "column:BLOCKS"),
        ({"a": "row:2"}, "column:BLOCKS"),
        ({"a..b": "row"}, "has an empty name"),
    ],
)
def test_words_are_checked_with_the_file(plan: Any, match: str) -> None:
    """Styles and names of plans are known without torch."""
    with pytest.raises(ValidationError, match=match):
        ShardsSpec(count=2, mode="tensor", plan=plan)
