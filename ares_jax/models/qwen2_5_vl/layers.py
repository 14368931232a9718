"""What both towers are made of: stacked parameters with logical axis names, RMSNorm, SwiGLU, a scan over layers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from ares_jax.errors import UserError
from ares_jax.parallel.sharding import platform

Axes = tuple[str | None, ...]


class Initializer:
    """Makes the parameters of a model: one random stream, one storage type, a logical name for every axis."""

    def __init__(self, rngs: nnx.Rngs, dtype: jnp.dtype):
        self._rngs, self._dtype = rngs, dtype

    def normal(self, shape: tuple[int, ...], axes: Axes, *, fan_in: int) -> nnx.Param:
        value = jax.random.normal(self._rngs.params(), shape, jnp.float32) * fan_in**-0.5
        return self._param(value, axes)

    def zeros(self, shape: tuple[int, ...], axes: Axes) -> nnx.Param:
        return self._param(jnp.zeros(shape), axes)

    def ones(self, shape: tuple[int, ...], axes: Axes) -> nnx.Param:
        return self._param(jnp.ones(shape), axes)

    def stored_as(self, dtype: jnp.dtype) -> "Initializer":
        """Returns the same random stream for parameters of another storage type."""
        return Initializer(self._rngs, dtype)

    def _param(self, value: jax.Array, axes: Axes) -> nnx.Param:
        return nnx.Param(value.astype(self._dtype), logical_axes=axes)


def rms_norm(x: Float[Array, "... D"], weight: Float[Array, "D"], eps: float) -> Float[Array, "... D"]:
    """Root-mean-square normalisation; the statistic in float32."""
    wide = x.astype(jnp.float32)
    return weight.astype(x.dtype) * (wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + eps)).astype(x.dtype)


def matmul(x: Float[Array, "... D"], kernel: Float[Array, "D F"]) -> Float[Array, "... F"]:
    """`x @ kernel`, in the type of x."""
    if x.dtype == jnp.bfloat16 and platform() == "cpu":
        return _summed_wide(x, kernel)
    return _multiply(x, kernel)


def _multiply(x: Float[Array, "... D"], kernel: Float[Array, "D F"], **options: Any) -> Float[Array, "... F"]:
    return jnp.matmul(_listed(x), kernel, **options).reshape(*x.shape[:-1], -1)


def _listed(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Returns a list of tokens in the place of rows of them, on one device.

    Rows make XLA's CPU compiler transpose what the gradient multiplies, a third of the layers' backward pass. Split over
    devices the rows must stay apart from what they hold.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return x if not mesh.empty and mesh.size > 1 else x.reshape(-1, x.shape[-1])


@jax.custom_vjp
def _summed_wide(x: Float[Array, "... D"], kernel: Float[Array, "D F"]) -> Float[Array, "... F"]:
    """As `_multiply`, for CPUs: XLA's code for bfloat16 products is several times as fast into float32, rounded afterwards.

    Elsewhere it would make the sums that devices send each other twice as large.
    """
    return _multiply(x, kernel, preferred_element_type=jnp.float32).astype(x.dtype)


def _summed_wide_backward(operands, gradient):
    x, kernel = operands
    d_kernel = jnp.einsum("...D,...F->DF", _listed(x), _listed(gradient), preferred_element_type=jnp.float32)
    return _summed_wide(gradient, kernel.T), d_kernel.astype(kernel.dtype)


_summed_wide.defvjp(lambda x, kernel: (_summed_wide(x, kernel), (x, kernel)), _summed_wide_backward)


FEW_ROWS = 64  # up to here a product with the weights on the left is not slower


def linear_by_output(
    x: Float[Array, "... D"], kernel: Float[Array, "F D"], bias: Float[Array, "F"] | None
) -> Float[Array, "... F"]:
    """`x @ kernel.T + bias`, rounded to the type of x once: for CPUs that decode, with a kernel stored output by output.

    On the left it is read once and in order; on the right, whichever way it is stored, 8 rows take XLA's CPU code a fifth
    to a third longer (benchmarks/RESULTS.md).
    """
    rows = x.reshape(-1, x.shape[-1])
    count = len(rows)
    if count <= FEW_ROWS:
        rows = jnp.pad(rows, ((0, count == 1), (0, 0)))  # in bfloat16 one row takes ten times as long as two
        wide = jnp.einsum("FD,RD->FR", kernel, rows, preferred_element_type=jnp.float32)
        wide = jax.lax.optimization_barrier(wide).T[:count]  # else the compiler puts the kernel back on the right
    else:
        wide = jnp.matmul(rows, kernel.T, preferred_element_type=jnp.float32)
    wide = wide if bias is None else wide + bias.astype(jnp.float32)
    return wide.astype(x.dtype).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def linear(x: Float[Array, "... D"], kernel: Float[Array, "D F"], bias: Float[Array, "F"]) -> Float[Array, "... F"]:
    """`x @ kernel + bias`, rounded to the type of x once, after the sum, as PyTorch does.

    Rounding the product, too, makes bf16 logits a tenth less exact.
    """
    wide = _multiply(x, kernel, preferred_element_type=jnp.float32)
    return (wide + bias.astype(jnp.float32)).astype(x.dtype)


def _linear_forward(*operands):
    return linear(*operands), operands


def _linear_backward(operands, gradient):
    # Derived from `linear` itself, the products of the backward pass would be float32 ones: several times slower.
    return jax.vjp(lambda x, kernel, bias: matmul(x, kernel) + bias, *operands)[1](gradient)


linear.defvjp(_linear_forward, _linear_backward)


_policies = jax.checkpoint_policies
# What the forward pass keeps of a layer for the backward pass; the rest is computed again.
REMAT: dict[str, Any] = {
    "none": None,  # everything is kept
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names("attention")
    ),  # results of matrix products and of attention
    "full": _policies.nothing_saveable,  # the layer's input
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),  # the layer's input, in the host's memory
}


SHALLOW = 16  # layers that are compiled one by one where all is kept


def scan_layers(layer: Callable[[Any, Any], tuple[Any, Any]], carry: Any, stacked: Any, *, remat: str) -> tuple[Any, Any]:
    """Runs `layer(carry, slice)` over the leading axis of `stacked`; the time to compile does not grow with a deep stack.

    `remat`: a name of `REMAT`. Raises `UserError` for another.
    """
    if remat not in REMAT:
        raise UserError(f"model.remat={remat!r} is not one of {', '.join(REMAT)}")
    if remat == "none":
        # A loop copies what it keeps of each layer into stacks of zeros: a shallow model on a CPU is quicker without.
        shallow = len(jax.tree.leaves(stacked)[0]) <= SHALLOW
        return jax.lax.scan(layer, carry, stacked, unroll=shallow)

    def named(carry, slice):
        return layer(jax.tree.map(lambda x: checkpoint_name(x, "layer_input"), carry), slice)

    return jax.lax.scan(jax.checkpoint(named, policy=REMAT[remat], prevent_cse=False), carry, stacked)


def run_layers(layer: Callable[[Any, Any], Any], carry: Any, stacked: Any, first: int | Int[Array, ""], count: int) -> Any:
    """Returns what `carry = layer(carry, slice)` makes of `carry` in `count` slices of `stacked` from `first` on.

    The slices are picked one by one: nothing of the stack is copied.
    """

    def step(carry, index):
        slice = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stacked)
        return layer(carry, slice), None

    return jax.lax.scan(step, carry, first + jnp.arange(count))[0]
