"""What XLA's compiler for GPUs must know of one that is not there.

The numbers are the hardware's, as XLA's own descriptions of these GPUs have them (github.com/openxla/xla,
xla/backends/gpu/target_config/specs), without the rates of arithmetic, which its cost model then assumes.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class _Gpu:
    name: str
    capability: tuple[int, str]  # major number, and whether the architecture's own instructions may be used
    cores: int  # streaming multiprocessors
    units: int  # float32 units of each
    shared_memory: int  # bytes of each
    clock: float  # GHz
    memory: int  # bytes
    bandwidth: int  # bytes a second
    cache: int  # bytes of L2


_OWN, _COMMON = "ACCELERATED_FEATURES", "NONE"
_GPUS = {
    "a100": _Gpu("NVIDIA A100", (8, _COMMON), 108, 64, 167_936, 1.41, 85_100_068_864, 2_039_040_000_000, 41_943_040),
    "h100": _Gpu("NVIDIA H100", (9, _OWN), 132, 128, 233_472, 1.98, 84_942_979_072, 3_352_320_000_000, 52_428_800),
    "h200": _Gpu("NVIDIA H200", (9, _OWN), 132, 128, 233_472, 1.98, 151_397_597_184, 4_800_000_000_000, 52_428_800),
    "b200": _Gpu("NVIDIA B200", (10, _OWN), 148, 128, 233_472, 1.965, 191_514_411_008, 7_672_320_000_000, 132_644_864),
}  # fmt: skip


def target_config(kind: str) -> str:
    """Returns the description of a GPU of `chips.GPUS`, a GpuTargetConfigProto as text."""
    g = _GPUS[kind]
    return f"""
      gpu_device_info {{
        threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
        shared_memory_per_block: 49152 shared_memory_per_core: {g.shared_memory}
        shared_memory_per_block_optin: {g.shared_memory - 1024}
        core_count: {g.cores} fpus_per_core: {g.units} clock_rate_ghz: {g.clock}
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
        memory_bandwidth: {g.bandwidth} l2_cache_size: {g.cache} device_memory_size: {g.memory}
        cuda_compute_capability {{ major: {g.capability[0]} feature_extension: {g.capability[1]} }}
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
      }}
      platform_name: "CUDA"
      dnn_version_info {{ major: 9 minor: 12 }}
      runtime_version {{ major: 13 }}
      device_description_str: "{g.name}"
    """
