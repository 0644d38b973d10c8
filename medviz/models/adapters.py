"""Adapters on one base pipeline: saving, loading, and switching exactly one on, or all off.

An adapter is LoRA weights of the UNet, learned input embeddings of the text encoder, or both. The base weights are
never changed, so that baseline and aligned images differ by the adapter alone; drawing may multiply by sums of them
and an adapter's change (`folded_adapters`). The LoRA files are those that diffusers' `load_lora_weights` reads, too.
"""

import json
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from peft.tuners.lora import Conv2d as LoraConv2d
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from medviz.errors import InputError, ModelError
from medviz.models.manifest import NAME_PATTERN, read_json
from medviz.models.networks import check_finite
from medviz.models.prompt_embeddings import PromptEmbeddings

ADAPTER_CONFIG_NAME = "adapter.json"
KIND_LORA = "lora"
KIND_PROMPTS = "anatomy_prompts"
_PREFIX = "unet"

_locks: weakref.WeakKeyDictionary[UNet2DConditionModel, threading.RLock] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()
# The learned embeddings of each UNet's text encoder, by adapter.
_embeddings: weakref.WeakKeyDictionary[UNet2DConditionModel, dict[str, PromptEmbeddings]] = weakref.WeakKeyDictionary()


def unet_lock(unet: UNet2DConditionModel) -> threading.RLock:
    """The lock of one UNet, which using_adapter holds: adapters and attention processors belong to all its threads."""
    with _locks_guard:
        return _locks.setdefault(unet, threading.RLock())


def loaded_adapters(unet: UNet2DConditionModel) -> tuple[str, ...]:
    """Names of the adapters that the UNet holds, on or off, LoRA before those that are learned embeddings alone."""
    return tuple(dict.fromkeys((*_lora_names(unet), *_embeddings.get(unet, {}))))


@contextmanager
def using_adapter(unet: UNet2DConditionModel, *names: str | None) -> Iterator[None]:
    """Switch exactly the adapters `names` on, all off where they are None, and restore the former state on every exit.

    Changes of several LoRA adapters add up. Another thread that asks for an adapter of the same UNet waits; leave the
    block in the thread that entered it. Raises InputError for a name that is not loaded.
    """
    chosen = [name for name in names if name is not None]
    with unet_lock(unet):
        for name in chosen:
            _check_loaded(name, loaded_adapters(unet))
        embeddings = _embeddings.get(unet, {})
        were_enabled = {each: found.enabled for each, found in embeddings.items()}
        loras = [name for name in chosen if name in _lora_names(unet)]
        states = [(layer, layer._active_adapter, layer._disable_adapters) for layer in _tuner_layers(unet)]
        try:
            # What PEFT's layers decide by. Its own switches also freeze and unfreeze every weight, which is the
            # trainer's business, and walk all of them to do so.
            for layer, active, _ in states:
                layer._active_adapter, layer._disable_adapters = loras or active, not loras
            for each, found in embeddings.items():
                found.enabled = each in chosen
            yield
        finally:
            for each, enabled in were_enabled.items():
                embeddings[each].enabled = enabled
            for layer, active, disabled in states:
                layer._active_adapter, layer._disable_adapters = active, disabled


@contextmanager
def also_using(unet: UNet2DConditionModel, name: str | None) -> Iterator[None]:
    """Switch the adapter `name` on beside those that are on; None changes nothing. Else as `using_adapter`."""
    if name is None:
        yield
        return
    with unet_lock(unet):
        on = [each for layer in _tuner_layers(unet) if not layer.disable_adapters for each in layer.active_adapters]
        on += [each for each, found in _embeddings.get(unet, {}).items() if found.enabled]
        with using_adapter(unet, *dict.fromkeys([*on, name])):
            yield


@contextmanager
def folded_adapters(unet: UNet2DConditionModel, in_turn: Sequence[str | None] = (None,)) -> Iterator[None]:
    """Let each layer with LoRA multiply its input once, by the sum of W and s B A, worked out on entry, instead of by
    W, A and B one after the other: the same function but for rounding, in less time for a few passes or more.

    in_turn: adapters beside those that are on; row i of whatever the UNet is given has the one at i modulo their
    number, so that one pass draws with all of them. Layers that they do not change see the rows together.

    For drawing: switch no adapter inside; no gradient reaches them. A change of zeros still changes no bit. In 16 bits
    nothing is summed: rounded, the sum would lose a small change. Raises InputError for a name that is not loaded.
    """
    found: list[tuple[BaseTunerLayer, Callable[..., torch.Tensor] | None]] = []
    with unet_lock(unet):
        for name in in_turn:
            if name is not None:
                _check_loaded(name, loaded_adapters(unet))
        try:
            for layer in _tuner_layers(unet):
                on = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
                turns = [tuple(dict.fromkeys([*on, *([name] if name in layer.lora_A else [])])) for name in in_turn]
                if not any(turns):
                    continue
                ways = {names: _forward_with(layer, names) for names in dict.fromkeys(turns)}
                found.append((layer, vars(layer).get("forward")))
                layer.forward = ways[turns[0]] if len(ways) == 1 else _by_rows([ways[names] for names in turns])
            yield
        finally:
            for layer, former in found:
                del layer.forward  # what its class has is seen again
                if former is not None:
                    layer.forward = former


