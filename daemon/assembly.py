"""Settings → stations and groups, whole and ready to run."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from threading import Event
from weakref import WeakValueDictionary

import cv2
import structlog

from calibration import golden, store
from calibration.calibration import Calibration, shortage
from config.changes import adopt, differences
from config.credentials import fingerprint
from config.load import ConfigError
from config.schema import DEFAULT_RECIPE, Settings
from config.schema import Challenge as ChallengeSettings
from config.schema import Group as GroupSettings
from config.schema import Recipe as RecipeSettings
from config.schema import Station as StationSettings
from daemon import boards, systemd
from daemon.announcements import Birth, EventKind
from daemon.archive import Archive
from daemon.build import (
    build_broker,
    build_challenge,
    build_detector,
    build_framing,
    build_rule,
    build_source,
    engine_of,
    fingerprint_of,
    overflow_of,
    place_of,
)
from daemon.contract import TOPICS, Identity, Message, Quality, StationState, encode_state
from daemon.control import Control, standing, unkept
from daemon.execution import Execution, Mode
from daemon.framing import Framing
from daemon.fusion import Fusion, Key
from daemon.groups import GroupHealth
from daemon.health import StationHealth
from daemon.link import Broker, DeliveryError, Link
from daemon.outbox import Outbox
from daemon.pipeline import Group, Station
from daemon.quality import StationQuality
from daemon.recipes import Load, Recipe, Recipes
from daemon.requests import Action
from daemon.sinks.delivery import Board
from daemon.sinks.mqtt import Commands, StationSink
from detectors.base import Detector
from detectors.devices import leave_cores
from detectors.engines.base import REFERENCE

log = structlog.get_logger()

Note = Callable[[Identity, EventKind, str, str, str], None]

TRIAL_S = 5.0
"""Seconds that the broker has to say whether it takes other credentials."""
LOADING_S = 120.0
"""Seconds that one model may take to be ready, on a slow disk and a slow machine."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What was changed by a configuration that was read anew, in lines, and what waits for a start of the daemon."""

    made: Sequence[str]
    waiting: Sequence[str]


@dataclass(frozen=True, slots=True)
class _Fresh:
    """What a station is to judge by: all of it, who speaks then, what of it is loaded anew, and what that changes."""

    loads: Mapping[str, Load]
    identities: Mapping[str, Identity]
    recipes: Mapping[str, Recipe]
    made: Sequence[str]


