import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from medviz.errors import InputError, ModelError
from medviz.rewards.classifier import AttributeClassifier, last_linear


@pytest.fixture(params=["rewards/attribute", "judge"])
def folder(request, model_root, tmp_path):
    return shutil.copytree(model_root / "dermatology" / request.param, tmp_path / "classifier")


def edited(folder, **change):
    path = folder / "heads.json"
    card = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (card | change).items() if value is not None}))
    return folder


def images(count=2, height=40, width=56) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_images_of_any_size_give_one_float32_logit_a_head(folder):
    classifier = AttributeClassifier.load(folder)
    for height, width in ((32, 32), (40, 56), (130, 128)):
        logits = classifier.logits(images(2, height, width))
        assert logits.shape == (2, len(classifier.heads))
        assert logits.dtype == torch.float32
    half = classifier.logits(images().to(torch.float16))
    torch.testing.assert_close(half, classifier.logits(images()), atol=1e-2, rtol=1e-2)


def test_the_images_are_never_changed(folder):
    classifier = AttributeClassifier.load(folder)
    for size in (classifier.size_px, 50):
        given = images(2, size, size)
        before = given.clone()
        classifier.logits(given)
        classifier.features(given)
        assert torch.equal(given, before)


def test_the_same_image_gets_the_same_logits_alone_and_in_a_batch(folder):
    classifier = AttributeClassifier.load(folder)
    batch = images(5)
    torch.testing.assert_close(classifier.logits(batch)[3:4], classifier.logits(batch[3:4]), atol=1e-5, rtol=1e-5)


def test_logits_are_divided_by_each_head_s_temperature(folder):
    plain = AttributeClassifier.load(folder)
    temperature = {head: float(index + 1) for index, head in enumerate(plain.heads)}
    scaled = AttributeClassifier.load(edited(folder, temperature=temperature))
    divisors = torch.arange(1.0, len(plain.heads) + 1)
    torch.testing.assert_close(scaled.logits(images()) * divisors, plain.logits(images()))
    torch.testing.assert_close(scaled.probabilities(images()), torch.sigmoid(scaled.logits(images())))


def test_gradients_reach_the_image_and_no_weight(folder):
    classifier = AttributeClassifier.load(folder)
    given = images().requires_grad_(True)
    classifier.logits(given).sum().backward()
    assert given.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in classifier.model.parameters())


def test_features_are_what_the_last_layer_reads(folder):
    classifier = AttributeClassifier.load(folder)
    features = classifier.features(images())
    logits = last_linear(classifier.model)(features) / torch.tensor(list(classifier.card["temperature"].values()))
    torch.testing.assert_close(logits, classifier.logits(images()), atol=1e-5, rtol=1e-5)


def test_what_is_not_a_batch_of_colour_images_is_refused(folder):
    classifier = AttributeClassifier.load(folder)
    for shape in ((3, 32, 32), (1, 1, 32, 32)):
        with pytest.raises(InputError, match="shape"):
            classifier.logits(torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": ["hair"]}, "does not fit its network"),
        ({"heads": "hair"}, "no list of names"),
        ({"temperature": {}}, "temperature"),
        ({"threshold": None}, "threshold"),
        ({"mean": [0.5]}, "mean"),
        ({"size_px": "large"}, "size_px"),
        ({"architecture": "ResNetForImageClassification"}, "does not describe"),
    ],
)
def test_a_card_that_does_not_fit_is_an_error_that_names_the_file(folder, change, message):
    with pytest.raises(ModelError, match=message) as caught:
        AttributeClassifier.load(edited(folder, **change))
    assert "heads.json" in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("temperature", 0.0), ("threshold", 1.0), ("threshold", float("nan"))])
def test_a_temperature_or_threshold_without_meaning_is_refused(folder, key, value):
    card = json.loads((folder / "heads.json").read_text())
    with pytest.raises(ModelError, match=key):
        AttributeClassifier.load(edited(folder, **{key: dict.fromkeys(card["heads"], value)}))


def test_weights_that_lack_a_layer_are_never_filled_with_random_ones(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights[next(name for name in weights if name.endswith("classifier.weight") or name.endswith("1.weight"))]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="do not fit"):
        AttributeClassifier.load(folder)


def test_damaged_weights_are_an_error(folder):
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="cannot be loaded"):
        AttributeClassifier.load(folder)


def test_a_missing_folder_is_an_error_and_nothing_is_fetched(tmp_path):
    with pytest.raises(ModelError, match="missing"):
        AttributeClassifier.load(tmp_path / "bert-base-uncased")
