"""The right side of the Generate tab: two images, the map of each term, figures, warnings and downloads."""

from functools import partial
from typing import Any

import gradio as gr

from medviz.export.archive import archive, image_png, report_json
from medviz.results import Pair, Preview
from medviz.ui import views
from medviz.ui.files import served, served_picture
from medviz.ui.guard import telling
from medviz.ui.running import Screens
from medviz.ui.views import Look

STATE_LIFETIME_S = 3600  # a shown pair's attention is kept this long for a page that stays open
Updates = dict[Any, Any]

# Page logic, not computing: never waits behind images, never an endpoint of the API.
LIGHT: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

PLAIN = Look(word=None, outlined=False, opacity=0.0)
EXPIRED = "These images are no longer kept on the server. Press Generate to draw them again."
UNFINISHED = "Generating: intermediate images"
_EXPLANATION = (
    "The *training reward* is what the aligned model was trained to raise, so a rise in it proves little. The *judge* "
    "is a separate network that training never saw. *Share* is the part of a term's attention inside a region; "
    "*contrast* is the mean inside minus the mean outside, in units of their spread."
)


class ResultPanel:
    """Builds the panel inside an open column; its methods return updates for the components in `outputs`."""

    def __init__(self) -> None:
        self.screens = Screens()
        self.pair = gr.State(None, time_to_live=STATE_LIFETIME_S)
        # The number of what is shown; its change has the files made (that of a gr.State goes unnoticed unqueued).
        self.screen = gr.Number(0, visible="hidden", label="Screen", precision=0)
        self.progress = gr.HTML("", elem_id="mv-progress")
        with gr.Row(elem_id="mv-result-row"):
            with gr.Column(elem_id="mv-pictures", min_width=280):
                self._build_pictures()
                self.shown = gr.Textbox(
                    label="Prompt and settings of this pair",
                    interactive=False,
                    lines=1,
                    max_lines=4,
                    elem_id="mv-shown",
                )
                self._build_words()
                self.region_table = gr.HTML("", elem_id="mv-regions", visible=False)
            with gr.Column(elem_id="mv-figures", min_width=280):
                self.warnings = gr.Textbox(
                    label="Warnings",
                    interactive=False,
                    visible=False,
                    elem_id="mv-warnings",
                    elem_classes="mv-warnings",
                )
                self.score_table = gr.HTML("", elem_id="mv-scores", visible=False)
                gr.Markdown(_EXPLANATION, elem_classes="mv-note")
                with gr.Row():
                    self.downloads = [
                        gr.DownloadButton(
                            label, interactive=False, size="sm", min_width=110, elem_id=f"mv-save-{index}"
                        )
                        for index, label in enumerate(
                            ("Baseline PNG", "Aligned PNG", "Report JSON", "Everything (ZIP)")
                        )
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
                label="Cross-attention map for each term",
                elem_id="mv-words",
                elem_classes="mv-chips",
            )
            self.legend = gr.HTML("", elem_id="mv-legend", padding=True, visible=False)
            with gr.Row():
                self.outlined = gr.Checkbox(False, label="Outline regions", elem_id="mv-outlines", min_width=140)
                self.opacity = gr.Slider(0.1, 1.0, 0.6, step=0.1, label="Overlay opacity", min_width=180)

    def _wire(self) -> None:
        shown = [self.pair, self.screen]
        chosen = [*shown, self.words, self.outlined, self.opacity]
        changed = [self.progress, self.baseline, self.aligned, self.slider, self.legend, self.region_table]
        triggers = [self.words.input, self.outlined.input, self.opacity.release]
        gr.on(triggers, self.look, chosen, changed, trigger_mode="always_last", **LIGHT)
        # The archive takes a second to pack: the pair is on the screen before.
        self.screen.change(self.pack, shown, self.downloads, trigger_mode="multiple", **LIGHT)

    @property
    def outputs(self) -> list[Any]:
        """Every component that the updates may hold."""
        return [
            self.pair,
            self.screen,
            self.progress,
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

    @property
    def streamed(self) -> list[Any]:
        """The components that a run updates at every step. Few: Gradio processes each of them at each step, in time
        that drawing would have had."""
        return [self.progress, self.baseline, self.aligned, self.shown]

    def show(self, session: str, pair: Pair | None, text: str, *, draft: bool = False) -> Updates:
        """Show a pair without overlays, or an empty panel, and a status line. Its files follow, see `pack`."""
        updates = {
            **self._cleared(),
            self.pair: pair,
            self.screen: self.screens.change(session),
            self.progress: views.status(text),
        }
        if pair is None:
            return updates
        difference, note = views.shown_difference(pair)
        return {
            **updates,
            **self._pictures(pair, PLAIN),
            self.difference: served_picture(difference, "difference"),
            self.difference_note: note,
            self.shown: _title(pair, draft),
            self.words: gr.update(choices=[views.NO_WORD, *pair.words], value=views.NO_WORD, interactive=True),
            self.outlined: gr.update(value=False, interactive=True),
            self.score_table: _markup(views.score_tables(pair)),
            self.warnings: gr.update(
                value="\n".join(pair.warnings), lines=max(1, len(pair.warnings)), visible=bool(pair.warnings)
            ),
        }

    def begin(self, session: str, text: str) -> Updates:
        """Clear everything that belongs to the pair before; that pair itself is kept, should the run fail."""
        self.screens.change(session)
        return {**self._cleared(), self.progress: views.progress_bar(0, 1, text), self.shown: UNFINISHED}

    def _cleared(self) -> Updates:
        updates: Updates = dict.fromkeys(self.outputs, None)
        del updates[self.pair], updates[self.screen]
        updates |= {component: gr.update(value=None, interactive=False) for component in self.downloads}
        updates |= {self.progress: "", self.difference_note: "", self.shown: ""}
        updates |= {part: _markup("") for part in (self.legend, self.region_table, self.score_table)}
        updates[self.words] = gr.update(choices=[views.NO_WORD], value=views.NO_WORD, interactive=False)
        updates[self.outlined] = gr.update(value=False, interactive=False)
        updates[self.warnings] = gr.update(value="", visible=False)
        return updates

    def preview(self, step: Preview) -> Updates:
        """Show how far a run is, and its intermediate images where the step brings them."""
        # A share, not a count: the solver may take fewer steps than were asked for, the last ones being larger.
        said = f"Generating both images: {100 * step.step / step.steps:.0f} %"
        updates: Updates = {self.progress: views.progress_bar(step.step, step.steps, said)}
        if step.images is not None:
            for side, image in zip((self.baseline, self.aligned), step.images, strict=True):
                updates[side] = served_picture(views.preview(image), "unfinished")
        return updates

    def finish(self, pair: Pair, text: str, *, draft: bool = False) -> Updates:
        """Replace the intermediate images by a run's result; `show` adds the rest."""
        baseline, aligned = self._shown_pair(pair, PLAIN)
        return {
            self.progress: views.status(text),
            self.baseline: baseline,
            self.aligned: aligned,
            self.shown: _title(pair, draft),
        }

    def pack(self, pair: Pair | None, screen: int, request: gr.Request) -> Updates:
        """Offer the files of the pair that is shown; nothing if another one is shown by the time they are made."""
        if pair is None:
            return gr.skip()
        stem = f"{pair.domain}_{pair.seed}"
        files = (
            (image_png(pair, "baseline"), f"{stem}_baseline.png"),
            (image_png(pair, "aligned"), f"{stem}_aligned.png"),
            (report_json(pair), f"{stem}_report.json"),
            (archive(pair), f"{stem}.zip"),
        )
        updates = {
            button: gr.update(value=served(content, name), interactive=True)
            for button, (content, name) in zip(self.downloads, files, strict=True)
        }
        return updates if self.screens.shows(str(request.session_hash), screen) else gr.skip()

    def look(
        self, pair: Pair | None, screen: int, word: str | None, outlined: bool, opacity: float, request: gr.Request
    ) -> Updates:
        """Show the chosen term's attention over both images; nothing if another pair is shown by then."""
        if pair is None:
            return {self.progress: views.alert(EXPIRED)}
        try:
            with telling():
                updates = self._pictures(pair, Look(None if word in (None, views.NO_WORD) else word, outlined, opacity))
        except gr.Error as error:
            return {self.progress: views.alert(error.message)}
        return updates if self.screens.shows(str(request.session_hash), screen) else gr.skip()

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


def _title(pair: Pair, draft: bool) -> str:
    """What is shown, in a line."""
    return (
        f"{'Draft: ' if draft else ''}{pair.prompt} | seed {pair.seed} | {pair.steps} steps | "
        f"guidance {pair.guidance_scale:g} | adapter {pair.adapter or 'none'}"
    )


def _markup(markup: str) -> dict[str, Any]:
    """Update of a markup component that takes no room while it is empty."""
    return gr.update(value=markup, visible=bool(markup))
