"""The Generate tab: a prompt from menus or by hand, settings, examples, and the run that fills the result panel."""

import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import gradio as gr

from medviz.domains import DOMAINS
from medviz.domains.base import Example
from medviz.errors import InputError
from medviz.limits import (
    DEFAULT_GUIDANCE_SCALE,
    DEFAULT_STEPS,
    MAX_GUIDANCE_SCALE,
    MAX_PROMPT_CHARS,
    MAX_SEED,
    MAX_STEPS,
    MIN_GUIDANCE_SCALE,
    MIN_SEED,
    MIN_STEPS,
    check_guidance_scale,
    check_prompt,
    check_seed,
    check_steps,
)
from medviz.results import Pair, Preview
from medviz.studio import Studio
from medviz.ui import views
from medviz.ui.files import served_picture
from medviz.ui.guard import telling
from medviz.ui.page import caller_has_left
from medviz.ui.prompt_builder import PromptBuilder
from medviz.ui.result_panel import LIGHT, ResultPanel, Updates
from medviz.ui.running import Run, Runs, stream
from medviz.ui.theme import scroll_to

WAITING = "Waiting for the models"
EMPTY = "Enter a prompt and press Generate."
STORED = "Precomputed example"
REFUSED = "The server did not take the request: it is busy or out of reach. Wait a minute, then press Generate again."
UNREAD = (
    f"The settings are out of range. Choose {MIN_STEPS} to {MAX_STEPS} steps and a guidance scale of "
    f"{MIN_GUIDANCE_SCALE:g} to {MAX_GUIDANCE_SCALE:g}, then press Generate again."
)
DRAFT_BUTTON = "mv-draft-now"
DRAFT_AFTER_MS = 700  # without a further change of the prompt

DRAFT_LATER = f"""() => {{
    clearTimeout(window.mvDraft);
    window.mvDraft = setTimeout(() => document.getElementById("{DRAFT_BUTTON}")?.click(), {DRAFT_AFTER_MS});
}}"""

NO_DRAFT = "() => clearTimeout(window.mvDraft)"

SHOW_RESULT = scroll_to("#mv-result", "!document.querySelector('#mv-alert [role=alert]')")


