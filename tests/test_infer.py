"""Asking a tiny model from the shell: what is printed is what was drawn, colours and marks are right, errors are named."""

import dataclasses
import io
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ares_jax.aepo.windows import validated
from ares_jax.checkpoints import save_hf
from ares_jax.checkpoints.folders import copy_side_files
from ares_jax.checkpoints.huggingface import HFFolder
from ares_jax.checkpoints.manager import Checkpoints
from ares_jax.checkpoints.orbax_params import write_orbax
from ares_jax.commands.infer import TOPICS, infer, with_joined_flags
from ares_jax.errors import UserError
from ares_jax.inference.asker import find_windows
from ares_jax.inference.conversation import Conversation, Options
from ares_jax.inference.media import load_video, split_paths
from ares_jax.inference.terminal import Printer, legend, painted, window_lines
from ares_jax.inference.texts import TokenTexts
from ares_jax.params import to_flat
from ares_jax.run.opening import open_model
from ares_jax.run.run import open_run
from ares_jax.sampling import Trajectory
from ares_jax.sampling.requests import derive_seed
from configs import digits_cpu
from data_pipeline.errors import DataError
from data_pipeline.tokenizer import save_processors
from tests import digits
from tests.warm_python import warm_python
from tests.xla import environment

ANSI = re.compile(r"\x1b\[[0-9;]*m")
WINDOW = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder with all that goes with it, and pictures beside it."""
    folder = tmp_path_factory.mktemp("infer")
    save_processors(folder / "hf", digits.encoder().tokenizer, digits.encoder().image_processor)
    save_hf(digits.model(), folder / "hf")
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (28, 56)), ("b,c.png", (56, 28)), ("strip.png", (2, 1000))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(folder / name)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "clip.mp4").write_bytes(b"\0\0\0 ftypisom")
    for name, sizes in (("frames", (28, 28, 28)), ("uneven", (28, 56)), ("empty", ())):
        (folder / name).mkdir()
        for number, size in enumerate(sizes):
            Image.fromarray(rng.integers(0, 255, (28, size, 3), np.uint8)).save(folder / name / f"{number:03d}.png")
    return folder


def options(folder, **changes):
    return Options(**{"model_path": str(folder / "hf"), "question": "Add the digits.", "max_tokens": 24, **changes})


class Page(HTMLParser):
    """Every token's text and classes, and every address on a page."""

    def __init__(self, text):
        super().__init__()
        self.tokens, self.sources, self._inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.sources += [values[name] for name in ("src", "href") if name in values]
        if tag == "span":
            self._inside = True
            self.tokens.append(["", values.get("class", "")])

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.tokens[-1][0] += data


def test_answers_are_streamed_coloured_and_put_on_a_page(folder, tmp_path, capsys):
    """Two answers about two images; what is printed, and what the page holds, is what the engine drew."""
    pieces = []
    images = [f"{folder}/a.png", f"{folder}/b,c.png"]
    chosen = options(
        folder, image_path=images, num_return_sequences=2, temperature=1.3, show_entropy=True, tau_high=5.5,
        html=str(tmp_path / "page.html"), question="<image> <b>Add</b> <image>",
    )  # fmt: skip
    pixels = [np.asarray(Image.open(path)) for path in images]
    conversation = Conversation(chosen, pixels, (), pieces.append)
    conversation._opened.run.config.sampler.prefill_chunk = 24
    conversation.ask(chosen.question)
    assert conversation._asker._engine.options.prefill_chunk == 32  # whole pages of 16
    printed = "".join(pieces)
    assert len(pieces) > 8  # it came bit by bit
    assert "tokens" in capsys.readouterr().err

    prompt, trigger = conversation._prompt(chosen.question), conversation._opened.run.trigger
    assert len(prompt.token_ids) > 32
    seen = list(conversation._asker.ask(prompt, derive_seed(0, chosen.question)))
    counts = [[len(leaf.token_ids) for leaf in leaves] for leaves in seen]
    assert len(seen) > 3 and (np.diff(counts, axis=0) >= 0).all()
    expected, tokens = legend() + "\n", []
    for number, leaf in enumerate(seen[-1], start=1):
        texts = TokenTexts(digits.encoder().tokenizer)
        texts.extend(leaf.token_ids.tolist())
        texts.finish()
        windows = find_windows(leaf, trigger, tau=5.5, window=WINDOW)
        lines = window_lines(leaf, texts, windows, window=WINDOW, colour=True, measured="--tau_high")
        text = "".join(texts.texts)
        expected += f"--- answer {number} of 2\n{text}" + "\n" * (not text.endswith("\n")) + "".join(f"{x}\n" for x in lines)
        for text, inside, starts in zip(texts.texts, windows.inside(WINDOW), windows.validated, strict=True):
            tokens.append([text, " ".join(name for name, on in (("h", inside), ("w", starts)) if on)])
        assert windows.high.any() and leaf.finish_reason in ("stop", "length")
    assert ANSI.sub("", printed) == ANSI.sub("", expected) and "\x1b[4;" in printed

    text = (tmp_path / "page.html").read_bytes().decode()
    page = Page(text)
    assert page.tokens == tokens and "<b>Add</b>" not in text
    assert len(page.sources) == 4 and all(source.startswith("data:image/png") for source in page.sources)


