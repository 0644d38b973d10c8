"""What each medical domain means: its vocabulary, prompt fields, heads, regions and examples.

A domain is one module of this package that holds a `DOMAIN`; adding a file adds the domain, nothing else has to know.
"""

from importlib import import_module
from pkgutil import iter_modules

from ..errors import InputError
from .base import NOT_STATED, Domain, Example, Field, Head, Imaging, ParsedPrompt, Region

__all__ = [
    "DOMAINS",
    "NOT_STATED",
    "Domain",
    "Example",
    "Field",
    "Head",
    "Imaging",
    "ParsedPrompt",
    "Region",
    "get_domain",
]


def _find_domains() -> dict[str, Domain]:
    modules = (import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__))
    domains = (getattr(module, "DOMAIN", None) for module in modules)
    return {domain.name: domain for domain in domains if isinstance(domain, Domain)}


DOMAINS: dict[str, Domain] = _find_domains()


def get_domain(name: str) -> Domain:
    """Return the domain called `name`. Raises InputError naming the domains there are."""
    if not isinstance(name, str) or name not in DOMAINS:
        raise InputError(f"unknown domain {name!r}; allowed: {', '.join(DOMAINS)}")
    return DOMAINS[name]
