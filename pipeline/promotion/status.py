"""The status command: what is promoted, since when, by whom, and the history."""

from __future__ import annotations

from typing import Any

from pipeline.core.promoted import Promotion, history, read_pointer
from pipeline.promotion import store_folders as versions
from pipeline.promotion.pointer import is_settled
from pipeline.promotion.request import StatusRequest
from pipeline.report import Report


def status(_: StatusRequest) -> Report:
    """Show what is promoted, and the history."""
    promoted, records = read_pointer(), history()
    if promoted is None:
        text = "nothing is promoted; train a model, then `python -m pipeline promote`"
        return Report(text, {"promoted": None, "history": records})
    data = promoted.model_dump(include={"version", "run_id", "since", "by", "why", "previous", "digests"})
    return Report(_status_text(promoted, records), {"promoted": promoted.tag, **data, "history": records})


def _status_text(promoted: Promotion, records: list[dict[str, Any]]) -> str:
    alias = "follows" if is_settled(promoted) else "does not follow yet: `python -m pipeline sync`"
    whole = versions.is_intact(promoted.tag, promoted.digests)
    cure = f"ABSENT OR ALTERED: `python -m pipeline promote --version {promoted.version}` stores them again"
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
    lines += [_history_line(record) for record in reversed(records)]
    return "\n".join(lines)


def _history_line(record: dict[str, Any]) -> str:
    before, after = (str(record.get(key) or "-").rpartition(":")[2] for key in ("previous", "tag"))
    forced = "  FORCED" if record.get("forced") else ""
    moment = str(record.get("since"))[:19].replace("T", " ")
    run = str(record.get("run_id"))[:8]
    return f"{moment}  {before:>5} → {after:<5} run {run}  {record.get('by')}  {record.get('why')}{forced}"
