"""Steady figures out of noisy ones: a rate that follows jumps and not noise, and what a row costs a worker. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torchrelay.queues.histogram import SERVICE_BUCKETS, service_middle_s

__all__ = ["Level", "Service", "sane"]

_SLOW_S, _SPREAD_S, _TREND_S = 40.0, 60.0, 80.0
# A slope counts by what it is steeper than so many of its standard errors.
_SURE = 2.0
_LINE_OF = 6.0
# In standard deviations: when a sum is no chance any more, and what one sample adds at most.
_JUMP, _MOST_OFF = 6.5, 4.0
_MOST = 1e12
# Half of what is known of the service times is this old, while work goes on.
_MEMORY_S = 45.0
_ENOUGH_BATCHES = 30.0
# So few tell of a move already where their times in powers of two have moved by so many standard errors, and so far:
# a slow batch or two of many fast ones, which is what heavy tails look like, moves that little.
_FIRST_COUNT = 0.25
_FEW_BATCHES, _SURE_OCTAVES, _LEAST_OCTAVES = 8.0, 4.5, 0.5
# A worker that was at work before anybody watched counts as so many batches.
_SEED_BATCHES = 200.0
# The cost of a row at batches up to so many times as full as those seen is taken from their trend.
_FURTHER = 2.0


def sane(value: float, most: float = _MOST) -> float:
    """A number from 0 to `most`, whatever came: NaN is 0."""
    return 0.0 if not value > 0 else min(value, most)


@dataclass(slots=True)
class Level:
    """A smoothed rate. It changes little while what comes scatters as it did, and jumps where that has moved.

    A jump is found by CUSUM (Page 1954), on either side: what goes beyond half a standard deviation is summed up until
    it cannot be chance. The level is then the mean of the last of them, and its trend theirs alone, so that a step is
    no steep ramp. How much the rates scatter is told by how much each differs from the one before, which a jump does
    not change.
    """

    value: float = 0.0
    noise: float = 0.0
    """Standard deviation of one sample."""
    trend: float = 0.0
    """By how much the rate rises each second, as far as that is no chance; negative where it falls."""
    _last: float = 0.0
    _samples: int = 0
    _age_s: float = 0.0
    # Discounted sums over samples: 1, t, t * t, x, t * x, with t seconds before now. Of those since the last jump, and
    # of those that the two sums below are made of.
    _sums: list[float] = field(default_factory=lambda: [0.0] * 5)
    _before: list[float] = field(default_factory=lambda: [0.0, 0.0])
    _sides: list[list[float]] = field(default_factory=lambda: [[0.0] * 5, [0.0] * 5])
    # Of the sum above and the one below: how much, over how many seconds, and how many events.
    _runs: list[list[float]] = field(default_factory=lambda: [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])

    def add(self, rate: float, seconds: float, grain: float = 1.0) -> float:
        """Takes in the mean rate of the last so many seconds; returns the level. `grain` is what one event adds."""
        rate, seconds = sane(rate), sane(seconds, 3600.0)
        if seconds <= 0:
            return self.value
        self._samples += 1
        if self._samples == 1:
            self.value = self._last = rate
            return rate
        # As a plain mean while there is little to go by.
        step = max(1.0 - math.exp(-seconds / _SPREAD_S), 1.0 / self._samples)
        change = abs(rate - self._last) / 1.128  # the mean of |x - y| is 1.128 standard deviations
        self.noise += step * (min(change, 4.0 * self._scatter(seconds, grain)) - self.noise)
        self._last = rate
        self._age_s += seconds
        off = (rate - self.value) / self._scatter(seconds, grain)
        self._sums = _with_sample(self._sums, rate, seconds)
        for i, side in enumerate((off, -off)):
            run = self._runs[i]
            run[0] = max(run[0] + min(side, _MOST_OFF) - 0.5, 0.0)
            # The newer ones count more: what began the sum may have been chance.
            run[1:] = [run[1] / 2.0 + seconds, run[2] / 2.0 + rate * seconds] if run[0] else [0.0, 0.0]
            if run[0] and not self._sides[i][0]:
                self._before[i] = self.trend
            self._sides[i] = _with_sample(self._sides[i], rate, seconds) if run[0] else [0.0] * 5
            if run[0] > _JUMP:
                self.value, self._age_s = run[2] / run[1], 0.0
                if self._before[i] * (1, -1)[i] <= 0:
                    self._sums = self._sides[i]
                self._runs, self._sides = [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [[0.0] * 5, [0.0] * 5]
                self._follow(seconds, grain)
                return self.value
        self._follow(seconds, grain)
        self.value += max(1.0 - math.exp(-seconds / _SLOW_S), 1.0 / self._samples) * (rate - self.value)
        return self.value

    def _follow(self, seconds: float, grain: float) -> None:
        """The slope of a discounted least-squares line, shrunk towards none."""
        n, t, tt, x, tx = self._sums
        spread = tt - t * t / n
        if n < _LINE_OF or spread <= 0:
            self.trend = 0.0
            return
        slope = (tx - t * x / n) / spread
        sure = _SURE * self._scatter(seconds, grain) / math.sqrt(spread)
        self.trend = math.copysign(max(abs(slope) - sure, 0.0), slope)

    @property
    def now(self) -> float:
        """The level, without the time by which it lags behind a trend: none where it has just jumped."""
        return max(self.value + self.trend * _SLOW_S * (1.0 - math.exp(-self._age_s / _SLOW_S)), 0.0)

    def _scatter(self, seconds: float, grain: float) -> float:
        """Standard deviation of a sample; no less than that of chance alone."""
        chance = math.sqrt(max(self.value, grain / seconds) * max(grain, 1e-9) / seconds)
        return max(self.noise, chance, 0.05 * self.value, 1e-9)

    def dispersion(self, seconds: float) -> float:
        """Variance of the events in such a time over their mean: 1 where they come by chance alone, one by one."""
        return self.noise**2 * seconds / self.value if self.value > 0 else 1.0


def _with_sample(sums: list[float], rate: float, seconds: float) -> list[float]:
    """The sums with one more sample, after `seconds`."""
    n, t, tt, x, tx = sums
    kept = math.exp(-seconds / _TREND_S)
    # All samples are older now by `seconds`.
    tt, tx = tt - 2.0 * seconds * t + seconds * seconds * n, tx - seconds * x
    return [kept * n + 1.0, kept * (t - seconds * n), kept * tt, kept * x + rate, kept * tx]


def _octaves(histogram: Sequence[float]) -> tuple[float, float, float]:
    """How many times are in it, and the mean and variance of their logarithms to the base of two. The variance of times
    within a bucket, which is half as wide, is in it."""
    count = sum(histogram)
    if count <= 0:
        return 0.0, 0.0, 0.0
    mean = sum(n * i for i, n in enumerate(histogram)) / count
    square = sum(n * (i - mean) ** 2 for i, n in enumerate(histogram)) / count
    return count, mean / 2.0, square / 4.0 + 0.25 / 12.0


@dataclass(slots=True)
class Service:
    """What a stage's forwards cost, from what its workers counted: seconds of a batch, as a fixed part and one by row.

    Sums over batches, of which the older ones count less. When the newer ones clearly cost something else, the older
    are forgotten.
    """

    batches: float = 0.0
    _rows: float = 0.0
    _seconds: float = 0.0
    _rows2: float = 0.0
    _rows_seconds: float = 0.0
    _histogram: list[float] = field(default_factory=lambda: [0.0] * SERVICE_BUCKETS)
    _recent: tuple[float, float, float] = (0.0, 0.0, 0.0)
    _recent_histogram: list[float] = field(default_factory=lambda: [0.0] * SERVICE_BUCKETS)
    _moved: int = 0
    _news: bool = False

    def seed(self, batches: float, rows: float, seconds: float, histogram: Sequence[float]) -> None:
        """What a worker counted before it was watched."""
        if batches <= 0 or rows <= 0:
            return
        part = min(1.0, _SEED_BATCHES / batches)
        self.add(batches * part, rows * part, seconds * part, [n * part for n in histogram])

    def add(self, batches: float, rows: float, seconds: float, histogram: Sequence[float] = ()) -> None:
        """So many batches more, of so many rows and seconds together."""
        batches, rows, seconds = sane(batches), sane(rows), sane(seconds)
        if batches < 1 or rows < 1:
            return
        self._news = True
        self.batches += batches
        self._rows += rows
        self._seconds += seconds
        self._rows2 += rows * rows / batches
        self._rows_seconds += rows * seconds / batches
        self._recent = (self._recent[0] + batches, self._recent[1] + rows, self._recent[2] + seconds)
        for bucket, count in enumerate(histogram[:SERVICE_BUCKETS]):
            self._histogram[bucket] += sane(count)
            self._recent_histogram[bucket] += sane(count)

    def pass_time(self, seconds: float) -> None:
        """Called at every look: forgets, and finds out whether the cost has moved. Idle time forgets nothing."""
        if not self._news:
            return
        self._news = False
        moved = self._recent[0] >= _FEW_BATCHES and self._shifted()
        if moved or self._recent[0] >= _ENOUGH_BATCHES:
            self._moved = self._moved + 1 if moved or self._differs() else 0
            if self._moved >= 2:
                self._forget_older()
            self._recent, self._recent_histogram = (0.0, 0.0, 0.0), [0.0] * SERVICE_BUCKETS
        if not self._moved:
            self._scale(0.5 ** (sane(seconds, 600.0) / _MEMORY_S))

    def _differs(self) -> bool:
        """Whether the newest batches cost more or less than chance and their fill explain."""
        batches, rows, spent = self._recent
        before = (self.batches - batches, self._rows - rows, self._seconds - spent)
        if before[0] < _ENOUGH_BATCHES or before[1] <= 0 or before[2] <= 0:
            return False
        expected = before[2] / before[0] * self._stretch(rows / batches, before[1] / before[0])
        bound = max(0.4, 4.0 * math.sqrt((self.cv2 + 0.1) / batches))
        return abs(math.log(max(spent / batches, 1e-9) / max(expected, 1e-9))) > math.log1p(bound)

    def _shifted(self) -> bool:
        """Whether the times of the newest few, as they come, are others than those of the older ones."""
        batches, rows, _ = self._recent
        older = [max(n - new, 0.0) for n, new in zip(self._histogram, self._recent_histogram, strict=True)]
        count, mean, variance = _octaves(older)
        fresh, now, _ = _octaves(self._recent_histogram)
        if fresh < _FEW_BATCHES or count < _ENOUGH_BATCHES or self._rows <= rows or self.batches <= batches:
            return False
        fill = self._stretch(rows / batches, (self._rows - rows) / (self.batches - batches))
        off = abs(now - mean - math.log2(max(fill, 1e-6)))
        return off > max(_LEAST_OCTAVES, _SURE_OCTAVES * math.sqrt(variance / fresh))

    def _stretch(self, rows: float, before: float) -> float:
        """How much longer a batch of `rows` takes than one of `before`."""
        fixed, per_row = self._line()
        return (fixed + per_row * rows) / max(fixed + per_row * before, 1e-12)

    def _forget_older(self) -> None:
        batches, rows, spent = self._recent
        seen = sum(self._recent_histogram) >= 1.0
        part = batches / max(self.batches, 1e-9)
        self._histogram = list(self._recent_histogram) if seen else [n * part for n in self._histogram]
        self.batches, self._rows, self._seconds = batches, rows, spent
        self._rows2, self._rows_seconds = rows * rows / batches, rows * spent / batches
        self._moved = 0
        # These may be from the very moment at which it moved; those to come count more.
        self._scale(_FIRST_COUNT)

    def _scale(self, kept: float) -> None:
        self.batches *= kept
        self._rows *= kept
        self._seconds *= kept
        self._rows2 *= kept
        self._rows_seconds *= kept
        self._recent = (self._recent[0] * kept, self._recent[1] * kept, self._recent[2] * kept)
        self._histogram = [n * kept for n in self._histogram]
        self._recent_histogram = [n * kept for n in self._recent_histogram]

    def _line(self) -> tuple[float, float]:
        """Seconds of a batch: the fixed part, and that of each row; all by row where batches were much alike."""
        if self.batches <= 0 or self._rows <= 0:
            return 0.0, 0.0
        rows, seconds = self._rows / self.batches, self._seconds / self.batches
        spread = self._rows2 / self.batches - rows * rows
        if spread <= (0.1 * rows) ** 2:
            return 0.0, seconds / rows
        slope = (self._rows_seconds / self.batches - rows * seconds) / spread
        slope = min(max(slope, 0.0), seconds / rows)
        return seconds - slope * rows, slope

    @property
    def known(self) -> bool:
        return self.batches > 0 and self._rows > 0 and self._seconds > 0

    def seconds_per_row(self, max_rows: float) -> float:
        """Of one worker that has enough to do; 0 while nothing is known."""
        if not self.known:
            return 0.0
        fixed, per_row = self._line()
        rows = self._rows / self.batches
        full = max(rows, min(max(max_rows, 1.0), _FURTHER * rows))
        return fixed / full + per_row

    @property
    def seconds_per_batch(self) -> float:
        return self._seconds / self.batches if self.batches > 0 else 0.0

    @property
    def rows_per_batch(self) -> float:
        return self._rows / self.batches if self.batches > 0 else 0.0

    @property
    def cv2(self) -> float:
        """Variance of a forward's time over its squared mean."""
        total = sum(self._histogram)
        if total <= 0:
            return 1.0
        mean = sum(n * service_middle_s(i) for i, n in enumerate(self._histogram)) / total
        square = sum(n * service_middle_s(i) ** 2 for i, n in enumerate(self._histogram)) / total
        return max(square / (mean * mean) - 1.0, 0.0)

    @property
    def histogram(self) -> list[float]:
        return self._histogram
