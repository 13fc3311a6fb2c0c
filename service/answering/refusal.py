"""Errors that clients see: an HTTP status and a JSON body."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import orjson
from pydantic import ValidationError

MOST_DETAILS = 100
"""Maximum details in one answer; a hostile body can break the contract a hundred thousand times."""

_LONGEST_KEY = 100
"""Maximum characters of an unknown key in an answer."""

Header = tuple[bytes, bytes]
Detail = dict[str, Any]


class Refusal(Exception):
    """An answer other than 200.

    Parameters
    ----------
    status
        HTTP status.
    error
        One sentence: the rule and, if there is one, the cure. Never a value that the client sent.
    detail
        ``{"loc", "msg", "type"}`` of each broken rule.
    headers
        Response headers beside the usual ones.
    """

    def __init__(
        self, status: int, error: str, detail: Sequence[Detail] = (), headers: Sequence[Header] = ()
    ) -> None:
        super().__init__(error)
        self.status = status
        self.error = error
        self.detail = list(detail)
        self.headers = list(headers)

    @property
    def body(self) -> bytes:
        """The JSON answer."""
        return orjson.dumps({"error": self.error, "detail": self.detail})


def contract_refusal(details: Sequence[Detail]) -> Refusal:
    """Make the 400 of a body that breaks the contract, with the first `MOST_DETAILS` of its details."""
    many = "" if len(details) <= MOST_DETAILS else f"; the first {MOST_DETAILS} problems follow"
    return Refusal(400, f"the request breaks the data contract{many}", details[:MOST_DETAILS])


def details_of(error: ValidationError, before: Iterable[str | int] = ()) -> list[Detail]:
    """List the broken rules of one validation, without the values that broke them.

    Parameters
    ----------
    before
        Put before each location: the row's index in a batch.
    """
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return [
        {"loc": [*before, *map(_shortened, item["loc"])], "msg": item["msg"], "type": item["type"]}
        for item in found
    ]


def detail(loc: Iterable[str | int], message: str, kind: str) -> Detail:
    """Make a detail for a rule that the validator does not know."""
    return {"loc": list(map(_shortened, loc)), "msg": message, "type": kind}


def _shortened(part: str | int) -> str | int:
    if isinstance(part, int) or len(part) <= _LONGEST_KEY:
        return part
    return part[:_LONGEST_KEY] + "…"
