"""A golden set survives its file and nothing else's, and tells the model that it was made with from others."""

import math
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.calibration import Calibration, CalibrationError, Provenance, fit
from calibration.golden import TOLERANCE, Golden, discard, load, place, save, spread
from detectors.base import Detector, Image
from detectors.engines.pytorch import Eager
from detectors.reverse_distillation.comparison import ReverseDistillationComparison
from detectors.reverse_distillation.detector import run_by
from detectors.reverse_distillation.network import PUBLISHED_SKIPS, ReverseDistillation
from detectors.teacher import Teacher, preprocess_for
from detectors.template import TemplateDetector

PROVENANCE = Provenance("model-a", "d" * 64, datetime(2026, 3, 4, 12, tzinfo=UTC), engine="opencv cpu float32")
TEMPLATE = np.random.default_rng(0).integers(60, 200, (32, 48, 3), dtype=np.uint8)


def parts(n: int) -> list[Image]:
    """Images that look like the template, each a little otherwise."""
    rng = np.random.default_rng(1)
    return [np.clip(TEMPLATE + rng.normal(0, 10, TEMPLATE.shape), 0, 255).astype(np.uint8) for _ in range(n)]


def scores(detector: Detector, images: tuple[Image, ...]) -> list[float]:
    return [detector.predict([image])[0].anomaly_score for image in images]


def calibrate(measured: list[float]) -> Calibration:
    return fit(measured, alpha=0.1, provenance=PROVENANCE)


def made(detector: Detector, n: int = 20) -> Golden:
    images = parts(n)
    measured = scores(detector, tuple(images))
    chosen = spread(measured)
    return Golden(
        calibrate(measured), tuple(images[number] for number in chosen), tuple(measured[number] for number in chosen)
    )


def plain(measured: list[float]) -> Golden:
    """A golden set of all scores, whose images nobody looks at."""
    return Golden(calibrate(measured), (TEMPLATE,) * len(measured), tuple(measured))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "calibration.json"


def network() -> ReverseDistillation:
    torch.manual_seed(3)
    return ReverseDistillation(Teacher("resnet18"), PUBLISHED_SKIPS).eval()


def networked(one: ReverseDistillation) -> Detector:
    preprocess = preprocess_for("resnet18", 64)
    return run_by(Eager(ReverseDistillationComparison(one, preprocess)), preprocess, "model-a")


@pytest.mark.parametrize(
    ("n", "ranks"), [(1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3, 4]), (101, [0, 25, 50, 75, 100])]
)
def test_the_lowest_the_quartiles_and_the_highest_are_kept_each_once(n: int, ranks: list[int]) -> None:
    measured = np.random.default_rng(n).normal(size=n)
    assert [measured[number] for number in spread(measured)] == [np.sort(measured)[rank] for rank in ranks]


def test_what_is_saved_is_loaded_again_to_the_last_bit(file: Path) -> None:
    golden = made(TemplateDetector(TEMPLATE))
    larger = Golden(golden.calibration, (*golden.images[:4], np.tile(TEMPLATE, (2, 3, 1))), golden.scores)
    for one in (golden, larger):
        path = save(one, file)
        kept = load(file, one.calibration)
        assert kept is not None
        assert kept.scores == one.scores
        assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(kept.images, one.images, strict=True))
        assert list(path.parent.iterdir()) == [path]


def test_calibrations_of_one_folder_keep_their_sets_apart(tmp_path: Path) -> None:
    golden = made(TemplateDetector(TEMPLATE))
    save(golden, tmp_path / "cam1.json")
    assert load(tmp_path / "cam2.json", golden.calibration) is None
    assert load(tmp_path / "cam1.json", golden.calibration) is not None
    assert load(tmp_path / "cam1.json", calibrate([1.0, 2.0, 3.0])) is None
    discard(tmp_path / "cam2.json", golden.calibration.id)
    discard(tmp_path / "cam1.json", golden.calibration.id)
    assert load(tmp_path / "cam1.json", golden.calibration) is None


def test_another_calibrations_set_is_refused(file: Path) -> None:
    golden, other = made(TemplateDetector(TEMPLATE)), calibrate([1.0, 2.0, 3.0])
    save(golden, file).rename(place(file, other.id))
    with pytest.raises(CalibrationError, match=r"npz: the golden set is torn, edited or another calibration's"):
        load(file, other)
    save(Golden(other, golden.images, golden.scores), file)
    with pytest.raises(CalibrationError, match="its scores are not the calibration's"):
        load(file, other)


