"""What to do when a device's memory is not enough."""

from pathlib import Path

import jax

from ares_jax.errors import UserError


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether XLA, at compilation or at run time, found too little memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def explained(error: BaseException, folder: Path, who: str = "") -> UserError:
    """Returns the error for the user; what lies on the devices is written to `folder/memory.<who>.prof` (pprof).

    `who`: by default the number of the process.
    """
    path = folder / f"memory.{who or jax.process_index()}.prof"
    try:
        jax.profiler.save_device_memory_profile(str(path))
        profile = f"; {path} shows what was there (pprof)"
    except (OSError, RuntimeError):  # nothing may hide the first error
        profile = ""
    reason = str(error).strip().splitlines()[0][:200]
    return UserError(
        f"out of device memory ({reason}){profile}. In this order: model.remat=True, fewer packing.rows or row_tokens, a "
        "larger mesh.fsdp, optimizer.mu_dtype=bfloat16, aepo.kl.reference=host; for the sampler fewer sampler.pages or slots"
    )
