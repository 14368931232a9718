"""`python -m ares_jax.evaluate`: a model on the paper's benchmarks, two evaluations side by side, or a run's stages.

    python -m ares_jax.evaluate --model-name=NAME --openai-base-url=http://host:8000/v1 --datasets=mathverse,math_500
    python -m ares_jax.evaluate --checkpoint=FOLDER --datasets=mathvista --dataset-dir=data
    python -m ares_jax.evaluate --compare output/base output/ares
    python -m ares_jax.evaluate --config=configs/digits_cpu.py --workdir=runs/digits

Flags may be written with dashes or underscores. docs/evaluate.md tells more.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from ares_jax.commands import cli
from ares_jax.commands.arguments import plain_arguments
from ares_jax.errors import UserError
from ares_jax.evaluation.answers_so_far import AnswersSoFar
from ares_jax.evaluation.questions import Asked
from ares_jax.lifecycle import preemption

TOPICS = {
    "A model on benchmarks": (
        "model_name", "openai_base_url", "openai_api_key", "checkpoint", "datasets", "limit", "dataset_dir", "output_dir",
        "cache_dir",
    ),
    "What it is asked": ("system_prompt", "min_pixels", "max_pixels"),
    "How answers are drawn": ("max_tokens", "temperature", "top_p"),
    "How patiently": ("eval_threads", "max_retries", "patience"),
    "A judge": ("judge_model", "judge_base_url", "judge_api_key"),
    "Two evaluations side by side": ("compare",),
    "Every stage of a run": ("config", "workdir"),
    "Several processes": ("coordinator_address", "num_processes", "process_id", "heartbeat_timeout"),
}  # fmt: skip

_SYSTEM_PROMPT = (  # the original's
    "You FIRST think about the reasoning process as an internal monologue and then provide the final answer. The reasoning "
    "process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in \\boxed{}."
)

_MODEL = flags.DEFINE_string("model_name", None, "the model's name at the endpoint")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "a Hugging Face folder, or a run's --workdir: a service is started with it and asked"
)
_KEY = flags.DEFINE_string("openai_api_key", "", "the endpoint's key; by default what OPENAI_API_KEY holds")
_URL = flags.DEFINE_string("openai_base_url", "https://api.openai.com/v1", "the endpoint")
_CACHE = flags.DEFINE_string("cache_dir", None, "where answers are kept; by default `cache` in --output-dir")
_OUTPUT = flags.DEFINE_string("output_dir", "output", "where results are written")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 8192, "most tokens of a response", lower_bound=1)
_MIN_PIXELS = flags.DEFINE_integer("min_pixels", 262_144, "smaller images are enlarged; 0: never", lower_bound=0)
_MAX_PIXELS = flags.DEFINE_integer("max_pixels", 1_048_576, "larger images are reduced; 0: never", lower_bound=0)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.3, "of sampling", lower_bound=0.0)
_TOP_P = flags.DEFINE_float("top_p", 0.95, "of sampling", lower_bound=0.0, upper_bound=1.0)
_SYSTEM = flags.DEFINE_string("system_prompt", _SYSTEM_PROMPT, "before every question; empty: none")
_DATASETS = flags.DEFINE_string("datasets", "all", "benchmarks, comma-separated, or all")
_DATASET_DIR = flags.DEFINE_string("dataset_dir", "dataset", "where data sets lie, and are downloaded to")
_THREADS = flags.DEFINE_integer("eval_threads", 8, "requests in flight", lower_bound=1)
_RETRIES = flags.DEFINE_integer("max_retries", 3, "attempts after the first, of a request that fails", lower_bound=0)
_PATIENCE = flags.DEFINE_float("patience", 300.0, "seconds of an endpoint that is away or full before giving up")
_LIMIT = flags.DEFINE_integer("limit", 0, "only the first so many samples of each benchmark; 0: all", lower_bound=0)
_JUDGE = flags.DEFINE_string("judge_model", None, "model that decides what rules cannot, where a benchmark has a judge")
_JUDGE_URL = flags.DEFINE_string("judge_base_url", None, "its endpoint; by default --openai-base-url")
_JUDGE_KEY = flags.DEFINE_string(
    "judge_api_key", "", "its key; by default that of the same endpoint, at another what OPENAI_API_KEY holds"
)
_COMPARE = flags.DEFINE_list("compare", None, "two --output-dir, or results files, side by side")


def main(config: ConfigDict | None, workdir: Path | None) -> None:
    if _COMPARE.value:
        _compare(_COMPARE.value)
    elif _CHECKPOINT.value and _MODEL.value:
        raise UserError("--checkpoint starts its own service, --model-name asks one that runs: give one of them")
    elif _CHECKPOINT.value or _MODEL.value:
        _benchmarks(config, workdir)
    elif config is not None and workdir is not None:
        _stages(config, workdir)
    else:
        raise UserError("name what to evaluate: --model-name, --checkpoint, --compare, or --config and --workdir of a run")


def _processes() -> cli.Processes:
    """An endpoint is asked by one process, which must not take devices that a service of its own needs."""
    return "first" if _COMPARE.value or _CHECKPOINT.value or _MODEL.value else "together"


def _benchmarks(config: ConfigDict | None, workdir: Path | None) -> None:
    """The paper's benchmarks, asked over HTTP. Exits with 1 if a sample stayed without an answer."""
    from ares_jax.evaluation.benchmarks import chosen
    from ares_jax.evaluation.published import find_folder
    from ares_jax.evaluation.report import line
    from ares_jax.evaluation.results import run_benchmark

    preemption.listen()  # every answer is kept as it comes
    benchmarks, output, data = chosen(_DATASETS.value), Path(_OUTPUT.value), Path(_DATASET_DIR.value)
    for benchmark in benchmarks:  # what is missing is named before a model is loaded, not hours later
        find_folder(benchmark, data)
    cache = Path(_CACHE.value) if _CACHE.value else output / "cache"
    errors = 0
    with _endpoint(config, workdir, output) as asked:
        judge = _judge_endpoint(asked)
        for benchmark in benchmarks:
            result = run_benchmark(
                benchmark, asked, dataset_dir=data, cache_dir=cache, output_dir=output, judge=judge, limit=_LIMIT.value
            )
            print(line(result), flush=True)
            errors += result["metrics"]["errors"]
    if errors:
        print(f"{errors} answers are missing (the results say why); the same command asks for these alone", file=sys.stderr)
        sys.exit(1)


