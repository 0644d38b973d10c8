"""The Generate tab: a prompt from menus or by hand, settings, examples, and the run that fills the result panel."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from medviz.domains import DOMAINS
from medviz.domains.base import Example
from medviz.errors import Cancelled, MedvizError
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
)
from medviz.results import Pair, Preview
from medviz.studio import Studio
from medviz.ui import views
from medviz.ui.guard import telling
from medviz.ui.prompt_builder import PromptBuilder
from medviz.ui.result_panel import LIGHT, ResultPanel, Updates
from medviz.ui.running import Runs, stream

WAITING = "Waiting for the models"
EMPTY = "Choose a prompt and press Generate."
STORED = "A stored example: no model was needed to show it."


class GenerateTab:
    """Builds the tab inside an open gr.Tab and wires it. examples: domain -> stored pairs."""

    def __init__(self, studio: Studio, examples: dict[str, list[Pair]], domains: Sequence[str]) -> None:
        self.studio, self.examples, self.domains = studio, examples, domains
        self.runs = Runs()
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320):
                self._build_request()
            with gr.Column(scale=7, min_width=320):
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
            info="Write it, or choose from the menus below.",
            lines=2,
            max_lines=4,
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
            self.seed = gr.Number(
                source.seed,
                label="Seed",
                info="The same seed gives the same noise.",
                precision=0,
                minimum=MIN_SEED,
                maximum=MAX_SEED,
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
        self.galleries = {name: self._build_examples(name) for name in self.domains}

    def _build_settings(self, domain: str) -> None:
        self.live = gr.Checkbox(
            False,
            label="Draft while typing",
            info="In few steps: near to the full picture from the same noise.",
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

    def _build_examples(self, name: str) -> gr.Gallery | gr.Dataset:
        pairs = self.examples.get(name, [])
        if not pairs:
            samples = [[example.prompt] for example in DOMAINS[name].examples]
            return gr.Dataset(
                components=["textbox"], samples=samples, type="index", label="Example prompts", visible=False
            )
        return gr.Gallery(
            [(views.thumbnail(pair), ", ".join(pair.words)) for pair in pairs],
            label="Examples: baseline on the left, aligned on the right",
            format="png",
            columns=2,
            height="auto",
            object_fit="contain",
            allow_preview=False,
            interactive=False,
            visible=False,
            buttons=[],
            elem_classes="mv-thumbs",
            elem_id=f"mv-examples-{name}",
        )

    def _wire(self) -> None:
        menus = [menu for builder in self.builders.values() for menu in builder.menus]
        request = [self.prompt, self.seed, *menus, self.unknown]
        groups = [*(builder.group for builder in self.builders.values()), *self.galleries.values()]
        switched = [*request, self.adapter, self.steps, self.guidance, self.live, *groups, *self.panel.outputs]
        self.domain.input(self._switch_domain, self.domain, switched, **LIGHT)
        self.prompt.blur(self._read_prompt, [self.domain, self.prompt], [*menus, self.unknown], **LIGHT)
        self.dice.click(new_seed, None, self.seed, **LIGHT)
        for name, gallery in self.galleries.items():
            picked = [*request, *self.panel.outputs]
            if isinstance(gallery, gr.Gallery):
                gallery.select(self._pick_pair(name), None, picked, **LIGHT)
            else:
                gallery.click(self._pick_prompt(name), gallery, picked, **LIGHT)
        self._wire_run()

    def _wire_run(self) -> None:
        buttons = [self.generate, self.cancel]
        asked = [self.domain, self.prompt, self.seed, self.keep_seed, self.steps, self.guidance, self.adapter]
        run = self.generate.click(self._busy, None, [*buttons, self.panel.progress], **LIGHT).then(
            self._run,
            [*asked, self.panel.pair],
            [self.seed, *self.panel.streamed],
            concurrency_id="model",
            concurrency_limit=1,
            show_progress="hidden",
            api_visibility="private",
        )
        run.then(self._ready, None, buttons, **LIGHT)
        self._fill_after(run)
        if any(few_steps(self.studio, name) is not None for name in self.domains):
            # the tick, and whatever changes the prompt, typing or a menu; what is shown already is not drawn again
            draft = gr.on(
                [self.prompt.change, self.live.input],
                self._draft,
                [self.domain, self.prompt, self.seed, self.live, self.adapter, self.panel.pair],
                self.panel.streamed,
                concurrency_id="model",
                concurrency_limit=1,
                trigger_mode="always_last",
                show_progress="hidden",
                api_visibility="private",
            )
            self._fill_after(draft)
        self.cancel.click(self._stop, self.panel.pair, [*buttons, *self.panel.outputs], cancels=[run], **LIGHT)

    def _fill_after(self, run: gr.events.Dependency) -> None:
        run.then(self.panel.fill, [self.panel.pair, self.panel.shown], self.panel.filled, **LIGHT)

    def open_page(self) -> Updates:
        """Return what a fresh page shows, the first domain's first stored example, and what may be used from then on.

        The prompt and its menus stand in the page as it is built: what a quick person types is left alone.
        """
        name = self.domains[0]
        usable = {part: gr.update(interactive=True) for part in (self.domain, self.generate)}
        usable[self.galleries[name]] = gr.update(visible=True)
        pairs = self.examples.get(name, [])
        if not pairs:
            return {**usable, self.panel.progress: views.status(EMPTY)}
        return usable | self.panel.show(pairs[0], STORED)

    def outputs_of_open_page(self) -> list[Any]:
        """Return the components that `open_page` sets."""
        return [self.domain, self.generate, self.galleries[self.domains[0]], *self.panel.outputs]

    def leave_page(self, request: gr.Request) -> None:
        """Stop what a closed page was computing."""
        self.runs.stop(str(request.session_hash))

    def _source(self, name: str) -> Pair | Example:
        """The prompt and seed that a domain opens with: its first stored pair's, else its first example's."""
        pairs = self.examples.get(name, [])
        return pairs[0] if pairs else DOMAINS[name].examples[0]

    def _request_of(self, name: str, source: Any) -> Updates:
        """Updates of the request side for a stored pair or an example prompt of a domain."""
        return {self.prompt: source.prompt, self.seed: source.seed, **self.builders[name].read(source.prompt)}

    def _switch_domain(self, name: str, request: gr.Request) -> Updates:
        self.leave_page(request)
        pairs = self.examples.get(name, [])
        updates = self._request_of(name, self._source(name))
        for other in self.domains:
            updates[self.builders[other].group] = gr.update(visible=other == name)
            updates[self.galleries[other]] = gr.update(visible=other == name)
        updates[self.adapter] = gr.update(choices=adapter_choices(self.studio, name), value="")
        updates[self.guidance] = default_guidance_scale(self.studio, name)
        updates[self.steps] = gr.update(info=steps_info(self.studio, name))
        updates[self.live] = gr.update(visible=few_steps(self.studio, name) is not None)
        if pairs:
            return updates | self.panel.show(pairs[0], STORED)
        return updates | self.panel.show(None, EMPTY)

    def _read_prompt(self, name: str, prompt: str) -> Updates:
        return self.builders[name].read(prompt)

    def _pick_pair(self, name: str) -> Callable[..., Updates]:
        def pick(selected: gr.SelectData) -> Updates:
            pair = self.examples[name][int(selected.index)]
            return self._request_of(name, pair) | self.panel.show(pair, STORED)

        return pick

    def _pick_prompt(self, name: str) -> Callable[[int], Updates]:
        def pick(index: int) -> Updates:
            text = "Press Generate to draw this prompt."
            return self._request_of(name, DOMAINS[name].examples[index]) | {self.panel.progress: views.status(text)}

        return pick

    def _busy(self) -> Updates:
        return {
            self.generate: gr.update(interactive=False),
            self.cancel: gr.update(interactive=True),
            self.panel.progress: views.progress_bar(0, 1, WAITING),
        }

    def _ready(self) -> Updates:
        return {self.generate: gr.update(interactive=True), self.cancel: gr.update(interactive=False)}

    def _stop(self, pair: Pair | None, request: gr.Request) -> Updates:
        self.leave_page(request)
        return self._ready() | self.panel.show(pair, "Cancelled.")

    def _run(
        self,
        domain: str,
        prompt: str,
        seed: int,
        keep_seed: bool,
        steps: int,
        guidance_scale: float,
        adapter: str,
        previous: Pair | None,
        request: gr.Request,
    ) -> Iterator[Updates]:
        chosen_seed = seed if keep_seed else new_seed()
        yield {self.seed: chosen_seed}
        yield from self._compared(domain, prompt, chosen_seed, steps, guidance_scale, adapter, previous, request)

    def _draft(
        self,
        domain: str,
        prompt: str,
        seed: int,
        live: bool,
        adapter: str,
        previous: Pair | None,
        request: gr.Request,
    ) -> Iterator[Updates]:
        steps = few_steps(self.studio, domain)
        is_shown = previous is not None and (previous.domain, previous.prompt, previous.seed) == (domain, prompt, seed)
        if not live or steps is None or not prompt.strip() or is_shown:
            yield gr.skip()  # a generator that yields nothing would empty the panel
            return
        yield from self._compared(domain, prompt, seed, steps, None, adapter, previous, request)

    def _compared(
        self,
        domain: str,
        prompt: str,
        seed: int,
        steps: int,
        guidance_scale: float | None,
        adapter: str,
        previous: Pair | None,
        request: gr.Request,
    ) -> Iterator[Updates]:
        with telling(), self.runs.running(str(request.session_hash)) as switch:

            def compare(on_preview: Callable[[Preview], None]) -> Pair:
                return self.studio.compare(
                    domain,
                    prompt,
                    seed,
                    steps=steps,
                    guidance_scale=guidance_scale,
                    adapter=adapter,
                    on_preview=on_preview,
                    cancelled=switch.is_set,
                )

            try:
                for found in stream(compare):
                    if isinstance(found, Preview):
                        yield self.panel.preview(found)
                    else:
                        yield self.panel.finish(found, f"Done in {found.timings_s['total']:.1f} s.")
            except Cancelled as stopped:
                # Whoever turned the switch has already put something else on the screen.
                if not switch.is_set():
                    yield self.panel.finish(previous, str(stopped))
            except (MedvizError, RuntimeError, OSError, MemoryError):
                # What was shown before comes back: a failed request loses nothing.
                yield self.panel.finish(previous, "The request failed.")
                raise


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
        return "More take longer."
    return f"At guidance {default_guidance_scale(studio, domain):g} the last of them are drawn in {last} larger ones."


def default_guidance_scale(studio: Studio, domain: str) -> float:
    """Return where the guidance slider stands for a domain."""
    return studio.default_guidance_scale(domain) if domain in studio.domains() else DEFAULT_GUIDANCE_SCALE
