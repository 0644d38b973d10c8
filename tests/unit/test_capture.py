"""Attention capture: right numbers for the right rows, no pixel changed, nothing left on the UNet."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor

from medviz.errors import Cancelled, InputError, MedvizError
from medviz.generation.prompts import PromptEmbeds, encode_prompts
from medviz.generation.sampling import decode, initial_latents, noise_pred, sample
from medviz.grounding.capture import AttentionMaps, capture, watch
from tests import tiny

PROMPTS = ["a dermoscopic image with melanoma (MEL) showing hair", "a dermoscopic image with no visible artifacts"]


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return tiny.make_pipeline("dermatology")


@pytest.fixture(scope="module")
def aligned() -> StableDiffusionPipeline:
    pipeline = tiny.make_pipeline("dermatology")
    tiny.add_lora(pipeline.unet)
    return pipeline


def hooks(unet: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in unet.modules())


class ReferenceProcessor(AttnProcessor):
    """Keeps what diffusers' own attention function returns for every cross-attention call."""

    def __init__(self, kept: list[torch.Tensor]) -> None:
        self.kept = kept

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        probs = attn.get_attention_scores(query, key, None)
        self.kept.append(probs.unflatten(0, (-1, attn.heads)).mean(dim=1))
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def reference_probs(unet: UNet2DConditionModel, latents: torch.Tensor, cond: torch.Tensor) -> list[torch.Tensor]:
    """Head-mean probabilities (B, h*w, L) of each cross-attention layer, computed by diffusers."""
    kept: list[torch.Tensor] = []
    before = unet.attn_processors
    own = {name: ReferenceProcessor(kept) if ".attn2." in name else each for name, each in before.items()}
    unet.set_attn_processor(own)
    with torch.no_grad():
        unet(latents, 500, encoder_hidden_states=cond)
    unet.set_attn_processor(before)
    return kept


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("which", ["pipeline", "aligned"])
def test_images_are_bit_identical_with_and_without_capture(
    which: str, guidance_scale: float, request: pytest.FixtureRequest
) -> None:
    pipeline = request.getfixturevalue(which)
    plain = decode(pipeline, sample(pipeline, PROMPTS, [1, 2], steps=3, guidance_scale=guidance_scale))
    with capture(pipeline.unet) as maps:
        latents = sample(pipeline, PROMPTS, [1, 2], steps=3, guidance_scale=guidance_scale, maps=maps)
    assert torch.equal(decode(pipeline, latents), plain)
    assert maps.samples == 2


@pytest.mark.parametrize("which", ["pipeline", "aligned"])
def test_maps_equal_the_probabilities_diffusers_computes(which: str, request: pytest.FixtureRequest) -> None:
    pipeline = request.getfixturevalue(which)
    embeds, latents = encode_prompts(pipeline, PROMPTS), initial_latents(pipeline.unet.config, [1, 2])
    expected = reference_probs(pipeline.unet, latents, embeds.cond)
    with capture(pipeline.unet) as maps, torch.no_grad():
        maps.begin_step(0, 1, 2)
        noise_pred(pipeline.unet, latents, 500, embeds, 1.0)
    assert len(maps.layers) == len(expected) == 7
    for layer, probs in zip(maps.layers, expected, strict=True):
        for row in range(2):
            torch.testing.assert_close(maps.probs(layer, sample=row).flatten(0, 1), probs[row])


def test_a_step_counts_as_often_as_it_says(pipeline: StableDiffusionPipeline) -> None:
    embeds, latents = encode_prompts(pipeline, PROMPTS), initial_latents(pipeline.unet.config, [1, 2])
    alone = []
    with torch.no_grad():
        for t in (900, 300):
            with capture(pipeline.unet, batch_size=2) as maps:
                noise_pred(pipeline.unet, latents, t, embeds, 1.0)
            alone.append(maps.probs(maps.layers[0], sample=1))
        with capture(pipeline.unet) as maps:
            for step, (t, weight) in enumerate([(900, 1), (300, 4)]):
                maps.begin_step(step, 2, 2, weight)
                noise_pred(pipeline.unet, latents, t, embeds, 1.0)
    torch.testing.assert_close(maps.probs(maps.layers[0], sample=1), (alone[0] + 4 * alone[1]) / 5)
    assert (alone[0] - alone[1]).abs().max() > 1e-4
    with pytest.raises(InputError, match="count for more than 0, found 0"):
        maps.begin_step(0, 2, 2, 0)


