"""Looking after the other processes of a run, so that none waits for ever for one that is gone.

Each process leaves a sign of life in the store they share. The first looks for everybody's, the others for the first's;
a process that cannot reach the store has lost them all. Whoever has to end says why in the store. A process that learns
of such a thing ends at the next safe point; where it hangs in a collective and comes to none, it is ended.
"""

import os
import signal
import socket
import sys
import threading
import time
from typing import Any

from spinlm.errors import PeerError, RunError, SpinError
from spinlm.utils.signals import request_stop

ERROR_KEY, ACK_KEY = "fault", "heard"
"""Keys in the store: why the run ends, and how many processes have learned of it from another."""

HEARTBEAT_SECONDS = 1.0  # seconds between signs of life
EXIT_GRACE_SECONDS = 10.0  # seconds in which a process may end by itself


class Watchdog:
    """Two threads: one that speaks with the store, and may hang there, and one that looks at the clock."""

    def __init__(self, store: Any, rank: int, size: int):
        self.lost_after = float(os.environ.get("SPINLM_LOST_AFTER", 120))
        self._store = store.clone()  # a connection of its own: others may be waiting on theirs
        self._rank = rank
        self._parent = os.getppid()
        self._watched = range(1, size) if rank == 0 else range(1)
        self._over = threading.Event()

    def begin(self) -> None:
        """Start watching."""
        self._over = threading.Event()
        self._failing: float | None = None  # since when this process is ending
        self.fault: str | None = None  # why another has ended the run
        self._contact = time.monotonic()
        self._heard = dict.fromkeys(self._watched, (0, self._contact))  # signs of life, and when the last one came
        self._store.set(f"beat/{self._rank}", f"0 {socket.gethostname()}")
        for work in (self._beat, self._monitor):
            threading.Thread(target=work, args=(self._over,), daemon=True).start()

    def end(self) -> None:
        """Stop watching."""
        self._over.set()

    def mark_exiting(self) -> None:
        """Say that this process is about to end; where that takes too long, it is ended."""
        self._failing = time.monotonic()

    def kill_launcher(self) -> None:
        """End torchrun where the store is out of reach: it would wait for that without limit, and deaf to signals."""
        if self._out_of_reach() and "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() == self._parent:
            os.kill(self._parent, signal.SIGKILL)  # unless another worker has, and somebody else has taken its place

    def _out_of_reach(self) -> bool:
        return time.monotonic() - self._contact > self.lost_after

    def _beat(self, over: threading.Event) -> None:
        number = 0
        keys = [f"beat/{rank}" for rank in self._watched]
        while not over.wait(HEARTBEAT_SECONDS):
            number += 1
            try:
                self._store.set(f"beat/{self._rank}", f"{number} {socket.gethostname()}")
                for rank, value in zip(self._watched, self._store.multi_get(keys), strict=True):
                    if value != self._heard[rank][0]:
                        self._heard[rank] = value, time.monotonic()
                if self.fault is None and self._store.check([ERROR_KEY]):
                    self.fault = self._store.get(ERROR_KEY).decode()
                    self._store.add(ACK_KEY, 1)
            except RuntimeError:  # gone, for now or for good: the other thread counts the seconds
                continue
            self._contact = time.monotonic()

    def _monitor(self, over: threading.Event) -> None:
        error: SpinError | None = None
        while not over.wait(HEARTBEAT_SECONDS):
            now = time.monotonic()
            if error is None and self._failing is None and (error := self._diagnose(now)):
                request_stop(error)
                self._failing = now
            if self._failing is not None and now - self._failing > EXIT_GRACE_SECONDS:
                if error is not None and not isinstance(error, PeerError):
                    print(f"spinlm: {error}", file=sys.stderr, flush=True)
                self.kill_launcher()
                os._exit(SpinError.exit_code)

    def _diagnose(self, now: float) -> SpinError | None:
        """What is wrong with the others."""
        if self.fault is not None:
            return PeerError(f"another process has ended the run: {self.fault}")
        silent = [rank for rank, (_, when) in self._heard.items() if now - when > self.lost_after]
        me = f"process {self._rank} on {socket.gethostname()}"
        if self._out_of_reach():
            lost = f"{me}: no contact with the other processes"
        elif silent:
            lost = f"{me}: no sign of life from {', '.join(self._name(rank) for rank in silent)}"
        else:
            return None
        return RunError(
            f"{lost} for {self.lost_after:.0f} s. Is a machine or the network between them down? Nothing that was "
            "saved is lost: run the same command again, and it goes on"
        )

    def _name(self, rank: int) -> str:
        value = self._heard[rank][0]
        return f"process {rank}" + (f" on {value.decode().split()[1]}" if isinstance(value, bytes) else "")
