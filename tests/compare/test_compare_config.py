"""What a comparison's config may say, and the one line for what it may not."""

import pytest
from compare_tiny import arm, config

from cli_jax.compare import protocol
from cli_jax.compare.config import from_config
from cli_jax.compare.runs import plan, stages
from cli_jax.experiment import ConfigError
from cli_jax.flag_parser import read_config


def test_an_arm_changes_its_strategy_and_nothing_else(tmp_path):
    arms = [
        arm("none", "none"),
        {"name": "wide", "changes": {"model": {"projector_width": 64}, "fusion": {"name": "none"}}},
        arm("cli_mean", "cli", agf="mean"),
        arm("dpvr", "none"),
    ]
    arms[-1]["changes"]["routing"] = {"name": "dpvr", "saturation": 1}
    base = config(tmp_path, arms=arms, select=[])
    base["data"]["text_per_row"] = 40  # `dpvr` wants it and two layers, and all arms share both
    base["model"]["text"]["num_hidden_layers"] = 2
    comparison = from_config(base, tmp_path)
    experiments = [comparison.experiment(a["name"], comparison.settings.stage2) for a in arms]
    none, wide, mean, dpvr = (each.model for each in experiments)
    assert (none.fusion_name, wide.projector_width) == ("none", 64)
    # What the base says of a strategy holds, where the arm does not say otherwise.
    assert (mean.fusion.agf, mean.fusion.rank, mean.fusion.taps) == ("mean", 2, "all")
    assert (none.routing.name, dpvr.routing.name, dpvr.fusion_name) == ("none", "dpvr", "none")
    assert len({(e.optimizer, e.total_steps, e.data.batch_size) for e in experiments}) == 1


def test_the_stages_of_a_run(tmp_path):
    encoders = [{"name": "scratch"}, {"name": "trained", "path": "some/hub-id"}]
    comparison = from_config(config(tmp_path, encoders=encoders), tmp_path)
    runs = plan(comparison.settings)
    assert len(runs) == len(set(runs)) == 2 * 2 * 3
    scratch, trained = (stages(comparison, tmp_path, run) for run in (runs[0], runs[-1]))
    for (_, first), (_, second) in (scratch, trained):
        assert (first.total_steps, second.total_steps) == (2, 4)
        assert first.optimizer.groups[-1].lr is None
        assert second.optimizer.groups == ()
        assert first.data == second.data
        assert first.eval.path == second.eval.path == ""
    assert [e.tower_from for _, e in scratch] == ["", ""]
    assert [e.tower_from for _, e in trained] == ["some/hub-id", ""]
    assert [e.init_from for _, e in trained] == ["", str(trained[0][0])]
    assert trained[0][0] == tmp_path / "runs/trained/1/layer_1/seed_1/stage1"
    alone = from_config(config(tmp_path, encoders=encoders, stage1={"steps": 0}), tmp_path)
    ((_, only),) = stages(alone, tmp_path, runs[-1])
    assert (only.tower_from, only.init_from, only.seed) == ("some/hub-id", "", 1)


