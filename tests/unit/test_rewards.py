import math

import pytest
import torch

from medviz.domains import get_domain
from medviz.domains.base import ParsedPrompt
from medviz.errors import InputError
from medviz.results import Score
from medviz.rewards.attribute import attribute_reward, attribute_reward_paper, prompt_accuracy, prompt_targets
from medviz.rewards.classifier import AttributeClassifier
from medviz.rewards.likeness import Likeness
from medviz.rewards.registry import REWARDS, STEPPED, Drawn, get_reward, safe_rewards
from medviz.rewards.scores import score_images, score_pair

HALF = [0.5] * 4
LOGITS = torch.tensor([[2.0, -2.0, 8.0, 0.5], [-1.0, 3.0, -8.0, 100.0]])
TARGETS = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
MASK = torch.tensor([[True, True, True, False], [True, True, True, False]])


def asking(**targets: float) -> ParsedPrompt:
    return ParsedPrompt("a prompt", {}, targets, (), ())


@pytest.fixture(scope="module")
def classifier(model_root) -> AttributeClassifier:
    return AttributeClassifier.load(model_root / "dermatology" / "rewards" / "attribute")


@pytest.fixture(scope="module")
def judge(model_root) -> AttributeClassifier:
    return AttributeClassifier.load(model_root / "dermatology" / "judge")


def test_the_paper_s_reward_counts_heads_that_answer_as_asked():
    rewards = attribute_reward_paper(LOGITS, TARGETS, MASK, HALF)
    torch.testing.assert_close(rewards, torch.tensor([2 / 3, 2 / 3]))
    assert torch.equal(prompt_accuracy(LOGITS, TARGETS, MASK, HALF), rewards)


def test_the_paper_s_reward_of_six_heads_has_seven_levels():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 6, generator=generator)
    targets = (torch.rand(500, 6, generator=generator) < 0.5).float()
    rewards = attribute_reward_paper(logits, targets, torch.ones(500, 6, dtype=torch.bool), [0.5] * 6)
    assert {round(6 * r) for r in rewards.tolist()} == set(range(7))
    assert torch.allclose(6 * rewards, (6 * rewards).round(), atol=1e-5)


def test_each_head_answers_at_its_own_threshold():
    logits = torch.logit(torch.tensor([[0.3, 0.3]]))
    both = torch.ones(1, 2)
    assert attribute_reward_paper(logits, both, both.bool(), [0.2, 0.4]).item() == 0.5
    assert attribute_reward_paper(logits, both, both.bool(), {"hair": 0.2, "ink": 0.4}).item() == 0.5
    with_margins = attribute_reward(logits, both, both.bool(), thresholds=[0.3, 0.3])
    assert with_margins.item() == pytest.approx(0.0, abs=1e-6)


def test_the_continuous_reward_is_the_mean_clamped_margin():
    rewards = attribute_reward(LOGITS, TARGETS, MASK)
    torch.testing.assert_close(rewards, torch.tensor([(2 + 2 - 4) / 12, (-1 + 3 + 4) / 12]))
    assert attribute_reward(torch.full((1, 4), 1e6), torch.ones(1, 4), torch.ones(1, 4)).item() == 1.0


def test_the_continuous_reward_has_a_gradient_where_the_paper_s_has_none():
    logits = torch.tensor([[0.1, -0.1]], requires_grad=True)
    attribute_reward(logits, torch.ones(1, 2), torch.ones(1, 2)).sum().backward()
    assert logits.grad.gt(0).all()


def test_a_prompt_that_decides_nothing_has_no_reward():
    nothing = torch.zeros_like(MASK)
    assert attribute_reward(LOGITS, TARGETS, nothing).isnan().all()
    assert attribute_reward_paper(LOGITS, TARGETS, nothing, HALF).isnan().all()


def test_undecided_heads_count_for_nothing():
    other = LOGITS.clone()
    other[:, 3] = torch.tensor([float("nan"), -50.0])
    assert torch.equal(attribute_reward(other, TARGETS, MASK), attribute_reward(LOGITS, TARGETS, MASK))
    assert torch.equal(
        attribute_reward_paper(other, TARGETS, MASK, HALF), attribute_reward_paper(LOGITS, TARGETS, MASK, HALF)
    )


def test_targets_are_restricted_to_the_heads_and_the_rest_is_masked():
    targets, mask = prompt_targets([asking(hair=1.0, ink=0.0), asking(patches=1.0)], ("ink", "hair", "ruler"))
    assert targets.tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert mask.tolist() == [[True, True, False], [False, False, False]]
    assert prompt_targets([], ("ink",))[0].shape == (0, 1)


