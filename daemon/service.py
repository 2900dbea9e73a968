"""The life of the daemon: start back to front, run, stop front to back."""

import fcntl
import hashlib
import secrets
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from threading import Event, Lock, Thread

import structlog
from ulid import ULID

from calibration import store
from calibration.calibration import shortage
from config.load import ConfigError
from config.schema import DEFAULT_RECIPE, Settings
from config.schema import Group as GroupSettings
from config.schema import Recipe as RecipeSettings
from config.schema import Station as StationSettings
from daemon import announcements, boards, pipeline, systemd
from daemon.announcements import Birth, EventKind, encode_alarm, encode_event
from daemon.build import (
    build_broker,
    build_challenge,
    build_detector,
    build_framing,
    build_rule,
    build_source,
    overflow_of,
    place_of,
)
from daemon.channel import Channel, Overflow
from daemon.contract import TOPICS, Identity, Message, Picture, Quality, StationState, encode_state
from daemon.control import Control, standing, unkept
from daemon.execution import Execution, Mode
from daemon.fusion import Fusion, Key
from daemon.groups import GroupHealth
from daemon.health import StationHealth
from daemon.link import Broker
from daemon.messages import Outcome
from daemon.outbox import Outbox, OutboxError
from daemon.pipeline import Concluded, Group, Station
from daemon.quality import StationQuality
from daemon.recipes import Recipe, Recipes
from daemon.requests import Action
from daemon.sinks.mqtt import PictureSink, StationSink
from detectors.base import Detector
from detectors.devices import batch_size

DRAIN_S = 8.0
TICK_S = 1.0
"""How often the alarms are looked after, and systemd is told."""

log = structlog.get_logger()

_REJECTS = (Outcome.FAIL, Outcome.UNCERTAIN, Outcome.ERROR)
_WANTED: dict[str, Sequence[Outcome]] = {"rejects": _REJECTS, "all": tuple(Outcome), "none": ()}


def run(settings: Settings, stop: Event) -> None:
    """Inspect until `stop` is set or a stage fails; the first failure leaves from here.

    Raises:
        ConfigError, ArtifactError, CalibrationError: nothing was started; a person must act.
    """
    with _alone(settings.state_dir):
        outbox = Outbox(settings.state_dir / "outbox.sqlite3", max_rows=settings.mqtt.outbox_max_rows)
        try:
            _Life(settings, outbox, stop).live()
        finally:
            outbox.close()


def stop_on_signals() -> Event:
    """Give an event that SIGTERM and SIGINT set. Main thread only."""
    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


