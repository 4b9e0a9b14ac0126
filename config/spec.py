"""What a pipeline file may say: strict models of its keys. What it means together is worked out in `graph.py`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from torchrelay.config.settings import parse_bytes
from torchrelay.config.shard_plans import check_plan
from torchrelay.config.types import parse_type
from torchrelay.errors import ConfigError

NAME = r"^[a-z][a-z0-9_-]{0,63}$"
COLUMN = r"^[A-Za-z_][A-Za-z0-9_]{0,63}$"
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=:/-]{0,63}")
SOURCE = r"^([a-z][a-z0-9_-]{0,63}\.)?[A-Za-z_][A-Za-z0-9_]{0,63}$"
MAX_STAGES = 30
# More would sort better, and hold back from other workers what this one computes only later.
_SORTED_BATCHES = 4
MAX_SHARDS = 16


def _type_text(text: Any) -> str:
    try:
        parse_type(text)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return str(text)


def _bytes(value: Any) -> int:
    try:
        return parse_bytes(value)
    except ConfigError as error:
        raise ValueError(str(error)) from error


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _count(value: Any) -> Any:
    return {"min": value, "max": value} if isinstance(value, int) and not isinstance(value, bool) else value


def _labels(value: Any) -> Any:
    return {"labels": value} if isinstance(value, str | list) else value


def _label(text: str) -> str:
    if not _LABEL.fullmatch(text):
        raise ValueError(f"a label is letters, digits and _.=:/-, at most 64; {text!r:.80} came")
    return text


def _apart(value: Any) -> Any:
    if isinstance(value, bool) or (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        return value
    raise ValueError(f"write true, or the names of stages; {value!r:.80} came")


def _number(value: Any) -> Any:
    if not isinstance(value, int | float):
        raise ValueError(f"a number is expected, {value!r:.80} came")
    return value


def _form(value: Any) -> str:
    return "list" if isinstance(value, list) else "mapping"


def _rows(value: Any) -> Any:
    collapse = isinstance(value, dict) and list(value) == ["collapse"] and isinstance(value["collapse"], str)
    if collapse or isinstance(value, CollapseSpec) or value in ("same", "expand"):
        return value
    raise ValueError(f"write same, expand or {{collapse: STAGE}}; {value!r:.80} came")


def _rows_form(value: Any) -> str:
    return "word" if isinstance(value, str) else "collapse"


def _ascending(sizes: list[int]) -> list[int]:
    if sizes != sorted(set(sizes)):
        raise ValueError(f"sizes rise from one to the next, as in {sorted(set(sizes))}; {sizes!r:.80} came")
    return sizes


Name = Annotated[str, Field(pattern=NAME)]
Column = Annotated[str, Field(pattern=COLUMN)]
Source = Annotated[str, Field(pattern=SOURCE)]
TypeText = Annotated[str, BeforeValidator(_type_text)]
Bytes = Annotated[int, BeforeValidator(_bytes)]
Size = Annotated[int, Field(ge=1, le=2**31)]
Label = Annotated[str, AfterValidator(_label)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class CostSpec(_Model):
    """What a batch may cost: `total` of the lengths that its rows have in `column`, or of its numbers."""

    column: Column
    total: Annotated[int, Field(ge=1, le=2**53)]


class BatchSpec(_Model):
    """How rows of several jobs are put together.

    `pad` names ragged columns and the number that fills them; `buckets` the sizes that their ragged axes are padded up
    to; `max_cost` bounds a batch beside `max_rows`. `row_buckets` are the numbers of rows that a compiled or recorded
    model sees, beside `max_rows`; None is the powers of two. `ahead` batches are made ready while others are computed:
    0 takes one step after the other, None is 2 on a GPU and 0 elsewhere. `in_flight_rows` bounds what one worker holds,
    from the claim until it was computed; None does not.
    """

    max_rows: Annotated[int, Field(ge=1, le=1_000_000)] = 32
    max_wait_ms: Annotated[float, Field(ge=0, le=60_000)] = 0
    # Any, because a union of int and float would report each number's problem once per member.
    pad: dict[Column, Annotated[Any, AfterValidator(_number)]] = {}
    buckets: dict[Column, Annotated[list[Size], Field(min_length=1, max_length=64), AfterValidator(_ascending)]] = {}
    max_cost: CostSpec | None = None
    row_buckets: Annotated[list[Size], Field(min_length=1, max_length=64), AfterValidator(_ascending)] | None = None
    ahead: Annotated[int, Field(ge=0, le=16)] | None = None
    in_flight_rows: Annotated[int, Field(ge=1, le=2**31)] | None = None

    @model_validator(mode="after")
    def _holds_a_batch(self) -> BatchSpec:
        if self.in_flight_rows is not None and self.in_flight_rows < self.window_rows:
            taken = f"{_SORTED_BATCHES} batches of max_rows, to sort them" if self.sorts else "max_rows"
            raise ValueError(
                f"in_flight_rows ({self.in_flight_rows}) is below the {self.window_rows} rows that are taken at once "
                f"({taken}); raise it or lower max_rows ({self.max_rows})"
            )
        return self

    @property
    def sorts(self) -> bool:
        """Whether rows of like length are put together."""
        return bool(self.buckets) or self.max_cost is not None

    @property
    def window_rows(self) -> int:
        """How many rows are taken at once: to put together rows of like length, there must be some to choose from."""
        return self.max_rows * _SORTED_BATCHES if self.sorts else self.max_rows


class ReplicasSpec(_Model):
    """How many workers serve a stage."""

    min: Annotated[int, Field(ge=0, le=10_000)] = 1
    max: Annotated[int, Field(ge=1, le=10_000)] = 1

    @model_validator(mode="before")
    @classmethod
    def _max_follows_min(cls, value: Any) -> Any:
        if isinstance(value, dict) and "min" in value and "max" not in value and isinstance(value["min"], int):
            return {**value, "max": max(1, value["min"])}
        return value


class ResourcesSpec(_Model):
    """What one worker takes: a share of a GPU's `compute` and of its `memory`; `cpus` and `host_memory` of its host.

    None is left to `coordinator.units`, which presumes a whole GPU, or one processor.
    """

    compute: Annotated[float, Field(gt=0, le=1)] | None = None
    memory: Annotated[Bytes, Field(ge=0, le=2**50)] | None = None
    cpus: Annotated[float, Field(ge=0, le=4096)] | None = None
    host_memory: Annotated[Bytes, Field(ge=0, le=2**50)] | None = None


class HostsSpec(_Model):
    """Where workers may run: on hosts with all these `labels`, and not beside those of the stages in `apart`, of the
    same version. True means the stage itself: each replica on a host of its own."""

    labels: Annotated[list[Label], Field(max_length=32), BeforeValidator(_one_or_many)] = []
    # Any, because a union would report each problem once per member.
    apart: Annotated[Any, BeforeValidator(_apart)] = []


class RetrySpec(_Model):
    """`attempts` in all; waits between them are drawn from 0 to base * 2**n seconds, at most the cap."""

    attempts: Annotated[int, Field(ge=1, le=100)] = 3
    backoff_s: Annotated[list[Annotated[float, Field(ge=0, le=86_400)]], Field(min_length=2, max_length=2)] = [
        0.5,
        30.0,
    ]


Delay = Annotated[float, Field(gt=0, le=86_400_000)]


class DelaySpec(_Model):
    """Milliseconds that a job of each priority should at most wait at the stage; None says nothing of it."""

    high: Delay | None = None
    medium: Delay | None = None
    low: Delay | None = None


class ScaleSpec(_Model):
    """What the number of workers, within `replicas`, is chosen for."""

    delay_ms: DelaySpec = DelaySpec()


class QueueSpec(_Model):
    """High-water marks of what is ready at a stage: above them its predecessors and producers wait."""

    max_rows: Annotated[int, Field(ge=1, le=2**31)] = 100_000
    max_bytes: Annotated[Bytes, Field(ge=1)] = 1 << 30


class TorchSpec(_Model):
    """How a TorchStage's model is prepared. `compile` and `cuda_graphs` pad the rows of a batch to few sizes."""

    dtype: Literal["float16", "bfloat16", "float32", "float64"] | None = None
    channels_last: bool = False
    compile: bool = False
    cuda_graphs: bool = False


