"""Where workers go and why, by example; what is refused, in which words; what stays, and what must go."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import pytest

from tests.coordinator.strategies import GIB, busy, host, numbered
from torchrelay.config.fleet import CPU, Assignment, Gpu, HostReport, Need, SlotTrouble
from torchrelay.coordinator.allocate import Allocation, Unit, allocate
from torchrelay.errors import InputError

REF = "p@1"
GPU = Unit(REF, "gpu", need=Need(compute=1.0), device="gpu")
CPU_ONE = Unit(REF, "cpu", need=Need(cpus=1.0))


def places(found: Allocation, stage: str | None = None) -> list[str]:
    return [f"{a.host} {a.slot}" for a in found.assignments if stage in (None, a.stage)]


def why(found: Allocation) -> str:
    (refusal,) = {r.why for r in found.refused}
    return refusal


# --- where it goes


def test_neighbours_share_memory_and_copies_of_a_pipeline_gather_on_one_host_each() -> None:
    """Two copies of three stages on two hosts: each host has one whole copy."""
    a = replace(CPU_ONE, stage="a", neighbours=("b",))
    b = replace(GPU, stage="b", neighbours=("a", "c"))
    c = replace(CPU_ONE, stage="c", neighbours=("b",))
    found = allocate([host("h1", 2), host("h2", 2)], numbered([a, b, c], [2, 2, 2]), [])
    assert Counter((x.host, x.stage) for x in found.assignments) == Counter(
        (name, stage) for name in ("h1", "h2") for stage in "abc"
    )
    assert any("shares memory with b" in x.why for x in found.assignments)


def test_hosts_that_share_memory_count_as_one_for_neighbours() -> None:
    """Two agents of one machine: the neighbour may be on either."""
    fleet = [host("h1", 1, cpus=0.0, host_id="m"), host("h2"), host("h3", host_id="m")]
    units = [replace(GPU, neighbours=("cpu",)), replace(CPU_ONE, neighbours=("gpu",))]
    assert places(allocate(fleet, units, []), "cpu") == ["h3 cpu"]


def test_replicas_spread_over_hosts_where_that_costs_no_locality() -> None:
    """A stage without neighbours has one worker on each host before any has two."""
    found = allocate([host(f"h{i}", 2) for i in range(3)], numbered([GPU], [4]), [])
    assert sorted(Counter(a.host for a in found.assignments).values()) == [1, 1, 2]


def test_a_gpu_that_is_in_use_is_filled_first_so_that_whole_ones_stay_free() -> None:
    """Two halves go to one GPU, and the whole one has another."""
    half = Unit(REF, "half", need=Need(compute=0.5), device="gpu")
    other = replace(half, stage="other")
    found = allocate([host("h1", 2)], [half, other, GPU], [])
    assert places(found, "half") == places(found, "other") != places(found, "gpu")


def test_processors_of_hosts_without_gpus_are_taken_first() -> None:
    assert places(allocate([host("h1", 1), host("h2")], [CPU_ONE], [])) == ["h2 cpu"]


def parts(count: int, need: Need | None = None) -> list[Unit]:
    """The shards of a gathered stage, each with a GPU of its own."""
    names = [f"s.{i}" for i in range(count)]
    one = replace(GPU, need=need or GPU.need)
    return [
        replace(one, stage=name, neighbours=tuple(others), kin=tuple(others))
        for name in names
        for others in [[n for n in names if n != name]]
    ]


def test_parts_of_a_cut_stage_go_to_a_host_with_room_for_all() -> None:
    """Though another one is the tighter fit for the first of them; with replicas, a whole group on each host."""
    found = allocate([host("h1", 3), host("h2", 4), host("h3", 8)], parts(4), [])
    assert {a.host for a in found.assignments} == {"h2"}
    twice = allocate([host("h1", 4), host("h2", 3), host("h3", 4)], numbered(parts(4), [2] * 4), [])
    assert Counter((a.host, a.stage) for a in twice.assignments) == Counter(
        (name, f"s.{i}") for name in ("h1", "h3") for i in range(4)
    )


def test_parts_that_share_a_gpu_need_no_gpu_each() -> None:
    """Room is what they take, not a slot for each."""
    found = allocate([host("h1", 1), host("h2", 2)], parts(4, Need(compute=0.5)), [])
    assert {a.host for a in found.assignments} == {"h2"}


def test_why_parts_of_a_cut_stage_are_on_several_hosts_is_said() -> None:
    """Where the others wait, and what that host lacks; and nothing where there is only one host to be on."""
    found = allocate([host("h1", 1), host("h2", 3)], parts(4), [])
    (far,) = [a for a in found.assignments if a.host == "h1"]
    assert far.why.startswith("not beside s.0, s.1, s.2 on h2, which lacks 1 of a GPU's compute")
    assert not any("not beside" in a.why for a in allocate([host("h1", 4)], parts(4), []).assignments)


def test_shards_go_to_gpus_that_nvlink_joins() -> None:
    """Of four GPUs in two pairs, of which one each is taken in part, the joined pair is chosen over any two."""
    taken = Assignment("x-1", "h1", "cuda:0", REF, "x", need=Need(compute=1.0))
    x = Unit(REF, "x", need=Need(compute=1.0), device="gpu")
    shards = numbered([replace(GPU, shards=2)], [1])
    found = allocate([host("h1", 5, links=((0, 1), (3, 4)))], [x, *shards], [taken])
    assert places(found, "gpu") == ["h1 cuda:3", "h1 cuda:4"]
    assert all("joined by NVLink" in a.why for a in found.assignments if a.stage == "gpu")
    assert len({a.group for a in found.assignments if a.stage == "gpu"}) == 1


def test_shards_go_over_hosts_when_none_has_room_for_all() -> None:
    """And say so. Unless they are to be on one host: then the group is refused as a whole."""
    fleet = [host("h1", 1), host("h2", 2)]
    shards = numbered([replace(GPU, shards=3)], [1])
    spread = allocate(fleet, shards, []).assignments
    assert [a.host for a in spread] == ["h1", "h2", "h2"]
    said = "shards on 2 hosts, since none has room for all 3: h1 for 1, h2 for 2"
    assert {a.why.partition(" stay free")[0] for a in spread} == {said}
    found = allocate(fleet, [replace(u, one_host=True) for u in shards], [])
    assert found.assignments == ()
    assert [(r.what, r.missing) for r in found.refused] == [("shards", 1)] * 3
    assert "wants 3 shards at once, each 1 of a GPU's compute; on one host there is room for 2" in why(found)


def test_why_a_group_is_on_several_hosts_is_said() -> None:
    """With the room that each has; of those that have none, why."""
    fleet = [host("h1", 1), host("h2", 2), host("h3", 4, labels=()), host("h4", 4, draining=True), host("h5")]
    taken = [Assignment(f"x-{i}", "h3", f"cuda:{i}", REF, "x", need=GPU.need) for i in range(4)]
    units = [*numbered([replace(GPU, stage="x")], [4]), *numbered([replace(GPU, shards=3)], [1])]
    found = allocate(busy(fleet, taken), units, taken)
    text = (
        "shards on 2 hosts, since none has room for all 3: h1 for 1, h2 for 2, h3 for none, which lacks 1 of a GPU's "
        "compute, h4 for none, which drains, and 1 more hosts"
    )
    assert {a.why.partition("; ")[0] for a in found.assignments if a.stage == "gpu"} == {text}


def test_a_worker_moves_so_that_a_group_is_on_one_host() -> None:
    """Only for the first group of a stage, and only to where it gets all that it had."""
    fleet = [host("h1", 2), host("h2", 1), host("h3", 1)]
    x = Unit(REF, "x", need=Need(compute=1.0), device="gpu")
    running = Assignment("x-1", "h1", "cuda:1", REF, "x", need=x.need)
    group = numbered([replace(GPU, shards=2)], [1])
    found = allocate(busy(fleet, [running]), [x, *group], [running])
    assert places(found, "gpu") == ["h1 cuda:0", "h1 cuda:1"]
    (moved,) = [a for a in found.assignments if a.stage == "x"]
    assert (moved.host, moved.why.partition(";")[0]) == ("h2", "moved to make room for gpu")
    assert [d.why for d in found.dropped] == ["moved, so that more have a place"]
    assert allocate(busy(fleet, found.assignments), [x, *group], found.assignments).assignments == found.assignments
    # It stays where it is the only one to fit, and for a further group.
    bound = replace(x, labels=("fast",))
    only = [replace(fleet[0], labels=("fast",)), *fleet[1:]]
    second = [replace(unit, replica=1) for unit in group]
    for hosts, units in ((only, [bound, *group]), (fleet, [x, *second])):
        found = allocate(busy(hosts, [running]), units, [running])
        assert running in found.assignments
        whys = {a.why.partition(",")[0] for a in found.assignments if a.stage == "gpu"}
        assert whys == {"shards on 2 hosts"}
    # A group that runs stays as well, though there is room now.
    assert set(allocate(fleet, second, found.assignments).assignments) == {
        a for a in found.assignments if a.stage == "gpu"
    }


def test_the_first_worker_of_each_stage_goes_before_the_second_of_any() -> None:
    """Two GPUs, three workers wanted of one stage and one of another: both have one."""
    found = allocate([host("h1", 2)], numbered([GPU, replace(GPU, stage="z")], [3, 1]), [])
    assert sorted(a.stage for a in found.assignments) == ["gpu", "z"]
    assert len(found.refused) == 2


# --- what only presumes


def test_a_small_machine_runs_what_says_no_needs() -> None:
    """Three stages on one processor and one GPU: each runs, and nothing is oversubscribed."""
    fleet = [host("h1", 1, cpus=1.0)]
    units = [replace(u, presumed=True) for u in (GPU, replace(GPU, stage="g2"), CPU_ONE, replace(CPU_ONE, stage="c2"))]
    found = allocate(fleet, units, [])
    assert (len(found.assignments), found.refused) == (4, ())
    assert sum(a.need.compute for a in found.assignments) == 1.0
    assert sum(a.need.cpus for a in found.assignments) == 1.0
    assert any("makes do with 0 of the 1 of a GPU's compute that it would take" in a.why for a in found.assignments)


def test_it_moves_to_a_gpu_of_its_own_once_there_is_one() -> None:
    """And says so."""
    units = [replace(u, presumed=True) for u in (GPU, replace(GPU, stage="g2"))]
    before = allocate([host("h1", 1)], units, [])
    found = allocate([host("h1", 1), host("h2", 1)], units, before.assignments)
    assert sorted(a.need.compute for a in found.assignments) == [1.0, 1.0]
    assert [d.why for d in found.dropped] == ["moved to where it gets all that is presumed"]


def test_what_says_its_needs_takes_them_from_what_presumes() -> None:
    """A running worker that presumed the processor leaves half of it to one that needs that; it stays where it is."""
    presuming = replace(CPU_ONE, presumed=True)
    fleet = [host("h1", cpus=1.0)]
    before = allocate(fleet, [presuming], [])
    found = allocate(fleet, [presuming, Unit(REF, "needs", need=Need(cpus=0.5))], before.assignments)
    assert found.refused == ()
    assert {a.stage: a.need.cpus for a in found.assignments} == {"cpu": 0.5, "needs": 0.5}
    assert before.assignments[0].id in {a.id for a in found.assignments}


def test_processors_stand_in_for_a_gpu_where_the_host_allows_it() -> None:
    """The model's memory is then the host's, and a real GPU goes before."""
    unit = Unit(REF, "g", need=Need(0.5, 4 * GIB, 0.0, GIB), device="gpu")
    (one,) = allocate([host("h1", allow_cpu=True)], [unit], []).assignments
    assert (one.slot, one.need) == (CPU, Need(0.0, 0, 1.0, 5 * GIB))
    assert "has no GPU and allows processors instead" in one.why
    assert places(allocate([host("h1", allow_cpu=True), host("h2", 1)], [unit], [])) == ["h2 cuda:0"]


def test_a_second_worker_takes_nothing_from_the_first_of_its_stage() -> None:
    """One processor that stands in for a GPU: one worker, the other is refused, and it stays so."""
    unit = Unit(REF, "g", need=Need(0.5), device="gpu")
    fleet = [host("h1", cpus=1.0, allow_cpu=True)]
    found = allocate(fleet, numbered([unit], [2]), [])
    assert ([a.need.cpus for a in found.assignments], len(found.refused)) == ([1.0], 1)
    assert allocate(fleet, numbered([unit], [2]), found.assignments) == found


def test_of_workers_that_run_the_first_are_those_that_make_do() -> None:
    """One makes do with nothing, the other has the processor: both stay, whatever their ids."""
    unit = Unit(REF, "g", need=Need(0.5), device="gpu")
    fleet = [host("h1", cpus=1.0, allow_cpu=True)]
    for lacking in ("a", "z"):
        running = [Assignment(name, "h1", CPU, REF, "g", need=Need(cpus=float(name != lacking))) for name in ("a", "z")]
        assert allocate(fleet, numbered([unit], [2]), running).assignments == tuple(running)


# --- what is refused


def test_a_refusal_says_what_is_short_and_by_how_much() -> None:
    """The memory of the GPU that comes closest, without what others use of it."""
    unit = Unit(REF, "detect", need=Need(0.5, 40 * GIB), device="gpu")
    small = Gpu(0, "u", "L4", 24 * GIB, 24 * GIB)
    half = Gpu(1, "v", "A100", 40 * GIB, 40 * GIB - 17 * GIB // 2)
    found = allocate([replace(host("h1"), gpus=(small,)),
                      replace(host("h2"), gpus=(small, half))], [unit], [])  # fmt: skip
    assert why(found) == (
        "stage detect of p@1 needs 40 GiB of a GPU; the freest, h2 cuda:1, has 31.5 GiB: 8.5 GiB short "
        "(other programs use 8.5 GiB)"
    )
    assert (found.refused[0].what, found.refused[0].missing) == ("memory", 17 * GIB // 2)


@pytest.mark.parametrize(
    ("fleet", "unit", "what", "text"),
    [
        ([], CPU_ONE, "hosts", "has no host to run on; start one: torchrelay agent FILE"),
        ([host("h1", refs=("q@2",))], CPU_ONE, "version", "their agents lack this version; start one with its file"),
        ([host("h1", draining=True)], CPU_ONE, "draining", "could run on h1 only, which drain; add a host"),
        ([host("h1", labels=("l40",))], replace(CPU_ONE, labels=("a100",)), "labels",
         "wants hosts with the labels a100, and there is none: h1 has l40"),
        ([host("h1")], GPU, "device", "needs a GPU, and h1 offers none; add one, or start the agent with --allow-cpu"),
        ([host("h1", trouble=(SlotTrouble(CPU, REF, "cpu", 3, 0.0, "no such file"),))], CPU_ONE, "trouble",
         "h1 cpu: cpu failed 3 times, last with: no such file"),
        ([host("h1", cpus=2.0)], replace(CPU_ONE, need=Need(cpus=2.5)), "cpus",
         "needs 2.5 processors; the freest, h1, has 2: 0.5 short"),
        ([host("h1")], replace(CPU_ONE, need=Need(cpus=9.0, host_memory=65 * GIB)), "cpus",
         "needs 9 processors and 65 GiB of a host's memory; the freest, h1, has 8 and 64 GiB: 1 and 1 GiB short"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_reason(fleet: list[HostReport], unit: Unit, what: str, text: str) -> None:
    """Why no slot counts at all, or what is short."""
    found = allocate(fleet, [unit], [])
    assert found.refused[0].what == what
    assert text in why(found)


def test_replicas_apart_need_a_host_each() -> None:
    """The third has none, and it is said which stage is in the way."""
    found = allocate([host("h1", 4), host("h2", 4)], numbered([replace(GPU, apart=("gpu",))], [3]), [])
    assert sorted(a.host for a in found.assignments) == ["h1", "h2"]
    assert "must be apart from gpu, which is on h1, h2; add a host" in why(found)


def test_a_group_with_a_shard_missing_is_an_error() -> None:
    with pytest.raises(InputError, match="has the shards \\[1\\] of 2; each must be there once"):
        allocate([host("h1")], [replace(GPU, shards=2, shard=1)], [])


# --- what stays and what goes


def test_one_worker_moves_so_that_another_has_a_place() -> None:
    """A small one that runs on the only large GPU goes to the other, and says why; for a second worker it does not."""
    gpus = (Gpu(0, "u", "L4", 24 * GIB, 24 * GIB), Gpu(1, "v", "H100", 80 * GIB, 80 * GIB))
    fleet = [replace(host("h1"), gpus=gpus)]
    small = Unit(REF, "small", need=Need(1.0, 10 * GIB), device="gpu")
    running = Assignment("small-1", "h1", "cuda:1", REF, "small", need=small.need, why="it was")
    large = Unit(REF, "large", need=Need(1.0, 60 * GIB), device="gpu")
    found = allocate(busy(fleet, [running]), [small, large], [running])
    assert {a.stage: a.slot for a in found.assignments} == {"small": "cuda:0", "large": "cuda:1"}
    assert "moved to make room for large" in next(a.why for a in found.assignments if a.stage == "small")
    second = allocate(busy(fleet, [running]), [small, replace(large, replica=1)], [running])
    assert second.assignments == (running,)
    assert [r.unit.stage for r in second.refused] == ["large"]


@pytest.mark.parametrize(
    ("fleet", "text"),
    [
        ([host("h2", 1)], "its host h1 is not there any more"),
        ([host("h1", 1, draining=True), host("h2", 1)], "its host h1 drains"),
        ([host("h1", 1, refs=()), host("h2", 1)], "its host h1 does not have p@1"),
        ([host("h1"), host("h2", 1)], "h1 has no cuda:0 any more"),
        ([host("h1", 1, trouble=(SlotTrouble("cuda:0", REF, "gpu", 1, 0.0, "it broke"),)), host("h2", 1)],
         "h1 cuda:0 is set aside: gpu failed once, last with: it broke"),
    ],
)  # fmt: skip
def test_what_must_go_is_placed_elsewhere_under_another_id(fleet: list[HostReport], text: str) -> None:
    """And it is said why it went."""
    before = allocate([host("h1", 1)], [GPU], [])
    found = allocate(fleet, [GPU], before.assignments)
    assert [d.why for d in found.dropped] == [text]
    assert places(found) == ["h2 cuda:0"]
    assert found.assignments[0].id != before.assignments[0].id


def test_a_group_goes_whole() -> None:
    """When one of two hosts is gone, the shard on the other goes with it."""
    shards = numbered([replace(GPU, shards=2)], [1])
    before = allocate([host("h1", 1), host("h2", 1)], shards, [])
    found = allocate([host("h1", 1), host("h3", 2)], shards, before.assignments)
    assert len(found.dropped) == 2
    assert {a.host for a in found.assignments} == {"h3"}


def test_memory_that_others_use_bars_new_workers_and_drives_out_none() -> None:
    """A worker stays on a GPU that somebody else fills; a second one is refused there."""
    unit = Unit(REF, "g", need=Need(0.25, 30 * GIB), device="gpu")
    before = allocate([host("h1", 1)], [unit], [])
    full = [replace(host("h1"), gpus=(Gpu(0, "u", "H100", 80 * GIB, 0),))]
    found = allocate(full, numbered([unit], [2]), before.assignments)
    assert found.assignments == before.assignments
    assert "needs 30 GiB of a GPU; the freest, h1 cuda:0, has 0 bytes: 30 GiB short" in why(found)


def test_a_slot_is_set_aside_for_a_while_and_for_the_stage_that_failed() -> None:
    """Of a GPU on which two stages failed, every stage stays away."""
    failed = SlotTrouble("cuda:0", REF, "gpu", 1, 100.0, "it broke")
    fleet = [host("h1", 1, trouble=(failed,))]
    other = replace(GPU, stage="other")
    assert allocate(fleet, [GPU], [], now=105.0).assignments == ()
    assert places(allocate(fleet, [GPU], [], now=111.0)) == ["h1 cuda:0"]
    assert places(allocate(fleet, [other], [])) == ["h1 cuda:0"]
    both = [host("h1", 1, trouble=(failed, replace(failed, stage="x")))]
    assert allocate(both, [other], []).refused[0].what == "trouble"


def test_too_many_end_on_the_host_that_has_most() -> None:
    """Three replicas on two hosts become two, one each."""
    fleet = [host("h1", 2), host("h2", 2)]
    before = allocate(fleet, numbered([GPU], [3]), [])
    found = allocate(fleet, numbered([GPU], [2]), before.assignments)
    assert sorted(a.host for a in found.assignments) == ["h1", "h2"]
    assert len(found.dropped) == 1
    assert set(found.assignments) < set(before.assignments)


def test_needs_that_changed_are_taken_over_where_they_fit() -> None:
    """The worker stays, with its id and its text."""
    before = allocate([host("h1", 1)], [GPU], [])
    found = allocate([host("h1", 1)], [replace(GPU, need=Need(0.5, GIB))], before.assignments)
    assert found.assignments == (replace(before.assignments[0], need=Need(0.5, GIB)),)


def test_ids_of_another_stamp_are_others() -> None:
    """So an id of a worker that still ends is not given again."""
    one, two = (allocate([host("h1", 1)], [GPU], [], stamp=stamp).assignments[0].id for stamp in ("1.1", "1.2"))
    assert one != two


# --- how long it takes


def _large() -> tuple[list[HostReport], list[Unit]]:
    fleet = [host(f"h{i:03}", 8, cpus=64.0, links=((0, 1, 2, 3), (4, 5, 6, 7))) for i in range(128)]
    clean = Unit(REF, "clean", need=Need(cpus=2.0), neighbours=("detect",))
    detect = Unit(REF, "detect", need=Need(0.5, 30 * GIB), device="gpu", neighbours=("clean", "llm"))
    llm = Unit(REF, "llm", shards=4, need=Need(1.0, 60 * GIB), device="gpu", neighbours=("detect",))
    return fleet, numbered([clean, detect, llm], [300, 400, 75])


@pytest.mark.alone
def test_a_thousand_workers_on_128_hosts_are_placed_at_once() -> None:
    """Within a second from nothing, and a fifth of one when nothing changed; more is wrong by an order."""
    fleet, units = _large()
    began = time.process_time()
    found = allocate(fleet, units, [])
    placed = time.process_time()
    again = allocate(busy(fleet, found.assignments), units, found.assignments)
    ended = time.process_time()
    assert (len(found.assignments), again) == (1000, replace(found))
    assert placed - began < 1.0
    assert ended - placed < 0.2
