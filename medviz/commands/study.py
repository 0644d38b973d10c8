"""`python -m medviz study protocol|plan|simulate|analyse|export`: a reader study from its protocol to its report."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from medviz.domains import DOMAINS
from medviz.errors import InputError, StudyError
from medviz.limits import DEFAULT_STEPS
from medviz.study import Study, read_protocol
from medviz.study.protocol import PHASES, Protocol
from medviz.study.store import STORE_NAME, Store


def main(arguments: Sequence[str]) -> None:
    """Run one of the subcommands. Raises MedvizError with what is wrong."""
    chosen = _parser().parse_args(arguments)
    chosen.run(chosen)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m medviz study", description=__doc__)
    subcommands = parser.add_subparsers(required=True, metavar="SUBCOMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        added = subcommands.add_parser(
            name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        added.set_defaults(run=run)
        return added

    protocol = add("protocol", draw_up, "draw the pairs of a study and freeze its protocol")
    protocol.add_argument("domain", choices=sorted(DOMAINS))
    protocol.add_argument("--out", type=Path, required=True, help="new folder of the study")
    protocol.add_argument("--cases", type=int, default=40, help="pairs, balanced over the domain's findings")
    protocol.add_argument("--real", type=Path, help="folder of your own real images; they are read there, never copied")
    protocol.add_argument("--phases", nargs="+", choices=PHASES, help="default: all, without --real all but detection")
    protocol.add_argument("--adapter", default="", help="aligned model; empty is the domain's default")
    protocol.add_argument("--models", type=Path, help="folder of model folders; default: the embedded ones")
    protocol.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="denoising steps of an image")
    protocol.add_argument("--seed", type=int, default=0, help="of prompts, noise and every reader's order")
    protocol.add_argument("--title", default="", help="default: named after the domain")
    protocol.add_argument("--repeat-share", type=float, default=0.1, help="share of items shown a second time")
    protocol.add_argument("--rating-margin", type=float, default=0.5, help="points within which ratings are equivalent")
    protocol.add_argument("--auc-margin", type=float, default=0.1, help="distance of an AUC from 0.5 that is chance")

    plan = add("plan", plan_study, "power of readers x cases for a given preference, by simulation")
    plan.add_argument("--preference", type=float, default=0.6, help="expected score; no difference counts half")
    plan.add_argument("--readers", type=int, nargs="+", default=[3, 5, 8])
    plan.add_argument("--cases", type=int, nargs="+", default=[20, 40, 80])
    plan.add_argument("--ties", type=float, default=0.2, help="share of answers without difference")
    plan.add_argument("--reader-sd", type=float, default=0.3, help="spread of readers; that of one answer is 1")
    plan.add_argument("--case-sd", type=float, default=0.5, help="spread of cases; that of one answer is 1")
    plan.add_argument("--simulations", type=int, default=2000, help="studies simulated for each row")
    plan.add_argument("--seed", type=int, default=0)

    simulate = add("simulate", simulate_study, "send simulated readers of known behaviour through a study")
    simulate.add_argument("study", type=Path, help="folder of the study")
    simulate.add_argument("--database", type=Path, required=True, help="file for the answers; never the study's own")
    simulate.add_argument("--real", type=Path, help="folder of the real images, where the study has some")
    simulate.add_argument("--readers", type=int, default=3)
    simulate.add_argument("--preference", type=float, default=0.63, help="expected score; no difference counts half")
    simulate.add_argument("--seed", type=int, default=0)

    for name, run, text in (
        ("analyse", analyse_studies, "analyse the answers: analysis.json and report.html"),
        ("export", export_studies, "write answers by case (CSV) and the input of iMRMC"),
    ):
        added = add(name, run, text)
        added.add_argument("studies", type=Path, nargs="+", help="folders of studies, such as one for each domain")
        added.add_argument("--database", type=Path, help=f"file of the answers; default: {STORE_NAME} in the folder")
        added.add_argument("--out", type=Path, required=True, help="folder for the files")
    return parser


def draw_up(chosen: argparse.Namespace) -> None:
    """Draw and freeze a protocol with the embedded models."""
    from medviz.studio import Studio
    from medviz.study.design import draw_up as write

    studio = Studio(chosen.models)
    manifest = studio.manifest(chosen.domain)
    adapter = chosen.adapter or manifest.default_adapter or ""
    if adapter in ("", "none"):
        raise InputError(f"{chosen.domain} has no adapter to compare with the baseline; name one with --adapter")
    guidance_scale = studio.default_guidance_scale(chosen.domain)
    protocol = write(
        chosen.out,
        chosen.domain,
        lambda prompts, seeds, name: studio.generate(chosen.domain, prompts, seeds, name, chosen.steps, guidance_scale),
        adapter=adapter,
        models={"sha256": manifest.sha256, "steps": chosen.steps, "guidance_scale": guidance_scale},
        cases=chosen.cases,
        seed=chosen.seed,
        phases=chosen.phases or [phase for phase in PHASES if chosen.real or phase != "detection"],
        real_folder=chosen.real,
        title=chosen.title,
        repeat_share=chosen.repeat_share,
        rating_margin=chosen.rating_margin,
        auc_margin=chosen.auc_margin,
    )
    _say(f"{chosen.out}: {len(protocol.cases)} cases, {len(protocol.real)} real images, sha256 {protocol.sha256}")


def plan_study(chosen: argparse.Namespace) -> None:
    """Print the power table."""
    from medviz.study.planner import plan

    _say("readers  cases  power  95 % interval   coverage")
    for row in plan(
        chosen.preference,
        chosen.readers,
        chosen.cases,
        ties=chosen.ties,
        reader_sd=chosen.reader_sd,
        case_sd=chosen.case_sd,
        simulations=chosen.simulations,
        seed=chosen.seed,
    ):
        _say(f"{row.readers:7d} {row.cases:6d}  {row.power:5.3f}  {row.low:.3f} to {row.high:.3f}  {row.coverage:8.3f}")


def simulate_study(chosen: argparse.Namespace) -> None:
    """Fill a database with simulated answers."""
    from medviz.study.simulation import behaviour_for, run_simulated

    if chosen.database.resolve() == (chosen.study / STORE_NAME).resolve():
        raise InputError("simulated answers do not go into the study's own database; name another file")
    behaviour = behaviour_for(chosen.preference, 0.2, 0.3, 0.5)
    run_simulated(Study(chosen.study, chosen.real, chosen.database), chosen.readers, behaviour, chosen.seed)
    _say(
        f"{chosen.readers} simulated readers; expected preference {behaviour.true_preference:.3f}, AUC baseline "
        f"{behaviour.true_auc('baseline'):.3f}, aligned {behaviour.true_auc('aligned'):.3f}"
    )


def analyse_studies(chosen: argparse.Namespace) -> None:
    """Write analysis.json and report.html of one or more studies."""
    from medviz.study.report import report_page
    from medviz.study.statistics import analyse

    analysed = [(protocol, store, analyse(protocol, store)) for protocol, store in _opened(chosen)]
    chosen.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps([result for _, _, result in analysed], indent=1, allow_nan=False) + "\n"
    (chosen.out / "analysis.json").write_text(text, encoding="utf-8")
    (chosen.out / "report.html").write_text(report_page(analysed), encoding="utf-8")
    _say(f"{chosen.out / 'report.html'} and analysis.json")


def export_studies(chosen: argparse.Namespace) -> None:
    """Write the answers of one or more studies as CSV, and the detection phases as input of iMRMC."""
    from medviz.study.answers import answer_table
    from medviz.study.exports import answers_csv, imrmc_input

    chosen.out.mkdir(parents=True, exist_ok=True)
    for protocol, store in _opened(chosen):
        name = f"{protocol.domain}-{protocol.sha256[:8]}"
        table = answer_table(protocol, store)
        files = {f"answers-{name}.csv": answers_csv(table)}
        if any(task.phase == "detection" for task in protocol.tasks):
            files[f"detection-{name}.imrmc"] = imrmc_input(protocol, table)
        for file, text in files.items():
            (chosen.out / file).write_text(text, encoding="utf-8")
            _say(str(chosen.out / file))


def _opened(chosen: argparse.Namespace) -> list[tuple[Protocol, Store]]:
    if chosen.database and len(chosen.studies) > 1:
        raise InputError("--database belongs to one study; leave it out for several")
    opened = []
    for folder in chosen.studies:
        protocol = read_protocol(folder)
        path = chosen.database or folder / STORE_NAME
        if not path.is_file():
            raise StudyError(f"{path} does not exist; no reader has started")
        opened.append((protocol, Store(path, protocol.sha256)))
    return opened


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