class WireSpec(_Model):
    """How columns travel to the next stages; those of the result are left as they are."""

    dtype: Literal["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"] | None = None
    compress: Literal["lz4", "zstd"] | None = None


def _combine(value: Any) -> Any:
    if value == "sum":
        return value
    dim = value["concat"] if isinstance(value, dict) and list(value) == ["concat"] else None
    if isinstance(dim, int) and not isinstance(dim, bool):
        return value
    raise ValueError(f"write sum or {{concat: DIMENSION}}; {value!r:.80} came")


def _plan(value: Any) -> Any:
    texts = isinstance(value, dict) and value and all(isinstance(x, str) for pair in value.items() for x in pair)
    if value is None or isinstance(value, str) or texts:
        check_plan(value)
        return value
    raise ValueError(f"write the name of a plan, or {{PATTERN: STYLE}}; {value!r:.80} came")


class ShardsSpec(_Model):
    """How a stage's model is cut into `count` parts.

    `gather`: each shard gets the same input, and their outputs are combined: a column is concatenated along the last
    dimension of a row's value, or as `combine` says. `tensor`: one group of processes computes together; `plan` names
    which modules are cut how, None is found by the model's class. `pipeline`: parts of the model one behind the other,
    of equal measured time or of equal memory, as `balance` says.
    """

    count: Annotated[int, Field(ge=2, le=MAX_SHARDS)]
    mode: Literal["gather", "tensor", "pipeline"]
    # Any, because a union would report each problem once per member.
    combine: dict[Column, Annotated[Any, AfterValidator(_combine)]] = {}
    plan: Annotated[Any, AfterValidator(_plan)] = None
    balance: Literal["time", "memory"] = "time"


