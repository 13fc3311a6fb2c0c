"""Give each request an id: the client's own if it is fit for logs and headers, else a new one."""

from __future__ import annotations

import os
import re
from itertools import count

from service.http.asgi import Headers

_FIT = re.compile(rb"[A-Za-z0-9._:-]{1,64}")


class RequestIds:
    """Chooses the ids of requests."""

    def __init__(self) -> None:
        # Random once and then counted: unique like a UUID for a tenth of its cost.
        self._prefix = os.urandom(8).hex()
        self._numbers = count()

    def choose(self, headers: Headers) -> str:
        """Take ``X-Request-ID`` if it is 1 to 64 letters, digits and ``. _ : -``; else make one."""
        given = headers.get(b"x-request-id")
        if given is not None and _FIT.fullmatch(given):
            return given.decode()
        return f"{self._prefix}{next(self._numbers):08x}"
