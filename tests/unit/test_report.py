"""The pages of a comparison: every figure and name arrives whole, and every link leads somewhere."""

import json
import re
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest

from daemon.desk import report
from daemon.desk.comparison import Case, Entry, Result, Row, Sheet

MACHINE = {
    "platform": "Linux-6.1",
    "processor": "AMD EPYC",
    "cores": 2,
    "device": "cpu",
    "inspectd": "0.1.0",
    "torch": "2.13.0",
    "python": "3.11.9",
}


def figures(
    quality: float = 2.0, seed: int = 0, *, masks: bool = True, kinds: Sequence[str] = ("dent", "scratch")
) -> dict[str, Any]:
    """A record as a finished run leaves it; the higher the quality, the further the bad parts lie from the good."""
    rng = np.random.default_rng(seed)
    truth = ["good"] * 40 + [kind for kind in kinds for _ in range(20)]
    scores = np.exp(rng.normal(0, 0.25, len(truth)) + quality * 0.4 * (np.array(truth) != "good"))
    held = sorted(np.exp(rng.normal(0, 0.25, 30)).tolist())
    parts: list[dict[str, Any]] = [
        {"path": f"test/{kind}/{i:03d}.png", "defect": kind, "score": float(score), "rejected": bool(score > held[-1])}
        for i, (kind, score) in enumerate(zip(truth, scores, strict=True))
    ]
    missed = {kind: sum(p["defect"] == kind and not p["rejected"] for p in parts) for kind in kinds}
    auroc = min(0.6 + 0.1 * quality + 0.01 * seed, 1)
    return {
        "image_auroc": auroc,
        "image_auroc_interval": [auroc - 0.05, auroc],
        "image_auroc_by_defect": dict.fromkeys(kinds, auroc),
        "image_auroc_mean": auroc,
        "pixel_auroc": 0.9 if masks else None,
        "aupro": 0.8 if masks else None,
        "true_reject_at_1": 0.2 * quality,
        "true_reject_at_1_interval": [0.1 * quality, 0.25 * quality],
        "true_reject_at_5": 0.22 * quality,
        "true_reject_at_5_interval": [None, None],
        "f1_max": 0.9,
        "pro_per_image_rd": None,
        "false_reject_rate": sum(p["defect"] == "good" and p["rejected"] for p in parts) / 40,
        "false_reject_interval": [0.0, 0.1],
        "escape_rate": sum(missed.values()) / (20 * len(kinds)),
        "escape_interval": [0.1, 0.3],
        "threshold": held[-1],
        "alpha": 0.01,
        "alpha_carried": 1 / 31,
        "n_good": 40,
        "n_defect": 20 * len(kinds),
        "latency_ms_p50": 40 * quality,
        "peak_memory_mb": 812.0,
        "missed": missed,
        "present": dict.fromkeys(kinds, 20),
        "parts": parts,
        "calibration": "0123456789ab",
        "train_seconds": 130.0 + 10 * seed,
        "run": {
            "identity": {"data": "/data/flange"},
            "commands": ["inspectd train …", "inspectd evaluate …"],
            "learned": 60,
            "calibration_scores": held,
            "machine": MACHINE,
        },
    }


def row(label: str, quality: float, seeds: int = 3, **options: Any) -> Row:
    results = tuple(Result(seed, figures(quality, seed, **options)) for seed in range(seeds))
    return Row(Entry(label, "rd4ad", ("--size=128",)), results)


