"""A faster engine, from its export to verdicts: it is taken if it judges alike, calibrated, and run by the daemon."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from calibration import store
from daemon.build import build_detector, engine_of
from daemon.desk.dataset import identity
from daemon.images import write_png
from demo.parts import render
from detectors.engines.store import exports
from tests.brokers import Broker, Subscriber
from tests.system.conftest import SIDE, Run, write_part
from tests.system.test_daemon import Daemon, verdicts

pytest.importorskip("openvino", reason="OpenVINO is not installed (pip install 'inspectd[openvino]')")


@pytest.fixture(scope="module")
def exported(inspectd: Run, data: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the engine that rounds most, accepted."""
    mine = tmp_path_factory.mktemp("models") / "fast"
    shutil.copytree(model, mine)
    done = inspectd("export", "--model", mine, "--good", data / "train/good", "--engine", "openvino-int8")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "openvino-int8" in done.stdout
    proposed = store.read(store.proposal(mine / "calibration.json"))
    assert proposed.provenance.parity in " ".join(done.stdout.split())
    accepted = inspectd("calibrations", "accept", proposed.id, "--model", mine)
    assert accepted.returncode == 0, accepted.stderr
    return mine


def test_an_export_is_calibrated_through_and_its_card_says_so(exported: Path) -> None:
    calibration = store.read(exported / "calibration.json")
    (key,) = exports(exported)
    assert engine_of(calibration) == key
    assert calibration.provenance.engine in (card := (exported / "calibration.html").read_text())
    assert calibration.provenance.parity in card
    assert {path.name for path in (exported / "engines").rglob("*.*")} >= {"engine.json", "model.xml", "model.bin"}


def test_the_daemon_runs_the_engine_of_its_calibration(
    exported: Path, tmp_path: Path, mosquitto_or_amqtt: Broker, subscribe: Callable[..., Subscriber]
) -> None:
    calibration = store.read(exported / "calibration.json")
    daemon = Daemon(tmp_path, exported, mosquitto_or_amqtt.port)
    subscriber = subscribe(mosquitto_or_amqtt)
    daemon.start()
    for number in range(3):
        write_part(daemon.incoming / f"part{number}.png", 300 + number)
    subscriber.wait(lambda: len(verdicts(subscriber)) == 3, "three verdicts")
    by_part = {verdict["part_id"]: verdict for verdict in verdicts(subscriber).values()}
    fast = build_detector(exported, "cpu", engine=engine_of(calibration))
    reference = build_detector(exported, "cpu")
    for number in range(3):
        image = render(300 + number, "good", SIDE).image
        (mine,), (other,) = fast.predict([image]), reference.predict([image])
        told = by_part[f"part{number}"]["score"]
        assert told == pytest.approx(mine.anomaly_score / calibration.threshold, abs=2e-3)
        assert mine.anomaly_score != other.anomaly_score
    assert daemon.end() == 0


def test_an_engine_that_is_gone_is_named_with_its_cure_and_restarting_does_not_help(
    exported: Path, tmp_path: Path, inspectd: Run
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(exported, mine)
    (key,) = exports(mine)
    weights = mine / "engines" / key / "model.bin"
    weights.write_bytes(weights.read_bytes()[:-1])
    daemon = Daemon(tmp_path, mine, 1)
    refused = inspectd("run", "--config", daemon.config)
    assert refused.returncode == 78
    assert f"{weights} is missing, cut off or changed" in " ".join(refused.stderr.split())
    assert "inspectd export" in refused.stderr
    shutil.rmtree(mine / "engines")
    refused = inspectd("run", "--config", daemon.config)
    assert refused.returncode == 78
    assert f"{mine} holds no engine {key}" in " ".join(refused.stderr.split())


def test_a_configuration_that_asks_for_another_engine_is_refused(exported: Path, tmp_path: Path, inspectd: Run) -> None:
    daemon = Daemon(tmp_path, exported, 1)
    daemon.config.write_text('engine = "torch"\n' + daemon.config.read_text())
    refused = inspectd("run", "--config", daemon.config)
    assert refused.returncode == 78
    assert 'engine = "torch" is asked for' in " ".join(refused.stderr.split())


def test_an_engine_that_judges_otherwise_is_refused_and_nothing_changes(
    inspectd: Run, data: Path, model: Path, tmp_path: Path
) -> None:
    """Of the ranges of black pictures int8 can make nothing."""
    mine, black = tmp_path / "mine", tmp_path / "black"
    shutil.copytree(model, mine)
    split = json.loads((mine / "split.json").read_text())
    shutil.copytree(data / "train/good", black)
    before = (mine / "calibration.json").read_bytes()
    for name in split["learned"]:
        write_png(black / name, np.zeros((SIDE, SIDE, 3), np.uint8), {})
        split["learned"][name] = identity(black / name)
    (mine / "split.json").write_text(json.dumps(split))
    done = inspectd("export", "--model", mine, "--good", black, "--engine", "openvino-int8")
    assert done.returncode == 78, done.stdout
    assert "refused" in done.stdout
    assert (mine / "calibration.json").read_bytes() == before
    assert not exports(mine)
    assert not store.proposal(mine / "calibration.json").exists()


@pytest.mark.long
def test_a_calibration_can_be_taken_back_with_its_engine(exported: Path, tmp_path: Path, inspectd: Run) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(exported, mine)
    fast = store.read(mine / "calibration.json")
    assert inspectd("calibrations", "roll-back", "--model", mine).returncode == 0
    assert engine_of(store.read(mine / "calibration.json")) == "torch"
    assert inspectd("calibrations", "roll-back", "--model", mine, "--id", fast.id).returncode == 0
    shutil.rmtree(mine / "engines")
    refused = inspectd("calibrations", "roll-back", "--model", mine)
    assert refused.returncode == 0  # to the reference, which needs no files
    refused = inspectd("calibrations", "roll-back", "--model", mine, "--id", fast.id)
    assert refused.returncode == 78
    assert "holds no engine" in refused.stderr
