"""What file names and sidecars say of a part: as much as fits, and never at the cost of its verdict."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from daemon.sources.folder.labels import (
    META_BYTES,
    META_KEYS,
    SIDECAR_BYTES,
    Label,
    NoSidecarError,
    TornSidecarError,
    by_name,
    by_sidecar,
    compiled,
    sidecar_of,
)
from daemon.wire import encode
from tests.folders import Arrivals, eventually, file_of, names_under, pixels, source

PATTERN = r"^(?P<batch>B\d+)_(?P<part>[^_]+)_s(?P<shift>\d)"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "incoming"
    path.mkdir()
    return path


def test_a_pattern_takes_part_batch_and_the_rest_from_the_name() -> None:
    assert by_name("B7_SN 1_s2_x.png", compiled(PATTERN)) == (Label("SN_1", "B7", {"shift": "2"}), True)
    assert by_name("other.png", compiled(PATTERN)) == (Label("other"), False)
    assert by_name("other.png", None) == (Label("other"), True)


def test_groups_that_take_no_part_say_nothing() -> None:
    pattern = compiled(r"(?P<part>\d+)?(-(?P<side>[LR]))?\.png")
    assert by_name("4711.png", pattern) == (Label("4711"), True)
    assert by_name("x-L.png", pattern) == (Label("x-L"), False)


@pytest.mark.parametrize(("pattern", "why"), [("(", "no regular expression"), (r"(?P<id>\d+)", "no group")])
def test_a_pattern_that_is_none_is_said(pattern: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        compiled(pattern)


def test_a_name_without_the_pattern_keeps_its_whole_name_and_is_said_once(folder: Path) -> None:
    for name in ("B1_a_s1.png", "odd.png", "even.png"):
        (folder / name).write_bytes(file_of(pixels(1)))
    with capture_logs() as logs, Arrivals(source(folder, part_id_pattern=PATTERN)) as arrivals:
        captures = [arrivals.frame().capture for _ in range(3)]
    assert {(c.part_id, c.batch_id) for c in captures} == {("a", "B1"), ("odd", ""), ("even", "")}
    (entry,) = logs
    assert "part_id_pattern" in entry["event"]


@pytest.mark.parametrize("name", ["part.json", "part.png.json"])
@pytest.mark.parametrize("leave", [False, True])
def test_a_sidecar_says_more_and_goes_with_its_image(folder: Path, tmp_path: Path, name: str, *, leave: bool) -> None:
    watched = source(folder, sidecar=True, ledger=tmp_path / "ledger.sqlite" if leave else None)
    said = {"part_id": "SN 4711", "batch_id": "B7", "meta": {"shift": 2, "hot": True, "t": 21.5, "line": "A"}}
    with Arrivals(watched) as arrivals:
        (folder / "part.png").write_bytes(file_of(pixels(1)))
        assert arrivals.nothing()
        (folder / name).write_text(json.dumps(said))
        capture = arrivals.frame().capture
    assert (capture.part_id, capture.batch_id, capture.meta) == ("SN_4711", "B7", said["meta"])
    assert watched.settle(capture, "no good")
    if leave:
        assert names_under(folder) == sorted(["part.png", name])
    else:
        assert names_under(folder) == ["part.png", "part.png.json", "part.png.reason.txt"]
        (kept,) = folder.glob("failed/*/part.png.json")
        assert json.loads(kept.read_text()) == said


def test_a_sidecar_before_its_image_waits_for_it(folder: Path) -> None:
    with capture_logs() as logs, Arrivals(source(folder, sidecar=True)) as arrivals:
        (folder / "part.json").write_text('{"part_id": 4711}')
        assert arrivals.nothing()
        (folder / "part.png").write_bytes(file_of(pixels(1)))
        assert arrivals.frame().capture.part_id == "4711"
    assert logs == []


def test_a_sidecar_written_slowly_is_read_whole(folder: Path) -> None:
    with Arrivals(source(folder, sidecar=True)) as arrivals:
        (folder / "part.png").write_bytes(file_of(pixels(1)))
        with (folder / "part.json").open("w") as file:
            for character in '{"part_id": "SN-1"}':
                file.write(character)
                file.flush()
                time.sleep(0.01)
        assert arrivals.frame().capture.part_id == "SN-1"


def test_parts_without_a_sidecar_are_judged_after_a_while_and_said_once(folder: Path) -> None:
    with capture_logs() as logs, Arrivals(source(folder, sidecar=True, give_up_s=0.3)) as arrivals:
        for number in range(3):
            (folder / f"part{number}.png").write_bytes(file_of(pixels(1)))
        assert {arrivals.frame().capture.part_id for _ in range(3)} == {"part0", "part1", "part2"}
    assert len(logs) == 1


@pytest.mark.parametrize("leave", [False, True])
def test_a_restart_reads_the_sidecar_again(folder: Path, tmp_path: Path, *, leave: bool) -> None:
    file = tmp_path / "ledger.sqlite" if leave else None
    (folder / "part.png").write_bytes(file_of(pixels(1)))
    (folder / "part.json").write_text('{"part_id": "SN-1"}')
    for _ in range(2):
        with Arrivals(source(folder, sidecar=True, ledger=file)) as arrivals:
            assert arrivals.frame().capture.part_id == "SN-1"


def test_a_sidecar_claimed_before_its_image_by_a_killed_daemon_is_found_again(folder: Path) -> None:
    (folder / "part.png").write_bytes(file_of(pixels(1)))
    (folder / "processing").mkdir()
    (folder / "processing" / "01ARZ3NDEKTSV4RRFFQ69G5FAV~part.png.json").write_text('{"part_id": "SN-1"}')
    with Arrivals(source(folder, sidecar=True)) as arrivals:
        assert arrivals.frame().capture.part_id == "SN-1"


BAD: dict[str, tuple[bytes, str]] = {
    "torn": (b'{"part_id": "SN', "no whole JSON"),
    "empty": (b"", "no whole JSON"),
    "deep": (b"[" * 10_000, "no whole JSON"),
    "list": (b"[1]", "no JSON object"),
    "large": (b" " * SIDECAR_BYTES + b"{}", "larger than"),
    "typed": (b'{"part_id": ["SN"], "batch_id": true, "meta": 5}', '"meta" is no JSON object'),
    "nested": (b'{"meta": {"a": {"b": 1}, "c": null, "d": NaN, "e": 1e999}}', "no text, number"),
    "many": (json.dumps({"meta": dict.fromkeys(map(str, range(40)), 1)}).encode(), "more than 16 keys"),
    "long": (json.dumps({"meta": dict.fromkeys("abcdefgh", "x" * 100)}).encode(), "or 512 bytes"),
    "infinite": (b'{"meta": {"e": 1e999}}', "no text, number"),
    "undefined": (b'{"meta": {"e": NaN}}', "no text, number"),
    "odd": (b'{"part": "SN-1"}', "no key of a sidecar"),
}


def test_bad_sidecars_are_said_with_their_reasons_and_their_parts_are_judged(folder: Path) -> None:
    for name, (data, _) in BAD.items():
        (folder / f"{name}.json").write_bytes(data)
        (folder / f"{name}.png").write_bytes(file_of(pixels(1)))
    watched = source(folder, sidecar=True, give_up_s=0.3)
    with capture_logs() as logs, Arrivals(watched) as arrivals:
        captures = [arrivals.frame().capture for _ in BAD]
        for capture in captures:
            watched.settle(capture, None)
    assert {capture.part_id for capture in captures} == set(BAD)
    reasons = {entry["file"].removesuffix(".png"): entry["reason"] for entry in logs}
    assert {name: why in reasons[name] for name, (_, why) in BAD.items()} == dict.fromkeys(BAD, True)
    assert len(list(folder.glob("done/*/*.json"))) == len(BAD)


def test_a_sidecar_that_is_a_link_or_a_folder_is_none(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "a.json").symlink_to(tmp_path / "secret")
    (tmp_path / "a.png.json").mkdir()
    assert sidecar_of(tmp_path / "a.png") is None
    os.mkfifo(tmp_path / "b.json")
    assert sidecar_of(tmp_path / "b.png") is None


def test_files_of_json_are_foreign_only_without_the_option(folder: Path) -> None:
    (folder / "part.json").write_text("{}")
    with capture_logs() as logs, Arrivals(source(folder, sidecar=True)) as arrivals:
        assert arrivals.nothing()
    assert logs == []
    with capture_logs() as logs, Arrivals(source(folder)):
        assert eventually(lambda: [entry["kind"] for entry in logs] == [".json"])


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=30),
    max_leaves=40,
)


@given(
    said=st.dictionaries(st.sampled_from(["part_id", "batch_id", "meta", "x"]), anything) | anything, torn=st.binary()
)
def test_whatever_a_sidecar_says_the_label_is_bounded_and_can_be_encoded(
    said: Any, torn: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sidecar = tmp_path_factory.getbasetemp() / "any.json"
    for data in (json.dumps(said).encode(), torn):
        sidecar.write_bytes(data)
        try:
            label, _ = by_sidecar(sidecar, Label("part"))
        except TornSidecarError:
            continue
        assert len(label.meta) <= META_KEYS
        assert len(encode(dict(label.meta))) <= META_BYTES
        assert len(label.part_id) <= 64
        assert len(encode(label.batch_id)) <= 66
        assert label.part_id


def test_a_missing_sidecar_is_none(tmp_path: Path) -> None:
    for sidecar in (None, tmp_path / "a.json"):
        with pytest.raises(NoSidecarError):
            by_sidecar(sidecar, Label("part"))
