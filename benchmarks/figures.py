"""Draw the serving benchmark as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from benchmarks.rounds import Figures

mpl.use("Agg")
_OURS, _OTHERS, _TAIL = "#0b6e4f", "#9aa5b1", "#d4a017"


def peers(measured: Mapping[str, Figures], ours: str, path: Path) -> None:
    """Draw answers a second and latencies of each service, the fastest on top."""
    names = sorted(measured, key=lambda name: measured[name].rate)
    rates = [measured[name].rate for name in names]
    figure = Figure(figsize=(11, 1.2 + 0.55 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    bars = left.barh(names, rates, color=[_OURS if name == ours else _OTHERS for name in names])
    ratios = [
        "" if name == ours else f"  (ours: {measured[ours].rate / measured[name].rate:.1f} times)"
        for name in names
    ]
    labels = [f"{rate:,.0f}{ratio}" for rate, ratio in zip(rates, ratios, strict=True)]
    left.bar_label(bars, labels, padding=4)
    left.set_xlim(0, 1.45 * max(rates))
    left.set_xlabel("answers a second, median of the rounds")
    for position, name in enumerate(names):
        seen = measured[name]
        right.plot([seen.p50, seen.p99], [position, position], color=_OTHERS, linewidth=2, zorder=1)
        right.scatter(seen.p50, position, color=_OURS, zorder=2, label="median" if not position else None)
        right.scatter(seen.p99, position, color=_TAIL, zorder=2, label="99th percentile" if not position else None)
    right.set_xscale("log")
    right.xaxis.set_major_formatter(ScalarFormatter())
    right.set_xlabel("milliseconds to an answer (log scale)")
    right.grid(axis="x", alpha=0.3)
    right.legend(loc="upper right")
    figure.suptitle("One decision a request, one worker, 16 keep-alive connections, client on the same machine")
    figure.savefig(path, dpi=150)


def memory(samples: Sequence[tuple[float, int]], path: Path) -> None:
    """Draw resident memory over time."""
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([time for time, _ in samples], [size / 2**20 for _, size in samples], color=_OURS)
    axes.set_ylim(0, 1.2 * max(size for _, size in samples) / 2**20)
    axes.set_xlabel("seconds of full load")
    axes.set_ylabel("resident MiB, all processes")
    axes.set_title("Memory of the service under full load")
    figure.savefig(path, dpi=150)
