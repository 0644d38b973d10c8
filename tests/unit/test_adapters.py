"""Adapters: exactly one is on, or none; the base never changes; what is saved is what is loaded."""

import inspect
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from medviz.errors import InputError, ModelError
from medviz.models.adapters import (
    folded_adapters,
    load_lora,
    loaded_adapters,
    save_lora,
    unet_lock,
    using_adapter,
    zero_adapter,
)
from tests import tiny

WEIGHTS = "pytorch_lora_weights.safetensors"


def noise_pred(unet: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, tiny.LATENT_CHANNELS, 8, 8, generator=generator)
    prompt_embeds = torch.randn(2, 5, 16, generator=generator)
    with torch.no_grad():
        return unet(latents.to(unet.dtype), 500, prompt_embeds.to(unet.dtype)).sample


@pytest.fixture
def unet() -> Iterator[UNet2DConditionModel]:
    unet = tiny.make_unet()
    tiny.add_lora(unet, "first", seed=1)
    tiny.add_lora(unet, "second", seed=2)
    unet.disable_adapters()
    return unet


def test_switched_off_the_unet_is_bit_identical_to_one_that_never_had_adapters(unet: UNet2DConditionModel) -> None:
    plain = noise_pred(tiny.make_unet())
    assert torch.equal(noise_pred(unet), plain)
    with using_adapter(unet, None):
        assert torch.equal(noise_pred(unet), plain)
    with using_adapter(unet, "first"):
        assert not torch.allclose(noise_pred(unet), plain)
    assert torch.equal(noise_pred(unet), plain)


def test_exactly_the_named_adapter_is_on(unet: UNet2DConditionModel) -> None:
    for seed, name in ((1, "first"), (2, "second")):
        alone = tiny.make_unet()
        tiny.add_lora(alone, name, seed=seed)
        with using_adapter(unet, name):
            assert torch.equal(noise_pred(unet), noise_pred(alone))


def test_changes_of_two_adapters_add_up(unet: UNet2DConditionModel) -> None:
    layer = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    found = {}
    with torch.no_grad():
        for names in ((None,), ("first",), ("second",), ("first", "second"), ("first", None)):
            with using_adapter(unet, *names):
                found[names] = layer(x)
    plain = found[None,]
    both = found["first",] + found["second",] - plain
    torch.testing.assert_close(found["first", "second"], both)
    assert torch.equal(found["first", None], found["first",])
    assert torch.equal(layer(x), plain)
    with pytest.raises(InputError, match="allowed: first, second"), using_adapter(unet, "first", "third"):
        pass


def test_an_adapter_of_zeros_changes_no_bit(unet: UNet2DConditionModel) -> None:
    zero_adapter(unet, "first")
    with using_adapter(unet, "first"):
        assert torch.equal(noise_pred(unet), noise_pred(tiny.make_unet()))
    with pytest.raises(InputError, match="allowed: first, second"):
        zero_adapter(unet, "third")


def test_the_former_adapter_comes_back_on_every_exit(unet: UNet2DConditionModel) -> None:
    with using_adapter(unet, "first"):
        before = noise_pred(unet)
        with using_adapter(unet, "second"):
            assert not torch.equal(noise_pred(unet), before)
        assert torch.equal(noise_pred(unet), before)
        with pytest.raises(KeyboardInterrupt), using_adapter(unet, None):
            raise KeyboardInterrupt
        assert torch.equal(noise_pred(unet), before)


def test_switching_freezes_and_thaws_nothing(unet: UNet2DConditionModel) -> None:
    unet.set_adapter("second")
    unet.enable_adapters()
    unet.requires_grad_(False)
    for name, weight in unet.named_parameters():
        weight.requires_grad_("lora" in name and "second" in name)
    trained = {name for name, weight in unet.named_parameters() if weight.requires_grad}
    assert trained
    for name in (None, "first", "second"):
        with using_adapter(unet, name):
            assert {key for key, weight in unet.named_parameters() if weight.requires_grad} == trained
        assert {key for key, weight in unet.named_parameters() if weight.requires_grad} == trained


