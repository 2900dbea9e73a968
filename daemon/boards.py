"""What is always to be seen of a station on MQTT: who it is, state and quality, alarms, figures, tags."""

from collections.abc import Callable, Sequence
from datetime import datetime

from daemon.alarms import Alarm
from daemon.announcements import Birth, encode_active, encode_birth, encode_stats
from daemon.contract import (
    Identity,
    Message,
    Quality,
    StationState,
    encode_quality,
    encode_ready,
    encode_state,
    encode_tags,
)
from daemon.messages import Verdict
from daemon.sinks.delivery import Board
from daemon.stats import Counters, Window

ONCE_S = float("inf")
HEARTBEAT_S = 10.0
QUALITY_INTERVAL_S = 60.0
ALARMS_INTERVAL_S = 60.0
STATS_INTERVAL_S = 10.0

Encode = Callable[[datetime], Sequence[Message]]


def birth_board(identity: Callable[[], Identity], birth: Callable[[], Birth]) -> Board:
    """Who the station is; within one run its recipe changes, and what was read anew."""

    def read() -> tuple[object, Encode]:
        who, now = identity(), birth()
        return (who, now), lambda at: [encode_birth(who, now, at)]

    return Board(read, ONCE_S)


def state_board(identity: Callable[[], Identity], state: Callable[[], StationState]) -> Board:
    """The condition, with its heartbeat."""

    def read() -> tuple[object, Encode]:
        who, now = identity(), state()
        essence = (who.recipe, now.state, now.ready, now.camera, now.drift, now.challenge)
        return essence, lambda at: [encode_state(who, now, at)]

    return Board(read, HEARTBEAT_S)


def quality_board(identity: Callable[[], Identity], quality: Callable[[], Quality]) -> Board:
    """What was promised and whether it still holds."""

    def read() -> tuple[object, Encode]:
        now = quality()
        essence = (
            now.calibration.id,
            now.challenge,
            *sorted(name for name, reading in now.watches.items() if reading.alarm),
        )
        return essence, lambda at: [encode_quality(identity(), now, at)]

    return Board(read, QUALITY_INTERVAL_S)


def alarms_board(identity: Identity, active: Callable[[], Sequence[Alarm]]) -> Board:
    """What is wrong now."""

    def read() -> tuple[object, Encode]:
        alarms = active()
        essence = [(alarm.instance, alarm.detail) for alarm in alarms]
        return essence, lambda at: [encode_active(identity, alarms, at)]

    return Board(read, ALARMS_INTERVAL_S)


def stats_board(identity: Identity, counters: Counters) -> Board:
    """The figures of both windows, every ten seconds and when a shift begins."""

    def read() -> tuple[object, Encode]:
        return counters.figures.shift.since, lambda at: [
            encode_stats(identity, counters.snapshot(at, window), at, window) for window in Window
        ]

    return Board(read, STATS_INTERVAL_S)


def tags_board(identity: Identity, state: Callable[[], StationState], newest: Callable[[], Verdict | None]) -> Board:
    """The newest verdict and readiness as single values."""

    def read() -> tuple[object, Encode]:
        verdict, ready = newest(), state().ready
        return (ready, verdict and verdict.seq), lambda _: [
            encode_ready(identity, ready=ready),
            *([] if verdict is None else encode_tags(identity, verdict)),
        ]

    return Board(read, ONCE_S)
