"""TLS, users and their rights: against real Mosquitto, with real certificates, and as docs/mqtt.md has it."""

import gc
import re
import shutil
import ssl
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from structlog.testing import capture_logs

from config.credentials import read_credentials, read_tls
from config.load import ConfigError, load
from config.schema import Mqtt, Tls
from daemon import link
from daemon.build import build_broker
from daemon.contract import Message
from daemon.link import DeliveryError, Link
from daemon.sinks.mqtt import PictureSink
from tests.brokers import (
    DEADLINE_S,
    HOST,
    ROOT,
    Broker,
    Subscriber,
    eventually,
    find_mosquitto,
    free_port,
)
from tests.component.test_mqtt_sink import picture, station, statuses

NAME = "localhost"
"""By which the broker's certificate knows it; its address is not in there."""
SECRET = "sw0rdfish-of-the-plant"  # noqa: S105 -- of no account
EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")

pytestmark = [
    pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed (apt-get install mosquitto)"),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed (apt-get install openssl)"),
]


@dataclass(frozen=True, slots=True)
class Authority:
    """Signs certificates, in a folder of its own."""

    folder: Path

    def found(self) -> "Authority":
        self.folder.mkdir()
        self._openssl(
            "req",
            "-x509",
            *EC,
            "-days",
            "30",
            "-subj",
            f"/CN={self.folder.name}",
            "-keyout",
            "ca.key",
            "-out",
            "ca.crt",
        )
        return self

    def sign(self, name: str, alternative: str = "", *, days: int = 30) -> tuple[Path, Path]:
        """Make a certificate and its key; `alternative` is what else it is valid for."""
        more = ["-addext", f"subjectAltName={alternative}"] if alternative else []
        self._openssl("req", *EC, "-subj", f"/CN={name}", *more, "-keyout", f"{name}.key", "-out", f"{name}.csr")
        by = ["-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", str(days), "-copy_extensions", "copy"]
        self._openssl("x509", "-req", "-in", f"{name}.csr", *by, "-out", f"{name}.crt")
        return self.folder / f"{name}.crt", self.folder / f"{name}.key"

    @property
    def certificate(self) -> Path:
        return self.folder / "ca.crt"

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The authority that signs for the broker and the daemon."""
    authority = Authority(tmp_path_factory.mktemp("certificates") / "plant").found()
    authority.sign("broker", f"DNS:{NAME}")
    authority.sign("other-name", "DNS:broker.plant.example")
    authority.sign("expired", f"DNS:{NAME}", days=-1)
    authority.sign("inspectd")
    authority.sign("inspectd-expired", days=-1)
    return authority


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority of which the plant knows nothing."""
    authority = Authority(tmp_path_factory.mktemp("certificates") / "stranger").found()
    authority.sign("inspectd")
    return authority


def serving(plant: Authority, name: str = "broker") -> list[str]:
    """What lets Mosquitto speak TLS with one of the certificates."""
    files = {
        "cafile": plant.certificate,
        "certfile": plant.folder / f"{name}.crt",
        "keyfile": f"{plant.folder / name}.key",
    }
    return [f"{option} {file}" for option, file in files.items()]


def trusting(authority: Authority, owner: Authority | None = None, name: str = "inspectd") -> Tls:
    """What lets the daemon trust an authority, and show a certificate where one is named."""
    if owner is None:
        return Tls(ca_file=authority.certificate)
    own = owner.folder
    return Tls(ca_file=authority.certificate, certificate_file=own / f"{name}.crt", key_file=own / f"{name}.key")


def to(broker: Broker, tls: Tls, host: str = NAME) -> link.Broker:
    return link.Broker(host, broker.port, tls=read_tls(tls))


def refusal(broker: link.Broker) -> DeliveryError:
    with pytest.raises(DeliveryError) as caught:
        Link(broker, "c")
    assert str(broker) in str(caught.value)
    return caught.value


# The connection


