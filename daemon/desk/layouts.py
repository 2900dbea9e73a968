"""Where published data sets, and plain folders, keep their good parts, their test images and their masks.

Labels come from the names of folders, or from the data set's table, never from masks; a mask belongs to the image of
its stem. Bergmann et al., MVTec AD (2019), MVTec LOCO (2022) and MVTec 3D-AD (2022); Zou et al., VisA (2022); Mishra
et al., BTAD (2021); Baitieva et al., VAD (2024).
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags
from PIL import Image as Pillow

from daemon import images

_KNOWN = """
  MVTec AD, LOCO or VAD: train/good, test/good, test/DEFECT, ground_truth/DEFECT (masks)
  MVTec 3D-AD: the same with rgb/ and gt/ in every folder
  BTAD: train/ok, test/ok, test/ko, ground_truth/ko
  VisA: Data/Images, and the table split_csv/1cls.csv beside the folder
  plain: good/ and one folder for each defect"""
_SAME_ASPECT = 0.02  # two sides rounded to whole pixels, never a turned or a foreign mask
_FEWEST = 3  # good parts of a plain folder: one to test, two to learn from and to calibrate on
_TURNED = 5  # EXIF orientations from here on swap width and height


class DatasetError(Exception):
    """A folder that does not hold what is asked of it; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Saturation:
    """How much of a region has to be found: pixels of its mask's file, or a share of its area where `relative`."""

    threshold: float
    relative: bool


@dataclass(frozen=True, slots=True)
class Labelled:
    """One test image: its defect is the name of its folder, "good" for none.

    The mask is absent, a file, or a folder with a file for each region of the image. `saturations` are by the value
    of a region's pixels, None where the data set defines none.
    """

    path: Path
    defect: str
    mask: Path | None
    saturations: Mapping[int, Saturation] | None = None

    @property
    def good(self) -> bool:
        """Whether the part is one that must pass."""
        return self.defect == "good"


@dataclass(frozen=True, slots=True)
class Category:
    """One kind of part: good parts to learn from, good parts to calibrate on, and a test set.

    `layout` is mvtec_ad, mvtec_loco, mvtec_3d, visa, vad, btad or plain. `good` is empty where there is a test set
    only; `held` is, unless the data set has a validation set. The test set has good parts and defects.
    """

    name: str
    layout: str
    good: list[Path]
    held: list[Path]
    test: list[Labelled]


def read_category(folder: Path) -> Category:
    """Find what a folder holds, in whichever layout it is; no image is decoded.

    Of plain folders a third of the good parts, always the same, becomes part of the test set.

    Raises:
        DatasetError: no layout fits, the test set lacks good parts or defects, an image has no mask although others
            of its defect have, or a mask has another shape than its image.
    """
    if not folder.is_dir():
        raise DatasetError(f"no such folder: {folder}")
    match _layout(folder):
        case None:
            raise DatasetError(f"{folder} is in no layout known here; put its images in one of{_KNOWN}")
        case "visa":
            found = _visa(folder)
        case "plain":
            found = _plain(folder)
        case layout:
            found = _split(folder, layout)
    goods = sum(item.good for item in found.test)
    if goods in {0, len(found.test)}:
        raise DatasetError(
            f"{folder} ({found.layout}) has {goods} good and {len(found.test) - goods} defective test images; "
            "it needs both"
        )
    for item in found.test:
        _check_shape(item)
    return found


def categories(root: Path) -> list[Path]:
    """The folders that `read_category` can read: the root itself, or those in it and one level deeper, sorted.

    Only names of folders are looked at.

    Raises:
        DatasetError: there is none.
    """
    if not root.is_dir():
        raise DatasetError(f"no such folder: {root}")
    if _layout(root):
        return [root]
    near = folders(root)
    found = [folder for child in near for folder in ([child] if _layout(child) else folders(child)) if _layout(folder)]
    if not found:
        raise DatasetError(f"neither {root}, nor a folder in it, nor one in those, is in a layout known here:{_KNOWN}")
    return found


