"""Follow the promoted pointer: verify, load and check the version that it names, then let it answer.

MLServer's reload is the model: the new version is loaded beside the old one, one assignment makes it answer, and
the old one is released by its last request. Here the pointer is looked at before every answer, so there is no
moment after a promotion at which an older version could still be chosen.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic, perf_counter
from typing import Generic, Protocol, TypeVar

from pipeline.core.errors import PointerUnreadable, StoreError
from pipeline.core.model.bundle import Bundle, open_bundle
from pipeline.core.promoted import Promotion, pointer_path, promotions, read_pointer, version_home
from service.answering.descriptor import ReservedDescriptor
from service.records.metrics import Metrics

logger = logging.getLogger("bentoml.credit_risk")

Signature = tuple[int, int, int] | None
"""What tells one state of the pointer's file from another: time, inode and size; None: no such file."""

_IDLE_SECONDS = 1.0
"""How often a worker that nobody asks looks at the pointer, so that its metrics tell what it would answer with."""

_SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""Errors that say nothing about the file: this process or the system has run out of something."""


class Served(Protocol):
    """Whatever answers for one version."""

    @property
    def promotion(self) -> Promotion:
        """The version."""
        ...


ServedT = TypeVar("ServedT", bound=Served)


@dataclass(frozen=True)
class RefusedVersion:
    """A promoted version that failed a check, so that another one answers, or none."""

    tag: str | None
    """None: the pointer itself could not be read."""
    error: str
    at: str
    """ISO 8601, UTC."""


class PointerFollower(Generic[ServedT]):
    """Follows the pointer of this machine.

    Parameters
    ----------
    prepare
        Compiles a verified bundle into what answers; called before the version counts.
    retry_seconds
        How often a refused version is tried again.
    metrics
        Told of switches and refusals.

    Attributes
    ----------
    promotion
        What the pointer says, as far as it could be read.
    served
        What answers as long as it is known what is promoted; None before the first version.
    loaded_at
        When it began to (ISO 8601, UTC).
    refused
        The last refusal, kept after the next success.
    swaps
        How often a version began to answer.
    """

    def __init__(
        self, prepare: Callable[[Promotion, Bundle], ServedT], retry_seconds: float, metrics: Metrics
    ) -> None:
        self.promotion: Promotion | None = None
        self.served: ServedT | None = None
        self.loaded_at: str | None = None
        self.refused: RefusedVersion | None = None
        self.swaps = 0
        self._prepare = prepare
        self._metrics = metrics
        self._retry_seconds = retry_seconds
        self._path = pointer_path()
        self._seen: Signature | str = "never looked"
        self._retry_at = float("inf")
        self._is_uncertain = False
        self._reserve = ReservedDescriptor()
        self._idle_look: asyncio.TimerHandle | None = None

    def current(self) -> ServedT | None:
        """Give what answers now, after one look at the pointer (a `stat`, 2 µs).

        A changed pointer is followed before this returns: the requests behind it wait some 20 ms, and
        none that began after a promotion can be answered by the version before it. So nothing answers while
        the system does not let the pointer be read: it may name another version than the one that is loaded.
        """
        signature = _signature(self._path)
        if signature != self._seen or self._is_uncertain or monotonic() >= self._retry_at:
            self._seen = signature
            self._follow()
        return None if self._is_uncertain else self.served

    def start(self) -> None:
        """Look at the pointer now and, in a running event loop, every second from then on."""
        self.close()
        with suppress(RuntimeError):  # no event loop is running
            self._idle_look = asyncio.get_running_loop().call_later(_IDLE_SECONDS, self.start)
        self.current()

    def close(self) -> None:
        """Look only when asked."""
        if self._idle_look is not None:
            self._idle_look.cancel()

    @property
    def is_behind(self) -> bool:
        """Whether something else than the promoted version answers, or nothing can."""
        promoted = self.promotion.tag if self.promotion else None
        answering = self.served.promotion.tag if self.served else None
        return answering != promoted or self._is_uncertain or self._retry_at < float("inf")

    @property
    def why_nothing_answers(self) -> str:
        """What a client is told while `current` gives None."""
        if self._is_uncertain:
            return "the promoted version cannot be read at the moment; the service's log says why"
        if self.refused:
            return "the promoted version failed its checks; run: python -m pipeline promote"
        return "nothing is promoted; run: python -m pipeline promote"

    def _follow(self) -> None:
        self._retry_at = float("inf")
        tag = None
        try:
            with self._reserve.released():
                promotion = self._read_pointer()
                tag = promotion.tag if promotion else None
                if promotion and (self.served is None or not _same_model(promotion, self.served.promotion)):
                    self._switch_to(promotion)
            self._is_uncertain = False
        except Exception as error:  # whatever is wrong with a version, it must not take the service down
            if isinstance(error, PointerUnreadable) or _is_shortage(error):
                self._stop_answering(tag, error)
            else:
                self._is_uncertain = False
                self._refuse(tag, error)
        self._metrics.behind(self.is_behind)

    def _read_pointer(self) -> Promotion | None:
        promotion = read_pointer()
        if promotion is None and self.served is not None:
            raise StoreError(f"{self._path}: is gone; promote again")
        self.promotion = promotion
        return promotion

    def _switch_to(self, promotion: Promotion) -> None:
        began = perf_counter()
        bundle = open_bundle(version_home(promotion.tag), promotion.digests)
        bundle.check_golden()
        served = self._prepare(promotion, bundle)
        # One assignment: an answer is made by what it took hold of before, or by this; never by a mixture.
        self.served = served
        self.loaded_at = _now()
        self.swaps += 1
        self._metrics.swapped(promotion)
        _freeze()
        logger.info("%s answers from now on (loaded in %.0f ms)", promotion.tag, 1000 * (perf_counter() - began))

    def _stop_answering(self, tag: str | None, error: Exception) -> None:
        if not self._is_uncertain:
            self.refused = RefusedVersion(tag, f"{type(error).__name__}: {error}", _now())
            logger.error("nothing is answered until the promoted version can be read: %s", error)
        self._is_uncertain = True

    def _refuse(self, tag: str | None, error: Exception) -> None:
        known = self.refused
        self.refused = RefusedVersion(tag, f"{type(error).__name__}: {error}", _now())
        self._metrics.refused()
        self._retry_at = monotonic() + self._retry_seconds
        fell_back = self.served is None and self._fall_back(tag)
        if known and (known.tag, known.error) == (tag, self.refused.error) and not fell_back:
            return  # tried again, to the same end: said already
        answering = self.served.promotion.tag if self.served else "nothing"
        logger.error("REFUSED the promoted version %s; %s answers instead. %s", tag, answering, self.refused.error)

    def _fall_back(self, broken: str | None) -> bool:
        """Answer with the last version of the history that passes its checks; False if none does."""
        try:
            candidates = promotions()
        except OSError as error:
            logger.warning("no version can stand in, as the history cannot be read: %s", error)
            return False
        for promotion in candidates:
            if promotion.tag == broken:
                continue
            try:
                self._switch_to(promotion)
            except Exception as error:
                logger.warning("%s cannot stand in: %s", promotion.tag, error)
            else:
                return True
        return False


def _signature(path: Path) -> Signature:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        return (0, 0, -(error.errno or 0))  # reading it will tell
    return (found.st_mtime_ns, found.st_ino, found.st_size)


def _is_shortage(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _SHORTAGES:
            return True
        error = error.__cause__
    return False


def _same_model(one: Promotion, other: Promotion) -> bool:
    return one.tag == other.tag and one.digests == other.digests


def _freeze() -> None:
    """Take what lives on out of the garbage collector's sight: a full collection over it would stall requests.

    What was frozen before is not walked here, so that this takes milliseconds during a switch.
    """
    gc.collect()
    gc.freeze()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
