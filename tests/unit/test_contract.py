"""What subscribers rely on does not move: bytes, keys, types and sizes, whatever a part or a file is called."""

import re
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from calibration.calibration import LEAST_P
from calibration.drift import Reading
from daemon import contract
from daemon.challenge import ChallengeStatus
from daemon.contract import Identity, Message, Picture, Quality, StationState
from daemon.images import MAX_PIXELS, MAX_SIDE
from daemon.messages import Decision, Latency, Outcome, Reason, Verdict, View
from daemon.regions import Region
from tests.payloads import (
    AT,
    CALIBRATION,
    CAPTURE,
    EPOCH,
    FAILED,
    FUSED,
    GOLDEN,
    IDENTITY,
    PASSED,
    PAYLOADS,
    QUALITY,
    STATE,
    UNCERTAIN,
    UNREADABLE,
    UNWATCHED,
    identities,
    moments,
    parse,
    qualities,
    shape,
    unhurried,
    verdicts,
    views,
)

GOLDEN_VIEWS = GOLDEN / "verdict_views.json"
REGION = shape(parse(PAYLOADS["verdict_fail.json"]())["regions"][0])


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_payload_is_the_stored_one_to_the_byte(name: str) -> None:
    assert PAYLOADS[name]() == (GOLDEN / name).read_bytes()


@unhurried
@given(identities(), verdicts())
def test_every_verdict_is_plain_whole_and_small_whatever_the_texts(identity: Identity, verdict: Verdict) -> None:
    payload = contract.encode_verdict(identity, verdict)
    content = parse(payload)
    assert len(payload) <= contract.VERDICT_LIMIT == 2048
    assert [shape(region) for region in content["regions"]] == [REGION] * len(content["regions"])
    assert len(content["regions"]) <= 8
    assert content["region_count"] == len(verdict.regions)
    assert content["neg_log10_p"] == -1.0 or 0.0 <= content["neg_log10_p"] <= 6.0
    plants_own: dict[str, object] = {"regions": [], "meta": {}}
    assert shape(content | plants_own) == shape(parse(PAYLOADS["verdict_pass.json"]()))
    said = verdict.capture.meta
    assert list(content["meta"]) == list(said)[: len(content["meta"])]
    assert content["meta"] == said or any(isinstance(value, float) for value in said.values())
    assert content["reject"] == (content["verdict"] != "PASS")
    assert content["replayed"] is False


@unhurried
@given(identities(), verdicts(), st.lists(views, min_size=1, max_size=8))
def test_every_verdict_of_several_views_stays_small_and_names_the_first_of_them(
    identity: Identity, verdict: Verdict, seen: list[View]
) -> None:
    payload = contract.encode_verdict(identity, replace(verdict, views=tuple(seen)))
    content = parse(payload)
    assert len(payload) <= contract.VERDICT_LIMIT
    assert [view["seq"] for view in content["views"]] == [view.seq for view in seen][: len(content["views"])]
    assert {repr(shape(view)) for view in content["views"]} <= {
        repr(shape(parse(GOLDEN_VIEWS.read_bytes())["views"][0]))
    }
    assert content["region_count"] == len(verdict.regions)


def test_eight_views_of_usual_names_are_all_named() -> None:
    seen = tuple(View(f"side-{number}-of-8", "0" * 26, 10**9, Outcome.FAIL, 12.345678) for number in range(8))
    part = replace(FUSED, capture=replace(FUSED.capture, part_id="p" * 40, batch_id="b" * 16), views=seen)
    assert len(parse(contract.encode_verdict(IDENTITY, part))["views"]) == 8


@unhurried
@given(identities(), verdicts(), st.floats(0.001, 3600))
def test_every_actuation_is_plain_whole_and_small_whatever_the_texts(
    identity: Identity, verdict: Verdict, ttl_s: float
) -> None:
    message = contract.encode_actuation(identity, verdict, ttl_s)
    content = parse(message.payload)
    assert len(message.payload) <= contract.ACTUATION_LIMIT == 256
    assert len(content["p"].encode()) <= 32
    assert shape(content) == shape(parse(PAYLOADS["plc.json"]()))
    assert content["r"] == (verdict.decision.outcome is not Outcome.PASS)
    assert message.expires_s == max(1, int(ttl_s))
    assert not message.retain


