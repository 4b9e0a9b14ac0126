"""How a model is split into parts, agreed on by their workers: one plan per version, stage, count and balance.

Promise: the first plan that is kept is the one that everybody gets, whoever made another. One worker makes it while
the others wait; when that one dies, another takes its place within seconds. The text is the splitter's, and is only
carried.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import redis
from redis.exceptions import OutOfMemoryError

from torchrelay.errors import BrokerUnavailable, DecodeError, StageLoadError
from torchrelay.queues.keys import ControlKeys, new_token

__all__ = ["MAX_PLAN_BYTES", "KeptPlans", "SplitPlace"]

log = logging.getLogger("torchrelay.worker")
MAX_PLAN_BYTES = 4 << 20
CLAIM_MS = 10_000
# However long the cutting takes, it is not hung: a model of a hundred gigabytes is measured within that.
_MOST_S = 1800.0
_LOOK_S = 0.1
_LINE_EVERY_S = 30.0


@dataclass(frozen=True, slots=True)
class SplitPlace:
    """Which model is split, and how: stage `stage` of a version `ref`, into `count` parts of equal `balance`."""

    ref: str
    stage: str
    count: int
    balance: str

    @property
    def field(self) -> str:
        return f"{self.stage}|{self.count}|{self.balance}"


class KeptPlans:
    """The split plans that a namespace keeps. Thread-safe, as the client's pool is."""

    def __init__(self, client: redis.Redis, control: ControlKeys) -> None:
        self._client = client
        self._control = control

    def find(self, place: SplitPlace) -> str | None:
        """The kept plan; None when there is none yet. Raises DecodeError for one that is no text."""
        found: bytes | None = self._client.hget(self._control.plans(place.ref), place.field)  # type: ignore[assignment]
        try:
            return None if found is None else found.decode()
        except UnicodeDecodeError as error:
            what = f"the kept split plan of {place.ref}/{place.stage} is no text"
            raise DecodeError(what, length=len(found or b""), offset=error.start) from error

    def keep(self, place: SplitPlace, text: str) -> str:
        """Keeps a plan unless one is kept already; returns the one that is.

        Raises StageLoadError for a text over `MAX_PLAN_BYTES`, BrokerUnavailable when the server has no room for it.
        """
        data = text.encode()
        if len(data) > MAX_PLAN_BYTES:
            raise StageLoadError(
                f"stage {place.stage!r}: its split plan has {len(data)} bytes, over the limit of {MAX_PLAN_BYTES}; "
                "split a model of fewer modules, or write its parts as stages"
            )
        try:
            self._client.hsetnx(self._control.plans(place.ref), place.field, data)
        except OutOfMemoryError as error:
            raise BrokerUnavailable(f"no room on the server for the split plan of {place.stage!r}: {error}") from error
        kept = self.find(place)
        # Only a version that is dropped at this moment has none, and then nobody else goes by it.
        return text if kept is None else kept

    def drop(self, ref: str) -> None:
        """Forgets all plans of a version."""
        self._client.delete(self._control.plans(ref))

    def agree(self, place: SplitPlace, make: Callable[[], str], who: str) -> str:
        """The kept plan, or the one that `make` makes, when nobody else is making one. Blocks meanwhile.

        Args:
            make: makes a plan; may take minutes. What it raises goes on to the caller, and frees the others.
            who: this worker, for the others' logs.
        """
        told_at = float("-inf")
        while True:
            kept = self.find(place)
            if kept is not None:
                return kept
            with self._claimed(place, who) as claimed:
                # Whoever had the claim before may have kept a plan since that look.
                if claimed:
                    return self.find(place) or self.keep(place, make())
            now = time.monotonic()
            if now - told_at >= _LINE_EVERY_S:
                told_at = now
                log.info("stage %r: waiting for its split plan, which %s makes", place.stage, self._maker(place))
            time.sleep(_LOOK_S)

    def _maker(self, place: SplitPlace) -> str:
        found: bytes | None = self._client.get(self._control.plan_maker(place.ref, place.field))  # type: ignore[assignment]
        return (found or b"another worker").decode(errors="replace").partition(" ")[0]

    @contextmanager
    def _claimed(self, place: SplitPlace, who: str) -> Iterator[bool]:
        """Whether this call may make the plan: held by a claim that runs out soon after this process dies."""
        key, mine = self._control.plan_maker(place.ref, place.field), f"{who} {new_token(8)}".encode()
        try:
            claimed = bool(self._client.set(key, mine, nx=True, px=CLAIM_MS))
        except OutOfMemoryError as error:
            raise BrokerUnavailable(f"no room on the server for the split plan of {place.stage!r}: {error}") from error
        if not claimed:
            yield False
            return
        over = threading.Event()
        renewing = threading.Thread(target=self._renew, args=(key, mine, over), name="torchrelay-plan", daemon=True)
        renewing.start()
        try:
            yield True
        finally:
            over.set()
            renewing.join()
            self._give_up(key, mine)

    def _renew(self, key: str, mine: bytes, over: threading.Event) -> None:
        until = time.monotonic() + _MOST_S
        while not over.wait(CLAIM_MS / 4000.0) and time.monotonic() < until:
            try:
                # Not compared in one step: at worst two workers make a plan, of which one is kept.
                if self._client.get(key) == mine:
                    self._client.pexpire(key, CLAIM_MS)
            except (redis.RedisError, OSError) as error:
                log.info("the claim on a split plan was not renewed: %s", error)

    def _give_up(self, key: str, mine: bytes) -> None:
        try:
            if self._client.get(key) == mine:
                self._client.delete(key)
        except (redis.RedisError, OSError):
            pass  # it runs out by itself
