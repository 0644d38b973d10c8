"""The library loads a domain once, as it was saved, and answers every other request with a way out."""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from medviz.errors import InputError, ModelError
from medviz.models import library as library_module
from medviz.models.adapters import loaded_adapters, unet_lock, using_adapter
from medviz.models.library import ModelLibrary
from medviz.models.manifest import hash_file, read_manifest, write_manifest
from medviz.workbench import load_models
from tests import tiny

PROMPT = "a dermoscopic image with melanoma (MEL) showing hair"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def library(model_root: Path) -> ModelLibrary:
    return ModelLibrary(model_root, device="cpu")


@pytest.fixture
def root(model_root: Path, tmp_path: Path) -> Path:
    """A copy of one domain that a test may change."""
    shutil.copytree(model_root / "dermatology", tmp_path / "dermatology")
    return tmp_path


def rewrite(root: Path, **change: object) -> None:
    """Write the manifest anew, as after an honest change of the folder."""
    fields = json.loads((root / "dermatology" / "manifest.json").read_text())
    kept = {key: value for key, value in fields.items() if key not in ("files", "format_version", "adapters")}
    write_manifest(root / "dermatology", {**kept, **change})


def draw(pipeline: StableDiffusionPipeline) -> np.ndarray:
    generator = torch.Generator().manual_seed(3)
    return np.asarray(pipeline(PROMPT, num_inference_steps=2, generator=generator).images[0])


def test_a_standard_diffusers_pipeline_loads_the_folder_and_draws(model_root: Path, library: ModelLibrary) -> None:
    plain = StableDiffusionPipeline.from_pretrained(
        model_root / "dermatology", safety_checker=None, local_files_only=True, use_safetensors=True
    )
    plain.set_progress_bar_config(disable=True)
    image = draw(plain)
    assert image.shape == (tiny.IMAGE_SIZE_PX, tiny.IMAGE_SIZE_PX, 3)
    assert image.std() > 5
    loaded = library.load("dermatology")
    drawn = draw(loaded.pipeline)
    # layers that an adapter wraps round differently
    assert np.abs(drawn.astype(int) - image.astype(int)).max() <= 1
    with using_adapter(loaded.pipeline.unet, tiny.ADAPTER):
        assert not np.array_equal(draw(loaded.pipeline), drawn)


def test_every_domain_is_there_and_is_loaded_once(library: ModelLibrary) -> None:
    assert library.domains() == ("dermatology", "radiology")
    for name in library.domains():
        loaded = library.load(name)
        assert loaded is library.load(name)
        assert (loaded.name, loaded.manifest.domain) == (name, name)
        assert loaded.adapters == loaded_adapters(loaded.pipeline.unet) == (tiny.ADAPTER,)
        assert loaded.default_adapter == tiny.ADAPTER
        assert loaded.lock is unet_lock(loaded.pipeline.unet)


def test_on_a_cpu_everything_is_float32_frozen_and_in_eval_mode(library: ModelLibrary) -> None:
    pipeline = library.load("radiology").pipeline
    for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert not model.training
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
        assert not any(weight.requires_grad for weight in model.parameters())


