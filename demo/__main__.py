"""A production line in a few minutes: parts, a model, a daemon, a broker, and a crash.

    python -m demo [--data FOLDER_IN_MVTEC_LAYOUT] [--out build/demo]

Everything but the parts is real: the commands are the user's own, and the verdicts are read where a user would read
them, from MQTT. Exit status 0 if each part got exactly one verdict, 1 if not, or if something broke.
"""

import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NoReturn

import cv2
import typer
from rich.console import Console
from rich.live import Live
from rich.rule import Rule

from daemon.desk.dataset import DatasetError
from demo.broker import HOST, Broker, BrokerError, Choice, broker
from demo.gallery import contact_sheet
from demo.plant import Plant, PlantError, parts_of
from demo.report import Balance, Board, selection
from demo.subscriber import Subscriber
from demo.workshop import Order, make
from detectors.base import Image

EPOCHS = 3
"""Enough for the rendered parts, which lie in place, and about a minute on two cores."""

_MARK = ".inspectd-demo"
_MEASURED = 3  # parts that go one by one
_STAGES = 7
_CONFIGURATION = """\
# A whole configuration; every other option has a default, see config/inspectd.toml.
node = "demo"
state_dir = "state"

[mqtt]
host = "{host}"
port = {port}
overlays = "all"

[[station]]
name = "cam1"
model = "model"

[station.source]
type = "folder"
path = "incoming"
"""

console = Console(highlight=False)


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


