"""What a policy never draws, member by member: one mask for the sampler and the learner's normaliser."""

import dataclasses
import json

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ares_jax.run.run import open_run
from configs.digits_cpu import get_config
from data_pipeline import tokenizer
from tests import digits

# In the order of the published vocabulary, from 151,643 on; `special` as its tokenizer_config.json says.
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
PLAIN = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>",
)  # fmt: skip


def published(folder, *, words: int, vocabulary: int):
    """A folder like a published Qwen2.5-VL's: a byte-level BPE, then the added tokens, and more rows than tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(a + b for a in alphabet for b in alphabet)][:words]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [(w[0], w[1]) for w in words if len(w) > 1]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_tokens([AddedToken(name, special=name in SPECIAL, normalized=False) for name in (*SPECIAL, *PLAIN)])
    text = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template="{{ messages }}"
    )
    tokenizer.save_processors(folder, text, tokenizer.make_image_processor(784, 784 * 64))
    ids = {name.strip("<|>"): len(words) + i for i, name in enumerate(SPECIAL)}
    tiny = digits.model().config
    config = dataclasses.replace(
        tiny, text=dataclasses.replace(tiny.text, vocab_size=vocabulary), image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"], vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config.to_hf()))


def test_of_a_published_tokenizer_no_image_padding_or_id_beyond_it_is_drawn(tmp_path):
    published(tmp_path / "qwen", words=300, vocabulary=384)
    config = get_config()
    config.model.pretrained = str(tmp_path / "qwen")
    (tmp_path / "run").mkdir()
    workspace = open_run(config, tmp_path / "run")
    drawn = np.flatnonzero(~workspace.banned).tolist()
    # Words, the end of a turn, and what is text to Qwen: tool calls, files. Ids 322 to 383 belong to no token.
    assert drawn == [*range(300), 302, *range(314, 322)]
    assert workspace.tokenizer.convert_ids_to_tokens([302, 314, 321]) == ["<|im_end|>", "<tool_call>", "<|file_sep|>"]
    model = workspace.model.config
    never = [model.image_token_id, model.video_token_id, model.vision_start_token_id, model.vision_end_token_id]
    never += [workspace.tokenizer.pad_token_id, workspace.tokenizer.convert_tokens_to_ids("<|vision_pad|>")]
    assert workspace.banned[never].all() and len(set(never)) == 6


def test_of_the_digits_tokenizer_every_special_token_but_the_end_is_banned(tmp_path):
    workspace = open_run(get_config(), tmp_path)
    names = workspace.tokenizer.convert_ids_to_tokens(np.flatnonzero(workspace.banned[: len(workspace.tokenizer)]).tolist())
    assert sorted(names) == sorted(set(SPECIAL) - {"<|im_end|>"})
    assert workspace.banned[len(workspace.tokenizer) :].all()
    assert len(workspace.banned) == workspace.model.config.text.vocab_size
    np.testing.assert_array_equal(workspace.banned, digits.banned())  # of the tests' engine
