"""Small fleets and what may be wanted of them, drawn by hypothesis; and a ledger of its own to judge allocations by."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

from hypothesis import strategies as st

from torchrelay.config.fleet import CPU, Assignment, Gpu, HostReport, Need, SlotTrouble
from torchrelay.coordinator.allocate import Unit

GIB = 1 << 30
REFS = ("p@1", "q@2")
STAGES = ("a", "b", "c")
LABELS = ("fast", "ssd")


def host(name: str, gpus: int = 0, **keys: object) -> HostReport:
    """A host with so many GPUs of 80 GiB, 8 processors and 64 GiB."""
    mine = tuple(Gpu(i, f"{name}-{i}", "H100", 80 * GIB, 80 * GIB) for i in range(gpus))
    plain = HostReport(name, "i", 1, 8.0, 64 * GIB, 64 * GIB, gpus=mine, refs=REFS)
    return replace(plain, **keys)  # type: ignore[arg-type]


@st.composite
def hosts(draw: st.DrawFn, most: int = 4) -> list[HostReport]:
    """Hosts that differ in everything that an allocation looks at."""
    found = []
    for i in range(draw(st.integers(0, most))):
        count = draw(st.integers(0, 4))
        gpus = []
        for j in range(count):
            memory = draw(st.sampled_from([24, 80])) * GIB
            gpus.append(Gpu(j, f"{i}-{j}", "gpu", memory, memory - draw(st.sampled_from([0, 0, 5])) * GIB))
        trouble = []
        for slot in [CPU, *(g.slot for g in gpus)]:
            if draw(st.integers(0, 9)) == 0:
                stage = draw(st.sampled_from(STAGES))
                trouble.append(SlotTrouble(slot, draw(st.sampled_from(REFS)), stage, 2, 0.0, "it broke"))
        found.append(
            HostReport(
                f"h{i}",
                "i",
                1,
                draw(st.sampled_from([1.0, 4.0, 16.0])),
                32 * GIB,
                draw(st.sampled_from([32, 20])) * GIB,
                host_id=draw(st.sampled_from(["", "m1", "m2"])),
                gpus=tuple(gpus),
                links=((0, 1), (2, 3)) if count == 4 else (),
                labels=tuple(draw(st.sets(st.sampled_from(LABELS)))),
                refs=tuple(draw(st.sampled_from([REFS, REFS, REFS[:1]]))),
                draining=draw(st.integers(0, 7)) == 0,
                trouble=tuple(trouble),
                allow_cpu=draw(st.booleans()),
            )
        )
    return found


_SHARES = [0.1, 0.25, 0.5, 1.0]


@st.composite
def stages(draw: st.DrawFn) -> list[Unit]:
    """One unit for each of a few stages, whose replicas `units` counts."""
    found = []
    for ref, stage in draw(st.lists(st.sampled_from(list(itertools.product(REFS, STAGES))), max_size=5, unique=True)):
        on_gpu = draw(st.booleans())
        need = Need(
            draw(st.sampled_from(_SHARES)) if on_gpu else 0.0,
            draw(st.sampled_from([0, 10, 20, 40])) * GIB if on_gpu else 0,
            draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])),
            draw(st.sampled_from([0, 0, 4, 16])) * GIB,
        )
        others = [s for s in STAGES if s != stage]
        found.append(
            Unit(
                ref,
                stage,
                shards=draw(st.sampled_from([1, 1, 1, 2, 3])),
                need=need,
                device="gpu" if on_gpu else "cpu",
                presumed=draw(st.booleans()) if on_gpu or need.cpus else False,
                labels=tuple(draw(st.sets(st.sampled_from(LABELS), max_size=1))),
                apart=tuple(draw(st.sampled_from([(), (), (stage,), (others[0],)]))),
                neighbours=tuple(draw(st.sets(st.sampled_from(others), max_size=2))),
                one_host=draw(st.booleans()),
            )
        )
    return found


def numbered(kinds: Iterable[Unit], counts: Iterable[int]) -> list[Unit]:
    """So many workers, or groups, of each; those after the first say their needs."""
    return [
        replace(kind, replica=number, shard=shard, presumed=kind.presumed and number == 0 and kind.shards == 1)
        for kind, count in zip(kinds, counts, strict=True)
        for number in range(count)
        for shard in range(kind.shards)
    ]


def busy(fleet: Iterable[HostReport], before: Sequence[Assignment]) -> list[HostReport]:
    """The hosts as they report once these workers have taken what they need."""
    found = []
    for report in fleet:
        mine = [a for a in before if a.host == report.name]
        taken = {g.slot: sum(a.need.memory for a in mine if a.slot == g.slot) for g in report.gpus}
        gpus = tuple(replace(g, free=g.free - taken[g.slot]) for g in report.gpus)
        free = report.free_memory - sum(a.need.host_memory for a in mine)
        found.append(replace(report, gpus=gpus, free_memory=free))
    return found


class Ledger:
    """What assignments leave of hosts, counted anew and by other means than the allocation's own."""

    def __init__(self, reports: Sequence[HostReport], assignments: Sequence[Assignment]) -> None:
        self.reports = {h.name: h for h in reports}
        self.assignments = list(assignments)

    def sums(self, name: str, slot: str | None = None) -> Need:
        mine = [a.need for a in self.assignments if a.host == name and slot in (None, a.slot)]
        return Need(
            sum(n.compute for n in mine),
            sum(n.memory for n in mine),
            sum(n.cpus for n in mine),
            sum(n.host_memory for n in mine),
        )

    def oversubscribed(self) -> list[str]:
        """Slots and hosts that hold more than they have."""
        found = []
        for name, report in self.reports.items():
            whole = self.sums(name)
            if whole.cpus > report.cpus + 1e-5 or whole.host_memory > report.memory:
                found.append(name)
            for gpu in report.gpus:
                taken = self.sums(name, gpu.slot)
                if taken.compute > 1 + 1e-5 or taken.memory > gpu.memory:
                    found.append(f"{name} {gpu.slot}")
        return found

    def allowed(self, unit: Unit, report: HostReport, slot: str) -> bool:
        """Whether a unit may be there, without regard to room and to what it must be apart from."""
        if report.draining or unit.ref not in report.refs or not set(unit.labels) <= set(report.labels):
            return False
        on_cpu = slot == CPU
        if unit.device == "cpu" and not on_cpu:
            return False
        if unit.device == "gpu" and on_cpu and (report.gpus or not report.allow_cpu):
            return False
        failed = {(t.ref, t.stage) for t in report.trouble if t.slot == slot}
        return (unit.ref, unit.stage) not in failed and (on_cpu or len(failed) < 2)

    def apart(self, unit: Unit, units: Sequence[Unit], report: HostReport) -> bool:
        """Whether something on this host must be apart from it."""
        rules = {(u.ref, u.stage): set(u.apart) for u in units}
        for one in self.assignments:
            if one.host == report.name and one.ref == unit.ref:
                theirs = rules.get((one.ref, one.stage), set())
                if one.stage in unit.apart or unit.stage in theirs:
                    return True
        return False

    def fits(self, unit: Unit, report: HostReport, slot: str, used: dict[str, int], used_host: int) -> bool:
        """Whether there is room for a worker that is not there yet; what it presumes counts as nothing.

        `used` is what strangers use of a GPU's memory, `used_host` of the host's.
        """
        need, whole = unit.need, self.sums(report.name)
        compute = 0.0 if unit.presumed else need.compute
        cpus = 0.0 if unit.presumed and unit.device == "cpu" else need.cpus
        memory, host_memory = need.memory, need.host_memory
        if slot == CPU and unit.device == "gpu":
            cpus = cpus or (0.0 if unit.replica == 0 and unit.shards == 1 else 1.0)
            compute, memory, host_memory = 0.0, 0, host_memory + memory
        if whole.cpus + cpus > report.cpus + 1e-7:
            return False
        if host_memory and whole.host_memory + host_memory + used_host > report.memory:
            return False
        if slot == CPU:
            return True
        gpu = next(g for g in report.gpus if g.slot == slot)
        taken = self.sums(report.name, slot)
        no_memory = memory and taken.memory + memory + used[slot] > gpu.memory
        return taken.compute + compute <= 1 + 1e-7 and not no_memory


def strangers(report: HostReport, before: Sequence[Assignment]) -> tuple[dict[str, int], int]:
    """What others use of each GPU's memory, and of the host's."""
    mine = [a for a in before if a.host == report.name]
    gpus = {
        g.slot: max(0, g.memory - g.free - sum(a.need.memory for a in mine if a.slot == g.slot)) for g in report.gpus
    }
    return gpus, max(0, report.memory - report.free_memory - sum(a.need.host_memory for a in mine))