def image_files(folder: Path) -> list[Path]:
    """The images directly in a folder, sorted by name, without hidden ones; none where there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in images.SUFFIXES and not p.name.startswith("."))


def folders(folder: Path) -> list[Path]:
    """The folders directly in a folder, sorted by name, without hidden ones; none where there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _layout(folder: Path) -> str | None:
    """Name the layout by its folders: the first of these signs that is there."""
    train, test = folder / "train", folder / "test"
    bad_only = (test / "bad").is_dir() and not (folder / "ground_truth").is_dir()
    signs = {
        "visa": (folder / "Data" / "Images").is_dir(),
        "btad": (train / "ok").is_dir() or (test / "ok").is_dir(),
        "mvtec_3d": (train / "good" / "rgb").is_dir() or (test / "good" / "rgb").is_dir(),
        "mvtec_loco": (test / "logical_anomalies").is_dir() or (test / "structural_anomalies").is_dir(),
        "vad": (train / "bad").is_dir() or bad_only,
        "mvtec_ad": train.is_dir() or test.is_dir(),
        "plain": (folder / "good").is_dir(),
    }
    return next((layout for layout, here in signs.items() if here), None)


def _split(folder: Path, layout: str) -> Category:
    """Read train/, validation/ and test/. Of train/ nothing but the good parts: VAD has a train/bad too."""
    if not (folder / "test").is_dir():
        raise DatasetError(f"{folder} has no folder test/ with good parts and one folder per defect")
    normal = "ok" if layout == "btad" else "good"
    test: list[Labelled] = []
    for kind in folders(folder / "test"):
        if kind.name == normal:
            test += [Labelled(path, "good", None) for path in _pictures(kind)]
        else:
            test += _defective(folder, kind)
    train, validation = folder / "train" / normal, folder / "validation" / normal
    return Category(folder.absolute().name, layout, _pictures(train), _pictures(validation), test)


