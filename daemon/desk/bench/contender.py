"""A contender, in a process of its own: measures itself when it is told to, and sleeps else.

It runs under a peer's Python too, so it starts with the standard library alone. It is given what to be as JSON:
`{"kind": "inspectd", "model": FOLDER, "engine": KEY, "device": NAME}`, or what `peer` says. Ready, it writes a line of
JSON; then each line it reads is answered by one:

    {"images": [FILE, ...]} → {"images": n}
    {"measure": n, "batch": b, "what": "memory"|"file"|"decode"} → {"ms": [...], "cpu_s": s, "rss_mb": m, "peak_mb": m}

`memory` is a prediction of images that are decoded already, `file` one of files, `decode` reading files and no more. It
ends with its input.
"""

import json
import os
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

LIBRARIES = ("inspectd", "anomalib", "torch", "openvino", "onnxruntime", "numpy", "pillow")


class Player(NamedTuple):
    """What competes: the name of what computes, how it reads a file, and how it judges images and files."""

    engine: str
    read: Callable[[str], Any]
    judge: Callable[[Sequence[Any]], object]
    judge_files: Callable[[Sequence[str]], object]


def play(order: dict[str, Any], out: TextIO) -> None:
    """Become what is ordered, and answer until the input ends."""
    if order["kind"] == "inspectd":
        load = _ours(order)
    else:
        load = runpy.run_path(str(Path(__file__).with_name("peer.py")))["prepare"](order)
    began = time.monotonic()
    player: Player = load()
    _say(out, {"load_s": time.monotonic() - began, "engine": player.engine, "versions": _versions(), **_memory()})
    files: list[str] = []
    images: list[Any] = []
    for line in sys.stdin:
        request = json.loads(line)
        if "images" in request:
            files = request["images"]
            images = [player.read(file) for file in files]
            _say(out, {"images": len(images)})
        else:
            what = {
                "memory": (player.judge, images),
                "file": (player.judge_files, files),
                "decode": (lambda some: [player.read(file) for file in some], files),
            }
            _say(out, _measure(*what[request["what"]], request["measure"], request["batch"]))


def _ours(order: dict[str, Any]) -> Callable[[], Player]:
    from daemon import images
    from daemon.build import build_detector
    from detectors.devices import leave_cores
    from detectors.engines.base import REFERENCE

    def load() -> Player:
        detector = build_detector(Path(order["model"]), order["device"], engine=order["engine"])
        if not detector.engine.startswith(REFERENCE):
            leave_cores()  # as the daemon does
        return Player(
            detector.engine,
            lambda file: images.read(Path(file)),
            detector.predict,
            lambda files: detector.predict([images.read(Path(file)) for file in files]),
        )

    return load


def _measure(judge: Callable[[Sequence[Any]], object], pool: Sequence[Any], times: int, batch: int) -> dict[str, Any]:
    """Once more than asked: the first does not count, since caches are cold after a sleep."""
    endless = cycle(pool)
    batches = [list(islice(endless, batch)) for _ in range(times + 1)]
    taken, used = [], []
    for some in batches:
        began = time.perf_counter()
        judge(some)
        taken.append((time.perf_counter() - began) * 1000)
        used.append(time.process_time())
    return {"ms": taken[1:], "cpu_s": used[-1] - used[0], **_memory()}


def _memory() -> dict[str, float]:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return {key: int(status[name].split()[0]) / 1024 for key, name in (("rss_mb", "VmRSS"), ("peak_mb", "VmHWM"))}


def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def _say(out: TextIO, answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    here = str(Path(__file__).parent)
    sys.path[:] = [place for place in sys.path if place != here]  # where a script lies is no place for modules
    mouth = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print; what is said here is read by a program
    play(json.loads(sys.argv[1]), mouth)
