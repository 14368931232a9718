"""The original harness's command line as absl reads it: dashes or underscores, and `--compare A B`."""

from collections.abc import Sequence


def plain_arguments(argv: Sequence[str]) -> list[str]:
    """Returns the arguments with underscores in the names of flags, and the two runs of `--compare` joined by a comma."""
    result: list[str] = []
    arguments = list(argv)
    while arguments:
        argument = arguments.pop(0)
        if not argument.startswith("--") or argument == "--":
            result.append(argument)
            continue
        name, equals, value = argument.partition("=")
        name = "--" + name[2:].replace("-", "_")
        if name == "--compare":
            runs = value.split(",") if equals else []
            while len(runs) < 2 and arguments and not arguments[0].startswith("--"):
                runs.append(arguments.pop(0))
            result.append(f"--compare={','.join(runs)}")
        else:
            result.append(name + equals + value)
    return result
