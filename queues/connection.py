"""Reaches a server: by URL, or the folder's embedded one; and refuses one that would lose or evict jobs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

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
_PASSWORD = re.compile(r"(//[^/@]*?):[^@/]*@")


@dataclass
class Broker:
    """A checked connection. `url` has no password; `close()` gives back the connection and the embedded server."""

    client: redis.Redis
    address: str
    embedded: EmbeddedServer | None = None

    @property
    def url(self) -> str:
        return hide_password(self.address)

    def close(self) -> None:
        self.client.close()
        if self.embedded is not None:
            self.embedded.close()


def hide_password(url: str) -> str:
    """The URL as messages may show it."""
    return _PASSWORD.sub(r"\1:***@", url)


def open_broker(url: str | None = None, start_dir: Path | None = None) -> Broker:
    """Connects and checks. Without a URL it joins the nearest folder's embedded server, or starts one.

    Raises ConfigError, BrokerUnavailable, BrokerMisconfigured.
    """
    embedded = None if url else find_or_start(start_dir)
    address = url or (embedded.url if embedded else "")
    try:
        client = connect(address)
        check_server(client, hide_password(address))
    except BaseException:
        if embedded is not None:
            embedded.close()
        raise
    return Broker(client, address, embedded)


def connect(url: str) -> redis.Redis:
    """A client for redis://, rediss:// or unix://; nothing is sent yet. Raises ConfigError for another URL."""
    tcp = {"socket_keepalive": True, "health_check_interval": 30} if not url.startswith("unix://") else {}
    try:
        # Only connecting is tried again: a sent command may have run, and its caller decides about a replay.
        return redis.Redis.from_url(
            url,
            socket_connect_timeout=5.0,
            socket_timeout=30.0,
            retry=Retry(ExponentialBackoff(cap=0.5, base=0.02), 3),
            decode_responses=False,
            client_name="torchrelay",
            **tcp,
        )
    except ValueError as error:
        raise ConfigError(f"{hide_password(url)!r} is no server URL: {error}; write redis://host:6379/0") from error


def check_server(client: redis.Redis, where: str) -> None:
    """Raises BrokerUnavailable when it cannot be reached, BrokerMisconfigured when it is too old or evicts."""
    try:
        info = client.info("server") | client.info("memory")
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
