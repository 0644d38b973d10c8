"""Content credentials: a signed statement that a trained model made the picture, where a certificate is configured."""

import datetime
import io
from pathlib import Path

import pytest
from PIL import Image

from medviz.audit.credentials import signed_png
from medviz.errors import ExportError
from medviz.images import decode_image, png_bytes

c2pa = pytest.importorskip("c2pa", reason="needs the package c2pa-python")
PNG = png_bytes(Image.linear_gradient("L").convert("RGB"), {"Synthetic": "yes"})


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A root that nobody knows (`root`), and a signer's certificate and key as the environment names them."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    folder, now = tmp_path_factory.mktemp("certificates"), datetime.datetime.now(datetime.UTC)
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))

    def name(common: str) -> x509.Name:
        parts = {NameOID.ORGANIZATION_NAME: "medviz tests", NameOID.COMMON_NAME: common}
        return x509.Name([x509.NameAttribute(oid, value) for oid, value in parts.items()])

    def certificate(subject: str, public: ec.EllipticCurvePublicKey, authority: bool) -> bytes:
        made = (
            x509.CertificateBuilder(name("root"), name(subject), public, x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
            .add_extension(x509.BasicConstraints(authority, None), critical=True)
            .add_extension(
                x509.KeyUsage(not authority, False, False, False, False, authority, authority, False, False),
                critical=True,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False)
        )
        if not authority:
            made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
        return made.sign(root_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    files = {
        "root": certificate("root", root_key.public_key(), True),
        "MEDVIZ_C2PA_CERT": certificate("signer", key.public_key(), False),
        "MEDVIZ_C2PA_KEY": key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    }
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return {file: str(folder / file) for file in files}


def read(content: bytes, root: str):
    settings = {"trust": {"trust_anchors": Path(root).read_text()}, "verify": {"verify_trust": True}}
    with c2pa.Context.from_dict(settings) as context:
        return c2pa.Reader("image/png", io.BytesIO(content), context=context)


def test_a_signed_picture_says_that_a_trained_model_made_it(certificates: dict[str, str]) -> None:
    signed = signed_png(PNG, "baseline.png", certificates)
    with read(signed, certificates["root"]) as found:
        assert found.get_validation_state() == "Trusted"
        (actions,) = [each for each in found.get_active_manifest()["assertions"] if "actions" in each["label"]]
    (created,) = actions["data"]["actions"]
    assert created["action"] == "c2pa.created"
    assert created["digitalSourceType"].endswith("/trainedAlgorithmicMedia")


def test_signing_changes_neither_pixels_nor_text(certificates: dict[str, str]) -> None:
    signed = signed_png(PNG, "baseline.png", certificates)
    with Image.open(io.BytesIO(signed)) as after, Image.open(io.BytesIO(PNG)) as before:
        assert after.tobytes() == before.tobytes()
        assert after.text == before.text
    assert decode_image(signed).tobytes() == decode_image(PNG).tobytes()


def test_a_changed_pixel_is_noticed(certificates: dict[str, str]) -> None:
    signed = bytearray(signed_png(PNG, "baseline.png", certificates))
    signed[signed.rindex(b"IDAT") + 40] ^= 1
    with read(bytes(signed), certificates["root"]) as found:
        assert found.get_validation_state() == "Invalid"


def test_without_a_certificate_nothing_changes() -> None:
    assert signed_png(PNG, "baseline.png", {}) == PNG


def test_half_or_wrong_settings_are_named(certificates: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="MEDVIZ_C2PA_KEY is not set"):
        signed_png(PNG, "baseline.png", {"MEDVIZ_C2PA_CERT": certificates["MEDVIZ_C2PA_CERT"]})
    with pytest.raises(ExportError, match="absent"):
        signed_png(PNG, "baseline.png", {**certificates, "MEDVIZ_C2PA_KEY": str(tmp_path / "absent")})
    with pytest.raises(ExportError, match="no unencrypted private key"):
        signed_png(PNG, "baseline.png", {**certificates, "MEDVIZ_C2PA_KEY": certificates["root"]})
    with pytest.raises(ExportError, match="cannot be signed"):
        signed_png(PNG, "baseline.png", {**certificates, "MEDVIZ_C2PA_CERT": certificates["MEDVIZ_C2PA_KEY"]})
