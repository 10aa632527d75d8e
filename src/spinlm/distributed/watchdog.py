"""Ends every process of a run when one of them fails, hangs, or loses its machine, with one message.

Each process writes a heartbeat to the store that all processes share. Rank 0 reads all heartbeats, the others read rank
0's. A process that cannot reach the store has lost the others. A process that fails writes its error to the store; the
others stop at their next safe point, or are ended if they hang in a collective operation.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

from spinlm.errors import PeerError, RunError, SpinError, StoppedError, first_line
from spinlm.utils.signals import request_stop

ERROR_KEY = "error"
"""Key in the store: the error that ends the run."""

HEARTBEAT_SECONDS = 1.0
EXIT_GRACE_SECONDS = 10.0  # a process that is exiting is ended after this time
SHUTDOWN_TIMEOUT = 3.0  # seconds for which rank 0 keeps the store open, so that the others can read its error
RESUME_HINT = "Finished work is kept: run the same command again to continue"


class Watchdog:
    """Two threads: one exchanges heartbeats through the store, which may hang; the other looks for lost processes."""

    def __init__(self, store: Any, rank: int, size: int):
        self._lost_after = float(os.environ.get("SPINLM_LOST_AFTER", 120))  # seconds without a heartbeat
        self._store = store.clone()  # a connection that no other thread waits on
        self._rank, self._name = rank, f"process {rank} on {socket.gethostname()}"
        self._launcher = os.getppid()
        self._watched = range(1, size) if rank == 0 else range(1)
        self._stopped = threading.Event()

    def start(self) -> None:
        """Start both threads."""
        self._stopped = threading.Event()
        self._exiting_since: float | None = None
        self._peer_error: str | None = None
        self._last_contact = time.monotonic()
        self._heartbeats = dict.fromkeys(self._watched, (b"", self._last_contact))  # rank → last beat, when it changed
        for loop in (self._beat, self._monitor):
            threading.Thread(target=loop, args=(self._stopped,), daemon=True).start()

    def stop(self) -> None:
        """Stop both threads."""
        self._stopped.set()

    def report(self, error: BaseException) -> BaseException:
        """Tell the other processes why this one ends. Return the error to raise: `PeerError` if another one failed."""
        self._exiting_since = time.monotonic()
        if self._peer_error is not None and not isinstance(error, PeerError):
            error = PeerError(self._peer_error)
        if not isinstance(error, PeerError):
            error = self._write_error(error)
        self._kill_launcher()
        return error

    def _write_error(self, error: BaseException) -> BaseException:
        if _is_collective_error(error):
            error = RunError(f"a process ended or cannot be reached ({first_line(error)}). {RESUME_HINT}")
        elif isinstance(error, StoppedError):
            error = StoppedError(f"stopped by a signal, or by the launcher after another process ended. {RESUME_HINT}")
        text = f"{self._name}: {first_line(error)}"
        with contextlib.suppress(Exception):  # the store may be out of reach
            first_error = self._store.compare_set(ERROR_KEY, "", text).decode()
            if first_error != text:
                return PeerError(first_error)
            if self._rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # the store ends with us
                time.sleep(SHUTDOWN_TIMEOUT)
        return type(error)(f"{self._name}: {error}") if isinstance(error, SpinError) else error

    def _kill_launcher(self) -> None:
        """Kill torchrun if the store is out of reach: torchrun would wait for the store for ever, ignoring signals."""
        if self._lost_contact() and "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() == self._launcher:
            os.kill(self._launcher, signal.SIGKILL)

    def _lost_contact(self) -> bool:
        return time.monotonic() - self._last_contact > self._lost_after

    def _beat(self, stopped: threading.Event) -> None:
        count = 0
        while not stopped.wait(HEARTBEAT_SECONDS):
            count += 1
            try:
                self._store.set(f"heartbeat/{self._rank}", f"{count} {self._name}")
                for rank in self._watched:
                    key = f"heartbeat/{rank}"
                    if self._store.check([key]) and (beat := self._store.get(key)) != self._heartbeats[rank][0]:
                        self._heartbeats[rank] = beat, time.monotonic()
                if self._store.check([ERROR_KEY]):
                    self._peer_error = self._store.get(ERROR_KEY).decode()
            except RuntimeError:  # the store is out of reach; the other thread measures for how long
                continue
            self._last_contact = time.monotonic()

    def _monitor(self, stopped: threading.Event) -> None:
        error: SpinError | None = None
        while not stopped.wait(HEARTBEAT_SECONDS):
            if self._exiting_since is None and (error := self._diagnose()):
                request_stop(error)
                self._exiting_since = time.monotonic()
            if self._exiting_since is not None and time.monotonic() - self._exiting_since > EXIT_GRACE_SECONDS:
                if error is not None and not isinstance(error, PeerError):
                    print(f"spinlm: {error}", file=sys.stderr, flush=True)
                self._kill_launcher()
                os._exit(SpinError.exit_code)

    def _diagnose(self) -> SpinError | None:
        """Return the error that ends this process, if another process failed or is lost."""
        if self._peer_error is not None:
            return PeerError(self._peer_error)
        silent = [
            beat.decode().partition(" ")[2] or f"process {rank}"
            for rank, (beat, changed) in self._heartbeats.items()
            if time.monotonic() - changed > self._lost_after
        ]
        if self._lost_contact():
            problem = "no contact with the other processes"
        elif silent:
            problem = f"no heartbeat from {', '.join(silent)}"
        else:
            return None
        return RunError(
            f"{self._name}: {problem} for {self._lost_after:.0f} s. Check the machines and the network between them. "
            f"{RESUME_HINT}"
        )


def _is_collective_error(error: BaseException) -> bool:
    """Whether a collective operation failed because another process is gone."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
