import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from cli_jax.config import ImageConfig, ModelConfig, TextConfig, VisionConfig
from cli_jax.parallel.mesh import AXES
from cli_jax.parallel.rules import Rules, rules_for, shard_params, spec


def mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> AbstractMesh:
    return AbstractMesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3)


def test_weights_are_split_over_fsdp_and_tensor_and_batches_over_data_and_fsdp():
    big = mesh(2, 4, 2)
    assert spec("w", (64, 32), ("embed", "mlp"), big, Rules()) == (
        PartitionSpec("fsdp", "tensor"),
        [],
    )
    assert spec("x", (16, 8, 64), ("batch", "length", None), big, Rules()) == (
        PartitionSpec(("data", "fsdp"), None, None),
        [],
    )
    assert spec("l", (3, 32, 64), ("layers", "heads", "embed"), big, Rules())[0] == PartitionSpec(
        None, "tensor", "fsdp"
    )


def test_a_dimension_that_is_not_divisible_is_replicated_and_said_so():
    placed, notes = spec("lm_head/kernel", (64, 31), ("embed", "vocab"), mesh(1, 4, 2), Rules())
    assert placed == PartitionSpec("fsdp", None)
    assert notes == ["lm_head/kernel: vocab 31 is not divisible by tensor=2: replicated"]


def test_one_mesh_axis_cannot_split_two_dimensions():
    with pytest.raises(ValueError, match=r"w: .*'embed' and 'vision_embed'.*'fsdp'"):
        spec("w", (64, 64), ("embed", "vision_embed"), mesh(1, 4), Rules())
    # ... unless that axis has only one device
    assert spec("w", (64, 64), ("embed", "vision_embed"), mesh(4), Rules())[1] == []


def test_unknown_names_and_wrong_ranks_are_errors():
    with pytest.raises(KeyError, match="no rule for the logical axis 'embd'"):
        spec("w", (64,), ("embd",), mesh(1, 4), Rules())
    with pytest.raises(ValueError, match="w: logical axes"):
        spec("w", (64, 2), ("embed",), mesh(1, 4), Rules())


def test_heads_that_the_tensor_size_does_not_divide_stay_whole():
    text = TextConfig(num_attention_heads=28, num_key_value_heads=4)
    model = ModelConfig(VisionConfig(), text, ImageConfig(), "none", None)
    rules, notes = rules_for(model, mesh(tensor=7))
    assert (rules.kv_heads, rules.vision_heads, rules.heads) == ((), (), ("tensor",))
    assert [note.split(":")[0] for note in notes] == ["kv_heads", "vision_heads"]
    assert rules_for(model, mesh(tensor=4)) == (Rules(), ())


def test_boxed_parameters_get_their_shardings():
    boxed = {
        "a": {"kernel": nn.LogicallyPartitioned(jnp.zeros((8, 6)), ("embed", "mlp"))},
        "scale": jnp.zeros(5),
    }
    placed, notes = shard_params(jax.eval_shape(lambda: boxed), mesh(1, 4, 4), Rules())
    assert placed["a"]["kernel"].sharding.spec == PartitionSpec("fsdp", None)
    assert placed["a"]["kernel"].shape == (8, 6)
    assert placed["scale"].sharding.spec == PartitionSpec(None)
    assert notes == ("a/kernel: mlp 6 is not divisible by tensor=4: replicated",)


def test_flax_reads_the_same_table():
    pairs = dict(Rules().pairs())
    assert pairs["batch"] == ("data", "fsdp")
    assert pairs["layers"] is None
    assert set(pairs) == {field.name for field in dataclasses.fields(Rules)}
    with nn.logical_axis_rules(Rules().pairs()):
        assert nn.logical_to_mesh_axes(("batch", "length", "mlp")) == PartitionSpec(
            ("data", "fsdp"), None, ("tensor",)
        )
