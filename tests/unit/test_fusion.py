"""Several views of one part become one verdict: the worst, once, in time, in whatever order they come."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import count, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.fusion import LATE, WAITING, Fate, Fused, Fusion, Key
from daemon.messages import Decision, Outcome, Reason, Trigger, Verdict
from tests.payloads import CAPTURE, PASSED

START = datetime(2026, 11, 22, 8, 0, tzinfo=UTC)
WITHIN_S = 2.0
DECISIONS = {
    Outcome.PASS: Decision(Outcome.PASS, Reason.NONE, "", 0.25, 0.5, 0.5, 0.75),
    Outcome.UNCERTAIN: Decision(Outcome.UNCERTAIN, Reason.UNCERTAIN_BAND, "", 0.625, 0.01, 0.5, 0.75),
    Outcome.FAIL: Decision(Outcome.FAIL, Reason.SCORE_ABOVE_THRESHOLD, "", 1.0, 0.001, 0.5, 0.75),
    Outcome.ERROR: Decision(Outcome.ERROR, Reason.DECODE_FAILED, "the file is empty", None, None, 0.5, 0.75),
}
NUMBERS = count(1)


def moment(now: float) -> datetime:
    return START + timedelta(seconds=now)


def view(station: str, part: str, outcome: Outcome = Outcome.PASS, seen_at: float = 0.0) -> Verdict:
    number = next(NUMBERS)
    at = moment(seen_at)
    capture = replace(
        CAPTURE,
        id=f"{number:026d}",
        station=station,
        part_id=part,
        captured_at=at - timedelta(seconds=1),
        arrived_at=at,
        seen_at=seen_at,
    )
    return replace(PASSED, seq=number, capture=capture, decision=DECISIONS[outcome])


def fusion(*views: str, by: Key = Key.PART_ID, last_seq: int = 0) -> Fusion:
    return Fusion("part", views or ("top", "side"), by, WITHIN_S, last_seq)


def joined(group: Fusion, one: Verdict, now: float | None = None) -> list[Fused]:
    """Join a view, as it is seen unless another moment is given."""
    when = one.capture.seen_at if now is None else now
    fate, fused = group.join(one, when, moment(when))
    assert fate is Fate.JOINED
    return fused


def test_the_last_view_brings_the_verdict_at_once_and_the_first_none() -> None:
    group = fusion()
    assert joined(group, view("top", "SN-1")) == []
    (part,) = joined(group, view("side", "SN-1", Outcome.FAIL, 0.5))
    told = part.verdict
    assert (told.seq, told.capture.station, told.capture.part_id) == (1, "part", "SN-1")
    assert (told.decision.outcome, told.decision.reason) == (Outcome.FAIL, Reason.SCORE_ABOVE_THRESHOLD)
    assert [(one.station, one.outcome, one.ratio) for one in told.views] == [
        ("top", Outcome.PASS, 0.5),
        ("side", Outcome.FAIL, 2.0),
    ]
    assert part.worst.capture.station == "side"
    assert group.waiting == 0
    assert told.capture.id not in {one.id for one in told.views}


@given(st.lists(st.sampled_from(Outcome), min_size=3, max_size=3))
def test_the_worst_view_counts_in_whatever_order_they_come(outcomes: list[Outcome]) -> None:
    names = ("top", "side", "back")
    seen = [view(name, "SN-1", outcome) for name, outcome in zip(names, outcomes, strict=True)]
    found = set()
    for order in permutations(seen):
        group = fusion(*names)
        *early, (part,) = [joined(group, one) for one in order]
        assert early == [[], []]
        found.add((part.verdict.decision, part.worst.seq, part.verdict.views))
    ((decision, _, views),) = found
    worst = next(o for o in (Outcome.ERROR, Outcome.FAIL, Outcome.UNCERTAIN, Outcome.PASS) if o in outcomes)
    assert decision.outcome is worst
    assert [one.station for one in views] == list(names)


def test_what_was_wrong_with_a_view_is_told_with_its_name() -> None:
    group = fusion()
    joined(group, view("top", "SN-1"))
    (part,) = joined(group, view("side", "SN-1", Outcome.ERROR))
    assert part.verdict.decision.reason is Reason.DECODE_FAILED
    assert part.verdict.decision.detail == "side: the file is empty"


def test_a_view_that_is_missing_at_the_deadline_is_an_error_and_comes_too_late_afterwards() -> None:
    group = fusion()
    assert group.patience_s(0.0) is None
    joined(group, view("top", "SN-1", seen_at=1.0), now=1.5)
    assert group.patience_s(1.5) == pytest.approx(1.5)
    assert group.expire(2.99, moment(2.99)) == []
    (part,) = group.expire(3.0, moment(3.0))
    decision = part.verdict.decision
    assert (decision.outcome, decision.reason, decision.score) == (Outcome.ERROR, Reason.VIEW_MISSING, None)
    assert decision.detail == "no verdict of side within 2 s"
    assert [one.station for one in part.verdict.views] == ["top"]
    assert part.verdict.capture.arrived_at == moment(3.0)
    assert group.join(view("side", "SN-1"), 3.1, moment(3.1)) == (Fate.LATE, [])
    assert (group.waiting, group.patience_s(3.1)) == (0, None)
    assert joined(group, view("side", "SN-1", seen_at=3.2)) == []  # it was owed once
    assert group.waiting == 1


def test_a_view_that_was_judged_too_late_joins_nothing_though_it_came_in_time() -> None:
    group = fusion()
    joined(group, view("top", "SN-1"))
    fate, (part,) = group.join(view("side", "SN-1", seen_at=1.0), 2.5, moment(2.5))
    assert (fate, part.verdict.decision.reason) == (Fate.LATE, Reason.VIEW_MISSING)


def test_the_deadline_counts_from_the_arrival_of_the_first_view_whichever_is_judged_first() -> None:
    group = fusion("top", "side", "back")
    joined(group, view("side", "SN-1", seen_at=1.0), now=1.2)
    assert group.patience_s(1.2) == pytest.approx(1.8)
    joined(group, view("top", "SN-1", seen_at=0.5), now=1.3)
    assert group.patience_s(1.3) == pytest.approx(1.2)


def test_parts_that_interleave_are_kept_apart() -> None:
    group = fusion()
    assert joined(group, view("top", "A")) == joined(group, view("top", "B", Outcome.FAIL)) == []
    (b,) = joined(group, view("side", "B"))
    (a,) = joined(group, view("side", "A"))
    assert [(p.verdict.seq, p.verdict.capture.part_id, p.verdict.decision.outcome) for p in (b, a)] == [
        (1, "B", Outcome.FAIL),
        (2, "A", Outcome.PASS),
    ]


@pytest.mark.parametrize("again", [(Outcome.FAIL, Outcome.PASS), (Outcome.PASS, Outcome.FAIL)])
def test_of_a_view_that_comes_again_before_the_others_the_worst_counts(again: Sequence[Outcome]) -> None:
    group = fusion()
    first, second = (view("top", "SN-1", outcome, at) for outcome, at in zip(again, (0.0, 1.0), strict=True))
    assert joined(group, first) == joined(group, second) == []
    assert group.patience_s(1.0) == pytest.approx(1.0)
    (part,) = joined(group, view("side", "SN-1", seen_at=1.5))
    assert part.verdict.decision.outcome is Outcome.FAIL
    assert len(part.verdict.views) == 2


def test_a_part_that_is_sent_again_after_its_verdict_is_another_part() -> None:
    group = fusion()
    for number in (1, 2):
        assert joined(group, view("top", "SN-1", seen_at=number)) == []
        (part,) = joined(group, view("side", "SN-1", seen_at=number))
        assert part.verdict.seq == number


def test_a_part_that_is_sent_again_after_it_was_given_up_is_whole_whichever_view_was_missing() -> None:
    group = fusion()
    joined(group, view("top", "SN-1"))
    assert len(group.expire(2.0, moment(2.0))) == 1
    assert joined(group, view("top", "SN-1", seen_at=3.0)) == []
    (part,) = joined(group, view("side", "SN-1", seen_at=3.5))
    assert part.verdict.decision.outcome is Outcome.PASS


def test_long_after_a_part_was_given_up_its_missing_view_begins_another() -> None:
    group = fusion()
    joined(group, view("top", "SN-1"))
    group.expire(2.0, moment(2.0))
    later = 2.0 + LATE * WITHIN_S + 0.1
    joined(group, view("side", "SN-1", seen_at=later))
    assert group.waiting == 1


@pytest.mark.parametrize("by", Key)
def test_a_view_without_an_id_is_no_parts(by: Key) -> None:
    group = fusion(by=by)
    assert group.join(view("top", ""), 0.0, START) == (Fate.UNNAMED, [])
    assert group.waiting == 0


def test_views_find_each_other_by_the_id_of_their_triggers() -> None:
    group = fusion(by=Key.TRIGGER_ID)

    def triggered(station: str, part: str) -> Verdict:
        one = view(station, part)
        return replace(one, capture=replace(one.capture, trigger=Trigger("0" * 26, 1, START, "T-1", part)))

    assert joined(group, triggered("top", "")) == []
    (part,) = joined(group, triggered("side", "SN-7"))
    assert part.verdict.capture.trigger is not None
    assert (part.verdict.capture.trigger.trigger_id, part.verdict.capture.part_id) == ("T-1", "SN-7")


def test_at_the_end_parts_that_wait_are_given_up_as_aborted() -> None:
    group = fusion(last_seq=41)
    joined(group, view("top", "SN-1", Outcome.FAIL))
    (part,) = group.end(1.0, moment(1.0))
    assert (part.verdict.seq, part.verdict.decision.reason) == (42, Reason.ABORTED)
    assert part.verdict.decision.detail == "no verdict of side before the daemon ended"


def test_a_challenge_part_is_one_if_any_view_says_so() -> None:
    group = fusion()
    joined(group, view("top", "SN-1"))
    (part,) = joined(group, replace(view("side", "SN-1"), challenge=True))
    assert part.verdict.challenge


arrivals = st.lists(
    st.tuples(st.sampled_from(["top", "side", "back"]), st.integers(0, 5), st.sampled_from(Outcome), st.floats(0, 1.5)),
    max_size=60,
)


@given(arrivals)
def test_whatever_comes_each_view_is_in_one_verdict_at_most_and_none_passes_that_has_not_passed_everywhere(
    coming: list[tuple[str, int, Outcome, float]],
) -> None:
    group = fusion("top", "side", "back")
    now, told, fates = 0.0, list[Fused](), Counter[Fate]()
    for station, number, outcome, pause_s in coming:
        now += pause_s
        fate, fused = group.join(view(station, str(number), outcome, now), now, moment(now))
        fates[fate] += 1
        told += fused
        patience = group.patience_s(now)
        assert patience is None or 0 < patience <= WITHIN_S + 1e-9
    told += group.end(now, moment(now))
    assert [part.verdict.seq for part in told] == list(range(1, len(told) + 1))
    ids = [one.id for part in told for one in part.verdict.views]
    assert len(ids) == len(set(ids)) <= fates[Fate.JOINED]
    for part in told:
        passed = [one.station for one in part.verdict.views if one.outcome is Outcome.PASS]
        if part.verdict.decision.outcome is Outcome.PASS:
            assert passed == ["top", "side", "back"]
    assert group.waiting == 0


def test_however_many_parts_lack_a_view_what_is_remembered_is_bounded() -> None:
    group = fusion()
    told = [part for number in range(WAITING + 10) for part in joined(group, view("top", f"SN-{number}"))]
    assert group.waiting == WAITING
    assert [part.verdict.capture.part_id for part in told] == [f"SN-{number}" for number in range(10)]
    assert {part.verdict.decision.reason for part in told} == {Reason.VIEW_MISSING}
    assert len(group.expire(2.0, moment(2.0))) == WAITING
    fates = Counter(
        group.join(view("side", f"SN-{number}", seen_at=2.0), 2.0, START)[0] for number in range(WAITING + 10)
    )
    assert fates[Fate.LATE] == WAITING
