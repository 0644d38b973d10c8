"""DICOM files of a pair: valid, synthetic wherever a file can say so, no person's, the same for the same pair."""

import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest

from medviz.export.archive import shared_picture
from medviz.export.dicom_objects import dicom_archive, dicom_files
from medviz.results import Drawing
from tests.pairs import make_pair, noise_image

DOMAINS = ("dermatology", "radiology")
VALIDATOR = shutil.which("dciodvfy", path=str(Path(sys.executable).parent)) or shutil.which("dciodvfy")
NAMES = {
    "baseline.dcm", "aligned.dcm", "baseline-attention.dcm", "aligned-attention.dcm",
    "baseline-outlines.dcm", "aligned-outlines.dcm", "scores.dcm",
}  # fmt: skip


@pytest.fixture(scope="module")
def files() -> dict[str, dict[str, bytes]]:
    return {domain: dicom_files(make_pair(domain)) for domain in DOMAINS}


def opened(content: bytes) -> pydicom.Dataset:
    return pydicom.dcmread(io.BytesIO(content))


def elements(dataset: pydicom.Dataset) -> Iterator[pydicom.DataElement]:
    yield from dataset.iterall()


@pytest.mark.skipif(VALIDATOR is None, reason="dciodvfy of the package dicom3tools is not installed")
@pytest.mark.parametrize("domain", DOMAINS)
def test_the_validator_finds_no_error(files: dict, domain: str, tmp_path: Path) -> None:
    assert set(files[domain]) == NAMES
    for name, content in files[domain].items():
        path = tmp_path / name
        path.write_bytes(content)
        done = subprocess.run([VALIDATOR, str(path)], capture_output=True, text=True, timeout=60, check=False)
        lines = (done.stdout + done.stderr).splitlines()
        assert not [line for line in lines if line.startswith("Error")], name


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_object_says_that_it_is_synthetic_and_what_synthesised_it(files: dict, domain: str) -> None:
    for name, content in files[domain].items():
        found = opened(content)
        assert found.SyntheticData == "YES", name
        assert found.PatientName == "SYNTHETIC^MEDVIZ"
        assert found.PatientID.startswith("SYNTHETIC-")
        assert not found.PatientBirthDate
        purposes = [item.PurposeOfReferenceCodeSequence[0].CodeValue for item in found.ContributingEquipmentSequence]
        assert purposes == ["109100", "109102"], "synthesizing equipment, then the library that wrote the file"
    assert opened(files[domain]["aligned.dcm"]).ConversionType == "SYN"
    assert (
        "seed 7"
        in opened(files[domain]["aligned.dcm"]).ContributingEquipmentSequence[0].ContributionDescription.lower()
    )


def test_objects_belong_to_one_study_and_refer_to_their_image(files: dict) -> None:
    found = {name: opened(content) for name, content in files["dermatology"].items()}
    assert len({dataset.StudyInstanceUID for dataset in found.values()}) == 1
    assert len({dataset.SOPInstanceUID for dataset in found.values()}) == len(found)
    for side in ("baseline", "aligned"):
        image = found[f"{side}.dcm"].SOPInstanceUID
        for name in (f"{side}-attention.dcm", f"{side}-outlines.dcm", "scores.dcm"):
            references = {e.value for e in elements(found[name]) if e.keyword == "ReferencedSOPInstanceUID"}
            assert image in references


def test_values_come_back(files: dict) -> None:
    pair = make_pair()
    found = {name: opened(content) for name, content in files["dermatology"].items()}
    picture = shared_picture(pair, "aligned")
    assert found["aligned.dcm"].pixel_array.tobytes() == picture.tobytes()
    attention = found["aligned-attention.dcm"]
    assert attention.pixel_array.shape == (2, *reversed(picture.size))
    assert attention.pixel_array.dtype == np.float32
    outlines = found["aligned-outlines.dcm"]
    assert [segment.SegmentLabel for segment in outlines.SegmentSequence] == [
        "Lesion",
        "Lesion border",
        "Surrounding skin",
    ]
    values = [float(e.value) for e in elements(found["scores.dcm"]) if e.keyword == "NumericValue"]
    assert values[-3:] == [0.25, 0.5, 0.75], "behind the images' rows and columns"


def test_a_chest_image_is_grey_and_knows_its_sides(files: dict) -> None:
    found = opened(files["radiology"]["aligned.dcm"])
    assert found.PhotometricInterpretation == "MONOCHROME2"
    assert list(found.PatientOrientation) == ["L", "F"]
    assert found.BodyPartExamined == "CHEST"


def test_the_same_pair_gives_the_same_files_and_another_one_other_uids(files: dict) -> None:
    pair = make_pair()
    assert dicom_files(pair) == files["dermatology"]
    assert dicom_archive(pair) == dicom_archive(pair)
    other = replace(pair, aligned=Drawing(noise_image(5), pair.aligned.outlines))
    uids = [
        {opened(content).SOPInstanceUID for content in each.values()}
        for each in (files["dermatology"], dicom_files(other))
    ]
    assert not uids[0] & uids[1]


def test_no_clock_and_no_random_uid_is_in_a_file(files: dict) -> None:
    for content in files["radiology"].values():
        for element in elements(opened(content)):
            if element.VR in ("DA", "DT") and element.value:
                assert str(element.value) == "19800101", element.keyword
            if element.VR == "UI" and str(element.value).startswith("1.2.826.0.1.3680043.10.511.3."):
                pytest.fail(f"{element.keyword} is highdicom's random UID")


def test_what_a_pair_lacks_is_left_out() -> None:
    pair = make_pair()
    bare = replace(
        pair,
        words=(),
        scores=(),
        prompt="a \\ backslash separates values in DICOM",
        baseline=Drawing(noise_image(1), {}),
        aligned=Drawing(noise_image(2), {"lesion": np.zeros((48, 48), bool)}),
    )
    files = dicom_files(bare)
    assert set(files) == {"baseline.dcm", "aligned.dcm"}
    assert (
        opened(files["aligned.dcm"]).StudyDescription
        == "SYNTHETIC dermatology: a / backslash separates values in DICOM"
    )
