"""Seconds until a sampler on this machine draws with new weights: through HTTP, through JAX's transfer server, through
shared memory, from a checkpoint.

    python -m benchmarks.weights --config=configs/digits_cpu.py --workdir=runs/weights \
        --config.model.text.num_layers=8 --config.model.text.hidden_size=1024 --config.model.text.intermediate_size=4096 \
        '--config.model.text.mrope_section=(16,56,56)' --config.sampler.pages=64 --config.sampler.slots=4

The sampler is `ares_jax.serve` in a process of its own. From arrays in NumPy (a checkpoint: from the start of its save) to
the answer that the new version is in use. The first of each is not counted.
"""

import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import save

from ares_jax.commands import cli
from ares_jax.run.run import open_run
from ares_jax.service import transfer

_REPEATS, _PIECE = 4, 2**20


def main(config: ConfigDict, workdir: Path) -> None:
    config.sampler.transfers = True
    run = open_run(config, workdir)
    params = run.initial_params()
    flat = run.host_params(params)
    gigabytes = sum(value.nbytes for value in flat.values()) / 1e9
    version = 0
    with run.sampler() as client, httpx.Client(base_url=client.urls[0], timeout=600) as http:

        def through_http() -> None:
            body = save(flat)
            pieces = (body[start : start + _PIECE] for start in range(0, len(body), _PIECE))
            headers = {"Content-Length": str(len(body))}
            http.put("/v1/weights", params={"version": version}, content=pieces, headers=headers).raise_for_status()

        def through_transfer() -> None:
            offer = transfer.offer(flat, "127.0.0.1")
            http.post("/v1/weights", json={**offer, "version": version}).raise_for_status()

        def through_memory() -> None:
            client.push_weights(flat, version)

        def save_checkpoint() -> None:
            checkpoints.save(version, params, {"none": np.zeros(1)}, {})
            checkpoints.wait()

        def from_checkpoint() -> None:
            uri = f"{workdir.absolute()}/checkpoints/benchmark/{version}"
            http.post("/v1/weights", json={"uri": uri, "version": version}).raise_for_status()

        checkpoints = run.checkpoints("benchmark")

        def measure(*actions: Callable[[], None]) -> list[float]:
            nonlocal version
            rounds = []
            for _ in range(_REPEATS):
                version += 1
                seconds = []
                for action in actions:
                    begin = time.perf_counter()
                    action()
                    seconds.append(time.perf_counter() - begin)
                rounds.append(seconds)
            assert http.get("/v1/weights").json()["policy_version"] == version
            return np.median(rounds[1:], axis=0).tolist()

        rows = [
            ("HTTP push", *measure(through_http)),
            ("`jax.experimental.transfer`", *measure(through_transfer)),
            ("shared memory (`push_weights`)", *measure(through_memory)),
        ]
        rows += zip(["Orbax: save", "Orbax: load by path"], measure(save_checkpoint, from_checkpoint), strict=True)
        checkpoints.close()
    print(f"\n{gigabytes:.3f} GB\n\n| way | seconds | GB/s |\n|---|---|---|")
    for name, seconds in rows:
        print(f"| {name} | {seconds:.2f} | {gigabytes / seconds:.2f} |")


if __name__ == "__main__":
    cli.run(main)
