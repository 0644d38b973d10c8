"""Methods side by side: equal budgets, pieces that are made once, and arithmetic that can be checked by hand."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torchmetrics.functional.classification import binary_calibration_error

from medviz.domains import get_domain
from medviz.errors import InputError
from tests import tiny
from tests.train.test_evaluate_stage import write_split
from train.calibration import CALIBRATION_BINS
from train.config import read_recipe
from train.evaluate.report import TABLES_NAME, ReportConfig, read_reports, section
from train.evaluate.report import run as write_tables
from train.experiments import crossed, methods
from train.experiments.measured import calibration_sums, likeliest_is_asked, per_prompt
from train.experiments.methods import MethodsConfig, plan, queries, run, train
from train.experiments.methods_report import Run, curve, figures
from train.experiments.pieces import piece
from train.rl.learner import RlLearner
from train.rl.recipe import RlConfig

RECIPES = Path(__file__).parents[2] / "train" / "recipes"
SHARED = "--steps 2 --prompts-per-epoch 1 --images-per-prompt 2 --updates 2"


def rl_recipe(folder: Path, models: Path) -> str:
    content = {
        "out": str(folder / "unused"),
        "base": str(models),
        "reward": str(models / "rewards" / "attribute"),
        "judge": str(models / "judge"),
        "size_px": tiny.IMAGE_SIZE_PX,
        "invented_prompts": 0,
        "rollout_steps": 2,
        "timesteps_per_image": 1,
        "rank": 2,
        "anchor_weight": 0.0,
        "evaluate_every": 1,
        "evaluation_prompts": 2,
        "evaluation_images": 2,
        "evaluation_steps": 1,
    }
    (folder / "rl.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "rl.yaml")


def config_for(folder: Path, models: Path, **options: Any) -> MethodsConfig:
    return MethodsConfig(
        **{
            "out": str(folder / "run"),
            "rl": rl_recipe(folder, models),
            "shared": SHARED,
            "methods": {"forward": "--objective forward", "ddpo": '--objective ddpo --title "The paper\'s"'},
            "queries": 4,
            "features": str(models),
            "reports": str(folder / "reports"),
            "steps": 1,
            "grid_prompts": 2,
            "seeds_per_prompt": 2,
            "captions": 4,
            "apr_heads": ("hair", "ink"),
            "picture": False,
            **options,
        }
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for seed, name in enumerate(("train", "validation")):
        write_split(root / "dermatology", name, 20, seed)
    return root


@pytest.fixture
def models(model_root: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEDVIZ_DATA", str(images))
    return model_root / "dermatology"


@pytest.fixture
def trained(models: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the rl stage, and notes which runs it was asked for: an adapter, its looks, and what it spent."""
    asked: list[str] = []

    def main(arguments: list[str]) -> None:
        wanted = read_recipe(arguments[0], RlConfig)
        out = Path(wanted.out)
        asked.append(out.name)
        shutil.copytree(models / "adapters" / tiny.ADAPTER, out / "model")
        score = 0.1 * (wanted.seed + 1)
        looks = [
            {"epoch": e, "judge": score * e, "judge_accuracy": 0.5, "reward": 0.0, "diversity": 1.0} for e in range(3)
        ]
        lines = [
            {"step": e, "forwards_rollout": 8.0 * e, "forwards_replay": 4.0 * e, "forwards_evaluation": 99}
            for e in (1, 2)
        ]
        (out / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        metrics = {"history": looks, "unet_forwards": {"with gradient": 6}, "trained_s": 1.0}
        (out / "metrics.json").write_text(json.dumps(metrics))

    monkeypatch.setattr(methods.trainer, "main", main)
    return asked


def test_methods_with_other_budgets_are_refused(tmp_path: Path, models: Path) -> None:
    longer = {"forward": "--objective forward", "ddpo": "--objective ddpo --steps 3"}
    with pytest.raises(InputError, match=r"must have 4 reward queries.*\{'ddpo': 6\}"):
        plan(config_for(tmp_path, models, methods=longer))
    plans = plan(config_for(tmp_path, models))
    assert {queries(one) for by_seed in plans.values() for one in by_seed.values()} == {4}
    one = plans["ddpo"][2]
    assert (one.objective, one.seed, one.adapter, one.title) == ("ddpo", 2, methods.ADAPTER, "The paper's")
    assert one.patience > one.steps
    assert one.keep == "newest"
    assert plans["forward"][0].title == "forward"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": (0, 1)}, "at least 3"),
        ({"seeds": (0, 1, 1)}, "different"),
        ({"methods": {}}, "at least one method"),
        ({"methods": {"baseline": ""}}, "cannot be a method's name"),
        ({"methods": {"a": "", "b": "--evaluation-images 3"}}, "may not differ in evaluation_images"),
        ({"methods": {"a": "--objective ddpo --updates 1"}}, "needs at least 2"),
        ({"captions": 3}, "captions must be at least 4"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, models: Path, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(config_for(tmp_path, models, **options))


def test_the_recipe_plans_equal_budgets_and_the_paper_s_reward() -> None:
    config = read_recipe(RECIPES / "methods-dermatology.yaml", MethodsConfig)
    plans = plan(config)
    assert list(plans) == ["ddpo_paper", "ddpo", "grpo", "forward", "draft"]
    assert plans["ddpo_paper"][0].reward_function == "attribute_paper"
    assert plans["ddpo"][0].reward_function == "attribute"
    assert plans["ddpo_paper"][0].objective == plans["ddpo"][0].objective == "ddpo"
    assert {queries(one) for by_seed in plans.values() for one in by_seed.values()} == {config.queries}


def test_a_run_goes_on_and_finds_what_is_finished(
    tmp_path: Path, models: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tmp_path, models)
    measured: list[int] = []
    real_measure = methods.measure
    monkeypatch.setattr(methods, "measure", lambda *given: measured.append(1) or real_measure(*given))
    found = run(config, "python -m train methods x")
    assert found is not None
    assert trained == [f"{name}-seed{seed}" for name in ("forward", "ddpo") for seed in range(3)]
    assert len(measured) == 1 + 6 + 1
    shutil.rmtree(tmp_path / "run" / "ddpo-seed1")
    (tmp_path / "run" / "measured" / "forward-seed0.json").unlink()
    trained.clear(), measured.clear()
    assert run(config, "python -m train methods x") == found
    assert trained == ["ddpo-seed1"]
    assert len(measured) == 1  # the adapter made again is the same, and so is what it measures
    changed = config_for(tmp_path, models, shared=f"{SHARED} --learning-rate 0.5")
    with pytest.raises(InputError, match="another recipe"):
        run(changed)
    # The report and its table.
    stored = json.loads((tmp_path / "reports" / "methods-dermatology.json").read_text())
    assert stored == found == json.loads((tmp_path / "run" / "methods-dermatology.json").read_text())
    assert [arm["name"] for arm in found["arms"]] == ["baseline", "forward", "ddpo"]
    assert found["runs"]["ddpo"][2]["forwards"] == 2 * 12
    by_name = {figure["name"]: figure for figure in found["figures"]}
    assert len(by_name) == len(found["figures"])
    for name in (
        "judge_accuracy_grid", "judge_apr_grid", "judge_head_hair_grid", "judge_disease_captions",
        "reward_accuracy_grid", "judge_calibration_grid", "kernel_distance_segmenter", "kernel_distance_judge",
        "frechet_distance_judge", "diversity_segmenter", "memorisation_share_segmenter", "cost_queries",
    ):  # fmt: skip
        figure = by_name[name]
        assert figure["headline"], name
        assert figure["baseline"]["value"] is not None, name
        assert set(figure["adapters"]) == {"forward", "ddpo"}, name
    assert by_name["judge_accuracy_grid"]["counts"] == {"seeds": 3, "prompts": 2}
    assert by_name["judge_accuracy_captions"]["real"]["n"] == 4
    assert by_name["judge_accuracy_grid"]["real"] is None
    assert by_name["cost_queries"]["adapters"]["ddpo"]["value"]["value"] == 4
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results:begin -->\n<!-- results:end -->\n")
    write_tables(ReportConfig(reports=str(tmp_path / "reports"), readme=str(readme), models=str(tmp_path / "models")))
    assert "| The paper's (`ddpo`) |" in (tmp_path / "reports" / TABLES_NAME).read_text()


def test_the_pictures_of_all_share_prompts_and_noise(tmp_path: Path, models: Path, trained: list[str]) -> None:
    run(config_for(tmp_path, models, methods={"forward": ""}))
    asked = [json.loads(path.read_text()) for path in (tmp_path / "run" / "pictures").glob("*/request.json")]
    assert len(asked) == 2 * 4
    by_kind: dict[str, set[Any]] = {}
    for one in asked:
        by_kind.setdefault(str(one["prompts"]), set()).add(
            (tuple(one["seeds"]), str(one["guidance_scale"]), one["steps"])
        )
    assert [len(requests) for requests in by_kind.values()] == [1, 1]
    assert len({one["adapter"] for one in asked}) == 4


def test_time_over_ends_between_pieces_and_the_command_goes_on(
    tmp_path: Path, models: Path, trained: list[str]
) -> None:
    config = config_for(tmp_path, models, methods={"forward": ""}, max_minutes=1e-9)
    assert run(config) is None
    assert trained == []


def test_a_run_of_the_real_trainer_keeps_the_newest_adapter_and_logs_its_cost(tmp_path: Path, models: Path) -> None:
    wanted = plan(config_for(tmp_path, models))["forward"][1]
    train(wanted)
    one = methods.read_run(wanted, {})
    card = json.loads((Path(wanted.out) / "model" / "adapter.json").read_text())
    assert card["recipe"]["seed"] == 1
    assert card["metrics"]["kept_epoch"] is None
    assert [look["queries"] for look in one.looks] == [0, 2, 4]
    # An epoch: 2 images x 2 steps with guidance, then 2 images x 1 timestep by the policy and by the one that drew.
    assert [look["forwards"] for look in one.looks] == [0, 12, 24]
    # Two of the 12 have a gradient, whose backward passes count as four more.
    assert [look["compute"] for look in one.looks] == [0, 16, 32]
    before = (Path(wanted.out) / "metrics.json").stat().st_mtime_ns
    train(wanted)
    assert (Path(wanted.out) / "metrics.json").stat().st_mtime_ns == before


def test_the_newest_adapter_is_exported_whatever_the_judge_chose(tmp_path: Path, models: Path) -> None:
    wanted = plan(config_for(tmp_path, models))["forward"][0]
    domain = get_domain("dermatology")
    scorer, judge = methods.trainer.open_scorer(wanted, domain), methods.trainer.open_judge(wanted)
    learner = RlLearner(wanted, methods.trainer.open_pipeline(wanted.base, "cpu"), domain, scorer, judge)
    learner.update(0)
    chosen = learner.watch.history[-1]
    learner.watch.best = chosen
    learner.best = {name: torch.zeros_like(w) for name, w in learner.policy.weights(learner.policy.behaviour).items()}
    found = {}
    for keep in ("newest", "best"):
        learner.config = replace(wanted, keep=keep)
        metrics = learner.export(tmp_path / keep)
        weights = load_file(tmp_path / keep / "pytorch_lora_weights.safetensors")
        found[keep] = metrics["kept_epoch"], any(bool(weight.any()) for weight in weights.values())
    assert found == {"newest": (None, True), "best": (chosen.epoch, False)}
    with pytest.raises(InputError, match="no keep 'all'"):
        methods.check(replace(wanted, keep="all"))


def hand_made(values: list[float | None], excess: float = 0.0) -> dict[str, Any]:
    bins = [[excess] + [0.0] * (CALIBRATION_BINS - 1)] * 2
    return {
        "units": {"judge_accuracy_grid": values, "diversity_judge": [v or 0.0 for v in values]},
        "calibration": {"grid": {"excess": bins, "counts": [4.0, 4.0]}},
        "kernel": {"judge": {"value": (values[0] or 0.0), "halves": [values[0] or 0.0] * 10, "n": 8}},
        "frechet": {"judge": 2.0 * (values[0] or 0.0)},
        "spaces": {"judge": "features of the judge"},
    }


def test_the_aggregate_of_hand_made_runs_is_as_computed_by_hand() -> None:
    baseline = hand_made([0.2, 0.4, None], excess=1.0)
    mine = [hand_made([0.4, 0.6, None], 2.0), hand_made([0.6, 0.8, None], 0.0), hand_made([0.8, 1.0, None], -2.0)]
    looks = ({"epoch": 0, "queries": 0, "forwards": 0, "compute": 0, "judge": 0.1, "reward": 0.0},
             {"epoch": 2, "queries": 4, "forwards": 10, "compute": 20, "judge": 0.4, "reward": 0.0})  # fmt: skip
    runs = {"a": [Run("A", seed, 4, 10 + seed, 6, 1.0, looks, one) for seed, one in enumerate(mine)]}
    real = {"units": {}, "calibration": {}, "kernel": baseline["kernel"], "frechet": baseline["frechet"]}
    found = {f.name: f for f in figures(get_domain("dermatology"), ("hair",), runs, baseline, real)}
    accuracy = found["judge_accuracy_grid"]
    assert accuracy.baseline.value == pytest.approx(0.3)
    assert accuracy.baseline.n == 2
    assert accuracy.aligned["a"].value == pytest.approx((0.5 + 0.7 + 0.9) / 3)
    # A change is by prompt, which it does not depend on here: only the seeds spread it, from 0.2 to 0.6.
    assert accuracy.change["a"].value == pytest.approx(0.4)
    assert 0.199 < accuracy.change["a"].low < 0.4 < accuracy.change["a"].high < 0.601
    ratio = found["diversity_judge"]
    assert ratio.change["a"].value == pytest.approx(0.7 / 0.3, rel=1e-6)
    calibration = found["judge_calibration_grid"]
    assert calibration.baseline.value == pytest.approx(2 / 8)
    assert calibration.aligned["a"].value == pytest.approx(0.0)  # + 2, 0 and - 2 in one bin, pooled over the seeds
    assert calibration.change["a"].value == pytest.approx(-0.25)
    assert found["kernel_distance_judge"].aligned["a"].value == pytest.approx(0.6)
    assert found["frechet_distance_judge"].change["a"].value == pytest.approx(0.8)
    assert found["cost_forwards"].aligned["a"].value == pytest.approx(11)
    points = curve(runs["a"])
    assert [point["queries"] for point in points] == [0, 4]
    assert points[1]["judge_gain"]["value"] == pytest.approx(0.3)


def test_gains_are_compared_at_what_the_thriftiest_method_spent() -> None:
    def run(seed: int, compute: int, judge: float) -> Run:
        looks = tuple(
            {"epoch": e, "queries": 4 * e, "forwards": 1, "compute": compute * e, "judge": judge * e} for e in range(3)
        )
        return Run("A", seed, 8, 1, 1, 1.0, looks, hand_made([0.2]))

    runs = {"slow": [run(s, 40, 0.4) for s in range(3)], "thrifty": [run(s, 10, 0.1) for s in range(3)]}
    nothing = {"units": {}, "calibration": {}, "kernel": hand_made([0.2])["kernel"], "frechet": {"judge": 0.0}}
    found = {f.name: f for f in figures(get_domain("dermatology"), (), runs, hand_made([0.2]), nothing)}
    queries, compute = found["judge_gain_at_equal_queries"], found["judge_gain_at_equal_compute"]
    assert queries.aligned["slow"].value == pytest.approx(0.8)
    assert queries.aligned["thrifty"].value == pytest.approx(0.2)
    # By 20 forwards the slow method is halfway to its first look, at 40.
    assert compute.label.startswith("Judge's margin gained by 20 ")
    assert compute.aligned["slow"].value == pytest.approx(0.2)
    assert compute.aligned["thrifty"].value == pytest.approx(0.2)


def test_intervals_hold_both_the_runs_and_the_prompts() -> None:
    apart = crossed.crossed_mean(np.array([[0.0, 0.0], [0.0, 0.0], [3.0, 3.0]]))
    assert apart.value == 1.0
    assert apart.low == 0.0
    assert apart.high >= 2.0
    units = crossed.crossed_mean(np.tile([0.0, 1.0, np.nan], (3, 1)))
    assert (units.value, units.low, units.high, units.n) == (0.5, 0.0, 1.0, 2)
    same = crossed.crossed_mean(np.ones((3, 4)))
    assert (same.low, same.high) == (1.0, 1.0)
    assert crossed.crossed_mean(np.ones((1, 1))).low is None
    assert crossed.crossed_mean(np.full((2, 2), np.nan)).n == 0
    kernel = crossed.kernel_interval(np.array([1.0, 3.0]), np.array([[1.0] * 50, [3.0] * 50]), 8)
    assert kernel.value == 2.0
    assert (kernel.low, kernel.high) == (1.0, 3.0)
    still = crossed.kernel_interval(np.array([2.0, 2.0]), np.full((2, 50), 2.0), 8)
    assert (still.low, still.high) == (2.0, 2.0)


def test_calibration_from_sums_is_the_library_s() -> None:
    rng = np.random.default_rng(0)
    probabilities, wanted = rng.random((6, 4)), rng.integers(0, 2, (6, 4)).astype(float)
    wanted[::2, 1] = np.nan
    excess, counts = calibration_sums(probabilities, wanted, each=2)
    assert excess.shape == (3, CALIBRATION_BINS)
    assert counts.sum() == np.isfinite(wanted).sum()
    decided = np.isfinite(wanted)
    expected = binary_calibration_error(
        torch.from_numpy(probabilities[decided]), torch.from_numpy(wanted[decided]).long(), n_bins=CALIBRATION_BINS
    )
    error = crossed.calibration_error(excess[None], counts[None])
    assert error(np.ones((1, 1)), np.ones((1, 3)))[0] == pytest.approx(float(expected), abs=1e-6)


def test_the_asked_disease_must_be_the_likeliest() -> None:
    probabilities = np.array([[0.9, 0.2, 0.7], [0.9, 0.95, 0.1], [0.9, 0.1, 0.1]])
    wanted = np.array([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    found = likeliest_is_asked(probabilities, wanted, [0, 1])
    assert found[:2].tolist() == [1.0, 0.0]
    assert np.isnan(found[2])
    assert per_prompt(np.array([1.0, 0.0, np.nan, np.nan]), 2) == [0.5, None]


def test_a_piece_is_made_once_and_again_for_another_identity(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> dict[str, Any]:
        made.append(1)
        return {"value": len(made)}

    path = tmp_path / "deep" / "piece.json"
    assert piece(path, {"weights": "a"}, make) == piece(path, {"weights": "a"}, make) == {"value": 1}
    assert piece(path, {"weights": "b"}, make) == {"value": 2}
    path.write_text("{")
    with pytest.raises(InputError, match=r"piece\.json is damaged"):
        piece(path, {"weights": "b"}, make)


def test_arms_are_rows_or_columns_of_the_table(tmp_path: Path) -> None:
    value = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 7}
    figure = {
        "name": "x", "label": "Accuracy", "group": "alignment", "headline": True, "higher_is_better": True,
        "real": None, "baseline": value, "change_kind": "difference",
        "adapters": {"a": {"value": {**value, "value": 0.7}, "change": {**value, "value": 0.2}}},
    }  # fmt: skip
    cost = {
        **figure,
        "name": "y",
        "label": "Cost",
        "group": "cost",
        "adapters": {"a": {"value": value, "change": None}},
    }
    arms = [{"name": "baseline", "label": "baseline"}, {"name": "a", "label": "A"}, {"name": "b", "label": "B"}]
    report = {
        "format_version": 1, "title": "T", "arms": arms, "rows": "arms", "intervals": "over <seeds>",
        "figures": [figure, cost, {**figure, "name": "z", "label": "Hidden", "headline": False}],
    }  # fmt: skip
    (tmp_path / "methods.json").write_text(json.dumps(report))
    lines = section(read_reports(tmp_path)[0]).splitlines()
    assert "| Alignment | Accuracy ↑, n 7 |" in lines
    assert "| baseline | 0.5 [0.4, 0.6] |" in lines
    assert "| A | 0.7 [0.4, 0.6]; Δ 0.2 [0.4, 0.6] |" in lines
    assert "| A | 0.5 [0.4, 0.6] |" in lines
    assert lines.count("| B | not computed |") == 2
    assert not any("Hidden" in line for line in lines)
    assert any("over &lt;seeds>" in line for line in lines)
    (tmp_path / "methods.json").write_text(json.dumps({**report, "rows": "figures"}))
    lines = section(read_reports(tmp_path)[0]).splitlines()
    assert "| Accuracy ↑ | 0.5 [0.4, 0.6] | 0.7 [0.4, 0.6]; Δ 0.2 [0.4, 0.6] | not computed | 7 |" in lines


def test_the_picture_shows_every_method(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    from train.experiments.picture import draw

    gain = {"value": 0.1, "low": 0.0, "high": 0.2, "n": 3}
    points = [{"queries": q, "compute": 10 * q, "judge_gain": gain} for q in (0, 4)]
    draw({"a": points, "b": points}, [{"name": "a", "label": "A"}, {"name": "b", "label": "B"}], tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width > 1000
