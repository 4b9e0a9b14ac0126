"""A stage that a group of processes computes together (`shards: {mode: tensor}`): rank 0 has the batches.

For each, rank 0 tells the others over its line what the batch is, hands its tensors over in the process group, and all
run the stage. Then every rank reports. Promise: rank 0 returns outputs only when all ranks computed theirs; whatever
went wrong on one rank alone ends the group, because its collectives may not match any more.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from torchrelay.config.ragged import RaggedRows
from torchrelay.errors import WorkerError
from torchrelay.stages.batch import Batch
from torchrelay.stages.faults import is_device_lost, is_out_of_memory
from torchrelay.stages.group_line import Line, LineClosed
from torchrelay.stages.outputs import Expand
from torchrelay.stages.padding import Padded
from torchrelay.stages.stage import Stage

__all__ = ["Codec", "GroupStage", "RankFailed", "RankOutOfMemory", "Report", "follow"]

# A rank that raised alone: so long the others may take to report before they are taken to hang in a collective.
_PATIENCE_S = 2.0
_ABORT = "abort"
# Each broadcast costs about as much as copying so much.
_SMALL_BYTES = 64 << 10


class RankFailed(WorkerError):
    """One rank of a group raised, and others did not."""


class RankOutOfMemory(RankFailed, RuntimeError):
    """One rank of a group ran out of memory."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a rank says of a batch: what it raised, '' for nothing."""

    kind: str = ""
    text: str = ""
    trace: str = ""
    room: bool = False
    lost: bool = False

    @classmethod
    def of(cls, error: BaseException | None) -> Report:
        if error is None:
            return cls()
        try:
            text = str(error)
        except Exception:  # a stranger's __str__ may raise anything
            text = ""
        trace = "".join(traceback.format_exception(error))[-8000:]
        told = _plain(type(error).__name__), _plain(text[:2000]), _plain(trace)
        return cls(*told, is_out_of_memory(error), is_device_lost(error))


def _plain(text: str) -> str:
    """Halves of characters, as in names of files that are no UTF-8, cannot be sent."""
    return text.encode("utf-8", "replace").decode()


@dataclass(slots=True)
class Codec:
    """How headers and columns become bytes and back; never by pickle."""

    encode: Callable[[Any], bytes]
    decode: Callable[[Any], Any]


