"""Small copies of the layouts in which data sets are published."""

import contextlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from daemon.desk.dataset import good_images, labelled_images, read_mask, read_regions
from daemon.desk.layouts import Category, DatasetError, Labelled, categories, read_category

HEIGHT, WIDTH = 8, 12

# By category: layout, good parts to learn from, good parts to test, defects to test, masks.
REAL = {
    "mvtec_ad/screw": ("mvtec_ad", 320, 41, 119, 119),
    "mvtec_loco/juice_bottle": ("mvtec_loco", 335, 54, 142, 142),
    "kolektorsdd/commutator": ("mvtec_ad", 264, 69, 50, 50),
    "aws_lookout/cookie": ("mvtec_ad", 31, 14, 32, 32),
    "elpv/solar_mono": ("mvtec_ad", 200, 60, 80, 0),
    "piped/PA_BDP01_TL": ("mvtec_ad", 36, 12, 48, 48),
    "piped/PA_BFT01_TL": ("mvtec_ad", 36, 12, 48, 48),
}


def write_images(folder: Path, *names: str) -> None:
    """Write images of noise, no two alike."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        noise = np.random.default_rng(list(str(folder / name).encode())).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        assert cv2.imwrite(str(folder / name), noise)


def write_mask(path: Path, *pixels: tuple[int, int], value: int = 255, size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    """Write a mask with these pixels (row, column) set."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros(size, np.uint8)
    for pixel in pixels:
        mask[pixel] = value
    assert cv2.imwrite(str(path), mask)


def write_mvtec(root: Path, defect: str = "scratch") -> Path:
    """Write three good parts to learn from, one to test, and two defective ones with masks."""
    write_images(root / "train/good", "000.png", "001.png", "002.png")
    write_images(root / "test/good", "000.png")
    write_images(root / f"test/{defect}", "000.png", "001.png")
    write_mask(root / f"ground_truth/{defect}/000_mask.png", (1, 2))
    write_mask(root / f"ground_truth/{defect}/001_mask.png", (3, 4))
    return root


def write_visa(root: Path, *, table: str | None = None) -> Path:
    """Write candles, of which one in the table has its suffix in capitals and on disk not; return their folder."""
    candle = root / "candle"
    write_images(candle / "Data/Images/Normal", "0001.JPG", "0002.jpg", "0003.JPG")
    write_images(candle / "Data/Images/Anomaly", "000.JPG")
    write_mask(candle / "Data/Masks/Anomaly/000.png", (5, 6), value=2)
    rows = (
        "object,split,label,image,mask",
        "pcb1,train,normal,pcb1/Data/Images/Normal/0001.JPG,",
        "candle,train,normal,candle/Data/Images/Normal/0002.JPG,",
        "candle,train,normal,candle/Data/Images/Normal/0001.JPG,",
        "candle,test,normal,candle/Data/Images/Normal/0003.JPG,",
        "candle,test,anomaly,candle/Data/Images/Anomaly/000.JPG,candle/Data/Masks/Anomaly/000.PNG",
    )
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\n".join(rows) + "\n" if table is None else table)
    return candle


def write_loco(root: Path) -> Path:
    """Write two logical anomalies, the first in two regions that overlap, and what counts as finding them."""
    write_images(root / "test/good", "000.png")
    write_images(root / "test/logical_anomalies", "000.png", "001.png")
    truth = root / "ground_truth/logical_anomalies"
    write_mask(truth / "000/000.png", *np.ndindex(4, 4), value=1)
    write_mask(truth / "000/001.png", *np.ndindex(8, 2), value=2)
    write_mask(truth / "001/000.png", (7, 11), value=1)
    table = [
        {"defect_name": "missing", "pixel_value": 1, "saturation_threshold": 6, "relative_saturation": False},
        {"defect_name": "scratch", "pixel_value": 2, "saturation_threshold": 0.5, "relative_saturation": True},
    ]
    (root / "defects_config.json").write_text(json.dumps(table))
    return root


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def answers(category: Category) -> list[tuple[str, str, str | None]]:
    return [(item.path.name, item.defect, item.mask.name if item.mask else None) for item in category.test]


