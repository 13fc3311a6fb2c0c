"""Commands that say which version answers: promote, rollback, status, sync.

A promotion is a transaction. Under one lock: stage → verify → judge → rename into the store → pointer → history →
``latest`` → alias ``champion``. The pointer's rename is the moment at which the new version counts. Whatever is
killed before it leaves the old version promoted and rubbish on the workbench; whatever is killed after it leaves
the new version promoted and steps to complete. The next command does either by itself: see `_recover`.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import PipelineError, PromotionRefused, StoreError, TrackingError
from pipeline.core.machine import now, whoami
from pipeline.core.policy import Policy
from pipeline.core.promoted import Promotion, history, promotions, read_pointer, version_home
from pipeline.promotion import store_folders as versions
from pipeline.promotion.alias import Settling, settle
from pipeline.promotion.failpoint import failpoint
from pipeline.promotion.lock import promotion_lock
from pipeline.promotion.pointer import is_settled, mark_settled, reconcile, write_pointer
from pipeline.promotion.request import PromoteRequest, RollbackRequest, StatusRequest, SyncRequest
from pipeline.promotion.settings import PromoteSettings
from pipeline.registry import client as champion
from pipeline.report import Report

if TYPE_CHECKING:
    from pipeline.promotion.gate import Verdict
    from pipeline.promotion.staging import Stored

BEST_BY = "test_log_loss"
"""Metric of the training run by which ``--best`` chooses: lower is better."""


def promote(request: PromoteRequest) -> Report:
    """Judge a candidate and, if the gate lets it pass, make it the version that answers.

    Raises
    ------
    PipelineError
        Nothing could be judged or stored; what was promoted still is.
    """
    settings = PromoteSettings.load(request.settings_file, data=request.data)
    with _changing(settings):
        if not request.dry_run:
            _settle_earlier()
        candidate = _chosen(request)
        named = champion.by_alias(champion.CHAMPION)
        current = _current()
        agreed = named is None or named.number == candidate.number
        if current and agreed and _is_same(current, candidate) and not request.dry_run:
            return _already(current, candidate, settings)
        return _promote(candidate, named or _local_champion(current), request, settings)


def rollback(request: RollbackRequest) -> Report:
    """Make an earlier promoted version answer again, from this machine's store, with MLflow reachable or not.

    Raises
    ------
    PipelineError
        There is no such version, or it is not what it was; what was promoted still is.
    """
    settings = PromoteSettings.load(request.settings_file)
    # Started first: it imports MLflow while this process opens the stored model.
    settling = Settling() if champion.is_reachable() else None
    try:
        with _changing(settings):
            current = _current()
            target = _earlier(current, request.to)
            if current and target.tag == current.tag:
                return Report(f"{target.tag} is promoted already; nothing to do", _data(current, changed=False))
            _check_whole(target)
            promotion = _succeed(target, _why("rollback", request.reason))
            write_pointer(promotion)
            notes = _complete(promotion, settings, settling)
    finally:
        if settling:
            settling.abandon()
    return _done("rolled back to", promotion, notes)


def sync(request: SyncRequest) -> Report:
    """Make this machine's store serve what MLflow's `champion` says, once or until told to end.

    Raises
    ------
    PipelineError
        MLflow cannot be asked, or its champion not be stored; what was promoted still is.
    """
    settings = PromoteSettings.load(request.settings_file)
    if request.watch is None:
        return _follow(settings)
    return _watch(settings, request.watch)


def status(_: StatusRequest) -> Report:
    """Show what is promoted, and the history."""
    promoted, records = read_pointer(), history()
    if promoted is None:
        text = "nothing is promoted; train a model, then `python -m pipeline promote`"
        return Report(text, {"promoted": None, "history": records})
    data = promoted.model_dump(include={"version", "run_id", "since", "by", "why", "previous", "digests"})
    return Report(_status_text(promoted, records), {"promoted": promoted.tag, **data, "history": records})


@dataclass(frozen=True)
class _Judged:
    """A verdict, on what it rests, and whether it was overridden."""

    verdict: Verdict
    basis: str
    forced: bool

    @property
    def text(self) -> str:
        return f"{self.basis}\n\n{self.verdict.table()}\n"

    @property
    def outcome(self) -> str:
        if self.verdict.passed:
            return "passed"
        return "forced" if self.forced else "refused"


def _promote(
    candidate: champion.ModelVersion,
    defender: champion.ModelVersion | None,
    request: PromoteRequest,
    settings: PromoteSettings,
) -> Report:
    """Stage, judge, and unless refused install the candidate and move the pointer."""
    with versions.workbench() as bench:
        stored = _stored(candidate, bench)
        judged = _judge(candidate, stored, defender, request, settings)
        data = {"candidate": candidate.tag, "verdict": judged.outcome, "rules": judged.verdict.document()}
        if request.dry_run:
            return Report(f"{judged.text}\ndry run: {judged.outcome}; nothing was changed", data)
        _log(candidate, judged)
        failpoint("after-verdict")
        if judged.outcome == "refused":
            return Report(judged.text, {**data, "changed": False}, failure=_refusal(candidate, judged))
        _check_undisputed(defender)
        why = _why("promote", request.reason)
        promotion = _entered(candidate, stored, why, replaces=defender, forced=judged.forced)
    notes = _complete(promotion, settings)
    report = _done("promoted", promotion, notes)
    return Report(f"{judged.text}\n{report.text}", {**data, **report.data})


def _judge(
    candidate: champion.ModelVersion,
    stored: Stored,
    defender: champion.ModelVersion | None,
    request: PromoteRequest,
    settings: PromoteSettings,
) -> _Judged:
    from pipeline.promotion.evidence import gather
    from pipeline.promotion.gate import judge

    evidence, basis = gather(candidate, stored, defender, settings.data)
    thresholds = Policy.load(request.conf / "policy.yaml").thresholds
    verdict = judge(evidence, settings, thresholds, allow_schema_change=request.allow_schema_change)
    return _Judged(verdict, basis, forced=request.force and not verdict.passed and verdict.can_be_forced)


def _log(candidate: champion.ModelVersion, judged: _Judged) -> None:
    """Leave the verdict with the run, so that a refused candidate shows why."""
    moment = now()
    broken = ", ".join(rule.name for rule in judged.verdict.broken)
    document = {
        "time": moment,
        "by": whoami(),
        "basis": judged.basis,
        "outcome": judged.outcome,
        "rules": judged.verdict.document(),
    }
    tags = {"gate": judged.outcome, "gate.broken": broken, "gate.time": moment}
    champion.log_verdict(candidate, document, tags, f"gate/{moment.replace(':', '')}.json")


def _refusal(candidate: champion.ModelVersion, judged: _Judged) -> str:
    cure = "promote another version, or override with --force --reason TEXT"
    if not judged.verdict.can_be_forced:
        cure = "promote another version; this cannot be forced"
    return f"{candidate.tag} refused: {judged.verdict.reasons()}; {cure}"


def _already(current: Promotion, candidate: champion.ModelVersion, settings: PromoteSettings) -> Report:
    """The candidate is promoted: change nothing, unless its folder is not whole."""
    if versions.is_intact(current.tag, current.digests):
        return Report(
            f"{current.tag} is promoted already, since {current.since}; nothing to do",
            _data(current, changed=False),
        )
    promotion = _import(candidate, "promote: its stored files were absent or altered")
    return _done("stored again", promotion, _complete(promotion, settings))


def _follow(settings: PromoteSettings) -> Report:
    """One round of `sync`."""
    with _changing(settings):
        _settle_earlier()
        named = champion.by_alias(champion.CHAMPION)
        if named is None:
            raise TrackingError("MLflow names no champion yet; promote a version first")
        current = _current()
        if current and _is_same(current, named) and versions.is_intact(current.tag, current.digests):
            return Report(f"{current.tag} is MLflow's champion and promoted here", _data(current, changed=False))
        promotion = _import(named, "sync")
        return _done("followed MLflow's champion:", promotion, _complete(promotion, settings))


def _watch(settings: PromoteSettings, seconds: float) -> Report:
    """Follow until SIGINT or SIGTERM. A round that fails is told once, and tried again."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    told = ""
    while not stop.is_set():
        try:
            told = _tell(_follow(settings).text.splitlines()[0], told)
        except PipelineError as error:
            told = _tell(f"error: {error}", told)
        stop.wait(seconds)
    current = read_pointer()
    return Report("stopped following", _data(current, changed=False) if current else {"promoted": None})


