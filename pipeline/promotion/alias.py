"""Move MLflow's alias ``champion`` to what this machine promoted."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from typing import Any

from pipeline.core.errors import TrackingError
from pipeline.core.promoted import MODEL_NAME, Promotion
from pipeline.promotion.failpoint import failpoint
from pipeline.registry.client import CHAMPION, aliased, asking, shown_address


def settle(promotion: Promotion) -> int | None:
    """Let the alias `CHAMPION` and the version's tags say what this machine promoted.

    The alias moves only from what it named before the promotion: if it names anything else, somebody has
    promoted since, and theirs is the newer word. MLflow has no compare-and-swap for aliases, so two machines that
    promote within the few milliseconds between the look and the move can still both move it; the last one
    wins, and the other machine follows with its next ``sync``.

    Returns
    -------
    int or None
        The version that the alias names now.

    Raises
    ------
    TrackingError
        MLflow cannot be asked.
    """
    with asking() as client:
        seen = aliased(client, CHAMPION)
        if seen not in {None, promotion.version, *promotion.replaces}:
            return seen
        if seen != promotion.version:
            client.set_registered_model_alias(MODEL_NAME, CHAMPION, str(promotion.version))
        failpoint("after-alias")
        _tag(client, promotion)
        return promotion.version


class Settling:
    """`settle` in a process of its own, which imports MLflow while this one does other work, and can be ended.

    A rollback is for emergencies: importing MLflow must not delay it, and no hanging server may hold it.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.promotion.alias"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def finish(self, promotion: Promotion, seconds: float) -> int | None:
        """Settle, as `settle` does, within a time.

        Raises
        ------
        TrackingError
            MLflow could not be asked within the time.
        """
        try:
            output, _ = self._process.communicate(promotion.model_dump_json(), timeout=seconds)
            answer = json.loads(output or "{}")
        except (subprocess.TimeoutExpired, ValueError):
            self.abandon()
            answer = {"error": f"MLflow at {shown_address()} did not answer within {seconds:g} s"}
        if "champion" not in answer:
            raise TrackingError(answer.get("error", f"MLflow at {shown_address()} could not be asked"))
        champion: int | None = answer["champion"]
        return champion

    def abandon(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def answer() -> None:
    """Be the process of `Settling`: one promotion on stdin, one JSON object on stdout."""
    with contextlib.suppress(TrackingError), asking():
        pass  # imports MLflow and opens its store, while the other process looks at the stored model
    text = sys.stdin.read()
    if text:
        sys.stdout.write(json.dumps(_answer(text)))
        sys.stdout.flush()
    # Nothing is left to do, and MLflow's modules take half a second to tear down.
    os._exit(0)


def _answer(text: str) -> dict[str, Any]:
    try:
        return {"champion": settle(Promotion.model_validate_json(text))}
    except TrackingError as error:
        return {"error": str(error)}


def _tag(client: Any, promotion: Promotion) -> None:
    """Tag the version with this promotion, one tag for each: the version's own history."""
    moment = "".join(character for character in promotion.since if character.isalnum() or character in ".-")
    event = promotion.model_dump(include={"since", "by", "why", "forced", "previous"})
    client.set_model_version_tag(MODEL_NAME, str(promotion.version), f"promotion.{moment}", json.dumps(event))


if __name__ == "__main__":
    answer()
