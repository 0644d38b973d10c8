"""Recipe files: YAML options of one stage, which may extend another recipe and hold options for one device or domain.

Beside its options a recipe may have these keys:

- ``stage``: the command that runs it, e.g. ``diffusion`` or ``evaluate grounding``.
- ``extends``: another recipe, relative to this one, whose options it takes over where it names none itself.
- ``cpu``, ``cuda``: options for that type of device alone; ``dermatology``, ``radiology``: for that domain alone.

``${domain}`` in any value is the domain.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from string import Template
from typing import Any

import yaml

from medviz.domains import DOMAINS
from medviz.errors import InputError

RECIPES = Path(__file__).parent / "recipes"
DEVICES = ("cpu", "cuda")
BLOCKS = (*DOMAINS, *DEVICES)


def load(path: str | Path, *, device: str = "", domain: str = "") -> dict[str, Any]:
    """The options of the recipe at `path`, its `stage` among them, for a device and a domain.

    device, domain: those of the command line, before the recipe's own; "": the recipe's. Raises InputError for a file
    that cannot be read or is no mapping, for one that extends itself, and for `${domain}` without a domain.
    """
    content = raw(path)
    domain = domain or str(content.get("domain", ""))
    if domain:
        content = _merged(content, content.get(domain) or {})
        if "domain" in content:
            content["domain"] = domain
    if device:
        content["device"] = device
    device_type = str(content.get("device", "cpu")).split(":")[0]
    content = _merged(content, {n: v for n, v in (content.get(device_type) or {}).items() if n != "device"})
    options = {name: value for name, value in content.items() if name not in BLOCKS}
    if not domain and any("${domain}" in text for text in texts(options)):
        raise InputError(f"the recipe {path} is for any domain: name one with --domain ({', '.join(DOMAINS)})")
    try:
        return mapped(options, lambda text: Template(text).substitute(domain=domain) if "${" in text else text)
    except (KeyError, ValueError) as error:
        raise InputError(f"the recipe {path} may use ${{domain}} alone, found {error}") from error


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list | tuple):
        return [mapped(item, change) for item in value]
    if isinstance(value, Mapping):
        return {name: mapped(item, change) for name, item in value.items()}
    return value


def raw(path: str | Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The content of a recipe with what it extends, blocks and placeholders as they stand. Raises as `load`."""
    path = Path(path)
    if path.resolve() in extended_by:
        raise InputError(f"the recipe {path} extends itself")
    try:
        content: Any = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"cannot read the recipe {path}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"the recipe {path} must be a mapping of options, found {type(content).__name__}")
    for name in BLOCKS:
        if not isinstance(content.get(name, {}), dict):
            raise InputError(f"{path}: {name} must be a mapping of options, found {content[name]!r}")
    parent = content.pop("extends", None)
    if parent is None:
        return content
    return _merged(raw(path.parent / str(parent), (*extended_by, path.resolve())), content)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with the options of `above` in their place; blocks are merged option by option."""
    blocks = {name: {**below.get(name, {}), **above[name]} for name in BLOCKS if name in above}
    return {**below, **above, **blocks}


def recipes_of(domain: str, recipes: Path = RECIPES) -> dict[Path, dict[str, Any]]:
    """The recipes of a folder that are for a domain, with their options. Raises as `load`."""
    found = {}
    for path in sorted(recipes.glob("*.yaml")):
        if raw(path).get("domain", domain) == domain:
            found[path] = load(path, domain=domain)
    return found


def texts(value: Any) -> list[str]:
    """Every text in `value`, however deep."""
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [text for item in items for text in texts(item)]
