"""The Gradio page: one file a tab, wiring only; what it shows is computed by the studio."""

from typing import Any

import gradio as gr

from medviz.domains import DOMAINS
from medviz.export.archive import NOTICE
from medviz.export.examples import read_examples
from medviz.limits import MAX_QUEUE, MAX_UPLOAD_BYTES
from medviz.studio import Studio
from medviz.ui.about import build_about
from medviz.ui.api import build_api
from medviz.ui.generate import GenerateTab
from medviz.ui.ground import GroundTab
from medviz.ui.result_panel import LIGHT
from medviz.ui.theme import ACCESSIBLE, CSS, theme

__all__ = ["build", "launch_settings"]

# Served files, uploads among them, are looked at every CLEAN_EVERY_S and deleted once older than KEEP_S.
CLEAN_EVERY_S, KEEP_S = 600, 2400
MAX_SESSIONS = 200

_TITLE = "# medviz\nDermoscopy and chest X-ray images from text: a baseline and its aligned model, side by side"


def build(studio: Studio) -> gr.Blocks:
    """Return the page with its queue, ready for launch(**launch_settings())."""
    domains = [name for name in studio.domains() if name in DOMAINS] or list(DOMAINS)
    examples = {name: read_examples(studio.assets / "examples" / name) for name in domains}
    with gr.Blocks(
        title="medviz", analytics_enabled=False, fill_width=True, delete_cache=(CLEAN_EVERY_S, KEEP_S)
    ) as page:
        with gr.Row(elem_id="mv-head"):
            gr.Markdown(_TITLE, elem_id="mv-title")
            gr.HTML(NOTICE, elem_id="mv-notice")
        with gr.Tabs():
            with gr.Tab("Generate", id="generate"):
                generate = GenerateTab(studio, examples, domains)
            with gr.Tab("Locate a finding", id="ground"):
                ground = GroundTab(studio, domains)
            with gr.Tab("About", id="about"):
                build_about(studio, domains, studio.assets / "reports")
            with gr.Tab("API", id="api"):
                example = DOMAINS[domains[0]].examples[0].prompt
                build_api(studio, domains, example, next(iter(DOMAINS[domains[0]].parse(example).words), ""))
        page.load(generate.open_page, None, generate.outputs_of_open_page(), js=ACCESSIBLE, **LIGHT)
        page.unload(generate.leave_page)
        page.unload(ground.leave_page)
    return page.queue(max_size=MAX_QUEUE, default_concurrency_limit=1)


def launch_settings() -> dict[str, Any]:
    """Return what Blocks.launch takes: looks, limits, and nothing that calls another server or keeps what was typed."""
    return {
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
