"""Makes a row or a table of a terminal record: fetches the columns that lie in Redis, decodes, lines up. Blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import redis

from torchrelay.errors import BytesLost, ResultExpired
from torchrelay.producer.lookups import reached
from torchrelay.queues import codec
from torchrelay.queues.blobs import read_blobs
from torchrelay.queues.job import Ref, Terminal, decode_payloads
from torchrelay.queues.levels import RowFailure, result_row, result_table
from torchrelay.queues.transitions import Transitions

ONE_ROW = np.zeros(1, np.int64)
ONE_ROW.flags.writeable = False


class Decoded(NamedTuple):
    """A result: the row or table, and for a table which submitted row each row came from, and the rows that failed."""

    value: Any
    source_rows: np.ndarray[Any, np.dtype[np.int64]] = ONE_ROW
    failures: tuple[RowFailure, ...] = ()


def read_result(client: redis.Redis, lane: Transitions, job_id: str, terminal: Terminal) -> Decoded:
    """The result of a job that is done. Raises ResultExpired when columns of it are gone."""
    payload = decode_payloads(terminal.payload)
    refs = {name: packed for name, packed in payload.columns.items() if isinstance(packed, Ref)}
    fetched: dict[str, bytes] = {}
    if refs:
        try:
            with reached():
                fetched = dict(zip(refs, read_blobs(client, lane, list(refs.values())), strict=True))
        except BytesLost as error:
            raise ResultExpired(f"its result is not kept any more: {error}", job_id=job_id) from error
    values: dict[str, Any] = {
        name: codec.decode(fetched[name] if isinstance(packed, Ref) else packed)
        for name, packed in payload.columns.items()
    }
    if not terminal.table:
        return Decoded(result_row(values, payload.origins))
    table = result_table(values, payload.origins)
    return Decoded(table.columns, table.source_rows, tuple(table.failures))
