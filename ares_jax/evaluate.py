"""`python -m ares_jax.evaluate`: accuracy and response length of every trained stage on the test split."""

import json
from functools import partial
from pathlib import Path

from ml_collections import ConfigDict
from tqdm import tqdm

from ares_jax import cli
from ares_jax.evaluation.harness import evaluate
from ares_jax.metrics import stage, write_json
from ares_jax.workspace import host, open_workspace


def _advance(bar: tqdm, index: int) -> None:
    bar.update()


def main(config: ConfigDict, workdir: Path) -> None:
    workspace, e = open_workspace(config, workdir), config.evaluation
    prompts = workspace.prompts("test")
    with stage(workdir, "evaluation") as record, workspace.sampler() as client:
        tokens = 0.0
        for version, name in enumerate(workspace.trained_stages()):
            step = workspace.checkpoints(name).latest()
            path = workdir / "evaluation" / f"{name}.json"
            if path.exists() and json.loads(path.read_text()).get("step") == step:
                continue  # these very weights were evaluated already
            client.push_weights(host(workspace.params(name)), version)
            with tqdm(total=len(prompts), desc=f"evaluate {name}", unit="problem") as bar:
                result = evaluate(
                    client, prompts, workspace.decode, name=name, split="test", seed=config.seed,
                    max_new_tokens=config.sampler.max_response_tokens, temperature=e.temperature, top_p=e.top_p,
                    samples_shown=e.samples_shown, on_group=partial(_advance, bar),
                )  # fmt: skip
            write_json(path, {**result, "step": step})
            tokens += sum(level["problems"] * level["mean_tokens"] for level in result["levels"].values())
        record["tokens"] = tokens


if __name__ == "__main__":
    cli.run(main)