class Assembly:
    """All stations and groups of a configuration, with their sinks by name; nothing runs yet.

    Args:
        note: takes down that something happened at a station: who it is, kind, subject, detail and user.

    Raises:
        ConfigError, ArtifactError, CalibrationError: a person must act.
    """

    def __init__(self, settings: Settings, outbox: Outbox, archive: Archive | None, boot_id: str, note: Note) -> None:
        self._settings = settings
        self._config_sha256 = _digest(settings)
        self._version = version("inspectd")  # looked up in a file, and asked for with every verdict
        self._outbox = outbox
        self._archive = archive
        self._boot_id = boot_id
        self._note = note
        self._detectors: WeakValueDictionary[tuple[str, str, str], Detector] = WeakValueDictionary()
        self._in_use = False
        self._proven: set[tuple[str, str, str, str]] = set()
        self._watched: dict[tuple[str, str], tuple[ChallengeSettings | None, StationQuality]] = {}
        self._read_broker = build_broker(settings.mqtt)
        self._credentials = fingerprint(settings.mqtt)
        self.sinks: dict[str, StationSink] = {}
        self.stations = {station.name: self._build(station) for station in settings.stations}
        self.groups = {group.name: self._build_group(group) for group in settings.groups}
        if not any(detector.engine.startswith(REFERENCE) for detector in self._detectors.values()):
            leave_cores()
            cv2.setNumThreads(1)  # its second thread spins, too, and saves no time on what is done here
        self._in_use = True

    def broker(self) -> Broker:
        """Where to publish, and as whom, by the newest configuration. Any thread may ask.

        Raises:
            DeliveryError: a file that it takes is at fault.
        """
        return self._read_broker()

    def reload(self, wanted: Settings, stop: Event) -> Changes:
        """Let what stations judge by, and the credentials, become as they are wanted: all of it, or nothing.

        What is new is loaded, run and verified beside what judges; then one takes the other's place between two parts.
        One thread at a time, beside those that inspect.

        Raises:
            ConfigError, ArtifactError, CalibrationError: nothing has changed; a person must act, but after a `stop`.
        """
        before, running = self._settings, adopt(self._settings, wanted)
        read_broker, credentials = build_broker(running.mqtt), fingerprint(running.mqtt)
        other_credentials = before.mqtt != running.mqtt or credentials != self._credentials
        if other_credentials:
            _try(read_broker, f"inspectd.{running.node}.reload")
        watched = dict(self._watched)
        try:
            fresh = {station.name: self._renew(station, stop) for station in running.stations}
        except BaseException:
            self._watched = watched
            raise
        self._settings, made = running, differences(before, running)
        self._config_sha256 = _digest(running)
        for name, new in fresh.items():
            made += new.made
            self.stations[name].recipes.replace(new.loads, new.identities, new.recipes)
        self._read_broker = read_broker
        if credentials != self._credentials:
            made.append("mqtt: the password, a certificate or the key has another content")
        if other_credentials:
            for sink in self.sinks.values():
                sink.reconnect()
        self._credentials = credentials
        return Changes(made, differences(running, wanted))

    def _renew(self, station: StationSettings, stop: Event) -> _Fresh:
        """Load what is other than it was when it was last loaded."""
        recipes, framing = self.stations[station.name].recipes, build_framing(station.framing)
        loads = self._loads(station, framing)
        if recipes.current.name not in loads:
            raise ConfigError(
                f"station {station.name}: the recipe {recipes.current.name} is prepared and is not in the file any "
                "more; prepare another one first, or put it back"
            )
        known = {one.recipe: one for one in recipes.identities}
        identities: dict[str, Identity] = {}
        fresh: dict[str, Recipe] = {}
        made: list[str] = []
        for name, load in loads.items():
            if stop.is_set():
                raise ConfigError("the daemon stops")
            was = known.get(name)
            if was is not None and self._is_as_loaded(station, framing, was):
                identities[name] = was
                continue
            recipe = load()
            identities[name] = recipe.identity
            made += _told(station.name, was, recipe.identity)
            if recipes.loaded(name):  # others were to be tried, and need not stay in memory
                fresh[name] = recipe
        return _Fresh(loads, identities, fresh, made)

    def _is_as_loaded(self, station: StationSettings, framing: Framing, identity: Identity) -> bool:
        """Whether a recipe is what it was, by the file and by what lies in its folders."""
        index, recipe = next((n, one) for n, one in enumerate(station.recipes, 1) if one.name == identity.recipe)
        rule, model = build_rule(recipe.regions), fingerprint_of(recipe.model)
        calibration = store.load(recipe.calibration_file, model, rule.fingerprint, framing.fingerprint)
        before = next(one for one in self._settings.stations if one.name == station.name)
        was = next(one for one in before.recipes if one.name == recipe.name)
        return (recipe, index, model, calibration.id) == (
            was,
            identity.recipe_index,
            identity.model_sha256,
            identity.calibration,
        )

    def _loads(self, station: StationSettings, framing: Framing) -> dict[str, Load]:
        return {
            recipe.name: partial(self._build_recipe, station, framing, index, recipe)
            for index, recipe in enumerate(station.recipes, start=1)
        }

    def _build(self, station: StationSettings) -> Station:
        name, mqtt, outbox = station.name, self._settings.mqtt, self._outbox
        framing = build_framing(station.framing)
        recipes = Recipes(self._loads(station, framing), outbox.prepared(name), held=station.recipes_held)
        last_seq = outbox.last_seq(name)
        mode = standing(outbox, name, {"continuous": Mode.CONTINUOUS, "triggered": Mode.READY}[station.mode], recipes)
        execution = Execution(
            name,
            mode,
            last_seq,
            timeout_s=station.trigger_timeout_s,
            acknowledged=station.acknowledge,
            aborted=unkept(outbox, name),
        )
        health = StationHealth(name, last_seq, recipes, execution, outbox.counters(name), self._trouble)

        def identity() -> Identity:
            return recipes.current.identity

        def quality() -> Quality:
            return health.quality.report()

        def note(kind: EventKind, subject: str, detail: str, user: str) -> None:
            self._note(identity(), kind, subject, detail, user)

        control = Control(identity(), execution, recipes, health, outbox, note)
        quality_board = boards.quality_board(identity, quality)
        sink = self._build_sink(identity, health, partial(self._birth, name), quality_board, commands=control)
        source = build_source(station, framing, self._settings.state_dir, outbox, health.lost, self.broker, identity())
        overflow = overflow_of(station.source)
        return Station(name, source, recipes, sink, health, execution, mqtt.actuation_ttl_s, overflow)

    def _trouble(self) -> str | None:
        return None if self._archive is None else self._archive.trouble

    def _build_group(self, group: GroupSettings) -> Group:
        """What joins the verdicts of stations that are built already."""
        settings, outbox, name = self._settings, self._outbox, group.name
        mqtt, views = settings.mqtt, [self.stations[view] for view in group.views]
        fusion = Fusion(name, group.views, Key(group.by), group.within_s, outbox.last_seq(name))
        health = GroupHealth(name, outbox.last_seq(name), [view.health for view in views], outbox.counters(name))

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

        unsaid = ("quality", "image/", "cmd/", *([] if mqtt.tags else ["tag/"]))

        def birth() -> Birth:
            return replace(
                self._birth(group.views[0]),
                source_kind="group",
                source_place=", ".join(group.views),
                leaves=[leaf for leaf in TOPICS if not leaf.startswith(unsaid)],
                recipes=[DEFAULT_RECIPE],
                commands=[],
            )

        sink = self._build_sink(identity, health, birth)
        return Group(name, fusion, identity, sink, health, mqtt.actuation_ttl_s)

    def _build_sink(
        self,
        identity: Callable[[], Identity],
        health: StationHealth | GroupHealth,
        birth: Callable[[], Birth],
        *more: Board,
        commands: Commands | None = None,
    ) -> StationSink:
        """What speaks for a station or group: what is always to be seen of both, and more."""
        mqtt, outbox, name = self._settings.mqtt, self._outbox, identity().station

        def state() -> StationState:
            return health.state(outbox.depth(name))

        def halted() -> Message:
            return encode_state(identity(), replace(state(), state=Mode.HALTED.value), datetime.now(UTC))

        self.sinks[name] = sink = StationSink(
            self.broker,
            identity(),
            outbox,
            halted=halted,
            boards=[
                boards.birth_board(identity, birth),
                boards.state_board(identity, state),
                *more,
                boards.alarms_board(identity(), health.alarms.active),
                boards.stats_board(identity(), health.counters),
                *([boards.tags_board(identity(), state, lambda: health.newest)] if mqtt.tags else []),
            ],
            commands=commands,
            actuation_ttl_s=mqtt.actuation_ttl_s,
            replay_rate=mqtt.replay_rate,
        )
        return sink

    def _build_recipe(self, station: StationSettings, framing: Framing, index: int, recipe: RecipeSettings) -> Recipe:
        settings = self._settings
        log.info("loading the model", station=station.name, recipe=recipe.name, model=str(recipe.model))
        systemd.working(LOADING_S, f"loading {recipe.model} for {station.name}")
        rule = build_rule(recipe.regions)
        model = fingerprint_of(recipe.model)
        calibration = store.load(recipe.calibration_file, model, rule.fingerprint, framing.fingerprint)
        engine = engine_of(calibration, settings.engine)
        key = model, rule.fingerprint, engine
        build = partial(build_detector, recipe.model, settings.device, settings.threads, rule, engine)
        shared = self._detectors.get(key)  # stations that judge alike share one, and are judged together
        detector = shared or build()
        self._detectors[key] = detector
        known = golden.load(recipe.calibration_file, calibration)
        proof = (*key, calibration.id)
        if known is None:
            log.warning(
                "there is no golden set, so the model is not verified; `inspectd calibrate` makes one",
                station=station.name,
                recipe=recipe.name,
                calibration=calibration.id,
            )
        elif proof not in self._proven:
            free = build() if shared and self._in_use else detector  # the shared one may be judging
            known.verify([free.predict([image])[0].anomaly_score for image in known.images])
            self._proven.add(proof)
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
        quality = self._watch(station.name, index, recipe, calibration)
        self._watched[station.name, recipe.name] = recipe.challenge, quality
        return Recipe(identity, detector, calibration, quality, rule)

    def _watch(self, station: str, index: int, recipe: RecipeSettings, calibration: Calibration) -> StationQuality:
        """What watches a recipe's parts: what did so until now, if it knows the same calibration and challenge test."""
        tested, quality = self._watched.get((station, recipe.name), (None, None))
        if quality is not None and tested == recipe.challenge:
            # A failed challenge test holds the station until it passes, whatever is calibrated meanwhile.
            as_calibrated = quality.calibration.id == calibration.id
            return quality if as_calibrated else StationQuality(station, calibration, quality.challenge)
        # A station that was given recipes later goes on with the result that it has.
        name = station if index == 1 else f"{station}.{recipe.name}"
        state_dir = self._settings.state_dir
        challenge = None if recipe.challenge is None else build_challenge(recipe.challenge, name, state_dir)
        return StationQuality(station, calibration, challenge)

    def _birth(self, name: str) -> Birth:
        mqtt = self._settings.mqtt
        station = next(station for station in self._settings.stations if station.name == name)
        optional = {"tag/": mqtt.tags, "image/map": mqtt.maps, "image/source": mqtt.sources}
        off = tuple(leaf for leaf, wanted in optional.items() if not wanted)
        return Birth(
            version=self._version,
            source_kind=station.source.type,
            source_place=place_of(station.source),
            actuation_ttl_ms=int(mqtt.actuation_ttl_s * 1000),
            max_packet_bytes=mqtt.max_packet_bytes,
            config_sha256=self._config_sha256,
            leaves=[leaf for leaf in TOPICS if not leaf.startswith(off)],
            recipes=[recipe.name for recipe in station.recipes],
            commands=list(Action),
        )


def _try(read_broker: Callable[[], Broker], client_id: str) -> None:
    """Sign in once, so that no station is cut off for a password that the broker does not take.

    Raises:
        ConfigError: the broker refuses us; one that is away is no reason.
    """
    try:
        Link(read_broker(), client_id, timeout_s=TRIAL_S).close()
    except DeliveryError as error:
        if error.refused:
            raise ConfigError(f"[mqtt]: {error}") from error


def _digest(settings: Settings) -> str:
    return hashlib.sha256(settings.model_dump_json().encode()).hexdigest()


def _told(station: str, was: Identity | None, now: Identity) -> list[str]:
    """What is other about a recipe that was loaded anew, by its content."""
    place = f"station[{station}].recipe[{now.recipe}]"
    if was is None:
        return [f"{place}: new"]
    contents = {"model": (was.model_sha256, now.model_sha256), "calibration": (was.calibration, now.calibration)}
    return [f"{place}.{what}: {old[:12]} → {new[:12]}" for what, (old, new) in contents.items() if old != new]
