"""Two minutes of a production line: parts, a model, a daemon, a broker, and a power cut.

    python -m demo [--data FOLDER_IN_MVTEC_LAYOUT] [--out build/demo]

Everything but the parts is real: the commands are the user's own, and the verdicts are read where a user would read
them, from MQTT. Exit status 0 if each part got exactly one verdict, 1 if not, or if something broke.
"""

import os
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, NoReturn

import cv2
import numpy as np
import typer
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.rule import Rule

from daemon import images, overlay
from daemon.dataset import DatasetError
from demo.broker import HOST, BrokerError, Choice, broker
from demo.child import Child
from demo.line import Line, Part, parts_of
from demo.parts import KINDS, write_dataset
from demo.report import Balance, Board, selection
from demo.subscriber import Subscriber

EPOCHS = 5
"""Enough for the rendered parts, which lie in place, and about a minute on two cores."""
SLOWEST_S, LOAD = 0.2, 0.6
"""At most five parts a second, for eyes, and no more than the machine can judge in this share of the time."""
MEASURED = 3
"""Parts that go one by one, to see how long one takes."""
START_S, VERDICT_S = 120.0, 30.0

_MARK = ".inspectd-demo"
_CONFIGURATION = """\
# A whole configuration; every other option has a default, see config/inspectd.toml.
node = "demo"
state_dir = "state"

[mqtt]
host = "{host}"
port = {port}
overlays = "all"

[[station]]
name = "flange"
model = "model"

[station.source]
type = "folder"
path = "incoming"
"""

console = Console(highlight=False)


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


