"""Things that the station may say, and every way of saying them: for tests of the contract and of its schemas."""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from calibration.calibration import LEAST_P, Provenance, fit
from calibration.drift import Reading
from daemon import announcements, contract, requests
from daemon.alarms import DEFINITIONS, Alarm, AlarmId, Change
from daemon.announcements import Birth, Event, EventKind
from daemon.canaries import CAUSES
from daemon.challenge import ChallengeStatus
from daemon.contract import META_LIMIT, TOPICS, Identity, Picture, Quality, StationState
from daemon.images import MAX_PIXELS, MAX_SIDE
from daemon.messages import Capture, Clock, Decision, Latency, Outcome, Reason, Trigger, Verdict, View
from daemon.regions import Region
from daemon.requests import Action, Code
from daemon.stats import Drop, Latencies, Percentiles, Stats, Window

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
GOLDEN = Path(__file__).parent / "golden"

IDENTITY = Identity(
    prefix="acme/lyon/press",
    node="edge7",
    station="top",
    boot_id="9f31c2aa",
    model="flange-a",
    model_sha256="3b7e0c5d9a1f" * 5 + "beef",
    calibration="51c0ffee51c0",
    fpr_target=0.01,
    recipe="flange-a",
)
CAPTURE = Capture(
    id="01JDA5ZK3V9Q4W8R7T6Y5M2N1P",
    station="top",
    part_id="SN-00091827364",
    captured_at=datetime(2026, 11, 22, 7, 58, 3, 482_000, UTC),
    arrived_at=datetime(2026, 11, 22, 7, 58, 3, 490_000, UTC),
    seen_at=17.25,
    origin="/srv/press/top/SN-00091827364.png",
)
PASSED = Verdict(
    seq=184213,
    capture=CAPTURE,
    decision=Decision(Outcome.PASS, Reason.NONE, "", 0.4375, 0.3125, 0.5, 0.75),
    decided_at=datetime(2026, 11, 22, 7, 58, 3, 731_999, UTC),
    latency=Latency(queue=1.5, infer=41.0625, total=249.999),
)
FAILED = replace(
    PASSED,
    decision=Decision(Outcome.FAIL, Reason.SCORE_ABOVE_THRESHOLD, "", 0.91875, 0.001, 0.5, 0.75),
    regions=(Region(412, 96, 40, 25, 731.5, 1.8375, 1.40625), Region(0, 600, 8, 8, 64.0, 1.1, 1.0625)),
    image_ref="top/2026-11-22/FAIL/01JDA5ZK3V9Q4W8R7T6Y5M2N1P_SN-00091827364.png",
)
UNCERTAIN = replace(
    PASSED,
    decision=Decision(Outcome.UNCERTAIN, Reason.UNCERTAIN_BAND, "", 0.55, 0.01, 0.5, 0.75),
    regions=(Region(412, 96, 8, 8, 64.0, 1.1, 1.0625),),
)
TRIGGERED = replace(
    PASSED,
    capture=replace(
        CAPTURE,
        clock=Clock.DEVICE_MAPPED,
        frame_id=65_536,
        batch_id="B-0417",
        meta={"cavity": 3, "oven": "north", "temperature": 231.5, "rework": False},
        trigger=Trigger("01JDA5ZK3V9Q4W8R7T6Y5M2N1V", 184213, CAPTURE.captured_at, "T-88127", "SN-00091827364"),
    ),
)
UNREADABLE = replace(
    PASSED,
    decision=Decision(Outcome.ERROR, Reason.DECODE_FAILED, 'Größe 0: "leer"', None, None, 0.5, 0.5),
    latency=Latency(queue=0.0, infer=0.00004, total=1e7),
)
SEEN = (
    View("top", CAPTURE.id, 184213, Outcome.FAIL, 1.8375),
    View("side", "01JDA5ZK3V9Q4W8R7T6Y5M2N1W", 184209, Outcome.ERROR, None),
)
FUSED = replace(
    UNREADABLE,
    capture=replace(CAPTURE, id="01JDA5ZK3V9Q4W8R7T6Y5M2N1X", station="part", origin=""),
    decision=replace(UNREADABLE.decision, detail="side: the file is empty"),
    views=SEEN,
)
LACKING = replace(
    FUSED,
    decision=replace(UNREADABLE.decision, reason=Reason.VIEW_MISSING, detail="no verdict of side within 2 s"),
    views=SEEN[:1],
)
STATE = StationState("ContinuousExecution", "online", "ok", "ok", 41, 0, 184213, 86211)
AT = datetime(2026, 11, 22, 7, 58, 4, 1_000, UTC)
CALIBRATION = replace(
    fit(
        [1 + number / 500 for number in range(500)],
        alpha=0.01,
        provenance=Provenance("3b7e0c5d9a1f", "d" * 64, datetime(2026, 11, 20, 6, 30, tzinfo=UTC)),
    ),
    id="51c0ffee51c0",
)
STEADY = Reading(1204, "ok", "ok", "ok", 0.512, 2.4375, 0.0, -1.25, "")
DARKER = Reading(1209, "ok", "alarm", "ok", 0.53, 0.0, 14.8125, 2.5, "down")
QUALITY = Quality(
    CALIBRATION,
    "light",
    {"score": STEADY, "brightness": DARKER, "contrast": STEADY, "sharpness": STEADY, "shift": STEADY},
    ChallengeStatus("failed", AT - timedelta(hours=9), None, 1, 4, 'LS-12 (bad) passed; send all 4 parts of "box 3"'),
)
UNWATCHED = Quality(CALIBRATION, "off", {}, None)

