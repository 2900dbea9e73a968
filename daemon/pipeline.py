"""The stages between source and outbox: plain functions, one per thread, ended by the closing of their input.

acquire ─Admitted→ inspect ─Concluded→ record ─→ outbox, source, pictures
                     └─ actuation, at once

The inspecting thread also joins the views of one part, and so numbers the verdicts of groups.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from threading import Event
from typing import Protocol

import structlog

from config.schema import MOST_VIEWS
from daemon import contract, judgement, overlay
from daemon.archive import Archive, Exhibit
from daemon.channel import Channel, ClosedError, Lanes, Overflow
from daemon.contract import Identity, Message, Picture
from daemon.execution import Execution
from daemon.fusion import WAITING, Fused, Fusion
from daemon.groups import GroupHealth
from daemon.health import StationHealth
from daemon.messages import Decision, Frame, Latency, Outcome, Reason, Unreadable, Verdict
from daemon.outbox import Entry, Outbox, OutboxError
from daemon.pulse import Beat, unwatched
from daemon.recipes import Recipe, Recipes
from daemon.regions import Region, Rule, regions, shown
from daemon.sources.base import TICK_S, Source, SourceUnavailableError
from daemon.stats import Drop, counted
from detectors.base import DeviceLostError, Image, Prediction

RETRY_S = (0.5, 10.0)
"""Seconds of the first and the longest pause before the disk is tried again."""
REOPEN_S = 1.0
"""Seconds from one attempt to open a source to the next."""
PICTURE_INTERVAL_S = 0.5
ARCHIVED_SIDE = 512
"""Pixels of the longer side of an archived overlay."""
FRAMES = 4
"""Images of each station that may wait for the detectors."""

log = structlog.get_logger()


class Sink(Protocol):
    """What the stages need of a station's MQTT session."""

    def actuate(self, message: Message) -> None:
        """Tell the reject gate, now or never."""

    def notify(self) -> None:
        """The outbox has something new."""


@dataclass(frozen=True, slots=True)
class Station:
    """All that one station consists of while it runs.

    `overflow` is what becomes of parts that nobody triggered and that come faster than they are judged: with EXCEED
    their pixels are let go of, and they are rejected.
    """

    name: str
    source: Source
    recipes: Recipes
    sink: Sink
    health: StationHealth
    execution: Execution
    actuation_ttl_s: float
    overflow: Overflow = Overflow.WAIT


@dataclass(frozen=True, slots=True)
class Group:
    """Stations that see one part from several sides. `identity` is the group's own."""

    name: str
    fusion: Fusion
    identity: Callable[[], Identity]
    sink: Sink
    health: GroupHealth
    actuation_ttl_s: float


@dataclass(frozen=True, slots=True)
class Admitted:
    """A part on its way to the detector, and what judges it: the recipe that was prepared when it came."""

    item: Frame | Unreadable
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class Concluded:
    """A verdict on its way into the record, by what recipe, and with what a picture of it needs.

    A group's goes by its worst view, without a picture. `parts` are the verdicts of groups that this view has brought
    about: one commit keeps them together, so that no part is seen whole and has no verdict.
    """

    verdict: Verdict
    recipe: Recipe
    image: Image | None = None
    prediction: Prediction | None = None
    parts: tuple["Concluded", ...] = ()


def lanes(stations: Iterable[str]) -> Lanes[Admitted]:
    """What brings frames from the stations to the detectors, a few of each; triggered ones are never dropped."""
    return Lanes(stations, FRAMES, keeps=lambda part: part.item.capture.trigger is not None)


def acquire(station: Station, frames: Lanes[Admitted], stop: Event, beat: Beat = unwatched) -> None:
    """Bring frames in until `stop`; an absent source is waited for, said once, and shown in the state."""
    complaint = ""
    while not stop.is_set():
        beat()
        try:
            try:
                for item in station.source.frames(stop, station.execution):
                    beat()
                    station.health.source_is(available=True)
                    complaint = complaint if item is None else ""
                    _admit(item, station, frames, beat)
            except SourceUnavailableError as error:
                station.health.source_is(available=False)
                station.sink.notify()
                if str(error) != complaint:
                    log.warning("source unavailable; waiting for it", station=station.name, reason=str(error))
                complaint = str(error)
                again_at = time.monotonic() + REOPEN_S
                while not stop.wait(TICK_S) and time.monotonic() < again_at:
                    _admit(None, station, frames, beat)  # triggers are answered all the same
        except ClosedError:
            return


