"""A torch model of which each rank of a process group has a part, loaded.

Promise: a rank takes no more memory for weights than its part, what is whole on every rank, and one tensor more; ranks
that built different models do not compute together. What the model returns is whole on each of them.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from torchrelay.config.shard_plans import Plan, Style
from torchrelay.errors import StageLoadError
from torchrelay.stages.building import parameters_on_meta
from torchrelay.stages.cuts import Cut
from torchrelay.stages.head_counts import Heads, even_cut, heads_of
from torchrelay.stages.parallel_layers import ColumnLinear, Ranks, RowLinear, VocabEmbedding
from torchrelay.stages.plans import Found, find_plan
from torchrelay.stages.slices import Weights, open_weights
from torchrelay.stages.weights import check_names, set_tensor, tied_names

__all__ = ["Wanted", "load_parallel", "parallelize"]

log = logging.getLogger("torchrelay.stages")
# Computes a tensor of the model: its name, its shape and type as built, and the part that is this rank's.
Source = Callable[[str, torch.Tensor, Cut | None], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a rank's model is made of: the plan, the weights (None: as rank 0 builds them), the device, and the type of
    floating parameters (None: as built)."""

    plan: Plan
    weights: Path | None
    device: torch.device
    dtype: torch.dtype | None = None


def load_parallel(build: Callable[[], nn.Module], wanted: Wanted) -> nn.Module:
    """Build this rank's part of a model, with its weights, on its device. All ranks of the default group call it.

    With weights, each rank reads its own part of the file. Without, rank 0 builds the model for real and the others
    get their parts of it, so that random weights are those of one model.

    Args:
        build: makes the whole model; called on every rank, with parameters on the meta device where that does.

    Raises:
        StageLoadError: there is no process group, the plan or the weights do not fit, or ranks differ.
    """
    group = dist.group.WORLD if dist.is_initialized() else None
    if group is None:
        raise StageLoadError(
            "its model is to be computed by a process group, and there is none here; run it with a worker, or take "
            "shards out to run it in one process"
        )
    ranks = Ranks(group)
    gives = wanted.weights is None and ranks.rank == 0
    with ExitStack() as opened:
        weights = None if wanted.weights is None else opened.enter_context(open_weights(wanted.weights))
        model = _filled(_built(build, real=gives), weights, wanted, ranks)
        left = [name for name, tensor in model.named_buffers() if tensor.is_meta]
        if weights is not None and left:
            # They were computed of parameters, and have values only where those do; so it is on every rank.
            log.info("the model is built on the CPU for its unsaved buffers %s", ", ".join(left))
            model = _filled(_built(build, real=True), weights, wanted, ranks)
    _share_buffers(model, ranks, wanted.device)
    return model


def _built(build: Callable[[], nn.Module], *, real: bool) -> nn.Module:
    if not real:
        try:
            with parameters_on_meta():
                return build()
        except (NotImplementedError, RuntimeError) as error:
            # Some modules compute with their parameters while they are built, which meta tensors cannot do.
            log.info("the model is built on the CPU, since the meta device refused: %s", error)
    return build()


def _filled(model: nn.Module, weights: Weights | None, wanted: Wanted, ranks: Ranks) -> nn.Module:
    whole = dict(model.state_dict(keep_vars=True))
    groups = tied_names(whole)
    if weights is not None:
        shapes = {name: weights.shape(name) for name in weights.names()}
        names = check_names({n: tuple(t.shape) for n, t in whole.items()}, groups, shapes, str(weights.path))
    else:
        names = {name: group[0] for group in groups for name in group}
    cuts = parallelize(model, wanted.plan, ranks)
    _must_agree(whole, cuts, ranks, wanted.device)
    source = _from_file(weights, names, wanted) if weights is not None else _from_first(whole, ranks, wanted)
    _fill(model, whole, cuts, groups, source)
    return model


def _from_file(weights: Weights, names: Mapping[str, str], wanted: Wanted) -> Source:
    def read(name: str, like: torch.Tensor, cut: Cut | None) -> torch.Tensor:
        found = weights.read(names.get(name, name), cut, device=wanted.device, dtype=like.dtype)
        return found.to(_type_of(like, wanted))

    return read


def _from_first(whole: dict[str, torch.Tensor], ranks: Ranks, wanted: Wanted) -> Source:
    def receive(name: str, like: torch.Tensor, cut: Cut | None) -> torch.Tensor:
        mine = whole[name].detach()
        found = (
            mine.to(wanted.device)
            if ranks.rank == 0
            else torch.empty(like.shape, dtype=like.dtype, device=wanted.device)
        )
        found = _broadcast(found.contiguous(), ranks)
        # What rank 0 built for real is let go of as it is handed out.
        whole[name] = mine.to("meta")
        return (found if cut is None else cut.of(found)).to(_type_of(like, wanted))

    return receive


def _type_of(like: torch.Tensor, wanted: Wanted) -> torch.dtype:
    return wanted.dtype if wanted.dtype is not None and like.is_floating_point() else like.dtype


def _fill(
    model: nn.Module,
    whole: Mapping[str, torch.Tensor],
    cuts: Mapping[str, Cut],
    groups: list[list[str]],
    source: Source,
) -> None:
    """Every saved tensor of the model, in the same order on every rank; tied ones of one cut once."""
    first = {name: group[0] for group in groups for name in group}
    own = model.state_dict(keep_vars=True)
    made: dict[tuple[str, Cut | None], torch.Tensor] = {}
    with torch.no_grad():
        for name, like in list(whole.items()):
            key = first.get(name, name), cuts.get(name)
            if key not in made:
                made[key] = source(name, like, key[1])
                if isinstance(like, nn.Parameter):
                    made[key] = nn.Parameter(made[key], requires_grad=False)
            # The bias of a row-wise Linear is rank 0's alone.
            if own.get(name) is not None:
                set_tensor(model, name, made[key])
            if name not in first:
                del made[key]


