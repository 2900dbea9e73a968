"""The stages in their threads, with a small detector, a real outbox and sources that are lists."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest

from calibration.calibration import Calibration, Provenance, fit
from daemon import contract, pipeline
from daemon.challenge import Challenge, ChallengeSet
from daemon.channel import Channel, Lanes, Overflow
from daemon.contract import Identity, Message
from daemon.execution import Execution, Mode
from daemon.fusion import Fusion, Key
from daemon.groups import GroupHealth
from daemon.health import StationHealth
from daemon.messages import Capture, Frame, Outcome, Reason, Unreadable
from daemon.outbox import Entry, Outbox, OutboxError
from daemon.pipeline import Admitted, Concluded, Group, Station
from daemon.quality import StationQuality
from daemon.recipes import Recipe, Recipes
from daemon.regions import PLAIN, RegionDetector, Rule
from daemon.sources.base import ALWAYS, Demand
from daemon.stats import Counters, Window, begun
from detectors.base import Detector, DeviceLostError, Image, Prediction
from detectors.template import TemplateDetector
from tests.brokers import eventually

GOOD = np.full((8, 8, 3), 100, np.uint8)
BAD = np.full((8, 8, 3), 200, np.uint8)
STRANGE = np.full((8, 8, 3), 7, np.uint8)
LOST = np.full((8, 8, 3), 9, np.uint8)


class Moody(TemplateDetector):
    """Fails on strange images, loses its device on others, and scores NaN on none."""

    def predict(self, images: Sequence[Image]) -> list[Prediction]:
        if any((image == LOST).all() for image in images):
            raise DeviceLostError("the GPU failed")
        if any((image == STRANGE).all() for image in images):
            raise RuntimeError("out of memory")
        return super().predict(images)


class Spotter:
    """Takes an image's brightness, at half its resolution, for the anomaly map."""

    fingerprint = "f"
    engine = "numpy"

    def predict(self, images: Sequence[Image]) -> list[Prediction]:
        maps = [image[::2, ::2, 0].astype(np.float32) for image in images]
        return [Prediction(float(anomaly_map.max()), anomaly_map) for anomaly_map in maps]


class Shelf:
    """A source whose frames are given by the test; it remembers what it may let go of."""

    def __init__(self) -> None:
        self.settled: list[tuple[str, str | None]] = []

    def frames(self, stop: Event, demand: Demand = ALWAYS) -> Iterator[Frame | Unreadable | None]:  # noqa: ARG002 -- the protocol's signature
        yield from ()

    def settle(self, capture: Capture, failure: str | None) -> bool:
        self.settled.append((capture.id, failure))
        return True


class Gate:
    """The reject gate's end."""

    def __init__(self) -> None:
        self.heard: list[Message] = []

    def actuate(self, message: Message) -> None:
        self.heard.append(message)

    def notify(self) -> None:
        pass


class FullDisk(Outbox):
    """An outbox whose disk is full until `room` is set."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.room = Event()

    def keep(self, entries: Sequence[Entry], settled: Iterable[str] = (), promised: Iterable[str] = ()) -> None:
        if not self.room.is_set():
            raise OutboxError("disk full")
        super().keep(entries, settled, promised)


class Ledger(Outbox):
    """An outbox that tells which verdicts were kept together."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.commits: list[list[tuple[str, int]]] = []

    def keep(self, entries: Sequence[Entry], settled: Iterable[str] = (), promised: Iterable[str] = ()) -> None:
        super().keep(entries, settled, promised)
        self.commits.append([(entry.station, entry.seq) for entry in entries])


def capture(number: int, station: str = "cam1") -> Capture:
    now = datetime.now(UTC)
    return Capture(f"{number:026d}", station, f"part{number}", now, now, time.monotonic(), f"/in/{number}.png")


def calibrated(scores: Sequence[float], **options: Any) -> Calibration:
    return fit(scores, provenance=Provenance("f", "d", datetime.now(UTC)), **options)


FEW = calibrated([1.0, 2.0, 3.0], alpha=0.3)
BANDED = calibrated([float(score) for score in range(1, 101)], alpha=0.2, fail_alpha=0.02)
USUAL = calibrated(np.random.default_rng(1).normal(100, 10, 300).round().tolist(), alpha=0.05)


