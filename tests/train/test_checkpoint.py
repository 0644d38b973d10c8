"""Checkpoints outlive a kill at any moment, and a damaged one never passes for a sound one."""

import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from medviz.errors import ModelError
from train import checkpoint

ROOT = Path(__file__).resolve().parents[2]


def state(value: float) -> dict[str, Any]:
    return {"weights": torch.full((3,), value), "value": value}


def test_state_comes_back_as_it_went(tmp_path: Path) -> None:
    saved = {
        "model": {"layer.weight": torch.randn(2, 3), "steps": torch.tensor(7), "half": torch.randn(4).bfloat16()},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0)}, 12: {"step": torch.tensor(4.0)}},
            "groups": [{"lr": 0.1}],
        },
        "mask": torch.tensor([True, False]),
        "nothing": None,
        "text": "größer",
        "flags": [True, False, [1, 2.5]],
        "empty": {"list": [], "dict": {}, "tensor": torch.zeros(0, 4)},
    }
    checkpoint.save(tmp_path, 5, saved)
    step, loaded = checkpoint.load(tmp_path)

    assert step == 5
    for path in (("model", "layer.weight"), ("model", "steps"), ("model", "half"), ("mask",), ("empty", "tensor")):
        before, after = saved, loaded
        for name in path:
            before, after = before[name], after[name]
        assert torch.equal(before, after)
        assert (before.dtype, before.shape) == (after.dtype, after.shape)
    assert list(loaded["optimizer"]["state"]) == [0, 12], "whole numbers stay the keys that optimisers look up"
    assert [s["step"].item() for s in loaded["optimizer"]["state"].values()] == [3.0, 4.0]
    assert {k: loaded[k] for k in ("nothing", "text", "flags")} == {k: saved[k] for k in ("nothing", "text", "flags")}
    assert (loaded["empty"]["list"], loaded["empty"]["dict"]) == ([], {})


def test_floats_are_kept_to_the_last_bit(tmp_path: Path) -> None:
    floats = [0.1 + 0.2, 1e-310, 2.0**-1074, 1.7976931348623157e308, -0.0, 1 / 3, math.inf]
    tensor = torch.tensor([0.1, -0.0, 1e-45, float("inf"), float("nan")])
    checkpoint.save(tmp_path, 1, {"floats": floats, "tensor": tensor})
    loaded = checkpoint.load(tmp_path)[1]

    assert [value.hex() for value in loaded["floats"]] == [value.hex() for value in floats]
    assert torch.equal(loaded["tensor"].view(torch.int32), tensor.view(torch.int32))


def test_a_tensor_in_another_layout_or_shared_keeps_its_values(tmp_path: Path) -> None:
    image, weight = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.randn(5)
    saved = {"image": image, "view": image[:, 1:], "weight": weight, "tied": weight, "part": weight[1:]}
    checkpoint.save(tmp_path, 1, saved)
    loaded = checkpoint.load(tmp_path)[1]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())


def test_only_the_newest_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        checkpoint.save(tmp_path, step, state(step))
    assert checkpoint.steps(tmp_path) == [3, 10]
    assert checkpoint.load(tmp_path)[1]["value"] == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000003", "checkpoint-00000010"]


def test_a_failed_rename_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 1, state(1))

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(ModelError, match=r"checkpoint of step 2 cannot be written.*no space left.*-00000001"):
            checkpoint.save(tmp_path, 2, state(2))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001"], "what was half written is gone"
    assert checkpoint.load(tmp_path)[1]["value"] == 1


KILLED_WHILE_SAVING = """
import os, signal, sys, shutil
from pathlib import Path
import torch
from train import checkpoint

# The child kills itself on the n-th call that reaches the disk, for every n until a save ends unharmed.
def kill_at(n):
    calls = 0
    def watched(function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return call
    checkpoint.save_file = watched(checkpoint.save_file)
    checkpoint._flush = watched(checkpoint._flush)
    checkpoint.os.replace = watched(checkpoint.os.replace)
    checkpoint.shutil.rmtree = watched(checkpoint.shutil.rmtree)
    Path.write_text = watched(Path.write_text)

for n in range(1, 40):
    folder = Path(sys.argv[1]) / str(n)
    checkpoint.save(folder, 1, {"weights": torch.full((3,), 1.0), "value": 1.0})
    child = os.fork()
    if child == 0:
        kill_at(n)
        checkpoint.save(folder, 2, {"weights": torch.full((3,), 2.0), "value": 2.0})
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        shutil.rmtree(folder)
        break
"""


def test_a_kill_at_any_moment_of_saving_leaves_a_sound_checkpoint(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path)], env=environment, check=True, timeout=280)
    folders = sorted(tmp_path.iterdir(), key=lambda path: int(path.name))
    assert len(folders) >= 9, "the kills came at nine moments or more"
    found = []
    for folder in folders:
        step, loaded = checkpoint.load(folder)
        assert (loaded["value"], loaded["weights"].tolist()) == (step, [step] * 3)
        found.append(step)
        checkpoint.save(folder, 3, state(3))
        assert checkpoint.load(folder)[0] == 3
        assert sorted(path.name for path in folder.iterdir()) == [f"checkpoint-{kept:08d}" for kept in (step, 3)]
    assert found == sorted(found), "the old one until the rename, the new one after it"
    assert set(found) == {1, 2}


