"""Brokers, cables and subscribers for tests, ended with them; and what every test must leave behind: nothing."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import brokers
from tests.brokers import Broker, Cable, Subscriber

# Programs under test share two cores with the tests; threads that wait for each other by spinning would crawl.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell's background jobs ignore Ctrl-C, and so would the programs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


POOL = "ThreadPoolExecutor"
"""Threads of exporters' libraries, which keep their pools; ours have names, or end with their block."""


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    found = [thread.name for thread in threading.enumerate() if thread not in before and not thread.daemon]
    left = [name for name in found if not name.startswith(POOL)]
    assert not left, f"the test left threads behind: {left}"


@pytest.fixture
def started() -> Iterator[Callable[[Broker], Broker]]:
    """Start brokers, and stop them when the test ends."""
    with ExitStack() as stack:

        def start(broker: Broker) -> Broker:
            stack.callback(broker.stop)
            broker.start()
            return broker

        yield start


@pytest.fixture
def mosquitto(tmp_path: Path, started: Callable[[Broker], Broker]) -> Callable[..., Broker]:
    """Start Mosquitto with some lines of its configuration."""
    if brokers.find_mosquitto() is None:
        pytest.skip("mosquitto is not installed (apt-get install mosquitto)")
    return lambda *options: started(brokers.mosquitto(tmp_path, *options))


@pytest.fixture
def amqtt(tmp_path: Path, started: Callable[[Broker], Broker]) -> Broker:
    """A broker that speaks MQTT 3.1.1 alone."""
    return started(brokers.amqtt(tmp_path))


@pytest.fixture(params=["mosquitto", "amqtt"])
def broker(request: pytest.FixtureRequest) -> Broker:
    """Each broker that is there."""
    running = request.getfixturevalue(request.param)
    return running if isinstance(running, Broker) else running()


@pytest.fixture
def cable_to() -> Iterator[Callable[[Broker], Cable]]:
    """Lay cables to brokers."""
    with ExitStack() as stack:

        def lay(broker: Broker) -> Cable:
            cable = Cable(broker.port)
            stack.callback(cable.close)
            return cable

        yield lay


@pytest.fixture
def subscribe() -> Iterator[Callable[..., Subscriber]]:
    """Subscribe to all of the station, or as told."""
    with ExitStack() as stack:

        def subscribed(broker: Broker, topic: str = "inspectd/#", *, five: bool = False) -> Subscriber:
            subscriber = Subscriber(broker.port, topic, five=five)
            stack.callback(subscriber.close)
            return subscriber

        yield subscribed


@pytest.fixture
def mosquitto_or_amqtt(tmp_path: Path, started: Callable[[Broker], Broker]) -> Broker:
    """One broker: Mosquitto where it is installed."""
    make = brokers.amqtt if brokers.find_mosquitto() is None else brokers.mosquitto
    return started(make(tmp_path))
