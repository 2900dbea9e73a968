"""The calibration card: one page on paper, by which an engineer answers for a threshold.

Pure but for the file it writes: a calibration comes in, a page without scripts, links or pictures from elsewhere goes
out, and the same page for the same calibration.
"""

from pathlib import Path
from xml.etree import ElementTree as ET

from calibration.calibration import Calibration, expectation, promise, share, shortage, stated, with_alpha
from calibration.quantile import smallest_sample
from calibration.threshold import Method
from daemon.desk import charts
from daemon.desk.page import document, node, save, svg

ALPHAS = (0.1, 0.05, 0.02, 0.01, 0.005, 0.001)
"""Of which the card says what they would have given."""

_STYLE = """
@page { size: A4 portrait; margin: 11mm 15mm 9mm; }
body { font-size: 12px; line-height: 1.42; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
main { max-width: 760px; min-height: 270mm; margin: 0 auto; padding: 40px; display: flex; flex-direction: column; }
header { display: flex; justify-content: space-between; color: #6b727b; border-bottom: 2px solid #1c2024;
  padding-bottom: 6px; letter-spacing: 0.02em; }
h1 { font-size: 24px; font-weight: 400; margin: 10px 0 5px; overflow-wrap: anywhere; }
h2 { font-size: 12px; font-weight: 620; margin: 0 0 2px; }
code { font: 10.5px/1.4 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.promise { font-size: 18px; line-height: 1.3; margin: 0 0 4px; max-width: none; }
.facts { font-size: 12px; margin: 0; overflow-wrap: anywhere; }
.banner { border: 2px solid #b34700; border-left-width: 12px; background: #fdf1e8; color: #8a3600; padding: 7px 14px;
  margin: 9px 0 0; max-width: none; font-size: 12.5px; }
.banner strong { display: block; font-size: 17px; font-weight: 680; line-height: 1.3; }
.columns { display: grid; grid-template-columns: 1fr 1fr; gap: 28px; align-items: start; }
.columns.below { grid-template-columns: 5fr 3fr; }
main > .columns, main > h2, .sign { margin-top: auto; padding-top: 9px; }
table { font-size: 11.5px; line-height: 1.38; margin: 0; }
th { padding: 3px 8px; }
td { padding: 2px 8px; }
.listed td { text-align: left; white-space: normal; vertical-align: top; overflow-wrap: anywhere; }
.listed td:first-child { color: #6b727b; white-space: nowrap; width: 1%; padding-right: 12px; }
.listed small { display: block; margin: 0; color: #6b727b; font-size: 10.5px; line-height: 1.35; }
.what-if th:not(:last-child), .what-if td:not(:last-child) { padding-right: 3px; }
.what-if th:not(:first-child), .what-if td:not(:first-child) { padding-left: 3px; }
.what-if td:nth-child(2), .what-if th:nth-child(2) { text-align: left; }
.what-if .chosen td { font-weight: 680; }
.sign div { display: grid; grid-template-columns: 5fr 3fr 6fr; gap: 26px; }
.sign span { border-top: 1px solid #1c2024; margin-top: 38px; padding-top: 3px; color: #6b727b; font-size: 11px; }
.sign p { margin: 0; }
@media print { main { max-width: none; padding: 0; } }
"""


def write(calibration: Calibration, path: Path, *, model_name: str) -> Path:
    """Write the card of a calibration; returns its path.

    Raises:
        OSError: It cannot be written.
    """
    save(path, compose(calibration, model_name=model_name))
    return path


def compose(calibration: Calibration, *, model_name: str) -> ET.Element:
    """Make the card of a calibration, one A4 page when printed."""
    made = calibration.provenance
    by = f" by {made.made_by}" if made.made_by else ""
    sentence = promise(calibration)
    above = " (orange: above the threshold)" if calibration.scores[-1] > calibration.threshold else ""
    curve = "; the curve is the distribution fitted to them" if calibration.tail else ""
    body = [
        node("header", node("span", "Calibration card"), node("span", "calibration ", node("code", calibration.id))),
        node("h1", model_name),
        node("p", f"{sentence[0].upper()}{sentence[1:]}.", class_="promise"),
        node(
            "p",
            f"While parts, light and camera stay as they were. Made {made.made_at:%Y-%m-%d %H:%M} UTC{by}.",
            class_="facts",
        ),
        *_banner(calibration),
        node("div", _threshold(calibration), _origin(calibration), class_="columns"),
        node("h2", f"Scores of the good parts{above}{curve}"),
        _chart(calibration),
        node("div", _what_if(calibration), _grounds(calibration), class_="columns below"),
        node(
            "div",
            node("p", f"I have read this card and release the threshold {calibration.threshold:.6g} for the line."),
            node("div", *(node("span", line) for line in ("Name", "Date", "Signature"))),
            class_="sign",
        ),
    ]
    return document(f"Calibration {calibration.id} of {model_name}", body, _STYLE)


def _banner(calibration: Calibration) -> list[ET.Element]:
    missing = shortage(calibration)
    if not missing:
        return []
    more = smallest_sample(calibration.alpha) - calibration.n_effective
    cure = f" Add {more} good parts and calibrate again." if more > 0 else ""
    heading = node("strong", f"No promise of α = {stated(calibration.alpha)}")
    return [node("p", heading, f"{missing[0].upper()}{missing[1:]}.{cure}", class_="banner")]


