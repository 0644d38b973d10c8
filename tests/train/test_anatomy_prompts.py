"""Anatomy prompt tuning: losses by hand, what learns and what does not, and the same weights after a resume."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from medviz.domains.chest_places import WORDINGS, mirrored_place
from medviz.errors import InputError, ModelError
from medviz.grounding.anatomy import Segmenter
from medviz.grounding.atlas import Atlas, Gaussian, place_boxes
from medviz.grounding.capture import capture, watch
from medviz.models.adapters import load_adapter, using_adapter
from tests import tiny
from tests.train.grounding_scenes import skin_rows, split_of
from train.anatomy_prompts import LAYERS, AnatomyPromptsConfig, AnatomyPromptsLearner
from train.attention_losses import diversity_loss, location_loss
from train.config import read_recipe
from train.datasets.grounded_phrases import dermoscopic_masks
from train.datasets.outlined_scenes import open_outlined_scene, share_of_cells
from train.datasets.placed_findings import PlacedFinding, fit_atlas, imaging_sentences, placed_findings
from train.datasets.placed_scenes import PlacedPrompts, PlacedScene, open_placed_scene
from train.datasets.scenes import ScenePrompt
from train.datasets.split import Split
from train.loop import fit

RECIPES = Path(__file__).resolve().parents[2] / "train" / "recipes"
SIDE = 64


def lungs() -> tuple[np.ndarray, np.ndarray]:
    masks = np.zeros((2, SIDE, SIDE), bool)
    masks[0, 10:50, 8:26], masks[1, 10:50, 38:56] = True, True
    return masks[0], masks[1]


ATLAS = Atlas.of_boxes([place_boxes(*lungs())])


def scene(count: int = 6, **prompts) -> PlacedScene:
    wordings = ("left lower zone", "right upper zone", "left hilum")
    findings = [PlacedFinding(i, "lung opacity", (wordings[i % 3],), "box") for i in range(count)]
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(count, tiny.LATENT_CHANNELS, tiny.SAMPLE_SIZE, tiny.SAMPLE_SIZE, generator=generator)
    return PlacedScene(tuple(findings), latents, (None,) * count, ATLAS, PlacedPrompts(**prompts))


def config(out: Path, **options) -> AnatomyPromptsConfig:
    small = AnatomyPromptsConfig(out=str(out), steps=4, batch=2, learning_rate=0.05, checkpoint_every_s=1e9)
    return replace(small, **options)


def learner(out: Path, **options) -> AnatomyPromptsLearner:
    made = config(out, **options)
    shown = replace(scene(), prompts=made.prompts())
    return AnatomyPromptsLearner(made, tiny.make_pipeline("radiology"), shown, scene(2))


def test_diversity_is_the_mean_squared_cosine_over_pairs() -> None:
    first, second, third = [1.0, 0, 0, 0], [1.0, 1, 0, 0], [0, 0, 2.0, 0]
    maps = torch.tensor([first, second, third]).view(3, 2, 2)
    # cosines: 1/sqrt(2), 0, 0, each in both orders, over six ordered pairs
    assert diversity_loss(maps).item() == pytest.approx(2 * 0.5 / 6)
    assert diversity_loss(maps[:1]).item() == 0.0
    assert diversity_loss(maps[[0, 0]]).item() == pytest.approx(1.0)
    both = torch.stack([maps, maps[[2, 2, 2]]])
    assert diversity_loss(both).item() == pytest.approx((1 / 6 + 1.0) / 2)
    with pytest.raises(InputError, match="attention maps"):
        diversity_loss(torch.zeros(2, 2))


def test_location_is_one_minus_the_cosine_to_the_masked_map_plus_the_gaussian() -> None:
    maps = torch.tensor([[3.0, 1.0, 2.0, 2.0], [3.0, 1.0, 2.0, 2.0]]).view(2, 2, 2).requires_grad_(True)
    region = torch.tensor([[1.0, 0.0], [0.5, 1e-6]])
    # A = (3, 1, 2, 2); G > 1e-5 in cells 0 and 2; target = (3 + 0.1, 0, 2 + 0.05, 0.1 * 1e-6)
    wanted = 1 - (3 * 3.1 + 2 * 2.05) / (np.sqrt(18) * np.sqrt(3.1**2 + 2.05**2))
    loss = location_loss(maps, region, alpha=0.1, eps=1e-5)
    assert loss.item() == pytest.approx(wanted, abs=1e-6)
    loss.backward()
    # the target is constant: the gradient of 1 - cos(A, t) is (cos A/|A| - t/|t|)/|A|, halved by the mean of two maps
    a, t = np.array([3.0, 1, 2, 2]), np.array([3.1, 0, 2.05, 1e-7])
    cosine = a @ t / np.linalg.norm(a) / np.linalg.norm(t)
    slope = (cosine * a / np.linalg.norm(a) - t / np.linalg.norm(t)) / np.linalg.norm(a) / 2
    assert np.allclose(maps.grad.numpy()[0].ravel(), slope, atol=1e-6)
    inside = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert location_loss(inside[None], inside, alpha=1.0, eps=1e-5).item() == pytest.approx(0.0, abs=1e-6)
    assert location_loss(inside.flip(-1)[None], inside, alpha=1.0, eps=1e-5).item() == pytest.approx(1.0)
    with pytest.raises(InputError, match="one grid"):
        location_loss(maps, torch.zeros(3, 3), 0.1, 1e-5)


def test_only_the_offsets_of_the_words_that_were_said_learn(tmp_path: Path) -> None:
    tuned = learner(tmp_path)
    parts = {"unet": tuned.pipeline.unet, "text": tuned.pipeline.text_encoder, "vae": tuned.pipeline.vae}
    before = {part: {n: w.clone() for n, w in module.state_dict().items()} for part, module in parts.items()}
    for step in range(6):
        tuned.update(step)
    for part, module in parts.items():
        assert all(torch.equal(w, before[part][n]) for n, w in module.state_dict().items()), part
    tokenizer = tuned.pipeline.tokenizer
    said = {t for w in ("left lower zone", "right upper zone", "left hilum") for t in tokenizer.tokenize(w)}
    moved = {t for t, row in zip(tuned.embeddings.tokens, tuned.embeddings.offsets, strict=True) if row.abs().max() > 0}
    assert moved == said
    assert not set(tokenizer.tokenize("opacity")) & said


def test_the_loss_falls_and_attention_moves_to_the_place(tmp_path: Path) -> None:
    tuned = learner(tmp_path, steps=40, diversity_weight=0.0, jitter=0.0)
    before = tuned.figures()["location_loss"]["baseline"]["value"]
    for step in range(40):
        tuned.update(step)
    figures = tuned.figures()["location_loss"]
    assert figures["baseline"]["value"] == pytest.approx(before), "the baseline is measured with the adapter off"
    assert figures["adapter"]["value"] < before - 0.005
    assert figures["change"]["n"] == 2


def test_a_place_or_a_finding_named_alone_is_drawn_to_all_that_it_means() -> None:
    twice = PlacedFinding(0, "lung opacity", ("right upper zone", "right upper lobe"), "box")
    grid, rng = (16, 16), np.random.default_rng(0)

    def prompts(**options) -> list[ScenePrompt]:
        shown = scene(**options)
        return [replace(shown, findings=(*shown.findings, twice)).prompt(0, rng) for _ in range(400)]

    def places(prompt: ScenePrompt, spread: float = 1.0) -> list[tuple[str, ...]]:
        return [
            p for p in set(WORDINGS.values()) if np.array_equal(prompt.heat(grid), ATLAS.heat(p, grid, spread=spread))
        ]

    alone = prompts(place_share=1.0, spread=2.0)
    assert {WORDINGS[prompt.text] for prompt in alone} == set(WORDINGS.values()), "every place of the atlas"
    assert all(WORDINGS[prompt.text] in places(prompt, 2.0) for prompt in alone)
    assert len({p.text for p in alone if WORDINGS[p.text] == ("left lower zone",)}) == 3, "synonyms too"
    named = prompts(finding_share=1.0)
    assert {(prompt.index, prompt.text) for prompt in named} == {(0, "lung opacity")}
    union = ATLAS.heat(("left lower zone", "right upper zone"), grid)
    assert all(np.array_equal(prompt.heat(grid), union) for prompt in named)
    assert {prompt.text for prompt in prompts()} == {"left lower zone lung opacity"}
    fixed = scene(template="{pathology} of the {location}", place_share=0.5, finding_share=0.5, jitter=0.1).prompt(0)
    assert fixed.text == "lung opacity of the left lower zone", "what is measured has no chance in it"
    assert places(fixed) == [("left lower zone",)]
    texts = [prompt.text for prompt in prompts(place_share=0.5, finding_share=0.25)]
    shares = [np.mean([text == t for text in texts]) for t in ("left lower zone lung opacity", "lung opacity")]
    assert shares == pytest.approx([0.25, 0.25], abs=0.07)


def test_every_layer_sees_one_jittered_target() -> None:
    moved = scene(jitter=0.2).prompt(0, np.random.default_rng(3))
    assert np.array_equal(moved.heat((8, 8)), moved.heat((8, 8)))
    assert not np.allclose(moved.heat((8, 8)), scene().prompt(0).heat((8, 8)), atol=1e-3)


def test_words_of_places_that_no_finding_lies_in_learn_where_places_are_named_alone(tmp_path: Path) -> None:
    tuned = learner(tmp_path, place_share=1.0, spread=2.0)
    for step in range(4):
        tuned.update(step)
    moved = {t for t, row in zip(tuned.embeddings.tokens, tuned.embeddings.offsets, strict=True) if row.abs().max() > 0}
    said = {
        t for w in ("left lower zone", "right upper zone", "left hilum") for t in tuned.pipeline.tokenizer.tokenize(w)
    }
    assert moved - said


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2, "denoising_weight": 0.5}])
def test_a_resumed_run_gives_the_weights_of_an_uninterrupted_one(tmp_path: Path, options: dict) -> None:
    fit(learner(tmp_path / "whole", **options), config(tmp_path / "whole", **options))
    fit(learner(tmp_path / "cut", **options), config(tmp_path / "cut", **options, max_minutes=1e-9))
    resumed = config(tmp_path / "cut", **options, resume=True)
    assert fit(learner(tmp_path / "cut", **options), resumed) is not None
    for path in sorted((tmp_path / "whole" / "model").glob("*.safetensors")):
        whole, cut = load_file(path), load_file(tmp_path / "cut" / "model" / path.name)
        assert all(torch.equal(whole[name], cut[name]) for name in whole)
        assert any(tensor.abs().max() > 0 for tensor in whole.values())
    assert len(list((tmp_path / "whole" / "model").glob("*.safetensors"))) == (2 if options else 1)
    with pytest.raises(InputError, match="other weights"):
        learner(tmp_path / "x", lora_rank=0 if options else 2).load_state(learner(tmp_path / "y", **options).state())


def test_the_exported_folder_is_an_adapter_with_its_atlas(tmp_path: Path) -> None:
    tuned = learner(tmp_path, lora_rank=2, target="atlas")
    metrics = fit(tuned, tuned.config)
    assert metrics is not None
    assert metrics["train_prompts"] == 6
    folder = tmp_path / "model"
    assert json.loads((folder / "adapter.json").read_text())["kind"] == "anatomy_prompts"
    assert Atlas.read(folder / "atlas.json") == ATLAS
    other = AnatomyPromptsLearner(config(tmp_path, adapter="fresh"), tiny.make_pipeline("radiology"), scene())
    load_adapter(other.pipeline, folder, "anatomy")
    for name in ("anatomy", None):
        with using_adapter(tuned.pipeline.unet, name), using_adapter(other.pipeline.unet, name), torch.no_grad():
            ours, theirs = (each.embed(["left hilum lung opacity", "no finding"]) for each in (tuned, other))
        assert torch.equal(ours, theirs)
    with using_adapter(tuned.pipeline.unet, "anatomy"), torch.no_grad():
        assert torch.equal(tuned.embed(["no finding"])[0], ours[1])
        assert not torch.equal(tuned.embed(["left hilum lung opacity"])[0], ours[0])
    with pytest.raises(InputError, match="already holds an adapter"):
        AnatomyPromptsLearner(config(tmp_path), tuned.pipeline, scene())


def test_a_mirrored_phrase_on_a_mirrored_atlas_has_the_mirrored_target() -> None:
    turned = ATLAS.mirrored()
    for wording, places in WORDINGS.items():
        heat = ATLAS.heat(places, (8, 8))
        assert np.allclose(turned.heat([mirrored_place(p) for p in places], (8, 8)), heat[:, ::-1], atol=1e-6), wording
    left, right = (ATLAS.heat([f"{side} lower zone"], (8, 8)) for side in ("left", "right"))
    assert left[:, 4:].sum() > 50 * left[:, :4].sum(), "the patient's left is on the image's right"
    assert right[:, :4].sum() > 50 * right[:, 4:].sum()


def test_the_layers_follow_the_paper_or_the_grid(tmp_path: Path) -> None:
    tuned, found = learner(tmp_path), {}
    for choice in LAYERS:
        maps: dict[str, torch.Tensor] = {}
        tuned.config = replace(tuned.config, layers=choice)
        with watch(tuned.pipeline.unet, maps.__setitem__), torch.no_grad():
            tuned.pipeline.unet(tuned.train.latents[:1], 500, tuned.embed(["left lung"]))
        found[choice] = LAYERS[choice](maps, tiny.SAMPLE_SIZE)
    assert [name.split(".")[0] for name in found["paper"]] == ["mid_block"] + ["up_blocks"] * 3
    assert all(name.startswith("up_blocks.1") or name.startswith("up_blocks.0") for name in found["decoder"])
    assert set(found["fine"]) <= set(found["decoder"])
    with capture(tuned.pipeline.unet) as maps, torch.no_grad():
        maps.begin_step(0, 1, 1)
        tuned.pipeline.unet(tuned.train.latents[:1], 500, tuned.embed(["left lung"]))
    made_of = maps.default_resolutions()
    assert set(found["read"]) == {layer for layer in maps.layers if maps.grid(layer) in made_of}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "guess"}, "target must be one of atlas, segmenter"),
        ({"domain": "dermatology"}, "target must be one of masks"),
        ({"domain": "elsewhere"}, "domain must be one of radiology, dermatology"),
        ({"layers": "all"}, "layers must be one of"),
        ({"template": "{location}"}, "template must hold"),
        ({"window": (0.6, 0.3)}, "two ascending fractions"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"alpha": -1.0}, "alpha must be at least 0"),
        ({"place_share": 0.7, "finding_share": 0.4}, "together at most 1"),
        ({"spread": 0.0}, "spread must be greater than 0"),
    ],
)
def test_options_out_of_range_are_named(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(tmp_path, **options).checked()


def test_the_recipe_reads() -> None:
    chest, skin = (
        read_recipe(RECIPES / "anatomy_prompts.yaml", AnatomyPromptsConfig, ["--domain", domain]).checked()
        for domain in ("radiology", "dermatology")
    )
    assert (chest.domain, chest.target, chest.lora_queries) == ("radiology", "segmenter", False)
    assert (skin.domain, skin.target, skin.lora_queries) == ("dermatology", "masks", True)


def png(pixels: np.ndarray) -> dict[str, object]:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def split(name: str = "train") -> Split:
    right, left = lungs()
    mask = ((right | left) * 255).astype(np.uint8)
    box = {"label": "lung opacity", "x": 0.6, "y": 0.65, "w": 0.2, "h": 0.1}
    sides = [
        {"label": f"{side} lung", "x": x, "y": 0.2, "w": 0.25, "h": 0.6} for side, x in (("right", 0.1), ("left", 0.6))
    ]
    rows = [
        {"boxes": json.dumps([box]), "report": None, "lung_mask": png(mask)},
        {"boxes": json.dumps(sides), "report": "Fever. CXR: opacity in the right upper zone.", "lung_mask": None},
        {"boxes": None, "report": "No opacity in the left base.", "lung_mask": None},
    ]
    image = np.full((SIDE, SIDE, 3), 90, np.uint8)
    for i, row in enumerate(rows):
        row |= {"image": png(image), "image_id": str(i), "patient_id": str(i), "source": "x", "findings": "[]"}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        name: pa.array([row[name] for row in rows], kind if name in ("image", "lung_mask") else pa.string())
        for name in rows[0]
    }
    return Split("radiology", name, pa.table(columns))


def test_an_atlas_fitted_on_masks_and_boxes_of_the_train_split_has_their_mean_centres() -> None:
    atlas = fit_atlas(split(), SIDE)
    assert atlas.details == {"split": "train", "images": {"masks": 1, "boxes": 1}}
    (right,) = atlas.places["right lung"]
    # mask: columns 8 to 26 of 64, box: 0.1 to 0.35
    assert right.mu_x == pytest.approx((17 / 64 + 0.225) / 2, abs=0.01)
    assert (atlas.fitted_on["left lung"], atlas.fitted_on["mediastinum"]) == (2, 1)
    for name in ("validation", "test"):
        with pytest.raises(InputError, match="train split alone"):
            fit_atlas(split(name))


def test_findings_are_placed_by_box_and_by_note_and_test_images_are_never_learnt_from() -> None:
    pipeline = tiny.make_pipeline("radiology")
    found = placed_findings(split(), ATLAS)
    assert [(f.index, f.finding, f.wordings[0], f.source) for f in found] == [
        (0, "lung opacity", "left lower zone", "box"),
        (1, "lung opacity", "right upper zone", "note"),
    ]
    assert placed_findings(split(), ATLAS, notes=False) == found[:1]
    opened = open_placed_scene(split(), pipeline, ATLAS, notes=True)
    assert opened.latents.shape == (2, tiny.LATENT_CHANNELS, 8, 8)
    with pytest.raises(InputError, match="test split"):
        open_placed_scene(split("test"), pipeline, ATLAS, notes=True)


def test_notes_are_reduced_to_what_this_image_shows() -> None:
    note = (
        "A man with fever. Right upper zone consolidation. CT showed opacity in the left base. History of left lower "
        "lobe pneumonia. No opacity in the right base. Left jugular line and pneumonia."
    )
    assert imaging_sentences(note) == ["Right upper zone consolidation."]
    assert imaging_sentences("") == []


def test_the_patients_own_regions_stand_in_for_the_atlas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny.make_pipeline("radiology")
    segmenter = Segmenter.load(tiny.make_segmenter_folder(tmp_path / "segmenter", "radiology"))
    with pytest.raises(InputError, match="no image of the train split"):
        open_placed_scene(split(), pipeline, ATLAS, notes=True, segmenter=segmenter)  # an untrained one finds no lungs
    low = tuple(np.roll(mask, 8, axis=0) for mask in lungs())
    logits = torch.full((3, SIDE, SIDE), -9.0)
    logits[0] = 0.0
    logits[1][torch.from_numpy(low[0])] = 9.0
    logits[2][torch.from_numpy(low[1])] = 9.0
    monkeypatch.setattr(segmenter, "probabilities", lambda images: logits.softmax(dim=0)[None])
    opened = open_placed_scene(split(), pipeline, ATLAS, notes=True, segmenter=segmenter)
    own = opened.own[0]
    assert own is not None
    shift = own.places["left lung"][0].mu_y - ATLAS.places["left lung"][0].mu_y
    assert shift == pytest.approx(8 / SIDE)
    assert isinstance(own.places["left lung"][0], Gaussian)
    tuned = AnatomyPromptsLearner(config(tmp_path, target="segmenter"), pipeline, opened)
    assert tuned.update(0)["location_loss"] > 0


def outlined(name: str = "train") -> Split:
    return split_of("dermatology", name, skin_rows(0, 3))


def test_phrases_that_experts_outlined_take_turns_and_are_drawn_to_their_masks() -> None:
    opened = open_outlined_scene(outlined(), tiny.make_pipeline("dermatology"))
    assert opened.latents.shape[1:] == (tiny.LATENT_CHANNELS, tiny.SAMPLE_SIZE, tiny.SAMPLE_SIZE)
    prompts = [opened.prompt(row) for row in range(len(opened))]
    texts = [prompt.text for prompt in prompts]
    assert set(texts) == set(opened.phrases) == {phrase for _, phrase in dermoscopic_masks().values()}
    assert texts.count("lesion") == texts.count("streaks"), "a rare one as often as a common one"
    for row, prompt in enumerate(prompts):
        again = opened.prompt(row, np.random.default_rng(row))
        assert (again.index, again.text) == (prompt.index, prompt.text)
        assert np.array_equal(again.heat((4, 4)), prompt.heat((4, 4)))
    heat = share_of_cells(np.kron(np.array([[1, 0], [0, 0]]), np.ones((8, 8))).astype(bool), (4, 4))
    assert heat.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    with pytest.raises(InputError, match="test split"):
        open_outlined_scene(outlined("test"), tiny.make_pipeline("dermatology"))


def test_words_of_structures_learn_to_look_where_they_are_outlined(tmp_path: Path) -> None:
    shown = open_outlined_scene(outlined(), tiny.make_pipeline("dermatology"))
    made = config(
        tmp_path, domain="dermatology", target="masks", lora_rank=2, diversity_weight=0.0, adapter="structures"
    )
    tuned = AnatomyPromptsLearner(made.checked(), tiny.make_pipeline("dermatology"), shown, shown)
    for step in range(30):
        tuned.update(step)
    metrics = tuned.export(tmp_path / "model")
    assert metrics["validation"]["location_loss"]["change"]["value"] < 0
    ids = tuned.pipeline.tokenizer(list(shown.phrases), add_special_tokens=False).input_ids
    assert metrics["learned_tokens"] == len({token for each in ids for token in each})
    assert not (tmp_path / "model" / "atlas.json").exists()
    load_adapter(tiny.make_pipeline("dermatology"), tmp_path / "model", "structures")


def test_a_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    fit(learner(tmp_path), config(tmp_path, max_minutes=1e-9))
    with pytest.raises(ModelError, match="already holds a checkpoint"):
        fit(learner(tmp_path), config(tmp_path))
