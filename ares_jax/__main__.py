"""`ares-jax <command>` after `pip install -e .`, or `python -m ares_jax <command>` in the clone: the commands by topic."""

import runpy
import sys
from pathlib import Path

from ares_jax import __version__
from ares_jax.commands.completion import SCRIPT, candidates

COMMANDS = {
    "Train": {
        "cold_start": "starting model, pass rates, curation, supervised fine-tuning",
        "cold_start.triggers": "mine trigger words from rollouts",
        "train": "AEPO, with rollouts from the sampler service",
        "serve": "the sampler service",
    },
    "Look": {
        "infer": "ask a model about images and videos",
        "evaluate": "a model on the paper's benchmarks, a run's stages, two evaluations compared",
        "report": "table and page of a run",
        "plan": "does a run fit on a TPU slice?",
    },
    "Carry": {"convert": "checkpoints between Hugging Face, Orbax and runs"},
}


def main() -> None:
    """Runs the command that is named, or lists them."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print(_help())
    elif name == "--completion":
        print(SCRIPT)
    elif name == "--complete":
        print("\n".join(candidates(arguments, [command for topic in COMMANDS.values() for command in topic])))
    elif name == "--version":
        print(f"ares-jax {__version__}")
    elif name in {command for topic in COMMANDS.values() for command in topic}:
        # The clone comes first, as with `python -m`: Hugging Face publishes a package called `kernels`, too.
        sys.path.insert(0, str(Path(__file__).parents[1]))
        sys.argv = [f"ares-jax {name}", *arguments]
        runpy.run_module(f"ares_jax.{name}", run_name="__main__", alter_sys=True)
    else:
        print(f"error: {name!r} is no command; `ares-jax --help` lists them", file=sys.stderr)
        sys.exit(2)


def _help() -> str:
    lines = [f"ares-jax {__version__}", "usage: ares-jax <command> --flag=value ...; each takes --help"]
    for topic, commands in COMMANDS.items():
        lines += ["", f"{topic}:", *(f"  {name:20}{does}" for name, does in commands.items())]
    return "\n".join([*lines, "", 'Tab completes commands, flags and fields in bash after: eval "$(ares-jax --completion)"'])


if __name__ == "__main__":
    main()
