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
from medviz.generation.spectrum import Spectra
from medviz.models.library import ModelLibrary
from medviz.models.manifest import read_manifest
from medviz.results import Preview, Request
from medviz.workbench import compare, load_models
from tests import tiny
from tests.train.test_evaluate_stage import write_split
from train.assemble import Parts, assemble
from train.restore import restore
from train.spectrum import SpectrumConfig, main, run, spectrum_of


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
        batch=4,
    )


def test_measured_assembled_and_drawn_through(
    config: SpectrumConfig, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medviz.workbench.PREVIEW_EVERY_S", 0)
    monkeypatch.setattr("medviz.workbench.PREVIEW_SHARE", math.inf)
    metrics = run(config)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
    assemble(parts, tmp_path / "models" / "dermatology")
    folder = tmp_path / "models" / "dermatology"
    spectra = Spectra.of_manifest(read_manifest(folder))
    assert spectra.steps is None
    assert spectra.few_steps is not None
    assert len(spectra.few_steps.gains) == tiny.LATENT_CHANNELS
    assert read_manifest(folder).metrics["spectrum"]["pictures"] == 6
    models = load_models(ModelLibrary(tmp_path / "models", "cpu"), "dermatology")
    request = Request("dermatology", "a dermoscopic image with nevus", 1, 3, 2.0, tiny.ADAPTER)
    previews: list[Preview] = []
    pair = compare(models, request, previews.append, lambda: None)
    plain = compare(replace(models, spectra=Spectra()), request, None, lambda: None)
    assert pair.models["spectrum"] == str(spectra.few_steps)
    for side in ("baseline", "aligned"):
        drawn, undone = (np.asarray(getattr(each, side).image) for each in (pair, plain))
        assert not np.array_equal(drawn, undone)
    assert previews[-1].images is not None
    for image, drawing in zip(previews[-1].images, (pair.baseline, pair.aligned), strict=True):
        # Gains change a tenth of a level here, rounding of what is else the same next to nothing.
        assert np.abs(np.asarray(image, int) - np.asarray(drawing.image, int)).mean() < 0.01
    many = replace(request, steps=5)
    assert compare(models, many, None, lambda: None).models.get("spectrum", "None") in ("None", None, "")
    shutil.rmtree(config.out)
    assert parts.spectrum in restore(parts, folder)
    assert json.loads(Path(parts.spectrum).read_text()) == read_manifest(folder).spectra
    assert not any(parts.spectrum in written for written in restore(parts, folder))


def test_gains_bring_power_and_mean_to_what_is_wanted() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(64, 2, 16, 16, generator=generator)
    drawn = 0.5 * torch.randn(64, 2, 16, 16, generator=generator) + 0.3
    found = spectrum_of(drawn, wanted)
    assert np.mean(found.gains) == pytest.approx(2.0, rel=0.1)
    assert found.offsets == pytest.approx((wanted - drawn).mean(dim=(0, 2, 3)).tolist(), abs=1e-6)
    same = spectrum_of(wanted, wanted)
    assert np.array(same.gains) == pytest.approx(1.0)
    assert same.offsets == (0.0, 0.0)


def test_a_spectrum_that_was_not_measured_is_asked_for(parts: Parts, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"spectra\.json is missing: the stage spectrum has not finished"):
        assemble(replace(parts, runs={}), tmp_path / "models" / "dermatology")


def test_the_same_command_draws_nothing_again(config: SpectrumConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(config)
    monkeypatch.setattr("train.evaluate.generated.sample", None)
    assert run(config) == first


def test_what_cannot_be_measured_is_refused(config: SpectrumConfig) -> None:
    with pytest.raises(InputError, match="pictures must be at least 2, found 1"):
        run(replace(config, pictures=1))
    with pytest.raises(InputError, match="name the assembly recipe"):
        run(replace(config, assembly=""))
    with pytest.raises(InputError, match="name a recipe"):
        main([])
    recipe = Path(config.assembly)
    recipe.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), "few_step_adapter": None}))
    with pytest.raises(InputError, match="has no few-step adapter"):
        run(config)
