"""The commands promote and rollback."""

from __future__ import annotations

from time import monotonic

from pipeline.core.errors import PromotionRefused, StoreError
from pipeline.core.promoted import Promotion, promotions, version_home
from pipeline.promotion.alias import BackgroundSettling, settle_earlier, settle_noting
from pipeline.promotion.candidates import champion, chosen, is_same, require_undisputed, staged
from pipeline.promotion.failpoint import failpoint
from pipeline.promotion.judgement import judge_candidate
from pipeline.promotion.outcome import moved, unchanged
from pipeline.promotion.request import PromoteRequest, RollbackRequest
from pipeline.promotion.settings import PromoteSettings
from pipeline.promotion.store_folders import is_intact, workbench
from pipeline.promotion.transaction import (
    changing,
    complete,
    enter,
    last_known,
    move_to,
    pointer_state,
    require_unmoved,
)
from pipeline.registry.client import ModelVersion
from pipeline.report import Report


def promote(request: PromoteRequest) -> Report:
    """Judge a candidate and, if it passes the gate, promote it.

    Raises
    ------
    PipelineError
        Nothing could be judged or stored; what was promoted still is.
    """
    settings = PromoteSettings.load(request.settings_file, data=request.data)
    with changing(settings):
        seen, current = pointer_state(), last_known()
    if not request.dry_run:
        settle_earlier()
    candidate = chosen(request)
    defender = champion(current)
    agreed = defender is None or defender.number == candidate.number
    if current and agreed and is_same(current, candidate) and not request.dry_run:
        return _promoted_already(current, candidate, seen, settings)
    return _judge_and_promote(candidate, defender, seen, request, settings)


def rollback(request: RollbackRequest) -> Report:
    """Make an earlier promoted version answer again, from this machine's store, with MLflow reachable or not.

    Raises
    ------
    PipelineError
        There is no such version, or it is not what it was; what was promoted still is.
    """
    began = monotonic()
    settings = PromoteSettings.load(request.settings_file)
    # Started first: it imports MLflow while this process opens the stored model.
    with BackgroundSettling(settings.alias_seconds) as settling:
        with changing(settings):
            current = last_known()
            target = _earlier(current, request.to)
            if current and target.tag == current.tag:
                return unchanged(current, f"{target.tag} is promoted already; nothing to do")
            _check_whole(target)
            promotion = move_to(target, _why("rollback", request.reason))
            notes = complete(promotion, settings)
        notes += settling.settle(promotion, settings.rollback_seconds - (monotonic() - began))
    return moved("rolled back to", promotion, notes)


def _judge_and_promote(
    candidate: ModelVersion,
    defender: ModelVersion | None,
    seen: bytes | None,
    request: PromoteRequest,
    settings: PromoteSettings,
) -> Report:
    """Stage, judge, and unless refused install the candidate and move the pointer."""
    with workbench() as bench:
        stored = staged(candidate, bench)
        judgement = judge_candidate(candidate, stored, defender, request, settings)
        if request.dry_run:
            text = f"{judgement.text}\ndry run: {judgement.outcome}; nothing was changed"
            return Report(text, judgement.data)
        judgement.log()
        failpoint("after-verdict")
        if judgement.outcome == "refused":
            return Report(judgement.text, {**judgement.data, "changed": False}, failure=judgement.refusal)
        require_undisputed(defender)
        with changing(settings):
            require_unmoved(seen)
            why = _why("promote", request.reason)
            promotion = enter(candidate, stored, why, replaces=defender, forced=judgement.forced)
            notes = complete(promotion, settings)
    report = moved("promoted", promotion, notes + settle_noting(promotion))
    return Report(f"{judgement.text}\n{report.text}", {**judgement.data, **report.data})


def _promoted_already(
    current: Promotion, candidate: ModelVersion, seen: bytes | None, settings: PromoteSettings
) -> Report:
    """Change nothing, as the candidate is promoted; but store it again if its folder is not whole."""
    if is_intact(current.tag, current.digests):
        return unchanged(current, f"{current.tag} is promoted already, since {current.since}; nothing to do")
    promotion, notes = bring_in(candidate, "promote: its stored files were absent or altered", seen, settings)
    return moved("stored again", promotion, notes)


def bring_in(
    version: ModelVersion, why: str, seen: bytes | None, settings: PromoteSettings
) -> tuple[Promotion, list[str]]:
    """Store and promote a version without judging it: it was judged where it was promoted first.

    Raises
    ------
    PipelineError
        Its files are not those that were logged, it does not answer as it did, or the world moved on meanwhile.
    """
    with workbench() as bench:
        stored = staged(version, bench)
        stored.bundle.check_golden()
        with changing(settings):
            require_unmoved(seen)
            promotion = enter(version, stored, why, replaces=version)
            notes = complete(promotion, settings)
    return promotion, notes + settle_noting(promotion)


def _earlier(current: Promotion | None, number: int | None) -> Promotion:
    """Return the promotion to go back to."""
    known = {promotion.tag: promotion for promotion in promotions()}
    if number is not None:
        found = next((one for one in known.values() if one.version == number), None)
        if found is None:
            raise PromotionRefused(
                f"version {number} was never promoted on this machine; run `promote --version {number}`"
            )
        return found
    if current is None or current.previous not in known:
        raise PromotionRefused("nothing was promoted before; promote a version with `promote --version N`")
    return known[current.previous]


def _check_whole(target: Promotion) -> None:
    """Open the version as the service will, every byte verified first."""
    from pipeline.core.model.bundle import open_bundle

    folder = version_home(target.tag)
    cure = f"bring it back with `python -m pipeline promote --version {target.version}`"
    if not folder.is_dir():
        raise PromotionRefused(f"{target.tag} was removed from the store; {cure}")
    try:
        open_bundle(folder, target.digests).check_golden()
    except StoreError as error:
        raise PromotionRefused(
            f"{target.tag} is not what it was when it was promoted ({error}); {cure}"
        ) from error


def _why(command: str, reason: str | None) -> str:
    return f"{command}: {reason}" if reason else command
