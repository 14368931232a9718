"""What every command needs of a run: tokenizer, prompts, problems, the model's structure, the weights of each stage."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool
from ml_collections import ConfigDict

from ares_jax.checkpoints.folders import is_remote
from ares_jax.checkpoints.huggingface import load_hf, read_config
from ares_jax.checkpoints.manager import Checkpoints
from ares_jax.checkpoints.orbax_params import is_converted, load_orbax
from ares_jax.errors import UserError
from ares_jax.lifecycle.startup import STARTUP
from ares_jax.models.lora import Lora, merged
from ares_jax.models.qwen2_5_vl import Qwen25VL, Qwen25VLConfig, TextConfig, VisionConfig
from ares_jax.models.qwen2_5_vl.model import abstract_model, new_lora, new_model
from ares_jax.parallel.distributed import barrier, gather, is_first, share, to_host
from ares_jax.parallel.micro_batch import row_count, share_of
from ares_jax.parallel.sharding import Placement, make_mesh, place_model
from ares_jax.params import Params, narrower, to_flat, with_params
from ares_jax.run.environment import record_environment, save_config
from ares_jax.run.samplers import colocated, sampler_mesh
from ares_jax.sampling import Engine
from ares_jax.sampling.local import LocalSampler
from ares_jax.sampling.options import engine_options
from ares_jax.sampling.sampler import Sampler
from ares_jax.sampling.trigger_words import WORDS, read_words, trigger_mask
from ares_jax.service.client import RolloutClient
from ares_jax.service.process import start_sampler
from data_pipeline import digits, tokenizer
from data_pipeline.packing import MicroBatches, Segment, pack
from data_pipeline.prompts import Prompt, PromptEncoder
from data_pipeline.reading import Ledger, Reader, read_all
from data_pipeline.records import Keys
from data_pipeline.sources import Mixture, Source, open_sources
from data_pipeline.stream import Stream

STAGES = ("base", "cold_start", "aepo")  # in the order in which they come


@dataclass(frozen=True)
class Run:
    """A run's folder, opened. `model` is abstract (shapes in place of weights), with LoRA if that is on."""

    config: ConfigDict
    folder: Path
    encoder: PromptEncoder
    model: Qwen25VL
    placement: Placement  # of the parameters
    banned: Bool[np.ndarray, "V"]  # never sampled, and outside every normaliser: sampler and learner share it
    trigger: Bool[np.ndarray, "V"]  # V_sem

    @property
    def tokenizer(self):
        return self.encoder.tokenizer

    def problems(self, split: str) -> Mixture:
        """Returns the problems of "train", "validation" or "test"."""
        d = self.config.data
        keys = Keys(**{field: tuple(names) for field, names in d.fields.items()})
        return open_sources(tuple(d[split]), keys)

    def stream(self, source: Source, transform: Callable[[Any], Any], *, seed: int, batch_size: int | None = None) -> Stream:
        """Returns an endless stream over `transform(problem)` (over lists of `batch_size`), this process's share.

        `batch_size` counts the elements of all processes. Raises `UserError` if it cannot be split among them.
        """
        d, processes = self.config.data, jax.process_count()
        if batch_size is not None:
            batch_size = share_of(batch_size, "cold_start.batch_size", processes)
        return Stream(
            source, transform, seed=seed, batch_size=batch_size, process_index=jax.process_index(),
            process_count=processes, workers=d.workers, prefetch=d.prefetch, max_corrupt_share=d.max_corrupt_share,
        )  # fmt: skip

    def ledger(self, source: Source) -> Ledger:
        """Returns an empty ledger for problems that cannot be read or do not fit."""
        return Ledger(len(source), self.config.data.max_corrupt_share)

    def prompts(self, split: str, *, limit: int | None = None) -> list[Prompt]:
        """Returns the prompts of a split (the first `limit`), in order, without those that cannot be read or do not fit."""
        problems = self.problems(split)
        elements = read_all(Reader(problems, self.encoder), range(len(problems)), self.ledger(problems))
        return [prompt for _, prompt in itertools.islice(elements, limit)]

    def pack(self, segments: Sequence[Segment]) -> MicroBatches:
        """Returns micro-batches of this process's segments: its own rows of each, shaped as every other process's.

        Raises `UserError` if the rows cannot be split among processes, `DataError` as `pack` does.
        """
        p, mesh, processes = self.config.packing, self.placement.mesh, jax.process_count()
        parts, rows = row_count(0, mesh.shape), row_count(p.rows, mesh.shape)
        return pack(
            segments, rows=share_of(rows, "packing.rows", processes), row_tokens=p.row_tokens, row_patches=p.row_patches,
            halvings=p.halvings, parts=-(-parts // processes), gather=gather,
            placeholder_ids=self.encoder.placeholder_ids,
        )  # fmt: skip

    def decode(self, token_ids: Sequence[int]) -> str:
        """Returns the text of a response, without its end-of-turn token."""
        ids = [i for i in token_ids if i != self.tokenizer.eos_token_id]
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def initial_params(self) -> Params:
        """Returns the weights before any training: pretrained, or random. LoRA's, if that is on, change nothing yet."""
        m, model, seed = self.config.model, self.model, self.config.seed
        if m.pretrained:
            load = load_orbax if is_converted(m.pretrained) else load_hf
            params = to_flat(load(m.pretrained, mesh=self.placement.mesh, dtype=jnp.dtype(m.param_dtype)))
        else:
            params = self.placement.put(to_flat(new_model(model.config, seed, **_types(self.config))))
        return params | (self.placement.put(new_lora(model.config, seed, model.lora)) if model.lora else {})

    def checkpoints(self, stage: str) -> Checkpoints:
        return Checkpoints(self.folder / "checkpoints" / stage, keep=self.config.aepo.keep_checkpoints)

    def trained_stages(self) -> list[str]:
        """Returns the stages that have a checkpoint."""
        folder = self.folder / "checkpoints"
        return [s for s in STAGES if (folder / s).is_dir() and self.checkpoints(s).latest() is not None]

    def params(self, stage: str) -> Params:
        """Returns the newest weights of a stage, to train. Raises `UserError` if it has none, or they are damaged."""
        if stage == "base" and not self.config.cold_start.warmup_steps:
            return self.initial_params()
        manager = self.checkpoints(stage)
        if (step := manager.latest()) is None:
            command = "train" if stage == "aepo" else "cold_start"
            raise UserError(f"{manager.folder}: no checkpoint yet; run `python -m ares_jax.{command}` first")
        return manager.restore_params(step, self.placement.abstract(to_flat(self.model)))

    def params_for_aepo(self) -> Params:
        """Returns the weights that AEPO starts from: the cold start's, or the published ones where there was none."""
        pretrained = self.config.model.pretrained
        if not pretrained or self.checkpoints("cold_start").latest() is not None:
            return self.params("cold_start")
        if is_first():
            print(f"AEPO: no cold start in {self.folder}; it starts from {pretrained} as it is", flush=True)
        return self.initial_params()

    def load(self, stage: str) -> Qwen25VL:
        """Returns the model with the newest weights of a stage, LoRA merged."""
        return self.merged_model(self.params(stage))

    def merged_model(self, params: Params) -> Qwen25VL:
        """Returns the model with these weights, LoRA merged."""
        plain = abstract_model(self.model.config, **_types(self.config))
        return with_params(plain, dict(merged(params, self.model.lora)))

    def sampler_params(self, params: Params) -> Iterator[tuple[str, jax.Array]]:
        """Yields the weights as the sampler has them: LoRA merged, no wider than the arithmetic, which rounds them first."""
        storage = self._sampler_types["param_dtype"]
        for name, value in merged(params, self.model.lora):
            yield name, value.astype(storage)

    @property
    def _sampler_types(self) -> dict:
        types = _types(self.config)
        return {**types, "param_dtype": narrower(types["dtype"], types["param_dtype"])}

    def host_params(self, params: Params) -> dict[str, np.ndarray]:
        """Returns the weights as the sampler takes them, as NumPy arrays."""
        return {name: to_host(value) for name, value in self.sampler_params(params)}

    @contextmanager
    def sampler(self) -> Iterator[Sampler]:
        """Yields this process's sampler: one of those at `sampler.url`, or its own engine (`colocated`), or a service that
        it starts.

        Raises `UserError` if several processes would each start a service.
        """
        s = self.config.sampler
        if colocated(self.config):
            if not s.colocated and is_first():
                print("sampler: no sampler.url, so it is in the learner's own process, with which it shares the devices")
            yield LocalSampler(self.own_engine())
            return
        if s.url:
            urls = s.url.split(",")
            client = RolloutClient(share(urls) or [urls[jax.process_index() % len(urls)]], patience=s.start_timeout)
            client.wait_until_ready()
            yield client
            return
        if jax.process_count() > 1:
            raise UserError(
                f"{jax.process_count()} processes and no sampler: name running ones with sampler.url, or set "
                "sampler.colocated=True"
            )
        resolved = Path(__file__).parents[2] / "configs" / "resolved.py"
        arguments = [f"--config={resolved}:{self.folder / 'config.json'}", f"--workdir={self.folder}"]
        with start_sampler(arguments, folder=self.folder, timeout=s.start_timeout, drain_seconds=s.drain_seconds) as process:
            yield RolloutClient([process.url], patience=s.start_timeout)

    def push(self, client: Sampler, params: Params, version: int) -> None:
        """Gives this process's sampler new weights; every process calls it together."""
        client.push_weights(self.sampler_params(params), version)

    def engine(self, params: Params) -> Engine:
        """Returns an engine with the given weights, as `sampler_params` gives them, on the devices where they lie."""
        plain = abstract_model(self.model.config, **self._sampler_types)
        return Engine(
            with_params(plain, dict(self.sampler_params(params))), engine_options(self.config),
            eos_token_ids=[self.tokenizer.eos_token_id],
            banned=self.banned, trigger_mask=self.trigger, token_bytes=tokenizer.token_bytes(self.tokenizer),
        )  # fmt: skip

    def own_engine(self) -> Engine:
        """Returns an engine on this host's first devices; its weights are zeros until some are pushed."""
        places = place_model(self.model, sampler_mesh(self.config)).params
        return self.engine(
            {name: jnp.zeros(x.shape, x.dtype, device=places[name]) for name, x in to_flat(self.model).items()}
        )


def open_run(
    config: ConfigDict, folder: Path, *, mesh: jax.sharding.Mesh | None = None, read_only: bool = False
) -> Run:
    """Makes or opens the run in `folder`: its tokenizer and `config.json` are written if they are not there.

    Of several processes the first writes; all must see the same folder.

    `mesh`: where parameters live; by default `config.mesh` over all devices. `read_only`: nothing is written to a run that
    is there (its `config.json` stays, whatever `config` says).
    """
    m, d = config.model, config.data
    if m.shape and not m.pretrained:
        raise UserError(
            f"model.shape={m.shape} has no weights; name the folder of the checkpoint with --config.model.pretrained="
        )
    if is_remote(m.pretrained):
        raise UserError(
            f"model.pretrained={m.pretrained}: a run reads it from a folder; copy it with `python -m ares_jax.convert "
            "--from=hf --to=hf`, or mount the bucket with gcsfuse (docs/pods.md)"
        )
    if is_first() and not read_only:
        save_config(config, folder)
        record_environment(folder)
        if not m.pretrained and not (folder / "tokenizer").is_dir():
            trained = tokenizer.train_tokenizer(digits.corpus(), d.vocab_size)
            pixels = tokenizer.make_image_processor(d.min_pixels, d.max_pixels)
            tokenizer.save_processors(folder / "tokenizer", trained, pixels)
    barrier("run")
    if not (folder / "config.json").is_file():
        raise UserError(f"--workdir={folder}: not the folder that process 0 writes to; name storage that all hosts share")
    if m.pretrained:
        text, pixels = tokenizer.load_processors(Path(m.pretrained))
        pixels = tokenizer.make_image_processor(d.min_pixels, d.max_pixels)
        model_config = read_config(Path(m.pretrained))
    else:
        text, pixels = tokenizer.load_processors(folder / "tokenizer")
        model_config = _model_config(config, text)
    vocabulary = model_config.text.vocab_size
    strings = tokenizer.token_strings(text)
    banned = np.arange(vocabulary) >= len(text)
    banned[list(text.get_added_vocab()[name] for name in tokenizer.NEVER_SAMPLED if name in text.get_added_vocab())] = True
    trigger = np.zeros(vocabulary, bool)
    words = read_words(Path(config.aepo.trigger_words)) if config.aepo.trigger_words else WORDS
    trigger[: len(strings)] = trigger_mask(strings, words)
    lora = Lora(**config.lora) if config.lora.rank else None
    model = abstract_model(model_config, **_types(config), lora=lora)
    encoder = PromptEncoder(
        text, pixels, tokens_per_second=model_config.vision.tokens_per_second,
        format_prompt=_format_prompt(d.format_prompt), max_tokens=config.sampler.max_prompt_tokens,
        max_patches=config.sampler.max_prompt_patches,
    )  # fmt: skip
    placement = place_model(model, mesh or make_mesh(**config.mesh))
    STARTUP.mark("tokenizer")
    return Run(config, folder, encoder, model, placement, banned, trigger)


def _format_prompt(file: str) -> str:
    try:
        return Path(file).read_text() if file else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.format_prompt={file}: cannot be read ({error}); name a file with a Jinja template") from None


def _model_config(config: ConfigDict, text) -> Qwen25VLConfig:
    t, v = config.model.text, config.model.vision
    ids = dict(
        zip(
            ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
            text.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]),
            strict=True,
        )
    )
    return Qwen25VLConfig(
        TextConfig(
            math.ceil(len(text) / 64) * 64, t.hidden_size, t.intermediate_size, t.num_layers, t.num_heads, t.num_kv_heads,
            tuple(t.mrope_section), t.rope_theta,
        ),
        VisionConfig(v.hidden_size, v.intermediate_size, v.num_layers, v.num_heads, tuple(v.full_attention_layers)),
        **ids,
    )  # fmt: skip


def _types(config: ConfigDict) -> dict:
    m = config.model
    return {"dtype": jnp.dtype(m.dtype), "param_dtype": jnp.dtype(m.param_dtype), "remat": m.remat}
