import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import psutil
import pytest

REPOSITORY = Path(__file__).parents[2]


def start(out: Path, *options: str) -> subprocess.Popen[str]:
    """Start the demo, as the head of a session, by which whatever it starts can be told."""
    command = [sys.executable, "-m", "demo", "--out", str(out), "--broker", "amqtt", *options]
    return subprocess.Popen(
        command, cwd=REPOSITORY, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def left_behind(session: int) -> list[str]:
    """Command lines of the processes in a session that do not end within some seconds."""
    living = [process for process in psutil.process_iter() if session_of(process) == session]
    _, alive = psutil.wait_procs(living, timeout=10)
    return [" ".join(process.cmdline()) for process in alive]


def session_of(process: psutil.Process) -> int | None:
    """Give the session of a process, None if it is gone."""
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return None


def test_a_small_demo_loses_no_part_over_a_crash_and_leaves_nothing_running(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    sizes = ["--train-good", "12", "--test-good", "6", "--per-defect", "1", "--epochs", "1"]
    with start(out, *sizes) as demo:
        printed, _ = demo.communicate()
        assert demo.returncode == 0, printed
        assert left_behind(demo.pid) == []
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["parts"] == summary["verdicts"] == 10
    assert summary["lost"] == summary["duplicates"] == 0
    assert summary["gapless"]
    assert sum(summary["escapes_by_defect"].values()) == summary["escapes"]
    assert f"{summary['false_rejects']} of 6 good parts" in printed
    assert 0 < summary["latency_ms_p50"] <= summary["latency_ms_p99"]
    assert "10 verdicts, 0 lost" in printed
    sheet = cv2.imread(summary["contact_sheet"])
    assert sheet is not None
    assert 600 < sheet.shape[0] < 2000
    assert 1500 < sheet.shape[1] < 3000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_interrupted_leaves_nothing_running(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "demo"
    with start(out) as demo:
        deadline = time.monotonic() + 60
        while not list(out.glob("data/train/good/*.png")):
            assert demo.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(demo.pid, number)
        printed, _ = demo.communicate()
        assert demo.returncode != 0
        assert left_behind(demo.pid) == []
        assert "Traceback" not in printed


def test_a_folder_that_is_not_the_demos_is_left_alone(tmp_path: Path) -> None:
    kept = tmp_path / "thesis.txt"
    kept.write_text("years of work")
    with start(tmp_path) as demo:
        printed, _ = demo.communicate()
    assert demo.returncode == 1
    assert "choose another --out" in " ".join(printed.split())
    assert kept.read_text() == "years of work"
