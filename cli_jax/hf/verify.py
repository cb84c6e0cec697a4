"""`convert.py verify`: our logits against transformers', on one picture and prompt.

Both models run in float32 on the CPU, one after the other, on the same tokens and pixels. Needs
torch.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from PIL import Image

from cli_jax.batch import Batch
from cli_jax.config import ModelConfig
from cli_jax.data.collate import Extent, Sizes, collate
from cli_jax.data.sample import Sample, SampleSpec, make_prompt_sample
from cli_jax.experiment import ComputeConfig
from cli_jax.fusion import registry
from cli_jax.hf.checkpoint import Checkpoint, read
from cli_jax.hf.config_out import is_onevision
from cli_jax.hf.error import ConversionError
from cli_jax.hf.load import load_params
from cli_jax.hf.source import open_source, resolve
from cli_jax.image.preprocess import normalize
from cli_jax.model import vlm
from cli_jax.text import load_tokenizer

PROMPT = "What do you see in this picture?"
_ROOM = Extent(tokens=32_768, visual=16_384, tiles=64, images=1, text=32_768)


def verify(
    source: str | Path,
    *,
    image: str | Path | None = None,
    prompt: str | None = None,
    bound: float = 1e-3,
) -> dict[str, Any]:
    """Compares logits at every text position after the picture; `equal` in the result says it.

    bound: largest difference allowed, in standard deviations of the reference's logits.
    """
    folder = resolve(source)
    if "mm_projector_type" in open_source(folder).config:
        raise ConversionError(
            f"{source} is not in transformers' own format: run `convert.py from-hf`, verify that"
        )
    checkpoint = read(folder)
    sample, size = _sample(checkpoint, folder, image, prompt or PROMPT)
    text = np.setdiff1d(np.arange(len(sample.ids)), sample.visual_position)
    positions = text[text > sample.visual_position[-1]]
    ours = _our_logits(checkpoint, folder, sample, positions)
    theirs = _reference_logits(checkpoint, folder, sample, positions, size)
    error, spread = float(np.abs(ours - theirs).max()), float(theirs.std())
    return {
        "source": str(source),
        "tokens": len(sample.ids),
        "visual_tokens": len(sample.visual_position),
        "tiles": len(sample.tiles),
        "compared_positions": len(positions),
        "largest_error": error,
        "standard_deviation": spread,
        "error_in_standard_deviations": error / spread,
        "bound": bound,
        "next_token": [int(ours[-1].argmax()), int(theirs[-1].argmax())],
        "equal": bool(error <= bound * spread),
    }


def _sample(
    checkpoint: Checkpoint, folder: Path, image: str | Path | None, prompt: str
) -> tuple[Sample, tuple[int, int]]:
    """The prompt with its picture, and the picture's (width, height)."""
    with tempfile.TemporaryDirectory() as made:
        path = Path(image) if image else _made_up_picture(Path(made) / "picture.png")
        if not path.is_file():
            raise ConversionError(f"--image {path} does not exist")
        spec = SampleSpec(
            tokenizer=load_tokenizer(str(folder)),
            template=checkpoint.template,
            labels="reference",
            image=checkpoint.image,
            vision=checkpoint.vision,
            room=_ROOM,
        )
        turns = [
            {"from": "human", "value": f"<image>\n{prompt}"},
            {"from": "gpt", "value": "(to be answered)"},
        ]
        row = {"id": "verify", "image": path.name, "conversations": turns}
        with Image.open(path) as opened:
            size = opened.size
        return make_prompt_sample(row, str(path.absolute().parent), spec), size


def _made_up_picture(path: Path) -> Path:
    """Ramps and noise of a fixed seed, 500 x 375."""
    rng = np.random.default_rng(0)
    ramp = np.add.outer(np.linspace(0, 120, 375), np.linspace(0, 90, 500))[..., None]
    pixels = ramp + rng.integers(0, 46, (375, 500, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def _our_logits(
    checkpoint: Checkpoint, folder: Path, sample: Sample, positions: np.ndarray
) -> np.ndarray:
    config = ModelConfig(
        checkpoint.vision,
        checkpoint.text,
        checkpoint.image,
        "none",
        registry.get("none").Config(),
        checkpoint.has_newline,
    )
    compute = ComputeConfig(dtype="float32", param_dtype="float32", remat="none")
    model = vlm.build(config, compute, "cpu")
    apply: Any = model.apply
    batch = _batch(sample, checkpoint)
    cpu = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    with jax.default_device(jax.devices("cpu")[0]):
        abstract = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), batch)["params"])
        shardings = jax.tree.map(lambda _: cpu, abstract)
        loaded = load_params(
            folder, config, abstract, shardings=shardings, base_only=True, progress=True
        )
        if loaded.missing:
            raise ConversionError(f"{folder} lacks {', '.join(loaded.missing)}: nothing to compare")

        @jax.jit
        def logits(params: Any, batch: Batch) -> jax.Array:
            hidden = apply({"params": params}, batch).hidden[0, positions]
            return apply({"params": params}, hidden, method="logits")

        return np.asarray(logits(loaded.params, batch))


def _batch(sample: Sample, checkpoint: Checkpoint) -> Batch:
    tokens, visual, tiles, images, _ = sample.extent
    vision = checkpoint.vision
    sizes = Sizes(1, tokens, visual, tiles, images, vision.image_size, vision.num_patches)
    return collate([[sample]], sizes)


def _reference_logits(
    checkpoint: Checkpoint,
    folder: Path,
    sample: Sample,
    positions: np.ndarray,
    size: tuple[int, int],
) -> np.ndarray:
    try:
        import torch
    except ImportError as error:
        raise ConversionError("verify needs torch: pip install 'cli-jax[test]'") from error
    import transformers

    onevision = is_onevision(checkpoint.image)
    kind = "LlavaOnevision" if onevision else "Llava"
    model = getattr(transformers, f"{kind}ForConditionalGeneration").from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )
    model.eval()
    ids = sample.ids.astype(np.int64)
    ids[sample.visual_position] = model.config.image_token_id
    pixels = normalize(sample.tiles, checkpoint.image).transpose(0, 3, 1, 2)
    inputs = {"input_ids": torch.from_numpy(ids)[None]}
    if onevision:
        inputs["pixel_values"] = torch.from_numpy(pixels)[None]
        inputs["image_sizes"] = torch.tensor([[size[1], size[0]]])
    else:
        inputs["pixel_values"] = torch.from_numpy(pixels)
    with torch.no_grad():
        hidden = model.model(**inputs).last_hidden_state[0, torch.from_numpy(positions)]
        return model.lm_head(hidden).numpy()
