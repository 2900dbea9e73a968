"""What a command works on: a model alone, or a station as its configuration has it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from calibration import store
from calibration.calibration import Calibration
from config.load import load
from daemon.regions import Rule
from daemon.terminal import Device
from detectors.base import Detector

ModelOption = Annotated[Path | None, typer.Option("--model", help="Model folder.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="Configuration file, instead of --model.")]
StationOption = Annotated[str | None, typer.Option("--station", help="Which of its stations; default: the only one.")]
RecipeOption = Annotated[str | None, typer.Option("--recipe", help="Which of its recipes; default: the only one.")]


@dataclass(frozen=True, slots=True)
class Target:
    """A model under a rule on a device, and where its calibration lies. `said` is how the user named it."""

    model: Path
    path: Path
    rule: Rule
    device: str
    threads: int
    said: str

    @property
    def fingerprint(self) -> str:
        """The model's."""
        from detectors import artifact

        return artifact.read_manifest(self.model).fingerprint

    def in_force(self) -> Calibration | None:
        """The calibration of this model, under whatever rule; None where there is none, or only another model's.

        Raises:
            CalibrationError: there is one that cannot be trusted.
        """
        if not self.path.exists():
            return None
        present = store.read(self.path)
        return present if present.provenance.model == self.fingerprint else None

    def detector(self) -> Detector:
        """The model as it inspects."""
        from daemon.build import build_detector

        return build_detector(self.model, self.device, self.threads, self.rule)

    def load(self) -> tuple[Detector, Calibration]:
        """The model and its calibration.

        Raises:
            ArtifactError, CalibrationError: one of them cannot be used.
        """
        detector = self.detector()
        return detector, store.load(self.path, detector.fingerprint, self.rule.fingerprint)


def model_alone(model: Path, device: Device) -> Target:
    """A model that inspects everything, with the calibration in its folder."""
    from daemon.build import CALIBRATION

    return Target(model, model / CALIBRATION, Rule(), device.value, 0, f"--model {model}")


def find(
    model: Path | None, config: Path | None, station: str | None, device: Device, recipe: str | None = None
) -> Target:
    """Understand the options: a model, or a configuration, one of its stations and one of the station's recipes.

    Raises:
        ConfigError: the configuration, or one of its masks, is at fault.
    """
    from daemon.build import build_rule

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
    return Target(by.model, by.calibration_file, build_rule(by.regions), where, settings.threads, said)
