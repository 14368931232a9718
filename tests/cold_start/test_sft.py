"""The fine-tuning loss and its KL term against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ares_jax.cold_start.sft import example, fine_tuning_loss, normalized
from tests import digits as tiny


def batch(rng, reference):
    log_probs = -rng.random((2, 9)).astype(np.float32)
    weight = (rng.random((2, 9)) < 0.7).astype(np.float32)
    weight /= weight.sum()
    values = {"weight": weight, "kl_weight": (rng.random((2, 9)) * (weight > 0)).astype(np.float32), "log_probs": log_probs}
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
    assert segment.extras["kl_weight"][-5:] == pytest.approx(0.3) and not segment.extras["kl_weight"][:-5].any()
    (scaled, other), count = normalized([segment, example(prompt, np.arange(3, dtype=np.int32))])
    assert count == 8 and scaled.extras["weight"].sum() + other.extras["weight"].sum() == pytest.approx(1.0)
    assert scaled.extras["kl_weight"][-1] == pytest.approx(0.3) and not other.extras["kl_weight"].any()