def _tell(line: str, told: str) -> str:
    if line != told:
        sys.stderr.write(f"{now()} {line}\n")
        sys.stderr.flush()
    return line


@contextlib.contextmanager
def _changing(settings: PromoteSettings) -> Iterator[None]:
    """Hold the lock, with all that an earlier command left undone completed; the disk's errors in one line."""
    try:
        with promotion_lock(settings.lock_seconds):
            _recover()
            failpoint("after-lock")
            yield
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise StoreError(
            f"the store must be writable: {error.strerror or error}{place}; what was promoted still is; "
            "free space or give rights, then run it again"
        ) from error


def _recover() -> None:
    """Finish or clean up what a killed command left on this machine. Idempotent."""
    with contextlib.suppress(StoreError):  # a damaged pointer is replaced by the next promotion, not repaired
        promoted = read_pointer()
        if promoted:
            versions.restore(promoted.tag, promoted.digests)
        reconcile()
    versions.clear()


def _settle_earlier() -> None:
    """Let MLflow's alias follow an earlier promotion of this machine, if it could not then."""
    with contextlib.suppress(StoreError):
        promoted = read_pointer()
        if promoted and not is_settled(promoted) and settle(promoted) == promoted.version:
            mark_settled(promoted)


def _current() -> Promotion | None:
    """What is promoted; the last known if the pointer is damaged."""
    try:
        return read_pointer()
    except StoreError:
        return next(iter(promotions()), None)


