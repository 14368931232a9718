"""`python -m ares_jax.plan`: does a run fit on a TPU slice or on GPUs, and how fast could it be? Without either.

Memory is what the compiler of the real programs says, traffic is counted in its text. Times are bounds from below by the
chip's datasheet.
"""

import itertools
from collections.abc import Iterable
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from ares_jax.commands import cli
from ares_jax.parallel.chips import chip_of
from ares_jax.planning import aot
from ares_jax.planning.fit import report
from ares_jax.planning.rooflines import assumptions, model_shape
from ares_jax.planning.search import search
from ares_jax.planning.slices import COLUMNS, compared, on_slice

TOPICS = {
    "The run (every field: ares_jax/config.py)": ("config", "workdir"),
    "The slice": ("topology",),
    "An iteration": ("mean_response",),
    "Looking for a better mesh": ("search", "compile"),
}

_TOPOLOGY = flags.DEFINE_string(
    "topology", "v5p:2x2x2", "TPU slice (v5p:2x2x2 is a v5p-16) or GPUs (h200:8; h200:4x8 on 4 hosts); several are compared"
)
_SEARCH = flags.DEFINE_bool("search", False, "try mesh shapes, remat policies and micro-batches of the learner; rank them")
_COMPILE = flags.DEFINE_integer("compile", 3, "how many of the search's best are compiled; the others are estimates")
_RESPONSE = flags.DEFINE_integer("mean_response", 2048, "tokens of a mean response, for the bound of an AEPO iteration")


def main(config: ConfigDict, workdir: Path | None) -> None:
    jax.config.update("jax_platforms", "cpu")
    names, shape = _TOPOLOGY.value.split(","), model_shape(config)
    parts: Iterable[str]
    if _SEARCH.value:
        parts = itertools.chain.from_iterable(search(config, shape, name, _COMPILE.value) for name in names)
    elif len(names) > 1:
        slices = {name: aot.topology_devices(name) for name in names}
        planned = [(name, on_slice(config, len(d), aot.host_count(d))) for name, d in slices.items()]
        kinds = {assumptions(chip_of(name)): name.split(":")[0] for name in names}
        start = [*(f"{kind}: {text}" for text, kind in kinds.items()), COLUMNS]
        parts = itertools.chain(start, (compared(c, shape, name)[1] for name, c in planned))
    else:
        parts = report(config, shape, names[0], _RESPONSE.value)
    for part in parts:
        print(part, flush=True)


def start() -> None:
    """Runs the command with the process's arguments."""
    cli.run(main, workdir_optional=True, processes="first")