class GenerateTab:
    """Builds the tab inside an open gr.Tab and wires it. examples: domain -> stored pairs."""

    def __init__(self, studio: Studio, examples: dict[str, list[Pair]], domains: Sequence[str]) -> None:
        self.studio, self.examples, self.domains = studio, examples, domains
        self.runs = Runs()
        # Names the run that was asked for last; its change starts the run (that of a gr.State goes unnoticed unqueued).
        self.ticket = gr.Textbox(visible="hidden", label="Ticket")
        with gr.Row(equal_height=False, elem_classes="mv-work"):
            with gr.Column(scale=4, min_width=300, elem_classes="mv-request"):
                self._build_request()
            with gr.Column(scale=11, min_width=300, elem_id="mv-result"):
                self.panel = ResultPanel()
        self._wire()

    def _build_request(self) -> None:
        first = DOMAINS[self.domains[0]]
        choices = [(DOMAINS[name].label, name) for name in self.domains]
        source = self._source(first.name)
        # What leads away from the first screen waits until `open_page` has filled it, which would undo it.
        self.domain = gr.Radio(choices, value=first.name, label="Domain", interactive=False, elem_id="mv-domain")
        self.prompt = gr.Textbox(
            source.prompt,
            label="Prompt",
            info="Type it, or choose from the menus below. Enter generates; Shift+Enter breaks the line.",
            lines=1,
            max_lines=5,
            max_length=MAX_PROMPT_CHARS,
            elem_id="mv-prompt",
        )
        self.unknown = gr.Textbox(
            label="Words outside the vocabulary (the models may ignore them)",
            visible=False,
            interactive=False,
            elem_id="mv-unknown",
        )
        with gr.Row():
            # No limits here: a seed out of range is refused in words, see `_begin`.
            self.seed = gr.Number(
                source.seed,
                label="Seed",
                info="The same seed gives the same noise.",
                precision=0,
                min_width=150,
                elem_id="mv-seed",
            )
            with gr.Column(min_width=120):
                self.keep_seed = gr.Checkbox(True, label="Keep this seed", container=False)
                self.dice = gr.Button("New seed", size="sm", elem_id="mv-dice")
        with gr.Row():
            self.generate = gr.Button(
                "Generate", variant="primary", interactive=False, elem_id="mv-generate", scale=3, min_width=120
            )
            self.cancel = gr.Button("Cancel", variant="stop", interactive=False, elem_id="mv-cancel", min_width=80)
        self.alert = gr.HTML("", elem_id="mv-alert")
        with gr.Accordion("Prompt menus", open=True):
            self.builders = {
                name: PromptBuilder(
                    DOMAINS[name],
                    self.prompt,
                    self.unknown,
                    start=self._source(name).prompt,
                    visible=name == first.name,
                )
                for name in self.domains
            }
        with gr.Accordion("Settings", open=False, elem_id="mv-settings"):
            self._build_settings(first.name)
        self.thumbs: dict[str, list[gr.Button]] = {}
        self.galleries = {name: self._build_examples(name) for name in self.domains}
        self.draft_now = gr.Button("Draft", elem_id=DRAFT_BUTTON, visible="hidden")

    def _build_settings(self, domain: str) -> None:
        self.live = gr.Checkbox(
            False,
            label="Draft while typing",
            info="In few steps, when you pause: close to the full images from the same noise.",
            visible=few_steps(self.studio, domain) is not None,
            elem_id="mv-live",
        )
        self.steps = gr.Slider(
            MIN_STEPS,
            MAX_STEPS,
            DEFAULT_STEPS,
            step=1,
            label="Denoising steps",
            info=steps_info(self.studio, domain),
            elem_id="mv-steps",
        )
        self.guidance = gr.Slider(
            MIN_GUIDANCE_SCALE,
            MAX_GUIDANCE_SCALE,
            default_guidance_scale(self.studio, domain),
            step=0.5,
            label="Guidance scale",
            info="How strongly the prompt steers both images; 1 is no guidance.",
        )
        self.adapter = gr.Dropdown(adapter_choices(self.studio, domain), value="", label="Adapter of the aligned model")

    def _build_examples(self, name: str) -> gr.Column:
        pairs = self.examples.get(name, [])
        with gr.Column(visible=False, elem_classes="mv-examples") as column:
            gr.Markdown(f"**Examples{': baseline left, aligned right' if pairs else ''}**")
            with gr.Row(elem_classes="mv-thumbs", elem_id=f"mv-examples-{name}"):
                self.thumbs[name] = [self._thumb(source) for source in pairs or DOMAINS[name].examples]
        return column

    def _thumb(self, source: Pair | Example) -> gr.Button:
        """A button that shows an example: its pictures, if they are stored, and what they show."""
        if isinstance(source, Example):
            return gr.Button(source.prompt, size="sm")
        icon = served_picture(views.thumbnail(source), "thumbnail")
        thumb = gr.Button(caption(source), icon=icon, size="sm", min_width=130, elem_classes="mv-thumb")
        thumb.keep_in_cache.add(icon)  # served for as long as the page is, unlike what a run leaves behind
        return thumb

    def _wire(self) -> None:
        self._wire_run()
        menus = [part for builder in self.builders.values() for part in builder.parts]
        request = [self.prompt, self.seed, *menus, self.unknown]
        groups = [*(builder.group for builder in self.builders.values()), *self.galleries.values()]
        shown = [self.generate, self.cancel, self.alert, *self.panel.outputs]
        switched = [*request, self.adapter, self.steps, self.guidance, self.live, *groups, *shown]
        self.domain.input(self._switch_domain, self.domain, switched, **LIGHT)
        self.cancel.click(None, js=NO_DRAFT)
        self.cancel.click(self._stop, self.panel.pair, shown, **LIGHT)
        for name, thumbs in self.thumbs.items():
            sources: Sequence[Pair | Example] = self.examples.get(name) or DOMAINS[name].examples
            for thumb, source in zip(thumbs, sources, strict=True):
                picked = thumb.click(self._pick(name, source), None, [*request, *shown], **LIGHT)
                picked.success(None, js=SHOW_RESULT)
        self.prompt.blur(self._read_prompt, [self.domain, self.prompt], [*menus, self.unknown], **LIGHT)
        self.dice.click(new_seed, None, self.seed, **LIGHT)

    def _wire_run(self) -> None:
        """Wire the way from the button to the result.

        Gradio's `cancels` is left alone: it has what a generator sent last shown again. A run that is no longer current
        stops itself, see `_run`.
        """
        shown = [self.generate, self.cancel, self.alert, *self.panel.outputs]
        # A run that stops early must not keep the next one from starting: several may be on their way.
        run = self.ticket.change(
            self._run,
            self.ticket,
            self.panel.streamed,
            concurrency_id="model",
            concurrency_limit=1,
            trigger_mode="multiple",
            show_progress="hidden",
            api_visibility="private",
        )
        ending = {"inputs": [self.ticket, self.panel.pair], "outputs": shown, "trigger_mode": "multiple", **LIGHT}
        run.success(self._end, **ending)
        run.failure(self._lost, **ending)
        started = [self.ticket, self.seed, *shown]
        begun = gr.on(
            [self.generate.click, self.prompt.submit],
            self._begin,
            [self.domain, self.prompt, self.seed, self.keep_seed, self.steps, self.guidance, self.adapter],
            started,
            **LIGHT,
        )
        begun.success(None, js=SHOW_RESULT)
        begun.failure(lambda: views.alert(UNREAD), None, self.alert, **LIGHT)
        if any(few_steps(self.studio, name) is not None for name in self.domains):
            self.prompt.change(None, js=DRAFT_LATER)
            gr.on(
                [self.draft_now.click, self.live.input],
                self._begin_draft,
                [self.domain, self.prompt, self.seed, self.live, self.adapter, self.panel.pair],
                started,
                **LIGHT,
            )

    def open_page(self, request: gr.Request) -> Updates:
        """Return what a fresh page shows, the first domain's first stored example, and what may be used from then on.

        The prompt and its menus stand in the page as it is built: what a quick person types is left alone.
        """
        name = self.domains[0]
        usable = {part: gr.update(interactive=True) for part in (self.domain, self.generate)}
        usable[self.galleries[name]] = gr.update(visible=True)
        return usable | self._example(self._source(name), request)

    def outputs_of_open_page(self) -> list[Any]:
        """Return the components that `open_page` sets."""
        return [self.domain, self.generate, self.galleries[self.domains[0]], *self.panel.outputs]

    def leave_page(self, request: gr.Request) -> None:
        """Stop what a closed page was computing."""
        self.runs.stop(str(request.session_hash))
        self.panel.screens.forget(str(request.session_hash))

    def _source(self, name: str) -> Pair | Example:
        """The prompt and seed that a domain opens with: its first stored pair's, else its first example's."""
        pairs = self.examples.get(name, [])
        return pairs[0] if pairs else DOMAINS[name].examples[0]

    def _request_of(self, name: str, source: Pair | Example) -> Updates:
        """Updates of the request side for a stored pair or an example prompt of a domain."""
        return {
            self.prompt: source.prompt,
            self.seed: source.seed,
            self.alert: "",
            **self._idle(),
            **self.builders[name].read(source.prompt),
        }

    def _switch_domain(self, name: str, request: gr.Request) -> Updates:
        self.runs.stop(str(request.session_hash))
        source = self._source(name)
        updates = self._request_of(name, source)
        for other in self.domains:
            updates[self.builders[other].group] = gr.update(visible=other == name)
            updates[self.galleries[other]] = gr.update(visible=other == name)
        updates[self.adapter] = gr.update(choices=adapter_choices(self.studio, name), value="")
        updates[self.guidance] = default_guidance_scale(self.studio, name)
        updates[self.steps] = gr.update(info=steps_info(self.studio, name))
        updates[self.live] = gr.update(visible=few_steps(self.studio, name) is not None)
        return updates | self._example(source, request)

    def _read_prompt(self, name: str, prompt: str) -> Updates:
        return self.builders[name].read(prompt)

    def _pick(self, name: str, source: Pair | Example) -> Callable[[gr.Request], Updates]:
        """What a click on an example does."""

        def pick(request: gr.Request) -> Updates:
            self.runs.stop(str(request.session_hash))
            return self._request_of(name, source) | self._example(source, request)

        return pick

    def _example(self, source: Pair | Example, request: gr.Request) -> Updates:
        session = str(request.session_hash)
        if isinstance(source, Pair):
            return self.panel.show(session, source, STORED)
        return self.panel.show(session, None, EMPTY)

    def _begin(
        self,
        domain: str,
        prompt: str,
        seed: int | None,
        keep_seed: bool,
        steps: int,
        guidance_scale: float,
        adapter: str,
        request: gr.Request,
    ) -> Updates:
        """Check what is asked for and hand out a ticket for it; what cannot be drawn is refused and changes nothing."""
        try:
            with telling():
                asked = {
                    "domain": domain,
                    "prompt": check_prompt(prompt),
                    "seed": _chosen_seed(seed) if keep_seed else new_seed(),
                    "steps": check_steps(steps),
                    "guidance_scale": check_guidance_scale(guidance_scale),
                    "adapter": adapter,
                }
        except gr.Error as refusal:
            return {self.alert: views.alert(refusal.message)}
        started = self._started(Run(asked), request)
        return started | {self.seed: asked["seed"], self.generate: gr.update(interactive=False)}

    def _begin_draft(
        self,
        domain: str,
        prompt: str,
        seed: int | None,
        live: bool,
        adapter: str,
        shown: Pair | None,
        request: gr.Request,
    ) -> Updates:
        """Ask for a draft of the prompt as it stands, unless it is shown already or a full run is on its way."""
        steps, running = few_steps(self.studio, domain), self.runs.current(str(request.session_hash))
        if not live or steps is None or (running is not None and not running.is_draft):
            return gr.skip()
        try:
            asked = {"domain": domain, "prompt": check_prompt(prompt), "seed": check_seed(seed), "adapter": adapter}
        except InputError:
            return gr.skip()  # half a prompt: the person is told when it is to be generated
        run = Run({**asked, "steps": steps, "guidance_scale": None}, is_draft=True)
        is_shown = shown is not None and (shown.domain, shown.prompt, shown.seed) == (domain, asked["prompt"], seed)
        if running.asked == run.asked if running else is_shown:
            return gr.skip()
        return self._started(run, request)

    def _started(self, run: Run, request: gr.Request) -> Updates:
        session = str(request.session_hash)
        self.runs.start(session, run)
        return {
            self.ticket: run.ticket,
            self.alert: "",
            self.cancel: gr.update(interactive=True),
            **self.panel.begin(session, f"{WAITING} to draw a draft" if run.is_draft else WAITING),
        }

    def _idle(self) -> Updates:
        return {self.generate: gr.update(interactive=True), self.cancel: gr.update(interactive=False)}

    def _stop(self, shown: Pair | None, request: gr.Request) -> Updates:
        session = str(request.session_hash)
        self.runs.stop(session)
        return {self.alert: "", **self._idle(), **self.panel.show(session, shown, "Cancelled.")}

    def _run(self, ticket: str, request: gr.Request) -> Iterator[Updates]:
        """Draw what a ticket stands for; yields what to show of it as long as nothing else was asked for."""
        run = self.runs.current(str(request.session_hash), ticket)
        if run is None:
            yield gr.skip()  # a generator that yields nothing would empty the panel
            return
        begun_s, drew, has_left = time.monotonic(), False, caller_has_left()
        try:
            with telling():
                for found in stream(partial(self._compare, run, has_left), run.stopped):
                    if run.stopped.is_set():
                        break
                    if isinstance(found, Preview):
                        drew = True
                        yield self.panel.preview(found)
                    else:
                        run.pair, run.text = found, _done(run, drew, time.monotonic() - begun_s)
                        yield self.panel.finish(found, run.text, draft=run.is_draft)
        except gr.Error as error:
            run.problem = error.message
        if self.runs.current(str(request.session_hash), ticket) is None:
            yield gr.skip()  # gradio sends the last updates again at the end, and by now something else is shown

    def _compare(self, run: Run, has_left: Callable[[], bool], on_preview: Callable[[Preview], None]) -> Pair:
        return self.studio.compare(
            **run.asked, on_preview=on_preview, cancelled=lambda: run.stopped.is_set() or has_left()
        )

    def _end(self, ticket: str, before: Pair | None, request: gr.Request) -> Updates:
        """Show a run's result, or what went wrong and the pair before it; nothing if something else is shown by now."""
        session = str(request.session_hash)
        run = self.runs.current(session, ticket)
        if run is None or not (run.pair or run.problem):
            return gr.skip()
        if run.pair is not None:
            updates = {self.alert: "", **self.panel.show(session, run.pair, run.text, draft=run.is_draft)}
        else:
            updates = {self.alert: views.alert(run.problem), **self.panel.show(session, before, "")}
        return updates | self._idle() if self.runs.end(session, run) else gr.skip()

    def _lost(self, ticket: str, before: Pair | None, request: gr.Request) -> Updates:
        """Say what to do after a run that the queue did not take or whose connection broke."""
        session = str(request.session_hash)
        if (run := self.runs.current(session, ticket)) is None:
            return gr.skip()
        run.stopped.set()
        run.problem = run.problem or REFUSED
        return self._end(ticket, before, request)


