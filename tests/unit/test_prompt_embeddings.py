"""Learned embeddings of phrases: they change those phrases alone, while they are on, and are an adapter like others."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from medviz.errors import InputError, ModelError
from medviz.generation.prompts import encode_prompts
from medviz.generation.sampling import decode, sample
from medviz.models.adapters import (
    add_prompt_embeddings,
    load_adapter,
    load_lora,
    loaded_adapters,
    save_prompt_adapter,
    using_adapter,
    zero_adapter,
)
from medviz.models.library import ModelLibrary
from medviz.models.manifest import write_manifest
from medviz.models.prompt_embeddings import WEIGHTS_NAME, PromptEmbeddings
from tests import tiny

PHRASES = ("right lower zone", "left lower zone", "left lung", "left hilum")
WITH, WITHOUT = "lung opacity in the right lower zone", "lung opacity, a bright lung zone"


def embeddings(pipeline: StableDiffusionPipeline, seed: int = 0) -> PromptEmbeddings:
    found = PromptEmbeddings(pipeline.tokenizer, PHRASES, pipeline.text_encoder.config.hidden_size)
    found.offsets.data.normal_(generator=torch.Generator().manual_seed(seed))
    return found


@pytest.fixture
def pipeline() -> StableDiffusionPipeline:
    return tiny.make_pipeline("radiology")


def draw(pipeline: StableDiffusionPipeline, prompt: str) -> torch.Tensor:
    return decode(pipeline, sample(pipeline, [prompt], [1], steps=2, guidance_scale=3.0))


def test_off_nothing_changes_and_on_only_prompts_with_a_phrase_do(pipeline: StableDiffusionPipeline) -> None:
    plain = {prompt: draw(pipeline, prompt) for prompt in (WITH, WITHOUT)}
    add_prompt_embeddings(pipeline, "anatomy", embeddings(pipeline))
    for prompt, image in plain.items():
        assert torch.equal(draw(pipeline, prompt), image)
    with using_adapter(pipeline.unet, "anatomy"):
        assert not torch.allclose(draw(pipeline, WITH), plain[WITH])
        assert torch.equal(draw(pipeline, WITHOUT), plain[WITHOUT])
        with using_adapter(pipeline.unet, None):
            assert torch.equal(draw(pipeline, WITH), plain[WITH])
        with pytest.raises(KeyboardInterrupt), using_adapter(pipeline.unet, None):
            raise KeyboardInterrupt
        assert not torch.allclose(draw(pipeline, WITH), plain[WITH])
    assert torch.equal(draw(pipeline, WITH), plain[WITH])
    zero_adapter(pipeline.unet, "anatomy")
    with using_adapter(pipeline.unet, "anatomy"):
        assert torch.equal(draw(pipeline, WITH), plain[WITH])


def test_only_the_tokens_of_whole_phrases_are_changed(pipeline: StableDiffusionPipeline) -> None:
    learned, tokenizer = embeddings(pipeline), pipeline.tokenizer

    def changed(text: str) -> str:
        ids = torch.tensor([tokenizer(text).input_ids])
        rows = learned.rows(ids)[0]
        assert all(learned.ids[row] == token for row, token in zip(rows, ids[0], strict=True) if row >= 0)
        return "".join(tokenizer.convert_ids_to_tokens(ids[0][rows >= 0].tolist())).replace("</w>", " ").strip()

    assert changed(WITH) == "right lower zone"
    assert changed("Left  Hilum, left lung opacity") == "left hilum left lung"
    for text in ("lung opacity", "bright lower zone", "left lower zonex", "right, lower zone", "hilum", ""):
        assert changed(text) == "", text


def test_the_base_embeddings_stay_bit_for_bit(pipeline: StableDiffusionPipeline) -> None:
    before = {name: weight.clone() for name, weight in pipeline.text_encoder.state_dict().items()}
    add_prompt_embeddings(pipeline, "anatomy", embeddings(pipeline))
    with using_adapter(pipeline.unet, "anatomy"):
        encode_prompts(pipeline, [WITH])
    after = pipeline.text_encoder.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_what_is_saved_is_loaded_with_its_lora(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    add_prompt_embeddings(pipeline, "anatomy", embeddings(pipeline))
    tiny.add_lora(pipeline.unet, "anatomy", seed=3)
    tiny.add_lora(pipeline.unet, "other", seed=4)
    pipeline.unet.disable_adapters()
    save_prompt_adapter(pipeline.unet, tmp_path, "anatomy", details={"title": "Anatomy"})
    with using_adapter(pipeline.unet, "anatomy"):
        image = draw(pipeline, WITH)
    other = tiny.make_pipeline("radiology")
    plain = draw(other, WITH)
    load_adapter(other, tmp_path, "anatomy")
    assert loaded_adapters(other.unet) == ("anatomy",)
    assert torch.equal(draw(other, WITH), plain)
    with using_adapter(other.unet, "anatomy"):
        assert torch.equal(draw(other, WITH), image)
    tiny.add_lora(other.unet, "other", seed=4)
    other.unet.disable_adapters()
    with using_adapter(pipeline.unet, "other"), using_adapter(other.unet, "other"):
        assert torch.equal(draw(other, WITH), draw(pipeline, WITH)), "another adapter leaves the words alone"
    with pytest.raises(InputError, match="already holds embeddings"):
        add_prompt_embeddings(pipeline, "anatomy", embeddings(pipeline))
    with pytest.raises(ModelError, match="whole pipeline"):
        load_lora(tiny.make_unet(), tmp_path, "anatomy")


def test_damage_and_another_tokenizer_have_a_name(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    embeddings(pipeline).save(tmp_path)
    with pytest.raises(ModelError, match=r"another tokenizer|cannot be loaded"):
        PromptEmbeddings.load(tmp_path, tiny.make_tokenizer("dermatology"))
    (tmp_path / WEIGHTS_NAME).write_bytes((tmp_path / WEIGHTS_NAME).read_bytes()[:-7])
    with pytest.raises(ModelError, match="cannot be loaded"):
        PromptEmbeddings.load(tmp_path, pipeline.tokenizer)
    with pytest.raises(InputError, match="at least one phrase"):
        PromptEmbeddings(pipeline.tokenizer, [], 16)
    wide = PromptEmbeddings(pipeline.tokenizer, PHRASES, 24)
    with pytest.raises(ModelError, match="width 24"):
        add_prompt_embeddings(pipeline, "wide", wide)


def test_the_library_serves_the_adapter_beside_lora(model_root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_root / "radiology", tmp_path / "radiology")
    base = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    add_prompt_embeddings(base, "anatomy", embeddings(base))
    save_prompt_adapter(base.unet, folder / "adapters" / "anatomy", "anatomy", details={"title": "Anatomy"})
    fields = json.loads((folder / "manifest.json").read_text())
    kept = {key: value for key, value in fields.items() if key not in ("files", "format_version", "adapters")}
    write_manifest(folder, kept)
    loaded = ModelLibrary(tmp_path, device="cpu").load("radiology")
    assert set(loaded.adapters) == set(loaded_adapters(loaded.pipeline.unet)) == {"anatomy", tiny.ADAPTER}
    plain = ModelLibrary(model_root, device="cpu").load("radiology").pipeline
    assert torch.equal(draw(loaded.pipeline, WITH), draw(plain, WITH))
    with using_adapter(loaded.pipeline.unet, tiny.ADAPTER), using_adapter(plain.unet, tiny.ADAPTER):
        assert torch.equal(draw(loaded.pipeline, WITH), draw(plain, WITH))
    with using_adapter(loaded.pipeline.unet, "anatomy"):
        assert not torch.allclose(draw(loaded.pipeline, WITH), draw(plain, WITH))
        assert torch.equal(draw(loaded.pipeline, WITHOUT), draw(plain, WITHOUT))