def test_the_base_weights_stay_as_they_were(unet: UNet2DConditionModel) -> None:
    plain = tiny.make_unet().state_dict()
    with using_adapter(unet, "first"):
        noise_pred(unet)
    kept = {key.replace(".base_layer", ""): value for key, value in unet.state_dict().items() if "lora_" not in key}
    assert kept.keys() == plain.keys()
    assert all(torch.equal(kept[key], plain[key]) for key in plain)


def add_lora_of_convolutions(unet: UNet2DConditionModel) -> None:
    torch.manual_seed(3)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["conv1", "to_q"], init_lora_weights=False), "third")
    unet.disable_adapters()


@pytest.mark.parametrize("names", [("first",), ("third",), ("first", "third")])
def test_folded_adapters_are_the_same_function(unet: UNet2DConditionModel, names: tuple[str, ...]) -> None:
    add_lora_of_convolutions(unet)
    for form in (torch.contiguous_format, torch.channels_last):
        unet.to(memory_format=form)
        with using_adapter(unet, *names):
            separate = noise_pred(unet)
            with folded_adapters(unet):
                torch.testing.assert_close(noise_pred(unet), separate, rtol=1e-4, atol=1e-5)
            assert torch.equal(noise_pred(unet), separate)
        assert not torch.equal(separate, noise_pred(unet))


def test_layers_multiply_once_where_their_adapters_are_folded(unet: UNet2DConditionModel) -> None:
    passed: list[str] = []
    for name, layer in unet.named_modules():
        if ".lora_A." in name:
            layer.register_forward_hook(lambda module, inputs, output, name=name: passed.append(name))
    with using_adapter(unet, "first"), folded_adapters(unet):
        noise_pred(unet)
        assert not passed
        with torch.autocast("cpu", torch.bfloat16):  # rounded to it, a sum would lose a small change
            noise_pred(unet)
        assert passed
        assert all("first" in name for name in passed)
    passed.clear()
    with using_adapter(unet, None), folded_adapters(unet):
        noise_pred(unet)
    assert not passed


def test_weights_of_16_bits_are_not_folded(unet: UNet2DConditionModel) -> None:
    unet.to(torch.bfloat16)
    with using_adapter(unet, "first"):
        separate = noise_pred(unet)
        with folded_adapters(unet):
            assert torch.equal(noise_pred(unet), separate)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_a_folded_adapter_of_zeros_changes_no_bit(unet: UNet2DConditionModel, form: torch.memory_format) -> None:
    add_lora_of_convolutions(unet)
    unet.to(memory_format=form)
    for name in ("first", "third"):
        zero_adapter(unet, name)
    plain = noise_pred(tiny.make_unet().to(memory_format=form))
    with using_adapter(unet, "first", "third"), folded_adapters(unet):
        assert torch.equal(noise_pred(unet), plain)
        for module in unet.modules():
            if isinstance(module, LoraLayer) and isinstance(module.base_layer, torch.nn.Conv2d):
                folded = inspect.getclosurevars(module.forward).nonlocals["weight"]
                assert folded.stride() == module.base_layer.weight.stride()


def test_what_stood_in_for_a_layer_is_put_back_after_folding(unet: UNet2DConditionModel) -> None:
    layers = [layer for layer in unet.modules() if isinstance(layer, LoraLayer)]
    layers[0].forward = own = layers[0].forward
    with pytest.raises(RuntimeError), using_adapter(unet, "second"), folded_adapters(unet):
        assert all("forward" in vars(layer) for layer in layers)
        raise RuntimeError
    assert vars(layers[0])["forward"] is own
    assert not any("forward" in vars(layer) for layer in layers[1:])


@pytest.mark.parametrize("name", ["third", "", "First", "../first"])
def test_a_name_that_is_not_loaded_is_answered_with_those_that_are(unet: UNet2DConditionModel, name: str) -> None:
    with pytest.raises(InputError, match="allowed: first, second"), using_adapter(unet, name):
        pass