class GroupStage(Stage):
    """Rank 0's stage. Loaded already: `inner` is the stage itself, `lines` reach the other ranks.

    `on_broken(rank, report, rows, at_once)` is called when the group cannot go on because of that rank. With `at_once`
    it is to end the process: a rank hangs, or there are several rows, of which nobody can tell whose fault it was.
    """

    def __init__(
        self, inner: Any, lines: Sequence[Line], codec: Codec, on_broken: Callable[[int, Report, int, bool], object]
    ) -> None:
        self.inner = inner
        self._takes_tensors = bool(inner._takes_tensors)
        self._lines = lines
        self._codec = codec
        self._on_broken = on_broken
        self._changed = threading.Condition()
        self._round = _Round(0, 0)
        self._fault: BaseException | None = None
        self._closed = False

    @property
    def share(self) -> bool:
        return bool(getattr(self.inner, "share", False))

    def begin(self) -> None:
        """From here on reports are heard."""
        for line in self._lines:
            threading.Thread(target=self._hear, args=(line,), name=f"torchrelay-rank-{line.rank}", daemon=True).start()

    def tensors(self, batch: Batch, device: str) -> Batch:
        return self.inner.tensors(batch, device)  # type: ignore[no-any-return]  # a TorchStage's

    def forward(self, batch: Batch) -> Mapping[str, Any] | Expand:
        return self.infer(batch)

    def infer(self, batch: Batch) -> Mapping[str, Any] | Expand:
        """What `inner` makes of it on this rank. Raises what all ranks raised alike, RankFailed for one alone."""
        if self._fault is not None:
            raise self._fault
        if batch.ended is not None:
            # All ranks must see the same, or they part ways.
            ended = list(batch.ended())
            batch = replace(batch, ended=lambda: ended)
        with self._changed:
            self._round = mine = _Round(self._round.number + 1, len(batch), gone=self._round.gone)
        outputs, error = None, None
        try:
            self._tell(mine.number, batch)
            outputs = _call(self.inner, batch)
        except (Exception, SystemExit) as raised:
            error = raised
        self._add(mine, 0, Report.of(error), error)
        self._settle(mine, error)
        assert outputs is not None  # nothing was raised
        return outputs  # type: ignore[no-any-return]  # the stage's own

    def _settle(self, mine: _Round, error: BaseException | None) -> None:
        """Waits for all ranks. What one of them raised alone, the hearing threads notice even while this one hangs."""
        size = len(self._lines) + 1
        with self._changed:
            self._changed.wait_for(
                lambda: len(mine.reports) == size or mine.gone, _PATIENCE_S if error is not None else None
            )
            reports, gone = dict(mine.reports), mine.gone
        whole = len(reports) == size
        failed = {rank: report for rank, report in reports.items() if report.kind}
        if mine.aborted:
            failed.pop(0, None)  # what came of the other rank's fault
        # Of a rank that is gone: what others raised may be no more than that their collective lost it.
        if gone not in reports or (not failed and (gone or not whole)):
            self._break(gone, Report("LineClosed", f"rank {gone} is gone"), mine, stuck=True)
        if not failed:
            return
        kinds = {(report.kind, report.room) for report in reports.values()}
        if (
            error is not None
            and whole
            and len(kinds) == 1
            and not mine.aborted
            and not any(report.lost for report in failed.values())
        ):
            raise error
        rank = next((r for r in sorted(failed) if failed[r].lost), min(failed))
        self._break(rank, failed[rank], mine, stuck=False, error=error)

    def _break(
        self, rank: int, report: Report, mine: _Round, *, stuck: bool, error: BaseException | None = None
    ) -> NoReturn:
        kind = RankOutOfMemory if report.room else RankFailed
        # It reads as torch's own, so that it is told from other faults as anywhere else.
        said = f"CUDA out of memory on rank {rank}" if report.room else f"rank {rank} alone raised {report.kind}"
        where = f"\n{report.trace}" if report.trace and rank else ""
        self._fault = kind(f"{said} of its group: {report.text}{where}")
        self._on_broken(rank, report, mine.rows, stuck or mine.rows > 1)
        raise self._fault from error

    def _add(self, mine: _Round, rank: int, report: Report, error: BaseException | None = None) -> None:
        with self._changed:
            mine.reports[rank] = report
            self._changed.notify_all()
        if report.kind:
            self._later(mine, rank, report)

    def _look_after(self, mine: _Round, rank: int, report: Report) -> None:
        """Some time after a rank raised: are others still in a collective that it will never join?"""
        with self._changed:
            over = len(mine.reports) == len(self._lines) + 1 or self._round is not mine
        if over or self._fault is not None:
            return
        if mine.rows == 1 and rank and not mine.aborted:
            # Its one row is at fault. Where a collective ends with its peer, this rank is free to say so.
            mine.aborted = True
            self._lines[rank - 1].send(self._codec.encode(_ABORT))
            self._later(mine, rank, report)
            return
        self._on_broken(rank, report, mine.rows, True)

    def _later(self, mine: _Round, rank: int, report: Report) -> None:
        waits = threading.Timer(_PATIENCE_S, self._look_after, (mine, rank, report))
        waits.daemon = True
        waits.start()

    def _hear(self, line: Line) -> None:
        try:
            while True:
                number, *report = self._codec.decode(line.receive())
                mine = self._round
                if number == mine.number:
                    self._add(mine, line.rank, Report(*report))
        except LineClosed as error:
            with self._changed:
                self._round.gone = self._round.gone or line.rank
                self._changed.notify_all()
            if not self._closed:
                self._on_broken(line.rank, Report("LineClosed", str(error)), self._round.rows, True)

    def _tell(self, number: int, batch: Batch) -> None:
        tensors: list[Any] = []
        head = {
            "number": number,
            "rows": list(batch.job_rows),
            "meta": [dict(meta) for meta in batch.job_meta],
            "ended": None if batch.ended is None else list(batch.ended()),
            "columns": {name: _packed(column, tensors) for name, column in batch.columns.items()},
            "padded": {name: [_packed(p.lengths, tensors), list(p.axes)] for name, p in (batch.padded or {}).items()},
            "fresh": sorted(batch.fresh),
        }
        message = self._codec.encode(head)
        for line in self._lines:
            try:
                line.send(message)
            except LineClosed:
                with self._changed:
                    self._round.gone = self._round.gone or line.rank
                raise
        _broadcast(tensors)

    def close(self) -> None:
        """The other ranks end, too."""
        if not self._closed:
            self._closed = True
            for line in self._lines:
                try:
                    line.send(self._codec.encode(None))
                except LineClosed:
                    continue
        self.inner.close()


