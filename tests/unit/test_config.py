import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import config
from config.load import ConfigError, load, read_password
from config.schema import (
    Archive,
    Challenge,
    FolderSource,
    Framing,
    GenicamSource,
    Group,
    Metrics,
    Mqtt,
    MqttSource,
    Recipe,
    Regions,
    Station,
    Tls,
    VideoSource,
    clean_name,
    options,
)

SAMPLE = Path(config.__file__).parent / "inspectd.toml"
MASKS = ("roi", "ignore")
FRAMES = ("flat_field", "crop")
OPTION = re.compile(r"(# )?([a-z_]+) = \S.*")
HEADING = re.compile(r"(# )?\[+([a-z_.]+)\]+")
SMALLEST = """
[mqtt]
host = "127.0.0.1"
port = 1883
topic_prefix = "plant/line1"

[[station]]
name = "cam1"
model = "models/screw"
[station.source]
type = "folder"
path = "incoming"
"""
TLS = """
[mqtt.tls]
ca_file = "ca.crt"
"""
SECOND_STATION = """
[[station]]
name = "cam2"
model = "models/screw"
[station.source]
type = "folder"
path = "incoming2"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "line1" / "inspectd.toml"
    file.parent.mkdir()
    file.write_text(SMALLEST)
    return file


def folder_of(station: Station) -> Path:
    """Where a station's files come from."""
    assert isinstance(station.source, FolderSource)
    return station.source.path


def faults(file: Path, content: str | bytes | None = None, environ: dict[str, str] | None = None) -> list[str]:
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError) as caught:
        load(file, environ or {})
    return str(caught.value).splitlines()


def replaced(old: str, new: str, text: str = SMALLEST) -> str:
    assert old in text
    return text.replace(old, new)


