"""The named endpoints: /compare, /attention, /ground and /score, with the limits and messages of the page."""

from pathlib import Path
from typing import Any

import gradio as gr

from medviz.errors import InputError
from medviz.export.archive import image_png, overlay_png
from medviz.limits import DEFAULT_GUIDANCE_SCALE, DEFAULT_STEPS
from medviz.rendering import draw_box, overlay
from medviz.studio import Studio
from medviz.ui import views
from medviz.ui.files import served, served_picture
from medviz.ui.guard import telling
from medviz.ui.running import computed

_GUIDE = """
Every endpoint takes the same limits as this page and answers errors in words. `domain` is {domains}; `adapter` is a
name, empty for the domain's default, or `none` for the baseline. The same request gives the same pixels. PNGs carry the
label SYNTHETIC and, as PNG text, how they were made. An image that is sent along is a PNG, JPEG, WebP, BMP, TIFF or
DICOM file.

| endpoint | takes | gives |
|---|---|---|
| `/compare` | domain, prompt, seed, steps, guidance_scale, adapter | baseline PNG, aligned PNG, report JSON |
| `/attention` | as `/compare`, and word | baseline overlay PNG, aligned overlay PNG, JSON |
| `/ground` | domain, image, phrase, adapter | overlay PNG, JSON |
| `/score` | domain, image, prompt | JSON |
"""

_CODE = """from gradio_client import Client, handle_file

client = Client("http://127.0.0.1:7860")  # or the name of the Space
baseline, aligned, report = client.predict(
    "{domain}", "{prompt}", seed=1, steps=20, guidance_scale=3.0, adapter="", api_name="/compare"
)
left, right, figures = client.predict(
    "{domain}", "{prompt}", seed=1, steps=20, guidance_scale=3.0, adapter="",
    word="{word}", api_name="/attention",
)
overlay, found = client.predict("{domain}", handle_file("image.png"), "{word}", adapter="", api_name="/ground")
scores = client.predict("{domain}", handle_file("image.png"), "{prompt}", api_name="/score")
"""


class Endpoints:
    """The four endpoints as functions of plain values; paths of PNGs come back beside JSON.

    Each holds its place in the queue until its computation has ended, and ends it when the client leaves or cancels.
    """

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    async def compare(
        self, domain: str, prompt: str, seed: int, steps: int, guidance_scale: float, adapter: str
    ) -> tuple[str, str, dict[str, Any]]:
        """Draw a prompt with the baseline and with the aligned model from the same noise."""
        with telling():
            settings: dict[str, Any] = {
                "steps": steps,
                "guidance_scale": guidance_scale,
                "adapter": "" if adapter is None else adapter,
            }
            pair = await computed(
                lambda cancelled: self.studio.compare(domain, prompt, seed, **settings, cancelled=cancelled)
            )
            return (
                served(image_png(pair, "baseline"), "baseline.png"),
                served(image_png(pair, "aligned"), "aligned.png"),
                pair.report(),
            )

    async def attention(
        self, domain: str, prompt: str, seed: int, steps: int, guidance_scale: float, adapter: str, word: str
    ) -> tuple[str, str, dict[str, Any]]:
        """Show where a word of the prompt looked on both images; at once after /compare of the same request."""
        with telling():
            settings: dict[str, Any] = {
                "steps": steps,
                "guidance_scale": guidance_scale,
                "adapter": "" if adapter is None else adapter,
            }
            pair, look = await computed(
                lambda cancelled: self.studio.attention(domain, prompt, seed, word, **settings, cancelled=cancelled)
            )
            return (
                served(overlay_png(pair, "baseline", word), "baseline_overlay.png"),
                served(overlay_png(pair, "aligned", word), "aligned_overlay.png"),
                look.report(),
            )

    async def ground(self, domain: str, image: str | None, phrase: str, adapter: str) -> tuple[str, dict[str, Any]]:
        """Show where a phrase looks in an image that is sent along."""
        with telling():
            path = _path(image)
            found = await computed(
                lambda cancelled: self.studio.ground(
                    domain, path, phrase, "" if adapter is None else adapter, cancelled=cancelled
                )
            )
        kept = views.shrunk(found)
        picture = overlay(kept.image, kept.heat_map, side_px=max(kept.image.size))
        if kept.box is not None:
            picture = draw_box(picture, kept.box, kept.heat_map.shape)
        return served_picture(picture, "overlay", synthetic=False), found.report()

    async def score(self, domain: str, image: str | None, prompt: str) -> dict[str, Any]:
        """Score how well an image that is sent along shows a prompt, by the reward and by the judge."""
        with telling():
            path = _path(image)
            scores = await computed(lambda cancelled: self.studio.score(domain, path, prompt, cancelled=cancelled))
        rows = [
            {"name": row.name, "role": row.role, "value": row.baseline, "higher_is_better": row.higher_is_better}
            for row in scores
        ]
        return {"scores": rows}


def _as_sent(component: gr.components.Component) -> gr.components.Component:
    """Let a component hand on what was sent: gr.Textbox makes text of anything, and the limits could not refuse it."""
    component.preprocess = lambda payload: payload
    return component


def build_api(studio: Studio, domains: list[str], prompt: str, word: str) -> None:
    """Build the API tab inside an open gr.Tab and register the endpoints."""
    gr.Markdown(_GUIDE.format(domains=" or ".join(f"`{name}`" for name in domains)))
    gr.Code(
        _CODE.format(domain=domains[0], prompt=prompt, word=word), language="python", label="Python", interactive=False
    )
    endpoints = Endpoints(studio)
    with gr.Group(visible=False):
        request = [
            _as_sent(gr.Textbox(label="domain")),
            _as_sent(gr.Textbox(label="prompt")),
            _as_sent(gr.Number(1, label="seed")),
            _as_sent(gr.Number(DEFAULT_STEPS, label="steps")),
            _as_sent(gr.Number(DEFAULT_GUIDANCE_SCALE, label="guidance_scale")),
            _as_sent(gr.Textbox("", label="adapter")),
        ]
        domain, text, adapter = request[0], request[1], request[5]
        word_box, phrase = _as_sent(gr.Textbox(label="word")), _as_sent(gr.Textbox(label="phrase"))
        image = gr.File(label="image", type="filepath")
        pngs = [gr.Image(label=label, type="filepath", format="png") for label in ("baseline", "aligned", "overlay")]
        report = gr.JSON(label="report")
        for name, function, inputs, outputs in (
            ("compare", endpoints.compare, request, [*pngs[:2], report]),
            ("attention", endpoints.attention, [*request, word_box], [*pngs[:2], report]),
            ("ground", endpoints.ground, [domain, image, phrase, adapter], [pngs[2], report]),
            ("score", endpoints.score, [domain, image, text], [report]),
        ):
            gr.Button(name).click(function, inputs, outputs, api_name=name, concurrency_id="model", concurrency_limit=1)


def _path(image: str | None) -> Path:
    if not image:
        raise InputError("an image file is needed; send one along")
    return Path(image)
