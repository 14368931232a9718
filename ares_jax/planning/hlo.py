"""What a compiled program does, counted from the compiler's own text: operations, bytes and collective bytes of one chip.

XLA's summary (`cost_analysis`) counts the body of a loop once; here it counts as often as it runs, which the loop's
condition says.
"""

import math
import re
from dataclasses import dataclass, field

import numpy as np

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4,
          "u32": 4, "f64": 8, "s64": 8, "u64": 8, "c64": 8, "f8e4m3fn": 1, "f8e5m2": 1}  # fmt: skip
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_PICK = ("dynamic-slice", "slice", "gather")  # read as much as they give
_UPDATE = {"dynamic-update-slice": 1, "scatter": 2}  # write as much as this operand, in place
# Neither reads nor writes memory by itself.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
         "partition-id", "replica-id", "iota", "optimization-barrier", "copy-done", "async-start", "async-done",
         "async-update", "custom-call-done", "opt-barrier"}  # fmt: skip


# A kernel that is handed the whole cache and reads some of its pages: how much only the caller can know.
_READS_PAGES = "ragged_paged_attention"


@dataclass
class Work:
    """Of one chip. Bytes of memory are those of HBM: what stays in the chip's own memory is free."""

    flops: float = 0.0  # of matrix products; kernels (custom calls) are not looked into
    bytes: float = 0.0  # read and written
    collective: dict[str, float] = field(default_factory=dict)  # bytes that a chip sends, by kind
    largest: float = 0.0  # bytes that one run of one collective sends
    unknown_loops: int = 0  # whose trip count the text does not say: left out
    page_kernels: int = 0  # calls of paged attention's kernel, whose bytes are not among those above

    def add(self, other: "Work", times: float) -> None:
        self.flops += other.flops * times
        self.bytes += other.bytes * times
        for kind, count in other.collective.items():
            self.collective[kind] = self.collective.get(kind, 0.0) + count * times
        self.largest = max(self.largest, other.largest)
        self.unknown_loops += other.unknown_loops
        self.page_kernels += int(other.page_kernels * times)


@dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    shape: str
    operands: list[str]
    rest: str
    root: bool


def work(text: str) -> Work:
    """Returns what the program with this optimized HLO text does."""
    computations, entry = _parse(text)
    head = text[: text.find("\n")]
    counts = (re.search(rf"\b{name}=(\d+)", head) for name in ("replica_count", "num_partitions"))
    return _Walk(computations, math.prod(int(count.group(1)) for count in counts if count)).computation(entry)


