"""One function over many items, spread over processes of this machine or of a cluster, by Ray.

Ray brings a process that died back and tries its item again. What is done here is little: every
process has one item at a time and keeps what the function has loaded, and results come in the
order of the items. Functions travel by name and files by path, so all machines need the same
packages, and the folder that the command is run in, under the same path.
"""

from __future__ import annotations

import os
import platform
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from shields.errors import ConfigError, MissingPackage

__all__ = ["Workers", "spread"]

#: how often an item is tried again after its process died
_RETRIES = 2
#: memory for what travels between processes, bytes; it is rows and paths, never images
_STORE = 2**27
#: nothing is reported to Ray's makers
_SILENT = {"RAY_USAGE_STATS_ENABLED": "0"}
#: a Ray of our own listens on this machine's loopback, to those who have the token of its user;
#: that a single machine is not a cluster has to be said in these words on Linux, too
_ALONE = {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The processes that share some work."""

    #: how many; as many as there is room for where None
    count: int | None = None
    #: GPUs for each, or the share of one; 0 for none
    gpus: float = 0.0
    #: of a cluster that runs already, "auto" for the one of this machine; None starts one
    address: str | None = None

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ConfigError(f"at least one worker is needed, got {self.count}")
        if self.gpus < 0 or (self.gpus > 1 and self.gpus % 1):
            raise ConfigError(
                f"a worker is given whole GPUs, or a share of one as in 0.25, got {self.gpus:g}"
            )

    def device(self, name: str) -> str:
        """The device that a worker computes on, where this process would compute on `name`.

        Ray shows a worker its own GPUs only, so whichever they are, it counts them from 0.
        """
        if self.gpus:
            return "cuda"
        return "cpu" if name.startswith("cuda") else name


def spread(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    workers: Workers,
    *,
    lost: Callable[[Item, str], Result],
    first: Callable[[Item], bool] | None = None,
    on_waiting: Callable[[int], None] | None = None,
) -> Iterator[Result]:
    """Do some work for every item; results come in the order of the items.

    Args:
        work: Can be pickled. Each worker has its own copy, and keeps it for all of its items.
        items: Can be pickled, and so can their results.
        workers: Who does it.
        lost: The result of an item whose process died each time that it was tried, and why.
        first: Items that are begun before all others, as the others need what they leave.
        on_waiting: Called with the number of results that are there before their turn.

    Raises:
        MissingPackage: Ray is not installed.
        ConfigError: There is no such cluster, or no room in it.
        Exception: Whatever `work` raises; nothing is begun after that.
    """
    if not items:
        return
    places = range(len(items))
    queue = deque(sorted(places, key=lambda place: first is not None and not first(items[place])))
    done: dict[int, Result] = {}
    turn = 0
    with _team(work, workers, len(items)) as team:
        while queue or team.busy:
            team.hand_out(queue, items)
            while turn in done:
                yield done.pop(turn)
                turn += 1
            if on_waiting is not None:
                on_waiting(len(done))
            place, result, reason = team.wait()
            done[place] = lost(items[place], reason) if result is None else result[0]
        yield from (done[place] for place in range(turn, len(items)))


class _Team(Generic[Item, Result]):
    """Workers that have an item, and those that wait for one."""

    def __init__(self, ray: ModuleType, idle: list[Any]) -> None:
        self.ray, self.idle = ray, idle
        #: a promise of Ray's -> the place of its item, and who works on it
        self.busy: dict[Any, tuple[int, Any]] = {}

    def hand_out(self, queue: deque[int], items: Sequence[Item]) -> None:
        """Give every idle worker an item; where none is left, send it home.

        A worker whose machine is gone, and one that there was no room for, finds room then.
        """
        while self.idle:
            worker = self.idle.pop()
            if queue:
                place = queue.popleft()
                self.busy[worker.work.remote(items[place])] = (place, worker)
            else:
                self.ray.kill(worker)

    def wait(self) -> tuple[int, tuple[Result] | None, str]:
        """The place of an item that is done, and its result; without one, the reason."""
        (promise,), _ = self.ray.wait(list(self.busy), num_returns=1)
        place, worker = self.busy.pop(promise)
        self.idle.append(worker)
        try:
            return place, (self.ray.get(promise),), ""
        except self.ray.exceptions.RayTaskError as error:
            # What was raised is wrapped in a report of many lines; the cause is the error itself.
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except self.ray.exceptions.RayError as error:
            return place, None, (
                f"the process that worked on it died {_RETRIES + 1} times "
                f"({type(error).__name__}); out of memory, perhaps: fewer --workers leave each more"
            )  # fmt: skip

    def stop(self) -> None:
        """End all processes, whatever they are at."""
        for worker in [*self.idle, *(worker for _, worker in self.busy.values())]:
            self.ray.kill(worker)


class _Worker:
    """What lives in a process of Ray."""

    def __init__(self, work: Callable[[Any], Any], folder: str) -> None:
        self._work, self._folder = work, folder

    def work(self, item: object) -> object:
        """Do the work in the folder of the command, so that relative paths mean the same."""
        try:
            os.chdir(self._folder)
        except OSError as error:
            raise ConfigError(
                f"a worker on {platform.node()} cannot enter {self._folder}: {error.strerror}; "
                "all machines need the same folders"
            ) from error
        return self._work(item)


@contextmanager
def _team(
    work: Callable[[Item], Result], workers: Workers, most: int
) -> Iterator[_Team[Item, Result]]:
    """Workers that nobody has asked for anything yet; they end with the context."""
    ray = _ray(workers.address)
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, workers)
    try:
        count, processors = _room(ray, workers, ours=ours)
        kind = ray.remote(_Worker).options(
            num_cpus=processors,
            num_gpus=workers.gpus,
            max_restarts=-1,
            max_task_retries=_RETRIES,
        )
        folder = str(Path.cwd())
        team = _Team[Item, Result](
            ray, [kind.remote(work, folder) for _ in range(min(count, most))]
        )
        try:
            yield team
        finally:
            if not ours:
                team.stop()
    finally:
        if ours:
            ray.shutdown()


def _ray(address: str | None) -> ModuleType:
    # Read when Ray is imported, so what the environment or an earlier import says stands.
    if "ray" not in sys.modules:
        for name, value in {**_SILENT, **(_ALONE if address is None else {})}.items():
            os.environ.setdefault(name, value)
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingPackage(
            "--engine ray needs the package ray: pip install 'shields[ray]'"
        ) from error
    return ray


def _connect(ray: ModuleType, workers: Workers) -> None:
    """Start Ray in this machine, or go to a cluster."""
    quiet = {"logging_level": "ERROR", "configure_logging": False, "log_to_driver": False}
    try:
        if workers.address is None:
            processors = max(_processors(), workers.count or 1)
            ray.init(
                address="local",
                num_cpus=processors,
                include_dashboard=False,
                object_store_memory=_STORE,
                **quiet,
            )
        else:
            ray.init(address=workers.address, **quiet)
    except Exception as error:  # of many kinds, plain ones among them
        where = "here" if workers.address is None else f"at {workers.address}"
        said = " ".join(str(error).split())
        raise ConfigError(f"Ray cannot be used {where}: {said}") from error


def _room(ray: ModuleType, workers: Workers, *, ours: bool) -> tuple[int, int]:
    """How many workers there are to be, and how many processors each is given."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = int(sum(min(n.get("CPU", 0), _shares(n.get("GPU", 0), workers.gpus)) for n in nodes))
    # A cluster may grow; this machine does not.
    grows = workers.address is not None
    if fits < (1 if workers.count is None else workers.count) and not (grows and workers.count):
        held = ray.cluster_resources()
        raise ConfigError(
            f"there is room for {fits} workers of {workers.gpus:g} GPUs each, as Ray has "
            f"{held.get('CPU', 0):g} processors and {held.get('GPU', 0):g} GPUs; "
            "change --workers or --gpus-per-worker"
        )
    count = workers.count or fits
    alone = ours and not grows
    return count, max(1, _processors() // count) if alone else 1


def _shares(gpus: float, share: float) -> float:
    """How many workers the GPUs of a machine are enough for; a share never spans two."""
    if not share:
        return float("inf")
    # A tenth is a little more than a tenth in binary.
    return gpus * int(1 / share + 1e-6) if share <= 1 else gpus // share


def _processors() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
