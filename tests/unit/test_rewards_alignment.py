import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from medviz.domains import get_domain
from medviz.domains.base import ParsedPrompt
from medviz.errors import InputError, ModelError
from medviz.rewards.alignment import AlignmentNetwork
from medviz.rewards.attribute import attribute_reward
from medviz.rewards.classifier import AttributeClassifier
from medviz.rewards.consistency import consistency
from medviz.rewards.registry import Drawn, get_reward, safe_rewards
from tests import tiny

PROMPTS = ["a dermoscopic image with melanoma (MEL)", "a dermoscopic image showing hair, ruler"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a contrastive run exports as alignment/, with random weights."""
    tokenizer = tiny.make_tokenizer("dermatology")
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": tiny.MAX_LENGTH, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    with torch.no_grad():
        # CLIP starts its embeddings at 0.02: too faint for an untrained encoder to tell two prompts apart.
        model.text_model.get_input_embeddings().weight.normal_()
    path = tmp_path_factory.mktemp("alignment")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def network(folder):
    return AlignmentNetwork.load(folder)


def images(count=2, side_px=32):
    return torch.rand(count, 3, side_px, side_px, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_similarity_is_the_cosine_that_the_model_was_trained_on(folder, network):
    model = CLIPModel.from_pretrained(folder).eval()
    tokens = network.tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**tokens, pixel_values=images())
    expected = (output.image_embeds * output.text_embeds).sum(1)
    torch.testing.assert_close(network.similarity(images(), PROMPTS), expected)
    assert not torch.allclose(expected, (output.image_embeds * output.text_embeds.flip(0)).sum(1), atol=1e-3)


def test_every_prompt_is_read_with_its_own_image_whatever_the_batch(network):
    together = network.similarity(images(), PROMPTS)
    apart = [network.similarity(images()[i : i + 1], PROMPTS[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(apart))
    torch.testing.assert_close(network.similarity(images().flip(0), PROMPTS[::-1]), together.flip(0))


def test_gradients_flow_to_images_of_any_size_and_the_images_stay(folder):
    # Read without gradient first: what is remembered of a prompt must serve a backward pass later on.
    network = AlignmentNetwork.load(folder)
    with torch.inference_mode():
        network.similarity(images(), PROMPTS)
    pixels = images(side_px=48).requires_grad_()
    before = pixels.detach().clone()
    network.similarity(pixels, PROMPTS).sum().backward()
    assert pixels.grad.abs().sum() > 0
    assert torch.equal(pixels.detach(), before)


def test_the_reward_asks_the_network_for_each_prompt(network):
    parsed = tuple(get_domain("dermatology").parse(prompt) for prompt in PROMPTS)
    values = get_reward("alignment")(Drawn(images(), parsed, alignment=network))
    torch.testing.assert_close(values, network.similarity(images(), PROMPTS))
    with pytest.raises(InputError, match="contrastive model"):
        get_reward("alignment")(Drawn(images(), parsed))
    with pytest.raises(InputError, match="attribute classifier"):
        get_reward("attribute")(Drawn(images(), parsed))


def test_other_shapes_and_folders_are_refused(network, tmp_path):
    for wrong in (images()[:1], images()[:, :1], images()[0]):
        with pytest.raises(InputError, match="one a prompt"):
            network.similarity(wrong, PROMPTS)
    with pytest.raises(ModelError, match="text projection"):
        AlignmentNetwork.load(tmp_path)


HEADS = ("pneumonia", "edema", "pa_view", "male")
ASPECTS = {"finding": ("pneumonia", "edema"), "person": ("male", "child"), "view": ("pa_view",)}
LOGITS = torch.tensor([[2.0, -4.0, 1.0, -2.0], [2.0, -4.0, 1.0, -2.0]])


def rows(mask, logits=LOGITS):
    return consistency(logits, torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 2), torch.tensor(mask), [0.5] * 4, HEADS, ASPECTS)


def test_each_part_of_a_report_is_the_margin_of_its_own_heads():
    found = rows([[True] * 4, [True, False, False, True]])
    assert list(found) == ["finding", "person", "view", "report"]
    torch.testing.assert_close(found["finding"], torch.tensor([(2 + 4) / 8, 2 / 4]))
    torch.testing.assert_close(found["view"], torch.tensor([-0.25, float("nan")]), equal_nan=True)
    torch.testing.assert_close(found["person"], torch.tensor([0.5, 0.5]))


def test_in_the_whole_report_every_part_weighs_alike():
    found = rows([[True] * 4, [True, False, False, True]])
    torch.testing.assert_close(found["report"], torch.tensor([(0.75 - 0.25 + 0.5) / 3, (0.5 + 0.5) / 2]))
    plain = attribute_reward(LOGITS, torch.tensor([[1.0, 0, 0, 0]] * 2), torch.ones(2, 4), thresholds=[0.5] * 4)
    assert not torch.allclose(found["report"], plain)


def test_a_report_has_a_gradient_where_a_part_is_not_asked():
    logits = LOGITS.clone().requires_grad_()
    rows([[True, True, False, False]] * 2, logits)["report"].sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[:, 0].gt(0).all()
    assert logits.grad[:, 2:].eq(0).all()


def test_radiology_says_which_heads_belong_to_which_part(model_root):
    domain = get_domain("radiology")
    classifier = AttributeClassifier.load(model_root / "radiology" / "rewards" / "attribute")
    assert domain.aspects["view"] == ("pa_view",)
    assert {"pneumonia", "normal", "effusion"} <= set(domain.aspects["finding"])
    assert set().union(*domain.aspects.values()) == {head.name for head in domain.heads}
    asked = domain.parse("a frontal chest X-ray of a child, pneumonia")
    batch = Drawn(images(), (asked, domain.parse(f"{asked.prompt}, PA view")), classifier, aspects=domain.aspects)
    view = safe_rewards(get_reward("view_consistency"), batch)
    assert view.valid.tolist() == [False, True]
    for name in ("finding_consistency", "report_consistency"):
        values = get_reward(name)(batch)
        assert values.shape == (2,)
        assert values.abs().le(1).all()


def test_a_domain_whose_reports_have_no_parts_has_no_consistency(model_root):
    classifier = AttributeClassifier.load(model_root / "dermatology" / "rewards" / "attribute")
    assert get_domain("dermatology").aspects == {}
    batch = Drawn(images(1), (ParsedPrompt("hair", {}, {"hair": 1.0}, (), ()),), classifier)
    with pytest.raises(InputError, match="no part 'view'; they have none"):
        get_reward("view_consistency")(batch)
