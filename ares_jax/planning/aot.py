"""Ahead of time: the real programs through the compiler for TPUs or GPUs, on shapes, without a device or weights."""

import functools
import math
import multiprocessing
import os
import pickle
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from ml_collections import ConfigDict

from ares_jax.aepo.learner import Learner
from ares_jax.cold_start.sft import fine_tuning_loss
from ares_jax.errors import UserError
from ares_jax.models.lora import Lora
from ares_jax.models.qwen2_5_vl import Qwen25VLConfig, VisionInputs
from ares_jax.models.qwen2_5_vl.model import Qwen25VL, abstract_model
from ares_jax.models.qwen2_5_vl.paged import cache_spec, cached_heads
from ares_jax.parallel.chips import GPUS, TPUS
from ares_jax.parallel.distributed import piece_shape
from ares_jax.parallel.micro_batch import row_count
from ares_jax.parallel.sharding import Placement, batch_sharding, make_mesh, place_model
from ares_jax.params import narrower, to_flat
from ares_jax.planning.gpu_targets import target_config
from ares_jax.planning.hlo import Work, work
from ares_jax.sampling.options import engine_options
from ares_jax.sampling.programs import DecodeState, Programs, Prompts, cut_shapes
from ares_jax.sampling.shapes import prompt_sizes, prompts_together
from ares_jax.training import Update, abstract_state, make_optimizer, trainable
from ares_jax.training.log_probs import token_statistics
from data_pipeline import micro_batch
from data_pipeline.micro_batch import AEPO_FIELDS, MODEL_FIELDS, SFT_FIELDS, TREE_FIELDS

