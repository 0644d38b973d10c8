"""Looks: calm, readable, no font and no script from anywhere but this server."""

import gradio as gr

INK, TEAL, TEAL_DARK = "#1c2430", "#0f6674", "#0b4d58"
WELL = "#1a1d21"  # the ground behind images: neutral, and dark as on a reading station
VIRIDIS = ("#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#fde725")  # equal steps of the overlay's colours


def theme() -> gr.Theme:
    """Return the app's theme. Its fonts come with gradio, whose semi-bold files hold few letters: bold stands in."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.cyan,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_sm,
        font=(gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"),
        font_mono=(gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700)), "monospace"),
    ).set(
        body_background_fill="*neutral_50",
        body_text_color=INK,
        body_text_color_subdued="*neutral_600",
        block_info_text_color="*neutral_600",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_800",
        block_border_width="1px",
        block_shadow="none",
        button_primary_background_fill=TEAL,
        button_primary_background_fill_hover=TEAL_DARK,
        button_primary_background_fill_dark=TEAL,
        button_primary_background_fill_hover_dark=TEAL_DARK,
        button_primary_text_color="white",
        slider_color=TEAL,
        checkbox_background_color_selected=TEAL,
        checkbox_border_color_selected=TEAL,
        checkbox_label_background_fill_selected=TEAL,
        checkbox_label_background_fill_selected_dark=TEAL,
        checkbox_label_text_color_selected="white",
        color_accent=TEAL,
        link_text_color=TEAL_DARK,
        link_text_color_dark="*primary_300",
    )


ACCESSIBLE = """() => {
    const set = (part, name, value) => part.getAttribute(name) === value || part.setAttribute(name, value);
    const repair = () => {
        for (const group of document.querySelectorAll("fieldset")) {
            const radios = group.querySelectorAll("input[type=radio]");
            const title = group.querySelector("[data-testid=block-info]");
            if (!radios.length) continue;
            set(group, "role", "radiogroup");
            if (title) set(group, "aria-label", title.textContent.trim());
            radios.forEach((radio) => set(radio, "name", group.id || radios[0].name));
        }
        for (const part of document.querySelectorAll(".empty[aria-label]")) set(part, "role", "img");
        for (const part of document.querySelectorAll(".upload-container")) part.removeAttribute("aria-label");
    };
    let pending = 0;
    new MutationObserver(() => { pending ||= requestAnimationFrame(() => { pending = 0; repair(); }); })
        .observe(document.body, {childList: true, subtree: true});
    repair();
}"""
"""Run when the page opens: what gradio's components lack for keyboards and screen readers. Radio buttons of one group
share a name, so that arrow keys move among them, and the group has one."""

CSS = """
#mv-tables td { overflow-wrap: normal; word-break: normal; }
#mv-tables table { display: block; overflow-x: auto; }
.gradio-container { max-width: none !important; }
#mv-head { align-items: center; gap: .4rem 1.5rem; }
#mv-head > * { flex: 1 1 20rem; min-width: 0 !important; }
#mv-title h1 { font-size: 1.45rem; font-weight: 600; margin: 0; }
#mv-title p { margin: .1rem 0 0; color: var(--body-text-color-subdued); }
#mv-notice { border-left: 4px solid #b45309; background: #fff7e6; color: #4a2c05; border-radius: 4px;
  padding: .15rem .4rem; }