def test_many_threads_load_once(model_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = library_module._load_pipeline

    def counted(*arguments: object) -> StableDiffusionPipeline:
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(library_module, "_load_pipeline", counted)
    library, found = ModelLibrary(model_root, device="cpu"), []
    threads = [threading.Thread(target=lambda: found.append(library.load("dermatology"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(calls) == 1
    assert len(found) == 6
    assert len({id(loaded) for loaded in found}) == 1


def test_an_adapter_is_resolved_as_the_request_means_it(library: ModelLibrary) -> None:
    loaded = library.load("dermatology")
    assert loaded.resolve_adapter("") == tiny.ADAPTER
    assert loaded.resolve_adapter(tiny.ADAPTER) == tiny.ADAPTER
    assert loaded.resolve_adapter(None) is None
    assert loaded.resolve_adapter("none") is None
    for wrong in ("anatomy", "../judge", "Attribute"):
        with pytest.raises(InputError, match=f"allowed: {tiny.ADAPTER}, none, or empty"):
            loaded.resolve_adapter(wrong)


@pytest.mark.parametrize("domain", ["../dermatology", "", "Dermatology", None, 3])
def test_what_cannot_be_a_domain_never_becomes_a_path(library: ModelLibrary, domain: object) -> None:
    with pytest.raises(InputError, match="allowed: dermatology, radiology"):
        library.load(domain)


def test_a_domain_without_models_is_answered_with_the_path_and_the_way_out(tmp_path: Path) -> None:
    library = ModelLibrary(tmp_path / "absent", device="cpu")
    assert library.domains() == ()
    with pytest.raises(ModelError, match=r"absent/dermatology/manifest\.json is missing.*python -m train"):
        library.load("dermatology")


def test_weights_in_bfloat16_are_widened(root: Path) -> None:
    path = root / "dermatology" / "unet" / "diffusion_pytorch_model.safetensors"
    narrow = {key: value.to(torch.bfloat16) for key, value in load_file(path).items()}
    save_file(narrow, path, metadata={"format": "pt"})
    rewrite(root)
    unet = ModelLibrary(root, device="cpu").load("dermatology").pipeline.unet
    assert {weight.dtype for weight in unet.parameters()} == {torch.float32}
    assert torch.equal(unet.conv_in.weight, narrow["conv_in.weight"].float())


def test_weights_in_shards_are_read_together(root: Path, library: ModelLibrary) -> None:
    folder = root / "dermatology"
    unet = tiny.make_unet(seed=0)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="100KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    rewrite(root)
    found = ModelLibrary(root, device="cpu").load("dermatology").pipeline
    assert np.array_equal(draw(found), draw(library.load("dermatology").pipeline))


def test_a_failed_load_is_tried_again(root: Path) -> None:
    library = ModelLibrary(root, device="cpu")
    path = root / "dermatology" / "manifest.json"
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(ModelError):
        library.load("dermatology")
    path.write_bytes(content)
    assert library.load("dermatology").name == "dermatology"


def test_the_manifest_must_describe_its_own_folder(root: Path) -> None:
    (root / "dermatology").rename(root / "radiology")
    with pytest.raises(ModelError, match="describes 'dermatology', but its folder is 'radiology'"):
        ModelLibrary(root, device="cpu").load("radiology")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AnyPipeline"}, "'AnyPipeline'; this program loads a StableDiffusionPipeline"),
        ({"unet": ["my_code", "UNet"]}, "builds its unet with 'my_code'; allowed: diffusers, transformers"),
        ({"vae": ["diffusers", "NoSuchClass"]}, "cannot be loaded"),
    ],
)
def test_a_pipeline_of_foreign_parts_is_refused(root: Path, change: dict[str, object], message: str) -> None:
    path = root / "dermatology" / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    rewrite(root)
    with pytest.raises(ModelError, match=message):
        ModelLibrary(root, device="cpu").load("dermatology")


def test_parts_of_two_trainings_are_refused(root: Path) -> None:
    path = root / "dermatology" / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 77}))
    rewrite(root)
    with pytest.raises(ModelError, match="prompt length of the tokenizer and the text_encoder are 77 and 48"):
        ModelLibrary(root, device="cpu").load("dermatology")


def test_a_base_on_the_hub_is_fetched_at_its_commit_verified_and_loaded(
    root: Path, monkeypatch: pytest.MonkeyPatch, library: ModelLibrary
) -> None:
    folder, cache = root / "dermatology", root / "cache"
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    for name in (*parts, "model_index.json"):
        cache.mkdir(exist_ok=True)
        (folder / name).rename(cache / name)
    files = {
        path.relative_to(cache).as_posix(): vars(hash_file(path)) for path in sorted(cache.rglob("*")) if path.is_file()
    }
    rewrite(root, hub={"repo_id": "org/base", "revision": COMMIT, "files": files})
    asked = []

    def fetch(repo_id: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((repo_id, revision, allow_patterns))
        return str(cache)

    monkeypatch.setattr(library_module, "snapshot_download", fetch)
    loaded = ModelLibrary(root, device="cpu").load("dermatology")
    assert asked == [("org/base", COMMIT, sorted(files))]
    assert np.array_equal(draw(loaded.pipeline), draw(library.load("dermatology").pipeline))

    (cache / "unet" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"unet/config\.json is damaged"):
        ModelLibrary(root, device="cpu").load("dermatology")

    def offline(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(library_module, "snapshot_download", offline)
    with pytest.raises(ModelError, match=f"hf download org/base --revision {COMMIT}"):
        ModelLibrary(root, device="cpu").load("dermatology")


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ModelError, match="no-such-device"):
        ModelLibrary(device="no-such-device")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="has no CUDA"):
            ModelLibrary(device="cuda")


def test_the_tiny_folder_is_the_same_every_time(model_root: Path, tmp_path: Path) -> None:
    tiny.make_domain_folder(tmp_path / "dermatology", "dermatology", seed=0)
    assert read_manifest(tmp_path / "dermatology").files == read_manifest(model_root / "dermatology").files


@pytest.mark.parametrize(
    "weights",
    [
        f"adapters/{tiny.ADAPTER}/pytorch_lora_weights.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "judge/model.safetensors",
        "segmenter/model.safetensors",
    ],
)
def test_weights_that_are_not_finite_are_named_when_they_are_loaded(root: Path, weights: str) -> None:
    path = root / "dermatology" / weights
    with safe_open(path, "pt") as stored:
        metadata = stored.metadata()
    content = load_file(path)
    name = sorted(key for key, value in content.items() if value.is_floating_point())[0]
    content[name] = torch.full_like(content[name], torch.nan)
    save_file(content, path, metadata=metadata)
    rewrite(root)
    with pytest.raises(ModelError, match="not finite") as caught:
        load_models(ModelLibrary(root, device="cpu"), "dermatology")
    assert str(path.parent) in str(caught.value)
