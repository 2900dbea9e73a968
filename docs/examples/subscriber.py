#!/usr/bin/env python3
"""Keeps the record of all stations below a topic prefix: python subscriber.py BROKER PREFIX [FILE] [PORT].

Needs paho-mqtt 2 and a broker that speaks MQTT 5. FILE is SQLite; SELECT * FROM record ORDER BY base, seq reads it.
"""

import json
import logging
import sqlite3
import sys

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

log = logging.getLogger("record")

WEEK_S = 7 * 24 * 3600
TABLES = """
CREATE TABLE IF NOT EXISTS record (id TEXT PRIMARY KEY, base TEXT, seq INTEGER, verdict TEXT, part_id TEXT, whole TEXT);
CREATE INDEX IF NOT EXISTS record_in_order ON record (base, seq);
CREATE TABLE IF NOT EXISTS told (id TEXT PRIMARY KEY, base TEXT, first INTEGER, last INTEGER, why TEXT);
"""


def keep(database: sqlite3.Connection, base: str, payload: bytes) -> None:
    """Write a verdict down unless it is there, and say what gap it leaves or closes."""
    verdict = json.loads(payload)
    seq = verdict["seq"]
    (newest,) = database.execute("SELECT max(seq) FROM record WHERE base = ?", [base]).fetchone()
    row = verdict["id"], base, seq, verdict["verdict"], verdict["part_id"], payload.decode()
    if not database.execute("INSERT OR IGNORE INTO record VALUES (?, ?, ?, ?, ?, ?)", row).rowcount or newest is None:
        return
    if seq > newest + 1:
        known = database.execute("SELECT why FROM told WHERE base = ? AND first < ? AND last > ?", [base, seq, newest])
        (why,) = known.fetchone() or ("on their way",)
        log.warning("%s: %d to %d are missing: %s", base, newest + 1, seq - 1, why)
    beside = database.execute("SELECT count(*) FROM record WHERE base = ? AND seq IN (?, ?)", [base, seq - 1, seq + 1])
    if beside.fetchone() == (2,):
        log.info("%s: %d has come and closes a gap", base, seq)


def hear(database: sqlite3.Connection, base: str, payload: bytes) -> None:
    """Take down which verdicts the station has given up or put aside."""
    event = json.loads(payload)
    first, last, why = event["first_seq"], event["last_seq"], f"{event['kind']}, {event['detail']}"
    row = event["id"], base, first, last, why
    if first and database.execute("INSERT OR IGNORE INTO told VALUES (?, ?, ?, ?, ?)", row).rowcount:
        log.warning("%s: %d to %d may never come: %s", base, first, last, why)


def main(broker: str, prefix: str, file: str = "record.sqlite3", port: str = "1883") -> None:
    """Listen until the end, writing each verdict to disk before the broker may forget it."""
    database = sqlite3.connect(file, isolation_level=None)
    database.executescript(TABLES)
    client = Client(CallbackAPIVersion.VERSION2, "record-keeper", protocol=MQTTProtocolVersion.MQTTv5, manual_ack=True)

    def subscribe(*_: object) -> None:
        client.subscribe([(f"{prefix}/+/verdict", 1), (f"{prefix}/+/event", 1)])

    def take(_: Client, __: object, message: MQTTMessage) -> None:
        base, leaf = message.topic.rsplit("/", 1)
        (keep if leaf == "verdict" else hear)(database, base, bytes(message.payload))
        client.ack(message.mid, message.qos)

    client.on_connect, client.on_message = subscribe, take
    session = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    session.SessionExpiryInterval = WEEK_S
    client.connect_async(broker, int(port), clean_start=False, properties=session)
    client.loop_forever(retry_first_connection=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(*sys.argv[1:])
