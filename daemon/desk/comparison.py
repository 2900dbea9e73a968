"""Which detector for which parts: trains and evaluates each on each category as a user would, and keeps the figures.

Every run is two processes of the installed program, so that time and memory are what a user's would be and one
failure does not end the rest. In the folder of a comparison:

models/CATEGORY/LABEL/seedN/            the model folder
runs/CATEGORY/LABEL/seedN.json          the figures of `inspectd evaluate`, and what they are figures of
runs/CATEGORY/LABEL/seedN.training.json seconds of training so far
logs/CATEGORY/LABEL/seedN.log           what both processes said
links/CATEGORY/good, calibration        links to images that do not lie in one folder of their own
"""

import contextlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from daemon import judgement, overlay
from daemon.desk import dataset
from daemon.desk.dataset import Category, DatasetError, Labelled
from daemon.messages import Outcome
from detectors.base import Image

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_SIDE = 384
_MASK, _MASK_EDGE = (86, 180, 233), (14, 14, 18)
_PATIENCE_S = 30


class _RunError(Exception):
    """One of the two processes failed; the message is its last word."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the table: a detector with the options it is trained with, under a label.

    In an option {out}, {category} and {seed} stand for those of the run.
    """

    label: str
    detector: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """One training and its evaluation. `held` None lets `inspectd train` hold out parts of `good` itself."""

    category: str
    data: Path
    data_sha256: str
    good: Path
    held: Path | None
    entry: Entry
    seed: int
    device: str
    out: Path

    @property
    def name(self) -> str:
        """Category, label and seed, also as a path."""
        return f"{self.category}/{self.entry.label}/seed{self.seed}"

    @property
    def model(self) -> Path:
        """The model folder."""
        return self.out / "models" / self.name

    @property
    def record(self) -> Path:
        """The file of figures; it is there, with its key `run`, when the run is finished."""
        return self.out / "runs" / f"{self.name}.json"

    @property
    def log(self) -> Path:
        """What the processes said."""
        return self.out / "logs" / f"{self.name}.log"

    @property
    def train(self) -> list[str]:
        """The arguments that train and calibrate. With `--overwrite`, as a calibration may have been interrupted."""
        entry, held = self.entry, [] if self.held is None else ["--calibration-good", str(self.held)]
        command = ["train", "--detector", entry.detector, "--good", str(self.good), *held, "--out", str(self.model)]
        known = {"{out}": str(self.out), "{category}": self.category, "{seed}": str(self.seed)}
        options = [reduce(lambda text, key: text.replace(key, known[key]), known, option) for option in entry.options]
        return [*command, "--seed", str(self.seed), "--device", self.device, "--overwrite", *options]

    @property
    def evaluate(self) -> list[str]:
        """The arguments that evaluate."""
        command = ["evaluate", "--model", str(self.model), "--data", str(self.data), "--json", str(self.record)]
        return [*command, "--device", self.device]

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for figures to be used again; where they are kept is not in it."""
        entry = self.entry
        options = {"detector": entry.detector, "options": list(entry.options), "seed": self.seed}
        about = {"device": self.device, "data": str(self.data), "data_sha256": self.data_sha256}
        return {**options, **about, "inspectd": version("inspectd")}


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a run: the content of its record, or None and the last line of what went wrong."""

    seed: int
    figures: Mapping[str, Any] | None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and sample standard deviation over `n` seeds; of one seed there is no deviation."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Row:
    """All runs of one entry on one category, by ascending seed."""

    entry: Entry
    results: tuple[Result, ...]

    @property
    def done(self) -> list[Mapping[str, Any]]:
        """The figures of the runs that succeeded."""
        return [result.figures for result in self.results if result.figures is not None]

    @property
    def errors(self) -> list[str]:
        """What failed runs said, with their seeds; once where several said the same."""
        seeds: dict[str, list[str]] = {}
        for result in self.results:
            if result.figures is None:
                seeds.setdefault(result.error, []).append(str(result.seed))
        return [f"seed {', '.join(where)}: {error}" for error, where in seeds.items()]

    def spread(self, key: str) -> Spread | None:
        """Sum up one figure; "a/b" is b inside a. None where no run has it."""
        return spread(_look(figures, key) for figures in self.done)


