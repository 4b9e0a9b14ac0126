"""Which versions have workers: the current ones, those asked for, and old ones until their last job has ended."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from torchrelay.coordinator.versions import QUIET_S, Drains, served_versions

OLD, NEW, OTHER = "p@00000001", "p@00000002", "q@00000001"
NOBODY: frozenset[str] = frozenset()


def test_an_old_version_is_served_until_its_last_job_has_ended_and_a_moment_longer() -> None:
    """Jobs in the graph of its runs count; a client may submit to it for a moment after the switch."""
    known, state = [OLD, NEW], Drains()
    served, state = served_versions(known, {"p": OLD}, NOBODY, {}, state, 0.0)
    assert served == {OLD: ("new jobs take it", True)}
    served, state = served_versions(known, {"p": OLD}, frozenset({NEW}), {}, state, 1.0)
    assert served[NEW] == ("it is to take jobs soon", False)
    served, state = served_versions(known, {"p": NEW}, NOBODY, {f"{OLD}+run": 2, OLD: 1}, state, 100.0)
    assert served == {NEW: ("new jobs take it", True), OLD: ("it drains: 3 jobs are left", False)}
    served, state = served_versions(known, {"p": NEW}, NOBODY, {}, state, 100.0 + QUIET_S - 1)
    assert set(served) == {OLD, NEW}
    served, state = served_versions(known, {"p": NEW}, NOBODY, {}, state, 100.0 + QUIET_S)
    assert set(served) == {NEW}
    served, state = served_versions(known, {"p": NEW}, NOBODY, {OLD: 1}, state, 200.0)
    assert set(served) == {OLD, NEW}


def test_versions_that_no_host_has_are_not_served() -> None:
    served, _ = served_versions([OTHER], {"p": OLD, "q": OTHER}, frozenset({NEW}), {OLD: 5}, Drains(), 0.0)
    assert set(served) == {OTHER}


REFS = st.sampled_from([f"{name}@{number:08x}" for name in "pq" for number in range(3)])


@given(
    st.lists(
        st.tuples(
            st.sets(REFS),
            st.dictionaries(st.sampled_from("pq"), REFS),
            st.frozensets(REFS),
            st.dictionaries(REFS, st.integers(0, 3)),
            st.floats(0, 10),
        ),
        max_size=8,
    )
)
def test_whatever_happens_who_has_work_is_served_and_who_is_quiet_is_not(
    steps: list[tuple[set[str], dict[str, str], frozenset[str], dict[str, int], float]],
) -> None:
    """Of those that a host has: all that take or have jobs or are asked for, and none that was quiet for long."""
    state, now, busy_at = Drains(), 0.0, dict[str, float]()
    for known, current, asked, jobs, passed in steps:
        now += passed
        served, state = served_versions(sorted(known), current, asked, jobs, state, now)
        busy = known & (set(current.values()) | asked | {ref for ref, count in jobs.items() if count})
        assert busy <= set(served) <= known
        assert {ref for ref, one in served.items() if one.current} == known & set(current.values())
        busy_at |= dict.fromkeys(busy, now)
        for ref in set(served) - busy:
            assert now - busy_at[ref] < QUIET_S
