"""`python -m ares_jax.plan`: does a run fit on a TPU slice or on GPUs, and how fast could it be? Without either.

Memory is what the compiler of the real programs says, traffic is counted in its text. Times are bounds from below by the
chip's datasheet.
"""

import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from ares_jax.checkpoints.huggingface import read_config
from ares_jax.commands import cli
from ares_jax.errors import UserError
from ares_jax.models.flops import Flops, forward_flops, gradient_flops, model_flops
from ares_jax.models.qwen2_5_vl import Qwen25VLConfig
from ares_jax.models.qwen2_5_vl.config import PUBLISHED
from ares_jax.models.qwen2_5_vl.layers import REMAT
from ares_jax.models.qwen2_5_vl.paged import cached_heads, paged_implementation
from ares_jax.parallel.chips import Chip, chip_of
from ares_jax.parallel.micro_batch import check_rows, row_count
from ares_jax.parallel.sharding import mesh_sizes
from ares_jax.planning import aot
from ares_jax.planning.aot import Compiled
from ares_jax.planning.estimate import Estimate, estimate
from ares_jax.sampling.shapes import prompts_together

TOPICS = {
    "The run (every field: ares_jax/config.py)": ("config", "workdir"),
    "The slice": ("topology",),
    "An iteration": ("mean_response",),
    "Looking for a better mesh": ("search", "compile"),
}

_TOPOLOGY = flags.DEFINE_string(
    "topology", "v5p:2x2x2", "TPU slice (v5p:2x2x2 is a v5p-16) or GPUs (h200:8; h200:4x8 on 4 hosts); several are compared"
)
_SEARCH = flags.DEFINE_bool("search", False, "try mesh shapes, remat policies and micro-batches of the learner; rank them")
_COMPILE = flags.DEFINE_integer("compile", 3, "how many of the search's best are compiled; the others are estimates")
_RESPONSE = flags.DEFINE_integer("mean_response", 2048, "tokens of a mean response, for the bound of an AEPO iteration")
_GIB = 2**30
_TITLES = {"log_probs": "fixed log-probs", "more": "gradients", "apply": "apply", "prefill": "prefill", "decode": "decode"}
_COMPARED = (
    f"{'slice':<12} {'chips':>5} {'data':>4} {'fsdp':>5} {'seq':>3} {'tens':>4} {'rows':>5}  {'remat':<7} {'GiB':>6} "
    f"{'of HBM':>6} {'TFLOP':>6} {'GB moved':>8} {'GB sent':>7}  {'ms arithmetic/memory/network':>28} {'tokens/s':>9} "
    f"{'MFU':>9}"
)


class Bound(NamedTuple):
    """Seconds that a program cannot be faster than, by each of what a chip has."""

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        return max(self)


def model_shape(config: ConfigDict) -> Qwen25VLConfig:
    """Returns the shape of the checkpoint, or the published one of `model.shape`. Raises `UserError` without either."""
    m = config.model
    if m.pretrained:
        return read_config(Path(m.pretrained))
    if m.shape not in PUBLISHED:
        raise UserError(f"model.shape={m.shape!r} is not one of {', '.join(PUBLISHED)}; or set model.pretrained")
    return PUBLISHED[m.shape]


def row_flops(config: ConfigDict, shape: Qwen25VLConfig) -> Flops:
    """Returns the operations of a pass over a full row, taken as one segment: the most it can cost."""
    p = config.packing
    frame = config.data.max_pixels // shape.vision.patch_size**2
    return forward_flops(shape, tokens=p.row_tokens, patches=p.row_patches, context=p.row_tokens / 2, frame=frame)


