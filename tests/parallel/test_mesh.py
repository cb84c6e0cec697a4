import jax
import pytest

from cli_jax.config import ImageConfig, ModelConfig, TextConfig, VisionConfig
from cli_jax.experiment import ConfigError, MeshConfig
from cli_jax.parallel.mesh import AXES, axis_sizes, batch_shards, check_tensor, make_mesh


def model(heads: int = 28, kv_heads: int = 4) -> ModelConfig:
    text = TextConfig(num_attention_heads=heads, num_key_value_heads=kv_heads)
    return ModelConfig(VisionConfig(), text, ImageConfig(), "none", None)


@pytest.mark.parametrize(
    ("config", "devices", "expected"),
    [
        (MeshConfig(), 1, (1, 1, 1)),
        (MeshConfig(), 8, (1, 8, 1)),
        (MeshConfig(data=-1, fsdp=2, tensor=2), 16, (4, 2, 2)),
        (MeshConfig(data=2, fsdp=2, tensor=-1), 8, (2, 2, 2)),
        (MeshConfig(data=4, fsdp=2, tensor=1), 8, (4, 2, 1)),
    ],
)
def test_minus_one_takes_what_is_left(config, devices, expected):
    assert axis_sizes(config, model(), devices) == expected


@pytest.mark.parametrize(
    ("config", "devices", "words"),
    [
        (MeshConfig(data=3, fsdp=-1), 8, ["data=3", "8 devices"]),
        (MeshConfig(data=2, fsdp=2), 8, ["fsdp=2", "multiply to 8"]),
        (MeshConfig(data=1, fsdp=-1, tensor=-1), 8, ["at most one -1"]),
        (MeshConfig(data=0), 8, ["positive"]),
        (MeshConfig(data=-2), 8, ["positive"]),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(config, devices, words):
    with pytest.raises(ConfigError) as error:
        axis_sizes(config, model(), devices)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("config", "devices", "slices", "expected"),
    [
        (MeshConfig(), 64, 1, (1, 64, 1)),
        (MeshConfig(), 256, 1, (2, 128, 1)),  # 1152 is not divisible by 256
        (MeshConfig(tensor=2), 256, 1, (1, 128, 2)),
        (MeshConfig(), 96, 1, (3, 32, 1)),
        (MeshConfig(), 512, 2, (4, 128, 1)),
        (MeshConfig(), 16, 2, (2, 8, 1)),  # a slice holds the whole model
    ],
)
def test_the_default_splits_every_weight(config, devices, slices, expected):
    assert axis_sizes(config, model(), devices, slices) == expected


def test_a_copy_of_the_model_must_lie_in_one_slice():
    with pytest.raises(ConfigError, match="data=1 is not a multiple of the 2 slices"):
        axis_sizes(MeshConfig(data=1, fsdp=16), model(), 16, 2)


@pytest.mark.parametrize(
    ("heads", "good"), [(28, [1, 2, 4, 7, 14, 28]), (14, [1, 2, 7, 14]), (32, [1, 2, 4, 8, 16, 32])]
)
def test_a_tensor_size_must_divide_the_heads(heads, good):
    for tensor in range(1, 33):
        if tensor in good:
            check_tensor(model(heads), tensor)
        else:
            with pytest.raises(ConfigError, match=rf"{heads} attention heads.*\{str(good)[:-1]}"):
                check_tensor(model(heads), tensor)


def test_the_mesh_has_auto_axes_over_the_given_devices():
    mesh = make_mesh(MeshConfig(), model(), jax.devices()[:1])
    assert mesh.axis_names == AXES
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert batch_shards(mesh) == 1