@contextmanager
def an_ordinary_user() -> Iterator[None]:
    """Root may read everything, so that a refusal takes another user."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_the_smallest_configuration_has_all_defaults(file: Path) -> None:
    settings = load(file, {})
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,32}", settings.node)
    assert (settings.device, settings.threads) == ("auto", 0)
    assert settings.mqtt == Mqtt(host="127.0.0.1", topic_prefix="plant/line1")
    assert (settings.mqtt.port, settings.mqtt.protocol, settings.mqtt.keepalive_s) == (1883, "auto", 10)
    assert (settings.mqtt.username, settings.mqtt.password_file) == (None, None)
    assert (settings.mqtt.overlays, settings.mqtt.overlay_side) == ("rejects", 512)
    assert (settings.mqtt.actuation_ttl_s, settings.mqtt.max_packet_bytes) == (2.0, 1_000_000)
    (station,) = settings.stations
    assert station.name == "cam1"
    assert station.source == FolderSource(
        type="folder",
        path=file.parent / "incoming",
        settle_ms=200,
        give_up_s=10,
        rescan_s=5,
    )
    assert station.regions == Regions(smallest_area_px=0, count=1, roi=None, ignore=None)


def test_the_regions_of_each_station_are_its_own(file: Path) -> None:
    told = '[station.regions]\nsmallest_area_px = 40\ncount = 3\nroi = "roi.png"\nignore = "/srv/ignore.png"\n'
    own = SMALLEST.replace('model = "models/screw"', 'model = "models/screw"\ncalibration = "cam1.json"', 1)
    file.write_text(own + told + SECOND_STATION)
    first, second = load(file, {}).stations
    masks = {"roi": file.parent / "roi.png", "ignore": Path("/srv/ignore.png")}
    assert first.regions == Regions(smallest_area_px=40, count=3, **masks)
    assert second.regions == Regions()


def test_stations_with_other_regions_cannot_share_a_calibration(file: Path) -> None:
    file.write_text(SMALLEST + "[station.regions]\nsmallest_area_px = 40\n" + SECOND_STATION)
    with pytest.raises(ConfigError, match=r"calibration of station\[0\] .* whose regions are others"):
        load(file, {})


def test_relative_paths_start_at_the_folder_of_the_file(file: Path, tmp_path: Path) -> None:
    settings = load(file, {})
    assert settings.state_dir == tmp_path / "line1" / "state"
    assert settings.stations[0].model == tmp_path / "line1" / "models" / "screw"
    assert folder_of(settings.stations[0]) == tmp_path / "line1" / "incoming"


def test_absolute_paths_stay_as_they_are(file: Path) -> None:
    file.write_text(replaced('"incoming"', '"/srv/incoming"'))
    assert folder_of(load(file, {}).stations[0]) == Path("/srv/incoming")


def test_a_relative_name_of_the_file_gives_absolute_paths() -> None:
    settings = load(Path(os.path.relpath(SAMPLE)), {})
    assert folder_of(settings.stations[0]).is_absolute()


def test_settings_cannot_be_changed(file: Path) -> None:
    settings = load(file, {})
    with pytest.raises(ValidationError, match="frozen"):
        settings.threads = 3  # type: ignore[misc]


def test_two_stations_with_folders_of_their_own_are_valid(file: Path) -> None:
    file.write_text(SMALLEST + SECOND_STATION)
    assert [station.name for station in load(file, {}).stations] == ["cam1", "cam2"]


def test_a_byte_order_mark_and_windows_line_ends_are_read(file: Path) -> None:
    plain = load(file, {})
    file.write_bytes(b"\xef\xbb\xbf" + SMALLEST.replace("\n", "\r\n").encode())
    assert load(file, {}) == plain


@given(st.text())
def test_any_host_name_becomes_a_valid_node(host_name: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,32}", clean_name(host_name))


def test_a_host_name_that_is_a_name_is_kept() -> None:
    assert clean_name("edge-7_b") == "edge-7_b"
    assert clean_name("edge7.plant.example") == "edge7-plant-example"


def test_the_state_folder_comes_from_systemd_unless_the_file_names_one(file: Path) -> None:
    environ = {"STATE_DIRECTORY": "/var/lib/inspectd:/var/lib/other"}
    assert load(file, environ).state_dir == Path("/var/lib/inspectd")
    file.write_text('state_dir = "/srv/state"\n' + SMALLEST)
    assert load(file, environ).state_dir == Path("/srv/state")


def test_the_password_comes_from_the_systemd_credential(file: Path, tmp_path: Path) -> None:
    (tmp_path / "mqtt_password").write_text("opensesame\n")
    file.write_text(replaced("port = 1883", 'username = "line1"'))
    mqtt = load(file, {"CREDENTIALS_DIRECTORY": str(tmp_path)}).mqtt
    assert mqtt.password_file == tmp_path / "mqtt_password"
    assert read_password(mqtt) == "opensesame"


def test_a_credentials_folder_without_the_password_changes_nothing(file: Path, tmp_path: Path) -> None:
    assert load(file, {"CREDENTIALS_DIRECTORY": str(tmp_path)}) == load(file, {})


def test_a_password_file_in_the_configuration_goes_before_the_credential(file: Path, tmp_path: Path) -> None:
    (tmp_path / "mqtt_password").write_text("credential")
    (file.parent / "secret").write_text("own")
    file.write_text(replaced("port = 1883", 'username = "line1"\npassword_file = "secret"'))
    assert read_password(load(file, {"CREDENTIALS_DIRECTORY": str(tmp_path)}).mqtt) == "own"


def test_a_user_without_a_password_is_valid(file: Path) -> None:
    file.write_text(replaced("port = 1883", 'username = "line1"'))
    mqtt = load(file, {}).mqtt
    assert mqtt.username == "line1"
    assert read_password(mqtt) is None


@pytest.mark.parametrize(
    ("content", "password"),
    [(b"a b\n", "a b"), (b"a\n\n", "a\n"), (b"a\r\n", "a"), (b"a", "a"), ("\u00e4 ".encode(), "\u00e4 ")],
)
def test_a_password_loses_one_line_end_and_nothing_else(tmp_path: Path, content: bytes, password: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(content)
    assert read_password(Mqtt(host="::1", username="u", password_file=secret)) == password


def test_the_password_is_never_shown(file: Path) -> None:
    (file.parent / "secret").write_text("opensesame")
    file.write_text(replaced("port = 1883", 'username = "line1"\npassword_file = "secret"'))
    settings = load(file, {})
    assert read_password(settings.mqtt) == "opensesame"
    assert "opensesame" not in f"{settings!r} {settings} {settings.model_dump_json()}"


def test_a_password_written_into_the_configuration_is_refused_without_repeating_it(file: Path) -> None:
    (fault,) = faults(file, replaced("port = 1883", 'username = "line1"\npassword = "opensesame"'))
    assert "mqtt.password: is not an option" in fault
    assert '"password_file"' in fault
    assert "opensesame" not in fault


def test_a_section_for_tls_has_its_port_its_paths_and_a_host_name_that_is_verified(file: Path) -> None:
    file.write_text(
        replaced("port = 1883\n", "") + f'{TLS}certificate_file = "edge7.crt"\nkey_file = "/etc/edge7.key"\n'
    )
    mqtt = load(file, {}).mqtt
    assert mqtt.port == 8883
    assert mqtt.tls == Tls(
        ca_file=file.parent / "ca.crt",
        certificate_file=file.parent / "edge7.crt",
        key_file=Path("/etc/edge7.key"),
        verify_host_name=True,
    )


def test_a_port_that_is_given_goes_before_that_of_tls(file: Path) -> None:
    file.write_text(SMALLEST + TLS)
    assert load(file, {}).mqtt.port == 1883


def test_an_empty_section_for_tls_trusts_the_authorities_of_the_system(file: Path) -> None:
    file.write_text(f"{SMALLEST}[mqtt.tls]\n")
    assert load(file, {}).mqtt.tls == Tls(ca_file=None, certificate_file=None, key_file=None, verify_host_name=True)


def test_the_key_comes_from_the_systemd_credential_where_there_is_a_section_for_tls(file: Path, tmp_path: Path) -> None:
    (tmp_path / "mqtt_key").touch()
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert load(file, environ).mqtt.tls is None
    file.write_text(f'{SMALLEST}{TLS}certificate_file = "edge7.crt"\n')
    tls = load(file, environ).mqtt.tls
    assert tls is not None
    assert tls.key_file == tmp_path / "mqtt_key"


@pytest.mark.parametrize("host", ["localhost", "LocalHost", "127.0.0.1", "127.8.9.10", "::1"])
def test_this_machine_may_be_spoken_to_without_tls(file: Path, host: str) -> None:
    file.write_text(replaced("127.0.0.1", host))
    assert load(file, {}).mqtt.tls is None


@pytest.mark.parametrize(
    "host",
    ["broker", "localhost.plant.example", "127.0.0.1.plant.example", "128.0.0.1", "192.168.0.2", "fe80::1"],
)
def test_another_machine_is_spoken_to_without_tls_only_where_the_file_says_so(file: Path, host: str) -> None:
    (fault,) = faults(file, replaced("127.0.0.1", host))
    assert fault.startswith(f"{file}: mqtt.tls: is missing, ")
    assert host in fault
    assert "Add a section [mqtt.tls], or allow_plain = true under [mqtt]." in fault
    file.write_text(replaced("127.0.0.1", host).replace("port = 1883", "allow_plain = true"))
    assert load(file, {}).mqtt.port == 1883
    file.write_text(replaced("127.0.0.1", host) + TLS)
    assert load(file, {}).mqtt.host == host


@pytest.mark.parametrize(
    ("lines", "option", "cure"),
    [
        ('certificate_file = "a.crt"', "key_file", 'is missing. Add a line "key_file = …" under [mqtt.tls].'),
        ('key_file = "a.key"', "key_file", 'there is no certificate. Add certificate_file = "…" to [mqtt.tls]'),
        ("certificate_file = 7", "certificate_file", "7 is not text. Put the value in quotes"),
        ("verify_host_name = false", "verify_host_name", 'Add ca_file = "…" to [mqtt.tls]'),
        ('ca_file = ""\nverify_host_name = false', "ca_file", "is not a path"),
        ('cafile = "ca.crt"', "cafile", 'Did you mean "ca_file"?'),
        ("port = 8883", "port", "belongs under [mqtt]?"),
    ],
)
def test_a_fault_of_tls_is_told_once_with_key_and_cure(file: Path, lines: str, option: str, cure: str) -> None:
    (fault,) = faults(file, f"{SMALLEST}[mqtt.tls]\n{lines}\n")
    assert fault.startswith(f"{file}: mqtt.tls.{option}: ")
    assert cure in fault


def test_the_host_name_may_go_unverified_beside_a_file_of_authorities(file: Path) -> None:
    file.write_text(f"{SMALLEST}{TLS}verify_host_name = false\n")
    tls = load(file, {}).mqtt.tls
    assert tls is not None
    assert not tls.verify_host_name


def test_tls_that_is_no_section_is_refused_once(file: Path) -> None:
    (fault,) = faults(file, replaced("port = 1883", "tls = true"))
    assert fault.startswith(f"{file}: mqtt.tls: is not written as a section. Start it with the line [mqtt.tls]")


def test_a_password_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"nowhere: mqtt.password_file: cannot be read \(No such file.*Put the password"
    ):
        read_password(Mqtt(host="::1", username="u", password_file=tmp_path / "nowhere"))


@pytest.mark.parametrize(("content", "words"), [(b"\xff\xfe", "UTF-8"), (b"\n", "is empty"), (b"", "is empty")])
def test_a_password_file_without_a_password_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{secret}: mqtt.password_file: .*{words}"):
        read_password(Mqtt(host="::1", username="u", password_file=secret))


def test_a_missing_file_is_named_with_a_cure(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path / "nowhere.toml")
    assert fault.startswith(f"{tmp_path / 'nowhere.toml'}: there is no such file. Check the path")


def test_a_folder_instead_of_a_file_is_named_with_a_cure(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path)
    assert fault == f"{tmp_path}: is a folder. Name the file in it, like {tmp_path / 'inspectd.toml'}."


def test_a_file_that_may_not_be_read_is_named_with_a_cure(file: Path) -> None:
    file.chmod(0)
    with an_ordinary_user():
        (fault,) = faults(file)
    assert fault == f"{file}: may not be read by this user. Give the user the right to read it."


def test_a_name_that_the_disk_refuses_is_named_with_its_reason(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path / ("x" * 300))
    assert "cannot be read (File name too long)" in fault


def test_a_file_that_is_not_utf8_is_refused_with_its_line(file: Path) -> None:
    (fault,) = faults(file, b'# one\nnode = "m\xfcller"\n')
    assert fault == f"{file}, line 2: is not UTF-8 text. Save the file as UTF-8."


def test_broken_toml_is_refused_with_its_line_and_column(file: Path) -> None:
    (fault,) = faults(file, replaced('host = "127.0.0.1"', "host = 127.0.0.1"))
    assert fault.startswith(f"{file}, line 3, column 13: is not TOML: ")
    assert "text stands in quotes" in fault


def test_broken_toml_at_the_end_of_the_file_says_so(file: Path) -> None:
    (fault,) = faults(file, SMALLEST + 'note = """')
    assert fault.startswith(f"{file}, end of document: is not TOML: ")