def station(
    name: str = "cam1",
    calibration: Calibration = FEW,
    detector: Detector | None = None,
    challenge: Challenge | None = None,
    rule: Rule = PLAIN,
) -> Station:
    identity = Identity("plant", "edge", name, "b001", "m", "f" * 64, calibration.id, calibration.alpha_carried)
    quality = StationQuality(name, calibration, challenge)
    recipe = Recipe(identity, detector or Moody(GOOD), calibration, quality, rule)
    recipes = Recipes({recipe.name: lambda: recipe})
    execution = Execution(name, Mode.CONTINUOUS, 0)
    health = StationHealth(name, 0, recipes, execution, Counters(begun(datetime.now(UTC))))
    return Station(name, Shelf(), recipes, Gate(), health, execution, 5.0)


def spotted(*spots: tuple[slice, slice, int]) -> Image:
    """A black image of 40 × 24 pixels with brighter spots."""
    image = np.zeros((24, 40, 3), np.uint8)
    for rows, columns, brightness in spots:
        image[rows, columns] = brightness
    return image


def written(outbox: Outbox, station: str = "cam1") -> list[dict[str, Any]]:
    """The record as subscribers will read it."""
    return [json.loads(entry.payload) for entry in outbox.entries(station, 0, 1000)]


def group_of(*views: Station, within_s: float = 30.0) -> Group:
    identity = replace(views[0].recipes.current.identity, station="part", model="", calibration="")
    fusion = Fusion("part", [view.name for view in views], Key.PART_ID, within_s)
    health = GroupHealth("part", 0, [view.health for view in views], Counters(begun(datetime.now(UTC))))
    return Group("part", fusion, lambda: identity, Gate(), health, 5.0)


class Line:
    """Inspect and record, running."""

    def __init__(self, outbox: Outbox, *stations: Station, batch: int = 4, groups: Sequence[Group] = ()) -> None:
        self.outbox = outbox
        self.stations = {s.name: s for s in stations}
        self.frames: Lanes[Admitted] = Lanes(self.stations, 100)
        self.pictures: Channel[Concluded] = Channel(100, Overflow.DROP_OLDEST)
        self.stop = Event()
        self.failures: list[BaseException] = []
        concluded: Channel[Concluded] = Channel(100, Overflow.WAIT)
        stages: list[Callable[[], None]] = [
            lambda: pipeline.inspect(self.frames, self.stations, concluded, batch, groups),
            lambda: pipeline.record(concluded, self.stations, outbox, self.pictures, self.stop, groups),
        ]
        self.threads = [Thread(target=self._guard, args=(stage,)) for stage in stages]

    def _guard(self, stage: Callable[[], None]) -> None:
        try:
            stage()
        except Exception as failure:  # noqa: BLE001 -- what the service would see
            self.failures.append(failure)

    def put(self, item: Frame | Unreadable) -> None:
        name = item.capture.station
        self.frames.put(name, Admitted(item, self.stations[name].recipes.current))

    def run(self, *items: Frame | Unreadable) -> list[Concluded]:
        """Put items before the stages start, so that they meet in batches; give what was concluded."""
        for item in items:
            self.put(item)
        self.frames.close()
        for thread in self.threads:
            thread.start()
        return self.join()

    def join(self) -> list[Concluded]:
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive()
        return [item for batch in self.pictures.batches(1) for item in batch]


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    opened = Outbox(tmp_path / "outbox.sqlite3")
    yield opened
    opened.close()


def outcomes(concluded: list[Concluded]) -> list[Outcome]:
    return [item.verdict.decision.outcome for item in concluded]


def test_a_part_that_breaks_the_detector_gets_an_error_and_its_neighbours_their_verdicts(outbox: Outbox) -> None:
    cam = station()
    images = [GOOD, STRANGE, BAD, GOOD]
    done = Line(outbox, cam).run(*(Frame(capture(n), image) for n, image in enumerate(images)))
    assert outcomes(done) == [Outcome.PASS, Outcome.ERROR, Outcome.FAIL, Outcome.PASS]
    assert "out of memory" in done[1].verdict.decision.detail
    assert [item.verdict.seq for item in done] == [1, 2, 3, 4]
    assert outbox.last_seq("cam1") == outbox.depth("cam1") == 4