def _plain(folder: Path) -> Category:
    pool = image_files(folder / "good")
    if len(pool) < _FEWEST:
        raise DatasetError(f"{folder / 'good'} has {len(pool)} images; give {_FEWEST} or more, for a third is tested")
    chosen = set(np.random.default_rng(1).permutation(len(pool))[: len(pool) // 3].tolist())
    test = [Labelled(path, "good", None) for i, path in enumerate(pool) if i in chosen]
    for kind in folders(folder):
        if kind.name not in {"good", "ground_truth", "masks"}:
            test += _defective(folder, kind)
    learn = [path for i, path in enumerate(pool) if i not in chosen]
    return Category(folder.absolute().name, "plain", learn, [], test)


def _visa(folder: Path) -> Category:
    """Read the rows of one object in the one-class split; paths in the table start at the folder above."""
    root, name = folder.absolute().parent, folder.absolute().name
    table = root / "split_csv" / "1cls.csv"
    if not table.is_file():
        raise DatasetError(f"{folder} is in the layout of VisA, but its table {table} is missing; put it there")
    with table.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = {"object", "split", "label", "image", "mask"}.difference(reader.fieldnames or ())
        if missing:
            raise DatasetError(f"{table} has no column {', '.join(sorted(missing))}; use the table of the data set")
        rows = [row for row in reader if row["object"] == name]
    if not rows:
        raise DatasetError(f"{table} has no row of the object {name}")
    good: list[Path] = []
    test: list[Labelled] = []
    for row in rows:
        match row["split"], row["label"]:
            case "train", "normal":
                good.append(_listed(root, row["image"], table))
            case "test", "normal":
                test.append(Labelled(_listed(root, row["image"], table), "good", None))
            case "test", "anomaly":
                paths = [_listed(root, row[column], table) for column in ("image", "mask")]
                test.append(Labelled(paths[0], "anomaly", paths[1]))
            case split, label:
                raise DatasetError(f"{table} calls {row['image']} {split} and {label}; that is not the one-class split")
    return Category(name, "visa", sorted(good), [], sorted(test, key=lambda item: (item.defect, item.path)))


def _listed(root: Path, entry: str | None, table: Path) -> Path:
    """Find a file named in a table; copies of the data set have its suffixes in capitals or not."""
    if not entry:
        raise DatasetError(f"{table} leaves the file of a test image or its mask empty; use the table of the data set")
    path = root / entry
    for suffix in (path.suffix, path.suffix.lower(), path.suffix.upper()):
        if path.with_suffix(suffix).is_file():
            return path.with_suffix(suffix)
    raise DatasetError(f"{path} is named in {table} but missing; copy the data set again")


def _pictures(kind: Path) -> list[Path]:
    """The images of a folder, or of the colour camera where depth was taken too."""
    return image_files(kind / "rgb") or image_files(kind)


def _defective(folder: Path, kind: Path) -> list[Labelled]:
    """Pair the images of a defect with their masks: all of them have one, or none."""
    pictures = _pictures(kind)
    masks = _masks(folder, kind)
    for path in pictures:
        if masks and path.stem not in masks:
            place = next(iter(masks.values())).parent
            raise DatasetError(f"{path} has no mask in {place}, though its neighbours have; add it")
    saturations = _saturations(folder / "defects_config.json")
    return [Labelled(path, kind.name, masks.get(path.stem), saturations) for path in pictures]


def _saturations(table: Path) -> dict[int, Saturation] | None:
    if not table.is_file():
        return None
    try:
        return {
            row["pixel_value"]: Saturation(row["saturation_threshold"], row["relative_saturation"])
            for row in json.loads(table.read_text(encoding="utf-8"))
            if row["saturation_threshold"] > 0
        }
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DatasetError(f"{table} is no table of saturations ({error!r}); use the one of the data set") from error


def _masks(folder: Path, kind: Path) -> dict[str, Path]:
    """The masks of a defect by their images' stems: STEM_mask.png, STEM.png, or a folder STEM of several."""
    root = next((p for p in (folder / "ground_truth", folder / "masks") if p.is_dir()), folder / "ground_truth")
    stray = image_files(root)
    if stray:
        raise DatasetError(f"{stray[0]} belongs to no defect; put masks in one folder per defect, like {kind.name}/")
    truth = kind / "gt" if (kind / "gt").is_dir() else root / kind.name
    found: dict[str, Path] = {}
    for path in image_files(truth) + folders(truth):
        stem = path.name if path.is_dir() else path.stem.removesuffix("_mask")
        if stem in found:
            raise DatasetError(f"{found[stem]} and {path} are masks of the same image; keep one")
        found[stem] = path
    return found


def _check_shape(item: Labelled) -> None:
    if item.mask is None:
        return
    files: Sequence[Path] = image_files(item.mask) if item.mask.is_dir() else [item.mask]
    if not files:
        raise DatasetError(f"{item.mask} is a folder for masks but holds none; add them")
    width, height = _size(item.path)
    for file in files:
        across, down = _size(file)
        if abs(width * down / (height * across) - 1) > _SAME_ASPECT:
            raise DatasetError(
                f"the mask {file} is {across}×{down} pixels, which does not fit its image {item.path} of "
                f"{width}×{height}; do they belong together?"
            )


def _size(path: Path) -> tuple[int, int]:
    """Width and height of an upright image, by its header."""
    try:
        with Pillow.open(path) as picture:
            width, height = picture.size
            turned = picture.getexif().get(ExifTags.Base.Orientation, 1) >= _TURNED
    except (OSError, SyntaxError, ValueError) as error:  # as Pillow's parsers please
        raise DatasetError(f"{path} is not a readable image; repair it or take it out of the folder") from error
    return (height, width) if turned else (width, height)