BIRTH = Birth(
    version="0.1.0",
    source_kind="folder",
    source_place="/srv/press/top",
    actuation_ttl_ms=2000,
    max_packet_bytes=1_000_000,
    config_sha256="c0ffee" * 10 + "beef",
    leaves=("status", "birth", "verdict", "tag/reject", "image/overlay"),
    recipes=("flange-a", "flange-b"),
    commands=("trigger", "get_state"),
)
STATS = Stats(
    since=AT - timedelta(hours=9),
    outcomes={Outcome.PASS: 6990, Outcome.FAIL: 7, Outcome.UNCERTAIN: 2, Outcome.ERROR: 1},
    dropped={Drop.QUEUE: 3, Drop.INCOMPLETE: 0, Drop.MISSED: 1, Drop.DUPLICATE: 0},
    answered=11,
    trigger_errors=2,
    pending=2,
    too_late=4,
    rate_per_min=13.0,
    latencies=Latencies(181.5, 10_000_000.0, 249.9994),
    percentiles=Percentiles(244.0, 310.25, 402.0625),
)
UNUSED = Stats(AT, dict.fromkeys(Outcome, 0), dict.fromkeys(Drop, 0))
ALARM = Alarm(
    AlarmId.CAMERA_OFFLINE, "01JDA5ZK3V9Q4W8R7T6Y5M2N1Q", "/srv/press/top is away", AT - timedelta(minutes=3), 2
)
DRIFTING = Alarm(AlarmId.DRIFT, "01JDA5ZK3V9Q4W8R7T6Y5M2N1R", "light", AT - timedelta(hours=1), 1)
GAP = Event("01JDA5ZK3V9Q4W8R7T6Y5M2N1S", EventKind.GAP, "", "the outbox is full", AT, 183_004, 183_120)
STARTED = Event("01JDA5ZK3V9Q4W8R7T6Y5M2N1T", EventKind.STARTED, "0.1.0", "", AT, chain=32 * "5e")

