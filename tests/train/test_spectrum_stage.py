"""Gains measured on training captions, shipped with the folder that they were measured for, and drawn through there."""

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from medviz.errors import InputError
from medviz.generation.spectrum import Spectra, Spectrum
from medviz.models.library import ModelLibrary
from medviz.models.manifest import read_manifest
from medviz.results import Preview, Request
from medviz.workbench import compare, load_models
from tests import tiny
from tests.train.test_evaluate_stage import write_split
from train.assemble import Parts, assemble
from train.evaluate.stage import EvaluateConfig
from train.evaluate.stage import run as evaluate
from train.restore import restore
from train.spectrum import SpectrumConfig, joined, main, run, spectrum_of


@pytest.fixture
def parts(model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parts:
    for number, split in enumerate(("train", "validation")):
        write_split(tmp_path / "images" / "dermatology", split, 20, seed=number)
    monkeypatch.setenv("MEDVIZ_DATA", str(tmp_path / "images"))
    folder = shutil.copytree(model_root / "dermatology", tmp_path / "parts")
    few_steps = tiny.add_few_steps(folder, [999, 700, 400])
    settings = json.loads((folder / "vae" / "config.json").read_text())
    # An encoder of random weights makes faint latents, which no gain within bounds would give to what noise draws.
    (folder / "vae" / "config.json").write_text(json.dumps({**settings, "scaling_factor": 100.0}))
    aside = shutil.ignore_patterns("adapters", "rewards", "judge", "segmenter", "features", "*.md", "manifest.json")
    shutil.copytree(folder, tmp_path / "pipeline", ignore=aside)
    recipe = json.loads((few_steps / "adapter.json").read_text()).get("recipe", {})
    card = few_steps / "adapter.json"
    learnt = {"guidance_scale": 2.0, "guidance_interval": [0, 700], "guidance_outside": 0.2}
    card.write_text(json.dumps({**json.loads(card.read_text()), "recipe": {**recipe, **learnt}}))
    return Parts(
        domain="dermatology",
        preset="cpu",
        pipeline=str(tmp_path / "pipeline"),
        autoencoder=str(folder / "vae"),
        features=str(folder / "features") if (folder / "features").is_dir() else "",
        reward=str(folder / "rewards" / "attribute"),
        judge=str(folder / "judge"),
        segmenter=str(folder / "segmenter"),
        guidance_scale=2.0,
        guidance_interval=(0, 700),
        guidance_outside=0.2,
        adapters={tiny.ADAPTER: str(folder / "adapters" / tiny.ADAPTER), "few_steps": str(few_steps)},
        default_adapter=tiny.ADAPTER,
        few_step_adapter="few_steps",
        runs={"spectrum": str(tmp_path / "run")},
        spectrum=str(tmp_path / "run" / "spectra.json"),
    )


@pytest.fixture
def config(parts: Parts, tmp_path: Path) -> SpectrumConfig:
    recipe = tmp_path / "assemble.yaml"
    recipe.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(parts)))))
    return SpectrumConfig(
        out=str(tmp_path / "run"),
        assembly=str(recipe),
        steps=5,
        pictures=6,
        captions=6,
        batch=4,
        report=str(tmp_path / "reports" / "spectrum.json"),
    )


