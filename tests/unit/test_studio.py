"""The use cases on tiny models: what is asked is checked first, drawn once, measured, and the same every time."""

import json
import math
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medviz import Cancelled, InputError, ModelError, Studio, workbench
from medviz.limits import MAX_PROMPT_CHARS
from medviz.models import library
from medviz.models.adapters import zero_adapter
from medviz.ui.generate import adapter_choices, steps_info
from medviz.workbench import brightest_box
from tests.dicoms import dicom, ramp
from tests.tiny import ADAPTER, IMAGE_SIZE_PX, add_few_steps

PROMPTS = {
    "dermatology": "a dermoscopic image with melanoma (MEL) showing hair, ruler",
    "radiology": "a frontal chest X-ray of a woman, cardiomegaly, pleural effusion, PA view",
}
STEPS = 2


@pytest.fixture(scope="module")
def studio(model_root: Path) -> Studio:
    return Studio(model_root, device="cpu")


@pytest.fixture(scope="module", params=sorted(PROMPTS))
def pair(request: pytest.FixtureRequest, studio: Studio):
    return studio.compare(request.param, PROMPTS[request.param], seed=1, steps=STEPS)


def upload(width: int = 96, height: int = 64) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([rows * 2, columns * 2, rows + columns], -1).astype(np.uint8))


def test_a_pair_holds_two_different_images_of_the_models_size(pair) -> None:
    sizes = {drawing.image.size for drawing in (pair.baseline, pair.aligned)}
    assert sizes == {(IMAGE_SIZE_PX, IMAGE_SIZE_PX)}
    assert pair.baseline.image.mode == "RGB"
    assert pair.baseline.image.tobytes() != pair.aligned.image.tobytes()
    assert pair.adapter == ADAPTER


def test_the_report_is_the_documented_json(pair) -> None:
    report = json.loads(json.dumps(pair.report(), allow_nan=False))
    assert set(report) == {
        "domain", "prompt", "seed", "steps", "guidance_scale", "adapter",
        "models", "words", "scores", "warnings", "timings_s",
    }  # fmt: skip
    assert report["prompt"] == PROMPTS[pair.domain]
    assert {row["role"] for row in report["scores"]} == {"reward", "judge"}
    assert all(set(row) == {"name", "role", "baseline", "aligned", "higher_is_better"} for row in report["scores"])
    assert len(report["models"]["unet"]) == 64
    assert "guidance_interval" not in report["models"]  # these models guide throughout
    assert report["models"][f"adapters/{ADAPTER}"] != report["models"]["unet"]


def test_every_word_has_attention_on_one_scale(pair) -> None:
    assert len(pair.words) >= 2
    for word in pair.words:
        look = pair.attention(word)
        for heat_map in (look.baseline, look.aligned):
            assert heat_map.shape == (IMAGE_SIZE_PX, IMAGE_SIZE_PX)
            assert heat_map.dtype == np.float32
        assert min(look.baseline.min(), look.aligned.min()) == 0.0
        assert max(look.baseline.max(), look.aligned.max()) == 1.0


def test_words_differ_in_where_they_look(pair) -> None:
    first, second = (pair.attention(word).baseline for word in pair.words[:2])
    assert np.abs(first - second).max() > 0.05


def test_a_word_that_is_not_in_the_prompt_is_refused(pair) -> None:
    with pytest.raises(InputError, match="not in the prompt"):
        pair.attention("nonsense")


@pytest.mark.parametrize("domain", sorted(PROMPTS))
def test_the_same_call_gives_the_same_bits_without_the_cache(model_root: Path, studio: Studio, domain: str) -> None:
    fresh = Studio(model_root, device="cpu", cached_pairs=0)
    fresh._models, fresh._library = studio._models, studio._library
    first, second = (fresh.compare(domain, PROMPTS[domain], seed=7, steps=STEPS) for _ in range(2))
    assert first is not second
    assert first.baseline.image.tobytes() == second.baseline.image.tobytes()
    assert first.aligned.image.tobytes() == second.aligned.image.tobytes()
    assert np.array_equal(first.attention(first.words[0]).aligned, second.attention(second.words[0]).aligned)
    assert first.scores == second.scores