@unhurried
@given(verdicts(), st.sampled_from(Picture))
@example(replace(PASSED, seq=2**53 - 1, capture=replace(CAPTURE, part_id=64 * "é")), Picture.SOURCE)
def test_every_picture_comment_is_plain_ascii_and_small(verdict: Verdict, kind: Picture) -> None:
    comment = contract.encode_picture_comment(verdict, kind)
    content = parse(comment)
    assert comment.isascii()
    assert len(comment) <= 1024
    assert (content["id"], content["seq"], content["kind"]) == (verdict.capture.id, verdict.seq, kind.value)
    assert content["part_id"] == parse(contract.encode_verdict(IDENTITY, verdict))["part_id"]


def test_tags_are_scalars_in_plain_text_and_the_number_comes_last() -> None:
    def told(verdict: Verdict) -> dict[str, bytes]:
        return {
            message.topic.rpartition("/")[2]: message.payload for message in contract.encode_tags(IDENTITY, verdict)
        }

    assert told(FAILED) == {
        "verdict_code": b"2",
        "reject": b"true",
        "score": b"1.837",
        "part_id": b"SN-00091827364",
        "seq": b"184213",
    }
    assert list(told(FAILED))[-1] == "seq"
    assert (told(PASSED)["reject"], told(PASSED)["verdict_code"]) == (b"false", b"1")
    assert (told(UNREADABLE)["reject"], told(UNREADABLE)["score"]) == (b"true", b"-1.0")
    assert contract.encode_ready(IDENTITY, ready=True).payload == b"true"
    assert contract.encode_ready(IDENTITY, ready=False).payload == b"false"


@unhurried
@given(verdicts())
def test_every_tag_is_small_and_never_empty_which_would_delete_it(verdict: Verdict) -> None:
    tags = contract.encode_tags(IDENTITY, verdict)
    assert all(1 <= len(tag.payload) <= 128 for tag in tags)
    score = next(tag.payload.decode() for tag in tags if tag.topic.endswith("/score"))
    assert re.fullmatch(r"-?\d+\.\d+", score)
    assert score == repr(parse(contract.encode_actuation(IDENTITY, verdict, 2.0).payload)["sc"])


@unhurried
@given(identities(), st.sampled_from(sorted(contract.STATES)), st.integers(0, 2**53 - 1), moments)
def test_state_and_status_stay_small(identity: Identity, state: str, number: int, at: datetime) -> None:
    condition = StationState(state, "offline", "position", "failed", number, number, number, number)
    told = contract.encode_state(identity, condition, at).payload
    assert len(told) <= 512
    assert shape(parse(told)) == shape(parse(PAYLOADS["state.json"]()))
    for reason in ("running", "stopped", "lost"):
        status = contract.encode_status(identity, online=False, reason=reason, at=at).payload
        assert len(status) <= 256
        assert shape(parse(status)) == shape(parse(PAYLOADS["status.json"]()))


@unhurried
@given(identities(), qualities, moments)
@example(
    IDENTITY,
    replace(
        QUALITY,
        watches=dict.fromkeys(
            contract.WATCHES, Reading(2**53 - 1, "alarm", "alarm", "alarm", 0.5, 15.875, 15.875, -999.99, "down")
        ),
        challenge=ChallengeStatus("failed", AT, AT, 10**6, 10**6, 5000 * '"'),
    ),
    AT,
)
def test_every_quality_is_plain_whole_and_small(identity: Identity, quality: Quality, at: datetime) -> None:
    told = contract.encode_quality(identity, quality, at).payload
    content = parse(told)
    assert len(told) <= 1536
    assert shape(content) == shape(parse(PAYLOADS["quality.json"]()))
    assert content["drift"]["status"] == quality.drift


@unhurried
@example(replace(PASSED, decided_at=EPOCH + timedelta(milliseconds=2_164_903_468_022)))  # no float is near enough
@given(verdicts())
def test_both_forms_of_each_time_are_the_same_millisecond(verdict: Verdict) -> None:
    content = parse(contract.encode_verdict(IDENTITY, verdict))
    for text, number in (("ts", "ts_ms"), ("capture_ts", "capture_ts_ms")):
        assert content[text].endswith("Z")
        since = datetime.fromisoformat(content[text]) - EPOCH
        assert since // timedelta(milliseconds=1) == content[number]