PAYLOADS: dict[str, Callable[[], bytes]] = {
    "verdict_pass.json": lambda: contract.encode_verdict(IDENTITY, PASSED),
    "verdict_fail.json": lambda: contract.encode_verdict(IDENTITY, FAILED),
    "verdict_uncertain.json": lambda: contract.encode_verdict(IDENTITY, UNCERTAIN),
    "verdict_error.json": lambda: contract.encode_verdict(IDENTITY, UNREADABLE),
    "verdict_triggered.json": lambda: contract.encode_verdict(IDENTITY, TRIGGERED),
    "verdict_views.json": lambda: contract.encode_verdict(replace(IDENTITY, station="part"), FUSED),
    "verdict_view_missing.json": lambda: contract.encode_verdict(replace(IDENTITY, station="part"), LACKING),
    "plc_triggered.json": lambda: contract.encode_actuation(IDENTITY, TRIGGERED, 2.0).payload,
    "response.json": lambda: requests.encode_response(
        IDENTITY, ("T-88127", "trigger"), Code.ACCEPTED, "", "Ready", AT, seq=184213
    ),
    "response_refused.json": lambda: requests.encode_response(
        IDENTITY, ("", ""), Code.UNKNOWN_ACTION, '"action" must be one of …', "Ready", AT
    ),
    "plc.json": lambda: contract.encode_actuation(IDENTITY, FAILED, 2.0).payload,
    "status.json": lambda: contract.encode_status(IDENTITY, online=True, reason="running", at=AT).payload,
    "state.json": lambda: contract.encode_state(IDENTITY, STATE, AT).payload,
    "quality.json": lambda: contract.encode_quality(IDENTITY, QUALITY, AT).payload,
    "picture_overlay.json": lambda: contract.encode_picture_comment(FAILED),
    "picture_map.json": lambda: contract.encode_picture_comment(FAILED, Picture.MAP),
    "birth.json": lambda: announcements.encode_birth(IDENTITY, BIRTH, AT).payload,
    "stats.json": lambda: announcements.encode_stats(IDENTITY, STATS, AT).payload,
    "stats_none.json": lambda: announcements.encode_stats(IDENTITY, UNUSED, AT).payload,
    "stats_total.json": lambda: announcements.encode_stats(IDENTITY, STATS, AT, Window.TOTAL).payload,
    "alarm_active.json": lambda: announcements.encode_alarm(IDENTITY, Change(ALARM, active=True), AT).payload,
    "alarm_cleared.json": lambda: announcements.encode_alarm(IDENTITY, Change(ALARM, active=False), AT).payload,
    "alarms.json": lambda: announcements.encode_active(IDENTITY, [ALARM, DRIFTING], AT).payload,
    "alarms_none.json": lambda: announcements.encode_active(IDENTITY, [], AT).payload,
    "event_gap.json": lambda: announcements.encode_event(IDENTITY, GAP).payload,
    "event_started.json": lambda: announcements.encode_event(IDENTITY, STARTED).payload,
}

characters = st.one_of(
    st.characters(max_codepoint=0x1F),
    st.sampled_from('"\\/\x7f\u2028é\U0001f600\udc80\udcff'),
    st.characters(codec=None),
)
texts = st.one_of(st.text(characters, max_size=300), characters.map(lambda character: 5000 * character))
finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
measured = st.one_of(finite, st.floats(-1e-3, 1e-3))
zones = st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=45))])
whole_milliseconds = st.integers(1, 253_402_200_000_000).map(lambda ms: EPOCH + timedelta(milliseconds=ms))
moments = st.one_of(
    st.builds(datetime.astimezone, whole_milliseconds, zones),
    st.datetimes(datetime(1970, 1, 2), datetime(9999, 12, 30), timezones=zones),  # noqa: DTZ001 -- they get their zone
)
pixels = st.integers(0, MAX_SIDE)
regions = st.builds(Region, pixels, pixels, pixels, pixels, st.floats(0, MAX_PIXELS), measured, measured)
counts = st.integers(0, 2**53 - 1)
statuses = st.sampled_from(["ok", "alarm"])
readings = st.builds(
    Reading,
    counts,
    statuses,
    statuses,
    statuses,
    st.one_of(st.just(math.nan), st.floats(0, 1)),
    st.floats(0, 20),
    st.floats(0, 20),
    st.floats(-1000, 1000),
    st.sampled_from(["up", "down", ""]),
)
tests = st.builds(
    ChallengeStatus,
    st.sampled_from(["ok", "due", "failed"]),
    st.none() | moments,
    st.none() | moments,
    st.integers(0, 1_000_000),
    st.integers(0, 1_000_000),
    texts,
)
qualities = st.builds(
    Quality,
    st.just(replace(CALIBRATION, n_effective=10**9)),
    st.sampled_from([*CAUSES.values(), "product", "ok", "off"]),
    st.dictionaries(st.sampled_from(contract.WATCHES), readings),
    st.none() | tests,
)
births = st.builds(
    Birth,
    texts,
    st.sampled_from(["folder", "camera"]),
    texts,
    counts,
    counts,
    st.just("c" * 64),
    st.lists(st.sampled_from(sorted(TOPICS)), unique=True),
    st.lists(st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=32), min_size=1, max_size=24),
    st.just(list(Action)),
)
latencies = st.builds(Latencies, measured, measured, measured)
percentiles = st.builds(Percentiles, measured, measured, measured)
figures = st.builds(
    Stats,
    moments,
    st.fixed_dictionaries(dict.fromkeys(Outcome, counts)),
    st.fixed_dictionaries(dict.fromkeys(Drop, counts)),
    counts,
    counts,
    counts,
    counts,
    st.floats(0, 1e6),
    st.none() | latencies,
    st.none() | percentiles,
)
alarms = st.builds(Alarm, st.sampled_from(AlarmId), st.just("0" * 26), texts, moments, counts)
changes = st.builds(Change, alarms, st.booleans())
everything_wrong = st.tuples(
    *(st.builds(Alarm, st.just(i), st.just("0" * 26), texts, moments, counts) for i in DEFINITIONS)
)
chains = st.sampled_from(["", 64 * "f"])
events = st.builds(Event, st.just("0" * 26), st.sampled_from(EventKind), texts, texts, moments, counts, counts, chains)
scalars = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=64), st.integers(-(2**53) + 1, 2**53 - 1), st.booleans(), measured
)
metas = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=24), scalars, max_size=16).filter(
    lambda meta: len(json.dumps(meta, ensure_ascii=False).encode()) <= META_LIMIT
)
unhurried = settings(deadline=None, max_examples=100)