def test_mvtec_ad_pairs_each_defect_with_its_mask(tmp_path: Path) -> None:
    write_mvtec(tmp_path / "screw")
    screw = read_category(tmp_path / "screw")
    assert (screw.name, screw.layout, screw.held) == ("screw", "mvtec_ad", [])
    assert screw.good == [tmp_path / f"screw/train/good/00{i}.png" for i in range(3)]
    assert answers(screw) == [
        ("000.png", "good", None),
        ("000.png", "scratch", "000_mask.png"),
        ("001.png", "scratch", "001_mask.png"),
    ]
    assert [item.good for item in screw.test] == [True, False, False]


def test_hidden_files_and_files_of_other_kinds_are_no_images(tmp_path: Path) -> None:
    write_mvtec(tmp_path)
    for place in ("train/good", "test/good", "test/scratch", "ground_truth/scratch", "test/.cache"):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "._000.png").write_bytes(b"left by a Mac")
        (tmp_path / place / "Thumbs.db").write_bytes(b"left by a PC")
    found = read_category(tmp_path)
    assert len(found.good) == 3
    assert len(found.test) == 3


def test_a_test_set_alone_can_be_read(tmp_path: Path) -> None:
    write_mvtec(tmp_path)
    shutil.rmtree(tmp_path / "train")
    assert read_category(tmp_path).good == []
    assert labelled_images(tmp_path) == read_category(tmp_path).test


def test_loco_holds_its_validation_set_and_merges_the_masks_of_an_image(tmp_path: Path) -> None:
    write_images(tmp_path / "train/good", "000.png")
    write_images(tmp_path / "validation/good", "000.png", "001.png")
    write_images(tmp_path / "test/good", "000.png")
    for defect in ("logical_anomalies", "structural_anomalies"):
        write_images(tmp_path / f"test/{defect}", "000.png")
    write_mask(tmp_path / "ground_truth/logical_anomalies/000/000.png", (1, 2), value=1)
    write_mask(tmp_path / "ground_truth/logical_anomalies/000/001.png", (6, 7), value=2)
    write_mask(tmp_path / "ground_truth/structural_anomalies/000/000.png", (4, 4))
    (tmp_path / "defects_config.json").write_text("[]")
    found = read_category(tmp_path)
    assert found.layout == "mvtec_loco"
    assert found.held == [tmp_path / "validation/good/000.png", tmp_path / "validation/good/001.png"]
    assert [item.defect for item in found.test] == ["good", "logical_anomalies", "structural_anomalies"]
    assert np.argwhere(read_mask(found.test[1].mask, (HEIGHT, WIDTH))).tolist() == [[1, 2], [6, 7]]


def test_a_small_region_stays_beside_a_large_one_in_another_file(tmp_path: Path) -> None:
    write_mask(tmp_path / "000.png", *((row, column) for row in range(8) for column in range(4)))
    write_mask(tmp_path / "001.png", (7, 11))
    assert read_mask(tmp_path, (2, 3)).tolist() == [[True, False, False], [True, False, True]]


def test_each_file_is_a_region_with_the_saturation_of_its_pixels_value(tmp_path: Path) -> None:
    _, two, _ = read_category(write_loco(tmp_path)).test
    (square, pixels), (stripe, share) = read_regions(two, (HEIGHT, WIDTH))
    assert np.argwhere(square).tolist() == [list(pixel) for pixel in np.ndindex(4, 4)]
    assert np.argwhere(stripe).tolist() == [list(pixel) for pixel in np.ndindex(8, 2)]
    assert (pixels, share) == (6, 8)


