"""The examples for real: their pipelines served by real workers, their demos as users start them, real HTTP."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import redis

from tests.conftest import PrivateServer, Workers, await_no_shared_memory, wait_until
from torchrelay import Relay
from torchrelay.errors import JobFailed, QueueFull
from torchrelay.queues.operate import Target, pause, purge
from torchrelay.queues.registry import Registry

if TYPE_CHECKING:
    import httpx

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NEEDED = ("fastapi", "httpx", "multipart", "PIL", "scipy", "sklearn", "uvicorn")
MISSING = [p for p in NEEDED if not importlib.util.find_spec(p)]
pytestmark = pytest.mark.skipif(
    bool(MISSING) and "CI" not in os.environ,
    reason=f'needs {MISSING}: pip install "torchrelay[examples]" httpx',
)


@dataclass
class Example:
    """An example whose workers run, one process per stage, in a namespace of its own."""

    name: str
    pipeline: str
    url: str
    namespace: str
    relay: Relay
    registry: Registry

    @property
    def env(self) -> dict[str, str]:
        """Leads `Relay()` and `AsyncRelay()` of the example's own processes here."""
        return {**os.environ, "TORCHRELAY_REDIS_URL": self.url, "TORCHRELAY_NAMESPACE": self.namespace}

    def run_demo(self, *arguments: str) -> str:
        """What `python -m examples.NAME.demo` prints; it must end with status 0 and complain of nothing."""
        command = [sys.executable, "-m", f"examples.{self.name}.demo", *arguments]
        ran = subprocess.run(command, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=60, check=False)
        assert (ran.returncode, ran.stderr) == (0, "")
        return ran.stdout

    @contextmanager
    def paused(self, *, drop: bool = False) -> Iterator[None]:
        """No worker takes anything up meanwhile; with `drop`, what waits at the end never is."""
        target = Target.find(self.registry, self.pipeline)
        pause(self.registry, target)
        try:
            yield
        finally:
            if drop:
                purge(self.registry, target)
            pause(self.registry, target, on=False)


@contextmanager
def serving(server: PrivateServer, name: str, pipeline: str) -> Iterator[Example]:
    namespace = f"example-{name}"
    workers = Workers(server.url, namespace)
    client = redis.Redis.from_url(server.url)
    try:
        workers.start(EXAMPLES / name / "pipeline.yaml")
        registry = Registry(client, namespace, 1)
        registry.open()
        with Relay(server.url, namespace=namespace) as relay:
            yield Example(name, pipeline, server.url, namespace, relay, registry)
    finally:
        workers.stop()
        client.close()


@pytest.fixture(scope="module", autouse=True)
def no_shared_memory_left(arena_dir: Path) -> Iterator[None]:
    yield
    await_no_shared_memory(arena_dir)


@pytest.fixture(scope="module")
def pages(server: PrivateServer) -> Iterator[Example]:
    with serving(server, "pages", "pages") as example:
        yield example


@pytest.fixture(scope="module")
def ensemble(server: PrivateServer) -> Iterator[Example]:
    with serving(server, "ensemble", "ensemble") as example:
        yield example


