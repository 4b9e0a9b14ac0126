"""The folder that a run writes into, local or behind a URL, as far as writers and the driver need it.

    <folder>/part-00000012.parquet     parts: all that is visible, so that any reader of the folder sees rows alone
    <folder>/_run/                     everything else (readers of datasets skip names that begin with _)
        manifest.json ...              of the driver
        empty/  parts/  tmp/  bad/     parts without rows, records beside parts, unfinished files, what did not verify

Names are relative to the folder, with `/`. Promise: a file under its final name is whole; locally it also outlives a
loss of power.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final, Protocol

from torchrelay.errors import ConfigError, WorkerError

__all__ = [
    "BAD",
    "DISK_FULL",
    "EMPTY",
    "HIDDEN",
    "RECORDS",
    "TMP",
    "LocalStore",
    "Store",
    "disk_trouble",
    "open_store",
    "sync_folder",
]

HIDDEN: Final = "_run"
EMPTY, RECORDS, TMP, BAD = (f"{HIDDEN}/{name}" for name in ("empty", "parts", "tmp", "bad"))
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EINVAL, errno.EMLINK)


class Store(Protocol):
    """`links` says whether `add` can refuse to replace. Where it cannot, names hold the writer's fence."""

    where: str

    @property
    def links(self) -> bool: ...

    def sizes(self, folder: str, begin: str = "") -> dict[str, int]:
        """The files right in a folder ("" the store's own) whose names begin so, sorted; none where it is missing."""

    def size(self, name: str) -> int | None:
        """None where there is no such file."""

    def open(self, name: str) -> IO[bytes]:
        """For reading, from any place; raises FileNotFoundError."""

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""

    def write(self, name: str, data: bytes) -> None:
        """Whole or not at all; replaces."""

    def add(self, made: Path, name: str) -> bool:
        """Gives a local file, which is on the disk, its final name; False where that is taken already. Where `links`
        is False it replaces. Raises FileNotFoundError where the file is gone."""

    def replace(self, made: Path, name: str) -> None:
        """The same, in place of what has that name."""

    def remove(self, name: str) -> None:
        """Nothing where it is gone."""

    def move_away(self, name: str) -> None:
        """Puts a file that is not as it should be out of the readers' sight."""


def open_store(folder: str) -> Store:
    """A local path, file:// or any other URL that fsspec opens. Makes nothing yet; raises ConfigError."""
    scheme, colon, rest = folder.partition("://")
    if colon and scheme not in ("file", "local"):
        from torchrelay.stages.writing.remote import RemoteStore

        return RemoteStore(folder)
    return LocalStore(rest if colon else folder)


class LocalStore:
    """A folder of this host's file systems."""

    def __init__(self, folder: str) -> None:
        self.where = os.path.abspath(os.path.expanduser(folder))
        self._root = Path(self.where)
        self._links: bool | None = None

    @property
    def links(self) -> bool:
        if self._links is None:
            self._links = self._can_link()
        return self._links

    def path(self, name: str) -> Path:
        return self._root / name

    def tmp_folder(self) -> Path:
        return self._folder(TMP)

    def sizes(self, folder: str, begin: str = "") -> dict[str, int]:
        sizes = {}
        try:
            with os.scandir(self._root / folder) as found:
                for entry in found:
                    if entry.name.startswith(begin) and not entry.is_dir():
                        try:
                            sizes[entry.name] = entry.stat().st_size
                        except FileNotFoundError:
                            pass  # gone since it was listed
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return dict(sorted(sizes.items()))

    def size(self, name: str) -> int | None:
        try:
            return self.path(name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def open(self, name: str) -> IO[bytes]:
        return self.path(name).open("rb")

    def read(self, name: str) -> bytes:
        return self.path(name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        with disk_trouble(self.where):
            made = self.tmp_folder() / f"{name.replace('/', '~')}.{secrets.token_hex(6)}"
            try:
                with made.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                target = self._folder(os.path.dirname(name)) / os.path.basename(name)
                os.replace(made, target)
            except BaseException:
                made.unlink(missing_ok=True)
                raise
            sync_folder(target.parent)

    def add(self, made: Path, name: str) -> bool:
        with disk_trouble(self.where):
            target = self._folder(os.path.dirname(name)) / os.path.basename(name)
            if self.links:
                try:
                    os.link(made, target)
                except FileExistsError:
                    return False
            else:
                os.replace(made, target)
            sync_folder(target.parent)
        return True

    def replace(self, made: Path, name: str) -> None:
        with disk_trouble(self.where):
            target = self._folder(os.path.dirname(name)) / os.path.basename(name)
            try:
                os.replace(made, target)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                aside = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
                shutil.copyfile(made, aside)
                os.replace(aside, target)
            sync_folder(target.parent)

    def remove(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)

    def move_away(self, name: str) -> None:
        with disk_trouble(self.where):
            os.replace(self.path(name), self._folder(BAD) / f"{os.path.basename(name)}.{secrets.token_hex(4)}")

    def _folder(self, name: str) -> Path:
        """The folder, made where it is missing and then on the disk."""
        path = self._root / name
        if not path.is_dir():
            missing = [p for p in (path, *path.parents) if not p.exists()]
            path.mkdir(parents=True, exist_ok=True)
            for made in missing:
                sync_folder(made.parent)
        return path

    def _can_link(self) -> bool:
        with disk_trouble(self.where):
            while True:
                probe = self.tmp_folder() / f"probe.{secrets.token_hex(6)}"
                linked = probe.with_name(f"{probe.name}.linked")
                probe.touch(exist_ok=False)
                try:
                    os.link(probe, linked)
                    return True
                except FileNotFoundError:
                    continue  # a driver that cleans up took it for one of a dead writer
                except OSError as error:
                    if error.errno not in _NO_LINKS:
                        raise
                    return False
                finally:
                    probe.unlink(missing_ok=True)
                    linked.unlink(missing_ok=True)


@contextmanager
def disk_trouble(where: str) -> Iterator[None]:
    """Says what is wrong with the output folder, and what to do, in place of an error number.

    FileNotFoundError passes: it can mean that somebody else was faster.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except FileExistsError as error:
        raise ConfigError(f"output {where}: {error.filename} is a file where a folder is needed") from error
    except PermissionError as error:
        raise ConfigError(f"output {where}: may not write {error.filename}; allow it, or choose another") from error
    except OSError as error:
        if error.errno in DISK_FULL:
            raise WorkerError(
                f"output {where}: no space is left ({error.strerror}); free some, then go on with --resume"
            ) from error
        raise WorkerError(f"output {where}: cannot be written: {error}") from error


def sync_folder(path: Path) -> None:
    """Puts the names in a folder on the disk, where the system can."""
    if os.name == "nt":
        return
    descriptor: Any = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems have no such call
            raise
    finally:
        os.close(descriptor)
