"""What is always to be seen of a station on MQTT, besides its state and quality: who it is, its alarms, its figures."""

from collections.abc import Callable, Sequence
from datetime import datetime

from daemon.alarms import Alarm
from daemon.announcements import Birth, encode_active, encode_birth, encode_stats
from daemon.contract import Identity, Message, StationState, encode_ready, encode_tags
from daemon.messages import Verdict
from daemon.sinks.delivery import Board
from daemon.stats import Stats

ONCE_S = float("inf")
ALARMS_INTERVAL_S = 60.0
STATS_INTERVAL_S = 10.0


def birth_board(identity: Identity, birth: Birth) -> Board:
    """Who the station is: once a connection, since nothing of it changes in one run."""
    return Board(lambda at: (birth, [encode_birth(identity, birth, at)]), ONCE_S)


def alarms_board(identity: Identity, active: Callable[[], Sequence[Alarm]]) -> Board:
    """What is wrong now."""

    def read(at: datetime) -> tuple[object, Sequence[Message]]:
        alarms = active()
        return [(alarm.instance, alarm.detail) for alarm in alarms], [encode_active(identity, alarms, at)]

    return Board(read, ALARMS_INTERVAL_S)


def stats_board(identity: Identity, snapshot: Callable[[datetime], Stats]) -> Board:
    """The figures, every ten seconds."""
    return Board(lambda at: ("", [encode_stats(identity, snapshot(at), at)]), STATS_INTERVAL_S)


def tags_board(identity: Identity, state: Callable[[], StationState], newest: Callable[[], Verdict | None]) -> Board:
    """The newest verdict and readiness as single values."""

    def read(_: datetime) -> tuple[object, Sequence[Message]]:
        verdict, ready = newest(), state().state == "ContinuousExecution"
        tags = [] if verdict is None else encode_tags(identity, verdict)
        return (ready, verdict and verdict.seq), [encode_ready(identity, ready=ready), *tags]

    return Board(read, ONCE_S)
