"""The product of few rows with a kernel stored output by output, as CPUs decode, is the ordinary one."""

import jax.numpy as jnp
import numpy as np
import pytest

from ares_jax.models.qwen2_5_vl.layers import FEW_ROWS, linear, linear_by_output, matmul


@pytest.mark.parametrize("rows", [1, 8, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 8e-3)])
def test_a_kernel_stored_by_output(rows, dtype, tolerance):
    rng = np.random.default_rng(rows)
    x, kernel, bias = (jnp.asarray(rng.normal(size=s), dtype) for s in ((rows, 1, 96), (96, 40), (40,)))
    for found, same, b in (
        (linear_by_output(x, kernel.T, bias), linear(x, kernel, bias), bias),
        (linear_by_output(x, kernel.T, None), matmul(x, kernel), 0),
    ):
        assert found.dtype == dtype and found.shape == (rows, 1, 40)
        exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64) + np.asarray(b, np.float64)
        np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(
            np.asarray(found, np.float64), np.asarray(same, np.float64), rtol=tolerance, atol=tolerance
        )
