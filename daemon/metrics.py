"""The figures of the daemon for Prometheus: verdicts are counted as they are recorded, all else is read when asked for.

Labels are stations, recipes and words of a short list, never parts. A group counts as a station, under its own name.
"""

import errno
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import structlog
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from ulid import ULID

from config.schema import Settings
from daemon.alarms import DEFINITIONS
from daemon.canaries import CAUSES
from daemon.contract import STATES
from daemon.groups import GroupHealth
from daemon.health import StationHealth
from daemon.messages import Outcome, Verdict
from daemon.outbox import Outbox, OutboxError
from daemon.pipeline import Group, Station
from daemon.recipes import Recipe
from daemon.stats import Stats
from detectors import devices

log = structlog.get_logger()

DRIFTS = ("off", "ok", *dict.fromkeys(CAUSES.values()), "product")
CHALLENGES = ("off", "ok", "due", "failed")
LATENCIES_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0)
SCORES = (0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 4.0)
"""Of the threshold; up to 1 a part passes."""


class Session(Protocol):
    """What is asked of a station's MQTT session."""

    actuations_dropped: int

    @property
    def connected(self) -> bool:
        """Whether a broker is there."""


@dataclass(frozen=True, slots=True)
class Line:
    """What runs, of which figures are read.

    Attributes:
        sinks: the sessions of stations and groups by their names.
        totals: what a station or group of a name has counted, no matter when a person has begun a shift.
        pictures_dropped: how many pictures were not sent since the start.
    """

    stations: Mapping[str, Station]
    groups: Mapping[str, Group]
    sinks: Mapping[str, Session]
    outbox: Outbox
    totals: Callable[[str], Stats]
    pictures_dropped: Callable[[], int]


@dataclass(frozen=True, slots=True)
class _Counts:
    """Where the verdicts of one station by one recipe are counted."""

    outcomes: Mapping[Outcome, Counter]
    queue: Histogram
    infer: Histogram
    record: Histogram
    total: Histogram
    score: Histogram


class Metrics:
    """All figures of one process. Any thread may call."""

    def __init__(self, settings: Settings) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call] # untyped where it is made
        self._settings = settings
        self.registry = CollectorRegistry()
        self._inspections = Counter(
            "inspectd_inspections_total",
            "Verdicts in the record, without those of the challenge test.",
            ["station", "recipe", "outcome"],
            registry=self.registry,
        )
        self._latency = Histogram(
            "inspectd_latency_seconds",
            "How long parts took: waiting, in the detector, from decision to the record, and from capture to decision.",
            ["station", "stage"],
            buckets=LATENCIES_S,
            registry=self.registry,
        )
        self._score = Histogram(
            "inspectd_score",
            "Scores of measured parts in units of the threshold; above 1 a part does not pass.",
            ["station", "recipe"],
            buckets=SCORES,
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)
        about = {"version": version("inspectd"), "python": platform.python_version(), "torch": version("torch")}
        Info("inspectd_build", "What this program is.", registry=self.registry).info({"node": settings.node, **about})
        # A count that is there before its first part rises by it; one that appears with it does not, to Prometheus.
        recipes = {station.name: [recipe.name for recipe in station.recipes] for station in settings.stations}
        views = {group.name: [recipe for view in group.views for recipe in recipes[view]] for group in settings.groups}
        self._counts = {
            (station, recipe): self._begin(station, recipe)
            for station, names in {**recipes, **views}.items()
            for recipe in names
        }

    def observe(self, verdict: Verdict, recipe: str, kept_at: datetime) -> None:
        """Count a verdict that has become durable, at a time in UTC; those of the challenge test are in no figure."""
        if verdict.challenge:
            return
        station, decision, latency = verdict.capture.station, verdict.decision, verdict.latency
        counts = self._counts.get((station, recipe)) or self._begin(station, recipe)
        counts.outcomes[decision.outcome].inc()
        # Clocks that are set back give times below zero, and a sum that falls counts as a restart.
        counts.total.observe(max(0.0, latency.total / 1000))
        counts.record.observe(max(0.0, (kept_at - verdict.decided_at).total_seconds()))
        if decision.ratio is not None:
            counts.queue.observe(latency.queue / 1000)
            counts.infer.observe(latency.infer / 1000)
            counts.score.observe(decision.ratio)

    def show(self, line: Line) -> None:
        """Let figures be read of what runs from now on."""
        self.registry.register(_Now(line, self._settings.state_dir))

    def _begin(self, station: str, recipe: str) -> "_Counts":
        outcomes = {outcome: self._inspections.labels(station, recipe, outcome.name) for outcome in Outcome}
        stages = ("queue", "infer", "record", "total")
        queue, infer, record, total = (self._latency.labels(station, stage) for stage in stages)
        return _Counts(outcomes, queue, infer, record, total, self._score.labels(station, recipe))


