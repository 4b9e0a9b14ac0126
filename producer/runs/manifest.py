"""What defines a run's results, as its output folder keeps it, and whether a run that goes on is still the same.

`_run/manifest.json` holds all but the list of sources, which can be long and lies beside it under the name of its
digest. It is replaced as a whole, after the list that it names. Pure but for `read_manifest` and `write_manifest`.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Final

from torchrelay.config.runs import ChunkSize, ReadOptions, Source, WriteOptions
from torchrelay.errors import DecodeError, RunConflict, TorchrelayError
from torchrelay.producer.runs.kept_types import kept_differences
from torchrelay.stages.writing.stores import HIDDEN, Store

__all__ = [
    "Manifest",
    "RunPlan",
    "new_run_id",
    "read_manifest",
    "remove_old_lists",
    "resumed",
    "started",
    "write_manifest",
]

MANIFEST: Final = f"{HIDDEN}/manifest.json"
_SCHEMA = 1
_SHOWN = 5


@dataclass(frozen=True)
class RunPlan:
    """What the user asks for. `size` is tuning: a run that goes on keeps the size that it began with."""

    pipeline: str
    version: str
    input: str
    """As the user wrote it; for people."""
    sources: Sequence[Source]
    read: ReadOptions
    write: WriteOptions
    size: ChunkSize = field(default_factory=ChunkSize)
    limit: int | None = None


@dataclass(frozen=True)
class Manifest:
    """A run as its folder knows it.

    `batches` says how many sources each start of the run added: the first as many as there were, each later one those
    that had been added to the input. A batch is planned by itself, so that no chunk of an earlier one ever changes.
    """

    run: str
    created: str
    plan: RunPlan
    batches: tuple[int, ...]
    earlier: tuple[tuple[str, str], ...] = ()
    """(version of the pipeline, when the run went on with another one) for each that parts may be of beside the plan's,
    where that was accepted."""

    def source_batches(self) -> list[list[Source]]:
        """The sources of each batch, numbered through."""
        out, at = [], 0
        for size in self.batches:
            out.append(list(self.plan.sources[at : at + size]))
            at += size
        return out

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the whole input."""
        return _digest(self.plan.sources)

    @property
    def sources_name(self) -> str:
        """The file that lists the sources."""
        return f"{HIDDEN}/sources-{self.fingerprint}.jsonl"


def new_run_id(now: datetime | None = None) -> str:
    """What names a run: the moment at which it began, and something that no other run has."""
    return f"{now or datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"


def started(plan: RunPlan, run: str | None = None) -> Manifest:
    """The manifest of a new run."""
    now = datetime.now(UTC)
    run = run or new_run_id(now)
    return Manifest(run, now.isoformat(timespec="seconds"), _numbered(plan, plan.sources), (len(plan.sources),))


def resumed(known: Manifest, asked: RunPlan, *, accept_version: bool = False) -> Manifest:
    """The manifest of the run that goes on, with sources that were added since. With `accept_version` what is left may
    be done by another version of the pipeline, and the manifest says so.

    Raises:
        RunConflict: it would not be the same run; the message says each thing that differs.
    """
    if accept_version and known.plan.version != asked.version:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        plan = replace(known.plan, version=asked.version)
        known = replace(known, plan=plan, earlier=(*known.earlier, (known.plan.version, now)))
    plan = known.plan
    differs = [*_differences(plan, asked), *_changed_sources(plan.sources, asked.sources)]
    differs += kept_differences(plan.read.kept, asked.read.kept)
    if differs:
        lines = "".join(f"\n  {line}" for line in differs)
        hint = ""
        if plan.version != asked.version:
            hint = "\nTo keep what is there and do what is left with the new version, add --accept-version."
        raise RunConflict(
            f"run {known.run} cannot go on in {asked.write.folder}, for its results would not be the same:{lines}\n"
            f"Undo that, or start a new run in another folder.{hint}"
        )
    have = {_identity(s) for s in plan.sources}
    added = [s for s in asked.sources if _identity(s) not in have]
    if not added:
        return known
    batches = (*known.batches, len(added))
    return replace(known, plan=_numbered(plan, [*plan.sources, *added]), batches=batches)


def _numbered(plan: RunPlan, sources: Sequence[Source]) -> RunPlan:
    return replace(plan, sources=tuple(s if s.number == i else replace(s, number=i) for i, s in enumerate(sources)))


def _identity(source: Source) -> tuple[str, str]:
    return source.path, source.format


