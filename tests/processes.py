"""Real processes for one run, forked from the test's own, which has done the slow imports already."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any


def together(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns in each of `size` processes that find each other as torchrun's do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    answers: Any = context.Queue()
    processes = [
        context.Process(target=_one, args=(rank, size, port, answers, work, arguments)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=300) for _ in processes)
    for process in processes:
        process.join(60)
    for answer in found.values():
        assert not isinstance(answer, _Failed), answer.story
    return [found[rank] for rank in range(size)]


class _Failed:
    def __init__(self, story: str) -> None:
        self.story = story


def _one(rank: int, size: int, port: int, answers: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in own.items()}, TORCHELASTIC_RUN_ID="test")
    try:
        answers.put((rank, work(*arguments)))
    except BaseException:
        answers.put((rank, _Failed(traceback.format_exc())))
