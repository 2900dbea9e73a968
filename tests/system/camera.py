"""A camera dies and comes back while the daemon inspects: is every frame accounted for, and is its death known at once?

    python -m tests.system.camera [--seconds 300] [--deaths 3] [--loss 5] [--json FILE]

Aravis' simulator is the camera, 25 frames a second over real sockets, `--loss N` of a thousand packets lost; the daemon
is the installed program with a small model, learned from what the camera shows. What its subscriber hears is compared
with the camera's own count of frames, which the verdicts carry. Ends with status 1 if a promise was broken.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from paho.mqtt.publish import single
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tests.brokers import HOST, Subscriber, mosquitto
from tests.cameras import ADDRESS, Simulator
from tests.system.test_daemon import Daemon

SOURCE = f"""
[station.source]
type = "genicam"
camera = "{ADDRESS}"
overflow = "drop"
"""
LARGEST_ID = 65_535
"""GigE Vision's count of frames goes from here to 1."""
DOWN_S = 2.0
"""How long a dead camera stays dead."""


@dataclass(slots=True)
class Seen:
    """What a subscriber saw; times are seconds.

    `noticed` and `back` are from each death to the state that says so, and from the camera's return to the first
    verdict on what it sees.
    """

    verdicts: list[dict[str, Any]]
    stats: dict[str, Any]
    noticed: list[float] = field(default_factory=list)
    back: list[float] = field(default_factory=list)
    silent: list[tuple[float, float]] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        """What is not as promised, in words; times apart."""
        return [*self._in_the_record(), *self._in_the_accounts()]

    def _in_the_record(self) -> Iterator[str]:
        if [verdict["seq"] for verdict in self.verdicts] != list(range(1, len(self.verdicts) + 1)):
            yield "seq has gaps"
        if len({verdict["id"] for verdict in self.verdicts}) != len(self.verdicts):
            yield "a frame has two verdicts"
        for died, known in self.silent:
            if wrong := [v["seq"] for v in self.verdicts if died + 0.5 < v["capture_ts_ms"] / 1000 < known]:
                yield f"verdicts {wrong} are on frames of a dead camera"

    def _in_the_accounts(self) -> Iterator[str]:
        stats, dropped = self.stats, sum(self.stats["dropped"].values())
        if stats["inspected"] != len(self.verdicts):
            yield f"{stats['inspected']} are said to be inspected, and {len(self.verdicts)} verdicts came"
        if stats["frames_in"] != stats["inspected"] + dropped or stats["pending"]:
            yield f"frames_in does not add up: {stats}"
        if self.missing != dropped:
            yield f"the camera's count misses {self.missing} frames, and {stats['dropped']} are said to be dropped"

    @property
    def missing(self) -> int:
        """Frames between the first and the last of each life of the camera that have no verdict."""
        missing = 0
        for earlier, later in pairwise(self.verdicts):
            between = earlier["capture_ts_ms"] / 1000, later["capture_ts_ms"] / 1000
            if not any(between[0] < returned < between[1] for _, returned in self.silent):
                missing += (later["frame_id"] - earlier["frame_id"]) % LARGEST_ID - 1
        return missing


