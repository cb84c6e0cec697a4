"""Attention from text to image: against transformers' own, and restated with injection."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cli_jax.analysis import attention
from cli_jax.analysis.prompts import AnalysisError
from cli_jax.evaluate.prompts import load_prompts, prompt_spec, read_questions
from cli_jax.fusion.cli import CLIConfig
from cli_jax.generate.buckets import batches
from cli_jax.text import load_tokenizer
from tests.evaluate import eval_small as small
from tests.fusion import restatement, tiny
from tests.fusion.rows import make_batch


def look(model, params, batch):
    """(hidden states, mass [n, B, H]) of the model as `analyze.py attention` watches it."""
    query_BxQ = attention.last_text(batch)

    @jax.jit
    def run(params, batch):
        is_image = batch["visual_index"] < batch["visual_position"].shape[1]

        def see(q, k):
            return attention.image_mass(q, k, query_BxQ, is_image, batch["segment_ids"])

        output, mass = model.apply({"params": params}, batch, see, method="watch")
        return output.hidden, mass

    return jax.tree.map(np.asarray, run(params, batch))


# ---- against transformers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "compute"),
    [("siglip_qwen2", "SCANNED"), ("siglip_qwen2_tied", "LOOPED"), ("clip_llama", "SCANNED")],
)
def test_every_head_equals_transformers(name, compute):
    """LlavaOnevision and Llava, one prompt a row, up to three pictures, every parameter redrawn."""
    torch = pytest.importorskip("torch")
    from tests.model import oracle, reference
    from tests.model.samples import batch_of

    case, compute = oracle.case(name), getattr(oracle, compute)
    names = [n for n in oracle.SIZES if n != "no_picture"]
    batch, places = batch_of([[n] for n in names], case.prompts, case.config, length=oracle.LENGTH)
    model = oracle.build(case.config, compute)
    hidden, mass_nxBxH = look(model, case.params, batch)
    logits = np.asarray(model.apply({"params": case.params}, hidden, method="logits"))
    for place in places:
        unwatched = oracle.reference_logits(name, place.name)
        assert oracle.error(place.of(logits), unwatched) <= oracle.BOUND
        inputs = oracle.reference_inputs(case, case.prompts[place.name])
        with torch.no_grad():
            seen = case.model(**inputs, output_attentions=True).attentions
        is_image = inputs["input_ids"][0].numpy() == reference.IMAGE_TOKEN
        behind = np.arange(len(is_image)) > np.flatnonzero(is_image)[-1]
        assert behind.sum() == 11  # four tokens follow each picture, seven end the prompt
        for layer, weights_1xHxLxL in enumerate(seen):
            to_image = weights_1xHxLxL[0].numpy()[:, behind][:, :, is_image]
            expected = np.float64(to_image).sum(axis=-1).mean(axis=-1)
            assert mass_nxBxH[layer, place.row] == pytest.approx(expected, abs=5e-6)
    assert np.ptp(mass_nxBxH) > 0.2


# ---- with Cross-Layer Injection, restated --------------------------------------------------------


def rms_norm(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def rotated(x_LxHxd, positions):
    """Each pair (j, j + d/2) turned by position / theta^(2j/d)."""
    half = x_LxHxd.shape[-1] // 2
    angle = positions[:, None] / tiny.TEXT.rope_theta ** (np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x_LxHxd[..., :half], x_LxHxd[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def layer_of(params, h_LxD):
    """One decoder layer on one row without padding: (h, attention probabilities [H, L, L])."""
    c, L = tiny.TEXT, len(h_LxD)
    own = params["self_attn"]
    x = rms_norm(h_LxD, params["input_layernorm"]["scale"])

    def heads(name, count):
        y = x @ own[name]["kernel"] + own[name]["bias"]
        return y.reshape(L, count, c.head_dim)

    q = rotated(heads("q_proj", c.num_attention_heads), np.arange(L))
    k = rotated(heads("k_proj", c.num_key_value_heads), np.arange(L))
    v = heads("v_proj", c.num_key_value_heads)
    weights, out = [], []
    for head in range(c.num_attention_heads):
        kv = head * c.num_key_value_heads // c.num_attention_heads
        scores = q[:, head] @ k[:, kv].T / np.sqrt(c.head_dim)
        scores[np.triu_indices(L, 1)] = -np.inf
        e = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights.append(e / e.sum(axis=-1, keepdims=True))
        out.append(weights[-1] @ v[:, kv])
    h = h_LxD + np.concatenate(out, axis=-1) @ own["o_proj"]["kernel"]
    x, mlp = rms_norm(h, params["post_attention_layernorm"]["scale"]), params["mlp"]
    gate = x @ mlp["gate_proj"]["kernel"]
    wide = gate * restatement.sigmoid(gate) * (x @ mlp["up_proj"]["kernel"])
    return h + wide @ mlp["down_proj"]["kernel"], np.stack(weights)


def restated(config, model, params, batch):
    """Mass [n, B, H] in float64: inject before a layer, then run it, row by row."""
    wide = restatement.float64(params)
    layers = tuple(range(restatement.LAST + 1))
    tower = jax.jit(lambda p, x: model.apply({"params": p}, x, layers, method="vision"))
    hidden = restatement.float64(tower(params, batch["pixel_values"]))
    language = wide["language_model"]
    h = language["embed_tokens"]["embedding"][batch["input_ids"]]
    for b, slot in np.argwhere(batch["visual_newline"]):
        h[b, batch["visual_position"][b, slot]] = wide["image_newline"]
    for b, i in restatement.pictures(batch):
        for slot in restatement.patch_slots(batch, b, i):
            feature = restatement.projected(wide, batch, b, slot, hidden[-1][b])
            h[b, batch["visual_position"][b, slot]] = feature
    Vhat = restatement.aligned(config, wide, batch, hidden)
    lengths = (batch["segment_ids"] > 0).sum(axis=1)
    mass = np.zeros((tiny.TEXT.num_hidden_layers, len(h), tiny.TEXT.num_attention_heads))
    for n in range(len(mass)):
        if n in config.inject:
            h, _ = restatement.injected(config, wide, batch, Vhat, config.inject.index(n), h)
        for b, length in enumerate(lengths):
            own = jax.tree.map(lambda x, n=n: x[n], language["layers"])
            h[b, :length], weights = layer_of(own, h[b, :length])
            slots = batch["visual_position"][b]
            image = slots[slots < batch["input_ids"].shape[1]]
            if len(image):
                mass[n, b] = weights[:, max(image) + 1 :][:, :, image].sum(axis=-1).mean(axis=-1)
    return mass


def test_mass_is_measured_behind_the_injection():
    config = CLIConfig(taps=(1, 3, 5), inject=(0, 1, 3), rank=4)
    (_, text_only, one), (pair,) = tiny.conversations()
    batch = make_batch([[text_only], [one], [pair]], **tiny.SIZES)
    model, params = tiny.model(config), tiny.redrawn(config)
    hidden, mass = look(model, params, batch)
    unwatched = jax.jit(lambda p, b: model.apply({"params": p}, b).hidden)(params, batch)
    np.testing.assert_allclose(hidden, unwatched, rtol=0, atol=2e-5)  # compiled as another program
    assert mass == pytest.approx(restated(config, model, params, batch), abs=5e-6)
    assert not mass[:, 0].any()  # no picture, nothing to look at


# ---- which tokens ask, and what is kept ----------------------------------------------------------


def test_the_queries_are_the_text_behind_the_last_picture():
    (two_turns, text_only, one), (pair,) = tiny.conversations()
    batch = make_batch([[two_turns], [text_only], [one], [pair]], **tiny.SIZES)
    L = batch["input_ids"].shape[1]
    query = attention.last_text(batch)
    assert query.shape == (4, 64)
    for row, sample in ((0, two_turns), (2, one), (3, pair)):
        last = sample.pictures[-1]
        behind = range(last.start + len(last.newline), len(sample.ids))
        assert query[row][query[row] < L].tolist() == list(behind)
    assert (query[1] == L).all()


def test_no_square_matrix_is_made():
    """1,000 positions, 64 queries, 4 heads in 2 groups."""
    q, k = jnp.zeros((1, 1000, 4, 8)), jnp.zeros((1, 1000, 2, 8))
    ids, query = jnp.ones((1, 1000), jnp.int32), jnp.zeros((1, 64), jnp.int32)
    program = str(jax.make_jaxpr(attention.image_mass)(q, k, query, ids > 0, ids))
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"\[([\d,]+)\]", program)}
    assert (1, 2, 64, 1000) in shapes
    assert max(np.prod(shape) for shape in shapes) == 2 * 64 * 1000
    assert not [shape for shape in shapes if shape.count(1000) > 1]


@pytest.mark.parametrize(
    ("curve", "layer"),
    [
        ([0.6, 0.3, 0.049, 0.04, 0.03, 0.03, 0.03, 0.03], 2),  # 0.03 is the end
        ([0.6, 0.03, 0.06, 0.04, 0.03, 0.03, 0.03, 0.03], 3),  # leaves again at layer 2
        ([0.0, 0.0, 0.1, 0.3, 0.3, 0.3, 0.3, 0.3], 3),  # from below
        ([0.03] * 8, 0),  # settled from the start
        ([0.1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.6], None),  # the end is not one
        ([0.9, 0.5, 0.1], 2),  # a quarter of three layers is one
        ([0.9, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1], 5),  # and of seven, too
        ([0.7], 0),
        ([0.06, 0.04], 0),
        ([0.0601, 0.04], 1),
    ],
)
def test_saturation(curve, layer):
    assert attention.saturation(np.array(curve)) == layer


def test_the_summary_names_the_layer_or_says_that_there_is_none():
    sums = np.full((8, 2), 0.06)
    sums[:3] = 0.9
    settled = attention.summary(attention.Mass(sums, prompts=2))
    assert settled.endswith("\n--config.routing.saturation=3")
    at_once = attention.summary(attention.Mass(np.ones_like(sums), prompts=2))
    assert "saturation layer s = 0 of" in at_once
    assert "--config.routing.saturation=1\n(1 is the least" in at_once  # 0 would be refused
    assert "0.450 at layer 0" in settled
    sums[-1] = 0.9
    assert "never settles" in attention.summary(attention.Mass(sums, prompts=2))


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A workdir of a small cli model; questions about one, two, no picture, and a missing one."""
    folder = tmp_path_factory.mktemp("attention")
    experiment = small.make_experiment(folder)
    small.save_workdir(folder / "run", experiment, small.make_model(experiment)[1])
    names = [small.save_picture(folder, f"p{i}.png", (8, 8), i) for i in range(4)]
    pictures = [names[0], "nowhere.png", names[1], None, names[2:], names[3]]
    small.save_rows(folder, [small.question(i, image) for i, image in enumerate(pictures)])
    return folder


