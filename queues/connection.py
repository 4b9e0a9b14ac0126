"""Reaches a server: by URL, or the folder's embedded one; and refuses one that would lose or evict jobs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    NoPermissionError,
    RedisError,
    ResponseError,
)
from redis.retry import Retry

from torchrelay.errors import BrokerMisconfigured, BrokerUnavailable, ConfigError
from torchrelay.queues.server import EmbeddedServer, find_or_start

OLDEST_VERSION = (6, 2)
_QUERY_PASSWORD = re.compile(r"(password=)[^&#]*", re.IGNORECASE)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_USER = re.compile(r"[\w.-]*(?=:)")


@dataclass
class Broker:
    """A checked connection. `url` has no password; `close()` gives back the connection and the embedded server."""

    client: redis.Redis
    address: str = field(repr=False)
    embedded: EmbeddedServer | None = None

    @property
    def url(self) -> str:
        return hide_password(self.address)

    def close(self) -> None:
        self.client.close()
        if self.embedded is not None:
            self.embedded.close()


def hide_password(url: str) -> str:
    """The URL as messages may show it: no password, also where an unquoted @ or / in it makes the URL a wrong one."""
    url = _QUERY_PASSWORD.sub(r"\1***", url)
    before, at, after = url.rpartition("@")
    if not at:
        return url
    scheme = _SCHEME.match(before)
    user = _USER.match(before, scheme.end() if scheme else 0)
    return f"{scheme[0] if scheme else ''}{user[0] + ':' if user else ''}***@{after}"


def open_broker(url: str | None = None, start_dir: Path | None = None) -> Broker:
    """Connects and checks. Without a URL it joins the nearest folder's embedded server, or starts one.

    Raises ConfigError, BrokerUnavailable, BrokerMisconfigured.
    """
    embedded = None if url else find_or_start(start_dir)
    address = url or (embedded.url if embedded else "")
    try:
        # A server that accepts and answers nothing should be named within seconds, and an old one, which knows no
        # HELLO, with its version.
        with connect(address, timeout_s=5.0, again=(redis.ConnectionError,), protocol=2) as probe:
            check_server(probe, hide_password(address))
        return Broker(connect(address), address, embedded)
    except BaseException:
        if embedded is not None:
            embedded.close()
        raise


def connect(
    url: str,
    *,
    timeout_s: float = 30.0,
    again: tuple[type[Exception], ...] = (redis.ConnectionError, redis.TimeoutError),
    protocol: int | None = None,
) -> redis.Redis:
    """A client for redis://, rediss:// or unix://; nothing is sent yet. Raises ConfigError for another URL.

    `timeout_s` bounds the wait for each answer. After an error of `again` a plain command is sent up to three times
    more, so that it may run twice; transitions go through `Channel`, which replays them without that.
    """
    tcp = {"socket_keepalive": True, "health_check_interval": 30} if not url.startswith("unix://") else {}
    try:
        _check_url(url)
        client = redis.Redis.from_url(
            url,
            socket_connect_timeout=5.0,
            socket_timeout=timeout_s,
            retry=Retry(ExponentialBackoff(cap=0.5, base=0.02), 3, again),
            protocol=protocol,
            decode_responses=False,
            client_name="torchrelay",
            **tcp,
        )
        pool = client.connection_pool
        pool.connection_class(**pool.connection_kwargs)  # an unknown option after the ? shows only here
    except (ValueError, TypeError):
        # The cause's text may hold a part of the password, so it is not chained.
        raise ConfigError(
            f"{hide_password(url)!r} is no server URL; write redis://[user:password@]host:6379/0, rediss://... or "
            "unix:///path/to.sock, with @ : / in a password as %40 %3A %2F"
        ) from None
    return client


def _check_url(url: str) -> None:
    """What redis-py takes in silence: a database that is not a number becomes 0, a missing path or host a default."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        if not parts.path:
            raise ValueError("no path")
    elif not parts.hostname or not re.fullmatch(r"(/\d*)?", parts.path):
        raise ValueError("no host, or a database that is no number")


def check_server(client: redis.Redis, where: str) -> None:
    """Raises BrokerUnavailable when it cannot be reached, BrokerMisconfigured when it is too old or evicts."""
    try:
        info = client.info()
    except (AuthenticationError, AuthorizationError, NoPermissionError) as error:
        raise BrokerMisconfigured(f"{where} refuses this user: {error}; give user and password in the URL") from error
    except BusyLoadingError as error:
        raise BrokerUnavailable(f"{where} is loading its data; try again when it is done") from error
    except ResponseError as error:
        raise BrokerMisconfigured(f"{where} refuses INFO: {error}") from error
    except (RedisError, OSError) as error:
        raise BrokerUnavailable(
            f"no server at {where}: {error}; start it, check host and port, "
            "or leave --redis and TORCHRELAY_REDIS_URL out to use the embedded one"
        ) from error
    if info.get("loading"):
        raise BrokerUnavailable(f"{where} is loading its data; try again when it is done")
    version = str(info.get("redis_version", "0"))
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST_VERSION:
        raise BrokerMisconfigured(f"{where} runs version {version}; Redis 6.2 or Valkey 7.2 is the oldest that serves")
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise BrokerMisconfigured(
            f"{where} has maxmemory-policy {policy}: it would throw jobs away; "
            "set it: redis-cli config set maxmemory-policy noeviction"
        )