def kernel_flops(config: ConfigDict, shape: Qwen25VLConfig, chips: int, platform: str = "tpu") -> dict[str, float]:
    """Returns each program's operations on one chip inside kernels, and loops over tiles: the compiler's text has none."""
    s, rows = config.sampler, config.packing.rows / chips
    row = row_flops(config, shape)
    frame = min(config.data.max_pixels // shape.vision.patch_size**2, s.max_prompt_patches)
    prompt = forward_flops(
        shape, tokens=s.max_prompt_tokens, patches=s.max_prompt_patches, context=s.max_prompt_tokens / 2, frame=frame
    )
    return {
        "log_probs": rows * row.attention, "more": rows * gradient_flops(row, remat=config.model.remat).attention,
        "prefill": prompts_together(s.max_prompt_tokens, s.prefill_chunk, s.prefill_batch) * prompt.attention / s.tensor,
        "decode": s.slots * s.decode_steps * _token_flops(config, shape, platform) / s.tensor,
    }  # fmt: skip


def _token_flops(config: ConfigDict, shape: Qwen25VLConfig, platform: str) -> float:
    """Returns a decoded token's operations in kernels, at full length: the head's and attention's, where there are such."""
    s, t = config.sampler, shape.text
    head = 2 * t.hidden_size * t.vocab_size if s.kernel in ("tpu", "gpu") else 0
    context = s.max_prompt_tokens + s.max_response_tokens
    kept = cached_heads(t.num_heads, t.num_kv_heads, s.tensor)
    on_a_chip = kept if kept % s.tensor else kept // s.tensor
    kind = paged_implementation(platform, jnp.dtype(config.model.dtype), on_a_chip, t.head_dim, s.paged_attention)
    attention = 4 * t.num_layers * t.num_heads * t.head_dim * context
    return head + (0 if kind == "gather" else attention)


def bound(program: Compiled, kernels: float, chip: Chip) -> Bound:
    """Returns the roofline of a program that does `kernels` operations besides the counted ones."""
    w = program.work
    return Bound((w.flops + kernels) / chip.flops, w.bytes / chip.bandwidth, sum(w.collective.values()) / chip.link)


def table(programs: dict[str, Compiled], kernels: dict[str, float], chip: Chip) -> str:
    """Returns the programs as columns; memory in GiB of a chip."""
    names = list(dict.fromkeys(name for p in programs.values() for name in p.resident))
    kinds = list(dict.fromkeys(kind for p in programs.values() for kind in p.work.collective))

    def line(title, cells):
        return f"{title:<26}" + "".join(f"{cell:>17}" for cell in cells)

    def gib(count):
        return f"{count / _GIB:.2f}" if count else "-"

    known = {name: p for name, p in programs.items() if not p.refused}
    bounds = {name: bound(p, kernels.get(name, 0.0), chip) for name, p in known.items()}

    def cells(give, otherwise="?"):
        return [give(name, known[name]) if name in known else otherwise for name in programs]

    def times(give):
        return cells(lambda name, _: f"{1e3 * give(bounds[name]):.1f}")

    loops = cells(lambda _, p: str(p.work.unknown_loops or "-"))
    lines = [
        line("", [_TITLES[name] for name in programs]),
        *(line(name, [gib(p.resident.get(name, 0)) for p in programs.values()]) for name in names),
        line("results", cells(lambda _, p: gib(p.new))),
        line("activations, scratch", cells(lambda _, p: gib(p.temporary))),
        line("in the host's memory", cells(lambda _, p: gib(p.offloaded))),
        line("peak GiB", cells(lambda _, p: gib(p.peak), "too large")),
        line(f"of {chip.hbm} GiB", cells(lambda _, p: f"{p.peak / _GIB / chip.hbm:.0%}", "no")),
        line("TFLOP", cells(lambda name, p: f"{(p.work.flops + kernels.get(name, 0.0)) / 1e12:.2f}")),
        line("  of them in kernels", cells(lambda name, _: f"{kernels.get(name, 0.0) / 1e12:.2f}")),
        line("GB moved", cells(lambda _, p: f"{p.work.bytes / 1e9:.1f}")),
        *([line("loops not counted", loops)] if any(p.work.unknown_loops for p in known.values()) else []),
        *(
            line(f"GB sent, {kind}", cells(lambda _, p, k=kind: f"{p.work.collective.get(k, 0) / 1e9:.2f}"))
            for kind in kinds
        ),
        line("ms of arithmetic", times(lambda b: b.compute)),
        line("ms of memory", times(lambda b: b.memory)),
        line("ms of network", times(lambda b: b.network)),
        line(
            "ms at once, one by one", cells(lambda name, _: f"{1e3 * max(bounds[name]):.0f}, {1e3 * sum(bounds[name]):.0f}")
        ),
        line("compiled in", [f"{p.seconds:.0f} s" for p in programs.values()]),
    ]
    return "\n".join([*lines, *[f"{_TITLES[name]}: {p.refused}" for name, p in programs.items() if p.refused]])


class Rate(NamedTuple):
    """Bounds of a micro-batch's passes on all chips: everything at once, and one after another."""

    tokens: float  # a second
    mfu: float
    mfu_one_by_one: float


def throughput(
    config: ConfigDict, shape: Qwen25VLConfig, programs: dict[str, Compiled], chip: Chip, chips: int
) -> Rate | None:
    """Returns what the gradients and, if compiled, the reference's log-probs allow; None where one does not fit."""
    passes = {name: programs[name] for name in ("log_probs", "more") if name in programs}
    if any(p.refused or p.peak > chip.usable * _GIB for p in passes.values()):
        return None
    kernels = kernel_flops(config, shape, chips)
    bounds = [bound(p, kernels[name], chip) for name, p in passes.items()]
    seconds = sum(b.seconds for b in bounds)
    rows, row = config.packing.rows, row_flops(config, shape)
    useful = rows * (model_flops(row) + ("log_probs" in passes) * sum(row)) / (chip.flops * chips)
    return Rate(rows * config.packing.row_tokens / seconds, useful / seconds, useful / sum(map(sum, bounds)))


def candidates(config: ConfigDict, shape: Qwen25VLConfig, chips: int, hosts: int) -> Iterator[ConfigDict]:
    """Yields configs with other meshes, remat policies and micro-batches that fill the slice, and that the trainers take."""
    shares = ((t, s, d) for t in (1, 2, 4, 8) for s in (1, 2, 4, 8) for d in (1, 2, 4, 8))
    for tensor, sequence, data in shares:
        parts = tensor * sequence * data
        if chips % parts or parts > chips // 2 or tensor * sequence > chips // hosts or shape.text.num_heads % tensor:
            continue
        for rows, remat in itertools.product((1, 2, 4), REMAT):
            c = config.copy_and_resolve_references()
            c.mesh.update(data=data, fsdp=chips // parts, sequence=sequence, tensor=tensor)
            c.packing.rows = rows * data * c.mesh.fsdp
            c.model.remat = remat
            yield c


def _estimate(config: ConfigDict, shape: Qwen25VLConfig, chip: Chip) -> Estimate:
    p = config.packing
    return estimate(
        shape, config.mesh, remat=config.model.remat, rows=p.rows, row_tokens=p.row_tokens, row=row_flops(config, shape),
        chip=chip,
    )  # fmt: skip


def with_shorter_rows(config: ConfigDict) -> ConfigDict | None:
    """Returns the config with rows half as long, and with answers that fit in them; None where no prompt would."""
    c = config.copy_and_resolve_references()
    p, s = c.packing, c.sampler
    p.update(row_tokens=p.row_tokens // 2, row_patches=p.row_patches // 2)
    room = p.row_tokens - s.max_prompt_tokens
    if room <= 0 or p.row_patches < s.max_prompt_patches:
        return None
    s.max_response_tokens = min(s.max_response_tokens, room)
    return c


def search(config: ConfigDict, shape: Qwen25VLConfig, name: str, compiled: int) -> Iterator[str]:
    """Yields the learner's settings that may fit, the quickest estimate first, then the best of them as compiled.

    Where none fits, the same with rows half as long.
    """
    yield assumptions(chip_of(name))
    while not (yield from _search_rows(config, shape, name, compiled)):
        shorter = with_shorter_rows(config)
        if shorter is None:
            yield f"{name}: no shorter row holds a prompt (sampler.max_prompt_tokens, max_prompt_patches); take more chips"
            return
        config, p = shorter, shorter.packing
        yield (
            f"\nshorter rows: --config.packing.row_tokens={p.row_tokens} --config.packing.row_patches={p.row_patches} "
            f"--config.sampler.max_response_tokens={config.sampler.max_response_tokens}"
        )


def _search_rows(config: ConfigDict, shape: Qwen25VLConfig, name: str, compiled: int) -> Generator[str, None, bool]:
    """Searches with rows as long as they are. Returns whether a setting fits; without compiling, whether one may."""
    devices, chip = aot.topology_devices(name), chip_of(name)
    found = []
    every = list(candidates(config, shape, len(devices), aot.host_count(devices)))
    for c in every:
        e = _estimate(c, shape, chip)
        if e.memory < chip.usable * _GIB:
            found.append((c.packing.rows * c.packing.row_tokens / e.seconds, c, e))
    found.sort(key=lambda x: -x[0])
    fitting = len(found)
    best = {tuple(c.mesh.values()): (rate, c, e) for rate, c, e in reversed(found)}  # of each mesh
    found = sorted(best.values(), key=lambda x: -x[0])
    if not found:
        yield f"{name}: none of {len(every)} settings fits {len(devices)} {chip.unit}"
        return False
    yield f"{name}, {len(devices)} {chip.unit}: {len(every)} settings, {fitting} may fit by estimate. The best of each mesh:"
    yield (
        f"{'data':>4} {'fsdp':>5} {'seq':>4} {'tensor':>6} {'rows':>5}  {'remat':<8} {'GiB':>6} {'ms arithmetic':>14} "
        f"{'network':>8} {'tokens/s':>10}, one after the other"
    )
    for rate, c, e in found[:12]:
        h = c.mesh
        yield (
            f"{h.data:>4} {h.fsdp:>5} {h.sequence:>4} {h.tensor:>6} {c.packing.rows:>5}  {c.model.remat:<8} "
            f"{e.memory / _GIB:>6.1f} {1e3 * e.compute:>14.0f} {1e3 * e.network:>8.0f} {rate:>10.0f}\n"
            f"      {overrides(c, config)}"
        )
    if not compiled:
        return True
    yield f"\nas compiled, a micro-batch's gradients, the best first\n{_COMPARED}"
    lines = []
    for _, c, _ in found[:compiled]:
        bounds, text = compared(c, shape, name)
        lines.append((bounds.mfu_one_by_one if bounds else 0.0, f"{text}\n      {overrides(c, config)}"))
    lines.sort(key=lambda x: -x[0])
    yield from (text for _, text in lines)
    return lines[0][0] > 0


def compared(config: ConfigDict, shape: Qwen25VLConfig, name: str) -> tuple[Rate | None, str]:
    """Returns the bounds of a slice's gradient step and the line that shows it."""
    devices, chip = aot.topology_devices(name), chip_of(name)
    h, p = config.mesh, aot.without_code(config, shape, name)
    start = (
        f"{name:<12} {len(devices):>5} {h.data:>4} {h.fsdp:>5} {h.sequence:>3} {h.tensor:>4} {config.packing.rows:>5}  "
        f"{config.model.remat:<7}"
    )
    if p.refused:
        return None, f"{start} too large: {p.refused}"
    kernels = kernel_flops(config, shape, len(devices), devices[0].platform)["more"]
    times = "/".join(f"{1e3 * x:.0f}" for x in bound(p, kernels, chip))
    rate = throughput(config, shape, {"more": p}, chip, len(devices))
    return rate, (
        f"{start} {p.peak / _GIB:>6.1f} {p.peak / _GIB / chip.hbm:>6.0%} {(p.work.flops + kernels) / 1e12:>6.0f} "
        f"{p.work.bytes / 1e9:>8.0f} {sum(p.work.collective.values()) / 1e9:>7.1f}  {times:>28} "
        + (f"{rate.tokens:>9.0f} {rate.mfu_one_by_one:>4.0%}-{rate.mfu:.0%}" if rate else "does not fit")
        + (f"; {p.work.unknown_loops} loops not counted" if p.work.unknown_loops else "")
    )


def on_slice(config: ConfigDict, chips: int, hosts: int) -> ConfigDict:
    """Returns the config as the trainers take it there: no axis is -1, and `packing.rows` not 0.

    Raises `UserError` where they would.
    """
    check_rows(config, chips, hosts)
    c = config.copy_and_resolve_references()
    c.mesh.update(mesh_sizes(chips, **c.mesh))
    c.packing.rows = row_count(c.packing.rows, c.mesh)
    return c


def overrides(config: ConfigDict, given: ConfigDict) -> str:
    """Returns the flags that make `config` of the given one: those of the mesh, of rows and remat."""
    fields = [*(f"mesh.{axis}" for axis in config.mesh), "packing.rows", "model.remat"]
    ours, theirs = ([reduce(getattr, field.split("."), c) for field in fields] for c in (config, given))
    return " ".join(f"--config.{f}={x}" for f, x, other in zip(fields, ours, theirs, strict=True) if x != other)


def assumptions(chip: Chip) -> str:
    """Returns what the times rest on."""
    return (
        f"Bounds, not measurements: {chip.flops / 1e12:.0f} bf16 TFLOP/s, {chip.bandwidth / 1e9:.0f} GB/s of memory and "
        f"{chip.link / 1e9:.0f} GB/s sent over all links (datasheet), all reached. Every row is one full segment. Loops "
        "count as often as they run; attention's kernels and tiles by hand. Moved: what each fused step reads and writes."
    )


def report(config: ConfigDict, shape: Qwen25VLConfig, name: str, response: int) -> Iterator[str]:
    """Yields the plan, part by part as they are compiled. `response`: mean tokens of one, of an iteration."""
    devices, chip = aot.topology_devices(name), chip_of(name)
    config = on_slice(config, len(devices), aot.host_count(devices))
    kernels = kernel_flops(config, shape, len(devices), devices[0].platform)
    mesh = ", ".join(f"{axis} {size}" for axis, size in config.mesh.items())
    p, s = config.packing, config.sampler
    yield (
        f"{name}: {len(devices)} {chip.unit} of {chip.hbm} GiB; mesh {mesh}; remat {config.model.remat}. Numbers are of one."
    )
    yield assumptions(chip)
    yield f"\nAEPO, a micro-batch of {p.rows} rows of {p.row_tokens} tokens and {p.row_patches} patches"
    learner = aot.learner_programs(config, shape, devices, ("log_probs", "more", "apply"))
    yield table(learner, kernels, chip)
    yield _rate(config, shape, learner, chip, len(devices))
    yield "\nsupervised fine-tuning, the same micro-batch"
    tuning = aot.fine_tuning_programs(config, shape, devices, ("more",))
    yield table(tuning, kernels, chip)
    yield _rate(config, shape, tuning, chip, len(devices))
    yield (
        f"\nsampler, {s.tensor} of the {chip.unit}: "
        f"{prompts_together(s.max_prompt_tokens, s.prefill_chunk, s.prefill_batch)} prompts of "
        f"{s.max_prompt_tokens} tokens; {s.slots} sequences, {s.decode_steps} tokens each at full length"
    )
    sampler = aot.sampler_programs(config, shape, devices)
    yield table(sampler, kernels, chip)
    if all(not x.refused for x in sampler.values()):
        cache = sampler["decode"].resident["KV pages"]
        longest = -(-(s.max_prompt_tokens + s.max_response_tokens) // s.page_size)
        room = max(chip.usable * _GIB - max(x.peak - cache for x in sampler.values()), 0)
        pages = int(room / (cache / s.pages))
        seconds = bound(sampler["decode"], kernels["decode"], chip).seconds
        yield (
            f"at most {s.slots * s.decode_steps / seconds:.0f} tokens/s; {s.pages} pages hold {s.pages // longest} of the "
            f"longest sequences, the memory has room for {pages} pages, {pages // longest} such sequences"
        )
        if not any(x.refused for x in learner.values()):
            yield colocated(config, learner, sampler, chip, aot.largest_piece(config, shape, devices))
            bounds = {title: bound(x, kernels.get(title, 0.0), chip).seconds for title, x in (learner | sampler).items()}
            yield iteration(config, bounds, aot.host_count(devices), response)


def colocated(config: ConfigDict, learner: dict[str, Compiled], sampler: dict[str, Compiled], chip: Chip, piece: int) -> str:
    """Returns what a chip takes that learner and sampler share (`sampler.colocated`), and what to do if it has less.

    With `aepo.staleness` they work at the same time; and while weights are handed over, in pieces of at most `piece` bytes,
    the sampler has them twice.
    """
    learns, draws = (max(p.peak for p in programs.values()) for programs in (learner, sampler))
    state = sum(learner["apply"].resident.values()) - learner["apply"].resident["gradients"]
    weights, cache = (sampler["decode"].resident[name] for name in ("parameters", "KV pages"))
    both = learns + draws if config.aepo.staleness else max(learns + weights + cache, state + draws)
    both = max(both, state + 2 * weights + cache + 2 * piece)  # one whole, and the part of it that is written
    fits = both <= chip.usable * _GIB
    remedy = "" if fits else ": more sampler.tensor, fewer sampler.pages, or samplers elsewhere (sampler.url)"
    return (
        f"with sampler.colocated=True the first {config.sampler.tensor} of each host's chips hold learner and sampler: "
        f"{both / _GIB:.1f} of {chip.usable} GiB{'' if fits else ', which does not fit'}{remedy}"
    )


def iteration(config: ConfigDict, seconds: Mapping[str, float], samplers: int, response: int) -> str:
    """Returns what an AEPO iteration takes if each program takes these seconds, and what that assumes.

    Args:
      samplers: engines that draw, each on `sampler.tensor` chips.
      response: mean tokens of a response.
    """
    a, s, p = config.aepo, config.sampler, config.packing
    response = min(response, s.max_response_tokens)
    decodes = a.prompts_per_step * a.group_size * response / (s.slots * s.decode_steps)
    prefills = a.prompts_per_step / prompts_together(s.max_prompt_tokens, s.prefill_chunk, s.prefill_batch)
    drawing = (decodes * seconds["decode"] + prefills * seconds["prefill"]) / samplers
    tokens = a.prompts_per_step * (s.max_prompt_tokens + a.group_size * response)
    batches = tokens / (p.rows * p.row_tokens)
    fixed = bool(a.kl.weight) + (a.old_log_probs == "recomputed")
    learning = batches * (fixed * seconds["log_probs"] + seconds["more"]) + a.minibatches * seconds["apply"]
    return (
        f"an iteration of {a.prompts_per_step} prompts x {a.group_size} answers of {response} tokens (--mean_response): "
        f"rollouts {drawing:.0f} s, update {learning:.0f} s; {drawing + learning:.0f} s one after the other, "
        f"{max(drawing, learning):.0f} s at once (aepo.staleness=1, sampler.url). Each program at its bound, rows and "
        f"sequences at full length; {samplers} samplers, one a host, all slots busy to the end; no group dropped; "
        f"prompts of {s.max_prompt_tokens} tokens, shared by their answers, which share nothing else; {batches:.1f} "
        f"micro-batches without padding, {a.minibatches} updates"
    )


def _rate(config: ConfigDict, shape: Qwen25VLConfig, programs: dict[str, Compiled], chip: Chip, chips: int) -> str:
    rate = throughput(config, shape, programs, chip, chips)
    if rate is None:
        return "does not fit"
    return (
        f"at most {rate.tokens:.0f} tokens/s on all chips; MFU {rate.mfu:.0%} at most, {rate.mfu_one_by_one:.0%} if "
        "arithmetic, memory and network waited for each other (`apply`, once an update, left out)"
    )


def main(config: ConfigDict, workdir: Path | None) -> None:
    jax.config.update("jax_platforms", "cpu")
    names, shape = _TOPOLOGY.value.split(","), model_shape(config)
    parts: Iterable[str]
    if _SEARCH.value:
        parts = itertools.chain.from_iterable(search(config, shape, name, _COMPILE.value) for name in names)
    elif len(names) > 1:
        slices = {name: aot.topology_devices(name) for name in names}
        planned = [(name, on_slice(config, len(d), aot.host_count(d))) for name, d in slices.items()]
        kinds = {assumptions(chip_of(name)): name.split(":")[0] for name in names}
        start = [*(f"{kind}: {text}" for text, kind in kinds.items()), _COMPARED]
        parts = itertools.chain(start, (compared(c, shape, name)[1] for name, c in planned))
    else:
        parts = report(config, shape, names[0], _RESPONSE.value)
    for part in parts:
        print(part, flush=True)


def start() -> None:
    """Runs the command with the process's arguments."""
    cli.run(main, workdir_optional=True, processes="first")