def test_what_cannot_be_read_is_refused_and_its_source_told_why(outbox: Outbox) -> None:
    cam = station()
    done = Line(outbox, cam).run(Unreadable(capture(1), "the file is empty"), Frame(capture(2), GOOD))
    assert outcomes(done) == [Outcome.ERROR, Outcome.PASS]
    assert isinstance(cam.source, Shelf)
    assert cam.source.settled == [(f"{1:026d}", "the file is empty"), (f"{2:026d}", None)]


def test_a_lost_device_ends_the_stages_and_what_was_judged_before_is_kept(outbox: Outbox) -> None:
    line = Line(outbox, station(), batch=1)
    line.run(Frame(capture(1), GOOD), Frame(capture(2), LOST), Frame(capture(3), GOOD))
    assert [type(failure) for failure in line.failures] == [DeviceLostError]
    assert outbox.last_seq("cam1") == 1


def test_each_station_is_numbered_and_judged_for_itself(outbox: Outbox) -> None:
    line = Line(outbox, station("a"), station("b"))
    done = line.run(*(Frame(capture(n, "ab"[n % 2]), BAD if n % 2 else GOOD) for n in range(8)))
    for name, outcome in (("a", Outcome.PASS), ("b", Outcome.FAIL)):
        mine = [item for item in done if item.verdict.capture.station == name]
        assert [item.verdict.seq for item in mine] == [1, 2, 3, 4]
        assert set(outcomes(mine)) == {outcome}


def test_the_gate_hears_of_parts_in_time_and_not_of_old_ones(outbox: Outbox) -> None:
    cam = station()
    old = replace(capture(1), arrived_at=datetime.now(UTC) - timedelta(seconds=60))
    done = Line(outbox, cam).run(Frame(old, GOOD), Frame(capture(2), BAD))
    assert isinstance(cam.sink, Gate)
    assert len(done) == 2
    assert [b'"s":2' in message.payload for message in cam.sink.heard] == [True]
    assert "1 too late for the gate" in cam.health.summary()


def test_a_full_disk_holds_the_line_shows_in_the_state_and_loses_nothing(tmp_path: Path) -> None:
    outbox = FullDisk(tmp_path / "outbox.sqlite3")
    cam = station()
    cam.health.source_is(available=True)
    line = Line(outbox, cam)
    for n in range(3):
        line.put(Frame(capture(n), GOOD))
    for thread in line.threads:
        thread.start()
    eventually(lambda: cam.health.state(0).state == "Error", "the state Error")
    assert isinstance(cam.source, Shelf)
    assert cam.source.settled == []
    outbox.room.set()
    line.frames.close()
    assert outcomes(line.join()) == [Outcome.PASS] * 3
    assert cam.health.state(0).state == "ContinuousExecution"
    assert outbox.last_seq("cam1") == 3
    outbox.close()


def test_a_stop_while_the_disk_refuses_leaves_the_parts_to_the_next_start(tmp_path: Path) -> None:
    outbox = FullDisk(tmp_path / "outbox.sqlite3")
    cam = station()
    line = Line(outbox, cam)
    line.stop.set()
    assert line.run(Frame(capture(1), GOOD)) == []
    assert isinstance(cam.source, Shelf)
    assert cam.source.settled == []
    assert outbox.last_seq("cam1") == 0
    outbox.close()


def test_pictures_are_thinned_out_and_one_that_cannot_be_drawn_is_left_out(outbox: Outbox) -> None:
    cam = station()
    done = Line(outbox, cam).run(*(Frame(capture(n), BAD) for n in range(3)))
    broken = replace(done[0], prediction=Prediction(1.0, np.full((0, 0), 1.0, np.float32)))
    pictures: Channel[Concluded] = Channel(9, Overflow.WAIT)
    for item in (broken, done[1], done[2]):
        pictures.put(item)
    pictures.close()
    shown: list[Message] = []
    wanted = [Outcome.FAIL]
    pipeline.illustrate(pictures, {"cam1": cam}, shown.append, wanted=wanted, side=64, limit_bytes=10**6)
    assert [m.topic for m in shown] in ([], ["plant/cam1/image/overlay"])


