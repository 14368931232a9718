"""The fine-tuning loss and its KL term against NumPy; resumption to the last bit."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ares_jax.cold_start.sft import example, fine_tune, fine_tuning_loss, normalized
from ares_jax.errors import Preempted
from ares_jax.metrics import read_jsonl
from ares_jax.parallel.sharding import make_mesh
from ares_jax.params import to_flat
from ares_jax.run.run import open_run
from ares_jax.training import abstract_state, make_optimizer, trainable
from configs.digits_cpu import get_config
from data_pipeline.errors import DataError
from tests import digits as tiny


def batch(rng, reference):
    log_probs = -rng.random((2, 9)).astype(np.float32)
    weight = (rng.random((2, 9)) < 0.7).astype(np.float32)
    weight /= weight.sum()
    values = {
        "loss_mask": weight > 0,
        "weight": weight,
        "kl_weight": (rng.random((2, 9)) * (weight > 0)).astype(np.float32),
        "log_probs": log_probs,
    }
    return values | ({"reference_log_prob": -rng.random((2, 9)).astype(np.float32)} if reference else {})


def statistics(params, values):
    return values["log_probs"] + params, None


@pytest.mark.parametrize("estimator, of", [("k3", lambda d: np.exp(d) - d - 1), ("mse", lambda d: d**2 / 2)])
def test_the_loss_is_nll_plus_the_weighted_drift(estimator, of):
    values = batch(np.random.default_rng(0), reference=True)
    loss, metrics = fine_tuning_loss(statistics, estimator)(0.0, values)
    v = {name: value.astype(np.float64) for name, value in values.items()}
    drift = of(v["reference_log_prob"] - v["log_probs"])
    nll = -np.sum(v["weight"] * v["log_probs"])
    assert float(loss) == pytest.approx(nll + np.sum(v["kl_weight"] * v["weight"] * drift), abs=1e-5)
    assert float(metrics["kl"]) == pytest.approx(np.sum(v["weight"] * drift), abs=1e-5)


def test_without_a_reference_it_is_the_nll_and_a_padding_of_minus_infinity_does_not_matter():
    values = batch(np.random.default_rng(1), reference=False)
    values["log_probs"] = jnp.where(values["weight"] > 0, values["log_probs"], -jnp.inf)
    loss, metrics = fine_tuning_loss(statistics, "k3")(0.0, values)
    inside = values["weight"] > 0
    assert float(loss) == pytest.approx(-float(np.sum(values["weight"][inside] * values["log_probs"][inside])), abs=1e-6)
    assert metrics == {}


def test_the_guide_pulls_back_and_weighs_as_much_as_it_is_told():
    values = batch(np.random.default_rng(2), reference=True)
    values["reference_log_prob"] = values["log_probs"]
    grad = jax.grad(lambda p, weight: fine_tuning_loss(statistics, "k3")(p, values | {"kl_weight": weight})[0])
    ones = jnp.ones_like(values["weight"])
    at_start, moved, free = grad(0.0, 5 * ones), grad(0.3, 5 * ones), grad(0.3, 0 * ones)
    assert float(at_start) == pytest.approx(-1.0, abs=1e-5)  # no drift yet: the NLL alone
    assert float(moved) == pytest.approx(-1.0 + 5 * (1 - np.exp(-0.3)), abs=1e-5)
    assert float(free) == pytest.approx(-1.0, abs=1e-5)


def test_an_example_carries_its_brackets_weight_on_the_response_alone():
    prompt = tiny.prompts(1)[0]
    segment = example(prompt, np.arange(5, dtype=np.int32), kl_weight=0.3)
    assert segment.token_fields["kl_weight"][-5:] == pytest.approx(0.3) and not segment.token_fields["kl_weight"][:-5].any()
    (scaled, other), count = normalized([segment, example(prompt, np.arange(3, dtype=np.int32))])
    assert count == 8 and scaled.token_fields["weight"].sum() + other.token_fields["weight"].sum() == pytest.approx(1.0)
    assert scaled.token_fields["kl_weight"][-1] == pytest.approx(0.3) and not other.token_fields["kl_weight"].any()


def test_a_trace_that_draws_an_image_is_named_before_anything_runs(tmp_path):
    workspace = open_run(get_config(), tmp_path, mesh=make_mesh(devices=jax.devices()[:1]))
    prompt = workspace.encoder(workspace.problems("train")[0])
    drawn = max(workspace.encoder.placeholder_ids)
    good, bad = (example(prompt, np.array(tokens, np.int32)) for tokens in ([5, 6], [5, drawn]))
    assert workspace.pack(normalized([good])[0])[0]["tokens"].any()
    with pytest.raises(DataError, match=f"problem {prompt.problem_id}: .* image tokens for .* of .* images of sizes"):
        workspace.pack(normalized([good, bad])[0])


class Told:
    """A stream; as its batch number `at` is taken the process is told to go."""

    def __init__(self, stream, at):
        self.stream, self.left = stream, at
        self.get_state, self.set_state = stream.get_state, stream.set_state

    def __next__(self):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return next(self.stream)


def fine_tuned(folder, *, told_at=0, steps=4):
    """Fine-tunes, guided, in a workspace and with a stream that are new; returns what its checkpoint then holds."""
    config = get_config()
    config.update_from_flattened_dict(tiny.TINY_RUN | {"cold_start.warmup_fraction": 0.5, "cold_start.save_every": 3})
    folder.mkdir(exist_ok=True)
    workspace = open_run(config, folder, mesh=make_mesh(devices=jax.devices()[:1]))
    encoder = workspace.encoder

    def teach(problem):
        return example(encoder(problem), encoder.encode_response(problem.responses[0]), kl_weight=0.5)

    stream = workspace.stream(workspace.problems("train"), teach, seed=config.seed, batch_size=config.cold_start.batch_size)
    tokens = fine_tune(
        workspace, "cold_start", workspace.initial_params, Told(stream, told_at), steps=steps, learning_rate=1e-2,
        lora=False, guided=True,
    )  # fmt: skip
    optimizer = make_optimizer(config.optimizer, learning_rate=1e-2, steps=steps)
    template = abstract_state(to_flat(workspace.model), optimizer, workspace.placement, trainable(config.optimizer))
    *arrays, extra = workspace.checkpoints("cold_start").restore(steps, template.params, template._replace(params={}))
    return arrays, extra["iterator"], tokens


def test_a_resumed_fine_tuning_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected, position, tokens = fine_tuned(whole)
    with pytest.raises(Preempted, match="saved cold_start at step 2 of 4"):
        fine_tuned(parts, told_at=2)
    resumed, *rest = fine_tuned(parts)
    assert rest == [position, tokens]
    jax.tree.map_with_path(lambda path, a, b: np.testing.assert_array_equal(a, b, err_msg=str(path)), expected, resumed)
    names = ("step", "loss", "nll", "kl", "grad_norm", "learning_rate")
    logs = [read_jsonl(folder / "cold_start" / "metrics.jsonl") for folder in (whole, parts)]
    lines, others = ([[line[name] for name in names] for line in log] for log in logs)
    assert lines == others and [line[0] for line in lines] == [1, 2, 3, 4]
    assert [line[5] for line in lines] == pytest.approx([0.0, 5e-3, 1e-2, 5.5e-3])  # warm-up, cosine
    assert len({line[1] for line in lines}) == 4 and lines[-1][3] > 1e-6  # other problems each time, and a drift to lose
