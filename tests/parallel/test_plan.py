"""What `python -m ares_jax.plan` prints: of programs with known numbers, and of a model of two layers as compiled."""

import dataclasses
import re

import jax
import pytest

from ares_jax.errors import UserError
from ares_jax.models.flops import model_flops
from ares_jax.models.qwen2_5_vl.config import PUBLISHED
from ares_jax.parallel.chips import TPUS
from ares_jax.planning import aot, fit, rooflines, search
from ares_jax.planning.hlo import Work
from configs import qwen2_5_vl

GIB = 2**30


def two_layers(size):
    """Returns a published shape with two layers in the text decoder and in the vision tower."""
    shape = PUBLISHED[size]
    vision = dataclasses.replace(shape.vision, num_layers=2, full_attention_layers=(1,))
    return dataclasses.replace(shape, text=dataclasses.replace(shape.text, num_layers=2), vision=vision)


def short(size):
    """Returns a config of short rows: two of 2,048 tokens."""
    c = qwen2_5_vl.aepo(size)
    c.packing.update(rows=2, row_tokens=2048, row_patches=1024)
    c.sampler.update(slots=8, prefill_batch=1, pages=64, max_prompt_tokens=1024, max_prompt_patches=1024,
                     max_response_tokens=1024, prefill_chunk=0)  # fmt: skip
    return c


def program(flops=0.0, moved=0.0, sent=0.0, temporary=0):
    return aot.Compiled({"parameters": GIB}, temporary, 0, 0, Work(flops, moved, {"all-gather": sent}), 1.0, "")


def test_rates_are_those_of_the_slowest_part_and_of_all_parts():
    config, shape, chip = short("3b"), PUBLISHED["3b"], TPUS["v5p"]
    kernels = rooflines.kernel_flops(config, shape, 2)
    programs = {
        "log_probs": program(chip.flops - kernels["log_probs"], 0.5 * chip.bandwidth, 0.25 * chip.link),  # 1 s, 0.5, 0.25
        "more": program(2 * chip.flops - kernels["more"], 3 * chip.bandwidth),  # 2 s, 3 s
    }
    rate = rooflines.throughput(config, shape, programs, chip, 2)
    row = rooflines.row_flops(config, shape)
    useful = (2 * model_flops(row) + 2 * sum(row)) / (2 * chip.flops)  # seconds, of two rows on two chips
    assert rate == pytest.approx((2 * 2048 / (1 + 3), useful / (1 + 3), useful / (1.75 + 5)))
    assert f"at most {rate.tokens:.0f} tokens/s on all chips; MFU" in fit._rate(config, shape, programs, chip, 2)
    alone = rooflines.throughput(config, shape, {"more": programs["more"]}, chip, 2)
    assert alone.tokens == pytest.approx(2 * 2048 / 3) and alone.mfu == pytest.approx(2 * model_flops(row) / 6 / chip.flops)
    programs["more"] = program(1.0, temporary=95 * GIB)
    assert rooflines.throughput(config, shape, programs, chip, 2) is None
    assert fit._rate(config, shape, programs, chip, 2) == "does not fit"


def test_an_iteration_is_its_rollouts_and_its_update():
    config = short("3b")
    config.aepo.update(prompts_per_step=4, group_size=8, minibatches=2)
    seconds = {"prefill": 3.0, "decode": 5.0, "log_probs": 7.0, "more": 11.0, "apply": 13.0}
    drawing = (4 * 8 * 512 / (8 * 16) * 5 + 4 * 3) / 2  # 128 calls, 4 prompts, two samplers
    learning = 4 * (1024 + 8 * 512) / 4096 * (7 + 11) + 2 * 13
    line = fit.iteration(config, seconds, 2, 512)
    assert f"rollouts {drawing:.0f} s, update {learning:.0f} s; {drawing + learning:.0f} s one after the other" in line
    assert f"{max(drawing, learning):.0f} s at once" in line and "8 answers of 512 tokens" in line
    config.aepo.kl.weight = 0.0
    assert f"update {5 * 11 + 26} s" in fit.iteration(config, seconds, 2, 512)
    assert "answers of 1024 tokens" in fit.iteration(config, seconds, 2, 99_999)  # no longer than one may be


def test_shorter_rows_hold_a_prompt_and_answers_that_fit():
    config = qwen2_5_vl.aepo("7b")
    half = search.with_shorter_rows(config)
    assert (half.packing.row_tokens, half.packing.row_patches, half.sampler.max_response_tokens) == (16_384, 32_768, 12_288)
    quarter = search.with_shorter_rows(half)
    assert (quarter.packing.row_tokens, quarter.sampler.max_response_tokens) == (8192, 4096)
    assert search.with_shorter_rows(quarter) is None  # a prompt may have 4,096 tokens
    assert config.packing.row_tokens == 32_768