def _admit(item: Frame | Unreadable | None, station: Station, frames: Lanes[Admitted], beat: Beat) -> None:
    recipe = station.recipes.current
    for part in station.execution.admit(item):
        seen = isinstance(part, Frame) or part.cause in {Reason.DECODE_FAILED, Reason.INCOMPLETE_FRAME}
        station.health.frame_arrived(seen=seen, challenge=recipe.quality.is_challenge(part.capture.part_id))
        overflow = Overflow.WAIT if part.capture.trigger else station.overflow
        going_on = part
        if overflow is Overflow.EXCEED and frames.full(station.name):
            going_on = Unreadable(part.capture, "parts come faster than they are judged", Reason.QUEUE_OVERRUN)
        _put(Admitted(going_on, recipe), station, frames, overflow, beat)


def _put(part: Admitted, station: Station, frames: Lanes[Admitted], overflow: Overflow, beat: Beat) -> None:
    """Hand over a part; an older one gives way to it only as long as no promised number counts that one."""
    if overflow is Overflow.DROP_OLDEST:
        with station.execution.losing() as may:
            if may:  # then the lane holds nothing that must be kept, and this does not wait
                if frames.put(station.name, part, overflow, beat) is not None:
                    station.execution.lose()
                    station.health.dropped(Drop.QUEUE)
                return
        overflow = Overflow.WAIT
    frames.put(station.name, part, overflow, beat)


def inspect(
    frames: Lanes[Admitted],
    stations: Mapping[str, Station],
    concluded: Channel[Concluded],
    batch: int,
    groups: Sequence[Group] = (),
    beat: Beat = unwatched,
) -> None:
    """Judge what arrives and tell the reject gate at once. Owns the detectors; closes `concluded` at the end.

    The gate hears nothing of a part that came longer ago than its message may live, after a standstill say: by now
    another part stands there. Silence is a reject; the record has the verdict all the same.

    A group's gate hears as soon as the last view is judged, or the deadline passes, whether or not parts come. Parts
    that wait for views at the end are given up.
    """
    joins = _Joins(groups, stations)
    try:
        for parts in frames.batches(batch, joins.patience_s, beat):
            for together in _together(parts):
                for part, predicted in zip(together, _predict(together), strict=True):
                    station = stations[part.item.capture.station]
                    concluded.put(_conclude(part, predicted, station, joins), beat)
            for joined in joins.expire():
                concluded.put(joined, beat)
        for joined in joins.end():
            concluded.put(joined, beat)
    except ClosedError:  # the recording stage has ended, and says why itself
        return
    finally:
        frames.close()
        concluded.close()


def record(
    concluded: Channel[Concluded],
    stations: Mapping[str, Station],
    outbox: Outbox,
    pictures: Channel[Concluded],
    stop: Event,
    groups: Sequence[Group] = (),
    beat: Beat = unwatched,
    count: Callable[[Verdict, str, datetime], None] | None = None,
    archive: Archive | None = None,
) -> None:
    """Make verdicts durable, several in a commit, then let go of their frames. Closes `pictures` at the end.

    Images go into the `archive` first, so that a verdict names none that is not there.
    `count` is told of each verdict, by what recipe, and when it became durable.

    While the disk refuses, the stage waits and so holds the line's back-pressure; nothing is let go of.
    """
    settled: list[str] = []
    healths = [station.health for station in stations.values()]
    of = {group.name: group for group in groups}
    try:
        for several in concluded.batches(32, beat):
            batch = [one for item in several for one in (item, *item.parts)]
            if archive is not None:
                batch = _archived(archive, batch, beat)
            entries = [_entry(item) for item in batch]
            # Of a group no source lets go.
            settled += [item.verdict.capture.id for item in batch if item.verdict.capture.station in of]
            promised = [item.verdict.capture.trigger.id for item in batch if item.verdict.capture.trigger]
            if not _keep(partial(outbox.keep, entries, settled, promised), healths, stop, beat):
                return
            settled, kept_at = [], datetime.now(UTC)
            for item in batch:
                beat()
                capture, decision = item.verdict.capture, item.verdict.decision
                if count is not None:
                    count(item.verdict, item.recipe.name, kept_at)
                if group := of.get(capture.station):
                    group.health.concluded(item.verdict)
                    group.sink.notify()
                    _tell(item.verdict)
                    continue
                station = stations[capture.station]
                station.health.concluded(item.verdict)
                station.sink.notify()
                unreadable = decision.reason is Reason.DECODE_FAILED
                if station.source.settle(capture, decision.detail if unreadable else None):
                    settled.append(capture.id)
                _tell(item.verdict)
                pictures.put(item)
                if item.image is not None and decision.score is not None and not item.verdict.challenge:
                    item.recipe.quality.observe(item.image, decision)
    finally:
        concluded.close()
        pictures.close()


