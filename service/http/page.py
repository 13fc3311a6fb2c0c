"""The page at ``/``: what the service is, and a form to try it. It loads nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

PAGE = (Path(__file__).parent / "page.html").read_bytes()


def _hash(element: str) -> str:
    """Give the source by which a Content-Security-Policy allows the page's inline element, and no other."""
    found = re.search(rb"<%b>(.*?)</%b>" % (element.encode(), element.encode()), PAGE, re.DOTALL)
    text = found[1] if found else b""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"


_POLICY = (
    f"default-src 'none'; script-src {_hash('script')}; style-src {_hash('style')}; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
)