def test_a_part_above_the_threshold_carries_its_regions_in_pixels_of_its_image(outbox: Outbox) -> None:
    cam = station(calibration=BANDED, detector=Spotter())
    spots = [
        (slice(4, 8), slice(10, 16), int(2 * BANDED.threshold)),
        (slice(20, 24), slice(36, 40), int(2.5 * BANDED.threshold)),
    ]
    done = Line(outbox, cam).run(Frame(capture(1), spotted(*spots)), Frame(capture(2), spotted()))
    assert outcomes(done) == [Outcome.FAIL, Outcome.PASS]
    failed, passed = written(outbox)
    assert failed["region_count"] == 2
    assert [tuple(region[key] for key in "xywh") for region in failed["regions"]] == [(36, 20, 4, 4), (10, 4, 6, 4)]
    assert [region["area_px"] for region in failed["regions"]] == [16.0, 24.0]
    assert failed["regions"][0]["peak"] == round(failed["score"], 3)
    assert (passed["regions"], passed["region_count"]) == ([], 0)


def test_under_a_rule_what_is_too_small_is_no_region(outbox: Outbox) -> None:
    rule = Rule(smallest_area_px=20)
    cam = station(calibration=BANDED, detector=RegionDetector(Spotter(), rule), rule=rule)
    large, small = (slice(4, 8), slice(10, 16), 200), (slice(20, 24), slice(36, 40), 250)
    done = Line(outbox, cam).run(Frame(capture(1), spotted(large, small)), Frame(capture(2), spotted(small)))
    assert outcomes(done) == [Outcome.FAIL, Outcome.PASS]
    assert [region["x"] for region in written(outbox)[0]["regions"]] == [10]


def test_an_uncertain_part_is_rejected_for_its_own_reason_and_shows_where(outbox: Outbox) -> None:
    cam = station(calibration=BANDED, detector=Spotter())
    between = int(BANDED.threshold) + 1
    done = Line(outbox, cam).run(Frame(capture(1), spotted((slice(4, 8), slice(10, 16), between))))
    assert outcomes(done) == [Outcome.UNCERTAIN]
    (told,) = written(outbox)
    assert (told["verdict_code"], told["reason"], told["reason_code"]) == (3, "uncertain_band", 110)
    assert told["reject"] is True
    assert told["threshold"] < told["score"] <= told["fail_threshold"]
    assert told["region_count"] == 1
    assert isinstance(cam.sink, Gate)
    gate = json.loads(cam.sink.heard[0].payload)
    assert (gate["c"], gate["r"]) == (3, True)


@pytest.fixture
def challenge(tmp_path: Path) -> Challenge:
    """Part 1 is good and part 2 bad; a failed test holds the station."""
    parts = ChallengeSet("box", frozenset({"part1"}), frozenset({"part2"}), timedelta(hours=8), timedelta(minutes=30))
    return Challenge(parts, "cam1", tmp_path, holds_station=True)


def frames(*parts: tuple[int, Image]) -> list[Frame]:
    return [Frame(replace(capture(n), part_id=f"part{number}"), image) for n, (number, image) in enumerate(parts)]


def test_a_failed_challenge_test_rejects_all_other_parts_until_the_set_passes(
    outbox: Outbox, challenge: Challenge
) -> None:
    cam = station(challenge=challenge)
    parts = frames((10, GOOD), (1, BAD), (11, GOOD), (12, BAD), (2, BAD), (13, GOOD), (1, GOOD), (14, GOOD))
    done = Line(outbox, cam).run(*parts)
    told = written(outbox)
    assert [(verdict["part_id"], verdict["verdict"], verdict["reason_code"]) for verdict in told] == [
        ("part10", "PASS", 0),
        ("part1", "FAIL", 100),
        ("part11", "ERROR", 501),
        ("part12", "ERROR", 501),
        ("part2", "FAIL", 100),
        ("part13", "ERROR", 501),
        ("part1", "PASS", 0),
        ("part14", "PASS", 0),
    ]
    assert [verdict["part_id"] for verdict in told if verdict["challenge"]] == ["part1", "part2", "part1"]
    rejects = [verdict["reject"] for verdict in told]
    assert rejects == [False, True, True, True, True, True, False, False]
    assert isinstance(cam.sink, Gate)
    assert [json.loads(message.payload)["r"] for message in cam.sink.heard] == rejects
    assert "part1 (good) failed" in told[2]["detail"]
    assert (told[2]["score"], told[2]["regions"]) == (-1.0, [])
    assert challenge.status(datetime.now(UTC)).status == "ok"
    assert pipeline.picture_of(done[2], 64).any()