def test_an_adapter_changes_what_is_captured(aligned: StableDiffusionPipeline) -> None:
    embeds, latents = encode_prompts(aligned, PROMPTS), initial_latents(aligned.unet.config, [1, 2])
    found = []
    for switch in (aligned.unet.enable_adapters, aligned.unet.disable_adapters):
        switch()
        with capture(aligned.unet, batch_size=2) as maps, torch.no_grad():
            noise_pred(aligned.unet, latents, 500, embeds, 1.0)
        found.append(maps.probs(maps.layers[0]))
    aligned.unet.enable_adapters()
    assert (found[0] - found[1]).abs().max() > 1e-4


def test_each_places_probabilities_sum_to_one(pipeline: StableDiffusionPipeline) -> None:
    with capture(pipeline.unet, time_bins=2) as maps:
        sample(pipeline, PROMPTS, [1, 2], steps=4, maps=maps)
    for layer in maps.layers:
        for time_bin in (None, 0, 1):
            sums = maps.probs(layer, sample=1, time_bin=time_bin).sum(dim=-1)
            torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-5)


def test_with_guidance_only_the_conditional_half_counts(pipeline: StableDiffusionPipeline) -> None:
    embeds, latents = encode_prompts(pipeline, PROMPTS), initial_latents(pipeline.unet.config, [1, 2])
    swapped = PromptEmbeds(cond=embeds.uncond, uncond=embeds.cond)
    found = []
    for guidance_scale, texts in ((1.0, embeds), (3.0, embeds), (3.0, swapped)):
        with capture(pipeline.unet, batch_size=2) as maps, torch.no_grad():
            noise_pred(pipeline.unet, latents, 500, texts, guidance_scale)
        assert maps.samples == 2
        found.append(maps.probs(maps.layers[1], sample=1))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    assert (found[2] - found[0]).abs().max() > 1e-4


def test_all_rows_are_kept_on_request(pipeline: StableDiffusionPipeline) -> None:
    with capture(pipeline.unet, conditional_only=False) as maps:
        sample(pipeline, PROMPTS, [1, 2], steps=1, guidance_scale=3.0, maps=maps)
    assert maps.samples == 4


def test_rows_of_unknown_meaning_are_refused(pipeline: StableDiffusionPipeline) -> None:
    with pytest.raises(MedvizError, match="begin_step"), capture(pipeline.unet):
        sample(pipeline, PROMPTS, [1, 2], steps=1)
    with pytest.raises(MedvizError, match="3 images"), capture(pipeline.unet, batch_size=3):
        sample(pipeline, PROMPTS, [1, 2], steps=1)
    assert hooks(pipeline.unet) == 0


def test_nothing_stays_on_the_unet_after_an_exception(aligned: StableDiffusionPipeline) -> None:
    processors, unet = aligned.unet.attn_processors, aligned.unet
    found_hooks = hooks(unet)

    def stop(index: int, x0: torch.Tensor) -> None:
        assert hooks(unet) > found_hooks
        raise Cancelled("stop")

    with pytest.raises(Cancelled), capture(unet) as maps:
        sample(aligned, PROMPTS, [1, 2], steps=2, maps=maps, on_step=stop)
    assert hooks(unet) == found_hooks
    assert all(unet.attn_processors[name] is each for name, each in processors.items())