# What lies in memory while each program runs, by its name, in bytes of a chip; and what lowers it.
_Programs = tuple[dict[str, dict[str, int]], Mapping[str, Callable[[], jax.stages.Lowered]]]


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program. Bytes are those of one chip."""

    resident: Mapping[str, int]  # what lies in memory while it runs, by name; its arguments among them
    temporary: int
    new: int  # results that take no argument's place
    offloaded: int  # in the host's memory
    work: Work  # what it does
    seconds: float  # that the compiler took
    text: str  # of the program as it was given to the compiler (StableHLO)
    refused: str = ""  # why it cannot run

    @property
    def peak(self) -> int:
        return sum(self.resident.values()) + self.temporary + self.new


def topology_devices(name: str) -> Sequence[Any]:
    """Returns the devices of a TPU slice such as "v5p:2x2x2", or of GPUs: "h200:8", or "h200:4x8" on four hosts.

    Raises `UserError` if there is no compiler for them here, or if it knows no such slice.
    """
    kind, _, shape = name.partition(":")
    if kind in GPUS:
        return _gpus(name, kind, shape)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if kind not in TPUS:
        raise UserError(
            f"--topology={name}: give one of {', '.join(TPUS)} and a shape, such as v5p:2x2x2, or one of {', '.join(GPUS)} "
            "and a number of GPUs, such as h200:8"
        )
    # Both cores of a v4 are one device to JAX on a TPU; the compiler takes them for two unless it is told.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"--topology={name}: the TPU compiler has no such slice ({reason}); it needs `pip install libtpu==0.0.42.1`"
        ) from None


def _gpus(name: str, kind: str, shape: str) -> Sequence[Any]:
    if not re.fullmatch(r"([1-9]\d*x)?[1-9]\d*", shape):
        raise UserError(f"--topology={name}: give a number of GPUs, such as {kind}:8, or hosts x GPUs, such as {kind}:4x8")
    hosts, _, each = shape.rpartition("x")
    try:
        return topologies.get_topology_desc(
            platform="cuda", target_config=target_config(kind), topology=f"1x{hosts or 1}x{each}"
        ).devices
    except Exception as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"--topology={name}: no compiler for GPUs ({reason}); it needs `pip install jax[cuda13]`, and JAX_PLATFORMS=cpu"
        ) from None


def host_count(devices: Sequence[Any]) -> int:
    """Returns on how many hosts, each a process of a run, these devices are."""
    return len({device.process_index for device in devices})


def bytes_per_chip(tree: Any) -> int:
    """Returns how much of a tree of placed shapes lies on one chip."""

    def local(leaf):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        return int(np.prod(shape)) * leaf.dtype.itemsize

    return sum(map(local, jax.tree.leaves(tree)))


def learner_programs(
    config: ConfigDict,
    shape: Qwen25VLConfig,
    devices: Sequence[Any],
    names: Sequence[str] = ("log_probs", "first", "more", "apply"),
) -> dict[str, Compiled]:
    """Returns programs of an AEPO update on a micro-batch, by name."""
    return _compile_all(*_learner(config, shape, devices), names)


def _learner(config: ConfigDict, shape: Qwen25VLConfig, devices: Sequence[Any]) -> _Programs:
    model, place = _placed(config, shape, devices)
    trained = trainable(config.optimizer, lora=model.lora is not None)
    optimizer = make_optimizer(config.optimizer, learning_rate=config.aepo.learning_rate, steps=config.aepo.steps)
    learner = Learner(
        model, np.zeros(shape.text.vocab_size, bool), optimizer, config.aepo, place,
        temperature=config.sampler.temperature, trainable=trained,
    )  # fmt: skip
    fixed = ["reference_log_prob"] if config.aepo.kl.weight else []
    if config.aepo.old_log_probs == "recomputed":
        fixed.append("recomputed_log_prob")
    batch = batch_shapes(config, place, (*AEPO_FIELDS, *TREE_FIELDS, *fixed))
    state = abstract_state(to_flat(model), optimizer, place, trained)
    resident = _resident(state, batch, trained, reference="reference_log_prob" in fixed)
    programs = learner.lower(state, batch)
    return _while_running(programs, resident, on_host=config.aepo.kl.reference == "host"), programs


def fine_tuning_programs(
    config: ConfigDict, shape: Qwen25VLConfig, devices: Sequence[Any], names: Sequence[str] = ("first", "more", "apply")
) -> dict[str, Compiled]:
    """Returns programs of a step of supervised fine-tuning on a micro-batch, by name."""
    return _compile_all(*_fine_tuning(config, shape, devices), names)


def _fine_tuning(config: ConfigDict, shape: Qwen25VLConfig, devices: Sequence[Any]) -> _Programs:
    model, place = _placed(config, shape, devices)
    trained, k = trainable(config.optimizer, lora=model.lora is not None), config.cold_start
    optimizer = make_optimizer(config.optimizer, learning_rate=k.learning_rate, steps=1000, final_fraction=0.1)
    statistics = token_statistics(model, jnp.zeros(shape.text.vocab_size, bool))
    update = Update(fine_tuning_loss(statistics, k.kl.estimator), optimizer, place, trained)
    guided = ["reference_log_prob"] if any(k.kl.weight) else []
    batch = batch_shapes(config, place, (*SFT_FIELDS, *guided))
    state = abstract_state(to_flat(model), optimizer, place, trained)
    resident, programs = _resident(state, batch, trained, reference=bool(guided)), update.lower(state, batch)
    return _while_running(programs, resident), programs


def largest_piece(config: ConfigDict, shape: Qwen25VLConfig, devices: Sequence[Any]) -> int:
    """Returns the bytes of a parameter that every chip holds whole at a time while weights are handed to the sampler."""
    model, place = _placed(config, shape, devices)
    params = place.abstract(to_flat(model))
    return max(math.prod(piece_shape(x.shape, x.dtype, x.sharding)) * x.dtype.itemsize for x in params.values())


def sampler_programs(
    config: ConfigDict, shape: Qwen25VLConfig, devices: Sequence[Any], names: Sequence[str] = ("prefill", "decode")
) -> dict[str, Compiled]:
    """Returns programs as the engine runs them, on `sampler.tensor` of the devices, rows at their longest, by name."""
    s, options = config.sampler, engine_options(config)
    if not 1 <= s.tensor <= len(devices):
        raise UserError(f"sampler.tensor={s.tensor}: the slice has {len(devices)} chips; give 1 to {len(devices)}")
    mesh = make_mesh(tensor=s.tensor, devices=devices[: s.tensor])
    model, place = _placed(config, shape, devices, mesh=mesh)
    params = arranged = place.abstract(to_flat(model))
    if devices[0].platform != "tpu":  # as the engine arranges them there
        arranged = cut_shapes(params)

    def array(dimensions, dtype, *spec):
        return jax.ShapeDtypeStruct(dimensions, dtype, sharding=jax.NamedSharding(mesh, jax.P(*spec)))

    t, none = shape.text, jnp.zeros(shape.text.vocab_size, bool)
    programs = Programs(
        model, eos_token_ids=(0,), banned=none, trigger=none, steps=options.decode_steps, kernel=options.kernel,
        paged_attention=options.paged_attention, prefill_layers=options.prefill_layers,
        prefill_chunk=options.prefill_chunk,
    )  # fmt: skip
    heads = cached_heads(t.num_heads, t.num_kv_heads, s.tensor)
    with jax.set_mesh(mesh):
        pages = array((t.num_layers, s.pages, s.page_size, 2 * heads, t.head_dim), model.text.dtype, *cache_spec(heads))
    tokens, patches = prompt_sizes(s.max_prompt_tokens, s.page_size, s.prefill_chunk)[-1], s.max_prompt_patches
    rows = prompts_together(tokens, s.prefill_chunk, s.prefill_batch)
    vision = VisionInputs(
        array((rows, patches, shape.vision.patch_values), jnp.float32), array((rows, patches, 2), jnp.int32),
        array((rows, patches), jnp.int32), array((rows, patches), jnp.int32),
    )  # fmt: skip
    prompts = Prompts(
        array((rows, tokens), jnp.int32), array((rows, 3, tokens), jnp.int32), array((rows, tokens), jnp.int32),
        array((rows, tokens // s.page_size), jnp.int32), vision,
    )  # fmt: skip
    width = options.pages(options.max_context_tokens)
    kinds = {
        "alive": jnp.bool_, "key": jnp.uint32, "temperature": jnp.float32, "top_p": jnp.float32, "tau_high": jnp.float32,
        "ring": jnp.float32,
    }  # fmt: skip
    widths = {"key": (2,), "ring": (config.aepo.window,), "ring_tokens": (config.aepo.window,)}
    fields = {name: array((s.slots, *widths.get(name, ())), kinds.get(name, jnp.int32)) for name in DecodeState._fields}
    sequences = DecodeState(**fields)
    table = array((s.slots, width), jnp.int32)
    resident = {"parameters": bytes_per_chip(params), "KV pages": bytes_per_chip(pages)}
    given = {"prefill": (prompts,), "decode": (table, sequences)}
    jitted = {"prefill": jax.jit(programs.prefill, donate_argnums=1), "decode": programs.decode}
    compiled: dict[str, Compiled] = {}
    with jax.set_mesh(mesh):  # says that the platform is a TPU's
        for name in names:
            lower = functools.partial(jitted[name].lower, arranged, pages, *given[name])
            compiled[name] = compile_lowered(lower(), resident | {"batch": bytes_per_chip(given[name])})
            if (work := compiled[name].work).page_kernels:  # each reads every key and value of the rows once
                work.bytes += s.decode_steps * s.slots * width * bytes_per_chip(pages) / s.pages
    return compiled


def batch_shapes(config: ConfigDict, place: Placement, fields: Sequence[str]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a full micro-batch with the model's fields and these, rows split over the mesh."""
    p = config.packing
    rows, split = row_count(p.rows, place.mesh.shape), batch_sharding(place.mesh)
    sizes = micro_batch.shapes((*MODEL_FIELDS, *fields), rows=rows, row_tokens=p.row_tokens, row_patches=p.row_patches)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=split) for name, (shape, dtype) in sizes.items()}