def test_measured_assembled_and_drawn_through(
    config: SpectrumConfig, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medviz.workbench.PREVIEW_EVERY_S", 0)
    monkeypatch.setattr("medviz.workbench.PREVIEW_SHARE", math.inf)
    report = run(config, "python -m train spectrum x.yaml")
    assert json.loads(Path(config.report).read_text()) == report
    assert [arm["label"] for arm in report["arms"]] == [
        f"{steps} steps, {how}" for steps in (5, 3) for how in ("matched", "as drawn")
    ]
    judged = next(f for f in report["figures"] if f["name"] == "kernel_distance_judge")
    values = [judged["baseline"]["value"], *(arm["value"]["value"] for arm in judged["adapters"].values())]
    assert len(set(values)) == 4
    assemble(parts, tmp_path / "models" / "dermatology")
    folder = tmp_path / "models" / "dermatology"
    spectra = Spectra.of_manifest(read_manifest(folder))
    assert spectra.steps != spectra.few_steps
    assert spectra.steps is not None
    assert len(spectra.steps.gains) == tiny.LATENT_CHANNELS
    assert read_manifest(folder).metrics["spectrum"]["pictures"] == 6
    evaluated = EvaluateConfig(
        out=str(tmp_path / "evaluation"),
        domain="dermatology",
        models=str(tmp_path / "models"),
        reports="",
        split="validation",
        steps=5,
        grid_prompts=2,
        seeds_per_prompt=2,
        captions=6,
        batch=4,
        per_class=0,
    )
    models = load_models(ModelLibrary(tmp_path / "models", "cpu"), "dermatology")
    for steps, spectrum in ((3, spectra.few_steps), (5, spectra.steps)):
        request = Request("dermatology", "a dermoscopic image with nevus", 1, steps, 2.0, tiny.ADAPTER)
        previews: list[Preview] = []
        pair = compare(models, request, previews.append, lambda: None)
        plain = compare(replace(models, spectra=Spectra()), request, None, lambda: None)
        assert pair.models["spectrum"] == str(spectrum)
        for side in ("baseline", "aligned"):
            drawn, undone = (np.asarray(getattr(each, side).image) for each in (pair, plain))
            assert not np.array_equal(drawn, undone)
        assert previews[-1].images is not None
        for image, drawing in zip(previews[-1].images, (pair.baseline, pair.aligned), strict=True):
            # Gains change a tenth of a level here, rounding of what is else the same next to nothing.
            assert np.abs(np.asarray(image, int) - np.asarray(drawing.image, int)).mean() < 0.01
    found = next(f for f in evaluate(evaluated)["figures"] if f["name"] == "kernel_distance_judge")
    aligned = found["adapters"][tiny.ADAPTER]["value"]
    np.testing.assert_allclose(aligned["value"], judged["baseline"]["value"], atol=1e-6)
    shutil.rmtree(config.out)
    assert parts.spectrum in restore(parts, folder)
    assert json.loads(Path(parts.spectrum).read_text()) == read_manifest(folder).spectra
    assert not any(parts.spectrum in written for written in restore(parts, folder))


def test_few_steps_alone_may_be_brought_to_many_as_they_were_drawn(config: SpectrumConfig, parts: Parts) -> None:
    report = run(replace(config, to_real=False))
    assert [arm["label"] for arm in report["arms"]] == ["5 steps, as drawn", "3 steps, matched", "3 steps, as drawn"]
    spectra = json.loads(Path(parts.spectrum).read_text())
    assert list(spectra) == ["few_steps"]
    assert report["settings"]["matched_to"] == "pictures in 5 steps"


def test_few_steps_may_draw_more_captions_that_many_steps_are_told_apart_from(
    config: SpectrumConfig, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(replace(config, few_step_pictures=6))
    same = json.loads(Path(parts.spectrum).read_text())
    run(config)
    assert json.loads(Path(parts.spectrum).read_text()) == same
    compared = []

    def watched(drawn: torch.Tensor, wanted: torch.Tensor) -> Spectrum:
        compared.append((drawn, wanted))
        return spectrum_of(drawn, wanted)

    monkeypatch.setattr("train.spectrum.spectrum_of", watched)
    report = run(replace(config, few_step_pictures=16))
    assert report["settings"]["training_images"] == 16
    assert report["settings"]["drawn_in_many_steps"] == 6
    (in_few, real), (in_many, beside) = compared
    assert (len(in_few), len(real), len(in_many)) == (16, 16, 6)
    assert torch.equal(beside, in_few[:6])
    to_few, to_real = spectrum_of(in_many, beside), spectrum_of(in_few, real)
    more = json.loads(Path(parts.spectrum).read_text())
    assert more["few_steps"] == to_real.as_json()
    assert more["steps"] == joined(to_few, to_real).as_json()


def test_a_spectrum_that_was_not_measured_is_asked_for(parts: Parts, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"spectra\.json is missing: the stage spectrum has not finished"):
        assemble(replace(parts, runs={}), tmp_path / "models" / "dermatology")


def test_the_same_command_draws_nothing_again(config: SpectrumConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(config)
    monkeypatch.setattr("train.evaluate.generated.sample", None)
    assert run(config) == first


def test_what_cannot_be_measured_is_refused(config: SpectrumConfig) -> None:
    for name in ("pictures", "captions"):
        with pytest.raises(InputError, match=f"{name} must be at least 2, found 1"):
            run(replace(config, **{name: 1}))
    with pytest.raises(InputError, match="name the assembly recipe"):
        run(replace(config, assembly=""))
    with pytest.raises(InputError, match="name a recipe"):
        main([])
    recipe = Path(config.assembly)
    recipe.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), "few_step_adapter": None}))
    with pytest.raises(InputError, match="has no few-step adapter"):
        run(replace(config, to_real=False))
    with pytest.raises(InputError, match="few_step_pictures needs real images"):
        run(replace(config, few_step_pictures=8))
    recipe.write_text(json.dumps({**yaml.safe_load(recipe.read_text()), "few_step_adapter": "few_steps"}))
    with pytest.raises(InputError, match="few_step_pictures must be 0 or at least 6, found 4"):
        run(replace(config, few_step_pictures=4))