@pytest.mark.parametrize(("grid_hw", "coarse"), [((8, 4), (4, 2)), ((4, 8), (2, 4)), ((7, 5), (4, 3))])
def test_latents_need_not_be_square(
    pipeline: StableDiffusionPipeline, grid_hw: tuple[int, int], coarse: tuple[int, int]
) -> None:
    with capture(pipeline.unet) as maps:
        sample(pipeline, PROMPTS[:1], [1], steps=1, maps=maps, grid_hw=grid_hw)
    assert maps.latent_hw == grid_hw
    assert maps.resolutions == (grid_hw, coarse)
    assert maps.heat([1, 2], (30, 20)).shape == (30, 20)


def test_a_row_of_the_latents_is_a_row_of_the_map(pipeline: StableDiffusionPipeline) -> None:
    # Places with equal content read alike, and self-attention does not know where a place is.
    transformer = pipeline.unet.down_blocks[0].attentions[0]
    hidden_states = torch.zeros(1, 8, 5, 3)
    hidden_states[:, :, 1] = torch.linspace(-2, 2, 8)[None, :, None]
    hidden_states[:, 3] += 1
    kept: list[torch.Tensor] = []
    text = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0))
    with watch(torch.nn.ModuleList([transformer]), lambda layer, probs: kept.append(probs)), torch.no_grad():
        transformer(hidden_states, encoder_hidden_states=text)
    probs = kept[0][0]
    torch.testing.assert_close(probs[0], probs[3])
    torch.testing.assert_close(probs[1, 0], probs[1, 2])
    assert (probs[1, 0] - probs[0, 0]).abs().max() > 1e-4


@pytest.mark.parametrize("length", [11, 77, 130])
def test_any_context_length(pipeline: StableDiffusionPipeline, length: int) -> None:
    text = torch.randn(1, length, 16, generator=torch.Generator().manual_seed(0))
    with capture(pipeline.unet, batch_size=1) as maps, torch.no_grad():
        pipeline.unet(initial_latents(pipeline.unet.config, [1]), 500, encoder_hidden_states=text)
    assert maps.context_length == length
    assert maps.heat([length - 1], (8, 8)).min() > 0
    with pytest.raises(InputError, match=f"0..{length - 1}"):
        maps.heat([length], (8, 8))


def test_masked_tokens_get_no_attention(pipeline: StableDiffusionPipeline) -> None:
    text = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    with capture(pipeline.unet, batch_size=1) as maps, torch.no_grad():
        latents = initial_latents(pipeline.unet.config, [1, 2])
        pipeline.unet(latents, 500, encoder_hidden_states=text, encoder_attention_mask=mask)
    assert maps.probs(maps.layers[0])[..., 3:].max() < 1e-6


def test_time_bins_split_the_steps_and_average_to_the_whole(pipeline: StableDiffusionPipeline) -> None:
    with capture(pipeline.unet, time_bins=2) as maps:
        sample(pipeline, PROMPTS, [1, 2], steps=4, maps=maps)
    early, late, whole = (maps.heat([3], (8, 8), time_bin=each) for each in (0, 1, None))
    np.testing.assert_allclose((early + late) / 2, whole, rtol=1e-4)
    assert np.abs(early - late).max() > 1e-6
    with pytest.raises(InputError, match="time bin 2"):
        maps.heat([3], (8, 8), time_bin=2)


def test_time_bins_without_steps_are_refused(pipeline: StableDiffusionPipeline) -> None:
    with pytest.raises(MedvizError, match="begin_step"), capture(pipeline.unet, time_bins=2, batch_size=2):
        sample(pipeline, PROMPTS, [1, 2], steps=1)


def test_memory_does_not_grow_with_the_steps(pipeline: StableDiffusionPipeline) -> None:
    sizes = []
    for steps in (1, 5):
        with capture(pipeline.unet) as maps:
            sample(pipeline, PROMPTS, [1, 2], steps=steps, maps=maps)
        sizes.append(sum(each.numel() for each in maps._sums.values()))
    assert sizes[0] == sizes[1] == sum(2 * h * w * 48 for h, w in (maps.grid(layer) for layer in maps.layers))