class _Life:
    """Stations, channels and threads of one run."""

    def __init__(self, settings: Settings, outbox: Outbox, stop: Event) -> None:
        self._settings = settings
        self._outbox = outbox
        self._stop = stop
        self._boot_id = secrets.token_hex(4)
        self._failures: list[BaseException] = []
        self._notes: deque[tuple[str, Message]] = deque()
        self._delivering = Lock()
        self._challenges: dict[tuple[str, str], str] = {}
        self._detectors: dict[tuple[Path, str], Detector] = {}
        broker = build_broker(settings.mqtt)
        self._pictures = PictureSink(broker, settings.node)
        self._sinks: dict[str, StationSink] = {}
        self._stations = {s.name: self._build(s, broker) for s in settings.stations}
        self._groups = {group.name: self._build_group(group, broker) for group in settings.groups}

    def live(self) -> None:
        """Start back to front, wait, stop front to back."""
        settings, stations, outbox = self._settings, self._stations, self._outbox
        frames = pipeline.lanes(stations)
        concluded: Channel[Concluded] = Channel(8, Overflow.WAIT)  # each holds its image
        pictures: Channel[Concluded] = Channel(4, Overflow.DROP_OLDEST)
        drained = Event()
        mqtt, groups = settings.mqtt, list(self._groups.values())
        names = [*stations, *self._groups]

        sinks = [self._start(f"mqtt {name}", partial(s.run, drained, DRAIN_S)) for name, s in self._sinks.items()]
        back = [
            self._start(
                "pictures",
                lambda: pipeline.illustrate(
                    pictures,
                    stations,
                    self._pictures.show,
                    wanted=_WANTED[mqtt.overlays],
                    side=mqtt.overlay_side,
                    limit_bytes=mqtt.max_packet_bytes - 1024,
                    more=[*([Picture.MAP] if mqtt.maps else []), *([Picture.SOURCE] if mqtt.sources else [])],
                ),
            ),
            self._start("record", lambda: pipeline.record(concluded, stations, outbox, pictures, self._stop, groups)),
            self._start(
                "inspect",
                lambda: pipeline.inspect(frames, stations, concluded, batch_size(settings.device), groups),
            ),
        ]
        front = [
            self._start(f"acquire {name}", partial(pipeline.acquire, s, frames, self._stop))
            for name, s in stations.items()
        ]
        systemd.ready(self._summary())
        log.info("ready", stations=list(stations), boot_id=self._boot_id)
        for name, station in stations.items():
            prepared = station.recipes.current.identity
            self._note(
                name,
                EventKind.STARTED,
                version("inspectd"),
                f"recipe {prepared.recipe}, calibration {prepared.calibration}",
            )
        for name, group in self._groups.items():
            fusion = group.fusion
            what = f"views {', '.join(fusion.views)} of one {fusion.by} within {fusion.within_s:g} s"
            self._note(name, EventKind.STARTED, version("inspectd"), what)
        while not self._stop.wait(TICK_S):
            self._look_after_alarms()
            systemd.status(self._summary())
        systemd.stopping()
        log.info("stopping")
        _join(front)
        frames.close()
        _join(back)
        why = str(self._failures[0]) if self._failures else "as it was asked to"
        for name in names:
            self._note(name, EventKind.STOPPED, version("inspectd"), why)
        drained.set()
        for sink in self._sinks.values():
            sink.notify()
        _join(sinks)
        self._pictures.close()
        log.info(
            "stopped",
            waiting={name: outbox.depth(name) for name in names},
            quarantined={name: outbox.quarantined(name) for name in names},
            gate_messages_dropped={name: sink.actuations_dropped for name, sink in self._sinks.items()},
            pictures_dropped=pictures.dropped + self._pictures.dropped,
        )
        if self._failures:
            raise self._failures[0]

    def _build(self, station: StationSettings, broker: Callable[[], Broker]) -> Station:
        name, mqtt, outbox = station.name, self._settings.mqtt, self._outbox
        built = [self._build_recipe(station, index, recipe) for index, recipe in enumerate(station.recipes, start=1)]
        recipes = Recipes(built, outbox.prepared(name))
        last_seq = outbox.last_seq(name)
        mode = standing(outbox, name, {"continuous": Mode.CONTINUOUS, "triggered": Mode.READY}[station.mode])
        execution = Execution(
            name,
            mode,
            last_seq,
            timeout_s=station.trigger_timeout_s,
            acknowledged=station.acknowledge,
            aborted=unkept(outbox, name),
        )
        health = StationHealth(name, last_seq, recipes, execution)

        def identity() -> Identity:
            return recipes.current.identity

        def state() -> StationState:
            return health.state(outbox.depth(name))

        def quality() -> Quality:
            return health.quality.report()

        def halted() -> Message:
            return encode_state(identity(), replace(state(), state=Mode.HALTED.value), datetime.now(UTC))

        control = Control(identity(), execution, recipes, health, outbox, partial(self._note, name))
        self._sinks[name] = sink = StationSink(
            broker,
            identity(),
            outbox,
            halted=halted,
            boards=[
                boards.birth_board(identity, self._birth(station)),
                boards.state_board(identity, state),
                boards.quality_board(identity(), quality),
                boards.alarms_board(identity(), health.alarms.active),
                boards.stats_board(identity(), health.counters),
                *([boards.tags_board(identity(), state, lambda: health.newest)] if mqtt.tags else []),
            ],
            obey=control.obey,
            actuation_ttl_s=mqtt.actuation_ttl_s,
            replay_rate=mqtt.replay_rate,
        )
        source = build_source(station, self._settings.state_dir, outbox, health.lost, broker, identity())
        overflow = overflow_of(station.source)
        return Station(name, source, recipes, sink, health, execution, mqtt.actuation_ttl_s, overflow)

    def _build_group(self, group: GroupSettings, broker: Callable[[], Broker]) -> Group:
        """What joins the verdicts of stations that are built already."""
        settings, outbox, name = self._settings, self._outbox, group.name
        mqtt, views = settings.mqtt, [self._stations[view] for view in group.views]
        fusion = Fusion(name, group.views, Key(group.by), group.within_s, outbox.last_seq(name))
        health = GroupHealth(name, outbox.last_seq(name), [view.health for view in views])

        def identity() -> Identity:
            now = [view.recipes.current.identity for view in views]
            return Identity(
                prefix=mqtt.topic_prefix,
                node=settings.node,
                station=name,
                boot_id=self._boot_id,
                model="",
                model_sha256=hashlib.sha256("".join(view.model_sha256 for view in now).encode()).hexdigest(),
                calibration="",
                fpr_target=min(1.0, sum(view.fpr_target for view in now)),  # a good part fails if any view does
            )

        def state() -> StationState:
            return health.state(outbox.depth(name))

        def halted() -> Message:
            return encode_state(identity(), replace(state(), state=Mode.HALTED.value), datetime.now(UTC))

        unsaid = ("quality", "image/", "cmd/", *([] if mqtt.tags else ["tag/"]))
        birth = replace(
            self._birth(next(station for station in settings.stations if station.name == group.views[0])),
            source_kind="group",
            source_place=", ".join(group.views),
            leaves=[leaf for leaf in TOPICS if not leaf.startswith(unsaid)],
            recipes=[DEFAULT_RECIPE],
            commands=[],
        )
        self._sinks[name] = sink = StationSink(
            broker,
            identity(),
            outbox,
            halted=halted,
            boards=[
                boards.birth_board(identity, birth),
                boards.state_board(identity, state),
                boards.alarms_board(identity(), health.alarms.active),
                boards.stats_board(identity(), health.counters),
                *([boards.tags_board(identity(), state, lambda: health.newest)] if mqtt.tags else []),
            ],
            obey=None,
            actuation_ttl_s=mqtt.actuation_ttl_s,
            replay_rate=mqtt.replay_rate,
        )
        return Group(name, fusion, identity, sink, health, mqtt.actuation_ttl_s)

    def _identity(self, name: str) -> Identity:
        """Who speaks for a station or group now."""
        return self._groups[name].identity() if name in self._groups else self._stations[name].recipes.current.identity

    def _build_recipe(self, station: StationSettings, index: int, recipe: RecipeSettings) -> Recipe:
        settings = self._settings
        log.info("loading the model", station=station.name, recipe=recipe.name, model=str(recipe.model))
        rule = build_rule(recipe.regions)
        key = recipe.model, rule.fingerprint
        if key not in self._detectors:  # stations that judge alike share one, and are judged together
            self._detectors[key] = build_detector(recipe.model, settings.device, settings.threads, rule)
        detector = self._detectors[key]
        framing = build_framing(station.framing).fingerprint
        calibration = store.load(recipe.calibration_file, detector.fingerprint, rule.fingerprint, framing)
        if missing := shortage(calibration):
            log.warning(
                "too few good parts for the false-reject rate that was asked for", station=station.name, reason=missing
            )
        if calibration.provenance.engine != detector.engine:
            log.warning(
                "calibrated with another engine than inspects; scores may differ in their last digits",
                station=station.name,
                calibrated=calibration.provenance.engine,
                inspects=detector.engine,
            )
        identity = Identity(
            prefix=settings.mqtt.topic_prefix,
            node=settings.node,
            station=station.name,
            boot_id=self._boot_id,
            model=recipe.model.name,
            model_sha256=detector.fingerprint,
            calibration=calibration.id,
            fpr_target=calibration.alpha_carried,
            recipe=recipe.name,
            recipe_index=index,
        )
        # A station that was given recipes later goes on with the result that it has.
        name = station.name if index == 1 else f"{station.name}.{recipe.name}"
        challenge = None if recipe.challenge is None else build_challenge(recipe.challenge, name, settings.state_dir)
        return Recipe(identity, detector, calibration, StationQuality(station.name, calibration, challenge), rule)

    def _start(self, name: str, stage: Callable[[], None]) -> Thread:
        def root() -> None:
            try:
                stage()
            except BaseException as failure:  # noqa: BLE001 -- the root of a thread; it leaves from `live`
                self._failures.append(failure)
                self._stop.set()

        thread = threading.Thread(target=root, name=name)
        thread.start()
        return thread

    def _birth(self, station: StationSettings) -> Birth:
        mqtt = self._settings.mqtt
        optional = {"tag/": mqtt.tags, "image/map": mqtt.maps, "image/source": mqtt.sources}
        off = tuple(leaf for leaf, wanted in optional.items() if not wanted)
        return Birth(
            version=version("inspectd"),
            source_kind=station.source.type,
            source_place=place_of(station.source),
            actuation_ttl_ms=int(mqtt.actuation_ttl_s * 1000),
            max_packet_bytes=mqtt.max_packet_bytes,
            config_sha256=hashlib.sha256(self._settings.model_dump_json().encode()).hexdigest(),
            leaves=[leaf for leaf in TOPICS if not leaf.startswith(off)],
            recipes=[recipe.name for recipe in station.recipes],
            commands=list(Action),
        )

    def _look_after_alarms(self) -> None:
        """Raise and clear alarms, and note the results of challenge tests."""
        for name, health in self._healths.items():
            for change in health.update(self._outbox.depth(name)):
                log.warning(
                    "alarm", station=name, alarm=change.alarm.id, active=change.active, detail=change.alarm.detail
                )
                self._notes.append((name, encode_alarm(self._identity(name), change, datetime.now(UTC))))
        for name, station in self._stations.items():
            recipe = station.recipes.current
            test = recipe.quality.report().challenge
            if test and self._challenges.setdefault((name, recipe.name), test.status) != test.status:
                self._challenges[name, recipe.name] = test.status
                self._note(name, EventKind.CHALLENGE, test.status, test.detail)
        self._deliver_notes()

    def _note(self, station: str, kind: EventKind, subject: str, detail: str) -> None:
        """Note that something happened, for the audit."""
        at = datetime.now(UTC)
        event = announcements.Event(str(ULID.from_datetime(at)), kind, subject, detail, at)
        self._notes.append((station, encode_event(self._identity(station), event)))
        self._deliver_notes()

    def _deliver_notes(self) -> None:
        """Put into the outbox what it takes; while the disk refuses, the rest waits here. Any thread."""
        with self._delivering:
            self._deliver_in_order()

    def _deliver_in_order(self) -> None:
        while self._notes:
            station, message = self._notes[0]
            leaf = message.topic.removeprefix(self._identity(station).topic(""))
            try:
                self._outbox.tell(station, leaf, message.payload)
            except OutboxError:
                return
            self._notes.popleft()
            self._sinks[station].notify()

    def _summary(self) -> str:
        return "; ".join(health.summary() for health in self._healths.values())

    @property
    def _healths(self) -> dict[str, StationHealth | GroupHealth]:
        stations = {name: station.health for name, station in self._stations.items()}
        return {**stations, **{name: group.health for name, group in self._groups.items()}}


def _join(threads: Sequence[Thread]) -> None:
    for thread in threads:
        thread.join()


@contextmanager
def _alone(state_dir: Path) -> Iterator[None]:
    """Hold the state folder for one daemon alone."""
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        lock = (state_dir / "lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"state_dir: {state_dir} cannot be used: {error.strerror}; create it with the rights of the daemon's user"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Not a fault of the configuration: the other one may end, and systemd shall try again.
            raise OutboxError(
                f"{state_dir} is in use by another inspectd; stop it, or give each its own state_dir"
            ) from None
        yield
