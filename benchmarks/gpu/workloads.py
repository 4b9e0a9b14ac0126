"""What each model of `benchmarks.gpu` is fed: column, sizes, arrival order, and the batches of the bare loops.

Imports no torch: the producer process reads this too. The same seed gives the same jobs in every process.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

SHORTEST, MEDIAN_TOKENS, SIGMA, VOCABULARY = 8, 80, 0.8, 30_000
_LARGE_BYTES = 4 << 20
Table = dict[str, Any]


class Packed(NamedTuple):
    """One batch of a bare loop: the model's arguments, how many units it counts, and the pool's row in each place."""

    inputs: tuple[np.ndarray, ...]
    units: int
    rows: np.ndarray


@dataclass(frozen=True, slots=True)
class Workload:
    """One model's food. `buckets` (lengths) and `batch_tokens` (rows x length) are for ragged tokens only.

    `pool_rows` different rows are made once and sent again and again, more than a processor's or a GPU's caches hold.
    """

    name: str
    unit: str
    column: str
    dtype: str
    shape: tuple[int, ...]
    max_rows: int
    job_rows: int
    in_flight: int
    pool_rows: int
    buckets: tuple[int, ...] = ()
    batch_tokens: int = 0
    width: int = 0
    layers: int = 0

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> Workload:
        data = json.loads(text)
        return cls(**{**data, "shape": tuple(data["shape"]), "buckets": tuple(data["buckets"])})

    @property
    def pass_rows(self) -> int:
        """Rows of a batch of the stage that passes on: where jobs are small, it takes several, and joins them."""
        return self.job_rows if math.prod(self.shape) * self.job_rows > _LARGE_BYTES else 8 * self.job_rows

    @property
    def type(self) -> str:
        """The column's type as a pipeline file writes it."""
        return f"{self.dtype}[{', '.join(map(str, self.shape)) or '*'}]"

    def tables(self, seed: int = 0) -> list[Table]:
        """The jobs in the order in which the producer sends them, over and over."""
        random = np.random.default_rng(seed)
        jobs = math.ceil(max(self.pool_rows, 2 * self.max_rows) / self.job_rows)
        if self.buckets:
            return [{self.column: _token_rows(random, self.job_rows, self.buckets[-1])} for _ in range(jobs)]
        shape = (self.job_rows, *self.shape)
        return [{self.column: random.integers(0, 256, shape, np.uint8)} for _ in range(jobs)]

    def units_of(self, table: Table) -> int:
        """Images, rows or tokens of a job."""
        rows = table[self.column]
        return sum(map(len, rows)) if self.buckets else len(rows)

    def rows_at(self, bucket: int) -> int:
        """How many rows of `bucket` tokens fill a batch."""
        return self.batch_tokens // bucket

    def pack(self, tables: list[Table]) -> list[Packed]:
        """The same rows as batches of fixed shapes: full ones, or for tokens by sorted windows."""
        if self.buckets:
            return self._pack_tokens([row for table in tables for row in table[self.column]])
        rows = np.concatenate([table[self.column] for table in tables])
        starts = range(0, len(rows) - self.max_rows + 1, self.max_rows)
        return [Packed((rows[i : i + self.max_rows],), self.max_rows, np.arange(i, i + self.max_rows)) for i in starts]

    def _pack_tokens(self, rows: list[np.ndarray]) -> list[Packed]:
        # A window is what is under way at once through the relay: so much can its worker see, at most, to sort.
        window = self.job_rows * self.in_flight
        batches = []
        for start in range(0, len(rows), window):
            order = sorted(range(start, min(start + window, len(rows))), key=lambda i: len(rows[i]))
            lengths = np.array([len(rows[i]) for i in order])
            ends = [0, *np.searchsorted(lengths, self.buckets, side="right").tolist()]
            for bucket, low, high in zip(self.buckets, ends, ends[1:], strict=False):
                size = self.rows_at(bucket)
                parts = (order[i : min(i + size, high)] for i in range(low, high, size))
                batches += [_padded(rows, part, size, bucket) for part in parts]
        return batches


def _token_rows(random: np.random.Generator, count: int, longest: int) -> list[np.ndarray]:
    lengths = np.exp(random.normal(math.log(MEDIAN_TOKENS), SIGMA, count)).astype(int).clip(SHORTEST, longest)
    return [random.integers(1, VOCABULARY, length).astype(np.int32) for length in lengths]


def _padded(rows: list[np.ndarray], part: list[int], size: int, bucket: int) -> Packed:
    tokens = np.zeros((size, bucket), np.int32)
    # One token where no row is: a softmax over nothing is NaN.
    lengths = np.ones(size, np.int64)
    for place, number in enumerate(part):
        lengths[place] = len(rows[number])
        tokens[place, : lengths[place]] = rows[number]
    return Packed((tokens, lengths), int(lengths[: len(part)].sum()), np.array(part))


# Bytes to the GPU at the speed of an H100, of the 55 GB/s that PCIe moves from pinned memory:
# - images, 147 KiB each: 24,350/s are 3.7 GB/s for ResNet-50; ViT-B/16 takes fewer.
# - mlp: a row is 4 x 2 x 4096^2 = 134 MFLOP, so 600 TFLOP/s are 4.5 million rows/s. As fp16[4096] they would be
#   37 GB/s, near what PCIe and one copying core can do; as uint8[256], projected to 4096 by 2 MFLOP, 1.1 GB/s.
#   A forward of 1,024 rows is 0.23 ms; 4,096 rows (four jobs) are the baseline's better batch too.
# - tokens, 4 bytes each: 12 MB/s at 3 million/s; the cost is in the number of rows.
_FULL = {
    "resnet50": Workload("resnet50", "images", "image", "uint8", (224, 224, 3), 256, 128, 64, 1024),
    "vit_b16": Workload("vit_b16", "images", "image", "uint8", (224, 224, 3), 256, 128, 64, 1024),
    "tinycnn": Workload("tinycnn", "images", "image", "uint8", (224, 224, 3), 256, 128, 64, 1024),
    "mlp": Workload("mlp", "rows", "features", "uint8", (256,), 4096, 1024, 64, 262_144, width=4096, layers=4),
    "text": Workload(
        *("text", "tokens", "tokens", "int32", (), 512, 64, 256, 16_384),
        buckets=(32, 64, 128, 256, 512),
        batch_tokens=16_384,
        width=768,
        layers=6,
    ),
}
MODELS = tuple(_FULL)


def workload(name: str, quick: bool) -> Workload:
    """The workload of a model; `quick` makes it tiny, for a try on a CPU."""
    full = _FULL[name]
    if not quick:
        return full
    if name == "mlp":
        return replace(full, max_rows=256, job_rows=64, in_flight=8, pool_rows=1024, width=256)
    if name == "text":
        small = replace(full, max_rows=64, job_rows=16, in_flight=8, pool_rows=256)
        return replace(small, batch_tokens=2048, width=48, layers=2)
    side = 224 if name == "vit_b16" else 64
    return replace(full, shape=(side, side, 3), max_rows=16, job_rows=8, in_flight=6, pool_rows=64)
