"""A study on a Ray cluster: each piece is a task, which Ray gives to another node when its node dies.

A task holds the claim on its piece (:mod:`emmech.studies.work`). The retry of a task whose node was cut off therefore
waits until the first one has ended or died, and finds its result or goes on with what it left.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from emmech.errors import EmmechError
from emmech.studies.spec import Piece
from emmech.studies.work import perform


def on_ray(
    pieces: Sequence[Piece],
    out: Path,
    address: str,
    *,
    resources: Mapping[str, float],
    ended: Callable[[], object] = lambda: None,
) -> None:
    """Do all pieces on the nodes of a cluster.

    Args:
        out: a folder that all nodes see.
        address: of the cluster, as ``ray.init`` takes it.
        resources: what a piece takes of a node: ``num_cpus``, ``num_gpus``.
        ended: called when a piece has ended.

    Raises:
        EmmechError: Ray is not installed, there is no such cluster, or a node does not see the folder.
    """
    if importlib.util.find_spec("ray") is None:
        why, instead = "Ray is not installed", 'pip install "emmech[ray]", or cluster=None for this machine'
        raise EmmechError("study on a cluster", f"cluster={address!r}", why, instead)
    import ray

    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, logging_level="warning")
        except (ConnectionError, ValueError, RuntimeError) as error:
            why = str(error).strip().split("\n")[0][:200]
            raise EmmechError("study on a cluster", f"cluster={address!r}", why, "the address that `ray start` prints")

    @ray.remote(max_retries=-1, **resources)  # type: ignore[untyped-decorator]
    def task(piece: Piece, *needs: Any) -> str:
        return perform(piece, out, wait=True, place=ray.get_runtime_context().get_node_id())

    tasks: dict[str, Any] = {}
    for piece in pieces:  # fine-tunes come first
        tasks[piece.digest] = task.remote(piece, *([tasks[piece.needs]] if piece.needs else []))
    waiting = list(tasks.values())
    while waiting:
        ready, waiting = ray.wait(waiting, num_returns=1)
        try:
            ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, EmmechError) else error
        ended()
