"""Signals that ask a run to leave: it writes a checkpoint where it can, in time, and says how to go on.

The system writes the number of each signal into a pipe as it comes (`signal.set_wakeup_fd`), and a thread reads them:
it speaks, and leaves where time is up, also while the main thread is inside a long computation.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from lora_exp.errors import Interrupted, print_user_error
from lora_exp.reports import console

if TYPE_CHECKING:
    from lora_exp.run_folder import RunFolder

STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 143, "SIGHUP": 129}
"""Exit status by signal: 128 and its number; SIGUSR1, which schedulers send ahead of SIGTERM, as that."""

ONE_KEY = 0.5
"""Seconds within which a signal is the same one, sent to the group of processes and handed on by a parent too."""

END = b"\0"


class Interrupts:
    """Watches for the signals of `STATUS` while it is used as a context.

    Args:
        folder: The run's; `run.json` says there how the run ended.
        grace_seconds: How long it may take to leave.
        go_on: The command that goes on.
        checkpoint: The one that the run comes from.
    """

    def __init__(self, folder: RunFolder, grace_seconds: float, go_on: str, checkpoint: Path | None = None) -> None:
        self.folder = folder
        self.grace_seconds = grace_seconds
        self.go_on = go_on
        self.signal: str | None = None
        """The first one that came."""
        self.progress = ""
        """Where the training is, as in `step 12 of 90`."""
        self.checkpoint = checkpoint
        """The newest."""
        self._training = False
        self._saved = False
        self._came, self._name = 0.0, ""
        self._process = os.getpid()
        self._handlers: dict[str, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is not threading.main_thread():
            return self  # no thread but the main one is asked
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        for name in STATUS:
            number = getattr(signal, name, None)
            # nohup, and a shell for what it starts in the background, have a process ignore some.
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[name] = signal.signal(number, self._handle)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="interrupts", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._handlers:
            return
        signal.set_wakeup_fd(self._wakeup)
        for name, handler in self._handlers.items():
            signal.signal(getattr(signal, name), handler)
        self._handlers = {}
        os.write(self._writer, END)
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Have a run leave where `saved` is called, once a checkpoint is written, instead of at once."""
        self._training = True
        try:
            yield
            if self.asked:  # after the last step
                self.leave()
        finally:
            self._training = False

    @contextmanager
    def keeping_the_end(self, save: Callable[[], Path | None]) -> Iterator[None]:
        """Have a run that leaves after its last step, but before its results are whole, write a checkpoint first.

        Args:
            save: Returns that of the last step; None where there can be none, as before the training has ended.
        """
        try:
            yield
        except Interrupted:
            checkpoint = save()
            if checkpoint is None:
                raise
            self.checkpoint = checkpoint
            self.leave()

    @property
    def asked(self) -> bool:
        """Whether the run was asked to leave."""
        return self.signal is not None

    def saved(self, checkpoint: Path) -> None:
        """Note a checkpoint, and leave after it if asked to.

        Raises:
            Interrupted: If asked to.
        """
        self.checkpoint = checkpoint
        if self.asked:
            self._saved = True
            raise self._interrupted()

    def leave(self) -> None:
        """Leave without a checkpoint.

        Raises:
            Interrupted: Always.
        """
        raise self._interrupted()

    def _interrupted(self, why: str = "") -> Interrupted:
        assert self.signal is not None
        stage = self.folder.current_stage
        where = f"in the stage {stage}" if stage else "before it had begun"
        where = f"at {self.progress}" if self.progress else where
        found = f"from {self.checkpoint.name}" if self.checkpoint else "from the first step"
        return Interrupted(
            f"interrupted by {self.signal} {where}{why}", f"go on {found} with {self.go_on}", STATUS[self.signal]
        )

    def _handle(self, number: int, _: FrameType | None) -> None:
        """Run in the main thread, between two of its instructions."""
        if os.getpid() != self._process:  # a worker that was forked: its parent ends it
            return
        if self.signal is None:
            self.signal = signal.Signals(number).name
            if not self._training:
                raise self._interrupted()

    def _watch(self) -> None:
        """Run in a thread of its own: speak, and leave where the time is up or a second Ctrl-C comes."""
        deadline: float | None = None
        while True:
            left = None if deadline is None else max(deadline - time.monotonic(), 0)
            ready, _, _ = select.select([self._reader], [], [], left)
            if not ready:
                self._leave_now(f"; the next did not end within {self.grace_seconds:g} s")
            told = os.read(self._reader, 1)
            if told == END:
                return
            name = signal.Signals(told[0]).name
            if name not in STATUS:
                continue
            if deadline is not None:
                if name == "SIGINT" and time.monotonic() - self._came > ONE_KEY:
                    self._leave_now("")
                continue
            self._came, self._name = time.monotonic(), name
            deadline = self._came + self.grace_seconds
            if self._training:
                again = "; Ctrl-C again leaves at once" if name == "SIGINT" else ""
                console.note(
                    f"{name}: the step ends and a checkpoint is written, within {self.grace_seconds:g} s{again}"
                )

    def _leave_now(self, why: str) -> None:
        self.signal = self.signal or self._name  # the main thread may be too busy to have seen it
        error = self._interrupted("" if self._saved else why)
        self.folder.end_as_failed(f"{error.what}; {error.mend}")
        print_user_error(error)
        sys.stderr.flush()
        os._exit(error.status)