def illustrate(
    pictures: Channel[Concluded],
    stations: Mapping[str, Station],
    show: Callable[[Message], None],
    *,
    wanted: Sequence[Outcome],
    side: int,
    limit_bytes: int,
    more: Sequence[Picture] = (),
    beat: Beat = unwatched,
) -> None:
    """Render pictures off the inspecting thread, at most two parts a second and station; late ones are dropped."""
    shown: dict[str, float] = dict.fromkeys(stations, 0.0)
    for (item,) in pictures.batches(1, beat):
        name = item.verdict.capture.station
        now = time.monotonic()
        if item.verdict.decision.outcome not in wanted or now - shown[name] < PICTURE_INTERVAL_S:
            continue
        shown[name] = now
        try:
            messages = _pictures(item, [Picture.OVERLAY, *more], side, limit_bytes)
        except Exception as error:  # noqa: BLE001 -- no picture is worth a verdict
            capture = item.verdict.capture
            log.warning(
                "a picture could not be drawn", station=name, part=capture.part_id, id=capture.id, reason=str(error)
            )
            continue
        for message in messages:
            show(message)


def _pictures(item: Concluded, kinds: Sequence[Picture], side: int, limit_bytes: int) -> list[Message]:
    """Those of the pictures that there are and that fit into a packet."""
    messages = []
    for kind in kinds:
        comment = contract.encode_picture_comment(item.verdict, kind)
        encoded = None
        if kind is Picture.OVERLAY:
            encoded = overlay.fit_jpeg(picture_of(item, side), comment, limit_bytes)
        elif kind is Picture.MAP and item.prediction is not None:
            threshold = item.verdict.decision.threshold
            encoded = overlay.fit_map(item.prediction.anomaly_map, threshold, comment, limit_bytes)
        elif kind is Picture.SOURCE and item.image is not None:
            encoded = overlay.fit_jpeg(item.image, comment, limit_bytes)
        if encoded is not None:
            messages.append(contract.picture(item.recipe.identity, kind, encoded))
    return messages


def picture_of(item: Concluded, side: int) -> Image:
    """The overlay of one verdict; where a recipe does not look, nothing is outlined."""
    decision, capture, rule = item.verdict.decision, item.verdict.capture, item.recipe.rule
    title = f"{capture.station} · {capture.part_id}"
    caption = overlay.Caption(decision.outcome, title, judgement.explain(decision))
    if item.prediction is None:
        return overlay.render(item.image, None, decision.threshold, caption, side)
    return overlay.render(item.image, shown(item.prediction), decision.threshold, caption, side, kept=rule.kept)


def _is_timely(verdict: Verdict, ttl_s: float) -> bool:
    return (verdict.decided_at - verdict.capture.arrived_at).total_seconds() <= ttl_s


def _regions(
    item: Frame | Unreadable, decision: Decision, prediction: Prediction | None, rule: Rule
) -> tuple[Region, ...]:
    """Where a measured part that does not pass is above the threshold."""
    if prediction is None or not isinstance(item, Frame) or decision.outcome not in {Outcome.FAIL, Outcome.UNCERTAIN}:
        return ()
    return tuple(regions(prediction.anomaly_map, decision.threshold, item.image.shape, rule))


