"""Signals that reach a script while it imports: remembered from its first line on, for `training.preemption.Preemption`.

Only modules that load at once are imported here, since until `catch` is called a signal ends the process.
"""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
received: list[int] = []  # in the order of their arrival


def catch() -> None:
    """Remember SIGTERM and SIGUSR1 instead of ending the process."""
    for number in SIGNALS:
        signal.signal(number, _remember)


def release() -> None:
    """Give the signals their default effect back. One that has come ends the process now, as it would have then."""
    for number in SIGNALS:
        if signal.getsignal(number) is _remember:
            signal.signal(number, signal.SIG_DFL)
    if received:
        raise SystemExit(128 + received[0])


def _remember(number: int, _: FrameType | None) -> None:
    received.append(number)