def test_while_the_station_is_held_its_state_is_an_error_and_a_damaged_file_is_still_known_as_one(
    outbox: Outbox, challenge: Challenge
) -> None:
    cam = station(challenge=challenge)
    cam.health.source_is(available=True)
    damaged = Unreadable(capture(10), "the file is empty")
    done = Line(outbox, cam).run(Frame(capture(2), GOOD), damaged, Frame(capture(11), GOOD))
    reasons = [item.verdict.decision.reason for item in done]
    assert reasons == [Reason.NONE, Reason.DECODE_FAILED, Reason.CHALLENGE_FAILED]
    assert isinstance(cam.source, Shelf)
    assert [failure for _, failure in cam.source.settled] == [None, "the file is empty", None]
    state = cam.health.state(0)
    assert (state.state, state.challenge) == ("Error", "failed")


def test_parts_of_the_challenge_test_and_held_parts_move_no_watch(outbox: Outbox, challenge: Challenge) -> None:
    cam = station(challenge=challenge)
    parts = frames((1, GOOD), (2, BAD), (10, GOOD), (11, GOOD), (12, BAD), (2, GOOD), (13, GOOD))
    done = Line(outbox, cam).run(*parts)
    assert outcomes(done).count(Outcome.PASS) == 4
    assert cam.health.quality.report().watches["score"].parts == 2


def test_scores_that_drift_below_the_threshold_alarm_and_the_alarm_is_told(outbox: Outbox) -> None:
    cam = station(calibration=USUAL, detector=Spotter())
    scores = np.random.default_rng(2).normal(111, 2, 80).astype(int).tolist()
    parts = frames(*((n, spotted((slice(4, 8), slice(10, 16), score))) for n, score in enumerate(scores)))
    assert set(outcomes(Line(outbox, cam).run(*parts))) == {Outcome.PASS}
    told = json.loads(
        contract.encode_quality(cam.recipes.current.identity, cam.health.quality.report(), datetime.now(UTC)).payload
    )
    assert told["drift"]["status"] == cam.health.state(0).drift == "product"
    watch = told["drift"]["score"]
    assert (watch["status"], watch["direction"], watch["parts"]) == ("alarm", "up", 80)
    assert told["drift"]["brightness"]["status"] == "off"
    assert {verdict["threshold_raw"] for verdict in written(outbox)} == {round(USUAL.threshold, 6)}


def test_the_views_of_a_part_become_one_verdict_that_goes_by_the_worst_and_its_gate_hears_it(outbox: Outbox) -> None:
    top, side = station("top"), station("side", detector=Spotter(), calibration=BANDED)
    group = group_of(top, side)
    spot = spotted((slice(4, 8), slice(10, 16), int(2 * BANDED.threshold)))
    parts = [(1, "top", GOOD), (2, "top", GOOD), (1, "side", spotted()), (2, "side", spot)]
    views = [Frame(replace(capture(n, name), id=f"{place:026d}"), im) for place, (n, name, im) in enumerate(parts)]
    done = Line(outbox, top, side, groups=[group]).run(*views)
    assert len(done) == 4
    told = {verdict["part_id"]: verdict for verdict in written(outbox, "part")}
    assert [(one["verdict"], one["reject"]) for one in (told["part1"], told["part2"])] == [
        ("PASS", False),
        ("FAIL", True),
    ]
    assert sorted(one["seq"] for one in told.values()) == [1, 2]
    assert [(one["station"], one["verdict_code"]) for one in told["part2"]["views"]] == [("top", 1), ("side", 2)]
    recorded = {one["id"]: one for name in ("top", "side") for one in written(outbox, name)}
    for seen in told["part2"]["views"]:
        own = recorded[seen["id"]]
        assert {key: own[key] for key in seen} == seen
        assert (own["views"], own["part_id"]) == ([], "part2")
    worst = next(one for one in written(outbox, "side") if one["part_id"] == "part2")
    assert {told["part2"][key] == worst[key] for key in ("score", "threshold_raw", "p_value", "calibration")} == {True}
    assert told["part2"]["station"] == "part"
    assert isinstance(group.sink, Gate)
    gate = [json.loads(message.payload) for message in group.sink.heard]
    assert {message.topic for message in group.sink.heard} == {"plant/part/plc"}
    assert {(one["p"], one["r"]) for one in gate} == {("part1", False), ("part2", True)}
    assert [one["s"] for one in gate] == [1, 2]
    assert not outbox.concluded(told["part1"]["id"])
    counted = outbox.counters("part").snapshot(datetime.now(UTC), Window.TOTAL)
    assert (counted.inspected, counted.outcomes[Outcome.PASS], counted.outcomes[Outcome.FAIL]) == (2, 1, 1)
    assert counted.pending == 0