def _placed(
    config: ConfigDict, shape: Qwen25VLConfig, devices: Sequence[Any], mesh: jax.sharding.Mesh | None = None
) -> tuple[Qwen25VL, Placement]:
    """`mesh`: the sampler's, whose model has no LoRA and no weights wider than its arithmetic."""
    m, lora = config.model, Lora(**config.lora) if config.lora.rank and mesh is None else None
    types = {"dtype": jnp.dtype(m.dtype), "param_dtype": jnp.dtype(m.param_dtype)}
    if mesh is not None:
        types["param_dtype"] = narrower(*types.values())
    model = abstract_model(shape, **types, remat=m.remat, lora=lora)
    return model, place_model(model, mesh or make_mesh(**config.mesh, devices=devices))


def _resident(state: Any, batch: Any, trained: Callable[[str], bool], *, reference: bool) -> dict[str, int]:
    own = {name: value for name, value in state.params.items() if trained(name)}
    gradients = {name: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding) for name, x in own.items()}
    resident = {
        "parameters": bytes_per_chip(state.params), "optimizer": bytes_per_chip(state.optimizer),
        "gradients": bytes_per_chip(gradients), "batch": bytes_per_chip(batch),
    }  # fmt: skip
    return resident | ({"reference": bytes_per_chip(own)} if reference else {})


def _while_running(names: Iterable[str], resident: Mapping[str, int], *, on_host: bool = False) -> dict[str, dict[str, int]]:
    """Returns what of it lies there while each program runs. `on_host`: the reference, but for its log-probs."""

    def there(part, name):
        if part == "gradients":
            return name not in ("first", "log_probs")  # those of the first micro-batch are a result
        return part != "reference" or name == "log_probs" or not on_host

    return {name: {part: size for part, size in resident.items() if there(part, name)} for name in names}


def _compile_all(
    residents: Mapping[str, dict[str, int]],
    programs: Mapping[str, Callable[[], jax.stages.Lowered]],
    names: Sequence[str] | None = None,
) -> dict[str, Compiled]:
    return {name: compile_lowered(programs[name](), residents[name]) for name in names or programs}