def _together(parts: Sequence[Admitted]) -> list[list[Admitted]]:
    """What one detector can judge at once, whatever the stations; parts of one station stay in their order."""
    groups: list[list[Admitted]] = []
    first: dict[str, int] = {}  # the earliest group that a station's next part may join
    for part in parts:
        name, detector = part.item.capture.station, part.recipe.detector
        candidates = range(first.get(name, 0), len(groups))
        place = next((place for place in candidates if groups[place][0].recipe.detector is detector), len(groups))
        if place == len(groups):
            groups.append([])
        groups[place].append(part)
        first[name] = place
    return groups


@dataclass(frozen=True, slots=True)
class _Predicted:
    """What a detector made of one item; with neither a prediction nor a failure there was no image."""

    prediction: Prediction | None
    failure: str
    taken_at: float
    inferred_ms: float


def _predict(parts: Sequence[Admitted]) -> list[_Predicted]:
    """Predict some frames of one detector together; where that fails, one by one."""
    taken_at = time.monotonic()
    detector, items = parts[0].recipe.detector, [part.item for part in parts]
    images = [item.image for item in items if isinstance(item, Frame)]
    failure = ""
    predictions: list[Prediction] = []
    try:
        predictions = detector.predict(images)
    except DeviceLostError:
        raise  # nothing can be judged any more: the process must start afresh
    except Exception as error:  # noqa: BLE001 -- a part that was seen gets a verdict, whatever is wrong with it
        if len(parts) > 1:
            return [predicted for part in parts for predicted in _predict([part])]
        failure = f"{type(error).__name__}: {error}"[:200]
        capture = items[0].capture
        log.warning("the detector failed", station=capture.station, part=capture.part_id, id=capture.id, reason=failure)
    inferred_ms = (time.monotonic() - taken_at) * 1000 / max(1, len(images))
    upcoming = iter(predictions)
    return [
        _Predicted(next(upcoming, None) if isinstance(item, Frame) else None, failure, taken_at, inferred_ms)
        for item in items
    ]


class _Joins:
    """The groups of all stations, in the inspecting thread."""

    def __init__(self, groups: Sequence[Group], stations: Mapping[str, Station]) -> None:
        self._groups = groups
        self._stations = stations
        self._of = {view: group for group in groups for view in group.fusion.views}
        self._judged_by: OrderedDict[str, Identity] = OrderedDict()

    def patience_s(self) -> float | None:
        """Seconds to the next deadline of a part; None where none waits."""
        now = time.monotonic()
        waits = [wait for group in self._groups if (wait := group.fusion.patience_s(now)) is not None]
        return min(waits, default=None)

    def join(self, view: Verdict, identity: Identity) -> tuple[Concluded, ...]:
        """The parts that have their verdicts by this view, of a station that is this identity's."""
        group = self._of.get(view.capture.station)
        if group is None:
            return ()
        self._judged_by[view.capture.id] = identity
        if len(self._judged_by) > MOST_VIEWS * WAITING * len(self._groups):
            self._judged_by.popitem(last=False)
        fate, fused = group.fusion.join(view, time.monotonic(), datetime.now(UTC))
        parts = tuple(self._conclude(group, part) for part in fused)
        group.health.view_came(view, fate, group.fusion.by)
        return parts

    def expire(self) -> list[Concluded]:
        """The parts whose deadline has passed."""
        now, at = time.monotonic(), datetime.now(UTC)
        return [self._conclude(group, part) for group in self._groups for part in group.fusion.expire(now, at)]

    def end(self) -> list[Concluded]:
        """All parts that wait."""
        now, at = time.monotonic(), datetime.now(UTC)
        return [self._conclude(group, part) for group in self._groups for part in group.fusion.end(now, at)]

    def _conclude(self, group: Group, fused: Fused) -> Concluded:
        """Tell the group's gate at once."""
        verdict, worst = fused.verdict, fused.worst.capture
        own = group.identity()
        if _is_timely(verdict, group.actuation_ttl_s):
            group.sink.actuate(contract.encode_actuation(own, verdict, group.actuation_ttl_s))
        else:
            group.health.came_too_late()
        recipe = self._stations[worst.station].recipes.current
        judged_by = self._judged_by.get(worst.id, recipe.identity)
        identity = replace(judged_by, station=group.name, fpr_target=own.fpr_target)
        return Concluded(verdict, replace(recipe, identity=identity))


