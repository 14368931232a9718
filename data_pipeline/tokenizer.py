"""Tokenizer and image processor: those of a Hugging Face folder, or the digits task's own small byte-level BPE.

The small one has Qwen2.5-VL's special tokens and a chat template of the same effect, so that code cannot tell them apart.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data_pipeline.errors import DataError

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
THINK_TOKENS = ("<think>", "</think>")
NEVER_SAMPLED = tuple(t for t in SPECIAL_TOKENS if t != "<|im_end|>")  # a response may end; it may not draw an image

# Letters with a leading space, single digits with theirs, punctuation: a digit is a token of its own.
_WORDS = Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s")

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE of exactly `vocab_size` tokens at most, trained on `texts`. Deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_WORDS, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(THINK_TOKENS), special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    template = ["system\nYou are a helpful assistant.", "user\n", "assistant\n"] * 1000
    tokenizer.train_from_iterator([*(_plain(text) for text in texts), *template], trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_image_processor(min_pixels: int, max_pixels: int) -> Qwen2VLImageProcessorPil:
    """Returns Qwen2.5-VL's image processor, scaling images to between these numbers of pixels."""
    return Qwen2VLImageProcessorPil(size={"shortest_edge": min_pixels, "longest_edge": max_pixels})


def save_processors(folder: Path, tokenizer, image_processor) -> None:
    """Writes both to `folder`, whole or not at all, in the layout that `transformers` loads."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    tokenizer.save_pretrained(temporary)
    image_processor.save_pretrained(temporary)
    temporary.rename(folder)


def load_processors(folder: Path) -> tuple[Any, Qwen2VLImageProcessorPil]:
    """Returns the tokenizer and the image processor of a Hugging Face folder. Raises `DataError` if a file is missing."""
    for names in (("tokenizer.json", "vocab.json"), ("preprocessor_config.json",)):
        if not any((folder / name).is_file() for name in names):
            raise DataError(f"{folder}: no {names[0]} in it; copy the tokenizer and the processor of the model there")
    try:
        return AutoTokenizer.from_pretrained(folder), Qwen2VLImageProcessorPil.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises a bare Exception on a damaged file
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise DataError(f"{folder}: tokenizer or image processor cannot be read ({reason}); copy them again") from None


def token_strings(tokenizer) -> list[str]:
    """Returns the text of every token, by id."""
    return [tokenizer.decode([i]) for i in range(len(tokenizer))]


def token_bytes(tokenizer) -> list[bytes]:
    """Returns the UTF-8 bytes of every token of a byte-level BPE, by id; a special token has none.

    A byte-level BPE spells bytes as characters: the printable ones as themselves, the others, in order, from U+0100 on.
    """
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    others = [byte for byte in range(256) if chr(byte) not in alphabet]
    spelling = {chr(byte): byte for byte in range(256) if chr(byte) in alphabet}
    spelling |= {chr(256 + place): byte for place, byte in enumerate(others)}
    added, special = tokenizer.added_tokens_decoder, set(tokenizer.all_special_ids)
    table = []
    for number, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        if number in special or number in added and added[number].special:
            table.append(b"")
        elif number in added:
            table.append(added[number].content.encode())
        else:
            table.append(bytes(spelling[character] for character in token))
    return table


def _plain(text: str) -> str:
    for token in THINK_TOKENS:
        text = text.replace(token, "\n")
    return text
