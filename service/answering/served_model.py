"""One promoted version, compiled for answering: bodies in, decisions and the bytes of their answers out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from pydantic import ValidationError

from pipeline.core.contract.requests import RequestValidators, Values, valid_columns
from pipeline.core.model.bundle import BOOSTER_FILE, Bundle
from pipeline.core.model.encoders import FrameEncoder, RowEncoder
from pipeline.core.model.explainer import Explainer, Reason
from pipeline.core.model.features import Matrix
from pipeline.core.policy import STATUSES, Policy, Status, decide_many
from pipeline.core.promoted import Promotion
from service.answering.refusal import MOST_DETAILS, Detail, Refusal, contract_refusal, detail, details_of
from service.settings import ServeSettings

Application = Mapping[str, Any]

_HEADS: dict[Status, bytes] = {status: b'{"Status":"%b","probability":' % status.encode() for status in STATUSES}


@dataclass(frozen=True, slots=True)
class Batch:
    """The applications of one batch request, validated.

    Attributes
    ----------
    rows
        As they came.
    columns
        The same by field, as `valid_columns` gives them; None if only the rows are known to be valid.
    """

    rows: list[dict[str, Any]]
    columns: Mapping[str, Values] | None


@dataclass(frozen=True, slots=True)
class Decisions:
    """What was decided on some applications; the sequences are parallel.

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
    """A version that answers.

    Parameters
    ----------
    promotion, bundle
        The version and its verified parts.
    settings
        ``conf/serve.yaml``.
    policy
        ``conf/policy.yaml``.
    validators
        Those of the version before, if it had the same contract; None: compile them.
    """

    def __init__(
        self,
        promotion: Promotion,
        bundle: Bundle,
        settings: ServeSettings,
        policy: Policy,
        validators: RequestValidators | None = None,
    ) -> None:
        self.promotion = promotion
        self.schema = bundle.schema
        self.validators = validators or RequestValidators.of(bundle.schema)
        self.explainer = Explainer(bundle)
        self.journal_members = self._journal_members(policy)
        self._bundle = bundle
        self._settings = settings
        self._thresholds = policy.thresholds
        self._encoder = RowEncoder(self.schema, bundle.vectorizer)
        self._columns_encoder = FrameEncoder(self.schema, bundle.vectorizer)
        self._validate: Callable[[bytes], dict[str, Any]] = self.validators.application.validator.validate_json
        self._validate_many: Callable[[bytes], list[dict[str, Any]]] = (
            self.validators.batch.validator.validate_json
        )
        self._tail = b',"model":"%b","request_id":"' % promotion.tag.encode()

    @property
    def tag(self) -> str:
        """Exact tag in the BentoML store."""
        return self.promotion.tag

    def parse(self, body: bytes) -> dict[str, Any]:
        """Validate one application, or raise the `Refusal` 400."""
        try:
            application = self._validate(body)
        except ValidationError as error:
            raise contract_refusal(details_of(error)) from None
        # The contract admits no colon in a key or a category: there are as many as keys, repeated ones included.
        if body.count(b":") != len(application):
            raise contract_refusal(_repeated_keys(body))
        return application

    def parse_many(self, body: bytes) -> Batch:
        """Validate an array of applications, or raise the `Refusal` 400 that names rows and fields."""
        marks = _Marks(body)
        # Bounds what parsing can cost: a body of brackets alone would take a hundred times its size in memory.
        if marks.values > self._settings.limits.batch_rows * (len(self.schema.fields) + 2):
            raise self._too_many()
        batch = self._plainly_valid(body)
        if batch is None:
            try:
                batch = Batch(self._validate_many(body), None)
            except ValidationError as error:
                raise contract_refusal(self._details_of_rows(body, error)) from None
        if len(batch.rows) > self._settings.limits.batch_rows:
            raise self._too_many()
        if marks.keys != sum(map(len, batch.rows)):
            raise contract_refusal(_repeated_keys(body))
        return batch

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

    def _plainly_valid(self, body: bytes) -> Batch | None:
        """Validate a batch by columns: None if it is not plain that all of it is valid."""
        try:
            rows = orjson.loads(body)
        except orjson.JSONDecodeError:
            return None
        columns = valid_columns(rows, self.schema) if isinstance(rows, list) else None
        return None if columns is None else Batch(rows, columns)

    def _too_many(self) -> Refusal:
        limit = self._settings.limits.batch_rows
        return Refusal(
            400,
            f"a batch holds at most {limit} applications; send it in parts",
            [detail((), f"more than {limit} applications, or values beyond the contract", "too_long")],
        )

    def _details_of_rows(self, body: bytes, error: ValidationError) -> list[Detail]:
        """Go through the rows one by one, as the validator stopped at the first that breaks the contract."""
        try:
            rows = json.loads(body)
        except (ValueError, RecursionError):
            return details_of(error)
        if not isinstance(rows, list):
            return details_of(error)
        found: list[Detail] = []
        for index, row in enumerate(rows):
            try:
                self._validate(json.dumps(row).encode())
            except ValidationError as broken:
                found += details_of(broken, before=(index,))
            if len(found) > MOST_DETAILS:
                break
        return found or details_of(error)

    def _journal_members(self, policy: Policy) -> bytes:
        members = {
            "model": self.promotion.tag,
            "digest": self.promotion.digests.get(BOOSTER_FILE),
            "schema": self.schema.digest,
            "thresholds": policy.thresholds.model_dump(),
        }
        return orjson.dumps(members)[1:-1]


class _Marks:
    """Marks of punctuation in a JSON text.

    Attributes
    ----------
    values
        Commas and opening brackets: there are no more values, as each follows one.
    keys
        Colons: where no string holds one, each follows a key.
    """

    def __init__(self, body: bytes) -> None:
        # Four comparisons of arrays take a third of the time of `bytes.count`.
        text = np.frombuffer(body, dtype=np.uint8)
        commas, lists, objects, self.keys = (int(np.count_nonzero(text == mark)) for mark in b",[{:")
        self.values = commas + lists + objects


def _as_json(numbers: Sequence[float]) -> list[bytes]:
    return orjson.dumps(numbers)[1:-1].split(b",")


def _endings(decisions: Decisions) -> list[bytes]:
    if decisions.reasons is None:
        return [b"}"] * len(decisions.statuses)
    return [b',"reasons":%b}' % orjson.dumps(reasons) for reasons in decisions.reasons]


def _repeated_keys(body: bytes) -> list[Detail]:
    """Find the keys that stand twice in a body that is valid otherwise."""
    repeated: list[str] = []

    def notice(pairs: list[tuple[str, Any]]) -> None:
        keys = [key for key, _ in pairs]
        repeated.extend(key for key in dict.fromkeys(keys) if keys.count(key) > 1)

    json.loads(body, object_pairs_hook=notice)
    return [detail((key,), "Key must stand once", "repeated_key") for key in repeated[: MOST_DETAILS + 1]]
