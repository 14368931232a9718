"""Tests run on the CPU with 8 virtual devices, so that every sharded path is exercised without an accelerator."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# The real TPU compiler answers ahead-of-time compilation without a TPU; parallel test processes must not fight for its lock.
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
