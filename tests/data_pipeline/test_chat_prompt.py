"""A chat prompt is the tokenizer's own template, token by token, with its placeholders expanded."""

import copy

import numpy as np
import pytest
from transformers import Qwen2_5_VLProcessor

from ares_jax.models.qwen2_5_vl import Qwen25VLConfig
from data_pipeline.errors import DataError
from data_pipeline.prompts import Problem, PromptEncoder
from tests import digits

IMAGES = tuple(np.full((*size, 3), 90, np.uint8) for size in [(28, 56), (84, 84), (28, 28)])
VIDEO = np.stack([np.full((56, 28, 3), shade, np.uint8) for shade in range(5)])
NUMBERED = (  # as published checkpoints do on request: another text around the placeholders, no system turn
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}Picture "
    "{{ loop.index }}: <|vision_start|><|image_pad|><|vision_end|>{% elif c.type == 'video' %}<|vision_start|>"
    "<|video_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# What the published checkpoints' template does: a system turn of its own where the chat begins with another, a text or parts
# in a turn, and on request (`add_vision_id`) a number before every image and video, counted through the whole chat.
PUBLISHED = """\
{%- set seen = namespace(image=0, video=0) -%}
{%- for turn in messages -%}
  {%- if loop.first and turn.role != "system" -%}
    {{ "<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n" }}
  {%- endif -%}
  {{ "<|im_start|>" ~ turn.role ~ "\\n" }}
  {%- if turn.content is string -%}
    {{ turn.content }}
  {%- else -%}
    {%- for part in turn.content -%}
      {%- if part.type == "image" or "image" in part or "image_url" in part -%}
        {%- set seen.image = seen.image + 1 -%}
        {{ "Picture " ~ seen.image ~ ": " if add_vision_id else "" }}{{ "<|vision_start|><|image_pad|><|vision_end|>" }}
      {%- elif part.type == "video" or "video" in part -%}
        {%- set seen.video = seen.video + 1 -%}
        {{ "Video " ~ seen.video ~ ": " if add_vision_id else "" }}{{ "<|vision_start|><|video_pad|><|vision_end|>" }}
      {%- elif "text" in part -%}
        {{ part.text }}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{ "<|im_end|>\\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{ "<|im_start|>assistant\\n" }}
{%- endif -%}"""


def text(words):
    return {"type": "text", "text": words}