#mv-notice * { font-weight: 600; }
.dark #mv-notice { background: #3a2a10; color: #fde9c8; }
.mv-well, .mv-well .image-container, .mv-well .image-frame, .mv-well .wrap { background: WELL !important; }
.mv-well img { image-rendering: auto; }
.mv-note, .mv-note p { font-size: .85rem; color: var(--body-text-color-subdued); }
.mv-chips .wrap { gap: .4rem; }
.mv-chips label { border-radius: 999px !important; padding: .3rem .85rem !important; }
.mv-chips label input { position: absolute; opacity: 0; width: 1px; height: 1px; }
.gradio-container :focus-visible, label:has(> input:focus-visible),
.wrap:has(> .wrap-inner input:focus-visible) { outline: 3px solid var(--mv-focus) !important; outline-offset: 2px; }
.wrap-inner input:focus-visible { outline: none !important; }
.gradio-container { --mv-focus: #b45309; } .dark .gradio-container, .gradio-container.dark { --mv-focus: #fbbf24; }
.mv-chips label span { margin: 0 !important; }
.mv-table { width: 100%; border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
.mv-table, .mv-table tr, .mv-table th, .mv-table td { border: 0 !important; background: none !important; }
.mv-table th, .mv-table td { padding: .25rem .3rem; text-align: right; white-space: nowrap; }
.mv-table tbody tr { border-top: 1px solid var(--border-color-primary) !important; }
.mv-table caption { text-align: left; font-weight: 600; padding: .2rem .5rem .35rem; }
.mv-table th:first-child, .mv-table td:first-child { text-align: left; white-space: normal; }
.mv-table tbody th { font-weight: 400 !important; color: var(--body-text-color) !important; }
#mv-scores, #mv-scores .prose, #mv-scores > div { padding: 0 !important; }
#mv-scores details { margin-top: .6rem; }
#mv-scores summary { cursor: pointer; font-weight: 600; padding: .3rem .5rem; }
.mv-table th { font-weight: 600; color: var(--body-text-color-subdued); }
.mv-better { color: #0b6b3a; font-weight: 600; } .mv-worse { color: #a3341b; font-weight: 600; }
.dark .mv-better { color: #6ee7a8; } .dark .mv-worse { color: #fca58f; }
.prose table, .prose tr, .prose th, .prose td { border-color: var(--border-color-primary) !important; }
.mv-scroll { overflow-x: auto; }
.mv-bar { height: .8rem; border-radius: 3px; border: 1px solid var(--border-color-primary);
  background: linear-gradient(to right, VIRIDIS); }
.mv-bar-ends { display: flex; justify-content: space-between; font-size: .82rem; gap: 1rem;
  color: var(--body-text-color-subdued); }
.mv-key { display: flex; flex-wrap: wrap; gap: .15rem 1rem; font-size: .82rem; margin-top: .35rem; }
.mv-key i { display: inline-block; width: 1rem; height: .28rem; margin-right: .35rem; vertical-align: middle; }
.mv-progress { display: flex; align-items: center; gap: .8rem; font-size: .88rem; min-height: 1.6rem; }
.mv-progress progress { flex: 1; height: .6rem; appearance: none; border: 0; border-radius: 3px; overflow: hidden;
  background: var(--border-color-primary); }
.mv-progress progress::-webkit-progress-bar { background: var(--border-color-primary); }
.mv-progress progress::-webkit-progress-value { background: var(--slider-color); }
.mv-progress progress::-moz-progress-bar { background: var(--slider-color); }
.mv-alert { border-left: 4px solid #a3341b; background: #fdecea; color: #611a0c; border-radius: 4px;
  padding: .45rem .7rem; font-weight: 600; }
.dark .mv-alert { background: #3b1710; color: #fcd5cc; }
.mv-warnings textarea { color: #7a2e0e; } .dark .mv-warnings textarea { color: #fdba8c; }
.dark { --color-accent: #5cc3d1; }
.mv-thumbs { gap: .5rem !important; align-items: stretch; }
.mv-thumb { flex-direction: column; justify-content: flex-start; gap: .3rem; padding: .3rem !important;
  white-space: normal; text-align: center; line-height: 1.25; }
.mv-thumb img { width: 100% !important; height: auto !important; max-width: none; margin: 0 !important; }
#mv-pair .mv-well { aspect-ratio: 20 / 21; min-height: 0 !important; }
#mv-alert:not(:has([role=alert])), .mv-menus [id^=mv-menus-alert]:not(:has([role=alert])),
#mv-ground-alert:not(:has([role=alert])) { display: none; }
#mv-code .cm-content span { color: inherit !important; }
#mv-draft-now { display: none; }
.mv-work > .mv-request { flex: 0 0 clamp(320px, 26%, 440px) !important; }
#mv-result { scroll-margin-top: 1.5rem; }
@media (min-width: 1100px) {
  #mv-result-row { flex-wrap: nowrap; }
  #mv-result-row > #mv-pictures { flex: 7 1 0 !important; } #mv-result-row > #mv-figures { flex: 5 1 0 !important; }
}
.mv-menus .row > * { flex: 1 1 46% !important; min-width: 0 !important; }
@media (max-width: 760px) { .mv-work > .mv-request, .mv-work > * { flex: 1 1 100% !important; } }
@media (max-width: 640px) {
  .gradio-container { padding: .4rem !important; }
  #mv-pair { flex-wrap: nowrap; gap: .3rem; } #mv-pair > * { min-width: 0 !important; }
  .mv-table th, .mv-table td { padding: .3rem .3rem; font-size: .82rem; }
}
""".replace("WELL", WELL).replace("VIRIDIS", ", ".join(VIRIDIS))


def scroll_to(part: str, condition: str) -> str:
    """JavaScript of an event that scrolls to a part of the page (a CSS selector) unless its top is in view already.

    condition: JavaScript that must hold, read once the event's answer is shown.
    """
    return f"""() => setTimeout(() => {{
        const part = document.querySelector("{part}");
        if (!part || !({condition})) return;
        const {{top}} = part.getBoundingClientRect(), still = matchMedia("(prefers-reduced-motion: reduce)").matches;
        if (top < 0 || top > innerHeight / 2) part.scrollIntoView({{behavior: still ? "auto" : "smooth"}});
    }}, 100)"""