def test_the_station_and_the_pictures_arrive_by_tls(
    tmp_path: Path, mosquitto: Callable[..., Broker], plant: Authority
) -> None:
    plain = free_port()
    broker = mosquitto(*serving(plant), f"listener {plain} {HOST}")
    account = to(broker, trusting(plant))
    Link(account, "c").close()  # a broker that has answered listens on all its ports
    watching = Subscriber(plain, "inspectd/#")
    pictures = PictureSink(lambda: account, "edge7")
    with station(tmp_path, account):
        watching.wait(lambda: statuses(watching) == ["running"], "the station to be online")
        pictures.show(picture(300_000))
        watching.wait(lambda: watching.of("image/overlay"), "the picture")
    pictures.close()
    watching.wait(lambda: statuses(watching) == ["running", "stopped"], "the end")
    watching.close()


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_connection_is_encrypted_by_tls_1_2_or_later(
    mosquitto: Callable[..., Broker], plant: Authority, protocol: str
) -> None:
    broker = mosquitto(*serving(plant))
    context = read_tls(trusting(plant))
    connection = Link(link.Broker(NAME, broker.port, protocol, tls=context), "c")
    assert connection.protocol == protocol
    connection.close()
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname


def test_a_broker_of_an_unknown_authority_is_refused_with_its_reason(
    mosquitto: Callable[..., Broker], plant: Authority, stranger: Authority
) -> None:
    error = refusal(to(mosquitto(*serving(plant)), trusting(stranger)))
    assert error.refused
    assert "no authority that this machine knows" in str(error)
    assert "set ca_file in [mqtt.tls]" in str(error)


def test_the_authorities_of_the_system_do_not_vouch_for_that_of_the_plant(
    mosquitto: Callable[..., Broker], plant: Authority
) -> None:
    assert "no authority that this machine knows" in str(refusal(to(mosquitto(*serving(plant)), Tls())))


@pytest.mark.parametrize(("certificate", "host"), [("other-name", NAME), ("broker", HOST)])
def test_a_broker_of_another_name_is_refused_with_its_reason(
    mosquitto: Callable[..., Broker], plant: Authority, certificate: str, host: str
) -> None:
    error = refusal(to(mosquitto(*serving(plant, certificate)), trusting(plant), host))
    assert error.refused
    assert f"its certificate is not for {host}" in str(error)
    assert "set host in [mqtt]" in str(error)


def test_a_broker_of_another_name_is_taken_where_the_name_is_not_verified_but_not_one_of_another_authority(
    mosquitto: Callable[..., Broker], plant: Authority, stranger: Authority
) -> None:
    broker = mosquitto(*serving(plant, "other-name"))
    Link(to(broker, Tls(ca_file=plant.certificate, verify_host_name=False)), "c").close()
    assert refusal(to(broker, Tls(ca_file=stranger.certificate, verify_host_name=False))).refused


def test_a_broker_with_an_expired_certificate_is_refused_with_its_reason(
    mosquitto: Callable[..., Broker], plant: Authority
) -> None:
    error = refusal(to(mosquitto(*serving(plant, "expired")), trusting(plant)))
    assert error.refused
    assert "has expired" in str(error)
    assert "clock" in str(error)


@pytest.mark.parametrize("latest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_broker_that_demands_a_certificate_takes_ours_and_refuses_others_with_the_cure(
    tmp_path: Path, mosquitto: Callable[..., Broker], plant: Authority, stranger: Authority, latest: ssl.TLSVersion
) -> None:
    broker = mosquitto(*serving(plant), "require_certificate true")

    def by(tls: Tls) -> link.Broker:
        account = to(broker, tls)
        assert account.tls is not None
        account.tls.maximum_version = latest
        return account

    Link(by(trusting(plant, plant)), "c").close()
    namesake = Authority(tmp_path / "plant").found()
    namesake.sign("inspectd")
    others = [trusting(plant, other) for other in (None, stranger, namesake)]
    for tls in (*others, trusting(plant, plant, "inspectd-expired")):
        error = refusal(by(tls))
        assert error.refused, error
        assert "refuses the daemon's certificate, or that it shows none" in str(error)
        assert "certificate_file and key_file in [mqtt.tls]" in str(error)


