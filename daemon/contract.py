"""What subscribers may rely on: topics, payloads and their versions. Pure: values in, messages out.

Here stands what is said of each part and of the station's condition; who the station is and what it counts, alarms and
events are in `announcements`.

Floats always print with a decimal point, integers never, and no value is null: where nothing was measured
a score is -1.0. Every JSON payload has a fixed set of keys per schema version, and texts from outside are cut, so
that it keeps its size whatever a file is called.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from calibration.calibration import Calibration
from calibration.drift import Reading
from daemon.challenge import ChallengeStatus
from daemon.messages import Decision, Outcome, Reason, Scalar, Verdict, View
from daemon.regions import Region
from daemon.wire import NOT_MEASURED, encode, epoch_ms, iso, number, text

ACTUATION_LIMIT = 256
"""Bytes; the smallest PLC clients have fixed buffers."""
VERDICT_LIMIT = 2048
"""Bytes; half of what the common soft PLCs take."""

WATCHES = ("score", "brightness", "contrast", "sharpness", "shift")
"""What can drift: the scores of parts that pass, and the looks of all."""

META_LIMIT = 256
"""Bytes of what a verdict says of its part beside the ids."""

_LEAST_P = 1e-4
"""Below it numbers need an exponent; the logarithm goes on."""
_REGIONS = 8
"""The most that a verdict names; it counts them all."""
_PART_ID_IN_PLC, _TRIGGER_ID_IN_PLC, _PART_ID, _ID, _MODEL, _WHY, _DETAIL, _SOURCE = 32, 24, 128, 64, 64, 256, 384, 256
"""The most bytes that a text takes as it stands in the JSON."""
_IMAGE_REF = 160
"""More than the archive's longest."""
_COMPLETED, _ABORTED, _FAILED = 1, 3, 4
"""OPC 40100-1 ResultState."""


@dataclass(frozen=True, slots=True)
class Message:
    """One MQTT publication. By MQTT 5 alone, `expires_s` asks the broker to forget it, and `correlation` goes along."""

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False
    expires_s: int | None = None
    content_type: str = "application/json"
    correlation: bytes | None = None


@dataclass(frozen=True, slots=True)
class Identity:
    """Who speaks, and by what it judges: constant for one recipe in one run of one station.

    `recipe_index` counts the station's recipes from 1, as a PLC names them.
    """

    prefix: str
    node: str
    station: str
    boot_id: str
    model: str
    model_sha256: str
    calibration: str
    fpr_target: float
    recipe: str = "default"
    recipe_index: int = 1

    @property
    def base(self) -> str:
        """What stands before the leaf in all of the station's topics."""
        return f"{self.prefix}/{self.station}"

    def topic(self, leaf: str) -> str:
        """The full topic of one of the station's leaves."""
        return f"{self.base}/{leaf}"


class Picture(StrEnum):
    """What an image message shows; the value is its leaf under `image/`, and the `kind` in its comment."""

    OVERLAY = "overlay"
    MAP = "map"
    SOURCE = "source"


SCALES = {Picture.OVERLAY: (0.5, 2.0), Picture.MAP: (0.0, 255 / 64), Picture.SOURCE: (0.0, 0.0)}
"""From and to which multiple of the threshold a picture's colours or values reach; a source image has no such scale."""

TOPICS: Mapping[str, str] = {
    "status": "inspectd.status/1",
    "birth": "inspectd.birth/1",
    "state": "inspectd.state/1",
    "quality": "inspectd.quality/1",
    "stats": "inspectd.stats/1",
    "totals": "inspectd.stats/1",
    "plc": "inspectd.plc/1",
    "verdict": "inspectd.verdict/1",
    "last": "inspectd.verdict/1",
    "alarm/event": "inspectd.alarm/1",
    "alarm/active": "inspectd.alarms/1",
    "event": "inspectd.event/1",
    "cmd/response": "inspectd.response/1",
    "tag/verdict_code": "text/plain",
    "tag/reject": "text/plain",
    "tag/seq": "text/plain",
    "tag/score": "text/plain",
    "tag/part_id": "text/plain",
    "tag/ready": "text/plain",
    "image/overlay": "image/jpeg",
    "image/map": "image/png",
    "image/source": "image/jpeg",
}
"""Every leaf that a station may publish, with the schema of its JSON or else its content type."""


