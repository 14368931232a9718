"""The order of test files, the longest first, from the seconds that each took in an earlier run (tests/seconds.json)."""

import json
from collections import Counter
from pathlib import Path

_FILE = Path(__file__).with_name("seconds.json")
_taken: Counter[str] = Counter()


def longest_first(items: list) -> None:
    """Sorts the items of files by the files' seconds; a new file, of which nothing is known, comes first."""
    seconds = json.loads(_FILE.read_text())
    items.sort(key=lambda item: -seconds.get(file_of(item.nodeid), 10**6))


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0].removeprefix("tests/")


def note(report) -> None:
    """Adds the seconds of a test's set-up, call or tear-down to its file's."""
    _taken[file_of(report.nodeid)] += report.duration


def keep() -> None:
    """Writes the seconds of a whole run, if a file's moved by more than 10 s and a half of it."""
    old = json.loads(_FILE.read_text())
    new = {name: round(seconds) for name, seconds in sorted(_taken.items())}
    moved = [
        name for name in old.keys() | new.keys() if abs(old.get(name, 0) - new.get(name, 0)) > 10 + old.get(name, 0) / 2
    ]
    if moved or old.keys() != new.keys():
        _FILE.write_text(json.dumps(new, indent=1) + "\n")