def test_a_port_without_tls_is_named_where_tls_is_expected(mosquitto: Callable[..., Broker], plant: Authority) -> None:
    error = refusal(to(mosquitto(), trusting(plant)))
    assert not error.refused
    assert "cannot be reached by TLS" in str(error)
    assert "port in [mqtt]" in str(error)


def test_a_port_with_tls_is_hinted_at_where_none_is_expected(
    mosquitto: Callable[..., Broker], plant: Authority
) -> None:
    error = refusal(link.Broker(HOST, mosquitto(*serving(plant)).port))
    assert "if it expects TLS, add a section [mqtt.tls]" in str(error)


def test_connections_that_were_refused_leave_no_socket_open_even_before_garbage_is_collected(
    mosquitto: Callable[..., Broker], plant: Authority, stranger: Authority
) -> None:
    broker = mosquitto(*serving(plant), "require_certificate true")
    refused = [to(broker, trusting(stranger)), to(broker, trusting(plant))]
    gc.collect()
    gc.disable()
    try:
        before = psutil.Process().num_fds()
        for account in refused:
            with pytest.raises(DeliveryError):
                Link(account, "c")
        assert psutil.Process().num_fds() == before
    finally:
        gc.enable()


# The files


def test_all_faults_of_all_files_are_told_at_once(tmp_path: Path, plant: Authority) -> None:
    authority = tmp_path / "ca.crt"
    authority.write_text("a note")
    own = plant.folder
    tls = Tls(ca_file=authority, certificate_file=tmp_path / "none.crt", key_file=tmp_path / "none.key")
    with pytest.raises(ConfigError) as caught:
        read_credentials(Mqtt(host=NAME, username="u", password_file=tmp_path / "none", tls=tls))
    told = str(caught.value).splitlines()
    assert [line.partition(": ")[2].partition(": ")[0] for line in told] == [
        "mqtt.password_file",
        "mqtt.tls.ca_file",
        "mqtt.tls.certificate_file",
        "mqtt.tls.key_file",
    ]
    assert told[1].startswith(f"{authority}: ")
    assert "holds no certificate that can be used. Name a file in PEM form" in told[1]
    assert all("cannot be read (No such file or directory). Put the" in line for line in (told[0], *told[2:]))
    with pytest.raises(ConfigError, match=r"broker\.key: mqtt\.tls\.key_file: is not the key of .*inspectd\.crt"):
        read_tls(Tls(certificate_file=own / "inspectd.crt", key_file=own / "broker.key"))


def test_a_key_with_a_password_is_refused_without_asking_for_it(tmp_path: Path, plant: Authority) -> None:
    locked = tmp_path / "locked.key"
    to_lock = ["openssl", "pkey", "-in", str(plant.folder / "inspectd.key"), "-aes256", "-out", str(locked)]
    subprocess.run([*to_lock, "-passout", f"pass:{SECRET}"], check=True)
    with pytest.raises(ConfigError, match=r"locked\.key: mqtt\.tls\.key_file: .* without a password") as caught:
        read_tls(Tls(certificate_file=plant.folder / "inspectd.crt", key_file=locked))
    assert SECRET not in str(caught.value)


def test_a_file_that_is_no_key_is_refused(plant: Authority) -> None:
    certificate = plant.folder / "inspectd.crt"
    with pytest.raises(ConfigError, match=r"mqtt\.tls\.key_file: holds no private key that can be used"):
        read_tls(Tls(certificate_file=certificate, key_file=certificate))


# What is said


