# SPDX-License-Identifier: GPL-2.0-or-later
"""The plot of `paprscm bench flush`: flushes a second, and their latency, over threads."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paprscm.commands.bench_flushes import SLEEP_MS, RateCell, cells_of, flush_title
from paprscm.commands.series import Series
from paprscm.errors import CapabilityError, ConfigError

# An optional dependency, and slow to import.
if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Value = Callable[[RateCell], float]

_NO_DATE = {"Date": None}
_SUFFIXES = (".svg", ".png")
# Okabe and Ito's colours for the colour-blind, the first four from dark to light. In black and
# white the markers distinguish the lines; later ones are smaller, so that coinciding points stay
# visible.
_COLOURS = ("#000000", "#0072b2", "#d55e00", "#e69f00", "#009e73", "#56b4e9", "#cc79a7", "#999999")
_MARKERS = "osD^vP*X"
_SOLID: dict[str, Any] = {"linestyle": "-", "linewidth": 1.6}
_DASHED: dict[str, Any] = {"linestyle": "--", "linewidth": 1.0, "markerfacecolor": "white"}
_DOTTED: dict[str, Any] = {"linestyle": ":", "linewidth": 1.8, "color": "#555555"}


def check_plot_file(file: Path) -> None:
    """Raise unless a plot can be written to this file.

    Raises:
        ConfigError: its suffix is not supported.
        CapabilityError: matplotlib is missing.
    """
    if file.suffix not in _SUFFIXES:
        raise ConfigError(
            f"--plot={file} is neither .svg nor .png", hint="give the file one of these endings"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise CapabilityError(
            "matplotlib, which draws the plot, is not installed", hint="tools/setup installs it"
        )


def draw_plot(series: Series, file: Path) -> None:
    """Draw the plot, independent of the machine's fonts and settings.

    Args:
        series: returned by measure_flushes().
        file: .svg or .png; an existing file is replaced.
    """
    # The import takes 0.5 s, which other verbs do not need. Without pyplot no window system is
    # needed: the file's format selects the renderer.
    import matplotlib
    from matplotlib.figure import Figure

    cells = cells_of(series)
    rows = [[c for c in cells if c.dimms == dimms] for dimms in series.found["dimms"]]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        # The same series gives the same file.
        matplotlib.rcParams["svg.hashsalt"] = "paprscm"
        figure = Figure(figsize=(11, 6), layout="constrained")
        figure.suptitle(flush_title(series), fontsize=11)
        left, right = figure.subplots(1, 2)
        _draw(left, rows, lambda cell: cell.flushes, lambda cell: cell.fdatasync)
        _line(left, rows[0], lambda cell: cell.bound, **_DOTTED)
        _finish(left, series, "flushes a second", (1.0,))
        _explain(left, "the guest's flushes", "the host's fdatasync", "bound: threads / 10 ms")
        marks = ("p50", "p99")
        _draw(right, rows, *(lambda cell, m=mark: cell.latency_ms[m] for mark in marks))
        _line(right, rows[0], lambda _cell: SLEEP_MS, **_DOTTED)
        _finish(right, series, "latency of a flush, ms", (1.0, 2.0, 3.0, 5.0))
        right.set_ylim(bottom=SLEEP_MS / 2)
        _explain(right, *marks, "the driver's sleep, 10 ms")
        keys = left.get_lines()[: len(rows)]
        figure.legend(handles=keys, loc="outside lower center", ncols=8, frameon=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        kind = file.suffix[1:]
        figure.savefig(file, format=kind, dpi=150, metadata=_NO_DATE if kind == "svg" else None)


def _draw(axes: Axes, rows: list[list[RateCell]], solid: _Value, dashed: _Value) -> None:
    """Draw two lines for each number of DIMMs."""
    for value, style in ((solid, _SOLID), (dashed, _DASHED)):
        for place, row in enumerate(rows):
            look = {"color": _COLOURS[place], "marker": _MARKERS[place]}
            label = f"{row[0].dimms} DIMM{'s' if row[0].dimms > 1 else ''}"
            _line(axes, row, value, label=label, markersize=9 - 0.8 * place, **look, **style)


def _line(axes: Axes, row: list[RateCell], value: _Value, **style: Any) -> None:
    axes.plot([cell.threads for cell in row], [value(cell) for cell in row], **style)


def _finish(axes: Axes, series: Series, label: str, steps: Sequence[float]) -> None:
    """Make both axes logarithmic, with plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    threads = series.found["threads"]
    axes.set_xscale("log", base=2)
    axes.set_xticks(threads, [str(number) for number in threads])
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(lambda value, _place: f"{value:,.0f}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("threads in the guest")
    axes.set_ylabel(label)
    axes.grid(color="#dddddd")
    axes.set_axisbelow(True)


def _explain(axes: Axes, *words: str) -> None:
    """Draw the legend of the kinds of lines below the data."""
    from matplotlib.lines import Line2D

    styles = (_SOLID, _DASHED, _DOTTED)
    keys = [
        Line2D([], [], label=label, **{"color": "black", **style})
        for label, style in zip(words, styles, strict=True)
    ]
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12)}
    axes.legend(handles=keys, ncols=3, frameon=False, fontsize=9, columnspacing=1.2, **place)
