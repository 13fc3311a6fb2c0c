"""Note, and refuse, whatever Python processes want from other machines."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

CALLS_OUT = "CALLS_OUT"
"""Variable that names the file in which calls out are noted."""

_RECORDER = """
import ipaddress, os, socket

def _note(what):
    with open(os.environ["CALLS_OUT"], "a") as file:
        file.write(f"{what}\\n")

def _is_far(host):
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host not in ("localhost", socket.gethostname())

_look_up, _connect = socket.getaddrinfo, socket.socket.connect

def getaddrinfo(host, *args, **kwargs):
    if isinstance(host, str) and _is_far(host) and host != "0.0.0.0":
        _note(host)
        raise socket.gaierror("no names here")
    return _look_up(host, *args, **kwargs)

def connect(self, address):
    if isinstance(address, tuple) and _is_far(address[0]):
        _note(address)
        raise OSError("no network here")
    return _connect(self, address)

socket.getaddrinfo, socket.socket.connect = getaddrinfo, connect
"""
"""A sitecustomize module: every Python process under test notes, and is refused, what it wants from elsewhere."""

_HINTS = ("MLFLOW_", "BENTOML_", "DO_NOT_TRACK", "CI", "PYTEST_", "GITHUB_")


def recorded_environment(variables: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Variables of processes that nothing tells to be quiet, and whose calls out are noted below `folder`.

    Where the state lies is not taken from them.
    """
    recorder = folder / "recorder"
    recorder.mkdir()
    (recorder / "sitecustomize.py").write_text(_RECORDER)
    kept = {name: text for name, text in variables.items() if not name.startswith(_HINTS) or name in _PLACES}
    path = os.pathsep.join([str(recorder), variables.get("PYTHONPATH", "")])
    return {**kept, "PYTHONPATH": path, CALLS_OUT: str(folder / "calls")}


_PLACES = frozenset({"BENTOML_HOME", "MLFLOW_TRACKING_URI"})
