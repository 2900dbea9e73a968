"""Every figure of an evaluation follows by hand from grey levels: part = template + score."""

import json
import math
import resource
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from calibration.calibration import Calibration, Provenance, fit
from calibration.metrics import binomial_interval
from daemon.desk import dataset
from daemon.desk.evaluation import Evaluation, Judged, evaluate
from detectors.template import TemplateDetector

SIDE = 16
GREY = 100
GOOD = [1] * 17 + [2, 4, 6]
UPPER_HALF, LEFT_QUARTER, NOWHERE = (np.zeros((SIDE, SIDE), np.uint8) for _ in range(3))
UPPER_HALF[: SIDE // 2] = 255
LEFT_QUARTER[:, : SIDE // 4] = 255

detector = TemplateDetector(np.full((SIDE, SIDE, 3), GREY, np.uint8))


def write_part(path: Path, score: int) -> None:
    """Write a part that the detector scores so, everywhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((SIDE, SIDE, 3), GREY + score, np.uint8))


def write_parts(folder: Path, defect: str, scores: Sequence[int], masks: Sequence[NDArray[np.uint8]] = ()) -> None:
    for index, score in enumerate(scores):
        write_part(folder / "test" / defect / f"{index:02}.png", score)
    for index, mask in enumerate(masks):
        truth = folder / "ground_truth" / defect
        truth.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(truth / f"{index:02}_mask.png"), mask)


def write_saturations(folder: Path, *saturations: tuple[int, float, bool]) -> None:
    """Write a table with a row a defect: the value of its pixels, its saturation, and whether that is relative."""
    keys = ("pixel_value", "saturation_threshold", "relative_saturation")
    rows = [{"defect_name": "scratch"} | dict(zip(keys, row, strict=True)) for row in saturations]
    (folder / "defects_config.json").write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    """Three good parts, a threshold of 5."""
    path, scores = tmp_path_factory.mktemp("calibration") / "part.png", []
    for score in (1, 5, 3):
        write_part(path, score)
        (prediction,) = detector.predict([dataset.read_image(path)])
        scores.append(prediction.anomaly_score)
    provenance = Provenance(detector.fingerprint, "", datetime(2026, 1, 2, tzinfo=UTC))
    return fit(scores, alpha=0.25, provenance=provenance)


def measure(folder: Path, calibration: Calibration) -> Evaluation:
    advanced: list[None] = []
    items = dataset.labelled_images(folder)
    found = evaluate(detector, calibration, items, lambda: advanced.append(None))
    assert len(advanced) == len(items)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty good parts, two with a scratch and a mask, and one with a dent and none; half a scratch is enough."""
    folder = tmp_path_factory.mktemp("parts")
    write_parts(folder, "good", GOOD)
    write_parts(folder, "scratch", [8, 5], [UPPER_HALF, LEFT_QUARTER])
    write_parts(folder, "dent", [3])
    write_saturations(folder, (255, 0.5, True))
    return folder


@pytest.fixture(scope="module")
def found(folder: Path, calibration: Calibration) -> Evaluation:
    return measure(folder, calibration)


def test_every_part_is_listed_with_its_score_and_what_became_of_it(found: Evaluation, folder: Path) -> None:
    expected = [("dent", 0, 3), *(("good", i, s) for i, s in enumerate(GOOD)), ("scratch", 0, 8), ("scratch", 1, 5)]
    assert found.parts == tuple(
        Judged(str(folder / "test" / defect / f"{index:02}.png"), defect, score, rejected=score > 5)
        for defect, index, score in expected
    )


def test_the_areas_of_parts_are_as_counted_by_hand(found: Evaluation) -> None:
    # Good parts below 8, 5 and 3: 20, 19 and 18.
    assert found.image_auroc == pytest.approx(57 / 60)
    assert found.image_auroc_by_defect == pytest.approx({"scratch": 39 / 40, "dent": 18 / 20})
    assert found.image_auroc_mean == pytest.approx((39 / 40 + 18 / 20) / 2)
    # From above: 8 bad, 6 good, 5 bad, 4 good, 3 bad.
    assert found.average_precision == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    assert found.f1_max == pytest.approx(6 / 8)
    low, high = found.image_auroc_interval
    # The worst draw of bad parts is the dent alone; it comes up once in 27 times.
    assert 0.8 < low < 57 / 60 < high <= 1.0


def test_true_rejects_are_those_above_the_good_parts_that_must_pass(found: Evaluation) -> None:
    # Of 20 good parts 1 % is none: the threshold is 6. 5 % is one: the threshold is 4.
    assert found.true_reject_at_1 == pytest.approx(1 / 3)
    assert found.true_reject_at_5 == pytest.approx(2 / 3)
    # Three bad parts, and a threshold that hangs on two or three good ones, rule nothing out.
    assert found.true_reject_at_1_interval == (0.0, 1.0)
    assert found.true_reject_at_5_interval == (0.0, 1.0)


def test_rates_are_those_at_the_calibrated_threshold(found: Evaluation) -> None:
    assert (found.threshold, found.alpha, found.alpha_carried) == (5.0, 0.25, 0.25)
    assert (found.n_good, found.n_defect) == (20, 3)
    assert found.false_reject_rate == 1 / 20
    assert found.false_reject_interval == binomial_interval(1, 20)
    # The scratch that scores as the threshold passes.
    assert found.escape_rate == 2 / 3
    assert found.escape_interval == binomial_interval(2, 3)
    assert found.missed == {"dent": 1, "scratch": 1}
    assert found.present == {"dent": 1, "scratch": 2}


def test_pixel_figures_leave_out_the_bad_part_without_a_mask(found: Evaluation) -> None:
    assert found.n_masked == 2
    # Bad pixels: 128 at 8 and 64 at 5. Normal ones: 128 at 8, 256 at 6, 192 at 5, 256 at 4, 18 images below.
    normal = 20 * 256 + 128 + 192
    above_half = 128 * (normal - 128 + 128 / 2) + 64 * (20 * 256 - 256 + 192 / 2)
    assert found.pixel_auroc == pytest.approx(above_half / (192 * normal))
    # Overlap rises to 1/2 with the pixels at 8, stays with those at 6, rises to 1 with those at 5, and stays.
    area = (128 * 0.25 + 256 * 0.5 + 192 * 0.75) / normal + (0.3 - (128 + 256 + 192) / normal)
    assert found.aupro == pytest.approx(area / 0.3)
    # The scratch at 8 is found at once, and nothing else before 5 %: the good part at 6 leads beyond that.
    assert found.au_spro == pytest.approx((128 * 0.25 + (0.05 * normal - 128) * 0.5) / (0.05 * normal))
    # Within each image the map is constant.
    assert found.pro_per_image_rd == 0.0


def test_the_evaluation_says_what_it_took(found: Evaluation) -> None:
    assert 0 < found.latency_ms_p50 <= found.latency_ms_p99
    # This interpreter with its libraries takes more than 10 MB, and no more than it has taken by now.
    assert 10 < found.peak_memory_mb <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def test_the_figures_are_plain_numbers_that_json_keeps(found: Evaluation) -> None:
    kept = json.loads(json.dumps(asdict(found), allow_nan=False))
    assert tuple(Judged(**part) for part in kept["parts"]) == found.parts
    assert kept["image_auroc_by_defect"] == found.image_auroc_by_defect


def test_without_masks_there_are_no_pixel_figures(tmp_path: Path, calibration: Calibration) -> None:
    write_parts(tmp_path, "good", [1, 2])
    write_parts(tmp_path, "dent", [7, 8])
    found = measure(tmp_path, calibration)
    assert found.n_masked == 0
    figures = (found.pixel_auroc, found.aupro, found.au_spro, found.pro_per_image_rd)
    assert all(math.isnan(figure) for figure in figures)
    assert found.image_auroc == 1.0


def test_a_bad_part_with_an_empty_mask_says_nothing_of_pixels(tmp_path: Path, calibration: Calibration) -> None:
    write_parts(tmp_path, "good", [1, 2])
    write_parts(tmp_path, "scratch", [6, 9], [UPPER_HALF, NOWHERE])
    found = measure(tmp_path, calibration)
    assert found.n_masked == 1
    # 128 bad pixels at 6 against 128 normal ones at 6 and two images below; none at 9.
    assert found.pixel_auroc == pytest.approx((512 + 128 / 2) / (512 + 128))
    assert math.isnan(found.au_spro)  # for nothing says how much of a scratch is enough


def test_saturated_overlap_is_the_mean_over_defects_each_beside_the_good_parts(
    tmp_path: Path, calibration: Calibration
) -> None:
    write_parts(tmp_path, "good", [0] * 20)
    write_parts(tmp_path, "structural_anomalies", [8], [UPPER_HALF])
    # Bright in its upper half, which the detector blurs five rows into the dark one.
    write_parts(tmp_path, "logical_anomalies", [0])
    bright = np.full((SIDE, SIDE, 3), GREY, np.uint8)
    bright[: SIDE // 2] += 100
    assert cv2.imwrite(str(tmp_path / "test/logical_anomalies/00.png"), bright)
    # One region in two pieces, of 64 and 32 pixels of the map, of which any 80 are enough; masks are twice as fine.
    pieces = np.zeros((2 * SIDE, 2 * SIDE), np.uint8)
    pieces[:8] = pieces[-4:] = 1
    truth = tmp_path / "ground_truth/logical_anomalies/00"
    truth.mkdir(parents=True)
    assert cv2.imwrite(str(truth / "000.png"), pieces)
    write_saturations(tmp_path, (1, 320, False), (255, 0.5, True))
    # Half of the only other image is as high as the region, which is found together with it.
    structural = 1 - 128 / (20 * 256 + 128) / 0.05 / 2
    # The upper piece comes first, then the 9 rows below it, then the lower one with all that is dark.
    false = 9 * SIDE / (20 * 256 + 160)
    logical = 0.8 + 0.2 / (1 - false) * (0.05 - false) ** 2 / 2 / 0.05
    assert measure(tmp_path, calibration).au_spro == pytest.approx((structural + logical) / 2)


def test_one_part_of_each_kind_has_figures_but_no_interval(tmp_path: Path, calibration: Calibration) -> None:
    write_parts(tmp_path, "good", [1])
    write_parts(tmp_path, "dent", [7])
    found = measure(tmp_path, calibration)
    assert (found.image_auroc, found.image_auroc_mean, found.true_reject_at_1, found.f1_max) == (1.0, 1.0, 1.0, 1.0)
    for interval in (found.image_auroc_interval, found.true_reject_at_1_interval, found.true_reject_at_5_interval):
        assert all(math.isnan(bound) for bound in interval)