@dataclass(frozen=True, slots=True)
class StationState:
    """What `state` says.

    `state` is one of STATES, `camera` "online" or "offline"; `drift` is what `Quality.drift` says, and `challenge` how
    the challenge test stands. `unacknowledged` counts results that wait to be acknowledged, and `overrun` says that so
    many wait that triggers are refused.
    """

    state: str
    camera: str
    drift: str
    challenge: str
    last_frame_age_ms: int
    mqtt_outbox: int
    last_seq: int
    uptime_s: int
    unacknowledged: int = 0
    overrun: bool = False

    @property
    def ready(self) -> bool:
        """Whether the next part will be judged: in Ready after its trigger, in ContinuousExecution as it comes."""
        return self.state in {"Ready", "ContinuousExecution"} and not self.overrun


@dataclass(frozen=True, slots=True)
class Quality:
    """What `quality` says: what was promised, whether parts and pictures are still as they were, and the last proof.

    `drift` is "ok", "off" where nothing is watched, or what drifts: "light", "focus", "position" or "product".
    `challenge` is None without a challenge test.
    """

    calibration: Calibration
    drift: str
    watches: Mapping[str, Reading]
    challenge: ChallengeStatus | None


STATES = {
    "Preoperational": 1,
    "Halted": 2,
    "Error": 3,
    "Ready": 6,
    "SingleExecution": 7,
    "ContinuousExecution": 8,
}
"""OPC 40100-1 names and numbers of the states that a station can be in."""


def encode_verdict(identity: Identity, verdict: Verdict) -> bytes:
    """The record of one inspection, schema inspectd.verdict/1, at most 2048 bytes; `as_replayed` needs its end.

    Of its regions it names up to 8, the first ones, and fewer, as of its views, only where long texts leave no room.
    """
    capture, decision = verdict.capture, verdict.decision
    threshold = decision.threshold
    score = NOT_MEASURED if decision.ratio is None else decision.ratio
    regions = [_region(region) for region in verdict.regions[:_REGIONS]]
    views = [_view(view) for view in verdict.views]
    content = {
        "schema": "inspectd.verdict/1",
        "id": capture.id,
        "seq": verdict.seq,
        "boot_id": identity.boot_id,
        "node": identity.node,
        "station": identity.station,
        "ts": iso(verdict.decided_at),
        "ts_ms": epoch_ms(verdict.decided_at),
        "capture_ts": iso(capture.captured_at),
        "capture_ts_ms": epoch_ms(capture.captured_at),
        "ts_source": capture.clock.value,
        "verdict": decision.outcome.name,
        "verdict_code": decision.outcome.value,
        "result_state": _result_state(decision),
        "reject": decision.outcome is not Outcome.PASS,
        "reason": decision.reason.name.lower(),
        "reason_code": decision.reason.value,
        "detail": text(decision.detail, _WHY),
        "score": number(score),
        "threshold": 1.0,
        "fail_threshold": number(decision.fail_threshold / threshold),
        "margin": number(1.0 - score if decision.score is not None else NOT_MEASURED),
        "score_raw": number(NOT_MEASURED if decision.score is None else decision.score),
        "threshold_raw": number(threshold),
        "p_value": number(NOT_MEASURED if decision.p_value is None else max(_LEAST_P, decision.p_value)),
        "neg_log10_p": number(NOT_MEASURED if decision.p_value is None else -math.log10(decision.p_value), 3),
        "regions": regions,
        "region_count": len(verdict.regions),
        "part_id": text(capture.part_id, _PART_ID, keep_end=True),
        "trigger_id": text(capture.trigger.trigger_id, _ID) if capture.trigger else "",
        "batch_id": text(capture.batch_id, _ID),
        "meta": _plain(capture.meta),
        "challenge": verdict.challenge,
        "recipe": identity.recipe,
        "model": text(identity.model, _MODEL),
        "model_sha256": identity.model_sha256[:12],
        "calibration": identity.calibration,
        "fpr_target": number(identity.fpr_target),
        "latency_ms": {
            "queue": number(verdict.latency.queue, 3),
            "infer": number(verdict.latency.infer, 3),
            "total": number(verdict.latency.total, 3),
        },
        "source": text(capture.origin, _SOURCE, keep_end=True),
        "frame_id": capture.frame_id,
        "image_ref": text(verdict.image_ref, _IMAGE_REF),
        "views": views,
        "replayed": False,
    }
    while len(payload := encode(content)) > VERDICT_LIMIT and (shortened := regions or views):
        shortened.pop()
    return payload


