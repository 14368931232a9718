"""What prompts are padded to, and how many go together."""

import pytest

from ares_jax.errors import UserError
from ares_jax.sampling import EngineOptions
from ares_jax.sampling.shapes import prompt_sizes, prompts_together


def test_prompts_are_padded_to_whole_pages_and_whole_chunks():
    assert prompt_sizes(64, 8, 0) == prompt_sizes(64, 8, 16) == prompt_sizes(64, 8, 64) == (8, 16, 32, 48, 64)
    assert prompt_sizes(64, 8, 24) == (8, 16, 48, 72)
    assert [prompts_together(size, 16, 4) for size in (8, 16, 32)] == [4, 4, 1]
    assert prompts_together(32, 0, 4) == 4


@pytest.mark.parametrize("name, good", [("kernel", "tpu"), ("paged_attention", "gather")])
def test_kernels_have_names(name, good):
    sizes = dict(max_prompt_tokens=64, max_prompt_patches=48, max_context_tokens=128, prefill_batch=4, decode_steps=5)
    options = dict(max_slots=4, page_size=8, num_pages=99, window=3, **sizes)
    assert getattr(EngineOptions(**options, **{name: good}), name) == good
    with pytest.raises(UserError, match=f"sampler.{name}='cuda': give .*'{good}'.* or '' for the default"):
        EngineOptions(**options, **{name: "cuda"})


@pytest.mark.parametrize("chunk, fits", [(0, True), (16, True), (100, True), (12, False), (-8, False)])
def test_a_chunk_is_whole_pages(chunk, fits):
    sizes = dict(max_prompt_tokens=64, max_prompt_patches=48, max_context_tokens=128, prefill_batch=4, decode_steps=5)
    options = dict(max_slots=4, page_size=8, num_pages=99, window=3, prefill_chunk=chunk, **sizes)
    if fits:
        assert EngineOptions(**options).prefill_chunk == chunk
        return
    with pytest.raises(UserError, match=f"sampler.prefill_chunk={chunk}: make it a multiple of page_size 8"):
        EngineOptions(**options)