@contextlib.contextmanager
def _endpoint(config: ConfigDict | None, workdir: Path | None, output: Path) -> Iterator[Asked]:
    common: dict[str, Any] = {
        "temperature": _TEMPERATURE.value, "top_p": _TOP_P.value, "max_tokens": _MAX_TOKENS.value,
        "system_prompt": _SYSTEM.value, "min_pixels": _MIN_PIXELS.value, "max_pixels": _MAX_PIXELS.value,
        "threads": _THREADS.value, "retries": _RETRIES.value, "patience": _PATIENCE.value,
    }  # fmt: skip
    if not _CHECKPOINT.value:
        yield Asked(_URL.value, _MODEL.value or "", _KEY.value, **common)
        return
    from ares_jax.run.local_service import local_service

    with local_service(Path(_CHECKPOINT.value), config, workdir or output / "service", _MAX_TOKENS.value) as service:
        yield Asked(service.url, service.model, os.environ.get("ARES_TOKEN", ""), service.identity, **common)


def _judge_endpoint(asked: Asked) -> Asked | None:
    if not _JUDGE.value:
        return None
    url = _JUDGE_URL.value or _URL.value
    key = _JUDGE_KEY.value or (_KEY.value if url == _URL.value else "")  # one host's key is not for another to see
    return Asked(url, _JUDGE.value, key, threads=asked.threads, retries=asked.retries, patience=asked.patience)


def _compare(runs: list[str]) -> None:
    """Prints the table, and writes it with its plot beside the second run."""
    from ares_jax.evaluation.benchmarks import BENCHMARKS
    from ares_jax.evaluation.compare import compared, load_results, plot, table
    from ares_jax.metrics import write_atomic

    if len(runs) != 2:
        raise UserError(f"--compare takes two runs, not {len(runs)}")
    a, b = (load_results(Path(run)) for run in runs)
    rows = compared(a, b, BENCHMARKS)
    text = table(rows, (runs[0], runs[1]))
    print(text)
    folder = Path(runs[1]) if Path(runs[1]).is_dir() else Path(runs[1]).parent
    write_atomic(folder / "compare.md", text + "\n")
    plot(rows, (runs[0], runs[1]), folder / "compare.png")
    print(f"\n{folder / 'compare.md'}, {folder / 'compare.png'}")


def _stages(config: ConfigDict, workdir: Path) -> None:
    """Accuracy and response length of every trained stage of a run on its test split."""
    from ares_jax.evaluation.harness import evaluate
    from ares_jax.lifecycle.watchdog import watchdog
    from ares_jax.metrics import stage, write_json
    from ares_jax.parallel.distributed import is_first
    from ares_jax.run.run import open_run
    from ares_jax.sampling.gathering import GatheringSampler

    run, e = open_run(config, workdir), config.evaluation
    prompts = run.prompts("test")
    drawn = {
        "seed": config.seed, "max_new_tokens": config.sampler.max_response_tokens, "temperature": e.temperature,
        "top_p": e.top_p,
    }  # fmt: skip
    with stage(workdir, "evaluation") as record, watchdog(config.watchdog_seconds), run.sampler() as client:
        tokens = 0.0
        for version, name in enumerate(run.trained_stages()):
            step = run.checkpoints(name).latest()
            path = workdir / "evaluation" / f"{name}.json"
            if preemption.from_first(partial(_holds, path, step)):
                continue  # these very weights were evaluated already: all processes go by what one sees
            run.push(client, run.params(name), version)
            so_far = AnswersSoFar(path.parent, name, {"step": step, "problems": list(config.data.test), **drawn})
            progress = {"total": len(prompts), "initial": len(so_far.known), "unit": "problem"}
            with so_far, tqdm(desc=f"evaluate {name}", **progress) as bar:
                result = evaluate(
                    GatheringSampler(client), prompts, run.decode, name=name, split="test", **drawn,
                    samples_shown=e.samples_shown, known=so_far.known, on_answer=partial(_keep, so_far, bar),
                )  # fmt: skip
            write_json(path, {**result, "step": step})
            if is_first():
                so_far.remove()
            tokens += sum(level["problems"] * level["mean_tokens"] for level in result["levels"].values())
        record["tokens"] = tokens


def _holds(path: Path, step: int | None) -> bool:
    return path.exists() and json.loads(path.read_text()).get("step") == step


def _keep(so_far: AnswersSoFar, bar: tqdm, index: int, response: str, tokens: int) -> None:
    so_far.keep(index, response, tokens)
    bar.update()


def start() -> None:
    """Runs the command with the process's arguments."""
    sys.argv = plain_arguments(sys.argv)
    cli.run(main, config_optional=True, processes=_processes)