def _share_buffers(model: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Those that are never saved, as rank 0 computed them."""
    saved = model.state_dict(keep_vars=True)
    for name, buffer in list(model.named_buffers()):
        if name not in saved:
            mine = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device, copy=True)
            set_tensor(model, name, _broadcast(mine.contiguous(), ranks))


def _broadcast(tensor: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """As bytes, since backends have not all types."""
    if tensor.numel():
        dist.broadcast(tensor.view(-1).view(torch.uint8), src=0, group=ranks.group)
    return tensor


def _must_agree(whole: Mapping[str, torch.Tensor], cuts: Mapping[str, Cut], ranks: Ranks, device: torch.device) -> None:
    text = repr([(name, tuple(t.shape), str(t.dtype), name in cuts) for name, t in whole.items()])
    mine = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8).to(device)
    found = ranks.gather(mine)
    if not bool((found == found[0]).all()):
        raise StageLoadError(
            f"rank {ranks.rank} of {ranks.count} built another model than others did; build must make the same whole "
            "model on every rank, whatever context.rank and shard say"
        )


def parallelize(model: nn.Module, plan: Plan, ranks: Ranks) -> dict[str, Cut]:
    """Put this rank's parts in place of the modules that a plan names, without values, and adapt counts of heads.

    Returns: of each parameter that is cut, by name, what of the whole one is this rank's.

    Raises:
        StageLoadError: the plan does not fit the model, or sizes do not divide.
    """
    found = find_plan(model, plan, ranks.count)
    heads = _heads(model, found)
    kept = {(owner, name) for owner, _, name in (path.rpartition(".") for path in found.divided)}
    made: dict[int, nn.Module] = {}
    places = list(_places(model, found))
    for name, owner, leaf, module in places:
        if id(module) not in made:
            made[id(module)] = _part(name, leaf, module, found.modules[name], heads.get(name.rpartition(".")[0]), ranks)
        setattr(owner, leaf, made[id(module)])
    for path, attention in heads.items():
        attention.adapt(model.get_submodule(path), ranks.count, {n for owner, n in kept if owner == path})
    for path in found.divided:
        owner_path, _, attribute = path.rpartition(".")
        whole = model.get_submodule(owner_path)
        setattr(whole, attribute, getattr(whole, attribute) // ranks.count)
    log.info("cut %d modules of %s into %d parts", len(places), type(model).__name__, ranks.count)
    return {
        f"{name}.{parameter}": cut
        for name, *_ in places
        if isinstance(part := model.get_submodule(name), (ColumnLinear, RowLinear, VocabEmbedding))
        for parameter, cut in part.cuts.items()
    }


def _places(model: nn.Module, found: Found) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    for name in found.modules:
        path, _, leaf = name.rpartition(".")
        yield name, model.get_submodule(path), leaf, model.get_submodule(name)


def _heads(model: nn.Module, found: Found) -> dict[str, Heads]:
    """Of each module, by name, whose children are cut by columns, what it says of heads."""
    columns: dict[str, dict[str, tuple[nn.Linear, int]]] = {}
    for name, _, leaf, module in _places(model, found):
        style = found.modules[name]
        if style.kind == "column" and isinstance(module, nn.Linear):
            columns.setdefault(name.rpartition(".")[0], {})[leaf] = module, style.blocks
    told = {path: heads_of(path, model.get_submodule(path), cut) for path, cut in columns.items()}
    return {path: heads for path, heads in told.items() if heads is not None}


def _part(name: str, leaf: str, module: nn.Module, style: Style, heads: Heads | None, ranks: Ranks) -> nn.Module:
    rank, count = ranks.rank, ranks.count
    if isinstance(module, nn.Embedding):
        cut = _rounded(module.num_embeddings, rank, count)
        if (count - 1) * -(-module.num_embeddings // count) >= module.num_embeddings:
            raise StageLoadError(
                f"module {name!r}: its {module.num_embeddings} embeddings are too few for {count} shards; choose a "
                "smaller count, or the style whole"
            )
        return VocabEmbedding(module, ranks, cut)
    assert isinstance(module, nn.Linear)  # the plan saw to it
    if style.kind == "row":
        return RowLinear(module, ranks, even_cut(module.in_features, 1, rank, count, name, dim=1))
    if style.kind == "column_gather":
        even = style.blocks > 1
        cut = (
            even_cut(module.out_features, style.blocks, rank, count, name)
            if even
            else _rounded(module.out_features, rank, count)
        )
        return ColumnLinear(module, ranks, cut, gather=True, blocks=style.blocks)
    if heads is not None and leaf in heads.keys | heads.queries:
        heads.check(count)
        return ColumnLinear(module, ranks, heads.cut(leaf, module, style, rank, count))
    return ColumnLinear(module, ranks, even_cut(module.out_features, style.blocks, rank, count, name))


def _rounded(total: int, rank: int, count: int) -> Cut:
    """A rank's part where the last may have less, and zeros up to the size of the others'."""
    size = -(-total // count)
    return Cut(0, ((min(rank * size, total), min((rank + 1) * size, total)),), size)
