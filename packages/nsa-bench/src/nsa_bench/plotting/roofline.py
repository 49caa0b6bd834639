"""The roofline: what calls achieve beside what this machine could do at their arithmetic intensity.

```
intensity = flops / bytes                          of a call, each tensor moved once
achieved  = flops / ms_total
roof(x)   = min(ceiling_flops, x * ceiling_bandwidth)      measured in the same run
```
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nsa_bench.measurements import ANCHOR, by_series, device_words, is_timed, labels
from nsa_bench.plotting.style import INK, PALE, PANEL, log_axis, looks, page
from nsa_bench.plotting.times import CLOCK_WORDS
from nsa_bench.schema import Row

TERA, GIGA = 1e12, 1e9
SIZES = (4.0, 7.5)  # of markers, in points: at the shortest and the longest length
NOTE = "grey: ceilings measured in the same run; a line goes from the shortest context, small marker, to the longest"
WIDTH = 1.15 * PANEL
ROOM = 2.0  # above the roof and beyond the points, for words


def roofline_figure(name: str, rows: Sequence[Row]) -> Figure | None:
    """A panel for each clock; None where no row has flops, bytes and ceilings.

    Series of one length are left out where there are longer ones.
    """
    told = [row for row in rows if is_timed(row) and row.flops and row.bytes and all(_roof(row))]
    lines = by_series(told)
    told = [row for line in lines if line[0].S != line[-1].S for row in line] or told
    if not told:
        return None
    called = dict(zip(map(id, rows), labels(rows), strict=True))
    entries = looks(sorted((called[id(row)] for row in told), key=lambda label: label.startswith(ANCHOR)))
    clocks = list(dict.fromkeys(row.clock for row in told))
    drawn = page(
        f"{name}: roofline",
        [device_words(told), NOTE],
        entries,
        [[CLOCK_WORDS.get(clock, clock) for clock in clocks]],
        [WIDTH] * len(clocks),
    )
    roofs = sorted({_roof(row) for row in told})
    places = {id(row): _place(row) for row in told}
    low = min(x for x, _ in places.values()) / ROOM
    high = ROOM * max(*(x for x, _ in places.values()), *(peak / bandwidth for peak, bandwidth in roofs))
    heights = [y for _, y in places.values()] + [low * bandwidth / TERA for _, bandwidth in roofs]
    heights.append(ROOM * max(peak for peak, _ in roofs) / TERA)
    for clock, axes in zip(clocks, drawn.panels[0], strict=True):
        log_axis(axes, [low, high], "x")
        log_axis(axes, heights)
        for roof in roofs:
            _draw_roof(axes, *roof, low, high)
        for line in by_series(row for row in told if row.clock == clock):
            label = called[id(line[0])]
            look = entries[label]
            axes.plot(*zip(*(places[id(row)] for row in line), strict=True), label=label, **look.line(marker=""))
            for row, size in ((line[0], SIZES[0]), (line[-1], SIZES[1])):
                axes.plot(*places[id(row)], **look.line(linestyle="", markersize=size))
        axes.set_xlabel("arithmetic intensity, FLOP/byte")
    drawn.panels[0][0].set_ylabel("achieved TFLOP/s")
    return drawn.figure


def _roof(row: Row) -> tuple[float, float]:
    return row.ceiling_flops or 0.0, row.ceiling_bandwidth or 0.0


def _place(row: Row) -> tuple[float, float]:
    """(FLOP/byte, TFLOP/s)."""
    assert row.flops
    assert row.bytes
    assert row.ms_total
    return row.flops / row.bytes, row.flops / (row.ms_total * 1e-3) / TERA


def _draw_roof(axes: Axes, peak: float, bandwidth: float, low: float, high: float) -> None:
    """The lesser of peak and bandwidth * intensity, each with its number above it."""
    ridge = peak / bandwidth
    axes.plot([low, ridge, high], [low * bandwidth / TERA, peak / TERA, peak / TERA], color=PALE, zorder=1)
    words: dict[str, Any] = {"textcoords": "offset points", "size": 8, "color": INK}
    axes.annotate(f"{peak / TERA:.3g} TFLOP/s", (high, peak / TERA), (0, 4), ha="right", **words)
    rate = f"{bandwidth / TERA:.3g} TB/s" if bandwidth >= TERA else f"{bandwidth / GIGA:.3g} GB/s"
    # Where the line is longest: half way up, as people see it on logarithmic axes.
    middle = (low * ridge) ** 0.5
    corners = axes.transData.transform([(low, low * bandwidth / TERA), (ridge, peak / TERA)])
    rise, run = corners[1][1] - corners[0][1], corners[1][0] - corners[0][0]
    angle = float(np.degrees(np.arctan2(rise, run)))
    place = (middle, middle * bandwidth / TERA)
    axes.annotate(rate, place, (-2, 4), rotation=angle, rotation_mode="anchor", ha="center", **words)