@pytest.mark.parametrize("command", ["check", "run"])
def test_the_program_says_which_broker_by_what_and_as_whom_and_nothing_secret(
    command: str, tmp_path: Path, plant: Authority
) -> None:
    (tmp_path / "password").write_text(SECRET)
    own = plant.folder
    (tmp_path / "inspectd.toml").write_text(
        f'[mqtt]\nhost = "broker.plant.example"\nusername = "line1"\npassword_file = "password"\n'
        f'[mqtt.tls]\nca_file = "{plant.certificate}"\ncertificate_file = "{own / "inspectd.crt"}"\n'
        f'key_file = "{own / "inspectd.key"}"\nverify_host_name = false\n'
        '[[station]]\nname = "cam1"\nmodel = "nowhere"\n[station.source]\ntype = "folder"\npath = "incoming"\n'
    )
    program = Path(sys.executable).with_name("inspectd")
    done = subprocess.run(
        [program, command, "--config", tmp_path / "inspectd.toml"], capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 78
    assert "nowhere" in said
    if command == "check":
        assert "broker broker.plant.example:8883 by TLS without verifying its host name, as user line1" in said
        assert f"with the certificate {own / 'inspectd.crt'}" in said
    else:
        assert "the broker's certificate need not name its host" in said
        assert '"level": "warning"' in said
    secrets = [SECRET, *(own / "inspectd.key").read_text().splitlines()[1:-1]]
    assert not [secret for secret in secrets if secret in said]


def test_a_refused_password_is_logged_by_its_user_alone(
    tmp_path: Path, mosquitto: Callable[..., Broker], plant: Authority
) -> None:
    passwords = add_user(tmp_path / "passwords", "inspectd")
    broker = mosquitto(*serving(plant), f"password_file {passwords}")
    context = read_tls(trusting(plant))
    account = link.Broker(NAME, broker.port, username="inspectd", password=f"{SECRET}-wrong", tls=context)
    with capture_logs() as logs, station(tmp_path, account):
        eventually(lambda: logs, "the warning")
    assert "refused user 'inspectd'" in logs[0]["event"]
    assert SECRET not in f"{logs} {account!r} {account}"


def add_user(passwords: Path, user: str) -> Path:
    """Let a user in with the password SECRET."""
    passwords.touch(mode=0o600)
    subprocess.run(["mosquitto_passwd", "-b", passwords, user, SECRET], check=True)
    return passwords


# The page


@dataclass(frozen=True, slots=True)
class Page:
    """The setup of docs/mqtt.md, block by block, for this machine instead of the plant's broker."""

    folder: Path
    port: int

    def block(self, number: int) -> str:
        _, _, section = (ROOT / "docs/mqtt.md").read_text().partition("\n## Security\n")
        blocks = re.findall(r"```\w*\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
        assert len(blocks) == 5
        text: str = blocks[number].replace("broker.plant.example", NAME).replace("listener 8883", self._listener)
        return text.replace("/etc/mosquitto", str(self.folder))

    def set_up(self, *more: int) -> Broker:
        """Do what the page says, with further blocks of the broker's configuration."""
        certificates = self.folder / "certs"
        certificates.mkdir()
        subprocess.run(["sh", "-ec", self.block(0)], cwd=certificates, check=True, capture_output=True)
        (self.folder / "acl").write_text(self.block(2))
        (self.folder / "acl").chmod(0o600)
        for user in ("inspectd", "plc", "viewer"):
            add_user(self.folder / "passwords", user)
        configuration = self.folder / "mosquitto.conf"
        configuration.write_text("".join(self.block(number) for number in (1, *more)) + "user root\n")
        program = find_mosquitto()
        assert program is not None
        return Broker([program, "-c", str(configuration)], self.port, self.folder / "mosquitto.log", five=True)

    def account(self) -> link.Broker:
        """The daemon's side of it, as the daemon would read it."""
        (self.folder / "certs/mqtt_password").write_text(SECRET)
        file = self.folder / "certs/inspectd.toml"
        file.write_text(
            self.block(4).replace("[mqtt]", f"[mqtt]\nport = {self.port}")
            + '[[station]]\nname = "cam1"\nmodel = "m"\n[station.source]\ntype = "folder"\npath = "incoming"\n'
        )
        return build_broker(load(file, {}).mqtt)()

    def client(self, program: str, user: str, topic: str, *more: str) -> list[str]:
        to_broker = ["-h", NAME, "-p", str(self.port), "--cafile", str(self.folder / "certs/ca.crt"), "-V", "5"]
        return [program, *to_broker, "-u", user, "-P", SECRET, "-q", "1", "-t", topic, *more]

    @property
    def _listener(self) -> str:
        return f"listener {self.port} {HOST}"


@pytest.fixture
def page(tmp_path: Path) -> Page:
    for program in ("mosquitto_passwd", "mosquitto_pub", "mosquitto_sub"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (apt-get install mosquitto mosquitto-clients)")
    return Page(tmp_path, free_port())


def publish(connection: Link, leaf: str, text: str, *, retain: bool = False) -> None:
    """Publish, and see that the broker has taken it."""
    connection.publish(Message(f"plant/line1/cam1/{leaf}", text.encode(), retain=retain)).wait_for_publish(DEADLINE_S)
    connection.check()


def hear(child: subprocess.Popen[str]) -> str:
    """Wait for the next message that a subscriber prints, as its leaf and payload."""
    assert child.stdout is not None
    return child.stdout.readline().strip().removeprefix("plant/line1/cam1/")


def test_with_the_setup_of_the_page_the_daemon_writes_the_plc_reads_its_own_and_strangers_are_refused(
    page: Page, started: Callable[[Broker], Broker]
) -> None:
    started(page.set_up())
    account = page.account()
    connection = Link(account, "inspectd.edge7.cam1")
    publish(connection, "state", "ready", retain=True)
    everything, patience = "plant/line1/cam1/#", ("-F", "%t %p", "-W", str(round(DEADLINE_S)))
    children = {
        user: subprocess.Popen(
            page.client("mosquitto_sub", user, everything, *patience), stdout=subprocess.PIPE, text=True
        )
        for user in ("plc", "viewer")
    }
    heard = {user: [hear(child)] for user, child in children.items()}  # what is retained: they have subscribed
    publish(connection, "verdict", "1")
    publish(connection, "plc", "2")
    forge = page.client("mosquitto_pub", "plc", "plant/line1/cam1/plc", "-m", "forged")
    forged = subprocess.run(forge, capture_output=True, text=True, check=False)
    publish(connection, "status", "3")
    heard["plc"] += [hear(children["plc"]) for _ in range(2)]
    heard["viewer"] += [hear(children["viewer"]) for _ in range(3)]
    for child in children.values():
        child.terminate()
        child.communicate()
    connection.close()
    assert heard == {
        "plc": ["state ready", "plc 2", "status 3"],
        "viewer": ["state ready", "verdict 1", "plc 2", "status 3"],
    }
    assert "not authorized" in forged.stderr.lower()
    nobody = refusal(link.Broker(NAME, page.port, tls=account.tls))
    assert nobody.refused
    assert "refused a client without a user name" in str(nobody)
    assert "refused user 'plc'" in str(
        refusal(link.Broker(NAME, page.port, username="plc", password="", tls=account.tls))
    )


def test_with_the_setup_of_the_page_for_certificates_the_daemon_writes_without_a_password(
    page: Page, started: Callable[[Broker], Broker]
) -> None:
    started(page.set_up(3))
    tls = page.account().tls
    connection = Link(link.Broker(NAME, page.port, tls=tls), "inspectd.edge7.cam1")
    publish(connection, "verdict", "1")
    connection.publish(Message("plant/line1/cam2/verdict", b"1"))
    (refused,) = eventually(connection.take_refused, "the refusal of another station's topic").values()
    assert refused.forbidden
    connection.refuse(refused)
    with pytest.raises(DeliveryError, match="it refuses a message"):
        connection.check()
    connection.close()
    without = read_tls(Tls(ca_file=page.folder / "certs/ca.crt"))
    assert refusal(link.Broker(NAME, page.port, tls=without)).refused
