"""The Ground tab: where a phrase looks in an image that a person brings."""

from pathlib import Path

import gradio as gr

from medviz.domains import DOMAINS
from medviz.errors import InputError
from medviz.images import decode_image
from medviz.limits import MAX_IMAGE_PIXELS, MAX_PROMPT_CHARS, MAX_UPLOAD_BYTES
from medviz.results import Grounding
from medviz.studio import Studio
from medviz.ui import views
from medviz.ui.files import served_picture
from medviz.ui.generate import adapter_choices
from medviz.ui.guard import telling
from medviz.ui.page import caller_has_left
from medviz.ui.result_panel import LIGHT, STATE_LIFETIME_S, Updates
from medviz.ui.views import Look

_FORMATS = "PNG, JPEG, WebP, BMP, TIFF or DICOM"
_LIMITS = f"at most {MAX_UPLOAD_BYTES // 2**20} MiB and {MAX_IMAGE_PIXELS // 10**6} megapixels"
_DICOM = (
    "A DICOM radiograph or photograph is shown through its own window and, where its header says how it lies, turned "
    "so that the patient's right is on the image's left; what the header says of the patient is not read."
)
_CAVEAT = (
    "The map shows where the *generator* reads the phrase in this image. It is no detector: it also lights up for "
    "findings that are not there, and must not be used for any decision about a patient. *No image* is the same phrase "
    "read on plain grey: only what exceeds it comes from your image. Upload only images that you may share; the server "
    "deletes them within the hour."
)


class GroundTab:
    """Builds the tab inside an open gr.Tab and wires it."""

    def __init__(self, studio: Studio, domains: list[str]) -> None:
        self.studio = studio
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320):
                self._build_request(domains)
            with gr.Column(scale=7, min_width=320):
                self._build_result()
        self._wire()

    def _build_request(self, domains: list[str]) -> None:
        choices = [(DOMAINS[name].label, name) for name in domains]
        self.domain = gr.Radio(choices, value=domains[0], label="Domain", elem_id="mv-ground-domain")
        # A file, not an image component: what comes in is judged by the program's own limits, with its own messages.
        self.image = gr.File(
            label="Image",
            type="filepath",
            height=150,
            elem_id="mv-ground-image",
        )
        self.phrase = gr.Textbox(
            example_phrase(domains[0]),
            label="Phrase to look for",
            max_length=MAX_PROMPT_CHARS,
            elem_id="mv-ground-phrase",
        )
        self.adapter = gr.Dropdown(adapter_choices(self.studio, domains[0], grounding=True), value="", label="Adapter")
        self.find = gr.Button("Find the phrase", variant="primary", elem_id="mv-ground-find")
        gr.Markdown(f"{_FORMATS}, {_LIMITS}. {_DICOM} {_CAVEAT}", elem_classes="mv-note")

    def _build_result(self) -> None:
        self.grounding = gr.State(None, time_to_live=STATE_LIFETIME_S)
        self.picture = gr.Image(
            label="Where the phrase looks",
            alt_text="The uploaded image with the phrase's heat map",
            type="filepath",
            format="png",
            interactive=False,
            buttons=["fullscreen", "download"],
            elem_classes="mv-well",
            elem_id="mv-ground-picture",
        )
        self.legend = gr.HTML("", padding=True)
        with gr.Row():
            self.outlined = gr.Checkbox(False, label="Outline regions", min_width=140)
            self.opacity = gr.Slider(
                0.1, 1.0, 0.6, step=0.1, label="Overlay opacity", min_width=180, elem_id="mv-ground-opacity"
            )
        self.table = gr.HTML("", elem_id="mv-ground-table")
        self.box = gr.Textbox(label="Box around the brightest part, in pixels of the upright image", interactive=False)
        self.warnings = gr.Textbox(label="Warnings", interactive=False, visible=False, elem_classes="mv-warnings")

    def _wire(self) -> None:
        results = [self.grounding, self.picture, self.legend, self.table, self.box, self.warnings]
        self.domain.input(self._switch_domain, self.domain, [self.phrase, self.adapter, *results], **LIGHT)
        self.image.upload(self._preview, self.image, results, **LIGHT)
        self.find.click(
            self._ground,
            [self.domain, self.image, self.phrase, self.adapter, self.outlined, self.opacity],
            results,
            concurrency_id="model",
            concurrency_limit=1,
            show_progress="minimal",
            show_progress_on=self.picture,
            api_visibility="private",
        )
        look = [self.grounding, self.outlined, self.opacity]
        self.outlined.input(self._look, look, [self.picture, self.legend], trigger_mode="always_last", **LIGHT)
        self.opacity.release(self._look, look, [self.picture, self.legend], **LIGHT)

    def _switch_domain(self, name: str) -> Updates:
        return self._empty() | {
            self.phrase: example_phrase(name),
            self.adapter: gr.update(choices=adapter_choices(self.studio, name, grounding=True), value=""),
        }

    def _empty(self) -> Updates:
        return {
            self.grounding: None,
            self.picture: None,
            self.legend: "",
            self.table: "",
            self.box: "",
            self.warnings: gr.update(value="", visible=False),
        }

    def _preview(self, path: str) -> Updates:
        with telling():
            image = decode_image(Path(path))
        return self._empty() | {self.picture: served_picture(views.upload(image), "upload", synthetic=False)}

    def _ground(
        self, domain: str, path: str | None, phrase: str, adapter: str, outlined: bool, opacity: float
    ) -> Updates:
        with telling():
            if not path:
                raise InputError("there is no image yet; upload one")
            found = self.studio.ground(domain, Path(path), phrase, adapter, cancelled=caller_has_left())
        kept = views.shrunk(found)
        return {
            self.grounding: kept,
            **self._pictures(kept, outlined, opacity),
            self.table: views.grounding_table(found.regions, domain),
            self.box: _box_text(found.box),
            self.warnings: gr.update(value="\n".join(found.warnings), visible=bool(found.warnings)),
        }

    def _look(self, kept: Grounding | None, outlined: bool, opacity: float) -> Updates:
        return {self.legend: ""} if kept is None else self._pictures(kept, outlined, opacity)

    def _pictures(self, kept: Grounding, outlined: bool, opacity: float) -> Updates:
        look = Look(kept.phrase, outlined, opacity)
        return {
            self.picture: served_picture(views.shown_grounding(kept, look), "grounding", synthetic=False),
            self.legend: views.legend(kept.outlines, look, kept.domain, of="on this image"),
        }


def _box_text(box: tuple[int, int, int, int] | None) -> str:
    return "none: the map is flat" if box is None else f"x {box[0]} to {box[2]}, y {box[1]} to {box[3]}"


def example_phrase(domain: str) -> str:
    """Return the longest phrase worth looking for in the domain's example prompts."""
    words = [word for example in DOMAINS[domain].examples for word in DOMAINS[domain].parse(example.prompt).words]
    return max(words, key=len, default="")