def test_a_pair_that_was_just_compared_is_kept_and_old_ones_go(studio: Studio, model_root: Path) -> None:
    fresh = Studio(model_root, device="cpu", cached_pairs=2)
    fresh._models, fresh._library = studio._models, studio._library
    ask = [fresh.compare("dermatology", PROMPTS["dermatology"], seed=seed, steps=1) for seed in (1, 2, 3)]
    assert fresh.compare("dermatology", PROMPTS["dermatology"], seed=3, steps=1).timings_s == ask[2].timings_s
    assert fresh.compare("dermatology", PROMPTS["dermatology"], seed=1, steps=1).timings_s is not ask[0].timings_s
    kept, look = fresh.attention("dermatology", PROMPTS["dermatology"], 3, "Hair", steps=1)
    assert kept.baseline.image.tobytes() == ask[2].baseline.image.tobytes()
    assert np.array_equal(look.baseline, ask[2].attention("hair").baseline)


def test_what_a_caller_does_to_a_pair_changes_no_later_answer(studio: Studio, model_root: Path) -> None:
    fresh = Studio(model_root, device="cpu")
    fresh._models, fresh._library = studio._models, studio._library
    ask = lambda: fresh.compare("dermatology", PROMPTS["dermatology"], seed=4, steps=1)  # noqa: E731
    first = ask()
    pixels, report = first.baseline.image.tobytes(), json.dumps(first.report())
    for pair in (first, ask()):
        pair.baseline.image.paste(0, (0, 0, IMAGE_SIZE_PX, IMAGE_SIZE_PX))
        for mask in pair.baseline.outlines.values():
            mask[:] = True
        pair.models.clear()
        pair.timings_s["total"] = 0.0
    again = ask()
    assert again.baseline.image.tobytes() == pixels
    assert json.dumps(again.report()) == report


