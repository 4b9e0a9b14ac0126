"""What people see of a fleet: slots and what is taken of them, what was asked for, what has no place and why."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

from rich.console import Console

from torchrelay.config.fleet import Assignment, Desired, Gpu, HostReport, Need
from torchrelay.fleet_view import fleet_parts, why_parts
from torchrelay.queues.fleet import FleetView, Wishes

REF = "p@12345678"
GIB = 2**30
HOST = HostReport(
    "a", "x", 1, 4.0, 64 * GIB, 60 * GIB, gpus=(Gpu(0, "GPU-0", "H100", 80 * GIB, 70 * GIB, 0.5),), labels=("fast",)
)
WORKERS = (
    Assignment("w1", "a", "cpu", REF, "s", need=Need(cpus=1.5), why="spread"),
    Assignment("w2", "a", "cuda:0", REF, "g", need=Need(compute=0.25, cpus=1.0), why="tightest fit"),
    Assignment("w3", "a", "cuda:0", REF, "g", need=Need(compute=0.25, cpus=1.0)),
)
REFUSED = [{"ref": REF, "stage": "g", "why": "needs a GPU"}] * 3 + [{"ref": REF, "stage": "s", "why": "needs memory"}]
VIEW = FleetView(
    9.0,
    "c1",
    3,
    (HOST,),
    {"a": Desired("a", 3, 1, WORKERS)},
    wishes=Wishes({"p/s": 1, "p/g": 5}, frozenset({"b"})),
    reasons={"stages": {f"{REF}/g": "stays at 5"}, "refused": REFUSED},
)


def shown(view: FleetView, *, why: bool = False) -> str:
    out = StringIO()
    console = Console(file=out, width=300)
    for part in (*fleet_parts(view, []), *(why_parts(view) if why else ())):
        console.print(part)
    return out.getvalue()


def test_a_slot_shows_what_it_offers_and_what_is_taken() -> None:
    """Processors that workers take on GPUs count too; labels are told."""
    lines = shown(VIEW).splitlines()
    (cpu,) = (line for line in lines if " cpu " in line)
    (gpu,) = (line for line in lines if " cuda:0 " in line)
    assert "4 processors, 64 GiB, fast" in cpu
    assert "60 GiB" in cpu
    assert "3.5 of 4" in cpu
    assert "H100, 80 GiB" in gpu
    assert "0.5 of 1" in gpu
    assert "50 %" in gpu


def test_what_was_asked_for_tells_how_it_is_taken_back() -> None:
    text = shown(VIEW)
    assert "1 worker of p/s; back to what the load needs: torchrelay scale p/s auto" in text
    assert "b is to be empty; back: torchrelay drain b --undo" in text


def test_what_has_no_place_is_counted_once_for_each_reason() -> None:
    """Without --why one line says that there is something to look at."""
    text = shown(VIEW)
    assert "4 workers have no place; what is short: torchrelay status --why" in text
    assert "needs a GPU" not in text
    told = shown(VIEW, why=True).splitlines()
    assert [line for line in told if "no place: " in line] == [
        f"3 workers of {REF}/g have no place: needs a GPU",
        f"1 worker of {REF}/s has no place: needs memory",
    ]
    assert "no place" not in shown(replace(VIEW, reasons={}), why=True)
    assert "no place" not in shown(replace(VIEW, reasons={"refused": 5}), why=True)
