"""`inspectd bench` with the real processes of its contenders. No time is asserted."""

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from daemon.desk.bench import contest
from daemon.desk.bench.contest import Record
from daemon.desk.bench.event import MEMORY, draw_image
from daemon.desk.bench.rival import FallenError, Rival
from tests.brokers import find_mosquitto
from tests.system.conftest import Run

PEER = Path(__file__).parents[2] / "build/peers/bin/python"


def ours(model: Path, engine: str = "torch") -> dict[str, str]:
    return {"kind": "inspectd", "model": str(model), "engine": engine, "device": "cpu"}


@pytest.mark.skipif(
    find_spec("openvino") is None, reason="OpenVINO is not installed (pip install 'inspectd[openvino]')"
)
@pytest.mark.long
def test_two_engines_compete_and_the_table_and_the_json_are_complete(
    inspectd: Run, data: Path, model: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "model"
    shutil.copytree(model, mine)
    export = inspectd("export", "--model", mine, "--good", data / "train/good", "--engine", "openvino-fp32")
    assert export.returncode == 0, export.stderr + export.stdout
    file = tmp_path / "out/bench.json"
    done = inspectd(
        *("bench", "--model", mine, "--images", data / "test/good", "--rounds", "2", "--batch", "3", "--beside"),
        *("--json", file),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.index("torch") < done.stdout.index("openvino-fp32")
    for word in ("× as fast", "peak MB", "slowed by", "frames/s", "CPU ms"):
        assert word in done.stdout
    document = json.loads(file.read_text())
    assert [each["name"] for each in document["contenders"]] == ["torch", "openvino-fp32"]
    assert document["faults"] == []
    assert document["machine"]["cpu"]
    for each in document["contenders"]:
        assert each["start"]["versions"]["torch"]
        assert each["peak_mb"] >= each["start"]["rss_mb"] > 0
        assert {(heat["from"], heat["batch"]) for heat in each["heats"]} == {("memory", 1), ("file", 1), ("memory", 3)}
        assert all(len(heat["turns_ms"]) == 2 for heat in each["heats"])
        assert all(heat["times_as_fast"]["rounds"] == 2 for heat in each["heats"])
        assert each["beside"]["calls"] == 10


@pytest.mark.long
def test_an_engine_that_cannot_start_has_a_row_with_its_reason_and_the_others_go_on(
    inspectd: Run, model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "bench.json"
    done = inspectd(
        *("bench", "--model", model, "--engine", "torch", "--engine", "openvino-bf16", "--rounds", "1", "--json", file)
    )
    assert done.returncode == 1
    assert "openvino-bf16: ended with status 1" in done.stdout
    well, ill = json.loads(file.read_text())["contenders"]
    assert well["fault"] is None
    assert len(well["heats"]) == 2
    assert "holds no engine openvino-bf16" in ill["fault"]


def test_a_contender_that_dies_in_a_round_is_out_and_says_by_what(model: Path, tmp_path: Path) -> None:
    draw_image(tmp_path / "drawn.jpg")
    records = {name: Record(name) for name in ("lives", "dies")}
    with (
        Rival("lives", ours(model), tmp_path / "lives.log") as lives,
        Rival("dies", ours(model), tmp_path / "dies.log") as dies,
    ):
        for rival in (lives, dies):
            rival.start([tmp_path / "drawn.jpg"])
        rounds = contest.hold([lives, dies], records, {name: [MEMORY] for name in records}, 3)
        assert [next(rounds), next(rounds)] == ["lives", "dies"]
        os.kill(dies.pid, signal.SIGKILL)
        assert len(list(rounds)) == 4
    assert records["lives"].fault is None
    assert len(records["lives"].turns[MEMORY]) == 3
    assert records["dies"].fault == "killed by SIGKILL: it printed nothing"
    assert len(records["dies"].turns[MEMORY]) == 1


def test_a_contender_that_says_nothing_is_ended_after_a_while(model: Path, tmp_path: Path) -> None:
    with Rival("mute", ours(model), tmp_path / "mute.log", patience_s=0.01) as mute:
        with pytest.raises(FallenError, match="no answer"):
            mute.finish()
        with pytest.raises(ProcessLookupError):
            os.kill(mute.pid, 0)


@pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed (apt-get install mosquitto)")
@pytest.mark.long
def test_the_whole_path_is_measured_with_the_real_daemon(inspectd: Run, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    done = inspectd("bench", "--model", model, "--rounds", "1", "--engine", "torch", "--whole-path", "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    path = json.loads(file.read_text())["whole_path"]
    assert path["broker"] == "Mosquitto"
    assert path["parts"] > 0
    assert path["share"]["rounds"] == 1
    assert "full load" in done.stdout


def test_the_whole_path_of_a_model_without_a_calibration_is_refused(inspectd: Run, model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("calibration*"))
    done = inspectd("bench", "--model", bare, "--whole-path")
    assert done.returncode == 78
    assert "calibrat" in done.stderr


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(not PEER.exists(), reason="no peer to compare with (make bench-peers)")
def test_a_peer_competes_by_torch_and_by_openvino(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    program = Path(sys.executable).with_name("inspectd")
    options = ("--model", model, "--rounds", "1", "--engine", "torch", "--peer", PEER, "--json", file)
    done = subprocess.run([program, "bench", *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "untrained" in done.stdout
    contenders = json.loads(file.read_text())["contenders"]
    assert [(each["name"], each["peer"]) for each in contenders] == [
        ("torch", False),
        ("anomalib torch", True),
        ("anomalib openvino", True),
    ]
    assert all(each["start"]["versions"]["anomalib"] for each in contenders[1:])
