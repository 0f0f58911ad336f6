"""Count a compiled program's work from its HLO text: matmul FLOPs, HBM bytes, interconnect bytes.

    work = count_work(compiled.as_text())
    work.ici["all-gather"]           # bytes that one chip receives through all-gathers in one run

XLA's own cost analysis counts a loop body once; here bodies are multiplied by their trip counts. A loop whose
trip count is only known at run time counts `dynamic_trips` times. A grouped matmul (`ragged_dot`) counts as
if a fraction `rows_used` of its rows were used.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

_BITS = {"pred": 8, "bf16": 16, "token": 0}  # other dtype names end in their number of bits
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
# The last operands of a grouped matmul: rows `[rows, in]` and matrices `[groups, in, out]`.
_GROUPED = re.compile(r"\w+\[(\d+),(\d+)\]\{[\d,]*\}, \w+\[\d+,\2,(\d+)\]\{[\d,]*\}\}, frontend.*ragged_dot")
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_NO_TRAFFIC = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
}
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # index of the operand that holds the written data
_PASSED_ON = {"tuple", "get-tuple-element", "custom-call", *_KINDS}  # inside a fused step of a collective


@dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    dims: tuple[int, ...]
    bytes: int
    dtype: str
    in_hbm: bool  # not in on-chip memory, which TPU programs mark as space S(n)


@dataclass(frozen=True)
class Instruction:
    name: str
    op: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str  # everything after the operands, that is, the attributes
    is_root: bool


@dataclass
class Work:
    """What one chip does in one run of the program."""

    flops: float = 0.0  # of matmuls; of custom kernels, only `ragged_dot`'s
    grouped_flops: float = 0.0  # of `ragged_dot` kernels, over all of their rows
    flops8: float = 0.0  # the part of `flops` where both factors are 8-bit integers
    hbm_bytes: float = 0.0
    ici: dict[str, float] = field(default_factory=dict)  # bytes received, by collective
    kernels: dict[str, int] = field(default_factory=dict)  # runs of custom kernels, by name
    dynamic_loops: int = 0  # loops whose trip count is only known at run time
    largest_entry_gather: int = 0  # bytes of the largest all-gather result outside loops

    @property
    def ici_bytes(self) -> float:
        return sum(self.ici.values())


Computation = dict[str, Instruction]


def count_work(text: str, dynamic_trips: int = 1, rows_used: float = 1.0) -> Work:
    """The work of one chip's part of a compiled program, from `compiled.as_text()`."""
    computations, entry = parse(text)
    work = Work()
    _walk(computations, entry, 1.0, dynamic_trips, work, in_entry=True)
    work.flops += rows_used * work.grouped_flops
    return work


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Computations by name, each a dict of instructions, and the name of the entry computation."""
    computations: dict[str, Computation] = {}
    current, entry = "", ""
    for line in text.splitlines():
        if line.endswith("{") and (match := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
            current = match[2]
            computations[current] = {}
            entry = current if match[1] else entry
        elif current and (match := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)):
            instruction = _instruction(match[2], line[match.end() :], bool(match[1]))
            computations[current][instruction.name] = instruction
    return computations, entry


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else re.match(r"\S+", rest).end()  # type: ignore[union-attr]
    result = tuple(_array(*m.groups()) for m in _SHAPE.finditer(rest[:end]))
    open_at = rest.index("(", end)
    op = rest[end:open_at].strip()
    close_at = _closing(rest, open_at)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[open_at:close_at]))
    return Instruction(name, op, result, operands, rest[open_at:], is_root)


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError("unbalanced HLO text")


def _array(dtype: str, dims: str, layout: str | None) -> Array:
    sizes = tuple(int(d) for d in dims.split(",") if d)
    digits = re.search(r"\d+", dtype)
    bits = _BITS.get(dtype, int(digits[0]) if digits else 0)
    return Array(sizes, math.prod(sizes) * bits // 8, dtype, "S(" not in (layout or ""))


def _walk(computations, name: str, times: float, dynamic_trips: int, work: Work, in_entry: bool) -> None:
    computation = computations[name]
    for instruction in computation.values():
        op = instruction.op
        kind = op.removesuffix("-start")
        if op == "while":
            trips = _trip_count(computations, instruction)
            work.dynamic_loops += trips is None
            trips = dynamic_trips if trips is None else trips
            _walk(computations, _called(instruction, "body"), times * trips, dynamic_trips, work, False)
        elif op == "conditional":
            for branch in re.findall(r"%([\w.\-]+)", _attribute(instruction, "branch_computations")):
                _walk(computations, branch, times, dynamic_trips, work, False)
        elif op in ("call", "async-start"):
            called = _called(instruction, "to_apply" if op == "call" else "calls")
            _walk(computations, called, times, dynamic_trips, work, in_entry)
        elif kind in _KINDS:
            _count_collective(computation, instruction, kind, times, work, in_entry)
        elif op in ("dot", "convolution"):
            _count_product(computation, instruction, times, work)
        elif op == "custom-call":
            _count_kernel(instruction, times, work)
        elif op == "fusion":
            _inside_fusion(computations, _called(instruction, "calls"), times, work, in_entry)
        if op not in _NO_TRAFFIC and op != "async-start" and not op.endswith(("-done", "-update")):
            work.hbm_bytes += times * _traffic(computations, computation, instruction)


def _inside_fusion(computations, name: str, times: float, work: Work, in_entry: bool) -> None:
    """Count matmuls and collectives fused with other work.

    A collective that overlaps with matmuls appears in every fused step of its chain; it is counted where it
    starts.
    """
    computation = computations[name]
    starts = any('"AsyncCollectiveStart"' in i.text for i in computation.values())
    root = next(i for i in computation.values() if i.is_root)
    for instruction in computation.values():
        if instruction.op in ("dot", "convolution"):
            _count_product(computation, instruction, times, work)
        elif instruction.op in _KINDS and ("chain_id" not in instruction.text or starts):
            # On TPU, XLA fuses a reduce-scatter as an all-reduce of which each chip keeps a slice.
            scatters = instruction.op == "all-reduce" and root.op == "dynamic-slice"
            kind = "reduce-scatter" if scatters else instruction.op
            _count_collective(computation, instruction, kind, times, work, in_entry)
        elif instruction.op == "custom-call":
            _count_kernel(instruction, times, work)
        elif instruction.op == "fusion":
            _inside_fusion(computations, _called(instruction, "calls"), times, work, in_entry)


def _count_kernel(instruction: Instruction, times: float, work: Work) -> None:
    if '"tpu_custom_call"' in instruction.text:  # a Pallas kernel; XLA's own helpers have other targets
        name = re.sub(r"\.\d+$", "", instruction.name)
        work.kernels[name] = work.kernels.get(name, 0) + int(times)
        if match := _GROUPED.search(instruction.text):
            rows, depth, width = map(int, match.groups())
            work.grouped_flops += times * 2 * rows * depth * width


def _count_collective(computation, instruction, kind: str, times: float, work: Work, in_entry: bool) -> None:
    """Add the bytes that a chip receives with an optimal algorithm, which are the same for ring and tree."""
    sent = sum(a.bytes for name in instruction.operands for a in computation[name].result)
    n = group_size(instruction.text)
    received = {
        "all-gather": sent * (n - 1),
        "all-reduce": 2 * sent * (n - 1) / n,
        "reduce-scatter": sent * (n - 1) / n,
        "all-to-all": sent * (n - 1) / n,
        "collective-permute": sent,
    }[kind]
    if received:
        work.ici[kind] = work.ici.get(kind, 0) + times * received
    if kind == "all-gather" and in_entry:
        work.largest_entry_gather = max(work.largest_entry_gather, sent * n)


def group_size(text: str) -> int:
    """The number of chips in one group of a collective, from its `replica_groups`."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        return math.prod(sizes[name] for name in re.findall(r"'([^']+)'", match[2]))
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(match[1])
    return 2 if "source_target_pairs" in text else 1


