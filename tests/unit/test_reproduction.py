"""A manifest draws the same pixels in a fresh process, and names the weights, settings or versions that differ."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from medviz import Studio
from medviz.__main__ import main
from medviz.errors import InputError
from medviz.export.archive import archive, json_bytes, pair_files
from medviz.export.reproduction import compared, read_manifest
from medviz.models.manifest import write_manifest
from tests.pairs import make_pair

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a dermoscopic image with melanoma (MEL) showing hair"


@pytest.fixture(scope="module")
def packed(model_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of a pair that tiny models drew."""
    path = tmp_path_factory.mktemp("archive") / "pair.zip"
    path.write_bytes(archive(Studio(model_root, device="cpu").compare("dermatology", PROMPT, 3, steps=2)))
    return path


def changed(path: Path, folder: Path, **parts: object) -> Path:
    """The manifest of an archive with some of its parts replaced."""
    with zipfile.ZipFile(path) as found:
        content = json.loads(found.read("manifest.json"))
    (folder / "manifest.json").write_bytes(json_bytes({**content, **parts}))
    return folder / "manifest.json"


def test_a_fresh_process_draws_the_same_pixels(model_root: Path, packed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "medviz", "reproduce", str(packed), "--models", str(model_root), "--device", "cpu"]
    done = subprocess.run(
        [*command, "--json", "--out", str(tmp_path / "again")],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "2"}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["identical"]
    assert (found["pictures"], found["maps"], found["models"]) == ([], [], [])
    assert found["sampling"] == [], "on one thread, as the manifest says, not on two"
    with zipfile.ZipFile(packed) as before:
        for name in ("pixels/aligned.png", "maps/01-baseline.png", "manifest.json"):
            assert (tmp_path / "again" / name).read_bytes() == before.read(name)


def test_a_changed_weight_is_named(
    model_root: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "models"
    folder = shutil.copytree(model_root / "dermatology", root / "dermatology")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"] += 0.5
    save_file(tensors, weights, metadata={"format": "pt"})
    command = ["reproduce", str(packed), "--models", str(root), "--device", "cpu"]
    assert main(command) == 1
    assert "unet/diffusion_pytorch_model.safetensors is damaged" in capsys.readouterr().err, "not what its folder lists"
    listed = json.loads((folder / "manifest.json").read_text())
    write_manifest(folder, {key: value for key, value in listed.items() if key not in ("files", "format_version")})
    assert main(command) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "pixels differ: pixels/baseline.png, pixels/aligned.png"
    assert [line.split(":")[0] for line in lines[2:]] == ["unet"]


def test_a_version_and_a_setting_that_differ_are_named(tmp_path: Path) -> None:
    pair = replace(make_pair(), sampling={"threads": 1}, versions={"torch": "2.13.0"})
    files = pair_files(pair)
    (tmp_path / "manifest.json").write_bytes(files["manifest.json"])
    recorded = read_manifest(tmp_path / "manifest.json")
    assert recorded.request == pair.request
    elsewhere = replace(pair, sampling={"threads": 2}, versions={"torch": "9.9", "python": "3.11"})
    found = compared(recorded, elsewhere, files)
    assert found.identical
    assert found.sampling == ("threads: 1 in the manifest, 2 here",)
    assert found.versions == (
        'python: not recorded in the manifest, "3.11" here',
        'torch: "2.13.0" in the manifest, "9.9" here',
    )
    other = {**files, "pixels/baseline.png": files["pixels/aligned.png"]}
    assert compared(recorded, pair, other).pictures == ("pixels/baseline.png",)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"format_version": 9}, "format 'medviz pair' 9"),
        ({"format": "other"}, "format 'other' 1"),
        ({"request": {"domain": "dermatology", "eta": 1}}, "asks with domain, eta"),
        ({"pictures": {}}, "no picture under pixels/"),
        ({"models": 3}, "no manifest of a pair, or damaged"),
    ],
)
def test_a_manifest_that_cannot_be_drawn_is_refused(
    packed: Path, tmp_path: Path, parts: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_manifest(changed(packed, tmp_path, **parts))


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("{")
    (tmp_path / "large.json").write_text(" " * (2**20 + 1))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as other:
        other.writestr("report.json", "{}")
    for name, message in (("text", "damaged"), ("large", "at most"), ("absent", "cannot be read")):
        with pytest.raises(InputError, match=message):
            read_manifest(tmp_path / f"{name}.json")
    with pytest.raises(InputError, match="damaged"):
        read_manifest(tmp_path / "other.zip")
