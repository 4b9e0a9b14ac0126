"""One rank of a group, for the tests: it computes with its part and with the whole model, and compares.

python -m tests.stages.tensor_ranks FOLDER RANK COUNT
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_model
from torch import nn

from tests.stages.parallel_models import FUSED, Bert, Fused, Llama, mlp
from torchrelay.errors import StageLoadError
from torchrelay.stages import StageContext, TorchStage
from torchrelay.stages.tensor_parallel import Wanted, load_parallel
from torchrelay.stages.torch_stage import TorchOptions

FOLDER, RANK, COUNT = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
# Sums of the ranks' parts are rounded otherwise than the whole's: by float32's, of values up to about ten.
ATOL = 1e-5


class Computes(TorchStage):
    """A model as a stage."""

    def __init__(self, made: Callable[[], nn.Module]) -> None:
        self.made = made

    def build(self, context: StageContext) -> nn.Module:
        return self.made()


def loaded(made: Callable[[], nn.Module], weights: str | None, plan: Any = None, **options: Any) -> tuple[Any, Any]:
    """The stage with the whole model, and with this rank's part."""
    whole, part = Computes(made), Computes(made)
    whole.configure(TorchOptions(**options), weights)
    part.configure(TorchOptions(**options), weights, plan)
    whole.load(StageContext(base_dir=FOLDER))
    context = StageContext(base_dir=FOLDER, rank=RANK, world_size=COUNT, shard=RANK, shards=COUNT)
    part.load(context)
    return whole, part


def saved(made: Callable[[], nn.Module], name: str) -> str:
    if RANK == 0:
        torch.manual_seed(3)
        save_model(made(), str(FOLDER / f"{name}.safetensors"))
    dist.barrier()
    return f"{name}.safetensors"


def inputs(kind: str, rows: int, length: int) -> torch.Tensor:
    torch.manual_seed(rows * 100 + length)
    if kind == "ids":
        return torch.randint(1, 30, (rows, length))
    if kind == "image":
        return torch.randn(rows, 3, 16, 16)
    return torch.randn(rows, length, 12 if kind == "mlp" else 16)


def first(output: Any) -> torch.Tensor:
    found = output if isinstance(output, torch.Tensor) else output[0]
    assert isinstance(found, torch.Tensor)
    return found


def check(name: str, made: Callable[[], nn.Module], kind: str, plan: Any = None) -> None:
    """Batches of several sizes and lengths, in float32 and bfloat16; each rank owns less than the whole."""
    weights = saved(made, name)
    whole, part = loaded(made, weights, plan)
    sizes = [sum(p.numel() for p in stage.model.parameters()) for stage in (whole, part)]
    assert sizes[1] < sizes[0], sizes
    assert not any(t.is_meta or t.requires_grad for t in part.model.state_dict(keep_vars=True).values())
    with torch.inference_mode():
        for rows, length in ((1, 5), (3, 9), (2, 1)):
            x = inputs(kind, rows, length)
            torch.testing.assert_close(first(part.model(x)), first(whole.model(x)), rtol=1e-5, atol=ATOL)
        whole, part = loaded(made, weights, plan, dtype="bfloat16")
        x = inputs(kind, 3, 9)
        x = x.bfloat16() if x.is_floating_point() else x
        expected = first(whole.model(x))
        assert expected.dtype == torch.bfloat16
        # Eight bits of mantissa, some layers deep.
        scale = float(expected.abs().max())
        torch.testing.assert_close(first(part.model(x)), expected, rtol=0.05, atol=0.03 * scale)
    print(name, "equals", sizes, flush=True)


def check_random() -> None:
    """Without weights, all ranks have rank 0's random model, whatever their own random numbers are."""
    torch.manual_seed(50 + RANK)
    context = StageContext(rank=RANK, world_size=COUNT)
    stage = Computes(Bert)
    stage.load(context)
    ids = inputs("ids", 3, 7)
    with torch.inference_mode():
        found = stage.model(ids)
    torch.manual_seed(50)
    torch.testing.assert_close(found, Bert().eval()(ids), rtol=1e-5, atol=ATOL)
    assert stage.model.decoder.weight is stage.model.word_embeddings.weight


