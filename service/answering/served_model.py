"""One promoted version, compiled for answering: it parses bodies, decides, and writes the answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from pydantic_core import SchemaValidator

from pipeline.core.contract.requests import request_validator
from pipeline.core.model.bundle import BOOSTER_FILE, Bundle
from pipeline.core.model.encoders import FrameEncoder, RowEncoder
from pipeline.core.model.explainer import Explainer, Reason
from pipeline.core.model.features import Matrix
from pipeline.core.policy import STATUSES, Policy, Status, decide_many
from pipeline.core.promoted import Promotion
from service.answering.bodies import Batch, BodyParser
from service.settings import ServeSettings

Application = Mapping[str, Any]

_HEADS: dict[Status, bytes] = {status: b'{"Status":"%b","probability":' % status.encode() for status in STATUSES}


@dataclass(frozen=True, slots=True)
class Decisions:
    """The decisions on some applications, as parallel sequences.

    Attributes
    ----------
    probabilities
        Of default, in [0, 1]: exactly the model's float32.
    statuses
        By the policy's thresholds.
    reasons
        Adverse reasons; None unless ``reasons`` is on.
    """

    probabilities: list[float]
    statuses: list[Status]
    reasons: list[list[Reason]] | None


class ServedModel:
    """The model of one promoted version.

    Parameters
    ----------
    promotion, bundle
        The version and its verified parts.
    settings
        ``conf/serve.yaml``.
    policy
        ``conf/policy.yaml``.
    validator
        That of the version before, if it had the same contract; None: compile it.
    """

    def __init__(
        self,
        promotion: Promotion,
        bundle: Bundle,
        settings: ServeSettings,
        policy: Policy,
        validator: SchemaValidator | None = None,
    ) -> None:
        self.promotion = promotion
        self.schema = bundle.schema
        self.validator = validator or request_validator(bundle.schema)
        self.explainer = Explainer(bundle)
        self.journal_members = self._journal_members(policy)
        self._bodies = BodyParser(self.schema, settings.limits, self.validator)
        self._bundle = bundle
        self._settings = settings
        self._thresholds = policy.thresholds
        self._encoder = RowEncoder(self.schema, bundle.vectorizer)
        self._columns_encoder = FrameEncoder(self.schema, bundle.vectorizer)
        self._tail = b',"model":"%b","request_id":"' % promotion.tag.encode()

    @property
    def tag(self) -> str:
        """Exact tag in the BentoML store."""
        return self.promotion.tag

    def parse(self, body: bytes) -> dict[str, Any]:
        """Validate one application, or raise the `Refusal` 400."""
        return self._bodies.application(body)

    def parse_many(self, body: bytes) -> Iterator[Batch]:
        """Validate an array of applications; see `service.answering.bodies.BodyParser.batch`."""
        return self._bodies.batch(body)

    def encode(self, applications: Sequence[Application]) -> Matrix:
        """Encode validated applications: shape (n, k), float32."""
        return self._encoder.transform(applications)

    def encode_many(self, batch: Batch) -> Matrix:
        """Encode a batch request: shape (n, k), float32."""
        if batch.columns is None:
            return self.encode(batch.rows)
        return self._columns_encoder.transform_values(batch.columns, len(batch.rows))

    def probabilities(self, matrix: Matrix) -> Matrix:
        """Score encoded applications: shape (n, k) → shape (n,). May be called from any thread."""
        return self._bundle.probabilities(matrix)

    def decide(self, matrix: Matrix) -> Decisions:
        """Score and decide on encoded applications, shape (n, k)."""
        return self.decisions(matrix, self.probabilities(matrix))

    def decisions(self, matrix: Matrix, probabilities: Matrix) -> Decisions:
        """Decide on encoded applications, shape (n, k), by this version's probabilities for them, shape (n,)."""
        codes = decide_many(probabilities, self._thresholds)
        return Decisions(
            probabilities.tolist(), [STATUSES[code] for code in codes.tolist()], self._reasons(matrix)
        )

    def answers(self, decisions: Decisions, request_ids: Sequence[str]) -> list[bytes]:
        """Write the JSON answer of each decision."""
        numbers = _as_json(decisions.probabilities)
        endings = _endings(decisions)
        return [
            b'%b%b%b%b"%b' % (_HEADS[status], number, self._tail, request_id.encode(), ending)
            for status, number, request_id, ending in zip(
                decisions.statuses, numbers, request_ids, endings, strict=True
            )
        ]

    def explanation(self, application: Application) -> dict[str, Any]:
        """Explain one validated application; see `pipeline.core.model.explainer.Explainer`."""
        return self.explainer.document(self.encode([application]))

    def _reasons(self, matrix: Matrix) -> list[list[Reason]] | None:
        if not self._settings.reasons:
            return None
        contributions, _ = self.explainer.contributions(matrix)
        return [self.explainer.reasons(row) for row in contributions]

    def _journal_members(self, policy: Policy) -> bytes:
        members = {
            "model": self.promotion.tag,
            "digest": self.promotion.digests.get(BOOSTER_FILE),
            "schema": self.schema.digest,
            "thresholds": policy.thresholds.model_dump(),
        }
        return orjson.dumps(members)[1:-1]


def _as_json(numbers: Sequence[float]) -> list[bytes]:
    return orjson.dumps(numbers)[1:-1].split(b",")


def _endings(decisions: Decisions) -> list[bytes]:
    if decisions.reasons is None:
        return [b"}"] * len(decisions.statuses)
    return [b',"reasons":%b}' % orjson.dumps(reasons) for reasons in decisions.reasons]