@pytest.mark.parametrize(
    ("old", "new", "key", "cure"),
    [
        ("[mqtt]", '[mqtt]\nhots = "x"', "mqtt.hots", 'is not an option. Did you mean "host"?'),
        ("\n[mqtt]", "devcie = 1\n[mqtt]", "devcie", 'Did you mean "device"?'),
        ("\n[mqtt]", "keepalive = 3\n[mqtt]", "keepalive", 'Did you mean "keepalive_s", which belongs under [mqtt]?'),
        ("\n[mqtt]", "settle_ms = 3\n[mqtt]", "settle_ms", "which belongs under [station.source]?"),
        ("[mqtt]", "[mqtt]\nzzz = 1", "mqtt.zzz", "Take it away; known here: host, port,"),
        ("[[station]]", "[[stations]]", "stations", 'Did you mean "station"?'),
        ('"folder"', '"folder"\nzzz = 1', 'station[0].source.zzz ("cam1")', "known here: type, path,"),
        ("\n[mqtt]", 'node = "edge 7"\n[mqtt]', "node", '"edge 7" is not a name. Use 1 to 32 letters, digits'),
        (
            "\n[mqtt]",
            "state_dir = 7\n[mqtt]",
            "state_dir",
            '7 is not text. Put the value in quotes, like state_dir = "',
        ),
        ("\n[mqtt]", 'device = "gpu"\n[mqtt]', "device", "\"gpu\" is not a choice. Write 'auto', 'cpu' or 'cuda'"),
        ("\n[mqtt]", "threads = 1.5\n[mqtt]", "threads", "1.5 is not a whole number. Write digits alone"),
        ("\n[mqtt]", "threads = -1\n[mqtt]", "threads", "-1 is out of range. Give a number of at least 0"),
        ('host = "127.0.0.1"', "", "mqtt.host", 'is missing. Add a line "host = …" under [mqtt].'),
        ('"127.0.0.1"', '"mqtt://broker"', "mqtt.host", "without mqtt://"),
        ('"127.0.0.1"', '"broker:1883"', "mqtt.host", "the port is another option"),
        ('"127.0.0.1"', '""', "mqtt.host", '"" is not a host'),
        ('"127.0.0.1"', "true", "mqtt.host", "true is not text. Put the value in quotes"),
        ("1883", '"1883"', "mqtt.port", '"1883" is not a whole number. Write digits alone, without quotes'),
        ("1883", "true", "mqtt.port", "true is not a whole number"),
        ("1883", "0", "mqtt.port", "0 is out of range. Give a number of at least 1 and at most 65535."),
        ("1883", "65536", "mqtt.port", "65536 is out of range. Give a number of at least 1 and at most 65535."),
        (
            "port = 1883",
            "protocol = 5",
            "mqtt.protocol",
            "5 is not a choice. Write 'auto', '5' or '3.1.1', with the quotes",
        ),
        ("port = 1883", 'username = ""', "mqtt.username", "is empty. Write at least 1 character"),
        ("port = 1883", f'username = "{"u" * 257}"', "mqtt.username", "is too long. Use at most 256 characters."),
        ("port = 1883", 'password_file = "p"', "mqtt.password_file", 'there is no user. Add username = "…" to [mqtt]'),
        ("port = 1883", "keepalive_s = 4", "mqtt.keepalive_s", "at least 5 and at most 3600"),
        ("port = 1883", 'overlays = "some"', "mqtt.overlays", "Write 'rejects', 'all' or 'none'"),
        ("port = 1883", "overlay_side = 63", "mqtt.overlay_side", "at least 64 and at most 2048"),
        ("port = 1883", "overlay_side = 2049", "mqtt.overlay_side", "at least 64 and at most 2048"),
        ("port = 1883", "actuation_ttl_s = 0", "mqtt.actuation_ttl_s", "0 is out of range. Give a number above 0"),
        ("port = 1883", "actuation_ttl_s = inf", "mqtt.actuation_ttl_s", "is not a number. Write one like 2.5"),
        ("port = 1883", 'actuation_ttl_s = "2"', "mqtt.actuation_ttl_s", '"2" is not a number. Write one like 2.5'),
        ("port = 1883", "max_packet_bytes = 10", "mqtt.max_packet_bytes", "at least 4096"),
        ('name = "cam1"', 'name = "cam/1"', 'station[0].name ("cam/1")', "Use 1 to 32 letters, digits, - and _"),
        ('name = "cam1"', "", "station[0].name", 'Add a line "name = …" under [[station]].'),
        ('"models/screw"', '""', 'station[0].model ("cam1")', "is not a path. Name a file or folder"),
        ('"models/screw"', r'"a\u0000"', 'station[0].model ("cam1")', "is not a path. Name a file or folder"),
        ("path =", "pfad =", 'station[0].source.path ("cam1")', 'Add a line "path = …" under [station.source].'),
        ('"folder"', '"camera"', 'station[0].source ("cam1")', "unknown type \"camera\". Write type = 'folder'"),
        ('type = "folder"', "", 'station[0].source ("cam1")', 'has no type. Add a line like type = "folder"'),
        ('"folder"', '"folder"\nsettle_ms = 60001', 'station[0].source.settle_ms ("cam1")', "at most 60000"),
        ('"folder"', '"folder"\ngive_up_s = 0', 'station[0].source.give_up_s ("cam1")', "above 0"),
        ('"folder"', '"folder"\nrescan_s = nan', 'station[0].source.rescan_s ("cam1")', "is not a number"),
        ("[station.source]", "challenge = 1\n[station.source]", 'station[0].challenge ("cam1")', "[station.challenge]"),
        (
            "[station.source]",
            "regions = 5\n[station.source]",
            'station[0].regions ("cam1")',
            "Start it with the line [station.regions]",
        ),
        ("[station.source]", "count = 2\n[station.source]", 'station[0].count ("cam1")', "under [station.regions]?"),
        ("[[station]]", "[station]", "station", "Start it with the line [[station]], brackets as here."),
        ("[mqtt]", "[[mqtt]]", "mqtt", "Start it with the line [mqtt], brackets as here."),
    ],
)
def test_a_fault_is_told_with_file_key_and_cure(file: Path, old: str, new: str, key: str, cure: str) -> None:
    (fault,) = [line for line in faults(file, replaced(old, new)) if line.startswith(f"{file}: {key}: ")]
    assert cure in fault


