"""A web API over a pipeline: an image comes in, its label goes out, or a status that says why not.

Run it with `uvicorn examples.webapp.app:app`; the workers run elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Header, HTTPException, Request, UploadFile
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from torchrelay import AsyncRelay
from torchrelay.errors import BrokerError, DeadlineExceeded, JobFailed, QueueFull, TorchrelayError

T = TypeVar("T")

PIPELINE = Path(__file__).with_name("pipeline.yaml")
DEADLINE_S = 2.0
MAX_BYTES = 8 << 20


class Answer(BaseModel):
    label: int
    score: float


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with AsyncRelay() as relay:  # $TORCHRELAY_REDIS_URL, or the server that `torchrelay up` started here
        await relay.register(PIPELINE)
        app.state.relay = relay
        yield


app = FastAPI(title="Digits", lifespan=lifespan)


@app.post("/classify")
async def classify(
    request: Request, image: UploadFile, idempotency_key: Annotated[str | None, Header()] = None
) -> Answer:
    """Says which digit an image shows. With an `Idempotency-Key`, a request sent again is not computed again."""
    if image.size is None or image.size > MAX_BYTES:
        raise HTTPException(413, f"the image is larger than {MAX_BYTES >> 20} MiB")
    relay: AsyncRelay = request.app.state.relay
    row = {"image": await image.read()}
    call = relay.infer("digits", row, key=idempotency_key, deadline_s=DEADLINE_S)
    return Answer(**await while_connected(request, call))


async def while_connected(request: Request, call: Coroutine[Any, Any, T]) -> T:
    """The result of `call`, which is cancelled when the client goes away: cancelling `infer` cancels its job."""
    task = asyncio.create_task(call)
    watch = asyncio.create_task(cancel_when_gone(request, task))
    try:
        return await task
    except asyncio.CancelledError:
        if not watch.done():
            raise
        raise HTTPException(499, "the client closed the connection") from None
    finally:
        watch.cancel()


async def cancel_when_gone(request: Request, task: asyncio.Task[Any]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    task.cancel()


@app.exception_handler(TorchrelayError)
async def refuse(request: Request, error: TorchrelayError) -> JSONResponse:
    match error:
        case JobFailed(error_type="Rejected"):  # batch.reject in a stage: the image's fault
            return JSONResponse({"detail": error.message}, 422)
        case DeadlineExceeded():
            return JSONResponse({"detail": f"no answer within {DEADLINE_S:g} s"}, 504)
        case QueueFull() | BrokerError():
            return JSONResponse({"detail": "no room right now"}, 503, {"Retry-After": "1"})
    raise error
