"""The engine's sizes, and the requests that can never fit into them."""

import math
from dataclasses import dataclass

from ml_collections import ConfigDict

from ares_jax.errors import UserError
from ares_jax.models.qwen2_5_vl import Qwen25VLConfig
from ares_jax.models.qwen2_5_vl.paged import PAGED_ATTENTION
from ares_jax.sampling.branching import BRANCH_AT, BRANCH_CHOICES
from ares_jax.sampling.requests import RolloutRequest
from data_pipeline.errors import DataError
from data_pipeline.placeholders import grid_sizes, vision_spans
from kernels.implementations import IMPLEMENTATIONS

LOWEST_TEMPERATURE = 1e-4  # but for 0: logits divided by less may overflow


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of the engine: all shapes that are ever compiled follow from them."""

    max_slots: int  # leaves decoded together
    page_size: int  # tokens
    num_pages: int
    max_prompt_tokens: int
    max_prompt_patches: int
    max_context_tokens: int  # prompt and response
    prefill_batch: int
    decode_steps: int  # tokens between two looks of the host
    window: int  # tokens of an entropy window
    kernel: str = ""  # implementation of the sampling kernels; "": their own choice (`kernels.implementations`)
    paged_attention: str = ""  # "ragged", "triton" or "gather"; "": see `paged.paged_implementation`
    prefill_layers: int = 16  # run between two decode calls
    prefill_chunk: int = 0  # tokens of a longer prompt that the decoder runs between two decode calls; 0: all
    one_shape: bool = False  # of all decode calls, and a prompt a prefill: bits do not depend on what else is drawn

    def __post_init__(self):
        if self.max_prompt_tokens % self.page_size:
            raise UserError(
                f"sampler.max_prompt_tokens={self.max_prompt_tokens}: make it a multiple of page_size {self.page_size}"
            )
        if self.prefill_layers < 1:
            raise UserError(f"sampler.prefill_layers={self.prefill_layers}: give at least 1")
        for name, value, possible in (
            ("kernel", self.kernel, IMPLEMENTATIONS),
            ("paged_attention", self.paged_attention, PAGED_ATTENTION),
        ):
            if value not in ("", *possible):
                raise UserError(f"sampler.{name}={value!r}: give {', '.join(map(repr, possible))}, or '' for the default")
        if self.prefill_chunk < 0 or self.prefill_chunk < self.max_prompt_tokens and self.prefill_chunk % self.page_size:
            raise UserError(
                f"sampler.prefill_chunk={self.prefill_chunk}: make it a multiple of page_size {self.page_size}, or 0 (off)"
            )

    def room(self, prompt_tokens: int, leaves: int) -> int:
        """Returns the most tokens that each of `leaves` may draw after such a prompt; below 1 there is no room."""
        own = (self.num_pages - 1 - self.pages(prompt_tokens)) // leaves
        return min(self.max_context_tokens, (own + self._shared(prompt_tokens)) * self.page_size) - prompt_tokens

    def group_pages(self, prompt_tokens: int, leaves: int, new_tokens: int) -> int:
        """Returns the pages of a prompt and of so many root leaves: all share those that the prompt fills.

        The token that a leaf feeds again is its own to write: its page is not one of them.
        """
        own = self.pages(prompt_tokens + new_tokens) - self._shared(prompt_tokens)
        return self.pages(prompt_tokens) + leaves * own

    def _shared(self, prompt_tokens: int) -> int:
        return (prompt_tokens - 1) // self.page_size

    def pages(self, tokens: int) -> int:
        """Returns how many pages hold so many tokens."""
        return -(-tokens // self.page_size)


def engine_options(config: ConfigDict) -> EngineOptions:
    """Returns the sizes that a config asks for. Raises `UserError` for those that cannot be."""
    s = config.sampler
    return EngineOptions(
        max_slots=s.slots, page_size=s.page_size, num_pages=s.pages, max_prompt_tokens=s.max_prompt_tokens,
        max_prompt_patches=s.max_prompt_patches, max_context_tokens=s.max_prompt_tokens + s.max_response_tokens,
        prefill_batch=s.prefill_batch, decode_steps=s.decode_steps, window=config.aepo.window,
        kernel=s.kernel, paged_attention=s.paged_attention, prefill_layers=s.prefill_layers,
        prefill_chunk=s.prefill_chunk, one_shape=s.one_shape,
    )  # fmt: skip


def check_request(request: RolloutRequest, options: EngineOptions, model: Qwen25VLConfig) -> None:
    """Raises `UserError` if a request can never fit, or its image tokens and image features do not match."""
    o, tokens = options, len(request.token_ids)
    context = tokens + request.max_new_tokens
    limits = [
        ("prompt tokens", tokens, o.max_prompt_tokens, "sampler.max_prompt_tokens"),
        ("image patches", len(request.patches), o.max_prompt_patches, "sampler.max_prompt_patches"),
        ("prompt and response tokens", context, o.max_context_tokens, "sampler.max_response_tokens"),
    ]
    pages = o.group_pages(tokens, request.group_size, request.max_new_tokens)  # a branch shares more, a top-up does not
    limits.append(("cache pages", pages, o.num_pages - 1, "sampler.pages"))
    for what, value, limit, setting in limits:
        if value > limit:
            raise UserError(f"problem {request.problem_id}: {value} {what}, the limit is {limit}; raise {setting}")
    if min(tokens, request.max_new_tokens) < 1 or not 1 <= request.root_leaves <= request.group_size:
        raise UserError(
            f"problem {request.problem_id}: {tokens} prompt tokens, max_new_tokens={request.max_new_tokens}, "
            f"group_size={request.group_size}, root_leaves={request.root_leaves}; need a prompt, a token to draw and "
            "1 <= root_leaves <= group_size"
        )
    for name, choices in (("branch_at", BRANCH_AT), ("branch_choice", BRANCH_CHOICES)):
        if getattr(request, name) not in choices:
            raise UserError(
                f"problem {request.problem_id}: {name}={getattr(request, name)!r} is not one of {', '.join(choices)}"
            )
    if not (request.temperature == 0 or LOWEST_TEMPERATURE <= request.temperature < math.inf):
        raise UserError(
            f"problem {request.problem_id}: temperature={request.temperature:g}; take 0 (the most likely token) or at least "
            f"{LOWEST_TEMPERATURE:g}"
        )
    if not (0 <= request.top_p <= 1 and request.top_k >= 0 and request.tau_high == request.tau_high):
        raise UserError(
            f"problem {request.problem_id}: top_p={request.top_p:g}, top_k={request.top_k}, tau_high={request.tau_high:g}; "
            "need 0 <= top_p <= 1, top_k >= 0 (0: off), and a number of nats"
        )
    if not 0 <= request.token_ids.min() <= request.token_ids.max() < model.text.vocab_size:
        raise UserError(
            f"problem {request.problem_id}: token ids {request.token_ids.min()} to {request.token_ids.max()}, the model has "
            f"0 to {model.text.vocab_size - 1}; encode the prompt with its tokenizer"
        )
    if (patches := int(request.grid_thw.prod(axis=1).sum())) != len(request.patches):
        raise UserError(
            f"problem {request.problem_id}: {len(request.patches)} image patches for {grid_sizes(request.grid_thw)}, which "
            f"have {patches}; encode text and images together"
        )
    placeholders = {model.image_token_id, model.video_token_id}
    try:
        vision_spans(request.token_ids, request.grid_thw, placeholders, problem_id=request.problem_id)
    except DataError as error:
        raise UserError(str(error)) from None
