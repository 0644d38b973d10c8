"""Tables from the JSON reports, `python -m train report`: a short one a domain for the README, all for the app.

Nothing in a table is typed by hand. A figure that a report does not hold reads "not computed".
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from medviz.errors import InputError
from medviz.generation.guidance import Guidance
from medviz.limits import DEFAULT_GUIDANCE_SCALE
from medviz.models.card import CARD_NAME, folder_card
from medviz.models.manifest import MANIFEST_NAME, Manifest, read_manifest
from medviz.results import TABLES_NAME
from train import shipping
from train.evaluate import history

FORMAT_VERSION = 1
NOT_COMPUTED = "not computed"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"

logger = logging.getLogger(__name__)


@dataclass
class ReportConfig:
    """Options of the report stage."""

    reports: str = "assets/reports"
    """Folder of the JSON files that the evaluations wrote."""
    models: str = "assets/models"
    """Folder of the model folders, whose cards show what was measured on them."""
    readme: str = "README.md"
    """File whose text between the results markers is replaced."""
    check: bool = False
    """Write nothing; fail when the tables are not those of the reports."""


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """The reports in a folder, by file name; other JSON files are left alone.

    Raises InputError for a file that is no JSON, or a report of another format version.
    """
    reports = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is no readable JSON: {error}") from error
        if not isinstance(content, dict) or "figures" not in content or "format_version" not in content:
            continue
        if content["format_version"] != FORMAT_VERSION:
            raise InputError(f"{path} has format {content['format_version']}, this program reads {FORMAT_VERSION}")
        reports.append({**content, "file": path.name})
    return reports


Shipped = Mapping[str, Manifest]
"""Domain -> the manifest of its model folder; a report that was measured on other files says so."""


def tables(reports: Sequence[Mapping[str, Any]], shipped: Shipped | None = None) -> str:
    """Markdown of all reports, one section each, but of those that say they are for choosing; or that there is none."""
    reports = [report for report in reports if report.get("tables", True)]
    if not reports:
        return "No evaluation has been run yet: every figure is not computed."
    return "\n\n".join(section(report, shipped) for report in reports)


def summary(reports: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of a short table a domain: the figures that decide, in as many steps as the longest evaluation takes
    and, for the default adapter, in those of the others; or that there is none."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for report in reports:
        if report.get("kind") == "evaluation" and report.get("tables", True):
            found.setdefault(report["domain"], []).append(report)
    return "\n\n".join(_summary(measured) for measured in found.values()) or tables([])


def _summary(measured: Sequence[Mapping[str, Any]]) -> str:
    main, *others = sorted(measured, key=lambda report: -report["settings"]["steps"])
    default = main.get("default_adapter")
    in_steps = [f"aligned, {other['settings']['steps']} steps" for other in others]
    rows = []
    for figure in main["figures"]:
        if figure.get("headline") and figure["name"].startswith((*history.DECIDING, "judge_accuracy_grid")):
            *cells, n = _row(figure, [default])
            rows.append([*cells, *(_aligned(other, figure["name"], default) for other in others), n])
    header = (f"{main['settings']['steps']} steps", "real images", "baseline", "aligned", "change", *in_steps, "n")
    split = _text(main["settings"].get("split", ""))
    made = f"Images of the {split} split; brackets hold 95 % intervals, changes are paired by prompt and seed."
    return "\n".join([f"### {_heading(main)}", "", made, "", *_table_lines(header, rows)])


def _aligned(report: Mapping[str, Any], name: str, adapter: str | None) -> str:
    for figure in report["figures"]:
        if figure["name"] == name:
            return estimate_text(figure["adapters"].get(adapter, {}).get("value"))
    return NOT_COMPUTED


def section(report: Mapping[str, Any], shipped: Shipped | None = None) -> str:
    """One report as a heading, what it rests on, and its headline figures: for its default adapter, then for the others
    that were measured, or, where it compares several arms, for all of them. Figures that name a table of their own
    stand in it, and beneath are the tables of what was taken for what."""
    if report.get("arms"):
        return "\n".join([f"### {_heading(report)}", "", _basis(report, shipped or {}), *_arm_tables(report)])
    adapters = _adapters(report)
    changed = [
        cell for name in adapters for cell in ("aligned" if name is None else f"aligned (`{_text(name)}`)", "change")
    ]
    shown = [figure for figure in report["figures"] if figure.get("headline") or figure.get("table")]
    lines: list[str] = []
    for table in dict.fromkeys(figure.get("table") or "" for figure in shown):
        header = (_text(table) or "Figure", "real images", "baseline", *changed, "n")
        rows = [_row(figure, adapters) for figure in shown if (figure.get("table") or "") == table]
        lines += ["", *_table_lines(header, rows)]
    return "\n".join([f"### {_heading(report)}", "", _basis(report, shipped or {}), *lines, *_confusion_lines(report)])


def _confusion_lines(report: Mapping[str, Any]) -> list[str]:
    """Lines of a table a group of heads that exclude each other: what was asked for by row, what the judge takes it for
    by column, as percentages of the row for real images and for the default adapter's pictures."""
    lines: list[str] = []
    for found in report.get("confusions", ()):
        names = ["real", report.get("default_adapter") or "baseline"]
        counts = [found["counts"][name] for name in names if name in found["counts"]]
        heads = [_text(head).replace("_", " ") for head in found["heads"]]
        header = (f"{_text(found['group']).capitalize()} asked for, taken for (%: real images / pictures)", *heads, "n")
        rows = []
        for number, head in enumerate(heads):
            shares = [[100 * c / max(sum(table[number]), 1) for c in table[number]] for table in counts]
            cells = [" / ".join(f"{share:.0f}" for share in pair) for pair in zip(*shares, strict=True)]
            rows.append((head, *cells, str(sum(counts[-1][number]))))
        lines += ["", *_table_lines(header, rows)]
    return lines


