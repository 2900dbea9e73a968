"""The figures of the installed program, as Prometheus reads them."""

import socket
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from tests.brokers import DEADLINE_S, HOST, Broker, Subscriber, eventually, free_port
from tests.system.conftest import write_part
from tests.system.test_daemon import Daemon, verdicts


def figures(port: int) -> dict[frozenset[str], float]:
    """Each sample by its name and the values of its labels; nothing as long as nobody answers."""
    try:
        with urlopen(f"http://{HOST}:{port}/metrics", timeout=DEADLINE_S) as answer:
            text = answer.read().decode()
    except OSError:
        return {}
    families = text_string_to_metric_families(text)
    return {frozenset([s.name, *s.labels.values()]): s.value for family in families for s in family.samples}


def of(name: str, *labels: str) -> frozenset[str]:
    """A figure of the station, as `figures` names it."""
    return frozenset([f"inspectd_{name}", "cam1", *labels])


def test_what_a_running_daemon_has_judged_is_on_its_page_until_its_end(
    tmp_path: Path, model: Path, mosquitto: Callable[..., Broker]
) -> None:
    broker, port = mosquitto(), free_port()
    daemon = Daemon(tmp_path, model, broker.port, f"[metrics]\nport = {port}")
    daemon.start()
    try:
        with closing(Subscriber(broker.port, "inspectd/#")) as ear:
            eventually(lambda: figures(port).get(of("source_up")), "the station on the page")
            for number in range(3):
                write_part(daemon.incoming / f"{number}.png", number)
            (daemon.incoming / ".torn.png").write_text("no image")
            (daemon.incoming / ".torn.png").rename(daemon.incoming / "torn.png")
            ear.wait(lambda: len(verdicts(ear)) == 4, "all verdicts")
            eventually(lambda: figures(port)[of("outbox_depth")] == 0, "what waits to be delivered")
            page = figures(port)
            outcomes = {one["verdict"] for one in verdicts(ear).values()}
            for outcome in outcomes:
                count = sum(one["verdict"] == outcome for one in verdicts(ear).values())
                assert page[of("inspections_total", "default", outcome)] == count
            assert page[of("frames_total", "inspected")] == 4
            assert page[of("latency_seconds_count", "total")] == 4
            assert page[of("latency_seconds_count", "infer")] == 3
            assert page[of("score_count", "default")] == 3
            assert 0 < page[of("latency_seconds_sum", "record")] < 60
            assert page[of("mqtt_connected")] == 1
            broker.stop()
            eventually(lambda: figures(port)[of("mqtt_connected")] == 0, "the broker's absence")
    finally:
        assert daemon.end() == 0
    assert figures(port) == {}


def test_a_port_that_is_taken_does_not_stop_the_line(
    tmp_path: Path, model: Path, mosquitto: Callable[..., Broker]
) -> None:
    broker = mosquitto()
    subscriber = Subscriber(broker.port, "inspectd/#")
    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
        daemon = Daemon(tmp_path, model, broker.port, f"[metrics]\nport = {port}")
        daemon.start()
        write_part(daemon.incoming / "part.png", 1)
        subscriber.wait(lambda: subscriber.of("verdict"), "a verdict")
        assert daemon.end() == 0
    subscriber.close()
    assert f"metrics.port: {port} of {HOST} is taken" in daemon.said()
