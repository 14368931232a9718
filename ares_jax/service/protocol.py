"""What goes over the wire: rollouts as frames (`frame`) between our own processes; as JSON for whoever asks for it.

In JSON arrays are base64 of their little-endian bytes.
"""

import base64
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ares_jax.sampling.requests import RolloutRequest, rollout_request
from ares_jax.sampling.rollout_tree import LEAF_ARRAYS, TOKEN_ARRAYS, RolloutTree, Trajectory, tree_of
from ares_jax.service import frame
from ares_jax.service.chat import Message, StopStrings, image_urls
from data_pipeline.pixels import Cut, PixelPatches
from data_pipeline.prompts import Prompt

VERSION_HEADER = "ares-policy-version"  # of an answer with rollouts: of the weights when they were asked for
MOST_GROUPS = 4096  # of a request
_DTYPES = {"int32", "float32", "bool"}
_REQUEST_ARRAYS = {"token_ids": "int32", "patches": "float32", "grid_thw": "int32", "positions": "int32"}
_LEAF_ARRAYS = {
    "token_ids": "int32", "log_probs": "float32", "entropies": "float32", "window_means": "float32",
    "window_mask": "bool", "policy_version": "int32",
}  # fmt: skip


_TREE_FIELDS = ("problem_id", "prompt_tokens", "window", "first_roots", "finish_reason")
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
        return self._request(Prompt("", "", "", "", "", token_ids, *nothing, positions, 0))


class PixelsModel(BaseModel):
    """What `PixelPatches` is made of, but for its arrays: `pixels`, uint8, and `table`, float32 [3, 256]."""

    model_config = ConfigDict(extra="forbid")
    cuts: list[tuple[Annotated[int, Field(ge=1, le=2**24)], Literal[1, 2]]] = Field(max_length=4096)
    values: Literal[1176]


class FramedGroupModel(_DrawModel):
    """`RolloutRequest` but for its arrays, which stand in the frame beside it."""

    root_leaves: int = Field(ge=1, le=1024)
    rope_delta: int = Field(ge=-(2**31), lt=2**31)
    pixels: PixelsModel | None = None  # null: the frame has patches


class RolloutsModel(BaseModel):
    """Body of `POST /v1/rollouts`."""

    model_config = ConfigDict(extra="forbid")
    groups: list[GroupModel | TokenGroupModel | ChatGroupModel] = Field(min_length=1, max_length=MOST_GROUPS)


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
    return _checked(value, model.stop)


def frame_requests(requests: Sequence[RolloutRequest]) -> bytes:
    """Returns requests as one frame."""
    plain: list[dict[str, Any]] = []
    arrays: dict[str, np.ndarray] = {}
    for number, request in enumerate(requests):
        own = {name: value for name, value in vars(request).items() if name not in _REQUEST_ARRAYS}
        own["tau_high"] = request.tau_high if math.isfinite(request.tau_high) else None
        plain.append(own)
        if isinstance(patches := request.patches, PixelPatches):
            own["pixels"] = {"cuts": patches.cuts, "values": patches.shape[1]}
            arrays |= {f"{number}/pixels": patches.data, f"{number}/table": patches.table}
        for name, dtype in _REQUEST_ARRAYS.items():
            if name != "patches" or "pixels" not in own:
                arrays[f"{number}/{name}"] = np.asarray(getattr(request, name), dtype)
    return frame.encode({"groups": plain}, arrays)


def unframe_requests(data: bytes) -> list[RolloutRequest]:
    """Returns the requests of a frame. Raises `ValueError` for what is none, naming the group and the field."""
    fields, arrays = frame.decode(data)
    groups = fields.get("groups")
    if not isinstance(groups, list) or not 1 <= len(groups) <= MOST_GROUPS:
        raise frame.FrameError(f"a frame of requests has 1 to {MOST_GROUPS} groups, in the field `groups`")
    requests = []
    for number, group in enumerate(groups):
        try:
            model = FramedGroupModel.model_validate(group)
            value = model.model_dump()
            del value["pixels"]
            for name, dtype in _REQUEST_ARRAYS.items():
                if name == "patches" and model.pixels is not None:
                    value[name] = _pixels(model.pixels, *(arrays.get(f"{number}/{part}") for part in ("pixels", "table")))
                    continue
                if (array := arrays.get(f"{number}/{name}")) is None or array.dtype != dtype:
                    raise ValueError(f"{name}: no array {number}/{name} of {dtype} in the frame")
                value[name] = array
            requests.append(_checked(value, model.stop))
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"groups.{number}.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        except ValueError as error:
            raise ValueError(f"groups.{number}.{error}") from None
    return requests


def _pixels(model: PixelsModel, pixels: np.ndarray | None, table: np.ndarray | None) -> PixelPatches:
    """Raises `ValueError` where the arrays are missing, or not as many bytes as the patches have."""
    if pixels is None or pixels.dtype != np.uint8 or table is None or (table.dtype, table.shape) != (np.float32, (3, 256)):
        raise ValueError("pixels: the frame needs arrays `pixels`, uint8, and `table`, float32 [3, 256], of the group")
    patches = PixelPatches(np.ascontiguousarray(pixels).reshape(-1), [Cut(*cut) for cut in model.cuts], table, model.values)
    patches.raw()
    return patches


def _checked(value: dict[str, Any], stop: Sequence[str]) -> RolloutRequest:
    tokens, patches, images = (
        value[name].shape[0] if value[name].shape else -1 for name in ("token_ids", "patches", "grid_thw")
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
    return RolloutRequest(**{**value, "stop": tuple(stop)})


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


def frame_tree(index: int, tree: RolloutTree) -> bytes:
    """Returns a finished tree, the answer to request number `index`, as a frame."""
    names = (*TOKEN_ARRAYS, *LEAF_ARRAYS)
    fields = {"index": index, **{name: getattr(tree, name) for name in _TREE_FIELDS}}
    return frame.encode(fields, {name: getattr(tree, name) for name in names})


def unframe_tree(fields: dict[str, Any], arrays: dict[str, np.ndarray]) -> tuple[int, RolloutTree]:
    """Returns what `frame_tree` was given."""
    plain: dict[str, Any] = {name: fields[name] for name in _TREE_FIELDS}
    plain["finish_reason"] = tuple(plain["finish_reason"])
    return fields["index"], RolloutTree(**plain | arrays)
