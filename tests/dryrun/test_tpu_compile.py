"""The TPU compiler on a shrunken ov7b_cli: as many layers, taps and points, narrower.

`pytest -m tpu_aot` compiles every strategy, and the full-size configs of docs/pods.md (hours on two
cores).
"""

import dataclasses
import importlib.util
import math
import re

import pytest

from cli_jax.dryrun import chips, hlo
from cli_jax.dryrun.compile import compile_for
from cli_jax.dryrun.report import make_report
from cli_jax.experiment import from_dict
from cli_jax.fusion.registry import STRATEGIES
from configs import ov7b_cli

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler (the `tpu` extra)"
)
ROWS, LENGTH, VISUAL, TILES, VOCAB, CHUNK = 8, 2048, 1536, 3, 32_000, 256
V, D = 128, 256


def shrunken(*, fusion="cli", routing="none", **changes):
    config = ov7b_cli.get_config()
    config.fusion.name = fusion
    config.routing.update(name=routing, saturation=18)
    config.model.vision.update(hidden_size=V, intermediate_size=2 * V, num_attention_heads=2)
    config.model.text.update(
        hidden_size=D,
        intermediate_size=2 * D,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=VOCAB,
    )
    config.data.update(
        batch_size=ROWS,
        row_length=LENGTH,
        visual_per_row=VISUAL,
        text_per_row=LENGTH - VISUAL if routing == "dpvr" else 0,
        tiles_per_row=TILES,
    )
    config.compute.loss_chunk = CHUNK
    experiment = from_dict(config)
    return dataclasses.replace(experiment, **changes)


@pytest.fixture(scope="module")
def topology():
    return chips.describe("v5e:2x4")


@pytest.fixture(scope="module")
def compiled(topology):
    return compile_for(shrunken(), topology)


def test_it_fits_and_is_reported(compiled, topology):
    report = make_report(shrunken(), topology, compiled)
    assert report.fits
    assert (report.chips, report.devices) == (8, 8)
    assert report.mesh == {"data": 1, "fsdp": 8, "tensor": 1}
    assert report.memory.limit == 16 * 2**30
    parameters = sum(leaf.size for leaf in _leaves(compiled.setup.state.params))
    assert report.memory.parameters == pytest.approx(parameters * 4 / 8, rel=0.05)
    assert report.memory.temporaries > 0
    assert 0 < report.mfu_ceiling < 1
    # Every weight is gathered at least once, in two bytes, and its gradient comes back.
    assert sum(report.collectives.values()) > 2 * parameters


def _leaves(tree):
    return [leaf for x in tree.values() for leaf in (_leaves(x) if isinstance(x, dict) else [x])]


def kernels(text):
    """Where attention runs in a kernel."""
    return set(re.findall(r'op_name="[^"]*(vision_tower|language_model)[^"]*splash', text))


def test_attention_is_splash_in_tower_and_decoder(compiled):
    assert kernels(compiled.text) == {"vision_tower", "language_model"}


ALLOWED = {  # per device; what is large, on purpose
    "inputs of the decoder's layers": (9, 2, 1, LENGTH, D),
    "the decoder's state before injections": (9, 1, LENGTH, D),
    "inputs of the tower's layers": (8, 2, TILES, 729, V),
    "bank": (9, 1, VISUAL, D),
    "bank, but for the last layer's": (8, 1, VISUAL, D),
    "logits of a chunk": (1, CHUNK, VOCAB),
    "embeddings and head, gathered": (VOCAB, D),
}
LARGE = 6e6  # bytes; a row's logits would be 262 MB in float32, its scores 67 MB


def test_nothing_is_large_that_is_not_on_the_list(compiled):
    allowed = [sorted(n for n in shape if n > 1) for shape in ALLOWED.values()]
    allowed += [
        sorted(n for n in leaf.sharding.shard_shape(leaf.shape) if n > 1)
        for leaf in _leaves(compiled.setup.state.params)
    ]
    large = set()
    for line in (line for line in hlo.instructions(compiled.text) if not line.fused):
        for kind, dims in re.findall(r"\b([a-z]+[0-9a-z]*)\[([0-9,]+)\]", line.type):
            shape = sorted(n for n in map(int, dims.split(",")) if n > 1)
            if hlo.size(f"{kind}[{dims}]") > LARGE and shape not in allowed:
                large.add((f"{kind}[{dims}]", line.op))
    assert not large
    wholes = [math.prod((LENGTH, VOCAB)) * 4, 4 * LENGTH**2 * 4]
    assert min(wholes) > LARGE


def test_inputs_of_layers_can_wait_in_the_hosts_memory(topology):
    """Also between equally spaced injection points, where layers would run in a loop in a loop."""
    compute = dataclasses.replace(shrunken().compute, remat="offload")
    text = compile_for(shrunken(compute=compute), topology).text
    host = re.findall(r"bf16\[([0-9,]+)\]\{[^}]*S\(5\)\}", text)
    assert f"9,1,{LENGTH},{D}" in host
    assert any(shape.endswith(f",{TILES},729,{V}") for shape in host)


@pytest.mark.slow
def test_tensor_parallel_and_two_slices_compile():
    """The decoder's attention runs split over heads; only `data` crosses between slices."""
    mesh = dataclasses.replace(shrunken().mesh, data=1, fsdp=2, tensor=2)
    split = compile_for(shrunken(mesh=mesh), chips.describe("v5e:2x2"))
    assert split.memory.fits
    slices = chips.describe("2*v5e:2x2")
    both = compile_for(shrunken(), slices)
    assert dict(both.setup.mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert both.memory.fits


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("fusion", "routing"), [*((name, "none") for name in STRATEGIES), ("none", "dpvr")]
)
def test_every_strategy_compiles(topology, fusion, routing):
    compiled = compile_for(shrunken(fusion=fusion, routing=routing), topology)
    assert compiled.memory.fits
    assert kernels(compiled.text) == {"vision_tower", "language_model"}


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v5e:16x16", "v5p:4x4x4", "v6e:16x16"])
def test_ov7b_cli_fits(topology):
    compiled = compile_for(from_dict(ov7b_cli.get_config()), chips.describe(topology))
    assert compiled.memory.fits