class TestPages:
    def test_boxes_are_exact_and_labels_nearly_so(self, pages: Example) -> None:
        """Pages with none to 24 digits come back with each box where it was drawn; 95 % of the labels are right."""
        from examples.pages.demo import read
        from examples.pages.draw import draw_pages

        drawn = draw_pages(60, seed=7)
        assert {len(p.answer) for p in drawn} >= {0, 24}
        answers = read(pages.relay, [p.image for p in drawn])
        assert [a.keys() for a in answers if isinstance(a, dict)] == [p.answer.keys() for p in drawn]
        pairs = zip(drawn, answers, strict=True)
        assert np.mean([answer[box] == digit for p, answer in pairs for box, digit in p.answer.items()]) >= 0.95

    def test_a_broken_page_is_refused_and_its_neighbours_complete(self, pages: Example) -> None:
        """Of pages in one batch the broken one fails at once with the stage's reason, and only that one."""
        from examples.pages.draw import draw_pages, static

        drawn = draw_pages(6)
        images = [*(p.image for p in drawn[:3]), static(), *(p.image for p in drawn[3:])]
        with pages.paused():
            futures = pages.relay.submit_many("pages", [{"page": image} for image in images])
        broken = futures.pop(3)
        with pytest.raises(JobFailed, match="this is no scan of a page") as failed:
            broken.result(timeout=20)
        assert (failed.value.stage, failed.value.error_type, failed.value.attempts) == ("detect", "Rejected", 1)
        assert [len(f.result(timeout=20)["box"]) for f in futures] == [len(p.answer) for p in drawn]

    def test_the_demo_compares_with_what_was_drawn(self, pages: Example) -> None:
        """It prints a line per page and finds all boxes."""
        *table, broken, summary = pages.run_demo("--pages", "9").splitlines()
        found = re.fullmatch(r"(\d+) digits: (\d+) boxes and (\d+) labels right \(\d+\.\d%\)", summary)
        assert found is not None
        total, boxes, labels = map(int, found.groups())
        assert len(table) == 1 + 9
        assert sum(int(line.split()[1]) for line in table[1:]) == total == boxes
        assert labels >= 0.9 * total
        assert broken.startswith("static: job ")


class TestEnsemble:
    def test_two_models_at_the_same_time_beat_the_worse_one(self, ensemble: Example) -> None:
        """The joined answer is right for more than 95 %; processes of their own served the branches, together."""
        from examples.ensemble.demo import busy_together
        from examples.ensemble.stages import split_digits

        _, _, images, digits = split_digits()

        def answers() -> list[dict[str, Any]]:
            return list(ensemble.relay.map("ensemble", ({"image": image} for image in images)))

        results = answers()
        right = {name: np.mean([r[name] for r in results] == digits) for name in ("digit", "neighbours", "network")}
        assert right["digit"] > 0.95
        assert right["digit"] >= min(right["neighbours"], right["network"])
        assert any(r["neighbours"] != r["network"] for r in results)
        serving = {w.node.rpartition("/")[2]: w.pid for w in ensemble.registry.workers()}
        assert serving["neighbours"] != serving["network"]
        # On a busy machine one round may miss it; branches that ran one after the other would never show it.
        wait_until(lambda: busy_together(np.array([r["ran"] for r in answers()])) > 0)

    def test_the_demo_prints_how_often_each_is_right(self, ensemble: Example) -> None:
        """A line for each model, one for both."""
        lines = ensemble.run_demo().splitlines()
        shares = {line.split()[0]: float(line.split()[1].rstrip("%")) for line in lines[:3]}
        assert set(shares) == {"neighbours", "network", "both"}
        assert min(shares.values()) > 95
        assert lines[3].startswith("both models were at work at the same time for ")

    def test_time_together_is_what_both_intervals_share(self) -> None:
        """Rows of one batch count once; intervals that do not meet count nothing."""
        from examples.ensemble.demo import busy_together

        first, second = [[0.0, 2.0], [1.0, 4.0]], [[2.0, 3.0], [5.0, 6.0]]
        assert busy_together(np.array([first, first])) == 1.0
        assert busy_together(np.array([first, second])) == 2.0
        assert busy_together(np.array([second])) == 0.0


@dataclass
class WebApp:
    """The web app in a process of its own, and its workers."""

    http: httpx.Client
    example: Example

    def classify(self, image: bytes) -> httpx.Response:
        return self.http.post("/classify", files={"image": image})

    def waiting(self) -> int:
        """Jobs that no worker has taken up."""
        loads = self.example.registry.loads()
        return sum(rows for name, rows in loads.items() if name.endswith("/decode.ready_rows"))


@pytest.fixture(scope="module")
def app(server: PrivateServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebApp]:
    import httpx

    log = tmp_path_factory.mktemp("webapp") / "uvicorn.log"
    command = [sys.executable, "-m", "uvicorn", "examples.webapp.app:app", "--port", "0"]
    with serving(server, "webapp", "digits") as example, log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=example.env, stdout=out, stderr=out)
        try:
            wait_until(lambda: "Uvicorn running on" in log.read_text(), 30)
            url = re.findall(r"running on (\S+)", log.read_text())[0]
            with httpx.Client(base_url=url, timeout=20) as http:
                yield WebApp(http, example)
            process.terminate()
            process.wait(20)
            assert "Application shutdown complete" in log.read_text()
            assert "Traceback" not in log.read_text()
        finally:
            process.kill()
            process.wait()