class _Walk:
    def __init__(self, computations: dict[str, dict[str, _Instruction]], devices: int):
        self.computations, self.devices = computations, devices
        self.known: dict[str, Work] = {}

    def computation(self, name: str) -> Work:
        if name not in self.known:
            total = Work()
            for instruction in self.computations[name].values():
                total.add(self.instruction(instruction, self.computations[name]), 1)
            self.known[name] = total
        return self.known[name]

    def trips(self, loop: _Instruction) -> int | None:
        """Returns how often a loop runs that counts upwards from zero: at most, if it may end sooner."""
        if noted := re.search(r'known_trip_count[^}]*?"?n"?:\s*"?(\d+)', loop.rest):
            return int(noted.group(1))
        limit = min(self._limits(_called(loop, "condition")[0], []), default=None)
        return None if limit is None else -(-limit // self._step(loop))

    def _step(self, loop: _Instruction) -> int:
        """Returns by how much a loop counts: JAX's by one, the compiler's own, of products cut into windows, also by two."""
        asked, body = (self.computations[_called(loop, name)[0]] for name in ("condition", "body"))
        compared = [asked.get(x.operands[0]) for x in asked.values() if x.opcode == "compare" and "direction=LT" in x.rest]
        place = [re.search(r"index=(\d+)", x.rest) for x in compared if x and x.opcode == "get-tuple-element"]
        (root,) = (x for x in body.values() if x.root)
        if len(place) != 1 or place[0] is None or root.opcode != "tuple":
            return 1
        counted = body.get(root.operands[int(place[0].group(1))])
        if counted is None or counted.opcode != "add":
            return 1
        steps = [body[name] for name in counted.operands if name in body and body[name].opcode == "constant"]
        return int(steps[0].rest) if len(steps) == 1 and steps[0].rest.isdigit() else 1

    def _limits(self, name: str, given: list[_Instruction]) -> list[int]:
        """Returns the constants that a computation asks integers to be less than."""
        inner, limits = self.computations[name], []

        def source(x: _Instruction) -> _Instruction:
            place = int(x.rest) if x.opcode == "parameter" else len(given)
            return given[place] if place < len(given) else x

        for x in inner.values():
            if x.opcode == "fusion":
                limits += self._limits(_called(x, "calls")[0], [source(inner[operand]) for operand in x.operands])
            elif x.opcode == "compare" and "direction=LT" in x.rest:
                limit = source(inner[x.operands[1]])
                if limit.opcode == "constant" and limit.shape.startswith(("s32[]", "u32[]")):
                    limits.append(int(limit.rest))
        return limits

    def instruction(self, i: _Instruction, scope: dict[str, _Instruction]) -> Work:
        total = Work()
        if i.opcode == "while":
            trips = self.trips(i)
            if trips is None:
                total.unknown_loops += 1
            else:
                total.add(self.computation(_called(i, "body")[0]), trips)
        elif i.opcode == "conditional":
            branches = [self.computation(name) for name in _called(i, "branch_computations", "true_computation",
                                                                          "false_computation")]  # fmt: skip
            if branches:
                total.add(max(branches, key=lambda w: (w.flops, w.bytes)), 1)
        elif i.opcode in ("call", "async-start") or "called_computations=" in i.rest:
            for name in _called(i, "to_apply", "calls", "called_computations"):
                total.add(self.computation(name), 1)
        elif i.opcode == "fusion":
            for name in _called(i, "calls"):
                total.flops += self._products(name)
                total.bytes += self._fusion_bytes(i, scope, self.computations[name])
                inner = self.computations[name]
                for x in inner.values():
                    _collective(x, inner, total, self.devices, scattered="reduce-scatter" in name)
        else:
            if i.opcode in ("dot", "convolution"):
                total.flops += _product(i, scope)
            _collective(i, scope, total, self.devices)
            pages = i.opcode == "custom-call" and _READS_PAGES in i.rest
            total.page_kernels += pages
            if not pages and i.opcode not in _FREE and not i.opcode.endswith("-done"):
                total.bytes += _moved(i, scope)
        return total

    def _products(self, name: str) -> float:
        inner = self.computations[name]
        flops = sum(_product(i, inner) for i in inner.values() if i.opcode in ("dot", "convolution"))
        return flops + sum(self._products(c) for i in inner.values() if i.opcode == "fusion" for c in _called(i, "calls"))

    def _fusion_bytes(self, i: _Instruction, scope, inner: dict[str, _Instruction]) -> float:
        """An operand of which only slices are read counts as these, a result updated in place as the update."""
        total, updated = 0.0, False
        for x in inner.values():
            if x.opcode != "parameter":
                continue
            position = int(re.match(r"\s*(\d+)", x.rest).group(1))  # type: ignore[union-attr]
            operand = scope[i.operands[position]].shape if position < len(i.operands) else x.shape
            touched, written = self._touched(x, inner)
            updated |= written
            total += _hbm(operand, min(touched, _size(operand)))
        return total if updated else total + _hbm(i.shape)

    def _touched(self, x: _Instruction, inner: dict[str, _Instruction]) -> tuple[float, bool]:
        """Returns the bytes of an operand that a fusion reads or writes, and whether it writes, however deep inside."""
        total, written = 0.0, False
        for reader in [y for y in inner.values() if x.name in y.operands]:
            if reader.opcode == "bitcast":
                size, wrote = self._touched(reader, inner)
            elif reader.opcode == "fusion":
                called = self.computations[_called(reader, "calls")[0]]
                parameters = [y for y in called.values() if y.opcode == "parameter"]
                place = reader.operands.index(x.name)
                size, wrote = self._touched(
                    next(y for y in parameters if y.rest.strip().split(")")[0] == str(place)), called
                )
            elif reader.opcode in _PICK and reader.operands[0] == x.name:
                size, wrote = _size(reader.shape), False
            elif reader.opcode in _UPDATE and reader.operands[0] == x.name:
                size, wrote = _size(inner[reader.operands[_UPDATE[reader.opcode]]].shape), True
            else:
                size, wrote = _size(x.shape), False
            total, written = total + size, written or wrote
        return total, written


def _parse(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) (?:\([^=]*)?.*\{\s*$", line) if not line.startswith((" ", "}")) else None
        if head and "->" in line:
            current = computations.setdefault(head.group(2), {})
            entry = head.group(2) if head.group(1) else entry
        elif current is not None and (match := _LINE.match(line)):
            instruction = _instruction(*match.groups())
            if instruction:
                current[instruction.name] = instruction
    return computations, entry


def _instruction(root: str | None, name: str, right: str) -> _Instruction | None:
    end = _balanced(right, 0) if right.startswith("(") else right.find(" ")
    shape, right = right[:end], right[end:].lstrip()
    match = re.match(r"([\w\-]+)\(", right)
    if not match:
        return None
    close = _balanced(right, match.end() - 1)
    inside = right[match.end() : close - 1]
    operands = re.findall(r"%([\w.\-]+)", re.sub(r"/\*.*?\*/", "", inside))
    rest = inside if match.group(1) in ("parameter", "constant") else right[close:]
    return _Instruction(name, match.group(1), shape, operands, rest, bool(root))


def _balanced(text: str, start: int) -> int:
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index + 1
    return len(text)


def _called(i: _Instruction, *names: str) -> list[str]:
    found = []
    for name in names:
        if match := re.search(rf"\b{name}=(\{{[^}}]*\}}|%?[\w.\-]+)", i.rest):
            found += re.findall(r"[\w.\-]+", match.group(1))
    return found


def _dims(shape: str) -> list[int]:
    match = _SHAPE.search(shape)
    return [int(d) for d in match.group(2).split(",") if d] if match else []


def _size(shape: str) -> float:
    """Returns the bytes of a shape, those of all parts of a tuple."""
    return sum(
        _BYTES.get(kind, 0) * math.prod(int(d) for d in dims.split(",") if d) for kind, dims, _ in _SHAPE.findall(shape)
    )


def _hbm(shape: str, size: float | None = None) -> float:
    """Returns the bytes of a shape's parts that lie in HBM, or `size` if the (first) part does."""
    parts = [(kind, dims) for kind, dims, layout in _SHAPE.findall(shape) if "S(" not in layout]
    if size is not None:
        return size if parts else 0.0
    return sum(_BYTES.get(kind, 0) * math.prod(int(d) for d in dims.split(",") if d) for kind, dims in parts)


def _moved(i: _Instruction, scope: dict[str, _Instruction]) -> float:
    if i.opcode in _PICK:
        return 2 * _size(i.shape) if _hbm(i.shape) else _size(i.shape)
    if i.opcode in _UPDATE:
        return 2 * _size(scope[i.operands[_UPDATE[i.opcode]]].shape)
    if i.opcode == "copy-start":  # (target, source, context)
        return _hbm(scope[i.operands[0]].shape) + _hbm(i.shape.split("}")[0] + "}")
    return _hbm(i.shape) + sum(_hbm(scope[name].shape) for name in i.operands if name in scope)


def _collective(i: _Instruction, scope: dict[str, _Instruction], total: Work, devices: int, scattered: bool = False) -> None:
    kind = i.opcode.removesuffix("-start")
    if kind not in _COLLECTIVES:
        return
    given = sum(_size(scope[name].shape) for name in i.operands if name in scope)
    group = _group_size(i.rest, devices)
    others = (group - 1) / group
    if kind == "collective-permute":
        others = 1.0
    if kind == "all-gather":
        sent = given * (group - 1)
    elif kind == "all-reduce" and not scattered:
        sent = 2 * given * others
    else:
        sent = given * others
    name = "reduce-scatter" if scattered else kind
    total.collective[name] = total.collective.get(name, 0.0) + sent
    total.largest = max(total.largest, sent)


def _group_size(rest: str, all_devices: int) -> int:
    """Returns how many devices a collective is among; all where it names none. Raises `ValueError` if that is unreadable."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(.*?\))? \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match.group(1)))
        split = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match.group(2))
        return math.prod(int(part or sizes[axis]) for axis, part in split)
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(match.group(2))
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return match.group(1).count(",") + 1
    if "replica_groups={}" in rest or "replica_groups=" not in rest:
        return all_devices
    raise ValueError(f"replica_groups cannot be read in: {rest[:200]}")


def _product(i: _Instruction, scope: dict[str, _Instruction]) -> float:
    """Returns twice the multiplications of a dot, or of a convolution, which is what a TPU makes of a dot."""
    left, right = (_dims(scope[name].shape) for name in i.operands[:2])
    out = math.prod(_dims(i.shape))
    if i.opcode == "dot":
        match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
        return 2.0 * out * math.prod(left[int(d)] for d in match.group(1).split(",") if d) if match else 0.0
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    assert labels, i.rest
    result = _dims(i.shape)
    channels = right[labels.group(2).index("i")]
    total = 2.0 * channels * result[labels.group(3).index("b")] * result[labels.group(3).index("f")]
    described = re.search(r"window=\{([^}]*)\}", i.rest)
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", described.group(1) if described else ""))
    for axis in range(len(labels.group(1)) - 2):
        digit = str(axis)

        def given(name: str, default: str, axis=axis) -> str:
            return window[name].split("x")[axis] if name in window else default

        low = int(given("pad", "0_0").split("_")[0])
        stride, in_step, kernel_step = (int(given(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        kernel = np.arange(right[labels.group(2).index(digit)])
        place = np.arange(result[labels.group(3).index(digit)])[:, None] * stride - low + kernel * kernel_step
        limit = (left[labels.group(1).index(digit)] - 1) * in_step
        total *= int(np.sum((place >= 0) & (place <= limit) & (place % in_step == 0)))
    return total
