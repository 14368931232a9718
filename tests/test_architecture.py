"""The rooms (folders of `ares_jax`, and its single files) import each other one way only: docs/architecture.md."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [path for top in ("ares_jax", "data_pipeline", "kernels") for path in sorted((ROOT / top).rglob("*.py"))]


def imported(path):
    """Yields the dotted names of what a file imports, modules of packages included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(parts):
    """Returns the room of a file, or of what a dotted name names."""
    return parts[1] if parts[0] == "ares_jax" and len(parts) > 1 else parts[0]


def rooms():
    """Returns each room with those it imports. An entry point of a command belongs to `commands`."""
    found = {}
    for path in FILES:
        names = [name.split(".") for name in imported(path)]
        ours = {room(parts) for parts in names if parts[0] in ("ares_jax", "data_pipeline", "kernels")}
        entry = "commands" in ours and '__name__ == "__main__"' in path.read_text()
        here = "commands" if entry else room(path.relative_to(ROOT).with_suffix("").parts)
        found.setdefault(here, set()).update(ours - {here, "__version__", "show_torch"})
    return found


def test_rooms_have_no_circle():
    graph = rooms()
    assert len(graph) > 20 and "ares_jax" not in graph["kernels"] | graph["data_pipeline"]
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_kernels_and_data_know_nothing_of_ares_jax():
    assert rooms()["kernels"] == rooms()["data_pipeline"] == set()


def test_private_jax_is_imported_in_one_file():
    private = [path for path in FILES if any("jax._src" in name for name in imported(path))]
    assert [str(path.relative_to(ROOT)) for path in private] == ["ares_jax/parallel/private_jax.py"]


def test_flags_belong_to_commands():
    defining = [path for path in FILES if "DEFINE_" in path.read_text()]
    assert {path.parent.name for path in defining} == {"commands"}