def _forward_with(layer: BaseTunerLayer, names: tuple[str, ...]) -> Callable[..., torch.Tensor]:
    """What the layer computes with exactly these of its adapters on."""
    base, own = layer.base_layer, layer.forward

    def separate(x: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        former = layer._active_adapter, layer._disable_adapters
        layer._active_adapter, layer._disable_adapters = list(names), not names
        try:
            return own(x, *arguments, **named)
        finally:
            layer._active_adapter, layer._disable_adapters = former

    if not _can_fold(layer, names):
        return separate
    weight = _sum(layer, names)
    is_linear = isinstance(base, torch.nn.Linear)

    def folded(x: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            return separate(x, *arguments, **named)
        if is_linear:
            return torch.nn.functional.linear(x, weight, base.bias)
        return base._conv_forward(x, weight, base.bias)

    return folded


def _can_fold(layer: BaseTunerLayer, names: tuple[str, ...]) -> bool:
    plain = isinstance(layer, LoraLinear | LoraConv2d) and not layer.merged
    return (
        plain
        and layer.base_layer.weight.dtype == torch.float32
        and getattr(layer.base_layer, "groups", 1) == 1
        and not any(name in layer.lora_variant or layer.lora_bias[name] for name in names)
    )


@torch.no_grad()
def _sum(layer: BaseTunerLayer, names: tuple[str, ...]) -> torch.Tensor:
    """W + s B A over these adapters, laid out in memory as W is.

    In one pass over W each, where PEFT's `get_delta_weight` takes several: a draft of four steps feels it.
    """

    def rows(weight: torch.Tensor) -> torch.Tensor:  # the order in which channels-last weights lie in memory
        return weight if weight.ndim == 2 else weight.permute(0, 2, 3, 1).flatten(1)

    weight = layer.base_layer.weight
    total = rows(weight)
    for name in names:
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        total = torch.addmm(total, up.flatten(1), rows(down), alpha=layer.scaling[name])
    if weight.ndim == 2:
        return total
    out_channels, in_channels, height, width = weight.shape
    total = total.view(out_channels, height, width, in_channels).permute(0, 3, 1, 2)
    # In another layout another kernel would convolve, and zeros would change a bit.
    return total if total.stride() == weight.stride() else torch.empty_like(weight).copy_(total)


def _by_rows(ways: Sequence[Callable[..., torch.Tensor]]) -> Callable[..., torch.Tensor]:
    """What computes row i by the way at i modulo their number."""

    def forward(x: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        turns = x.unflatten(0, (-1, len(ways))).unbind(1)
        computed = [way(rows, *arguments, **named) for way, rows in zip(ways, turns, strict=True)]
        return torch.stack(computed, dim=1).flatten(0, 1)

    return forward


def save_lora(unet: UNet2DConditionModel, folder: Path, name: str, *, details: Mapping[str, Any] | None = None) -> Path:
    """Write the LoRA adapter `name` of a UNet to `folder` (adapters/NAME): weights and adapter.json; return the folder.

    details: title, recipe and whatever else the model card should say; `kind` is added. Raises InputError for a name
    that is not loaded or not allowed.
    """
    _check_loaded(name, _lora_names(unet))
    _check_name(name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_lora(unet, folder, name)
    _write_details(folder, {"kind": KIND_LORA, **(details or {})})
    return folder


def save_prompt_adapter(
    unet: UNet2DConditionModel, folder: Path, name: str, *, details: Mapping[str, Any] | None = None
) -> Path:
    """Write the adapter `name`, learned embeddings with or without LoRA, to `folder` (adapters/NAME); return it.

    details: see `save_lora`; `kind` and whether there is LoRA are added. Raises InputError as `save_lora`.
    """
    found = _embeddings.get(unet, {})
    _check_loaded(name, found)
    _check_name(name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found[name].save(folder)
    has_lora = name in _lora_names(unet)
    if has_lora:
        _write_lora(unet, folder, name)
    _write_details(folder, {"kind": KIND_PROMPTS, "lora": has_lora, **(details or {})})
    return folder


def _write_lora(unet: UNet2DConditionModel, folder: Path, name: str) -> None:
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


def _write_details(folder: Path, details: Mapping[str, Any]) -> None:
    text = json.dumps(details, indent=1, sort_keys=True, allow_nan=False)
    (folder / ADAPTER_CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def add_prompt_embeddings(pipeline: StableDiffusionPipeline, name: str, embeddings: PromptEmbeddings) -> None:
    """Give the pipeline learned embeddings under `name`, switched off; a LoRA of that name is switched with them.

    Raises InputError for a name that is not allowed or already has embeddings, ModelError for another text encoder.
    """
    _check_name(name)
    with unet_lock(pipeline.unet):
        known = _embeddings.setdefault(pipeline.unet, {})
        if name in known:
            raise InputError(f"the pipeline already holds embeddings {name!r}; choose another name")
        embeddings.attach(pipeline.text_encoder)
        known[name] = embeddings


def load_adapter(pipeline: StableDiffusionPipeline, folder: Path, name: str) -> None:
    """Add the adapter in `folder` (adapters/NAME), of whatever kind, to the pipeline; it is switched off and frozen.

    Raises ModelError when the files are missing, damaged, of an unknown kind, or fit another pipeline.
    """
    details = read_json(Path(folder) / ADAPTER_CONFIG_NAME)
    if not isinstance(details, dict) or details.get("kind") != KIND_PROMPTS:
        load_lora(pipeline.unet, folder, name)
        return
    _check_name(name)
    embeddings = PromptEmbeddings.load(Path(folder), pipeline.tokenizer)
    if details.get("lora"):
        _read_lora(pipeline.unet, Path(folder), name)
    add_prompt_embeddings(pipeline, name, embeddings)


def load_lora(unet: UNet2DConditionModel, folder: Path, name: str) -> None:
    """Add the LoRA adapter in `folder` (adapters/NAME) to the UNet under `name`, switched off and frozen.

    Raises ModelError when the files are missing, damaged, of an unknown kind, or fit another UNet.
    """
    folder = Path(folder)
    _check_name(name)
    kind = read_json(folder / ADAPTER_CONFIG_NAME).get("kind")
    if kind != KIND_LORA:
        raise ModelError(
            f"{folder / ADAPTER_CONFIG_NAME} has the kind {kind!r}; this program reads {KIND_LORA!r} and "
            f"{KIND_PROMPTS!r}, the latter on a whole pipeline alone"
        )
    _read_lora(unet, folder, name)


def _read_lora(unet: UNet2DConditionModel, folder: Path, name: str) -> None:
    path = folder / LORA_WEIGHT_NAME_SAFE
    try:
        weights = load_file(path)
        check_finite(weights, path)
        expected = set(weights)
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
    if not expected or name not in _lora_names(unet):
        raise ModelError(f"the adapter {path} holds no weights for a UNet")
    found = {f"{_PREFIX}.{key}" for key in get_peft_model_state_dict(unet, adapter_name=name)}
    if found != expected:
        unet.delete_adapters(name)
        raise ModelError(f"the adapter {path} fits another UNet: {len(found ^ expected)} of its weights have no place")
    unet.disable_adapters()


def zero_adapter(unet: UNet2DConditionModel, name: str) -> None:
    """Set the adapter's output weights and offsets to zero in place: switched on, it must then change no bit."""
    _check_loaded(name, loaded_adapters(unet))
    with torch.no_grad():
        if name in _embeddings.get(unet, {}):
            _embeddings[unet][name].offsets.zero_()
        for layer in _tuner_layers(unet):
            if name in layer.lora_B:
                layer.lora_B[name].weight.zero_()


def _lora_names(unet: UNet2DConditionModel) -> tuple[str, ...]:
    return tuple(getattr(unet, "peft_config", {}))


def _check_loaded(name: str, allowed: Collection[str]) -> None:
    if name not in allowed:
        raise InputError(f"unknown adapter {name!r}; allowed: {', '.join(allowed) or 'none is loaded'}")


def _check_name(name: str) -> None:
    # PEFT keeps adapters as attributes of torch modules, which have attributes of their own.
    if not NAME_PATTERN.fullmatch(name) or name == "none" or hasattr(torch.nn.ModuleDict, name):
        raise InputError(
            f"{name!r} cannot be an adapter's name; allowed: {NAME_PATTERN.pattern}, but not 'none', nor a name that "
            "torch's modules have, such as 'forward' or 'train'"
        )


def _tuner_layers(unet: UNet2DConditionModel) -> list[BaseTunerLayer]:
    return [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
