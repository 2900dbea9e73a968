"""The life of the daemon: start back to front, run, stop front to back."""

import faulthandler
import fcntl
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from datetime import time as clock
from functools import partial
from importlib.metadata import version
from pathlib import Path
from threading import Event, Thread

import structlog

from config.load import ConfigError
from config.schema import Settings
from daemon import audit, logs, metrics, pipeline, systemd
from daemon.announcements import EventKind
from daemon.archive import Archive
from daemon.assembly import LOADING_S, Assembly
from daemon.audit import Audit
from daemon.build import build_archive
from daemon.channel import Channel, Overflow
from daemon.contract import Identity, Picture
from daemon.groups import GroupHealth
from daemon.health import StationHealth
from daemon.journal import Journal
from daemon.messages import Outcome
from daemon.metrics import Line, Metrics
from daemon.outbox import Outbox, OutboxError
from daemon.pipeline import Concluded
from daemon.pulse import Beat, Pulse
from daemon.sinks.mqtt import PictureSink
from daemon.stats import Window, is_over
from detectors.devices import batch_size

DRAIN_S = 8.0
TICK_S = 1.0
"""How often the alarms are looked after, and systemd is told."""
PATIENCE_S, PATIENCE_OUTSIDE_S, PATIENCE_WITH_SOURCES_S = 20.0, 120.0, 300.0
"""Seconds without a sign of life after which a stage hangs: one that computes; one that waits for a disk, a broker or a
name server; one that waits for a camera's driver, or lists a folder on a network."""

log = structlog.get_logger()