def _done(run: Run, drew: bool, took_s: float) -> str:
    """The status line of a finished run."""
    if run.is_draft:
        return f"Draft done in {took_s:.1f} s. Press Generate for the full images."
    return f"Done in {took_s:.1f} s." if drew else "This pair was generated before and is shown from memory."


def _chosen_seed(seed: int | None) -> int:
    if seed is None:
        raise InputError(f"the seed is empty; enter a whole number from {MIN_SEED} to {MAX_SEED}, or press New seed")
    return check_seed(seed)


def caption(pair: Pair) -> str:
    """What a stored pair shows: its terms, or, without any, what the prompt says after its opening words."""
    return ", ".join(pair.words) or re.split(r" (?:of|with|showing) ", pair.prompt, maxsplit=1)[-1]


def new_seed() -> int:
    """Return a seed drawn at random."""
    return random.SystemRandom().randint(MIN_SEED, MAX_SEED)


def adapter_choices(studio: Studio, domain: str, *, grounding: bool = False) -> list[tuple[str, str]]:
    """Return (label, value) of a domain's adapters as the API takes them: "" the default one, "none" the baseline.

    grounding: the default is the one that phrases are looked for with.
    """
    baseline = ("None: the baseline on both sides", "none")
    if domain not in studio.domains():
        return [("None trained yet", ""), baseline]
    manifest = studio.manifest(domain)
    titles = {name: str(manifest.adapters[name].get("title") or name) for name in manifest.selectable}
    first = (manifest.grounding_adapter if grounding else None) or manifest.default_adapter
    default = titles.pop(first or "", None)
    choices = [(f"{default} (default)" if default else "None trained yet", "")]
    return [*choices, *((title, name) for name, title in titles.items()), baseline]


def few_steps(studio: Studio, domain: str) -> int | None:
    """In how many steps a domain can draw a draft; None where it cannot."""
    return studio.manifest(domain).few_steps if domain in studio.domains() else None


def steps_info(studio: Studio, domain: str) -> str:
    """What a domain makes of the number of steps."""
    if domain not in studio.domains() or not (last := studio.manifest(domain).recipe.get("few_step_finish")):
        return "More steps take longer and may add detail."
    guidance = default_guidance_scale(studio, domain)
    return f"More steps take longer. At guidance {guidance:g} the last of them are merged into {last}."


def default_guidance_scale(studio: Studio, domain: str) -> float:
    """Return where the guidance slider stands for a domain."""
    return studio.default_guidance_scale(domain) if domain in studio.domains() else DEFAULT_GUIDANCE_SCALE