def learn(config: Path, folder: Path) -> None:
    """Let the daemon's own commands look through the camera, and learn what it shows."""
    program = Path(sys.executable).with_name("inspectd")
    for command in (
        ["sources", "grab", "--config", config, "--out", folder / "good", "--count", "24"],
        ["train", "--good", folder / "good", "--out", folder / "m", "--size", "64", "--epochs", "2"],
    ):
        done = subprocess.run([program, *map(str, command)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def watch(folder: Path, simulator: Simulator, seconds: float, deaths: int, *arguments: str) -> Seen:
    """Let the daemon look through the camera for so long, and kill the camera so often meanwhile."""
    with ExitStack() as stack:
        broker = mosquitto(folder)
        broker.start()
        stack.callback(broker.stop)
        simulator.start(*arguments)
        daemon = Daemon(folder, folder / "m", broker.port)
        daemon.config.write_text(daemon.config.read_text().partition("[station.source]")[0] + SOURCE)
        learn(daemon.config, folder)
        ear = stack.enter_context(closing(Subscriber(broker.port, "inspectd/cam1/#")))
        daemon.start()
        stack.callback(lambda: daemon.alive and daemon.end(signal.SIGKILL))
        seen = Seen([], {})
        _wait(ear, 60, lambda: ear.of("verdict"), "the first verdict")
        for _ in range(deaths):
            time.sleep(seconds / (deaths + 1))
            died = time.time()
            simulator.kill()
            known = _wait(ear, 20, lambda died=died: _told(ear, "offline", died), "the death to be noticed")  # type: ignore[misc]
            time.sleep(DOWN_S)
            simulator.start(*arguments)
            returned = time.time()
            _wait(ear, 20, lambda returned=returned: _told(ear, "online", returned), "the return to be noticed")  # type: ignore[misc]
            first = _wait(ear, 20, lambda returned=returned: _after(ear, returned), "a verdict after it")  # type: ignore[misc]
            seen.noticed.append(known - died)
            seen.back.append(first - returned)
            seen.silent.append((died, returned))
        time.sleep(seconds / (deaths + 1))
        _ask(broker.port, "stop")
        _wait(ear, 20, lambda: ear.of("state")[-1].content["state"] == "Ready", "the end")
        time.sleep(0.5)
        before = len(ear.of("stats"))
        _ask(broker.port, "republish")
        _wait(ear, 20, lambda: len(ear.of("stats")) > before, "the figures")
        seen.stats = ear.of("stats")[-1].content
        seen.verdicts = [message.content for message in ear.of("verdict")]
        daemon.end()
    return seen


def _ask(port: int, action: str) -> None:
    single("inspectd/cam1/cmd/request", json.dumps({"cmd_id": action, "action": action}), 1, hostname=HOST, port=port)


def _told(ear: Subscriber, camera: str, since: float) -> float:
    return next(
        (
            message.content["ts_ms"] / 1000
            for message in ear.of("state")
            if message.content["camera"] == camera and message.content["ts_ms"] / 1000 > since
        ),
        0.0,
    )


def _after(ear: Subscriber, since: float) -> float:
    return next((v.content["ts_ms"] / 1000 for v in ear.of("verdict") if v.content["ts_ms"] / 1000 > since), 0.0)


def _wait(ear: Subscriber, seconds: float, condition: Callable[[], Any], what: str) -> Any:
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, f"still waiting for {what}; {len(ear.messages)} messages came"
        time.sleep(0.02)
    return value


def main(
    seconds: Annotated[float, typer.Option(help="How long to look.")] = 300.0,
    deaths: Annotated[int, typer.Option(help="How often the camera dies.")] = 3,
    loss: Annotated[int, typer.Option(help="Packets of a thousand that are lost.")] = 0,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
) -> None:
    """Show the figures."""
    simulator = Simulator()
    try:
        seen = watch(Path(tempfile.mkdtemp()), simulator, seconds, deaths, *(("-r", str(loss)) if loss else ()))
    finally:
        simulator.close()
    reasons = [verdict["reason"] for verdict in seen.verdicts]
    figures = {
        "verdicts": len(seen.verdicts),
        "of incomplete frames": reasons.count("incomplete_frame"),
        "dropped": {cause: number for cause, number in seen.stats["dropped"].items() if number},
        "missing by the camera's own count": seen.missing,
        "p50, p99 ms": (seen.stats["p50_ms"], seen.stats["p99_ms"]),
        "death known after s": [round(value, 2) for value in seen.noticed],
        "first verdict after return s": [round(value, 2) for value in seen.back],
    }
    table = Table("figure", "value", box=SIMPLE_HEAD)
    for name, value in figures.items():
        table.add_row(name, str(value))
    Console().print(table)
    for fault in seen.faults:
        Console().print(f"[red]broken[/]  {fault}")
    if json_:
        json_.write_text(json.dumps({**asdict(seen), "figures": figures}, indent=1))
    raise typer.Exit(bool(seen.faults))


if __name__ == "__main__":
    typer.run(main)