class CollapseSpec(_Model):
    """Undoes the expansion of the named stage."""

    collapse: Annotated[str, Field(max_length=400)]


class LimitsSpec(_Model):
    """What one job may grow to."""

    rows_per_job: Annotated[int, Field(ge=1, le=100_000_000)] = 1_000_000


class StageConfig(_Model):
    """One stage of a pipeline, as its file describes it. Only a collapse may go without `use`: it then regroups."""

    name: Name
    use: Annotated[str | None, Field(min_length=3, max_length=400)] = None
    after: Annotated[list[str] | None, BeforeValidator(_one_or_many)] = None
    inputs: (
        Annotated[
            Annotated[list[Column], Tag("list")] | Annotated[dict[Column, Source], Tag("mapping")], Discriminator(_form)
        ]
        | None
    ) = None
    outputs: dict[Column, TypeText] = {}
    rows: Annotated[
        Annotated[Literal["same", "expand"], Tag("word")] | Annotated[CollapseSpec, Tag("collapse")],
        Discriminator(_rows_form),
        BeforeValidator(_rows),
    ] = "same"
    when: Source | None = None
    device: Literal["cpu", "gpu"] = "cpu"
    args: dict[str, Any] = {}
    weights: Annotated[str | None, Field(min_length=1, max_length=400)] = None
    torch: TorchSpec = TorchSpec()
    batch: BatchSpec = BatchSpec()
    replicas: Annotated[ReplicasSpec, BeforeValidator(_count)] = ReplicasSpec()
    resources: ResourcesSpec = ResourcesSpec()
    hosts: Annotated[HostsSpec, BeforeValidator(_labels)] = HostsSpec()
    retry: RetrySpec = RetrySpec()
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    queue: QueueSpec = QueueSpec()
    scale: ScaleSpec = ScaleSpec()
    wire: WireSpec = WireSpec()
    handoff: Literal["host", "device"] = "host"
    shards: ShardsSpec | None = None

    @model_validator(mode="before")
    @classmethod
    def _regroups_much(cls, value: Any) -> Any:
        # No code runs, so a batch need not fit a device.
        if isinstance(value, dict) and value.get("use") is None and "batch" not in value:
            return {**value, "batch": {"max_rows": 4096}}
        return value

    @property
    def apart(self) -> frozenset[str]:
        """Stages that its workers share no host with; itself, where its replicas share none."""
        apart = self.hosts.apart
        return frozenset([self.name] if apart is True else apart or [])

    @property
    def collapses(self) -> str | None:
        """The stage whose expansion it undoes."""
        return self.rows.collapse if isinstance(self.rows, CollapseSpec) else None


def _few(stages: list[StageConfig]) -> list[StageConfig]:
    if not 1 <= len(stages) <= MAX_STAGES:
        raise ValueError(f"a pipeline has 1 to {MAX_STAGES} stages, not {len(stages)}")
    return stages


class PipelineSpec(_Model):
    """A pipeline file. `input` declares the columns of a row; without it, anything is taken as it comes. Each list of
    `fuse` names consecutive stages that one worker runs."""

    pipeline: Name
    input: dict[Column, TypeText] = {}
    output: Annotated[list[Column], Field(min_length=1)] | None = None
    limits: LimitsSpec = LimitsSpec()
    stages: Annotated[list[StageConfig], AfterValidator(_few)]
    fuse: list[list[str]] = []
