"""Signs of life: who waits moves, who works too long hangs."""

import time
from threading import Thread

from daemon.channel import Channel, Overflow
from daemon.pulse import BEAT_S, Pulse


def test_a_thread_hangs_when_it_has_not_moved_for_longer_than_its_limit() -> None:
    pulse = Pulse(limit_s=0.05)
    assert not pulse.hangs
    time.sleep(0.1)
    assert pulse.hangs
    pulse.beat()
    assert not pulse.hangs


def test_who_waits_for_something_to_do_or_for_room_shows_signs_of_life() -> None:
    channel: Channel[int] = Channel(1, Overflow.WAIT)
    taker, giver = Pulse(1.5 * BEAT_S), Pulse(1.5 * BEAT_S)
    taken: list[int] = []

    def take() -> None:
        for batch in channel.batches(1, taker.beat):
            taken.extend(batch)

    taking = Thread(target=take)
    taking.start()
    time.sleep(2 * BEAT_S)
    assert not taker.hangs
    channel.close()
    taking.join()

    full: Channel[int] = Channel(1, Overflow.WAIT)
    full.put(1)
    giving = Thread(target=full.put, args=(2, giver.beat))
    giving.start()
    time.sleep(2 * BEAT_S)
    assert not giver.hangs
    assert list(next(full.batches(1))) == [1]
    giving.join()
    full.close()
