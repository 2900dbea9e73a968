"""What people do with the archive: look, review, and make a data set that the other commands can read."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from daemon.archive import REVIEW, Archive, beside, survey
from daemon.cli import app
from daemon.desk import lens
from daemon.desk.dataset import DatasetError, good_images, read_category
from daemon.messages import Outcome
from tests.payloads import IDENTITY
from tests.unit.test_archive import ROOM, exhibit, identified

CONFIG = """
[mqtt]
host = "127.0.0.1"
[archive]
path = "archive"
[[station]]
name = "top"
model = "model"
[station.source]
type = "folder"
path = "incoming"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration beside an archive of 12 parts that passed and 6 rejects."""
    file = tmp_path / "inspectd.toml"
    file.write_text(CONFIG)
    fill(tmp_path / "archive")
    return file


def fill(root: Path, **options: str) -> None:
    archive = Archive(root, ROOM, pass_every=1, **options)  # type: ignore[arg-type] # a format
    outcomes = [Outcome.PASS] * 12 + [Outcome.FAIL] * 6
    assert all(archive.keep([exhibit(number, outcome) for number, outcome in enumerate(outcomes)]))
    archive.close()


def tell(config: Path, *arguments: str) -> str:
    command, *others = arguments
    result = CliRunner().invoke(app, ["archive", command, "--config", str(config), *others])
    if result.exception is not None:
        raise result.exception
    return result.output


def test_the_newest_rejects_are_listed_until_they_are_reviewed(config: Path) -> None:
    assert "6 of 6" in tell(config, "list", "--todo")
    assert "2 reviewed" in tell(config, "review", "--as", "bad", "--by", "Ana", identified(13), identified(14))
    assert "3 of 4" in tell(config, "list", "--todo", "--count", "3")
    assert tell(config, "list").count("bad (Ana)") == 2
    assert "12 of 12" in tell(config, "list", "--outcome", "PASS")


def test_the_status_counts_what_is_kept_and_names_the_room(config: Path) -> None:
    tell(config, "review", "--as", "bad", identified(13))
    said = tell(config, "status")
    rows = [line.split() for line in said.splitlines()]
    assert ["top", "FAIL", "6", "1"] in [row[:4] for row in rows]
    assert ["all", "PASS", "12", "0"] in [row[:4] for row in rows]
    assert "GB are free" in said


def test_a_review_lies_beside_the_verdict_and_a_later_one_takes_its_place(config: Path) -> None:
    root = config.parent / "archive"
    (kept,) = [kept for kept in survey(root).kept if kept.id == identified(13)]
    before = beside(root / kept.ref, ".json").read_bytes()
    tell(config, "review", "--as", "bad", kept.ref)
    tell(config, "review", "--as", "good", "--by", "Ana", "--note", "dust", kept.id)
    said = json.loads(beside(root / kept.ref, REVIEW).read_bytes())
    assert {key: said[key] for key in ("as", "by", "note", "id", "verdict")} == {
        "as": "good",
        "by": "Ana",
        "note": "dust",
        "id": kept.id,
        "verdict": "FAIL",
    }
    assert beside(root / kept.ref, ".json").read_bytes() == before


def test_an_unknown_part_is_said_and_none_is_reviewed(config: Path) -> None:
    with pytest.raises(DatasetError, match="no image of nobody"):
        tell(config, "review", "--as", "bad", identified(13), "nobody")
    assert not any(kept.reviewed for kept in survey(config.parent / "archive").kept)


def test_an_export_is_a_data_set_of_what_people_said_and_of_what_passed(config: Path, tmp_path: Path) -> None:
    tell(config, "review", "--as", "bad", *map(identified, range(12, 15)))
    tell(config, "review", "--as", "good", identified(15), identified(0))
    tell(config, "review", "--as", "unsure", identified(16))
    tell(config, "review", "--as", "bad", identified(1))
    tell(config, "export", "--out", str(tmp_path / "set"), "--passed")
    found = read_category(tmp_path / "set")
    assert sum(not item.good for item in found.test) == 4
    assert len(found.good) + sum(item.good for item in found.test) == 12
    assert good_images(tmp_path / "set/train/good") == found.good
    with (tmp_path / "set/manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["file"] for row in rows} == {
        str(path.relative_to(tmp_path / "set")) for path in (tmp_path / "set").rglob("*.png")
    }
    assert {row["id"] for row in rows if row["review"] == "bad"} == set(map(identified, [1, 12, 13, 14]))
    for row in rows:
        assert (tmp_path / "set" / row["file"]).samefile(tmp_path / "archive" / row["image_ref"])


def test_an_export_of_what_was_reviewed_alone_and_a_later_one_test_with_the_same_parts(
    config: Path, tmp_path: Path
) -> None:
    tell(config, "review", "--as", "good", *map(identified, range(11)))
    tell(config, "review", "--as", "bad", identified(12))
    tell(config, "export", "--out", str(tmp_path / "first"))
    tell(config, "review", "--as", "good", identified(17))
    tell(config, "export", "--out", str(tmp_path / "second"), "--passed")
    first, second = ({path.name for path in (tmp_path / name / "test/good").iterdir()} for name in ("first", "second"))
    assert first
    assert first <= second


def test_a_framed_jpeg_becomes_a_png_that_says_so(config: Path, tmp_path: Path) -> None:
    archive = Archive(tmp_path / "archive", ROOM, "jpeg")
    (ref,) = archive.keep([exhibit(100, framing="0123456789ab")])
    archive.close()
    tell(config, "review", "--as", "bad", ref)
    tell(config, "export", "--out", str(tmp_path / "set"))
    (image,) = (tmp_path / "set/test/bad").iterdir()
    assert lens.fingerprint(image) == "0123456789ab"


def test_parts_of_two_recipes_are_no_data_set_and_parts_of_the_challenge_test_are_left_out(
    config: Path, tmp_path: Path
) -> None:
    archive = Archive(tmp_path / "archive", ROOM)
    other = replace(exhibit(100), identity=replace(IDENTITY, recipe="flange-b"))
    known = exhibit(101)
    archive.keep([other, replace(known, verdict=replace(known.verdict, challenge=True))])
    archive.close()
    tell(config, "review", "--as", "bad", *map(identified, (12, 100, 101)))
    with pytest.raises(DatasetError, match=r"top flange-a, top flange-b.*--recipe"):
        tell(config, "export", "--out", str(tmp_path / "set"))
    tell(config, "export", "--out", str(tmp_path / "set"), "--recipe", "flange-a")
    assert [path.name[:26] for path in (tmp_path / "set/test/bad").iterdir()] == [identified(12)]


def test_what_cannot_be_done_is_said_with_what_to_do(config: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="inspectd archive review"):
        tell(config, "export", "--out", str(tmp_path / "set"))
    with pytest.raises(DatasetError, match="not empty"):
        tell(config, "export", "--out", str(tmp_path))
    config.write_text(CONFIG.replace('[archive]\npath = "archive"\n', ""))
    with pytest.raises(DatasetError, match=r"no section \[archive\]"):
        tell(config, "list")
