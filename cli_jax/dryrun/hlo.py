"""Reading a compiled program's text: which collectives it runs, how often, on how many bytes.

The text lists computations; a loop's body is listed once, with its trip count at the loop. What
runs in a body counts as often as all the loops around it say.
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
_CALLED = re.compile(r"(?:body|condition|calls|to_apply|branch_computations)=\{?(%?[\w.\-, %]+)\}?")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Instruction(NamedTuple):
    """One line: what it is called, the type it makes, its operation, and the rest of the line."""

    name: str
    type: str
    op: str
    rest: str
    times: int  # how often it runs in one execution of the program


def instructions(text: str) -> Iterator[Instruction]:
    """Every instruction of a compiled program that is reached from its entry."""
    bodies = _computations(text)
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for _, _, op, rest in bodies[name]:
            trips = _TRIPS.search(rest)
            loops = int(trips[1]) if op == "while" and trips else 1
            for called in _CALLED.finditer(rest):
                for callee in called[1].replace("%", "").split(","):
                    if callee.strip() in bodies:
                        visit(callee.strip(), count * loops)

    visit(_entry(text), 1)
    for computation, lines in bodies.items():
        for line in lines:
            if times[computation]:
                yield Instruction(*line, times[computation])


def size(type_: str) -> float:
    """Bytes of an instruction's type, a tuple's parts together; layouts and padding left out."""
    return sum(
        _BYTES.get(kind, 0) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in _ARRAY.findall(type_)
    )


def collective_bytes(text: str) -> dict[str, float]:
    """Bytes that one device's collectives produce in one execution, by kind.

    An asynchronous pair counts once, at its start, with what it makes (not what it reads).
    """
    total: dict[str, float] = dict.fromkeys(COLLECTIVES, 0.0)
    for line in instructions(text):
        op = line.op.removesuffix("-start")
        if op in total:
            arrays = _ARRAY.findall(line.type)
            made = size(line.type)
            if line.op.endswith("-start") and len(arrays) > 1:
                # (operands..., results..., context): the results are the larger or the equal half
                made = max(size(f"{kind}[{dims}]") for kind, dims in arrays)
            total[op] += line.times * made
    return total


def _computations(text: str) -> dict[str, list[tuple[str, str, str, str]]]:
    found: dict[str, list[tuple[str, str, str, str]]] = {}
    lines: list[tuple[str, str, str, str]] = []
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
