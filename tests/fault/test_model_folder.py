"""A model folder that is damaged in any way is refused by name before a single weight is loaded from it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from medviz.errors import ModelError
from medviz.models import library as library_module
from medviz.models.library import ModelLibrary
from medviz.models.manifest import read_manifest, verify, write_manifest
from tests import tiny

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(model_root: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_root / "dermatology", tmp_path / "dermatology")


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object) -> None:
        raise AssertionError("weights of a damaged folder were loaded")

    monkeypatch.setattr(library_module, "_load_pipeline", explode)


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        ModelLibrary(folder.parent, device="cpu").load("dermatology")
    return str(caught.value)


def listed(model_root: Path) -> list[str]:
    return sorted(read_manifest(model_root / "dermatology").files)


def test_every_single_file_is_missed_when_it_is_gone(folder: Path, model_root: Path) -> None:
    manifest = read_manifest(folder)
    for name in listed(model_root):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(ModelError, match="missing") as caught:
            verify(folder, manifest)
        assert str(folder / name) in str(caught.value)
        (folder / name).write_bytes(content)
    verify(folder, manifest)


def test_one_flipped_bit_in_any_file_is_found(folder: Path, model_root: Path) -> None:
    manifest = read_manifest(folder)
    for name in listed(model_root):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ModelError, match="sha256") as caught:
            verify(folder, manifest)
        assert str(folder / name) in str(caught.value)
        (folder / name).write_bytes(content)
    verify(folder, manifest)


def test_a_truncated_file_is_named_with_its_sizes_and_the_way_out(folder: Path) -> None:
    content = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(content[:1000])
    message = refusal(folder)
    assert f"{folder / UNET} is damaged: it has 1000 bytes instead of {len(content)}" in message
    assert "git restore" in message


def test_a_pointer_left_by_large_file_storage_is_answered_with_the_command_that_fetches_it(folder: Path) -> None:
    (folder / UNET).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refusal(folder)


def test_a_wrong_sha256_in_the_manifest_is_a_damaged_file(folder: Path) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    content["files"][UNET]["sha256"] = "0" * 64
    path.write_text(json.dumps(content))
    assert f"{folder / UNET} is damaged: its sha256 is" in refusal(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / UNET).unlink()
    tiny.make_unet().save_pretrained(folder / "unet", max_shard_size="100KB")
    fields = {"domain": "dermatology", "default_adapter": tiny.ADAPTER}
    write_manifest(folder, fields)
    shard = sorted((folder / "unet").glob("*-00002-of-*.safetensors"))[0]
    shard.unlink()
    assert f"{shard} is missing" in refusal(folder)
    with pytest.raises(ModelError, match=f"names the shard {shard.name}, which is missing"):
        write_manifest(folder, fields)


@pytest.mark.parametrize(
    "name",
    ["unet/diffusion_pytorch_model.bin", "weights.pt", "a/b/model.ckpt", ".hidden.pkl", "judge/x.PTH", "unet/unet.py"],
)
def test_a_pickle_anywhere_is_refused_by_reader_and_writer(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weight": torch.zeros(1)}, folder / name)
    assert f"{folder / name} is refused" in refusal(folder)
    with pytest.raises(ModelError, match="only safetensors"):
        write_manifest(folder, {"domain": "dermatology"})


def test_a_manifest_cut_at_any_place_is_damaged_never_a_fresh_start(folder: Path) -> None:
    path = folder / "manifest.json"
    content = path.read_bytes().rstrip()
    for end in (0, 1, len(content) // 3, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:end])
        assert f"{path} is damaged" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format version 2; this program reads version 1"),
        ({"format_version": None}, "format version None"),
        ({"files": None}, "is damaged"),
        ({"files": {UNET: {"sha256": "0" * 64}}}, "is damaged"),
        ({"files": {UNET: {"sha256": "xyz", "bytes": 1}}}, "no usable sha256"),
        ({"files": {UNET: {"sha256": 5, "bytes": 1}}}, "is damaged"),
        ({"files": {"../outside.json": {"sha256": "0" * 64, "bytes": 1}}}, "no path inside"),
        ({"files": {"/etc/passwd": {"sha256": "0" * 64, "bytes": 1}}}, "no path inside"),
        ({"adapters": ["attribute"]}, "is damaged"),
        ({"adapters": {"../../x": {}}}, "'../../x'"),
        ({"hub": "org/base"}, "is damaged"),
        ({"hub": {"repo_id": "org/base", "revision": "main"}}, "pinned to a commit"),
        ({"surprise": 1}, "is damaged"),
    ],
)
def test_a_manifest_that_says_impossible_things_is_refused(
    folder: Path, change: dict[str, object], message: str
) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    found = refusal(folder)
    assert message in found
    assert str(path) in found


@pytest.mark.parametrize("text", ["[]", "null", "5", '"manifest"', "\xff"])
def test_a_manifest_that_is_no_object_is_damaged(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text, encoding="latin-1")
    assert "is damaged" in refusal(folder)
