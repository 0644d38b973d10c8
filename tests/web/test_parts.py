"""The page's parts without a server: markup is escaped, messages are safe, runs stop, files are written whole."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from medviz.domains import DOMAINS, NOT_STATED, get_domain
from medviz.errors import Cancelled, InputError, ModelError
from medviz.results import Drawing, Pair, Preview, RegionAttention, Score, WordAttention
from medviz.ui import generate, views
from medviz.ui.files import served
from medviz.ui.guard import telling
from medviz.ui.prompt_builder import PromptBuilder
from medviz.ui.result_panel import ResultPanel
from medviz.ui.running import Run, Runs, Screens, stream
from medviz.ui.theme import CSS

SIDE = 32


def a_pair() -> Pair:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    mask = np.zeros((SIDE, SIDE), bool)
    mask[8:20, 8:20] = True
    ramp = np.tile(np.linspace(0, 1, SIDE, dtype=np.float32), (SIDE, 1))
    look = WordAttention("hair", ramp, ramp[:, ::-1], (RegionAttention("lesion", 0.25, 0.5, None, 2.0),))
    return Pair(
        domain="dermatology",
        prompt="<b>hair</b>",
        seed=1,
        steps=2,
        guidance_scale=3.0,
        adapter="attribute",
        models={},
        words=("hair",),
        baseline=Drawing(image, {"lesion": mask, "skin": ~mask}),
        aligned=Drawing(image, {"lesion": mask, "skin": ~mask}),
        scores=(
            Score("Hair", "reward", 0.25, 0.75),
            Score("Ink <i>", "reward", 0.5, 0.25),
            Score("Hair", "judge", 0.5, None),
            Score("Ink <i>", "judge", 0.5, 0.501),
        ),
        warnings=(),
        timings_s={},
        look_up=lambda word: look,
    )


def test_tables_say_better_worse_same_and_not_computed_and_escape_names() -> None:
    table = views.score_tables(a_pair())
    assert "▲ +0.50 better" in table
    assert "▼ -0.25 worse" in table
    assert "same" in table
    assert views.NOT_COMPUTED in table
    assert "<i>" not in table
    assert table.index("Judge (held out)") < table.index("<details>") < table.index("Training reward")
    lower = replace(a_pair(), scores=(Score("Error", "judge", 0.5, 0.25, higher_is_better=False),))
    assert "▼ -0.25 better" in views.score_tables(lower)


def test_the_region_table_names_regions_and_what_is_missing() -> None:
    table = views.region_table(a_pair().attention("hair"), "dermatology")
    assert "Lesion" in table
    assert "25 %" in table
    assert views.NOT_COMPUTED in table


def test_a_word_and_outlines_change_what_is_shown_and_the_label_stays_below() -> None:
    pair = a_pair()
    plain = views.shown_pair(pair, views.Look(None, False, 0.6))
    word = views.shown_pair(pair, views.Look("hair", False, 0.6))
    lined = views.shown_pair(pair, views.Look(None, True, 0.6))
    assert plain[0].tobytes() == plain[1].tobytes()
    assert word[0].tobytes() != word[1].tobytes()
    assert len({image.tobytes() for image in (plain[0], word[0], lined[0])}) == 3
    assert plain[0].height > views.DISPLAY_SIDE_PX
    assert "Lesion" in views.legend(pair.baseline.outlines, views.Look("hair", True, 0.6), "dermatology")
    assert views.legend(pair.baseline.outlines, views.Look(None, False, 0.6), "dermatology") == ""


def test_zones_inside_a_lung_are_not_outlined_beside_it() -> None:
    lung = np.zeros((SIDE, SIDE), bool)
    lung[4:28, 4:14] = True
    zone = lung.copy()
    zone[12:] = False
    assert list(views.main_outlines({"right_lung": lung, "right_upper_zone": zone, "empty": ~lung & lung})) == [
        "right_lung"
    ]


@pytest.mark.parametrize(
    ("error", "said", "hidden"),
    [
        (InputError("<script>alert(1)</script> is no prompt"), "&lt;script&gt;", "<script>"),
        (ModelError("/secret/unet is damaged"), "log", "secret"),
        (RuntimeError("/secret/x"), "log", "secret"),
        (Cancelled("stopped after 120 s"), "Stopped after 120 s.", "log"),
    ],
)
def test_messages_tell_mistakes_in_full_and_failures_in_general(error: Exception, said: str, hidden: str) -> None:
    with pytest.raises(gr.Error) as caught, telling():
        raise error
    assert said in caught.value.message
    assert hidden not in caught.value.message


def test_a_stream_yields_what_the_work_reports_then_its_result_or_its_error() -> None:
    steps = [Preview(number, 2, None) for number in (1, 2)]
    pair = a_pair()

    def work(report: Callable[[Preview], None]) -> Pair:
        for step in steps:
            report(step)
        return pair

    assert list(stream(work, threading.Event())) == [*steps, pair]

    def fail(report: Callable[[Preview], None]) -> Pair:
        report(steps[0])
        raise InputError("no")

    seen = []
    with pytest.raises(InputError):
        seen.extend(stream(fail, threading.Event()))
    assert len(list(seen)) <= 1


def test_leaving_a_stream_stops_its_work() -> None:
    stopped = threading.Event()

    def work(report: Callable[[Preview], None]) -> Pair:
        report(Preview(1, 2, None))
        assert stopped.wait(20), "nobody stopped the work"
        raise Cancelled("stopped")

    found = stream(work, stopped)
    next(found)
    found.close()
    assert stopped.is_set()


def test_a_session_has_one_current_run_and_can_stop_it() -> None:
    runs = Runs()
    runs.stop("nobody")
    first, other, second = Run({}), Run({}), Run({})
    runs.start("a", first)
    runs.start("b", other)
    assert runs.current("a", first.ticket) is first
    runs.start("a", second)
    assert first.stopped.is_set(), "a new run of the session stops the older one"
    assert runs.current("a", first.ticket) is None
    assert not runs.end("a", first), "its result comes too late"
    runs.stop("a")
    assert second.stopped.is_set()
    assert not runs.end("a", second)
    assert not other.stopped.is_set()
    assert runs.end("b", other)
    assert runs.current("b") is None


def test_an_answer_to_what_was_shown_before_is_told_from_one_to_what_is_shown() -> None:
    screens = Screens()
    first, other = screens.change("a"), screens.change("b")
    second = screens.change("a")
    assert not screens.shows("a", first)
    assert screens.shows("a", second)
    assert screens.shows("b", other)
    screens.forget("a")
    assert not screens.shows("a", second)


def test_served_files_are_whole_and_named_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    content = bytes(range(256)) * 2000
    paths: list[str] = []
    threads = [threading.Thread(target=lambda: paths.append(served(content, "../../x/shown.png"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    path = Path(paths[0])
    assert path.read_bytes() == content
    assert path.is_relative_to(tmp_path)
    assert [found.name for found in path.parent.iterdir()] == ["shown.png"]
    assert served(content + b".", "shown.png") != paths[0]


def test_looks_ask_no_other_server() -> None:
    assert "http" not in CSS
    assert "@import" not in CSS


def test_a_run_streams_few_parts_and_clears_what_belongs_to_the_pair_before() -> None:
    with gr.Blocks():
        panel = ResultPanel()
    pair, step = a_pair(), Preview(1, 2, None)
    begun = panel.begin("a", "Waiting")
    assert panel.pair not in begun, "the pair before comes back if the run fails"
    assert set(begun) == set(panel.outputs) - {panel.pair, panel.screen}
    assert all(begun[part] is None for part in (panel.baseline, panel.aligned, panel.slider, panel.difference))
    assert all(not begun[button]["interactive"] for button in panel.downloads)
    assert set(panel.preview(step)) <= set(panel.streamed)
    unfinished = panel.preview(replace(step, images=(pair.baseline.image, pair.aligned.image)))
    assert set(unfinished) <= set(panel.streamed)
    finished = panel.finish(pair, "Done")
    assert set(finished) == set(panel.streamed)
    shown = panel.show("a", pair, "Done")
    assert set(shown) == set(panel.outputs)
    assert [shown[side] for side in (panel.baseline, panel.aligned)] == [
        finished[panel.baseline],
        finished[panel.aligned],
    ]
    assert panel.show("a", None, "").keys() == set(panel.outputs)


def test_files_and_overlays_that_come_too_late_are_dropped() -> None:
    with gr.Blocks():
        panel = ResultPanel()
    pair, request = a_pair(), gr.Request(session_hash="a")
    number = panel.show("a", pair, "Done")[panel.screen]
    assert set(panel.pack(pair, number, request)) == set(panel.downloads)
    assert panel.baseline in panel.look(pair, number, "hair", False, 0.6, request)
    panel.begin("a", "Waiting")
    assert panel.pack(pair, number, request) == gr.skip()
    assert panel.look(pair, number, "hair", False, 0.6, request) == gr.skip()


def test_a_title_marks_a_draft_and_markup_escapes_it() -> None:
    with gr.Blocks():
        panel = ResultPanel()
    assert panel.show("a", a_pair(), "Done", draft=True)[panel.shown].startswith("Draft: <b>hair</b> | seed 1")


def test_choices_that_exclude_each_other_are_settled_for_the_last_and_others_are_refused_in_words() -> None:
    domain = get_domain("dermatology")
    with gr.Blocks():
        builder = PromptBuilder(domain, gr.Textbox(), gr.Textbox(), start="", visible=True)
    place = [field.name for field in domain.fields].index("artefacts")

    def write(*artefacts: str) -> tuple[str, object]:
        chosen = [[] if field.multiple else NOT_STATED for field in domain.fields]
        chosen[place] = list(artefacts)
        updates = builder.write(*chosen)
        return str(updates[builder.prompt]), updates.get(builder.menus[place])

    nothing = domain.fields[place].nothing
    prompt, menu = write("hair", "ruler", nothing)
    assert "no visible artifacts" in prompt
    assert menu == gr.update(value=[nothing])
    prompt, menu = write(nothing, "hair")
    assert "hair" in prompt
    assert menu == gr.update(value=["hair"])
    assert write("hair", "ruler")[1] is None

    domain = get_domain("radiology")
    with gr.Blocks():
        builder = PromptBuilder(domain, gr.Textbox(), gr.Textbox(), start="", visible=True)
    values = {"age_group": "child", "age": "60"}
    refused = builder.write(*(values.get(field.name, [] if field.multiple else NOT_STATED) for field in domain.fields))
    assert 'role="alert"' in refused[builder.alert]
    assert builder.prompt not in refused


@pytest.mark.parametrize("domain", sorted(DOMAINS))
def test_every_example_has_a_caption_of_its_own(domain: str) -> None:
    pairs = [
        replace(a_pair(), domain=domain, prompt=example.prompt, words=get_domain(domain).parse(example.prompt).words)
        for example in get_domain(domain).examples
    ]
    captions = [generate.caption(pair) for pair in pairs]
    assert all(captions)
    assert len(set(captions)) == len(captions)
