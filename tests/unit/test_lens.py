"""Commands see images framed once: those of the camera are framed, those that were are taken as they are."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from daemon import images
from daemon.desk import dataset, lens
from daemon.desk.dataset import DatasetError, Labelled, read_mask, read_regions
from daemon.desk.layouts import Saturation
from daemon.desk.lens import Lens, of_all
from daemon.framing import Framing

PART = np.random.default_rng(7).integers(0, 256, (48, 64, 3), dtype=np.uint8)
FRAMING = Framing(crop=(8, 4, 40, 30), rotate=90)
OTHER = Framing(rotate=90)
SEEN = Lens(FRAMING.fingerprint, FRAMING)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    Pillow.fromarray(PART).save(tmp_path / "raw.png")
    return tmp_path / "raw.png"


@pytest.fixture
def framed(raw: Path) -> Path:
    lens.frame(raw, FRAMING, raw.with_name("framed.png"))
    return raw.with_name("framed.png")


def test_an_image_of_the_camera_is_framed_and_a_framed_one_taken_as_it_is(raw: Path, framed: Path) -> None:
    assert np.array_equal(SEEN.read(raw), FRAMING.apply(PART))
    assert np.array_equal(images.read(framed), FRAMING.apply(PART))
    assert np.array_equal(SEEN.read(framed), FRAMING.apply(PART))
    assert (lens.fingerprint(raw), lens.fingerprint(framed)) == ("", FRAMING.fingerprint)


def test_a_jpeg_is_shrunk_while_it_is_decoded_as_the_daemon_does_and_its_copy_says_so(tmp_path: Path) -> None:
    raw, copy, framing = tmp_path / "raw.jpg", tmp_path / "copy.png", Framing(crop=(4, 2, 20, 15), shrink=2)
    Pillow.fromarray(PART).save(raw)
    expected = images.read(raw, 2)[2:17, 4:24]
    lens.frame(raw, framing, copy)
    seen = Lens(framing.fingerprint, framing)
    assert np.array_equal(seen.read(raw), expected)
    assert np.array_equal(seen.read(copy), expected)


def test_an_image_that_was_framed_otherwise_is_refused(framed: Path) -> None:
    with pytest.raises(
        DatasetError, match=f"framed otherwise than now .{FRAMING.fingerprint}, now {OTHER.fingerprint}"
    ):
        Lens(OTHER.fingerprint, OTHER).read(framed)
    with pytest.raises(DatasetError, match="now not at all"):
        Lens().read(framed)


def test_nothing_is_framed_twice(framed: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="has been framed before"):
        lens.frame(framed, FRAMING, tmp_path / "twice.png")
    assert not (tmp_path / "twice.png").exists()


def test_without_a_framing_images_are_all_framed_alike_or_none(raw: Path, framed: Path) -> None:
    assert of_all([]) == of_all([raw, raw]) == Lens()
    seen = of_all([framed, framed])
    assert np.array_equal(seen.read(framed), FRAMING.apply(PART))
    with pytest.raises(DatasetError, match="is not framed, and others are"):
        seen.read(raw)
    for pair in ([raw, framed], [framed, raw]):
        with pytest.raises(DatasetError, match="framed otherwise than"):
            of_all(pair)


def test_a_framed_copy_is_the_same_picture(raw: Path, framed: Path) -> None:
    assert framed.read_bytes() != raw.read_bytes()
    assert lens.sha256(raw) == lens.sha256(framed)
    assert dataset.identity(raw) == dataset.identity(framed) == dataset.digest([raw])
    assert dataset.digest([framed]) != dataset.digest([raw])  # yet a training begun on the one does not go on with it


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n", b"\x89PNG\r\n\x1a\ntorn", b"\xff\xd8\xff"])
def test_a_file_that_is_no_whole_png_has_no_notes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "torn.png"
    path.write_bytes(content)
    assert images.notes(path) == {}
    assert lens.fingerprint(path) == ""


def test_an_image_that_cannot_be_read_or_framed_is_refused_with_its_file(tmp_path: Path) -> None:
    small, torn = tmp_path / "small.png", tmp_path / "torn.png"
    Pillow.fromarray(PART[:20]).save(small)
    torn.write_bytes(small.read_bytes()[:-30])
    with pytest.raises(DatasetError, match=r"small\.png: the image is 64×20 pixels, but crop"):
        SEEN.read(small)
    with pytest.raises(DatasetError, match=r"torn\.png: .*repair it or take it out"):
        SEEN.read(torn)


def test_a_mask_goes_where_its_image_goes(tmp_path: Path) -> None:
    labels = np.zeros((48, 64), np.uint8)
    labels[4, 8:12] = 3  # along the upper edge of what is kept, which becomes the right one
    labels[0, 0] = 3  # cut away
    Pillow.fromarray(labels).save(tmp_path / "mask.png")
    assert np.argwhere(read_mask(tmp_path / "mask.png", (40, 30), FRAMING)).tolist() == [[y, 29] for y in range(4)]
    assert np.argwhere(read_mask(tmp_path / "mask.png", (48, 64)))[0].tolist() == [0, 0]
    with pytest.raises(DatasetError, match=r"mask\.png: the image is 64×48"):
        read_mask(tmp_path / "mask.png", (9, 9), Framing(crop=(0, 0, 65, 1)))


def test_a_mask_of_an_image_that_is_shrunk_keeps_its_smallest_defect(tmp_path: Path) -> None:
    labels = np.zeros((48, 64), np.uint8)
    labels[13, 22] = 1
    Pillow.fromarray(labels).save(tmp_path / "mask.png")
    framing = Framing(crop=(4, 2, 8, 10), shrink=4)
    assert np.argwhere(read_mask(tmp_path / "mask.png", (10, 8), framing)).tolist() == [[13 // 4 - 2, 22 // 4 - 4]]


def test_a_region_that_is_cut_away_is_none(tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for name, place in (("inside", (10, 20)), ("outside", (0, 0))):
        labels = np.zeros((48, 64), np.uint8)
        labels[place] = 1
        Pillow.fromarray(labels).save(masks / f"{name}.png")
    item = Labelled(tmp_path / "part.png", "dent", masks, {1: Saturation(1.0, relative=False)})
    assert len(read_regions(item, (48, 64))) == 2
    ((mask, saturation),) = read_regions(item, (40, 30), FRAMING)
    assert (mask.sum(), saturation) == (1, 1.0)