def _threshold(calibration: Calibration) -> ET.Element:
    beyond = "" if calibration.threshold == calibration.scores[calibration.rank - 1] else "above "
    place = f"{beyond}score {calibration.rank} of {calibration.good_parts}, ascending"
    asked = stated(calibration.confidence)
    rows = [_row("Threshold", node("strong", f"{calibration.threshold:.6g}"), node("small", place))]
    if calibration.fail_alpha is not None:
        fails = f"α = {stated(calibration.fail_alpha)}, {calibration.fail_method}"
        band = f"up to {calibration.fail_threshold:.6g}, above that FAIL"
        none = "no band: so few parts give the same threshold again"
        rows.append(
            _row(
                "Uncertain", band if calibration.fail_threshold > calibration.threshold else none, node("small", fails)
            )
        )
    rows += [
        _row("α", f"{stated(calibration.alpha)} asked, {share(calibration.alpha_carried)} carried"),
        _row("Confidence", asked if calibration.method is Method.tolerance else f"on average only; {asked} asked"),
        _row("Method", calibration.method, node("small", calibration.why)),
        _row("False rejects", expectation(calibration)),
    ]
    return node("table", *rows, class_="listed")


def _origin(calibration: Calibration) -> ET.Element:
    made = calibration.provenance
    groups = len(set(calibration.groups))
    independent = f"in {groups} groups" if groups else "each part stands for itself"
    rows = [
        _row("Good parts", f"{calibration.good_parts}"),
        _row("Effective n", f"{calibration.n_effective}", node("small", independent)),
        _row("Data sha256", node("code", made.data_sha256)),
        _row("Model", node("code", made.model), node("small", "weights, preprocessing and scoring")),
        _row("Engine", made.engine or "not recorded", *([node("small", made.parity)] if made.parity else [])),
        _row("Regions", node("code", made.regions) if made.regions else "none"),
        _row("Framing", node("code", made.framing) if made.framing else "none"),
    ]
    return node("table", *rows, class_="listed")


def _what_if(calibration: Calibration) -> ET.Element:
    """Thresholds that the same scores would give for other alphas."""
    headings = ("α", "method", "threshold", "× this", "expected false rejects", "90 % of such calibrations")
    rows = [node("tr", *(node("th", heading) for heading in headings))]
    for alpha in sorted({*ALPHAS, calibration.alpha}, reverse=True):
        chosen = {"class_": "chosen"} if alpha == calibration.alpha else {}
        other = with_alpha(calibration, alpha)
        if other is None:
            cells = [f"{calibration.asked or ''}", "none", "–", "–", "–"]
        else:
            low, high = other.false_reject_interval
            most = "at most " if other.method in {Method.tail, Method.quantile} else ""
            cells = [
                other.method.value,
                f"{other.threshold:.6g}",
                f"{other.threshold / calibration.threshold:.3f}",
                f"{most}{share(other.expected_false_rejects)}",
                f"{share(low).removesuffix(' %')} … {share(high)}",
            ]
        rows.append(node("tr", *(node("td", cell) for cell in (stated(alpha), *cells)), **chosen))
    return node("div", node("h2", "What another α would give"), node("table", *rows), class_="what-if")


def _grounds(calibration: Calibration) -> ET.Element:
    """What must be true for the promise to hold, what kind of promise it is, and what it leaves open."""
    alike = ""
    if calibration.n_effective < calibration.good_parts:
        alike = f"; parts of a group are alike, so that they count as {calibration.n_effective}"
    match calibration.method:
        case Method.tolerance:
            kind = (
                "The promise follows from the order of the scores, whatever their distribution: of 100 calibrations "
                f"like this one at least {100 * calibration.confidence:g} keep it."
            )
        case Method.conformal:
            kind = (
                "The promise follows from the order of the scores, whatever their distribution, but on average over "
                "calibrations: this one may reject more, as its 90 % interval shows."
            )
        case Method.tail:
            kind = (
                "The threshold lies where an extreme-value distribution, fitted to the scores with caution, puts it: "
                "if good parts do not follow that, no more holds than the α carried."
            )
        case Method.largest:
            kind = (
                "So few parts tell nothing of what lies above them, so the threshold is the largest score that "
                "counts, and no more holds than the α carried."
            )
        case _:  # an interpolated quantile
            kind = (
                "The threshold is interpolated between scores, which is always too low for so many parts: no more "
                "holds than the α carried."
            )
    sentences = [
        f"The good parts that were scored stand for those to come, and none of them trained the model{alike}.",
        kind,
        "Nothing is said of bad parts: how many of them escape can only be measured on bad parts.",
    ]
    return node("div", node("h2", "What the promise rests on"), node("p", " ".join(sentences)))


def _row(name: str, *content: ET.Element | str) -> ET.Element:
    return node("tr", node("td", name), node("td", *content))


def _chart(calibration: Calibration) -> ET.Element:
    """Draw the scores into the page itself, where elements need no namespace."""
    with charts.drawing():
        chart = ET.fromstring(svg(charts.good_scores(calibration)))  # noqa: S314 -- drawn a moment ago
    for element in chart.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(name): value for name, value in element.attrib.items()}
    for metadata in chart.findall("metadata"):
        chart.remove(metadata)
    chart.attrib |= {"class": "chart", "role": "img", "aria-label": "Histogram of the scores, and the threshold"}
    return chart


def _local(name: str) -> str:
    return name.rpartition("}")[2]