def test_a_search_tries_shorter_rows_where_nothing_fits(monkeypatch):
    fits = {32_768: False, 16_384: True}
    monkeypatch.setattr(aot, "without_code", lambda c, *_: program(
        1e12, 1e9, 1e9, temporary=0 if fits[c.packing.row_tokens] else 16 * GIB))  # fmt: skip
    lines = "\n".join(search.search(qwen2_5_vl.aepo("7b"), PUBLISHED["7b"], "v5e:4x4", 2)).splitlines()
    ends = [line.endswith("does not fit") for line in lines if line.startswith("v5e:4x4     ")]
    (shorter,) = (number for number, line in enumerate(lines) if "shorter rows" in line)
    assert ends == [True, True, False, False] and "row_tokens=16384" in lines[shorter] and "12288" in lines[shorter]


def test_what_an_axis_of_the_mesh_does_not_divide_lies_on_every_chip():
    """512 do not divide the vision tower's 1280: all 0.6 billion parameters of it, their gradients and moments."""
    config, shape = qwen2_5_vl.aepo("3b"), PUBLISHED["3b"]
    config.mesh.update(fsdp=512)
    whole = search._estimate(config, shape, TPUS["v5p"]).memory
    config.mesh.update(data=2, fsdp=256)
    assert whole - search._estimate(config, shape, TPUS["v5p"]).memory > 11 * GIB


def test_a_report_of_programs_with_known_numbers(monkeypatch):
    """Of one chip, v5e: 197 TFLOP/s, 819 GB/s, 200 GB/s. test_aot.py compiles the programs that are asked for here."""
    config, shape, slices = short("3b"), two_layers("3b"), []
    config.packing.rows = 0
    config.aepo.update(prompts_per_step=4, group_size=8, minibatches=2)
    seconds = {"log_probs": 1, "more": 4, "apply": 2, "prefill": 1, "decode": 2}  # of memory; half of that of network

    def programs(config, shape, devices, names=("prefill", "decode")):
        slices.append((len(devices), config.packing.rows))
        resident = dict.fromkeys(("parameters", "gradients", "optimizer", "KV pages"), GIB)
        return {
            name: dataclasses.replace(program(0.0, seconds[name] * 819e9, seconds[name] * 100e9), resident=resident)
            for name in names
        }

    for name in ("learner_programs", "fine_tuning_programs", "sampler_programs"):
        monkeypatch.setattr(aot, name, programs)
    text = "\n".join(fit.report(config, shape, "v5e:2x2", 512))
    assert slices == [(4, 4)] * 3  # a row for each chip
    assert "v5e:2x2: 4 chips of 16 GiB; mesh data 1, fsdp 4, sequence 1, tensor 1; remat full" in text
    assert "197 bf16 TFLOP/s, 819 GB/s of memory and 200 GB/s sent" in text
    rows = {line[:26].strip(): line[26:].split() for line in reversed(text.splitlines())}  # the first table's
    assert rows["peak GiB"] == ["4.00"] * 3 and rows["of 16 GiB"] == ["25%"] * 3
    assert rows["ms of memory"] == ["1000.0", "4000.0", "2000.0"] and rows["ms of network"] == ["500.0", "2000.0", "1000.0"]
    assert rows["GB sent, all-gather"] == ["100.00", "400.00", "200.00"]
    assert f"at most {4 * 2048 / 5:.0f} tokens/s on all chips" in text  # log-probs and gradients
    assert f"at most {4 * 2048 / 4:.0f} tokens/s on all chips" in text  # fine-tuning's gradients
    assert f"at most {8 * 16 / 2:.0f} tokens/s; 64 pages hold 2 of the longest sequences" in text  # 32 pages of 64 each
    assert f"room for {64 * 12.75:.0f} pages" in text  # 15.75 GiB less three; 64 pages are one
    learning = 4 * (1024 + 8 * 512) / (4 * 2048) * 5 + 2 * 2
    drawing = 4 * 8 * 512 / (8 * 16) * 2 + 4 * 1
    assert f"rollouts {drawing:.0f} s, update {learning:.0f} s" in text and "1 samplers, one a host" in text


def test_a_search_compiles_the_best_of_its_estimates():
    config, shape = short("7b"), two_layers("7b")
    lines = "\n".join(search.search(config, shape, "v6e:2x2", 1)).splitlines()
    best, compiled = lines[3].split(), lines[-2].split()  # below each what to type for it
    assert lines[-4] == "as compiled, a micro-batch's gradients, the best first"
    assert compiled[:2] == ["v6e:2x2", "4"] and compiled[2:8] == best[:6]  # mesh, rows and remat of the best estimate
    low, high = map(int, re.match(r"(\d+)%-(\d+)%", compiled[-1]).groups())
    assert 0 < low <= high < 100 and float(compiled[-2]) > 0


@pytest.mark.parametrize("name", ["kernel", "paged_attention"])
def test_a_sampler_that_could_not_run_is_refused_as_the_engine_refuses_it(name):
    config = qwen2_5_vl.aepo("3b")
    config.sampler[name] = "cuda"
    with pytest.raises(UserError, match=f"sampler.{name}='cuda': give .* or '' for the default"):
        aot.sampler_programs(config, PUBLISHED["3b"], jax.devices())
