"""What a command works on: a model alone, or a station as its configuration has it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from calibration import store
from calibration.calibration import Calibration, CalibrationError
from config.load import load
from daemon.desk.lens import Lens, of_all
from daemon.framing import Framing
from daemon.regions import Rule
from daemon.terminal import Device
from detectors.base import Detector

AUTO, REFERENCE = "auto", "torch"
"""What a configuration says for the calibration's own engine, and the engine that all others are compared with."""

ModelOption = Annotated[Path | None, typer.Option("--model", help="Model folder.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="Configuration file, instead of --model.")]
StationOption = Annotated[str | None, typer.Option("--station", help="Which of its stations; default: the only one.")]
RecipeOption = Annotated[str | None, typer.Option("--recipe", help="Which of its recipes; default: the only one.")]


@dataclass(frozen=True, slots=True)
class Target:
    """A model under a rule on a device, and where its calibration lies. `said` is how the user named it.

    `framing` is the station's; None for a model alone, to which images come as they are. `engine` is the one that the
    configuration asks for, or "auto".
    """

    model: Path
    path: Path
    rule: Rule
    device: str
    threads: int
    said: str
    framing: Framing | None = None
    engine: str = AUTO

    @property
    def fingerprint(self) -> str:
        """The model's."""
        from daemon.build import fingerprint_of

        return fingerprint_of(self.model)

    def in_force(self) -> Calibration | None:
        """The calibration of this model, under whatever rule; None where there is none, or only another model's.

        Raises:
            CalibrationError: there is one that cannot be trusted.
        """
        if not self.path.exists():
            return None
        present = store.read(self.path)
        return present if present.provenance.model == self.fingerprint else None

    def detector(self, calibration: Calibration | None = None) -> Detector:
        """The model as it inspects by a calibration; without one, by the reference engine.

        Raises:
            ArtifactError, CalibrationError: the model, or the calibration's engine, cannot be used.
        """
        from daemon.build import engine_of

        return self.detector_by(REFERENCE if calibration is None else engine_of(calibration, self.engine))

    def require_engine(self, calibration: Calibration) -> None:
        """See that what a calibration was made with is there, whole.

        Raises:
            ArtifactError, CalibrationError: it is not, or the configuration asks for another engine.
        """
        from daemon.build import engine_of
        from detectors import artifact
        from detectors.engines import store as engines

        engines.require(self.model, artifact.read_manifest(self.model), engine_of(calibration, self.engine))

    def detector_by(self, engine: str) -> Detector:
        """The model as the engine of that key computes it."""
        from daemon.build import build_detector

        return build_detector(self.model, self.device, self.threads, self.rule, engine)

    def lens(self, paths: Sequence[Path]) -> Lens:
        """How it sees these images.

        Raises:
            DatasetError: it is a model alone, and they were not all framed alike.
            OSError: one cannot be read.
        """
        return of_all(paths) if self.framing is None else Lens(self.framing.fingerprint, self.framing)

    def load(self, framing: str) -> tuple[Detector, Calibration]:
        """The model and its calibration, which must be one for images of this framing.

        Raises:
            ArtifactError, CalibrationError: one of them cannot be used.
        """
        calibration = self.fitting(store.read(self.path), framing)
        return self.detector(calibration), calibration

    def fitting(self, calibration: Calibration, framing: str) -> Calibration:
        """The calibration, if it is one of this model under this rule for images of this framing.

        Raises:
            CalibrationError: it is not.
        """
        made = calibration.provenance.framing
        if self.framing is None and made != framing:
            raise CalibrationError(
                f"{self.path}: made of images framed otherwise than these ({made or 'not at all'}, "
                f"{framing or 'not at all'}); give --config FILE --station NAME instead of --model, or other images"
            )
        store.require(calibration, self.fingerprint, self.rule.fingerprint, framing, self.path)
        return calibration


def model_alone(model: Path, device: Device) -> Target:
    """A model that inspects everything, with the calibration in its folder."""
    from daemon.build import CALIBRATION

    return Target(model, model / CALIBRATION, Rule(), device.value, 0, f"--model {model}")


def find(
    model: Path | None, config: Path | None, station: str | None, device: Device, recipe: str | None = None
) -> Target:
    """Understand the options: a model, or a configuration, one of its stations and one of the station's recipes.

    Raises:
        ConfigError: the configuration, one of its masks or its flat field is at fault.
    """
    from daemon.build import build_framing, build_rule

    if model is not None and config is None and station is recipe is None:
        return model_alone(model, device)
    if model is not None or config is None:
        raise typer.BadParameter("give either --model, or --config with --station")
    settings = load(config)
    names = ", ".join(one.name for one in settings.stations)
    chosen = [one for one in settings.stations if station in {None, one.name}]
    if len(chosen) != 1:
        raise typer.BadParameter(f"--station must be one of: {names}")
    (one,) = chosen
    judging = [each for each in one.recipes if recipe in {None, each.name}]
    if len(judging) != 1:
        raise typer.BadParameter(f"--recipe must be one of: {', '.join(each.name for each in one.recipes)}")
    (by,) = judging
    where = settings.device if device is Device.auto else device.value
    said = f"--config {config} --station {one.name}" + (f" --recipe {by.name}" if one.own_recipes else "")
    rule, framing = build_rule(by.regions), build_framing(one.framing)
    return Target(by.model, by.calibration_file, rule, where, settings.threads, said, framing, settings.engine)