@unhurried
@given(identities(), verdicts())
def test_replaying_changes_that_flag_alone_and_only_once(identity: Identity, verdict: Verdict) -> None:
    payload = contract.encode_verdict(identity, verdict)
    replayed = contract.as_replayed(payload)
    assert parse(replayed) == parse(payload) | {"replayed": True}
    assert len(replayed) == len(payload) - 1
    assert contract.as_replayed(replayed) == replayed


@pytest.mark.parametrize(
    ("verdict", "name", "code", "result_state", "reject"),
    [
        (PASSED, "PASS", 1, 1, False),
        (FAILED, "FAIL", 2, 1, True),
        (UNCERTAIN, "UNCERTAIN", 3, 1, True),
        (UNREADABLE, "ERROR", 0, 4, True),
    ],
)
def test_outcomes_have_the_numbers_of_opc_and_all_but_pass_reject(
    verdict: Verdict, name: str, code: int, result_state: int, *, reject: bool
) -> None:
    record = parse(contract.encode_verdict(IDENTITY, verdict))
    gate = parse(contract.encode_actuation(IDENTITY, verdict, 2.0).payload)
    assert (record["verdict"], record["verdict_code"], record["result_state"]) == (name, code, result_state)
    assert record["reject"] is gate["r"] is reject
    assert gate["c"] == code
    assert gate["s"] == record["seq"]
    assert gate["t"] == record["ts_ms"]


def test_scores_are_multiples_of_the_threshold() -> None:
    content = parse(contract.encode_verdict(IDENTITY, FAILED))
    assert (content["score"], content["threshold"], content["margin"]) == (1.8375, 1.0, -0.8375)
    assert (content["score_raw"], content["threshold_raw"], content["p_value"]) == (0.91875, 0.5, 0.001)
    assert content["fail_threshold"] == 1.5


def test_without_an_uncertain_band_a_part_fails_above_the_threshold() -> None:
    decision = replace(FAILED.decision, fail_threshold=FAILED.decision.threshold)
    content = parse(contract.encode_verdict(IDENTITY, replace(FAILED, decision=decision)))
    assert content["fail_threshold"] == content["threshold"] == 1.0


@pytest.mark.parametrize(("p", "told", "logarithm"), [(1.0, 1.0, 0.0), (0.001, 0.001, 3.0), (LEAST_P, 0.0001, 6.0)])
def test_the_logarithm_of_p_tells_what_its_six_decimals_cannot(p: float, told: float, logarithm: float) -> None:
    content = parse(contract.encode_verdict(IDENTITY, replace(FAILED, decision=replace(FAILED.decision, p_value=p))))
    assert (content["p_value"], content["neg_log10_p"]) == (told, logarithm)


def test_regions_come_in_their_order_eight_of_them_and_all_are_counted() -> None:
    found = tuple(Region(number, 0, 1, 1, 1.0, 3.0 - number / 10, 1.0) for number in range(11))
    content = parse(contract.encode_verdict(IDENTITY, replace(FAILED, regions=found)))
    assert [region["x"] for region in content["regions"]] == list(range(8))
    assert content["regions"][1] == {"x": 1, "y": 0, "w": 1, "h": 1, "area_px": 1.0, "peak": 2.9, "mean": 1.0}
    assert content["region_count"] == 11


def crowded(part_id: str, origin: str) -> bytes:
    """An uncertain part of the largest image, with the widest plausible numbers and more regions than are named."""
    region = Region(MAX_SIDE - 1, MAX_SIDE - 1, MAX_SIDE, MAX_SIDE, MAX_PIXELS / 3, 1234.5678, 1234.5678)
    verdict = Verdict(
        seq=2**53 - 1,
        capture=replace(CAPTURE, station="s" * 32, part_id=part_id, origin=origin),
        decision=Decision(Outcome.UNCERTAIN, Reason.UNCERTAIN_BAND, "", -54321.654321, 0.000123, 43.654321, 54.123456),
        decided_at=PASSED.decided_at,
        latency=Latency(12345.678, 12345.678, -12345678.912),
        regions=(region,) * 12_345,
    )
    identity = replace(IDENTITY, node="n" * 32, station="s" * 32, model="m" * 64, fpr_target=0.012345)
    return contract.encode_verdict(identity, verdict)


