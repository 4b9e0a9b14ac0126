"""The graph of a model, where it can be cut, and what its parts compute: the same as the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests import models
from torchrelay.errors import InputError
from torchrelay.stages.splitting.calls import Call
from torchrelay.stages.splitting.making import graph_cuts
from torchrelay.stages.splitting.pieces import GraphPiece, build_piece
from torchrelay.stages.splitting.source import Source
from torchrelay.stages.splitting.tracing import Traced, Untraceable, trace

CPU = torch.device("cpu")


class Made(nn.Module):
    """A few linear layers, with something between them."""

    def __init__(self, between: Callable[[Any, torch.Tensor], torch.Tensor], **more: torch.Tensor) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.between = between
        for name, value in more.items():
            self.register_buffer(name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.between(self, self.first(x)))


def call_of(*shape: int | None, dtype: torch.dtype = torch.float32) -> Call:
    """A call with one tensor; None is a length that varies."""

    def sample(rows: int, length: int) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
        return rows, (torch.zeros((rows, *(length if s is None else s for s in shape)), dtype=dtype),), {}

    return Call.of([sample(5, 7), sample(3, 11)])


def traced(model: nn.Module, *shape: int | None, dtype: torch.dtype = torch.float32) -> Traced:
    return trace(Source(model.eval().requires_grad_(False)).model, call_of(*shape, dtype=dtype))


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, Source, Traced]:
    """A model with tied weights and a buffer that is never saved; what its parts are made of; and its graph."""
    sizes: dict[str, Any] = {"tied": True, "layers": 2}
    source = Source(models.build("llama", **sizes))
    return models.build("llama", **sizes), source, trace(source.model, call_of(None, dtype=torch.int64))


@pytest.mark.parametrize(
    ("between", "shape", "says"),
    [
        (lambda _, x: x.reshape(5, -1)[:, :4], (4,), "fixes"),
        (lambda _, x: x + x.new_zeros(7, 4), (None, 4), "fixes"),
        (lambda _, x: x if float(x.sum()) > 0 else -x, (4,), "data-dependent|GuardOnDataDependent|meta"),
        (lambda _, x: x[x[:, 0].nonzero()[:, 0]], (4,), "depends on values|meta|data"),
        (lambda s, x: x + s.seen.add_(1), (4,), "changes"),
    ],
    ids=["rows", "length", "values", "sizes by values", "buffer"],
)
def test_what_cannot_be_cut_by_its_graph_says_why(between: Any, shape: tuple[Any, ...], says: str) -> None:
    """Its rows or lengths are fixed, or its code goes by values, or changes the model."""
    with pytest.raises(Untraceable, match=says):
        traced(Made(between, seen=torch.zeros(1)), *shape)


def test_the_same_model_gives_the_same_graph_and_another_another() -> None:
    """Whatever its values are."""
    one, same = (traced(models.build("mlp", seed), 12).digest for seed in (1, 2))
    assert one == same
    assert one != traced(models.build("mlp", layers=5), 12).digest
    assert one != traced(models.build("mlp", width=16), 12).digest


def test_no_cut_comes_between_a_tensor_and_what_changes_it_in_place() -> None:
    """Nor between it and a view that was taken before."""

    def between(_: Any, x: torch.Tensor) -> torch.Tensor:
        view = x[:, :2]
        y = x * 2
        view.add_(1)
        return x + y

    found = traced(Made(between), 4)
    names = [node.name for node in found.nodes]
    crossing = found.crossing([])
    made, changed = names.index("linear"), next(i for i, n in enumerate(names) if n.startswith("add_"))
    assert all(crossing[place] is None for place in range(made + 1, changed + 1))
    assert crossing[changed + 1] is not None


def test_what_does_not_depend_on_rows_does_not_cross(llama: tuple[nn.Module, Source, Traced]) -> None:
    """Rotary tables are computed anew from the length, and a residual is all that crosses between layers."""
    traced_llama = llama[2]
    found = [nodes for nodes in traced_llama.crossing([16]) if nodes is not None]
    assert min(sum(traced_llama.row_bytes(n, [16]) for n in nodes) for nodes in found) == 16 * 8  # the tokens
    middle = found[len(found) // 2]
    assert len(middle) <= 2


def test_pieces_behind_each_other_are_the_model(llama: tuple[nn.Module, Source, Traced]) -> None:
    """Cut at any of many places; for one row and for several, of lengths that were never tried."""
    model, source, found = llama
    places = [i for i, nodes in enumerate(found.crossing(found.planned_sizes())) if nodes is not None]
    for rows, length in ((1, 2), (2, 9), (6, 1)):
        tokens = torch.arange(rows * length).reshape(rows, length) % 64
        for cuts in (places[:1], places[-1:], [places[1], places[len(places) // 2], places[-2]]):
            with torch.inference_mode():
                ours, wanted = chained(found, cuts, source, (tokens,)), model(tokens)
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def chained(found: Traced, cuts: list[int], source: Source, args: tuple[torch.Tensor, ...]) -> Any:
    pieces = [build_piece(found, cut, CPU, found.planned_sizes()) for cut in graph_cuts(found, cuts)]
    for piece in pieces:
        piece.fill(source, CPU)
    came = pieces[0].first(args, {})
    for piece in pieces[1:-1]:
        came = piece.middle(came)
    return pieces[-1].last(args, {}, came)


def test_each_tensor_is_owned_where_it_is_used(llama: tuple[nn.Module, Source, Traced]) -> None:
    """By both of two parts that use it, and by no other; what no file holds comes from the model that was built."""
    _, _, found = llama
    crossing = found.crossing(found.planned_sizes())
    third = len(crossing) // 3
    cuts = [next(p for p in range(at, len(crossing)) if crossing[p] is not None) for at in (third, 2 * third)]
    pieces = [build_piece(found, cut, CPU, found.planned_sizes()) for cut in graph_cuts(found, cuts)]

    def tied(piece: GraphPiece) -> bool:
        return bool(piece.names & {"lm_head.weight", "model.embed_tokens.weight"})

    assert [tied(piece) for piece in pieces] == [True, False, True]
    rotary = "model.rotary_emb.inv_freq"
    assert sum(rotary in piece.names for piece in pieces) > 1
    rest = [piece.names - {"lm_head.weight", "model.embed_tokens.weight", rotary} for piece in pieces]
    assert not rest[0] & rest[1] | rest[1] & rest[2] | rest[0] & rest[2]


def test_a_size_that_the_graph_is_not_for_is_refused() -> None:
    """The trace holds for lengths of 8 and more; told with the length that came."""

    def between(_: Any, x: torch.Tensor) -> torch.Tensor:
        return x if x.shape[1] > 5 else x * 2

    found = traced(Made(between), None, 4)
    assert found.sizes_of([torch.zeros(1, 8, 4)]) == [8]
    with pytest.raises(InputError, match=r"traced for sizes with .*5"):
        found.sizes_of([torch.zeros(2, 4, 4)])


def test_calls_of_another_form_are_refused() -> None:
    """Another dtype, more dimensions, another fixed size, an argument that is missing, and a changed number."""
    rows = [(n, (torch.zeros(n, 4), 2), {"flag": True}) for n in (5, 3)]
    call = Call.of(rows)
    good = torch.zeros(9, 4)
    assert call.tensors((good, 2), {"flag": True})[0] is good
    for args, kwargs, says in [
        ((good.double(), 2), {"flag": True}, "argument 0 .* is torch.float64"),
        ((good[None], 2), {"flag": True}, "argument 0"),
        ((torch.zeros(9, 5), 2), {"flag": True}, r"had 4 in dimension 1 of every batch"),
        ((good,), {"flag": True}, "other arguments than when it was split"),
        ((good, 3), {"flag": True}, "argument 1 of the model's call is 3, and was 2"),
        ((good, 2), {"flag": False}, "argument 2 of the model's call is False, and was True"),
    ]:
        with pytest.raises(InputError, match=says):
            call.tensors(args, kwargs)
    assert Call.from_plain(call.plain()) == call
