"""Menus beside the prompt: choosing writes the prompt, leaving the prompt sets the menus; the prompt decides."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from medviz.domains import NOT_STATED, Domain
from medviz.domains.base import ParsedPrompt
from medviz.ui.guard import telling

ONCE = """(...chosen) => {
    const last = window.mvChosen ?? {}, now = {key: JSON.stringify(chosen), at: Date.now()};
    window.mvChosen = now;
    return last.key === now.key && now.at - last.at < 500 ? chosen.map(() => null) : chosen;
}"""
"""Gradio tells of a choice twice, as chosen and as left: the second, which might come back after a person has typed
something else, is sent without choices."""


class PromptBuilder:
    """The menus of one domain, in a group of their own, wired to the prompt's text box."""

    def __init__(self, domain: Domain, prompt: gr.Textbox, unknown: gr.Textbox, *, start: str, visible: bool) -> None:
        """start: the prompt that the menus show at first."""
        self.domain = domain
        values = choices_of(domain, domain.parse(start))
        self.unknown = unknown
        with gr.Group(visible=visible) as self.group, gr.Row():
            self.menus = [
                gr.Dropdown(
                    list(field.choices),
                    value=value,
                    multiselect=field.multiple,
                    label=field.label,
                    info=field.info or None,
                    min_width=150,
                    elem_id=f"mv-field-{domain.name}-{field.name}",
                )
                for field, value in zip(domain.fields, values, strict=True)
            ]
        for menu in self.menus:
            # `input` is a person's choice alone: what the program sets does not write the prompt again.
            menu.input(
                self.write,
                self.menus,
                [prompt, unknown],
                queue=False,
                js=ONCE,
                show_progress="hidden",
                api_visibility="private",
            )

    def write(self, *chosen: str | Sequence[str] | None) -> tuple[Any, Any]:
        """Return the prompt of the menus' choices, and an empty line of unknown words; no change where no menu says
        anything, see `ONCE`: what is not stated is a choice, too."""
        if all(choice is None for choice in chosen):
            return gr.skip(), gr.skip()
        values = {
            field.name: choice
            for field, choice in zip(self.domain.fields, chosen, strict=True)
            if choice and choice != NOT_STATED
        }
        with telling():
            return self.domain.build_prompt(values), gr.update(visible=False, value="")

    def read(self, prompt: str) -> dict[Any, Any]:
        """Return updates that set the menus to what a prompt says and name the words it does not know."""
        parsed = self.domain.parse(prompt or "")
        values = choices_of(self.domain, parsed)
        updates: dict[Any, Any] = {m: gr.update(value=v) for m, v in zip(self.menus, values, strict=True)}
        words = ", ".join(parsed.unknown_words)
        updates[self.unknown] = gr.update(value=words, visible=bool(words))
        return updates


def choices_of(domain: Domain, parsed: ParsedPrompt) -> list[str | list[str]]:
    """What each menu of a domain shows for a prompt: one choice, or a list where several may be chosen."""
    found = [[c for c in parsed.values.get(field.name, ()) if c in field.choices] for field in domain.fields]
    return [
        mine if field.multiple else mine[0] if mine else NOT_STATED
        for field, mine in zip(domain.fields, found, strict=True)
    ]