@st.composite
def verdicts(draw: st.DrawFn) -> Verdict:
    outcome = draw(st.sampled_from(Outcome))
    blind = outcome is Outcome.ERROR and draw(st.booleans())
    trigger = st.builds(Trigger, st.just("0" * 26), counts, moments, texts)
    capture = Capture(
        "0" * 26,
        "s" * 32,
        draw(texts),
        draw(moments),
        draw(moments),
        0.0,
        draw(texts),
        draw(st.sampled_from(Clock)),
        draw(counts),
        draw(texts),
        draw(metas),
        draw(st.none() | trigger),
    )
    decision = Decision(
        outcome,
        draw(st.sampled_from(Reason)),
        draw(texts),
        None if blind else draw(measured),
        None if blind else draw(st.floats(LEAST_P, 1)),
        draw(positive),
        draw(positive),
    )
    latency = Latency(draw(measured), draw(measured), draw(measured))
    found = tuple(draw(st.lists(regions, max_size=9)))
    image_ref = draw(st.text(characters, max_size=200))
    number, challenge = draw(st.integers(1, 2**53 - 1)), draw(st.booleans())
    return Verdict(number, capture, decision, draw(moments), latency, found, challenge, image_ref=image_ref)


views = st.builds(
    View,
    st.just("s" * 32),
    st.just("0" * 26),
    st.integers(1, 2**53 - 1),
    st.sampled_from(Outcome),
    st.none() | positive,
)


@st.composite
def identities(draw: st.DrawFn) -> Identity:
    return Identity("p", "n" * 32, "s" * 32, "b" * 8, draw(texts), "f" * 64, "c" * 12, draw(st.floats(0, 1)), "r" * 32)


def leaves(content: object) -> Iterator[object]:
    if isinstance(content, dict | list):
        for inner in content.values() if isinstance(content, dict) else content:
            yield from leaves(inner)
    else:
        yield content


def parse(payload: bytes) -> dict[str, Any]:
    """Read a payload as a strict consumer does, and see that its numbers are plain."""

    def plain(text: str) -> float:
        assert re.fullmatch(r"-?\d+\.\d+", text), text
        assert text != "-0.0"
        return float(text)

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no number")

    content: dict[str, Any] = json.loads(payload.decode(), parse_float=plain, parse_constant=refuse)
    assert None not in list(leaves(content))
    return content


def shape(content: object) -> object:
    """The keys in their order, each with the type of its value; of a list the shapes that its entries have."""
    if isinstance(content, dict):
        return [(key, shape(value)) for key, value in content.items()]
    if isinstance(content, list):
        return [list, *{repr(shape(value)) for value in content}]
    return type(content)
