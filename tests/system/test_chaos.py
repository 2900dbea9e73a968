"""The record through chaos: a small one each time, the whole one on request (`make chaos` shows it with figures)."""

from pathlib import Path

import pytest
from rich.progress import Progress

from tests.brokers import find_mosquitto
from tests.system.chaos import PACE_S, PER_2000_PARTS, Kind, Plant, draw, judge, render_images, run

pytestmark = pytest.mark.skipif(
    find_mosquitto() is None, reason="mosquitto is not installed (apt-get install mosquitto mosquitto-clients)"
)


def broken_promises(folder: Path, model: Path, parts: int, counts: dict[Kind, int], pace_s: float) -> list[str]:
    breaks = draw(parts, counts, seed=1, pace_s=pace_s)
    with Plant(folder, model, disk=Kind.FULL in counts) as plant, Progress(disable=True) as progress:
        run(plant, parts, breaks, render_images(folder / "images"), pace_s, progress)
        return [f"{f.what}: {f.found}, not {f.promised}" for f in judge(plant) if f.kept is False]


def test_sixty_parts_survive_a_kill_a_restart_and_a_freeze(tmp_path: Path, model: Path) -> None:
    counts = {Kind.KILL: 1, Kind.RESTART: 1, Kind.FREEZE: 1}
    assert broken_promises(tmp_path, model, 60, counts, pace_s=0.08) == []


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_thousand_parts_survive_twenty_kills_and_all_that_can_break(tmp_path: Path, model: Path) -> None:
    assert broken_promises(tmp_path, model, 2000, {Kind.KILL: 20, **PER_2000_PARTS}, PACE_S) == []
