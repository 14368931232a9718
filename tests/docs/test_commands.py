"""Every command of README, docs/ and the heads of the launchers is executed, in the order in which a reader would.

A block runs in a folder laid out like the clone, in bash, as it is written but for `RULES`. Nothing else is on the path than
our commands, `make` and what every Linux has: a command for which there is no tiny fixture or stand-in fails.
"""

import contextlib
import re
import socket

import pytest

from tests.cold_start import fake
from tests.digits import TINY_RUN
from tests.docs.sandbox import ROOT, Sandbox, solution
from tests.evaluation import published_layouts

# What is written, and what is run instead. {folder}: the sandbox; {endpoint}: one that answers; {port}: a free one.
RULES = {
    r"(?<!\w)/(?=(models|data|mnt)/)": "{folder}/",
    r"https?://host(:8000)?/v1": "{endpoint}/v1",
    r"(127\.0\.0\.1:|sampler\.port=)8000": r"\g<1>{port}",
    r"^(.* --follow=)30": r"timeout --preserve-status --signal=INT 4 \g<1>1 || [ $? = 130 ]",  # until Ctrl-C
    r"aepo\.steps=60": "aepo.steps=4",
    r"--dry_run(?=\s+--command=cold_start)": "--attempts=1",  # of pods.md: our gcloud runs what a worker would
    r"sampler\.tensor=4": "sampler.tensor=1",  # one device here
    r"(?<=--datasets=digits)(.*--max-tokens=)64": r" --limit=8\g<1>32",
    r"--words=100": "--words=100 --least=1",  # few rollouts
    r"aepo\.window=8": "aepo.window=6",  # as everywhere: not compiled for this alone
}
_COMPILES = "half a minute of compiling even for the tiniest model; tests/parallel/test_aot.py tries the compiler"
_PLAN = "plan --config=configs/qwen2_5_vl_7b_aepo.py --topology="
NOT_EXECUTED = {
    f"ares-jax {_PLAN}v5p:2x2x2": _COMPILES,
    f"python -m ares_jax.{_PLAN}v5p:2x2x2": _COMPILES,
    f"python -m ares_jax.{_PLAN}v5p:4x4x4,v6e:16x16": _COMPILES,
    f"python -m ares_jax.{_PLAN}v5p:4x4x8 --search --compile=2": _COMPILES,
    f"python -m ares_jax.{_PLAN}h200:8,h200:4x8": "tests/parallel/test_gpu_compiler.py tries the compiler",
    f"python -m ares_jax.{_PLAN}h200:8".replace("7b", "3b"): "tests/parallel/test_gpu_compiler.py tries the compiler",
    "make test": "it runs this test; .ci/run executes it",
    "python -m venv .venv": "`make demo` and `make test` do it where .ci/run executes them",
    "pip install -c requirements.lock -e '.[tpu]'": "needs the network; tests/test_package.py builds the installation",
    "python -m pip install -r requirements.txt 'jax[tpu]' libtpu==0.0.42.1": "needs the network",
}  # (and `make ablation`, which takes hours: it stands in no block)
SERVICE = re.compile(r"^python -m ares_jax\.serve .*$", re.MULTILINE)  # started once, where a block first asks for port 8000
CONFIGS = {  # (sections as in the tiny digits', fields): few shapes, as each is compiled
    "digits_cpu.py": ((), TINY_RUN | {"sampler.colocated": True}),
    "qwen2_5_vl_*.py": (
        ("mesh", "packing", "sampler", "optimizer", "cold_start"),
        {"model.dtype": "float32", "model.remat": "none", "cold_start.warmup_steps": 0, "data.format_prompt": "",
         "data.min_pixels": 784, "data.max_pixels": 784 * 2, "data.workers": 0},
    ),
}  # fmt: skip
# A page uses what those before it have made.
PAGES = ["README.md", *(f"docs/{name}.md" for name in ("quickstart", "cold_start", "train", "convert", "infer", "evaluate",
         "report", "serve", "plan", "pods", "testing"))]  # fmt: skip
ON_HOSTS = ("worker.sh", "tpu_host.sh")  # which the launchers run, not a reader
LAUNCHERS = sorted(f"launch/{path.name}" for path in (ROOT / "launch").glob("*.sh") if path.name not in ON_HOSTS)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: str) -> list[tuple[str, str]]:
    """The (language, text) of a page's blocks; of a launcher, the usage in its head with all that it says is optional."""
    text = (ROOT / page).read_text()
    if page.endswith(".sh"):
        (usage,) = re.findall(rf"^#   ({page} (?:.*\\\n)*.*)$", text, re.MULTILINE)
        return [("sh", re.sub(r"^#|[\[\]]| \.\.\.", "", usage, flags=re.MULTILINE) + "\n")]
    return FENCE.findall(text)


