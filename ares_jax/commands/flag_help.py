"""`--help` of a command: what it does, and its flags by topic."""

import textwrap
from types import ModuleType

from absl import flags

_COLUMN, _WIDTH = 26, 110


def flag_help(command: ModuleType) -> str:
    """Returns the help of a command's module: its docstring, then its flags by topic, as its `TOPICS` groups their names."""
    lines = [(command.__doc__ or "").strip()]
    for topic, names in command.TOPICS.items():
        lines += ["", f"{topic}:", *(_line(flags.FLAGS[name]) for name in names)]
    return "\n".join(lines)


def _line(flag: flags.Flag) -> str:
    default = f" ({flag.default})" if flag.default not in (None, [], False, "") else ""
    name = f"  --{flag.name}"
    text = (flag.help or "").split(";\n    repeat this option")[0]  # which absl adds
    body = textwrap.wrap(text + default, _WIDTH - _COLUMN)
    first = f"{name:{_COLUMN}}" if len(name) < _COLUMN else f"{name}\n{'':{_COLUMN}}"
    return first + f"\n{'':{_COLUMN}}".join(body)