def test_no_checkpoint_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ModelError, match=f"no checkpoint in {folder}"):
            checkpoint.load(folder)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "one bit"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = checkpoint.save(tmp_path, 4, state(4)) / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(ModelError, match=rf"checkpoint-00000004 is damaged: {name}"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint.save(tmp_path, 1, state(1))
    (checkpoint.save(tmp_path, 2, state(2)) / name).write_text("{}")
    assert checkpoint.load(tmp_path)[1]["value"] == 1
    (warning,) = caplog.messages
    assert "checkpoint-00000002" in warning
    assert "going on from" in warning
    assert warning.endswith("checkpoint-00000001")


def test_where_each_is_damaged_all_are_named(tmp_path: Path) -> None:
    for step in (1, 2):
        (checkpoint.save(tmp_path, step, state(step)) / "state.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no sound checkpoint in .*-00000002 is damaged.*-00000001 is damaged"):
        checkpoint.load(tmp_path)


def test_a_damaged_checkpoint_does_not_push_out_a_sound_one(tmp_path: Path) -> None:
    for step in (4, 8):
        checkpoint.save(tmp_path, step, state(step))
    (tmp_path / "checkpoint-00000008" / "state.json").write_text("{}")
    checkpoint.save(tmp_path, 6, state(6))
    assert checkpoint.steps(tmp_path) == [4, 6]


@pytest.mark.parametrize("left_out", ["bytes", "sha256", "both"])
def test_a_manifest_without_size_or_hash_is_an_error_with_a_name(tmp_path: Path, left_out: str) -> None:
    path = checkpoint.save(tmp_path, 4, state(4)) / "manifest.json"
    manifest = json.loads(path.read_text())
    if left_out == "both":
        manifest["files"]["state.json"] = None
    else:
        del manifest["files"]["state.json"][left_out]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match="-00000004 is damaged: its manifest lacks the size or the sha256 of state"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("room", [64, 1500])
def test_a_disk_that_takes_no_more_is_named_and_leaves_what_is_there(tmp_path: Path, room: int) -> None:
    """No file may grow past `room` bytes, which the system tells as it tells of a full disk: while the tensors are
    written, and after them."""
    checkpoint.save(tmp_path, 1, state(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(ModelError, match=r"step 2 cannot be written.*left as they were: checkpoint-00000001\."):
            checkpoint.save(tmp_path, 2, state(2) | {"text": "x" * 2000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001"]
    assert checkpoint.load(tmp_path)[1]["value"] == 1


def test_the_options_of_a_run_stand_in_its_checkpoint(tmp_path: Path) -> None:
    place = checkpoint.save(tmp_path, 1, state(1), {"seed": 7, "channels": [4, 8]})
    assert checkpoint.recipe(place) == {"seed": 7, "channels": [4, 8]}
    assert checkpoint.recipe(checkpoint.save(tmp_path, 2, state(2))) is None


@pytest.mark.parametrize("content", [None, "", "{"])
def test_a_manifest_that_cannot_be_read_is_an_error(tmp_path: Path, content: str | None) -> None:
    manifest = checkpoint.save(tmp_path, 4, state(4)) / "manifest.json"
    if content is None:
        manifest.unlink()
    else:
        manifest.write_text(content)
    with pytest.raises(ModelError, match="checkpoint-00000004 has no readable manifest"):
        checkpoint.load(tmp_path)


def test_another_format_is_refused(tmp_path: Path) -> None:
    manifest = checkpoint.save(tmp_path, 4, state(4)) / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format_version": 99}))
    with pytest.raises(ModelError, match="format 99, this program reads 1"):
        checkpoint.load(tmp_path)


def test_saving_a_step_again_never_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 1, state(1))

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ModelError, match="no space left"):
        checkpoint.save(tmp_path, 1, state(2))
    assert checkpoint.load(tmp_path)[0] == 1


@pytest.mark.parametrize("content", ["[]", '{"format_version": 1, "step": 4}', '{"format_version": 1, "files": {}}'])
def test_a_manifest_that_lacks_its_files_is_an_error_with_a_name(tmp_path: Path, content: str) -> None:
    place = checkpoint.save(tmp_path, 4, state(4))
    (place / "manifest.json").write_text(content)
    (place / "tensors.safetensors").unlink()
    with pytest.raises(ModelError, match="checkpoint-00000004"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("keys", [("a/b", "a"), (1, "1")])
def test_tensors_under_keys_that_look_alike_stay_apart(tmp_path: Path, keys: tuple[Any, Any]) -> None:
    first, second = torch.zeros(2), torch.ones(2)
    nested = {keys[0]: first, keys[1]: {"b": second} if keys[1] == "a" else second}
    checkpoint.save(tmp_path, 1, {"state": nested})
    loaded = checkpoint.load(tmp_path)[1]["state"]
    assert torch.equal(loaded[keys[0]], first)