@pytest.mark.parametrize(
    ("shifts", "cure"),
    [
        ('["6:00"]', "is no list of times"),
        ('["24:00"]', "is no list of times"),
        ('["06:00", 14]', "is no list of times"),
        ("06:00:00", "Write hours and minutes, in quotes"),
        ('["06:00", "06:00"]', "Name each time once."),
    ],
)
def test_times_of_shifts_that_are_none_are_refused(file: Path, shifts: str, cure: str) -> None:
    (fault,) = faults(file, f"shifts = {shifts}\n{SMALLEST}")
    assert fault.startswith(f"{file}: shifts: ")
    assert cure in fault


def test_shifts_are_taken_as_they_stand_and_there_are_none_by_default(file: Path) -> None:
    for shown, taken in (("", ()), ('shifts = ["22:00", "06:00"]', ("22:00", "06:00"))):
        file.write_text(f"{shown}\n{SMALLEST}")
        assert load(file, {}).shifts == taken


@pytest.mark.parametrize(
    ("lines", "option", "cure"),
    [
        ("", "name", 'Add a line "name = …" under [station.challenge].'),
        ('name = ""', "name", "is empty. Write at least 1 character"),
        ("within_min = 0", "within_min", "above 0 and at most 1440"),
        ("every_h = true", "every_h", "true is not a number"),
        ("evry_h = 4", "evry_h", 'Did you mean "every_h"?'),
        ("good = []", "good", "Name at least one part."),
        ("bad = []", "bad", "Name at least one part."),
        ('good = "LS-1"', "good", '"LS-1" is not a list. Write one between'),
        ("good = [1]", "good[0]", "1 is not a part id. Write it as"),
        ('good = ["LS 1"]', "good[0]", '"LS 1" is not a part id.'),
        ('bad = ["a", "a"]', "bad", 'names "a" twice. Name each part once.'),
        (
            'good = ["a", "b"]\nbad = ["c", "b"]',
            "bad",
            'names "b", which is among the good parts.',
        ),
    ],
)
def test_a_fault_of_a_challenge_test_is_told_with_key_and_cure(file: Path, lines: str, option: str, cure: str) -> None:
    told = faults(file, f"{SMALLEST}[station.challenge]\n{lines}\n")
    (fault,) = [line for line in told if line.startswith(f'{file}: station[0].challenge.{option} ("cam1"): ')]
    assert cure in fault


