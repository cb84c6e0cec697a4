import jax
import numpy as np
import pytest
from PIL import Image

from cli_jax.analysis import gates, plots
from cli_jax.analysis.prompts import AnalysisError
from cli_jax.data import Sizes, collate
from cli_jax.evaluate.prompts import load_prompts, prompt_spec, read_questions
from cli_jax.output import OutputError
from cli_jax.text import load_tokenizer
from tests.evaluate import eval_small as small


class Setting:
    """A model with gates, and seven questions of which one cannot be asked."""

    def __init__(self, folder, pictures=(0, 1, 2), **fusion):
        self.folder = folder
        self.experiment = small.make_experiment(folder, **fusion)
        self.model, self.params = small.make_model(self.experiment)
        rows = []
        for i in range(6):
            names = [f"p{i}{j}.png" for j in range(pictures[i % len(pictures)])]
            for seed, name in enumerate(names, 9 * i):
                small.save_picture(folder, name, (8, 8), seed)
            rows.append(small.question(i, names or None))
        rows.insert(1, small.question(7, "nowhere.png"))
        self.data = small.save_rows(folder, rows)

    def analyze(self, output="out", **options):
        arguments = self.model, self.params, self.experiment, self.data, self.folder
        return gates.analyze_gates(*arguments, self.folder / output, **options)

    def direct(self):
        """{category: gates [pictures, T, K]} from one plain forward pass, picture by picture."""
        vision = self.experiment.model.vision
        spec = prompt_spec(self.experiment, load_tokenizer(self.experiment.data.tokenizer), 0)
        questions = read_questions(self.data)
        prompts = load_prompts(questions, str(self.folder), spec)
        good = [(n, p) for n, p in prompts if not isinstance(p, str)]
        sizes = Sizes(
            rows=len(good), length=128, visual=16, tiles=2, images=2,
            tile_size=vision.image_size, patches=vision.num_patches,
        )  # fmt: skip
        batch = collate([[sample] for _, sample in good], sizes)
        found = np.asarray(jax.jit(self.model.apply)({"params": self.params}, batch).gates)
        out = {}
        for row, (number, sample) in enumerate(good):
            for image in range(len(sample.context_end)):
                out.setdefault(questions[number].category, []).append(found[:, row, image])
        return {category: np.stack(values) for category, values in out.items()}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    setting = Setting(tmp_path_factory.mktemp("gates"), context="prompt")
    setting.written, setting.left_out, _ = setting.analyze()
    return setting


def test_the_file_equals_a_direct_computation(setting):
    expected = setting.direct()
    with np.load(setting.folder / "out" / "gates.npz", allow_pickle=False) as found:
        assert found["categories"].tolist() == sorted(expected) == ["few", "many"]
        counts = [len(expected[c]) for c in sorted(expected)]
        assert found["category_pictures"].tolist() == counts == [3, 3]
        assert found["pictures"] == 6
        every = np.concatenate(list(expected.values()))
        assert found["gates"] == pytest.approx(every.mean(axis=0), abs=1e-6)
        for category, values in zip(found["categories"], found["category_gates"], strict=True):
            assert values == pytest.approx(expected[category].mean(axis=0), abs=1e-6)
        assert found["decoder_layers"].tolist() == ["0", "1"]
        assert found["vision_layers"].tolist() == ["1", "2"]
        assert np.ptp(found["gates"]) > 0.05  # else everything would agree with everything
    assert np.abs(expected["few"].mean(axis=0) - expected["many"].mean(axis=0)).max() > 1e-3


def test_rows_that_cannot_be_read_are_listed(setting):
    assert list(setting.left_out) == ["q7"]
    assert "no such file" in setting.left_out["q7"]


def test_a_picture_per_category_is_drawn(setting):
    names = ["gates.npz", "gates.png", "gates_few.png", "gates_many.png"]
    assert [path.name for path in setting.written] == names
    for path in setting.written[1:]:
        with Image.open(path) as image:
            assert image.width > 300


def test_channel_gates_enter_with_their_mean(tmp_path):
    setting = Setting(tmp_path, (2,), gate="channel", taps=[[0, 1], 2], inject=[1])
    setting.analyze(batch_size=6)
    every = np.concatenate(list(setting.direct().values()))
    assert every.ndim == 4
    with np.load(tmp_path / "out" / "gates.npz") as found:
        assert found["gates"] == pytest.approx(every.mean(axis=(0, 3)), abs=1e-6)
        assert found["decoder_layers"].tolist() == ["1"]
        assert found["vision_layers"].tolist() == ["0+1", "2"]


@pytest.mark.parametrize("fusion", [{"name": "none"}, {"agf": "mean"}], ids=["none", "no AGF"])
def test_a_strategy_without_gates_is_a_clear_error(tmp_path, fusion):
    experiment = small.make_experiment(tmp_path, **fusion)
    with pytest.raises(AnalysisError, match="has no gates"):
        gates.analyze_gates(None, None, experiment, "x.json", "", tmp_path / "out")


def test_a_file_without_pictures_is_a_clear_error(tmp_path):
    experiment = small.make_experiment(tmp_path)
    data = small.save_rows(tmp_path, [small.question(0, "nowhere.png")])
    with pytest.raises(AnalysisError, match="no such file"):
        gates.analyze_gates(None, None, experiment, data, tmp_path, tmp_path / "out")


def test_missing_matplotlib_is_noticed_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(plots.PlotError, match="demo"):
        gates.analyze_gates(None, None, None, "x.json", "", tmp_path / "out")


def test_an_unwritable_place_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        gates.analyze_gates(None, None, None, "x.json", "", tmp_path / "file" / "out")


def test_means_refuse_gates_of_another_shape():
    means = gates.GateMeans(("0",), ("1", "2"))
    means.add("a", np.array([[0.0, 1.0]]))
    means.add("b", np.array([[1.0, 1.0]]))
    assert means.mean().tolist() == [[0.5, 1.0]]
    with pytest.raises(ValueError, match="declares"):
        means.add("a", np.zeros((2, 2)))


def test_category_names_cannot_leave_the_folder_or_collide(tmp_path):
    means = gates.GateMeans(("0",), ("1",))
    for category in ("a/b", "a_b", "../c", ""):
        means.add(category, np.array([[0.5]]))
    written = gates.save(means, gates.epath.Path(tmp_path), "title")
    assert len(written) == len(set(written)) == len(list(tmp_path.iterdir())) == 6
