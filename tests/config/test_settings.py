"""Settings: from arguments, else from the environment, else their defaults; wrong ones are named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import settings as checked
from hypothesis import strategies as st

from torchrelay.config.settings import Settings, parse_bytes
from torchrelay.errors import ConfigError


def test_order() -> None:
    """An argument goes before the environment, and the environment before the default."""
    environment = {
        "TORCHRELAY_REDIS_URL": "redis://h:1/0",
        "TORCHRELAY_NAMESPACE": "prod",
        "TORCHRELAY_LEASE_MS": "2000",
        "TORCHRELAY_RESULTS_MAX_BYTES": "2MiB",
        "TORCHRELAY_NURSERY": "0",
    }
    settings = Settings.load(environment, namespace="test", url=None)
    assert settings == Settings("redis://h:1/0", "test", 1, 2000, 600, 2 << 20, nursery=False)
    assert Settings.load({}) == Settings()
    assert Settings.load({"TORCHRELAY_RESULTS_MAX_BYTES": "4096"}).results_max_bytes == 4096


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"TORCHRELAY_LANES": "x"}, "TORCHRELAY_LANES"),
        ({"TORCHRELAY_LANES": "0"}, "TORCHRELAY_LANES"),
        ({"TORCHRELAY_NAMESPACE": "a:b"}, "TORCHRELAY_NAMESPACE"),
        ({"TORCHRELAY_RESULTS_MAX_BYTES": "much"}, "TORCHRELAY_RESULTS_MAX_BYTES"),
        ({"TORCHRELAY_REDIS_URL": "http://h"}, "TORCHRELAY_REDIS_URL"),
        ({"TORCHRELAY_LOG": "xml"}, "TORCHRELAY_LOG"),
        ({"TORCHRELAY_NURSERY": "off"}, "TORCHRELAY_NURSERY"),
    ],
)
def test_environment_refused(environment: dict[str, str], says: str) -> None:
    """A wrong variable is named."""
    with pytest.raises(ConfigError, match=says):
        Settings.load(environment)


@pytest.mark.parametrize("name", ["", "a\n", "a}", "{}", "a:b", "a*", "a\x00", "x" * 65, "\u202ea", None, 5])
def test_namespace_refused(name: str) -> None:
    """A namespace that could break out of its keys is refused."""
    with pytest.raises(ConfigError, match="namespace"):
        Settings(namespace=name)


def test_password_hidden() -> None:
    """A URL that is refused is not repeated, because it may hold a password."""
    with pytest.raises(ConfigError) as caught:
        Settings(redis_url="http://user:secret@host")
    assert "secret" not in str(caught.value)


def test_unknown_setting() -> None:
    """An unknown setting is refused with the nearest known name."""
    with pytest.raises(ConfigError, match="did you mean 'lanes'"):
        Settings.load({}, lane=1)


@pytest.mark.parametrize(
    ("text", "size"),
    [(0, 0), ("512MiB", 512 << 20), ("2GB", 2 * 10**9), ("1.5 KiB", 1536), ("8B", 8), ("7", 7), ("1gib", 1 << 30)],
)
def test_sizes(text: int | str, size: int) -> None:
    """Sizes are bytes, with decimal or binary units."""
    assert parse_bytes(text) == size


@checked(deadline=None)
@given(st.one_of(st.text(max_size=30), st.integers(max_value=-1), st.booleans(), st.none(), st.just("9" * 400)))
def test_sizes_refused(value: object) -> None:
    """What is no size is a ConfigError and nothing else."""
    try:
        assert parse_bytes(value) >= 0  # type: ignore[arg-type]  # wrong types are the point
    except ConfigError:
        pass
