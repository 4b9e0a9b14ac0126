"""Tenants share real workers: ten rows do not wait for a hundred thousand."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import MakePipeline, Workers, run_cli, wait_until
from torchrelay import Relay

YAML = """
pipeline: share
input: {x: int64}
stages:
  - name: slow
    use: stages.py:slow
    outputs: {x: int64}
    batch: {max_rows: 8, max_wait_ms: 0}
    queue: {max_rows: 1000000}
"""
CODE = """
import time


def slow(batch):
    time.sleep(0.001 * len(batch))
    return {"x": batch["x"]}
"""


def served(relay: Relay) -> int:
    return sum(n for field, n in relay.registry.loads().items() if field.endswith("slow.committed"))


def test_ten_rows_do_not_wait_for_a_hundred_thousand(
    make_pipeline: MakePipeline, relay: Relay, workers: Workers
) -> None:
    """A has 100,000 rows waiting, and a worker is in the middle of them. B's ten are done when about twenty rows are,
    and what the worker had claimed before."""
    relay.register(path := make_pipeline(YAML, CODE))
    rows = [{"x": n} for n in range(100_000)]
    relay.submit_many("share", rows, keep_s=0, tenant="a")
    workers.start(path)
    wait_until(lambda: served(relay) > 500)
    before = served(relay)
    mine = relay.submit_many("share", rows[:10], tenant="b")
    assert [f.result(timeout=20)["x"] for f in mine] == list(range(10))
    assert served(relay) - before < 1000


def test_the_command_line_names_tenants_and_their_weights(
    make_pipeline: MakePipeline, relay: Relay, server_url: str, namespace: str, tmp_path: Path
) -> None:
    """`submit --tenant`, `tenants set` and `tenants list`; a name that cannot be is refused with what may be."""
    relay.register(make_pipeline(YAML, CODE))
    at = ("--redis", server_url, "--namespace", namespace)
    assert run_cli("tenants", "set", "a", "3", *at).returncode == 0
    listed = run_cli("tenants", "list", "--json", *at)
    assert listed.stdout.split() == ["{", '"a":', "3.0", "}"] or '"a": 3.0' in listed.stdout
    done = run_cli("submit", "share", '{"x": 1}', "--tenant", "a", *at)
    assert done.returncode == 0, done.stderr
    ref = relay.registry.current()["share"]
    assert relay.registry.client.hexists(relay.registry.lanes[0].keys.fair(ref), "F50:a")
    refused = run_cli("submit", "share", '{"x": 1}', "--tenant", "no spaces", *at)
    assert (refused.returncode, "letters, digits" in refused.stderr) == (2, True)
