"""Completion in bash: `eval "$(ares-jax --completion)"` makes Tab complete commands, flags and fields of the config."""

import ast
import re
from collections.abc import Sequence
from pathlib import Path

# Bash cuts words at `=`; what stands behind it, and what has no candidate, is completed as the name of a file.
SCRIPT = """_ares_jax() {
  local IFS=$'\\n'
  [[ ${COMP_WORDS[COMP_CWORD]} == = || ${COMP_WORDS[COMP_CWORD-1]} == = ]] ||
    COMPREPLY=($("$1" --complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -o nospace -F _ares_jax ares-jax"""


def candidates(words: Sequence[str], commands: Sequence[str]) -> list[str]:
    """Returns what the last of the words behind `ares-jax` may become; a space ends what is complete."""
    *before, last = words or [""]
    if not before:
        found = [f"{name} " for name in (*commands, "--help", "--version")]
    elif before[0] not in commands:
        return []
    elif last.startswith("--config.") and "config" in flags_of(before[0]):
        found = _fields(last)
    else:
        switches = re.findall(r'DEFINE_bool\(\s*"(\w+)"', _source(before[0]))
        found = ["--help ", *(f"--{name}{' ' if name in switches else '='}" for name in flags_of(before[0]))]
        found += ["--config."] if "--config=" in found else []
    return [text for text in found if text.startswith(last)]


def flags_of(command: str) -> list[str]:
    """Returns the names of a command's flags, read in its source: to import it takes seconds."""
    (topics,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(_source(command)).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TOPICS"
    )
    return [name for names in topics.values() for name in names]


def _source(command: str) -> str:
    return (Path(__file__).parent / f"{command.rpartition('.')[2]}.py").read_text()


def _fields(beginning: str) -> list[str]:
    """Returns the sections (ending with a dot) and fields (with `=`) one level below the last dot."""
    from ares_jax.config import default_config  # a second; only here

    prefix = beginning.rpartition(".")[0]
    section = default_config().to_dict()
    for name in prefix.split(".")[1:]:
        section = section.get(name, {}) if isinstance(section, dict) else {}
    items = section.items() if isinstance(section, dict) else ()
    return [f"{prefix}.{name}{'.' if isinstance(value, dict) else '='}" for name, value in items]
