"""Settings → stations and groups, whole and ready to run."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import structlog

from calibration import store
from calibration.calibration import shortage
from config.schema import DEFAULT_RECIPE, Settings
from config.schema import Group as GroupSettings
from config.schema import Recipe as RecipeSettings
from config.schema import Station as StationSettings
from daemon import boards
from daemon.announcements import Birth, EventKind
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
from daemon.contract import TOPICS, Identity, Message, Quality, StationState, encode_state
from daemon.control import Control, standing, unkept
from daemon.execution import Execution, Mode
from daemon.framing import Framing
from daemon.fusion import Fusion, Key
from daemon.groups import GroupHealth
from daemon.health import StationHealth
from daemon.outbox import Outbox
from daemon.pipeline import Group, Station
from daemon.quality import StationQuality
from daemon.recipes import Recipe, Recipes
from daemon.requests import Action
from daemon.sinks.delivery import Board
from daemon.sinks.mqtt import Obey, StationSink
from detectors.base import Detector

log = structlog.get_logger()

Note = Callable[[Identity, EventKind, str, str], None]


class Assembly:
    """All stations and groups of a configuration, with their sinks by name; nothing runs yet.

    Args:
        note: takes down that something happened at a station: who it is, kind, subject and detail.

    Raises:
        ConfigError, ArtifactError, CalibrationError: a person must act.
    """

    def __init__(self, settings: Settings, outbox: Outbox, boot_id: str, note: Note) -> None:
        self._settings = settings
        self._outbox = outbox
        self._boot_id = boot_id
        self._note = note
        self._detectors: dict[tuple[Path, str], Detector] = {}
        self.broker = build_broker(settings.mqtt)
        self.sinks: dict[str, StationSink] = {}
        self.stations = {station.name: self._build(station) for station in settings.stations}
        self.groups = {group.name: self._build_group(group) for group in settings.groups}

    def _build(self, station: StationSettings) -> Station:
        name, mqtt, outbox = station.name, self._settings.mqtt, self._outbox
        framing = build_framing(station.framing)
        built = [self._build_recipe(station, framing, n, recipe) for n, recipe in enumerate(station.recipes, start=1)]
        recipes = Recipes(built, outbox.prepared(name))
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
        health = StationHealth(name, last_seq, recipes, execution)

        def identity() -> Identity:
            return recipes.current.identity

        def quality() -> Quality:
            return health.quality.report()

        def note(kind: EventKind, subject: str, detail: str) -> None:
            self._note(identity(), kind, subject, detail)

        control = Control(identity(), execution, recipes, health, outbox, note)
        quality_board = boards.quality_board(identity(), quality)
        sink = self._build_sink(identity, health, self._birth(station), quality_board, obey=control.obey)
        source = build_source(station, framing, self._settings.state_dir, outbox, health.lost, self.broker, identity())
        overflow = overflow_of(station.source)
        return Station(name, source, recipes, sink, health, execution, mqtt.actuation_ttl_s, overflow)

    def _build_group(self, group: GroupSettings) -> Group:
        """What joins the verdicts of stations that are built already."""
        settings, outbox, name = self._settings, self._outbox, group.name
        mqtt, views = settings.mqtt, [self.stations[view] for view in group.views]
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

        unsaid = ("quality", "image/", "cmd/", *([] if mqtt.tags else ["tag/"]))
        birth = replace(
            self._birth(next(station for station in settings.stations if station.name == group.views[0])),
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
        birth: Birth,
        *more: Board,
        obey: Obey | None = None,
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
            obey=obey,
            actuation_ttl_s=mqtt.actuation_ttl_s,
            replay_rate=mqtt.replay_rate,
        )
        return sink

    def _build_recipe(self, station: StationSettings, framing: Framing, index: int, recipe: RecipeSettings) -> Recipe:
        settings = self._settings
        log.info("loading the model", station=station.name, recipe=recipe.name, model=str(recipe.model))
        rule = build_rule(recipe.regions)
        key = recipe.model, rule.fingerprint
        if key not in self._detectors:  # stations that judge alike share one, and are judged together
            self._detectors[key] = build_detector(recipe.model, settings.device, settings.threads, rule)
        detector = self._detectors[key]
        calibration = store.load(recipe.calibration_file, detector.fingerprint, rule.fingerprint, framing.fingerprint)
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
