"""The About tab: what this is, the contact sheets and tables that evaluation wrote, and the model cards."""

from pathlib import Path

import gradio as gr

from medviz.domains import DOMAINS
from medviz.results import TABLES_NAME
from medviz.studio import Studio

_INTRODUCTION = """
**What this is.** Two text-to-image models draw the same prompt from the same noise: the *baseline*, trained on medical
images, and the *aligned* model, the same network with an adapter that reinforcement learning trained to draw what the
prompt says. The coloured maps show the cross-attention of each term: where it influenced the image.

**What this is not.** This is not a medical device. The images are synthetic and show no patient; they reproduce errors
and gaps of the training images. They must not inform any decision about a person.

**How to read the scores.** The aligned model was trained to raise the reward, so a higher reward is expected. The judge
has another architecture, was trained on other images and gave the training no gradient, but it helped to select the
adapter. Give the judge more weight than the reward, and do not take either as proof. A figure that could not be
computed reads "not computed".
"""

SHEET = "contact-sheet-"


def build_about(studio: Studio, domains: list[str], reports: Path) -> None:
    """Build the tab inside an open gr.Tab. reports: the folder of pictures (*.png) and of the tables."""
    gr.Markdown(_INTRODUCTION)
    pictures = sorted(reports.glob("*.png"), key=lambda path: path.stem)  # a domain's default sheet before its others
    sheets = [path for path in pictures if path.stem.startswith(SHEET)]
    main = [path for path in sheets if path.stem.removeprefix(SHEET) in domains] or sheets
    for path in main:
        _picture(path)
    for path in sheets:
        if path not in main:
            with gr.Accordion(_title(path), open=False):
                _picture(path)
    with gr.Column(elem_id="mv-tables"):
        for title, text in _tables(reports / TABLES_NAME):
            with gr.Accordion(title, open=False):
                gr.Markdown(text, sanitize_html=True)
    for path in pictures:
        if path not in sheets:
            _picture(path)
    for name in domains:
        with gr.Accordion(f"Model card: {DOMAINS[name].label}", open=False):
            gr.Markdown(_card(studio, name), sanitize_html=True)


def _title(path: Path) -> str:
    return path.stem.replace("-", " ").replace("_", " ").capitalize()


def _picture(path: Path) -> None:
    title = _title(path)
    gr.Markdown(f"**{title}**")
    gr.Image(
        str(path),
        show_label=False,
        alt_text=title,
        interactive=False,
        format="png",
        buttons=["fullscreen", "download"],
        elem_classes="mv-well",
    )


def _tables(path: Path) -> list[tuple[str, str]]:
    """(heading, what stands beneath it) of each section of the tables."""
    if not path.is_file():
        return [("No evaluation has been run yet", "Every figure is not computed.")]
    before, *sections = ("\n" + path.read_text(encoding="utf-8")).split("\n### ")
    parted = [section.partition("\n") for section in sections] or [("Results", "", before)]
    return [(title.strip(), text.strip()) for title, _, text in parted]


def _card(studio: Studio, name: str) -> str:
    path = studio.root / name / "README.md"
    if not path.is_file():
        return "There is no model card for this domain."
    text = path.read_text(encoding="utf-8")
    # The front matter is for the Hub.
    return text.split("\n---\n", 1)[-1] if text.startswith("---\n") else text