def test_a_capture_may_go_on_outside_inference_mode(pipeline: StableDiffusionPipeline) -> None:
    embeds = encode_prompts(pipeline, PROMPTS)
    with capture(pipeline.unet) as maps:
        sample(pipeline, PROMPTS, [1, 2], steps=1, maps=maps)
        noise_pred(pipeline.unet, initial_latents(pipeline.unet.config, [1, 2]), 5, embeds, 1.0)
    assert not maps.probs(maps.layers[0]).requires_grad


def test_watch_with_gradient_reaches_the_text(pipeline: StableDiffusionPipeline) -> None:
    text = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    kept: list[torch.Tensor] = []
    with watch(pipeline.unet, lambda layer, probs: kept.append(probs), gradient=True) as layers:
        pipeline.unet(initial_latents(pipeline.unet.config, [1]), 500, encoder_hidden_states=text)
    assert len(layers) == len(kept) == 7
    (gradient,) = torch.autograd.grad(kept[-1][..., 2].mean(), text)
    assert gradient.abs().sum() > 0


def test_a_model_without_cross_attention_is_refused() -> None:
    with pytest.raises(MedvizError, match="no cross-attention"), capture(torch.nn.Linear(2, 2)):
        pass


def recorded(**layers: torch.Tensor) -> AttentionMaps:
    maps = AttentionMaps()
    for name, probs in layers.items():
        maps.add(name, probs[None])
    return maps


def test_every_resolution_weighs_the_same_however_many_layers_it_has() -> None:
    maps = recorded(a=torch.full((2, 2, 3), 0.2), b=torch.full((2, 2, 3), 0.4), c=torch.full((4, 4, 3), 0.9))
    np.testing.assert_allclose(maps.heat([0, 2], (4, 4)), 0.6, rtol=1e-6)
    np.testing.assert_allclose(maps.heat([0], (4, 4), resolutions=[(2, 2)]), 0.3, rtol=1e-6)
    with pytest.raises(InputError, match=r"\(8, 8\)"):
        maps.heat([0], (4, 4), resolutions=[(8, 8)])


def test_grids_too_coarse_for_findings_are_left_out_by_default() -> None:
    maps = recorded(fine=torch.zeros(8, 8, 3), middle=torch.zeros(4, 4, 3), coarse=torch.zeros(2, 2, 3))
    maps.latent_hw = (16, 16)
    assert maps.default_resolutions() == ((8, 8), (4, 4))


def test_heat_is_the_mean_over_tokens_resized_bilinearly() -> None:
    probs = torch.zeros(1, 2, 3)
    probs[0, 1, 0], probs[0, 1, 1] = 0.8, 0.4
    heat = recorded(only=probs).heat([0, 1], (1, 4))
    np.testing.assert_allclose(heat, [[0.0, 0.15, 0.45, 0.6]], atol=1e-6)
    assert heat.dtype == np.float32


def test_share_among_the_words_of_the_prompt() -> None:
    probs = torch.tensor([[[0.9, 0.05, 0.05], [0.2, 0.6, 0.2]]])
    maps = recorded(only=probs)
    np.testing.assert_allclose(maps.heat([1], (1, 2), content_indices=[1, 2]), [[0.5, 0.75]], rtol=1e-6)
    np.testing.assert_allclose(maps.heat([1], (1, 2), content_indices=[1]), [[1.0, 1.0]], rtol=1e-6)


def test_reading_maps_before_anything_ran_is_refused() -> None:
    with pytest.raises(InputError, match="no attention was recorded"):
        AttentionMaps().heat([0], (4, 4))


def test_one_capture_holds_one_batch_size(pipeline: StableDiffusionPipeline) -> None:
    with capture(pipeline.unet) as maps:
        sample(pipeline, PROMPTS, [1, 2], steps=1, maps=maps)
        with pytest.raises(MedvizError, match="one batch"):
            sample(pipeline, PROMPTS[:1], [1], steps=1, maps=maps)
