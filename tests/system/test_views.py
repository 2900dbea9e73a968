"""Two folders that see each part from two sides, the installed program between them and a real broker."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.brokers import Broker, Subscriber
from tests.system.conftest import write_part
from tests.system.test_daemon import Daemon, verdicts

GROUP = """
[[group]]
name = "part"
views = ["top", "side"]
within_s = {within_s}
"""


def configure(daemon: Daemon, model: Path, within_s: float) -> None:
    stations = "".join(
        f'[[station]]\nname = "{name}"\nmodel = "{model}"\n[station.source]\ntype = "folder"\npath = "{name}"\n'
        for name in ("top", "side")
    )
    for name in ("top", "side"):
        (daemon.folder / name).mkdir(exist_ok=True)
    head = daemon.config.read_text().partition("[[station]]")[0]
    daemon.config.write_text(head + stations + GROUP.format(within_s=within_s))


@pytest.fixture
def line(tmp_path: Path, model: Path, mosquitto: Callable[..., Broker]) -> Iterator[tuple[Daemon, Broker]]:
    broker = mosquitto()
    daemon = Daemon(tmp_path, model, broker.port, "actuation_ttl_s = 30.0")
    configure(daemon, model, 60.0)
    yield daemon, broker
    if daemon.alive:
        daemon.end(signal.SIGKILL)


def told(ear: Subscriber, leaf: str = "verdict") -> list[dict[str, Any]]:
    return [message.content for message in ear.of(leaf)]


def test_a_part_that_two_stations_have_seen_has_one_verdict_though_a_view_is_missing_and_the_daemon_is_killed(
    line: tuple[Daemon, Broker], model: Path
) -> None:
    daemon, broker = line
    with (
        closing(Subscriber(broker.port, "inspectd/part/#")) as ear,
        closing(Subscriber(broker.port, "inspectd/side/verdict")) as side,
        closing(Subscriber(broker.port, "inspectd/top/verdict")) as top,
    ):
        daemon.start()
        ear.wait(lambda: [s for s in told(ear, "state") if s["ready"]], "the group to be ready")
        born = told(ear, "birth")[0]
        assert (born["source_kind"], born["source_place"], born["commands"]) == ("group", "top, side", [])
        assert "image/overlay" not in [topic["leaf"] for topic in born["topics"]]

        write_part(daemon.folder / "top/SN-1.png", 1)
        write_part(daemon.folder / "side/SN-2.png", 2)
        write_part(daemon.folder / "side/SN-1.png", 3)
        (daemon.folder / "top/.SN-2.png").write_text("no image")
        (daemon.folder / "top/.SN-2.png").rename(daemon.folder / "top/SN-2.png")
        ear.wait(lambda: len(told(ear)) == 2, "the verdicts of two parts")
        parts = {one["part_id"]: one for one in told(ear)}
        assert sorted(one["seq"] for one in parts.values()) == [1, 2]
        assert (parts["SN-2"]["reason"], parts["SN-2"]["detail"][:5]) == ("decode_failed", "top: ")
        top.wait(lambda: len(told(top)) == 2, "the verdicts at the top")
        side.wait(lambda: len(told(side)) == 2, "the verdicts at the side")
        own = {one["id"]: one for one in told(top) + told(side)}
        for part in parts.values():
            assert [one["station"] for one in part["views"]] == ["top", "side"]
            assert all({key: own[one["id"]][key] for key in one} == one for one in part["views"])
            assert part["reject"] == any(own[one["id"]]["reject"] for one in part["views"])
        gate = {one["p"]: one for one in told(ear, "plc")}
        assert {name: (one["s"], one["r"]) for name, one in gate.items()} == {
            name: (one["seq"], one["reject"]) for name, one in parts.items()
        }

        write_part(daemon.folder / "top/SN-3.png", 4)
        top.wait(lambda: len(told(top)) == 3, "the third view at the top")
        daemon.end(signal.SIGKILL)
        configure(daemon, model, 0.5)
        daemon.start()
        write_part(daemon.folder / "side/SN-3.png", 5)
        ear.wait(lambda: len(verdicts(ear)) == 3, "the verdict of the part that lost its view")
        lacking = list(verdicts(ear).values())[2]
        assert (lacking["seq"], lacking["part_id"], lacking["verdict"]) == (3, "SN-3", "ERROR")
        assert (lacking["reason_code"], lacking["detail"]) == (307, "no verdict of top within 0.5 s")
        assert [one["station"] for one in lacking["views"]] == ["side"]
        ear.wait(lambda: [one for one in told(ear, "alarm/event") if one["alarm_id"] == "VIEW_MISSING"], "the alarm")
        gate = {one["p"]: one for one in told(ear, "plc")}
        assert (gate["SN-3"]["s"], gate["SN-3"]["r"]) == (3, True)
        assert daemon.end() == 0
        ear.wait(lambda: told(ear, "status")[-1]["reason"] == "stopped", "the good-bye")
        assert [one["seq"] for one in verdicts(ear).values()] == [1, 2, 3]
        assert [one["p"] for one in told(ear, "plc")][2:] == ["SN-3"]
        assert told(ear, "last")[-1]["seq"] == 3
    assert not list(Path(daemon.folder).glob("*/processing/*"))
    assert json.loads(ear.of("stats")[-1].payload)["pending"] == 0
