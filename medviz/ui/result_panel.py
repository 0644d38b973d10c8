"""The right side of the Generate tab: two images, what each word looked at, figures, warnings and downloads."""

from functools import partial
from typing import Any

import gradio as gr

from medviz.export.archive import archive, image_png, report_json
from medviz.results import Pair, Preview
from medviz.ui import views
from medviz.ui.files import served, served_picture
from medviz.ui.guard import message, telling
from medviz.ui.views import Look

STATE_LIFETIME_S = 3600  # a shown pair's attention is kept this long for a page that stays open
Updates = dict[Any, Any]

# Page logic, not computing: never waits behind images, never an endpoint of the API.
LIGHT: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

PLAIN = Look(word=None, outlined=False, opacity=0.0)
UNFINISHED = "Unfinished images of the next pair"
_EXPLANATION = (
    "A *reward* is what the aligned model was trained to raise, so a rise in it proves little. A *judge* is a separate "
    "network that training never saw. *Share* is the part of the word's attention inside a region; *contrast* is the "
    "mean inside less the mean outside, in units of their spread."
)


class ResultPanel:
    """Builds the panel inside an open column; its methods return updates for the components in `outputs`."""

    def __init__(self) -> None:
        self.pair = gr.State(None, time_to_live=STATE_LIFETIME_S)
        self.progress = gr.HTML("", elem_id="mv-progress")
        self._build_pictures()
        self.shown = gr.Textbox(label="Shown", interactive=False, lines=1, max_lines=4, elem_id="mv-shown")
        self._build_words()
        self.region_table = gr.HTML("", elem_id="mv-regions", visible=False)
        self.score_table = gr.HTML("", elem_id="mv-scores", visible=False)
        self.warnings = gr.Textbox(
            label="Warnings", interactive=False, visible=False, elem_id="mv-warnings", elem_classes="mv-warnings"
        )
        gr.Markdown(_EXPLANATION, elem_classes="mv-note")
        with gr.Row():
            self.downloads = [
                gr.DownloadButton(label, interactive=False, size="sm", min_width=110, elem_id=f"mv-save-{index}")
                for index, label in enumerate(("Baseline PNG", "Aligned PNG", "Report JSON", "Everything (ZIP)"))
            ]
        self._wire()

    def _build_pictures(self) -> None:
        image = partial(
            gr.Image, type="filepath", format="png", interactive=False, buttons=["fullscreen"], elem_classes="mv-well"
        )
        with gr.Tabs():
            with gr.Tab("Side by side"), gr.Row(elem_id="mv-pair"):
                self.baseline = image(label="Baseline", elem_id="mv-baseline", min_width=140, alt_text="Baseline image")
                self.aligned = image(label="Aligned", elem_id="mv-aligned", min_width=140, alt_text="Aligned image")
            with gr.Tab("Slider"):
                self.slider = gr.ImageSlider(
                    type="filepath",
                    format="png",
                    interactive=False,
                    label="Baseline left, aligned right",
                    buttons=["fullscreen"],
                    max_height=520,
                    elem_id="mv-slider",
                )
            with gr.Tab("Difference"):
                self.difference = image(
                    label="Difference", elem_id="mv-difference", height=500, alt_text="Where the images differ"
                )
                self.difference_note = gr.HTML("", elem_classes="mv-note")

    def _build_words(self) -> None:
        with gr.Group():
            self.words = gr.Radio(
                [views.NO_WORD],
                value=views.NO_WORD,
                label="Where did each word look?",
                elem_id="mv-words",
                elem_classes="mv-chips",
            )
            self.legend = gr.HTML("", elem_id="mv-legend", padding=True, visible=False)
            with gr.Row():
                self.outlined = gr.Checkbox(False, label="Outline regions", elem_id="mv-outlines", min_width=140)
                self.opacity = gr.Slider(0.1, 1.0, 0.6, step=0.1, label="Overlay opacity", min_width=180)

    def _wire(self) -> None:
        chosen = [self.pair, self.words, self.outlined, self.opacity]
        changed = [self.baseline, self.aligned, self.slider, self.legend, self.region_table]
        for component in (self.words, self.outlined):
            component.input(self.look, chosen, changed, trigger_mode="always_last", **LIGHT)
        self.opacity.release(self.look, chosen, changed, **LIGHT)

    @property
    def outputs(self) -> list[Any]:
        """Every component that the updates may hold."""
        return [self.pair, self.progress, *self.filled]

    @property
    def streamed(self) -> list[Any]:
        """The components that a run updates at every step. Few: Gradio makes each one anew at each step, in time that
        drawing would have had."""
        return [self.pair, self.progress, self.baseline, self.aligned, self.shown]

    @property
    def filled(self) -> list[Any]:
        """The components that `fill` updates when a run has ended."""
        return [
            self.baseline,
            self.aligned,
            self.slider,
            self.difference,
            self.difference_note,
            self.shown,
            self.words,
            self.outlined,
            self.legend,
            self.region_table,
            self.score_table,
            self.warnings,
            *self.downloads,
        ]

    def show(self, pair: Pair | None, text: str) -> Updates:
        """Show a pair without overlays, or an empty panel, and a line of text where the progress bar stands."""
        return {self.pair: pair, self.progress: views.status(text), **self._filled(pair)}

    def finish(self, pair: Pair | None, text: str) -> Updates:
        """Show a run's images, or once more those before it, and a line of text; `fill` shows the rest."""
        pictures = (None, None) if pair is None else self._shown_pair(pair, PLAIN)
        updates = {self.pair: pair, self.progress: views.status(text), self.shown: UNFINISHED}
        return updates | dict(zip((self.baseline, self.aligned), pictures, strict=True))

    def fill(self, pair: Pair | None, shown: str) -> Updates:
        """Show all of a pair whose run has ended; where that was not its end, and it stands there already, nothing."""
        return gr.skip() if shown == _title(pair) else self._filled(pair)

    def _filled(self, pair: Pair | None) -> Updates:
        if pair is None:
            updates: Updates = dict.fromkeys(self.filled, None)
            updates |= {component: gr.update(value=None, interactive=False) for component in self.downloads}
            updates |= {self.difference_note: "", self.shown: _title(None)}
            updates |= {part: _markup("") for part in (self.legend, self.region_table, self.score_table)}
            updates[self.words] = gr.update(choices=[views.NO_WORD], value=views.NO_WORD)
            updates[self.outlined] = False
            updates[self.warnings] = gr.update(value="", visible=False)
            return updates
        difference, note = views.shown_difference(pair)
        return {
            **self._pictures(pair, PLAIN),
            self.outlined: False,
            self.difference: served_picture(difference, "difference"),
            self.difference_note: note,
            self.shown: _title(pair),
            self.words: gr.update(choices=[views.NO_WORD, *pair.words], value=views.NO_WORD),
            self.score_table: _markup(views.score_table(pair)),
            self.warnings: gr.update(
                value="\n".join(pair.warnings), lines=max(1, len(pair.warnings)), visible=bool(pair.warnings)
            ),
            **self._files(pair),
        }

    def preview(self, step: Preview) -> Updates:
        """Show how far a run is, and the unfinished images where the step brings them."""
        said = f"Both images, step {step.step} of {step.steps}"
        updates: Updates = {self.progress: views.progress_bar(step.step, step.steps, said)}
        if step.images is not None:
            updates[self.shown] = UNFINISHED
            for side, image in zip((self.baseline, self.aligned), step.images, strict=True):
                updates[side] = served_picture(views.preview(image), "unfinished")
        return updates

    def look(self, pair: Pair | None, word: str | None, outlined: bool, opacity: float) -> Updates:
        """Show the chosen word's attention over both images."""
        if pair is None:
            raise message("These images are no longer kept on the server; press Generate again.", title="Expired")
        with telling():
            return self._pictures(pair, Look(None if word in (None, views.NO_WORD) else word, outlined, opacity))

    def _pictures(self, pair: Pair, look: Look) -> Updates:
        baseline, aligned = self._shown_pair(pair, look)
        regions = views.region_table(pair.attention(look.word), pair.domain) if look.word else ""
        return {
            self.baseline: baseline,
            self.aligned: aligned,
            self.slider: (baseline, aligned),
            self.legend: _markup(views.legend(pair.baseline.outlines, look, pair.domain)),
            self.region_table: _markup(regions),
        }

    def _shown_pair(self, pair: Pair, look: Look) -> tuple[str, str]:
        baseline, aligned = (served_picture(picture, "shown") for picture in views.shown_pair(pair, look))
        return baseline, aligned

    def _files(self, pair: Pair) -> Updates:
        stem = f"{pair.domain}_{pair.seed}"
        files = (
            (image_png(pair, "baseline"), f"{stem}_baseline.png"),
            (image_png(pair, "aligned"), f"{stem}_aligned.png"),
            (report_json(pair), f"{stem}_report.json"),
            (archive(pair), f"{stem}.zip"),
        )
        return {
            button: gr.update(value=served(content, name), interactive=True)
            for button, (content, name) in zip(self.downloads, files, strict=True)
        }


def _title(pair: Pair | None) -> str:
    """What is shown, in a line."""
    if pair is None:
        return ""
    return (
        f"{pair.prompt} | seed {pair.seed} | {pair.steps} steps | guidance {pair.guidance_scale:g} | "
        f"adapter {pair.adapter or 'none'}"
    )


def _markup(markup: str) -> dict[str, Any]:
    """Update of a markup component that takes no room while it is empty."""
    return gr.update(value=markup, visible=bool(markup))
