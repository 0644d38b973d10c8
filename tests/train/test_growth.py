"""A grown UNet draws what the narrower one drew, and learns what it could not."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from medviz.errors import InputError
from train.growth import grown

CHANNELS = (16, 32, 48)
ATTENDS = (False, True, True)


@pytest.fixture(scope="module")
def narrow() -> UNet2DConditionModel:
    torch.manual_seed(3)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=24,
        norm_num_groups=4,
    )


@torch.no_grad()
def predicted(unet: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(3, 4, 16, 16, generator=generator), torch.randn(3, 5, 24, generator=generator)
    return unet(latents, torch.tensor([3, 400, 990]), encoder_hidden_states=text).sample


@pytest.mark.parametrize(
    ("channels", "attends"),
    [((32, 64, 96), ATTENDS), (CHANNELS, (True, True, True)), ((48, 96, 144), (True, True, True))],
)
def test_draws_what_it_drew(narrow, channels, attends) -> None:
    wide = grown(narrow, channels, attends)
    assert wide.config.block_out_channels == channels
    assert [hasattr(block, "attentions") for block in wide.down_blocks] == list(attends)
    torch.testing.assert_close(predicted(wide), predicted(narrow), atol=2e-5, rtol=1e-4)


def test_draws_nearly_what_it_drew_where_widths_grow_unequally(narrow) -> None:
    """Far nearer than another start would be, of the same widths."""
    wide, before = predicted(grown(narrow, (32, 40, 56), ATTENDS)), predicted(narrow)
    assert (wide - before).square().mean() < 0.1 * before.var()


def test_copies_are_read_unequally_so_that_they_part(narrow) -> None:
    wide = grown(narrow, (32, 64, 96), ATTENDS)
    copied = wide.conv_in.weight
    assert torch.equal(copied[0::2], copied[1::2])
    wide(torch.randn(2, 4, 16, 16), 500, encoder_hidden_states=torch.randn(2, 5, 24)).sample.square().sum().backward()
    assert not torch.allclose(copied.grad[0::2], copied.grad[1::2], rtol=0.01)


def test_the_same_seed_grows_the_same(narrow) -> None:
    a, b, c = (grown(narrow, (32, 64, 96), ATTENDS, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_a_grown_unet_is_read_back_and_grows_again(narrow, tmp_path) -> None:
    grown(narrow, (32, 64, 96), ATTENDS).save_pretrained(tmp_path)
    again = grown(UNet2DConditionModel.from_pretrained(tmp_path), (64, 128, 192), ATTENDS)
    torch.testing.assert_close(predicted(again), predicted(narrow), atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("channels", "attends", "message"),
    [
        ((32, 64), ATTENDS, "3 levels"),
        ((32, 64, 96), (True, True), "3 levels"),
        ((8, 64, 96), ATTENDS, "at least"),
        ((18, 64, 96), ATTENDS, "multiples of 4"),
        ((32, 32, 96), ATTENDS, "neighbouring"),
        ((32, 64, 96), (False, False, True), "taken away"),
    ],
)
def test_refuses_what_cannot_draw_the_same(narrow, channels, attends, message) -> None:
    with pytest.raises(InputError, match=message):
        grown(narrow, channels, attends)
