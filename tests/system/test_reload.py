"""The configuration read anew while parts come: models, thresholds and recipes change, no part is lost."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.brokers import Broker, Subscriber
from tests.system.conftest import Run, write_part
from tests.system.test_daemon import Daemon, verdicts


@pytest.fixture(scope="module")
def other(inspectd: Run, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same parts."""
    folder = tmp_path_factory.mktemp("models") / "other"
    done = inspectd("train", "--good", data / "train/good", "--out", folder, "--size", "64", "--epochs", "1")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def line(tmp_path: Path, model: Path, mosquitto: Callable[..., Broker]) -> Iterator["Line"]:
    broker = mosquitto()
    subscriber = Subscriber(broker.port, "inspectd/cam1/#")
    made = Line(Daemon(tmp_path, model, broker.port), subscriber)
    made.daemon.start()
    subscriber.wait(lambda: subscriber.of("birth"), "the daemon to run")
    yield made
    if made.daemon.alive:
        made.daemon.end(signal.SIGKILL)
    subscriber.close()


class Line:
    """A daemon at work, and who listens to it."""

    def __init__(self, daemon: Daemon, subscriber: Subscriber) -> None:
        self.daemon = daemon
        self._subscriber = subscriber
        self._dropped = 0

    def edit(self, change: Callable[[str], str]) -> None:
        config = self.daemon.config
        config.write_text(change(config.read_text()))

    def reload(self) -> dict[str, Any]:
        """Send SIGHUP; give the event that says what came of it."""
        told = len(self.events)
        os.kill(self.daemon.pid, signal.SIGHUP)
        self._subscriber.wait(lambda: len(self.events) > told, "an event about the new configuration")
        return self.events[-1]

    def judge(self, count: int = 1) -> list[dict[str, Any]]:
        """Drop parts; give their verdicts."""
        first = self._dropped
        for number in range(first, first + count):
            self.drop(number)
        self._dropped += count
        self.wait(self._dropped)
        return self.verdicts[first : first + count]

    def drop(self, number: int) -> None:
        write_part(self.daemon.incoming / f"part{number:04}.png", number)

    def wait(self, count: int) -> None:
        self._subscriber.wait(lambda: len(self.verdicts) >= count, f"{count} verdicts")

    @property
    def verdicts(self) -> list[dict[str, Any]]:
        return sorted(verdicts(self._subscriber).values(), key=lambda verdict: int(verdict["seq"]))

    @property
    def events(self) -> list[dict[str, Any]]:
        return [event for m in self._subscriber.of("event") if (event := m.content)["kind"] == "reload"]

    @property
    def births(self) -> list[dict[str, Any]]:
        return [message.content for message in self._subscriber.of("birth")]


def fingerprint(model: Path) -> str:
    return str(json.loads((model / "calibration.json").read_text())["provenance"]["model"])[:12]


def test_a_new_model_takes_the_place_of_the_old_between_two_parts_of_a_running_line(
    line: Line, model: Path, other: Path
) -> None:
    line.judge(5)
    line.edit(lambda text: text.replace(str(model), str(other)))
    os.kill(line.daemon.pid, signal.SIGHUP)
    number = 5
    while not line.events or number < 40:  # parts come all the time
        line.drop(number)
        number += 1
        time.sleep(0.05)
    line.drop(number)
    line.wait(number + 1)
    assert line.events[-1]["subject"] == "done"
    assert fingerprint(model) in line.events[-1]["detail"]
    assert fingerprint(other) in line.events[-1]["detail"]
    found = line.verdicts
    assert [verdict["seq"] for verdict in found] == list(range(1, number + 2))
    assert {verdict["part_id"] for verdict in found} == {f"part{n:04}" for n in range(number + 1)}
    models = [verdict["model_sha256"] for verdict in found]
    assert {fingerprint(model), fingerprint(other)} == set(models)
    assert sorted(models, key=lambda sha: sha == fingerprint(other)) == models, "the models took turns"
    births = [birth["config_sha256"] for birth in line.births]
    assert len(set(births)) == 2


def test_a_file_that_is_wrong_changes_nothing_and_says_why(line: Line, model: Path) -> None:
    before = line.judge()[0]
    line.edit(lambda text: text + "\nno TOML")
    told = line.reload()
    assert told["subject"] == "refused"
    assert "is not TOML" in told["detail"]
    line.edit(lambda text: text.replace("\nno TOML", "").replace(str(model), "nowhere"))
    assert "no model folder" in line.reload()["detail"]
    after = line.judge()[0]
    assert after["model_sha256"] == before["model_sha256"]
    assert "nothing is changed" in line.daemon.said()


def test_one_wrong_station_keeps_all_others_as_they_are(line: Line, model: Path, other: Path, tmp_path: Path) -> None:
    more = f'[[station]]\nname = "cam2"\nmodel = "{model}"\n[station.source]\ntype = "folder"\npath = "second"\n'
    line.daemon.end()
    line.edit(lambda text: text + more)
    line.daemon.start()
    before = line.judge()[0]
    broken = tmp_path / "broken"
    shutil.copytree(other, broken)
    (broken / "calibration.json").write_text("{}")
    line.edit(lambda text: text.replace(str(model), str(other), 1).replace(str(model), str(broken), 1))
    assert line.reload()["subject"] == "refused"
    assert line.judge()[0]["model_sha256"] == before["model_sha256"]
    line.edit(lambda text: text.replace(str(broken), str(other)))
    assert line.reload()["subject"] == "done"
    assert line.judge()[0]["model_sha256"] == fingerprint(other)


def test_a_model_whose_golden_set_is_torn_is_not_put_in_force(
    line: Line, model: Path, other: Path, tmp_path: Path
) -> None:
    before = line.judge()[0]
    torn = tmp_path / "torn"
    shutil.copytree(other, torn)
    (golden,) = torn.rglob("*.npz")
    golden.write_bytes(golden.read_bytes()[:-100])
    line.edit(lambda text: text.replace(str(model), str(torn)))
    told = line.reload()
    assert told["subject"] == "refused"
    assert "golden set" in told["detail"]
    assert line.judge()[0]["model_sha256"] == before["model_sha256"]


def test_what_lies_in_the_same_place_is_read_anew(line: Line, model: Path, inspectd: Run, data: Path) -> None:
    own = line.daemon.folder / "own"
    shutil.copytree(model, own)
    line.edit(lambda text: text.replace(str(model), str(own)))
    assert line.reload()["subject"] == "done"
    before = line.judge()[0]
    (own / "calibration.json").unlink()
    done = inspectd("calibrate", "--model", own, "--good", data / "train/good", "--alpha", "0.2")
    assert done.returncode == 0, done.stderr
    told = line.reload()
    after = line.judge()[0]
    assert after["calibration"] != before["calibration"]
    change = f"{before['calibration']} → {after['calibration']}"
    assert told["detail"] == f"station[cam1].recipe[default].calibration: {change}"


def test_what_must_wait_for_a_start_is_said_each_time(line: Line) -> None:
    line.edit(lambda text: text + "settle_ms = 50\n")
    for _ in range(2):
        assert line.reload()["detail"] == "after a restart: station[cam1].source.settle_ms: 200 → 50"


def test_a_recipe_that_is_prepared_cannot_be_taken_away(line: Line, model: Path) -> None:
    recipe = f'[[station.recipe]]\nname = "A"\nmodel = "{model}"\n'
    line.edit(lambda text: text.replace(f'model = "{model}"\n', "") + recipe)
    told = line.reload()
    assert told["subject"] == "refused"
    assert "default is prepared" in told["detail"]
