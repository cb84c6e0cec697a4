"""Configs that the image tests share."""

import pytest

from cli_jax.config import ImageConfig, VisionConfig

PINPOINTS = tuple((384 * i, 384 * j) for i in range(1, 7) for j in range(1, 7))
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="session")
def ov() -> tuple[ImageConfig, VisionConfig]:
    """LLaVA-OneVision."""
    return ImageConfig(aspect_ratio="anyres_max_9", grid_pinpoints=PINPOINTS), VisionConfig()


@pytest.fixture(scope="session")
def llava15() -> tuple[ImageConfig, VisionConfig]:
    """LLaVA-1.5, stage 2."""
    image = ImageConfig(
        aspect_ratio="pad", multi_image="same", image_mean=CLIP_MEAN, image_std=CLIP_STD
    )
    return image, VisionConfig(model_type="clip", image_size=336)
