"""What proves who the daemon is and who the broker may be, read from its files and tried."""

import hashlib
import ssl
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from config.load import ConfigError, read_password
from config.schema import Mqtt, Tls


@dataclass(frozen=True, slots=True, repr=False)
class Credentials:
    """The password of the broker's account, and the TLS context for the connection; None where there is none."""

    password: str | None
    tls: ssl.SSLContext | None


def read_credentials(mqtt: Mqtt) -> Credentials:
    """Read all files that the connection to the broker needs.

    Raises:
        ConfigError: with the faults of all of them.
    """
    password, tls, faults = None, None, []
    try:
        password = read_password(mqtt)
    except ConfigError as error:
        faults.append(str(error))
    try:
        tls = None if mqtt.tls is None else read_tls(mqtt.tls)
    except ConfigError as error:
        faults.append(str(error))
    if faults:
        raise ConfigError("\n".join(faults))
    return Credentials(password, tls)


def fingerprint(mqtt: Mqtt) -> str:
    """What changes when the content of any of these files does; a file that cannot be read counts as empty."""
    tls = mqtt.tls or Tls()
    digest = hashlib.sha256()
    for file in (mqtt.password_file, tls.ca_file, tls.certificate_file, tls.key_file):
        content = b""
        with suppress(OSError):
            content = b"" if file is None else file.read_bytes()
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def read_tls(tls: Tls) -> ssl.SSLContext:
    """Make the context of a client that speaks TLS 1.2 or later and believes only what it can verify.

    Raises:
        ConfigError: with all faults of the files: unreadable, no certificate, no key, a key of another certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies the certificate, whatever becomes of the name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = tls.verify_host_name
    faults: list[str] = []
    if tls.ca_file is None:
        context.load_default_certs()
    else:
        faults += _trust(context, "ca_file", tls.ca_file)
    if tls.certificate_file is not None and tls.key_file is not None:
        faults += _identify(context, tls.certificate_file, tls.key_file)
    if faults:
        raise ConfigError("\n".join(faults))
    return context


def _trust(context: ssl.SSLContext, option: str, file: Path) -> Iterator[str]:
    """Take in the certificates of a file as authorities, or tell its fault."""
    if fault := _unreadable(option, file):
        yield fault
        return
    try:
        context.load_verify_locations(file)
    except ssl.SSLError:
        yield (
            f"{file}: mqtt.tls.{option}: holds no certificate that can be used. "
            "Name a file in PEM form, with a line -----BEGIN CERTIFICATE-----."
        )


def _identify(context: ssl.SSLContext, certificate: Path, key: Path) -> Iterator[str]:
    """Take in the daemon's own certificate and key, or tell the faults of the two files."""
    # Tried on another context, for the daemon's own certificate makes nobody else's good.
    faults = list(_trust(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), "certificate_file", certificate))
    if fault := _unreadable("key_file", key):
        faults.append(fault)
    if faults:
        yield from faults
        return
    try:
        # Without an (empty) password a key that needs one would ask for it on the terminal.
        context.load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        if error.reason in {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"}:
            yield (
                f"{key}: mqtt.tls.key_file: is not the key of {certificate}. "
                "Name the key with which that certificate was requested."
            )
        else:
            yield (
                f"{key}: mqtt.tls.key_file: holds no private key that can be used ({error.reason or 'not PEM'}). "
                "Name a key in PEM form without a password; openssl pkey -in KEY -out PLAIN_KEY takes one away."
            )


def _unreadable(option: str, file: Path) -> str | None:
    try:
        file.read_bytes()
    except OSError as error:
        return (
            f"{file}: mqtt.tls.{option}: cannot be read ({error.strerror}). "
            "Put the file there, readable by the daemon's user."
        )
    return None