def test_a_challenge_test_is_read_and_is_absent_otherwise(file: Path) -> None:
    assert load(file, {}).stations[0].challenge is None
    lines = 'name = "screw, box 3"\ngood = ["LS-01"]\nbad = ["LS-11", "LS-12"]\nholds_station = true\n'
    file.write_text(f"{SMALLEST}[station.challenge]\n{lines}")
    assert load(file, {}).stations[0].challenge == Challenge(
        name="screw, box 3",
        good=("LS-01",),
        bad=("LS-11", "LS-12"),
        every_h=8,
        within_min=30,
        holds_station=True,
    )


@pytest.mark.parametrize(
    ("told", "name", "cure"),
    [
        ("smallest_area_px = -1", "smallest_area_px", "-1 is out of range. Give a number of at least 0 and at most 1"),
        ('smallest_area_px = "40"', "smallest_area_px", '"40" is not a number. Write one like 2.5'),
        ("smallest_area_px = inf", "smallest_area_px", "is not a number"),
        ('smallest_area_px = "40"\ncount = 2', "smallest_area_px", "is not a number"),
        ("smallest_area_px = 40\ncount = 0", "count", "0 is out of range. Give a number of at least 1 and at most 1"),
        ("smallest_area_px = 40\ncount = 1.5", "count", "1.5 is not a whole number"),
        ("count = 2", "count", "2 cannot be counted without a size. Add smallest_area_px = … to [station.regions]"),
        ("smallest_area_px = 0\ncount = 2", "count", "2 cannot be counted without a size"),
        ('roi = ""', "roi", "is not a path. Name a file or folder"),
        ("ignore = [1]", "ignore", "a list is not text. Put the value in quotes"),
        ('polygon = "roi.png"', "polygon", "known here: smallest_area_px, count, roi, ignore"),
    ],
)
def test_a_fault_of_the_regions_is_told_once_with_key_and_cure(file: Path, told: str, name: str, cure: str) -> None:
    (fault,) = faults(file, f"{SMALLEST}[station.regions]\n{told}\n")
    assert fault.startswith(f'{file}: station[0].regions.{name} ("cam1"): ')
    assert cure in fault


@pytest.mark.parametrize(
    ("told", "name", "cure"),
    [
        ("crop = [0, 0, 10]", "crop", "a list is no crop. Write four whole numbers, [x, y, width, height]."),
        ("crop = [0, 0, 10.0, 10]", "crop", "Write four whole numbers"),
        ("crop = [0, 0, 10, true]", "crop", "Write four whole numbers"),
        ('crop = "0 0 10 10"', "crop", '"0 0 10 10" is no crop. Write four'),
        ("crop = [-1, 0, 10, 10]", "crop", "Give x and y from 0, width and height from 1"),
        ("crop = [0, 0, 0, 10]", "crop", "Give x and y from 0, width and height from 1"),
        ("shrink = 3", "shrink", "3 is no such share. Write 1, 2, 4 or 8, without quotes."),
        ("shrink = true", "shrink", "is no such share"),
        ("rotate = 45", "rotate", "45 is no such turn. Write 0, 90, 180 or 270, without quotes."),
        ('rotate = "90"', "rotate", '"90" is no such turn'),
        ("rotate = 90.0", "rotate", "is no such turn"),
        ("rotate = false", "rotate", "is no such turn"),
        ('flat_field = ""', "flat_field", "is not a path. Name a file or folder"),
        ("flip = true", "flip", "known here: shrink, flat_field, crop, rotate"),
    ],
)
def test_a_fault_of_the_framing_is_told_once_with_key_and_cure(file: Path, told: str, name: str, cure: str) -> None:
    (fault,) = faults(file, f"{SMALLEST}[station.framing]\n{told}\n")
    assert fault.startswith(f'{file}: station[0].framing.{name} ("cam1"): ')
    assert cure in fault


def test_the_framing_of_a_station_is_read_and_is_plain_otherwise(file: Path) -> None:
    assert load(file, {}).stations[0].framing == Framing(shrink=1, flat_field=None, crop=None, rotate=0)
    framing = 'shrink = 2\nflat_field = "flat.png"\ncrop = [1, 0, 30, 20]\nrotate = 270\n'
    file.write_text(f"{SMALLEST}[station.framing]\n{framing}")
    assert load(file, {}).stations[0].framing == Framing(
        shrink=2, flat_field=file.parent / "flat.png", crop=(1, 0, 30, 20), rotate=270
    )


def test_stations_that_frame_otherwise_cannot_share_a_calibration(file: Path) -> None:
    (fault,) = faults(file, f"{SMALLEST}{SECOND_STATION}[station.framing]\nrotate = 90\n")
    assert fault.startswith(f'{file}: station[1].calibration ("cam2"): ')
    assert fault.endswith("too, whose framing is another. Give one of them a calibration file of its own.")


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "/plant",
        "plant/",
        "plant//line1",
        "plant/+",
        "#",
        "a b",
        "a/b/c/d/e/f/g",
        "x" * 33,
        "line\\n",
        "$SYS",
        "w\u00e4rk",
    ],
)
def test_a_bad_topic_prefix_is_refused_with_the_rule(file: Path, prefix: str) -> None:
    (fault,) = faults(file, replaced("plant/line1", prefix))
    assert f"{file}: mqtt.topic_prefix: " in fault
    assert "1 to 6 levels" in fault
    assert "no slash at either end and no wildcard" in fault


@pytest.mark.parametrize("prefix", ["a", "a/b/c/d/e/f", "x" * 32, "Plant_1/line-2"])
def test_a_good_topic_prefix_is_taken(file: Path, prefix: str) -> None:
    file.write_text(replaced("plant/line1", prefix))
    assert load(file, {}).mqtt.topic_prefix == prefix