def test_all_arms_start_from_the_model_of_the_base(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    comparison = from_config(config(tmp_path) | {"init_from": "model"}, tmp_path)
    for run in plan(comparison.settings):
        (workdir, first), (_, second) = stages(comparison, tmp_path, run)
        assert (first.init_from, first.tower_from) == (str(tmp_path / "model"), "")
        assert (second.init_from, second.tower_from) == (str(workdir), "")


def test_another_model_to_start_from_is_another_comparison(tmp_path):
    file = tmp_path / "model" / "model.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"one")
    raw = config(tmp_path) | {"init_from": str(file.parent)}
    raw["compare"]["encoders"] = [{"name": "own"}, {"name": "hub", "path": "some/hub-id"}]
    comparison = from_config(raw, tmp_path)
    fixed = protocol.fix(comparison, {}, tmp_path)
    assert fixed["encoders"] == {"own": fixed["init_from"], "hub": "hub id some/hub-id"}
    assert protocol.fix(comparison, {}, tmp_path) == fixed
    file.write_bytes(b"two")
    with pytest.raises(
        ConfigError, match=r"another comparison: encoders\.own was .*; init_from was"
    ):
        protocol.fix(comparison, {}, tmp_path)


def test_towers_are_named_in_one_place(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.tower_from: the towers of a comparison are"):
        from_config(config(tmp_path) | {"tower_from": "some/hub-id"}, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": "sli"}, r"there is no arm 'sli'; the arms are \['none', 'cli', 'layer_1'\]"),
        ({"baseline": "layer_1"}, "'layer_1' is not reported"),
        (
            {"contrasts": [{"arm": "cli", "against": "layer_1"}]},
            "'layer_1' is no reported arm and no selection",
        ),
        ({"seeds": [0, 0]}, r"compare.seeds must not be empty or repeat: \[0, 0\]"),
        ({"arms": []}, "compare.arms must not be empty"),
        ({"fractions": [0.0]}, r"fractions must be in \(0, 1\]"),
        ({"select": []}, "'layer_1' is neither reported nor in a selection"),
        ({"stage2": {"steps": 0}}, "stage2.steps and draws are at least 1"),
        (
            {"stage2": {"steps": 1, "changes": {"data": {}}}},
            r"stage2 changes \['data'\], which all",
        ),
        ({"armss": []}, "unknown key config.compare.armss; did you mean 'arms'"),
        ({"encoders": [{"name": "a/b"}]}, "'a/b' becomes a folder"),
        (
            {"select": [{"name": "best", "arms": ["layer_1", "layer_1"]}]},
            r"select: the arms of 'best' must not be empty or repeat: \['layer_1', 'layer_1'\]",
        ),
        ({"select": [{"name": "best", "arms": []}]}, "the arms of 'best' must not be empty"),
        ({"select": [{"name": "1/3", "arms": ["none", "layer_1"]}]}, "'1/3' becomes a file"),
        (
            {"select": [{"name": "none", "arms": ["none", "layer_1"]}]},
            r"arms and select must not be empty or repeat: \['none', 'cli', 'layer_1', 'none'\]",
        ),
        (
            {"evals": [{"name": "held_out_2", "path": "val.json"}]},
            "'held_out_2' would be mixed up with the held-out pictures",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        from_config(config(tmp_path, **change), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"batch_size": 8}}, r"'odd' changes \['data'\], which all arms and stages share"),
        ({"model": {"text": {"hidden_size": 64}}}, "'odd' changes model.text, which all share"),
        ({"optimizer": {"lrr": 1.0}}, "unknown key config.optimizer.lrr; did you mean 'lr'"),
        ({"fusion": {"name": "slii"}}, "config.fusion.name='slii' is no strategy"),
    ],
)
def test_an_arm_that_is_not_comparable_is_refused(tmp_path, changes, message):
    arms = [arm("none", "none"), {"name": "odd", "changes": changes}]
    with pytest.raises(ConfigError, match=message):
        from_config(config(tmp_path, arms=arms, select=[]), tmp_path)


def test_an_arm_with_its_own_rates_aligns_what_all_align(tmp_path):
    rates = {"optimizer": {"groups": [{"pattern": "fusion/agf/.*", "lr": 1e-4}], "lr": 1e-3}}
    arms = [arm("none", "none"), arm("cli", "cli"), arm("slow", "cli")]
    arms[2]["changes"] |= rates
    comparison = from_config(config(tmp_path, arms=arms, select=[]), tmp_path)
    first, second = (
        [comparison.experiment(name, stage).optimizer for name in ("cli", "slow")]
        for stage in (comparison.settings.stage1, comparison.settings.stage2)
    )
    assert first[0].groups == first[1].groups
    assert first[0].groups[-1].lr is None
    assert [group.pattern for group in second[1].groups] == ["fusion/agf/.*"]
    assert second[0].groups == ()
    assert second[1].lr == 1e-3


def test_packed_rows_hold_the_same_samples_or_are_refused(tmp_path):
    arms = [arm("none", "none"), arm("sci", "dense_connector", variant="sci", taps=[1])]
    arms += [arm("sti", "dense_connector", variant="sti", taps=[1])]
    base = config(tmp_path, arms=arms[:2], select=[])
    base["model"]["vision"] |= {"image_size": 16, "patch_size": 4}
    base["data"] |= {"pack": True, "visual_per_row": 20}
    from_config(base, tmp_path)
    base["compare"]["arms"] = arms
    with pytest.raises(ConfigError, match=r"'sti' have other sizes than those of 'none'.*pack=Fal"):
        from_config(base, tmp_path)
    base["data"]["pack"] = False
    from_config(base, tmp_path)


def test_an_experiment_alone_is_no_comparison(tmp_path):
    alone = {key: value for key, value in config(tmp_path).items() if key != "compare"}
    with pytest.raises(ConfigError, match="has no section `compare`"):
        from_config(alone, tmp_path)


def test_a_config_file_with_changes_from_the_command_line(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({config(tmp_path)!r})\n"
    )
    changes = ["--config.optimizer.lr=0.5", "--config.compare.stage2.steps", "7"]
    changed = from_config(read_config(str(path), changes), tmp_path)
    assert (changed.base.optimizer.lr, changed.settings.stage2.steps) == (0.5, 7)
    for wrong, message in (
        (["--config.optimizer.lrr=1"], "unknown name in a --config flag: 'lrr'"),
        (["--steps=7"], "'steps'"),
        (["7"], "unknown arguments: 7"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_config(str(path), wrong)
    with pytest.raises(ConfigError, match=r"nowhere\.py"):
        read_config("nowhere.py", [])
