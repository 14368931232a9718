"""`/v1/weights`: the sampler's weights, pushed as a request's body, read from an allowed folder, or fetched from the caller.
Whole or not at all."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from etils import epath
from fastapi import APIRouter, HTTPException, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from ares_jax.errors import UserError
from ares_jax.params import check_flat
from ares_jax.service import transfer, weight_files
from ares_jax.service.worker import ConflictError, Worker

InFlight = Literal["continue", "finish"]
_FETCHED_IN = 300.0  # seconds that a caller's arrays may take
_SAFETENSORS = {
    "requestBody": {
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}, "required": True
    }
}  # fmt: skip


class WeightsModel(BaseModel):
    """Body of `POST /v1/weights`: where to read them.

    `in_flight`: requests that were begun "continue" with the new weights (each token says which drew it), or "finish" with
    the old ones, and until they have, nothing else is begun. `force`: a lower version than the present one is taken too.
    """

    model_config = ConfigDict(extra="forbid")
    uri: str = Field(max_length=4096)
    version: int = Field(ge=0, lt=2**31)
    in_flight: InFlight = "continue"
    force: bool = False


class TensorModel(BaseModel):
    """An array that a caller offers."""

    model_config = ConfigDict(extra="forbid")
    dtype: Literal["float32", "bfloat16", "float16"]
    shape: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(max_length=8)


class OfferModel(BaseModel):
    """Body of `POST /v1/weights`: what JAX's transfer server offers at the address that the request comes from."""

    model_config = ConfigDict(extra="forbid")
    port: int = Field(ge=1, lt=2**16)
    number: int = Field(ge=0, lt=2**62)
    tensors: dict[str, TensorModel] = Field(max_length=10_000)
    version: int = Field(ge=0, lt=2**31)
    in_flight: InFlight = "continue"
    force: bool = False

    def specs(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct(tuple(t.shape), jnp.dtype(t.dtype)) for name, t in self.tensors.items()}


def weight_router(
    worker: Worker, *, roots: Sequence[Path | epath.Path] = (), shared_folder: Path | None = None, transfers: bool = False
) -> APIRouter:
    """Returns the endpoint. Weights are read below `roots` and `shared_folder`, which lies in this machine's memory.

    `transfers`: they may be fetched from callers, by `ares_jax.service.transfer`.
    """
    router = APIRouter()
    allowed = [*roots, *([shared_folder] if shared_folder else [])]
    one_at_a_time = asyncio.Lock()  # each takes the memory of a model
    coming: list[int] = []  # versions on their way, that one first which is taken next

    async def take(make: Callable[[], dict[str, Any]], version: int, in_flight: InFlight, force: bool) -> dict[str, int]:
        coming.append(version)
        try:
            async with one_at_a_time:
                flat = await asyncio.to_thread(make)
                loaded = worker.load_weights(flat, version, finish=in_flight == "finish", force=force)
                await asyncio.wrap_future(loaded)
        except UserError as error:
            status = 409 if isinstance(error, ConflictError) else 422
            raise HTTPException(status, str(error).encode(errors="backslashreplace").decode()) from None
        except PermissionError as error:
            raise HTTPException(403, str(error).encode(errors="backslashreplace").decode()) from None
        except transfer.TransferError as error:
            raise HTTPException(transfer.FAILED, str(error).encode(errors="backslashreplace").decode()) from None
        except RuntimeError as error:  # the engine has failed, or the sampler is stopping
            raise HTTPException(503, str(error)) from None
        finally:
            coming.remove(version)
        return {"policy_version": version}

    @router.get("/v1/weights")
    async def present():
        """The version, versions that are on their way, a folder through which a process on this machine hands over weights
        without sending them, and whether those of others are fetched."""
        folder = shared_folder and str(shared_folder)
        present = {"policy_version": worker.policy_version, "coming": coming}
        return {**present, "shared_folder": folder, "transfers": transfers}

    @router.put("/v1/weights", openapi_extra=_SAFETENSORS)
    async def push(
        version: Annotated[int, Query(ge=0, lt=2**31)], request: Request, in_flight: InFlight = "continue",
        force: bool = False,
    ):  # fmt: skip
        """The body is a safetensors file."""
        body = await request.body()
        return await take(lambda: weight_files.from_bytes(body), version, in_flight, force)

    @router.post("/v1/weights")
    async def load(wanted: WeightsModel | OfferModel, request: Request):
        def read(uri: str) -> dict[str, Any]:
            return weight_files.read(weight_files.find(uri, allowed), worker.weight_specs())

        def fetch(offer: OfferModel) -> dict[str, Any]:
            if not transfers or not request.client:
                raise PermissionError("weights are not fetched here: start the sampler with --config.sampler.transfers=True")
            check_flat(worker.weight_specs(), specs := offer.specs())
            # Only from whoever asks for it: no address that a client gives is ever connected to.
            peer, local = request.client.host, request.scope["server"][0]
            return transfer.fetch(specs, offer.number, peer=peer, port=offer.port, local=local, seconds=_FETCHED_IN)

        make = partial(read, wanted.uri) if isinstance(wanted, WeightsModel) else partial(fetch, wanted)
        return await take(make, wanted.version, wanted.in_flight, wanted.force)

    return router
