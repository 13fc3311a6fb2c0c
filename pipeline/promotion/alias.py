"""Move MLflow's alias ``champion`` to what this machine promoted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from typing import Any, Self

from pipeline.core.errors import PipelineError, StoreError, TrackingError
from pipeline.core.promoted import MODEL_NAME, Promotion, read_pointer
from pipeline.promotion.failpoint import failpoint
from pipeline.promotion.pointer import is_settled, mark_settled
from pipeline.registry.client import CHAMPION, aliased, asking, shown_address

CURE = "`python -m pipeline sync` moves the alias when MLflow is back"


def settle(promotion: Promotion) -> int | None:
    """Point the alias `CHAMPION` at what this machine promoted, and tag the version.

    The alias moves only from what it named before the promotion: if it names anything else, somebody has
    promoted since, and theirs is the newer word. Nor does it move if this machine has promoted something else
    meanwhile. MLflow has no compare-and-swap for aliases, so two machines that promote within the few
    milliseconds between the look and the move can still both move it; the last one wins, and the other machine
    follows with its next ``sync``.

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
        named = aliased(client, CHAMPION)
        if named not in {None, promotion.version, *promotion.replaces} or not _still_promoted(promotion):
            return named
        if named != promotion.version:
            client.set_registered_model_alias(MODEL_NAME, CHAMPION, str(promotion.version))
        failpoint("after-alias")
        _tag(client, promotion)
    if _still_promoted(promotion):
        mark_settled(promotion)
    failpoint("after-settled")
    return promotion.version


def settle_noting(promotion: Promotion) -> list[str]:
    """Move the alias, and return notes on what could not be done: the promotion counts already."""
    if is_settled(promotion):
        return []
    try:
        return _notes(promotion, settle(promotion))
    except (PipelineError, OSError) as error:
        return [f"{error}; {CURE}"]


def settle_earlier() -> None:
    """Let MLflow's alias follow an earlier promotion of this machine, if it could not then.

    Raises
    ------
    TrackingError
        MLflow cannot be asked.
    """
    with contextlib.suppress(StoreError):
        promoted = read_pointer()
        if promoted and not is_settled(promoted):
            settle(promoted)


class BackgroundSettling:
    """`settle` in a process of its own, which imports MLflow while this one does other work.

    A rollback is for emergencies: neither the import of MLflow nor a server that hangs may delay it. If the
    process is not done when the command ends, it continues alone, for at most `seconds` in all.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._asked = False

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.promotion.alias", str(self._seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # the terminal's Ctrl-C is not for it
        )
        return self

    def __exit__(self, *_: object) -> None:
        if not self._asked:
            self._process.kill()
            self._process.communicate()

    def settle(self, promotion: Promotion, seconds: float) -> list[str]:
        """Have the alias moved, wait at most `seconds` for it, and return notes on what could not be done."""
        self._asked = True
        try:
            output, _ = self._process.communicate(promotion.model_dump_json(), timeout=max(0.1, seconds))
            answer = json.loads(output)
        except subprocess.TimeoutExpired:
            return [
                f"MLflow at {shown_address()} has not answered yet. If it does within {self._seconds:g} s, its "
                f"alias {CHAMPION} follows; otherwise {CURE}"
            ]
        except ValueError:
            answer = {"error": f"MLflow at {shown_address()} could not be asked"}
        return [f"{answer['error']}; {CURE}"] if "error" in answer else _notes(promotion, answer["champion"])


def main() -> None:
    """Run as the process of `BackgroundSettling`: read a promotion from stdin, write a JSON object to stdout."""
    signal.alarm(max(1, round(float(sys.argv[1]))))  # whatever hangs, this process ends
    with contextlib.suppress(TrackingError), asking():
        pass  # imports MLflow and opens its store, while the other process looks at the stored model
    text = sys.stdin.read()
    if text:
        answer = _answer(text)
        with contextlib.suppress(BrokenPipeError):  # the command has ended
            sys.stdout.write(json.dumps(answer))
            sys.stdout.flush()
    # Nothing is left to do, and MLflow's modules take half a second to tear down.
    os._exit(0)


def _answer(text: str) -> dict[str, Any]:
    try:
        return {"champion": settle(Promotion.model_validate_json(text))}
    except (PipelineError, OSError) as error:
        return {"error": str(error)}


def _notes(promotion: Promotion, named: int | None) -> list[str]:
    if named in {promotion.version, None}:
        return []
    return [f"MLflow's champion is v{named}, promoted elsewhere: the next sync follows it"]


def _still_promoted(promotion: Promotion) -> bool:
    with contextlib.suppress(StoreError):
        return read_pointer() == promotion
    return False


def _tag(client: Any, promotion: Promotion) -> None:
    """Tag the version with this promotion, one tag for each: the version's own history."""
    moment = "".join(character for character in promotion.since if character.isalnum() or character in ".-")
    event = promotion.model_dump(include={"since", "by", "why", "forced", "previous"})
    client.set_model_version_tag(MODEL_NAME, str(promotion.version), f"promotion.{moment}", json.dumps(event))


if __name__ == "__main__":
    main()
