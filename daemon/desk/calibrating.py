"""The commands that choose a threshold, put it in force, and take it back."""

import getpass
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from calibration import golden, store
from calibration.calibration import (
    CONFIDENCE,
    Appearance,
    Calibration,
    CalibrationError,
    Provenance,
    asked_again,
    describe,
    fit,
    share,
    stated,
    with_alpha,
)
from calibration.metrics import binomial_interval
from calibration.threshold import Method
from daemon import canaries
from daemon.desk import card, dataset
from daemon.desk.dataset import DatasetError
from daemon.desk.lens import Lens, sha256
from daemon.desk.target import ConfigOption, ModelOption, RecipeOption, StationOption, Target, find, model_alone
from daemon.terminal import Device, DeviceOption, out, progress
from detectors.base import Detector, Image

AlphaOption = Annotated[
    float, typer.Option(help="Share of good parts that may be rejected.", min=1e-6, max=0.5, show_default=True)
]

calibrations = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="List the calibrations of a model or station, accept a proposed one, or go back to an earlier one.",
)


@dataclass(frozen=True, slots=True)
class How:
    """How a threshold is asked for, as `fit` understands it."""

    alpha: float
    confidence: float = CONFIDENCE
    method: Method | None = None
    fail_alpha: float | None = None


@dataclass(frozen=True, slots=True)
class _Survey:
    """What was measured of good parts, in the order of the images."""

    scores: Sequence[float]
    groups: Sequence[str]
    images: Sequence[str]
    appearance: Appearance | None


