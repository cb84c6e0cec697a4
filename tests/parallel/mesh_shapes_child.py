"""Three updates on every shape of an 8-device mesh; prints JSON. Started by test_mesh_shapes.py.

mesh_shapes_child.py FOLDER [MODEL]: with a config's sections `fusion` and `routing` (JSON), that
model on one shape only.
"""

import itertools
import json
import math
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np

from cli_jax.dryrun import hlo
from cli_jax.experiment import from_dict
from cli_jax.model.gather import apply_plan
from cli_jax.parallel.rules import batch_sharding
from cli_jax.train.setup import Setup, make_setup, shardings
from cli_jax.train.state import flatten, split
from cli_jax.train.step import gradients
from tests.data import small
from tests.train import train_tiny

QUICK = train_tiny.QUICK
ROWS, PARTS, RATE = 16, 2, 0.05
OTHER = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
TEXT = 250 if "routing" in OTHER else 0  # text slots of a row


def experiment(**mesh):
    """Any-res pictures, packed rows, all parts of the model, heads for every tensor size."""
    base = train_tiny.config()
    if OTHER:
        base |= OTHER
        base["model"]["vision"]["num_hidden_layers"] = 3
    base["model"]["image"] = {
        "aspect_ratio": "anyres_max_4",
        "grid_pinpoints": small.IMAGE.grid_pinpoints,
    }
    base["model"]["text"] |= {
        "vocab_size": 128,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_hidden_layers": 5 if OTHER else 2,
    }
    data = {"row_length": 256, "visual_per_row": 48, "tiles_per_row": 8, "images_per_row": 4}
    base["data"] = data | {"batch_size": ROWS, "labels": "answer_only", "text_per_row": TEXT}
    base["optimizer"] |= {"accumulate": PARTS if math.prod(mesh.values()) > 1 else 1}
    base["compute"] |= {"scan_layers": True, "remat": "full", "loss_chunk": 64}
    return from_dict(base | {"mesh": mesh})


def batches(folder: Path, sizes):
    """Three batches from the true pipeline."""
    from cli_jax.data.pipeline import make_loader

    path = small.write(folder, small.mixed_rows(folder, 60))
    data = small.config(path, batch_size=ROWS, text_per_row=TEXT)
    loader = make_loader(
        data, sizes.model.image, sizes.model.vision, seed=0, rows_per_process=ROWS,
        tokenizer=small.tokenizer(), extras=sizes.extras,
    )  # fmt: skip
    found = [dict(next(loader)) for _ in range(3)]
    loader.close()
    return found


def put(setup: Setup, batch):
    return {k: jax.device_put(batch[k], v.sharding) for k, v in setup.batch.items()}


def drawn(params):
    """For another model: nothing is left at its initial zero, behind which gradients would be."""
    if not OTHER:
        return params
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, moved)


def descend(setup: Setup, data):
    """Losses, gradients of the first update and the text of the program, for plain descent."""
    with setup.context():
        params = jax.jit(
            lambda: drawn(setup.init_params(0)),
            out_shardings=shardings(setup.state.params),
            compiler_options=QUICK,
        )()
        trainable, frozen = split(params, flatten(params))
        trainable_shapes, _ = split(setup.state.params, flatten(params))

        def update(trainable, batch):
            grads, sums = gradients(setup, trainable, frozen, batch)
            moved = jax.tree.map(lambda p, g: p - RATE * g, trainable, grads)
            return moved, grads, sums.loss / sums.weight

        step = (
            jax.jit(update, out_shardings=(shardings(trainable_shapes), None, None))
            .lower(trainable, put(setup, data[0]))
            .compile(QUICK)
        )
        losses, first = [], None
        for batch in data:
            trainable, grads, loss = step(trainable, put(setup, batch))
            losses.append(float(loss))
            first = first or {k: np.asarray(v) for k, v in flatten(grads).items()}
    return losses, first, step.as_text()


def reductions(text):
    """Bytes of all reductions that run once, and of the largest one that a loop repeats."""
    found = [x for x in hlo.instructions(text) if x.op.startswith("all-reduce")]
    once = sum(hlo.size(line.type) for line in found if line.times == 1)
    return once, max((hlo.size(line.type) for line in found if line.times > 1), default=0)


def gather_collectives(setup: Setup, batch):
    """Collectives in the any-res gather, forward and backward."""
    keys = ("plan_index", "plan_weight", "plan_inverse")
    sharding = batch_sharding(setup.mesh, setup.rules)
    rows, tiles = batch["pixel_values"].shape[:2]
    x = jax.ShapeDtypeStruct(
        (rows, tiles * setup.experiment.model.vision.num_patches, 64), np.float32, sharding=sharding
    )
    plan = [setup.batch[k] for k in keys]
    both = jax.jit(lambda x, *plan: jax.vjp(lambda x: apply_plan(x, *plan), x)[1](
        apply_plan(x, *plan)
    ))  # fmt: skip
    text = both.lower(x, *plan).compile().as_text()
    assert "gather" in text
    return sum(line.op.removesuffix("-start") in hlo.COLLECTIVES for line in hlo.instructions(text))


def main(folder: Path):
    single = make_setup(experiment(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    data = batches(folder, single.experiment)
    packed = np.mean([(b["segment_ids"].max(axis=1) > 1).mean() for b in data])
    tiles = {int(n) for b in data for n in (b["plan_weight"] > 0).sum((1, 2))}
    losses, grads, _ = descend(single, data)
    found = {}
    for data_axis, fsdp in itertools.product((1, 2, 4, 8), repeat=2):
        tensor = 8 // (data_axis * fsdp)
        if tensor == 0 or (OTHER and (data_axis, fsdp) != (2, 2)):
            continue
        setup = make_setup(experiment(data=data_axis, fsdp=fsdp, tensor=tensor))
        got, first, text = descend(setup, data)
        errors = {
            path: float(np.abs(first[path] - g).max() / max(np.abs(g).max(), 1e-3))
            for path, g in grads.items()
        }
        found[f"{data_axis}x{fsdp}x{tensor}"] = {
            "losses": got,
            "gradient_error": max(errors.values()),
            "worst": max(errors, key=errors.get),
            "reductions": reductions(text) if fsdp == tensor == 1 else None,
            "gather_collectives": gather_collectives(setup, data[0]) if tensor == 1 else None,
        }
    sizes = {path: g.nbytes for path, g in grads.items()}
    print(json.dumps({
        "losses": losses, "meshes": found, "packed": float(packed), "tiles": len(tiles),
        "largest_gradient": max(sizes.values()), "gradients": sum(sizes.values()),
    }))  # fmt: skip


main(Path(sys.argv[1]))
