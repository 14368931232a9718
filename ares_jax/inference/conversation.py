"""Questions to one model about the same pictures: streamed to the terminal, collected on a page."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from ares_jax.aepo.windows import batch_threshold
from ares_jax.errors import UserError
from ares_jax.inference.asker import Answer, Asker, Sampling, Windows, find_windows
from ares_jax.inference.terminal import Printer, legend, window_lines
from ares_jax.inference.texts import TokenTexts
from ares_jax.metrics import write_atomic
from ares_jax.run.opening import open_model
from ares_jax.sampling.requests import derive_seed
from data_pipeline.errors import OverlongError
from data_pipeline.images import to_data_url
from data_pipeline.problems import Problem
from data_pipeline.prompts import Prompt


@dataclass(frozen=True)
class Options:
    """The command line; `ares_jax.infer` says what each means. None: the run's value, or the folder's."""

    model_path: str
    question: str | None = None
    prompt: str | None = None
    image_path: Sequence[str] = ()
    video_path: Sequence[str] = ()
    video_fps: float = 2.0
    max_tokens: int | None = None
    do_sample: bool = True
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    num_return_sequences: int = 1
    seed: int = 0
    show_entropy: bool = False
    tau_high: float | None = None
    html: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_prompt_tokens: int | None = None
    dtype: str | None = None


class Conversation:
    """The model, the pictures, and the page that grows with every question. Questions know nothing of each other."""

    def __init__(
        self,
        options: Options,
        images: Sequence[UInt8[np.ndarray, "H W 3"]],
        videos: Sequence[UInt8[np.ndarray, "F H W 3"]],
        write: Callable[[str], object],
    ):
        """`write` takes the answers piece by piece. Raises `UserError` if the model cannot be opened."""
        self._options, self._images, self._videos, self._write = options, tuple(images), tuple(videos), write
        overrides = {
            "data.min_pixels": options.min_pixels, "data.max_pixels": options.max_pixels,
            "data.format_prompt": None if options.prompt is None else "",
            "sampler.max_prompt_tokens": options.max_prompt_tokens,
            "sampler.max_prompt_patches": options.max_prompt_tokens and 4 * options.max_prompt_tokens,
        }  # fmt: skip
        given = {name: value for name, value in overrides.items() if value is not None}
        self._opened = open_model(Path(options.model_path), given, dtype=options.dtype)
        config = self._opened.run.config
        s, self._window = config.sampler, config.aepo.window
        self._sampling = Sampling(
            options.max_tokens or s.max_response_tokens,
            (s.temperature if options.temperature is None else options.temperature) if options.do_sample else 0.0,
            s.top_p if options.top_p is None else options.top_p,
            s.top_k if options.top_k is None else options.top_k,
            options.num_return_sequences,
        )
        self._tau = self._opened.tau_high if options.tau_high is None else options.tau_high
        self._colour = options.show_entropy and not os.environ.get("NO_COLOR")
        self._asker = Asker(self._opened, self._sampling, window=self._window)
        self._explained = False
        self._page: list[dict] = []

    def ask(self, question: str) -> None:
        """Writes the answers to a question as they are drawn. Raises `UserError` or `DataError` if it cannot be asked."""
        prompt, start = self._prompt(question), time.time()
        trigger = self._opened.run.trigger
        if self._colour and not self._explained:
            self._write(legend() + "\n")
            self._explained = True
        texts: list[TokenTexts] = []
        printers: list[Printer] = []
        leaves: Sequence[Answer] = ()
        current, named = 0, -1
        for leaves in self._asker.ask(prompt, derive_seed(self._options.seed, question)):
            for index, leaf in enumerate(leaves):
                if index == len(texts):
                    texts.append(TokenTexts(self._opened.run.tokenizer))
                    printers.append(
                        Printer(self._write, trigger, colour=self._colour, tau_high=self._tau, window=self._window)
                    )
                texts[index].extend(leaf.token_ids[len(texts[index].texts) :].tolist())
                if leaf.finish_reason:
                    texts[index].finish()
            while current < len(leaves):  # answers are drawn together, and shown one after the other
                if self._sampling.answers > 1 and named < current:
                    self._write(f"--- answer {current + 1} of {self._sampling.answers}\n")
                    named = current
                printers[current].show(leaves[current], texts[current])
                if not leaves[current].finish_reason:
                    break
                self._end(leaves[current], texts[current])
                current += 1
        tokens = sum(len(leaf.token_ids) for leaf in leaves)
        print(f"[{self._opened.name}: {tokens} tokens, {time.time() - start:.1f} s]", file=sys.stderr)
        if self._options.html:
            self._add_to_page(Path(self._options.html), question, leaves, texts)

    def _prompt(self, question: str) -> Prompt:
        text = question if not self._options.prompt else f"{question}\n{self._options.prompt}"
        rates = (self._options.video_fps,) * len(self._videos)
        problem = Problem("question", "shell", "medium", text, self._images, "", (), self._videos, rates)
        try:
            return self._opened.run.encoder(problem)
        except OverlongError as error:
            raise UserError(f"{error}; shorten it, show less, lower --max_pixels or raise --max_prompt_tokens") from None

    def _end(self, leaf: Answer, texts: TokenTexts) -> None:
        self._write("" if "".join(texts.texts).endswith("\n") else "\n")
        if self._options.show_entropy:
            windows, measured = self._windows(leaf)
            lines = window_lines(leaf, texts, windows, window=self._window, colour=self._colour, measured=measured)
            self._write("".join(line + "\n" for line in lines))

    def _windows(self, leaf: Answer) -> tuple[Windows, str]:
        """Returns the windows of a complete answer, and where their threshold comes from."""
        a, tau, measured = self._opened.run.config.aepo, self._tau, "--tau_high"
        if self._options.tau_high is None:
            measured = "as in the run"
        if np.isnan(tau):
            measured = f"the answer's own {a.tau_quantile:.0%} quantile"
            tau = batch_threshold([leaf.entropies], definition="trajectory", quantile=a.tau_quantile, window=self._window)
        return find_windows(leaf, self._opened.run.trigger, tau=tau, window=self._window), measured

    def _add_to_page(self, path: Path, question: str, leaves: Sequence[Answer], texts: Sequence[TokenTexts]) -> None:
        from ares_jax.reporting.answers import answers_page  # matplotlib takes a second

        answers = []
        for leaf, text in zip(leaves, texts, strict=True):
            windows, _ = self._windows(leaf)
            marks = zip(windows.inside(self._window).tolist(), windows.validated.tolist(), strict=True)
            answers.append(
                {
                    "tokens": text.texts, "entropies": leaf.entropies.tolist(), "window_means": leaf.window_means.tolist(),
                    "marks": [" ".join(["h"] * inside + ["w"] * starts) for inside, starts in marks],
                    "tau_high": windows.tau, "finish_reason": leaf.finish_reason, "parent": -1, "branch_position": 0,
                }
            )  # fmt: skip
        shown = [*self._images, *(frame for video in self._videos for frame in video[:8])]
        self._page.append({"question": question, "images": [to_data_url(image) for image in shown], "answers": answers})
        s = self._sampling
        note = f"temperature {s.temperature:g}, top-p {s.top_p:g}, top-k {s.top_k}, seed {self._options.seed}"
        try:
            write_atomic(path, answers_page(f"ARES: {Path(self._options.model_path).resolve().name}", note, self._page))
        except OSError as error:
            raise UserError(f"--html={path}: {error.strerror}; name a file that can be written") from None
        print(f"[{path}]", file=sys.stderr)
