"""Answer requests with the promoted version, for callers over HTTP and in this process alike."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import orjson

from pipeline.core.model.bundle import Bundle
from pipeline.core.model.features import Matrix
from pipeline.core.policy import Policy, Status
from pipeline.core.promoted import Promotion
from pipeline.core.settings import conf_folder
from service.answering.batcher import Batcher, MicroBatcher
from service.answering.bodies import Batch
from service.answering.follower import PointerFollower
from service.answering.refusal import Refusal
from service.answering.served_model import Application, Decisions, ServedModel
from service.records.decision_log import DecidedBatch, DecisionLog
from service.records.metrics import Metrics
from service.settings import ServeSettings


@dataclass(frozen=True, slots=True)
class PendingApplication:
    """An application that waits to be scored."""

    application: Application
    request_id: str
    trace_id: str


class Version:
    """A loaded version, with a batcher of its own.

    A request keeps the version that it started with. So its contract, encoder and booster belong together, and the
    version lives as long as its last request.
    """

    def __init__(self, model: ServedModel, batcher: Batcher[PendingApplication, bytes]):
        self.model = model
        self.batcher = batcher

    @property
    def promotion(self) -> Promotion:
        """The version's promotion."""
        return self.model.promotion


class Core:
    """Answers requests with the version that is promoted at that moment.

    Parameters
    ----------
    settings
        ``conf/serve.yaml``.
    policy
        ``conf/policy.yaml``.
    home
        Folder that relative paths of the settings start from.
    """

    def __init__(self, settings: ServeSettings, policy: Policy, home: Path) -> None:
        self.settings = settings
        self.policy = policy
        self.metrics = Metrics()
        self.decision_log = DecisionLog(
            settings.decision_log, home / settings.decision_log.folder, self.metrics.dropped
        )
        self.promoted: PointerFollower[Version] = PointerFollower(
            self._prepare, settings.retry_refused_seconds, self.metrics
        )
        self.batches = ConcurrencyLimit(settings.limits.batches, settings.limits.retry_after_seconds)
        """Entered before the body of a batch request is read: those are large."""
        self._parsing = asyncio.Lock()
        """Held while a batch is parsed: several at once would each take their part of every turn of the loop."""
        self._scorer = ThreadPoolExecutor(1, thread_name_prefix="batch scorer")
        self._requests = ConcurrencyLimit(settings.limits.requests, settings.limits.retry_after_seconds)

    def start(self) -> None:
        """Load the promoted version and start recording decisions."""
        self.promoted.start()
        self.decision_log.start()

    def close(self) -> None:
        """Stop, after recording every decision."""
        self.promoted.close()
        self._scorer.shutdown(wait=False, cancel_futures=True)
        self.decision_log.close()

    def answering(self) -> Version:
        """Return the serving version, or raise the `Refusal` 503."""
        version = self.promoted.current()
        if version is None:
            raise self._nothing_answers()
        return version

    async def classify(
        self, body: bytes, request_id: str, trace_id: str = "", version: Version | None = None
    ) -> bytes:
        """Decide on one application: the JSON answer.

        Parameters
        ----------
        version
            What `answering` returned, for callers that have it.

        Raises
        ------
        Refusal
            400 the body breaks the contract; 503 nothing is promoted, or too many requests are in progress.
        """
        version = version or self.answering()
        application = version.model.parse(body)
        with self._requests:
            return await version.batcher.submit(PendingApplication(application, request_id, trace_id))

    async def classify_batch(
        self, body: bytes, request_id: str, trace_id: str = "", version: Version | None = None
    ) -> bytes:
        """Decide on an array of applications, all by one version and all or none: the JSON array of answers."""
        model = (version or self.answering()).model
        answers: list[bytes] = []
        for part in await self._parsed(model, body):
            matrix = model.encode_many(part)
            decisions = await self._decide_many(model, matrix)
            ids = [request_id] * len(matrix)
            self._record(model, part.rows, decisions, ids, [trace_id] * len(matrix), first_row=len(answers))
            answers += model.answers(decisions, ids)
            await asyncio.sleep(0)
        return b"[%b]" % b",".join(answers)

    async def explain(
        self, body: bytes, request_id: str, trace_id: str = "", version: Version | None = None
    ) -> bytes:
        """Decide on one application and say why: the JSON answer."""
        version = version or self.answering()
        application = version.model.parse(body)
        with self._requests:
            answer = await version.batcher.submit(PendingApplication(application, request_id, trace_id))
            return orjson.dumps({**orjson.loads(answer), **version.model.explanation(application)})

    def model(self) -> dict[str, Any]:
        """Describe what is promoted, what this worker serves, and which version was refused last."""
        version, promoted = self.promoted.current(), self.promoted
        refused = promoted.refused
        return {
            "promoted": _public_fields(promoted.promotion),
            "loaded": _public_fields(version.promotion) if version else None,
            "loaded_at": promoted.loaded_at,
            "schema": version.model.schema.digest if version else None,
            "swaps": promoted.swaps,
            "refused": vars(refused) if refused else None,
        }

    def version(self) -> Version | None:
        """Return the serving version, if there is one."""
        return self.promoted.current()

    def show(self) -> None:
        """Update the metrics that describe the present."""
        self.promoted.current()
        self.metrics.show(self.promoted.promotion, behind=self.promoted.is_behind)

    def _nothing_answers(self) -> Refusal:
        retry_after = (b"retry-after", b"%d" % self.settings.limits.retry_after_seconds)
        return Refusal(503, self.promoted.why_nothing_answers, headers=[retry_after])

    def _prepare(self, promotion: Promotion, bundle: Bundle) -> Version:
        before = self.promoted.served
        same = before is not None and before.model.schema.digest == bundle.schema.digest
        model = ServedModel(
            promotion, bundle, self.settings, self.policy, before.model.validator if before and same else None
        )
        return Version(model, self._batcher(model))

    def _batcher(self, model: ServedModel) -> Batcher[PendingApplication, bytes]:
        def answer(pending: Sequence[PendingApplication]) -> list[bytes]:
            return self._answers(model, pending, model.decide(encoded(model, pending)))

        return MicroBatcher(answer, self.settings.micro_batch_rows)

    async def _parsed(self, model: ServedModel, body: bytes) -> list[Batch]:
        """Validate a whole batch before any of it is decided; other requests run between its parts."""
        parts: list[Batch] = []
        async with self._parsing:
            for part in model.parse_many(body):
                parts.append(part)
                await asyncio.sleep(0)
        return [part for part in parts if part.rows]

    async def _decide_many(self, model: ServedModel, matrix: Matrix) -> Decisions:
        # XGBoost releases the interpreter's lock, so other requests are read and parsed meanwhile.
        probabilities = await asyncio.get_running_loop().run_in_executor(self._scorer, model.probabilities, matrix)
        return model.decisions(matrix, probabilities)

    def _answers(
        self, model: ServedModel, pending: Sequence[PendingApplication], decisions: Decisions
    ) -> list[bytes]:
        ids = [one.request_id for one in pending]
        applications = [one.application for one in pending]
        self._record(model, applications, decisions, ids, [one.trace_id for one in pending])
        return model.answers(decisions, ids)

    def _record(
        self,
        model: ServedModel,
        applications: Sequence[Application],
        decisions: Decisions,
        request_ids: Sequence[str],
        trace_ids: Sequence[str],
        first_row: int | None = None,
    ) -> None:
        statuses: Sequence[Status] = decisions.statuses
        self.metrics.decided(model.tag, statuses, decisions.probabilities)
        self.decision_log.add(
            DecidedBatch(
                model.journal_members,
                applications,
                decisions.probabilities,
                statuses,
                request_ids,
                trace_ids if self.settings.bentoml.tracing else None,
                decisions.reasons,
                first_row,
            )
        )


class ConcurrencyLimit:
    """Bounds how many requests are in progress: further ones are refused at once rather than kept waiting."""

    def __init__(self, limit: int, retry_after_seconds: int) -> None:
        self._free = limit
        self._retry_after = (b"retry-after", b"%d" % retry_after_seconds)

    def __enter__(self) -> None:
        if self._free <= 0:
            raise Refusal(503, "too many requests are in progress; try again", headers=[self._retry_after])
        self._free -= 1

    def __exit__(self, *_: object) -> None:
        self._free += 1


def _public_fields(promotion: Promotion | None) -> dict[str, Any] | None:
    """Give what a client may know of a promotion: who did it, and why, stays in the history."""
    if promotion is None:
        return None
    return promotion.model_dump(include={"tag", "version", "run_id", "since", "previous"})


def encoded(model: ServedModel, pending: Sequence[PendingApplication]) -> Matrix:
    """Encode pending applications: shape (n, k), float32."""
    return model.encode([one.application for one in pending])


@cache
def core() -> Core:
    """Make this process's core from ``conf/serve.yaml``, once."""
    folder = conf_folder()
    return Core(ServeSettings.load(folder / "serve.yaml"), Policy.load(folder / "policy.yaml"), folder.parent)