@contextmanager
def serving(settings: Settings) -> Iterator[Metrics | None]:
    """Answer Prometheus for as long as the context is open; None, and nothing, without a section `[metrics]`.

    None, too, where nobody may listen there, which is said in the log: no figure is worth a line that stands.
    """
    if settings.metrics is None:
        yield None
        return
    host, port = settings.metrics.host, settings.metrics.port
    metrics, served = Metrics(settings), None
    try:
        served = start_http_server(port, host, metrics.registry)
    except OSError as error:
        log.warning("Prometheus is not answered; inspection goes on", reason=_refusal(host, port, error))
    try:
        yield metrics if served else None
    finally:
        if served:
            server, thread = served
            server.shutdown()
            thread.join()
            server.server_close()


def _refusal(host: str, port: int, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return (
                f"metrics.port: {port} of {host} is taken by another program, an inspectd perhaps; choose another "
                "port under [metrics], or stop that program, and restart"
            )
        case errno.EACCES:
            return f"metrics.port: {port} may not be listened at by this user; choose one above 1023 under [metrics]"
        case _:
            return (
                f"metrics.host: {host} is no address of this machine ({error.strerror}); correct it under [metrics], "
                "or restart when the network is there"
            )


class _Figures:
    """The figures of one reading by name; what ends in `_total` is a counter."""

    def __init__(self) -> None:
        self.by_name: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}

    def add(self, name: str, meaning: str, value: float, **labels: str) -> None:
        """Take one value; each of a name has the same labels in the same order."""
        if name not in self.by_name:
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            self.by_name[name] = family(name, meaning, labels=list(labels))
        self.by_name[name].add_metric(list(labels.values()), value)


