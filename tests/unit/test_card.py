"""The calibration card: every figure an engineer signs for stands on it, and it asks nothing of anyone else."""

import re
from collections import Counter
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from calibration.calibration import Calibration, Provenance, expectation, fit, promise, shortage
from calibration.threshold import Method
from daemon.desk import card

PROVENANCE = Provenance(
    model="9f2c" * 16,
    data_sha256="4be1" * 16,
    made_at=datetime(2026, 11, 22, 9, 30, tzinfo=UTC),
    engine="torch 2.13.0, cpu",
    regions="17aa" * 16,
    made_by="m.keller",
)


def scores(n: int) -> NDArray[np.float64]:
    return np.random.default_rng(1).gumbel(1.2, 0.18, n)


def calibrated(n: int, alpha: float = 0.01, provenance: Provenance = PROVENANCE, **options: Any) -> Calibration:
    return fit(scores(n), alpha=alpha, provenance=provenance, **options)


class Page(HTMLParser):
    """What stands on a page, what a browser would fetch, and the cells of each row."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.pieces: list[str] = []
        self.inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        elif tag in {"td", "th"}:
            self.rows[-1].append("")
        self.inside = tag if tag in {"style", "tr", "td", "th"} else self.inside

    def handle_endtag(self, tag: str) -> None:
        if tag in {"style", "table"}:
            self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "style":
            return
        self.pieces.append(data)
        if self.inside in {"td", "th"}:
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join("".join(self.pieces).split())

    def row(self, name: str) -> str:
        return next(" ".join(cells[1:]) for cells in self.rows if cells[0] == name)

    @property
    def banner(self) -> bool:
        return ("class", "banner") in self.attributes


def page(calibration: Calibration, folder: Path, name: str = "flange-front") -> Page:
    return Page(card.write(calibration, folder / "card.html", model_name=name))


def test_every_figure_that_is_signed_for_stands_on_the_card(tmp_path: Path) -> None:
    made = calibrated(120)
    shown = page(made, tmp_path)
    for said in (made.id, "flange-front", promise(made)[1:], "2026-11-22 09:30 UTC by m.keller"):
        assert said in shown.text
    assert shown.row("Threshold").startswith(f"{made.threshold:.6g}")
    assert "score 120 of 120" in shown.row("Threshold")
    assert shown.row("α") == "1 % asked, 1 % carried"
    assert shown.row("Confidence") == "on average only; 95 % asked"
    assert shown.row("Method") == f"conformal{made.why}"
    assert shown.row("False rejects") == expectation(made)
    assert shown.row("Good parts") == "120"
    assert shown.row("Effective n").startswith("120")
    assert "4be1" * 16 in shown.row("Data sha256")
    assert "9f2c" * 16 in shown.row("Model")
    assert shown.row("Engine") == "torch 2.13.0, cpu"
    assert shown.row("Regions") == "17aa" * 16
    for line in ("Name", "Date", "Signature"):
        assert line in shown.pieces
    assert f"threshold {made.threshold:.6g}" in shown.text


def test_the_confidence_is_claimed_by_the_method_that_has_it(tmp_path: Path) -> None:
    assert page(calibrated(299), tmp_path).row("Confidence") == "95 %"


@pytest.mark.parametrize(("n", "alpha"), [(299, 0.01), (99, 0.01), (98, 0.01), (31, 0.01), (19, 0.05), (9, 0.05)])
def test_the_banner_stands_exactly_where_something_is_missing(n: int, alpha: float, tmp_path: Path) -> None:
    made = calibrated(n, alpha=alpha)
    shown = page(made, tmp_path)
    missing = shortage(made)
    assert shown.banner is bool(missing)
    assert ("No promise of α" in shown.text) is bool(missing)
    assert missing[1:] in shown.text
    if n == 31:
        assert "Add 68 good parts" in shown.text


def test_other_alphas_give_the_thresholds_that_a_calibration_of_their_own_would(tmp_path: Path) -> None:
    made = calibrated(120, alpha=0.03)
    rows = {cells[0]: cells for cells in page(made, tmp_path).rows if len(cells) == 6}
    assert list(rows) == ["α", "10 %", "5 %", "3 %", "2 %", "1 %", "0.5 %", "0.1 %"]
    for alpha, name in ((0.1, "10 %"), (0.03, "3 %"), (0.01, "1 %"), (0.001, "0.1 %")):
        other = calibrated(120, alpha=alpha)
        assert rows[name][1:3] == [other.method, f"{other.threshold:.6g}"]
    assert rows["3 %"][3] == "1.000"
    assert rows["1 %"][4] == "0.83 %"
    assert rows["0.1 %"][4] == "at most 0.83 %"


def test_a_method_that_was_asked_for_and_cannot_be_leaves_its_rows_empty(tmp_path: Path) -> None:
    rows = {cells[0]: cells for cells in page(calibrated(299, method=Method.tolerance), tmp_path).rows}
    assert rows["1 %"][1] == "tolerance"
    assert rows["0.1 %"][2:] == ["none", "–", "–", "–"]


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    evil = '<script>"a" & b</script>'
    made = calibrated(120, provenance=Provenance(evil, evil, PROVENANCE.made_at, evil, evil, evil))
    shown = page(made, tmp_path, evil)
    assert shown.tags["script"] == 0
    assert shown.text.count(evil) == 7  # title, heading, and five fields of the provenance
    assert shown.row("Model").startswith(evil)


@pytest.mark.parametrize("n", [9, 40, 299])
def test_the_card_asks_nothing_of_a_network_and_runs_nothing(n: int, tmp_path: Path) -> None:
    shown = page(calibrated(n), tmp_path)
    assert {"script", "link", "img", "iframe", "object", "image", "a"}.isdisjoint(shown.tags)
    assert shown.tags["svg"] == 1
    links = [value for name, value in shown.attributes if name.rpartition(":")[2] in {"href", "src"}]
    assert all(link.startswith("#") for link in links)
    text = (tmp_path / "card.html").read_text(encoding="utf-8")
    assert "://" not in text
    assert "@import" not in text
    assert all(inner.startswith("#") for inner in re.findall(r"url\(([^)]*)\)", text))


def test_groups_are_shown_with_the_number_that_they_count_as(tmp_path: Path) -> None:
    made = fit(np.repeat(scores(60), 2), alpha=0.05, provenance=PROVENANCE, groups=[str(i // 2) for i in range(120)])
    shown = page(made, tmp_path)
    assert made.n_effective == 60
    assert shown.row("Good parts") == "120"
    assert shown.row("Effective n") == "60in 60 groups"
    assert "they count as 60" in shown.text


def test_the_band_of_uncertainty_is_shown_in_words_and_in_the_chart(tmp_path: Path) -> None:
    made = calibrated(299, alpha=0.1, fail_alpha=0.01)
    shown = page(made, tmp_path)
    assert shown.row("Uncertain") == f"up to {made.fail_threshold:.6g}, above that FAILα = 1 %, tolerance"
    assert f"fail above {made.fail_threshold:.6g}" in shown.text
    assert "orange" in shown.text
    plain = page(calibrated(299), tmp_path)
    assert "fail above" not in plain.text
    assert not any(cells[0] == "Uncertain" for cells in plain.rows)


def test_two_equal_thresholds_are_no_band(tmp_path: Path) -> None:
    shown = page(calibrated(9, alpha=0.1, fail_alpha=0.01), tmp_path)
    assert shown.row("Uncertain").startswith("no band")
    assert "fail above" not in shown.text


@pytest.mark.parametrize("values", [[2.0], [2.0] * 40, [0.1, 0.2], [1e-9] * 14 + [1e9], [-1.0, 0.5]])
def test_scores_of_any_shape_are_drawn(values: list[float], tmp_path: Path) -> None:
    made = fit(values, alpha=0.01, provenance=PROVENANCE)
    shown = page(made, tmp_path)
    assert shown.tags["svg"] == 1
    assert f"threshold {made.threshold:.6g}" in shown.text
    assert "nan" not in (tmp_path / "card.html").read_text(encoding="utf-8").lower()


def test_one_calibration_makes_one_and_the_same_card(tmp_path: Path) -> None:
    made = calibrated(31)
    first, second = (card.write(made, tmp_path / f"{i}.html", model_name="flange") for i in range(2))
    assert first.read_bytes() == second.read_bytes()