FOLDER = 'type = "folder"\npath = "incoming"'


@pytest.mark.parametrize("topic", ["#", "+/line1/#", "plant/+/cam1/cmd", "plant/line1/+"])
def test_images_cannot_come_from_where_inspectd_speaks(file: Path, topic: str) -> None:
    (fault,) = faults(file, replaced(FOLDER, f'type = "mqtt"\ntopic = "{topic}"'))
    assert 'station[0].source.topic ("cam1")' in fault
    assert "has topics below plant/line1/, where inspectd itself speaks" in fault


@pytest.mark.parametrize("topic", ["", "a/#/b", "a+", "$share/g/a", "a\u0000b", "x" * 1025])
def test_what_is_no_topic_to_subscribe_to_is_refused_with_the_rule(file: Path, topic: str) -> None:
    (fault,) = faults(file, replaced(FOLDER, f'type = "mqtt"\ntopic = {json.dumps(topic)}'))
    assert "is not a topic to subscribe to" in fault


@pytest.mark.parametrize("topic", ["plant/images", "plant", "lines/+/images", "plant/line2/#", "/a//b"])
def test_images_may_come_from_anywhere_else(file: Path, topic: str) -> None:
    file.write_text(replaced(FOLDER, f'type = "mqtt"\ntopic = "{topic}"\ngroup = "g"'))
    assert load(file, {}).stations[0].source == MqttSource(type="mqtt", topic=topic, group="g")


@pytest.mark.parametrize("host", ["broker", "broker.plant.example", "::1", "192.168.0.2"])
def test_names_and_addresses_are_hosts(file: Path, host: str) -> None:
    file.write_text(replaced("127.0.0.1", host) + TLS)
    assert load(file, {}).mqtt.host == host


def test_an_empty_file_lacks_both_sections(file: Path) -> None:
    assert faults(file, "") == [
        f"{file}: mqtt: is missing. Add a section [mqtt].",
        f"{file}: station: is missing. Add a section [[station]].",
    ]


def test_an_empty_list_of_stations_is_refused(file: Path) -> None:
    (fault,) = faults(file, 'station = []\n[mqtt]\nhost = "localhost"\n')
    assert "station: " in fault
    assert "Add a section [[station]]." in fault


def test_a_station_that_is_no_section_is_refused_once(file: Path) -> None:
    (fault,) = faults(file, 'station = [1]\n[mqtt]\nhost = "localhost"\n')
    assert f"{file}: station[0]: is not written as a section." in fault


