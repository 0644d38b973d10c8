"""Menus beside the prompt: choosing writes the prompt, leaving the prompt sets the menus; the prompt decides."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from medviz.domains import NOT_STATED, Domain
from medviz.domains.base import Field, ParsedPrompt
from medviz.ui import views
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
        self.prompt, self.unknown = prompt, unknown
        with gr.Column(visible=visible, elem_classes="mv-menus") as self.group, gr.Group():
            self.alert = gr.HTML("", elem_id=f"mv-menus-alert-{domain.name}")
            with gr.Row():
                self._build_menus(values)
        for menu in self.menus:
            # `input` is a person's choice alone: what the program sets does not write the prompt again.
            menu.input(
                self.write,
                self.menus,
                [prompt, *self.parts, unknown],
                queue=False,
                js=ONCE,
                trigger_mode="always_last",
                show_progress="hidden",
                api_visibility="private",
            )

    def _build_menus(self, values: Sequence[str | list[str]]) -> None:
        self.menus = [
            gr.Dropdown(
                list(field.choices),
                value=value,
                multiselect=field.multiple,
                label=field.label,
                info=field.info or None,
                min_width=110,
                elem_id=f"mv-field-{self.domain.name}-{field.name}",
            )
            for field, value in zip(self.domain.fields, values, strict=True)
        ]

    @property
    def parts(self) -> list[Any]:
        """The menus and the line that says what is wrong with them."""
        return [*self.menus, self.alert]

    def write(self, *chosen: str | Sequence[str] | None) -> dict[Any, Any]:
        """Return the prompt of the menus' choices, and an empty line of unknown words; no change where no menu says
        anything, see `ONCE`: what is not stated is a choice, too.

        Choices that exclude each other within a menu are settled for the one made last; others are refused in words.
        """
        if all(choice is None for choice in chosen):
            return gr.skip()
        kept = [_without_excluded(field, choice) for field, choice in zip(self.domain.fields, chosen, strict=True)]
        values = {
            field.name: choice
            for field, choice in zip(self.domain.fields, kept, strict=True)
            if choice and choice != NOT_STATED
        }
        updates: dict[Any, Any] = {
            menu: gr.update(value=now)
            for menu, now, before in zip(self.menus, kept, chosen, strict=True)
            if now != before
        }
        try:
            with telling():
                updates[self.prompt] = self.domain.build_prompt(values)
        except gr.Error as refusal:
            return updates | {self.alert: views.alert(refusal.message)}
        return updates | {self.alert: "", self.unknown: gr.update(visible=False, value="")}

    def read(self, prompt: str) -> dict[Any, Any]:
        """Return updates that set the menus to what a prompt says and name the words it does not know."""
        parsed = self.domain.parse(prompt or "")
        values = choices_of(self.domain, parsed)
        updates: dict[Any, Any] = {m: gr.update(value=v) for m, v in zip(self.menus, values, strict=True)}
        words = ", ".join(parsed.unknown_words)
        return updates | {self.alert: "", self.unknown: gr.update(value=words, visible=bool(words))}


def _without_excluded(field: Field, choice: str | Sequence[str] | None) -> str | Sequence[str] | None:
    """A menu's choices, in the order they were made, without those that the last one excludes."""
    alone = field.alone or field.nothing
    if not alone or choice is None or isinstance(choice, str) or len(choice) < 2:
        return choice
    return [alone] if choice[-1] == alone else [one for one in choice if one != alone]


def choices_of(domain: Domain, parsed: ParsedPrompt) -> list[str | list[str]]:
    """What each menu of a domain shows for a prompt: one choice, or a list where several may be chosen."""
    found = [[c for c in parsed.values.get(field.name, ()) if c in field.choices] for field in domain.fields]
    return [
        mine if field.multiple else mine[0] if mine else NOT_STATED
        for field, mine in zip(domain.fields, found, strict=True)
    ]
