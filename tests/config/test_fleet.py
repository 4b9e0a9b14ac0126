"""What agents and the coordinator exchange comes back as it was sent, and what is none of theirs is refused."""

from __future__ import annotations

import pytest

from torchrelay.config.fleet import Assignment, Desired, Gpu, HostReport, Need, SlotTrouble
from torchrelay.errors import DecodeError

GIB = 2**30
REPORT = HostReport(
    name="a",
    incarnation="x1",
    pid=7,
    cpus=8.0,
    memory=64 * GIB,
    free_memory=60 * GIB,
    host_id="h",
    gpus=(Gpu(0, "GPU-0", "H100", 80 * GIB, 79 * GIB, 0.5), Gpu(1, "GPU-1", "H100", 80 * GIB, 79 * GIB)),
    links=((0, 1),),
    labels=("fast",),
    refs=("ocr@12345678",),
    applied=3,
    trouble=(SlotTrouble("cuda:1", "ocr@12345678", "detect", 3, 5.0, "no memory"),),
)
WORKER = Assignment("w1", "a", "cuda:0", "ocr@12345678", "detect", 1, 2, "g", Need(0.5, GIB, 2.0, GIB), "beside crop")
DESIRED = Desired("a", 4, 9, (WORKER,))


def test_a_report_comes_back_as_it_was_sent():
    assert HostReport.decode(REPORT.encode()) == REPORT
    assert HostReport.decode(REPORT.encode().encode()).slots == ("cpu", "cuda:0", "cuda:1")


def test_a_desired_state_comes_back_as_it_was_sent():
    assert Desired.decode(DESIRED.encode()) == DESIRED


@pytest.mark.parametrize("kind", [HostReport, Desired])
@pytest.mark.parametrize("text", ["", "[]", "{}", "3", '{"host": 1}', "[" * 5000, b"\xff"])
def test_what_is_neither_is_refused(kind: type[HostReport | Desired], text: str | bytes):
    with pytest.raises(DecodeError):
        kind.decode(text)