def test_a_credential_without_a_user_is_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "mqtt_password").write_text("opensesame")
    (fault,) = faults(file, environ={"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert f"{file}: mqtt.password_file: " in fault
    assert str(tmp_path / "mqtt_password") in fault
    assert "Add username" in fault


def test_two_stations_of_one_name_are_refused(file: Path) -> None:
    (fault,) = faults(file, SMALLEST + replaced("cam2", "cam1", SECOND_STATION))
    assert f'{file}: station[1].name: "cam1" is the name of station[0] already. Give each' in fault


@pytest.mark.parametrize("folder", ["incoming", "./incoming/", "other/../incoming", "link"])
def test_two_stations_on_one_folder_are_refused(file: Path, folder: str) -> None:
    (file.parent / "link").symlink_to(file.parent / "incoming")
    (fault,) = faults(file, SMALLEST + replaced("incoming2", folder, SECOND_STATION))
    assert f'{file}: station[1].source.path ("cam2"): {file.parent / "incoming"} is watched by station[0]' in fault
    assert "Give each station a folder of its own." in fault


@pytest.mark.parametrize("subfolder", ["done", "failed", "processing"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_station_on_another_stations_subfolder_is_refused(file: Path, subfolder: str, order: int) -> None:
    top, station = SMALLEST.split("[[station]]")
    stations = ["[[station]]" + station, replaced("incoming2", f"incoming/{subfolder}", SECOND_STATION)][::order]
    (fault,) = faults(file, top + "".join(stations))
    assert '.source.path ("cam2"): ' in fault
    assert f"keeps its parts in {subfolder}/. Choose a folder outside" in fault


def test_a_station_on_any_other_subfolder_is_valid(file: Path) -> None:
    file.write_text(SMALLEST + replaced("incoming2", "incoming/cam2", SECOND_STATION))
    assert folder_of(load(file, {}).stations[1]) == file.parent / "incoming" / "cam2"


def test_all_faults_are_told_at_once(file: Path) -> None:
    content = "treads = 2\n" + replaced("1883", "0\nusername = 3\npassword_file = 4") + SECOND_STATION + SECOND_STATION
    told = faults(file, replaced('model = "models/screw"', "", content) + 'settle_ms = "1"\n[[station]]\n')
    assert [line.removeprefix(f"{file}: ").partition(": ")[0] for line in told] == [
        "mqtt.port",
        "mqtt.username",
        "mqtt.password_file",
        'station[0].model ("cam1")',
        'station[1].model ("cam2")',
        'station[2].model ("cam2")',
        'station[2].source.settle_ms ("cam2")',
        "station[3].name",
        "station[3].model",
        "station[3].source",
        "treads",
    ]


def test_stations_that_clash_are_told_beside_other_faults(file: Path) -> None:
    told = faults(file, replaced("1883", "0") + SECOND_STATION + SECOND_STATION + "[[station]]\n")
    assert any("mqtt.port: " in line for line in told)
    assert any("station[3].name: is missing" in line for line in told)
    assert any('station[2].name: "cam2" is the name of station[1]' in line for line in told)
    assert any('station[2].source.path ("cam2"): ' in line for line in told)


def test_the_sample_is_valid_as_shipped() -> None:
    settings = load(SAMPLE, {})
    assert settings.mqtt.host == "127.0.0.1"
    assert folder_of(settings.stations[0]) == SAMPLE.parent / "incoming"


PATTERN = ("part_id_pattern",)


def test_the_sample_shows_the_defaults(file: Path) -> None:
    """Every commented line holds its default, but for those that can only show an example."""
    lines = SAMPLE.read_text().splitlines()
    file.write_text("\n".join(lines))
    shipped = load(file, {}).model_dump()
    shown = [line.removeprefix("# ") if OPTION.fullmatch(line) or HEADING.fullmatch(line) else line for line in lines]
    recipe, (_, genicam, video, mqtt) = (
        shown.index("[[station.recipe]]"),
        [number for number, line in enumerate(shown) if line == "[station.source]"],
    )
    after = shown.index("[station.framing]") - 1
    file.write_text("\n".join(shown[:genicam] + shown[after:recipe]))
    uncommented = load(file, {}).model_dump()
    examples = [
        (uncommented.pop("node"), shipped.pop("node")),
        (uncommented.pop("shifts"), shipped.pop("shifts")),
        (uncommented["mqtt"].pop("username"), shipped["mqtt"].pop("username")),
        (uncommented["mqtt"].pop("password_file"), shipped["mqtt"].pop("password_file")),
        (tls := uncommented["mqtt"].pop("tls"), shipped["mqtt"].pop("tls")),
        *[(uncommented["stations"][0]["regions"].pop(n), shipped["stations"][0]["regions"].pop(n)) for n in MASKS],
        *[(uncommented["stations"][0]["framing"].pop(n), shipped["stations"][0]["framing"].pop(n)) for n in FRAMES],
        (uncommented["stations"][0].pop("calibration"), shipped["stations"][0].pop("calibration")),
        *[(uncommented["stations"][0]["source"].pop(n), shipped["stations"][0]["source"].pop(n)) for n in PATTERN],
        (challenge := uncommented["stations"][0].pop("challenge"), shipped["stations"][0].pop("challenge")),
        (metrics := uncommented.pop("metrics"), shipped.pop("metrics")),
        (archive := uncommented.pop("archive"), shipped.pop("archive")),
    ]
    assert all(example != default for example, default in examples)
    assert uncommented == shipped
    assert tls == Tls(**{key: tls[key] for key in ("ca_file", "certificate_file", "key_file")}).model_dump()
    assert challenge == Challenge(**{key: challenge[key] for key in ("name", "good", "bad")}).model_dump()
    assert metrics == Metrics().model_dump()
    assert archive == Archive(path=archive["path"]).model_dump()
    before = lines[: lines.index("[station.source]")]
    file.write_text("\n".join(before + shown[genicam:video]))
    camera = load(file, {}).stations[0].source
    assert camera == GenicamSource(
        type="genicam", camera="192.168.0.10", features={"ExposureTime": 5000.0, "Gain": 0.0}
    )
    file.write_text("\n".join(before + shown[mqtt:after]))
    sent = load(file, {}).stations[0].source
    assert sent == MqttSource(type="mqtt", topic="lines/images", group="inspectors")
    file.write_text("\n".join(before + shown[video:mqtt]))
    recorded = load(file, {}).stations[0].source
    asked = {"width": 1280, "height": 1024, "fps": 30.0, "fourcc": "MJPG"}
    assert recorded == VideoSource.model_validate({"type": "video", "place": "/dev/video0", "live": True, **asked})
    group = shown.index("[[group]]")
    file.write_text("\n".join([line for line in lines if not line.startswith("model = ")] + shown[recipe:group]))
    (own,) = load(file, {}).stations[0].own_recipes
    at = file.parent
    assert own == Recipe(
        name="bracket-A",
        model=at / "models" / "bracket-a",
        calibration=at / "calibrations" / "bracket-a.json",
        regions=Regions(roi=at / "roi.png", ignore=at / "ignore.png"),
        challenge=Challenge(**{key: challenge[key] for key in ("name", "good", "bad")}),
    )


TWO_RECIPES = """
[[station.recipe]]
name = "bracket-A"
model = "models/a"
[[station.recipe]]
name = "bracket-B"
model = "models/b"
[station.recipe.regions]
smallest_area_px = 4
"""


def test_a_station_judges_by_its_model_or_by_its_recipes(file: Path) -> None:
    (alone,) = load(file, {}).stations[0].recipes
    assert (alone.name, alone.model) == ("default", file.parent / "models" / "screw")
    file.write_text(replaced('model = "models/screw"\n', "") + TWO_RECIPES)
    recipes = load(file, {}).stations[0].recipes
    assert [recipe.name for recipe in recipes] == ["bracket-A", "bracket-B"]
    assert recipes[1].calibration_file == file.parent / "models" / "b" / "calibration.json"
    assert recipes[1].regions.smallest_area_px == 4


def test_recipes_that_clash_are_told(file: Path) -> None:
    key = 'station[0].recipe ("cam1")'
    (fault,) = faults(file, SMALLEST + TWO_RECIPES)
    assert fault == f"{file}: {key}: stands beside model. Take those away, or move them into a [[station.recipe]]."
    alone = replaced('model = "models/screw"\n', "")
    (fault,) = faults(file, alone + TWO_RECIPES.replace("bracket-B", "bracket-A"))
    assert fault == f'{file}: {key}: has "bracket-A" twice. Give each recipe a name of its own.'
    (fault,) = faults(file, alone + TWO_RECIPES.replace("models/b", "models/a"))
    assert 'station[0].recipe[1].calibration ("cam1")' in fault
    assert "whose regions are others" in fault


def test_the_sample_shows_every_option_once_in_order_below_its_description() -> None:
    section, above = "", ""
    told: list[tuple[str, str]] = []
    for line in SAMPLE.read_text().splitlines():
        if heading := HEADING.fullmatch(line):
            section = f"{heading[2]}."
            told.append((heading[2], above))
        elif option := OPTION.fullmatch(line):
            told.append((section + option[2], above))
        above = line.removeprefix("# ")
    described = [(key, field.description or "") for key, field in options()]
    assert told == described
    assert all(description.endswith(".") for _, description in described)


def test_the_sample_comments_out_what_has_a_default_and_nothing_else() -> None:
    may_be_absent = tuple(f"{key}." for key, field in options() if not field.is_required())
    required = {
        key.rpartition(".")[2] for key, field in options() if field.is_required() and not key.startswith(may_be_absent)
    }
    shown = {
        option[2] for line in SAMPLE.read_text().splitlines() if (option := OPTION.fullmatch(line)) and not option[1]
    }
    # Recipes and other kinds of sources are shown as well.
    assert shown == {*required, "model"} - {"mqtt", "station", "source", "camera", "place", "topic"}


def test_every_number_has_bounds() -> None:
    for key, field in options():
        if field.annotation in {int, float}:
            bounds = {name for rule in field.metadata for name in ("gt", "ge", "le") if hasattr(rule, name)}
            assert "le" in bounds, key
            assert bounds & {"gt", "ge"}, key


def test_the_options_are_those_of_the_settings() -> None:
    keys = [key for key, _ in options()]
    assert {"node", "mqtt", "mqtt.port", "station", "station.name", "station.source", "station.source.path"} <= set(
        keys
    )
    kinds = [key for key in keys if not key.startswith("station.source")]
    assert len(kinds) == len(set(kinds))
    assert keys.count("station.source") == 4


GROUP = """
[[group]]
name = "part"
views = ["cam1", "cam2"]
"""


def test_stations_that_see_one_part_form_a_group(file: Path) -> None:
    assert load(file, {}).groups == ()
    file.write_text(SMALLEST + SECOND_STATION + GROUP)
    assert load(file, {}).groups == (Group(name="part", views=("cam1", "cam2"), by="part_id", within_s=2.0),)
    file.write_text(f'{SMALLEST}{SECOND_STATION}{GROUP}by = "trigger_id"\nwithin_s = 0.5\n')
    (group,) = load(file, {}).groups
    assert (group.by, group.within_s) == ("trigger_id", 0.5)


@pytest.mark.parametrize(
    ("old", "new", "key", "cure"),
    [
        (
            '"cam2"]',
            '"cam3"]',
            'group[0].views ("part")',
            'there is no station "cam3". Name some of these: cam1, cam2.',
        ),
        ('"cam2"]', '"cam1"]', "group[0].views", "are no views of one part. Name 2 to 8 stations, each once."),
        (', "cam2"]', "]", "group[0].views", "Name 2 to 8 stations, each once."),
        ('["cam1", "cam2"]', '"cam1"', "group[0].views", '"cam1" is not a list. Write one between brackets'),
        ('["cam1", "cam2"]', '["cam 1", "cam2"]', "group[0].views[0]", '"cam 1" is not a name.'),
        ('views = ["cam1", "cam2"]', "", "group[0].views", 'Add a line "views = …" under [[group]].'),
        ('"part"', '"cam2"', "group[0].name", '"cam2" is the name of a station already. Give the group its own.'),
        ('"part"', '"part"\nby = "id"', "group[0].by", "Write 'part_id' or 'trigger_id'"),
        ('"part"', '"part"\nwithin_s = 0', "group[0].within_s", "above 0 and at most 3600"),
        ("[[group]]", "[group]", "group", "Start it with the line [[group]], brackets as here."),
    ],
)
def test_a_fault_of_a_group_is_told_with_key_and_cure(file: Path, old: str, new: str, key: str, cure: str) -> None:
    (fault,) = faults(file, SMALLEST + SECOND_STATION + replaced(old, new, GROUP))
    assert fault.startswith(f"{file}: {key}: ")
    assert cure in fault


def test_a_station_is_in_one_group_and_groups_have_names_of_their_own(file: Path) -> None:
    told = faults(file, SMALLEST + SECOND_STATION + GROUP + GROUP)
    assert told == [
        f'{file}: group[1].name: "part" is the name of a group already. Give the group its own.',
        f'{file}: group[1].views ("part"): "cam1" is in the group "part" already. Take it out of one of the two.',
        f'{file}: group[1].views ("part"): "cam2" is in the group "part" already. Take it out of one of the two.',
    ]


def test_the_sample_of_a_group_shows_its_defaults(file: Path) -> None:
    lines = SAMPLE.read_text().splitlines()
    shown = [
        line.removeprefix("# ") for line in lines[lines.index("# [[group]]") :] if re.match(r"# (\[|\w+ = )", line)
    ]
    file.write_text(SMALLEST + SECOND_STATION + "\n".join(shown))
    assert load(file, {}).groups == (Group(name="part", views=("cam1", "cam2")),)


TWO_LISTENERS = """
[mqtt]
host = "127.0.0.1"
[[station]]
name = "cam1"
model = "m"
[station.source]
type = "mqtt"
topic = "lines/+/images"
[[station]]
name = "cam2"
model = "m"
[station.source]
type = "mqtt"
topic = "{topic}"
"""


@pytest.mark.parametrize("topic", ["lines/+/images", "lines/a/images", "lines/#", "lines/a/+"])
def test_one_image_does_not_come_to_two_stations(file: Path, topic: str) -> None:
    (fault,) = faults(file, TWO_LISTENERS.replace("{topic}", topic))
    assert f'station[1].source.topic ("cam2"): images on {topic} come to station[0] ("cam1") too.' in fault
    shared = TWO_LISTENERS.replace("{topic}", topic).replace('type = "mqtt"', 'type = "mqtt"\ngroup = "lines"')
    file.write_text(shared)
    assert len(load(file, {}).stations) == 2


@pytest.mark.parametrize("topic", ["lines/a/pictures", "lines/images", "lines/a/b/images", "other/#"])
def test_stations_with_topics_of_their_own_are_valid(file: Path, topic: str) -> None:
    file.write_text(TWO_LISTENERS.replace("{topic}", topic))
    assert len(load(file, {}).stations) == 2