def png(image: np.ndarray) -> bytes:
    """A digit as somebody would upload it: 8 x 8 with ink from 0 to 16, enlarged, dark on light, with a margin."""
    from PIL import Image, ImageOps

    ink = Image.fromarray((255 - 15 * image).astype(np.uint8)).resize((96, 96), Image.Resampling.BICUBIC)
    file = BytesIO()
    ImageOps.expand(ink, 16, 255).save(file, "PNG")
    return file.getvalue()


class TestWebApp:
    def test_the_image_of_the_readme_is_a_seven(self, app: WebApp) -> None:
        """The README's third command prints what it says."""
        answer = app.classify((EXAMPLES / "webapp" / "seven.png").read_bytes())
        assert answer.status_code == 200
        assert answer.json() == {"label": 7, "score": pytest.approx(0.9, abs=0.1)}

    def test_images_that_the_model_has_not_seen(self, app: WebApp) -> None:
        """Of 64 uploads from eight clients at once 9 in 10 get the right label."""
        from examples.webapp.stages import split_digits

        _, _, images, digits = split_digits()
        with ThreadPoolExecutor(8) as pool:
            answers = [a.json() for a in pool.map(app.classify, map(png, images[:64]))]
        assert np.mean([a["label"] == d for a, d in zip(answers, digits, strict=False)]) >= 0.9
        assert all(0.1 < a["score"] <= 1 for a in answers)

    @pytest.mark.parametrize("image", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + b"\0" * 50], ids=["", "text", "broken"])
    def test_what_is_no_image_is_refused_with_the_stages_reason(self, app: WebApp, image: bytes) -> None:
        """422, and the words of `batch.reject`."""
        answer = app.classify(image)
        assert answer.status_code == 422
        assert answer.json() == {"detail": "this is no PNG, JPEG or WebP image, or a broken one"}

    def test_an_image_of_too_many_pixels_is_not_decoded(self, app: WebApp) -> None:
        """A small file that would unpack into 25 million pixels is refused by its size."""
        from PIL import Image

        file = BytesIO()
        Image.new("1", (5000, 5000)).save(file, "PNG")
        answer = app.classify(file.getvalue())
        assert (answer.status_code, "5000 x 5000" in answer.text) == (422, True)
        assert app.classify(b"\0" * ((8 << 20) + 1)).status_code == 413

    def test_the_deadline_passes(self, app: WebApp) -> None:
        """504 when nobody takes the job up in time."""
        with app.example.paused(drop=True):
            answer = app.classify(png(np.eye(8) * 16))
        assert (answer.status_code, answer.json()) == (504, {"detail": "no answer within 2 s"})

    def test_a_full_queue_sends_clients_away(self, app: WebApp) -> None:
        """503, and when to come back; afterwards there is room again."""
        image = png(np.eye(8) * 16)
        with app.example.paused(drop=True):
            with pytest.raises(QueueFull):
                app.example.relay.submit_many("digits", [{"image": image}] * 1000)
            answer = app.classify(image)
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert app.classify(image).status_code == 200

    def test_a_client_that_goes_away_takes_its_job_along(self, app: WebApp) -> None:
        """The job of a request whose connection closes before the answer is cancelled on the server."""
        request = app.http.build_request("POST", "/classify", files={"image": png(np.eye(8) * 16)})
        body = request.read()
        connection = HTTPConnection(request.url.host, request.url.port)
        with app.example.paused(drop=True):
            connection.request("POST", "/classify", body, {**request.headers, "Idempotency-Key": "gone"})
            wait_until(lambda: app.waiting() == 1)
            # The same key and content: the request's own job, not another one.
            job = app.example.relay.submit("digits", {"image": png(np.eye(8) * 16)}, key="gone")
            assert (job.status(), app.waiting()) == ("waiting", 1)
            connection.close()
            wait_until(lambda: job.status() != "waiting")
            assert job.status() == "cancelled"
            assert app.waiting() == 0
