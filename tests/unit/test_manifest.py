"""manifest.json knows every file of a model folder, and the card says what the manifest says."""

import hashlib
import json
from pathlib import Path

import pytest

from medviz.errors import ModelError
from medviz.models.card import CARD_NAME, model_card, write_card
from medviz.models.manifest import FORMAT_VERSION, FileRecord, HubSource, read_manifest, verify, write_manifest

FIELDS = {
    "domain": "dermatology",
    "preset": "cpu",
    "recipe": {"diffusion": "train/recipes/diffusion.yaml", "guidance_scale": 1.5},
    "data": [{"source": "HAM10000 | part 1", "licence": "CC BY-NC-SA 4.0", "citation": "Tschandl <2018>"}],
    "training_cost": {"diffusion": {"seconds": 90.0, "steps": 40}},
    "seeds": {"diffusion": 7},
    "metrics": {"diffusion": {"validation_loss": 0.3084, "steps": 40, "heads": {"hair": 1}, "compiled": True}},
    "tells": ["Rulers are <not> drawn."],
    "default_adapter": "attribute",
}
ADAPTER = {
    "kind": "lora",
    "title": "Attribute reward",
    "recipe": {"objective": "forward"},
    "metrics": {"judge_gain": {"value": 0.048, "low": 0.038, "high": 0.0585, "n": 64}},
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    contents = {
        "model_index.json": "{}",
        "unet/config.json": "{}",
        "unet/diffusion_pytorch_model.safetensors": "weights",
        "adapters/attribute/adapter.json": json.dumps(ADAPTER),
        "adapters/attribute/pytorch_lora_weights.safetensors": "lora",
    }
    for name, text in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_what_is_written_is_read(folder: Path) -> None:
    written = write_manifest(folder, FIELDS)
    found = read_manifest(folder)
    assert found == written
    assert found.format_version == FORMAT_VERSION
    assert found.metrics == FIELDS["metrics"]
    assert found.adapters == {"attribute": ADAPTER}
    assert found.files["unet/diffusion_pytorch_model.safetensors"] == FileRecord(
        sha256=hashlib.sha256(b"weights").hexdigest(), bytes=7
    )
    assert len(found.files) == 5
    verify(folder, found)


def test_the_same_folder_gives_the_same_manifest_and_leaves_nothing_beside_it(folder: Path) -> None:
    write_manifest(folder, FIELDS)
    first = (folder / "manifest.json").read_bytes()
    write_manifest(folder, FIELDS)
    assert (folder / "manifest.json").read_bytes() == first
    assert not list(folder.glob(".*"))


def test_one_byte_anywhere_changes_the_identity_of_the_models(folder: Path) -> None:
    before = write_manifest(folder, FIELDS).sha256
    (folder / "unet/config.json").write_text("[]")
    assert write_manifest(folder, FIELDS).sha256 != before


def test_a_failed_write_keeps_the_old_manifest(folder: Path) -> None:
    write_manifest(folder, FIELDS)
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(ModelError, match="JSON"):
        write_manifest(folder, {**FIELDS, "metrics": {"kid": float("nan")}})
    assert (folder / "manifest.json").read_bytes() == before


def test_a_card_and_hidden_files_are_no_part_of_the_models(folder: Path) -> None:
    (folder / "README.md").write_text("card")
    (folder / ".gitattributes").write_text("")
    manifest = write_manifest(folder, FIELDS)
    assert not {"README.md", ".gitattributes"} & set(manifest.files)
    verify(folder, manifest)


@pytest.mark.parametrize("name", ["unet/extra.safetensors", "unet/notes.txt", "config.json"])
def test_a_file_that_is_not_listed_is_refused(folder: Path, name: str) -> None:
    manifest = write_manifest(folder, FIELDS)
    (folder / name).write_text("{}")
    with pytest.raises(ModelError, match=f"{name} is not listed"):
        verify(folder, manifest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "unknown manifest fields colour"),
        ({"domain": "../dermatology"}, "allowed"),
        ({"domain": None}, "allowed"),
        ({"default_adapter": "anatomy"}, "'anatomy' is not among the adapters \\(attribute\\)"),
        ({"grounding_adapter": "anatomy"}, "the grounding adapter 'anatomy' is not among the adapters"),
        ({"few_step_adapter": "fast"}, "the few-step adapter 'fast' is not among the adapters"),
        ({"few_step_adapter": "attribute"}, "'attribute' cannot be the default one, too"),
        ({"few_step_adapter": "attribute", "default_adapter": None}, "'attribute' needs falling timesteps, found None"),
        (
            {"adapters": {"fast": {"timesteps": [200, 400]}}, "default_adapter": None, "few_step_adapter": "fast"},
            "needs falling timesteps, found \\[200, 400\\]",
        ),
        (
            {
                "adapters": {"fast": {"timesteps": [999, 400]}},
                "default_adapter": None,
                "few_step_adapter": "fast",
                "recipe": {"few_step_finish": 2},
            },
            "few_step_finish must be from 0 to 1 of its steps, found 2",
        ),
        ({"adapters": {"none": {}}, "default_adapter": None}, "'none'"),
        ({"adapters": {"a/b": {}}, "default_adapter": None}, "'a/b'"),
    ],
)
def test_fields_that_cannot_be_right_are_refused(folder: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        write_manifest(folder, {**FIELDS, **change})
    assert not (folder / "manifest.json").exists()


def hub(**change: object) -> dict[str, object]:
    record = {"sha256": "0" * 64, "bytes": 1}
    source = {"repo_id": "org/base", "revision": COMMIT, "files": {"model_index.json": record}}
    return {**FIELDS, "hub": {**source, **change}}


def test_a_hub_model_is_pinned_to_a_commit_and_to_its_files(folder: Path) -> None:
    write_manifest(folder, hub())
    found = read_manifest(folder)
    assert found.hub == HubSource("org/base", COMMIT, {"model_index.json": FileRecord("0" * 64, 1)})
    assert COMMIT in model_card(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"revision": "main"}, "pinned to a commit"),
        ({"revision": None}, "pinned to a commit"),
        ({"revision": COMMIT[:7]}, "pinned to a commit"),
        ({"files": {}}, "hub.files"),
        ({"files": {"unet/diffusion_pytorch_model.bin": {"sha256": "0" * 64, "bytes": 1}}}, "never .bin"),
        ({"files": {"../x.json": {"sha256": "0" * 64, "bytes": 1}}}, "no path inside"),
    ],
)
def test_a_hub_model_that_is_not_pinned_is_refused(folder: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        write_manifest(folder, hub(**change))


def test_the_card_says_what_the_manifest_says_and_nothing_is_left_open(folder: Path) -> None:
    write_manifest(folder, FIELDS)
    (folder / "judge").mkdir()
    heads = {
        "architecture": "ConvNextV2ForImageClassification",
        "heads": ["hair", "ink"],
        "trained_on": "half B of train by group",
        "metrics": {"hair": {"auroc": 0.91, "ci": [0.89, 0.93], "accuracy": 0.85, "ece": 0.02, "n": 400}},
    }
    (folder / "judge" / "heads.json").write_text(json.dumps(heads))
    assert write_card(folder) == folder / CARD_NAME
    card = (folder / CARD_NAME).read_text()
    assert card.startswith("---\nlicense: cc-by-nc-sa-4.0\n")
    for line in (
        "| `attribute` | Attribute reward | forward | 0.048 (0.038 to 0.0585, n 64) | drawing, grounding |",
        "| diffusion | `train/recipes/diffusion.yaml` | 40 | 1.5 | 7 | validation loss 0.3084 |",
        "| guidance scale | 1.5 |",
        "- Rulers are &lt;not&gt; drawn.",
        "## Measured\n\nNot computed.",
        "| HAM10000 \\| part 1 | CC BY-NC-SA 4.0 | Tschandl &lt;2018&gt; |",
        "| hair | 0.91 | 0.89 to 0.93 | 0.85 | 0.02 | 400 |",
        "| ink | not computed | not computed | not computed | not computed | not computed |",
        "half B of train by group",
        "## Limits",
    ):
        assert line in card
    assert read_manifest(folder).sha256 in card


def test_the_card_shows_what_was_measured_and_that_nobody_has_looked(folder: Path) -> None:
    manifest = write_manifest(folder, {**FIELDS, "tells": []})
    card = model_card(manifest, measured="| KID | 0.02 |")
    assert "## Measured\n\n| KID | 0.02 |\n" in card
    assert "Not written down yet." in card
