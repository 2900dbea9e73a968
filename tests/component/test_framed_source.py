"""A framed source over a watched folder: all that follows sees framed images alone."""

from pathlib import Path

import numpy as np
import pytest

from config.load import ConfigError
from config.schema import Framing as Settings
from daemon.build import build_framing
from daemon.framing import PLAIN, Framing
from daemon.messages import Reason
from daemon.sources.framed import FramedSource, framed
from tests.folders import Arrivals, file_of, names_under, pixels, source

CROP = (10, 4, 30, 20)


class Unwanted:
    """No part is wanted."""

    since = None

    def wanted(self, wait_s: float = 0.0) -> bool:  # noqa: ARG002 -- the protocol's signature
        return False


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "incoming"
    path.mkdir()
    return path


def test_a_part_comes_framed_with_all_that_is_known_of_it(folder: Path) -> None:
    (folder / "part.png").write_bytes(file_of(pixels(1)))
    with Arrivals(framed(source(folder), Framing(crop=CROP, rotate=90))) as arrivals:
        frame = arrivals.frame()
    assert np.array_equal(frame.image, np.rot90(pixels(1)[4:24, 10:40], -1))
    assert (frame.capture.part_id, frame.capture.origin) == ("part", str(folder / "part.png"))


def test_a_part_that_cannot_be_framed_is_told_with_both_sizes_and_put_away_and_the_next_one_follows(
    folder: Path,
) -> None:
    inner = source(folder)
    outer = framed(inner, Framing(crop=CROP))
    with Arrivals(outer) as arrivals:
        (folder / "small.png").write_bytes(file_of(pixels(1)[:10]))
        part = arrivals.unreadable()
        (folder / "whole.png").write_bytes(file_of(pixels(2)))
        assert arrivals.frame().image.shape == (20, 30, 3)
    assert part.cause is Reason.DECODE_FAILED
    assert part.reason.startswith("the image is 60×10 pixels, but crop = [10, 4, 30, 20]")
    assert outer.settle(part.capture, part.reason)
    assert any("small" in name for name in names_under(folder / "failed"))


def test_what_cannot_be_read_stays_unreadable_for_its_own_reason(folder: Path) -> None:
    (folder / "torn.png").write_bytes(file_of(pixels(1))[:-2000])
    with Arrivals(framed(source(folder, give_up_s=0.1), Framing(crop=CROP))) as arrivals:
        assert "cut off" in arrivals.unreadable().reason


def test_nothing_is_taken_while_nothing_is_wanted(folder: Path) -> None:
    (folder / "part.png").write_bytes(file_of(pixels(1)))
    with Arrivals(framed(source(folder), Framing(rotate=90)), Unwanted()) as arrivals:
        assert arrivals.nothing()
    assert names_under(folder) == ["part.png"]


def test_a_source_that_is_away_is_away_framed_too(tmp_path: Path) -> None:
    with Arrivals(framed(source(tmp_path / "none"), Framing(rotate=90))) as arrivals:
        assert str(tmp_path / "none") in arrivals.failure()


def test_where_images_stay_as_they_are_the_source_stays_what_it_is(folder: Path) -> None:
    inner = source(folder)
    assert framed(inner, PLAIN) is inner
    assert isinstance(framed(inner, Framing(rotate=180)), FramedSource)


def test_a_framing_is_built_from_its_section(tmp_path: Path) -> None:
    flat = np.full((40, 60, 3), 200, np.uint8)
    (tmp_path / "flat.png").write_bytes(file_of(flat))
    built = build_framing(Settings(flat_field=tmp_path / "flat.png", crop=CROP, rotate=90))
    assert built.fingerprint == Framing(flat, CROP, 90).fingerprint
    assert build_framing(Settings()).is_plain


def test_a_flat_field_that_cannot_be_used_is_told_with_its_file(tmp_path: Path) -> None:
    dark, torn = tmp_path / "dark.png", tmp_path / "torn.png"
    flat = np.full((40, 60, 3), 200, np.uint8)
    flat[0, 0] = 0
    dark.write_bytes(file_of(flat))
    torn.write_bytes(file_of(flat)[:-60])
    for file, cure in (
        (dark, "1 px are darker than 5% of the mean"),
        (torn, "cannot be read as an image: .*Save it again as a PNG"),
        (tmp_path / "none.png", "cannot be read .No such file or directory.. Put it there"),
    ):
        with pytest.raises(ConfigError, match=rf"^\[station\.framing\]: {file}: {cure}"):
            build_framing(Settings(flat_field=file))
    with pytest.raises(ConfigError, match="60×40 pixels, but crop"):
        build_framing(Settings(flat_field=dark, crop=(31, 0, 30, 20)))
