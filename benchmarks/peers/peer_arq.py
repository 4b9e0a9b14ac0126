"""arq as a peer: one Worker in burst mode on one event loop.

arq stores results by default (a string per result, kept an hour); --no-results sets keep_result=0. Its defaults start
at most 100 jobs per poll of half a second (about 200 jobs/s); here queue_read_limit and poll_delay are set so that it
never idles. max_jobs of 10 to 100 measured alike within noise. arq has no bulk enqueue: many
`enqueue_job` calls are gathered, on CONNECTIONS connections at once: 20 to 256 measured alike, fewer slower.
Jobs overlap, so the clock ends where arq calls `after_job_end`: when the last result has been stored.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from arq.connections import ArqRedis, RedisSettings, create_pool
from arq.worker import Worker, func
from peer_common import CLOCK, noop, parse, payload, report, report_drain, require_results

MAX_JOBS = 100
CONNECTIONS = 64
QUEUE_READ_LIMIT = 5000
POLL_DELAY_S = 0.001


async def arq_noop(ctx: dict[str, Any], body: str) -> int | None:
    """The same no-op behind arq's calling convention."""
    return noop(body)


async def send(pool: ArqRedis, count: int, body: str) -> None:
    """Enqueue `count` jobs from CONNECTIONS coroutines, each of which waits for its own replies."""

    async def some(n: int) -> None:
        for _ in range(n):
            await pool.enqueue_job("noop", body)

    share, rest = divmod(count, CONNECTIONS)
    await asyncio.gather(*(some(share + (i < rest)) for i in range(CONNECTIONS)))


async def enqueue(settings: RedisSettings, jobs: int, batch: int, body: str) -> float:
    """Seconds to enqueue `jobs` jobs in one gather, after one untimed batch that opens the connections."""
    pool = await create_pool(settings)
    if batch:
        await send(pool, batch, body)
    start_s = time.perf_counter()
    await send(pool, jobs, body)
    seconds = time.perf_counter() - start_s
    await pool.aclose()
    return seconds


def main() -> None:
    args = parse("arq")
    settings = RedisSettings.from_dsn(args.url)
    body = payload(args.size)
    max_jobs = args.threads or MAX_JOBS
    if args.mode == "enqueue":
        seconds = asyncio.run(enqueue(settings, args.jobs, args.batch, body))
        report("arq", args, seconds, args.jobs, f"enqueue_job, {CONNECTIONS} at once")
        return
    asyncio.run(enqueue(settings, args.jobs, 0, body))
    asyncio.set_event_loop(asyncio.new_event_loop())
    ended = 0

    async def after_job_end(ctx: dict[str, Any]) -> None:
        nonlocal ended
        ended += 1
        if ended == args.jobs:
            CLOCK.last_s = time.perf_counter()

    CLOCK.arm(args.jobs, args.results)
    worker = Worker(
        [func(arq_noop, name="noop")],
        redis_settings=settings,
        burst=True,
        max_jobs=max_jobs,
        queue_read_limit=QUEUE_READ_LIMIT,
        poll_delay=POLL_DELAY_S,
        keep_result=3600 if args.results else 0,
        after_job_end=after_job_end,
    )
    worker.run()
    if args.results:
        require_results(args.url, "arq:result:*", args.jobs)
    report_drain("arq", args, f"burst, max_jobs {max_jobs}, queue_read_limit {QUEUE_READ_LIMIT}")


if __name__ == "__main__":
    main()
