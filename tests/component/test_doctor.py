"""What `inspectd doctor` finds at real brokers, folders, videos and cameras, and that it leaves them as they were."""

import fcntl
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest

from config.load import load
from config.schema import Settings
from daemon.desk.checks import arrival, broker, disk
from daemon.desk.checks.finding import Finding, Mark
from daemon.sources.folder import claims
from tests.brokers import Broker, Subscriber, free_port
from tests.cameras import Simulator, need_simulator
from tests.component.test_mqtt_security import NAME, Authority, add_user, serving

SOURCE = '[station.source]\ntype = "folder"\npath = "incoming"\n'
OWN = ("topic write inspectd/cam1/#", "topic read inspectd/cam1/cmd/request", "topic read inspectd/cam1/cmd/trigger")
"""What docs/mqtt.md lets the daemon do."""


def settings(folder: Path, port: int, mqtt: str = "", source: str = SOURCE, host: str = "127.0.0.1") -> Settings:
    file = folder / "inspectd.toml"
    file.write_text(
        f'node = "edge7"\n[mqtt]\nhost = "{host}"\nport = {port}\n{mqtt}\n'
        f'[[station]]\nname = "cam1"\nmodel = "nowhere"\n{source}\n'
    )
    return load(file, {})


def failures(found: Iterator[Finding]) -> list[Finding]:
    """Those that must be mended, each with its cure."""
    failed = [finding for finding in found if finding.mark is Mark.fail]
    assert all(finding.cure for finding in failed)
    return failed


def the(found: Iterator[Finding], words: str) -> Finding:
    """The only finding with these words."""
    every = list(found)
    (only,) = [finding for finding in every if words in finding.found] or [every]  # type: ignore[list-item] # to be shown
    assert isinstance(only, Finding), only
    return only


@pytest.fixture
def guarded(mosquitto: Callable[..., Broker], tmp_path: Path) -> Callable[..., tuple[Broker, str]]:
    """Start a broker with an access list; with it comes what signs the daemon in."""

    def start(*rights: str) -> tuple[Broker, str]:
        rules = tmp_path / "acl"
        rules.write_text("\n".join(["user inspectd", *rights, "user all", "topic readwrite #", ""]))
        rules.chmod(0o600)
        (tmp_path / "password").write_text("sw0rdfish-of-the-plant")
        started = mosquitto(f"password_file {add_user(tmp_path / 'passwords', 'inspectd')}", f"acl_file {rules}")
        return started, 'username = "inspectd"\npassword_file = "password"'

    return start


