"""The parts of docs/examples/long_document.py that need no model: document, fact, tables and figure."""

import io

import long_document
import matplotlib.image
import needle
import pytest
import torch
from nsa_varlen import BlockGeometry
from rich.console import Console


def words(text: str) -> int:
    return len(text.split())


def show(table) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    return console.file.getvalue()


def test_standard_library_fills_the_context():
    parts = needle.paragraphs()
    assert needle.ANSWER not in needle.GAP.join(parts)
    assert sum(map(len, parts)) > 8192 * 4  # English text and code: about four characters a token


def test_modules_without_docstring_are_refused(monkeypatch):
    monkeypatch.setattr("json.__doc__", None)
    with pytest.raises(ValueError, match="'json' has no docstring"):
        needle.paragraphs(["json"])


@pytest.mark.parametrize("depth", [0.0, 0.35, 1.0])
@pytest.mark.parametrize("budget", [300, 2000])
def test_the_fact_stands_once_at_its_depth_within_the_budget(depth, budget):
    parts = needle.paragraphs()
    document = needle.plant(parts, needle.FACT, depth, budget, words)
    assert budget - max(map(words, parts)) < words(document.text) <= budget
    assert document.text.count(needle.FACT) == 1
    assert document.text.find(needle.FACT) == document.needle
    assert abs(document.needle - depth * len(document.text)) <= max(map(len, parts))


@pytest.mark.parametrize("depth", [-0.1, 1.1])
def test_depths_outside_the_document_are_refused(depth):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got"):
        needle.plant(["text"], "fact", depth, 10, words)


def test_budgets_too_small_for_any_text_are_refused():
    with pytest.raises(ValueError, match="no paragraph fits into 5 tokens"):
        needle.plant(["six words are more than five"], "fact", 0.5, 5, words)


def test_a_miss_is_printed_as_a_miss():
    hit = long_document.Score("dense", 14.2249, 1.0, 300.4, 15.04, f"It is {needle.ANSWER}.")
    miss = long_document.Score("NSA topk 4", 16.2, 0.8214, 99.9, 10.0, "It is 735.")
    rows = [line.replace("│", " ").split() for line in show(long_document.quality_table([hit, miss])).splitlines()]
    assert ["dense", "14.22", "1.000", "300", "15.0", "found"] in rows
    assert ["NSA", "topk", "4", "16.20", "0.821", "100", "10.0", "MISSED"] in rows


def test_reads_stand_beside_the_budget():
    row = long_document.Reads(topk=16, compressed=255, selected=980, budget=1791, window=512, dense=4108, fact=0.125)
    rows = [line.replace("│", " ").split() for line in show(long_document.reads_table([row])).splitlines()]
    assert ["16", "255", "980", "0", "1,235", "1,279", "1,791", "4,108", "30%", "12%"] in rows


class Recorded:
    """A prompt of 256 tokens and two decode steps: every query selects block 0 and its own."""

    def __init__(self) -> None:
        self.blocks = BlockGeometry(topk=3)
        current = torch.arange(258) // 64
        own = current.masked_fill(current == 0, -1)
        indices = torch.stack([torch.zeros_like(own), own, torch.full_like(own, -1)], -1)[:, None].expand(-1, 2, -1)
        self.selected = [list(indices.int().split([128, 128, 1, 1])) for _ in range(2)]


@pytest.fixture
def prompt() -> long_document.Prompt:
    return long_document.Prompt(torch.zeros(256, dtype=torch.int64), document=slice(10, 240), fact=slice(60, 70))


def test_reads_are_counted_from_the_decode_steps(prompt):
    reads = long_document.reads_per_step(Recorded(), prompt)
    # At positions 256 and 257: (S - 32) // 16 + 1 = 15 compressed keys, block 0 whole, then 1 and 2 keys of block 4.
    assert reads == long_document.Reads(3, 15.0, 65.5, 15 + 3 * 64 + 257.5, 257.5, 257.5, 1.0)


def test_the_figure_is_written(prompt, tmp_path):
    path = tmp_path / "new" / "figure.png"
    long_document.plot(Recorded(), prompt, path)
    height, width, _ = matplotlib.image.imread(path).shape
    assert width > height > 500