def as_replayed(payload: bytes) -> bytes:
    """The same record, marked as one that waited for a broker."""
    live = b'"replayed":false}'
    return payload.removesuffix(live) + b'"replayed":true}' if payload.endswith(live) else payload


def encode_actuation(identity: Identity, verdict: Verdict, ttl_s: float) -> Message:
    """What the reject gate acts on, schema inspectd.plc/1: at most 256 bytes, never retained, never replayed."""
    decision = verdict.decision
    score = NOT_MEASURED if decision.ratio is None else decision.ratio
    content = {
        "c": decision.outcome.value,
        "r": decision.outcome is not Outcome.PASS,
        "s": verdict.seq,
        "t": epoch_ms(verdict.decided_at),
        "sc": number(score, 3),
        "tr": text(verdict.capture.trigger.trigger_id, _TRIGGER_ID_IN_PLC, keep_end=True)
        if verdict.capture.trigger
        else "",
        "p": text(verdict.capture.part_id, _PART_ID_IN_PLC, keep_end=True),
        "v": 1,
    }
    return Message(identity.topic("plc"), encode(content), expires_s=max(1, int(ttl_s)))


def encode_status(identity: Identity, *, online: bool, reason: str, at: datetime) -> Message:
    """Retained presence, schema inspectd.status/1; with reason "lost" it is the last will."""
    content = {
        "schema": "inspectd.status/1",
        "online": online,
        "reason": reason,
        "node": identity.node,
        "boot_id": identity.boot_id,
        "ts_ms": epoch_ms(at),
    }
    return Message(identity.topic("status"), encode(content), retain=True)


def encode_state(identity: Identity, state: StationState, at: datetime) -> Message:
    """Retained condition with a heartbeat, schema inspectd.state/1."""
    content = {
        "schema": "inspectd.state/1",
        "state": state.state,
        "state_no": STATES[state.state],
        "ready": state.ready,
        "recipe": identity.recipe,
        "recipe_index": identity.recipe_index,
        "model": text(identity.model, _MODEL),
        "calibration": identity.calibration,
        "camera": state.camera,
        "drift": state.drift,
        "challenge": state.challenge,
        "last_frame_age_ms": state.last_frame_age_ms,
        "mqtt_outbox": state.mqtt_outbox,
        "last_seq": state.last_seq,
        "unacknowledged": state.unacknowledged,
        "uptime_s": state.uptime_s,
        "ts_ms": epoch_ms(at),
    }
    return Message(identity.topic("state"), encode(content), retain=True)


def encode_quality(identity: Identity, quality: Quality, at: datetime) -> Message:
    """Retained grounds for trust, schema inspectd.quality/1, at most 1,536 bytes."""
    calibration, test = quality.calibration, quality.challenge
    content = {
        "schema": "inspectd.quality/1",
        "calibration": {
            "id": calibration.id,
            "method": calibration.method.value,
            "good_parts": calibration.good_parts,
            "n_effective": calibration.n_effective,
            "alpha": number(calibration.alpha),
            "alpha_carried": number(calibration.alpha_carried),
            "made_ts_ms": epoch_ms(calibration.provenance.made_at),
        },
        "drift": {
            "status": quality.drift,
            **{name: _reading(quality.watches.get(name)) for name in WATCHES},
        },
        "challenge": {
            "status": test.status if test else "off",
            "passed": test.passed if test else 0,
            "expected": test.expected if test else 0,
            "last_ts_ms": epoch_ms(test.last_passed) if test and test.last_passed else 0,
            "next_due_ts_ms": epoch_ms(test.next_due) if test and test.next_due else 0,
            "detail": text(test.detail, _DETAIL) if test else "",
        },
        "ts_ms": epoch_ms(at),
    }
    return Message(identity.topic("quality"), encode(content), retain=True)


