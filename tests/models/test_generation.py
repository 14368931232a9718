"""Greedy generation through the paged cache equals transformers' `generate`."""

import math

import numpy as np
import pytest
import torch

from ares_jax.errors import UserError
from ares_jax.sampling import Engine, EngineOptions, RolloutRequest
from tests.models.oracle import END, IMAGE, START, VIDEO, VOCAB, Shape, examples, make_pair

LENGTH = 64
NEVER = [IMAGE, VIDEO, START, END]


# With weights this large a greedy continuation wanders; with smaller ones it repeats a token.
NOISE = 0.3


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair") / "hf", Shape(tied=False, kv_heads=1), noise=NOISE)


def request(name, prompt, **changes) -> RolloutRequest:
    positions, delta = prompt.positions()
    plain = dict(
        problem_id=name, token_ids=prompt.tokens.astype(np.int32), patches=prompt.patches, grid_thw=prompt.grids,
        positions=positions, rope_delta=delta, seed=0, group_size=1, root_leaves=1, max_branches_per_sequence=0,
        tau_high=math.inf, branch_at="window_end", branch_choice="first", temperature=0.0, top_p=1.0, top_k=0,
        max_new_tokens=LENGTH,
    )  # fmt: skip
    return RolloutRequest(**{**plain, **changes})


def new_engine(model, eos) -> Engine:
    options = EngineOptions(8, 16, 80, 128, 352, 192, 5, 16, 4)
    banned = np.isin(np.arange(VOCAB), NEVER)
    return Engine(model, options, eos_token_ids=[eos], banned=banned, trigger_mask=np.zeros(VOCAB, bool))


def theirs_generated(pair, prompt, eos):
    inputs = prompt.for_torch()
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])  # else every token equal to the padding is masked
    out = pair.theirs.generate(
        **inputs, max_new_tokens=LENGTH, do_sample=False, suppress_tokens=NEVER, eos_token_id=eos, pad_token_id=0
    )
    return out[0, len(prompt.tokens) :].numpy()


def test_64_greedy_tokens_with_a_tied_head(tmp_path):
    """Whose best token is often the last one again: the final norm's noise makes them differ."""
    pair, prompts = make_pair(tmp_path / "hf", Shape(tied=True, heads=7, kv_heads=1), noise=NOISE), examples()
    with torch.no_grad():
        norm = pair.theirs.model.language_model.norm.weight
        norm.copy_(3 * torch.randn_like(norm))
    pair.theirs.save_pretrained(pair.folder)
    groups = new_engine(pair.ours, END).generate([request(name, prompt) for name, prompt in prompts.items()])
    for (name, prompt), group in zip(prompts.items(), groups, strict=True):
        other = theirs_generated(pair, prompt, END)
        assert len(other) == LENGTH and len(set(other.tolist())) > 10, other
        np.testing.assert_array_equal(group.leaves[0].token_ids, other, err_msg=name)


def test_64_greedy_tokens_of_every_kind_of_prompt(pair):
    prompts = examples()
    groups = new_engine(pair.ours, END).generate([request(name, prompt) for name, prompt in prompts.items()])
    expected = {name: theirs_generated(pair, prompt, END) for name, prompt in prompts.items()}
    for (name, other), group in zip(expected.items(), groups, strict=True):
        assert len(other) == LENGTH and len(set(other.tolist())) > 20, other
        np.testing.assert_array_equal(group.leaves[0].token_ids, other, err_msg=name)
    # Half as many tokens with an end-of-turn token that one of them does draw.
    eos = int(expected["image"][LENGTH // 2])
    (group,) = new_engine(pair.ours, eos).generate([request("image", prompts["image"])])
    stopped = theirs_generated(pair, prompts["image"], eos)
    assert len(stopped) < LENGTH and group.leaves[0].finish_reason == "stop"
    np.testing.assert_array_equal(group.leaves[0].token_ids, stopped)


def test_generated_log_probs_are_pytorchs(pair):
    prompt = examples()["mixture"]
    leaf = new_engine(pair.ours, END).generate([request("mixture", prompt, temperature=1.0)])[0].leaves[0]
    logits = torch.tensor(pair.their_logits(prompt.with_response(leaf.token_ids)))[len(prompt.tokens) - 1 : -1]
    logits[:, NEVER] = -torch.inf
    expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(leaf.token_ids).long()[:, None])[:, 0]
    np.testing.assert_allclose(leaf.log_probs, expected, atol=1e-4)


def test_a_prompt_whose_image_tokens_do_not_match_is_refused(pair):
    prompt, engine = examples()["images"], new_engine(pair.ours, END)
    sizes = "3 images of sizes 56x84, 168x280, 28x28"
    with pytest.raises(UserError, match=f"problem geo-7: 66 image tokens for 67 image features of {sizes}"):
        tokens = prompt.tokens[prompt.tokens != IMAGE]
        tokens = np.concatenate([tokens[:6], [IMAGE] * 66, tokens[6:]])
        engine.submit(request("geo-7", prompt, token_ids=tokens, positions=np.zeros((3, len(tokens)), np.int32)))
    with pytest.raises(UserError, match="problem geo-7: .* do not stand in one run an image"):
        tokens = prompt.tokens.copy()
        tokens[[6, 5]] = tokens[[5, 6]]
        engine.submit(request("geo-7", prompt, token_ids=tokens))
    with pytest.raises(UserError, match="problem geo-7: 268 image patches for 1 images of sizes 56x84 .*, which have 24"):
        engine.submit(request("geo-7", prompt, grid_thw=prompt.grids[:1]))
    assert not engine.busy
