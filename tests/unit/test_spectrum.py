"""Gains by spatial frequency: what they change, what they leave, and which of a folder's a drawing goes through."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from medviz.errors import ModelError
from medviz.generation.plan import FewSteps
from medviz.generation.sampling import sample
from medviz.generation.spectrum import Spectra, Spectrum, radius
from medviz.models.manifest import Manifest
from tests.tiny import LATENT_CHANNELS, make_pipeline
from train.spectrum import band_power, spectrum_of

FLAT = Spectrum((0.1, 0.5), ((1.0, 1.0), (1.0, 1.0)), (0.0, 0.0))


def wave(cycles: int, side: int = 16) -> torch.Tensor:
    """(1, 2, side, side): one cosine along the rows, in both channels."""
    line = torch.cos(2 * torch.pi * cycles * torch.arange(side) / side)
    return line.expand(1, 2, side, side).clone()


def test_a_wave_is_multiplied_by_the_gain_at_its_frequency_in_its_channel() -> None:
    spectrum = Spectrum((0.125, 0.25), ((0.5, 1.5), (2.0, 2.0)), (0.0, 0.0))
    for cycles, first in ((1, 0.5), (2, 0.5), (3, 1.0), (4, 1.5), (7, 1.5)):
        changed = spectrum(wave(cycles))
        torch.testing.assert_close(changed[:, 0], first * wave(cycles)[:, 0], atol=1e-5, rtol=0)
        torch.testing.assert_close(changed[:, 1], 2.0 * wave(cycles)[:, 1], atol=1e-5, rtol=0)


def test_the_mean_moves_by_the_offset_and_gains_of_one_change_nothing() -> None:
    latents = torch.randn(3, 2, 12, 20, generator=torch.Generator().manual_seed(0)) + 4.0
    strong = Spectrum((0.2,), ((3.0,), (0.3,)), (-1.5, 0.25))
    moved = latents.mean((2, 3)) + torch.tensor([-1.5, 0.25])
    torch.testing.assert_close(strong(latents).mean((2, 3)), moved, atol=1e-5, rtol=0)
    torch.testing.assert_close(FLAT(latents), latents, atol=1e-5, rtol=0)
    assert not torch.allclose(strong(latents), latents, atol=0.1)


def test_frequencies_are_those_of_the_transform() -> None:
    found = radius(8, 8)
    assert found.shape == (8, 5)
    assert found[0, 0] == 0
    assert found[0, 4] == found[4, 0] == 0.5
    assert found[3, 4] == pytest.approx(np.hypot(0.375, 0.5))


def test_what_was_measured_gives_the_power_of_what_it_was_measured_against() -> None:
    """Gains are the square root of the ratio of geometric means over pictures, not of one strong picture's."""
    generator = torch.Generator().manual_seed(1)
    real = torch.randn(64, 2, 32, 32, generator=generator)
    drawn = Spectrum((0.05, 0.6), ((1.2, 0.8), (0.7, 0.7)), (0.5, 0.0))(torch.randn(64, 2, 32, 32, generator=generator))
    drawn[0] *= 50.0
    found = spectrum_of(drawn, real)
    power, wanted = (band_power(each)[1].log().mean(0) for each in (found(drawn), real))
    assert (power - wanted).abs().max() < 0.1
    torch.testing.assert_close(found(drawn).mean((0, 2, 3)), real.mean((0, 2, 3)), atol=1e-4, rtol=0)
    assert np.array(found.gains)[0, 0] < 1.0 < np.array(found.gains)[0, -1]
    np.testing.assert_allclose(np.array(found.gains)[1], 1 / 0.7 / 50 ** (1 / 64), rtol=0.1)


@pytest.mark.parametrize("side", [8, 16, 32, 64])
def test_every_grid_has_bands_and_every_coefficient_but_the_mean_lies_in_one(side: int) -> None:
    unit = torch.zeros(1, 1, side, side)
    unit[..., 0, 0] = side  # a point: the same power at every frequency
    frequencies, power = band_power(unit)
    assert 4 <= len(frequencies) <= 7
    assert (np.diff(frequencies) > 0).all()
    torch.testing.assert_close(power, torch.ones_like(power))


@pytest.mark.parametrize(
    ("frequencies", "gains", "said"),
    [
        ((), ((),), "frequencies must rise"),
        ((0.0, 0.2), ((1.0, 1.0),), "frequencies must rise"),
        ((0.2, 0.1), ((1.0, 1.0),), "frequencies must rise"),
        ((0.1, 0.2), ((1.0,),), "a gain for each of 2 frequencies"),
        ((0.1,), (), "a gain for each of 1 frequencies"),
        ((0.1,), ((float("nan"),),), "gains must be from 0.25 to 4"),
        ((0.1,), ((9.0,),), "gains must be from 0.25 to 4"),
        ((0.1,), ((1.0,), (1.0,)), "needs 2 finite offsets"),
    ],
)
def test_what_is_no_spectrum_is_refused(
    frequencies: tuple[float, ...], gains: tuple[tuple[float, ...], ...], said: str
) -> None:
    with pytest.raises(ModelError, match=said):
        Spectrum(frequencies, gains, (0.0,))


def test_latents_of_other_channels_are_refused() -> None:
    with pytest.raises(ModelError, match="2 channels does not fit latents"):
        FLAT(torch.zeros(1, 3, 8, 8))


def test_a_folder_has_one_for_many_steps_and_one_for_few() -> None:
    other = Spectrum((0.1,), ((1.5,), (0.5,)), (0.0, 1.0))
    stored = json.loads(json.dumps({"steps": FLAT.as_json(), "few_steps": other.as_json()}))
    spectra = Spectra.of_manifest(Manifest("dermatology", spectra=stored))
    assert spectra == Spectra(FLAT, other)
    assert spectra.of(None) == FLAT
    assert spectra.of(FewSteps("fast", (450, 250), lead=20)) == FLAT  # the generator began
    assert spectra.of(FewSteps("fast", (999, 699, 450, 250))) == other
    assert str(other) == str(Spectrum.of_json(other.as_json())) != str(FLAT)
    assert Spectra.of_manifest(Manifest("dermatology")) == Spectra()


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        ({"other": {}}, "spectra for other, unknown ways"),
        ({"steps": {"gains": [[1.0]]}}, "no spectrum"),
        ({"steps": {"frequencies": [0.1], "gains": [["x"]]}}, "no spectrum"),
        ({"steps": [1.0]}, "no spectrum"),
    ],
)
def test_a_manifest_with_anything_else_is_refused(damaged: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        Spectra.of_manifest(Manifest("dermatology", spectra=damaged))


def test_a_drawing_goes_through_it_at_its_end_and_nowhere_before() -> None:
    pipeline = make_pipeline("dermatology", loras=("aligned",))
    gains = tuple((0.5 + 0.1 * channel, 1.3) for channel in range(LATENT_CHANNELS))
    spectrum = Spectrum((0.2, 0.6), gains, (0.1,) * LATENT_CHANNELS)
    prompts, trails = ["a dermoscopic image with nevus"], ([], [])
    settings = {"steps": 3, "guidance_scale": 2.0, "adapters": (None, "aligned")}
    plain = sample(pipeline, prompts, [1], **settings, trail=trails[0])
    through = sample(pipeline, prompts, [1], **settings, trail=trails[1], spectrum=spectrum)
    torch.testing.assert_close(through, spectrum(plain))
    assert not torch.equal(through, plain)
    assert all(torch.equal(one, other) for one, other in zip(*trails, strict=True))
