import json

import numpy as np
import pytest
from PIL import Image

from cli_jax.analysis import plots

LABELS = {
    "title": "gates",
    "row_title": "decoder layer",
    "column_title": "vision layer",
    "value_title": "mean gate",
}


def draw(values, path, **kwargs):
    rows, columns = values.shape
    labels = {"rows": [str(i) for i in range(rows)], "columns": [str(i) for i in range(columns)]}
    plots.heatmap(values, path, **labels, **LABELS, **kwargs)
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.mark.parametrize("shape", [(1, 1), (4, 3), (12, 12), (32, 26)])
def test_a_heatmap_grows_with_its_cells_up_to_a_page(tmp_path, shape):
    pixels = draw(np.random.default_rng(0).random(shape), tmp_path / "map.png")
    height, width = pixels.shape[:2]
    assert width == pytest.approx(plots.DPI * min(2.6 + 0.45 * shape[1], 7.5), abs=2)
    assert height == pytest.approx(plots.DPI * min(1.8 + 0.38 * shape[0], 7.0), abs=2)


def test_row_zero_is_at_the_bottom(tmp_path):
    """The lowest viridis color is nearly black purple, the highest yellow."""
    values = np.zeros((40, 1))
    values[0] = 1
    pixels = draw(values, tmp_path / "map.png", limits=(0, 1))
    left = pixels[:, : pixels.shape[1] // 2]  # without the color bar
    yellow = np.argwhere(np.abs(left - (253, 231, 37)).sum(axis=-1) < 10)
    assert len(yellow) > 100
    assert yellow[:, 0].mean() > 0.85 * len(pixels)


def test_a_fixed_scale_is_kept(tmp_path):
    one = draw(np.full((2, 2), 0.2), tmp_path / "a.png", limits=(0, 1))
    other = draw(np.full((2, 2), 0.8), tmp_path / "b.png", limits=(0, 1))
    center = tuple(n // 3 for n in one.shape[:2])
    assert np.abs(one[center] - other[center]).sum() > 100


def test_values_are_written_only_when_there_are_few(tmp_path, monkeypatch):
    few, many = np.full((3, 3), 0.5), np.full((3, 13), 0.5)
    annotated = draw(few, tmp_path / "a.png", limits=(0, 1))
    bare_many = draw(many, tmp_path / "b.png", limits=(0, 1))
    monkeypatch.setattr(plots, "ANNOTATE_UP_TO", 0)
    assert not np.array_equal(annotated, draw(few, tmp_path / "c.png", limits=(0, 1)))
    assert np.array_equal(bare_many, draw(many, tmp_path / "d.png", limits=(0, 1)))


def test_closed_gates_are_told_apart(tmp_path):
    one, other = (
        draw(np.full((2, 2), value), tmp_path / f"{value}.png", limits=(0, 1))
        for value in (1e-5, 8e-5)
    )
    assert not np.array_equal(one, other)


def test_labels_must_fit_the_values(tmp_path):
    with pytest.raises(ValueError, match="2 rows, 3 columns"):
        plots.heatmap(
            np.zeros((3, 2)), tmp_path / "x.png", rows=["0", "1"], columns=list("abc"), **LABELS
        )


def test_groups_and_their_medoids_are_marked(tmp_path):
    def similarity(groups):
        path = tmp_path / "similarity.png"
        plots.similarity_map(np.eye(9), path, groups=groups, title="layers")
        return np.asarray(Image.open(path).convert("RGB")).astype(int)

    red = (214, 39, 40)  # matplotlib's tab:red
    pixels = similarity([(1, 4, 2), (5, 8, 7)])
    rows, columns = np.nonzero(np.abs(pixels - red).sum(axis=-1) < 10)
    inside = rows < 0.8 * len(pixels)  # above the legend
    assert np.ptp(columns[inside]) > 0.2 * pixels.shape[1]  # two medoids, five layers apart
    assert columns[inside][rows[inside].argmin()] > columns[inside][rows[inside].argmax()]
    assert not np.array_equal(pixels, similarity([(1, 3, 2), (4, 8, 7)]))


def test_the_saturation_layer_is_marked_where_there_is_one(tmp_path):
    def curve(saturation):
        path = tmp_path / "curve.png"
        plots.attention_curve(np.array([0.6, 0.2, 0.1, 0.1]), path, saturation=saturation, title="")
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
        lines = pixels[: int(0.8 * len(pixels)), : int(0.75 * pixels.shape[1])]  # no legend
        return np.nonzero(np.abs(lines - (214, 39, 40)).sum(axis=-1) < 10)[1]

    assert not len(curve(None))
    assert np.ptp(curve(1)) < 10
    assert np.median(curve(2)) - np.median(curve(1)) > 100


def test_smooth_is_a_centered_mean():
    values = np.arange(200.0)
    assert plots.smooth(values)[10:190] == pytest.approx(values[10:190])
    assert plots.smooth(np.full(7, 3.0)) == pytest.approx(np.full(7, 3.0))
    assert plots.smooth(np.array([1.0])) == pytest.approx([1.0])
    spike = np.zeros(80)
    spike[40] = 1
    assert plots.smooth(spike)[38:43] == pytest.approx([1 / 5] * 5)
    assert plots.smooth(spike)[[37, 43]] == pytest.approx([0, 0])


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_loss_curve_takes_the_later_line_of_a_step(tmp_path):
    first = [{"step": s, "loss": 9.0} for s in range(1, 6)]
    again = [{"step": s, "loss": 1.0 / s} for s in range(1, 21)]
    other = [{"event": "resumed"}]
    plots.loss_curve(write(tmp_path / "a.jsonl", first + other + again), tmp_path / "a.png")
    plots.loss_curve(write(tmp_path / "b.jsonl", again), tmp_path / "b.png")
    assert np.array_equal(Image.open(tmp_path / "a.png"), Image.open(tmp_path / "b.png"))


def test_a_metrics_file_without_losses_is_a_clear_error(tmp_path):
    with pytest.raises(plots.PlotError, match="does not exist"):
        plots.loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    with pytest.raises(plots.PlotError, match="no line with step and loss"):
        plots.loss_curve(write(tmp_path / "m.jsonl", [{"step": 1}]), tmp_path / "loss.png")


def test_a_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(plots.PlotError, match=r"cli-jax\[demo\]"):
        draw(np.zeros((2, 2)), tmp_path / "map.png")