_STAGES = {"cold_start": _fine_tuning, "aepo": _learner}


def without_code(
    config: ConfigDict, shape: Qwen25VLConfig, topology: str, stage: str = "aepo", name: str = "more"
) -> Compiled:
    """Returns a program of a stage (the gradients') as it is scheduled and laid out in memory, before its machine code.

    That is most of a compilation for TPUs. Their compiler cannot be asked to stop there: a process compiles, and is ended
    once the compiler has written its plan of the memory down. For GPUs the code is made in seconds: it is waited for.
    """
    begin = time.time()
    with tempfile.TemporaryDirectory() as folder:
        child = multiprocessing.get_context("spawn").Process(
            target=_compile_in, args=(folder, config, shape, topology, stage, name), daemon=True
        )
        child.start()
        written = None
        while child.is_alive() and not written:
            child.join(0.5)
            written = _written(Path(folder), name) if topology.split(":")[0] in TPUS else None
        child.kill()
        child.join()
        if (done := Path(folder) / "done").exists():
            return pickle.loads(done.read_bytes())
        if not written:
            raise RuntimeError(f"the compiler of {topology} died with {child.exitcode}")
        resident = pickle.loads((Path(folder) / "resident").read_bytes())
    plan, text = written
    sizes = _allocations(plan)
    new = sum(size for size, kind in sizes if "maybe-live-out" in kind and "parameter" not in kind)
    return Compiled(resident, _temporary(sizes), new, 0, work(text), time.time() - begin, "")


def _allocations(plan: str) -> list[tuple[int, str]]:
    """Returns the bytes and the kinds of what the compiler's plan puts into HBM: other memories have a colour."""
    found = re.findall(r"^allocation \d+: size (\d+), (?!color)(.*):$", plan, re.MULTILINE)
    return [(int(size), kind) for size, kind in found]


def _temporary(allocations: list[tuple[int, str]]) -> int:
    return sum(size for size, kind in allocations if "preallocated-temp" in kind)


def _compile_in(folder: str, config: ConfigDict, shape: Qwen25VLConfig, topology: str, stage: str, name: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    tempfile.tempdir = folder
    residents, programs = _STAGES[stage](config, shape, topology_devices(topology))
    (Path(folder) / "resident").write_bytes(pickle.dumps(residents[name]))
    program = _compile_all(residents, programs, (name,))[name]
    written = Path(folder) / "done.part"
    written.write_bytes(pickle.dumps(program))
    written.rename(Path(folder) / "done")


def _written(folder: Path, name: str) -> tuple[str, str] | None:
    """Returns the compiler's plan of the memory and its program, once both are there: a report follows them."""
    for report in folder.glob(f"*/*.jit_{name}.*.after_optimizations-memory-usage-report.txt"):
        names = (report.name.replace("-memory-usage-report", kind) for kind in ("-buffer-assignment", ""))
        try:
            plan, text = ((report.parent / name).read_text() for name in names)
            return (plan, text) if re.search(r"^ENTRY .*?^}", text, re.MULTILINE | re.DOTALL) else None  # being written
        except FileNotFoundError:  # the compiler gave up, and its folder went
            return None
    return None


def compile_lowered(lowered: jax.stages.Lowered, resident: dict[str, int]) -> Compiled:
    """Compiles and counts. `resident`: what lies in memory meanwhile, by name, in bytes of a chip."""
    begin = time.time()
    with tempfile.TemporaryDirectory() as folder:
        # The compiler writes its program down itself: jaxlib 0.10.2 cannot read asynchronous collectives of a newer libtpu.
        options: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            memory: Any = lowered.compile(compiler_options=options).memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            text = str(error)
            if "RESOURCE_EXHAUSTED" not in text:
                raise
            used = re.search(r"Used \S+ of \S+ hbm", text)
            reason = used.group() if used else text.splitlines()[0][:200]
            return Compiled(resident, 0, 0, 0, Work(), time.time() - begin, "", reason)
        seconds = time.time() - begin
        written = max(Path(folder).glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size)
        done, temporary = work(written.read_text()), memory.temp_size_in_bytes
        if list(Path(folder).glob("*tpu_comp_env.txt")):
            # libtpu 0.0.42.1 says 35.5 GiB of a program (7B on v5p:4x4x8) for which its plan has a buffer of 23.0.
            plan = written.with_name(written.name.replace(".txt", "-buffer-assignment.txt"))
            temporary = _temporary(_allocations(plan.read_text()))
    new = max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)
    return Compiled(resident, temporary, new, memory.host_temp_size_in_bytes, done, seconds, lowered.as_text())
