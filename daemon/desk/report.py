"""The pages by which a detector is chosen: tables, charts and pictures of a comparison, and a table to paste.

Pure but for the files it writes: the figures come in, pages without scripts, network or absolute paths go out.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote
from xml.etree import ElementTree as ET

from daemon.desk import charts
from daemon.desk.comparison import Case, Entry, Row, Sheet, Spread, clearly_best, spread
from daemon.desk.page import document, node, save, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LOCO = ("logical_anomalies", "structural_anomalies")


@dataclass(frozen=True, slots=True)
class _Column:
    """One figure of the table. `better` None: a figure that nobody should be chosen by alone."""

    key: str
    heading: str
    kind: Literal["share", "percent", "time", "milliseconds", "memory"]
    better: Literal["high", "low"] | None


_COLUMNS = (
    _Column("image_auroc", "image AUROC", "share", "high"),
    _Column("pixel_auroc", "pixel AUROC", "share", "high"),
    _Column("aupro", "AUPRO", "share", "high"),
    _Column("true_reject_at_1", "true rejects at\u00a01\u00a0%", "percent", "high"),
    _Column("true_reject_at_5", "true rejects at\u00a05\u00a0%", "percent", "high"),
    _Column("false_reject_rate", "false rejects", "percent", None),
    _Column("escape_rate", "escapes", "percent", None),
    _Column("train_seconds", "training", "time", "low"),
    _Column("latency_ms_p50", "latency p50", "milliseconds", "low"),
    _Column("peak_memory_mb", "memory", "memory", "low"),
)

_PROTOCOL = (
    "Each detector learned from good parts alone. No test image was seen before the last line of training. The "
    "threshold comes from good parts that were held out of training, before any test image was judged."
)
_READING = (
    "Figures are mean ± standard deviation over seeds. A mean is set in bold where it is ahead of every other by more "
    "than both deviations together; with one seed nothing is. The deviation tells of training only: how much so few "
    "test parts can show stands on each category's page. "
    "True rejects at 1 % (5 %) are the share of bad parts rejected by the threshold that rejects at most 1 % (5 %) of "
    "the good test parts. False rejects and escapes are those of the calibrated threshold; either can be bought with "
    "the other, so neither is set in bold. Training is the whole of `inspectd train`, calibration included. Latency is "
    "of one image at a time, from pixels to prediction; memory is the most that `inspectd evaluate` held. "
    "Whoever chooses the best of several detectors by these figures has used the test parts for choosing: expect "
    "slightly less on the line."
)

_STYLE = """
main { max-width: 1180px; margin: 0 auto; padding: 56px 40px 80px; }
h2 { font-size: 23px; font-weight: 350; letter-spacing: -0.005em; margin: 64px 0 4px; }
h3 { font-size: 16px; font-weight: 550; margin: 48px 0 4px; }
.facts, .legend { max-width: none; }
.legend { margin: 28px 0 -6px; font-size: 14px; }
.legend > span { margin-right: 26px; white-space: nowrap; }
a { color: #005a8e; text-decoration: none; border-bottom: 1px solid #b9d6e8; }
a:hover { border-color: #005a8e; }
nav, figcaption { color: #6b727b; font-size: 13.5px; }
nav { margin-bottom: 40px; }
nav a { margin-right: 18px; }
.wide { overflow-x: auto; }
table.stacked td { vertical-align: top; }
table.stacked small { display: block; margin: 0; }
td.failed { color: #b34700; text-align: left; white-space: normal; overflow-wrap: anywhere; }
.chip { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 9px; }
.chart { margin: 18px 0 4px; }
.cases { display: grid; grid-template-columns: repeat(auto-fill, minmax(500px, 1fr)); gap: 26px 28px; margin: 18px 0; }
figure { margin: 0; }
.pair { display: flex; align-items: flex-start; gap: 4px; border-radius: 6px; overflow: hidden; background: #131519; }
.pair img { display: block; min-width: 0; height: auto; }
figcaption { margin-top: 7px; overflow-wrap: anywhere; }
figcaption b { color: #1c2024; font-weight: 550; }
figcaption b.wrong { color: #b34700; }
details { margin: 10px 0; }
summary { cursor: pointer; color: #6b727b; font-size: 13.5px; }
pre { font: 12px/1.6 ui-monospace, "SF Mono", Menlo, Consolas, monospace; background: #f5f6f8; padding: 14px 16px;
  border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; }
footer { margin-top: 72px; padding-top: 16px; }
@media print { main { padding: 0; max-width: none; } .cases figure, tr, .chart { break-inside: avoid; } }
"""


def write(sheets: Sequence[Sheet], machine: Mapping[str, Any], out: Path) -> Path:
    """Write index.html, a page for each category, results.json and results.md into `out`; returns the index.

    Raises:
        OSError: `out` cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    save(out / "index.html", _index(sheets, machine, out))
    for place, sheet in enumerate(sheets):
        save(out / _page(sheet.category), _category(sheets, place, out))
    (out / "results.md").write_text(markdown(sheets), encoding="utf-8")
    content = {"machine": dict(machine), "categories": {sheet.category: _figures(sheet) for sheet in sheets}}
    (out / "results.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return out / "index.html"


def markdown(sheets: Sequence[Sheet]) -> str:
    """The tables of all categories, to paste into a document."""
    lines: list[str] = []
    for sheet in sheets:
        columns, best = _shown(sheet), _best(sheet)
        lines += [f"### {_plain(sheet.category)}", "", _facts(sheet), ""]
        lines += ["| detector | " + " | ".join(column.heading for column in columns) + " | seeds |"]
        lines += ["|---" * (len(columns) + 2) + "|"]
        for row in sheet.rows:
            cells = []
            for column in columns:
                mean, deviation = _cell(row.spread(column.key), column.kind)
                cells.append((f"**{mean}**" if best[column.key] is row else mean) + deviation)
            failed = "".join(f"; failed, {_plain(error)}" for error in row.errors)
            lines.append(f"| {row.entry.label} | {' | '.join(cells)} | {_seeds(row)}{failed} |")
        lines.append("")
    return "\n".join([*lines, _PROTOCOL, "", _READING, ""])


def summary(sheet: Sheet) -> list[tuple[str, ...]]:
    """The most telling columns as text, a heading and a row an entry, for a terminal of 80 columns."""
    keys = ("image_auroc", "aupro", "true_reject_at_1", "false_reject_rate", "escape_rate", "latency_ms_p50")
    columns = [column for column in _COLUMNS if column.key in keys]
    rows = [("", *(column.heading for column in columns), "seeds")]
    for row in sheet.rows:
        first, *others = (_cell(row.spread(column.key), column.kind) for column in columns)
        cells = ["".join(first), *(mean for mean, _ in others)]
        rows.append((row.entry.label, *cells, _seeds(row)))
    return rows


# Pages


def _index(sheets: Sequence[Sheet], machine: Mapping[str, Any], out: Path) -> ET.Element:
    entries = [row.entry for row in sheets[0].rows]
    seeds = max(len(row.results) for row in sheets[0].rows)
    title = f"{_count(len(entries), 'detector')} on {_count(len(sheets), 'category', 'categories')}"
    body = [node("h1", title), node("p", _machine(machine, seeds), class_="facts"), node("p", _PROTOCOL)]
    with charts.drawing():
        if any(row.done for sheet in sheets for row in sheet.rows):
            alt = "Image AUROC and true rejects at 1 % of each detector on each category"
            legend = [node("span", _chip(entry, entries), entry.label) for entry in entries]
            body.append(node("p", *legend, class_="legend"))
            body.append(_chart(charts.overview(sheets), out / "charts" / "overview.svg", out, alt))
            body.append(
                _chart(charts.cost(sheets), out / "charts" / "cost.svg", out, "True rejects at 1 % over latency")
            )
    for sheet in sheets:
        link = node("a", sheet.category, href=quote(_page(sheet.category)))
        body += [node("h2", link), node("p", _facts(sheet), class_="facts"), _table(sheet)]
    body += [node("h2", "How to read this"), node("p", _READING), node("h2", "How it was made")]
    body.append(_made(sheets))
    return _document(title, body)


def _category(sheets: Sequence[Sheet], place: int, out: Path) -> ET.Element:
    sheet = sheets[place]
    entries = [row.entry for row in sheet.rows]
    ways = [("all categories", "index.html")]
    ways += [(f"← {other.category}", _page(other.category)) for other in sheets[max(place - 1, 0) : place]]
    ways += [(f"{other.category} →", _page(other.category)) for other in sheets[place + 1 : place + 2]]
    body = [
        node("nav", *(node("a", text, href=quote(page)) for text, page in ways)),
        node("h1", sheet.category),
        node("p", _facts(sheet), class_="facts"),
        _table(sheet),
    ]
    measured = [row for row in sheet.rows if row.done]
    drawn = out / "charts" / sheet.category
    with charts.drawing():
        if measured:
            body += [node("h2", "What each rejects, and what it costs in good parts"), node("p", _ROC_NOTE)]
            body.append(_chart(charts.roc(measured, entries), drawn / "roc.svg", out, "ROC curves of all detectors"))
            body += [node("h2", "What so few parts can show"), _intervals(measured, entries)]
            if len(measured[0].done[0]["present"]) > 1:
                body += [node("h2", "Which defects"), _defects(measured, entries)]
            body += [node("h2", "Scores, and the parts behind them"), node("p", _SCORES_NOTE)]
        for row in measured:
            body += _portrait(row, sheet.cases.get(row.entry.label, ()), entries, drawn, out)
    return _document(sheet.category, body)


_ROC_NOTE = (
    "The curves are those of the first seed. The left panel is the part of the curve that a line can afford. A dot is "
    "what the calibrated threshold gave: its place to the right of the wanted share of false rejects is chance or a "
    "change between held-out and test parts."
)
_INTERVALS_NOTE = (
    "First seed, with 95 % intervals over the test parts. Where scores are wholly apart the first three intervals have "
    "no width, however few the parts are: trust those of false rejects and escapes. The best F1 saw the answers; "
    "PRO per image is what the papers on reverse distillation print as AUPRO, and is not comparable with it."
)
_SCORES_NOTE = (
    "Scores of the first seed, in multiples of the threshold; each row has a height of its own. What lies on the wrong "
    "side is orange: good parts beyond the threshold, bad parts before it. Below are the parts it judged worst, and "
    "some that it judged best: what the detector saw, beside the truth."
)


def _portrait(
    row: Row, cases: Sequence[Case] | str, entries: Sequence[Entry], drawn: Path, out: Path
) -> Iterator[ET.Element]:
    """One detector: its scores and its telling parts."""
    figures, label = row.done[0], row.entry.label
    yield node("h3", _chip(row.entry, entries), _name(row.entry))
    yield _chart(charts.scores(figures), drawn / f"{label}.svg", out, f"Scores of {label} by kind of part")
    if isinstance(cases, str):
        yield node("p", f"There are no pictures: {cases}", class_="note")
        return
    yield node("div", *(_figure(case, figures["threshold"]) for case in cases), class_="cases")


def _figure(case: Case, threshold: float) -> ET.Element:
    good = case.defect == "good"
    said = {True: "rightly passed" if good else "rightly rejected", False: "false reject" if good else "escape"}
    verdict = node("b", said[case.right], class_="right" if case.right else "wrong")
    ratio = f" · {case.score / threshold:.2f} × threshold" if threshold > 0 else ""
    pictures = [
        node("img", src=quote(path.as_posix()), alt=f"{what} of {case.part}", loading="lazy")
        for path, what in ((case.truth, "truth"), (case.overlay, "anomaly map"))
    ]
    caption = node("figcaption", verdict, f" · {case.defect} · {case.part}{ratio}")
    return node("figure", node("div", *pictures, class_="pair"), caption)


def _table(sheet: Sheet) -> ET.Element:
    columns, best, entries = _shown(sheet), _best(sheet), [row.entry for row in sheet.rows]
    rows = [node("tr", node("th", ""), *(node("th", column.heading) for column in columns), node("th", "seeds"))]
    for row in sheet.rows:
        cells = [node("td", _chip(row.entry, entries), row.entry.label)]
        if row.done:
            for column in columns:
                mean, deviation = _cell(row.spread(column.key), column.kind)
                figure = node("strong", mean) if best[column.key] is row else mean
                cells.append(node("td", figure, *([node("small", deviation)] if deviation else [])))
            cells.append(node("td", _seeds(row)))
        wide = str(len(columns) + 1)
        failed = [node("td", f"failed, {error}", class_="failed", colspan=wide) for error in row.errors]
        rows.append(node("tr", *cells, *([] if row.done else failed[:1])))
        rows += [node("tr", node("td"), cell) for cell in failed[0 if row.done else 1 :]]
    return node("div", node("table", *rows, class_="stacked"), class_="wide")


def _intervals(measured: Sequence[Row], entries: Sequence[Entry]) -> ET.Element:
    headings = (
        "",
        "image AUROC",
        "true rejects at 1 %",
        "true rejects at 5 %",
        "false rejects",
        "escapes",
        "α carried",
        "F1, best threshold",
        "PRO per image",
    )
    rows = [node("tr", *(node("th", heading) for heading in headings))]
    for row in measured:
        found = row.done[0]
        cells: list[list[ET.Element | str]] = [
            _span(found["image_auroc"], found["image_auroc_interval"], "share"),
            _span(found["true_reject_at_1"], found["true_reject_at_1_interval"], "percent"),
            _span(found["true_reject_at_5"], found["true_reject_at_5_interval"], "percent"),
            _span(found["false_reject_rate"], found["false_reject_interval"], "percent"),
            _span(found["escape_rate"], found["escape_interval"], "percent"),
            [f"{100 * found['alpha_carried']:.1f} %", node("small", f"of {100 * found['alpha']:.3g} % asked")],
            [f"{found['f1_max']:.3f}"],
            ["–" if found["pro_per_image_rd"] is None else f"{found['pro_per_image_rd']:.3f}"],
        ]
        name = node("td", _chip(row.entry, entries), row.entry.label)
        rows.append(node("tr", name, *(node("td", *cell) for cell in cells)))
    note = node("p", _INTERVALS_NOTE, class_="note")
    return node("div", note, node("table", *rows), class_="wide")


def _defects(measured: Sequence[Row], entries: Sequence[Entry]) -> ET.Element:
    present: Mapping[str, int] = measured[0].done[0]["present"]
    headings = [node("th", kind, node("br"), node("small", f"{n} parts")) for kind, n in present.items()]
    rows = [node("tr", node("th", ""), *headings, node("th", "mean of kinds"))]
    for row in measured:
        cells = [node("td", _chip(row.entry, entries), row.entry.label)]
        for kind in present:
            mean, deviation = _cell(row.spread(f"image_auroc_by_defect/{kind}"), "share")
            escaped = spread(figures["missed"][kind] / figures["present"][kind] for figures in row.done)
            share = "" if escaped is None else f"{100 * escaped.mean:.0f} % escape"
            cells.append(node("td", mean, node("small", deviation), node("br"), node("small", share)))
        mean, deviation = _cell(row.spread("image_auroc_mean"), "share")
        rows.append(node("tr", *cells, node("td", mean, node("small", deviation))))
    note = node("p", "Image AUROC of each defect against the good parts, and the share that passes.", class_="note")
    return node("div", note, node("table", *rows), class_="wide")


def _made(sheets: Sequence[Sheet]) -> ET.Element:
    """The command lines of every run, so that each can be repeated alone."""
    blocks = []
    for sheet in sheets:
        done = [figures for row in sheet.rows for figures in row.done]
        lines = [command for figures in done for command in figures["run"]["commands"]]
        blocks.append(node("details", node("summary", sheet.category), node("pre", "\n".join(lines))))
    return node("div", *blocks)


def _chart(figure: "Figure", path: Path, out: Path, alt: str) -> ET.Element:
    """Write the chart and return its place in the page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg(figure), encoding="utf-8", errors="replace")
    source = quote(path.relative_to(out).as_posix())
    return node("img", src=source, alt=alt, class_="chart", width=str(round(96 * figure.get_figwidth())))


def _document(title: str, body: Iterable[ET.Element]) -> ET.Element:
    footer = node("footer", f"Made by inspectd on {datetime.now(UTC).date().isoformat()}.")
    return document(title, [*body, footer], _STYLE)


def _page(category: str) -> str:
    return f"{category}.html" if category != "index" else "index_.html"


# Words and figures


def _shown(sheet: Sheet) -> list[_Column]:
    """The columns that say something of this category: pixel figures need masks, LOCO is known by its two kinds."""
    columns = [column for column in _COLUMNS if any(row.spread(column.key) for row in sheet.rows)]
    kinds = [kind for kind in _LOCO if any(row.spread(f"image_auroc_by_defect/{kind}") for row in sheet.rows)]
    if not columns or not kinds:
        return columns
    names = [(f"image_auroc_by_defect/{kind}", kind.removesuffix("_anomalies")) for kind in kinds]
    split = [_Column(key, name, "share", "high") for key, name in (*names, ("image_auroc_mean", "mean of kinds"))]
    return [columns[0], *split, *columns[1:]]


def _best(sheet: Sheet) -> dict[str, Row | None]:
    """The clear winner of each column, where there is one."""
    shown = _shown(sheet)
    return {c.key: clearly_best(sheet.rows, c.key, c.better) if c.better else None for c in shown}


def _cell(found: Spread | None, kind: str) -> tuple[str, str]:
    """Mean and deviation as text, the latter with its sign, or empty."""
    if found is None:
        return "–", ""
    match kind:
        case "share":
            factor, digits, unit = 1.0, 3, ""
        case "percent":
            factor, digits, unit = 100.0, 1, " %"
        case "time":
            factor, digits, unit = next(
                scale
                for limit, scale in ((100, (1, 0, " s")), (6000, (1 / 60, 0, " min")), (math.inf, (1 / 3600, 1, " h")))
                if found.mean < limit
            )
        case "milliseconds":
            factor, digits, unit = 1.0, 1 if found.mean < 10 else 0, " ms"  # noqa: PLR2004 -- two figures are enough
        case _:
            factor, digits, unit = (1.0, 0, " MB") if found.mean < 1000 else (0.001, 1, " GB")  # noqa: PLR2004
    deviation = "" if found.sd is None else f" ± {factor * found.sd:.{digits}f}"
    return f"{factor * found.mean:.{digits}f}{unit}", deviation


def _span(value: float, interval: Sequence[float | None], kind: str) -> list[ET.Element | str]:
    low, high = interval
    if low is None or high is None or math.isnan(low + high):
        return [_cell(Spread(value, None, 1), kind)[0]]
    factor, digits = (1, 3) if kind == "share" else (100, 1)
    text = _cell(Spread(value, None, 1), kind)[0]
    return [text, node("small", f"{factor * low:.{digits}f} … {factor * high:.{digits}f}")]


def _facts(sheet: Sheet) -> str:
    done = [figures for row in sheet.rows for figures in row.done]
    if not done:
        return "No run has finished."
    found, run = done[0], done[0]["run"]
    return (
        f"{run['learned']} good parts to learn from · {len(run['calibration_scores'])} held-out good parts for the "
        f"threshold · {found['n_good']} good and {found['n_defect']} bad parts to test"
    )


def _machine(machine: Mapping[str, Any], seeds: int) -> str:
    return (
        f"{_count(seeds, 'seed')} · {machine['processor']}, {_count(machine['cores'], 'core')}, {machine['device']} · "
        f"inspectd {machine['inspectd']}, torch {machine['torch']}, Python {machine['python']} · {machine['platform']}"
    )


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _seeds(row: Row) -> str:
    return str(len(row.done)) if not row.errors else f"{len(row.done)} of {len(row.results)}"


def _name(entry: Entry) -> str:
    """Label, detector and options, as they were asked for."""
    detector = "" if entry.label == entry.detector else f" = {entry.detector}"
    return f"{entry.label}{detector} {' '.join(entry.options)}".rstrip()


def _plain(text: str) -> str:
    """Text that keeps within its cell of a Markdown table."""
    for letter in "\\`*_<>|[]":
        text = text.replace(letter, f"\\{letter}")
    return " ".join(text.split())


def _chip(entry: Entry, entries: Sequence[Entry]) -> ET.Element:
    return node("span", class_="chip", style=f"background:{charts.colour_of(entry, entries)}")


def _figures(sheet: Sheet) -> list[dict[str, Any]]:
    """The rows as JSON, without the scores of single parts, which stand in runs/."""
    rows = []
    for row in sheet.rows:
        runs = []
        for result in row.results:
            figures = {} if result.figures is None else {k: v for k, v in result.figures.items() if k != "parts"}
            if figures:
                figures["run"] = {k: v for k, v in figures["run"].items() if k != "calibration_scores"}
            runs.append({"seed": result.seed, "error": result.error or None, **figures})
        spreads = {column.key: found and asdict(found) for column in _COLUMNS for found in [row.spread(column.key)]}
        rows.append({**asdict(row.entry), "summary": spreads, "runs": runs})
    return rows