def record(identity: Identity, payload: bytes) -> Message:
    """A stored verdict as the message that must arrive."""
    return Message(identity.topic("verdict"), payload)


def last(identity: Identity, payload: bytes) -> Message:
    """The newest verdict, retained for those who come late."""
    return Message(identity.topic("last"), payload, retain=True, expires_s=3600)


def encode_tags(identity: Identity, verdict: Verdict) -> list[Message]:
    """The newest verdict as retained scalars in plain text, for those who read no JSON; `seq` comes last.

    Whoever waits for a new `seq` so finds the other values of that part already there.
    """
    decision = verdict.decision
    scalars = {
        "verdict_code": str(decision.outcome.value),
        "reject": _word(truth=decision.outcome is not Outcome.PASS),
        "score": repr(number(NOT_MEASURED if decision.ratio is None else decision.ratio, 3)),
        # An empty payload would delete what is retained.
        "part_id": text(verdict.capture.part_id, _PART_ID, keep_end=True) or "-",
        "seq": str(verdict.seq),
    }
    return [_tag(identity, name, value) for name, value in scalars.items()]


def encode_ready(identity: Identity, *, ready: bool) -> Message:
    """Whether parts are judged, as a retained scalar; what `state` says at length."""
    return _tag(identity, "ready", _word(truth=ready))


def picture(identity: Identity, kind: Picture, encoded: bytes) -> Message:
    """A picture of a verdict; may be lost."""
    leaf = f"image/{kind.value}"
    return Message(identity.topic(leaf), encoded, qos=0, expires_s=60, content_type=TOPICS[leaf])


def encode_picture_comment(verdict: Verdict, kind: Picture = Picture.OVERLAY) -> bytes:
    """What a picture carries inside, schema inspectd.picture/1, so that it can be matched without MQTT 5.

    ASCII, at most 1,024 bytes: neither a JPEG comment nor a PNG text chunk can say that it holds UTF-8.
    """
    decision = verdict.decision
    score = NOT_MEASURED if decision.ratio is None else decision.ratio
    lowest, highest = SCALES[kind]
    content = {
        "id": verdict.capture.id,
        "seq": verdict.seq,
        "part_id": text(verdict.capture.part_id, _PART_ID, keep_end=True),
        "ts_ms": epoch_ms(verdict.decided_at),
        "score": number(score),
        "scale_lo": lowest,
        "scale_hi": highest,
        "kind": kind.value,
    }
    return encode(content, ascii_only=True)


def _plain(meta: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """The same with plain numbers; of too much the first keys."""
    plain = {key: number(value) if isinstance(value, float) else value for key, value in meta.items()}
    while len(encode(plain)) > META_LIMIT:
        plain.popitem()
    return plain


def _result_state(decision: Decision) -> int:
    if decision.outcome is not Outcome.ERROR:
        return _COMPLETED
    return _ABORTED if decision.reason is Reason.ABORTED else _FAILED


def _tag(identity: Identity, name: str, value: str) -> Message:
    return Message(identity.topic(f"tag/{name}"), value.encode(), qos=0, retain=True, content_type="text/plain")


def _word(*, truth: bool) -> str:
    return "true" if truth else "false"


def _region(region: Region) -> dict[str, Any]:
    return {
        "x": region.x,
        "y": region.y,
        "w": region.width,
        "h": region.height,
        "area_px": number(region.area_px, 1),
        "peak": number(region.peak, 3),
        "mean": number(region.mean, 3),
    }


def _view(view: View) -> dict[str, Any]:
    return {
        "station": view.station,
        "id": view.id,
        "seq": view.seq,
        "verdict_code": view.outcome.value,
        "score": number(NOT_MEASURED if view.ratio is None else view.ratio),
    }


def _reading(reading: Reading | None) -> dict[str, Any]:
    """How one watch stands; nothing is known where it does not watch."""
    if reading is None:
        return {"status": "off", "parts": 0, "direction": "", "cusum": 0.0, "log10_martingale": 0.0}
    return {
        "status": "alarm" if reading.alarm else "ok",
        "parts": reading.parts,
        "direction": reading.direction,
        "cusum": number(max(reading.cusum_up, reading.cusum_down), 2),
        "log10_martingale": number(reading.log_martingale / math.log(10), 2),
    }
