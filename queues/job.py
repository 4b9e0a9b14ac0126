"""What a job looks like in Redis: its record, its payload, refs, terminal records, each with `encode` and `decode`.

A payload is a table: column name -> the column's bytes (made by `codec.encode`), or a Ref to them. Columns that a stage
neither reads nor returns ride along as they came, undecoded. Where stages fork or change the number of rows, the
payload also says where its columns come from (`origins`), and hidden columns hold what `levels` lines them up by.
Layouts of records are shared with `lua/lib.lua`. No I/O here.
"""

from __future__ import annotations

import re
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import msgpack

from torchrelay.errors import DecodeError, InputError
from torchrelay.queues.codec import Message, join

HEAD = struct.Struct("<ddIIIIHBBBBBBH")
FORK = struct.Struct("<BBBBII")
TERMINAL = struct.Struct("<BBBBBIIIH")
SUBMIT_HEAD = struct.Struct("<dddIIIBH")
REPLY_HEAD = struct.Struct("<BI")

FLAG_KEYED, FLAG_HISTORY, FLAG_SUBSCRIBED, FLAG_CHECKPOINT, FLAG_UNTIL_ACK, FLAG_HIGH = 1, 2, 4, 8, 16, 32
FLAG_TABLE, FLAG_KEEP = 64, 128
INLINE_MAX_BYTES = 4096
# A result is written and sent once, and read by the client alone: as a blob it would cost two round trips more.
INLINE_RESULT_MAX_BYTES = 16384
CHUNK_BYTES = 1 << 20
MAX_ROWS = 2**31 - 1

_REF_CODE = 2
# A packer never gives its buffer back; one that grew past this is dropped.
_KEEP_PACKER_BYTES = 1 << 20
_SEPARATORS = re.compile("[:,;]")
_BLOB = re.compile(r"[0-9A-Za-z~]+\.\d{1,3}\.[^.]+\..+", re.DOTALL)
_MAKER = re.compile(r"[0-9A-Za-z~]+\.([0-9]+)\.")
_ENTRY = re.compile(rb"([0-9A-Za-z~]+)([\x80-\xff])")


M = TypeVar("M", bound=Message)


def host_text(host: int) -> str:
    """How reports and job records write a host's id."""
    return f"{host:016x}"


class Place(NamedTuple):
    """A block of shared memory: in which arena of which host, and the generation in which it holds what is meant."""

    host: int
    arena: str
    segment: int
    slot: int
    generation: int
    offset: int


@dataclass(frozen=True, slots=True)
class Ref:
    """Where a column's `nbytes` bytes lie, as `codec` encoded them: in Redis as a blob of `chunks` chunks (0 where it
    does not hold them), in a block of shared memory at `place`, or in both."""

    name: str
    chunks: int
    nbytes: int
    place: Place | None = None

    def __hash__(self) -> int:
        return hash(self.name)  # no two are of one name, and the other fields take longer

    @classmethod
    def of(cls, name: str, nbytes: int, place: Place | None = None, *, in_redis: bool = True) -> Ref:
        """The ref of so many bytes; in Redis they lie in chunks of CHUNK_BYTES."""
        return cls(name, _chunks_of(nbytes) if in_redis else 0, nbytes, place)

    @property
    def column(self) -> str:
        """The column, of a ref whose name is that of a job's blob."""
        return self.name.split(".", 3)[3]

    @property
    def maker(self) -> int | None:
        """Number of the node that made these bytes, as the name says: 0 for the client, None for a name of no job."""
        found = _MAKER.match(self.name)
        return int(found[1]) if found else None

    @property
    def of_input(self) -> bool:
        """Whether these are bytes that the client sent, which no restart brings back."""
        return self.maker == 0

    @property
    def as_copied(self) -> Ref:
        """The ref of the copy in Redis, which there is once it was spilled: payloads are not told of it."""
        return self if self.chunks else Ref(self.name, _chunks_of(self.nbytes), self.nbytes)

    def text(self, consumers: int) -> str:
        """The ref as job records list it; `consumers` is a mask of nodes, 0 for a column of the result. What lies in
        the memory of one host alone says of which.

        Raises InputError for a name that the list cannot hold.
        """
        if _SEPARATORS.search(self.name):
            raise InputError(
                f"column of {self.name[:100]!r} is too large to travel inline, and its name has one of : , ;"
            )
        at = f":{host_text(self.place.host)}" if self.place is not None and not self.chunks else ""
        return f"{self.name}:{self.chunks}:{self.nbytes}:{consumers}{at},"


