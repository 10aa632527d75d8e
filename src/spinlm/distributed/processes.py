"""The processes of a run: one, or those that torchrun or `accelerate launch` has started, on one machine or several.

All of them do the same things in the same order. What has to happen once, the first does while the others wait
(`on_rank_zero`); shards go to whoever is free (`claim_work`); what each has found out, all are told (`all_gather`). Each waits only as
long as the others are there: see `watchdog`. A process on its own does everything itself, and all this costs it nothing.
"""

import atexit
import contextlib
import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from spinlm.distributed.watchdog import ACK_KEY, ERROR_KEY, Watchdog
from spinlm.errors import PeerError, RunError, SpinError, StoppedError
from spinlm.utils.signals import check_interrupt

T = TypeVar("T")

KEYS = ("arrived", "all", "result", "next", "items", "units")
"""What a turn, at which all do something together, can leave in the store that they share."""


SHUTDOWN_TIMEOUT = 3.0  # seconds for the last words


class _Team:
    """Several processes, and the store they share."""

    def __init__(self, rank: int, size: int, store: Any):
        self.rank, self.size, self.store = rank, size, store
        self.sound = True  # no fault so far
        self.turns = itertools.count()
        self.met = 0  # at this turn
        self.watchdog = Watchdog(store, rank, size)

    def wait_for(self, key: str) -> str:
        """The value of a key, once another process has set it."""
        pause = 0.002
        while not self.store.check([key]):
            check_interrupt()
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
        return str(self.store.get(key).decode())

    def barrier(self) -> int:
        """Wait until all are here; returns the number of this meeting, the same in every process."""
        turn = next(self.turns)
        if self.store.add(f"{turn}/arrived", 1) == self.size:
            self.store.set(f"{turn}/all", "")
        self.wait_for(f"{turn}/all")
        if self.rank == 0:  # what is older, nobody needs any more
            for old, key in itertools.product(range(self.met, turn), KEYS):
                self.store.delete_key(f"{old}/{key}")
        self.met = turn
        return turn


_team: _Team | None = None
_known: _Team | None = None  # of this process, if it was ever in one: there is one for life
_acting = False  # this process does something for all


def _launched() -> bool:
    """Whether a launcher has started several processes."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ


def rank() -> int:
    """The number of this process, from 0."""
    return 0 if _team is None else _team.rank


def local_rank() -> int:
    """The number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """How many processes there are."""
    return 1 if _team is None else _team.size


def is_main_process() -> bool:
    """Whether this process writes what is written once."""
    return _team.rank == 0 if _team is not None else not _launched() or os.environ["RANK"] == "0"


