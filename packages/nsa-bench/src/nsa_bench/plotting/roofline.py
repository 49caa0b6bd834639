"""The roofline: what calls achieve beside what this machine could do at their arithmetic intensity.

```
intensity = flops / bytes                          of a call, each tensor moved once
achieved  = flops / ms_total
roof(x)   = min(ceiling_flops, x * ceiling_bandwidth)      measured in the same run
```
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from nsa_bench.measurements import by_series, device_words, is_timed, labels
from nsa_bench.plotting.style import INK, PALE, PANEL, log_axis, looks, page
from nsa_bench.plotting.times import CLOCK_WORDS
from nsa_bench.schema import Row

SIZES = (4.0, 10.0)  # of markers, points: shortest and longest length


def roofline_figure(name: str, rows: Sequence[Row]) -> Figure | None:
    """A panel for each clock; None where no row has flops, bytes and ceilings."""
    told = [row for row in rows if is_timed(row) and row.flops and row.bytes and row.ceiling_flops and row.ceiling_bandwidth]
    if not told:
        return None
    called = dict(zip(map(id, rows), labels(rows), strict=True))
    names = sorted(dict.fromkeys(called[id(row)] for row in told), key=lambda label: label.startswith("dense."))
    entries = looks(names)
    clocks = list(dict.fromkeys(row.clock for row in told))
    drawn = page(
        f"{name}: roofline",
        [device_words(told), "grey: ceilings measured in the same run; larger markers: longer contexts"],
        entries,
        widths=[PANEL * 1.15] * len(clocks),
    )
    lengths = sorted({row.S for row in told})
    sizes = dict(zip(lengths, np.linspace(*SIZES, len(lengths)), strict=True))
    roofs = sorted({(row.ceiling_flops or 0, row.ceiling_bandwidth or 0) for row in told})
    x = [(row.flops or 0) / (row.bytes or 1) for row in told]
    ridges = [peak / bandwidth for peak, bandwidth in roofs]
    low, high = min(x) / 2, max(*x, *ridges) * 3
    y = [_achieved(row) for row in told] + [min(peak, x * bandwidth) / 1e12 for peak, bandwidth in roofs for x in (low, high)]
    for clock, axes in zip(clocks, drawn.panels[0], strict=True):
        log_axis(axes, [low, high], "x")
        log_axis(axes, y)
        for peak, bandwidth in roofs:
            axes.plot([low, peak / bandwidth, high], np.minimum(peak, [low * bandwidth, peak, peak]) / 1e12, color=PALE)
            words = f"{peak / 1e12:.3g} TFLOP/s"
            axes.annotate(words, (high, peak / 1e12), (0, 4), textcoords="offset points", ha="right", size=8, color=INK)
            words = f"{bandwidth / 1e12:.3g} TB/s" if bandwidth >= 1e12 else f"{bandwidth / 1e9:.3g} GB/s"
            axes.annotate(
                words,
                (low, low * bandwidth / 1e12),
                (2, 12),
                textcoords="offset points",
                rotation=_slope(axes, low, high, y),
                rotation_mode="anchor",
                size=8,
                color=INK,
            )
        for line in by_series([row for row in told if row.clock == clock]):
            label = called[id(line[0])]
            at = [((row.flops or 0) / (row.bytes or 1), _achieved(row)) for row in line]
            axes.plot(*zip(*at, strict=True), **entries[label].line(marker="", linewidth=0.9))
            for number, (row, place) in enumerate(zip(line, at, strict=True)):
                look = entries[label].line(linestyle="", markersize=sizes[row.S])
                axes.plot(*place, label="_" if number else label, **look)
        axes.set_title(CLOCK_WORDS.get(clock, clock))
        axes.set_xlabel("arithmetic intensity, FLOP/byte")
    drawn.panels[0][0].set_ylabel("achieved TFLOP/s")
    return drawn.figure


def _achieved(row: Row) -> float:
    """TFLOP/s."""
    assert row.flops
    assert row.ms_total
    return row.flops / row.ms_total / 1e9


def _slope(axes: object, low: float, high: float, y: Sequence[float]) -> float:
    """Degrees at which a line of slope 1 rises in a panel."""
    from nsa_bench.plotting.style import HEIGHT

    wide = PANEL * 1.15 / np.log10(high * 1.69 / low)
    tall = HEIGHT / np.log10(max(y) * 1.69 / min(y))
    return float(np.degrees(np.arctan2(tall, wide)))
