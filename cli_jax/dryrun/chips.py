"""TPU chips and topologies: what one device has, and how to describe many of them to the compiler.

Numbers per chip are Google Cloud's published ones (cloud.google.com/tpu/docs/system-architecture),
bfloat16. A device of JAX is a chip, but for v4 and TPU7x, whose two cores are two devices to the
compiler: they are counted as half a chip each.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence

import jax

from cli_jax.experiment import ConfigError


@dataclasses.dataclass(frozen=True)
class Chip:
    """Per device: peak FLOP/s, HBM bytes and bytes/s, inter-chip bytes/s over all links one way."""

    name: str
    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    per_chip: int = 1  # devices of JAX on one chip


_GIB = 2.0**30
_CHIPS = {
    "v4": Chip("TPU v4", 275e12, 32 * _GIB, 1228e9, 300e9),
    "v5e": Chip("TPU v5e", 197e12, 16 * _GIB, 819e9, 200e9),
    "v5p": Chip("TPU v5p", 459e12, 95 * _GIB, 2765e9, 600e9),
    "v6e": Chip("TPU v6e", 918e12, 32 * _GIB, 1640e9, 448e9),
    "tpu7x": Chip("TPU7x", 2307e12, 192 * _GIB, 7380e9, 1200e9),
}
DCN_BANDWIDTH = 25e9  # bytes/s between slices, per host of 4 to 8 chips: 200 Gbit/s
_FORM = re.compile(r"(?:(?P<slices>\d+)\*)?(?P<chip>\w+):(?P<shape>\d+(?:x\d+)+)")


@dataclasses.dataclass(frozen=True)
class Topology:
    """Described devices of one kind, in one slice or several."""

    name: str
    chip: Chip  # the numbers of one device
    devices: Sequence[jax.Device]
    slices: int

    @property
    def chips(self) -> int:
        return len(self.devices) // self.chip.per_chip


def describe(name: str) -> Topology:
    """The topology of a name such as `v5e:16x16`, or `2*v5p:4x4x4` for two slices.

    Needs libtpu (the `tpu` extra), no TPU. ConfigError if the name or libtpu is unknown.
    """
    match = _FORM.fullmatch(name)
    if not match or match["chip"] not in _CHIPS:
        raise ConfigError(
            f"--topology={name}: not CHIP:SHAPE, e.g. v5e:16x16, or 2*v5e:16x16 for two slices; "
            f"chips: {', '.join(_CHIPS)}"
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU to lock
    from jax.experimental import topologies

    slices = int(match["slices"] or 1)
    several = {"num_slices": slices} if slices > 1 else {}
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{match['chip']}:{match['shape']}", **several
        )
    except Exception as error:  # jaxlib raises several kinds, all about the name or libtpu
        raise ConfigError(
            f"--topology={name}: the TPU compiler does not know it ({str(error).splitlines()[0]}); "
            "the compiler comes with pip install 'cli-jax[tpu]'"
        ) from error
    devices = described.devices
    chips = slices
    for side in match["shape"].split("x"):
        chips *= int(side)
    per_chip = max(len(devices) // chips, 1)
    chip = _CHIPS[match["chip"]]
    share = {
        f.name: getattr(chip, f.name) / per_chip
        for f in dataclasses.fields(chip)
        if isinstance(getattr(chip, f.name), float)
    }
    return Topology(name, dataclasses.replace(chip, **share, per_chip=per_chip), devices, slices)
