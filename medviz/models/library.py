"""The models that are there, each loaded once, verified first, and shared by every thread."""

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError

from medviz.errors import InputError, ModelError
from medviz.models.adapters import load_adapter, unet_lock
from medviz.models.manifest import (
    FORBIDDEN_SUFFIXES,
    MANIFEST_NAME,
    NAME_PATTERN,
    HubSource,
    Manifest,
    read_json,
    read_manifest,
    verify,
    verify_files,
)
from medviz.models.networks import check_finite, keeping_random_state

DEFAULT_ROOT = Path(__file__).resolve().parents[2] / "assets" / "models"
PIPELINE_CLASS = "StableDiffusionPipeline"
NO_ADAPTER = "none"  # how a request says None where it can only send text

# What a pipeline may be built of: anything else could be code that came with the weights.
_LIBRARIES = frozenset({"diffusers", "transformers"})
_LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
    SafetensorError,
)

LOADING = threading.RLock()
"""Held while any network is read. Meanwhile transformers and accelerate patch torch for the whole process, and two
threads that do so at once leave it patched: every network made from then on has no weights."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LoadedDomain:
    """One domain's pipeline with all its adapters loaded and switched off.

    pipeline: eval mode and frozen, float32 on a CPU, bfloat16 or float16 on CUDA. folder: where the domain's rewards,
    judge and segmenter lie, too. Switch adapters by medviz.models.adapters.using_adapter; hold `lock` around work that
    changes the UNet's adapters or attention processors.
    """

    name: str
    pipeline: StableDiffusionPipeline
    manifest: Manifest
    folder: Path
    device: torch.device
    dtype: torch.dtype

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self.manifest.adapters)

    @property
    def default_adapter(self) -> str | None:
        return self.manifest.default_adapter

    @property
    def lock(self) -> threading.RLock:
        return unet_lock(self.pipeline.unet)

    def resolve_adapter(self, name: str | None) -> str | None:
        """Return the adapter that a request means: "" is the default one, None or "none" the baseline (None).

        Raises InputError, naming the adapters there are, for any other name.
        """
        if name is None or name == NO_ADAPTER:
            return None
        if name == "":
            return self.default_adapter
        if name not in self.manifest.selectable:
            raise InputError(
                f"unknown adapter {str(name)[:60]!r}; allowed: {', '.join((*self.manifest.selectable, NO_ADAPTER))}, "
                "or empty for the default"
            )
        return name


class ModelLibrary:
    """The model folders under one root (assets/models); every domain is verified and loaded on its first use.

    root: a folder of domain folders, each with its manifest.json. device: a torch device; None takes CUDA when there
    is one. dtype: of the generator's weights; None takes fp32 on a CPU and half precision on a card. Raises ModelError
    for a device that is not there.
    """

    def __init__(
        self,
        root: Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.root = Path(root) if root is not None else DEFAULT_ROOT
        self.device = _choose_device(device)
        self.dtype = dtype or _choose_dtype(self.device)
        self._loaded: dict[str, LoadedDomain] = {}

    def domains(self) -> tuple[str, ...]:
        """Names of the domains that have a model folder, in alphabetical order; nothing is loaded or verified."""
        return tuple(sorted(path.parent.name for path in self.root.glob(f"*/{MANIFEST_NAME}")))

    def load(self, domain: str) -> LoadedDomain:
        """Return the domain's models; the first call verifies and loads them, while others that ask for it wait.

        Raises InputError for what cannot be a domain's name, ModelError, with the path and the way out, for a folder
        that is missing, damaged or incompatible. A failed load is tried again by the next call.
        """
        if not isinstance(domain, str) or not NAME_PATTERN.fullmatch(domain):
            raise InputError(f"unknown domain {str(domain)[:60]!r}; allowed: {', '.join(self.domains())}")
        if domain not in self._loaded:
            with LOADING:
                if domain not in self._loaded:
                    with keeping_random_state():
                        self._loaded[domain] = self._load(domain)
        return self._loaded[domain]

    def _load(self, domain: str) -> LoadedDomain:
        folder = self.root / domain
        if not (folder / MANIFEST_NAME).is_file():
            raise ModelError(
                f"there are no models for {domain!r}: {folder / MANIFEST_NAME} is missing. Make them with "
                f"`python -m train`, or choose one of: {', '.join(self.domains()) or f'none is in {self.root}'}"
            )
        manifest = read_manifest(folder)
        if manifest.domain != domain:
            raise ModelError(f"{folder / MANIFEST_NAME} describes {manifest.domain!r}, but its folder is {domain!r}")
        verify(folder, manifest)
        source = folder if manifest.hub is None else _fetch(manifest.hub)
        pipeline = _load_pipeline(source, self.dtype)
        for name in manifest.adapters:
            load_adapter(pipeline, folder / "adapters" / name, name)
        for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            model.eval().requires_grad_(False)
        for model in (pipeline.unet, pipeline.vae):
            model.to(memory_format=torch.channels_last)  # on a CPU half the time to decode, a tenth less to denoise
        pipeline.to(self.device)
        logger.info("loaded %s from %s on %s", domain, source, self.device)
        return LoadedDomain(domain, pipeline, manifest, folder, self.device, self.dtype)


def _load_pipeline(folder: Path, dtype: torch.dtype) -> StableDiffusionPipeline:
    _check_components(read_json(folder / "model_index.json"), folder)
    try:
        # Weights that were stored in 16 bits are widened here: a CPU computes in float32.
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder,
            dtype=dtype,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            local_files_only=True,
            use_safetensors=True,
        )
    except _LOAD_ERRORS as error:
        raise ModelError(f"the pipeline in {folder} cannot be loaded: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    _check_fit(pipeline, folder)
    for name in ("unet", "vae", "text_encoder"):
        check_finite(getattr(pipeline, name).state_dict(), folder / name)
    return pipeline


def _check_components(index: Mapping[str, object], folder: Path) -> None:
    found = index.get("_class_name")
    if found != PIPELINE_CLASS:
        raise ModelError(f"{folder} holds a {found!r}; this program loads a {PIPELINE_CLASS}")
    for name, component in index.items():
        if isinstance(component, list) and component[0] is not None and component[0] not in _LIBRARIES:
            raise ModelError(
                f"{folder} builds its {name} with {component[0]!r}; allowed: {', '.join(sorted(_LIBRARIES))}"
            )


def _check_fit(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """The parts of a pipeline can be loadable and yet come from different trainings."""
    unet, text_encoder = pipeline.unet.config, pipeline.text_encoder.config
    pairs = {
        "latent channels of the unet and the vae": (unet.in_channels, pipeline.vae.config.latent_channels),
        "text width of the unet and the text_encoder": (unet.cross_attention_dim, text_encoder.hidden_size),
        "prompt length of the tokenizer and the text_encoder": (
            pipeline.tokenizer.model_max_length,
            text_encoder.max_position_embeddings,
        ),
    }
    for what, (left, right) in pairs.items():
        if left != right:
            raise ModelError(f"the pipeline in {folder} does not fit together: {what} are {left} and {right}")
    if len(pipeline.tokenizer) > text_encoder.vocab_size:
        raise ModelError(
            f"the pipeline in {folder} does not fit together: the tokenizer has {len(pipeline.tokenizer)} tokens, "
            f"the text_encoder {text_encoder.vocab_size}"
        )


def _fetch(hub: HubSource) -> Path:
    """Bring exactly the listed files of one commit into the Hub's cache, verify them and return their folder."""
    try:
        folder = Path(snapshot_download(hub.repo_id, revision=hub.revision, allow_patterns=sorted(hub.files)))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(
            f"the base model {hub.repo_id} at {hub.revision} is neither here nor can it be fetched: {error}. "
            f"Fetch it once with `hf download {hub.repo_id} --revision {hub.revision}` while there is a network."
        ) from error
    verify_files(folder, hub.files)
    for path in folder.rglob("*"):
        if path.suffix.lower() in FORBIDDEN_SUFFIXES:
            # A full download by other means lies in the same cache; from_pretrained is told to take safetensors alone.
            logger.warning("%s is not read: only safetensors weights are loaded", path)
    return folder


def _choose_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"unknown device {device!r}; allowed: cpu, cuda, cuda:N") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"the device {device!r} is not there; this machine has no CUDA")
    return chosen


def _choose_dtype(device: torch.device) -> torch.dtype:
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
