"""Do figures show what rows hold, to every eye, with their device and versions, and as the same bytes each time?"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from nsa_bench.plotting import FORMATS
from nsa_bench.plotting.figures import draw
from nsa_bench.plotting.history import METRICS, MetricError
from nsa_bench.plotting.style import COLOURS, MARKERS, looks, save
from nsa_bench.schema import Row

Rows = Callable[..., list[Row]]
PROVENANCE = ("NVIDIA H100 80GB HBM3", "torch 2.11.0+cu130", "triton 3.6.0", "commit 1f0c2ab94d", "2026-11-29")


def figure(rows: list[Row], kind: str) -> Figure:
    ((_, found),), _ = draw({"run": rows}, kind)
    return found


def series(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """Lines by their label; bars of quartiles carry it for their line."""
    found = {}
    for bars in axes.containers:
        found[bars.get_label()] = bars.lines[0]
    for line in axes.lines:
        if not line.get_label().startswith("_"):
            found[line.get_label()] = line
    return {label: (list(line.get_xdata()), list(line.get_ydata())) for label, line in found.items()}


def words(drawn: Figure) -> str:
    return " | ".join(text.get_text() for text in drawn.findobj(Text))


def every_kind(measured: Rows, **given: object) -> list[tuple[str, Figure]]:
    full = {"clocks": ("graph", "host"), "backends": ("triton", "sdpa"), "anchors": ("sdpa", "cudnn", "flash-attn")}
    rows = [*measured(**full), *measured((8192,), batches=(64,), **full), *measured((65536,), batches=(1,), **full)]
    rows = [replace(row, **given) for row in rows]
    later = [replace(row, commit="2b7e151628", date="2026-12-01") for row in rows]
    drawn, nothing = draw({"one": rows, "two": later})
    assert nothing == []
    return drawn


def test_rows_that_read_nothing_have_no_place_among_reads(measured: Rows) -> None:
    rows = measured()
    nothing = [replace(row, reads_actual_decode=0) if row.S == 8192 else row for row in rows]
    (lines,) = (series(axes) for axes in figure(nothing, "reads").axes)
    assert lines["nsa.decode, counted"][0] == [S for S in dict.fromkeys(row.S for row in rows) if S != 8192]
    drawn, missing = draw({"run": [replace(row, reads_expected_decode=0) for row in rows]}, "reads")
    assert (drawn, missing) == ([], ["run: nothing to draw for reads: no row with decode reads, batch and calls"])


def test_time_has_a_line_for_each_variant_and_a_panel_for_each_clock_and_shape(measured: Rows) -> None:
    rows = measured(batches=(1, 8), clocks=("graph", "host"))
    axes = figure(rows, "time").axes
    titles = ["CUDA graph, batch 1", "batch 8", "called from Python, batch 1", "batch 8"]
    assert [each.get_title("left") for each in axes] == titles
    names = {"nsa.decode triton", "dense.decode cudnn", "dense.decode flash-attn"}
    for panel, (clock, batch) in zip(axes, [(c, b) for c in ("graph", "host") for b in (1, 8)], strict=True):
        lines = series(panel)
        assert lines.keys() == names
        own = [row for row in rows if (row.clock, row.batch, row.workload) == (clock, batch, "nsa.decode")]
        assert lines["nsa.decode triton"] == ([row.S for row in own], [row.ms_total for row in own])
        assert (panel.get_xscale(), panel.get_yscale()) == ("log", "log")
        assert [label.get_text() for label in panel.get_xticklabels()] == ["8k", "16k", "32k", "64k", "128k"]


def test_bars_go_from_quartile_to_quartile(measured: Rows) -> None:
    rows = measured((8192, 16384), anchors=(), noise=0.1)
    (bars,) = figure(rows, "time").axes[0].containers
    spans = [tuple(segment[:, 1]) for segment in bars.lines[2][0].get_segments()]
    np.testing.assert_allclose(spans, [(row.p25_ms, row.p75_ms) for row in rows])


def test_rows_without_a_time_are_not_drawn(measured: Rows) -> None:
    rows = [replace(row, status="wrong: by 1") if row.S == 8192 else row for row in measured()]
    assert all(min(x) == 16384 for x, _ in series(figure(rows, "time").axes[0]).values())
    assert draw({"run": [replace(row, ms_total=None) for row in rows]}, "time") == (
        [],
        ["run: nothing to draw for time: no row with a time"],
    )


def test_branches_are_lines_of_the_backends_panel(measured: Rows) -> None:
    rows = measured(backends=("triton", "sdpa"))
    panels = figure(rows, "branches").axes
    assert [panel.get_title("left") for panel in panels] == ["nsa.decode triton", "nsa.decode sdpa"]
    lines = series(panels[1])
    assert lines.keys() == {"whole call", "compressed", "selected + window, fused", "sum by gates"}
    assert lines["compressed"][1] == [row.ms_cmp for row in rows if row.backend == "sdpa"]


def test_the_roofline_is_the_lesser_of_both_ceilings(measured: Rows) -> None:
    rows = measured()
    (panel,) = figure(rows, "roofline").axes
    lines = series(panel)
    row = next(row for row in rows if row.S == 131072)
    x, y = (values[-1] for values in lines["nsa.decode triton"])
    assert x == pytest.approx(row.flops / row.bytes)
    assert y * 1e12 == pytest.approx(row.flops / (row.ms_total / 1e3))
    roof = next(line for line in panel.lines if line.get_label().startswith("_"))
    assert row.ceiling_flops / row.ceiling_bandwidth in roof.get_xdata()
    for x, y in zip(roof.get_xdata(), roof.get_ydata(), strict=True):
        assert y * 1e12 == pytest.approx(min(row.ceiling_flops, x * row.ceiling_bandwidth))
    # Whatever is timed at the floor stands on the roof.
    at_floor = [replace(row, ms_total=row.floor_ms) for row in rows]
    for x, y in zip(*series(figure(at_floor, "roofline").axes[0])["nsa.decode triton"], strict=True):
        assert y * 1e12 == pytest.approx(min(row.ceiling_flops, x * row.ceiling_bandwidth))


def test_reads_stand_beside_the_budget_and_every_key(measured: Rows) -> None:
    lengths = (7900, 8192, 16384)
    panel = figure(measured(lengths, batches=(1, 8), backends=("triton", "sdpa")), "reads").axes[0]
    lines = series(panel)
    assert lines["dense attention: every key"] == (list(lengths), list(lengths))
    assert lines["nsa.decode, counted"] == (list(lengths), [1992, 2047, 2559])
    assert lines["nsa.decode, budget"] == (list(lengths), [2028, 2047, 2559])
    assert "2,559 of 16,384 keys, 15.6%" in words(panel.figure)


def test_history_orders_commits_by_date(measured: Rows) -> None:
    runs = {
        name: measured((8192,), slower=slower, noise=0, commit=f"{name}+", date=f"2026-11-{day}")
        for name, slower, day in (("cccccccccc", 0.5, 29), ("aaaaaaaaaa", 1.0, 30), ("bbbbbbbbbb", 2.0, 28))
    }
    ((name, drawn),), _ = draw(runs, "history")
    assert name == "bench_decode-history-speedup"
    (panel,) = drawn.axes
    x, y = series(panel)["S 8k"]
    assert list(x) == [0, 1, 2]
    np.testing.assert_allclose(np.array(y) / y[2], [0.5, 2, 1])
    ticks = [label.get_text() for label in panel.get_xticklabels()]
    assert ticks == ["bbbbbbb+\n11-28", "ccccccc+\n11-29", "aaaaaaa+\n11-30"]
    ((name, drawn),), _ = draw(runs, "history", "ms_total")
    assert "dense.decode cudnn" in [axes.get_title("left") for axes in drawn.axes]
    assert series(drawn.axes[0])["S 8k"][1] == [runs[10 * letter][0].ms_total for letter in "bca"]


def test_history_needs_a_measurement_in_two_files_and_a_metric(measured: Rows) -> None:
    drawn, nothing = draw({"one": measured(), "two": measured((1024,))}, "history")
    assert (len(drawn), len(nothing)) == (0, 1)
    with pytest.raises(MetricError, match=r"expected one of speedup, ms_total, .*, got 'workload'"):
        draw({"one": measured()}, "history", "workload")
    assert not {"S", "batch", "status"} & set(METRICS)


def test_every_figure_says_on_what_it_was_measured(measured: Rows) -> None:
    found = every_kind(measured)
    assert [name for name, _ in found] == [
        *(f"{stem}-{kind}" for stem in ("one", "two") for kind in ("time", "branches", "roofline", "reads")),
        "bench_decode-history-speedup",
    ]
    for name, drawn in found:
        for part in PROVENANCE if name.startswith("one") else PROVENANCE[:3]:
            assert part in " ".join(words(drawn).replace("|", " ").split()), name


def test_series_differ_by_more_than_their_colour(measured: Rows) -> None:
    for name, drawn in every_kind(measured):
        handles = drawn.legends[0].get_lines()
        seen = {(line.get_marker(), line.get_markerfacecolor() == "white") for line in handles}
        assert len(seen) == len(handles) > 1, name


def test_looks_are_distinct_and_anchors_grey() -> None:
    found = looks([*(f"nsa.{n}" for n in range(2 * len(MARKERS) - 2)), "dense.a", "dense.b"])
    assert len({(look.marker, look.filled) for look in found.values()}) == len(found)
    for label, look in found.items():
        red, green, blue = (look.color[place : place + 2] for place in (1, 3, 5))
        assert (red == green == blue) is label.startswith("dense.")
        assert (look.color in COLOURS) is not label.startswith("dense.")


@pytest.mark.parametrize("given", [{}, {"device": "A CPU of many words, " * 9, "dtype": "float8_e4m3fn"}])
def test_no_words_overlap(measured: Rows, given: dict[str, str]) -> None:
    """Titles, notes, panel titles, tick labels, axis labels, legends: pairwise apart, and on the page."""
    for name, drawn in every_kind(measured, **given):
        drawn.canvas.draw()
        page = drawn.bbox
        boxes = []
        for text in drawn.findobj(Text):
            box = text.get_window_extent()
            # What stands along the roof is turned, and has a box that its words do not fill.
            if text.get_visible() and text.get_text().strip() and text.get_rotation() in (0, 90) and box.width:
                inside = page.x0 <= box.x0 < box.x1 <= page.x1 and page.y0 <= box.y0 < box.y1 <= page.y1
                assert inside, (name, text.get_text())
                boxes.append((text.get_text(), box))
        assert len(boxes) > 5
        for place, (one, box) in enumerate(boxes):
            for other, second in boxes[:place]:
                assert not box.overlaps(second), (name, one, other)


@pytest.mark.parametrize("suffix", FORMATS)
def test_files_are_the_same_bytes_in_every_run(measured: Rows, tmp_path: Path, suffix: str) -> None:
    rows = measured((8192, 16384), backends=("triton", "sdpa"))
    for run in ("first", "second"):
        (tmp_path / run).mkdir()
        for name, drawn in draw({"one": rows, "two": rows})[0]:
            save(drawn, tmp_path / run / f"{name}.{suffix}")
    written = sorted((tmp_path / "first").iterdir())
    assert len(written) == 9
    start = {"png": b"\x89PNG", "svg": b"<?xml"}[suffix]
    for path in written:
        data = path.read_bytes()
        assert data.startswith(start)
        assert data == (tmp_path / "second" / path.name).read_bytes()
    if suffix == "svg":
        assert "NVIDIA H100 80GB HBM3" in written[0].read_text()
        assert "<dc:date>" not in written[0].read_text()


def test_drawing_leaves_the_readers_matplotlib_alone() -> None:
    code = (
        "import sys, matplotlib; matplotlib.rcParams['font.size'] = 3\n"
        "from nsa_bench.plotting import figures\n"
        "from nsa_bench.schema import Row\n"
        "(one,), _ = figures.draw({'a': [Row(64, ms_total=1.0, workload='nsa.x')]}, 'time')\n"
        "print('matplotlib.pyplot' in sys.modules, matplotlib.rcParams['font.size'], one[1].axes[0].title.get_size())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "3.0", "9.5"]


def test_no_module_but_those_that_draw_imports_matplotlib() -> None:
    code = "import sys, nsa_bench, nsa_bench.reading, nsa_bench.plotting; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
