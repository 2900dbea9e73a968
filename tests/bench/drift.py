"""How often the watches are wrong, and how soon they are right: simulated, and on real pictures as the light falls.

python -m tests.bench.drift [--streams 300] [--model DIR --good DIR]

With a calibrated model and good parts that it has not seen, these pass by as before the daemon: all once as they are,
then all again, each darker by 1 % than the one before.
"""

import math
from pathlib import Path

import numpy as np
import typer
from numpy.typing import NDArray

from calibration.drift import EPOCH, FALSE_ALARM, MARTINGALE_FALSE_ALARM, Watch
from daemon.build import build_detector, load_calibration
from daemon.images import read
from daemon.judgement import judge
from daemon.messages import Outcome
from daemon.quality import StationQuality

REFERENCES = (20, 99, 500)
TESTS = ("bulk", "cusum", "martingale")
SHIFTS = (0.5, 1.0, 2.0)
PATIENCE = 3_000
FALL = 0.99


def raised(watch: Watch, values: NDArray[np.float64]) -> dict[str, int]:
    """After how many values each test first alarmed, and any of them; without those that did not."""
    first: dict[str, int] = {}
    for number, value in enumerate(values, 1):
        watch.update(value)
        reading = watch.reading
        if reading.alarm:
            for name in (*(name for name in TESTS if getattr(reading, name) == "alarm"), "any"):
                first.setdefault(name, number)
    return first


def false_alarms(streams: int, seed: int) -> None:
    """Print how many streams without drift had an alarm."""
    promise = {"bulk": 0.002, "cusum": 0.01, "martingale": MARTINGALE_FALSE_ALARM, "any": FALSE_ALARM}
    typer.echo(f"Streams of {EPOCH} exchangeable values with a false alarm, of {streams}")
    typer.echo(f"{'reference':>10}" + "".join(f"{name:>12}" for name in promise))
    for n in REFERENCES:
        rng = np.random.default_rng((seed, n))
        hits = [raised(Watch(rng.normal(size=n), index), rng.normal(size=EPOCH)) for index in range(streams)]
        counts = [sum(name in hit for hit in hits) for name in promise]
        typer.echo(f"{n:>10}" + "".join(f"{count:>12}" for count in counts))
    typer.echo(f"{'expected ≤':>10}" + "".join(f"{streams * rate:>12.1f}" for rate in promise.values()) + "\n")


def delays(streams: int, seed: int) -> None:
    """Print the median number of shifted values until an alarm."""
    typer.echo(f"Values from the shift to the alarm, median of {streams} (– in less than half within {PATIENCE})")
    typer.echo(f"{'reference':>10}{'before':>8}{'shift':>8}" + "".join(f"{name:>12}" for name in (*TESTS, "any")))
    for n in REFERENCES:
        for before in (0, 1_000):
            for shift in SHIFTS:
                rng = np.random.default_rng((seed, n, before))
                hits = []
                for index in range(streams):
                    watch = Watch(rng.normal(size=n), index)
                    for value in rng.normal(size=before):
                        watch.update(value)
                    hits.append(raised(watch, rng.normal(shift, size=PATIENCE)))
                medians = [float(np.median([hit.get(name, math.inf) for hit in hits])) for name in (*TESTS, "any")]
                row = "".join(f"{m:>12.0f}" if math.isfinite(m) else f"{'–':>12}" for m in medians)
                typer.echo(f"{n:>10}{before:>8}{f'{shift:g} σ':>8}{row}")
    typer.echo()


def falling_light(model: Path, good: Path, seed: int) -> None:
    """Print when the light alarms, and what has been rejected by then, as the light falls on parts never seen."""
    detector = build_detector(model, "cpu", threads=1)
    calibration = load_calibration(model, detector)
    quality = StationQuality(good.parent.parent.name, calibration)
    paths = np.random.default_rng(seed).permutation(sorted(good.iterdir()))
    images = [read(path) for path in paths]
    typer.echo(f"{model}: {calibration.good_parts} parts calibrate, {len(images)} pass by twice")
    typer.echo(f"expected false rejects {calibration.expected_false_rejects:.1%}")
    rejected: list[bool] = []
    said = "ok"
    for frame in range(2 * len(images)):
        light = FALL ** max(0, frame + 1 - len(images))
        seen = np.rint(images[frame % len(images)] * light).astype(np.uint8)
        decision = judge(detector.predict([seen])[0], calibration)
        quality.observe(seen, decision)
        rejected.append(decision.outcome is not Outcome.PASS)
        if frame + 1 == len(images):
            typer.echo(f"  steady light: {sum(rejected)} of {len(rejected)} rejected, drift {quality.report().drift}")
        if (drift := quality.report().drift) != said:
            said = drift
            typer.echo(
                f"  frame {frame + 1:>4}  light {light:>6.1%}  drift: {drift:<9}"
                f"rejected since the light falls {sum(rejected[len(images) :])} of {max(0, frame + 1 - len(images))}"
            )
    for light in (1, 0.9, 0.8, 0.7, 0.6, 0.5):
        scores = [detector.predict([np.rint(image * light).astype(np.uint8)])[0].anomaly_score for image in images]
        share = sum(not calibration.passes(score) for score in scores) / len(scores)
        typer.echo(f"  all at {light:>5.0%} light: {share:>6.1%} rejected")


def main(streams: int = 300, model: Path | None = None, good: Path | None = None, seed: int = 0) -> None:
    """Print all tables."""
    if streams:
        false_alarms(streams, seed)
        delays(min(streams, 50), seed)
    if model and good:
        falling_light(model, good, seed)


if __name__ == "__main__":
    typer.run(main)
