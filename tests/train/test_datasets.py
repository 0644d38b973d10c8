"""Splits as the stages see them: halves, weights, pictures, and what is said when something is not there."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medviz.errors import InputError
from train.datasets.split import Split, boxes, images_root, open_split, source_weights


def png(pixels: np.ndarray) -> dict[str, Any]:
    return {"bytes": cv2.imencode(".png", pixels)[1].tobytes(), "path": "a.png"}


def split_of(rows: list[dict[str, Any]], domain: str = "dermatology") -> Split:
    return Split(domain, "train", pa.Table.from_pylist(rows))


def lesions(count: int, images_each: int = 2) -> Split:
    names = [(f"L{lesion}", f"I{lesion}-{i}") for lesion in range(count) for i in range(images_each)]
    picture = png(np.zeros((4, 4, 3), np.uint8))
    return split_of([{"image": picture, "image_id": image, "lesion_id": lesion} for lesion, image in names])


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / name)


def test_halves_keep_a_group_on_one_side_and_share_the_images() -> None:
    split = lesions(1000)
    halves = split.halves
    first, second = ({g for g, h in zip(split.groups, halves, strict=True) if h == side} for side in (0, 1))
    assert not first & second
    assert 420 < len(first) < 580
    assert first | second == set(split.groups)


def test_halves_depend_on_the_group_alone() -> None:
    many, few = lesions(50, 3), lesions(20, 1)
    side = dict(zip(many.groups, many.halves.tolist(), strict=True))
    assert all(side[group] == half for group, half in zip(few.groups, few.halves.tolist(), strict=True))


def test_the_group_is_the_lesion_or_the_patient_or_else_the_image() -> None:
    picture = png(np.zeros((4, 4, 3), np.uint8))
    rows = [{"image": picture, "image_id": "a", "lesion_id": "L", "patient_id": "P"}]
    rows += [{"image": picture, "image_id": "b", "lesion_id": None, "patient_id": None}]
    assert split_of(rows).groups == ["L", "b"]
    assert split_of(rows, "radiology").groups == ["P", "b"]


def sources(counts: dict[str, int]) -> Split:
    picture = png(np.zeros((4, 4, 3), np.uint8))
    names = [source for source, count in counts.items() for _ in range(count)]
    rows = [{"image": picture, "image_id": str(i), "patient_id": str(i), "source": s} for i, s in enumerate(names)]
    return split_of(rows, "radiology")


@pytest.mark.parametrize("shares", [{"a": 1.0, "b": 1.0}, {"a": 3.0, "b": 1.0}, {"a": 0.0, "b": 2.0}])
def test_weights_give_each_source_the_share_asked_for(shares: dict[str, float]) -> None:
    split = sources({"a": 80, "b": 20})
    weights = source_weights(split, shares)
    assert weights.sum() == pytest.approx(1.0)
    total = sum(shares.values())
    for source, share in shares.items():
        mine = weights[[record["source"] == source for record in split.records]]
        assert mine.sum() == pytest.approx(share / total)
        assert np.ptp(mine) == 0, "images of a source weigh the same"


def test_without_shares_every_image_weighs_the_same() -> None:
    assert np.allclose(source_weights(sources({"a": 80, "b": 20}), {}), 1 / 100)


def test_pictures_are_rgb_and_masks_boolean_in_the_size_asked() -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[..., 2] = 200  # OpenCV's order is blue, green, red
    inside = np.zeros((8, 8), np.uint8)
    inside[:, :4] = 255
    rows = [{"image": png(picture), "image_id": "a", "lesion_id": "L", "lesion_mask": png(inside)}]
    rows += [{"image": png(picture), "image_id": "b", "lesion_id": "L", "lesion_mask": None}]
    split = split_of(rows)

    image, mask = split.image(0, 4), split.mask(0, "lesion_mask", 4)
    assert (image.shape, image.dtype) == ((4, 4, 3), np.uint8)
    assert (image == [200, 0, 0]).all()
    assert mask is not None
    assert mask.dtype == bool
    assert mask.tolist() == [[True, True, False, False]] * 4
    assert split.mask(1, "lesion_mask", 4) is None
    assert [record["lesion_mask"] for record in split.records] == [True, False]
    assert "image" not in split.records[0]
    assert split.images(4).shape == (2, 4, 4, 3)
    assert split.images(4, [1]).shape == (1, 4, 4, 3)
    assert split.images(4, []).shape == (0, 4, 4, 3)


def test_a_mask_that_no_column_holds_is_an_error() -> None:
    with pytest.raises(InputError, match="no mask 'lung_mask'"):
        lesions(1).mask(0, "lung_mask", 4)


def test_a_picture_that_cannot_be_decoded_is_named() -> None:
    rows = [{"image": {"bytes": b"nothing", "path": "ISIC_1.jpg"}, "image_id": "a", "lesion_id": "L"}]
    with pytest.raises(InputError, match=r"ISIC_1.jpg"):
        split_of(rows).image(0, 4)


def test_shards_are_read_in_order_and_only_those_of_the_split(tmp_path: Path) -> None:
    picture = png(np.zeros((4, 4, 3), np.uint8))
    for name, image_id in (("train-00001-of-00002", "b"), ("train-00000-of-00002", "a"), ("test-00000-of-00001", "c")):
        row = {"image": picture, "image_id": image_id, "lesion_id": image_id}
        write(tmp_path / "dermatology", f"{name}.parquet", [row])
    write(tmp_path / "dermatology", "test-structures.parquet", [{"image_id": "c", "structure": "airways"}])
    assert [r["image_id"] for r in open_split("dermatology", "train", tmp_path).records] == ["a", "b"]
    assert [r["image_id"] for r in open_split("dermatology", "test", tmp_path).records] == ["c"]


def test_missing_shards_name_the_folder_and_the_command(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"no train-\*.parquet in {tmp_path}/radiology.*train prepare"):
        open_split("radiology", "train", tmp_path)


def test_a_split_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no split 'valid'"):
        open_split("radiology", "valid", tmp_path)


def test_the_folder_is_the_one_given_or_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDVIZ_DATA", "/from/environment")
    assert images_root() == Path("/from/environment")
    assert images_root("/given") == Path("/given")
    monkeypatch.delenv("MEDVIZ_DATA")
    assert images_root() == Path("data")


def test_boxes_of_a_record() -> None:
    box = {"label": "left lung", "x": 0.5, "y": 0.1, "w": 0.4, "h": 0.7}
    assert boxes({"boxes": '[{"label": "left lung", "x": 0.5, "y": 0.1, "w": 0.4, "h": 0.7}]'}) == [box]
    assert boxes({"boxes": None}) == boxes({}) == []


def test_a_shard_missing_from_the_set_is_an_error(tmp_path: Path) -> None:
    picture = png(np.zeros((4, 4, 3), np.uint8))
    write(tmp_path / "dermatology", "train-00001-of-00002.parquet", [{"image": picture, "image_id": "a"}])
    with pytest.raises(InputError, match="train-00000-of-00002"):
        open_split("dermatology", "train", tmp_path)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "dermatology").mkdir()
    (tmp_path / "dermatology" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="train-00000-of-00001"):
        open_split("dermatology", "train", tmp_path)


def test_a_share_for_an_unknown_source_is_an_error() -> None:
    with pytest.raises(InputError, match="kermany"):
        source_weights(sources({"a": 80, "b": 20}), {"kermany": 1.0})