@dataclass(slots=True, eq=False)
class _Round:
    """One batch: its number and size, what ranks reported of it, and the first rank that is gone, 0 for none."""

    number: int
    rows: int
    reports: dict[int, Report] = field(default_factory=dict)
    gone: int = 0
    aborted: bool = False


def follow(inner: Any, line: Line, codec: Codec, device: str, progress: Callable[[bool, int], object]) -> None:
    """Computes what rank 0 announces until it says that no more comes. `progress(running, rows)` is called around each
    forward. Raises LineClosed when rank 0 is gone."""
    while (head := codec.decode(line.receive())) is not None:
        if head == _ABORT:
            _leave_process_group()
            continue
        progress(True, 0)
        error: BaseException | None = None
        rows = sum(head["rows"])
        try:
            batch = _batch(inner, head, device)
            _call(inner, batch)
        except (Exception, SystemExit) as raised:
            error = raised
        report = Report.of(error)
        error = None
        progress(False, rows)
        message = [head["number"], report.kind, report.text, report.trace, report.room, report.lost]
        line.send(codec.encode(message))


def _leave_process_group() -> None:
    """Others that wait for this rank in a gloo collective are told that it is gone."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _call(inner: Any, batch: Batch) -> Any:
    return inner.infer(batch) if inner._takes_tensors else inner.forward(batch)


def _packed(column: Any, tensors: list[Any]) -> Any:
    """A column as the header holds it: values as they are, of a tensor its form, with its bytes to come behind."""
    if _is_tensor(column):
        tensors.append(column)
        return ["tensor", str(column.dtype).removeprefix("torch."), list(column.shape)]
    # Rows of many lengths that are not padded, or of which some are null.
    if isinstance(column, list) and any(map(_holds_tensors, column)):
        return ["rows", [_packed(value, tensors) for value in column]]
    return ["values", list(column) if isinstance(column, RaggedRows) else column]


def _holds_tensors(value: Any) -> bool:
    return _is_tensor(value) or (isinstance(value, list) and any(map(_holds_tensors, value)))


def _batch(inner: Any, head: Mapping[str, Any], device: str) -> Batch:
    """The batch that rank 0 announced, on this rank's device."""
    tensors: list[Any] = []
    columns = {name: _unpacked(value, tensors, device) for name, value in head["columns"].items()}
    padded = {
        name: Padded(_unpacked(value, tensors, device), tuple(axes)) for name, (value, axes) in head["padded"].items()
    }
    _broadcast(tensors)
    ended = head["ended"]
    batch = Batch(
        columns,
        tuple(head["rows"]),
        tuple(head["meta"]),
        padded,
        frozenset(head["fresh"]),
        ended=None if ended is None else lambda: ended,
    )
    if not inner._takes_tensors:
        return batch
    import torch

    return replace(batch, arange=lambda n: torch.arange(n, device=device))


def _unpacked(value: Sequence[Any], tensors: list[Any], device: str) -> Any:
    if value[0] == "values":
        return value[1]
    if value[0] == "rows":
        return [_unpacked(row, tensors, device) for row in value[1]]
    import torch

    with torch.inference_mode():
        tensors.append(torch.empty(value[2], dtype=getattr(torch, value[1]), device=device))
    return tensors[-1]


def _broadcast(tensors: Sequence[Any]) -> None:
    """From rank 0 to all, as bytes: of every dtype, whatever a backend knows. Small ones go together."""
    if not tensors:
        return
    import torch
    import torch.distributed as dist

    with torch.inference_mode():
        found = [_bytes(tensor) for tensor in tensors if tensor.numel()]
        small = [part for part in found if len(part) <= _SMALL_BYTES]
        if len(small) < 2:
            small = []
        for part in found:
            if not small or len(part) > _SMALL_BYTES:
                dist.broadcast(part, 0)
        if small:
            together: Any = torch.cat(small)
            dist.broadcast(together, 0)
            if dist.get_rank():
                for part, came in zip(small, together.split(list(map(len, small))), strict=True):
                    part.copy_(came)


def _bytes(tensor: Any) -> Any:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _is_tensor(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "numel")
