"""A run's folder behind a URL (s3://, gs://, memory:// ...), through fsspec.

Object stores have no rename that refuses to replace, so each writer's files have names of their own, by its fence, and
whoever reads the folder knows which of them counts.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import IO, Any, Final, cast

from torchrelay.errors import ConfigError, WorkerError
from torchrelay.stages.writing.stores import BAD, TMP

__all__ = ["RemoteStore"]

# What is uploaded there is visible when it is whole; elsewhere a file is uploaded aside and moved.
_WHOLE: Final = frozenset(["s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "hf", "r2"])
# A prefix asks for one part's files in one request; a whole listing grows with the run.
_LISTS_PREFIXES: Final = frozenset(["s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory"])


class RemoteStore:
    """A folder that fsspec reaches."""

    links = False

    def __init__(self, url: str) -> None:
        self.where = url.rstrip("/")
        try:
            import fsspec
        except ImportError as error:
            raise ConfigError(f'output {url}: needs fsspec: pip install "torchrelay[runs]"') from error
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.where)
        except (ImportError, ValueError) as error:
            # fsspec names the package that is missing, or the protocols it knows.
            raise ConfigError(f"output {url}: {error}") from error
        scheme = self.where.partition("://")[0]
        self._whole = scheme in _WHOLE
        self._lists_prefixes = scheme in _LISTS_PREFIXES

    def path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else str(self._root)

    def sizes(self, folder: str, begin: str = "") -> dict[str, int]:
        path = self.path(folder)
        self._fs.invalidate_cache(path)
        try:
            if begin and self._lists_prefixes:
                found = list(self._fs.find(path, prefix=begin, detail=True).values())
            else:
                found = self._fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise self._trouble("listed", error) from error
        files = [(f["name"].rpartition("/"), int(f["size"])) for f in found if f["type"] == "file"]
        here = {n: size for (where, _, n), size in files if where == path.rstrip("/") and n.startswith(begin)}
        return dict(sorted(here.items()))

    def size(self, name: str) -> int | None:
        try:
            found = self._fs.info(self.path(name))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._trouble("read", error) from error
        return int(found["size"]) if found["type"] == "file" else None

    def open(self, name: str) -> IO[bytes]:
        return cast("IO[bytes]", self._fs.open(self.path(name), "rb"))

    def read(self, name: str) -> bytes:
        data: bytes = self._fs.cat_file(self.path(name))
        return data

    def write(self, name: str, data: bytes) -> None:
        try:
            self._put(name, lambda path: self._fs.pipe_file(path, data))
        except OSError as error:
            raise self._trouble("written", error) from error

    def add(self, made: Path, name: str) -> bool:
        try:
            self._put(name, lambda path: self._fs.put_file(str(made), path))
        except OSError as error:
            raise self._trouble("written", error) from error
        return True

    def replace(self, made: Path, name: str) -> None:
        self.add(made, name)

    def remove(self, name: str) -> None:
        try:
            self._fs.rm_file(self.path(name))
        except FileNotFoundError:
            pass  # somebody else cleaned

    def move_away(self, name: str) -> None:
        self._move(self.path(name), self.path(f"{BAD}/{name.rpartition('/')[2]}.{secrets.token_hex(4)}"))

    def _put(self, name: str, upload: Any) -> None:
        target = self.path(name)
        if self._whole:
            upload(target)
            return
        aside = self.path(f"{TMP}/{name.replace('/', '~')}.{secrets.token_hex(6)}")
        self._fs.makedirs(aside.rpartition("/")[0], exist_ok=True)
        upload(aside)
        self._move(aside, target)

    def _move(self, source: str, target: str) -> None:
        self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._fs.mv(source, target)

    def _trouble(self, what: str, error: OSError) -> WorkerError:
        return WorkerError(f"output {self.where}: cannot be {what}: {error}; then go on with --resume")
