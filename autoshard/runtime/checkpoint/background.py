"""Work beside training: a thread that does one thing, and hands over what came of it when it is asked.

In: a function. Out: its result, or what it raised, once. The process doesn't end before the work has. A failure that nobody has asked for
by then is logged, so that it isn't lost.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger("autoshard")


class Background:
    def __init__(self, work: Callable[[], Path]) -> None:
        self.work = work
        self.path: Path | None = None
        self.error: BaseException | None = None
        # not a daemon: the interpreter waits for it before it ends
        self.thread = threading.Thread(target=self._run, name="autoshard-save")
        atexit.register(self._unasked)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.path = self.work()
        except BaseException as error:
            self.error = error

    def result(self) -> Path:
        """Wait for it. Raises what it raised."""
        self.thread.join()
        atexit.unregister(self._unasked)
        if self.error is not None:
            raise self.error
        assert self.path is not None
        return self.path

    def _unasked(self) -> None:
        self.thread.join()
        if self.error is not None:
            log.error("what was saved last isn't there: %s", self.error)