_REJECTS = (Outcome.FAIL, Outcome.UNCERTAIN, Outcome.ERROR)
_WANTED: dict[str, Sequence[Outcome]] = {"rejects": _REJECTS, "all": tuple(Outcome), "none": ()}


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the daemon may be asked by signals: to stop, and to read its configuration anew."""

    stop: Event = field(default_factory=Event)
    reload: Event = field(default_factory=Event)


def run(read: Callable[[], Settings], wishes: Wishes) -> None:
    """Inspect, by the configuration that is read, until a stop or until a stage fails; its failure leaves from here.

    Raises:
        ConfigError, ArtifactError, CalibrationError: nothing was started; a person must act.
    """
    settings = read()
    with (
        _alone(settings.state_dir),
        metrics.serving(settings) as page,
        closing(Outbox(settings.state_dir / "outbox.sqlite3", max_rows=settings.mqtt.outbox_max_rows)) as outbox,
        _archiving(settings) as archive,
    ):
        _Life(settings, read, outbox, archive, page, wishes).live()


def _archiving(settings: Settings) -> AbstractContextManager[Archive | None]:
    if settings.archive is None:
        return nullcontext()
    return closing(build_archive(settings.archive, partial(systemd.working, LOADING_S, "listing the archive")))


def heed_signals() -> Wishes:
    """Stop on SIGTERM and SIGINT, reload on SIGHUP; on what kills, say where each thread was. Main thread only."""
    wishes = Wishes()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: wishes.stop.set())
    signal.signal(signal.SIGHUP, lambda *_: wishes.reload.set())
    faulthandler.enable()
    return wishes


class _Life:
    """Stations, channels and threads of one run."""

    def __init__(
        self,
        settings: Settings,
        read: Callable[[], Settings],
        outbox: Outbox,
        archive: Archive | None,
        page: Metrics | None,
        wishes: Wishes,
    ) -> None:
        self._settings = settings
        self._read = read
        self._outbox = outbox
        self._archive = archive
        self._page = page
        self._stop = wishes.stop
        self._reload = wishes.reload
        self._boot_id = secrets.token_hex(4)
        self._failures: list[BaseException] = []
        self._pulses: dict[str, Pulse] = {}
        self._hanging: set[str] = set()
        self._looked_at = time.monotonic()
        self._renewal: Thread | None = None
        self._renewal_began = 0.0
        self._challenges: dict[tuple[str, str], str] = {}
        self._journal = Journal(outbox, Audit(settings.state_dir / audit.FILE), lambda name: self._sinks[name].notify())
        self._journal.open()
        self._assembly = Assembly(settings, outbox, archive, self._boot_id, self._journal.note)
        self._sinks, self._stations = self._assembly.sinks, self._assembly.stations
        self._groups = self._assembly.groups
        self._pictures = PictureSink(self._assembly.broker, settings.node)

    def live(self) -> None:
        """Start back to front, wait, stop front to back."""
        settings, stations, outbox = self._settings, self._stations, self._outbox
        frames = pipeline.lanes(stations)
        concluded: Channel[Concluded] = Channel(8, Overflow.WAIT)  # each holds its image
        pictures: Channel[Concluded] = Channel(4, Overflow.DROP_OLDEST)
        drained = Event()
        mqtt, groups = settings.mqtt, list(self._groups.values())
        names = [*stations, *self._groups]
        if self._page is not None:
            self._page.show(
                Line(
                    stations,
                    self._groups,
                    self._sinks,
                    outbox,
                    totals=lambda name: self._healths[name].counters.snapshot(datetime.now(UTC), Window.TOTAL),
                    pictures_dropped=lambda: pictures.dropped + self._pictures.dropped,
                )
            )
        count = None if self._page is None else self._page.observe

        sinks = [
            self._start(f"mqtt {name}", partial(sink.run, drained, DRAIN_S), PATIENCE_OUTSIDE_S)
            for name, sink in self._sinks.items()
        ]
        back = [
            self._start(
                "pictures",
                lambda beat: pipeline.illustrate(
                    pictures,
                    stations,
                    self._pictures.show,
                    wanted=_WANTED[mqtt.overlays],
                    side=mqtt.overlay_side,
                    limit_bytes=mqtt.max_packet_bytes - 1024,
                    more=[*([Picture.MAP] if mqtt.maps else []), *([Picture.SOURCE] if mqtt.sources else [])],
                    beat=beat,
                ),
                PATIENCE_OUTSIDE_S,
            ),
            self._start(
                "record",
                lambda beat: pipeline.record(
                    concluded, stations, outbox, pictures, self._stop, groups, beat, count, self._archive
                ),
                PATIENCE_OUTSIDE_S,
            ),
            self._start(
                "inspect",
                lambda beat: pipeline.inspect(frames, stations, concluded, batch_size(settings.device), groups, beat),
            ),
        ]
        front = [
            self._start(f"acquire {name}", partial(pipeline.acquire, s, frames, self._stop), PATIENCE_WITH_SOURCES_S)
            for name, s in stations.items()
        ]
        try:
            self._watch()
        except Exception as failure:  # noqa: BLE001 -- what runs must end in its order, whatever fails here
            self._failures.append(failure)
            self._stop.set()
        systemd.stopping()
        log.info("stopping")
        _join(front)
        frames.close()
        _join(back)
        if self._renewal is not None:
            self._renewal.join()
        why = str(self._failures[0]) if self._failures else "as it was asked to"
        for name in names:
            self._journal.note(self._identity(name), EventKind.STOPPED, version("inspectd"), why)
        drained.set()
        for sink in self._sinks.values():
            sink.notify()
        _join(sinks)
        self._journal.close()  # the sinks may have obeyed commands until now
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

    def _identity(self, name: str) -> Identity:
        """Who speaks for a station or group now."""
        return self._groups[name].identity() if name in self._groups else self._stations[name].recipes.current.identity

    def _watch(self) -> None:
        """Say that all runs, and look after it until the stop."""
        systemd.ready(self._summary())
        log.info("ready", stations=list(self._stations), boot_id=self._boot_id)
        for station in self._stations.values():
            prepared = station.recipes.current.identity
            self._journal.note(
                prepared,
                EventKind.STARTED,
                version("inspectd"),
                f"recipe {prepared.recipe}, calibration {prepared.calibration}",
            )
        for name, group in self._groups.items():
            fusion = group.fusion
            what = f"views {', '.join(fusion.views)} of one {fusion.by} within {fusion.within_s:g} s"
            self._journal.note(self._identity(name), EventKind.STARTED, version("inspectd"), what)
        while not self._stop.wait(TICK_S):
            self._look_after_alarms()
            self._look_after_figures()
            self._look_after_stages()
            self._look_after_wishes()

    def _start(self, name: str, stage: Callable[[Beat], None], patience_s: float = PATIENCE_S) -> Thread:
        pulse = self._pulses[name] = Pulse(patience_s)

        def root() -> None:
            with suppress(OSError):  # for `top -H`; the kernel takes 15 characters
                Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name[:15])
            try:
                stage(pulse.beat)
            except BaseException as failure:  # noqa: BLE001 -- the root of a thread; it leaves from `live`
                self._failures.append(failure)
                self._stop.set()

        thread = threading.Thread(target=root, name=name)
        thread.start()
        return thread

    def _look_after_alarms(self) -> None:
        """Raise and clear alarms, and note the results of challenge tests."""
        for name, health in self._healths.items():
            for change in health.update(self._outbox.depth(name), self._journal.trouble):
                self._journal.alarm(self._identity(name), change)
        for name, station in self._stations.items():
            recipe = station.recipes.current
            test = recipe.quality.report().challenge
            if test and self._challenges.setdefault((name, recipe.name), test.status) != test.status:
                self._challenges[name, recipe.name] = test.status
                self._journal.note(self._identity(name), EventKind.CHALLENGE, test.status, test.detail)
        self._journal.deliver()

    def _look_after_figures(self) -> None:
        """Begin a new shift where one is over, and save what no verdict has taken along."""
        now, shifts = datetime.now(UTC), [clock.fromisoformat(each) for each in self._settings.shifts]
        for name, health in self._healths.items():
            if is_over(health.counters.figures.shift.since, shifts, now):
                self._journal.change_shift(self._identity(name), now)
        with suppress(OutboxError):  # a full disk, say; it is tried again in a second
            self._outbox.checkpoint()

    def _look_after_stages(self) -> None:
        """Tell systemd that all stages move, or which one hangs, so that it starts the daemon afresh."""
        # Where this thread itself was held up, the whole machine may have been: then the stages have a second more.
        paused = time.monotonic() - self._looked_at > PATIENCE_S / 4
        self._looked_at = time.monotonic()
        hanging = set() if paused else {name for name, pulse in self._pulses.items() if pulse.hangs}
        for name in hanging - self._hanging:
            log.critical("a stage hangs; systemd restarts the service, elsewhere restart it by hand", stage=name)
        self._hanging = hanging
        if hanging:
            systemd.hanging(f"hanging: {', '.join(sorted(hanging))}; {self._summary()}")
        else:
            systemd.alive(self._summary())

    def _look_after_wishes(self) -> None:
        """Read the configuration anew if that is wished, once after another."""
        if not self._reload.is_set():
            return
        if self._renewal is not None and self._renewal.is_alive():
            if time.monotonic() - self._renewal_began > LOADING_S:
                log.error("the configuration is still being read anew; restart the service if that hangs")
            return
        self._reload.clear()
        self._renewal = threading.Thread(target=self._renew, name="reload", daemon=True)
        self._renewal_began = time.monotonic()
        self._renewal.start()

    def _renew(self) -> None:
        """Read the configuration anew; one that is wrong changes nothing. A thread's root."""
        systemd.reloading()
        try:
            changes = self._assembly.reload(self._read(), self._stop)
        except Exception as error:  # noqa: BLE001 -- whatever it is, what runs goes on
            log.error("the configuration is refused; nothing is changed", reason=str(error))  # noqa: TRY400 -- no bug of ours
            subject, lines = "refused", str(error).splitlines()
        else:
            log.info("the configuration is read anew", changed=changes.made, after_a_restart=changes.waiting)
            subject = "done"
            lines = [*changes.made, *(f"after a restart: {line}" for line in changes.waiting)] or ["nothing new"]
        self._pictures.reconnect()
        lines = [_public(line) for line in lines]
        for name in self._stations:
            others = [f"station[{other}]" for other in self._stations if other != name]
            told = [line for line in lines if not any(other in line for other in others)]
            if told:
                self._journal.note(self._identity(name), EventKind.RELOAD, subject, "; ".join(told))
        systemd.ready(self._summary())

    def _summary(self) -> str:
        return "; ".join(health.summary() for health in self._healths.values())

    @property
    def _healths(self) -> dict[str, StationHealth | GroupHealth]:
        stations = {name: station.health for name, station in self._stations.items()}
        return {**stations, **{name: group.health for name, group in self._groups.items()}}


def _public(change: str) -> str:
    """A line about the configuration as everybody may read it: without the passwords that URLs may hold."""
    key, _, values = logs.redacted(change).partition(": ")
    before, arrow, after = values.partition(" → ")
    return f"{key}: changed" if arrow and before == after else f"{key}: {values}".removesuffix(": ")


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
