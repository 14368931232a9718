"""How the project is installed: from its clone, without ever putting a package `kernels` into site-packages."""

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ares_jax import __version__
from ares_jax.__main__ import COMMANDS
from ares_jax.commands.completion import flags_of

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The files that an installation reads."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("pyproject.toml", "build_backend.py", "requirements.txt", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("ares_jax", "configs", "data_pipeline", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def build(clone, call):
    code = f"import build_backend; print(build_backend.{call})"
    return subprocess.run([sys.executable, "-c", code], cwd=clone, capture_output=True, text=True)


def test_an_editable_installation_points_to_the_clone(clone):
    result = build(clone, "build_editable('.')")
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(clone / result.stdout.split()[-1]) as wheel:
        names = wheel.namelist()
        read = {name.split("/")[-1]: wheel.read(name).decode() for name in names if ".dist-info/" in name}
    tops = {name.split("/")[0] for name in names}
    assert not tops & {"kernels", "ares_jax", "configs", "data_pipeline"}
    assert "ares-jax = ares_jax.__main__:main" in read["entry_points.txt"]
    assert f"Version: {__version__}" in read["METADATA"]
    requirements = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    needed = [line for line in read["METADATA"].splitlines() if line.startswith("Requires-Dist: ") and "extra" not in line]
    assert len(needed) == len(requirements) > 10


def test_the_extra_for_tests_is_the_file_for_tests():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements-test.txt").read_text().splitlines()]
    assert extras["test"] == [line for line in lines if line and not line.startswith("-")]
    assert set(extras) == {"tpu", "cuda", "gcs", "eval", "test"}


def test_the_compiler_that_plans_is_the_one_that_runs():
    """One libtpu: that of the tests, of the extra and of the launchers, which this JAX's own extra takes."""
    (asked,) = [r for r in map(Requirement, importlib.metadata.requires("jax")) if r.name == "libtpu"]
    places = ("pyproject.toml", "requirements-test.txt", "launch/Dockerfile", "launch/tpu_host.sh", "docs/pods.md")
    found = [version for name in places for version in re.findall(r"libtpu==([\d.]+)", (ROOT / name).read_text())]
    assert len(found) == len(places) + 1 and len(set(found)) == 1 and found[0] in asked.specifier
    assert f"libtpu {found[0]}," in (ROOT / "docs" / "plan.md").read_text()


def requirements(name):
    """The lines of a requirements file, without its comments, and its comments."""
    lines = [line.partition("#") for line in (ROOT / name).read_text().splitlines()]
    return [(line.strip(), reason.strip()) for line, _, reason in lines if line.strip() and not line.startswith("-")]


def test_every_requirement_is_pinned_with_its_reason():
    for name in ("requirements.txt", "requirements-test.txt", "requirements.lock"):
        for line, reason in requirements(name):
            assert re.fullmatch(r"[\w.-]+==[\w.]+( ; .*)?", line) and reason, f"{name}: {line}"


def test_the_lock_holds_all_that_is_needed_here():
    """What the requirements ask for, and what these ask for, in the versions that the requirements name."""
    locked = {}
    for line, _ in requirements("requirements.lock"):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate():
            locked[canonicalize_name(requirement.name)] = requirement.specifier
    named = [Requirement(line) for line, _ in requirements("requirements.txt")]
    assert all(locked[canonicalize_name(r.name)] == r.specifier for r in named)
    todo, done = list(named), set()
    while todo:
        needed = todo.pop()
        name = canonicalize_name(needed.name)
        assert name in locked, f"{name} is not in requirements.lock; its head says how it is made"
        extras = needed.extras or {""}
        if (name, *extras) not in done:
            done.add((name, *extras))
            below = map(Requirement, importlib.metadata.requires(name) or [])
            todo += [r for r in below if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in extras)]


def test_a_wheel_is_refused_with_the_way_to_install(clone):
    result = build(clone, "build_wheel('.')")
    assert result.returncode == 1 and "pip install -e ." in result.stderr and "Traceback" not in result.stderr


