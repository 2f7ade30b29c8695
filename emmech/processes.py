"""Work on several items at once, each in a process that imports the package anew."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from emmech.errors import EmmechError
from emmech.progress import quiet

Item = TypeVar("Item")
Found = TypeVar("Found")


def apart(
    asked: str,
    work: Callable[[Item], Found],
    items: Sequence[Item],
    processes: int,
    *,
    order: Sequence[int] | None = None,
) -> Iterator[Found]:
    """What a function finds of each item, in the order of the items; the threads are shared between the processes.

    Args:
        asked: what is being done, for messages.
        work: a function of a module, or a partial of one.
        order: the items' numbers in the order in which they are begun.

    Raises:
        EmmechError: as the function; any other exception of it under its name; or a process ended.
    """
    import torch

    threads = max(1, torch.get_num_threads() // processes)
    with ProcessPoolExecutor(min(processes, len(items)), multiprocessing.get_context("spawn")) as pool:
        begun = {at: pool.submit(_one, asked, threads, work, items[at]) for at in order or range(len(items))}
        try:
            yield from (begun[at].result() for at in range(len(items)))
        except BrokenProcessPool:
            why = "a process ended before it answered: it had too little memory, or could not import the script"
            instead = 'processes=1, or if __name__ == "__main__": in a script; what is finished is kept'
            raise EmmechError(asked, f"processes={processes}", why, instead) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _one(asked: str, threads: int, work: Callable[[Item], Found], item: Item) -> Found:
    import torch

    torch.set_num_threads(threads)
    try:
        with quiet():
            return work(item)
    except EmmechError:
        raise
    except Exception as error:  # not every exception can be sent back
        raise EmmechError(asked, getattr(item, "name", None), f"{type(error).__name__}: {error}") from None


def check_apart(asked: str, given: Mapping[str, Any]) -> None:
    """Refuse what another process could not be given.

    Raises:
        EmmechError: one of the objects cannot be sent, or this is such a process itself.
    """
    if multiprocessing.parent_process() is not None:
        why = "it is called in such a process itself, as in a script that does not ask whether it is the main one"
        raise EmmechError(asked, "processes > 1", why, 'the call under if __name__ == "__main__":')
    for name, one in given.items():
        try:
            pickle.dumps(one)
        except Exception as error:  # as many kinds as there are objects
            why = f"it cannot be sent to another process: {error}"
            raise EmmechError(asked, f"processes > 1 and {name}", why, "processes=1") from None
