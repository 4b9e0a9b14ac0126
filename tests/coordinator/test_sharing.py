"""Room that is short is shared; nothing is ever given that does not fit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from torchrelay.coordinator.sharing import Wish, share, slots


def wish(
    name: str, wanted: int, *, least: int = 1, current: int = 1, spare: int = 0, need: float | None = None
) -> Wish:
    return Wish(("p@1", name), least, wanted, current, spare, float(wanted) if need is None else need)


def room(total: float, *names: str, takes: float = 1.0) -> object:
    return slots({"gpu": total}, {("p@1", name): ("gpu", takes) for name in names})


def counts(*wishes: Wish, total: float) -> dict[str, int]:
    fits = slots({"gpu": total}, {w.key: ("gpu", 1.0) for w in wishes})
    return {key[1]: n for key, n in share(wishes, fits).items()}


def test_all_that_is_wanted_if_there_is_room() -> None:
    """Ten slots, nine wanted."""
    assert counts(wish("a", 4), wish("b", 5), total=10) == {"a": 4, "b": 5}


def test_what_others_can_spare_goes_to_who_needs_it() -> None:
    """All slots are taken: a has three more than it needs, and b gets those that it wants."""
    found = counts(wish("a", 6, current=6, spare=3, need=3.0), wish("b", 4, current=2), total=8)
    assert found == {"a": 4, "b": 4}


def test_hardship_is_shared_by_need() -> None:
    """Twice as much is wanted as there is: both get about half."""
    found = counts(wish("a", 12, current=9), wish("b", 4, current=1), total=8)
    assert found == {"a": 6, "b": 2}


def test_nothing_moves_for_little() -> None:
    """A stage that is worse off by less than a tenth takes no worker from another."""
    found = counts(wish("a", 22, current=10, need=20.0), wish("b", 24, current=10, need=21.0), total=20)
    assert found == {"a": 10, "b": 10}


def test_the_least_goes_one_by_one_where_not_even_that_fits() -> None:
    """Three slots for five: nobody gets a second before each has one."""
    found = counts(wish("a", 3, least=3), wish("b", 2, least=2), total=3)
    assert sum(found.values()) == 3
    assert min(found.values()) >= 1


WISHES = st.lists(
    st.tuples(st.integers(0, 8), st.integers(0, 40), st.integers(0, 60), st.integers(0, 40), st.floats(0, 100)),
    min_size=1,
    max_size=6,
)


@given(WISHES, st.integers(0, 120))
def test_never_more_than_fits_and_never_more_than_wanted(
    given_: list[tuple[int, int, int, int, float]], total: int
) -> None:
    """Whatever is wanted, whatever is there: within the room, at most what is wanted, the least if that fits."""
    wishes = [
        Wish(("p@1", f"s{i}"), least, least + more, current, spare, need)
        for i, (least, more, current, spare, need) in enumerate(given_)
    ]
    fits = slots({"gpu": total}, {w.key: ("gpu", 1.0) for w in wishes})
    found = share(wishes, fits)
    assert fits(found)
    assert all(0 <= found[w.key] <= w.wanted for w in wishes)
    if sum(w.least for w in wishes) <= total:
        assert all(found[w.key] >= w.least for w in wishes)
    # No slot stays free that somebody wants and would be given.
    if sum(found.values()) < total and sum(w.wanted - w.spare for w in wishes) > total:
        assert all(found[w.key] >= min(max(w.wanted - w.spare, w.least), w.wanted) for w in wishes)


def test_one_worker_of_eight_moves_where_that_helps_by_more_than_a_tenth() -> None:
    """Seven of what needs ten, and three of what needs two: with eight it is better off by a seventh."""
    assert counts(wish("a", 3, current=3, need=1.8), wish("b", 11, current=7, need=10.0), total=10) == {"a": 2, "b": 8}
