"""Which engines may take the reference's place."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.parity import MOST_FLIPS, MOST_SHIFT, Scores, compare

RNG = np.random.default_rng(0)
GOOD, BAD = RNG.normal(1, 0.1, 100).tolist(), RNG.normal(2, 0.3, 50).tolist()
REFERENCE = Scores(GOOD, BAD, 1.4)


def shifted(by: float, good: list[float] = GOOD, bad: list[float] = BAD) -> Scores:
    return Scores([score + by for score in good], [score + by for score in bad], 1.4 + by)


def test_the_reference_is_like_itself() -> None:
    found = compare(REFERENCE, REFERENCE)
    assert not found.faults
    assert (found.parts, found.flips, found.shift) == (150, 0, 0)
    assert found.rank == pytest.approx(1)
    assert found.auroc == found.reference_auroc == pytest.approx(REFERENCE.auroc)


def test_what_all_scores_have_in_common_goes_into_the_threshold_and_is_no_fault() -> None:
    found = compare(REFERENCE, shifted(0.05))
    assert not found.faults
    assert found.shift == pytest.approx(0.05 / (1.4 - np.median(GOOD)))
    assert found.flips == 0


def test_scores_that_moved_far_are_refused_even_if_their_order_is_kept() -> None:
    (fault,) = compare(REFERENCE, shifted(0.2)).faults
    assert f"{MOST_SHIFT:.0%} may" in fault


@pytest.mark.parametrize(("flips", "refused"), [(1, False), (3, False), (4, True)])
def test_a_few_other_verdicts_are_allowed_and_more_are_not(flips: int, refused: bool) -> None:  # noqa: FBT001
    good = [*GOOD]
    for place in range(flips):
        good[place] = 1.41
    found = compare(REFERENCE, Scores(good, BAD, 1.4))
    assert found.flips == flips
    assert found.most_flips == int(MOST_FLIPS * 150) == 3
    assert any("verdicts" in fault for fault in found.faults) == refused


def test_one_other_verdict_is_allowed_however_few_parts_there_are() -> None:
    few = Scores(GOOD[:10], [], 1.4)
    found = compare(few, Scores([1.41, *GOOD[1:10]], [], 1.4))
    assert found.flips == 1
    assert not any("verdicts" in fault for fault in found.faults)


def test_bad_parts_that_are_told_worse_refuse_an_engine_that_keeps_all_verdicts() -> None:
    good, bad = [1.0 + n / 1000 for n in range(100)], [1.05 + n / 1000 for n in range(100)]
    reference = Scores(good, bad, 3.0)  # nothing is rejected, so no verdict can be another
    found = compare(reference, Scores(good, [score - 0.004 for score in bad], 3.0))
    assert found.flips == 0
    assert any("AUROC" in fault for fault in found.faults)


@pytest.mark.parametrize(("rise", "kept", "refused"), [(0.7, 0.7, True), (0.8, 0.8, False), (1.3, 1.3, False)])
def test_an_engine_that_sees_much_less_of_a_spoiled_part_is_refused_though_good_parts_are_judged_alike(
    rise: float,
    kept: float,
    refused: bool,  # noqa: FBT001
) -> None:
    reference = Scores(GOOD, [], 1.4, [score + 1 for score in GOOD])
    found = compare(reference, Scores(GOOD, [], 1.4, [score + rise for score in GOOD]))
    assert found.kept == pytest.approx(kept)
    assert any("spoiled parts rise 70% as far" in fault for fault in found.faults) == refused
    assert f"spoiled parts rise {kept:.0%} as far" in str(found)


def test_spoiled_parts_that_the_reference_does_not_see_say_nothing() -> None:
    found = compare(Scores(GOOD, [], 1.4, GOOD), Scores(GOOD, [], 1.4, GOOD))
    assert found.kept is None
    assert not found.faults


@pytest.mark.parametrize("broken", [[math.nan], [math.inf], [1.0]], ids=["no number", "infinite", "all alike"])
@pytest.mark.parametrize("bad", [BAD, []], ids=["with bad parts", "good parts alone"])
def test_an_engine_that_gives_no_scores_worth_the_name_is_refused(broken: list[float], bad: list[float]) -> None:
    reference = Scores(GOOD, bad, 1.4)
    assert compare(reference, Scores(broken * 100, broken * len(bad), 1.4)).faults


@given(st.floats(0, 0.3), st.integers(0, 2**32 - 1))
def test_noise_lowers_the_rank_and_moves_scores(noise: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    noisy = Scores(
        (GOOD + rng.normal(0, noise, 100)).tolist(), (BAD + rng.normal(0, noise, 50)).tolist(), REFERENCE.threshold
    )
    found = compare(REFERENCE, noisy)
    assert -1 <= found.rank <= 1 + 1e-12
    assert found.largest_shift >= found.shift >= 0
    assert 0 <= found.flips <= found.parts


def test_one_sentence_tells_it_on_the_card() -> None:
    assert str(compare(REFERENCE, shifted(0.04))) == (
        "of 150 parts 0 other verdicts than by the reference, rank correlation 1.0000, scores moved by 10.2% of the "
        "way to the threshold (median), image AUROC 1.0000 against 1.0000"
    )
