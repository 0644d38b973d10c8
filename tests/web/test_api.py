"""The named endpoints as a client meets them: files, JSON, limits and messages."""

from pathlib import Path

import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from medviz import Studio
from medviz.models.adapters import zero_adapter
from tests.dicoms import SECRET, dicom
from tests.tiny import ADAPTER
from tests.web.conftest import STEPS

pytestmark = pytest.mark.web

PROMPTS = {
    "dermatology": "a dermoscopic image with melanoma (MEL) showing hair, ruler",
    "radiology": "a frontal chest X-ray of a woman, cardiomegaly, pleural effusion, PA view",
}
REPORT_KEYS = {
    "domain", "prompt", "seed", "steps", "guidance_scale", "adapter",
    "models", "words", "scores", "warnings", "timings_s",
}  # fmt: skip


@pytest.fixture(scope="module")
def client(url: str, tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(url, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows, columns = np.mgrid[0:80, 0:96]
    path = tmp_path_factory.mktemp("photo") / "skin.png"
    Image.fromarray(np.stack([rows * 2, columns * 2, rows + columns], -1).astype(np.uint8)).save(path)
    return path


def compare(client: Client, domain: str = "dermatology", **changed):
    asked = {
        "domain": domain, "prompt": PROMPTS.get(domain, "hair"), "seed": 1, "steps": STEPS,
        "guidance_scale": 3.0, "adapter": "", **changed,
    }  # fmt: skip
    return client.predict(**asked, api_name="/compare")


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_the_endpoints_are_the_documented_ones(client: Client) -> None:
    named = client.view_api(return_format="dict")["named_endpoints"]
    taken = {name: [p["parameter_name"] for p in endpoint["parameters"]] for name, endpoint in named.items()}
    request = ["domain", "prompt", "seed", "steps", "guidance_scale", "adapter"]
    assert taken == {
        "/compare": request,
        "/attention": [*request, "word"],
        "/ground": ["domain", "image", "phrase", "adapter"],
        "/score": ["domain", "image", "prompt"],
    }


@pytest.mark.parametrize("domain", sorted(PROMPTS))
def test_compare_gives_two_labelled_pngs_and_a_report_and_the_same_again(
    client: Client, web_studio: Studio, domain: str
) -> None:
    baseline, aligned, report = compare(client, domain)
    assert set(report) == REPORT_KEYS
    assert (report["domain"], report["seed"], report["adapter"]) == (domain, 1, ADAPTER)
    assert {row["role"] for row in report["scores"]} == {"reward", "judge"}
    assert (pixels(baseline) != pixels(aligned)).any()
    for path, adapter in ((baseline, "none"), (aligned, ADAPTER)):
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.text["Synthetic"] == "yes"
            assert image.text["Prompt"] == PROMPTS[domain]
            assert image.text["Adapter"] == adapter
            assert len(image.text["ModelSha256"]) == 64
        assert pixels(path)[-8:].max() > 200, "the label is on the image"
    web_studio._pairs.clear()
    again = compare(client, domain)
    assert Path(again[0]).read_bytes() == Path(baseline).read_bytes()
    assert Path(again[1]).read_bytes() == Path(aligned).read_bytes()


def test_attention_gives_two_overlays_that_depend_on_the_word(client: Client) -> None:
    request = ("dermatology", PROMPTS["dermatology"], 1, STEPS, 3.0, "")
    plain = compare(client)
    hair, ruler = (client.predict(*request, word, api_name="/attention") for word in ("hair", "ruler"))
    assert hair[2]["word"] == "hair"
    for region in hair[2]["regions"]:
        assert set(region) == {"name", "baseline_mass", "aligned_mass", "baseline_cnr", "aligned_cnr"}
    assert (pixels(hair[0]) != pixels(ruler[0])).any()
    assert (pixels(hair[0]) != pixels(hair[1])).any()
    assert pixels(plain[0]).shape[2] == 3
    with Image.open(hair[0]) as image:
        assert image.text["Synthetic"] == "yes"


def test_an_adapter_of_zeros_gives_the_baselines_pixels(client: Client, web_studio: Studio) -> None:
    compare(client)
    unet = web_studio._models["dermatology"].loaded.pipeline.unet
    weights = {name: weight.detach().clone() for name, weight in unet.named_parameters() if "lora_B" in name}
    zero_adapter(unet, ADAPTER)
    web_studio._pairs.clear()
    try:
        baseline, aligned, _ = compare(client)
        assert (pixels(baseline) == pixels(aligned)).all()
    finally:
        for name, weight in unet.named_parameters():
            if name in weights:
                weight.data.copy_(weights[name])
        web_studio._pairs.clear()


def test_none_is_the_baseline_on_both_sides(client: Client) -> None:
    baseline, aligned, report = compare(client, adapter="none")
    assert (pixels(baseline) == pixels(aligned)).all()
    assert report["adapter"] == "none"


def test_a_real_image_is_grounded_and_scored(client: Client, photo: Path) -> None:
    overlay, found = client.predict("dermatology", handle_file(photo), "melanoma", "", api_name="/ground")
    assert set(found) == {"phrase", "words", "regions", "box", "warnings"}
    assert pixels(overlay).shape[:2] == (80, 96)
    scores = client.predict("dermatology", handle_file(photo), PROMPTS["dermatology"], api_name="/score")["scores"]
    assert {row["role"] for row in scores} == {"reward", "judge"}
    assert all(set(row) == {"name", "role", "value", "higher_is_better"} for row in scores)


def test_a_dicom_file_is_grounded_and_scored_as_its_picture_is(client: Client, tmp_path: Path) -> None:
    stored = np.add.outer(np.arange(80), np.arange(96)).astype(np.uint8)
    picture, radiograph, slice_ = (tmp_path / name for name in ("chest.png", "chest.dcm", "slice.dcm"))
    Image.fromarray(stored).save(picture)
    radiograph.write_bytes(dicom(np.ascontiguousarray(stored[:, ::-1]), PatientOrientation=["R", "F"]))
    slice_.write_bytes(dicom(Modality="CT"))
    for name, phrase in (("/ground", ("lung opacity", "")), ("/score", (PROMPTS["radiology"],))):
        png, dcm = (
            client.predict("radiology", handle_file(path), *phrase, api_name=name) for path in (picture, radiograph)
        )
        if name == "/ground":
            assert (pixels(png[0]) == pixels(dcm[0])).all()
            with Image.open(dcm[0]) as image:
                assert image.info == {}, "nothing of the file's header is handed on"
            png, dcm = png[1], dcm[1]
        assert png == dcm
        with pytest.raises(AppError, match="modality 'CT'; allowed") as caught:
            client.predict("radiology", handle_file(slice_), *phrase, api_name=name)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"domain": "cardiology"}, "dermatology, radiology"),
        ({"prompt": "  "}, "empty"),
        ({"prompt": "x" * 401}, "400"),
        ({"seed": -1}, "4294967295"),
        ({"seed": 1.5}, "whole number"),
        ({"steps": 51}, "1 to 50"),
        ({"guidance_scale": 99}, "1 to 15"),
        ({"adapter": "../judge"}, ADAPTER),
        ({"prompt": "<img src=x onerror=alert(1)>" * 20}, "400"),
    ],
)
def test_bad_requests_say_what_is_allowed_and_run_no_model(
    client: Client, web_studio: Studio, monkeypatch: pytest.MonkeyPatch, changed: dict, said: str
) -> None:
    def refuse(domain: str) -> None:
        raise AssertionError("a model was asked for")

    monkeypatch.setattr(web_studio, "_load", refuse)
    with pytest.raises(AppError) as caught:
        compare(client, **changed)
    assert said in str(caught.value)
    assert "<img" not in str(caught.value)


def test_bad_images_and_words_say_what_is_allowed(client: Client, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n no image")
    for name, phrase in (("/ground", ("hair", "")), ("/score", (PROMPTS["dermatology"],))):
        with pytest.raises(AppError, match="PNG, JPEG"):
            client.predict("dermatology", handle_file(broken), *phrase, api_name=name)
    with pytest.raises(AppError, match="not in the prompt"):
        client.predict("dermatology", PROMPTS["dermatology"], 1, STEPS, 3.0, "", "ink", api_name="/attention")


def test_a_failure_of_the_server_is_told_in_general_and_logged(
    client: Client, web_studio: Studio, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(domain: str) -> None:
        raise RuntimeError("/secret/path is full")

    monkeypatch.setattr(web_studio, "_load", fail)
    with pytest.raises(AppError) as caught:
        compare(client, seed=99)
    assert "secret" not in str(caught.value)
    assert "log" in str(caught.value)
    assert "secret" in caplog.text