@contextmanager
def running(state: Path) -> Iterator[None]:
    """Hold a state folder as a daemon does."""
    state.mkdir(exist_ok=True)
    with (state / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


# The broker


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_the_rights_of_the_page_are_enough(
    guarded: Callable[..., tuple[Broker, str]], tmp_path: Path, protocol: str
) -> None:
    at, user = guarded(*OWN)
    found = list(broker.broker(settings(tmp_path, at.port, f'{user}\nprotocol = "{protocol}"')))
    assert {finding.mark for finding in found} == {Mark.ok}
    assert the(iter(found), "signed in").found == f"signed in, user inspectd, by MQTT {protocol}"
    assert the(iter(found), "may write to").subject == "station cam1"
    assert the(iter(found), "hears commands on inspectd/cam1/cmd/request").subject == "station cam1"


def test_a_user_who_may_not_write_is_found_by_mqtt_5(
    guarded: Callable[..., tuple[Broker, str]], tmp_path: Path
) -> None:
    at, user = guarded("topic write inspectd/cam2/#", *OWN[1:])
    (failed,) = failures(broker.broker(settings(tmp_path, at.port, user)))
    assert failed.found == "the broker refuses what is published below inspectd/cam1/: Not authorized"
    assert "let the daemon's user write to inspectd/cam1/#" in failed.cure


def test_a_user_who_may_not_write_is_suspected_by_mqtt_3_1_1(
    guarded: Callable[..., tuple[Broker, str]], tmp_path: Path
) -> None:
    at, user = guarded("topic write inspectd/cam2/#", *OWN[1:])
    found = the(broker.broker(settings(tmp_path, at.port, f'{user}\nprotocol = "3.1.1"')), "does not say")
    assert found.mark is Mark.warn
    assert "let the daemon's user write to inspectd/cam1/#" in found.cure


def test_a_user_who_hears_no_commands_is_found_though_the_broker_grants_the_subscription(
    guarded: Callable[..., tuple[Broker, str]], tmp_path: Path
) -> None:
    at, user = guarded(OWN[0])
    (failed,) = failures(broker.broker(settings(tmp_path, at.port, user)))
    assert "what is published on inspectd/cam1/cmd/request does not come" in failed.found
    assert "read inspectd/cam1/cmd/request and inspectd/cam1/cmd/trigger" in failed.cure


def test_what_is_sent_to_try_the_rights_stays_nowhere(mosquitto: Callable[..., Broker], tmp_path: Path) -> None:
    at = mosquitto()
    with closing(Subscriber(at.port, "inspectd/#")) as watching:
        assert not failures(broker.broker(settings(tmp_path, at.port)))
        watching.wait(lambda: len(watching.messages) == 2, "what is sent")
        assert [message.leaf for message in watching.messages] == ["doctor", "cmd/request"]
        assert not any(message.retain for message in watching.messages)
        assert watching.messages[1].content["action"] == "get_state"
    with closing(Subscriber(at.port, "#", five=True)) as late:
        assert late.messages == []


def test_a_daemon_that_runs_is_asked_nothing(mosquitto: Callable[..., Broker], tmp_path: Path) -> None:
    at = mosquitto()
    online = json.dumps({"online": True, "node": "edge7"})
    subprocess.run(["mosquitto_pub", "-p", str(at.port), "-r", "-t", "inspectd/cam1/status", "-m", online], check=True)
    here = settings(tmp_path, at.port)
    with closing(Subscriber(at.port, "inspectd/#")) as watching, running(tmp_path / "state"):
        found = list(broker.broker(here))
        watching.wait(lambda: watching.of("doctor"), "what is sent")
        assert not watching.of("cmd/request")
    assert not failures(iter(found))
    assert the(iter(found), "online, by the daemon that runs here as edge7").subject == "station cam1"
    assert the(iter(found), "not tried while a daemon is online").subject == "station cam1"


@pytest.mark.parametrize(
    ("node", "words"),
    [("edge7", "a daemon elsewhere is online under this machine's name"), ("edge8", "the node edge8 speaks for it")],
)
def test_a_daemon_elsewhere_that_would_be_in_the_way_is_found(
    mosquitto: Callable[..., Broker], tmp_path: Path, node: str, words: str
) -> None:
    at = mosquitto()
    online = json.dumps({"online": True, "node": node})
    subprocess.run(["mosquitto_pub", "-p", str(at.port), "-r", "-t", "inspectd/cam1/status", "-m", online], check=True)
    (failed,) = failures(broker.broker(settings(tmp_path, at.port)))
    assert words in failed.found


def test_limits_of_the_broker_that_are_too_low_are_found(mosquitto: Callable[..., Broker], tmp_path: Path) -> None:
    at = mosquitto("max_packet_size 50000", "retain_available false", "max_qos 0")
    failed = failures(broker.broker(settings(tmp_path, at.port)))
    assert "it takes packets of 50000 bytes, and max_packet_bytes is 1000000" in failed[0].found
    assert "set max_packet_bytes = 50000" in failed[0].cure
    assert "retains nothing" in failed[1].found
    assert "acknowledges nothing" in failed[2].found


def test_an_older_broker_is_spoken_to_as_it_can(amqtt: Broker, tmp_path: Path) -> None:
    found = list(broker.broker(settings(tmp_path, amqtt.port)))
    assert not failures(iter(found))
    assert "by MQTT 3.1.1" in the(iter(found), "signed in").found
    assert the(iter(found), "may write to inspectd/cam1/#").subject == "station cam1"


def test_a_wrong_password_is_found(guarded: Callable[..., tuple[Broker, str]], tmp_path: Path) -> None:
    at, user = guarded(*OWN)
    (tmp_path / "password").write_text("wrong")
    (failed,) = failures(broker.broker(settings(tmp_path, at.port, user)))
    assert "refused user 'inspectd'" in failed.found
    assert "check username and password_file" in failed.cure


def test_a_host_without_an_address_and_a_port_without_a_broker_are_found(tmp_path: Path) -> None:
    (failed,) = failures(broker.broker(settings(tmp_path, 1883, "allow_plain = true", host="broker.invalid")))
    assert "broker.invalid has no address" in failed.found
    port = free_port()
    (failed,) = failures(broker.broker(settings(tmp_path, port)))
    assert f"nothing answers on 127.0.0.1:{port}" in failed.found


def test_a_broker_that_is_silent_is_given_up(mosquitto: Callable[..., Broker], tmp_path: Path) -> None:
    at = mosquitto()
    at.freeze()
    (failed,) = failures(broker.broker(settings(tmp_path, at.port, 'protocol = "5"')))
    at.thaw()
    assert "did not answer as an MQTT broker does" in failed.found


def test_images_over_mqtt_may_be_subscribed_to(mosquitto: Callable[..., Broker], tmp_path: Path) -> None:
    at = mosquitto()
    source = '[station.source]\ntype = "mqtt"\ntopic = "cameras/+/image"\ngroup = "line1"\n'
    found = the(broker.broker(settings(tmp_path, at.port, source=source)), "may subscribe to cameras/+/image")
    assert found.mark is Mark.ok


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed (apt-get install openssl)")
def test_the_days_of_the_brokers_certificate_are_counted(mosquitto: Callable[..., Broker], tmp_path: Path) -> None:
    plant = Authority(tmp_path / "plant").found()
    stranger = Authority(tmp_path / "stranger").found()
    for days, mark in ((20, Mark.warn), (90, Mark.ok)):
        plant.sign("broker", f"DNS:{NAME}", days=days)
        at = mosquitto(*serving(plant))
        trusted = settings(tmp_path, at.port, f'[mqtt.tls]\nca_file = "{plant.certificate}"', host=NAME)
        found = list(broker.broker(trusted))
        assert the(iter(found), f"good for {days - 1} days more").mark is mark
        assert "TLSv1.3" in the(iter(found), "days more").found
        assert not failures(iter(found))
        foreign = settings(tmp_path, at.port, f'[mqtt.tls]\nca_file = "{stranger.certificate}"', host=NAME)
        (failed,) = failures(broker.broker(foreign))
        assert "no authority that this machine knows" in failed.found
        at.stop()


# Folders and disks


def test_files_are_moved_to_try_it_and_nothing_is_left(tmp_path: Path) -> None:
    here = settings(tmp_path, 1883)
    for room in ("processing", "done", "failed"):
        (tmp_path / "incoming" / room).mkdir(parents=True)
    (tmp_path / "incoming/part.png").write_bytes(b"not looked at")
    before = sorted(tmp_path.rglob("*"))
    found = list(arrival.folders(here))
    assert sorted(tmp_path.rglob("*")) == before
    assert [finding.mark for finding in found if finding.subject == "station cam1"] == [Mark.ok]
    assert the(iter(found), "file-system events are granted").subject == "folders"


@pytest.fixture
def mounted() -> Iterator[Callable[..., None]]:
    """Mount file systems in memory, as root."""
    places: list[Path] = []

    def mount(place: Path, options: str) -> None:
        place.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("needs root to mount a file system")
        places.append(place)

    yield mount
    for place in reversed(places):
        subprocess.run(["umount", "-l", place], check=True)


def test_a_room_on_another_file_system_is_found(mounted: Callable[..., None], tmp_path: Path) -> None:
    mounted(tmp_path / "incoming/done", "size=1m")
    (tmp_path / "incoming/processing").mkdir()
    (failed,) = failures(arrival.folders(settings(tmp_path, 1883)))
    assert "files cannot be moved" in failed.found
    assert "cross-device" in failed.found
    assert "on one file system" in failed.cure
    assert not list((tmp_path / "incoming").rglob(".doctor*"))


def test_a_folder_that_may_not_be_written_is_found_and_is_enough_for_leaving(
    mounted: Callable[..., None], tmp_path: Path
) -> None:
    mounted(tmp_path / "incoming", "ro,size=1m")
    (failed,) = failures(arrival.folders(settings(tmp_path, 1883)))
    assert "Read-only file system" in failed.found
    leaving = settings(tmp_path, 1883, source=f'{SOURCE}keep = "leave"')
    assert not failures(arrival.folders(leaving))
    assert not failures(arrival.sources(leaving))


def test_a_full_disk_is_found(mounted: Callable[..., None], tmp_path: Path) -> None:
    mounted(tmp_path / "incoming", "size=1m")
    (failed,) = failures(disk.disks(settings(tmp_path, 1883)))
    assert f"{tmp_path / 'incoming'} has " in failed.found
    assert "delete what is old in done/ and failed/" in failed.cure


def test_a_folder_that_another_daemon_has_is_found(tmp_path: Path) -> None:
    here = settings(tmp_path, 1883)
    (tmp_path / "incoming/processing").mkdir(parents=True)
    with claims.alone(tmp_path / "incoming/processing"):
        (failed,) = failures(arrival.folders(here))
        assert "another inspectd, with another state_dir" in failed.found
        with running(tmp_path / "state"):
            assert not failures(arrival.folders(here))


# Cameras


def test_a_video_gives_a_frame_unless_a_daemon_looks_through_it(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "part_0.png"), np.full((48, 64, 3), 90, np.uint8))
    video = f'[station.source]\ntype = "video"\nplace = "{tmp_path}/part_%d.png"\n'
    here = settings(tmp_path, 1883, source=video)
    assert the(arrival.cameras(here), "gave a frame of 64 × 48 px").mark is Mark.ok
    with running(tmp_path / "state"):
        assert the(arrival.cameras(here), "is not tried, since a daemon runs").mark is Mark.ok


