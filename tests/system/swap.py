"""Models that change while a line runs: is a part lost, how long do parts wait, how soon is a recipe prepared?

    python -m tests.system.swap [--swaps 10] [--size 256] [--share 0.6] [--json FILE]

The installed daemon judges parts that come at a steady pace, a share of what it can. Meanwhile the configuration names
another model and SIGHUP says so, again and again. Then a PLC prepares recipes: those in memory, and those that must be
loaded first. Ends with status 1 if a part was lost or judged twice, if seq has a gap, or if a recipe in memory took
200 ms or more.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, closing
from itertools import count, pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tests.brokers import Subscriber, eventually, mosquitto
from tests.system.conftest import write_part
from tests.system.test_daemon import Daemon

PREPARED_MS = 200.0
"""A recipe in memory is to be prepared within this."""
ASKED = 20
"""Recipes that the PLC prepares, of each kind."""
WARM_UP = 30
PATIENCE_S = 120.0


class Line:
    """A daemon with two models, parts that come, and who listens."""

    def __init__(self, folder: Path, size: int, stack: ExitStack) -> None:
        self.folder = folder
        broker = mosquitto(folder)
        broker.start()
        stack.callback(broker.stop)
        self.models = [_train(folder, f"model{n}", size, seed=n) for n in range(2)]
        self.daemon = Daemon(folder, self.models[0], broker.port)
        self.ear = stack.enter_context(closing(Subscriber(broker.port, "inspectd/cam1/#")))
        self.daemon.start()
        stack.callback(lambda: self.daemon.alive and self.daemon.end(signal.SIGKILL))
        self.ear.wait(lambda: self.ear.of("birth"), "the daemon to run", PATIENCE_S)
        self._part = (folder / "good/000.png").read_bytes()
        self._feeder: threading.Thread | None = None
        self._stop = threading.Event()
        self.dropped = 0

    def drop(self) -> None:
        hidden = self.daemon.incoming / f".{self.dropped}"
        hidden.write_bytes(self._part)
        hidden.rename(self.daemon.incoming / f"part{self.dropped:06}.png")
        self.dropped += 1

    def feed(self, pace_s: float) -> None:
        """Let a part come every so many seconds from now on."""

        def run() -> None:
            began = time.monotonic()
            for number in count(1):
                self.drop()
                if self._stop.wait(max(0.0, began + number * pace_s - time.monotonic())):
                    return

        self._stop.clear()
        self._feeder = threading.Thread(target=run)
        self._feeder.start()

    def rest(self) -> None:
        """Let no part come any more, and wait for the verdicts of all."""
        self._stop.set()
        if self._feeder is not None:
            self._feeder.join()
        self.wait(self.dropped)

    def wait(self, parts: int) -> None:
        eventually(lambda: len(self.ear.of("verdict")) >= parts, f"{parts} verdicts", PATIENCE_S)

    @property
    def reloads(self) -> list[dict[str, Any]]:
        return [event for m in self.ear.of("event") if (event := m.content)["kind"] == "reload"]

    def swap(self, to: int) -> tuple[float, float]:
        """Put the other model in force; the moments, UTC, when that began and was done."""
        self.daemon.config.write_text(
            self.daemon.config.read_text().replace(str(self.models[1 - to]), str(self.models[to]))
        )
        before, began = len(self.reloads), time.time()
        os.kill(self.daemon.pid, signal.SIGHUP)
        self.ear.wait(lambda: len(self.reloads) > before, "the other model", PATIENCE_S)
        if self.reloads[-1]["subject"] != "done":
            raise SystemExit(self.reloads[-1]["detail"])
        return began, time.time()


def _train(folder: Path, name: str, size: int, seed: int) -> Path:
    good = folder / "good"
    if not good.exists():
        for number in range(24):
            write_part(good / f"{number:03d}.png", number)
    out = folder / name
    command = [str(Path(sys.executable).with_name("inspectd")), "train", "--good", str(good), "--out", str(out)]
    subprocess.run(
        [*command, "--size", str(size), "--epochs", "1", "--seed", str(seed)], check=True, capture_output=True
    )
    return out


def measure_swaps(line: Line, swaps: int, share: float) -> dict[str, Any]:
    """Parts before, while and after models change."""
    for _ in range(WARM_UP):
        line.drop()
    line.wait(WARM_UP)
    began = time.monotonic()
    for _ in range(WARM_UP):
        line.drop()
    line.wait(2 * WARM_UP)
    capacity = WARM_UP / (time.monotonic() - began)
    line.feed(1 / (share * capacity))
    time.sleep(10)
    windows = []
    for number in range(swaps):
        windows.append(line.swap((number + 1) % 2))
        time.sleep(3)
    line.rest()
    verdicts = [message.content for message in line.ear.of("verdict")]
    steady = [v for v in verdicts if v["seq"] > 2 * WARM_UP]
    during: list[float] = []
    apart: list[float] = []
    for verdict in steady:
        decided = verdict["ts_ms"] / 1000
        inside = any(begin <= decided <= end + 0.2 for begin, end in windows)
        (during if inside else apart).append(verdict["latency_ms"]["total"])
    models = [verdict["model_sha256"] for verdict in sorted(verdicts, key=lambda v: int(v["seq"]))]
    return {
        "parts": line.dropped,
        "verdicts": len({verdict["id"] for verdict in verdicts}),
        "gapless": sorted(verdict["seq"] for verdict in verdicts) == list(range(1, line.dropped + 1)),
        "changes": sum(one != other for one, other in pairwise(models)),
        "capacity": capacity,
        "swap_s": [end - begin for begin, end in windows],
        "during_ms": during,
        "apart_ms": apart,
    }


def measure_recipes(line: Line, held: int) -> list[float]:
    """Milliseconds from a PLC's command to the answer that a recipe is prepared."""
    line.daemon.end()
    head, _, _ = line.daemon.config.read_text().partition("[[station]]")
    recipes = "".join(f'[[station.recipe]]\nname = "r{n}"\nmodel = "{m}"\n' for n, m in enumerate(line.models))
    line.daemon.config.write_text(
        f'{head}[[station]]\nname = "cam1"\nrecipes_held = {held}\n'
        f'[station.source]\ntype = "folder"\npath = "incoming"\n{recipes}'
    )
    births = len(line.ear.of("birth"))
    line.daemon.start()
    line.ear.wait(lambda: len(line.ear.of("birth")) > births, "the daemon to run", PATIENCE_S)
    taken = []
    for number in range(ASKED):
        name = f"{held}-{number}-{time.time()}"
        began = time.monotonic()
        line.ear.publish(
            "inspectd/cam1/cmd/request",
            json.dumps({"cmd_id": name, "action": "prepare_recipe", "args": {"recipe": f"r{(number + 1) % 2}"}}),
        )

        def done(name: str = name) -> bool:
            answers = [m.content for m in line.ear.of("cmd/response")]
            return any(answer["cmd_id"] == name and answer["result"] == "DONE" for answer in answers)

        line.ear.wait(done, "the recipe", PATIENCE_S)
        taken.append((time.monotonic() - began) * 1000)
    return taken