def _count_product(computation: Computation, instruction: Instruction, times: float, work: Work) -> None:
    flops = times * _product_flops(computation, instruction)
    work.flops += flops
    if all(computation[name].result[0].dtype in ("s8", "u8") for name in instruction.operands[:2]):
        work.flops8 += flops


def _product_flops(computation: Computation, instruction: Instruction) -> float:
    """2 B M N K for `[B, M, K] x [B, K, N]`. The sizes of the three arrays multiply to B^3 (M N K)^2."""
    left, right = (computation[name].result[0].dims for name in instruction.operands[:2])
    batch = 1
    if match := re.search(r"lhs_batch_dims=\{([\d,]+)\}", instruction.text):
        batch = math.prod(left[int(i)] for i in match[1].split(","))
    return 2 * math.sqrt(math.prod((*left, *right, *instruction.result[0].dims)) / batch)


def _traffic(computations, computation: Computation, instruction: Instruction) -> float:
    """Bytes that an instruction reads from and writes to HBM."""
    if instruction.op == "dynamic-slice":
        return 2 * sum(a.bytes for a in instruction.result if a.in_hbm)
    if instruction.op in _IN_PLACE:
        update = computation[instruction.operands[_IN_PLACE[instruction.op]]].result
        return 2 * sum(a.bytes for a in update if a.in_hbm)
    if instruction.op != "fusion":
        reads = [a for name in instruction.operands for a in computation[name].result]
        writes = instruction.result
        if instruction.op.endswith("-start"):  # its result repeats the operand
            writes = writes[1:2]
        return sum(a.bytes for a in (*reads, *writes) if a.in_hbm)
    fused = computations[_called(instruction, "calls")]
    inner = [i for i in fused.values() if i.op == "parameter"]
    total = 0.0
    for parameter in inner:
        number = int(re.match(r"\((\d+)\)", parameter.text)[1])  # type: ignore[index]
        outer = computation[instruction.operands[number]].result
        if all(a.in_hbm for a in outer):
            total += _bytes_used(computations, fused, parameter)
    root = next(i for i in fused.values() if i.is_root)
    written = [fused[name] for name in root.operands] if root.op == "tuple" else [root]
    for value, array in zip(written, instruction.result, strict=False):
        if array.in_hbm and value.op not in _PASSED_ON and value.op != "parameter":
            update = fused[value.operands[_IN_PLACE[value.op]]].result if value.op in _IN_PLACE else (array,)
            total += sum(a.bytes for a in update)
    return total


