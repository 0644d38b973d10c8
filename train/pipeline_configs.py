"""Configurations of a pipeline folder that plain diffusers loads in one dtype and without a warning."""

import json
from pathlib import Path

CONFIG_NAME = "config.json"


def load_in_fp32(text_encoder: Path) -> None:
    """Have the text encoder in the folder `text_encoder` loaded in fp32, whatever its weights are stored in.

    Without a dtype argument diffusers loads its own networks in fp32, and transformers loads in the dtype that
    config.json names: that of the weights, unless this changes it.
    """
    _change(text_encoder / CONFIG_NAME, {"dtype": "float32"})


def drop_unknown_options(vae: Path) -> None:
    """Drop from the configuration of the AutoencoderTiny in the folder `vae` what its constructor does not take.

    It adds `block_out_channels` to its own configuration and warns of it when it is read.
    """
    _change(vae / CONFIG_NAME, {}, drop=("block_out_channels",))


def _change(path: Path, changes: dict[str, str], drop: tuple[str, ...] = ()) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: value for name, value in content.items() if name not in drop}
    path.write_text(json.dumps({**kept, **changes}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
