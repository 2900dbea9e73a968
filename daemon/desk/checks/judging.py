"""What judges the parts: framing, regions, models, calibrations, and how stations are joined."""

import statistics
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from calibration import golden, store
from calibration.calibration import Calibration, CalibrationError, promise, shortage
from config.load import ConfigError
from config.schema import Recipe, Settings, Station
from daemon.build import build_detector, build_framing, build_rule, engine_of, fingerprint_of
from daemon.desk.checks.finding import Finding, fail, ok, warn
from daemon.regions import Rule
from detectors.base import ArtifactError, Detector

OLD_DAYS = 365
"""Light, lens and supplier change; a calibration of last year is worth a look."""

_IMAGES = 5
_ENOUGH_S = 3.0
_SIDE = 1024


def groups(settings: Settings) -> Iterator[Finding]:
    """Which stations see one part together."""
    for group in settings.groups:
        seen = f"views {', '.join(group.views)} of one {group.by} within {group.within_s:g} s"
        yield ok(f"group {group.name}", seen)


def stations(settings: Settings) -> Iterator[Finding]:
    """Load all that judges, run it, and say what it promises."""
    loaded: dict[tuple[Path, str, str], Detector] = {}
    for station in settings.stations:
        subject = f"station {station.name}"
        try:
            framing: str | None = build_framing(station.framing).fingerprint
        except ConfigError as error:
            yield fail(subject, error)
            framing = None
        for recipe in station.recipes:
            said = f"recipe {recipe.name}: " if station.own_recipes else ""
            try:
                for finding in _recipe(subject, settings, station, recipe, framing, loaded):
                    yield Finding(finding.mark, subject, said + finding.found, finding.cure)
            except (ArtifactError, CalibrationError, ConfigError) as error:
                yield fail(subject, f"{said}{error}")


def _recipe(
    subject: str,
    settings: Settings,
    station: Station,
    recipe: Recipe,
    framing: str | None,
    loaded: dict[tuple[Path, str, str], Detector],
) -> Iterator[Finding]:
    rule = build_rule(recipe.regions)
    if not rule.is_plain:
        yield _mask(subject, station, rule)
    calibration = store.load(recipe.calibration_file, fingerprint_of(recipe.model), rule.fingerprint, framing)
    engine = engine_of(calibration, settings.engine)
    key = recipe.model, rule.fingerprint, engine
    if key not in loaded:  # stations that judge alike share one
        loaded[key] = build_detector(recipe.model, settings.device, settings.threads, rule, engine)
    detector = loaded[key]
    yield ok(subject, f"model {recipe.model}: {_pace(detector, rule)}")
    yield from _calibration(subject, calibration)
    if (proof := golden.load(recipe.calibration_file, calibration)) is None:
        yield ok(subject, "no golden set: it is not verified that the model scores as it did when it was calibrated")
    else:
        worst = proof.verify([detector.predict([image])[0].anomaly_score for image in proof.images])
        yield ok(subject, f"golden set of {len(proof.images)} images: scores differ by {worst:.2%} at the most")
    if (made := calibration.provenance.engine) != detector.engine:
        yield warn(
            subject,
            f"calibrated with {made}, inspects with {detector.engine}; scores may differ in their last digits",
            "calibrate on the machine that inspects",
        )


def _mask(subject: str, station: Station, rule: Rule) -> Finding:
    """What the region rules ask for, and whether the mask can fit the images."""
    asked = f"regions: {rule.count} defect(s) of {rule.smallest_area_px:g} px or more reject a part"
    if rule.kept is None:
        return ok(subject, asked)
    height, width = rule.kept.shape
    found = f"{asked}; {rule.kept.mean():.0%} of {width} × {height} px is inspected"
    if station.framing.crop is not None:
        across, down = station.framing.crop[2:]
        if station.framing.rotate in {90, 270}:
            across, down = down, across
        if (across, down) != (width, height):
            cure = f"make the masks {across} × {down} px large, as the images are after crop and rotate"
            return fail(subject, f"the mask is {width} × {height} px, the framed images are {across} × {down} px", cure)
    return ok(subject, found)


def _pace(detector: Detector, rule: Rule) -> str:
    height, width = (_SIDE, _SIDE) if rule.kept is None else rule.kept.shape
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    took: list[float] = []
    while len(took) < _IMAGES and sum(took) < _ENOUGH_S:
        began = time.monotonic()
        detector.predict([image])
        took.append(time.monotonic() - began)
    median = 1000 * statistics.median(took)
    return f"{median:.0f} ms an image of {width} × {height} px (median of {len(took)}, {detector.engine})"


def _calibration(subject: str, calibration: Calibration) -> Iterator[Finding]:
    days = (datetime.now(UTC) - calibration.provenance.made_at).days
    name = f"calibration {calibration.id}"
    if days < 0:
        cure = "set the clock; verdicts carry its time"
        yield warn(subject, f"{name} was made {-days} day(s) from now, by this machine's clock", cure)
    elif days > OLD_DAYS:
        cure = "look at its card and at drift; calibrate again with good parts of today"
        yield warn(subject, f"{name} is {days} days old", cure)
    yield ok(subject, f"{name} of {calibration.good_parts} good parts, {days} day(s) old: {promise(calibration)}")
    if missing := shortage(calibration):
        yield warn(subject, missing, "add good parts: inspectd calibrate --add")