@dataclass(frozen=True, slots=True)
class Case:
    """A part worth looking at: pictures of what the detector saw and of the truth, relative to the report."""

    part: str
    defect: str
    score: float
    rejected: bool
    overlay: Path
    truth: Path

    @property
    def right(self) -> bool:
        """Whether the verdict was right."""
        return self.rejected == (self.defect != "good")


@dataclass(frozen=True, slots=True)
class Sheet:
    """Everything about one category. `cases` are by label; where they cannot be drawn it is said why."""

    category: str
    rows: tuple[Row, ...]
    cases: Mapping[str, Sequence[Case] | str]


def entries(detectors: str, settings: Sequence[str], known: Collection[str]) -> list[Entry]:
    """Read "rd4ad,r50=rd4ad" and settings such as "r50:--backbone=resnet50_msra" or "all:--size=128".

    Options of `all` come first, so that those of one label win.

    Raises:
        ValueError: a name or a setting cannot be right; the message says which, and what would be.
    """
    pairs = [text.strip().rpartition("=")[::2] for text in detectors.split(",") if text.strip()]
    named = [(label or detector, detector) for label, detector in pairs]
    labels = [label for label, _ in named]
    for label, detector in named:
        if detector not in known:
            raise ValueError(f"no detector is called {detector!r}; choose of {', '.join(sorted(known))}")
        if not _LABEL.fullmatch(label) or label == "all":
            raise ValueError(f"{label!r} is no label: use letters, digits, '_', '-' and '.', and not the word all")
        if labels.count(label) > 1:
            raise ValueError(f"{label} is listed twice; give one of them a label: {label}2={detector}")
    if not named:
        raise ValueError("no detector is listed")
    options: dict[str, list[str]] = {label: [] for label in ("all", *labels)}
    for setting in settings:
        label, _, option = setting.partition(":")
        if label not in options or not option.startswith("--"):
            raise ValueError(
                f"{setting!r} is no setting: write LABEL:--option=value, LABEL one of {', '.join(options)}"
            )
        options[label].append(option)
    return [Entry(label, detector, (*options["all"], *options[label])) for label, detector in named]


def read(data: Path) -> list[tuple[Path, Category]]:
    """Every category in a folder, or the folder itself, with the place it was found at.

    Raises:
        DatasetError: there is none, one cannot be read, or has no good parts to learn from, or two have one name.
    """
    found = [(folder.resolve(), dataset.read_category(folder)) for folder in dataset.categories(data)]
    for folder, category in found:
        if not category.good:
            raise DatasetError(f"{folder} has a test set but no good parts to learn from; add them or leave it out")
        if sum(other.name == category.name for _, other in found) > 1:
            raise DatasetError(f"{data} holds more than one category called {category.name}; compare on one at a time")
    return found


def plan(category: Category, data: Path, listed: Sequence[Entry], seeds: int, device: str, out: Path) -> list[Run]:
    """List the runs of one category, those of the first seed first, and make folders of links where they are needed."""
    good = _folder(category.good, out / "links" / category.name / "good")
    held = _folder(category.held, out / "links" / category.name / "calibration") if category.held else None
    sha256 = dataset.digest([*category.good, *category.held, *(part.path for part in category.test)])
    return [
        Run(category.name, data, sha256, good, held, entry, seed, device, out)
        for seed in range(seeds)
        for entry in listed
    ]


def finished(run: Run) -> Result | None:
    """The result of an earlier run with the same options, if there is one."""
    figures = _read(run.record)
    return Result(run.seed, figures) if figures.get("run", {}).get("identity") == run.identity else None


def perform(run: Run, machine: Mapping[str, Any]) -> Result:
    """Train and evaluate; a failure is a result too.

    Raises:
        KeyboardInterrupt: interrupted; the same run goes on where it was.
        OSError: `out` cannot be written.
    """
    for path in (run.record, run.log):
        path.parent.mkdir(parents=True, exist_ok=True)
    run.record.unlink(missing_ok=True)
    try:
        seconds = _train(run)
        _inspectd(run.evaluate, run.log)
        return Result(run.seed, _complete(run, seconds, machine))
    except _RunError as error:
        return Result(run.seed, None, str(error))


