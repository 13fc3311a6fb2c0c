"""Judge a candidate: the gate's verdict, its basis, and whether a person overrode it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipeline.core.machine import now, whoami
from pipeline.core.policy import Policy
from pipeline.promotion.request import PromoteRequest
from pipeline.promotion.settings import PromoteSettings
from pipeline.registry import client
from pipeline.registry.client import ModelVersion

if TYPE_CHECKING:
    from pipeline.promotion.gate import Verdict
    from pipeline.promotion.staging import Stored


@dataclass(frozen=True)
class Judgement:
    """The outcome of judging a candidate.

    Attributes
    ----------
    candidate
        Its version.
    verdict
        The gate's.
    basis
        One sentence on what the verdict is based.
    forced
        Whether a person overrode a refusal.
    """

    candidate: ModelVersion
    verdict: Verdict
    basis: str
    forced: bool

    @property
    def outcome(self) -> Literal["passed", "forced", "refused"]:
        """What follows from the verdict."""
        if self.verdict.passed:
            return "passed"
        return "forced" if self.forced else "refused"

    @property
    def text(self) -> str:
        """The verdict for people."""
        return f"{self.basis}\n\n{self.verdict.table()}\n"

    @property
    def data(self) -> dict[str, Any]:
        """The verdict for programs."""
        return {"candidate": self.candidate.tag, "verdict": self.outcome, "rules": self.verdict.document()}

    @property
    def refusal(self) -> str:
        """Why the candidate is refused, and what to do."""
        cure = "promote another version, or override with --force --reason TEXT"
        if not self.verdict.can_be_forced:
            cure = "promote another version; this cannot be forced"
        return f"{self.candidate.tag} refused: {self.verdict.reasons()}; {cure}"

    def log(self) -> None:
        """Log the verdict to the candidate's run, so that MLflow shows why a candidate was refused.

        Raises
        ------
        TrackingError
            MLflow cannot be asked.
        """
        moment = now()
        broken = ", ".join(rule.name for rule in self.verdict.broken)
        rules = self.verdict.document()
        document = {"time": moment, "by": whoami(), "basis": self.basis, "outcome": self.outcome, "rules": rules}
        tags = {"gate": self.outcome, "gate.broken": broken, "gate.time": moment}
        client.log_verdict(self.candidate, document, tags, f"gate/{moment.replace(':', '')}.json")


def judge_candidate(
    candidate: ModelVersion,
    stored: Stored,
    defender: ModelVersion | None,
    request: PromoteRequest,
    settings: PromoteSettings,
) -> Judgement:
    """Apply the gate to a staged candidate; `defender` is the champion, if there is one.

    Raises
    ------
    PipelineError
        The table, the policy or the candidate's run is not usable.
    """
    from pipeline.promotion.evidence import gather
    from pipeline.promotion.gate import judge

    thresholds = Policy.load(request.conf / "policy.yaml").thresholds
    evidence, basis = gather(candidate, stored, defender, settings.data)
    verdict = judge(evidence, settings, thresholds, allow_schema_change=request.allow_schema_change)
    forced = request.force and not verdict.passed and verdict.can_be_forced
    return Judgement(candidate, verdict, basis, forced)