def listed():
    return [name for topic in COMMANDS.values() for name in topic]


def test_every_listed_command_is_there():
    for name in listed():
        module = importlib.util.find_spec(f"ares_jax.{name}")
        assert module is not None, name


@pytest.mark.parametrize(
    "arguments, texts",
    [
        ([], ["Train:", *listed()]),
        (["--version"], [__version__]),
        (["infer", "--help"], ["How answers are drawn:", "--num_return_sequences", "--html"]),
    ],
    ids=str,
)
def test_help_is_grouped(arguments, texts):
    line = [sys.executable, "-m", "ares_jax", *arguments]
    result = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and all(text in result.stdout for text in texts), result.stderr


def test_commands_alone_do_without_pytorch_where_it_is(tmp_path):
    """transformers imports it wherever it is: half of a command's start-up, and 300 MB. Who imports ares_jax keeps it."""

    def imports(*line):
        line = [sys.executable, "-X", "importtime", *line]
        result = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert result.returncode == 0, result.stderr[-500:]
        return re.findall(r"\| +(torch\.nn|transformers)$", result.stderr, re.MULTILINE)

    script = tmp_path / "ares-jax"
    script.write_text("from ares_jax.__main__ import main; main()")
    for command in (["-m", "ares_jax.serve"], ["-Bm", "ares_jax", "serve"], [script, "serve"]):
        assert imports(*command, "--version") == ["transformers"]
    assert set(imports("-c", "import ares_jax.commands.serve")) == {"torch.nn", "transformers"}


def defined(path):
    """Names of the flags that a module defines."""
    return set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', (ROOT / "ares_jax" / path).read_text()))


@pytest.mark.parametrize("command", listed())
def test_every_flag_has_a_topic_and_every_topic_flags(command):
    path = f"commands/{command.rpartition('.')[2]}.py"
    shared = defined("commands/cli.py")
    named = set(flags_of(command))
    assert len(named) == len(flags_of(command)) and defined(path) <= named
    assert command == "infer" or named <= defined(path) | shared  # of infer, tests/test_infer.py


@pytest.mark.parametrize(
    "typed, completed",
    [
        ("", [f"{name} " for name in listed()] + ["--help ", "--version "]),
        ("re", ["report "]),
        ("cold_start.", ["cold_start.triggers "]),
        ("evaluate --max_", ["--max_tokens=", "--max_retries=", "--max_pixels="]),
        ("train --config=configs/x.py --config.aepo.wi", ["--config.aepo.window="]),
        ("train --config.aepo.kl.r", ["--config.aepo.kl.rate=", "--config.aepo.kl.reference=", "--config.aepo.kl.rho="]),
        ("train --config.opt", ["--config.optimizer."]),
        ("convert --config", ["--config.", "--config="]),
        ("infer --show_en", ["--show_entropy "]),
        ("infer --show_entropy --h", ["--help ", "--html="]),
        ("infer --config.a", []),
        ("trane --", []),
        ("train --config=", []),  # bash's own: files
    ],
)
def test_tab_completes_in_bash(typed, completed, tmp_path):
    """At a Tab bash splits what is typed, also at `=`, and calls the function."""
    (tmp_path / "ares-jax").write_text(f'#!/bin/sh\nexec {sys.executable} -m ares_jax "$@"\n')
    (tmp_path / "ares-jax").chmod(0o755)
    words = re.findall(r"=|[^= ]+", f"ares-jax {typed}") + ([""] if typed.endswith(" ") or not typed else [])
    code = (
        f'PATH={tmp_path}:$PATH; eval "$(ares-jax --completion)"; COMP_WORDS=({shlex.join(words)}); '
        f"COMP_CWORD={len(words) - 1}; _ares_jax ares-jax; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    result = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and sorted(result.stdout.strip("\n").split("\n")) == sorted(completed or [""]), result


def test_an_unknown_command_is_one_line():
    result = subprocess.run([sys.executable, "-m", "ares_jax", "trane"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2 and result.stderr == "error: 'trane' is no command; `ares-jax --help` lists them\n"