def collect(category: Category, runs: Sequence[Run], results: Mapping[Run, Result]) -> Sheet:
    """Put together what a page needs; pictures are of each entry's first run that succeeded."""
    from calibration.calibration import CalibrationError
    from detectors.base import ArtifactError

    cases: dict[str, Sequence[Case] | str] = {}
    rows: dict[Entry, list[Result]] = {}
    for run in runs:
        result = results[run]
        rows.setdefault(run.entry, []).append(result)
        if result.figures is None or run.entry.label in cases:
            continue
        try:
            cases[run.entry.label] = draw(run, result.figures, category.test)
        except (ArtifactError, CalibrationError, DatasetError, OSError) as error:
            cases[run.entry.label] = str(error)  # hours of figures are worth a page without pictures
    return Sheet(category.name, tuple(Row(entry, tuple(found)) for entry, found in rows.items()), cases)


def describe_machine(device: str) -> dict[str, Any]:
    """Where the figures come from."""
    from detectors.devices import choose

    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": choose(device),
        "inspectd": version("inspectd"),
        "torch": version("torch"),
        "python": platform.python_version(),
    }


def spread(values: Iterable[float | None]) -> Spread | None:
    """Sum up the values that there are; None without any."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    return Spread(statistics.fmean(there), statistics.stdev(there) if len(there) > 1 else None, len(there))


def clearly_best(rows: Sequence[Row], key: str, better: Literal["high", "low"]) -> Row | None:
    """The row whose mean is ahead of every other's by more than both standard deviations together.

    None if there is no such row, for want of seeds, or if there is nothing to compare it with.
    """
    sign = 1 if better == "high" else -1
    spreads = [(row, found) for row in rows if (found := row.spread(key))]
    if len(spreads) < 2 or any(found.sd is None for _, found in spreads):  # noqa: PLR2004 -- best of two at least
        return None
    best, first = max(spreads, key=lambda pair: sign * pair[1].mean)
    ahead = all(
        sign * (first.mean - other.mean) > (first.sd or 0) + (other.sd or 0)
        for row, other in spreads
        if row is not best
    )
    return best if ahead else None


def telling(parts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Choose at most eight parts to look at: those judged worst first, then those judged best.

    Three bad parts of lowest score, two good ones of highest; two bad parts of highest score, a good one of lowest.
    """
    ranked = sorted(parts, key=lambda part: float(part["score"]))
    good = [part for part in ranked if part["defect"] == "good"]
    bad = [part for part in ranked if part["defect"] != "good"]
    chosen: list[Mapping[str, Any]] = []
    for part in (*bad[:3], *good[:-3:-1], *bad[:-3:-1], *good[:1]):
        if part not in chosen:
            chosen.append(part)
    return chosen


def draw(run: Run, figures: Mapping[str, Any], test: Sequence[Labelled]) -> list[Case]:
    """Judge the telling parts again and draw what the detector saw beside the truth; old pictures are used again.

    Raises:
        ArtifactError, CalibrationError: the model cannot be used any more.
        DatasetError, OSError: an image cannot be read, or a picture not be written.
    """
    from daemon.build import build_detector, load_calibration

    folder = run.out / "pictures" / run.category / run.entry.label
    chosen = telling(figures["parts"])
    stem = f"{run.seed}-{figures['calibration']}"
    pairs = [tuple(folder / f"{stem}-{i}-{what}.jpg" for what in ("map", "truth")) for i in range(len(chosen))]
    if not all(path.exists() for pair in pairs for path in pair):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        detector = build_detector(run.model, run.device)
        calibration = load_calibration(run.model, detector)
        labelled = {item.path.resolve(): item for item in test}
        for part, (seen, truth) in zip(chosen, pairs, strict=True):
            item = labelled[(run.data / part["path"]).resolve()]
            image = dataset.read_image(item.path)
            (prediction,) = detector.predict([image])
            decision = judgement.judge(prediction, calibration)
            caption = overlay.Caption(decision.outcome, item.path.name, judgement.explain(decision))
            picture = overlay.render(image, prediction.anomaly_map, decision.threshold, caption, _SIDE)
            seen.write_bytes(overlay.encode_jpeg(picture, b"", quality=88))
            truth.write_bytes(overlay.encode_jpeg(_truth(image, item), b"", quality=88))
    return [
        Case(
            Path(part["path"]).name,
            part["defect"],
            part["score"],
            part["rejected"],
            seen.relative_to(run.out),
            truth.relative_to(run.out),
        )
        for part, (seen, truth) in zip(chosen, pairs, strict=True)
    ]


