"""celery as a peer: one worker process with `-P solo`: jobs run in the process that fetches them, with no hand-over.

Gossip, mingle, heartbeat and events are off, as celery's own tuning guide advises where they are not used.
A user who wants results sets `result_backend`, as here (a string per result, kept a day); --no-results sets
`task_ignore_result`. While enqueuing, the results backend is left out of the producer's app: the worker stores the
results all the same, and the producer is spared one SUBSCRIBE per job, so this is celery's faster form.
celery has no bulk enqueue: a group too publishes each task by itself. One pooled producer serves the whole loop.
"""

from __future__ import annotations

from celery import Celery
from celery.worker import state
from peer_common import CLOCK, noop, parse, payload, report, report_drain, require_results, timed_batches

PREFETCH = 128


def make_app(url: str, results: bool, backend: bool) -> Celery:
    """An app on `url`; `backend` says whether this side reads or writes results."""
    # kombu and celery spell a Unix socket in their own way.
    broker = "redis+socket://" + url.removeprefix("unix://") if url.startswith("unix://") else url
    app = Celery("bench", broker=broker, backend=broker if backend and results else None)
    app.conf.update(
        task_ignore_result=not results,
        task_default_queue="bench",
        worker_prefetch_multiplier=PREFETCH,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
    )
    return app


def main() -> None:
    args = parse("celery")
    body = (payload(args.size),)
    producer_app = make_app(args.url, args.results, backend=False)
    task = producer_app.task(noop, name="noop")
    with producer_app.producer_pool.acquire(block=True) as producer:

        def send(count: int) -> None:
            for _ in range(count):
                task.apply_async(body, producer=producer)

        if args.mode == "enqueue":
            seconds = timed_batches(args.jobs, args.batch, send)
            report("celery", args, seconds, args.jobs, "apply_async in a loop, one pooled producer")
            return
        send(args.jobs)

    def stop() -> None:
        # Read by the worker's loop after the task in hand; setting it is what SIGTERM's handler does.
        state.should_stop = 0

    CLOCK.arm(args.jobs, args.results, stop)
    worker_app = make_app(args.url, args.results, backend=True)
    worker_app.task(noop, name="noop")
    argv = ["--quiet", "worker", "--pool=solo", "--concurrency=1", "--loglevel=WARNING", "--without-gossip"]
    try:
        worker_app.worker_main([*argv, "--without-mingle", "--without-heartbeat", "--queues=bench"])
    except SystemExit as end:  # the command line ends by SystemExit(0) after a clean stop
        if end.code:
            raise
    if args.results:
        require_results(args.url, "celery-task-meta-*", args.jobs)
    report_drain("celery", args, f"-P solo, prefetch {PREFETCH}")


if __name__ == "__main__":
    main()
