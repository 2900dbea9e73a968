"""What flows through the daemon. Frozen values; whoever holds one may keep it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, StrEnum

from daemon.regions import Region
from detectors.base import Image

Scalar = str | int | float | bool


class Clock(StrEnum):
    """How it is known when a part was captured."""

    FILE_MTIME = "file_mtime"
    HOST_ARRIVAL = "host_arrival"
    DEVICE_MAPPED = "device_mapped"


@dataclass(frozen=True, slots=True)
class Trigger:
    """Somebody asked for one part, and was promised a verdict with the number `seq`, whatever comes.

    `id` is a ULID; `at` is when it came, UTC. What it says of the part goes into the verdict as it is; "" and nothing
    where it says nothing.
    """

    id: str
    seq: int
    at: datetime
    trigger_id: str
    part_id: str = ""
    batch_id: str = ""
    meta: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reply:
    """Where whoever sent a part waits for its verdict, "" if nobody does, and what shall come back with it.

    A part with a reply may be sent again; its verdict is remembered for a while, so that it is not judged again.
    """

    topic: str
    correlation: bytes | None = None


@dataclass(frozen=True, slots=True)
class Capture:
    """Where and when a part was seen.

    `id` is a ULID given once when the part is claimed; its verdict carries the same one, however often
    the daemon is restarted in between. `captured_at`, known by `clock`, and `arrived_at`, when the part came to us, are
    UTC; `seen_at` is `time.monotonic()` seconds. `frame_id` is the camera's own count, 0 where there is none. `reply`
    is where its verdict goes besides the record.
    """

    id: str
    station: str
    part_id: str
    captured_at: datetime
    arrived_at: datetime
    seen_at: float
    origin: str
    clock: Clock = Clock.FILE_MTIME
    frame_id: int = 0
    batch_id: str = ""
    meta: Mapping[str, Scalar] = field(default_factory=dict)
    trigger: Trigger | None = None
    reply: Reply | None = None


@dataclass(frozen=True, slots=True)
class Frame:
    """One capture with its pixels."""

    capture: Capture
    image: Image


class Outcome(Enum):
    """What the line is told. The value is the `verdict_code`, numbered as OPC 40001-101 ResultEvaluation."""

    ERROR = 0
    PASS = 1
    FAIL = 2
    UNCERTAIN = 3


class Reason(Enum):
    """Why an outcome is not PASS. The value is the `reason_code`; numbers are never reused."""

    NONE = 0
    SCORE_ABOVE_THRESHOLD = 100
    UNCERTAIN_BAND = 110
    ACQUISITION_TIMEOUT = 300
    INCOMPLETE_FRAME = 301
    TRIGGER_WHILE_BUSY = 302
    QUEUE_OVERRUN = 303
    DECODE_FAILED = 304
    ABORTED = 305
    VIEW_MISSING = 307
    MODEL_ERROR = 400
    CHALLENGE_FAILED = 501


@dataclass(frozen=True, slots=True)
class Unreadable:
    """One capture whose pixels cannot be had, and why: the cause, and in words for an operator."""

    capture: Capture
    reason: str
    cause: Reason = Reason.DECODE_FAILED


@dataclass(frozen=True, slots=True)
class Decision:
    """What is decided about one part, and on what grounds.

    `score` and the thresholds are in the detector's units: above `threshold` a part does not pass, and only above
    `fail_threshold`, which is the same one unless an uncertain band was calibrated, it fails. `p_value` is the share of
    good parts at least as anomalous. `score` and `p_value` are None where nothing could be measured.
    """

    outcome: Outcome
    reason: Reason
    detail: str
    score: float | None
    p_value: float | None
    threshold: float
    fail_threshold: float

    @property
    def ratio(self) -> float | None:
        """The score in units of the threshold; above 1 is a reject.

        Never below 0, where the standardised scores of EfficientAD and PUAD may lie: listeners take a negative number
        for "not measured".
        """
        return None if self.score is None else max(0.0, self.score / self.threshold)


@dataclass(frozen=True, slots=True)
class Latency:
    """Where the time of one part went, in milliseconds: waiting, in the detector, and from capture to decision."""

    queue: float
    infer: float
    total: float


@dataclass(frozen=True, slots=True)
class View:
    """What a group's verdict says of one view that it was made of: whose and which verdict, and its score."""

    station: str
    id: str
    seq: int
    outcome: Outcome
    ratio: float | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """A decision with its place in the record: `seq` counts a station's verdicts from 1 without a gap.

    `regions` is where a measured part is above the threshold, the highest peak first. `challenge`: the part is one of
    the challenge test's. `views` are those of a part that several stations have seen, in a group's verdict alone.
    `image_ref` is where the archive keeps its image, empty where it does not.
    """

    seq: int
    capture: Capture
    decision: Decision
    decided_at: datetime
    latency: Latency
    regions: tuple[Region, ...] = ()
    challenge: bool = False
    views: tuple[View, ...] = ()
    image_ref: str = ""