def test_loading_models_leaves_the_callers_random_state_alone(model_root: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    Studio(model_root, device="cpu").warm_up()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_damaged_domain_leaves_the_other_warm(
    model_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = shutil.copytree(model_root, tmp_path / "models")
    damaged = root / "dermatology" / "unet" / "diffusion_pytorch_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    studio = Studio(root, device="cpu")
    studio.warm_up()
    assert set(studio._models) == {"radiology"}
    assert str(damaged) in caplog.text
    with pytest.raises(ModelError):
        studio.compare("dermatology", PROMPTS["dermatology"], 1, steps=1)


def test_attention_stops_at_the_next_step_and_scoring_before_its_turn(studio: Studio) -> None:
    asked = []

    def after_three() -> bool:
        asked.append(None)
        return len(asked) > 3

    with pytest.raises(Cancelled):
        studio.attention("dermatology", PROMPTS["dermatology"], 77, "hair", steps=50, cancelled=after_three)
    assert len(asked) == 4
    with pytest.raises(Cancelled):
        studio.score("dermatology", upload(), PROMPTS["dermatology"], cancelled=lambda: True)


def test_seed_prompt_and_guidance_change_the_image(studio: Studio) -> None:
    ask = lambda **changed: studio.compare(  # noqa: E731
        **{"domain": "dermatology", "prompt": PROMPTS["dermatology"], "seed": 1, "steps": STEPS, **changed}
    ).baseline.image.tobytes()
    images = {ask(), ask(seed=2), ask(prompt="a dermoscopic image with nevus (NV)"), ask(guidance_scale=9.0)}
    assert len(images) == 4


@pytest.fixture(scope="module")
def fast(model_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """A studio whose dermatology can draw in two steps."""
    root = tmp_path_factory.mktemp("fast")
    folder = shutil.copytree(model_root / "dermatology", root / "dermatology")
    add_few_steps(folder, [999, 400])
    return Studio(root, device="cpu")


def test_a_number_of_steps_asks_for_the_adapter_that_learnt_to_draw_in_them(studio: Studio, fast: Studio) -> None:
    prompt = PROMPTS["dermatology"]
    plain, quick = (s.compare("dermatology", prompt, 1, steps=2) for s in (studio, fast))
    for side in ("baseline", "aligned"):
        assert getattr(plain, side).image.tobytes() != getattr(quick, side).image.tobytes()
    assert quick.baseline.image.tobytes() != quick.aligned.image.tobytes()
    assert {"adapters/attribute", "adapters/few_steps"} <= quick.report()["models"].keys()
    assert "adapters/few_steps" not in plain.report()["models"]
    assert any(warning.startswith("Drawn in 2 steps") for warning in quick.warnings)
    (drawn,) = fast.generate("dermatology", [prompt], [1], steps=2)
    assert np.abs(np.asarray(drawn, int) - np.asarray(quick.aligned.image, int)).max() <= 1
    # other steps, or another guidance than the adapter learnt, are the solver's as before
    for asked in ({"steps": 3}, {"steps": 2, "guidance_scale": 1.5}):
        one, other = (s.compare("dermatology", prompt, 1, **asked) for s in (studio, fast))
        assert one.baseline.image.tobytes() == other.baseline.image.tobytes()


def test_the_adapter_finishes_other_numbers_of_steps_where_the_folder_says_so(model_root, studio, tmp_path) -> None:
    prompt, seen = PROMPTS["dermatology"], []
    add_few_steps(shutil.copytree(model_root / "dermatology", tmp_path / "dermatology"), [999, 700, 400], finish=2)
    finishing = Studio(tmp_path, device="cpu")
    pair = finishing.compare("dermatology", prompt, 1, steps=10, on_preview=seen.append)
    plain = studio.compare("dermatology", prompt, 1, steps=10)
    assert [(preview.step, preview.steps) for preview in seen] == [(step, 5) for step in range(1, 6)]
    assert pair.baseline.image.tobytes() != plain.baseline.image.tobytes()
    assert pair.baseline.image.tobytes() != pair.aligned.image.tobytes()
    assert "adapters/few_steps" in pair.report()["models"]
    assert steps_info(finishing, "dermatology").endswith("the last of them are merged into 2.")
    assert "merged" not in steps_info(studio, "dermatology")
    (drawn,) = finishing.generate("dermatology", [prompt], [1], steps=10)
    assert np.abs(np.asarray(drawn, int) - np.asarray(pair.aligned.image, int)).max() <= 1
    one, other = (s.compare("dermatology", prompt, 1, steps=10, guidance_scale=1.5) for s in (studio, finishing))
    assert one.baseline.image.tobytes() == other.baseline.image.tobytes()


def test_the_few_step_adapter_is_no_choice_of_its_own(fast: Studio) -> None:
    assert "few_steps" not in [value for _, value in adapter_choices(fast, "dermatology")]
    with pytest.raises(InputError, match="unknown adapter 'few_steps'; allowed: attribute, none"):
        fast.compare("dermatology", PROMPTS["dermatology"], 1, adapter="few_steps")


def test_without_an_adapter_both_sides_are_the_baseline(studio: Studio) -> None:
    with_adapter = studio.compare("dermatology", PROMPTS["dermatology"], 1, STEPS)
    for adapter in (None, "none"):
        alone = studio.compare("dermatology", PROMPTS["dermatology"], 1, STEPS, adapter=adapter)
        assert alone.aligned.image.tobytes() == alone.baseline.image.tobytes()
        # one row in a pass, not two: the same but for rounding
        beside = (np.asarray(found.baseline.image, int) for found in (alone, with_adapter))
        assert np.abs(np.subtract(*beside)).max() <= 1
        assert alone.report()["adapter"] == "none"
        assert any("baseline" in warning for warning in alone.warnings)


def test_an_adapter_of_zeros_changes_no_bit(model_root: Path) -> None:
    studio = Studio(model_root, device="cpu")
    before = studio.compare("radiology", PROMPTS["radiology"], 3, STEPS)
    zero_adapter(studio._models["radiology"].loaded.pipeline.unet, ADAPTER)
    zeroed = studio.compare("radiology", PROMPTS["radiology"], 3, STEPS, guidance_scale=3.5)
    assert before.baseline.image.tobytes() != before.aligned.image.tobytes()
    assert zeroed.baseline.image.tobytes() == zeroed.aligned.image.tobytes()


def test_unknown_and_truncated_words_are_warned_of(studio: Studio) -> None:
    unknown = studio.compare("dermatology", "a dermoscopic image with melanoma (MEL) on a quokka", 1, 1)
    assert any("quokka" in warning for warning in unknown.warnings)
    long = "a dermoscopic image with melanoma (MEL), " + "with pigment network, " * 15 + "showing hair"
    cut = studio.compare("dermatology", long, 1, 1)
    assert any("Not read:" in warning for warning in cut.warnings)
    assert "hair" not in cut.words
    with pytest.raises(InputError, match="cut off"):
        cut.attention("hair")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"domain": "cardiology"}, "dermatology, radiology"),
        ({"prompt": ""}, "empty"),
        ({"prompt": "x" * (MAX_PROMPT_CHARS + 1)}, str(MAX_PROMPT_CHARS)),
        ({"prompt": None}, "text"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "whole number"),
        ({"seed": True}, "whole number"),
        ({"steps": 0}, "steps"),
        ({"steps": 51}, "50"),
        ({"guidance_scale": float("nan")}, "guidance"),
        ({"guidance_scale": "3"}, "guidance"),
        ({"adapter": "../../etc"}, ADAPTER),
        ({"adapter": 3}, ADAPTER),
    ],
)
def test_bad_requests_are_refused_before_any_model_is_loaded(model_root: Path, changed: dict, said: str) -> None:
    studio = Studio(model_root, device="cpu")
    asked = {"domain": "dermatology", "prompt": PROMPTS["dermatology"], "seed": 1, "steps": 1, **changed}
    with pytest.raises(InputError, match=said):
        studio.compare(**asked)
    assert studio._models == {}
    assert studio._library is None