def test_saturations_shrink_with_the_map_and_the_smallest_region_stays(tmp_path: Path) -> None:
    good, two, small = read_category(write_loco(tmp_path)).test
    # A quarter of the pixels: of the square 6 / 4, of the four that are left of the stripe a half.
    assert [(mask.sum(), saturation) for mask, saturation in read_regions(two, (4, 6))] == [(4, 1.5), (4, 2)]
    ((mask, saturation),) = read_regions(small, (4, 6))
    assert (np.argwhere(mask).tolist(), saturation) == ([[3, 5]], 1.5)
    assert read_regions(good, (4, 6)) == []


def test_masks_without_a_table_of_saturations_have_no_regions(tmp_path: Path) -> None:
    (write_loco(tmp_path) / "defects_config.json").unlink()
    two = read_category(tmp_path).test[1]
    assert two.saturations is None
    assert read_regions(two, (HEIGHT, WIDTH)) == []
    assert read_mask(two.mask, (HEIGHT, WIDTH)).any()


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "7",
        '{"pixel_value": 1}',
        '[{"pixel_value": 1}]',
        '[{"pixel_value": 1, "saturation_threshold": "6"}]',
        "[6]",
    ],
)
def test_a_table_of_saturations_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (write_loco(tmp_path) / "defects_config.json").write_text(text)
    with pytest.raises(DatasetError, match=r"defects_config\.json is no table of saturations"):
        read_category(tmp_path)


def test_a_file_of_saturations_in_another_encoding_is_named(tmp_path: Path) -> None:
    (write_loco(tmp_path) / "defects_config.json").write_bytes(b'["\xff"]')
    with pytest.raises(DatasetError, match=r"defects_config\.json is no table of saturations"):
        read_category(tmp_path)


@pytest.mark.parametrize("values", [[255], [1, 2], [0]])
def test_a_file_that_is_not_one_known_region_says_what_is_in_it(tmp_path: Path, values: list[int]) -> None:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[0, : len(values)] = values
    file = write_loco(tmp_path) / "ground_truth/logical_anomalies/001/000.png"
    assert cv2.imwrite(str(file), mask)
    small = read_category(tmp_path).test[-1]
    with pytest.raises(DatasetError, match=rf"001/000\.png is not one region: its values \[{str(values)[1:-1]}\]"):
        read_regions(small, (HEIGHT, WIDTH))


def test_a_saturation_of_zero_is_none(tmp_path: Path) -> None:
    table = write_loco(tmp_path) / "defects_config.json"
    table.write_text(table.read_text().replace("6", "0"))
    with pytest.raises(DatasetError, match=r"its values \[1\] are not one that defects_config\.json gives"):
        read_regions(read_category(tmp_path).test[-1], (HEIGHT, WIDTH))


def test_mvtec_3d_is_read_by_its_colour_images(tmp_path: Path) -> None:
    for part in ("train/good", "validation/good", "test/good", "test/hole"):
        write_images(tmp_path / part / "rgb", "000.png")
        write_images(tmp_path / part / "xyz", "000.tiff")
        write_mask(tmp_path / part / "gt/000.png", *([(1, 1)] if part == "test/hole" else []))
    found = read_category(tmp_path)
    assert found.layout == "mvtec_3d"
    assert found.good == [tmp_path / "train/good/rgb/000.png"]
    assert found.held == [tmp_path / "validation/good/rgb/000.png"]
    assert found.test == [
        Labelled(tmp_path / "test/good/rgb/000.png", "good", None),
        Labelled(tmp_path / "test/hole/rgb/000.png", "hole", tmp_path / "test/hole/gt/000.png"),
    ]


def test_visa_is_read_by_its_table_whatever_the_case_of_suffixes(tmp_path: Path) -> None:
    candle = read_category(write_visa(tmp_path))
    assert (candle.name, candle.layout, candle.held) == ("candle", "visa", [])
    assert names(candle.good) == ["0001.JPG", "0002.jpg"]
    assert answers(candle) == [("000.JPG", "anomaly", "000.png"), ("0003.JPG", "good", None)]


