"""What to do when a device's memory is not enough."""

from pathlib import Path

import jax

from ares_jax.errors import UserError

ADVICE = (
    "In this order: --config.model.remat=full, then --config.model.remat=offload (TPU, GPU); --config.packing.rows=0 (as "
    "few as the mesh takes); fewer packing.row_tokens (a prompt and its response must fit); --config.mesh.fsdp=-1 over more "
    "devices, or --config.mesh.tensor=4 (of a host); --config.optimizer.mu_dtype=bfloat16; --config.aepo.kl.reference=host; "
    "--config.lora.rank=16. Where the sampler shares the devices: --config.sampler.tensor=4 (of a host), with "
    "--config.aepo.staleness=0; fewer sampler.pages or sampler.slots; or samplers elsewhere (sampler.url)"
)


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
    return UserError(f"out of device memory ({reason}){profile}. {ADVICE}")