def test_a_unet_without_adapters_can_be_the_baseline_and_nothing_else() -> None:
    unet = tiny.make_unet()
    with using_adapter(unet, None):
        noise_pred(unet)
    with pytest.raises(InputError, match="none is loaded"), using_adapter(unet, "first"):
        pass


def test_two_threads_never_see_each_others_adapter(unet: UNet2DConditionModel) -> None:
    entered, leave, order = threading.Event(), threading.Event(), []

    def other() -> None:
        entered.wait(10)
        with using_adapter(unet, "second"):
            order.append("second")

    thread = threading.Thread(target=other)
    thread.start()
    with using_adapter(unet, "first"):
        entered.set()
        leave.wait(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert unet_lock(unet) is unet_lock(unet)
    assert unet_lock(unet) is not unet_lock(tiny.make_unet())


def test_what_is_saved_is_what_is_loaded(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    folder = save_lora(unet, tmp_path / "first", "first", details={"title": "One", "recipe": {"lr": 1e-4}})
    assert json.loads((folder / "adapter.json").read_text()) == {
        "kind": "lora",
        "title": "One",
        "recipe": {"lr": 1e-4},
    }
    other = tiny.make_unet()
    load_lora(other, folder, "renamed")
    assert loaded_adapters(other) == ("renamed",)
    assert torch.equal(noise_pred(other), noise_pred(tiny.make_unet()))
    with using_adapter(unet, "first"), using_adapter(other, "renamed"):
        assert torch.equal(noise_pred(other), noise_pred(unet))


def test_the_same_adapter_gives_the_same_file(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    contents = [(save_lora(unet, tmp_path / part, "first") / WEIGHTS).read_bytes() for part in ("a", "b")]
    assert contents[0] == contents[1]


def test_a_diffusers_pipeline_reads_the_file_by_itself(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    folder = save_lora(unet, tmp_path / "first", "first")
    pipeline = tiny.make_pipeline("dermatology")
    pipeline.load_lora_weights(str(folder), adapter_name="first", local_files_only=True)
    with using_adapter(unet, "first"), using_adapter(pipeline.unet, "first"):
        assert torch.equal(noise_pred(pipeline.unet), noise_pred(unet))


def test_adapters_that_do_not_fit_are_refused(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    folder = save_lora(unet, tmp_path / "first", "first")
    weights = load_file(folder / WEIGHTS)
    renamed = {key.replace("down_blocks.0", "down_blocks.7"): value for key, value in weights.items()}
    wider = {key: value.repeat_interleave(2, 1) if "lora_A" in key else value for key, value in weights.items()}
    other_part = {key.replace("unet.", "text_encoder."): value for key, value in weights.items()}
    for wrong in (renamed, wider, other_part, {}):
        save_file(wrong, folder / WEIGHTS)
        with pytest.raises(ModelError, match=WEIGHTS):
            load_lora(tiny.make_unet(), folder, "first")


def test_adapters_of_an_unknown_kind_or_without_weights_are_refused(tmp_path: Path) -> None:
    unet = tiny.make_unet()
    with pytest.raises(ModelError, match=r"adapter\.json is missing"):
        load_lora(unet, tmp_path, "first")
    (tmp_path / "adapter.json").write_text('{"kind": "hypernetwork"}')
    with pytest.raises(ModelError, match="'hypernetwork'"):
        load_lora(unet, tmp_path, "first")
    (tmp_path / "adapter.json").write_text('{"kind": "lora"}')
    with pytest.raises(ModelError, match=WEIGHTS):
        load_lora(unet, tmp_path, "first")


@pytest.mark.parametrize("name", ["none", "forward", "", "A", "a.b", "a/b", "x" * 49])
def test_names_that_could_mean_something_else_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot be an adapter's name"):
        load_lora(tiny.make_unet(), tmp_path, name)
