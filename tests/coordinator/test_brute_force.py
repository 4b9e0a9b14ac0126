"""Tiny fleets, where every way to place the workers can be tried: what is refused has no place, whatever one does.

Told from nothing, a refusal is always right here. Told while others run, it may be wrong where more than two workers
would have to move: at most one time in fifty of these.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations_with_replacement

import pytest

from tests.coordinator.strategies import GIB, host
from torchrelay.config.fleet import CPU, Assignment, Gpu, HostReport, Need
from torchrelay.coordinator import allocate as module
from torchrelay.coordinator.allocate import Unit, allocate


def _all_fit(fleet: Sequence[HostReport], units: Sequence[Unit]) -> bool:
    """Tries all ways."""
    room = {(h.name, ""): (h.cpus, h.memory) for h in fleet}
    room |= {(h.name, g.slot): (1.0, g.memory) for h in fleet for g in h.gpus}

    def down(index: int) -> bool:
        if index == len(units):
            return True
        need = units[index].need
        for report in fleet:
            cpus, memory = room[report.name, ""]
            if need.cpus > cpus + 1e-9 or need.host_memory > memory:
                continue
            room[report.name, ""] = cpus - need.cpus, memory - need.host_memory
            for slot in report.slots:
                if (slot == CPU) == (units[index].device == "gpu"):
                    continue
                share, gpu = room.get((report.name, slot), (1.0, 0))
                if need.compute <= share + 1e-9 and need.memory <= gpu:
                    room[report.name, slot] = share - need.compute, gpu - need.memory
                    if down(index + 1):
                        return True
                    room[report.name, slot] = share, gpu
            room[report.name, ""] = cpus, memory
        return False

    return down(0)


def _fleet(draw: random.Random) -> list[HostReport]:
    found = []
    for i in range(draw.randint(1, 3)):
        gpus = tuple(Gpu(j, f"{i}{j}", "gpu", 8 * GIB, 8 * GIB) for j in range(draw.randint(0, 2)))
        cpus = draw.choice([2.0, 4.0])
        found.append(replace(host(f"h{i}"), cpus=cpus, memory=8 * GIB, free_memory=8 * GIB, gpus=gpus))
    return found


def _unit(draw: random.Random, number: int) -> Unit:
    cpus, host_memory = draw.choice([0.5, 1.0, 2.0, 3.0]), draw.randint(0, 4) * GIB
    if draw.random() < 0.3:
        return Unit("p@1", f"s{number}", need=Need(0.0, 0, cpus, host_memory))
    need = Need(
        draw.choice([0.25, 0.5, 0.75, 1.0]), draw.randint(0, 8) * GIB, draw.choice([0.0, 0.5, 1.0]), host_memory
    )
    return Unit("p@1", f"s{number}", need=need, device="gpu")


def _cases(seed: int, count: int) -> list[tuple[list[HostReport], list[Unit]]]:
    draw = random.Random(seed)
    cases = [(_fleet(draw), [_unit(draw, i) for i in range(draw.randint(2, 6))]) for _ in range(count)]
    return [case for case in cases if _all_fit(*case)]


@pytest.mark.parametrize("seed", range(4))
def test_what_fits_somehow_is_placed(seed: int) -> None:
    """Wherever some way places all, all are placed."""
    cases = _cases(seed, 700)
    assert len(cases) > 150
    for fleet, units in cases:
        assert allocate(fleet, units, []).refused == (), (fleet, units)


_SIZES = [(share, memory) for share in (0.25, 0.5, 0.75, 1.0) for memory in (2, 3, 4)]


@pytest.mark.parametrize("shape", [(2,), (1, 1)], ids=["one host", "two hosts"])
def test_every_four_workers_on_two_gpus(shape: tuple[int, ...]) -> None:
    """Each choice of four out of twelve sizes: placed where some way places all, refused where none does."""
    fleet = [
        replace(host(f"h{i}"), gpus=tuple(Gpu(j, f"{i}{j}", "gpu", 8 * GIB, 8 * GIB) for j in range(count)))
        for i, count in enumerate(shape)
    ]
    placed = refused = 0
    for sizes in combinations_with_replacement(_SIZES, 4):
        units = [Unit("p@1", f"s{i}", need=Need(c, m * GIB), device="gpu") for i, (c, m) in enumerate(sizes)]
        found = allocate(fleet, units, [])
        assert (not found.refused) == _all_fit(fleet, units), sizes
        placed += not found.refused
        refused += bool(found.refused)
    assert min(placed, refused) > 200


def test_the_cases_are_hard_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the second chance, some of them would be refused."""
    monkeypatch.setattr(module, "improve", lambda board, refused: list(refused))
    cases = _cases(0, 700)
    assert sum(bool(allocate(fleet, units, []).refused) for fleet, units in cases) > 3


def test_while_others_run_at_most_one_in_fifty_is_refused_wrongly() -> None:
    """Workers come one after the other, and those that run are moved only by ones and twos."""
    wrong = cases = 0
    for fleet, units in _cases(7, 1500):
        running: tuple[Assignment, ...] = ()
        for count in range(1, len(units) + 1):
            found = allocate(fleet, units[:count], running, stamp=str(count))
            running = found.assignments
            cases += 1
            wrong += bool(found.refused)
    assert cases > 1000
    assert wrong / cases < 0.02
