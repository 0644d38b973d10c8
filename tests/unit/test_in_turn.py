"""Several adapters draw in the same passes what each of them draws alone, from one noise."""

from itertools import combinations

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from medviz.errors import InputError
from medviz.generation.guidance import Guidance, SemanticGuidance
from medviz.generation.plan import FewSteps
from medviz.generation.prompts import encode_prompts, in_turn
from medviz.generation.sampling import sample
from medviz.grounding.capture import AttentionMaps, capture
from medviz.models.adapters import add_prompt_embeddings, folded_adapters, using_adapter, zero_adapter
from medviz.models.prompt_embeddings import PromptEmbeddings
from tests.tiny import LATENT_CHANNELS, add_lora, make_pipeline, make_unet

PLAIN, HAIRY = "a dermoscopic image with nevus", "a dermoscopic image with melanoma (MEL) showing hair, ruler"
ALONG_HAIR = Guidance(3.0, (150, 700), 0.25, SemanticGuidance("dermatology", ("hair",), 4.0, (150, 900)))
SEEDS = [5, 6, 7]
ADAPTERS = (None, "aligned", "spoken")


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    """Off, it holds an adapter that draws fast, one that aligns, and one of learned embeddings."""
    made = make_pipeline("dermatology", loras=("fast", "aligned"))
    learned = PromptEmbeddings(made.tokenizer, ("nevus", "hair"), made.text_encoder.config.hidden_size)
    learned.offsets.data.normal_(generator=torch.Generator().manual_seed(0))
    add_prompt_embeddings(made, "spoken", learned)
    return made


@pytest.mark.parametrize(
    "few_steps",
    [None, FewSteps("fast", (999, 500), ALONG_HAIR.semantic), FewSteps("fast", (699, 400), lead=6)],
    ids=["solver", "few steps", "finished"],
)
def test_one_batch_draws_what_each_adapter_draws_alone(pipeline, few_steps: FewSteps | None) -> None:
    asked = {"steps": 6, "guidance_scale": ALONG_HAIR, "few_steps": few_steps}
    prompts = [HAIRY, PLAIN, HAIRY]
    with using_adapter(pipeline.unet, None), capture(pipeline.unet) as maps:
        together = sample(pipeline, prompts, SEEDS, adapters=ADAPTERS, maps=maps, **asked)
    assert maps.samples == len(together) == len(prompts) * len(ADAPTERS)
    drawn: list[torch.Tensor] = []
    for turn, name in enumerate(ADAPTERS):
        with using_adapter(pipeline.unet, name), capture(pipeline.unet) as alone:
            drawn.append(sample(pipeline, prompts, SEEDS, maps=alone, **asked))
        torch.testing.assert_close(together[turn :: len(ADAPTERS)], drawn[-1], rtol=0, atol=1e-4)
        assert_same_attention(maps, alone, turn)
    assert all(float((one - other).abs().max()) > 0.01 for one, other in combinations(drawn, 2))


def assert_same_attention(maps: AttentionMaps, alone: AttentionMaps, turn: int) -> None:
    for row in range(alone.samples):
        for layer in alone.layers:
            found = maps.probs(layer, sample=row * len(ADAPTERS) + turn)
            np.testing.assert_allclose(found, alone.probs(layer, sample=row), atol=1e-4)


def test_what_is_on_already_stays_on_for_all(pipeline) -> None:
    with using_adapter(pipeline.unet, "fast"):
        both = sample(pipeline, [PLAIN], [1], steps=2, adapters=(None, "aligned"))
        alone = sample(pipeline, [PLAIN], [1], steps=2)
    with using_adapter(pipeline.unet, "fast", "aligned"):
        beside = sample(pipeline, [PLAIN], [1], steps=2)
    torch.testing.assert_close(both, torch.cat([alone, beside]), rtol=0, atol=1e-5)


def test_an_adapter_of_zeros_draws_the_same_bits_in_the_same_batch() -> None:
    made = make_pipeline("radiology")
    add_lora(made.unet, "aligned", 1)
    prompt = ["a frontal chest X-ray of a man, normal"]
    made.unet.disable_adapters()
    first, second = sample(made, prompt, [1], steps=4, adapters=(None, "aligned"))
    assert not torch.equal(first, second)
    zero_adapter(made.unet, "aligned")
    first, second = sample(made, prompt, [1], steps=4, adapters=(None, "aligned"))
    assert torch.equal(first, second)


