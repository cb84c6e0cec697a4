"""How far each mutation throws the model off.

`python -m tests.model.table` prints the parity that was reached and a table of all mutations.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np

from cli_jax.config import ModelConfig
from cli_jax.model.vlm import build
from tests.model import oracle
from tests.model.mutations import CLIP, INVISIBLE, MUTATIONS, QUIET, SIGLIP, Mutation
from tests.model.samples import batch_of

ROWS = (("shrunk_and_cut",), ("no_picture", "two_pictures", "tall"))
LENGTH = 256
# Dozens of programs are compiled to run once each, so they are compiled quickly.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
CONTROLS = tuple(
    Mutation("nothing", case, scale=scale) for case in (SIGLIP, CLIP) for scale in (1.0, QUIET)
)


def _program(config: ModelConfig) -> Callable:
    model = build(config, dataclasses.replace(oracle.SCANNED, remat="none"))
    return jax.jit(lambda *args: oracle.logits(model, *args), compiler_options=QUICKLY)


_shared_program = functools.cache(_program)  # for mutations that leave the code as it is


def error_with(mutation: Mutation) -> float:
    """The mutated model's largest logit error, in standard deviations of the reference's logits."""
    right = oracle.case(mutation.case, scale=mutation.scale)
    params = jax.tree.map(np.copy, right.params)
    mutation.params(params)
    batch, places = batch_of(
        ROWS, right.prompts, right.config, length=LENGTH, change=mutation.layout
    )
    program = (_program if mutation.patch else _shared_program)(mutation.config(right.config))
    with mutation.patched():
        ours = np.asarray(program(params, batch))
    return max(
        oracle.error(
            place.of(ours),
            oracle.reference_logits(mutation.case, place.name, scale=mutation.scale),
        )
        for place in places
    )


def main() -> None:
    print("Largest errors in standard deviations of what is compared.\n")
    print("| model | layers | logits | hidden states |\n|---|---|---|---|")
    for name in oracle.CONFIGS:
        for layers, compute in (("scanned", oracle.SCANNED), ("looped", oracle.LOOPED)):
            logits = max(oracle.logit_errors(name, compute).values())
            states = max(oracle.hidden_state_errors(name, compute))
            print(f"| {name} | {layers} | {logits:.1e} | {states:.1e} |", flush=True)
    print("\n| model | mutation | logits | over the bound |\n|---|---|---|---|")
    for mutation in (*CONTROLS, *MUTATIONS, *INVISIBLE):
        error = error_with(mutation)
        name = mutation.name + (f" (residual streams x {mutation.scale})" * (mutation.scale != 1))
        ratio = error / oracle.BOUND
        times = f"{ratio:,.0f} x" if ratio > 1 else "no"
        print(f"| {mutation.case} | {name} | {error:.1e} | {times} |", flush=True)


if __name__ == "__main__":
    main()
