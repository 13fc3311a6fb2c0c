"""Reports of the promotion commands."""

from __future__ import annotations

from typing import Any

from pipeline.core.promoted import Promotion
from pipeline.report import Report


def moved(verb: str, promotion: Promotion, notes: list[str]) -> Report:
    """Report that another version is promoted now."""
    before = f" (before: {promotion.previous})" if promotion.previous else ""
    lines = [f"{verb} {promotion.tag}{before}", *(f"note: {note}" for note in notes)]
    return Report("\n".join(lines), promotion_data(promotion, changed=True, notes=notes))


def unchanged(promotion: Promotion, text: str) -> Report:
    """Report that there was nothing to do."""
    return Report(text, promotion_data(promotion, changed=False))


def promotion_data(promotion: Promotion, *, changed: bool, notes: list[str] | None = None) -> dict[str, Any]:
    """A promotion for programs."""
    return {
        "promoted": promotion.tag,
        "version": promotion.version,
        "previous": promotion.previous,
        "forced": promotion.forced,
        "changed": changed,
        "notes": notes or [],
    }
