"""`python -m ares_jax.infer`: ask a model from the shell.

    python -m ares_jax.infer --model_path=runs/digits --image_path=docs/digits.png --question="Add the digits."

Without --question every line of the standard input is one, all about the same images.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from ares_jax.commands import cli
from ares_jax.errors import UserError
from ares_jax.inference.conversation import Conversation, Options
from ares_jax.inference.media import load_image, load_video, split_paths
from data_pipeline.errors import DataError

TOPICS = {
    "The model": ("model_path", "dtype"),
    "What it is asked": ("question", "prompt", "image_path", "video_path", "video_fps", "min_pixels", "max_pixels",
                         "max_prompt_tokens"),
    "How answers are drawn": ("max_tokens", "do_sample", "temperature", "top_p", "top_k", "num_return_sequences", "seed"),
    "How they are shown": ("show_entropy", "tau_high", "html"),
}  # fmt: skip


def _define_flags() -> None:
    """Called by the command alone: other commands have flags of the same names."""
    text, number, real = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    text("model_path", None, "Hugging Face folder, a converted one, or a run's workdir (its newest stage)")
    text("question", None, "the question; <image> in it says where an image stands. Absent: lines of the standard input")
    text("prompt", None, "instruction below the question, in place of the run's format prompt")
    flags.DEFINE_multi_string("image_path", [], "image file; several: repeat it, or separate them by commas")
    flags.DEFINE_multi_string("video_path", [], "folder of frames, or an animated GIF, WebP or PNG; several: as images")
    real("video_fps", 2.0, "frames a second of the videos", lower_bound=0.01)
    number("max_tokens", None, "longest answer; default: the run's, or 16384", lower_bound=1)
    flags.DEFINE_bool("do_sample", True, "draw answers; false: the most likely token always")
    real("temperature", None, "of drawing; default: the run's, or 1.0", lower_bound=0.0)
    real("top_p", None, "probability mass that is drawn from; default: the run's, or 0.99", lower_bound=0.0, upper_bound=1.0)
    number("top_k", None, "tokens that are drawn from, 0: all; default: the run's, or 0", lower_bound=0)
    number("num_return_sequences", 1, "answers", lower_bound=1)
    number("seed", 0, "another one draws other answers")
    flags.DEFINE_bool("show_entropy", False, "colour tokens by entropy and mark high-entropy windows")
    real(
        "tau_high", None, "window entropy from which on a window is high, nats; default: the run's, or the answer's own 95 %"
    )
    text("html", None, "file that takes answers, colours and windows as one page")
    number("min_pixels", None, "smaller images are scaled up to this; default: the run's, or the folder's", lower_bound=784)
    number("max_pixels", None, "larger images are scaled down to this; default: as above, 4194304 at most", lower_bound=784)
    number("max_prompt_tokens", None, "of text and images; default: the run's, or 8192", lower_bound=1)
    flags.DEFINE_enum(
        "dtype", None, ["float32", "bfloat16"], "default: the run's; else float32 on a CPU, bfloat16 elsewhere"
    )


def main(config: ConfigDict | None, workdir: Path | None) -> None:
    if config is not None or workdir is not None:
        raise UserError("--config and --workdir do not go with infer; --model_path takes a run's workdir, too")
    if not flags.FLAGS["model_path"].value:
        raise UserError("--model_path is missing; give a Hugging Face folder, a converted one or a run's workdir")
    cli.prepare_jax(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ares_jax")
    try:
        given: dict[str, Any] = {field.name: flags.FLAGS[field.name].value for field in fields(Options)}
        infer(Options(**given))
    except BrokenPipeError:  # `infer ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def infer(options: Options, *, write: Callable[[str], object] | None = None) -> None:
    """Answers the question, or those of the standard input. `write` takes the answers, by default to the terminal.

    Raises:
      UserError, DataError: the model, an image, or the only question cannot be read. Of several questions one that does
        not fit is named, and the others are answered; the error comes at the end.
    """
    if options.html and (Path(options.html).is_dir() or not Path(options.html).absolute().parent.is_dir()):
        raise UserError(f"--html={options.html}: not a file in a folder that is there; make the folder, name a file in it")
    images = tuple(map(load_image, split_paths(list(options.image_path))))
    videos = tuple(map(load_video, split_paths(list(options.video_path))))
    conversation = Conversation(options, images, videos, write or _to_terminal)
    if options.question is not None:
        conversation.ask(options.question)
        return
    asked = failed = 0
    for question in _questions():
        asked += 1
        if not sys.stdin.isatty():
            (write or _to_terminal)(f"> {question}\n")
        try:
            conversation.ask(question)
        except (UserError, DataError) as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
    if failed or not asked:
        raise UserError(
            f"{failed} of {asked} questions were not answered; the reasons stand above"
            if asked
            else "no question; give --question, or one a line on the standard input"
        )


def _questions() -> Iterator[str]:
    """Yields the lines of the standard input that are not empty; a terminal is prompted."""
    while True:
        try:
            line = input("question> ") if sys.stdin.isatty() else sys.stdin.readline()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: not text ({error}); give UTF-8") from None
        if not line and not sys.stdin.isatty():
            return
        if line.strip():
            yield line.strip()


def _to_terminal(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def with_joined_flags(argv: Sequence[str]) -> list[str]:
    """Returns the command line with `--do_sample True`, as it is written for the original, as `--do_sample=True`."""
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1] in ("--do_sample", "-do_sample") and argument.lower() in ("true", "false", "1", "0"):
            joined[-1] += f"={argument.lower()}"
        else:
            joined.append(argument)
    return joined


def start() -> None:
    """Runs the command with the process's arguments."""
    _define_flags()
    sys.argv = with_joined_flags(sys.argv)
    cli.run(main, config_optional=True, processes="first")