class Page(HTMLParser):
    """What a browser would follow, and what a person would read."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("href", "src") and value]

    def handle_data(self, data: str) -> None:
        self.text += data


def pages(folder: Path) -> Iterator[tuple[Path, Page]]:
    for path in sorted(folder.glob("*.html")):
        yield path, Page(path)


def test_every_link_and_picture_of_every_page_exists_and_is_relative(tmp_path: Path) -> None:
    pictures = [Path(f"pictures/a b/{i} %.jpg") for i in range(2)]
    (tmp_path / "pictures/a b").mkdir(parents=True)
    for path in pictures:
        (tmp_path / path).write_bytes(b"jpeg")
    case = Case("000.png", "dent", 0.5, rejected=False, overlay=pictures[0], truth=pictures[1])
    names = ("a b", "index", "100 % cotton #2")
    sheets = [Sheet(name, (row("one", 1), row("two", 3)), {"one": [case]}) for name in names]
    index = report.write(sheets, MACHINE, tmp_path)
    seen = dict(pages(tmp_path))
    assert len(seen) == 4
    assert index == tmp_path / "index.html"
    for page in seen.values():
        assert page.links
        for link in page.links:
            assert not re.match(r"[a-z]+:|/", link)
            assert (tmp_path / unquote(link)).is_file(), link
    assert "escape · dent · 000.png" in seen[tmp_path / "a b.html"].text


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    name, defect, error = "a<b", "<script>alert(1)</script>", 'no backbone "x" & <y>'
    torn = Row(Entry("torn", "rd4ad", ("--weights=<w>",)), (Result(0, None, error),))
    sheet = Sheet(name, (row("fine", 2, kinds=(defect,)), torn), {"fine": f"{defect} is gone"})
    report.write([sheet], MACHINE, tmp_path)
    for _, page in pages(tmp_path):
        assert "script" not in page.tags
        assert name in page.text
        assert error in page.text
    assert defect in Page(tmp_path / "a<b.html").text
    for chart in (tmp_path / "charts").rglob("*.svg"):
        assert "<script" not in chart.read_text()


def test_a_failed_run_stands_in_every_table_with_its_last_words(tmp_path: Path) -> None:
    half = Row(row("half", 2, 2).entry, (Result(0, figures()), Result(1, None, "train: no space left")))
    none = Row(Entry("none", "puad", ()), (Result(0, None, "train: out | of memory"),))
    sheet = Sheet("flange", (half, none), {})
    report.write([sheet], MACHINE, tmp_path)
    for _, page in pages(tmp_path):
        assert "failed, seed 1: train: no space left" in page.text
        assert "failed, seed 0: train: out | of memory" in page.text
        assert "1 of 2" in page.text
    table = [line for line in (tmp_path / "results.md").read_text().splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert [cells[-1] for cells in report.summary(sheet)] == ["seeds", "1 of 2", "0 of 1"]
    runs = json.loads((tmp_path / "results.json").read_text())["categories"]["flange"][0]["runs"]
    assert [run["error"] for run in runs] == [None, "train: no space left"]


def test_pages_are_written_where_nothing_succeeded(tmp_path: Path) -> None:
    failed = Row(Entry("none", "puad", ()), (Result(0, None, "train: no"), Result(1, None, "train: neither")))
    report.write([Sheet("flange", (failed,), {})], MACHINE, tmp_path)
    assert "neither" in Page(tmp_path / "flange.html").text
    assert "img" not in Page(tmp_path / "index.html").tags


@pytest.mark.parametrize(("seeds", "bold"), [(3, True), (1, False)])
def test_a_clear_lead_is_set_in_bold_and_one_seed_never_leads(seeds: int, bold: bool, tmp_path: Path) -> None:  # noqa: FBT001 -- a parameter of a test
    sheet = Sheet("flange", (row("weak", 1, seeds), row("strong", 3, seeds)), {})
    report.write([sheet], MACHINE, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert ("**0.910** ± 0.010" in text) is bold
    assert ("± " in text.split("Each detector")[0]) is bold
    assert ("<strong>0.910</strong>" in (tmp_path / "index.html").read_text()) is bold


def test_without_masks_there_are_no_columns_of_pixels() -> None:
    text = report.markdown([Sheet("flange", (row("one", 1, masks=False),), {})])
    assert "pixel AUROC |" not in text
    assert "image AUROC |" in text


def test_logical_and_structural_anomalies_have_columns_of_their_own() -> None:
    kinds = ("logical_anomalies", "structural_anomalies")
    heading = report.markdown([Sheet("bottle", (row("one", 1, kinds=kinds),), {})]).splitlines()[4]
    assert "| image AUROC | logical | structural | mean of kinds | pixel AUROC |" in heading


def test_negative_scores_and_a_threshold_of_zero_are_drawn(tmp_path: Path) -> None:
    found = figures()
    found["threshold"] = 0.0
    found["parts"] = [{**part, "score": part["score"] - 1} for part in found["parts"]]
    report.write([Sheet("flange", (Row(Entry("one", "puad", ()), (Result(0, found),)),), {})], MACHINE, tmp_path)
    assert "in the detector's units" in (tmp_path / "charts/flange/one.svg").read_text()