def test_the_gate_hears_of_a_missing_view_at_the_deadline_though_nothing_comes_and_a_late_view_changes_nothing(
    outbox: Outbox,
) -> None:
    top, side = station("top"), station("side")
    group = group_of(top, side, within_s=0.05)
    line = Line(outbox, top, side, groups=[group])
    line.put(Frame(capture(1, "top"), GOOD))
    for thread in line.threads:
        thread.start()
    assert isinstance(group.sink, Gate)
    heard = group.sink.heard
    eventually(lambda: heard, "the verdict of the part")
    line.put(Frame(replace(capture(1, "side"), id="1" * 26), GOOD))
    line.frames.close()
    line.join()
    (told,) = written(outbox, "part")
    assert (told["reason"], told["reason_code"], told["reject"]) == ("view_missing", 307, True)
    assert told["detail"] == "no verdict of side within 0.05 s"
    assert [one["station"] for one in told["views"]] == ["top"]
    assert len(heard) == len(written(outbox, "side")) == 1
    (raised,) = group.health.update(0)
    assert (raised.alarm.id.value, raised.alarm.detail) == ("VIEW_MISSING", told["detail"])
    assert "late views: 1" in group.health.summary()


def test_a_group_is_as_ready_as_the_least_ready_of_its_views_and_at_the_end_gives_up_what_waits(
    outbox: Outbox,
) -> None:
    top, side = station("top"), station("side")
    group = group_of(top, side)
    top.health.source_is(available=True)
    assert group.health.state(0).state == "Preoperational"
    side.health.source_is(available=True)
    assert (group.health.state(0).state, group.health.state(0).ready) == ("ContinuousExecution", True)
    side.execution.become(Mode.HALTED)
    assert (group.health.state(0).state, group.health.state(0).ready) == ("Halted", False)
    side.health.source_is(available=False)
    assert (group.health.state(0).state, group.health.state(0).camera) == ("Error", "offline")
    unnamed = replace(capture(2, "top"), part_id="")
    Line(outbox, top, side, groups=[group]).run(Frame(capture(1, "top"), GOOD), Frame(unnamed, GOOD))
    (told,) = written(outbox, "part")
    assert (told["reason_code"], told["result_state"], told["seq"]) == (305, 3, 1)
    assert "views without an id: 1" in group.health.summary()


def test_the_verdict_of_a_part_is_kept_together_with_that_of_its_last_view(tmp_path: Path) -> None:
    outbox = Ledger(tmp_path / "outbox.sqlite3")
    top, side = station("top"), station("side")
    line = Line(outbox, top, side, batch=1, groups=[group_of(top, side)])
    for thread in line.threads:
        thread.start()
    for n in range(1, 6):
        for name in ("top", "side"):
            line.put(Frame(replace(capture(n, name), id=f"{n}{name:0>25}"), GOOD))
    line.frames.close()
    line.join()
    parts = [
        (commit, commit.index(("part", n))) for n in range(1, 6) for commit in outbox.commits if ("part", n) in commit
    ]
    assert len(parts) == 5
    for number, (commit, place) in enumerate(parts, start=1):
        assert commit[place - 1] in {("top", number), ("side", number)}
    outbox.close()
