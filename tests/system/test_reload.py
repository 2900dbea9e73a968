"""The configuration read anew while parts come: models, thresholds and recipes change, no part is lost.

One daemon serves all these tests; each begins by the configuration that the daemon was started with.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.brokers import Subscriber, find_mosquitto, mosquitto
from tests.system.conftest import Run, write_part
from tests.system.test_daemon import Daemon, verdicts

SECOND = '[[station]]\nname = "cam2"\nmodel = "{model}"\n[station.source]\ntype = "folder"\npath = "second"\n'
CHALLENGE = (
    '\n[station.challenge]\nname = "box 3"\ngood = ["G1"]\nbad = ["B1"]\nholds_station = true\n'
    "[station.source]\n"  # goes on
)


@pytest.fixture(scope="module")
def other(inspectd: Run, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same parts."""
    folder = tmp_path_factory.mktemp("models") / "other"
    done = inspectd("train", "--good", data / "train/good", "--out", folder, "--size", "64", "--epochs", "1")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator["Line"]:
    if find_mosquitto() is None or shutil.which("mosquitto_passwd") is None:
        pytest.skip("Mosquitto is not installed (apt-get install mosquitto)")
    folder = tmp_path_factory.mktemp("reload")
    accounts = folder / "accounts"
    accounts.touch(0o700)
    for user in ("edge", "edge2"):
        subprocess.run(["mosquitto_passwd", "-b", str(accounts), user, f"of-{user}"], check=True)
    accounts.chmod(0o644)
    broker = mosquitto(folder, f"password_file {accounts}", "allow_anonymous true")
    broker.start()
    subscriber = Subscriber(broker.port, "inspectd/cam1/#")
    (folder / "password").write_text("of-edge")
    daemon = Daemon(folder, model, broker.port, 'username = "edge"\npassword_file = "password"')
    daemon.config.write_text(daemon.config.read_text() + SECOND.format(model=model))
    daemon.start()
    subscriber.wait(lambda: subscriber.of("birth"), "the daemon to run")
    yield Line(daemon, subscriber)
    daemon.end(signal.SIGKILL)
    subscriber.close()
    broker.stop()


@pytest.fixture
def line(running: "Line") -> Iterator["Line"]:
    yield running
    running.edit(lambda _: running.first)
    assert running.reload()["subject"] == "done"


class Line:
    """A daemon at work, and who listens to it."""

    def __init__(self, daemon: Daemon, subscriber: Subscriber) -> None:
        self.daemon = daemon
        self.first = daemon.config.read_text()
        self._subscriber = subscriber
        self._dropped = self._seed = 0

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
        before = self._dropped
        for _ in range(count):
            self.drop()
        return self.since(before)

    def drop(self, name: str = "", *, again: bool = False) -> None:
        """Let a part come; `again`: the last one, under another name."""
        self._seed = self._seed if again else self._dropped % 24
        write_part(self.daemon.incoming / f"{name or f'part{self._dropped:04}'}.png", self._seed)
        self._dropped += 1

    def since(self, before: int) -> list[dict[str, Any]]:
        """The verdicts of all parts behind so many, by their numbers."""
        self._subscriber.wait(lambda: len(self.verdicts) >= self._dropped, f"{self._dropped} verdicts")
        return self.verdicts[before:]

    @property
    def dropped(self) -> int:
        return self._dropped

    @property
    def verdicts(self) -> list[dict[str, Any]]:
        return sorted(verdicts(self._subscriber).values(), key=lambda verdict: int(verdict["seq"]))

    @property
    def events(self) -> list[dict[str, Any]]:
        return [event for m in self._subscriber.of("event") if (event := m.content)["kind"] == "reload"]

    @property
    def presence(self) -> list[bool]:
        """How often the station has said that it is there, or not."""
        return [message.content["online"] for message in self._subscriber.of("status")]

    @property
    def configurations(self) -> list[str]:
        return [message.content["config_sha256"] for message in self._subscriber.of("birth")]


def fingerprint(model: Path) -> str:
    return str(json.loads((model / "calibration.json").read_text())["provenance"]["model"])[:12]


def test_a_new_model_takes_the_place_of_the_old_between_two_parts_of_a_running_line(
    line: Line, model: Path, other: Path
) -> None:
    before, told, known = line.dropped, len(line.events), len(line.configurations)
    line.judge(5)
    line.edit(lambda text: text.replace(str(model), str(other), 1))
    os.kill(line.daemon.pid, signal.SIGHUP)
    while len(line.events) == told or line.dropped < before + 30:  # parts come all the time
        line.drop()
        time.sleep(0.05)
    line.drop()
    found = line.since(before)
    assert line.events[-1]["subject"] == "done"
    assert fingerprint(model) in line.events[-1]["detail"]
    assert fingerprint(other) in line.events[-1]["detail"]
    assert [verdict["seq"] for verdict in found] == list(range(before + 1, line.dropped + 1))
    assert len({verdict["part_id"] for verdict in found}) == line.dropped - before
    models = [verdict["model_sha256"] for verdict in found]
    assert {fingerprint(model), fingerprint(other)} == set(models)
    assert sorted(models, key=lambda sha: sha == fingerprint(other)) == models, "the models took turns"
    assert len(set(line.configurations[known - 1 :])) == 2