@pytest.mark.parametrize("edit", ["scores", "image3", "sha256"])
def test_an_edited_set_is_refused(file: Path, edit: str) -> None:
    golden = made(TemplateDetector(TEMPLATE))
    path = save(golden, file)
    with np.load(path) as kept:
        arrays = dict(kept)
    arrays[edit] = np.array("0" * 64) if edit == "sha256" else arrays[edit] + np.ones_like(arrays[edit])
    with path.open("wb") as stream:
        np.savez(stream, **arrays)
    with pytest.raises(CalibrationError, match="its SHA-256 is another"):
        load(file, golden.calibration)
    del arrays[edit]
    np.savez(path, **arrays)
    with pytest.raises(CalibrationError, match="torn, edited"):
        load(file, golden.calibration)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_torn_set_is_refused_and_a_spoiled_byte_changes_nothing_unseen(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    file = tmp_path_factory.mktemp("golden") / "calibration.json"
    golden = made(TemplateDetector(TEMPLATE), 2)
    path = save(golden, file)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(CalibrationError, match=r"torn, edited|cannot be read"):
        load(file, golden.calibration)
    spoiled = bytearray(whole)
    spoiled[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(spoiled)
    try:
        kept = load(file, golden.calibration)
    except CalibrationError:
        return
    assert kept is not None  # what was spoiled says nothing, like a date in the archive
    assert kept.scores == golden.scores
    assert all(map(np.array_equal, kept.images, golden.images))


def test_a_set_that_cannot_be_read_says_why(file: Path) -> None:
    golden = made(TemplateDetector(TEMPLATE))
    place(file, golden.calibration.id).mkdir(parents=True)
    with pytest.raises(CalibrationError, match="the golden set cannot be read: Is a directory"):
        load(file, golden.calibration)


def test_the_same_model_is_verified_and_images_prepared_otherwise_are_not() -> None:
    detector = TemplateDetector(TEMPLATE)
    golden = made(detector)
    assert golden.verify(scores(detector, golden.images)) == 0
    turned = tuple(np.ascontiguousarray(image[::-1]) for image in golden.images)
    shifted = tuple(np.roll(image, 2, axis=1) for image in golden.images)
    for other in (turned, shifted):
        with pytest.raises(CalibrationError, match=r"golden image \d of 5 scored"):
            golden.verify(scores(detector, other))


def test_a_network_is_verified_alone_and_in_a_batch_until_one_of_its_tensors_changes() -> None:
    one = network()
    golden = made(networked(one), 8)
    assert golden.verify(scores(networked(one), golden.images)) < 1e-3
    assert golden.verify([found.anomaly_score for found in networked(one).predict(golden.images)]) < TOLERANCE
    with torch.no_grad():
        next(one.decoder.parameters()).mul_(-1)
    with pytest.raises(CalibrationError, match=r"golden image \d of 5 scored"):
        golden.verify(scores(networked(one), golden.images))


def test_who_reads_the_refusal_learns_which_image_how_far_and_what_to_do() -> None:
    golden = plain([1.0, 2.0, 3.0, 4.0, 5.0])
    with pytest.raises(CalibrationError) as refused:
        golden.verify([1.0, 2.05, 3.0, 4.2, 5.0])
    for said in (
        golden.calibration.id,
        "golden image 4 of 5 scored 4 when the model was calibrated and scores 4.2 now",
        "threshold 5; they may differ by 0.1)",
        "opencv cpu float32",
        "run `inspectd calibrate`",
    ):
        assert said in str(refused.value)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_refused_before_any_other(number: float) -> None:
    with pytest.raises(CalibrationError, match=r"golden image 2 of 3 .* scores -?(nan|inf) now"):
        plain([1.0, 2.0, 3.0]).verify([9.0, number, 3.0])


def test_the_tolerance_is_a_share_of_the_way_from_the_median_to_the_threshold() -> None:
    golden = plain([-4.0, -2.0, 0.5])  # as EfficientAD may score: the threshold itself says nothing of the spread
    assert golden.verify([-4.0, -2.1, 0.5]) == pytest.approx(0.04)
    with pytest.raises(CalibrationError, match="golden image 1 of 3"):
        golden.verify([-4.13, -2.0, 0.5])


def test_the_last_digits_are_no_difference_where_all_good_parts_are_alike() -> None:
    for measured in ([2.0], [2.0, 2.000001]):
        golden = plain(measured)
        assert golden.verify([score + 1e-5 for score in measured]) < TOLERANCE
        with pytest.raises(CalibrationError, match="golden image 1"):
            golden.verify([1.9, *measured[1:]])


def test_a_score_at_the_threshold_may_come_to_lie_just_above_it() -> None:
    golden = plain([1.0, 2.0, 3.0])
    assert golden.calibration.threshold == 3
    assert not golden.calibration.passes(3.0001)
    assert 0 < golden.verify([1.0, 2.0, 3.0001]) < TOLERANCE


def test_as_many_scores_as_images_are_asked_for() -> None:
    with pytest.raises(ValueError, match="zip"):
        plain([1.0, 2.0, 3.0]).verify([1.0, 2.0])