def _chosen(request: PromoteRequest) -> champion.ModelVersion:
    if request.version:
        return champion.by_number(request.version)
    if request.run_id:
        return champion.by_run(request.run_id)
    if request.best:
        return champion.lowest(BEST_BY)
    candidate = champion.by_alias(champion.CANDIDATE)
    if candidate is None:
        raise TrackingError(
            f"no version has the alias {champion.CANDIDATE}; train one, or name one with --version N"
        )
    return candidate


def _local_champion(current: Promotion | None) -> champion.ModelVersion | None:
    """What this machine promoted, if MLflow names no champion but still knows the version."""
    if current is None:
        return None
    with contextlib.suppress(TrackingError):
        version = champion.by_number(current.version)
        return version if _is_same(current, version) else None
    return None


def _is_same(promotion: Promotion, version: champion.ModelVersion) -> bool:
    # The number alone is not enough: a new tracking database counts from 1 again.
    return promotion.version == version.number and promotion.run_id == version.run_id


def _stored(version: champion.ModelVersion, bench: Path) -> Stored:
    """The version as it stands in the store if it is whole there, else staged from MLflow."""
    from pipeline.promotion import staging as store

    for promotion in promotions():
        if _is_same(promotion, version):
            found = store.reopen(promotion.tag, promotion.digests)
            if found is not None:
                return found
    metadata = {"mlflow_version": str(version.number), "mlflow_run_id": version.run_id}
    return store.stage(version.uri, version.tag, bench, metadata)


def _import(version: champion.ModelVersion, why: str) -> Promotion:
    """Store and promote a version without judging it: it was judged where it was promoted first."""
    with versions.workbench() as bench:
        stored = _stored(version, bench)
        stored.bundle.check_golden()
        return _entered(version, stored, why, replaces=version)


def _entered(
    version: champion.ModelVersion,
    stored: Stored,
    why: str,
    *,
    replaces: champion.ModelVersion | None,
    forced: bool = False,
) -> Promotion:
    """Put a staged version into the store and move the pointer to it.

    `replaces` is the champion that MLflow names.
    """
    failpoint("after-verify")
    if stored.folder != version_home(stored.tag):
        versions.install(stored.folder, stored.tag)
    facts = {"tag": stored.tag, "version": version.number, "run_id": version.run_id}
    target = Promotion.model_validate({**_origin(why), **facts, "digests": dict(stored.digests)})
    before = [replaces.number] if replaces else []
    promotion = _succeed(target, why, forced=forced, replaces=before)
    write_pointer(promotion)
    failpoint("after-history")
    return promotion


def _origin(why: str) -> dict[str, Any]:
    return {"since": now(), "by": whoami(), "why": why}