def test_a_file_that_is_wrong_changes_nothing_and_says_why(line: Line, model: Path) -> None:
    before = line.judge()[0]
    line.edit(lambda text: text + "\nno TOML")
    told = line.reload()
    assert told["subject"] == "refused"
    assert "is not TOML" in told["detail"]
    line.edit(lambda text: text.replace("\nno TOML", "").replace(str(model), "nowhere"))
    assert "no model folder" in line.reload()["detail"]
    assert line.judge()[0]["model_sha256"] == before["model_sha256"]
    assert "nothing is changed" in line.daemon.said()


def test_one_wrong_station_keeps_all_others_as_they_are(line: Line, model: Path, other: Path, tmp_path: Path) -> None:
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
    line.edit(lambda text: text.replace(str(model), str(torn), 1))
    told = line.reload()
    assert told["subject"] == "refused"
    assert "golden set" in told["detail"]
    assert line.judge()[0]["model_sha256"] == before["model_sha256"]


def test_what_lies_in_the_same_place_is_read_anew(line: Line, model: Path, inspectd: Run, data: Path) -> None:
    own = line.daemon.folder / "own"
    shutil.copytree(model, own)
    line.edit(lambda text: text.replace(str(model), str(own), 1))
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
    line.edit(lambda text: text.replace('path = "incoming"', 'path = "incoming"\nsettle_ms = 50'))
    for _ in range(2):
        assert line.reload()["detail"] == "after a restart: station[cam1].source.settle_ms: 200 → 50"


def test_a_recipe_that_is_prepared_cannot_be_taken_away(line: Line, model: Path) -> None:
    recipe = f'[[station.recipe]]\nname = "A"\nmodel = "{model}"\n'
    own = f'[[station]]\nname = "cam1"\n[station.source]\ntype = "folder"\npath = "incoming"\n{recipe}'
    line.edit(lambda _: line.first.partition("[[station]]")[0] + own + SECOND.format(model=model))
    told = line.reload()
    assert told["subject"] == "refused"
    assert "default is prepared" in told["detail"]


def test_a_failed_challenge_test_holds_the_station_whatever_is_read_anew(line: Line, model: Path, other: Path) -> None:
    line.edit(lambda text: text.replace("[station.source]\n", CHALLENGE, 1))
    assert line.reload()["subject"] == "done"
    while line.judge()[0]["verdict"] != "PASS":
        pass
    before = line.dropped
    line.drop("B1", again=True)  # a good part by the name of the set's bad one
    assert line.since(before)[0]["challenge"]
    line.drop("G1")
    line.since(before)
    held = line.judge()[0]
    line.edit(lambda text: text.replace(str(model), str(other), 1))
    assert line.reload()["subject"] == "done"
    still = line.judge()[0]
    assert (held["reason"], still["reason"]) == ("challenge_failed", "challenge_failed")
    assert still["model_sha256"] == fingerprint(other)


def test_no_password_of_a_camera_is_told(line: Line) -> None:
    folder = 'type = "folder"\npath = "incoming"'
    for secret in ("S3cret", "N3wpass"):
        camera = f'type = "video"\nplace = "rtsp://bob:{secret}@camera/live"'
        line.daemon.config.write_text(line.first.replace(folder, camera))
        line.reload()
    every = json.dumps(line.events, ensure_ascii=False) + (line.daemon.folder / "state/audit.jsonl").read_text()
    assert "rtsp://…@camera/live" in every
    assert "S3cret" not in every
    assert "N3wpass" not in every


def test_credentials_that_the_broker_refuses_cut_nobody_off_and_others_are_used_at_once(line: Line) -> None:
    before = len(line.presence)
    password = line.daemon.folder / "password"
    password.write_text("of-nobody")
    told = line.reload()
    assert told["subject"] == "refused"
    assert "refused user" in told["detail"]
    assert line.judge()
    assert line.presence[before:] == []
    password.write_text("of-edge2")
    line.edit(lambda text: text.replace('"edge"', '"edge2"'))
    told = line.reload()
    assert 'mqtt.username: "edge" → "edge2"' in told["detail"]
    assert line.judge()
    assert line.presence[before:] == [True]
    password.write_text("of-edge")
