"""One prompt at a time through the engine, looked at while it answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from ares_jax.errors import UserError
from ares_jax.models.qwen2_5_vl import Qwen25VL
from ares_jax.params import with_params
from ares_jax.run.opening import Opened
from ares_jax.sampling import Engine, EngineOptions, Trajectory
from ares_jax.sampling.requests import Piece, rollout_request
from data_pipeline.prompts import Prompt

Answer = Trajectory | Piece  # complete, or as far as it is drawn
_DECODE_STEPS = 4  # tokens between two looks: few, so that the text flows


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; temperature 0 takes the most likely token always."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int  # 0: off
    answers: int


class Asker:
    """Holds an engine as large as the prompts so far needed; a larger prompt makes a larger engine, which is compiled."""

    def __init__(self, opened: Opened, sampling: Sampling, *, window: int):
        self._opened, self._sampling, self._window = opened, sampling, window
        self._model: Qwen25VL | None = None  # until it is asked
        self._engine: Engine | None = None

    def ask(self, prompt: Prompt, seed: int) -> Iterator[Sequence[Answer]]:
        """Yields the answers so far, again and again; at the last time they are complete.

        Raises:
          UserError: prompt and answer are longer than the model's positions.
        """
        s, longest = self._sampling, self._opened.run.model.config.text.max_position_embeddings
        if (size := len(prompt.token_ids) + s.max_tokens) > longest:
            raise UserError(f"{size} tokens of prompt and answer, the model has {longest} positions; lower --max_tokens")
        engine = self._engine_for(prompt)
        number = engine.submit(
            rollout_request(
                prompt, seed=seed, group_size=s.answers, max_new_tokens=s.max_tokens, temperature=s.temperature,
                top_p=s.top_p, top_k=s.top_k,
            )
        )  # fmt: skip
        try:
            while number not in (finished := dict(engine.step())):
                yield engine.drawn(number, {})
            yield finished[number].leaves
        finally:
            engine.cancel(number)  # where the caller did not wait for the end

    def _engine_for(self, prompt: Prompt) -> Engine:
        tokens, patches = _doubled(len(prompt.token_ids), 64), _doubled(len(prompt.patches), 64)
        if self._engine:
            o = self._engine.options
            tokens, patches = max(tokens, o.max_prompt_tokens), max(patches, o.max_prompt_patches)
            if (tokens, patches) == (o.max_prompt_tokens, o.max_prompt_patches):
                return self._engine
            self._engine = None  # its cache makes room
        self._engine = self._new_engine(tokens, patches)
        return self._engine

    def _new_engine(self, tokens: int, patches: int) -> Engine:
        run, s, page = self._opened.run, self._sampling, 16
        context, configured = tokens + s.max_tokens, run.config.sampler
        options = EngineOptions(
            max_slots=s.answers, page_size=page, num_pages=1 + tokens // page + s.answers * -(-context // page),
            max_prompt_tokens=tokens, max_prompt_patches=patches, max_context_tokens=context, prefill_batch=1,
            decode_steps=_DECODE_STEPS, window=self._window,
            kernel=configured.kernel, paged_attention=configured.paged_attention,
            prefill_chunk=-(-configured.prefill_chunk // page) * page,  # in pages of another size than these
        )  # fmt: skip
        if self._model is None:
            self._model = with_params(run.model, self._opened.load())
        return Engine(
            self._model, options, eos_token_ids=[run.tokenizer.eos_token_id], banned=run.banned,
            trigger_mask=run.trigger,
        )  # fmt: skip


@dataclass(frozen=True)
class Windows:
    """Where high-entropy windows start in an answer of N tokens."""

    tau: float  # nats
    high: Bool[np.ndarray, "N"]  # their mean is at least tau
    validated: Bool[np.ndarray, "N"]  # and they start with a trigger word: here AEPO would branch

    def inside(self, window: int) -> Bool[np.ndarray, "N"]:
        """Says which tokens lie in a window of so many tokens."""
        starts = np.flatnonzero(self.high)
        inside = np.zeros(len(self.high), bool)
        for offset in range(window):
            inside[starts + offset] = True
        return inside


def find_windows(leaf: Answer, trigger: Bool[np.ndarray, "V"], *, tau: float, window: int) -> Windows:
    """Returns the windows of an answer that are complete so far."""
    complete = np.arange(len(leaf.token_ids)) <= len(leaf.token_ids) - window
    high = complete & (leaf.window_means >= tau)
    return Windows(tau, high, high & trigger[leaf.token_ids])


def _doubled(value: int, smallest: int) -> int:
    size = smallest
    while size < value:
        size *= 2
    return size