def _conclude(part: Admitted, predicted: _Predicted, station: Station, joins: _Joins) -> Concluded:
    """Decide, number, and tell the reject gates at once."""
    item, recipe, prediction = part.item, part.recipe, predicted.prediction
    capture = item.capture
    if isinstance(item, Unreadable):
        judged = judgement.refuse(item.cause, item.reason, recipe.calibration)
    elif prediction is None:
        judged = judgement.refuse(Reason.MODEL_ERROR, predicted.failure, recipe.calibration)
    else:
        judged = judgement.judge(prediction, recipe.calibration)
    decision = recipe.quality.confirm(capture.part_id, judged)
    decided_at = datetime.now(UTC)
    latency = Latency(
        queue=(predicted.taken_at - capture.seen_at) * 1000,
        infer=predicted.inferred_ms,
        total=(decided_at - capture.captured_at).total_seconds() * 1000,
    )
    challenge = recipe.quality.is_challenge(capture.part_id)
    verdict = Verdict(station.execution.number(item), capture, decision, decided_at, latency, challenge=challenge)
    if _is_timely(verdict, station.actuation_ttl_s):
        station.sink.actuate(contract.encode_actuation(recipe.identity, verdict, station.actuation_ttl_s))
    else:
        station.health.came_too_late()
    parts = joins.join(verdict, recipe.identity)
    # The gates know; what takes longer comes after.
    recipe.quality.conclude(capture.part_id, decision)
    measured = None if judged.score is None else prediction
    verdict = replace(verdict, regions=_regions(item, decision, measured, recipe.rule))
    return Concluded(verdict, recipe, item.image if isinstance(item, Frame) else None, measured, parts)


def _archived(archive: Archive, batch: Sequence[Concluded], beat: Beat) -> list[Concluded]:
    """Keep the images that are wanted; the verdicts say from here on where."""
    refs = archive.keep([_exhibit(item) for item in batch], beat)
    return [
        replace(item, verdict=replace(item.verdict, image_ref=ref)) if ref else item
        for item, ref in zip(batch, refs, strict=True)
    ]


def _exhibit(item: Concluded) -> Exhibit:
    framing = item.recipe.calibration.provenance.framing
    return Exhibit(item.verdict, item.recipe.identity, item.image, partial(picture_of, item, ARCHIVED_SIDE), framing)


def _entry(item: Concluded) -> Entry:
    verdict = item.verdict
    payload = contract.encode_verdict(item.recipe.identity, verdict)
    capture = verdict.capture
    return Entry(
        capture.station, verdict.seq, capture.id, payload, verdict.decision.outcome, capture.reply, counted(verdict)
    )


def _keep(keep: Callable[[], None], healths: Sequence[StationHealth], stop: Event, beat: Beat) -> bool:
    """Keep verdicts however long the disk takes; False if asked to stop while it still refuses."""
    retry_s = RETRY_S[0]
    while True:
        beat()
        try:
            keep()
        except OutboxError as error:
            log.warning("the record cannot be written; the line is held until it can", reason=str(error))
            for health in healths:
                health.record_is(writable=False)
            if stop.wait(retry_s):
                return False
            retry_s = min(RETRY_S[1], 2 * retry_s)
        else:
            for health in healths:
                health.record_is(writable=True)
            return True


def _tell(verdict: Verdict) -> None:
    decision, capture = verdict.decision, verdict.capture
    log.info(
        "verdict",
        station=capture.station,
        part=capture.part_id,
        id=capture.id,
        seq=verdict.seq,
        verdict=decision.outcome.name,
        score=None if decision.ratio is None else round(decision.ratio, 3),
        **({"reason": decision.detail} if decision.detail else {}),
    )
