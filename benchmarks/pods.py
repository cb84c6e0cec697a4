"""The table of docs/pods.md: which config fits on which TPUs, and what bounds its step.

    python -m benchmarks.pods                        # all rows, some 4 minutes each
    python -m benchmarks.pods --only ov7b_cli --out runs/pods

Every row is a dry run (`train.py --dry_run`) in a process of its own: the training step compiled by
the TPU compiler (the `tpu` extra) for described chips. Writes OUT/<row>.json and OUT/table.md, and
takes over rows whose JSON is there already.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LONG = ("data.row_length=32768", "data.visual_per_row=31360", "data.tiles_per_row=74")
TIGHT = ("mesh.tensor=2", "optimizer.accumulate=2", "compute.remat=offload")


class Row(NamedTuple):
    """A config on a topology, with settings after `--config.`."""

    config: str
    topology: str
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        words = (self.config, self.topology.replace(":", "_").replace("*", "_"), *self.settings)
        return "-".join(words).replace("=", "_")


ROWS = (
    Row("ov7b_cli", "v5e:16x16"),
    Row("ov7b_baseline", "v5e:16x16"),
    Row("ov7b_cli", "v5p:4x4x4", ("optimizer.accumulate=4",)),
    Row("ov7b_cli", "v6e:16x16"),
    Row("ov0p5b_cli", "v5e:2x4"),
    Row("llava15_7b_cli", "v5p:2x2x2"),
    Row("ov7b_cli", "v6e:16x16", LONG),
    Row("ov7b_cli", "v5p:4x4x4", (*LONG, "optimizer.accumulate=4")),
    Row("ov7b_cli", "v5e:16x16", (*LONG, *TIGHT)),
    Row("ov7b_cli", "2*v5e:16x16", ("data.batch_size=512",)),
)
HEAD = (
    "| config | TPUs | mesh (data x fsdp x tensor) | rows x tokens | memory, GiB of | fits "
    "| TFLOP per update | CLI adds | bound, s (compute / memory / network) | MFU at most "
    "| compile, s / GB |\n" + "|---" * 11 + "|"
)


def run(row: Row, folder: Path) -> dict[str, float]:
    """The row's numbers, compiled unless they are there."""
    path, log = folder / f"{row.name}.json", folder / f"{row.name}.log"
    if not path.exists():
        command = [
            sys.executable,
            "train.py",
            "--config",
            f"configs/{row.config}.py",
            "--dry_run",
            "--nodry_run_propose",
        ]
        command += ["--topology", row.topology, "--dry_run_json", str(path)]
        command += [f"--config.{setting}" for setting in row.settings]
        before = time.perf_counter()
        with log.open("w") as out:
            child = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
            _, _, usage = os.wait4(child.pid, 0)
        if not path.exists():
            raise SystemExit(f"{row.name}: no result, see {log}")
        found = json.loads(path.read_text())
        found |= {"wall_seconds": time.perf_counter() - before, "peak_gb": usage.ru_maxrss / 1e6}
        path.write_text(json.dumps(found, indent=2))
    return json.loads(path.read_text())


def line(row: Row, r: dict) -> str:
    memory, bounds = r["memory"], r["bounds"]
    gib = 2**30
    cells = [
        row.config if r["remat"] == "full" else f"{row.config}, remat {r['remat']}",
        row.topology,
        " x ".join(str(n) for n in r["mesh"].values()),
        f"{r['rows']} x {r['row']['length']:,}"
        + (f", {r['accumulate']} microbatches" if r["accumulate"] > 1 else ""),
        f"{memory['total'] / gib:.1f} of {memory['limit'] / gib:.1f}",
        "yes" if r["fits"] else "**no**",
        f"{r['total_flops'] / 1e12:,.0f}",
        f"{r['fusion_share']:.2%}",
        f"{bounds['compute']:.2f} / {bounds['memory']:.2f} / {bounds['network']:.2f}"
        if r["fits"]
        else "-",
        f"{r['mfu_ceiling']:.0%}" if r["fits"] else "-",
        f"{r['compile_seconds']:.0f} / {r['peak_gb']:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows whose config has this in its name")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "pods")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lines = [HEAD]
    for row in ROWS:
        if args.only in row.config:
            lines.append(line(row, run(row, args.out)))
            print(lines[-1], flush=True)
    (args.out / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