def test_every_line_of_the_standard_input_is_a_question(folder, monkeypatch, capsys):
    """One that cannot be asked is named, the others are answered; greedy answers repeat."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("Read the digits.\n\n" + "Add " * 80 + "\nRead the digits.\n"))
    pieces = []
    with pytest.raises(UserError, match="1 of 3 questions"):
        infer(options(folder, question=None, do_sample=False, max_tokens=5, max_prompt_tokens=64), write=pieces.append)
    answers = "".join(pieces).split("> ")[1:]
    assert len(answers) == 3 and answers[0] == answers[2] != answers[1]
    assert "at most 64 fit; shorten it" in capsys.readouterr().err


def test_a_folder_a_converted_one_and_a_run_open_alike(folder, tmp_path):
    expected = to_flat(digits.model())
    (tmp_path / "orbax").mkdir()
    copy_side_files(epath.Path(folder / "hf"), epath.Path(tmp_path / "orbax"))
    write_orbax(HFFolder(folder / "hf"), epath.Path(tmp_path / "orbax"))
    for path in (folder / "hf", tmp_path / "orbax"):
        opened = open_model(path, {})
        assert math.isnan(opened.tau_high) and opened.run.config.data.max_pixels == 784 * 64
        for name, value in opened.load().items():
            np.testing.assert_array_equal(value, expected[name])
    assert not list(folder.glob("hf/checkpoint*")) and not (folder / "hf" / "tokenizer").exists()


def test_the_newest_stage_of_a_run_is_opened_and_nothing_is_written_there(tmp_path):
    config = digits_cpu.get_config()
    config.model.text.num_layers = 1
    workspace = open_run(config, tmp_path)
    with pytest.raises(UserError, match="no checkpoint yet; run"):
        open_model(tmp_path, {})
    for value, stage in ((1.0, "cold_start"), (2.0, "aepo")):
        manager = Checkpoints(tmp_path / "checkpoints" / stage)
        params = {name: jnp.full(x.shape, value, x.dtype) for name, x in to_flat(workspace.model).items()}
        manager.save(5, params, {"m": jnp.zeros(2)}, {})
        manager.close()
    (tmp_path / "aepo").mkdir()
    (tmp_path / "aepo" / "metrics.jsonl").write_text('{"step": 1, "tau_high": 0.5}\n{"step": 2, "tau_high": 0.75}\n')
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    opened = open_model(tmp_path, {"sampler.max_prompt_tokens": 128})
    assert opened.name.endswith("(aepo)") and opened.tau_high == 0.75
    assert opened.run.config.sampler.max_prompt_tokens == 128
    assert all(float(value.reshape(-1)[0]) == 2.0 for value in opened.load().values())
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    (tmp_path / "config.json").write_text('{"sampler": 3}')
    with pytest.raises(UserError, match="not a config of ours"):
        open_model(tmp_path, {})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_path": "nowhere"}, "--model_path=nowhere: no such folder"),
        ({"model_path": "Qwen/Qwen2.5-VL-3B"}, "hf download Qwen/Qwen2.5-VL-3B"),
        ({"model_path": "{}/frames"}, "no config.json in it"),
        ({"model_path": "{}/hf/config.json"}, "no such folder"),
        ({"image_path": ["{}/a.png,{}/gone.png"]}, "gone.png: no such file"),
        ({"image_path": ["https://example.org/a.png"]}, "download it first"),
        ({"image_path": ["{}/frames"]}, "Is a directory"),
        ({"image_path": ["{}/broken.png"]}, "broken.png: not a readable image"),
        ({"image_path": ["{}/strip.png"]}, "crop them"),
        ({"image_path": ["{}/a.png"], "question": "<image> and <image>"}, "2 <image> in the text for 1 images"),
        ({"video_path": ["{}/clip.mp4"]}, "extract its frames first"),
        ({"video_path": ["{}/uneven"]}, "frames of sizes"),
        ({"video_path": ["{}/empty"]}, "no images in this folder"),
        ({"image_path": ["{}/a.png"], "min_pixels": 784, "max_pixels": 783}, "--min_pixels=784 is above --max_pixels"),
        ({"image_path": ["{}/a.png"] * 40, "min_pixels": 784 * 16, "max_prompt_tokens": 512}, "lower --max_pixels or raise"),
        ({"max_tokens": 128_000}, "lower --max_tokens"),
        ({"html": "{}/none/page.html"}, "make the folder"),
        ({"question": "<|image_pad|>"}, "must not stand in the question's text"),
    ],
    ids=str,
)
def test_errors_are_one_line_that_names_the_value_and_the_remedy(folder, changes, message):
    def filled(value):
        return value.replace("{}", str(folder)) if isinstance(value, str) else value

    changes = {k: [filled(v) for v in value] if isinstance(value, list) else filled(value) for k, value in changes.items()}
    with pytest.raises((UserError, DataError), match=re.escape(message)) as error:
        infer(options(folder, **changes), write=print)
    assert "\n" not in str(error.value)


def test_a_folder_without_tokenizer_or_weights_is_named(folder, tmp_path):
    copy_side_files(epath.Path(folder / "hf"), epath.Path(tmp_path / "hf"))
    with pytest.raises(UserError, match="neither safetensors nor a converted checkpoint"):
        open_model(tmp_path / "hf", {})
    os.link(folder / "hf" / "model.safetensors", tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read .*copy them again"):
        open_model(tmp_path / "hf", {})
    (tmp_path / "hf" / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="no tokenizer.json in it"):
        open_model(tmp_path / "hf", {})


def test_a_video_is_a_folder_of_frames_or_an_animation(folder, tmp_path):
    frames = load_video(str(folder / "frames"))
    np.testing.assert_array_equal(frames[1], np.asarray(Image.open(folder / "frames" / "001.png")))
    first, *others = map(Image.fromarray, frames)
    first.save(tmp_path / "clip.png", save_all=True, append_images=others)
    np.testing.assert_array_equal(load_video(str(tmp_path / "clip.png")), frames)
    conversation = Conversation(options(folder, video_fps=4.0), (), (frames,), print)
    prompt = conversation._prompt("What moves?")
    assert prompt.grid_thw.tolist() == [[2, 2, 2]]  # three frames are two pairs


def test_paths_are_repeated_or_separated_by_commas(folder):
    url = "data:image/png;base64,AAAA"
    whole = f"{folder}/b,c.png"
    assert split_paths(["x.png, y.png", whole, url, "z.png"]) == ["x.png", "y.png", whole, url, "z.png"]


def test_the_originals_way_to_write_a_boolean():
    given = ["infer", "--do_sample", "False", "--question", "True", "--do_sample", "--top_k", "1", "--do_sample=false"]
    expected = ["infer", "--do_sample=false", "--question", "True", "--do_sample", "--top_k", "1", "--do_sample=false"]
    assert with_joined_flags(given) == expected


@given(st.lists(st.integers(0, 447), max_size=40), st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_the_texts_of_tokens_add_up_to_the_text(ids, chunk):
    tokenizer = digits.encoder().tokenizer
    ids = [i % len(tokenizer) for i in ids]
    texts = TokenTexts(tokenizer)
    for start in range(0, len(ids), chunk):
        texts.extend(ids[start : start + chunk])
    texts.finish()
    plain = [i for i in ids if i != tokenizer.eos_token_id]
    assert len(texts.texts) == len(ids) and "".join(texts.texts) == tokenizer.decode(plain) * bool(ids)


def drawn(entropies, ids, count):
    """The first `count` tokens of an answer, as the engine would show it."""
    h = np.array(entropies[:count], np.float32)
    means = np.array([h[i : i + WINDOW].mean() if i + WINDOW <= count else 0.0 for i in range(count)], np.float32)
    reason = "length" if count == len(ids) else ""
    own = np.array(ids[:count], np.int32)
    zeros = np.zeros(count, np.int32)
    return Trajectory(own, zeros * 0.0, h, means, zeros > 0, zeros, -1, 0, reason)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_marks_are_final_when_they_are_printed(data):
    """Printed as it comes, in any pieces, an answer looks as if printed at once; without its codes it is the text."""
    size = data.draw(st.integers(1, 14))
    ids = data.draw(st.lists(st.integers(20, 300), min_size=size, max_size=size))
    entropies = data.draw(st.lists(st.floats(0, 3, width=32), min_size=size, max_size=size))
    cuts = sorted(data.draw(st.sets(st.integers(1, size)))) + [size]
    trigger, tau = np.arange(digits.VOCABULARY) % 3 == 0, 1.2
    texts = TokenTexts(digits.encoder().tokenizer)
    texts.extend(ids)
    texts.finish()

    def printed(counts):
        pieces = []
        printer = Printer(pieces.append, trigger, colour=True, tau_high=tau, window=WINDOW)
        for count in counts:
            printer.show(drawn(entropies, ids, count), texts)
        return "".join(pieces)

    assert printed(cuts) == printed([size]) and ANSI.sub("", printed(cuts)) == "".join(texts.texts)
    leaf = drawn(entropies, ids, size)
    windows = find_windows(leaf, trigger, tau=tau, window=WINDOW)
    slow = [i + WINDOW <= size and leaf.window_means[i] >= tau for i in range(size)]
    assert windows.high.tolist() == slow
    complete = np.arange(size) + WINDOW <= size
    assert windows.validated.tolist() == validated(leaf.window_means, complete, trigger[leaf.token_ids], tau).tolist()
    inside = [any(slow[max(0, i - WINDOW + 1) : i + 1]) for i in range(size)]
    assert windows.inside(WINDOW).tolist() == inside
    lines = list(window_lines(leaf, texts, windows, window=WINDOW, colour=False, measured="here"))
    assert lines[0].startswith(f"{sum(slow)} high-entropy windows") and bool(lines[1:]) == any(slow)


def test_colours_follow_entropy_and_end_with_the_line():
    assert painted("a", 0.1, underline=False, bold=False) == "a"
    colours = [painted("a", h, underline=False, bold=False) for h in (0.5, 1.0, 1.5, 3.0)]
    assert len(set(colours)) == 4 and all("48;5;" in text for text in colours)
    text = painted("a\n\nb", 0.0, underline=True, bold=True)
    assert text == "\x1b[1;4ma\x1b[0m\n\n\x1b[1;4mb\x1b[0m"
    assert painted("a", math.nan, underline=False, bold=False) == "a"


def command(*arguments, stdin="", cache="/nonexistent"):
    line = [warm_python(), "-m", "ares_jax.infer", *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=environment(XDG_CACHE_HOME=str(cache)), input=stdin)


def test_the_command(folder, tmp_path):
    flags = [f"--model_path={folder}/hf", "--do_sample", "True", "--max_tokens", "6", f"--image_path={folder}/a.png"]
    result = command(*flags, "--temperature=1.3", stdin="Read the digits.\nRead the digits.\n", cache=tmp_path)
    assert result.returncode == 0, result.stderr
    before, *answers = result.stdout.split("> Read the digits.\n")
    assert before == "" and len(answers) == 2 and answers[0].strip() and answers[0] == answers[1]


def test_every_flag_of_the_help_is_an_option():
    assert {name for names in TOPICS.values() for name in names} == {field.name for field in dataclasses.fields(Options)}
