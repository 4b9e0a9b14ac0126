"""Reaching a server: URLs, passwords that stay out of messages, and servers that are refused by name."""

from __future__ import annotations

import socket
import socketserver
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from hypothesis import example, given
from hypothesis import strategies as st

from tests.conftest import PrivateServer, private_server, wait_until
from torchrelay.errors import BrokerMisconfigured, BrokerUnavailable, ConfigError
from torchrelay.queues import server
from torchrelay.queues.connection import connect, hide_password, open_broker
from torchrelay.queues.server_probe import ping


class _OldServer(socketserver.StreamRequestHandler):
    """Speaks as Redis 5 does: no HELLO 3, no CLIENT SETINFO, and an INFO of its time."""

    def handle(self) -> None:
        while line := self.rfile.readline():
            words = []
            for _ in range(int(line[1:])):
                length = int(self.rfile.readline()[1:])
                words.append(self.rfile.read(length + 2)[:-2].upper())
            if words[0] == b"INFO":
                text = b"redis_version:5.0.14\r\nmaxmemory_policy:noeviction\r\n"
                self.wfile.write(b"$%d\r\n%s\r\n" % (len(text), text))
            elif words[0] in (b"PING", b"SELECT") or words[:2] == [b"CLIENT", b"SETNAME"]:
                self.wfile.write(b"+OK\r\n")
            else:
                self.wfile.write(b"-ERR unknown command\r\n")


@contextmanager
def old_server() -> Iterator[int]:
    """The port of a server of version 5.0.14."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _OldServer) as listening:
        listening.daemon_threads = True
        thread = threading.Thread(target=listening.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield listening.server_address[1]
        finally:
            listening.shutdown()
            thread.join()


def admin(made: PrivateServer) -> redis.Redis:
    return redis.Redis(unix_socket_path=str(made.socket))


def test_a_good_server_is_opened(server_url: str) -> None:
    """A URL gives a checked client whose connections bear a name."""
    broker = open_broker(server_url)
    assert broker.url == server_url
    assert broker.embedded is None
    assert broker.client.client_getname() in (b"torchrelay", "torchrelay")
    broker.client.set("bytes", b"\xff")
    assert broker.client.get("bytes") == b"\xff"
    broker.close()


def test_without_a_url_the_folders_server_is_used_until_closed(tmp_path: Path) -> None:
    """No URL joins or starts the embedded server; closing gives the share back, and it ends."""
    first, second = open_broker(start_dir=tmp_path), open_broker(start_dir=tmp_path)
    assert first.address == second.address
    first.close()
    assert second.client.ping()
    second.close()
    wait_until(lambda: not server.status(tmp_path).running)


@given(before=st.text(max_size=5), after=st.text(max_size=5), user=st.sampled_from(["", "bob", "b:b", "b/b"]))
@example(before="", after="@", user="")
@example(before="", after="://", user="")
@example(before="p/w", after="?x#y", user="")
def test_no_password_is_ever_shown(before: str, after: str, user: str) -> None:
    """Whatever stands around it, also what should have been quoted, the password is replaced."""
    secret = f"{before}SeCrEt{after}"
    shown = [hide_password(url) for url in (f"redis://{user}:{secret}@h:6379/0", f"{user}:{secret}@h")]
    shown.append(hide_password("unix:///run/s.sock?db=1&password=SeCrEt"))
    assert not [text for text in shown if "SeCrEt" in text]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:6379/0", "redis://h:6379/0"),
        ("redis://:pw@h", "redis://:***@h"),
        ("rediss://bob:pw@h:1/2", "rediss://bob:***@h:1/2"),
        ("unix:///run/s.sock", "unix:///run/s.sock"),
        ("unix:///run/s.sock?password=pw&db=1", "unix:///run/s.sock?password=***&db=1"),
    ],
)
def test_the_rest_of_a_url_is_shown(url: str, shown: str) -> None:
    """Scheme, user, host, port, database and path stay legible."""
    assert hide_password(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        "bob:SeCrEt@h:6379",
        "http://:SeCrEt@h:6379",
        "redis://:SeC/rEt@h:6379",
        "redis://:SeCrEt@h:port",
        "redis://:SeCrEt@h:70000",
        "redis://:SeCrEt@h:6379/zero",
        "redis://:SeCrEt@h:6379?db=zero",
        "redis://:SeCrEt@h:6379?colour=red",
        "redis://",
        "unix://",
        "h:6379",
    ],
)
def test_a_wrong_url_is_refused_with_the_right_form(url: str) -> None:
    """Another scheme, a bad port or database or option, no host: a ConfigError, its cause not shown either."""
    with pytest.raises(ConfigError, match="is no server URL; write redis://") as raised:
        connect(url)
    told = "".join(traceback.format_exception_only(raised.value))
    assert "rEt" not in told
    assert raised.value.__suppress_context__


def test_an_unreachable_server_is_named_with_a_remedy(tmp_path: Path) -> None:
    """Nobody listens: the message has host and port, or the path, and says what to do; the password stays out."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        with pytest.raises(BrokerUnavailable, match=rf"redis://:\*\*\*@127\.0\.0\.1:{port}.*start it") as raised:
            open_broker(f"redis://:SeCrEt@127.0.0.1:{port}/0")
    assert "SeCrEt" not in str(raised.value)
    with pytest.raises(BrokerUnavailable, match=r"none\.sock"):
        open_broker(f"unix://{tmp_path}/none.sock")


