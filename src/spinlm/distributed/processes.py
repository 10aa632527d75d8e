"""The processes of a run: one, or those that torchrun or `accelerate launch` started, on one or several machines.

All processes run the same code in the same order. Rank 0 does what must happen once while the others wait
(`on_rank_zero`). A free process claims the next shard (`claim_work`). `all_gather` collects values from all processes.
The watchdog ends a process that waits for a lost one. A single process does everything itself and never waits.
"""

import atexit
import contextlib
import itertools
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from spinlm.distributed.watchdog import Watchdog
from spinlm.errors import RunError, first_line

T = TypeVar("T")

NO_TIMEOUT = timedelta(days=365)  # processes may wait for hours while rank 0 gets responses from a server


class ProcessGroup:
    """The processes of a run. Before `join`, and without a launcher, this process acts alone."""

    def __init__(self) -> None:
        self._store: Any = None  # key-value store that all processes share
        self._gloo: Any = None  # torch.distributed group for Python objects
        self._watchdog: Watchdog | None = None
        self._joined = False
        self._others_wait = False  # this is rank 0, inside on_rank_zero
        self._counters = itertools.count()  # names of shared counters, the same in every process

    @property
    def alone(self) -> bool:
        """Whether this process does everything itself, because there is no other process or the others wait."""
        return not self._joined or self._others_wait

    def rank(self) -> int:
        """Number of this process, from 0."""
        return int(os.environ["RANK"]) if _is_launched() else 0

    def world_size(self) -> int:
        """Number of processes that have joined."""
        return int(os.environ["WORLD_SIZE"]) if self._joined else 1

    def is_main_process(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank() == 0

    def on_rank_zero(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call a function in rank 0 once all processes are here. Return its result in every process."""
        if self.alone:
            return function(*args, **kwargs)
        import torch.distributed as dist

        self.barrier()
        result: list[Any] = [None]
        if self.rank() == 0:
            self._others_wait = True
            try:
                result = [function(*args, **kwargs)]
            finally:
                self._others_wait = False
        dist.broadcast_object_list(result, src=0, group=self._gloo)
        return result[0]

    def claim_work(self, items: Sequence[T], participates: bool = True) -> Iterator[T]:
        """Yield this process's share of the items; work is claimed dynamically.

        Args:
            items: the same sequence in every process.
            participates: whether this process claims items.
        """
        if self.alone:
            yield from items
            return
        claim = self.shared_counter()
        while participates and (index := claim(1) - 1) < len(items):
            yield items[index]

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        if self.alone:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size()
        dist.all_gather_object(values, value, group=self._gloo)
        return values

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if not self.alone:
            import torch.distributed as dist

            dist.barrier(group=self._gloo)

    def shared_counter(self) -> Callable[[int], int]:
        """Return a function that adds to a counter of all processes and returns the sum."""
        key = f"counter/{next(self._counters)}"
        return lambda amount: int(self._store.add(key, amount))

    @contextlib.contextmanager
    def join(self) -> Iterator[None]:
        """Connect to the other processes that the launcher started, for the duration of the block.

        Raises:
            PeerError: another process failed; that process prints the error.
            RunError: another process is lost or cannot be reached.
        """
        if self._joined or not _is_launched():
            yield
            return
        if self._watchdog is None:  # once in the life of this process
            self._store, self._gloo = _connect()
            self._watchdog = Watchdog(self._store, self.rank(), int(os.environ["WORLD_SIZE"]))
        self._watchdog.start()
        self._joined = True
        try:
            self.barrier()
            yield
            self.barrier()  # rank 0, which may hold the store, does not leave earlier
        except BaseException as error:
            reported = self._watchdog.report(error)
            if reported is error:
                raise
            raise reported from error
        else:
            self._watchdog.stop()
            atexit.register(_disconnect)
        finally:
            self._joined = False


def _is_launched() -> bool:
    """Whether a launcher started several processes."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ


def local_rank() -> int:
    """Number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


def _connect() -> tuple[Any, Any]:
    """Connect to the other processes as the launcher's environment variables say. Return the store and a Gloo group."""
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    name = f"process {os.environ['RANK']} on {socket.gethostname()}"
    if cuda := torch.cuda.is_available():
        if local_rank() >= (gpus := torch.cuda.device_count()):
            raise RunError(
                f"{name} has local rank {local_rank()}, but sees {gpus} GPUs. Start one process for each GPU, and let "
                "every process see all GPUs"
            )
        torch.cuda.set_device(local_rank())
    try:
        store, rank, size = next(iter(rendezvous("env://")))
        store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)  # torchrun keeps earlier keys
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=PrefixStore("torch", store), rank=rank, world_size=size)
        return PrefixStore("spinlm", store), dist.new_group(backend="gloo", timeout=NO_TIMEOUT)
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise RunError(
            f"{name} cannot connect to the other processes: {first_line(error)}. Start all of them with torchrun or "
            "accelerate launch, and check that every machine can reach MASTER_ADDR and MASTER_PORT"
        ) from error


def _disconnect() -> None:
    """Destroy the process group, because NCCL warns otherwise. After a failure this would wait for lost processes."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


_group = ProcessGroup()  # one for the life of this process
rank, world_size, is_main_process = _group.rank, _group.world_size, _group.is_main_process
on_rank_zero, claim_work, all_gather, barrier = (
    _group.on_rank_zero,
    _group.claim_work,
    _group.all_gather,
    _group.barrier,
)
process_group = _group.join


class SharedCounter:
    """A counter of this process or, if `shared`, of all processes."""

    def __init__(self, shared: bool):
        self.shared = shared and not _group.alone
        self._add = _group.shared_counter() if self.shared else self._add_here
        self._count = 0

    def _add_here(self, amount: int) -> int:
        self._count += amount
        return self._count

    def add(self, amount: int) -> int:
        """Add to the counter. Return the sum."""
        return self._add(amount)
