"""LoRA adapters on one base UNet: saving, loading, and switching exactly one on, or all off.

The base weights are never changed and adapters are never fused into them, so that baseline and aligned images differ by
the adapter alone. The files are those that `StableDiffusionPipeline.load_lora_weights` reads, too.
"""

import json
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from medviz.errors import InputError, ModelError
from medviz.models.manifest import NAME_PATTERN, read_json

ADAPTER_CONFIG_NAME = "adapter.json"
KIND_LORA = "lora"
_PREFIX = "unet"

_locks: weakref.WeakKeyDictionary[UNet2DConditionModel, threading.RLock] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


def unet_lock(unet: UNet2DConditionModel) -> threading.RLock:
    """The lock of one UNet, which using_adapter holds: adapters and attention processors belong to all its threads."""
    with _locks_guard:
        return _locks.setdefault(unet, threading.RLock())


def loaded_adapters(unet: UNet2DConditionModel) -> tuple[str, ...]:
    """Names of the adapters that the UNet holds, on or off, in the order they were added."""
    return tuple(getattr(unet, "peft_config", {}))


@contextmanager
def using_adapter(unet: UNet2DConditionModel, name: str | None) -> Iterator[None]:
    """Switch exactly the adapter `name` on, or all off for None, and restore the former state on every exit.

    Another thread that asks for an adapter of the same UNet waits; leave the block in the thread that entered it.
    Raises InputError for a name that is not loaded.
    """
    with unet_lock(unet):
        allowed = loaded_adapters(unet)
        if name is not None and name not in allowed:
            raise InputError(f"unknown adapter {name!r}; allowed: {', '.join(allowed) or 'none is loaded'}")
        layers = _tuner_layers(unet)
        states = [(layer, layer.disable_adapters, list(layer.active_adapters)) for layer in layers]
        # PEFT's switches also freeze and unfreeze; what is trained is the trainer's business, not ours.
        trainable = [(weight, weight.requires_grad) for layer in layers for weight in layer.parameters()]
        try:
            for layer in layers:
                if name is not None:
                    layer.set_adapter([name], inference_mode=True)
                layer.enable_adapters(name is not None)
            _restore_trainable(trainable)
            yield
        finally:
            for layer, disabled, active in states:
                layer.set_adapter(active, inference_mode=True)
                layer.enable_adapters(not disabled)
            _restore_trainable(trainable)


def save_lora(unet: UNet2DConditionModel, folder: Path, name: str, *, details: Mapping[str, Any] | None = None) -> Path:
    """Write the adapter `name` of a UNet to `folder` (adapters/NAME): its weights and adapter.json; return the folder.

    details: title, recipe and whatever else the model card should say; `kind` is added. Raises InputError for a name
    that is not loaded or not allowed.
    """
    if name not in loaded_adapters(unet):
        raise InputError(f"unknown adapter {name!r}; allowed: {', '.join(loaded_adapters(unet)) or 'none is loaded'}")
    _check_name(name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        f"{_PREFIX}.{key}": value.detach().to("cpu").contiguous()
        for key, value in get_peft_model_state_dict(unet, adapter_name=name).items()
    }
    # Sets sorted: the same adapter always gives the same file, and so the same sha256.
    config = {
        f"{_PREFIX}.{key}": sorted(value) if isinstance(value, set) else value
        for key, value in unet.peft_config[name].to_dict().items()
    }
    # One entry: safetensors writes several in an order of chance.
    metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps(config, indent=2, sort_keys=True)}
    save_file(weights, folder / LORA_WEIGHT_NAME_SAFE, metadata=metadata)
    text = json.dumps({"kind": KIND_LORA, **(details or {})}, indent=1, sort_keys=True, allow_nan=False)
    (folder / ADAPTER_CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
    return folder


def load_lora(unet: UNet2DConditionModel, folder: Path, name: str) -> None:
    """Add the adapter in `folder` (adapters/NAME) to the UNet under `name`, switched off and frozen.

    Raises ModelError when the files are missing, damaged, of an unknown kind, or fit another UNet.
    """
    folder = Path(folder)
    _check_name(name)
    kind = read_json(folder / ADAPTER_CONFIG_NAME).get("kind")
    if kind != KIND_LORA:
        raise ModelError(f"{folder / ADAPTER_CONFIG_NAME} has the kind {kind!r}; this program reads {KIND_LORA!r}")
    path = folder / LORA_WEIGHT_NAME_SAFE
    try:
        expected = set(load_file(path))
        unet.load_lora_adapter(
            folder,
            prefix=_PREFIX,
            adapter_name=name,
            weight_name=path.name,
            use_safetensors=True,
            local_files_only=True,
        )
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ModelError(f"the adapter {path} cannot be loaded on this UNet: {error}") from error
    if not expected or name not in loaded_adapters(unet):
        raise ModelError(f"the adapter {path} holds no weights for a UNet")
    found = {f"{_PREFIX}.{key}" for key in get_peft_model_state_dict(unet, adapter_name=name)}
    if found != expected:
        unet.delete_adapters(name)
        raise ModelError(f"the adapter {path} fits another UNet: {len(found ^ expected)} of its weights have no place")
    unet.disable_adapters()


def zero_adapter(unet: UNet2DConditionModel, name: str) -> None:
    """Set the adapter's output weights to zero in place: switched on, it must then change no bit of an image."""
    if name not in loaded_adapters(unet):
        raise InputError(f"unknown adapter {name!r}; allowed: {', '.join(loaded_adapters(unet)) or 'none is loaded'}")
    with torch.no_grad():
        for layer in _tuner_layers(unet):
            if name in layer.lora_B:
                layer.lora_B[name].weight.zero_()


def _check_name(name: str) -> None:
    if not NAME_PATTERN.fullmatch(name) or name == "none":
        raise InputError(f"{name!r} cannot be an adapter's name; allowed: {NAME_PATTERN.pattern}, but not 'none'")


def _tuner_layers(unet: UNet2DConditionModel) -> list[BaseTunerLayer]:
    return [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]


def _restore_trainable(trainable: list[tuple[torch.nn.Parameter, bool]]) -> None:
    for weight, requires_grad in trainable:
        weight.requires_grad_(requires_grad)