def _differences(known: RunPlan, asked: RunPlan) -> list[str]:
    pairs: list[tuple[str, Any, Any]] = [
        ("pipeline", known.pipeline, asked.pipeline),
        ("version of the pipeline", known.version, asked.version),
        ("columns", dict(known.read.columns), dict(asked.read.columns)),
        ("key", known.write.key, asked.write.key),
        ("delimiter", known.read.delimiter, asked.read.delimiter),
        ("keep", list(known.write.keep), list(asked.write.keep)),
        ("format", known.write.format, asked.write.format),
        ("limit", known.limit, asked.limit),
    ]
    return [f"{what} was {_text(was)}, and is {_text(now)} now" for what, was, now in pairs if was != now]


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if value is not None and value != [] else "none"


def _changed_sources(known: Sequence[Source], asked: Sequence[Source]) -> list[str]:
    now = {_identity(s): s for s in asked}
    removed = [s.path for s in known if _identity(s) not in now]
    changed = [s.path for s in known if _identity(s) in now and now[_identity(s)].fingerprint != s.fingerprint]
    return [*_listed("is gone from the input", removed), *_listed("has changed since", changed)]


def _listed(what: str, paths: list[str]) -> list[str]:
    more = len(paths) - _SHOWN
    return [f"{path} {what}" for path in paths[:_SHOWN]] + ([f"... and {more} more {what}"] if more > 0 else [])


def _digest(sources: Iterable[Source]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for s in sources:
        text = f"{s.number}\0{s.path}\0{s.format}\0{s.nbytes}\0{s.fingerprint}\n"
        digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def write_manifest(store: Store, manifest: Manifest) -> None:
    """Whole or not at all: the folder then holds this run, or what it held before."""
    plan = manifest.plan
    if store.size(manifest.sources_name) is None:
        # A million images are a million lines: short ones, of values alone.
        rows = ([s.number, s.path, s.format, s.nbytes, s.fingerprint] for s in plan.sources)
        store.write(manifest.sources_name, "".join(json.dumps(row) + "\n" for row in rows).encode())
    content = {
        "torchrelay_run": _SCHEMA,
        "run": manifest.run,
        "created": manifest.created,
        "pipeline": plan.pipeline,
        "version": plan.version,
        "input": plan.input,
        "sources": manifest.fingerprint,
        "batches": list(manifest.batches),
        "read": asdict(plan.read),
        "write": asdict(plan.write),
        "size": asdict(plan.size),
        "limit": plan.limit,
        "earlier_versions": [{"version": version, "until": until} for version, until in manifest.earlier],
    }
    store.write(MANIFEST, (json.dumps(content, indent=1) + "\n").encode())


def remove_old_lists(store: Store, manifest: Manifest) -> None:
    """Removes the lists of sources that only earlier manifests named."""
    for name in store.sizes(HIDDEN, "sources-"):
        if f"{HIDDEN}/{name}" != manifest.sources_name:
            store.remove(f"{HIDDEN}/{name}")


def read_manifest(store: Store) -> Manifest | None:
    """The manifest of the run that the folder holds; None when it holds none.

    Raises DecodeError for one that is damaged, or of a newer torchrelay.
    """
    try:
        text = store.read(MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        found = json.loads(text)
        if found["torchrelay_run"] != _SCHEMA:
            raise DecodeError(f"it has schema {found['torchrelay_run']!r:.20}, this torchrelay knows {_SCHEMA}")
        plan = RunPlan(
            found["pipeline"],
            found["version"],
            found["input"],
            _read_sources(store, str(found["sources"])),
            ReadOptions(**_tuples(found["read"])),
            WriteOptions(**_tuples(found["write"])),
            ChunkSize(**found["size"]),
            found["limit"],
        )
        batches = tuple(int(n) for n in found["batches"])
        if sum(batches) != len(plan.sources):
            raise DecodeError(f"it has {len(plan.sources)} sources, and names {sum(batches)}")
        earlier = tuple((str(e["version"]), str(e["until"])) for e in found.get("earlier_versions", ()))
        manifest = Manifest(str(found["run"]), str(found["created"]), plan, batches, earlier)
        if manifest.fingerprint != found["sources"]:
            raise DecodeError(f"sources-{found['sources']!s:.20}.jsonl is damaged")
        return manifest
    except (ValueError, KeyError, TypeError, FileNotFoundError, TorchrelayError) as error:
        raise DecodeError(
            f"{store.where}/{MANIFEST} is not readable: {error}; start a new run in another folder", length=len(text)
        ) from error


def _read_sources(store: Store, digest: str) -> tuple[Source, ...]:
    if not digest.isalnum():
        raise DecodeError(f"{digest!r:.40} is no digest")
    lines = store.read(f"{HIDDEN}/sources-{digest}.jsonl").splitlines()
    return tuple(Source(*json.loads(line)) for line in lines)


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