def on_rank_zero(do: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Once all processes are here, let the first alone do something, and all have the result (plain JSON data)."""
    global _acting
    if _team is None or _acting:
        return do(*args, **kwargs)
    turn = _team.barrier()
    if _team.rank != 0:
        result: T = json.loads(_team.wait_for(f"{turn}/result"))
        return result
    _acting = True
    try:
        mine = do(*args, **kwargs)
    finally:
        _acting = False
    _team.store.set(f"{turn}/result", json.dumps(mine))
    return mine


def claim_work(items: Sequence[T], at_work: bool = True) -> Iterator[T]:
    """Those of the items, the same in every process, that are this one's to do: whoever is free takes the next."""
    if _team is None or _acting:
        yield from items
        return
    turn = next(_team.turns)
    while at_work and (number := _team.store.add(f"{turn}/next", 1) - 1) < len(items):
        yield items[number]


def all_gather(value: T) -> list[T]:
    """What every process has, in their order, in every process."""
    if _team is None or _acting:
        return [value]
    import torch.distributed as dist

    _team.barrier()  # here waiting has no limit, in a collective it has
    values: list[Any] = [None] * _team.size
    dist.all_gather_object(values, value)
    return values


class SharedCounter:
    """How much has been done since it was made: by this process, or by all, where each makes one at the same place."""

    def __init__(self, shared: bool):
        self.costs = shared and _team is not None and not _acting
        """Whether adding takes a word with the other processes."""
        self._turn = next(_team.turns) if self.costs and _team is not None else 0
        self._totals = [0, 0]

    def add(self, items: int, units: int) -> tuple[int, int]:
        """Add what this process has done; returns the totals."""
        for place, (name, amount) in enumerate((("items", items), ("units", units))):
            if self.costs and _team is not None:
                self._totals[place] = _team.store.add(f"{self._turn}/{name}", amount)
            else:
                self._totals[place] += amount
        return self._totals[0], self._totals[1]


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Within the block, this process is one of those that its launcher has started.

    Raises:
        PeerError: another process has ended the run and says why.
        RunError: another process is gone, or cannot be reached.
    """
    global _team, _known
    if _team is not None or not _launched():
        yield
        return
    _team = _known = _known or _join()
    _team.watchdog.begin()
    try:
        _team.barrier()
        yield
        _team.barrier()  # nobody leaves while another still needs the store, which may be in the first process
    except BaseException as error:
        _team.sound = False
        _team.watchdog.mark_exiting()
        told = _explained(_team, error)
        _team.watchdog.kill_launcher()
        if told is error:
            raise
        raise told from error
    else:
        _team.watchdog.end()
    finally:
        _team = None


def _join() -> _Team:
    """Find the others: the launcher says in the environment who and where they are."""
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if torch.cuda.is_available():
        if local_rank() >= (gpus := torch.cuda.device_count()):
            raise RunError(
                f"process {os.environ.get('RANK')} on {socket.gethostname()} is number {local_rank()} there, from 0, "
                f"and sees {gpus} GPUs. Start one process for each GPU, and let all of them see all GPUs"
            )
        torch.cuda.set_device(local_rank())
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store remembers those before
    try:
        store, rank, size = next(iter(rendezvous("env://")))
        store = PrefixStore(f"attempt-{attempt}", store)
        if not dist.is_initialized():
            # Objects and flags travel between the processors, gradients between the devices.
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=size)
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise RunError(
            f"process {os.environ.get('RANK')} on {socket.gethostname()} does not find the others: {_line(error)}. "
            "Start all of them with torchrun or accelerate launch, and see that MASTER_ADDR and MASTER_PORT can be "
            "reached from every machine"
        ) from error
    team = _Team(rank, size, PrefixStore("spinlm", store))
    # NCCL complains of whoever ends without; after a failure, taking leave would be waiting for those who are gone.
    atexit.register(lambda: dist.destroy_process_group() if team.sound and dist.is_initialized() else None)
    return team


def _explained(team: _Team, error: BaseException) -> BaseException:
    """The error to end with, after all others have been told, or one that says that another has told us."""
    if isinstance(error, PeerError):
        return error
    if team.watchdog.fault is not None:
        return PeerError(f"another process has ended the run: {team.watchdog.fault}")
    if _is_of_a_collective(error):
        error = RunError(
            f"another process is gone, or cannot be reached ({_line(error)}). Nothing that was saved is lost: run the "
            "same command again, and it goes on"
        )
    elif isinstance(error, StoppedError):
        error = StoppedError(
            "stopped as asked, by a signal or by the launcher as another process had ended; run the same command "
            "again to continue"
        )
    about = f"process {team.rank} on {socket.gethostname()}: {_line(error)}"
    told = about
    with contextlib.suppress(Exception):  # the store may be what is gone
        told = team.store.compare_set(ERROR_KEY, "", about).decode()
    if told != about:
        return PeerError(f"another process has ended the run: {told}")
    if team.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        _wait_for_acks(team)
    if isinstance(error, SpinError):
        return type(error)(f"process {team.rank} on {socket.gethostname()}: {error}")
    return error


def _wait_for_acks(team: _Team) -> None:
    """Give the others time to hear why the run ends: the store goes with the process that holds it, this one."""
    deadline = time.monotonic() + SHUTDOWN_TIMEOUT
    with contextlib.suppress(Exception):
        while team.store.add(ACK_KEY, 0) < team.size and time.monotonic() < deadline:
            time.sleep(0.1)


def _is_of_a_collective(error: BaseException) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