class _Now(Collector):
    """What the line says of itself at the moment of a reading."""

    def __init__(self, line: Line, state_dir: Path) -> None:
        self._line = line
        self._state_dir = state_dir

    def collect(self) -> Iterator[Metric]:
        """Read all figures, in any thread; none of them waits for a line, a camera or a broker."""
        figures, now = _Figures(), datetime.now(UTC)
        healths: dict[str, StationHealth | GroupHealth] = {
            name: station.health for name, station in self._line.stations.items()
        }
        healths |= {name: group.health for name, group in self._line.groups.items()}
        for name, health in healths.items():
            _add_state(figures, name, health)
            self._add_parts(figures, name)
            self._add_delivery(figures, name, now)
        for name, station in self._line.stations.items():
            _add_recipe(figures, name, station.recipes.current, now)
        self._add_machine(figures)
        yield from figures.by_name.values()

    def _add_parts(self, figures: _Figures, name: str) -> None:
        totals = self._line.totals(name)
        fates = {"inspected": totals.inspected, **{cause.value: count for cause, count in totals.dropped.items()}}
        for fate, count in fates.items():
            figures.add(
                "inspectd_frames_total", "Parts that came, by what became of them.", count, station=name, outcome=fate
            )
        figures.add("inspectd_parts_pending", "Parts on their way to a verdict.", totals.pending, station=name)
        figures.add(
            "inspectd_gate_too_late_total",
            "Parts that came too long ago for the reject gate to be told.",
            totals.too_late,
            station=name,
        )

    def _add_delivery(self, figures: _Figures, name: str, now: datetime) -> None:
        sink, outbox = self._line.sinks[name], self._line.outbox
        depth = outbox.depth(name)
        figures.add("inspectd_mqtt_connected", "1 while a broker is there.", sink.connected, station=name)
        figures.add(
            "inspectd_gate_dropped_total",
            "Messages to the reject gate that were not sent for want of a live connection.",
            sink.actuations_dropped,
            station=name,
        )
        figures.add("inspectd_outbox_depth", "Verdicts that wait for the broker.", depth, station=name)
        with suppress(OutboxError):  # a disk that fails is told of by other figures
            oldest = outbox.entries(name, 0, 1) if depth else []
            age_s = max(((now - ULID.from_str(entry.id).datetime).total_seconds() for entry in oldest), default=0.0)
            figures.add(
                "inspectd_outbox_oldest_age_seconds",
                "Since the part of the oldest waiting verdict came; 0 where none waits.",
                max(0.0, age_s),
                station=name,
            )
        figures.add(
            "inspectd_outbox_quarantined",
            "Verdicts that are kept although no broker takes them.",
            outbox.quarantined(name),
            station=name,
        )

    def _add_machine(self, figures: _Figures) -> None:
        figures.add("inspectd_pictures_dropped_total", "Pictures that were not sent.", self._line.pictures_dropped())
        with suppress(OSError):
            disk = shutil.disk_usage(self._state_dir)
            figures.add("inspectd_disk_free_bytes", "Room on the disk of state_dir.", disk.free)
            figures.add("inspectd_disk_size_bytes", "Size of the disk of state_dir.", disk.total)
        if (gpu := devices.gpu()) is not None:
            figures.add("inspectd_gpu_memory_used_bytes", "Memory of the GPU that programs use.", gpu.used_bytes)
            figures.add("inspectd_gpu_memory_size_bytes", "Memory of the GPU.", gpu.size_bytes)
            if gpu.celsius is not None:
                figures.add("inspectd_gpu_temperature_celsius", "Temperature of the GPU.", gpu.celsius)


def _add_state(figures: _Figures, name: str, health: StationHealth | GroupHealth) -> None:
    """How a station or group is."""
    state = health.state(0)
    for word in STATES:
        figures.add("inspectd_state", "1 for the state that it is in.", word == state.state, station=name, state=word)
    up = state.camera == "online"
    figures.add("inspectd_source_up", "1 while the camera or folder can be read.", up, station=name)
    age_s = state.last_frame_age_ms / 1000
    figures.add(
        "inspectd_last_frame_age_seconds", "Since the last part was seen, or since the start.", age_s, station=name
    )
    for word in DRIFTS:
        figures.add("inspectd_drift", "1 for how drift stands.", word == state.drift, station=name, status=word)
    for word in CHALLENGES:
        holds = word == state.challenge
        figures.add("inspectd_challenge", "1 for how the challenge test stands.", holds, station=name, status=word)
    active = {alarm.id for alarm in health.alarms.active()}
    for id_, definition in DEFINITIONS.items():
        figures.add(
            "inspectd_alarm_active",
            "1 while the alarm is active; priority 1 is the most urgent.",
            id_ in active,
            station=name,
            alarm=id_.value,
            priority=str(definition.priority),
        )


def _add_recipe(figures: _Figures, station: str, recipe: Recipe, now: datetime) -> None:
    """What the prepared recipe judges by."""
    identity, calibration = recipe.identity, recipe.calibration
    figures.add(
        "inspectd_model_info",
        "Always 1: what judges the parts now.",
        1,
        station=station,
        recipe=recipe.name,
        model=identity.model,
        model_sha256=identity.model_sha256,
        calibration=calibration.id,
        engine=recipe.detector.engine,
    )
    figures.add(
        "inspectd_calibration_age_seconds",
        "Since the prepared recipe's calibration was made.",
        (now - calibration.provenance.made_at).total_seconds(),
        station=station,
        recipe=recipe.name,
    )
    figures.add(
        "inspectd_calibration_alpha",
        "The share of good parts that the calibration promises to reject at most.",
        calibration.alpha_carried,
        station=station,
        recipe=recipe.name,
    )
