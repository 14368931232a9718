"""What the documentation links to and names is there. (That its commands work is tested in `test_commands.py`.)"""

import re
from pathlib import Path

import pytest

from ares_jax.__main__ import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_code_are_there(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    if page.name == "comparison.md":  # names others' files
        return
    for path in re.findall(r"`((?:ares_jax|kernels|data_pipeline|configs|tests|benchmarks|launch)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
    for path, names in re.findall(r"`((?:ares_jax|kernels)/[\w/]+\.py)` (`\w+`(?:, `\w+`)*)", text):
        code = (ROOT / path).read_text()
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^(def|class) {name}\b", code, re.MULTILINE), f"{path} has no {name}"


def test_every_command_has_a_page():
    pages = {page.stem for page in PAGES}
    assert {name.split(".")[0] for topic in COMMANDS.values() for name in topic} <= pages
