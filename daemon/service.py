"""The life of the daemon: start back to front, run, stop front to back."""

import fcntl
import secrets
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event, Thread

import structlog

from calibration import store
from calibration.calibration import shortage
from config.load import ConfigError
from config.schema import Settings
from config.schema import Station as StationSettings
from daemon import pipeline, systemd
from daemon.build import (
    build_broker,
    build_challenge,
    build_detector,
    build_rule,
    build_source,
    calibration_path,
)
from daemon.channel import Channel, Overflow
from daemon.contract import Identity
from daemon.health import StationHealth
from daemon.messages import Frame, Outcome, Unreadable
from daemon.outbox import Outbox, OutboxError
from daemon.pipeline import Concluded, Station
from daemon.quality import StationQuality
from daemon.sinks.link import Broker
from daemon.sinks.mqtt import PictureSink, StationSink
from detectors.devices import batch_size

DRAIN_S = 8.0
STATUS_INTERVAL_S = 2.0

log = structlog.get_logger()

_REJECTS = (Outcome.FAIL, Outcome.UNCERTAIN, Outcome.ERROR)
_WANTED: dict[str, Sequence[Outcome]] = {"rejects": _REJECTS, "all": tuple(Outcome), "none": ()}


def run(settings: Settings, stop: Event) -> None:
    """Inspect until `stop` is set or a stage fails; the first failure leaves from here.

    Raises:
        ConfigError, ArtifactError, CalibrationError: nothing was started; a person must act.
    """
    with _alone(settings.state_dir):
        outbox = Outbox(settings.state_dir / "outbox.sqlite3")
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
        broker = build_broker(settings.mqtt)
        self._pictures = PictureSink(broker, settings.node)
        self._sinks: dict[str, StationSink] = {}
        self._stations = {s.name: self._build(s, broker) for s in settings.stations}

    def live(self) -> None:
        """Start back to front, wait, stop front to back."""
        settings, stations, outbox = self._settings, self._stations, self._outbox
        frames: Channel[Frame | Unreadable] = Channel(4, Overflow.WAIT)
        concluded: Channel[Concluded] = Channel(8, Overflow.WAIT)  # each holds its image
        pictures: Channel[Concluded] = Channel(4, Overflow.DROP_OLDEST)
        drained = Event()
        mqtt = settings.mqtt
        last_seq = {name: outbox.last_seq(name) for name in stations}

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
                ),
            ),
            self._start("record", lambda: pipeline.record(concluded, stations, outbox, pictures, self._stop)),
            self._start(
                "inspect",
                lambda: pipeline.inspect(frames, stations, concluded, batch_size(settings.device), last_seq),
            ),
        ]
        front = [
            self._start(f"acquire {name}", partial(pipeline.acquire, s, frames, self._stop))
            for name, s in stations.items()
        ]
        systemd.ready(self._summary())
        log.info("ready", stations=list(stations), boot_id=self._boot_id)
        while not self._stop.wait(STATUS_INTERVAL_S):
            systemd.status(self._summary())
        systemd.stopping()
        log.info("stopping")
        _join(front)
        frames.close()
        _join(back)
        drained.set()
        for sink in self._sinks.values():
            sink.notify()
        _join(sinks)
        self._pictures.close()
        log.info(
            "stopped",
            waiting={name: outbox.depth(name) for name in stations},
            gate_messages_dropped={name: sink.actuations_dropped for name, sink in self._sinks.items()},
            pictures_dropped=pictures.dropped + self._pictures.dropped,
        )
        if self._failures:
            raise self._failures[0]

    def _build(self, station: StationSettings, broker: Broker) -> Station:
        settings = self._settings
        log.info("loading the model", station=station.name, model=str(station.model))
        rule = build_rule(station.regions)
        detector = build_detector(station.model, settings.device, settings.threads, rule)
        calibration = store.load(calibration_path(station), detector.fingerprint, rule.fingerprint)
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
            model=station.model.name,
            model_sha256=detector.fingerprint,
            calibration=calibration.id,
            fpr_target=calibration.alpha_carried,
        )
        test = station.challenge
        challenge = None if test is None else build_challenge(test, station.name, settings.state_dir)
        quality = StationQuality(station.name, calibration, challenge)
        health = StationHealth(station.name, self._outbox.last_seq(station.name), quality)
        ttl_s = settings.mqtt.actuation_ttl_s
        self._sinks[station.name] = sink = StationSink(
            broker,
            identity,
            self._outbox,
            state=lambda: health.state(self._outbox.depth(station.name)),
            quality=quality.report,
            actuation_ttl_s=ttl_s,
        )
        source = build_source(station, self._outbox)
        return Station(identity, source, detector, calibration, sink, health, quality, ttl_s, rule)

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

    def _summary(self) -> str:
        return "; ".join(station.health.summary() for station in self._stations.values())


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
