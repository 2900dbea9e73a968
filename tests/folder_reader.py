"""The daemon in little: takes the parts of a folder, keeps a verdict of each, puts its file away.

Says each part it was handed over as a line of JSON. Ends when nothing has come for a while, or kills itself.
"""

import argparse
import json
import os
import signal
import sys
import threading
from pathlib import Path

import structlog

from daemon.messages import Outcome, Unreadable
from daemon.outbox import Entry, Outbox
from daemon.sources.folder.source import FolderSource


def main() -> None:
    """Read a folder."""
    options = argparse.ArgumentParser()
    options.add_argument("folder", type=Path)
    options.add_argument("state", type=Path)
    options.add_argument("--leave", action="store_true", help="keep by a ledger")
    options.add_argument("--delete", action="store_true", help="delete what was judged")
    options.add_argument("--sidecar", action="store_true")
    options.add_argument("--idle", type=int, default=10**9, help="end after so many looks in vain")
    options.add_argument(
        "--die", default="", help="handed:3 is killed once the third part was handed over; kept, settled"
    )
    options.add_argument("--rescan", type=float, default=0.1)
    chosen = options.parse_args()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    moment, _, at = chosen.die.partition(":")
    outbox = Outbox(chosen.state / "outbox.sqlite")
    source = FolderSource(
        "s1",
        chosen.folder,
        concluded=outbox.concluded,
        ledger=chosen.state / "ledger.sqlite" if chosen.leave else None,
        delete=chosen.delete,
        settle_ms=20,
        give_up_s=2.0,
        rescan_s=chosen.rescan,
        sidecar=chosen.sidecar,
    )
    count, idle = 0, 0
    settled: list[str] = []

    def reached(now: str) -> None:
        if moment == now and count == int(at):
            os.kill(os.getpid(), signal.SIGKILL)

    for part in source.frames(threading.Event()):
        idle = idle + 1 if part is None else 0
        if idle == 2:
            (chosen.state / f"begun.{os.getpid()}").touch()
        if idle > chosen.idle:
            break
        if part is None:
            continue
        count += 1
        capture = part.capture
        failure = part.reason if isinstance(part, Unreadable) else None
        said = {"id": capture.id, "part": capture.part_id, "meta": dict(capture.meta), "failure": failure}
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()
        reached("handed")
        seq = outbox.last_seq("s1") + 1
        outbox.keep([Entry("s1", seq, capture.id, capture.part_id.encode(), Outcome.PASS)], settled)
        settled = []
        reached("kept")
        if source.settle(capture, failure):
            settled.append(capture.id)
        reached("settled")
    outbox.close()


if __name__ == "__main__":
    main()