class Reader:
    """Types what is written."""

    def __init__(self, sandbox: Sandbox, endpoint: str):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        self.sandbox = sandbox
        self._values = {"folder": sandbox.folder, "endpoint": endpoint, "port": port}
        self._serving = False
        self._done: set[str] = set()

    def type(self, language: str, text: str):
        """Executes a block."""
        if "127.0.0.1:8000" in text:
            self._serve()
        if language == "python":
            (self.sandbox.folder / "block.py").write_text(self._ruled(text))
            text = "python block.py\n"
        else:
            text = self._ruled("".join(map(self._once, text.replace("\\\n", " ").splitlines(keepends=True))))
        return self.sandbox.run(text)

    def _once(self, line: str) -> str:
        """The line, or nothing if it is not to be executed or already has been."""
        command = re.sub(r"\s+#.*", "", line).replace(".venv/bin/", "").strip()
        if (
            command in NOT_EXECUTED
            or SERVICE.match(command)
            or (command in self._done and re.search("ares_jax|^make", command))
        ):
            return "\n"
        self._done.add(command)
        return line

    def _ruled(self, text: str) -> str:
        for pattern, instead in RULES.items():
            for name, value in self._values.items():
                instead = instead.replace(f"{{{name}}}", str(value))
            text = re.sub(pattern, instead, text, flags=re.MULTILINE)
        return text

    def _serve(self) -> None:
        """Starts the service as docs/serve.md says."""
        if not self._serving:
            (line,) = SERVICE.findall((ROOT / "docs" / "serve.md").read_text())
            self.sandbox.start(["bash", "-c", self._ruled(line)])
            health = f"curl -s http://127.0.0.1:{self._values['port']}/health"
            self.sandbox.wait_for(lambda: self.sandbox.run(health).returncode == 0, 120)
            self._serving = True


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    with contextlib.closing(Sandbox(tmp_path_factory.mktemp("clone"), CONFIGS)) as sandbox:
        yield from prepared(sandbox)


def prepared(sandbox):
    """Gives the sandbox what pages speak of and do not make: data sets, an endpoint, two evaluations."""
    for name, data_set in (("mathverse", "AI4Math/MathVerse"), ("math_500", "HuggingFaceH4/MATH-500")):
        getattr(published_layouts, name)(sandbox.folder / "dataset" / data_set)

    def reply(question: str, body: dict, times: int) -> list[str]:
        sum_of = re.match(r"(\d+) \+", question)
        return [solution(2 * int(sum_of[1])) if sum_of else "\\boxed{B}"] * body.get("n", 1)

    with fake.serving(fake.Fake(reply)) as url:
        for name in ("base", "ares"):  # two evaluations to compare
            done = sandbox.run(
                f"python -m ares_jax.evaluate --model-name={name} --openai-base-url={url}/v1 --datasets=math_500 "
                f"--output-dir=output/{name}"
            )
            assert done.returncode == 0, done.stdout
        yield Reader(sandbox, url)


@pytest.mark.parametrize("page", PAGES + LAUNCHERS)
def test_every_command_works(page, reader):
    for language, text in blocks(page):
        if language:
            done = reader.type(language, text)
            assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}"


def test_what_they_say_they_write_is_there(reader):
    for name in (
        "runs/digits/report.html", "runs/digits/export/model.safetensors", "runs/wide/evaluation/aepo.json",
        "runs/grpo/checkpoints/aepo/3", "runs/3b/checkpoints/cold_start", "runs/7b/cold_start/curation.md", "answers.html",
        "exported/config.json", "models/back/config.json", "output/ares/compare.png", "output/digits___digits.json",
        "mnt/ares/runs/7b/export/model.safetensors", "mnt/ares/runs/7b/report.html",
    ):  # fmt: skip
        assert (reader.sandbox.folder / name).exists(), name


def test_no_command_is_forgotten():
    """Each stands in a block of a page that is read, in a language that is executed."""
    pages = {f"docs/{path.name}": path.read_text() for path in (ROOT / "docs").glob("*.md")}
    pages["README.md"] = (ROOT / "README.md").read_text()
    written = ""
    for page, text in pages.items():
        found = FENCE.findall(text)
        assert len(re.findall("^ *```", text, re.MULTILINE)) == 2 * len(found), f"{page}: a block is not at the margin"
        assert {language for language, _ in found} <= {"", "sh", "python"}, f"{page}: others are not executed"
        assert page in PAGES or not any(language for language, _ in found), f"{page} is not in PAGES"
        typed = re.compile(r"^ *(\$ )?(\.venv/|python|pip|make|ares-jax|launch/)", re.MULTILINE)
        assert not any(typed.search(block) for language, block in found if not language), f"{page}: is an output a command?"
        assert not re.search(r"`[^`\n]*(python|ares-jax|launch/)[^`\n]* --\w+[= ][^`\n]*`", FENCE.sub("", text)), (
            f"{page}: a command within a sentence is not executed; give it a block"
        )
        written += "".join(block.replace(".venv/bin/", "") for language, block in found if language == "sh")
    assert all(command in written for command in NOT_EXECUTED)


@pytest.mark.parametrize(
    "line",
    ["make dmeo", "ares_jax.train", "python -m ares_jax.trane", "python -m ares_jax.report --workdir=runs/nowhere", "wget x",
     "launch/slurm.sh --nodes=4", "curl -s http://127.0.0.1:{port}/v1/nowhere", "false; true"],
)  # fmt: skip
def test_what_does_not_work_is_found(line, reader):
    assert reader.type("sh", line.format(**reader._values)).returncode != 0