def _bytes_used(computations, fused: Computation, parameter: Instruction) -> float:
    """Bytes that a fused computation reads of a parameter: only the slice, if it only slices."""
    whole = sum(a.bytes for a in parameter.result)
    used = 0.0
    for user in fused.values():
        if parameter.name not in user.operands or user.op in _PASSED_ON:
            continue
        if user.op == "dynamic-slice" and user.operands[0] == parameter.name:
            used = max(used, sum(a.bytes for a in user.result))
        elif user.op in _IN_PLACE and user.operands[0] == parameter.name:
            continue
        elif user.op == "gather" and user.operands[0] == parameter.name:
            used = max(used, sum(a.bytes for a in user.result))
        elif _is_view(user):
            used = max(used, _bytes_used(computations, fused, user))
        elif user.op == "fusion":
            inner = computations[_called(user, "calls")]
            for number, name in enumerate(user.operands):
                if name == parameter.name:
                    matches = (
                        i for i in inner.values() if i.op == "parameter" and i.text.startswith(f"({number})")
                    )
                    within = next(matches)
                    used = max(used, _bytes_used(computations, inner, within))
                    if _passes_on(inner, within):
                        used = max(used, _bytes_used(computations, fused, user))
        else:
            return whole
    return min(used, whole)


def _is_view(instruction: Instruction) -> bool:
    """Whether the result is the operand in another shape or order, in the same memory."""
    aliased = "output_to_operand_aliasing={{}: (0, {})}" in instruction.text
    return instruction.op == "bitcast" or (instruction.op == "fusion" and aliased)


def _passes_on(fused: Computation, value: Instruction) -> bool:
    """Whether a fused computation returns this very value, possibly through views."""
    if value.is_root:
        return True
    views = (i for i in fused.values() if value.name in i.operands and _is_view(i))
    return any(_passes_on(fused, view) for view in views)


def _trip_count(computations, loop: Instruction) -> int | None:
    """Trips of `while (i < n)` counted from zero with constant n; None: only known at run time."""
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text):
        return int(match[1])
    condition = computations[_called(loop, "condition")]
    root = next(i for i in condition.values() if i.is_root)
    if root.op == "fusion":
        return None
    bounds = [condition[name] for name in root.operands if condition[name].op == "constant"]
    if root.op == "compare" and "direction=LT" in root.text and bounds:
        return int(re.match(r"\((-?\d+)\)", bounds[0].text)[1])  # type: ignore[index]
    return None


def _called(instruction: Instruction, attribute: str) -> str:
    return _attribute(instruction, attribute).lstrip("%")


def _attribute(instruction: Instruction, name: str) -> str:
    match = re.search(rf"\b{name}=(\{{[^}}]*\}}|%?[\w.\-]+)", instruction.text)
    if match is None:
        raise ValueError(f"HLO instruction {instruction.name} has no {name}")
    return match[1]
