"""The command line: runs the daemon, and turns known errors into a message and an exit status.

Exit statuses: 0 done; 1 failed; 2 wrong options; 78 a configuration, a model or a calibration that a person must
correct (systemd does not restart on it).
"""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.markup import escape

from calibration.calibration import CalibrationError
from calibration.quantile import smallest_sample
from config.load import ConfigError, load, read_password
from daemon import logs
from daemon.desk import commands
from daemon.desk.dataset import DatasetError
from daemon.desk.report import ReportError
from daemon.images import UndecodableError
from daemon.outbox import OutboxError
from daemon.terminal import EXIT_CONFIG, EXIT_FAILED, err, out
from detectors.base import ArtifactError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Visual inspection for production lines: learn good parts, calibrate a threshold, publish verdicts over MQTT.",
)
for command in (
    commands.train,
    commands.distill_teacher,
    commands.calibrate,
    commands.evaluate,
    commands.predict,
    commands.compare,
):
    app.command()(command)

ConfigOption = Annotated[Path, typer.Option("--config", help="Configuration file.")]


def main() -> NoReturn:
    """Run `inspectd`."""
    logging.captureWarnings(capture=True)
    try:
        status = app(standalone_mode=False)
    except typer.Abort:
        _leave("interrupted", 130)
    except KeyboardInterrupt:
        _leave("interrupted", 130)
    except (ConfigError, ArtifactError, CalibrationError) as error:
        _leave(str(error), EXIT_CONFIG)
    except (DatasetError, UndecodableError, OutboxError, ReportError, OSError) as error:
        _leave(str(error), EXIT_FAILED)
    except Exception as error:
        if not hasattr(error, "exit_code"):
            raise  # a bug: its traceback is the best message
        if hasattr(error, "format_message"):
            _leave(f"{error.format_message()}\nTry 'inspectd --help'.", error.exit_code)
        sys.exit(error.exit_code)
    sys.exit(status if isinstance(status, int) else 0)


@app.command()
def run(config: ConfigOption) -> None:
    """Inspect what arrives, until SIGTERM or Ctrl-C."""
    from daemon import service

    logs.configure()
    stop = service.stop_on_signals()
    service.run(load(config), stop)


@app.command()
def check(config: ConfigOption) -> None:
    """Try everything `run` needs but the broker and the camera; exit status 78 if something is wrong."""
    from daemon.build import build_detector, load_calibration
    from daemon.sources.base import SourceUnavailableError
    from daemon.sources.folder import examine

    settings = load(config)
    faults: list[str] = []
    try:
        read_password(settings.mqtt)
    except ConfigError as error:
        faults.append(str(error))
    state = next(p for p in (settings.state_dir, *settings.state_dir.parents) if p.exists())
    if not state.is_dir() or not os.access(state, os.W_OK | os.X_OK):
        faults.append(f"state_dir: {settings.state_dir} cannot be written by this user; give it to the daemon's")
    _tell("[green]ok[/]  ", f"{config}: {len(settings.stations)} station(s), broker {settings.mqtt.host}")
    for station in settings.stations:
        try:
            detector = build_detector(station.model, settings.device, settings.threads)
            calibration = load_calibration(station.model, detector)
        except (ArtifactError, CalibrationError) as error:
            faults.append(f"station {station.name}: {error}")
        else:
            asked, carried = calibration.alpha, calibration.alpha_carried
            need = "" if calibration.carries else f"; {asked:.2%} needs {smallest_sample(asked)}"
            _tell(
                "[green]ok[/]  " if calibration.carries else "[yellow]weak[/]",
                f"station {station.name}: model {station.model}, {calibration.good_parts} good parts carry "
                f"α = {carried:.2%}{need}",
            )
        try:
            examine(station.source.path)
        except SourceUnavailableError as error:
            faults.append(f"station {station.name}: {error}")
        else:
            _tell("[green]ok[/]  ", f"station {station.name}: folder {station.source.path}")
    if faults:
        raise ConfigError("\n".join(f"{config}: {fault}" for fault in faults))


def _tell(mark: str, text: str) -> None:
    out.print(f"{mark}  {escape(text)}", soft_wrap=True)


def _leave(message: str, status: int) -> NoReturn:
    err.print(f"inspectd: {message}", markup=False, soft_wrap=True)
    sys.exit(status)
