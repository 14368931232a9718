"""`python -m ares_jax.cold_start.triggers`: mines a trigger vocabulary from rollouts.

Words are ranked by the mean entropy of the windows that start at them. The rollouts are those that `train` logged
(`aepo/rollouts.jsonl`), or any such files (`--rollouts=a.jsonl,b.jsonl`), or are drawn with the newest weights. Writes
`cold_start/triggers.txt`, which `aepo.trigger_words` takes, and `cold_start/triggers.json` with the numbers.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import flags
from jaxtyping import Float
from ml_collections import ConfigDict

from ares_jax.commands import cli
from ares_jax.errors import UserError
from ares_jax.metrics import read_jsonl, write_atomic, write_json
from ares_jax.run.run import open_run
from ares_jax.sampling.gathering import GatheringSampler
from ares_jax.sampling.requests import derive_seed, rollout_request
from ares_jax.sampling.trigger_words import WORDS, normalized

_SPACES = "Ġ▁Ċ \t\n"
TOPICS = {
    "The run (every field: ares_jax/config.py)": ("config", "workdir"),
    "Where responses come from": ("rollouts", "problems"),
    "Which words are taken": ("words", "least"),
    "Several processes": ("coordinator_address", "num_processes", "process_id"),
}

_ROLLOUTS = flags.DEFINE_list("rollouts", [], "JSONL files of logged rollouts; empty: the run's own, or drawn ones")
_PROBLEMS = flags.DEFINE_integer("problems", 64, "training problems to draw responses to, where there are no rollouts", 1)
_WORDS = flags.DEFINE_integer("words", 100, "size of the vocabulary", 1)
_LEAST = flags.DEFINE_integer("least", 20, "windows that a word needs to be ranked", 1)


@dataclass(frozen=True)
class Ranked:
    """A word, the mean entropy (nats) of the windows that start at it, and how many there were."""

    word: str
    entropy: float
    windows: int


def word_at(tokens: Sequence[str], t: int) -> str | None:
    """Returns the word that the token at t is, as V_sem spells it; None for a piece of one and for all that is no word.

    Digits, single letters, punctuation, LaTeX commands and placeholders (`<image>`, `[BLANK]`, `x_1`) are no words.
    """
    word = normalized(tokens[t])
    if len(word) < 2 or not word.isalpha() or not word.isascii():
        return None
    before = tokens[t - 1][-1:] if t else " "
    after = tokens[t + 1][:1] if t + 1 < len(tokens) else " "
    begins = tokens[t][0] in _SPACES or before in _SPACES or before == ">"  # of a tag, such as <think>
    ends = after in _SPACES or not (after.isalnum() or after in "_]}>")
    return word if begins and ends else None


def mine(
    leaves: Iterable[tuple[Sequence[str], Float[np.ndarray, "N"]]], *, window: int, least: int, count: int
) -> list[Ranked]:
    """Returns the `count` words with the highest mean window entropy, highest first.

    Args:
      leaves: of each response its tokens as text, and the mean entropy of the window that starts at each, nats; NaN:
        not to be counted.
      window: tokens of a window; the last `window - 1` positions have none.
      least: windows that a word needs.
    """
    means = defaultdict(list)
    for tokens, window_means in leaves:
        for t in range(len(tokens) - window + 1):
            if not np.isnan(window_means[t]) and (word := word_at(tokens, t)) is not None:
                means[word].append(float(window_means[t]))
    ranked = [Ranked(word, float(np.mean(values)), len(values)) for word, values in means.items() if len(values) >= least]
    return sorted(ranked, key=lambda r: (-r.entropy, r.word))[:count]


def main(config: ConfigDict, workdir: Path) -> None:
    files = [Path(file) for file in _ROLLOUTS.value]
    own = workdir / "aepo" / "rollouts.jsonl"
    if missing := next((file for file in files if not file.is_file()), None):
        raise UserError(f"--rollouts={missing}: no such file; `train` writes aepo/rollouts.jsonl")
    records = [record for file in files or [own] for record in read_jsonl(file)]
    if records:
        leaves = [(leaf["tokens"], own_means(leaf)) for record in records for leaf in record["leaves"]]
    else:
        leaves = _drawn(config, workdir)
    ranked = mine(leaves, window=config.aepo.window, least=_LEAST.value, count=_WORDS.value)
    if not ranked:
        raise UserError(
            f"no word starts {_LEAST.value} windows in {len(leaves)} responses; lower --least or give more rollouts"
        )
    folder = workdir / "cold_start"
    write_json(folder / "triggers.json", [dataclasses.asdict(r) for r in ranked])
    write_atomic(folder / "triggers.txt", "".join(f"{r.word}\n" for r in ranked))
    print(f"{'word':16}{'nats':>6}{'windows':>9}  ({len(leaves)} responses; * is in our own list)")
    for r in ranked[:30]:
        print(f"{r.word:15}{'*' if r.word in WORDS else ' '}{r.entropy:6.3f}{r.windows:9d}")
    print(f"{len(ranked)} words: --config.aepo.trigger_words={folder / 'triggers.txt'}")


def own_means(leaf: dict) -> Float[np.ndarray, "N"]:
    """Returns the window means of a logged leaf, NaN where it shares its parent's tokens: a window counts once."""
    means = np.array(leaf["window_means"], float)
    means[: leaf["branch_position"]] = np.nan
    return means


def _drawn(config: ConfigDict, workdir: Path) -> list[tuple[list[str], np.ndarray]]:
    run, s = open_run(config, workdir), config.sampler
    prompts = run.prompts("train", limit=_PROBLEMS.value)
    requests = [
        rollout_request(
            prompt, seed=derive_seed(config.seed, "triggers", prompt.problem_id), group_size=config.aepo.group_size,
            max_new_tokens=s.max_response_tokens, temperature=s.temperature, top_p=s.top_p, top_k=s.top_k,
        )
        for prompt in prompts
    ]  # fmt: skip
    stage = (run.trained_stages() or ["base"])[-1]
    with run.sampler() as client:
        run.push(client, run.params(stage), 0)
        groups = GatheringSampler(client).rollouts(requests)
    text: dict[int, str] = {}  # of each token id
    for leaf in (leaf for group in groups for leaf in group.leaves):
        text.update({i: run.tokenizer.decode([i]) for i in set(leaf.token_ids.tolist()) - set(text)})
    return [([text[i] for i in leaf.token_ids.tolist()], leaf.window_means) for g in groups for leaf in g.leaves]


def start() -> None:
    """Runs the command with the process's arguments."""
    cli.run(main)
