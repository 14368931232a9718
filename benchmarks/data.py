"""`python -m benchmarks.data`: prompts a second from every kind of source, and what the learner waits for them in the demo.

It writes the same problems (photograph-sized JPEGs of digit strips) in each format to a temporary folder, and streams them
through decoding, Qwen2.5-VL's image processing and tokenization, with threads and with worker processes. The first prompts,
with the start of the workers, are timed apart. The row "digits demo" is the demo's own setting. Then it runs the demo's
`cold_start` and `train` with fewer steps, and prints `time/data` beside `time/step` from their metrics.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from ares_jax.metrics import read_jsonl
from data_pipeline import digits, tokenizer
from data_pipeline.prompts import PromptEncoder
from data_pipeline.sources import open_sources
from data_pipeline.stream import Stream

SIZE = (512, 512)  # pixels of an image: 262,144, the least that the paper's configs scale to; 1369 patches

# Of the demo: the warm-up whole, so that answers are right and wrong as they are there; few steps of the rest.
SHORT = {
    "cold_start.pass_rate_problems": 192, "cold_start.selected": 128, "aepo.steps": 10, "aepo.validate_every": 99,
    "data.validation": "('digits://validation?size=12',)",
}  # fmt: skip


def write_all(folder: Path, count: int) -> dict[str, str]:
    """Writes `count` problems in each format and returns the URIs."""
    source = digits.DigitsSource("train", count, seed=0)
    rows, pictures = [], []
    for i in range(count):
        problem = source[i]
        buffer = io.BytesIO()
        Image.fromarray(problem.images[0]).resize(SIZE).save(buffer, format="JPEG")
        pictures.append(buffer.getvalue())
        rows.append({"global_id": str(i), "problem": "<image>" + problem.question, "answer": problem.answer})
    (folder / "images").mkdir()
    for i, picture in enumerate(pictures):
        (folder / "images" / f"{i}.jpg").write_bytes(picture)
    encoded = [{**row, "images": [base64.b64encode(p).decode()]} for row, p in zip(rows, pictures, strict=True)]
    by_path = [{**row, "images": [f"images/{i}.jpg"]} for i, row in enumerate(rows)]
    in_bytes = [{**row, "images": [{"bytes": p, "path": None}]} for row, p in zip(rows, pictures, strict=True)]
    (folder / "base64.jsonl").write_text("".join(json.dumps(row) + "\n" for row in encoded))
    (folder / "paths.jsonl").write_text("".join(json.dumps(row) + "\n" for row in by_path))
    (folder / "hub" / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(in_bytes), folder / "hub" / "data" / "train-00000-of-00001.parquet")
    writer = ArrayRecordWriter(str(folder / "a.arrayrecord"), "group_size:1")
    for row in encoded:
        writer.write(json.dumps(row).encode())
    writer.close()
    _write_tfds(folder, rows, pictures)
    return {
        "JSONL, base64": f"jsonl://{folder}/base64.jsonl",
        "JSONL, paths": f"jsonl://{folder}/paths.jsonl",
        "Parquet": f"parquet://{folder}/hub/data/*.parquet",
        "ArrayRecord": f"arrayrecord://{folder}/a.arrayrecord",
        "hub folder": f"hf://{folder}/hub",
        "TFDS": f"tfds://benchmark_problems/train?data_dir={folder}/tfds",
    }


def _write_tfds(folder: Path, rows: list[dict], pictures: list[bytes]) -> None:
    import tensorflow_datasets as tfds

    class BenchmarkProblems(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        url_infos: dict = {}  # TFDS would look for checksums in this module's package, and there is none

        def _info(self):
            text = {name: tfds.features.Text() for name in rows[0]}
            image = tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({**text, "image": image}))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
                yield i, {**row, "image": io.BytesIO(picture)}

    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        BenchmarkProblems(data_dir=str(folder / "tfds"), file_format="array_record").download_and_prepare()


def rate(uri: str, transform: Callable, workers: int, seconds: float) -> tuple[float, float]:
    """Returns the seconds until the first eight elements, and the elements a second after them."""
    begin = time.time()
    stream = Stream(open_sources((uri,)), transform, seed=0, workers=workers, prefetch=16)
    for _ in range(8):
        next(stream)
    start = time.time()
    count = 0
    while time.time() - start < seconds:
        next(stream)
        count += 1
    result = start - begin, count / (time.time() - start)
    stream.close()
    return result


def problem_only(problem):
    """Reading and decoding without tokens and patches."""
    return problem.answer


def demo(folder: Path, changes: dict[str, object]) -> list[str]:
    """Runs the demo up to AEPO with these changes of its config; returns a line of the table for each stage."""
    flags = ["--config=configs/digits_cpu.py", f"--workdir={folder}", *(f"--config.{k}={v}" for k, v in changes.items())]
    for command in ("cold_start", "train"):
        line = [sys.executable, "-m", f"ares_jax.{command}", *flags]
        result = subprocess.run(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if result.returncode:
            sys.exit(f"{' '.join(line)}\n{result.stderr[-2000:]}")
    lines = []
    for stage in ("base", "cold_start", "aepo"):
        # Without the first steps: those also compile, and readers start.
        records = [r for r in read_jsonl(folder / stage / "metrics.jsonl") if "time/data" in r][2:]
        waited, steps = ([r[f"time/{name}"] for r in records] for name in ("data", "step"))
        most = max(w / s for w, s in zip(waited, steps, strict=True))
        lines.append(
            f"| {stage} | {len(records)} | {sum(steps) / len(steps):.3f} | {1e3 * sum(waited) / len(waited):.1f} | "
            f"{sum(waited) / sum(steps):.2%} | {most:.2%} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=4.0, help="timed for each number")
    parser.add_argument("--no-demo", action="store_true", help="leave out the demo's learner, some minutes")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2], help="0: two threads")
    arguments = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    text = tokenizer.train_tokenizer(digits.corpus(), 448)
    encoder = PromptEncoder(text, tokenizer.make_image_processor(262_144, 4_194_304))
    demo = PromptEncoder(text, tokenizer.make_image_processor(784, 784 * 64))
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}, load {os.getloadavg()[0]:.1f};", end=" "
    )
    print(
        f"{arguments.problems} problems of one {SIZE[0]} x {SIZE[1]} JPEG; prompts a second (seconds to the first eight)\n"
    )
    names = [f"{n} workers" if n else "threads" for n in arguments.workers]
    print("| source | read and decode, threads | " + " | ".join(names) + " |\n|---|---|" + "---|" * len(names))
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["XDG_CACHE_HOME"] = f"{temporary}/cache"
        rows = {name: (uri, encoder) for name, uri in write_all(Path(temporary), arguments.problems).items()}
        rows["digits demo"] = ("digits://train?size=20000", demo)
        for name, (uri, transform) in rows.items():
            cells = [rate(uri, problem_only, 0, arguments.seconds / 2)]
            cells += [rate(uri, transform, workers, arguments.seconds) for workers in arguments.workers]
            print(f"| {name} | " + " | ".join(f"{speed:.0f} ({start:.1f} s)" for start, speed in cells) + " |", flush=True)
        if not arguments.no_demo:
            print("\n| stage of the demo | steps | seconds a step | ms waiting for data | share | most of a step |")
            print("|---|---|---|---|---|---|")
            print("\n".join(demo(Path(temporary) / "run", SHORT)))


if __name__ == "__main__":
    main()
