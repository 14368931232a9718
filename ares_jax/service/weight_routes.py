"""`/v1/weights`: the sampler's weights, pushed as a request's body or read from an allowed folder. Whole or not at all."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from ares_jax.errors import UserError
from ares_jax.service import weights
from ares_jax.service.worker import Worker

InFlight = Literal["continue", "finish"]
_SAFETENSORS = {
    "requestBody": {
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}, "required": True
    }
}  # fmt: skip


class WeightsModel(BaseModel):
    """Body of `POST /v1/weights`: where to read them.

    `in_flight`: requests that were begun "continue" with the new weights (each token says which drew it), or "finish" with
    the old ones, and until they have, nothing else is begun.
    """

    model_config = ConfigDict(extra="forbid")
    uri: str = Field(max_length=4096)
    version: int = Field(ge=0, lt=2**31)
    in_flight: InFlight = "continue"


def weight_router(worker: Worker, *, roots: Sequence[Path] = (), shared_folder: Path | None = None) -> APIRouter:
    """Returns the endpoint. Weights are read below `roots` and `shared_folder`, which lies in this machine's memory."""
    router = APIRouter()
    allowed = [*roots, *([shared_folder] if shared_folder else [])]
    one_at_a_time = asyncio.Lock()  # each takes the memory of a model

    async def take(make: Callable[[], dict[str, Any]], version: int, in_flight: InFlight) -> dict[str, int]:
        try:
            async with one_at_a_time:
                flat = await asyncio.to_thread(make)
                await asyncio.wrap_future(worker.load_weights(flat, version, finish=in_flight == "finish"))
        except UserError as error:
            raise HTTPException(422, str(error).encode(errors="backslashreplace").decode()) from None
        except PermissionError as error:
            raise HTTPException(403, str(error).encode(errors="backslashreplace").decode()) from None
        except RuntimeError as error:  # the engine has failed, or the sampler is stopping
            raise HTTPException(503, str(error)) from None
        return {"policy_version": version}

    @router.get("/v1/weights")
    async def present():
        """The version, and a folder through which a process on this machine hands over weights without sending them."""
        return {"policy_version": worker.policy_version, "shared_folder": shared_folder and str(shared_folder)}

    @router.put("/v1/weights", openapi_extra=_SAFETENSORS)
    async def push(version: Annotated[int, Query(ge=0, lt=2**31)], request: Request, in_flight: InFlight = "continue"):
        """The body is a safetensors file."""
        body = await request.body()
        return await take(lambda: weights.from_bytes(body), version, in_flight)

    @router.post("/v1/weights")
    async def load(wanted: WeightsModel):
        return await take(
            lambda: weights.read(weights.find(wanted.uri, allowed), worker.weight_specs()), wanted.version, wanted.in_flight
        )

    return router
