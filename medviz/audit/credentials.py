"""C2PA content credentials: a signed statement in a PNG file that a trained model made the picture.

The statement is the action `c2pa.created` with the digital source type `trainedAlgorithmicMedia` (C2PA 2.2, IPTC).
Signing needs the optional package c2pa-python, and a certificate in two environment variables:
MEDVIZ_C2PA_CERT, a PEM file of the certificate and its chain without the root, the signer's own first;
MEDVIZ_C2PA_KEY, a PEM file of its private key. Nothing is fetched and no timestamp authority is asked.
"""

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path

from medviz import __version__
from medviz.errors import ExportError

CERTIFICATE, KEY = "MEDVIZ_C2PA_CERT", "MEDVIZ_C2PA_KEY"


def signed_png(content: bytes, title: str, environment: Mapping[str, str] | None = None) -> bytes:
    """Return a PNG file with content credentials; the file itself where no certificate is configured.

    Pixels and PNG text stay as they are. environment: what to read instead of os.environ. Raises ExportError where one
    variable is set without the other, a file cannot be used, or c2pa-python is missing.
    """
    variables = os.environ if environment is None else environment
    paths = {name: variables.get(name, "") for name in (CERTIFICATE, KEY)}
    if not any(paths.values()):
        return content
    missing = [name for name, path in paths.items() if not path]
    if missing:
        raise ExportError(f"{missing[0]} is not set; content credentials need {CERTIFICATE} and {KEY}")
    try:
        import c2pa
    except ImportError as error:
        raise ExportError(
            f"{CERTIFICATE} is set, but c2pa-python is not installed; install medviz[credentials]"
        ) from error
    try:
        chain, key = (Path(path).read_bytes() for path in paths.values())
    except OSError as error:
        raise ExportError(f"the certificate or key of content credentials cannot be read: {error}") from error
    tool = {"name": "medviz", "version": __version__}
    claim = {"claim_generator_info": [tool], "title": title, "format": "image/png"}
    settings = {"builder": {"thumbnail": {"enabled": False}}}
    target = io.BytesIO()
    try:
        with (
            c2pa.Signer.from_info(c2pa.C2paSignerInfo(_algorithm(key), chain, key, None)) as signer,
            c2pa.Context.from_dict(settings) as context,
            c2pa.Builder(json.dumps(claim), context) as builder,
        ):
            builder.set_intent(c2pa.C2paBuilderIntent.CREATE, c2pa.C2paDigitalSourceType.TRAINED_ALGORITHMIC_MEDIA)
            builder.sign(signer, "image/png", io.BytesIO(content), target)
    except c2pa.C2paError as error:
        raise ExportError(f"{title} cannot be signed with the certificate of {CERTIFICATE}: {error}") from error
    return target.getvalue()


def _algorithm(key: bytes) -> bytes:
    """The signature algorithm, as C2PA names it, that fits a private key in PEM."""
    # A dependency of c2pa-python.
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        private = load_pem_private_key(key, password=None)
    except (ValueError, TypeError) as error:
        raise ExportError(f"the file of {KEY} holds no unencrypted private key in PEM: {error}") from error
    if isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name in _CURVES:
        return _CURVES[private.curve.name]
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return b"ed25519"
    if isinstance(private, rsa.RSAPrivateKey):
        return b"ps256"
    raise ExportError(f"the key of {KEY} must be of ECDSA P-256, P-384 or P-521, Ed25519 or RSA")


_CURVES = {"secp256r1": b"es256", "secp384r1": b"es384", "secp521r1": b"es512"}
