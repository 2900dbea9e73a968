"""Parts that arrive as MQTT messages, an image in each; by MQTT 5 each is answered where it asks for that.

The broker keeps an image until its verdict is on disk, and sends it again after a break. One that was judged by then is
known by its id and only answered once more. Daemons that subscribe as one group share the images between them.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest

import structlog
from ulid import ULID

from daemon import images
from daemon.contract import Identity
from daemon.link import Broker, Delivered, DeliveryError, Link, Session
from daemon.messages import Capture, Clock, Frame, Reply, Unreadable
from daemon.requests import RefusedError, response
from daemon.sources import labels
from daemon.sources.base import ALWAYS, TICK_S, Demand, SourceUnavailableError

RECENT = 1024
"""Of how many images without correlation data the contents are remembered, to know those that come again."""

log = structlog.get_logger()


class MqttSource:
    """Images on the topics of one filter. Satisfies `daemon.sources.base.Source`.

    Args:
        broker: where to connect, asked anew before each connection; may raise DeliveryError.
        identity: whose images these are; the connection is called by its node and station.
        topic: the filter; it may have wildcards.
        answer_again: answers a part once more if the record remembers the verdict of its id; False if it does not. May
            raise an exception, which leaves from `frames`.
        group: the daemons that share what comes, each image going to one of them; "" to be sent all.
        window: how many images the broker may send before the first has its verdict, by MQTT 5.
        absence_s: for how many seconds the broker shall keep images while we are away, by MQTT 5.

    Raises:
        ValueError: the filter has topics on which inspectd speaks itself, in words for an operator.
    """

    def __init__(
        self,
        broker: Callable[[], Broker],
        identity: Identity,
        topic: str,
        *,
        answer_again: Callable[[str, Reply], bool],
        group: str = "",
        window: int = 8,
        absence_s: int = 3600,
    ) -> None:
        if _meets(topic, identity.prefix):
            raise ValueError(
                f'topic = "{topic}" has topics below {identity.prefix}/, where inspectd itself speaks; have the images '
                "sent to a topic outside of it"
            )
        self._broker = broker
        self._identity = identity
        self._station = identity.station
        self._filter = f"$share/{group}/{topic}" if group else topic
        self._session = Session(absence_s, window)
        self._answer_again = answer_again
        self._held: dict[str, list[_Owed]] = {}  # by id, those handed over and not settled, with all that they came by
        self._recent: dict[bytes, str] = {}  # ids of those that say none themselves, oldest first, by what they are
        self._connected: Link | None = None
        self._changing = threading.Lock()
        self._mentioned: set[str] = set()

    def frames(self, stop: threading.Event, demand: Demand = ALWAYS) -> Iterator[Frame | Unreadable | None]:
        """Yield each image once. While no part is wanted, images wait at the broker, but for the window's.

        After `stop` the connection stands until the last part that was handed over is settled.

        Raises:
            SourceUnavailableError: the broker is away, or refuses us; at once, or later.
        """
        return self._frames(self._connect(), stop, demand)

    def _frames(self, link: Link, stop: threading.Event, demand: Demand) -> Iterator[Frame | Unreadable | None]:
        waiting: list[Delivered] = []
        try:
            while not stop.is_set():
                _see_to(link, self._filter)
                while waiting and not stop.is_set() and link.lost is None and demand.wanted():
                    part = self._take(link, waiting.pop(0))
                    if part is not None:
                        yield part
                yield None
                if waiting:
                    demand.wanted(TICK_S)
                waiting += link.take_delivered(0 if waiting else TICK_S)
        finally:
            with self._changing:
                self._connected = None
                for_good = link.lost is not None or not any(owed.link is link for owed in self._all_owed())
            if for_good:
                link.close()

    def settle(self, capture: Capture, failure: str | None) -> bool:  # noqa: ARG002 -- the protocol's signature
        """Let the broker forget an image: its verdict and answer are safe on disk.

        Always true: one that comes again because the broker did not hear of it is known by its id.
        """
        with self._changing:
            done = self._held.pop(capture.id, [])
            for owed in done:
                owed.link.acknowledge(owed.number)
            left = {owed.link for owed in self._all_owed()} | {self._connected}
        for link in {owed.link for owed in done} - left:
            link.close()
        return True