def test_eight_regions_fit_beside_the_longest_part_id_and_a_path_of_170_bytes() -> None:
    payload = crowded("p" * 64, "/" + "o" * 169)
    assert len(payload) <= 2048
    content = parse(payload)
    assert (len(content["regions"]), content["region_count"]) == (8, 12_345)


def test_where_texts_leave_no_room_fewer_regions_are_named_and_no_text_is_cut_for_them() -> None:
    payload = crowded(128 * "p", 900 * "o")
    assert len(payload) <= 2048
    content = parse(payload)
    assert 5 <= len(content["regions"]) < 8
    assert (content["region_count"], len(content["part_id"]), len(content["source"])) == (12_345, 128, 256)
    assert parse(contract.as_replayed(payload)) == content | {"replayed": True}


def test_a_part_of_the_challenge_test_is_marked() -> None:
    assert parse(contract.encode_verdict(IDENTITY, replace(PASSED, challenge=True)))["challenge"] is True
    assert parse(contract.encode_verdict(IDENTITY, PASSED))["challenge"] is False


def test_quality_tells_the_promise_what_drifts_and_the_last_proof() -> None:
    content = parse(contract.encode_quality(IDENTITY, QUALITY, AT).payload)
    assert content["calibration"] == {
        "id": CALIBRATION.id,
        "method": "tolerance",
        "good_parts": 500,
        "n_effective": 500,
        "alpha": 0.01,
        "alpha_carried": 0.01,
        "made_ts_ms": 1795156200000,
    }
    assert content["drift"]["status"] == "light"
    assert content["drift"]["brightness"] == {
        "status": "alarm",
        "parts": 1209,
        "direction": "down",
        "cusum": 14.81,
        "log10_martingale": 1.09,
    }
    assert content["drift"]["score"]["status"] == "ok"
    assert content["challenge"] == {
        "status": "failed",
        "passed": 1,
        "expected": 4,
        "last_ts_ms": 1795334284001 - 9 * 3_600_000,
        "next_due_ts_ms": 0,
        "detail": 'LS-12 (bad) passed; send all 4 parts of "box 3"',
    }


def test_what_is_not_watched_and_a_test_that_is_not_configured_are_off() -> None:
    content = parse(contract.encode_quality(IDENTITY, UNWATCHED, AT).payload)
    assert content["drift"].pop("status") == "off"
    assert {watch["status"] for watch in content["drift"].values()} == {"off"}
    assert tuple(content["drift"]) == contract.WATCHES
    assert set(content["challenge"].values()) == {"off", 0, ""}


def test_what_was_not_measured_is_minus_one() -> None:
    content = parse(contract.encode_verdict(IDENTITY, UNREADABLE))
    assert {content[key] for key in ("score", "margin", "score_raw", "p_value", "neg_log10_p")} == {-1.0}
    assert parse(contract.encode_actuation(IDENTITY, UNREADABLE, 2.0).payload)["sc"] == -1.0


def test_a_score_far_above_a_tiny_threshold_is_bounded_instead_of_infinite() -> None:
    decision = Decision(Outcome.FAIL, Reason.SCORE_ABOVE_THRESHOLD, "", 1e300, 0.01, 1e-300, 1e300)
    content = parse(contract.encode_verdict(IDENTITY, replace(PASSED, decision=decision)))
    assert content["score"] == 9e15
    assert content["margin"] == -9e15
    assert content["fail_threshold"] == 9e15


def test_texts_are_whole_where_they_fit_and_cut_at_a_character_where_not() -> None:
    def named(part_id: str) -> Verdict:
        return replace(PASSED, capture=replace(CAPTURE, part_id=part_id))

    def in_plc(part_id: str) -> object:
        return parse(contract.encode_actuation(IDENTITY, named(part_id), 2.0).payload)["p"]

    assert in_plc("p" * 32) == "p" * 32
    assert in_plc("line1-cam1-2026-11-22-SN00091827364") == "e1-cam1-2026-11-22-SN00091827364"
    assert in_plc("é" * 40) == "é" * 16
    assert in_plc("\U0001f600" * 9 + "a") == "\U0001f600" * 7 + "a"
    assert in_plc('"' * 40) == '"' * 16
    assert parse(contract.encode_verdict(IDENTITY, named("Teil-äöü-\U0001f600")))["part_id"] == "Teil-äöü-\U0001f600"


