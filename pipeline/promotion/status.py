"""The status command: what is promoted, since when, by whom, and the history."""

from __future__ import annotations

from typing import Any

from pipeline.core.promoted import History, Promotion, history, history_path, read_pointer
from pipeline.promotion import store_folders as versions
from pipeline.promotion.pointer import is_settled
from pipeline.promotion.request import StatusRequest
from pipeline.report import Report


def status(_: StatusRequest) -> Report:
    """Show what is promoted, and the history.

    Raises
    ------
    StoreError
        The pointer is damaged.
    """
    promoted, known = read_pointer(), history()
    data: dict[str, Any] = {"promoted": None, "history": [one.model_dump() for one in known.promotions]}
    if known.damaged_lines:
        data["damaged_lines"] = known.damaged_lines
    if promoted is None:
        return Report("nothing is promoted; train a model, then `python -m pipeline promote`", data)
    facts = promoted.model_dump(include={"version", "run_id", "since", "by", "why", "previous", "digests"})
    return Report(_status_text(promoted, known), {**data, **facts, "promoted": promoted.tag})


def _status_text(promoted: Promotion, known: History) -> str:
    alias = "follows" if is_settled(promoted) else "does not follow yet: `python -m pipeline sync`"
    whole = versions.is_intact(promoted.tag, promoted.digests)
    cure = f"MISSING OR ALTERED: `python -m pipeline promote --version {promoted.version}` stores them again"
    facts = {
        "promoted": promoted.tag,
        "run": promoted.run_id,
        "since": promoted.since,
        "by": promoted.by,
        "why": promoted.why + (" (forced)" if promoted.forced else ""),
        "previous": promoted.previous or "-",
        "champion": f"MLflow's alias {alias}",
        "files": "whole" if whole else cure,
    }
    lines = [f"{name:<9} {value}" for name, value in facts.items()]
    lines += ["", "file                 sha256"]
    lines += [f"{name:<20} {digest}" for name, digest in promoted.digests.items()]
    lines += ["", "history, newest first"]
    lines += [_history_line(promotion) for promotion in reversed(known.promotions)]
    if known.damaged_lines:
        lines.append(f"{known.damaged_lines} damaged lines of {history_path()} were left out")
    return "\n".join(lines)


def _history_line(promotion: Promotion) -> str:
    before, after = ((tag or "-").rpartition(":")[2] for tag in (promotion.previous, promotion.tag))
    moment = promotion.since[:19].replace("T", " ")
    forced = "  FORCED" if promotion.forced else ""
    run = promotion.run_id[:8]
    return f"{moment}  {before:>5} → {after:<5} run {run}  {promotion.by}  {promotion.why}{forced}"
