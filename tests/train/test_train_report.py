import numpy as np
import train_tiny

from cli_jax.train.report import parameter_table
from cli_jax.train.state import flatten

LEAVES = {
    "fusion/amp/lora_A": np.zeros((2, 5, 10)),
    "fusion/agf/gate_bias": np.zeros(100),
    "language_model/layers/mlp/kernel": np.zeros((20, 30)),
    "language_model/layers/mlp/bias": np.zeros(50),
    "vision_tower/norm/scale": np.zeros(150),
}
RATES = {
    "fusion/amp/lora_A": 1e-4,
    "fusion/agf/gate_bias": 1e-4,
    "language_model/layers/mlp/kernel": 1e-5,
    "language_model/layers/mlp/bias": None,
    "vision_tower/norm/scale": None,
}


def test_the_table_names_counts_shares_and_what_is_frozen():
    rows = [line.split("  ") for line in parameter_table(LEAVES, RATES).splitlines()]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert rows == [
        ["parameters", "count", "share", "trained"],
        ["fusion/amp/lora_A [2, 5, 10]", "100", "10.000%", "lr 0.0001"],
        ["fusion/agf/gate_bias [100]", "100", "10.000%", "lr 0.0001"],
        ["language_model/layers", "650", "65.000%", "lr 1e-05 (600 trained, 50 frozen)"],
        ["vision_tower/norm", "150", "15.000%", "frozen"],
        ["new: fusion/*", "200", "20.000%", "lr 0.0001"],
        ["total", "1,000", "100.000%", "lr 1e-05, 0.0001 (800 trained, 200 frozen)"],
    ]


def test_a_model_without_new_parameters_has_no_such_line():
    table = parameter_table({"a/b": np.zeros(3)}, {"a/b": 1e-3})
    assert "new" not in table


def test_the_tiny_models_count_is_that_of_its_arrays(setup, initial):
    leaves = flatten(initial.params)
    total = sum(leaf.size for leaf in leaves.values())
    new = sum(leaf.size for path, leaf in leaves.items() if path.startswith("fusion/"))
    table = parameter_table(flatten(setup.state.params), setup.rates).splitlines()
    assert f"{total:,}" in table[-1]
    assert f"{new:,}" in table[-2]
    assert leaves["lm_head/kernel"].size == train_tiny.VOCAB * 32
