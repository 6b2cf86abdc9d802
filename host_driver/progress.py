"""Says on stderr what takes longer than two seconds, and removes it again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, Timer

from rich.console import Console
from rich.status import Status

DELAY_S = 2.0

Update = Callable[[str], None]


@contextmanager
def task(console: Console, description: str) -> Iterator[Update]:
    """Shows ``description`` while the body runs, once two seconds have passed; yields a function that changes it."""
    lock = Lock()
    status: Status | None = None
    text = description

    def show() -> None:
        nonlocal status
        with lock:
            if finished:
                return
            if console.is_terminal:
                status = console.status(text)
                status.start()
            else:
                console.print(text, highlight=False)

    def update(changed: str) -> None:
        nonlocal text
        with lock:
            text = changed
            if status is not None:
                status.update(changed)

    finished = False
    timer = Timer(DELAY_S, show)
    timer.daemon = True
    timer.start()
    try:
        yield update
    finally:
        timer.cancel()
        with lock:
            finished = True
            if status is not None:
                status.stop()
