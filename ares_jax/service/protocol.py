"""What goes over the wire: JSON, arrays as base64 of their little-endian bytes."""

import base64
import math
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ares_jax.sampling.requests import RolloutRequest, rollout_request
from ares_jax.sampling.rollout_tree import RolloutTree, Trajectory, tree_of
from ares_jax.service.chat import Message, StopStrings, image_urls
from data_pipeline.prompts import Prompt

VERSION_HEADER = "ares-policy-version"  # of an answer with rollouts: of the weights when they were asked for
_DTYPES = {"int32", "float32", "bool"}
_REQUEST_ARRAYS = {"token_ids": "int32", "patches": "float32", "grid_thw": "int32", "positions": "int32"}
_LEAF_ARRAYS = {
    "token_ids": "int32", "log_probs": "float32", "entropies": "float32", "window_means": "float32",
    "window_mask": "bool", "policy_version": "int32",
}  # fmt: skip


_GROUP_NUMBERS = ("problem_id", "prompt_tokens", "computed_tokens", "shared_tokens", "window", "first_roots")


class ArrayModel(BaseModel):
    """An array: numpy's name of the type, the shape, and the bytes in row-major order."""

    dtype: str
    shape: list[int] = Field(max_length=4)
    data: str


class _DrawModel(BaseModel):
    """How a tree is drawn: fields of `RolloutRequest`. An infinite tau_high is null. Integers fit the engine's arrays."""

    model_config = ConfigDict(allow_inf_nan=False, extra="forbid")  # nothing is drawn otherwise than was meant
    problem_id: str
    seed: int = Field(ge=0, lt=2**31)
    group_size: int = Field(ge=1, le=1024)
    max_branches_per_sequence: int = Field(ge=0, lt=2**31)
    tau_high: float | None
    branch_at: Literal["window_end", "window_start"] = "window_end"
    branch_choice: Literal["first", "highest"] = "first"
    temperature: float = Field(ge=0)
    top_p: float = Field(gt=0, le=1)
    top_k: int = Field(ge=0, lt=2**31)
    max_new_tokens: int = Field(ge=1, lt=2**31)
    stop: StopStrings = []


class GroupModel(_DrawModel):
    """`RolloutRequest` as JSON: an encoded prompt, and how to draw."""

    root_leaves: int = Field(ge=1, le=1024)
    token_ids: ArrayModel
    patches: ArrayModel
    grid_thw: ArrayModel
    positions: ArrayModel
    rope_delta: int = Field(ge=-(2**31), lt=2**31)

    @property
    def sent_bytes(self) -> int:
        """Of pixels, as they were sent."""
        return len(self.patches.data)


class _Plain(_DrawModel):
    """What is left out: one tree of 8 samples that do not branch, at temperature 1."""

    problem_id: str = "chat"
    group_size: int = Field(8, ge=1, le=1024)
    root_leaves: int | None = Field(None, ge=1, le=1024)  # null: all
    max_branches_per_sequence: int = Field(2, ge=0, lt=2**31)
    tau_high: float | None = None
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=2**31)

    def _request(self, prompt: Prompt) -> RolloutRequest:
        draw = {name: getattr(self, name) for name in _Plain.model_fields if name != "problem_id"}
        draw["tau_high"] = math.inf if self.tau_high is None else self.tau_high
        return rollout_request(replace(prompt, problem_id=self.problem_id), **draw)


class ChatGroupModel(_Plain):
    """A prompt as the messages of a chat."""

    messages: list[Message] = Field(min_length=1, max_length=4096)

    @property
    def sent_bytes(self) -> int:
        """Of images, as they were sent."""
        return sum(map(len, image_urls(self.messages)))

    def request(self, prompt: Prompt) -> RolloutRequest:
        """Returns the request of the encoded messages."""
        return self._request(prompt)


class TokenGroupModel(_Plain):
    """A prompt of text alone, as its token ids."""

    token_ids: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(min_length=1, max_length=2**20)
    sent_bytes: ClassVar[int] = 0  # of images

    def request(self) -> RolloutRequest:
        """Returns the request: text stands at one position after the other."""
        token_ids = np.array(self.token_ids, np.int32)
        positions = np.broadcast_to(np.arange(len(token_ids), dtype=np.int32), (3, len(token_ids)))
        nothing = np.zeros((0, 1176), np.float32), np.zeros((0, 3), np.int32)
        return self._request(Prompt("", "", "", "", "", (), token_ids, *nothing, positions, 0))