def test_a_word_outside_the_prompt_is_refused_before_any_model_is_loaded(model_root: Path) -> None:
    studio = Studio(model_root, device="cpu")
    with pytest.raises(InputError, match="not in the prompt"):
        studio.attention("dermatology", PROMPTS["dermatology"], 1, "ink")
    assert studio._models == {}


def test_a_missing_model_folder_is_an_error_with_a_name(tmp_path: Path) -> None:
    studio = Studio(tmp_path)
    assert studio.domains() == ()
    with pytest.raises(ModelError, match="missing"):
        studio.compare("dermatology", PROMPTS["dermatology"], 1)


def test_every_step_is_reported_and_a_request_can_be_taken_back(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    with monkeypatch.context() as patched:
        patched.setattr("medviz.workbench.PREVIEW_EVERY_S", 0)
        patched.setattr("medviz.workbench.PREVIEW_SHARE", math.inf)
        pair = studio.compare("dermatology", PROMPTS["dermatology"], 11, 3, on_preview=seen.append)
    assert [(step.step, step.steps) for step in seen] == [(1, 3), (2, 3), (3, 3)]
    for image, drawing in zip(seen[-1].images, (pair.baseline, pair.aligned), strict=True):
        assert np.abs(np.asarray(image, int) - np.asarray(drawing.image, int)).max() <= 1
    seen.clear()
    with monkeypatch.context() as patched:
        patched.setattr("medviz.workbench.PREVIEW_EVERY_S", 100)  # the finished images come long before
        studio.compare("dermatology", PROMPTS["dermatology"], 14, 3, on_preview=seen.append)
    assert [step.images for step in seen] == [None, None, None]
    steps: list[int] = []
    with pytest.raises(Cancelled):
        studio.compare(
            "dermatology",
            PROMPTS["dermatology"],
            12,
            9,
            on_preview=lambda step: steps.append(step.step),
            cancelled=lambda: len(steps) >= 2,
        )
    assert len(steps) == 2
    assert studio.compare("dermatology", PROMPTS["dermatology"], 12, 1).baseline.image.size[0] == IMAGE_SIZE_PX


def test_a_request_has_a_time_limit(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medviz.studio.MAX_REQUEST_S", -1)
    with pytest.raises(Cancelled, match="fewer steps"):
        studio.compare("dermatology", PROMPTS["dermatology"], 13, 1)


def test_requests_from_several_threads_give_what_one_gives(studio: Studio) -> None:
    alone = {
        adapter: studio.generate("dermatology", [PROMPTS["dermatology"]], [5], adapter, 2)[0].tobytes()
        for adapter in ("", None)
    }
    found: list[tuple[str | None, bytes]] = []

    def ask(adapter: str | None) -> None:
        image = studio.generate("dermatology", [PROMPTS["dermatology"]], [5], adapter, 2)[0]
        found.append((adapter, image.tobytes()))

    threads = [threading.Thread(target=ask, args=(adapter,)) for adapter in ("", None, "", None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(image == alone[adapter] for adapter, image in found)


def test_whoever_waits_for_the_models_can_go(studio: Studio) -> None:
    with studio._turns["dermatology"], pytest.raises(Cancelled):
        studio.compare("dermatology", PROMPTS["dermatology"], 14, 1, cancelled=lambda: True)


def test_domains_are_loaded_one_after_the_other(model_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What reads a network patches torch for the whole process meanwhile: two at once leave it broken.
    inside, most = [0], [0]

    def counted(load):
        def slow(*arguments):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.1)
            found = load(*arguments)
            inside[0] -= 1
            return found

        return slow

    monkeypatch.setattr(library, "_load_pipeline", counted(library._load_pipeline))
    monkeypatch.setattr(workbench.Segmenter, "load", counted(workbench.Segmenter.load))
    fresh = Studio(model_root, device="cpu")
    requests = [threading.Thread(target=fresh.generate, args=(name, [PROMPTS[name]], [1], "", 1)) for name in PROMPTS]
    for request in requests:
        request.start()
    for request in requests:
        request.join()
    assert most == [1]


def test_a_batch_draws_each_prompt_and_seed_with_the_adapter_asked_for(studio: Studio) -> None:
    prompts, seeds = [PROMPTS["radiology"]] * 3, [1, 2, 1]
    aligned = studio.generate("radiology", prompts, seeds, "", STEPS, batch_size=3)
    assert aligned[0].tobytes() == aligned[2].tobytes()
    assert aligned[0].tobytes() != aligned[1].tobytes()
    pair = studio.compare("radiology", PROMPTS["radiology"], 1, STEPS)
    gap = np.abs(np.asarray(aligned[0]).astype(int) - np.asarray(pair.aligned.image).astype(int))
    assert gap.max() <= 1, "a batch rounds in another order, no more"
    assert studio.generate("radiology", [], []) == []
    with pytest.raises(InputError, match="one length"):
        studio.generate("radiology", prompts, [1])


def test_an_image_is_scored_by_reward_and_judge(studio: Studio) -> None:
    scores = studio.score("dermatology", upload(), PROMPTS["dermatology"])
    assert {score.role for score in scores} == {"reward", "judge"}
    assert all(score.aligned is None for score in scores)
    assert any(score.baseline is not None for score in scores)


def test_grounding_answers_on_the_images_own_grid(studio: Studio) -> None:
    image = upload(96, 64)
    found = studio.ground("dermatology", image, "melanoma")
    assert found.heat_map.shape == (64, 96)
    assert found.heat_map.dtype == np.float32
    assert found.heat_map[:, :14].max() == 0, "outside the central square nothing was looked at"
    assert found.heat_map.max() == pytest.approx(1.0, abs=0.05)
    x0, y0, x1, y1 = found.box
    assert 16 <= x0 < x1 <= 80
    assert 0 <= y0 < y1 <= 64
    assert any("central square" in warning for warning in found.warnings)
    assert set(found.report()) == {"phrase", "words", "regions", "box", "warnings"}
    for region in found.regions:
        assert set(region) == {"name", "mass", "cnr", "prior_mass", "prior_cnr"}
    again = studio.ground("dermatology", image, "melanoma")
    assert np.array_equal(found.heat_map, again.heat_map)


def test_a_window_of_a_dicom_file_that_cannot_be_used_is_among_the_warnings(studio: Studio) -> None:
    content = dicom(ramp(rows=64, columns=64), WindowCenter=100, WindowWidth=0)
    with pytest.warns(UserWarning, match="width 0"):
        found = studio.ground("radiology", content, "lung opacity")
    assert any("centre 100.0, width 0.0" in warning for warning in found.warnings)


def test_phrases_are_looked_for_with_the_adapter_made_for_it(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    image, manifest = upload(), studio.manifest("radiology")
    named, bare = (studio.ground("radiology", image, "lung opacity", name) for name in (ADAPTER, None))
    assert (named.adapter, bare.adapter) == (ADAPTER, None)
    assert not np.array_equal(named.heat_map, bare.heat_map)
    fits = {"default_adapter": None, "grounding_adapter": ADAPTER}
    monkeypatch.setattr(Studio, "manifest", lambda self, domain: replace(manifest, **fits))
    assert np.array_equal(studio.ground("radiology", image, "lung opacity").heat_map, named.heat_map)
    assert studio.ground("radiology", image, "lung opacity", adapter=None).adapter is None
    labels = {value: label for label, value in adapter_choices(studio, "radiology", grounding=True)}
    assert labels[""].endswith("(default)")
    assert not adapter_choices(studio, "radiology")[0][0].endswith("(default)")


def test_grounding_depends_on_the_phrase_and_refuses_what_is_no_image(studio: Studio) -> None:
    image = upload(64, 64)
    hair, ruler = (studio.ground("dermatology", image, phrase).heat_map for phrase in ("hair", "ruler"))
    assert np.abs(hair - ruler).max() > 0.01
    with pytest.raises(InputError, match="image"):
        studio.ground("dermatology", b"no image at all", "hair")
    with pytest.raises(InputError, match="adapter"):
        studio.ground("dermatology", image, "hair", adapter="nobody")


def test_the_largest_bright_part_is_boxed() -> None:
    heat_map = np.zeros((20, 30), np.float32)
    heat_map[2:4, 2:4] = 1.0
    heat_map[10:16, 12:25] = 0.8
    heat_map[18, 28] = 0.4
    assert brightest_box(heat_map, 0.5) == (12, 10, 25, 16)
    assert brightest_box(np.zeros((4, 4), np.float32), 0.5) is None