def main(
    swaps: Annotated[int, typer.Option(help="How often the model changes.")] = 10,
    size: Annotated[int, typer.Option(help="Side of the images that the models see.")] = 256,
    share: Annotated[float, typer.Option(help="Of what the daemon can judge, so much comes.")] = 0.6,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
) -> None:
    """Show the figures."""
    folder = Path(tempfile.mkdtemp())
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        line = Line(folder, size, stack)
        seen = measure_swaps(line, swaps, share)
        held, loaded = measure_recipes(line, 8), measure_recipes(line, 1)
    table = Table("", "number", "p50", "p99", "most", box=SIMPLE_HEAD)
    rows = {
        "latency apart from swaps, ms": seen["apart_ms"],
        "latency while a model is swapped, ms": seen["during_ms"],
        "a swap by SIGHUP, s": seen["swap_s"],
        "a recipe in memory, ms": held,
        "a recipe to be loaded, ms": loaded,
    }
    for name, values in rows.items():
        p50, p99 = np.percentile(values, [50, 99])
        table.add_row(name, str(len(values)), f"{p50:.2f}", f"{p99:.2f}", f"{max(values):.2f}")
    out = Console()
    out.print(table)
    out.print(
        f"{seen['parts']} parts at {share:.0%} of {seen['capacity']:.1f} a second, {seen['verdicts']} verdicts, "
        f"{seen['changes']} changes of the model, seq without gaps: {seen['gapless']}"
    )
    if json_ is not None:
        json_.write_text(json.dumps({**seen, "held_ms": held, "loaded_ms": loaded}))
    whole = seen["parts"] == seen["verdicts"] and seen["gapless"] and seen["changes"] == swaps
    if not whole or max(held) >= PREPARED_MS:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
