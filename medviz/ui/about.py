"""The About tab: what this is, the model cards, and the contact sheets and figures that evaluation wrote."""

import json
import logging
from pathlib import Path
from typing import Any

import gradio as gr

from medviz.domains import DOMAINS
from medviz.studio import Studio

logger = logging.getLogger(__name__)

_INTRODUCTION = """
**What this is.** Two text-to-image models draw the same prompt from the same noise: the *baseline*, trained on medical
images, and the *aligned* model, the same network with an adapter that reinforcement learning trained to draw what the
prompt says. The coloured maps show where each word of the prompt entered the image.

**What this is not.** No medical device. The images are synthetic and belong to no patient; they carry the mistakes and
gaps of their training images. Nothing here may inform a decision about a person.

**How to read the scores.** The reward's networks trained the aligned model, so its reward rises by design. The judge is
another architecture, trained on other images, and never took part in alignment: believe the judge. Where a figure could
not be computed the table says so.
"""


def build_about(studio: Studio, domains: list[str], reports: Path) -> None:
    """Build the tab inside an open gr.Tab. reports: the folder of contact sheets (*.png) and figures (*.json)."""
    gr.Markdown(_INTRODUCTION)
    for path in sorted(reports.glob("*.png")):
        gr.Image(
            str(path),
            label=_title(path),
            interactive=False,
            format="png",
            buttons=["fullscreen", "download"],
            elem_classes="mv-well",
        )
        figures = read_figures(path.with_suffix(".json"))
        if figures is not None:
            with gr.Accordion(f"{_title(path)}: figures", open=False):
                gr.JSON(figures, show_label=False)
    for name in domains:
        with gr.Accordion(f"Model card: {DOMAINS[name].label}", open=False):
            gr.Markdown(_card(studio, name), sanitize_html=True)


def read_figures(path: Path) -> Any:
    """Return what a report's JSON holds, None when there is none; a damaged one is logged and left out."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        logger.warning("the report %s cannot be read and is left out", path, exc_info=True)
        return None


def _card(studio: Studio, name: str) -> str:
    path = studio.root / name / "README.md"
    if not path.is_file():
        return "There is no model card for this domain."
    text = path.read_text(encoding="utf-8")
    # The front matter is for the Hub.
    return text.split("\n---\n", 1)[-1] if text.startswith("---\n") else text


def _title(path: Path) -> str:
    return path.stem.replace("_", " ").replace("-", " ").capitalize()
