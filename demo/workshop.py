"""Where the rendered parts are made, by two processes at a time."""

import signal
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import cv2
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from demo.parts import KINDS, write_dataset


@dataclass(frozen=True, slots=True)
class Order:
    """How many parts to make: good ones for training, good ones for the line, bad ones of each defect for the line."""

    train_good: int
    test_good: int
    per_defect: int
    seed: int


def make(order: Order, folder: Path, console: Console) -> None:
    """Render the parts into a folder in MVTec layout, with a progress bar.

    Raises:
        OSError: a file cannot be written.
    """
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    seed = 2 * order.seed  # training and line have a seed each, for they must not share a part
    with ProcessPoolExecutor(2, get_context("spawn"), _be_modest) as pool, bar:
        task = bar.add_task("rendering", total=order.train_good + order.test_good + order.per_defect * len(KINDS))
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # workers are born so, until they are modest
        try:
            jobs = [
                pool.submit(write_dataset, folder, good=order.train_good, test_good=0, per_kind=0, seed=seed),
                pool.submit(
                    write_dataset, folder, good=0, test_good=order.test_good, per_kind=order.per_defect, seed=seed + 1
                ),
            ]
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        rendering = True
        while rendering:
            rendering = bool(wait(jobs, 0.2).not_done)
            bar.update(task, completed=sum(not path.stem.endswith("_mask") for path in folder.rglob("*.png")))
        for job in jobs:
            job.result()


def _be_modest() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # else each worker prints a traceback at Ctrl-C
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    cv2.setNumThreads(1)