def calibrate(
    model: ModelOption = None,
    config: ConfigOption = None,
    station: StationOption = None,
    recipe: RecipeOption = None,
    good: Annotated[
        Path | None, typer.Option(help="Folder of images of good parts that did not train the model.")
    ] = None,
    alpha: AlphaOption = 0.01,
    confidence: Annotated[float, typer.Option(help="Of the method tolerance.", min=0.5, max=0.9999)] = CONFIDENCE,
    method: Annotated[
        Method | None, typer.Option(help="This method; default: the firmest for so many parts and this alpha.")
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(help="Regular expression: what of a file's name tells its part, lot or burst, like ([A-Z0-9]+)_."),
    ] = None,
    fail_alpha: Annotated[
        float | None,
        typer.Option(help="A share below alpha: parts between the thresholds of both are UNCERTAIN.", min=1e-6),
    ] = None,
    by: Annotated[str | None, typer.Option(help="Who answers for it; default: the name of the user.")] = None,
    engine: Annotated[
        str | None, typer.Option(help="Engine to calibrate; default: that of the calibration in force, or torch.")
    ] = None,
    add: Annotated[bool, typer.Option("--add", help="Keep the scores of the calibration in force too.")] = False,  # noqa: FBT002
    what_if: Annotated[  # noqa: FBT002 -- a flag
        bool, typer.Option("--what-if", help="Write nothing; show the thresholds of several alphas.")
    ] = False,
    defects: Annotated[
        Path | None, typer.Option(help="For --what-if: folder of bad parts, to count escapes; they move no threshold.")
    ] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Choose the threshold from good parts, and say what it promises.

    Where a calibration is in force, the new one is a proposal that waits for `inspectd calibrations accept`. With
    --what-if and without --good, the scores of the calibration in force serve.
    """
    target = find(model, config, station, device, recipe)
    present = target.in_force()
    if defects and not what_if:
        raise typer.BadParameter("--defects is for --what-if: bad parts never move a threshold")
    if add and (present is None or not present.images):
        raise typer.BadParameter(f"--add keeps the scores of a calibration in force, and there is none: {target.path}")
    how = How(alpha, confidence, method, fail_alpha)
    detector = _detector(target, engine, present) if good or defects else None
    if good is not None and detector is not None:
        held = not_learned(target.model, dataset.good_images(good), good)
        digests = _each_once(held, present.images if add and present else ())
        groups = [] if group is None else _groups(list(digests), group)
        lens = target.lens(list(digests))
        _warn_of_strange_images(target.model, lens)
        if add and present is not None:
            target.fitting(present, lens.fingerprint)
        survey = _survey(detector, lens, digests, groups, present if add else None)
        found = _fit(target, detector, lens, survey, how, by)
        if not what_if:
            _keep_golden(target, detector, lens, list(digests), survey, found)
    elif present is not None and what_if:
        found = asked_again(present, **asdict(how))
    else:
        raise typer.BadParameter("--good is missing: a folder of images of good parts")
    if what_if:
        bad = _scores(target, detector, dataset.good_images(defects), found) if defects and detector else []
        out.print(_what_if(found, bad))
    elif present is None:
        out.print(describe(found), markup=False, soft_wrap=True)
        _put_in_force(found, target)
    else:
        _propose(found, present, target)


def calibrate_through(
    target: Target, detector: Detector, good: Sequence[Path], alpha: float | None, parity: str
) -> None:
    """Calibrate anew through another engine: as the calibration in force was asked for, or with this alpha.

    Where one is in force, the new one is a proposal.
    """
    present = target.in_force()
    how = asked_of(present, alpha)
    lens = target.lens(good)
    digests = _each_once(good, ())
    survey = _survey(detector, lens, digests, [], None)
    found = _fit(target, detector, lens, survey, how, None, parity)
    _keep_golden(target, detector, lens, list(digests), survey, found)
    if present is None:
        out.print(describe(found), markup=False, soft_wrap=True)
        _put_in_force(found, target)
    else:
        _propose(found, present, target)


def asked_of(present: Calibration | None, alpha: float | None) -> How:
    """How a calibration was asked for; without one, or for another alpha, what `calibrate` does by default."""
    if present is None or alpha not in {None, present.alpha}:
        return How(0.01 if alpha is None else alpha)
    return How(present.alpha, present.confidence, present.asked, present.fail_alpha)


def _detector(target: Target, engine: str | None, present: Calibration | None) -> Detector:
    return target.detector(present) if engine is None else target.detector_by(engine)


def calibrate_new(model: Path, held: Sequence[Path], alpha: float, device: Device) -> None:
    """Calibrate a model that was just trained, and put that in force."""
    target = model_alone(model, device)
    detector = target.detector()
    lens = target.lens(held)
    digests = _each_once(held, ())
    survey = _survey(detector, lens, digests, [], None)
    calibration = _fit(target, detector, lens, survey, How(alpha), None)
    _keep_golden(target, detector, lens, list(digests), survey, calibration)
    out.print(describe(calibration), markup=False, soft_wrap=True)
    _put_in_force(calibration, target)


def _warn_of_strange_images(model: Path, lens: Lens) -> None:
    """Say if the model has learned from images that looked otherwise: its threshold holds, but it tells parts badly."""
    from daemon.desk.training import learned_framing

    learned = learned_framing(model)
    if learned is not None and learned != lens.fingerprint:
        out.print(
            f"{model} learned from images framed otherwise ({learned or 'not at all'}, now "
            f"{lens.fingerprint or 'not at all'}) and may miss defects: train on images framed as they are now, with "
            "`inspectd sources frame`.",
            markup=False,
            soft_wrap=True,
        )


def not_learned(model: Path, pool: Sequence[Path], good: Path) -> list[Path]:
    """Leave out what trained the model, and say so.

    Raises:
        DatasetError: Nothing is left.
    """
    from daemon.desk.training import unlearned

    held = unlearned(model, pool)
    if not held:
        raise DatasetError(f"every image in {good} was used to train {model}; calibrate on other good parts")
    if len(held) < len(pool):
        out.print(f"{len(pool) - len(held)} of {len(pool)} images trained this model and are left out.", soft_wrap=True)
    return held


@calibrations.command("list")
def show(
    model: ModelOption = None,
    config: ConfigOption = None,
    station: StationOption = None,
    recipe: RecipeOption = None,
) -> None:
    """Show the calibration in force, the proposed one, and those before."""
    target = find(model, config, station, Device.cpu, recipe)
    present, proposed = target.in_force(), store.proposal(target.path)
    table = _table("", "id", "made", "by", "parts", "α", "method", "threshold")
    known = [("in force", present)] if present else []
    known += [("proposed", store.read(proposed))] if proposed.exists() else []
    before = [one for one in reversed(store.history(target.path)) if present is None or one.id != present.id]
    for what, one in [*known, *(("earlier", one) for one in before)]:
        made = one.provenance
        table.add_row(
            what,
            one.id,
            f"{made.made_at:%Y-%m-%d}",
            escape(made.made_by),
            str(one.good_parts),
            stated(one.alpha),
            one.method.value,
            f"{one.threshold:.5g}",
        )
    if not table.row_count:
        raise CalibrationError(f"{target.path}: there is no calibration; run `inspectd calibrate`")
    out.print(table)


@calibrations.command()
def accept(
    calibration_id: Annotated[str, typer.Argument(metavar="ID", help="Of the proposal, as on its card.")],
    model: ModelOption = None,
    config: ConfigOption = None,
    station: StationOption = None,
    recipe: RecipeOption = None,
) -> None:
    """Put the proposed calibration in force; the present one is kept."""
    target = find(model, config, station, Device.cpu, recipe)
    chosen = store.proposed(target.path, calibration_id)
    page = _write_card(chosen, target)
    store.accept(target.path, calibration_id)
    store.proposal(target.path).with_suffix(".html").unlink(missing_ok=True)
    _tell(chosen, page, target)


@calibrations.command("roll-back")
def roll_back(
    model: ModelOption = None,
    config: ConfigOption = None,
    station: StationOption = None,
    recipe: RecipeOption = None,
    calibration_id: Annotated[
        str | None, typer.Option("--id", help="Which; default: the one that first came into force before the present.")
    ] = None,
) -> None:
    """Put an earlier calibration of the same model in force again; the present one is kept."""
    target = find(model, config, station, Device.cpu, recipe)
    _put_in_force(store.earlier(target.path, calibration_id), target)


def _each_once(paths: Sequence[Path], known: Sequence[str]) -> dict[Path, str]:
    """Each image with its SHA-256, without copies of one another and of what is known; says how many are left out.

    Raises:
        DatasetError: nothing is left.
    """
    seen = set(known)
    kept: dict[Path, str] = {}
    for path in paths:
        digest = sha256(path)
        if digest not in seen:
            seen.add(digest)
            kept[path] = digest
    if not kept:
        raise DatasetError("every image is in the calibration in force already; give other good parts")
    if copies := len(paths) - len(kept):
        out.print(f"{copies} of {len(paths)} images are copies of others and are left out.", soft_wrap=True)
    return kept


def _survey(
    detector: Detector, lens: Lens, digests: Mapping[Path, str], groups: Sequence[str], present: Calibration | None
) -> _Survey:
    """Score images, and put them to those of a calibration if there is one."""
    scores, glances = [], []
    for image in _read(lens, list(digests), "calibrating"):
        scores.append(detector.predict([image])[0].anomaly_score)
        glances.append(canaries.glance(image))
    looks = canaries.appearance(glances, None if present is None else present.appearance)
    survey = _Survey(scores, groups, list(digests.values()), looks)
    return survey if present is None else _joined(present, detector, survey)


def _joined(present: Calibration, detector: Detector, survey: _Survey) -> _Survey:
    if present.provenance.engine != detector.engine:
        raise CalibrationError(
            f"{present.id} was made with {present.provenance.engine}, this is {detector.engine}: scores of two engines "
            "cannot be added; calibrate without --add"
        )
    groups: list[str] = []
    if present.groups or survey.groups:
        old = present.groups or range(present.good_parts)
        groups = [*(f"before {group}" for group in old), *(survey.groups or map(str, range(len(survey.scores))))]
    scores, images = [*present.scores, *survey.scores], [*present.images, *survey.images]
    return _Survey(scores, groups, images, survey.appearance)


def _fit(
    target: Target, detector: Detector, lens: Lens, survey: _Survey, how: How, by: str | None, parity: str = ""
) -> Calibration:
    return fit(
        survey.scores,
        **asdict(how),
        groups=survey.groups,
        images=survey.images,
        appearance=survey.appearance,
        provenance=Provenance(
            model=detector.fingerprint,
            data_sha256=dataset.digest_of(survey.images),
            made_at=datetime.now(UTC),
            engine=detector.engine,
            regions=target.rule.fingerprint,
            made_by=_user() if by is None else by,
            framing=lens.fingerprint,
            parity=parity,
        ),
    )


def _keep_golden(
    target: Target, detector: Detector, lens: Lens, paths: Sequence[Path], survey: _Survey, calibration: Calibration
) -> None:
    """Keep some of the images with their scores, before the calibration is written: none shall be without them."""
    scores = survey.scores[-len(paths) :]  # after those of the calibration in force, which are added
    chosen = golden.spread(scores)
    # Read once more, as all images together may not fit into memory, and scored once more, as files may change.
    pictures = tuple(lens.read(paths[place]) for place in chosen)
    kept = golden.Golden(calibration, pictures, tuple(scores[place] for place in chosen))
    kept.verify([detector.predict([image])[0].anomaly_score for image in pictures])
    file = golden.save(kept, target.path)
    size = file.stat().st_size / 1e6
    out.print(f"Golden set: {len(chosen)} images, {size:.1f} MB, in {file}", markup=False, soft_wrap=True)


def _put_in_force(calibration: Calibration, target: Target) -> None:
    page = _write_card(calibration, target)
    store.install(calibration, target.path)
    _tell(calibration, page, target)


def _write_card(calibration: Calibration, target: Target) -> Path:
    """Write the card of what is about to come into force and will be loaded: none shall be in force without it."""
    made = calibration.provenance.framing
    target.fitting(calibration, made if target.framing is None else target.framing.fingerprint)
    target.require_engine(calibration)
    golden.load(target.path, calibration)  # refused now rather than at the next start
    return card.write(calibration, target.path.with_suffix(".html"), model_name=target.model.name)


def _tell(calibration: Calibration, page: Path, target: Target) -> None:
    out.print(
        f"In force: {calibration.id}, from the next start of the daemon on. Card to sign: {page}",
        markup=False,
        soft_wrap=True,
    )
    if not golden.place(target.path, calibration.id).exists():
        out.print("It has no golden set, so no loaded model is verified by it; `inspectd calibrate` makes one.")


def _propose(calibration: Calibration, present: Calibration, target: Target) -> None:
    waiting = store.proposal(target.path)
    if waiting.exists():
        out.print("The proposal that was waiting is replaced.")
        _forget_golden(waiting, target)
    proposal = store.propose(calibration, target.path)
    page = card.write(calibration, proposal.with_suffix(".html"), model_name=target.model.name)
    out.print(describe(calibration), markup=False, soft_wrap=True)
    out.print(_comparison(present, calibration))
    out.print(
        f"This is a proposal, {page}; {present.id} stays in force until: "
        f"inspectd calibrations accept {calibration.id} {target.said}",
        markup=False,
        soft_wrap=True,
    )


def _forget_golden(waiting: Path, target: Target) -> None:
    """Take away the golden set of a proposal that is about to be replaced, unless it has come into force."""
    try:
        replaced = store.read(waiting).id
    except CalibrationError:  # torn: whose set it was is not known, and one too many does no harm
        return
    if replaced not in {one.id for one in store.history(target.path)}:
        golden.discard(target.path, replaced)


def _comparison(present: Calibration, proposed: Calibration) -> Table:
    """How many each one rejects of the good parts in force before, and of those proposed now."""
    table = _table("", "threshold", "rejects before", "rejects now")
    for name, one in ((f"in force {present.id}", present), (f"proposed {proposed.id}", proposed)):
        counts = [(sum(not one.passes(score) for score in of.scores), of.good_parts) for of in (present, proposed)]
        shares = [f"{count} of {parts} = {count / parts:.1%}" for count, parts in counts]
        table.add_row(name, f"{one.threshold:.5g}", *shares)
    return table


def _what_if(found: Calibration, bad: Sequence[float]) -> Table:
    """Thresholds of several alphas, what each promises, and how many bad parts would escape."""
    escapes = ("escapes", "95 %") if bad else ()
    table = _table("α", "threshold", "method", "false rejects", "90 %", *escapes)
    for asked in sorted({*card.ALPHAS, found.alpha}, reverse=True):
        one = with_alpha(found, asked)
        if one is None:
            table.add_row(stated(asked), "none", str(found.asked))
            continue
        low, high = one.false_reject_interval
        most = "" if one.carries or one.method is Method.largest else "≤ "
        row = [stated(asked), f"{one.threshold:.5g}", one.method.value]
        row += [f"{most}{share(one.expected_false_rejects)}", f"{100 * low:.1f}–{100 * high:.1f} %"]
        if bad:
            escaped = sum(one.passes(score) for score in bad)
            low, high = binomial_interval(escaped, len(bad))
            row += [f"{escaped} of {len(bad)}", f"{100 * low:.0f}–{100 * high:.0f} %"]
        table.add_row(*row, style="bold" if asked == found.alpha else "")
    return table


def _table(*columns: str) -> Table:
    """A table for a terminal of 80 columns, figures to the right."""
    table = Table(*columns, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in table.columns:
        if column.header in {"", "id", "made", "by", "method"}:
            column.no_wrap = column.header != "by"
        else:
            column.justify, column.no_wrap = "right", True
    return table


def _scores(target: Target, detector: Detector, paths: Sequence[Path], good: Calibration) -> list[float]:
    lens = target.lens(paths)
    target.fitting(good, lens.fingerprint)
    return [detector.predict([image])[0].anomaly_score for image in _read(lens, paths, "scoring bad parts")]


def _read(lens: Lens, paths: Sequence[Path], doing: str) -> Iterator[Image]:
    with progress() as bar:
        task = bar.add_task(doing, total=len(paths), note="")
        for path in paths:
            yield lens.read(path)
            bar.advance(task)


def _groups(paths: Sequence[Path], pattern: str) -> list[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise typer.BadParameter(f"--group {pattern!r} is no regular expression: {error}") from None
    groups = []
    for path in paths:
        match = expression.search(path.name)
        if match is None:
            raise DatasetError(f"{path.name} has no group: it does not match {pattern!r}")
        groups.append(match[1] if expression.groups else match[0])
    return groups


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, in a container say
        return ""
