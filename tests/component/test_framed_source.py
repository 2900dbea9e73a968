"""A framed source over a watched folder: all that follows sees framed images alone."""

from pathlib import Path

import numpy as np
import pytest

from config.load import ConfigError
from config.schema import FolderSource, Station
from config.schema import Framing as Settings
from daemon import images
from daemon.build import build_framing, build_source
from daemon.framing import PLAIN, Framing
from daemon.messages import Reason
from daemon.outbox import Outbox
from daemon.sources.framed import FramedSource, framed
from tests.component.test_mqtt_sink import IDENTITY, nobody
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


def test_a_file_is_shrunk_while_it_is_decoded_and_a_camera_s_image_afterwards(folder: Path) -> None:
    (folder / "part.jpg").write_bytes(data := file_of(pixels(1), "JPEG"))
    framing = Framing(crop=(5, 2, 15, 10), rotate=90, shrink=2)
    with Arrivals(framed(source(folder, shrink=2), framing, shrunk=True)) as arrivals:
        assert np.array_equal(arrivals.frame().image, np.rot90(images.decode(data, 2)[2:12, 5:20], -1))
    (folder / "part.jpg").write_bytes(data)
    with Arrivals(framed(source(folder), framing)) as arrivals:
        assert np.array_equal(arrivals.frame().image, framing.apply(images.decode(data)))


def test_the_folder_of_a_station_is_built_to_shrink_while_it_decodes(folder: Path, tmp_path: Path) -> None:
    (folder / "part.jpg").write_bytes(data := file_of(pixels(1), "JPEG"))
    station = Station(name="s1", model=tmp_path, source=FolderSource(type="folder", path=folder))
    outbox = Outbox(tmp_path / "outbox.sqlite3")
    built = build_source(station, Framing(shrink=2, rotate=180), tmp_path, outbox, lambda *_: None, nobody, IDENTITY)
    with Arrivals(built) as arrivals:
        assert np.array_equal(arrivals.frame().image, images.decode(data, 2)[::-1, ::-1])
    outbox.close()


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


def test_a_flat_field_is_shrunk_as_the_images_are(tmp_path: Path) -> None:
    flat = pixels(3) // 2 + 100
    (tmp_path / "flat.png").write_bytes(file_of(flat))
    built = build_framing(Settings(shrink=4, flat_field=tmp_path / "flat.png"))
    assert built.fingerprint == Framing(images.shrunk(flat, 4), shrink=4).fingerprint
    assert built.apply(pixels(4)).shape == (10, 15, 3)


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