@pytest.fixture(scope="module")
def masses(folder):
    """Mass [n, H] of each prompt, from the queries and keys of every layer, in float64."""
    experiment = small.make_experiment(folder)
    model, params = small.make_model(experiment)
    spec = prompt_spec(experiment, load_tokenizer(experiment.data.tokenizer), 0)
    prompts = load_prompts(read_questions(folder / "questions.json"), str(folder), spec)
    good = [(n, p) for n, p in prompts if not isinstance(p, str) and p.extent.images]

    @jax.jit
    def watch(params, batch):
        return model.apply({"params": params}, batch, lambda *qk: qk, method="watch")[1]

    found = []
    for _, batch in batches(good, 1, spec.vision):
        length = int((batch["segment_ids"] > 0).sum())
        image = np.flatnonzero(batch["visual_index"][0] < batch["visual_position"].shape[1])
        q, k = (np.float64(x)[:, 0] for x in watch(params, batch))
        k = np.repeat(k, 2, axis=2)  # two heads a group
        scores = np.einsum("nihd,njhd->nhij", q, k) / np.sqrt(q.shape[-1])
        scores = np.where(np.tri(scores.shape[-1], dtype=bool), scores, -np.inf)
        e = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights = e / e.sum(axis=-1, keepdims=True)
        found.append(weights[:, :, max(image) + 1 : length][..., image].sum(-1).mean(-1))
    return found


