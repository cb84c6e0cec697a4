"""Reading a compiled program's text: which collectives it runs, how often, on how many bytes.

The text lists computations, and a loop's body once: what runs in it counts as often as all the
loops around it say. A loop's count is a note beside it, or else the constant that its condition
compares its counter with (the loops of JAX's scans and of XLA's own start at 0 and step by 1).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
)
_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1,
    "s16": 2, "u16": 2, "f16": 2, "bf16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8,
}  # fmt: skip
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+[0-9a-z]*)\[([0-9,]*)\]")
_CALLED = re.compile(
    r"\b(?:body|calls|to_apply|branch_computations|called_computations)="
    r"\{?(%?[\w.\-]+(?:, %[\w.\-]+)*)"
)
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
Line = tuple[str, str, str, str]  # name, type, operation, rest


class Instruction(NamedTuple):
    """One line: what it is called, the type it makes, its operation, and the rest of the line."""

    name: str
    type: str
    op: str
    rest: str
    times: int  # how often it runs in one execution of the program
    fused: bool  # inside a fusion: what it makes is no array in memory


def instructions(text: str) -> Iterator[Instruction]:
    """Every instruction of a compiled program that is reached from its entry."""
    bodies = _computations(text)
    times: dict[str, int] = defaultdict(int)
    fused: set[str] = set()

    def visit(name: str, count: int, inside: bool) -> None:
        times[name] += count
        if inside:
            fused.add(name)
        for _, _, op, rest in bodies[name]:
            loops = _trip_count(rest, bodies) if op == "while" else 1
            for called in _CALLED.finditer(rest):
                for callee in called[1].replace("%", "").split(","):
                    if callee.strip() in bodies:
                        visit(callee.strip(), count * loops, inside or op == "fusion")

    visit(_entry(text), 1, False)
    for computation, lines in bodies.items():
        for line in lines:
            if times[computation]:
                yield Instruction(*line, times[computation], computation in fused)


def size(type_: str) -> float:
    """Bytes of an instruction's type, a tuple's parts together; layouts and padding left out."""
    return sum(
        _BYTES.get(kind, 0) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in _ARRAY.findall(type_)
    )


def collective_bytes(text: str) -> dict[str, float]:
    """Bytes that one device's collectives produce in one execution, by kind.

    The TPU compiler writes one collective several times: where it starts, in the loops it is spread
    over, where it ends. They share a channel, which counts once, as often as its rarest mention
    runs.
    """
    channels: dict[str, tuple[str, float]] = {}
    for line in instructions(text):
        op, channel = line.op.removesuffix("-start"), _CHANNEL.search(line.rest)
        if op not in COLLECTIVES or channel is None:
            continue
        made = size(line.type)
        if line.op.endswith("-start"):
            # (operands..., results..., context): one array is the largest of either
            made = max(size(f"{kind}[{dims}]") for kind, dims in _ARRAY.findall(line.type))
        found = op, line.times * made
        channels[channel[1]] = min(found, channels.get(channel[1], found), key=lambda x: x[1])
    total: dict[str, float] = dict.fromkeys(COLLECTIVES, 0.0)
    for op, made in channels.values():
        total[op] += made
    return total


def _trip_count(rest: str, bodies: dict[str, list[Line]]) -> int:
    if noted := _TRIPS.search(rest):
        return int(noted[1])
    condition = _CONDITION.search(rest)
    lines = bodies[condition[1]] if condition else []
    constants = {name: rest for name, _, op, rest in lines if op == "constant"}
    compared = [r for _, _, op, r in lines if op == "compare" and "direction=LT" in r]
    limits = [n for name, n in constants.items() if any(f"%{name})" in r for r in compared)]
    if len(limits) != 1:
        raise ValueError(f"a loop's count cannot be read from its condition: {lines}")
    return int(limits[0].split(")")[0])


def _computations(text: str) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    lines: list[Line] = []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            lines = found.setdefault(header[1], [])
        elif match := _INSTRUCTION.match(line):
            lines.append((match[1], match[2], match[3], match[4]))
    return found


def _entry(text: str) -> str:
    match = re.search(r"^ENTRY %?([\w.\-]+) \(", text, re.MULTILINE)
    if match is None:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY")
    return match[1]
