"""A few processes that train together, forked from one that has imported everything already."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

PRELOADED = ["transformers", "accelerate", "mmgraft.training.session", "tiny_runs"]


def on_ranks(work: Callable[..., Any], *arguments: Any, count: int = 2, timeout: float = 600):
    """Return what ``work(*arguments)`` gives on every rank.

    `work` must be importable by name (a function of tests/support), for each rank is a process. It
    finds ``RANK`` and the like in its environment.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue: Any = context.Queue()
    children = [
        context.Process(target=_run, args=(queue, rank, count, port, work, arguments), daemon=True)
        for rank in range(count)
    ]
    for child in children:
        child.start()
    results: dict[int, Any] = {}
    try:
        while len(results) < count:
            rank, error, result = queue.get(timeout=timeout)
            assert error is None, f"rank {rank}:\n{error}"
            results[rank] = result
    finally:
        for child in children:
            child.join(0 if len(results) < count else 60)
            if child.is_alive():
                child.kill()
    return [results[rank] for rank in range(count)]


def _run(
    queue: Any, rank: int, count: int, port: int, work: Callable[..., Any], arguments: tuple
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        queue.put((rank, None, work(*arguments)))
    except BaseException:
        queue.put((rank, traceback.format_exc(), None))
    finally:
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