def test_a_name_that_is_no_text_does_not_stop_the_line() -> None:
    capture = replace(CAPTURE, part_id="part-\udcff", origin="/srv/part-\udcff.png")
    verdict = replace(PASSED, capture=capture)
    content = parse(contract.encode_verdict(IDENTITY, verdict))
    assert (content["part_id"], content["source"]) == ("part-?", "/srv/part-?.png")
    assert parse(contract.encode_actuation(IDENTITY, verdict, 2.0).payload)["p"] == "part-?"
    assert parse(contract.encode_picture_comment(verdict))["part_id"] == "part-?"


def messages() -> dict[str, Message]:
    payload = contract.encode_verdict(IDENTITY, PASSED)
    scalars = [*contract.encode_tags(IDENTITY, PASSED), contract.encode_ready(IDENTITY, ready=True)]
    return {
        "status": contract.encode_status(IDENTITY, online=True, reason="running", at=AT),
        "state": contract.encode_state(IDENTITY, STATE, AT),
        "quality": contract.encode_quality(IDENTITY, QUALITY, AT),
        "verdict": contract.record(IDENTITY, payload),
        "last": contract.last(IDENTITY, payload),
        "plc": contract.encode_actuation(IDENTITY, PASSED, 2.0),
        "image/overlay": contract.picture(IDENTITY, Picture.OVERLAY, b"\xff\xd8"),
        "image/map": contract.picture(IDENTITY, Picture.MAP, b"\x89PNG"),
        "image/source": contract.picture(IDENTITY, Picture.SOURCE, b"\xff\xd8"),
        **{message.topic.removeprefix("acme/lyon/press/top/"): message for message in scalars},
    }


def test_every_topic_is_a_leaf_of_the_station_and_none_is_above_another() -> None:
    assert [message.topic for message in messages().values()] == [f"acme/lyon/press/top/{leaf}" for leaf in messages()]
    elsewhere = {"birth", "stats", "totals", "alarm/event", "alarm/active", "event", "cmd/response"}
    assert set(messages()) | elsewhere == set(contract.TOPICS)
    topics = [IDENTITY.topic(leaf) for leaf in contract.TOPICS]
    assert not [(one, other) for one in topics for other in topics if other.startswith(one + "/")]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,32}(/[A-Za-z0-9_-]{1,32}){0,9}", topic) for topic in topics)
    assert all(leaf.count("/") <= 2 for leaf in contract.TOPICS)  # six levels of prefix and the station come before


def test_what_lasts_is_retained_what_is_late_expires_and_only_views_may_be_lost() -> None:
    sent = messages()
    pictures = {"image/overlay", "image/map", "image/source"}
    tags = {leaf for leaf in sent if leaf.startswith("tag/")}
    assert len(tags) == 6
    assert {leaf for leaf, message in sent.items() if message.retain} == {"status", "state", "quality", "last"} | tags
    expiring = {leaf: message.expires_s for leaf, message in sent.items() if message.expires_s}
    assert expiring == {"last": 3600, "plc": 2} | dict.fromkeys(pictures, 60)
    assert {leaf for leaf, message in sent.items() if message.qos == 0} == pictures | tags
    for leaf, message in sent.items():
        schema = contract.TOPICS[leaf]
        assert message.content_type == ("application/json" if schema.startswith("inspectd.") else schema)


def test_ready_follows_the_state() -> None:
    ready = {}
    for state, number in contract.STATES.items():
        content = parse(contract.encode_state(IDENTITY, replace(STATE, state=state), AT).payload)
        assert content["state_no"] == number
        ready[state] = content["ready"]
    assert [state for state in ready if ready[state]] == ["Ready", "ContinuousExecution"]
    overrun = parse(contract.encode_state(IDENTITY, replace(STATE, unacknowledged=8, overrun=True), AT).payload)
    assert (overrun["ready"], overrun["unacknowledged"]) == (False, 8)