def check_words() -> None:
    """An id that is none is refused by every rank, so that none waits."""
    stage = Computes(Bert)
    stage.load(StageContext(rank=RANK, world_size=COUNT))
    for wrong in (31, -1):
        with pytest.raises(IndexError, match=str(wrong)):
            stage.model(torch.tensor([[1, wrong]]))


def check_other_models() -> None:
    """Ranks that build different models all refuse."""
    width = 12 if RANK == 1 else 8

    def made() -> nn.Module:
        return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 4))

    with pytest.raises(StageLoadError, match="built another model"):
        load_parallel(made, Wanted(None, None, torch.device("cpu")))


def check_computed() -> None:
    """A model that computes a buffer of its parameters while it is built, which the meta device cannot."""

    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)
            self.register_buffer("scale", self.fc1.weight.detach().abs().max(), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.fc2(self.fc1(x).relu()) * self.scale
            return found

    torch.manual_seed(RANK)
    stage = Computes(Computed)
    stage.load(StageContext(rank=RANK, world_size=COUNT))
    torch.manual_seed(0)
    x = torch.ones(2, 4)
    torch.testing.assert_close(stage.model(x), Computed()(x), rtol=1e-5, atol=ATOL)


def check_memory() -> None:
    """Loading takes the part's memory and at most 15 % of the whole's beside: the files are 200 MB."""

    def made() -> nn.Module:
        return nn.Sequential(nn.Linear(5000, 5000), nn.ReLU(), nn.Linear(5000, 5000))

    before = peak()
    model = load_parallel(made, Wanted(None, FOLDER / "large.safetensors", torch.device("cpu")))
    more = (peak() - before) / 200e6
    assert 1 / COUNT - 0.05 <= more <= 1 / COUNT + 0.15, more
    assert len(list(model.parameters())) == (4 if RANK == 0 else 3)


def peak() -> int:
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) * 1024


def check_compiled() -> None:
    """Compiled code has the collectives in it. Traced as ever, but without the half minute of a C++
    compiler, which sees collectives as calls."""
    weights = saved(mlp, "compiled")
    with mock.patch("torch.compile", functools.partial(torch.compile, backend="aot_eager")):
        whole, part = loaded(mlp, weights, compile=True, row_buckets=(4,))
    with torch.inference_mode():
        x = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(part.model(x), whole.model(x), rtol=1e-5, atol=ATOL)


def check_transformers() -> None:
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    words = {"vocab_size": 31, "max_position_embeddings": 32}
    llama = LlamaConfig(**sizes, **words, num_key_value_heads=2, tie_word_embeddings=True, use_cache=False)
    check("hf-llama", lambda: LlamaForCausalLM(llama), "ids")
    # Keys and values of one head, which both ranks have.
    one = LlamaConfig(**sizes, **words, num_key_value_heads=1, attention_bias=True, use_cache=False)
    check("hf-llama-1", lambda: LlamaForCausalLM(one), "ids", "llama")
    check("hf-bert", lambda: BertModel(BertConfig(**sizes, **words)), "ids", "bert")
    check("hf-vit", lambda: ViTModel(ViTConfig(**sizes, image_size=16, patch_size=4)), "image", "vit")


def main() -> None:
    torch.set_num_threads(1)
    wanted = sys.argv[4].split(",")
    dist.init_process_group("gloo", init_method=f"file://{FOLDER}/store", rank=RANK, world_size=COUNT)
    if "memory" in wanted:
        check_memory()
    if "own" in wanted:
        check("mlp", mlp, "mlp")
        check("bert", Bert, "ids")
        check("llama", Llama, "ids", "llama")
        check("llama-4", lambda: Llama(kv_heads=4), "ids")
        check("fused", Fused, "fused", FUSED)
        check_random()
        check_words()
        check_computed()
        check_other_models()
    if "compiled" in wanted:
        check_compiled()
    if "transformers" in wanted:
        check_transformers()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