def test_the_label_ids_of_visa_are_all_defect(tmp_path: Path) -> None:
    candle = read_category(write_visa(tmp_path))
    assert np.argwhere(read_mask(candle.test[0].mask, (HEIGHT, WIDTH))).tolist() == [[5, 6]]


def test_the_lowest_label_of_a_16_bit_mask_is_defect(tmp_path: Path) -> None:
    mask = np.zeros((HEIGHT, WIDTH), np.uint16)
    mask[2, 3] = 1
    cv2.imwrite(str(tmp_path / "000.png"), mask)
    assert np.argwhere(read_mask(tmp_path / "000.png", mask.shape)).tolist() == [[2, 3]]


def test_visa_without_its_table_says_where_to_put_it(tmp_path: Path) -> None:
    candle = write_visa(tmp_path)
    (tmp_path / "split_csv/1cls.csv").unlink()
    with pytest.raises(DatasetError, match=r"split_csv/1cls\.csv is missing"):
        read_category(candle)


HEADER = "object,split,label,image,mask\n"


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("object,split\ncandle,train\n", "no column image, label, mask"),
        (HEADER + "pcb1,train,normal,a.JPG,\n", "no row of the object candle"),
        (HEADER + "candle,train,normal,candle/Data/Images/Normal/9.JPG,\n", r"9\.JPG is named in .* but missing"),
        (HEADER + "candle,test,anomaly,candle/Data/Images/Anomaly/000.JPG,\n", "leaves .* empty"),
        (HEADER + "candle,train,anomaly,candle/Data/Images/Anomaly/000.JPG,\n", "train and anomaly"),
    ],
)
def test_a_table_of_visa_that_does_not_fit_says_why(tmp_path: Path, table: str, reason: str) -> None:
    candle = write_visa(tmp_path, table=table)
    with pytest.raises(DatasetError, match=reason):
        read_category(candle)


def test_visa_as_its_script_leaves_it_has_masks_named_like_images(tmp_path: Path) -> None:
    write_images(tmp_path / "train/good", "0001.JPG")
    write_images(tmp_path / "test/good", "0002.JPG")
    write_images(tmp_path / "test/bad", "000.JPG")
    write_mask(tmp_path / "ground_truth/bad/000.png", (1, 1))
    found = read_category(tmp_path)
    assert found.layout == "mvtec_ad"
    assert answers(found) == [("000.JPG", "bad", "000.png"), ("0002.JPG", "good", None)]


def test_bad_parts_in_the_training_set_of_vad_are_never_learned(tmp_path: Path) -> None:
    for part in ("train/good", "train/bad", "test/good", "test/bad"):
        write_images(tmp_path / part, "000.png", "001.png")
    found = read_category(tmp_path)
    assert found.layout == "vad"
    assert found.good == [tmp_path / "train/good/000.png", tmp_path / "train/good/001.png"]
    assert Counter(item.defect for item in found.test) == {"good": 2, "bad": 2}
    assert not any("train" in item.path.relative_to(tmp_path).parts or item.mask for item in found.test)


@pytest.mark.parametrize("suffix", [".png", ".bmp"])
def test_btad_calls_good_parts_ok_and_masks_by_the_stem(tmp_path: Path, suffix: str) -> None:
    write_images(tmp_path / "01/train/ok", "0000.bmp")
    write_images(tmp_path / "01/test/ok", "0001.bmp")
    write_images(tmp_path / "01/test/ko", "0002.bmp")
    write_mask(tmp_path / f"01/ground_truth/ko/0002{suffix}", (1, 1))
    found = read_category(tmp_path / "01")
    assert (found.name, found.layout, names(found.good)) == ("01", "btad", ["0000.bmp"])
    assert answers(found) == [("0002.bmp", "ko", f"0002{suffix}"), ("0001.bmp", "good", None)]