def run(folder, *more, data="questions.json", output="out"):
    options = ["--workdir", folder / "run", "--data", folder / data, "--output", folder / output]
    return small.load_command("analyze").main(["attention", *map(str, options), *more])


def test_attention_writes_its_files(folder, masses, capsys):
    assert run(folder, "--per_head", "--batch_size", "3") == 0
    with np.load(folder / "out" / "attention.npz") as found:
        assert found["prompts"] == len(masses) == 4
        assert found["mass_per_head"] == pytest.approx(np.mean(masses, axis=0), abs=1e-6)
        assert found["mass"] == pytest.approx(found["mass_per_head"].mean(axis=1))
        settled = attention.saturation(found["mass"])
        assert settled == found["saturation"]
        assert found["tolerance"] == 0.02
    for name in ("attention.png", "attention_heads.png"):
        with Image.open(folder / "out" / name) as image:
            assert image.width > 500
    printed = capsys.readouterr().out
    assert "left out q1: ImageError: " in printed
    assert f"--config.routing.saturation={settled}" in printed
    assert printed.count("written: ") == 3


def test_heads_are_left_out_unless_asked_for_and_batches_do_not_matter(folder, masses):
    assert run(folder, "--batch_size", "1", output="one") == 0
    assert sorted(p.name for p in (folder / "one").iterdir()) == ["attention.npz", "attention.png"]
    with np.load(folder / "one" / "attention.npz") as one:
        assert "mass_per_head" not in one
        assert one["mass"] == pytest.approx(np.mean(masses, axis=(0, 2)), abs=1e-6)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([small.question(0)], "no prompt with text behind a picture: no row has a picture"),
        ([small.question(0, "nowhere.png")], "no such file"),
    ],
)
def test_a_failure_is_one_line(folder, capsys, rows, message):
    small.save_rows(folder, rows, "bad.json")
    assert run(folder, data="bad.json") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("analyze.py attention: ")
    assert message in line


def test_a_model_without_numbers_is_a_clear_error(folder):
    experiment = small.make_experiment(folder)
    model, params = small.make_model(experiment)
    broken = jax.tree.map(lambda x: x * np.nan, params)
    with pytest.raises(AnalysisError, match="not finite"):
        attention.mean_mass(model, broken, experiment, folder / "questions.json", "", limit=1)
