"""Applications that arrived in the same turn of the event loop in, one call of the booster for all of them out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")
AnswerT = TypeVar("AnswerT")


class MicroBatcher(Generic[ItemT, AnswerT]):
    """Collects without waiting: nobody's answer is delayed for company.

    Scoring one application costs 170 µs and sixteen 190 µs, so under load a call serves all that is there; a lone
    request is scored at once. BentoML's own batching waits for a window, which for a model as small as this one
    costs more than it saves.

    Parameters
    ----------
    answer
        Answers a batch: one answer an item, in order.
    limit
        Items in one batch at most.
    """

    def __init__(self, answer: Callable[[Sequence[ItemT]], Sequence[AnswerT]], limit: int) -> None:
        self._answer = answer
        self._limit = limit
        self._waiting: list[tuple[ItemT, asyncio.Future[AnswerT]]] = []

    def submit(self, item: ItemT) -> asyncio.Future[AnswerT]:
        """Put an item into the batch of this turn; await the result for its answer."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[AnswerT] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._flush)
        self._waiting.append((item, future))
        if len(self._waiting) >= self._limit:
            self._flush()
        return future

    def _flush(self) -> None:
        batch, self._waiting = self._waiting, []
        if not batch:
            return  # full before its turn came
        try:
            answers = self._answer([item for item, _ in batch])
        except Exception as error:
            _settle(batch, error)
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():  # its client may have gone
                future.set_result(answer)


def _settle(batch: Sequence[tuple[object, asyncio.Future[AnswerT]]], error: Exception) -> None:
    for _, future in batch:
        if not future.done():
            future.set_exception(error)