@pytest.mark.parametrize("masks", ["ground_truth", "masks"])
def test_a_plain_folder_holds_out_the_same_third_of_its_good_parts_every_time(tmp_path: Path, masks: str) -> None:
    write_images(tmp_path / "good", *(f"{i}.png" for i in range(9)))
    write_images(tmp_path / "dent", "a.png", "b.png")
    write_images(tmp_path / "crack", "a.png")
    write_mask(tmp_path / masks / "dent/b_mask.png", (1, 1))
    write_mask(tmp_path / masks / "dent/a.png", (1, 1))
    found = read_category(tmp_path)
    tested = [item.path for item in found.test if item.good]
    assert found.layout == "plain"
    assert (len(found.good), len(tested)) == (6, 3)
    assert sorted(found.good + tested) == good_images(tmp_path / "good")
    assert answers(found)[3:] == [("a.png", "crack", None), ("a.png", "dent", "a.png"), ("b.png", "dent", "b_mask.png")]
    assert read_category(tmp_path) == found


def test_a_plain_folder_of_two_good_parts_is_too_small(tmp_path: Path) -> None:
    write_images(tmp_path / "good", "0.png", "1.png")
    write_images(tmp_path / "dent", "0.png")
    with pytest.raises(DatasetError, match="has 2 images; give 3 or more"):
        read_category(tmp_path)


def test_a_mask_missing_beside_others_is_an_error(tmp_path: Path) -> None:
    write_mvtec(tmp_path)
    (tmp_path / "ground_truth/scratch/001_mask.png").unlink()
    with pytest.raises(DatasetError, match=r"test/scratch/001\.png has no mask in .*ground_truth/scratch"):
        read_category(tmp_path)


def test_masks_in_the_same_order_but_of_other_names_are_not_paired(tmp_path: Path) -> None:
    write_mvtec(tmp_path)
    for old, new in (("001_mask.png", "002_mask.png"), ("000_mask.png", "001_mask.png")):
        (tmp_path / "ground_truth/scratch" / old).rename(tmp_path / "ground_truth/scratch" / new)
    with pytest.raises(DatasetError, match=r"test/scratch/000\.png has no mask"):
        read_category(tmp_path)


def test_a_defect_may_have_no_masks_at_all(tmp_path: Path) -> None:
    write_mvtec(tmp_path)
    write_images(tmp_path / "test/stain", "000.png")
    assert [item.mask for item in read_category(tmp_path).test if item.defect == "stain"] == [None]


def test_two_masks_of_one_image_are_an_error(tmp_path: Path) -> None:
    write_mvtec(tmp_path)
    write_mask(tmp_path / "ground_truth/scratch/000.bmp", (1, 1))
    with pytest.raises(DatasetError, match="masks of the same image"):
        read_category(tmp_path)


def test_masks_outside_the_folder_of_a_defect_are_an_error(tmp_path: Path) -> None:
    write_mvtec(tmp_path)
    write_mask(tmp_path / "ground_truth/000_mask.png", (1, 1))
    with pytest.raises(DatasetError, match="put masks in one folder per defect"):
        read_category(tmp_path)


def test_a_folder_of_masks_without_one_is_an_error(tmp_path: Path) -> None:
    write_mvtec(tmp_path)
    (tmp_path / "ground_truth/scratch/001_mask.png").unlink()
    (tmp_path / "ground_truth/scratch/001").mkdir()
    with pytest.raises(DatasetError, match="holds none"):
        read_category(tmp_path)


def test_a_mask_of_another_shape_than_its_image_is_an_error(tmp_path: Path) -> None:
    write_mvtec(tmp_path)
    write_mask(tmp_path / "ground_truth/scratch/001_mask.png", (1, 1), size=(WIDTH, HEIGHT))
    with pytest.raises(DatasetError, match=r"001_mask\.png is 8×12 pixels, .* of 12×8"):
        read_category(tmp_path)


def test_a_mask_of_another_resolution_is_fine(tmp_path: Path) -> None:
    write_mvtec(tmp_path)
    write_mask(tmp_path / "ground_truth/scratch/001_mask.png", (1, 1), size=(4 * HEIGHT, 4 * WIDTH))
    assert len(read_category(tmp_path).test) == 3