IMAGE, CLIP = {"type": "image"}, {"type": "video"}
CHATS = {
    "a question alone": [{"role": "user", "content": [text("What is 3 + 4?")]}],
    "a system turn": [{"role": "system", "content": [text("Add.")]}, {"role": "user", "content": [IMAGE, text("So?")]}],
    "images in several turns": [
        {"role": "user", "content": [text("In "), IMAGE, text(" and\n"), IMAGE, text("?")]},
        {"role": "assistant", "content": [text("<think>3</think>7")]},
        {"role": "user", "content": [CLIP, IMAGE, text(" Größe?")]},
    ],
    "a last turn of images": [
        {"role": "system", "content": [text("")]},
        {"role": "user", "content": [text("Look:")]},
        {"role": "assistant", "content": [text("Where?")]},
        {"role": "user", "content": [IMAGE, IMAGE, IMAGE, CLIP]},
    ],
}


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("name", CHATS)
def test_a_chat_through_the_published_template(name, numbered):
    chat, tokenizer = CHATS[name], copy.deepcopy(digits.encoder().tokenizer)
    tokenizer.chat_template = ("{% set add_vision_id = true %}" if numbered else "") + PUBLISHED
    encoder = PromptEncoder(tokenizer, digits.encoder().image_processor)
    kinds = [part["type"] for turn in chat for part in turn["content"]]
    asked = problem("", IMAGES[: kinds.count("image")], (VIDEO,) * kinds.count("video"))
    prompt = encoder.encode_chat(chat, asked)
    # The tokenizer's own, with each placeholder as often as its image has features.
    merged = iter((prompt.grid_thw.prod(axis=1) // 4).tolist())
    pads = set(tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"]))
    plain = tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert prompt.token_ids.tolist() == [i for token in plain for i in [token] * (next(merged) if token in pads else 1)]
    assert next(merged, None) is None and int(prompt.grid_thw.prod(axis=1).sum()) == len(prompt.patches)
    written = tokenizer.decode(plain)
    assert written.endswith("<|im_end|>\n<|im_start|>assistant\n") and written.count("<|im_start|>system\n") == 1
    assert ("You are a helpful assistant." in written) == (chat[0]["role"] != "system")
    assert ("Picture 1: <|vision_start|><|image_pad|><|vision_end|>" in written) == (numbered and "image" in kinds)
    if name == "images in several turns":
        first, second, third = ("Picture 1: ", "Picture 2: ", "Video 1: ") if numbered else ("", "", "")
        image = "<|vision_start|><|image_pad|><|vision_end|>"
        assert f"user\nIn {first}{image} and\n{second}{image}?<|im_end|>\n<|im_start|>assistant\n<think>" in written
        assert f"<|im_start|>user\n{third}{image.replace('image', 'video')}" in written


def problem(question="What is 3 + 4?", images=IMAGES, videos=(VIDEO,)):
    return Problem("p1", "s", "easy", question, images, "7", videos=videos)


def transformers_tokens(encoder, problem):
    """transformers' way: its processor replaces each placeholder in the text, then the tokenizer reads the whole."""
    content = [{"type": "image"}] * len(problem.images) + [{"type": "video"}] * len(problem.videos)
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": problem.question}]}]
    text = encoder.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    processor = object.__new__(Qwen2_5_VLProcessor)  # its constructor asks for torchvision
    processor.image_processor = processor.video_processor = encoder.image_processor
    processor.image_token, processor.video_token = "<|image_pad|>", "<|video_pad|>"
    grids = encoder(problem).grid_thw
    image_inputs, video_inputs = ({"image_grid_thw": grids}, {"video_grid_thw": grids[len(problem.images) :]})
    for index in range(len(problem.images)):
        text = text.replace("<|image_pad|>", processor.replace_image_token(image_inputs, index).replace("image", "seen"), 1)
    for index in range(len(problem.videos)):
        text = text.replace("<|video_pad|>", processor.replace_video_token(video_inputs, index).replace("video", "shot"), 1)
    return encoder.tokenizer(text.replace("<|seen_pad|>", "<|image_pad|>").replace("<|shot_pad|>", "<|video_pad|>"))[
        "input_ids"
    ]


@pytest.mark.parametrize("template", [None, NUMBERED])
@pytest.mark.parametrize(
    "question, images, videos",
    [
        ("What is 3 + 4?", IMAGES, (VIDEO,)),
        ("Größe? <think>\n\n x", IMAGES[:1], ()),
        ("7", (), (VIDEO, VIDEO)),
        ("a", (), ()),
    ],
)
def test_the_tokenizers_own_template_token_by_token(template, question, images, videos):
    tokenizer = copy.deepcopy(digits.encoder().tokenizer)
    tokenizer.chat_template = template or tokenizer.chat_template
    encoder = PromptEncoder(tokenizer, digits.encoder().image_processor)
    asked = problem(question, images, videos)
    prompt = encoder(asked)
    assert prompt.token_ids.tolist() == transformers_tokens(encoder, asked)
    assert int(prompt.grid_thw.prod(axis=1).sum()) == len(prompt.patches)
    assert prompt.positions.shape == (3, len(prompt.token_ids))


@pytest.mark.parametrize("pad", ["<|image_pad|>", "<|video_pad|>"])
def test_a_placeholder_in_the_text_is_named_with_problem_sizes_and_both_counts(pad):
    sizes = r"28x56, 84x84, 28x28, 56x28 \(5 frames\) \(height x width\)"
    with pytest.raises(DataError, match=f"problem p1: 5 image placeholders for 4 images of sizes {sizes}"):
        digits.encoder()(problem(f"What is {pad}?"))
    with pytest.raises(DataError, match="problem p1: 1 image placeholders for 0 images"):
        digits.encoder()(problem(f"What is {pad}?", (), ()))
    with pytest.raises(DataError, match="problem p1: 2 image tokens in the response '<think> .*' for 0 image features"):
        digits.encoder().encode_response(f"<think> {pad}{pad}", "p1")


def test_a_template_without_placeholders_is_no_silent_loss_of_images():
    tokenizer = copy.deepcopy(digits.encoder().tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"
    encoder = PromptEncoder(tokenizer, digits.encoder().image_processor)
    with pytest.raises(DataError, match="0 image placeholders for 4 images"):
        encoder(problem())


def test_the_pads_are_those_of_the_model():
    config: Qwen25VLConfig = digits.model().config
    names = digits.encoder().tokenizer.convert_ids_to_tokens([config.image_token_id, config.video_token_id])
    assert names == ["<|image_pad|>", "<|video_pad|>"]
    assert digits.encoder().placeholder_ids == {config.image_token_id, config.video_token_id}