def test_what_a_real_prompt_asks_reaches_the_reward(classifier):
    parsed = get_domain("dermatology").parse("a dermoscopic image with melanoma (MEL) showing hair, ruler")
    targets, mask = prompt_targets([parsed], classifier.heads)
    asked = {h for h, t, m in zip(classifier.heads, targets[0], mask[0], strict=True) if m and t == 1}
    refused = {h for h, t, m in zip(classifier.heads, targets[0], mask[0], strict=True) if m and t == 0}
    assert asked == {"melanoma", "hair", "ruler"}
    assert {"nevus", "ink", "gel_bubble"} <= refused
    assert not mask[0, classifier.heads.index("streaks")]


def drawn(classifier, prompts, seed=0) -> Drawn:
    images = torch.rand(len(prompts), 3, 40, 40, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return Drawn(images, tuple(prompts), classifier)


def colours():
    """Likeness by mean colour, of two real and two drawn images."""
    likeness = Likeness(lambda images: images.mean(dim=(2, 3)), torch.eye(3)[:2])
    likeness.drawn = -torch.eye(3)[:2]
    return likeness


def test_every_reward_has_one_signature_and_one_value_an_image(classifier):
    class Anatomy:
        classes = ("background", "lesion")

        def probabilities(self, images):
            return torch.stack([images.mean(dim=1) * 0 + 0.1, images.mean(dim=1) * 0 + 0.9], dim=1)

    batch = drawn(classifier, [asking(hair=1.0), asking(ink=0.0)])

    class Alignment:
        def similarity(self, images, prompts):
            return images.mean(dim=(1, 2, 3))

    aspects = {"view": ("hair", "ink"), "finding": ("hair", "ink")}
    batch = Drawn(batch.images, batch.prompts, classifier, Anatomy(), Alignment(), colours(), aspects)
    before = batch.images.clone()
    for reward in REWARDS.values():
        values = reward(batch)
        assert values.shape == (2,)
        assert values.isfinite().all()
        assert torch.equal(batch.images, before)
        # Batched and one by one are the same: no reward of an image depends on its neighbours.
        alone = torch.cat([reward(batch.one(index)) for index in range(2)])
        torch.testing.assert_close(alone, values, rtol=1e-4, atol=1e-5)
    assert torch.allclose(REWARDS["anatomy"](batch), torch.full((2,), 0.8))


def test_every_reward_has_a_gradient_but_those_that_count(classifier):
    class Anatomy:
        classes = ("background", "lesion")

        def probabilities(self, images):
            sure = torch.sigmoid(images.mean(dim=1) + 2)
            return torch.stack([1 - sure, sure], dim=1)

    class Alignment:
        def similarity(self, images, prompts):
            return images.mean(dim=(1, 2, 3))

    images = drawn(classifier, [asking(hair=1.0)]).images
    for name, reward in REWARDS.items():
        pixels = images.clone().requires_grad_()
        aspects = {"view": ("hair",), "finding": ("hair",)}
        batch = Drawn(pixels, (asking(hair=1.0),), classifier, Anatomy(), Alignment(), colours(), aspects)
        assert reward(batch).requires_grad == (name not in STEPPED)


def test_an_image_without_the_structure_has_the_lowest_anatomy_reward(classifier):
    class Empty:
        classes = ("background", "lesion")

        def probabilities(self, images):
            return torch.tensor([0.9, 0.1]).view(1, 2, 1, 1).expand(len(images), 2, 8, 8)

    batch = drawn(classifier, [asking(hair=1.0)])
    assert REWARDS["anatomy"](Drawn(batch.images, batch.prompts, classifier, Empty())).item() == -1.0
    with pytest.raises(InputError, match="segmenter"):
        REWARDS["anatomy"](batch)


def test_an_unknown_reward_is_refused_with_the_names_there_are():
    with pytest.raises(InputError, match="attribute_paper"):
        get_reward("beauty")


def test_one_bad_image_costs_no_other_its_reward(classifier):
    prompts = [asking(hair=1.0), asking(ink=1.0), asking(hair=0.0)]

    def picky(batch: Drawn) -> torch.Tensor:
        if any("ink" in prompt.targets for prompt in batch.prompts):
            raise ValueError("no ink")
        return torch.arange(len(batch)) + 5.0

    found = safe_rewards(picky, drawn(classifier, prompts))
    assert found.valid.tolist() == [True, False, True]
    assert found.values.tolist() == [5.0, 0.0, 5.0]
    assert "no ink" in found.failures[0]


def test_a_reward_that_is_not_finite_masks_its_image(classifier):
    values = torch.tensor([1.0, float("nan"), float("inf")])
    found = safe_rewards(lambda batch: values, drawn(classifier, [asking(hair=1.0)] * 3))
    assert found.valid.tolist() == [True, False, False]
    assert found.values.tolist() == [1.0, 0.0, 0.0]
    assert found.failures


def test_a_reward_that_always_fails_masks_all_and_raises_nothing(classifier):
    def broken(batch: Drawn) -> torch.Tensor:
        raise RuntimeError("broken")

    for count in (1, 2):
        found = safe_rewards(broken, drawn(classifier, [asking(hair=1.0)] * count))
        assert not found.valid.any()
        assert found.values.tolist() == [0.0] * count


def test_a_reward_of_another_shape_is_a_failure(classifier):
    found = safe_rewards(lambda batch: torch.tensor(1.0), drawn(classifier, [asking(hair=1.0)] * 2))
    assert not found.valid.any()


def test_an_interrupt_is_not_swallowed(classifier):
    def stopped(batch: Drawn) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        safe_rewards(stopped, drawn(classifier, [asking(hair=1.0)]))


def test_a_pair_is_scored_by_reward_and_judge_apart(classifier, judge):
    domain = get_domain("dermatology")
    parsed = domain.parse("a dermoscopic image with melanoma (MEL) showing hair")
    images = drawn(classifier, [parsed, parsed]).images
    scores = score_pair({"judge": judge, "attribute": classifier}, domain, parsed, images[0], images[1])
    assert [score.role for score in scores] == sorted((score.role for score in scores), reverse=True)
    names = [score.name for score in scores if score.role == "judge"]
    assert names == [score.name for score in scores if score.role == "reward"]
    assert {"Prompt accuracy", "Attribute margin", "Melanoma", "Hair", "No ink"} <= set(names)
    # The other diagnoses follow from the one asked for.
    assert not any("nevus" in name.lower() for name in names)
    figures = {(score.role, score.name): score for score in scores}
    for index, side in enumerate(("baseline", "aligned")):
        hair = classifier.probabilities(images[index : index + 1])[0, classifier.heads.index("hair")].item()
        ink = judge.probabilities(images[index : index + 1])[0, judge.heads.index("ink")].item()
        assert getattr(figures["reward", "Hair"], side) == pytest.approx(hair, abs=1e-5)
        assert getattr(figures["judge", "No ink"], side) == pytest.approx(1 - ink, abs=1e-5)


def test_a_single_image_has_no_aligned_figure_and_an_open_prompt_no_accuracy(classifier):
    domain = get_domain("dermatology")
    scores = score_images({"attribute": classifier}, domain, domain.parse("a skin lesion"), [torch.zeros(3, 32, 32)])
    assert scores == [
        Score("Prompt accuracy", "reward", None, None),
        Score("Attribute margin", "reward", None, None),
    ]
    with pytest.raises(InputError, match="pair"):
        score_images({"attribute": classifier}, domain, domain.parse("hair"), [])


def test_scores_are_finite_or_none(classifier, judge):
    domain = get_domain("dermatology")
    parsed = domain.parse("nevus with no visible artifacts")
    scores = score_images({"attribute": classifier, "judge": judge}, domain, parsed, [torch.ones(3, 50, 70)])
    assert all(score.aligned is None and math.isfinite(score.baseline) for score in scores)


def test_a_report_s_parts_have_a_row_each_where_the_prompt_speaks_of_them(model_root):
    domain, judge = get_domain("radiology"), AttributeClassifier.load(model_root / "radiology" / "judge")
    image, whole = torch.zeros(3, 64, 64), domain.parse("a PA chest X-ray of a child with pneumonia")

    def rows(parsed):
        found = score_images({"judge": judge}, domain, parsed, [image])
        return {score.name: score.baseline for score in found if score.name.endswith("consistency")}

    parts = rows(whole)
    assert set(parts) == {f"{part.capitalize()} consistency" for part in (*domain.aspects, "report")}
    means = [value for name, value in parts.items() if name != "Report consistency"]
    assert parts["Report consistency"] == pytest.approx(sum(means) / len(means), abs=1e-6)
    names = {
        score.name
        for score in score_images({"judge": judge}, domain, domain.parse("a child, AP view, pneumonia"), [image])
    }
    assert "No no finding" not in names
    assert {"Some finding", "No PA view"} <= names
    assert "View consistency" not in rows(domain.parse("a chest X-ray with pneumonia"))
    assert rows(domain.parse("a picture")) == {}
