"""Does a run fit on a slice, and what would an iteration take? Part by part, as the programs are compiled."""

from collections.abc import Iterator, Mapping

from ml_collections import ConfigDict

from ares_jax.models.qwen2_5_vl import Qwen25VLConfig
from ares_jax.parallel.chips import Chip, chip_of
from ares_jax.planning import aot
from ares_jax.planning.aot import Compiled
from ares_jax.planning.rooflines import GIB, assumptions, bound, kernel_flops, throughput
from ares_jax.planning.slices import on_slice
from ares_jax.sampling.shapes import prompts_together

_TITLES = {"log_probs": "fixed log-probs", "more": "gradients", "apply": "apply", "prefill": "prefill", "decode": "decode"}


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
        room = max(chip.usable * GIB - max(x.peak - cache for x in sampler.values()), 0)
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
    fits = both <= chip.usable * GIB
    remedy = "" if fits else ": more sampler.tensor, fewer sampler.pages, or samplers elsewhere (sampler.url)"
    return (
        f"with sampler.colocated=True the first {config.sampler.tensor} of each host's chips hold learner and sampler: "
        f"{both / GIB:.1f} of {chip.usable} GiB{'' if fits else ', which does not fit'}{remedy}"
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


def table(programs: dict[str, Compiled], kernels: dict[str, float], chip: Chip) -> str:
    """Returns the programs as columns; memory in GiB of a chip."""
    names = list(dict.fromkeys(name for p in programs.values() for name in p.resident))
    kinds = list(dict.fromkeys(kind for p in programs.values() for kind in p.work.collective))

    def line(title, cells):
        return f"{title:<26}" + "".join(f"{cell:>17}" for cell in cells)

    def gib(count):
        return f"{count / GIB:.2f}" if count else "-"

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
        line(f"of {chip.hbm} GiB", cells(lambda _, p: f"{p.peak / GIB / chip.hbm:.0%}", "no")),
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
