"""The reinforcement learning benchmark: equal work on every side, honest arithmetic, a report that holds together."""

import importlib.util
import json
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from medviz.domains import get_domain
from medviz.errors import InputError, ModelError
from train.benchmarks import main
from train.benchmarks.rl import benchmark, ours, peer, side, summary
from train.benchmarks.rl.base import write_base
from train.benchmarks.rl.task import Meter, redness

CONFIG = benchmark.RlBenchmark(
    out="", picture="", peer=False, seeds=(3,), epochs=2, warmup=1, images_per_prompt=2, sample_batch=8, batch=8,
    steps=2, threads=1, evaluation_images=2, base_steps=1, compile=False,
)  # fmt: skip
IMAGES, GUIDED = 16, 2
ROWS = {
    "ddpo": 2 * IMAGES * CONFIG.steps * GUIDED,
    "forward": IMAGES * (CONFIG.steps * GUIDED + 3 * 2),
    "draft": IMAGES * (CONFIG.steps * GUIDED + GUIDED),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "base"
    domain = get_domain(benchmark.DOMAIN)
    write_base(folder, domain, domain.sheet_prompts(), steps=1, seed=0)
    return folder


def work(base, method, **options):
    config = replace(CONFIG, peer=True)
    return replace(next(w for w in benchmark.works(config, str(base), 3) if w.method == method), **options)


def in_this_program(asked, folder, python, program="side"):
    assert program == "side"
    request, answer = folder / "request.json", folder / "answer.json"
    request.write_text(json.dumps(asdict(asked)))
    side.main([str(request), str(answer)])
    return json.loads(answer.read_text())


def test_the_command_reports_both_methods_with_their_costs(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "run_side", in_this_program)
    drawn = importlib.util.find_spec("matplotlib") is not None
    options = {**vars(CONFIG), "out": tmp_path / "bench.json", "picture": tmp_path / "bench.png" if drawn else ""}
    for name in ("peer", "seeds", "compile", "noise_weighted"):
        del options[name]
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    main(["rl", "--no-peer", "--no-compile", "--seeds", "3", "4", *flags])
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["command"].startswith("python -m train bench rl --no-peer --no-compile --seeds 3 4")
    assert found["against_peer"] is None
    assert found["versions"]["ddpo"]["torch"] == torch.__version__
    for name, rows in ROWS.items():
        method = found["methods"][name]
        assert [point["queries"] for point in method["curve"]] == [0, IMAGES, 2 * IMAGES]
        assert [point["unet_rows"] for point in method["curve"]] == [0, rows, 2 * rows]
        assert method["unet_rows_per_image"]["value"] == rows / IMAGES
        assert method["images_per_s"]["n"] == method["curve"][0]["reward"]["n"] == 2
        assert 0 < method["peak_mib"]["value"] < 2**20
    # All start as the base: the first look is at the same images.
    first = [found["methods"][name]["curve"][0]["reward"] for name in ROWS]
    assert first[0] == first[1] == first[2]
    assert found["methods"]["ddpo"]["curve"][2]["reward"] != first[0]
    assert [(e["method"], e["reference"]) for e in found["efficiency"]] == [("forward", "ddpo"), ("draft", "ddpo")]
    assert (tmp_path / "bench.png").is_file() == drawn


def test_the_peer_is_asked_for_the_prompts_that_our_learner_draws(base):
    asked = work(base, "ddpo", prompts_per_epoch=3)
    made = ours.learner(asked)
    for epoch in (0, 1):
        drawn = [made.table.prompts[i] for i in made.draw(epoch).prompt_ids]
        assert drawn == asked.asked(epoch)
    assert asked.asked(0) != asked.asked(1)


def test_the_peer_refuses_work_it_cannot_do_equally(base):
    equal = peer.options(work(base, "trl", images_per_prompt=4, sample_batch=32, batch=16))
    assert equal["sample_num_batches_per_epoch"] * equal["sample_batch_size"] == 32
    assert equal["train_gradient_accumulation_steps"] * equal["train_batch_size"] * 2 == 32  # two updates an epoch
    with pytest.raises(InputError, match="rank is 8"):
        peer.options(work(base, "trl", rank=8))
    with pytest.raises(InputError, match="whole batches"):
        peer.options(work(base, "trl", batch=12))
    with pytest.raises(InputError, match="sample_batch is 4"):
        peer.options(work(base, "trl", sample_batch=4))


def test_trl_does_the_same_work_from_the_same_start(base, tmp_path):
    pytest.importorskip("trl")
    theirs = benchmark.run_side(work(base, "trl"), tmp_path, sys.executable)
    mine = in_this_program(work(base, "ddpo"), tmp_path, "")
    assert theirs["looks"][0]["reward"] == pytest.approx(mine["looks"][0]["reward"], abs=1e-5)
    for epoch in (0, 1):
        for count in ("sample_rows", "train_rows", "rows_with_gradient"):
            assert theirs["epochs"][epoch][count] == mine["epochs"][epoch][count]
    assert theirs["looks"][2]["reward"] != theirs["looks"][0]["reward"]
    assert theirs["versions"]["trl"] == "0.23.1"


def test_trl_and_ours_make_the_same_of_the_same_images(base, tmp_path):
    pytest.importorskip("trl")
    config = replace(CONFIG, peer=True, steps=4)
    found = benchmark.run_parity(config, benchmark.works(config, str(base), 3), tmp_path)
    assert found["log_probs"] < 1e-5
    assert found["advantages"] < 1e-5
    assert len(found["gradients"]) == 2
    assert max(found["gradients"]) < 1e-3
    assert found["clipped"][0] == 0 < found["clipped"][1]


def test_without_a_peer_beside_us_there_is_no_parity(base, tmp_path):
    assert benchmark.run_parity(CONFIG, [], tmp_path) is None
    assert benchmark.run_parity(replace(CONFIG, peer=True, peer_python="python"), [], tmp_path) is None


def test_a_side_that_fails_says_why(base, tmp_path):
    with pytest.raises(ModelError, match=r"grpo on seed 3 failed(?s:.*)no side for 'grpo'"):
        benchmark.run_side(replace(work(base, "ddpo"), method="grpo"), tmp_path, sys.executable)


def test_a_phase_inside_another_is_counted_once():
    layer = torch.nn.Linear(2, 2)
    meter = Meter(layer)
    with meter.phase("train"):
        layer(torch.zeros(3, 2))
        with meter.phase("sample"), torch.no_grad():
            layer(torch.zeros(5, 2))
        layer(torch.zeros(1, 2))
    with meter.phase("look"):
        layer(torch.zeros(9, 2))
    wall = meter.wall_s["train"] + meter.wall_s["sample"]
    lap = meter.lap()
    assert (lap["train_rows"], lap["sample_rows"], lap["rows_with_gradient"]) == (4, 5, 4)
    assert lap["train_s"] + lap["sample_s"] == pytest.approx(wall)
    assert meter.lap()["train_rows"] == 0


def test_redness_knows_red_from_grey():
    red, grey = torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.5)
    red[:, 0] = 1.0
    assert redness(torch.cat([red, grey, 1 - red])).tolist() == [1.0, 0.0, -1.0]