def test_noise_that_a_scheduler_draws_on_the_way_is_the_same_for_all(pipeline) -> None:
    scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    parts = {**pipeline.components, "scheduler": scheduler}
    drawing = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    with using_adapter(drawing.unet, None):
        drawn = sample(drawing, [PLAIN, HAIRY], [1, 2], steps=3, adapters=(None, None))
        torch.testing.assert_close(drawn[::2], drawn[1::2], rtol=0, atol=1e-5)
        torch.testing.assert_close(drawn[::2], sample(drawing, [PLAIN, HAIRY], [1, 2], steps=3), rtol=0, atol=1e-4)


def test_given_embeddings_stand_for_all_adapters(pipeline) -> None:
    semantic = ALONG_HAIR.semantic
    embeds = encode_prompts(pipeline, [PLAIN, HAIRY], semantic)
    asked = {"steps": 3, "guidance_scale": ALONG_HAIR, "adapters": (None, "aligned")}
    given = sample(pipeline, [PLAIN, HAIRY], [1, 2], prompt_embeds=embeds, **asked)
    torch.testing.assert_close(given, sample(pipeline, [PLAIN, HAIRY], [1, 2], **asked), rtol=0, atol=1e-5)


def test_encodings_are_joined_row_by_row(pipeline) -> None:
    prompts = [PLAIN, PLAIN, HAIRY, HAIRY]
    with using_adapter(pipeline.unet, None):
        plain = encode_prompts(pipeline, prompts, ALONG_HAIR.semantic)
    with using_adapter(pipeline.unet, "spoken"):
        spoken = encode_prompts(pipeline, prompts, ALONG_HAIR.semantic)
    joined = in_turn([plain, spoken])
    for row, source in enumerate((plain, spoken, plain, spoken)):
        assert torch.equal(joined.cond[row], source.cond[row])
    assert not torch.equal(joined.cond[2], joined.cond[3])
    assert joined.contrasts.rows.tolist() == [2, 3]
    assert torch.equal(joined.contrasts.named[1], spoken.contrasts.named[1])
    assert torch.equal(joined.contrasts.unnamed[0], plain.contrasts.unnamed[0])
    assert in_turn([plain]) is plain


@pytest.fixture
def unet() -> UNet2DConditionModel:
    made = make_unet()
    add_lora(made, "first", seed=1)
    torch.manual_seed(3)
    made.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["conv1", "to_q"], init_lora_weights=False), "convs")
    made.disable_adapters()
    return made


def noise_pred(unet: UNet2DConditionModel, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, LATENT_CHANNELS, 8, 8, generator=generator).expand(rows, -1, -1, -1)
    prompt_embeds = torch.randn(1, 5, 16, generator=generator).expand(rows, -1, -1)
    dtype = next(unet.parameters()).dtype
    with torch.no_grad():
        return unet(latents.to(dtype), 500, prompt_embeds.to(dtype)).sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_has_its_own_adapter(unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
    unet.to(dtype, memory_format=torch.channels_last)
    turns, tolerance = ("convs", None, "first"), 1e-5 if dtype == torch.float32 else 0.1
    before = noise_pred(unet, 1)
    with using_adapter(unet, None), folded_adapters(unet, turns):
        together = noise_pred(unet, 6)
    alone = []
    for name in turns:
        with using_adapter(unet, name):
            alone.append(noise_pred(unet, 1))
    torch.testing.assert_close(together, torch.cat(alone * 2), rtol=0, atol=tolerance)
    assert all(float((one - other).abs().max()) > 2 * tolerance for one, other in combinations(alone, 2))
    assert torch.equal(noise_pred(unet, 1), before)
    assert not any("forward" in vars(layer) for layer in unet.modules() if isinstance(layer, LoraLayer))


def test_rows_keep_their_adapters_under_autocast(unet: UNet2DConditionModel) -> None:
    with using_adapter(unet, None), folded_adapters(unet, (None, "first")), torch.autocast("cpu", torch.bfloat16):
        plain, aligned = noise_pred(unet, 2)
    assert not torch.equal(plain, aligned)
    with using_adapter(unet, "first"), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(aligned[None], noise_pred(unet, 1), rtol=0, atol=0.05)


def test_a_name_that_is_not_loaded_is_refused(unet: UNet2DConditionModel, pipeline) -> None:
    with pytest.raises(InputError, match="unknown adapter 'third'"), folded_adapters(unet, (None, "third")):
        pass
    with pytest.raises(InputError, match="at least one adapter"):
        sample(pipeline, [PLAIN], [1], steps=1, adapters=())
    with pytest.raises(InputError, match="unknown adapter 'third'"):
        sample(pipeline, [PLAIN], [1], steps=1, adapters=("third",))
