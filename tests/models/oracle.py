"""transformers' PyTorch Qwen2.5-VL with random weights beside ours, and prompts that both read."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import jax
import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from ares_jax.checkpoints import load_hf
from ares_jax.models.qwen2_5_vl import VisionInputs
from ares_jax.params import to_flat, with_params
from data_pipeline.mrope import mrope_positions
from data_pipeline.packing import Segment, pack

IMAGE, VIDEO, START, END = 60, 61, 62, 63
VOCAB = 64
TOKENS_PER_SECOND = 4


@dataclass(frozen=True)
class Shape:
    """What varies between the small configurations: the ratios of the real ones."""

    tied: bool = True
    heads: int = 4
    kv_heads: int = 2
    mrope_section: tuple[int, int, int] = (2, 3, 3)
    vision_layers: int = 3
    full_attention_layers: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Example:
    """A prompt of T tokens; `seconds` is the time between two grids of a video, 0 for an image."""

    tokens: np.ndarray
    patches: np.ndarray
    grids: np.ndarray
    seconds: np.ndarray

    def with_response(self, tokens) -> "Example":
        return Example(np.concatenate([self.tokens, tokens]), self.patches, self.grids, self.seconds)

    def segment(self, **extras) -> Segment:
        positions, _ = self.positions()
        return Segment(self.tokens.astype(np.int32), positions, self.patches, self.grids, extras)

    def positions(self):
        return mrope_positions(
            self.tokens, self.grids, image_token_id=IMAGE, video_token_id=VIDEO, seconds_per_grid=self.seconds,
            tokens_per_second=TOKENS_PER_SECOND,
        )  # fmt: skip

    def for_torch(self) -> dict[str, torch.Tensor]:
        """The keyword arguments of transformers' model: images and videos apart."""
        counts = self.grids.prod(axis=1)
        is_video = self.seconds > 0
        of_video = np.repeat(is_video, counts)
        kinds = (self.tokens == IMAGE) + 2 * (self.tokens == VIDEO)
        arguments = {"input_ids": self.tokens[None], "mm_token_type_ids": kinds[None]}
        if (~is_video).any():
            arguments |= {"pixel_values": self.patches[~of_video], "image_grid_thw": self.grids[~is_video]}
        if is_video.any():
            arguments |= {"pixel_values_videos": self.patches[of_video], "video_grid_thw": self.grids[is_video]}
            arguments["second_per_grid_ts"] = self.seconds[is_video]
        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arguments.items()}


def make_example(rng: np.random.Generator, *vision: tuple) -> Example:
    """Returns random text around images (frames, rows, columns) and videos (frames, rows, columns, seconds)."""
    tokens = list(rng.integers(0, 50, 5))
    for frames, rows, columns, *seconds in vision:
        block = [VIDEO if seconds else IMAGE] * (frames * rows * columns // 4)
        tokens += [START, *block, END, *rng.integers(0, 50, 4)]
    grids = np.array([v[:3] for v in vision], int).reshape(-1, 3)
    patches = rng.normal(size=(int(grids.prod(axis=1).sum()), 1176)).astype(np.float32)
    return Example(np.array(tokens), patches, grids, np.array([v[3] if len(v) > 3 else 0 for v in vision], np.float32))


SMALL, LARGE, CLIP = (1, 4, 6), (1, 12, 20), (3, 4, 10, 1.2)  # LARGE has several windows, none of full size at its edges


def examples(seed: int = 0) -> dict[str, Example]:
    """Every kind of prompt."""
    rng = np.random.default_rng(seed)
    return {
        "text": make_example(rng),
        "image": make_example(rng, LARGE),
        "images": make_example(rng, SMALL, LARGE, (1, 2, 2)),
        "video": make_example(rng, CLIP),
        "mixture": make_example(rng, (2, 4, 4, 0.3), SMALL, CLIP, (1, 6, 4)),
    }


@dataclass
class Pair:
    """The same weights twice."""

    theirs: Qwen2_5_VLForConditionalGeneration
    folder: str
    dtype: type | None = None
    _programs: dict = field(default_factory=dict)

    @cached_property
    def ours(self):
        return load_hf(self.folder, dtype=self.dtype)

    def their_logits(self, example: Example) -> np.ndarray:
        with torch.no_grad():
            return self.theirs(**example.for_torch()).logits[0].float().numpy()

    def our_logits(self, batch) -> np.ndarray:
        """Logits [B, T, V] of a packed batch, by one compiled program a shape."""
        run = self._programs.setdefault("logits", jax.jit(lambda flat, batch: logits(with_params(self.ours, flat), batch)))
        arrays = {name: batch[name] for name in _MODEL_INPUTS}
        return np.asarray(run(to_flat(self.ours), arrays).astype(np.float32))


_MODEL_INPUTS = (
    "tokens", "positions", "segment_ids", "patches", "patch_positions", "patch_window_ids", "patch_frame_ids",
)  # fmt: skip


def logits(model, batch) -> jax.Array:
    vision = VisionInputs(batch["patches"], batch["patch_positions"], batch["patch_window_ids"], batch["patch_frame_ids"])
    return model(batch["tokens"], batch["positions"], batch["segment_ids"], vision) @ model.head.T


def batch_of(chosen: Sequence[Example], *, row_tokens: int = 128, row_patches: int = 352):
    """Returns a padded batch with a row for each example."""
    rows = [pack([e.segment()], row_tokens=row_tokens, row_patches=row_patches, rows=1)[0] for e in chosen]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def torch_config(shape: Shape, *, text: dict | None = None, vision: dict | None = None) -> Qwen2_5_VLConfig:
    width = shape.heads * 16
    return Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=VOCAB, hidden_size=width, intermediate_size=96, num_hidden_layers=3,
            num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, max_position_embeddings=512,
            tie_word_embeddings=shape.tied, rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "mrope_section": list(shape.mrope_section), "rope_theta": 1e4},
        ) | (text or {}),
        vision_config=dict(
            hidden_size=32, intermediate_size=48, depth=shape.vision_layers, num_heads=2, out_hidden_size=width,
            fullatt_block_indexes=list(shape.full_attention_layers), window_size=112, tokens_per_second=TOKENS_PER_SECOND,
        ) | (vision or {}),
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
        tie_word_embeddings=shape.tied,
    )  # fmt: skip


def make_pair(folder, shape: Shape, *, noise: float = 0.1, seed: int = 0) -> Pair:
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(torch_config(shape)).float().eval()
    with torch.no_grad():  # biases start at 0 and norms at 1: make every parameter matter
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return Pair(model, folder)