def _table_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_line(header), "|" + " --- |" * len(header), *(_line(row) for row in rows)]


def histories(folder: Path) -> list[str]:
    """A table a domain of every model that was measured like its newest one, oldest first: `train.evaluate.history`."""
    found = []
    for path in sorted(folder.glob("history-*.json")):
        entries = history.read(path)
        shown = history.alike(entries, entries[-1]) if entries else []
        if len(shown) < 2:
            continue
        figures = shown[-1]["figures"]
        labels = [_text(figure["label"]) + _better(figure) for figure in figures.values()]
        header = ("Models, baseline → aligned", *labels)
        rows = []
        for entry in shown:
            cells = [_then_and_now(entry["figures"].get(name)) for name in figures]
            rows.append((f"`{entry['models'][:12]}`, {entry['preset']}, guidance {_text(entry['guidance'])}", *cells))
        domain = path.stem.removeprefix("history-").capitalize()
        how = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown[-1]["settings"].items())
        lines = [f"### {domain}: every model that was measured like the newest", "", f"{how}.", ""]
        found.append("\n".join([*lines, *_table_lines(header, rows)]))
    return found


def _then_and_now(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return NOT_COMPUTED
    values = [figure["baseline"], *([figure["aligned"]] if figure["aligned"] else [])]
    return " → ".join(NOT_COMPUTED if v is None else estimate_text({"value": v["value"]}) for v in values)


def _adapters(report: Mapping[str, Any]) -> list[str | None]:
    """The default adapter, None where there is none, then the others that any figure names."""
    named = [name for figure in report["figures"] for name in figure.get("adapters", {})]
    return list(dict.fromkeys([report.get("default_adapter"), *named]))


def _heading(report: Mapping[str, Any]) -> str:
    title = report.get("title") or f"{report.get('domain', '')} {report.get('kind', '')}".strip().capitalize()
    return _text(title)


def _arm_tables(report: Mapping[str, Any]) -> list[str]:
    """Lines of one table a group of headline figures, with all arms; the others are held against the first.

    A group whose figures name tables has one for each of these. `rows` of the report says whether arms or figures are
    the rows.
    """
    shown = [figure for figure in report["figures"] if figure.get("headline")]
    lines: list[str] = []
    for group in dict.fromkeys(map(_table, shown)):
        figures = [figure for figure in shown if _table(figure) == group]
        with_real = any(figure.get("real") is not None for figure in figures)
        names = [*(["real images"] if with_real else []), *(_text(arm["label"]) for arm in report["arms"])]
        cells = [_arm_cells(figure, report["arms"], with_real) for figure in figures]
        labels = [_text(figure["label"]) + _better(figure) for figure in figures]
        if report.get("rows") == "arms":
            header = [
                group,
                # a cost is counted, not estimated from a number of anything
                *(
                    name if f["group"] == "cost" else f"{name}, n {_n(f)}"
                    for name, f in zip(labels, figures, strict=True)
                ),
            ]
            rows = [[name, *column] for name, column in zip(names, zip(*cells, strict=True), strict=True)]
        else:
            header = [group, *names, "n"]
            rows = [[label, *row, _n(f)] for label, row, f in zip(labels, cells, figures, strict=True)]
        lines += ["", *_table_lines(header, rows)]
    return lines


def _table(figure: Mapping[str, Any]) -> str:
    return _text(figure.get("table") or str(figure["group"]).capitalize())


def _arm_cells(figure: Mapping[str, Any], arms: Sequence[Mapping[str, Any]], with_real: bool) -> list[str]:
    """A figure for real images (where the table has them), for the first arm, and for the others with their change."""
    real = "" if figure.get("real") is None else estimate_text(figure["real"])
    cells = [*([real] if with_real else []), estimate_text(figure.get("baseline"))]
    for arm in arms[1:]:
        mine = figure.get("adapters", {}).get(arm["name"]) or {}
        value, change = estimate_text(mine.get("value")), estimate_text(mine.get("change"))
        if figure.get("change_kind") == "ratio" and change != NOT_COMPUTED:
            change = f"× {change}"
        # A figure such as a cost has no change to speak of: null in the report, and nothing in the cell.
        cells.append(value if mine.get("change") is None else f"{value}; Δ {change}")
    return cells


def _basis(report: Mapping[str, Any], shipped: Shipped) -> str:
    settings = report.get("settings", {})
    parts = [f"Made by `{_text(report.get('command', NOT_COMPUTED))}` (assets/reports/{report['file']})"]
    if settings:
        parts.append(", ".join(f"{_text(name).replace('_', ' ')} {_text(value)}" for name, value in settings.items()))
    digest = report.get("models", {}).get("sha256")
    if digest or not report.get("arms"):
        named = f"model files sha256 `{_text(digest)[:12] if digest else NOT_COMPUTED}`"
        manifest = shipped.get(str(report.get("domain"))) if digest else None
        parts.append(named + (f", {_how_shipped(report, manifest)}" if manifest else ""))
    parts.append(_text(report.get("intervals", "brackets hold 95 % intervals, changes are paired by prompt and seed")))
    return "; ".join(parts) + "."


def _how_shipped(report: Mapping[str, Any], manifest: Manifest) -> str:
    if report["models"]["sha256"] == manifest.sha256:
        return "those that ship"
    return "of which all that it rests on ships" if rests_on_these(report, manifest) else "not those that ship"


def rests_on_these(report: Mapping[str, Any], manifest: Manifest) -> bool:
    """Whether an evaluation was measured on these files, or differs in none that its figures rest on."""
    from train.evaluate.generated import few_steps_of, rests_on  # heavy

    models = report.get("models", {})
    if models.get("sha256") == manifest.sha256:
        return True
    if not {"eyes", "weights"} <= models.keys():
        return False
    guidance = Guidance.of_recipe(manifest.recipe, manifest.domain, DEFAULT_GUIDANCE_SCALE)
    few_steps = few_steps_of(manifest, report["settings"].get("steps", 0), guidance)
    rows = {row: row if row in manifest.adapters else None for row in models["weights"]}
    files = {**(manifest.hub.files if manifest.hub else {}), **manifest.files}
    # a report of an earlier version names no reward
    return all(models.get(part, digest) == digest for part, digest in rests_on(files, files, rows, few_steps).items())


def _row(figure: Mapping[str, Any], adapters: Sequence[str | None]) -> tuple[str, ...]:
    cells = []
    for adapter in adapters:
        mine = figure.get("adapters", {}).get(adapter) or {}
        change = estimate_text(mine.get("change"))
        if figure.get("change_kind") == "ratio" and change != NOT_COMPUTED:
            change = f"× {change}"
        cells += [estimate_text(mine.get("value")), change]
    # Where no real image could have such a figure (a grid prompt has no photograph), the cell is empty, not missing.
    real = "" if figure.get("real") is None else estimate_text(figure["real"])
    return (_text(figure["label"]) + _better(figure), real, estimate_text(figure.get("baseline")), *cells, _n(figure))


def _better(figure: Mapping[str, Any]) -> str:
    return "" if figure.get("higher_is_better") is None else " ↑" if figure["higher_is_better"] else " ↓"


def _n(figure: Mapping[str, Any]) -> str:
    """The n of the first arm that has one, else of the others."""
    estimates = [figure.get("baseline"), *(arm.get("value") for arm in figure.get("adapters", {}).values())]
    found = [estimate["n"] for estimate in estimates if estimate and estimate.get("n")]
    return str(found[0]) if found else NOT_COMPUTED


def estimate_text(estimate: Mapping[str, Any] | None) -> str:
    """An estimate as "0.71 [0.68, 0.74]", without brackets where it has no interval, or "not computed"."""
    if estimate is None or not _is_number(estimate.get("value")):
        return NOT_COMPUTED
    value, low, high = (estimate.get(key) for key in ("value", "low", "high"))
    if not _is_number(low) or not _is_number(high):
        return f"{value:.3g}"
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"


def replaced(text: str, content: str) -> str:
    """`text` with what stands between the results markers replaced by `content`.

    Raises InputError unless each marker stands in the text exactly once, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise InputError(f"the file needs one {BEGIN} and, after it, one {END} to write results between")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{content}\n{END}{rest.split(END)[1]}"


def run(config: ReportConfig) -> bool:
    """Bring the README's short tables, all tables for the app and those of the model cards up to date; returns whether
    they already were.

    Raises InputError for an unreadable report or README, and with `check` when the tables are out of date.
    """
    path = Path(config.readme)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    reports = read_reports(Path(config.reports))
    folders = [place.parent for place in sorted(Path(config.models).glob(f"*/{MANIFEST_NAME}"))]
    shipped = {manifest.domain: manifest for manifest in map(read_manifest, folders)}
    content = "\n\n".join([tables(reports, shipped), *histories(Path(config.reports))])
    wanted = {path: replaced(text, summary(reports)), Path(config.reports) / TABLES_NAME: content + "\n"}
    wanted |= {folder / CARD_NAME: _card(folder, reports) for folder in folders}
    stale = [file for file, new in wanted.items() if not file.is_file() or file.read_text(encoding="utf-8") != new]
    if not stale:
        logger.info("the tables of %s are up to date", ", ".join(map(str, wanted)))
        return True
    if config.check:
        raise InputError(
            f"{stale[0]} does not show the reports in {config.reports}: run `python -m train report --ship`"
        )
    for file in stale:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(wanted[file], encoding="utf-8")
        logger.info("wrote the results into %s", file)
    return False


def _card(folder: Path, reports: Sequence[Mapping[str, Any]]) -> str:
    """A model folder's card with the tables of its evaluations: of files that it has, drawn as it draws."""
    from train.evaluate.generated import told  # heavy

    manifest = read_manifest(folder)
    guidance = Guidance.of_recipe(manifest.recipe, manifest.domain, DEFAULT_GUIDANCE_SCALE)
    measured = [
        section(report, {manifest.domain: manifest})
        for report in reports
        if report.get("kind") == "evaluation"
        and report.get("domain") == manifest.domain
        and rests_on_these(report, manifest)
        and (how := report["settings"]).get("guidance_scale") == told(manifest, how.get("steps", 0), guidance)
    ]
    return folder_card(folder, "\n\n".join(measured) or None)


def main(arguments: list[str]) -> None:
    """`python -m train report [--reports FOLDER] [--readme FILE] [--check] [--ship]`."""
    config = tyro.cli(ReportConfig, args=arguments, prog="python -m train report")
    run(config if config.check else _placed(config))


def _placed(config: ReportConfig) -> ReportConfig:
    """The same where `train.shipping` places it, with a README to write to."""
    readme = shipping.place(config.readme)
    if not readme.exists() and Path(config.readme).is_file():
        readme.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(config.readme, readme)
    reports, models = (str(shipping.place(path)) for path in (config.reports, config.models))
    return replace(config, readme=str(readme), reports=reports, models=models)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