def test_a_server_that_never_answers_is_named_within_seconds() -> None:
    """It accepts and stays silent, as a frozen one does: refused after one time-out, not after several."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(BrokerUnavailable, match=rf"127\.0\.0\.1:{port}.*[Tt]imeout"):
            open_broker(f"redis://127.0.0.1:{port}")


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_server_that_evicts_is_refused_by_name(policy: str) -> None:
    """The message names the policy, why it does harm, and the command that sets the right one."""
    with private_server("--maxmemory-policy", policy) as made:
        with pytest.raises(BrokerMisconfigured, match=rf"{policy}.*config set maxmemory-policy noeviction"):
            open_broker(made.url)
        admin(made).config_set("maxmemory-policy", "noeviction")
        open_broker(made.url).close()


def test_the_policy_is_read_where_config_is_forbidden() -> None:
    """A managed server's user may not call CONFIG: the policy is known all the same."""
    with private_server("--maxmemory-policy", "allkeys-lfu") as made:
        admin(made).execute_command("ACL", "SETUSER", "bob", "on", ">SeCrEt", "~*", "&*", "+@all", "-config")
        url = made.url.replace("unix://", "unix://bob:SeCrEt@")
        with pytest.raises(redis.exceptions.NoPermissionError):
            connect(url).config_get("maxmemory-policy")
        with pytest.raises(BrokerMisconfigured, match=r"bob:\*\*\*@.*allkeys-lfu"):
            open_broker(url)


def test_a_wrong_or_missing_password_is_named() -> None:
    """Both are told apart from a server that is away, and neither message holds the password."""
    with private_server() as made:
        admin(made).config_set("requirepass", "right")
        made_url = made.url.replace("unix://", "unix://:SeCrEt@")
        for url in (made.url, made_url):
            with pytest.raises(BrokerMisconfigured, match=r"refuses this user.*password") as raised:
                open_broker(url)
            assert "SeCrEt" not in str(raised.value)
        open_broker(made.url.replace("unix://", "unix://:right@")).close()


def test_a_server_that_is_too_old_is_refused_by_name() -> None:
    """The message has the version found and the oldest that serves."""
    with old_server() as port, pytest.raises(BrokerMisconfigured, match=r"5\.0\.14.*6\.2"):
        open_broker(f"redis://127.0.0.1:{port}/0")


def test_a_server_that_loads_its_data_is_named(tmp_path: Path) -> None:
    """It is there and not ready: the message says so, and the embedded server's probe tells it from a dead one."""
    slow = ("--key-load-delay", "20000", "--loading-process-events-interval-bytes", "1024")
    with private_server() as made:
        client = admin(made)
        client.mset({f"k{n}": "x" * 1000 for n in range(1000)})
        client.bgrewriteaof()
        wait_until(lambda: not client.info("persistence")["aof_rewrite_in_progress"])
        made.stop()
        made.options = slow
        starting = threading.Thread(target=made.start)
        starting.start()
        wait_until(lambda: ping(made.socket) == "LOADING")
        with pytest.raises(BrokerUnavailable, match="is loading its data"):
            open_broker(made.url)
        admin(made).config_set("key-load-delay", 0)
        starting.join()
        open_broker(made.url).close()