class Stages:
    """Numbered headings, and the seconds that each stage took."""

    def __init__(self, number: int) -> None:
        self.seconds: dict[str, float] = {}
        self._number = number

    @contextmanager
    def stage(self, name: str, sentence: str) -> Iterator[None]:
        """Announce a stage and time it."""
        console.print()
        console.print(Rule(f"[bold]{len(self.seconds) + 1}/{self._number}  {name}[/]", align="left", style="dim"))
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
    """Run the demo."""
    _clear(out, data)
    stages = Stages(7)
    with ExitStack() as running:
        with stages.stage(
            "Broker", "Verdicts travel over MQTT, so there must be a broker; this one is the demo's own."
        ):
            serving = running.enter_context(broker(use, out))
            console.print(f"{serving.name} listens on {HOST}:{serving.port}.")

        if data is None:
            data = out / "data"
            number = train_good + test_good + per_defect * len(KINDS)
            epochs = epochs or EPOCHS
            with stages.stage("Parts", f"{number} pictures of steel flanges are rendered; few of them show a defect."):
                _render(data, train_good, test_good, per_defect, seed)
                parts = parts_of(data)
        else:
            with stages.stage("Parts", f"They are yours, from {data}."):
                parts = parts_of(data)
        good = sum(part.good for part in parts)
        console.print(f"For the line there are {good} good parts and {len(parts) - good} bad ones.")

        with stages.stage("Training", "The model sees good parts only, and gets its threshold from some held back."):
            length = [] if epochs is None else ["--epochs", str(epochs)]
            _inspectd("train", "--good", data / "train" / "good", "--out", out / "model", *length, "--seed", str(seed))

        with stages.stage("Daemon", "It watches a folder, judges what arrives, and publishes."):
            configuration = out / "inspectd.toml"
            configuration.write_text(_CONFIGURATION.format(host=HOST, port=serving.port), encoding="utf-8")
            line = Line(out / "incoming")
            subscriber = running.enter_context(Subscriber(serving.port))
            daemon = Child(_command("run", "--config", configuration), out / "daemon.log")
            _show("run", "--config", configuration)
            with console.status("starting"):
                running.enter_context(daemon)
                _await_online(subscriber, daemon)
            console.print(f"It is online, and says so on [bold]inspectd/flange/status[/]; its log is {daemon.log}.")

        random.Random(seed).shuffle(parts)
        by_id = {part.id: part for part in parts}
        disturbed = parts[-max(2, len(parts) // 5) :]
        undisturbed = parts[: -len(disturbed)]
        with stages.stage("Line", "Parts pass the camera; below is what a subscriber of inspectd/+/verdict sees."):
            with Live(Board(subscriber, by_id, line.dropped), console=console, refresh_per_second=8):
                interval_s = _measure(line, undisturbed[:MEASURED], subscriber, daemon)
                line.run(undisturbed[MEASURED:], interval_s)
                _await_verdicts(line, subscriber, daemon)
            console.print(f"There was a part every {1000 * interval_s:.0f} ms.")

        with stages.stage("Power cut", f"{len(disturbed)} more parts; the daemon is killed while they pass."):
            with Live(Board(subscriber, by_id, line.dropped), console=console, refresh_per_second=8):
                dark_s = _cut_power(line, disturbed, interval_s, subscriber, daemon)
                _await_verdicts(line, subscriber, daemon)
            console.print(f"kill -9, and started again: the daemon was online after {dark_s:.1f} s.")

        balance = Balance.draw(by_id, subscriber, line.dropped, undisturbed)
        sheet = out / "contact_sheet.png"
        with stages.stage("Pictures", "The anomaly maps of some parts, from the highest to the lowest score."):
            _picture(out, line, selection(by_id, subscriber.verdicts, good=12, per_defect=3), balance, sheet)

    summary = out / "summary.json"
    balance.write(
        summary,
        {
            "contact_sheet": str(sheet),
            "interval_ms": round(1000 * interval_s),
            "restart_s": round(dark_s, 1),
            "seed": seed,
            "data": str(data),
            "epochs": epochs,
            "seconds": stages.seconds,
            "versions": _versions(serving.name),
        },
    )
    console.print()
    console.print(balance.panel({"contact sheet": sheet, "figures": summary}))
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


def _render(folder: Path, train_good: int, test_good: int, per_defect: int, seed: int) -> None:
    """Render training and test parts at the same time, of different seeds, for these must not share a part."""
    orders: tuple[Mapping[str, int], ...] = (
        {"good": train_good, "test_good": 0, "per_kind": 0, "seed": 2 * seed},
        {"good": 0, "test_good": test_good, "per_kind": per_defect, "seed": 2 * seed + 1},
    )
    total = train_good + test_good + per_defect * len(KINDS)
    with ProcessPoolExecutor(2, get_context("spawn"), _be_modest) as pool, _progress() as bar:
        task = bar.add_task("rendering", total=total)
        jobs = [pool.submit(write_dataset, folder, **order) for order in orders]
        while wait(jobs, 0.2).not_done:
            bar.update(task, completed=_count(folder))
        for job in jobs:
            job.result()
        bar.update(task, completed=_count(folder))


def _be_modest() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # else each worker prints a traceback at Ctrl-C
    cv2.setNumThreads(1)


def _count(folder: Path) -> int:
    return sum(1 for path in folder.rglob("*.png") if not path.stem.endswith("_mask"))


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def _command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "daemon", *map(str, words)]


def _show(*words: str | Path, more: str = "") -> None:
    console.print(f"[cyan]$ inspectd {shlex.join(map(str, words))}{more}[/]", soft_wrap=True)


def _inspectd(*words: str | Path) -> None:
    """Show a command of `inspectd`, and run it before the user's eyes."""
    _show(*words)
    status = subprocess.run(_command(*words), check=False).returncode
    if status:
        raise DemoError(f"inspectd {words[0]} failed with exit status {status}")


def _await_online(subscriber: Subscriber, daemon: Child, after: str = "") -> None:
    """Wait for a daemon other than the one with boot id `after`."""

    def online() -> bool:
        status = subscriber.status
        return status is not None and status.online and status.boot_id != after

    _await(online, subscriber, daemon, START_S, "the daemon does not come online")


def _await_verdicts(line: Line, subscriber: Subscriber, daemon: Child) -> None:
    """Wait until each part on the line has a verdict, or for half a minute without a new one."""

    def judged() -> int:
        return len({verdict.part_id for verdict in subscriber.verdicts})

    found = -1
    while judged() < len(line.dropped) and found < judged():
        found = before = judged()

        def more(before: int = before) -> bool:
            return judged() > before

        with_patience = _waits(more, subscriber, daemon, VERDICT_S)
        if not with_patience:
            return


def _measure(line: Line, parts: Sequence[Part], subscriber: Subscriber, daemon: Child) -> float:
    """Send parts one by one; give the interval in seconds at which the machine keeps up."""
    for part in parts:
        line.drop(part)
        _await_verdicts(line, subscriber, daemon)
    infer_ms = [verdict.infer_ms for verdict in subscriber.verdicts]
    if not infer_ms:
        raise DemoError(f"no verdict came; {daemon.log} ends:\n{daemon.last_words()}")
    return max(SLOWEST_S, statistics.median(infer_ms) / 1000 / LOAD)


def _cut_power(line: Line, parts: Sequence[Part], interval_s: float, subscriber: Subscriber, daemon: Child) -> float:
    """Kill the daemon after a third of the parts and start it again at once; give the seconds until it is online."""
    before = subscriber.status
    killed_at = 0.0

    def passed(number: int) -> None:
        nonlocal killed_at
        if number == -(-len(parts) // 3):
            killed_at = time.monotonic()
            daemon.kill()
            daemon.start()

    line.run(parts, interval_s, passed)
    _await_online(subscriber, daemon, after=before.boot_id if before else "")
    return time.monotonic() - killed_at


def _await(done: Callable[[], bool], subscriber: Subscriber, daemon: Child, seconds: float, complaint: str) -> None:
    if not _waits(done, subscriber, daemon, seconds):
        raise DemoError(f"{complaint} within {seconds:.0f} s; {daemon.log} ends:\n{daemon.last_words()}")


def _waits(done: Callable[[], bool], subscriber: Subscriber, daemon: Child, seconds: float) -> bool:
    """Wait while the daemon lives."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if subscriber.wait(0.5, done):
            return True
        if not daemon.alive:
            raise DemoError(f"the daemon has ended; {daemon.log} ends:\n{daemon.last_words()}")
    return False


def _picture(out: Path, line: Line, chosen: Sequence[Part], balance: Balance, sheet: Path) -> None:
    """Have `inspectd predict` draw the overlays, and lay them out on one sheet."""
    inspected = [line.inspected(part) for part in chosen]
    words: list[str | Path] = ["predict", "--model", out / "model", "--overlays", out / "overlays"]
    _show(*words, more=" IMAGE …")
    with console.status("drawing"):
        drawn = subprocess.run(_command(*words, *inspected), capture_output=True, text=True, check=False)
    if drawn.returncode:
        raise DemoError(f"inspectd predict failed: {drawn.stderr.strip()}")
    tiles = [_reduced(images.read(out / "overlays" / f"{path.stem}.jpg")) for path in inspected]
    picture = overlay.contact_sheet(tiles, 6, f"inspectd demo · {balance.headline()}")
    _, png = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    sheet.write_bytes(png.tobytes())
    console.print(f"{len(tiles)} overlays are in {out / 'overlays'}, and together on {sheet}.")


def _reduced(picture: images.Image) -> images.Image:
    return np.asarray(cv2.resize(picture, None, fx=0.75, fy=0.75, interpolation=cv2.INTER_AREA), np.uint8)


def _versions(broker_name: str) -> dict[str, object]:
    return {
        "inspectd": version("inspectd"),
        "broker": broker_name,
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
    except (DemoError, BrokerError, DatasetError, OSError) as error:
        console.print(f"\n[red]demo:[/] {error}", markup=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