def _succeed(target: Promotion, why: str, *, forced: bool = False, replaces: list[int] | None = None) -> Promotion:
    """The promotion of a version after what is promoted now.

    `replaces` is what MLflow's alias names; None: it was not asked, so what it may name is taken from here.
    """
    current = _current()
    changes: dict[str, Any] = {**_origin(why), "forced": forced, "previous": None, "replaces": replaces or []}
    if current:
        changes["previous"] = current.previous if current.tag == target.tag else current.tag
    if current and replaces is None:
        # This machine's last word; if that never reached MLflow, also what came before it.
        changes["replaces"] = [current.version, *([] if is_settled(current) else current.replaces)]
    return target.model_copy(update=changes)


def _check_undisputed(defender: champion.ModelVersion | None) -> None:
    """Refuse if another machine promoted while this one judged: the comparison is with a champion of the past."""
    named = champion.by_alias(champion.CHAMPION)
    if named and (defender is None or named.number != defender.number):
        raise PromotionRefused(
            f"the champion must be the one that was judged against; {named.tag} was promoted meanwhile; "
            "promote again"
        )


def _earlier(current: Promotion | None, number: int | None) -> Promotion:
    """The promotion to go back to."""
    known = {promotion.tag: promotion for promotion in promotions()}
    if number is not None:
        tag: str | None = next((tag for tag, one in known.items() if one.version == number), None)
        if tag is None:
            raise PromotionRefused(
                f"version {number} was never promoted on this machine; promote it with --version {number}"
            )
        return known[tag]
    if current is None or current.previous not in known:
        raise PromotionRefused("nothing was promoted before; promote a version with --version N")
    return known[current.previous]


def _check_whole(target: Promotion) -> None:
    """Open the version as the service will, every byte verified first."""
    from pipeline.core.model.bundle import open_bundle

    folder = version_home(target.tag)
    cure = f"bring it back with `python -m pipeline promote --version {target.version}`"
    if not folder.is_dir():
        raise PromotionRefused(f"{target.tag} must still be in the store, and was removed; {cure}")
    try:
        open_bundle(folder, target.digests).check_golden()
    except StoreError as error:
        raise PromotionRefused(f"{target.tag} must be as it was promoted: {error}; {cure}") from error


def _complete(promotion: Promotion, settings: PromoteSettings, settling: Settling | None = None) -> list[str]:
    """Do what follows the pointer; what cannot be done now is told, and done by the next command.

    The promotion counts already: nothing here may undo it.
    """
    notes: list[str] = []
    with _noting(notes, "the next command completes it"):
        reconcile()
    failpoint("after-latest")
    with _noting(notes, "`python -m pipeline sync` moves the alias when MLflow is back"):
        notes += _settle(promotion, settings, settling)
    failpoint("after-settled")
    with _noting(notes, "the next promotion tries again"):
        order = [one.tag for one in promotions()]
        removed = versions.prune(settings.keep, order, [promotion.tag, promotion.previous])
        notes += [f"removed {tag} (keep: {settings.keep})" for tag in removed]
    failpoint("after-prune")
    return notes


def _settle(promotion: Promotion, settings: PromoteSettings, settling: Settling | None) -> list[str]:
    if is_settled(promotion):
        return []
    named = settling.finish(promotion, settings.alias_seconds) if settling else settle(promotion)
    if named != promotion.version:
        return [f"MLflow's champion is v{named}, promoted elsewhere: the next sync follows it"]
    mark_settled(promotion)
    return []


@contextlib.contextmanager
def _noting(notes: list[str], cure: str) -> Iterator[None]:
    try:
        yield
    except (PipelineError, OSError) as error:
        notes.append(f"{error}; {cure}")


def _why(command: str, reason: str | None) -> str:
    return f"{command}: {reason}" if reason else command


def _data(promotion: Promotion, *, changed: bool, notes: list[str] | None = None) -> dict[str, Any]:
    return {
        "promoted": promotion.tag,
        "version": promotion.version,
        "previous": promotion.previous,
        "forced": promotion.forced,
        "changed": changed,
        "notes": notes or [],
    }


def _done(verb: str, promotion: Promotion, notes: list[str]) -> Report:
    before = f" (before: {promotion.previous})" if promotion.previous else ""
    lines = [f"{verb} {promotion.tag}{before}", *(f"note: {note}" for note in notes)]
    return Report("\n".join(lines), _data(promotion, changed=True, notes=notes))


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
