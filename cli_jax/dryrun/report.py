"""What a dry run tells: numbers for programs (`Report.to_json`), sentences for people (`text`)."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from cli_jax.dryrun import flops, hlo
from cli_jax.dryrun.bounds import Bounds, bounds
from cli_jax.dryrun.chips import Topology
from cli_jax.dryrun.compile import Compiled, Memory
from cli_jax.experiment import Experiment
from cli_jax.fusion import registry

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Report:
    """One compiled step on one topology. FLOPs are an update's over all devices, the memory and
    the bytes of one device, the bounds in seconds."""

    config: str
    topology: str
    chip: str
    chips: int
    devices: int
    mesh: dict[str, int]
    notes: tuple[str, ...]
    rows: int  # per update; a packed row holds one sample or more
    tokens: int  # per update, full rows
    row: flops.Row
    accumulate: int
    remat: str
    memory: Memory
    flops: flops.Flops
    baseline_flops: float  # the same without the fusion strategy
    collectives: dict[str, float]
    bounds: Bounds
    compile_seconds: float

    @property
    def fits(self) -> bool:
        return self.memory.fits

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())

    @property
    def fusion_share(self) -> float:
        """FLOPs that the fusion strategy adds, as a share of the baseline's."""
        return self.total_flops / self.baseline_flops - 1

    @property
    def mfu_ceiling(self) -> float:
        """The largest model FLOP utilization that the bounds allow."""
        compute = self.bounds.compute * self.total_flops
        return compute / (self.total_flops + self.bounds.recomputed) / self.bounds.step

    def to_json(self) -> str:
        """Everything, derived numbers included, as one JSON object."""
        derived = ("fits", "total_flops", "fusion_share", "mfu_ceiling")
        plain: dict[str, Any] = dataclasses.asdict(self) | {k: getattr(self, k) for k in derived}
        plain["row"] = self.row._asdict()
        plain["bounds"]["step"] = self.bounds.step
        return json.dumps(plain, indent=2)

    def text(self) -> str:
        """A page for people."""
        m, b = self.memory, self.bounds
        verdict = "FITS" if self.fits else "DOES NOT FIT"
        mesh = " x ".join(f"{axis}={size}" for axis, size in self.mesh.items())
        lines = [
            f"{self.config} on {self.topology}: {self.chips} {self.chip} chips, "
            f"{self.devices} devices, mesh {mesh}",
            *(f"note: {note}" for note in self.notes),
            f"update: {self.rows} rows of {self.row.length:,} tokens ({self.row.visual:,} visual, "
            f"{self.row.tiles} tiles), one sample or more each; {self.tokens:,} tokens; "
            f"{self.accumulate} microbatch{'es' * (self.accumulate > 1)}, remat {self.remat}",
            f"memory per device: {m.total / GIB:.2f} of {m.limit / GIB:.2f} GiB: {verdict}",
            f"  parameters {m.parameters / GIB:.2f}, optimizer {m.optimizer / GIB:.2f}, "
            f"batch {m.batch / GIB:.2f}, activations and temporaries {m.temporaries / GIB:.2f}; "
            f"{m.output / GIB:.2f} of output share the state's place",
            f"model FLOPs per update: {self.total_flops:.3e}",
            *(f"  {part:<10}{n:.3e}  {n / self.total_flops:6.2%}" for part, n in self._parts()),
            f"  the fusion strategy adds {self.fusion_share:.2%} to the baseline's "
            f"{self.baseline_flops:.3e}; rematerialization repeats {b.recomputed:.3e}",
        ]
        if self.fits:
            moved = ", ".join(f"{k} {v / GIB:.2f}" for k, v in self.collectives.items() if v)
            lines += [
                f"collectives per device and step, GiB: {moved or 'none'}",
                f"bank read per device and step: {b.bank / GIB:.2f} GiB",
                f"no step is faster than: compute {b.compute:.3f} s, memory {b.memory:.3f} s, "
                f"network {b.network:.3f} s; so MFU is at most {self.mfu_ceiling:.1%}",
            ]
        lines.append(f"compiled in {self.compile_seconds:.0f} s")
        return "\n".join(lines)

    def _parts(self) -> list[tuple[str, float]]:
        return [(part, n) for part, n in self.flops.items() if n]


def make_report(experiment: Experiment, topology: Topology, compiled: Compiled) -> Report:
    """The report of a step that `compile_for` compiled."""
    row = flops.row_of(experiment)
    data, rates = experiment.data, compiled.setup.rates
    model_flops = flops.step(experiment.model, row, data.batch_size, rates)
    none = registry.get("none")
    baseline = dataclasses.replace(experiment.model, fusion_name="none", fusion=none.Config())
    return Report(
        config=experiment.name,
        topology=topology.name,
        chip=topology.chip.name,
        chips=topology.chips,
        devices=len(topology.devices),
        mesh=dict(compiled.setup.mesh.shape),
        notes=compiled.setup.notes,
        rows=data.batch_size,
        tokens=data.batch_size * data.row_length,
        row=row,
        accumulate=experiment.optimizer.accumulate,
        remat=experiment.compute.remat,
        memory=compiled.memory,
        flops=model_flops,
        baseline_flops=sum(flops.step(baseline, row, data.batch_size, rates).values()),
        collectives=hlo.collective_bytes(compiled.text) if compiled.text else {},
        bounds=bounds(experiment, topology, compiled, model_flops),
        compile_seconds=compiled.seconds,
    )
