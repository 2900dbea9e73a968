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

from calibration import store
from calibration.calibration import CalibrationError, promise, shortage
from config.credentials import read_credentials
from config.load import ConfigError, load
from config.schema import FolderSource, GenicamSource, Mqtt, Recipe, Settings, Station, is_loopback
from daemon import logs
from daemon.desk import calibrating, commands, sources
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
    commands.evaluate,
    commands.predict,
    commands.compare,
    commands.schema,
):
    app.command()(command)
app.add_typer(calibrating.calibrations, name="calibrations")
app.add_typer(sources.app, name="sources")

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
    stop = service.stop_on_signals()
    service.run(load(config), stop)


@app.command()
def check(config: ConfigOption) -> None:
    """Try everything `run` needs but the broker and the camera; exit status 78 if something is wrong."""
    from daemon.build import place_of

    settings = load(config)
    faults: list[str] = []
    _tell("[green]ok[/]  ", f"{config}: {len(settings.stations)} station(s)")
    try:
        read_credentials(settings.mqtt)
    except ConfigError as error:
        faults += str(error).splitlines()
    else:
        _tell_broker(settings.mqtt)
    state = next(p for p in (settings.state_dir, *settings.state_dir.parents) if p.exists())
    if not state.is_dir() or not os.access(state, os.W_OK | os.X_OK):
        faults.append(f"state_dir: {settings.state_dir} cannot be written by this user; give it to the daemon's")
    for station in settings.stations:
        framing = _check_framing(station, faults)
        for recipe in station.recipes:
            place = f"station {station.name}" + (f", recipe {recipe.name}" if station.own_recipes else "")
            try:
                _check_judgement(place, recipe, settings, framing)
            except (ArtifactError, CalibrationError, ConfigError) as error:
                faults.append(f"{place}: {error}")
        try:
            _check_source(station)
        except (SourceUnavailableError, ConfigError) as error:
            faults.append(f"station {station.name}: {error}")
        else:
            said = f"{station.source.type} {place_of(station.source)}"
            _tell("[green]ok[/]  ", f"station {station.name}: {said}")
    if faults:
        raise ConfigError("\n".join(f"{config}: {fault}" for fault in faults))


def _check_framing(station: Station, faults: list[str]) -> str | None:
    """Give the fingerprint of a station's framing; None, and a fault more, where it cannot be used."""
    from daemon.build import build_framing

    try:
        return build_framing(station.framing).fingerprint
    except ConfigError as error:
        faults.append(f"station {station.name}: {error}")
        return None


def _check_source(station: Station) -> None:
    """See whether a source can be used, as far as that is known without taking a part from it."""
    from daemon.sources.folder.source import examine
    from daemon.sources.genicam.camera import require_library

    match station.source:
        case FolderSource() as source:
            examine(source.path, writable=source.keep == "move")
        case GenicamSource():
            require_library()
        case _:
            pass


def _tell_broker(mqtt: Mqtt) -> None:
    """Say where verdicts would go, how safely, and as whom; nothing that is secret."""
    user = "without a user name" if mqtt.username is None else f"as user {mqtt.username}"
    if mqtt.tls is None:
        safe, how = is_loopback(mqtt.host), "without TLS"
    else:
        safe, how = mqtt.tls.verify_host_name, "by TLS"
        if mqtt.tls.certificate_file is not None:
            user += f", with the certificate {mqtt.tls.certificate_file}"
        if not safe:
            how += " without verifying its host name"
    _tell("[green]ok[/]  " if safe else "[yellow]weak[/]", f"broker {mqtt.host}:{mqtt.port} {how}, {user}")


def _check_judgement(place: str, recipe: Recipe, settings: Settings, framing: str | None) -> None:
    """Load what judges the parts at a place, and say what it promises; the framing is None where it is at fault."""
    from daemon.build import build_detector, build_rule

    rule = build_rule(recipe.regions)
    detector = build_detector(recipe.model, settings.device, settings.threads, rule)
    calibration = store.load(recipe.calibration_file, detector.fingerprint, rule.fingerprint, framing)
    missing, made = shortage(calibration), calibration.provenance
    mark = "[yellow]weak[/]" if missing else "[green]ok[/]  "
    _tell(mark, f"{place}: model {recipe.model}, {promise(calibration)}")
    if missing:
        _tell(mark, f"{place}: {missing}")
    if made.engine != detector.engine:
        _tell(
            "[yellow]weak[/]",
            f"{place}: calibrated with {made.engine}, inspects with {detector.engine}; scores may "
            "differ in their last digits",
        )


def _tell(mark: str, text: str) -> None:
    out.print(f"{mark}  {escape(text)}", soft_wrap=True)


def _leave(message: str, status: int) -> NoReturn:
    err.print(f"inspectd: {message}", markup=False, soft_wrap=True)
    sys.exit(status)
