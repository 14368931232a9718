"""Compares the tests of two checkouts: `python -m tests.inventory BEFORE AFTER` lists test ids and assertions that are gone.

Assertions are `assert` statements, `pytest.raises` and calls of `np.testing`, as text, whatever file they stand in.
"""

import ast
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path


def collected(folder: Path, everything: bool) -> set[str]:
    """Returns the ids of the tests that a checkout's `make test`, or `make test-all`, runs."""
    line = [sys.executable, "-m", "pytest", "--collect-only", "--override-ini=addopts=--import-mode=importlib"]
    environment = {**os.environ, "ARES_TESTS": "all" if everything else "", "PYTHONPATH": ""}
    done = subprocess.run([*line, "-q"], cwd=folder, env=environment, capture_output=True, text=True)
    return {text for text in done.stdout.splitlines() if "::" in text}


def assertions(folder: Path) -> Counter[str]:
    found: Counter[str] = Counter()
    for path in (folder / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assert):
                found[ast.unparse(node.test)] += 1
            elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("np.testing.", "pytest.raises")):
                found[ast.unparse(node)] += 1
    return found


def main(before: Path, after: Path) -> None:
    old, new, quick = collected(before, True), collected(after, True), collected(after, False)
    lost = assertions(before) - assertions(after)
    report = {
        "test ids that are gone": old - new,
        "new test ids": new - old,
        "assertions that are gone": set(lost),
        "in `make test-all` alone": new - quick,
    }
    for title, rows in report.items():
        print(f"{title}: {len(rows)}", *sorted(rows), sep="\n  ")
    share = len(new - quick) / len(new)
    print(f"{len(old)} tests before, {len(new)} after, {share:.1%} of them in `make test-all` alone")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
