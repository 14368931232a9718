"""`python -m ares_jax.convert`: the run's newest weights as a Hugging Face folder that `transformers` loads."""

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from ares_jax import cli
from ares_jax.checkpoints import save_hf
from ares_jax.errors import UserError
from ares_jax.metrics import stage
from ares_jax.workspace import STAGES, open_workspace
from data_pipeline.tokenizer import save_processors

_STAGE = flags.DEFINE_enum("stage", None, list(STAGES), "whose weights; by default the last trained stage's")
_OUTPUT = flags.DEFINE_string("output", None, "folder to write; by default `export` in the workdir")


def main(config: ConfigDict, workdir: Path) -> None:
    workspace = open_workspace(config, workdir)
    stages = [_STAGE.value] if _STAGE.value else workspace.trained_stages()
    if not stages:
        raise UserError(f"{workdir}: no checkpoint to convert; run `python -m ares_jax.cold_start` first")
    output = Path(_OUTPUT.value or workdir / "export")
    with stage(workdir, "export"):
        model = workspace.load(stages[-1])
        if not output.exists():
            save_processors(output, workspace.tokenizer, workspace.encoder.image_processor)
        save_hf(model, output)
    print(f"{stages[-1]} exported to {output}")


if __name__ == "__main__":
    cli.run(main)