class Stages:
    """Numbered headings; `seconds` is what each stage took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, sentence: str) -> Iterator[None]:
        """Announce a stage and time it."""
        console.print()
        console.print(Rule(f"[bold]{len(self.seconds) + 1}/{_STAGES}  {name}[/]", align="left", style="dim"))
        console.print(sentence)
        began = time.monotonic()
        yield
        self.seconds[name.lower()] = round(time.monotonic() - began, 1)


def demo(
    data: Annotated[Path | None, typer.Option(help="Your own parts, in MVTec layout; default: rendered ones.")] = None,
    out: Annotated[Path, typer.Option(help="Folder to write, emptied first.")] = Path("build/demo"),
    seed: Annotated[int, typer.Option(help="Chooses the parts and their order.", min=0)] = 0,
    use: Annotated[Choice, typer.Option("--broker", help="The MQTT broker to run.")] = Choice.auto,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the good parts; default: by what the parts are.", min=1)
    ] = None,
    train_good: Annotated[int, typer.Option(help="Good parts to render for training.", min=3)] = 300,
    test_good: Annotated[int, typer.Option(help="Good parts to render for the line.", min=2)] = 60,
    per_defect: Annotated[int, typer.Option(help="Bad parts of each defect to render for the line.", min=1)] = 5,
) -> None:
    """Inspect parts on this machine, from training to a crash, and draw the balance."""
    _clear(out, data)
    stage = Stages()
    with ExitStack() as running:
        with stage("Broker", "Verdicts travel over MQTT; this broker is the demo's own."):
            serving = running.enter_context(broker(use, out))
            console.print(f"{serving.name} listens on {HOST}:{serving.port}.")
        if data is None:
            data, epochs = out / "data", epochs or EPOCHS
            with stage("Parts", "Pictures of steel flanges are rendered; a few of those for the line have a defect."):
                make(Order(train_good, test_good, per_defect, seed), data, console)
                parts = parts_of(data)
        else:
            with stage("Parts", f"They are yours, from {data}."):
                parts = parts_of(data)
        console.print(f"{sum(part.good for part in parts)} of {len(parts)} parts for the line are good.")
        with stage("Training", "The model sees good parts only; some are held back and set its threshold."):
            length = [] if epochs is None else ["--epochs", str(epochs)]
            _inspectd("train", "--good", data / "train" / "good", "--out", out / "model", "--seed", str(seed), *length)
        with stage("Daemon", "It watches a folder, judges what arrives, and publishes."):
            plant = _plant(out, serving)
            with console.status("starting"):
                running.enter_context(plant)
            console.print(f"It is online, as it says on inspectd/cam1/status; its log is {plant.daemon.log}.")

        random.Random(seed).shuffle(parts)
        last = max(1, len(parts) // 5)
        undisturbed, disturbed = parts[:-last], parts[-last:]
        with stage("Line", "Parts pass the camera; here is what a subscriber to inspectd/+/verdict sees."):
            with Live(Board(plant.subscriber, parts, plant.dropped), console=console, refresh_per_second=8):
                interval_s = plant.measure(undisturbed[:_MEASURED])
                plant.run(undisturbed[_MEASURED:], interval_s)
                plant.await_verdicts()
            console.print(f"A part came every {1000 * interval_s:.0f} ms.")
        with stage("Crash", f"While {last} more parts pass, the daemon is killed with kill -9 and started again."):
            with Live(Board(plant.subscriber, parts, plant.dropped), console=console, refresh_per_second=8):
                dark_s = plant.crash(disturbed, interval_s)
                plant.await_verdicts()
            console.print(f"It was back online after {dark_s:.1f} s, and judged what had come in the meantime.")

        balance = Balance.draw(parts, plant.subscriber.verdicts, plant.dropped, undisturbed)
        sheet = out / "contact_sheet.png"
        with stage("Pictures", "Good parts and each defect, from the highest score to the lowest, go on one sheet."):
            shown = selection(parts, plant.subscriber.verdicts, good=12, per_defect=3)
            with console.status(f"judging {len(shown)} parts again, for their anomaly maps"):
                _write(sheet, contact_sheet(shown, out / "model", f"inspectd · {balance.headline()}"))

    provenance = {
        "contact_sheet": str(sheet),
        "actuations": plant.subscriber.actuations,
        "overlays": plant.subscriber.pictures,
        "interval_ms": round(1000 * interval_s),
        "restart_s": round(dark_s, 1),
        "data": str(data),
        "epochs": epochs,
        "seed": seed,
        "seconds": stage.seconds,
        "versions": _versions(serving),
    }
    balance.write(out / "summary.json", provenance)
    console.print()
    console.print(balance.panel(plant.subscriber.pictures, {"contact sheet": sheet, "figures": out / "summary.json"}))
    raise typer.Exit(0 if balance.sound else 1)


def _clear(out: Path, data: Path | None) -> None:
    """Empty the folder, if it is ours."""
    if data is not None and data.resolve().is_relative_to(out.resolve()):
        raise DemoError(f"{data} lies in {out}, which is emptied first: choose another --out")
    if out.exists():
        if not (out / _MARK).exists() and any(out.iterdir()):
            raise DemoError(f"{out} holds files that are not the demo's: choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / _MARK).touch()


def _plant(out: Path, serving: Broker) -> Plant:
    configuration = out / "inspectd.toml"
    configuration.write_text(_CONFIGURATION.format(host=HOST, port=serving.port), encoding="utf-8")
    _show("run", "--config", configuration)
    command = _command("run", "--config", configuration)
    return Plant(command, out / "incoming", out / "daemon.log", Subscriber(serving.port))


def _command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "daemon", *map(str, words)]


def _show(*words: str | Path) -> None:
    console.print(f"[cyan]$ inspectd {shlex.join(map(str, words))}[/]", soft_wrap=True)


def _inspectd(*words: str | Path) -> None:
    """Show a command of `inspectd`, and run it before the user's eyes."""
    _show(*words)
    status = subprocess.run(_command(*words), check=False).returncode
    if status:
        raise DemoError(f"inspectd {words[0]} failed with exit status {status}")


def _write(path: Path, picture: Image) -> None:
    _, png = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    path.write_bytes(png.tobytes())


def _versions(serving: Broker) -> dict[str, object]:
    return {
        "inspectd": version("inspectd"),
        "broker": serving.name,
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": version("torch"),
        "cores": os.cpu_count(),
    }


def main() -> NoReturn:
    """Run the demo from the command line."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))  # leaves through every context, which ends the children
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(demo)
    try:
        app()
    except (DemoError, BrokerError, PlantError, DatasetError, OSError) as error:
        console.print(f"\ndemo: {error}", markup=False, style="red")
    sys.exit(1)


if __name__ == "__main__":
    main()
