"""The evaluate stage from end to end on tiny models and invented images, and what it keeps and reuses."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from medviz.domains import get_domain
from medviz.errors import InputError, ModelError
from medviz.generation.spectrum import Spectrum
from medviz.models.library import LoadedDomain, ModelLibrary
from medviz.models.manifest import write_manifest
from tests import tiny
from train.datasets.split import open_split
from train.evaluate.features import image_encoder_space, independent_space, segmenter_space
from train.evaluate.generated import caption_request, generate, grid_request, weights_digest
from train.evaluate.history import read as read_history
from train.evaluate.real import real_images
from train.evaluate.report import TABLES_NAME, ReportConfig, read_reports
from train.evaluate.report import run as write_tables
from train.evaluate.stage import EvaluateConfig, run

DIAGNOSES = ("nv", "mel", "bkl", "nv")


def write_split(folder: Path, name: str, count: int, seed: int) -> None:
    """Invented dermatology records: noise images, two to a lesion."""
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(stream, "PNG")
        pictures.append({"bytes": stream.getvalue(), "path": None})
    table = pa.table(
        {
            "image": pictures,
            "image_id": [f"{name}-{i}" for i in range(count)],
            "source": ["HAM10000"] * count,
            "lesion_id": [f"{name}-lesion-{i // 2}" for i in range(count)],
            "diagnosis": [DIAGNOSES[i % 4] for i in range(count)],
            "age": [50.0] * count,
            "sex": ["female"] * count,
            "site": ["back"] * count,
            "artefact_hair": [float(i % 2) for i in range(count)],
            "artefact_source": ["manual"] * count,
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / f"{name}-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def images_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_split(root / "dermatology", "train", 20, seed=1)
    write_split(root / "dermatology", "validation", 20, seed=2)
    return root


@pytest.fixture(scope="module")
def loaded(model_root: Path) -> LoadedDomain:
    return ModelLibrary(model_root, "cpu").load("dermatology")


def config_for(model_root: Path, out: Path, **options: Any) -> EvaluateConfig:
    small = {"steps": 2, "grid_prompts": 3, "seeds_per_prompt": 2, "captions": 6, "batch": 4, "per_class": 2}
    return EvaluateConfig(
        out=str(out / "run"),
        domain="dermatology",
        models=str(model_root),
        reports=str(out / "reports"),
        **{**small, **options},
    )


def test_a_run_writes_figures_with_n_and_interval_a_sheet_and_tables(
    model_root: Path, images_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDVIZ_DATA", str(images_folder))
    config = config_for(model_root, tmp_path, apr_heads=("hair", "ruler"))
    report = run(config, command="python -m train evaluate x.yaml")
    stored = json.loads((tmp_path / "reports" / "evaluation-dermatology-2-steps.json").read_text())
    assert stored == json.loads((tmp_path / "run" / "metrics.json").read_text()) == report
    figures = {figure["name"]: figure for figure in stored["figures"]}
    assert len(figures) == len(stored["figures"])
    for name in (
        "judge_accuracy_grid",
        "judge_complete_grid",
        "judge_apr_grid",
        "judge_margin_captions",
        "reward_accuracy_grid",
        "judge_head_melanoma_grid",
        "kernel_distance_segmenter",
        "kernel_distance_judge",
        "frechet_distance_judge",
        "diversity_segmenter",
        "memorisation_share_segmenter",
        "coverage_judge",
        "density_segmenter",
        "judge_head_hair_classes",
    ):
        assert figures[name]["baseline"]["n"] > 0, name
        assert figures[name]["baseline"]["value"] is not None, name
        assert set(figures[name]["adapters"]) == {tiny.ADAPTER}, name
    assert figures["judge_accuracy_grid"]["baseline"]["n"] == 6
    assert figures["judge_accuracy_grid"]["real"] is None
    assert figures["judge_accuracy_captions"]["real"]["n"] == 6
    assert figures["kernel_distance_judge"]["real"]["low"] is not None
    assert figures["kernel_distance_judge"]["counts"] == {"reference": 14}
    assert figures["diversity_segmenter"]["change_kind"] == "ratio"
    assert figures["diversity_segmenter"]["baseline"]["n"] == 3
    assert stored["seeds"] == [0, 1]
    assert len(stored["prompts"]) == 3
    assert len(stored["models"]["sha256"]) == 64
    assert stored["models"]["weights"]["baseline"] != stored["models"]["weights"][tiny.ADAPTER]
    assert stored["versions"]["torch"]
    with Image.open(tmp_path / "reports" / stored["contact_sheet"]) as sheet:
        assert sheet.width > 4 * tiny.IMAGE_SIZE_PX
        assert sheet.text["Synthetic"] == "yes"
    with Image.open(tmp_path / "reports" / "contact-sheet-dermatology-2-steps-classes.png") as sheet:
        assert sheet.text["Synthetic"] == "yes"
    (confused,) = stored["confusions"]
    assert confused["group"] == "diagnosis"
    assert set(confused["counts"]) == {"baseline", tiny.ADAPTER, "real"}
    assert np.sum(confused["counts"]["real"]) == np.sum(confused["counts"]["baseline"]) > 0
    assert len(read_history(tmp_path / "reports" / "history-dermatology.json")) == 1
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results:begin -->\n<!-- results:end -->\n")
    write_tables(ReportConfig(reports=str(tmp_path / "reports"), readme=str(readme), models=str(tmp_path / "models")))
    for shown in ("Prompt accuracy by the judge", "every class as often", "Diagnosis asked for, taken for"):
        assert shown in (tmp_path / "reports" / TABLES_NAME).read_text()
    assert "### Dermatology" in readme.read_text()
    assert "every class as often" not in readme.read_text()
    assert len(read_reports(tmp_path / "reports")) == 1


def test_other_eyes_measure_two_generators_alike_and_write_the_history_alone(
    model_root: Path, images_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDVIZ_DATA", str(images_folder))
    other = tmp_path / "models" / "dermatology"
    shutil.copytree(model_root / "dermatology", other)
    card = json.loads((other / "judge" / "heads.json").read_text())
    card["threshold"] = dict.fromkeys(card["heads"], 0.01)  # a judge that sees everything everywhere
    (other / "judge" / "heads.json").write_text(json.dumps(card))
    (other / "manifest.json").unlink()
    fields = json.loads((model_root / "dermatology" / "manifest.json").read_text())
    write_manifest(other, {name: value for name, value in fields.items() if name not in ("files", "format_version")})
    config = config_for(model_root, tmp_path)
    own = run(config)
    seen = run(replace(config, eyes=str(tmp_path / "models"), out=str(tmp_path / "seen")))
    theirs = run(replace(config, models=str(tmp_path / "models"), out=str(tmp_path / "theirs"), reports=""))
    assert seen["models"]["eyes"] == theirs["models"]["eyes"] != own["models"]["eyes"]
    assert seen["models"]["weights"] == own["models"]["weights"]
    of_grid = [
        {f["name"]: f["baseline"]["value"] for f in r["figures"] if f["prompts"] == "grid"} for r in (seen, theirs, own)
    ]
    # their generator draws the same here; theirs alone are real images of the size it draws
    assert of_grid[0] == of_grid[1] != of_grid[2]
    entries = read_history(tmp_path / "reports" / "history-dermatology.json")
    assert [entry["eyes"] for entry in entries] == [own["models"]["eyes"], seen["models"]["eyes"]]
    reports = tmp_path / "reports"
    assert [path.name for path in reports.glob("evaluation-*")] == ["evaluation-dermatology-2-steps.json"]
    assert json.loads((reports / "evaluation-dermatology-2-steps.json").read_text()) == own
    assert not list((tmp_path / "seen").glob("*.png"))


def test_half_precision_is_drawn_anew_and_recorded(
    model_root: Path, images_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDVIZ_DATA", str(images_folder))
    reports = [run(config_for(model_root, tmp_path, per_class=0, bf16=bf16)) for bf16 in (False, True)]
    assert [report["settings"]["precision"] for report in reports] == ["float32", "bfloat16"]
    # grid, captions and a sheet by two models, each in either precision
    assert len(list((tmp_path / "run" / "pictures").glob("*/images-000000.npz"))) == 12
    margins = [next(f for f in report["figures"] if f["name"] == "reward_margin_grid") for report in reports]
    full, half = (figure["baseline"]["value"] for figure in margins)
    assert full != half
    assert half == pytest.approx(full, abs=0.05)


def test_every_option_out_of_range_is_named(model_root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="seeds_per_prompt must be at least 2"):
        run(config_for(model_root, tmp_path, seeds_per_prompt=1))
    with pytest.raises(InputError, match="unknown adapter"):
        run(config_for(model_root, tmp_path, adapters=("imagined",)))


def test_pictures_are_drawn_once_and_found_again(
    loaded: LoadedDomain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = caption_request(["a", "b", "c"], seed=0, steps=2, guidance_scale=3.0)
    options: dict[str, Any] = {"batch": 2}
    first = generate(loaded.pipeline, loaded.manifest.files, None, request, tmp_path, **options)
    assert first.dtype == np.uint8
    assert first.shape == (3, tiny.IMAGE_SIZE_PX, tiny.IMAGE_SIZE_PX, 3)
    stored = sorted(tmp_path.rglob("*.npz"))
    assert len(stored) == 2
    for batch in (stored[1], *tmp_path.rglob("latents-000002.npy")):
        batch.unlink()  # a stop between the two batches

    drawn: list[int] = []
    from train.evaluate import generated

    real_sample = generated.sample

    def counted(pipeline: Any, prompts: Any, seeds: Any, **settings: Any) -> torch.Tensor:
        drawn.append(len(prompts))
        return real_sample(pipeline, prompts, seeds, **settings)

    monkeypatch.setattr(generated, "sample", counted)
    again = generate(loaded.pipeline, loaded.manifest.files, None, request, tmp_path, **options)
    np.testing.assert_array_equal(again, first)
    assert drawn == [1]
    stored[0].unlink()  # what was drawn is decoded again
    decoded = generate(loaded.pipeline, loaded.manifest.files, None, request, tmp_path, **options)
    np.testing.assert_array_equal(decoded, first)
    assert drawn == [1]
    flat = Spectrum((0.1,), ((0.25,),) * tiny.LATENT_CHANNELS, (0.0,) * tiny.LATENT_CHANNELS)
    through = generate(loaded.pipeline, loaded.manifest.files, None, request, tmp_path, spectrum=flat, **options)
    assert not np.array_equal(through, first)
    assert drawn == [1]
    aligned = generate(loaded.pipeline, loaded.manifest.files, tiny.ADAPTER, request, tmp_path, **options)
    assert drawn == [1, 2, 1]
    assert not np.array_equal(aligned, first)


def test_the_digest_changes_with_what_draws_and_with_nothing_else(loaded: LoadedDomain) -> None:
    files = dict(loaded.manifest.files)
    before = weights_digest(files, None), weights_digest(files, tiny.ADAPTER)
    judge = next(name for name in files if name.startswith("judge/"))
    files[judge] = files["model_index.json"]
    assert (weights_digest(files, None), weights_digest(files, tiny.ADAPTER)) == before
    adapter = next(name for name in files if name.startswith(f"adapters/{tiny.ADAPTER}/"))
    files[adapter] = files["model_index.json"]
    assert weights_digest(files, None) == before[0]
    assert weights_digest(files, tiny.ADAPTER) != before[1]


def test_the_grid_gives_every_prompt_the_same_seeds_and_captions_seeds_of_their_own() -> None:
    grid = grid_request(["a", "b"], 3, steps=1, guidance_scale=1.0)
    assert grid.prompts == ("a", "a", "a", "b", "b", "b")
    assert grid.seeds == (0, 1, 2, 0, 1, 2)
    seeds = caption_request(["same"] * 50, seed=0, steps=1, guidance_scale=1.0).seeds
    assert len(set(seeds)) == 50
    assert seeds[:10] == caption_request(["same"] * 10, seed=0, steps=1, guidance_scale=1.0).seeds
    assert seeds != caption_request(["same"] * 50, seed=1, steps=1, guidance_scale=1.0).seeds


def test_prompted_and_reference_images_share_no_lesion(images_folder: Path) -> None:
    split = open_split("dermatology", "validation", images_folder)
    real = real_images(split, get_domain("dermatology"), captions=100, size_px=16, seed=0)
    assert len(real.prompted) == len(real.captions) == len(real.reference) == 10
    where = {image.tobytes(): group for image, group in zip(split.images(16), split.groups, strict=True)}
    prompted = {where[image.tobytes()] for image in real.prompted}
    reference = {where[image.tobytes()] for image in real.reference}
    assert not prompted & reference
    assert len(prompted | reference) == 10


def test_an_odd_count_leaves_a_lesion_on_one_side(images_folder: Path) -> None:
    split = open_split("dermatology", "validation", images_folder)
    real = real_images(split, get_domain("dermatology"), captions=5, size_px=16, seed=0)
    where = {image.tobytes(): group for image, group in zip(split.images(16), split.groups, strict=True)}
    assert len(real.prompted) == 5
    assert not {where[i.tobytes()] for i in real.prompted} & {where[i.tobytes()] for i in real.reference}


def test_features_do_not_depend_on_the_batch_and_tell_images_apart(model_root: Path) -> None:
    space = independent_space(model_root / "dermatology")
    images = np.random.default_rng(0).integers(0, 256, (5, 48, 48, 3), dtype=np.uint8)
    images[1] = 0
    together, apart = space.embed(images), space.embed(images, batch=2)
    assert together.shape == (5, 16)
    np.testing.assert_allclose(together, apart, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-4
    assert segmenter_space(model_root / "dermatology" / "segmenter").name == space.name == "segmenter"


def test_the_image_encoder_is_preferred_and_reads_any_size(model_root: Path, tmp_path: Path) -> None:
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        projection_dim=8,
    )
    # Stored in 16 bits, as shipped: the features are computed in float32 all the same.
    CLIPVisionModelWithProjection(config).to(torch.bfloat16).save_pretrained(tmp_path / "features")
    space = independent_space(tmp_path)
    assert space.name == "image_encoder"
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)
    assert space.embed(images).shape == (2, 8)
    seen = image_encoder_space(tmp_path / "features").network(torch.zeros(1, 3, 32, 32))
    assert seen.dtype == torch.float32
    with pytest.raises(ModelError, match="neither features/ nor segmenter/"):
        independent_space(tmp_path / "features")