def _truth(image: Image, item: Labelled) -> Image:
    """The part with its mask outlined, on the same card as the overlay, with the verdict that would be right."""
    scale = _SIDE / max(image.shape[:2])
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    part = np.asarray(cv2.resize(image, None, fx=scale, fy=scale, interpolation=interpolation), np.uint8)
    mask = dataset.read_mask(item.mask, (part.shape[0], part.shape[1]))
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    for colour, weight in ((_MASK_EDGE, 4), (_MASK, 2)):
        cv2.polylines(part, contours, isClosed=True, color=colour, thickness=weight, lineType=cv2.LINE_AA)
    detail = "a good part" if item.good else "its defect outlined" if contours else "without a mask"
    caption = overlay.Caption(Outcome.PASS if item.good else Outcome.FAIL, f"truth: {item.defect}", detail)
    return overlay.render(part, None, 1, caption, _SIDE)


def _folder(paths: Sequence[Path], links: Path) -> Path:
    """The folder that holds these images and no others, or one of links to them."""
    folder = paths[0].parent
    if all(path.parent == folder for path in paths) and set(dataset.good_images(folder)) == set(paths):
        return folder.resolve()
    shutil.rmtree(links, ignore_errors=True)
    links.mkdir(parents=True)
    for i, path in enumerate(paths):
        (links / f"{i:05d}-{path.name}").symlink_to(path.resolve())
    return links


def _train(run: Run) -> float:
    """Train unless that is done, and return its seconds, those before an interruption included."""
    notes = run.record.with_suffix(".training.json")
    kept = _read(notes)
    if kept.get("identity") != run.identity:
        shutil.rmtree(run.model, ignore_errors=True)
        kept = {"identity": run.identity, "seconds": 0.0, "finished": False}
    if not kept["finished"] or not (run.model / "calibration.json").exists():
        _write(notes, kept)  # now, for a process that is killed cannot write
        began = time.monotonic()
        try:
            _inspectd(run.train, run.log)
            kept["finished"] = True
        finally:
            kept["seconds"] += time.monotonic() - began
            _write(notes, kept)
    return float(kept["seconds"])


def _inspectd(arguments: Sequence[str], log: Path) -> None:
    """Run the installed program, its words appended to `log`.

    Raises:
        _RunError: it failed.
    """
    program = Path(sys.executable).with_name("inspectd")
    with log.open("a+", encoding="utf-8", errors="replace") as file:
        file.write(f"$ {shlex.join(['inspectd', *arguments])}\n")
        file.flush()
        began = file.tell()
        with subprocess.Popen(
            [program, *arguments], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        ) as child:
            try:
                status = child.wait()
            except KeyboardInterrupt:
                # The keyboard interrupted the child as well, SIGTERM did not: it may be writing its checkpoint.
                child.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(_PATIENCE_S)
                child.kill()
                raise
        file.seek(began)
        said = [line.strip() for line in file if line.strip()]
    if status < 0:
        why = ", most often for want of memory" if status == -signal.SIGKILL else ""
        raise _RunError(f"{arguments[0]} was killed by {signal.Signals(-status).name}{why}")
    if status:
        own = [line for line in said if line.startswith("inspectd: ")] or said or [f"exit status {status}"]
        raise _RunError(f"{arguments[0]}: {own[-1].removeprefix('inspectd: ')}")


def _complete(run: Run, seconds: float, machine: Mapping[str, Any]) -> dict[str, Any]:
    """Add to the figures what they are figures of; from then on the run is finished."""
    split, calibration = _read(run.model / "split.json"), _read(run.model / "calibration.json")
    figures = _read(run.record) | {
        "train_seconds": seconds,
        "run": {
            "identity": run.identity,
            "commands": [shlex.join(["inspectd", *arguments]) for arguments in (run.train, run.evaluate)],
            "training": _read(run.model / "manifest.json")["training"],
            "learned": len(split["learned"]),
            "calibration_scores": calibration["scores"],
            "machine": dict(machine),
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    }
    _write(run.record, figures)
    return figures


def _processor() -> str:
    with contextlib.suppress(OSError):
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if names:
            return str(names[0])
    return platform.processor() or platform.machine()


def _look(figures: Mapping[str, Any], key: str) -> float | None:
    value: Any = figures
    for step in key.split("/"):
        value = value.get(step) if isinstance(value, Mapping) else None
    return None if value is None else float(value)


def _read(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if it is missing or torn, which is to say not finished."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    whole = path.with_name(f".{path.name}.tmp")
    whole.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    whole.replace(path)