def test_a_mask_that_is_no_image_is_named(tmp_path: Path) -> None:
    write_mvtec(tmp_path)
    (tmp_path / "ground_truth/scratch/001_mask.png").write_bytes(b"broken")
    with pytest.raises(DatasetError, match=r"001_mask\.png is not a readable image"):
        read_category(tmp_path)


def test_an_image_stays_defective_with_an_empty_mask(tmp_path: Path) -> None:
    write_mvtec(tmp_path)
    write_mask(tmp_path / "ground_truth/scratch/001_mask.png")
    item = read_category(tmp_path).test[-1]
    assert not item.good
    assert not read_mask(item.mask, (HEIGHT, WIDTH)).any()


def test_a_good_part_stays_good_whatever_a_mask_says(tmp_path: Path) -> None:
    write_mvtec(tmp_path)
    write_mask(tmp_path / "ground_truth/good/000_mask.png", (1, 1))
    assert read_category(tmp_path).test[0] == Labelled(tmp_path / "test/good/000.png", "good", None)


@pytest.mark.parametrize(
    ("gone", "reason"),
    [("test/good", "0 good and 2 defective"), ("test/scratch", "1 good and 0 defective"), ("test", "no folder test/")],
)
def test_a_test_set_needs_good_parts_and_defects(tmp_path: Path, gone: str, reason: str) -> None:
    write_mvtec(tmp_path)
    shutil.rmtree(tmp_path / gone)
    with pytest.raises(DatasetError, match=reason):
        read_category(tmp_path)


def test_a_folder_in_no_layout_is_told_what_was_looked_for(tmp_path: Path) -> None:
    write_images(tmp_path, "000.png")
    with pytest.raises(DatasetError, match=r"(?s)in no layout known here.*test/DEFECT.*test/ko.*1cls\.csv.*good/ and"):
        read_category(tmp_path)


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no such folder: .*/nowhere"):
        read_category(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"no such folder: .*/nowhere"):
        categories(tmp_path / "nowhere")


def test_categories_are_found_at_the_root_in_it_and_one_level_deeper(tmp_path: Path) -> None:
    screw = write_mvtec(tmp_path / "mvtec_ad/screw")
    bolt = write_mvtec(tmp_path / "mvtec_ad/bolt")
    candle = write_visa(tmp_path)
    (tmp_path / ".trash").mkdir()
    write_mvtec(tmp_path / ".trash/old")
    write_mvtec(tmp_path / "much/too/deep")
    assert categories(screw) == [screw]
    assert categories(tmp_path / "mvtec_ad") == [bolt, screw]
    assert categories(tmp_path) == [candle, bolt, screw]


def test_a_root_without_categories_is_an_error(tmp_path: Path) -> None:
    write_images(tmp_path / "photos/of/parts", "000.png")
    with pytest.raises(DatasetError, match="is in a layout known here"):
        categories(tmp_path)


def test_the_folder_one_stands_in_has_its_name(tmp_path: Path) -> None:
    with contextlib.chdir(write_visa(tmp_path)):
        assert read_category(Path()).name == "candle"


def test_a_folder_of_good_parts_one_level_too_high_hints_at_the_right_one(tmp_path: Path) -> None:
    write_images(tmp_path / "train/ok", "000.png")
    with pytest.raises(DatasetError, match=r"did you mean .*train/ok\?"):
        good_images(tmp_path)


@pytest.mark.parametrize("category", REAL)
def test_real_categories_are_read_whole(category: str) -> None:
    data = os.environ.get("INSPECTD_DATA")
    if not data:
        pytest.skip("INSPECTD_DATA names no folder of real images")
    found = read_category(Path(data) / category)
    tested = Counter(item.good for item in found.test)
    masks = sum(item.mask is not None for item in found.test)
    assert (found.layout, len(found.good), tested[True], tested[False], masks) == REAL[category]
    assert Path(data) / category in categories(Path(data))
