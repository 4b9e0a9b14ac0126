"""dramatiq as a peer: one process, one Worker, THREADS worker threads.

dramatiq keeps no results by default; a user who wants them adds the Results middleware, as here, with its RedisBackend
(a list per result, kept 10 minutes). --no-results leaves the middleware out. The other middleware is the default set.
dramatiq has no bulk enqueue: `group.run` too loops over `broker.enqueue`, so a plain loop is its fastest.
With several threads the last call may run while a few earlier jobs are still unacknowledged, in the peer's favour.
"""

from __future__ import annotations

import logging
import threading

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend
from peer_common import CLOCK, noop, parse, payload, report, report_drain, require_results, timed_batches

# From sweeps of 1 to 16 threads and of the prefetch: 2 to 4 threads lie within noise of each
# other, 8 and more are slower.
THREADS = 2
PREFETCH = 256


def main() -> None:
    args = parse("dramatiq")
    logging.getLogger("dramatiq").setLevel(logging.WARNING)
    threads = args.threads or THREADS
    broker = RedisBroker(url=args.url)
    if args.results:
        broker.add_middleware(Results(backend=RedisBackend(url=args.url)))
    dramatiq.set_broker(broker)
    options = {"store_results": True} if args.results else {}
    actor = dramatiq.actor(noop, broker=broker, queue_name="bench", **options)
    body = payload(args.size)

    def send(count: int) -> None:
        for _ in range(count):
            broker.enqueue(actor.message(body))

    if args.mode == "enqueue":
        seconds = timed_batches(args.jobs, args.batch, send)
        report("dramatiq", args, seconds, args.jobs, "broker.enqueue in a loop")
        return
    send(args.jobs)
    done = threading.Event()
    CLOCK.arm(args.jobs, args.results, done.set)
    worker = dramatiq.Worker(broker, worker_threads=threads, worker_timeout=100)
    # What the environment variable dramatiq_queue_prefetch sets; its default, 2 per thread, leaves threads idle.
    worker.queue_prefetch = PREFETCH
    worker.start()
    finished = done.wait(timeout=30 + args.jobs / 20)
    # Stopping waits for the jobs in hand, so the last result is stored before it is looked for.
    worker.stop()
    if finished and args.results:
        # dramatiq names a result by an MD5 in hexadecimal.
        require_results(args.url, "?" * 32, args.jobs)
    report_drain("dramatiq", args, f"one process, {threads} threads, prefetch {PREFETCH}")


if __name__ == "__main__":
    main()
