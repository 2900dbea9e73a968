"""The command line: runs the daemon, and turns known errors into a message and an exit status.

Exit statuses: 0 done; 1 failed; 2 wrong options; 78 a configuration, a model or a calibration that a person must
correct (systemd does not restart on it).
"""

import logging
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from calibration.calibration import CalibrationError
from config import reference
from config.load import ConfigError, load
from daemon import logs
from daemon.desk import archiving, auditing, calibrating, commands, doctor, exporting, sources
from daemon.desk.bench.command import bench
from daemon.desk.dataset import DatasetError
from daemon.images import UndecodableError
from daemon.outbox import OutboxError
from daemon.regions import MaskError
from daemon.sources.base import SourceUnavailableError
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
    calibrating.calibrate,
    exporting.export,
    commands.evaluate,
    commands.predict,
    commands.compare,
    bench,
    commands.schema,
    doctor.check,
    doctor.doctor,
):
    app.command()(command)
app.add_typer(calibrating.calibrations, name="calibrations")
app.add_typer(sources.app, name="sources")
app.add_typer(archiving.app, name="archive")
app.add_typer(auditing.app, name="audit")

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
    except doctor.UnsoundError as error:
        if out.is_terminal:  # who reads it has it before his eyes
            sys.exit(error.status)
        _leave(str(error), error.status)
    except (ConfigError, ArtifactError, CalibrationError, MaskError) as error:
        _leave(str(error), EXIT_CONFIG)
    except (DatasetError, UndecodableError, OutboxError, SourceUnavailableError, OSError) as error:
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
    service.run(partial(load, config), service.heed_signals())


@app.command()
def settings() -> None:
    """Print all options of the configuration file, as a page of Markdown."""
    typer.echo(reference.page().rstrip())


def _leave(message: str, status: int) -> NoReturn:
    err.print(f"inspectd: {message}", markup=False, soft_wrap=True)
    sys.exit(status)
