"""rq as a peer: SimpleWorker in burst mode, which runs jobs in its own process without a fork.

The default Worker forks for each job, which this one is spared. rq stores results by default (a stream per job,
kept 500 s); --no-results passes result_ttl=0. Logging is at WARNING, since a line per job would be timed too.
"""

from __future__ import annotations

import logging

import redis
from peer_common import CLOCK, noop, parse, payload, report, report_drain, require_results, timed_batches
from rq import Queue, SimpleWorker


def main() -> None:
    args = parse("rq")
    logging.getLogger("rq").setLevel(logging.WARNING)
    connection = redis.Redis.from_url(args.url)
    queue = Queue("bench", connection=connection)
    body = payload(args.size)
    result_ttl = None if args.results else 0

    def send(count: int) -> None:
        # enqueue_many puts all jobs of one call into one pipeline.
        queue.enqueue_many([Queue.prepare_data(noop, (body,), result_ttl=result_ttl) for _ in range(count)])

    if args.mode == "enqueue":
        seconds = timed_batches(args.jobs, args.batch, send)
        report("rq", args, seconds, args.jobs, f"enqueue_many, {args.batch} jobs a pipeline")
        return
    for left in range(args.jobs, 0, -args.batch):
        send(min(args.batch, left))
    CLOCK.arm(args.jobs, args.results)
    SimpleWorker([queue], connection=connection).work(burst=True, logging_level="WARNING")
    if args.results:
        require_results(args.url, "rq:results:*", args.jobs)
    report_drain("rq", args, "SimpleWorker, burst, no fork")


if __name__ == "__main__":
    main()