class RolloutsModel(BaseModel):
    """Body of `POST /v1/rollouts`."""

    model_config = ConfigDict(extra="forbid")
    groups: list[GroupModel | TokenGroupModel | ChatGroupModel] = Field(min_length=1, max_length=4096)


def encode_array(array: np.ndarray) -> dict[str, Any]:
    """Returns the JSON form of an array."""
    array = np.ascontiguousarray(array)
    data = base64.b64encode(array.tobytes()).decode()
    return {"dtype": array.dtype.name, "shape": list(array.shape), "data": data}


def decode_array(value: dict[str, Any], dtype: str) -> np.ndarray:
    """Returns the array of its JSON form. Raises `ValueError` if type, shape and bytes do not agree."""
    if value["dtype"] != dtype or dtype not in _DTYPES:
        raise ValueError(f"array of {value['dtype']}, expected {dtype}")
    data = base64.b64decode(value["data"], validate=True)
    shape = tuple(value["shape"])
    if min(shape, default=0) < 0 or math.prod(shape) * np.dtype(dtype).itemsize != len(data):
        raise ValueError(f"array of shape {list(shape)} and type {dtype} does not hold {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(shape)


def encode_request(request: RolloutRequest) -> dict[str, Any]:
    """Returns the JSON form of a request."""
    plain = {name: value for name, value in vars(request).items() if name not in _REQUEST_ARRAYS}
    plain["tau_high"] = request.tau_high if math.isfinite(request.tau_high) else None
    arrays = {name: encode_array(np.asarray(getattr(request, name), dtype)) for name, dtype in _REQUEST_ARRAYS.items()}
    return {**plain, **arrays}


def decode_request(model: GroupModel) -> RolloutRequest:
    """Returns the request of its JSON form. Raises `ValueError` naming the field whose array is wrong."""
    value = model.model_dump()
    for name, dtype in _REQUEST_ARRAYS.items():
        try:
            value[name] = decode_array(value[name], dtype)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    tokens, patches, images = (
        value[name].shape[0] if value[name].ndim else -1 for name in ("token_ids", "patches", "grid_thw")
    )
    expected = {"token_ids": (tokens,), "positions": (3, tokens), "patches": (patches, 1176), "grid_thw": (images, 3)}
    for name, shape in expected.items():
        if value[name].shape != shape or tokens < 1:
            raise ValueError(f"{name} has shape {list(value[name].shape)}, expected {list(shape)}")
    grid = value["grid_thw"]  # the processor merges 2 x 2 patches
    if (grid < 1).any() or (grid[:, 1:] % 2).any():
        raise ValueError(f"grid_thw {grid[:8].tolist()}: sides must be positive, height and width even")
    if (grid > patches).any() or int(grid.prod(axis=1, dtype=np.int64).sum()) != patches:
        raise ValueError(f"grid_thw counts other than the {patches} patches given")
    value["tau_high"] = math.inf if value["tau_high"] is None else value["tau_high"]
    return RolloutRequest(**{**value, "stop": tuple(model.stop)})


def encode_group(group: RolloutTree) -> dict[str, Any]:
    """Returns the JSON form of a finished group."""
    leaves = [{**vars(leaf), **{name: encode_array(getattr(leaf, name)) for name in _LEAF_ARRAYS}} for leaf in group.leaves]
    return {**{name: getattr(group, name) for name in _GROUP_NUMBERS}, "leaves": leaves}


def decode_group(value: dict[str, Any]) -> RolloutTree:
    """Returns the group of its JSON form."""
    leaves = [
        Trajectory(**{**leaf, **{name: decode_array(leaf[name], dtype) for name, dtype in _LEAF_ARRAYS.items()}})
        for leaf in value["leaves"]
    ]
    numbers = {name: value[name] for name in ("prompt_tokens", "window", "first_roots")}
    return tree_of(value["problem_id"], leaves, **numbers)
