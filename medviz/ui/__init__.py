"""The Gradio page: one file a tab, wiring only; what it shows is computed by the studio."""

import logging
import os
from typing import Any

import gradio as gr

from medviz.domains import DOMAINS
from medviz.errors import ModelError
from medviz.export.archive import NOTICE
from medviz.export.examples import read_examples
from medviz.limits import MAX_QUEUE, MAX_UPLOAD_BYTES, UPLOADS_KEPT_S
from medviz.studio import Studio
from medviz.ui.about import build_about
from medviz.ui.api import build_api
from medviz.ui.generate import GenerateTab
from medviz.ui.ground import GroundTab
from medviz.ui.middleware import guarded, own_names
from medviz.ui.page import Page
from medviz.ui.result_panel import LIGHT
from medviz.ui.theme import CSS, theme

__all__ = ["build", "launch_settings"]

logger = logging.getLogger(__name__)

# Served files, uploads among them, are looked at every CLEAN_EVERY_S and deleted once older than KEEP_S.
CLEAN_EVERY_S = 600
KEEP_S = UPLOADS_KEPT_S - CLEAN_EVERY_S
MAX_SESSIONS = 200

_TITLE = "# medviz\nDermoscopy and chest X-ray images from text: a baseline and its aligned model, side by side"


def build(studio: Studio) -> Page:
    """Return the page with its queue, ready for launch(**launch_settings()).

    A domain whose manifest cannot be read is logged and left out. Raises ModelError when none is left.
    """
    domains = _usable_domains(studio)
    examples = {name: read_examples(studio.assets / "examples" / name) for name in domains}
    with Page(title="medviz", analytics_enabled=False, fill_width=True, delete_cache=(CLEAN_EVERY_S, KEEP_S)) as page:
        gr.Markdown(_TITLE, elem_id="mv-title")
        gr.HTML(NOTICE, elem_id="mv-notice")
        with gr.Tabs():
            with gr.Tab("Generate", id="generate"):
                generate = GenerateTab(studio, examples, domains)
            with gr.Tab("Ground an image", id="ground"):
                GroundTab(studio, domains)
            with gr.Tab("About", id="about"):
                build_about(studio, domains, studio.assets / "reports")
            with gr.Tab("API", id="api"):
                example = DOMAINS[domains[0]].examples[0].prompt
                build_api(studio, domains, example, next(iter(DOMAINS[domains[0]].parse(example).words), ""))
        page.load(generate.open_page, None, generate.outputs_of_open_page(), **LIGHT)
        page.unload(generate.leave_page)
    return page.queue(api_open=False, max_size=MAX_QUEUE, default_concurrency_limit=1)


def _usable_domains(studio: Studio) -> list[str]:
    found = studio.domains()
    if not found:
        raise ModelError(f"there are no models in {studio.root}; it needs a folder {' or '.join(DOMAINS)}")
    usable, errors = [], []
    for name in found:
        try:
            studio.manifest(name)
        except ModelError as error:
            logger.error("the domain %s is left out: %s", name, error)
            errors.append(str(error))
        else:
            usable.append(name)
    if not usable:
        raise ModelError(f"no domain can be used: {' '.join(errors)}")
    return usable


def launch_settings(host: str = "") -> dict[str, Any]:
    """Return what Blocks.launch takes: looks, limits, and nothing that calls another server or keeps what was typed.

    host: a name that the server answers to, besides those of `own_names`.
    """
    return {
        "app_kwargs": {"lifespan": guarded(own_names(host), in_space="SPACE_ID" in os.environ)},
        "theme": theme(),
        "css": CSS,
        "max_file_size": MAX_UPLOAD_BYTES,
        "state_session_capacity": MAX_SESSIONS,
        "footer_links": ["api"],
        "run_history": False,
        "enable_monitoring": False,
        "ssr_mode": False,
        "pwa": False,
        "share": False,
    }
