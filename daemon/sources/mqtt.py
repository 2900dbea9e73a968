"""Parts that arrive as MQTT messages, an image in each; by MQTT 5 each is answered where it asks for that.

The broker keeps an image until its verdict is on disk, and sends it again after a break. One that was judged by then is
known by its id and only answered once more. Daemons that subscribe as one group share the images between them.
"""

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from itertools import zip_longest

import structlog
from ulid import ULID

from daemon import images
from daemon.contract import Identity
from daemon.link import Broker, Delivered, DeliveryError, Link, Session
from daemon.messages import Capture, Clock, Frame, Reply, Unreadable
from daemon.outbox import OutboxError
from daemon.requests import Received, RefusedError, response
from daemon.sources.base import ALWAYS, TICK_S, Demand, SourceUnavailableError
from daemon.sources.folder import labels

RECENT = 1024
"""Of how many images that do not say which they are the contents are remembered, to know those that come again."""

log = structlog.get_logger()


class MqttSource:
    """Images on the topics of one filter. Satisfies `daemon.sources.base.Source`.

    Args:
        broker: where to connect, asked anew before each connection; may raise DeliveryError.
        identity: whose images these are; the connection is called after its node and station.
        topic: the filter; it may have wildcards.
        answer_again: answers a part once more if the record remembers the verdict of this id, or is False; may raise
            OutboxError.
        group: the daemons that share what comes, each image going to one of them; "" to get them all.
        window: how many images the broker may send before the first of them has its verdict, by MQTT 5. Mosquitto
            2.0.11 sends as many more with each acknowledgement, and so all that it has, unless that is 1.
        absence_s: for how many seconds the broker shall keep images while we are away, by MQTT 5.
        shrink: at which share of their size images are decoded, 1/shrink (see `images.decode`).

    Raises:
        ValueError: the filter has topics where inspectd itself speaks, in words for an operator.
    """

    def __init__(
        self,
        broker: Callable[[], Broker],
        identity: Identity,
        topic: str,
        *,
        answer_again: Callable[[str, Reply], bool],
        group: str = "",
        window: int = 1,
        absence_s: int = 3600,
        shrink: int = 1,
    ) -> None:
        if _meets(topic, identity.prefix):
            raise ValueError(
                f'topic = "{topic}" has topics below {identity.prefix}/, where inspectd itself speaks; have the images '
                "sent to a topic outside of it"
            )
        self._broker = broker
        self._identity = identity
        self._filter = f"$share/{group}/{topic}" if group else topic
        self._session = Session(absence_s, window)
        self._shrink = shrink
        self._answer_again = answer_again
        self._held: dict[str, list[tuple[Link, int]]] = {}  # handed over and not settled: id to the messages it came by
        self._recent: dict[bytes, str] = {}  # digest to id, the oldest first
        self._receiving: Link | None = None
        self._open: set[Link] = set()
        self._changing = threading.Lock()
        self._mentioned: set[str] = set()

    def frames(self, stop: threading.Event, demand: Demand = ALWAYS) -> Iterator[Frame | Unreadable | None]:
        """Yield each image once. While no part is wanted they stay at the broker, unacknowledged.

        After `stop` the connection stands until the last part that was handed over is settled.

        Raises:
            SourceUnavailableError: the broker is away or refuses us; at once, or while images are waited for.
        """
        return self._frames(self._connect(), stop, demand)

    def settle(self, capture: Capture, failure: str | None) -> bool:  # noqa: ARG002 -- the protocol's signature
        """Let the broker forget an image, for its verdict and answer are safe on disk.

        Always true: should the broker not hear of it and send the image again, that is known by its id.
        """
        with self._changing:
            owed = self._held.pop(capture.id, [])
        for link, number in owed:
            link.acknowledge(number)
        for link in {link for link, _ in owed}:
            self._part_with(link)
        return True

    def _connect(self) -> Link:
        client_id = f"inspectd.{self._identity.node}.{self._identity.station}.images"  # names have no dots
        try:
            broker = self._broker()
            link = Link(broker, client_id, session=self._session)
        except DeliveryError as error:
            raise SourceUnavailableError(
                f"no images can come: {error}; see that it runs, and to [mqtt] in the configuration"
            ) from error
        try:
            link.subscribe(self._filter)
            link.await_subscriptions()
        except DeliveryError as error:
            link.close()
            raise SourceUnavailableError(f"no images can come: broker {broker}: {error}") from error
        if link.take_denied():
            link.close()
            raise SourceUnavailableError(
                f"no images can come: broker {broker} refuses the subscription to {self._filter}; let the daemon's "
                "user read there, and set a group only with a broker that knows shared subscriptions"
            )
        log.info(
            "images are awaited",
            station=self._identity.station,
            topic=self._filter,
            broker=str(broker),
            protocol=link.protocol,
        )
        with self._changing:
            self._open.add(link)
            self._receiving = link
        return link

    def _frames(self, link: Link, stop: threading.Event, demand: Demand) -> Iterator[Frame | Unreadable | None]:
        waiting: deque[Delivered] = deque()
        try:
            while not stop.is_set():
                link.check()
                while waiting and link.lost is None and not stop.is_set() and demand.wanted():
                    part = self._take(link, waiting.popleft())
                    if part is not None:
                        yield part
                yield None
                if waiting:
                    demand.wanted(TICK_S)
                waiting += link.take_delivered(0 if waiting else TICK_S)
        except (DeliveryError, OutboxError) as error:  # what is not acknowledged comes again
            raise SourceUnavailableError(f"images do not come any more: {error}") from error
        finally:
            with self._changing:
                self._receiving = None
            self._part_with(link)

    def _part_with(self, link: Link) -> None:
        """End a connection that is of no more use."""
        with self._changing:
            owing = any(link is other for owed in self._held.values() for other, _ in owed)
            if link not in self._open or (link.lost is None and (owing or link is self._receiving)):
                return
            self._open.remove(link)
        link.close()

    def _take(self, link: Link, delivered: Delivered) -> Frame | Unreadable | None:
        """The part that a message brings, or None if it brings none or one that is known."""
        received = delivered.received
        if received.retained:
            self._warn_once("an image that was retained is left out: it would come at every start", received)
            link.acknowledge(delivered.number)
            return None
        if not received.payload and received.reply_to is None:  # deletes what is retained, and is no part
            link.acknowledge(delivered.number)
            return None
        capture_id, reply = self._identify(delivered), self._reply(received)
        with self._changing:
            if capture_id in self._held:
                self._held[capture_id].append((link, delivered.number))
                return None
        if self._answer_again(capture_id, reply):
            link.acknowledge(delivered.number)
            return None
        with self._changing:
            self._held[capture_id] = [(link, delivered.number)]
        return self._part(capture_id, delivered, reply)

    def _identify(self, delivered: Delivered) -> str:
        """The id of a part: always the same for one that says which it is, whichever daemon it comes to.

        It does not sort by time then, since those daemons have no time in common; `seq` says the order. Of one that
        does not say, what the broker sends again is known by its content as long as the daemon runs.
        """
        received = delivered.received
        said = [value for key, value in delivered.said if key == "id"]
        content = hashlib.blake2b(digest_size=16)
        for part in (received.topic.encode(), received.correlation or b"", *(value.encode() for value in said)):
            content.update(len(part).to_bytes(4, "big") + part)
        content.update(received.payload)
        digest = content.digest()
        if said or received.correlation:
            return str(ULID(digest))
        if not (delivered.again and digest in self._recent):
            self._recent.pop(digest, None)
            self._recent[digest] = str(ULID())
            if len(self._recent) > RECENT:
                del self._recent[next(iter(self._recent))]
        return self._recent[digest]

    def _reply(self, received: Received) -> Reply:
        """Where the verdict shall go; nowhere if it may not go where the message says."""
        if received.reply_to is None:
            return Reply("")
        try:
            response(self._identity, received, b"")
        except RefusedError as error:
            self._warn_once(f"an image cannot be answered where it asks for it: {error}", received)
            return Reply("")
        return Reply(received.reply_to, received.correlation)

    def _part(self, capture_id: str, delivered: Delivered, reply: Reply) -> Frame | Unreadable:
        received = delivered.received
        label, fault = labels.by_properties([(key, value) for key, value in delivered.said if key != "id"])
        if fault:
            log.warning(
                "what the properties of an image say is left out",
                station=self._identity.station,
                part=label.part_id,
                id=capture_id,
                reason=fault,
            )
        capture = Capture(
            id=capture_id,
            station=self._identity.station,
            part_id=label.part_id,
            captured_at=delivered.at,
            arrived_at=delivered.at,
            seen_at=delivered.seen_at,
            origin=received.topic,
            clock=Clock.HOST_ARRIVAL,
            batch_id=label.batch_id,
            meta=label.meta,
            reply=reply,
        )
        try:
            return Frame(capture, images.decode(received.payload, self._shrink))
        except images.UndecodableError as error:
            return Unreadable(capture, str(error))

    def _warn_once(self, what: str, received: Received) -> None:
        if what not in self._mentioned and len(self._mentioned) < RECENT:
            self._mentioned.add(what)
            log.warning(what, station=self._identity.station, topic=received.topic)


def _meets(topic: str, prefix: str) -> bool:
    """Whether a filter has a topic that begins with the levels of a prefix."""
    for asked, own in zip_longest(topic.split("/"), prefix.split("/")):
        if asked == "#" or own is None:
            return True
        if asked not in {"+", own}:
            return False
    return False
