"""Keys that one query reads in a decode step: counted, the budget, and all keys, which dense attention reads."""

from collections import defaultdict
from collections.abc import Sequence

from matplotlib.figure import Figure

from nsa_bench.measurements import device_words, is_anchor, own_parameters
from nsa_bench.plotting.style import COLOURS, GREYS, INK, MARKERS, PALE, PANEL, Look, lengths_axis, page
from nsa_bench.schema import Row
from nsa_bench.summary import decode_reads


def reads_figure(name: str, rows: Sequence[Row]) -> Figure | None:
    """Of one query and kv head, so that batches and backends fall together. None where no row has decode reads.

    Workloads, and parameters that change what is read, have lines of their own; so do backends that read otherwise.
    """
    told = [(row, found) for row in rows if not is_anchor(row) and all(found := decode_reads(row) or (0, 0))]
    if not told:
        return None
    curves: dict[str, dict[int, tuple[float, float]]] = defaultdict(dict)
    for (row, found), own in zip(told, own_parameters([row for row, _ in told]), strict=True):
        words = f"{row.workload} {own}".strip()
        if curves[words].setdefault(row.S, found) != found:
            curves[f"{words} {row.backend}, batch {row.batch}"][row.S] = found
    entries: dict[str, Look] = {}
    for number, label in enumerate(curves):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[2 * number % len(MARKERS)]
        entries[f"{label}, counted"] = Look(colour, marker, "-")
        entries[f"{label}, budget"] = Look(colour, MARKERS[(2 * number + 1) % len(MARKERS)], (0, (5, 1.5)), False)
    dense = "dense attention: every key"
    entries[dense] = Look(GREYS[0], "", (0, (1, 1.2)))
    drawn = page(
        f"{name}: keys read in a decode step",
        [device_words([row for row, _ in told]), "for one query and kv head, on average over the timed steps"],
        entries,
        [[""]],
        [PANEL * 1.5],
    )
    axes = drawn.panels[0][0]
    lengths = sorted({row.S for row, _ in told})
    axes.plot(lengths, lengths, label=dense, **entries[dense].line())
    values: list[float] = [*lengths]
    for label, curve in curves.items():
        for which, word in ((1, "budget"), (0, "counted")):
            points = [(S, curve[S][which]) for S in sorted(curve)]
            values += [value for _, value in points]
            # The budget's open markers are larger: where it is met, they stand around those of what was counted.
            look = entries[f"{label}, {word}"].line(markersize=9 if which else 5)
            axes.plot(*zip(*points, strict=True), label=f"{label}, {word}", **look)
    # How far below every key the lowest curve ends.
    lowest = min(curves.values(), key=lambda curve: curve[max(curve)][0] / max(curve))
    last = max(lowest)
    keys = lowest[last][0]
    axes.annotate("", (last, keys), (last, last), arrowprops={"arrowstyle": "->", "color": PALE, "shrinkB": 6})
    share = f"{keys:,.0f} of {last:,} keys, {keys / last:.1%}"
    middle = (last, (keys * last) ** 0.5)
    axes.annotate(share, middle, (-6, 0), textcoords="offset points", ha="right", va="center", size=8, color=INK)
    lengths_axis(axes, lengths)
    lengths_axis(axes, values, "y")
    axes.set_xlabel("context length S, tokens")
    axes.set_ylabel("keys read by a query")
    return drawn.figure