Packed = bytes | Ref


def _chunks_of(nbytes: int) -> int:
    return max(1, -(-nbytes // CHUNK_BYTES))


_IN_REDIS: list[type] = [str, int, int]
_IN_ARENA: list[type] = [*_IN_REDIS, int, str, int, int, int, int]


def _default(value: object) -> msgpack.ExtType:
    if isinstance(value, Ref):
        return msgpack.ExtType(
            _REF_CODE, _local.refs.pack((value.name, value.chunks, value.nbytes, *(value.place or ())))
        )
    raise TypeError(f"{type(value).__name__} has no place in a payload")


class _Local(threading.local):
    """Each thread has packers of its own: a new one for each payload would take a buffer of 256 KiB from the system."""

    def __init__(self) -> None:
        self.payloads = msgpack.Packer(default=_default)
        self.refs = msgpack.Packer()


_local = _Local()


def _ext_hook(code: int, data: bytes) -> Ref:
    if code != _REF_CODE:
        raise DecodeError(f"payload holds the unknown extension {code}", length=len(data))
    parts = msgpack.unpackb(data)
    types = list(map(type, parts)) if isinstance(parts, list) else []
    sound = in_arena = types == _IN_ARENA
    if in_arena:
        sound = _BLOB.fullmatch(parts[0]) is not None and min(parts[1], parts[2], parts[3], *parts[5:]) >= 0
    elif types == _IN_REDIS:
        sound = parts[1] > 0 and parts[2] >= 0
    # As many chunks as the bytes take: whoever reads them asks for each.
    if not sound or parts[2] >= 1 << 32 or parts[1] not in (0, _chunks_of(parts[2])):
        raise DecodeError("payload holds a malformed ref", length=len(data))
    return Ref(parts[0], parts[1], parts[2], Place(*parts[3:]) if in_arena else None)


# Column -> (rank of the node that made it, *the stack of expanding nodes it was made at). Under AT, in a result, the
# stack that the result's rows stand at.
Origins = dict[str, tuple[int, ...]]
FROM_INPUT = (0,)
# What starts with these is no column of the user's: counts of an expanding node, and rows that a node rejected.
COUNTS, REJECTED, AT = "#", "!", "@"


def shared_length(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many leading elements two tuples have in common."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def is_hidden(name: str) -> bool:
    """Whether this column of a payload is one of ours; users' columns are named like variables."""
    return name[0] in "#!"


class Payload(NamedTuple):
    """A decoded payload; `meta` is still packed. A column without an origin is the input's."""

    columns: dict[str, Packed]
    meta: bytes = b""
    origins: Origins = {}  # noqa: RUF012  # never changed


def encode_payload(columns: Mapping[str, Packed], meta: bytes = b"", origins: Origins | None = None) -> bytes:
    """Columns and the job's packed `meta` as one payload; `origins` where the pipeline's graph is not plain."""
    parts = (columns, meta) if origins is None else (columns, meta, origins)
    packed: bytes = _local.payloads.pack(parts)
    if len(packed) > _KEEP_PACKER_BYTES:
        _local.payloads = msgpack.Packer(default=_default)
    return packed


def split_inline(columns: Mapping[str, M], most: int = INLINE_MAX_BYTES) -> tuple[dict[str, bytes], dict[str, M]]:
    """(inline, out of band): the largest columns leave until the rest is at most `most` bytes."""
    total = sum(map(len, columns.values()))
    if total <= most:
        return {name: m if isinstance(m, bytes) else join(m) for name, m in columns.items()}, {}
    inline, large = dict(columns), dict[str, M]()
    for name in sorted(columns, key=lambda n: len(columns[n]), reverse=True):
        if total <= most:
            break
        large[name] = inline.pop(name)
        total -= len(large[name])
    return {name: join(message) for name, message in inline.items()}, large


def _checked(value: object, length: int) -> Payload:
    if not (isinstance(value, list) and 2 <= len(value) <= 3 and isinstance(value[0], dict)):
        raise DecodeError("payload is not [columns, meta, origins]", length=length)
    columns = value[0]
    for name, column in columns.items():
        if type(name) is not str or not name or (type(column) is not bytes and type(column) is not Ref):
            raise DecodeError("payload has a column that is neither bytes nor a ref", length=length)
    if type(value[1]) is not bytes:
        raise DecodeError("payload's meta is not bytes", length=length)
    return Payload(columns, value[1]) if len(value) == 2 else Payload(columns, value[1], _origins(value[2], length))


def _origins(value: object, length: int) -> Origins:
    if isinstance(value, dict) and all(type(n) is str and _is_origin(o) for n, o in value.items()):
        return {name: tuple(origin) for name, origin in value.items()}
    raise DecodeError("payload has malformed origins", length=length)


def _is_origin(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(n) is int and 0 <= n <= 255 for n in value)


def decode_payload(data: bytes) -> Payload:
    """One payload; raises DecodeError."""
    try:
        value = msgpack.unpackb(data, ext_hook=_ext_hook)
    except DecodeError:
        raise
    except Exception as error:
        raise DecodeError(f"payload does not decode: {error}", length=len(data)) from error
    return _checked(value, len(data))


def decode_payloads(data: bytes) -> Payload:
    """Several payloads, one behind the other (a result of several terminal stages), as one."""
    try:
        return _checked(msgpack.unpackb(data, ext_hook=_ext_hook), len(data))
    except msgpack.ExtraData:
        pass  # more than one, taken apart below
    except DecodeError:
        raise
    except Exception as error:
        raise DecodeError(f"result does not decode: {error}", length=len(data)) from error
    parts: list[Payload] = []
    unpacker = msgpack.Unpacker(ext_hook=_ext_hook, max_buffer_size=max(len(data), 1))
    unpacker.feed(data)
    try:
        parts = [_checked(value, len(data)) for value in unpacker]
    except DecodeError:
        raise
    except Exception as error:
        raise DecodeError(f"result does not decode: {error}", length=len(data), offset=unpacker.tell()) from error
    if unpacker.tell() != len(data):
        raise DecodeError("result is cut off", length=len(data), offset=unpacker.tell())
    return join_payloads(parts)


def join_payloads(parts: Sequence[Payload]) -> Payload:
    """Payloads of branches as one: of a column that several carry, the one that was made last."""
    if len(parts) == 1:
        return parts[0]
    columns: dict[str, Packed] = {}
    origins: Origins = {}
    stacks = [part.origins[AT] for part in parts if AT in part.origins]
    if stacks:
        origins[AT] = min(stacks, key=len)[: min(shared_length(stacks[0], s) for s in stacks)]
    for part in parts:
        for name, packed in part.columns.items():
            origin = part.origins.get(name, FROM_INPUT)
            if name not in columns or origin[0] > origins[name][0]:
                columns[name], origins[name] = packed, origin
    return Payload(columns, parts[0].meta, origins)


class Entry(NamedTuple):
    """One granted job: what the worker needs to compute and commit it. `packed` is the grant's own token for it."""

    packed: bytes
    rank: float
    deadline_ms: float
    rows: int
    attempts: int
    strikes: int
    suspect: bool
    keep: bool
    payloads: tuple[bytes, ...]

    @property
    def job_id(self) -> str:
        return self.packed[:-1].decode()

    @property
    def restarted(self) -> bool:
        """Whether it was restarted since bytes of it were lost: its generation is not the first."""
        return self.packed[-1] > 128


def split_entries(packed: bytes) -> list[bytes]:
    """The tokens (id and generation) of a grant, in order."""
    return [m[0] for m in _ENTRY.finditer(packed)]


def decode_records(tokens: list[bytes], records: list[Any]) -> Iterator[Entry]:
    """Entries of a claim's answer: plain records of a linear pipeline, lists of a forking one."""
    size, unpack = HEAD.size, HEAD.unpack_from
    for token, record in zip(tokens, records, strict=True):
        main = record if type(record) is bytes else record[0]
        try:
            rank, deadline, rows, _, _, _, _, attempts, strikes, _, _, flags, suspect, reflen = unpack(main)
            payloads: tuple[bytes, ...]
            if type(record) is bytes:
                payloads = (main[size + reflen :],)
            else:
                attempts, strikes, _, suspect, rows, _ = FORK.unpack_from(record[1])
                payloads = tuple(main[size + reflen :] if not p else p[FORK.size :] for p in record[2:])
        except struct.error as error:
            raise DecodeError("job record is cut off", length=len(main)) from error
        keep = flags & FLAG_KEEP > 0
        yield Entry(token, rank, deadline, rows, attempts, strikes, bool(suspect & 1), keep, payloads)


def split_refs(refs: str) -> list[str]:
    """The names in a refs text."""
    return [ref.partition(":")[0] for ref in refs.split(",") if ref]


def refs_of(record: bytes) -> str:
    """The refs text of a job record."""
    reflen: int = HEAD.unpack_from(record)[-1]
    return record[HEAD.size : HEAD.size + reflen].decode()


_STATUS = {ord("k"): "done", ord("f"): "failed", ord("c"): "cancelled", ord("d"): "expired"}


class Terminal(NamedTuple):
    """How a job ended: `status` is done, failed, cancelled or expired; `payload` a result or an error."""

    status: str
    attempts: int
    generation: int
    node: int
    rows: int
    until_ack: bool
    has_refs: bool
    table: bool
    keep: bool
    payload: bytes

    @classmethod
    def decode(cls, record: bytes) -> Terminal:
        try:
            status, flags, attempts, generation, node, rows, _, _, reflen = TERMINAL.unpack_from(record)
            start = TERMINAL.size + (16 if flags & FLAG_KEYED else 0) + reflen
            until_ack = bool(flags & FLAG_UNTIL_ACK) and not flags & FLAG_KEYED
            shape = (bool(flags & FLAG_TABLE), bool(flags & FLAG_KEEP))
            return cls(_STATUS[status], attempts, generation, node, rows, until_ack, reflen > 0, *shape, record[start:])
        except (struct.error, KeyError) as error:
            raise DecodeError("terminal record does not decode", length=len(record)) from error


def split_reply(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(job id, terminal record) of each job in one element of a reply list."""
    at, end = 0, len(data)
    while at < end:
        try:
            id_length, length = REPLY_HEAD.unpack_from(data, at)
        except struct.error as error:
            raise DecodeError("reply is cut off", length=end, offset=at) from error
        at += REPLY_HEAD.size
        if at + id_length + length > end:
            raise DecodeError("reply is cut off", length=end, offset=at)
        yield data[at : at + id_length].decode("ascii"), data[at + id_length : at + id_length + length]
        at += id_length + length


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a stage could not do a job, as text that every client can read."""

    stage: str
    error_type: str
    message: str
    traceback: str = ""
    worker: str = ""

    def encode(self) -> bytes:
        texts = (self.stage, self.error_type, self.message[:4000], self.traceback[-12000:], self.worker)
        packed: bytes = msgpack.packb([t.encode("utf-8", "replace").decode() for t in texts])
        return packed

    @classmethod
    def decode(cls, data: bytes) -> Failure:
        try:
            return cls(*[str(v) for v in msgpack.unpackb(data)])
        except Exception as error:
            raise DecodeError("failure does not decode", length=len(data)) from error

    @classmethod
    def decode_all(cls, data: bytes) -> list[Failure]:
        """A dead letter's history, oldest first."""
        unpacker = msgpack.Unpacker(max_buffer_size=max(len(data), 1))
        unpacker.feed(data)
        try:
            return [cls(*[str(v) for v in parts]) for parts in unpacker]
        except Exception as error:
            raise DecodeError("history does not decode", length=len(data)) from error
