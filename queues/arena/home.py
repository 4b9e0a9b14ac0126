"""Where a namespace's arenas lie on this host, who may map them, and how much memory they may take.

A host is a boot of a machine *and* one /dev/shm: containers share the former and not the latter, so its identity is a
digest of the boot id, the device number and a random token file. A ref that names another host is never mapped.

    <base>/torchrelay-<uid>/host                 the token; the folder has mode 0700, every file 0600
    <base>/torchrelay-<uid>/<namespace id>/      one folder per namespace; see `segment`, `holds` for its files, and
                                                 `<name>.gpu` says that a worker with device memory for others lives

Imports neither torch nor redis.
"""

from __future__ import annotations

import hashlib
import os
import platform
import secrets
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

from torchrelay.errors import ConfigError

EXPORTER_SUFFIX = ".gpu"
_TOKEN_BYTES = 32
ARENA_FREE_PART = 0.1
"""This part of the file system stays free, whatever is asked for."""
_USUAL_BYTES, _USUAL_PARTS = 1 << 30, 32


@dataclass(frozen=True, slots=True)
class ArenaHome:
    """The folder of one namespace's arenas. `host` is what refs carry to say which host can map them."""

    folder: Path
    host: int

    @classmethod
    def open(cls, base: str, namespace_id: str) -> ArenaHome:
        """Makes the folders where they are missing.

        Raises ConfigError naming what is in the way: an arena in a folder that others can write would be theirs too.
        """
        root = Path(base) / f"torchrelay-{os.getuid()}"
        try:
            _own_folder(root)
            _make_token(root)
            host = _host_id(root)
            folder = root / namespace_id
            _own_folder(folder)
        except OSError as error:
            raise ConfigError(f"no arena in {root}: {error.strerror or error}; set TORCHRELAY_ARENA_BYTES=0") from error
        return cls(folder, host)

    def keep(self) -> None:
        """Says that the folder is in use, and makes it anew where it is gone: one unused for an hour is removed."""
        _own_folder(self.folder)
        os.utime(self.folder)

    def is_there(self) -> bool:
        """Whether the folder is there and this still is that host: somebody may have cleared the file system."""
        try:
            return self.folder.is_dir() and _host_id(self.folder.parent) == self.host
        except (OSError, ConfigError):
            return False

    def usual_bytes(self) -> int:
        """What one process may take where nobody said so. Of a machine with GPUs 1 GiB is little: less than half a
        second of the images that one of them classifies."""
        try:
            found = os.statvfs(self.folder)
        except OSError:
            return _USUAL_BYTES
        return max(_USUAL_BYTES, found.f_blocks * found.f_frsize // _USUAL_PARTS)

    def free_bytes(self) -> int:
        """How much more shared memory may be taken now: by the file system, and by the limit of this control group."""
        try:
            found = os.statvfs(self.folder)
        except OSError:
            return 0
        free = found.f_bavail * found.f_frsize - int(found.f_blocks * found.f_frsize * ARENA_FREE_PART)
        return max(0, min(free, _control_group_headroom()))


def unsupported() -> str:
    """Why this machine has no arena; '' where it has one.

    The words of a control slot are published by plain stores in program order. x86-64 keeps that order; weaker
    machines would need barriers, which Python cannot give.
    """
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} has no tmpfs with the locks that an arena needs"
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the memory order of {platform.machine()} is weaker than that of x86-64"
    return ""


def _own_folder(path: Path) -> None:
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"{path} must be a folder of this user alone (mode 0700); remove it, or chmod 700 it")


def _make_token(root: Path) -> None:
    token = root / "host"
    fresh = root / f"host.{secrets.token_hex(8)}"
    if not token.exists():
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(descriptor, secrets.token_hex(_TOKEN_BYTES // 2).encode())
            os.link(fresh, token)  # whole or not at all, and the first one wins
        except FileExistsError:
            pass
        finally:
            os.close(descriptor)
            fresh.unlink()


def _host_id(root: Path) -> int:
    token = root / "host"
    descriptor = os.open(token, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        words = os.read(descriptor, 64)
        if len(words) != _TOKEN_BYTES:
            # Two hosts with half a token would take each other's memory for their own.
            raise ConfigError(f"{token} is no host token; remove it")
        device = os.fstat(descriptor).st_dev
    finally:
        os.close(descriptor)
    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    return int.from_bytes(hashlib.blake2b(boot + words + str(device).encode(), digest_size=8).digest(), "little")


def _control_group_headroom(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes below the memory limits of this control group (version 2) and of those above it, what they could drop at
    once not counted."""
    try:
        folder = root / own.read_text().strip().rpartition("::")[2].lstrip("/")
    except (OSError, ValueError):
        return sys.maxsize
    # Inside a container the group's own folder is the root of what is mounted.
    groups = [folder, *folder.parents]
    return min(_headroom(group) for group in groups[: groups.index(root) + 1])


def _headroom(group: Path) -> int:
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return sys.maxsize
        used = int((group / "memory.current").read_text())
        stats = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # A tenth of the limit stays for everything else.
        return int(int(limit) * 0.9) - used + int(stats.get("inactive_file", 0))
    except (OSError, ValueError):
        return sys.maxsize