def test_a_video_that_is_not_there_is_found(tmp_path: Path) -> None:
    nowhere = '[station.source]\ntype = "video"\nplace = "/dev/video77"\n'
    (failed,) = failures(arrival.cameras(settings(tmp_path, 1883, source=nowhere)))
    assert "/dev/video77" in failed.found


def test_a_camera_answers_and_gives_a_frame(tmp_path: Path) -> None:
    need_simulator()
    pytest.importorskip("viva_genicam")
    with closing(Simulator()) as camera:
        camera.start()
        source = f'[station.source]\ntype = "genicam"\ncamera = "{camera.serial}"\n'
        found = list(arrival.cameras(settings(tmp_path, 1883, source=source)))
        assert not failures(iter(found))
        assert f"serial {camera.serial}, answers at 127.0.0.1" in the(iter(found), "answers at").found
        assert re.search(r"gave a frame of \d+ × \d+ px", the(iter(found), "gave a frame").found)
        assert the(iter(found), "bytes on lo").mark is Mark.ok
        assert the(iter(found), "net.core.rmem_max").subject == "station cam1"


def test_a_camera_that_does_not_answer_is_found(tmp_path: Path) -> None:
    pytest.importorskip("viva_genicam")
    source = '[station.source]\ntype = "genicam"\ncamera = "NOBODY"\n'
    first, *_ = failures(arrival.cameras(settings(tmp_path, 1883, source=source)))
    assert "NOBODY" in first.found