def answer(rewards, seconds=1.0, peak=100):
    epoch = {
        "sample_s": seconds / 4, "train_s": 3 * seconds / 4, "sample_cpu_s": seconds, "train_cpu_s": seconds,
        "sample_rows": 10, "train_rows": 30, "rows_with_gradient": 30, "reward": 0.0,
    }  # fmt: skip
    looks = [{"reward": r, "diversity": 1.0} for r in rewards]
    epochs = [epoch | {"sample_s": 99.0} if i == 0 else epoch for i in range(len(rewards) - 1)]
    return {"looks": looks, "epochs": epochs, "peak_bytes": peak * 2**20, "ready_bytes": 2**20}


def test_the_warm_up_is_left_out_of_the_speed():
    found = summary.speed(answer([0.0, 0.1, 0.2], seconds=2.0), images=8, warmup=1)
    assert found["images_per_s"] == pytest.approx(4.0)
    assert found["unet_rows_per_s"] == pytest.approx(20.0)
    assert found["peak_over_imports_mib"] == 99
    # The first epoch lasted 99 s and more: its seconds are those of the others in what a method spends, too.
    assert summary.spent(answer([0.0, 0.1, 0.2], seconds=2.0), images=8, warmup=1)["seconds"].tolist() == [0, 2, 4]


def test_the_reference_is_charged_to_its_own_first_look_at_the_score():
    answers = {
        "ddpo": [answer([0.0, 0.2, 0.5, 0.6, 0.5]), answer([0.0, 0.2, 0.3, 0.4, 0.5])],
        "forward": [answer([0.0, 0.7, 0.8, 0.8, 0.8]), answer([0.0, 0.1, 0.1, 0.1, 0.4])],
    }
    found = summary.efficiency(answers, "forward", "ddpo", images=8, warmup=0)
    assert (found["reached"], found["n"]) == (1, 2)
    assert found["queries_ratio"]["value"] == pytest.approx(8 / 16)  # of the one seed that reached it
    assert found["unet_rows"]["value"] == 40
    assert found["reference_queries"]["value"] == np.mean([16, 32])


def test_a_ratio_to_the_peer_pairs_the_seeds():
    answers = {
        "trl": [answer([0.0, 0.1, 0.2], seconds=s) for s in (2.0, 4.0)],
        "ddpo": [answer([0.0, 0.2, 0.3], seconds=s) for s in (1.0, 2.0)],
        "forward": [answer([0.0, 0.3, 0.4]) for _ in range(2)],
    }
    found = summary.summary(answers, images=8, warmup=1)
    assert found["against_peer"]["images_per_s_ratio"]["value"] == pytest.approx(2.0)
    assert found["against_peer"]["final_reward_difference"]["value"] == pytest.approx(0.1)
    assert [e["reference"] for e in found["efficiency"]] == ["ddpo", "trl"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"seeds": ()}, "seeds must differ"),
        ({"seeds": (1, 1)}, "seeds must differ"),
        ({"warmup": 2}, "warmup is 2; allowed are 0 to 1"),
        ({"threads": 0}, "threads is 0"),
        ({"evaluation_images": 1}, "evaluation_images is 1"),
        ({"peer": True, "peer_python": "/nowhere/python"}, "cannot run the interpreter"),
    ],
)
def test_what_leaves_nothing_to_measure_is_refused(options, complaint):
    with pytest.raises(InputError, match=complaint):
        benchmark.check(replace(CONFIG, **options))


def test_a_missing_peer_names_the_ways_out(monkeypatch):
    monkeypatch.setattr(benchmark, "PEER", "no_such_library")
    with pytest.raises(InputError, match="--peer-python"):
        benchmark.check(replace(CONFIG, peer=True))


def test_methods_take_turns_in_going_first():
    config = replace(CONFIG, peer=True, seeds=(5, 6, 7))
    first = [benchmark.works(config, "", seed)[0].method for seed in config.seeds]
    assert first == ["trl", "ddpo", "forward"]
