"""A pretrained language model reads a long document with Native Sparse Attention, untrained, and answers a question.

    hatch run demo                                  # 4,096 tokens; topk 4, 8 and 16; a few minutes on one core
    hatch run demo --tokens 8000 --needle-depth 0.6

SmolLM2-135M-Instruct reads Python's own documentation, in which one fact is planted: once with its own dense attention
and once per topk with NSA's selected branch in every layer. All run in the same loop, each with its own cache, and take
turns chunk by chunk, so that a busy machine slows them alike. A missed fact is printed as a miss.
"""

import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import needle
import numpy as np
import smollm2
import torch
import typer
from matplotlib.figure import Figure
from nsa.reads import count_reads
from nsa_varlen import BlockGeometry, VarlenLayout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

BLOCKS_PER_QUERY = [4, 8, 16]


@dataclass(frozen=True)
class Prompt:
    """Tokens [T] of document and question in the chat template; the slices are the document's and the fact's."""

    tokens: Tensor
    document: slice
    fact: slice


@dataclass
class Reading:
    """What one attention makes of the prompt, filled call by call: seconds, per-token results, the greedy answer."""

    name: str
    attention: smollm2.Attention
    prefill_seconds: list[float] = field(default_factory=list)  # one entry per chunk
    decode_seconds: list[float] = field(default_factory=list)  # one entry per step
    nll: list[Tensor] = field(default_factory=list)  # [T-1] in pieces: of token i + 1 given 0..i
    predicted: list[Tensor] = field(default_factory=list)  # [T-1] in pieces: the most likely token i + 1
    answer: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Score:
    """A row of the first table; rates in tokens per second."""

    name: str
    perplexity: float
    agreement: float
    prefill_rate: float
    decode_rate: float
    answer: str


@dataclass(frozen=True)
class Reads:
    """Keys read per decode step, per layer and kv head (means), from the indices that were really used."""

    topk: int
    compressed: float
    selected: float
    budget: float  # blocks.reads, which counts a window that gates 0/1/0 never read
    window: float
    dense: float
    fact: float  # share of steps, layers and kv heads that selected a block of the fact


def write_prompt(tokenizer: Any, tokens: int, depth: float) -> Prompt:
    """At most `tokens` tokens: the chat template around the document and the question that follows it."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    mark = "\0"
    chat = [{"role": "user", "content": f"{mark}\n\n{needle.QUESTION}"}]
    head, tail = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True).split(mark)
    before, after = encode(head), encode(tail)
    parts = needle.paragraphs()
    document = needle.plant(parts, needle.FACT, depth, tokens - len(before) - len(after), lambda t: len(encode(t)))
    body = encode(document.text)
    start = len(before) + len(encode(document.text[: document.needle]))
    return Prompt(
        torch.tensor(before + body + after),
        slice(len(before), len(before) + len(body)),
        slice(start, start + len(encode(needle.FACT))),
    )


def timed(model: Any, tokens: Tensor, start: int, attention: smollm2.Attention) -> tuple[Tensor, float]:
    """Logits of all tokens, and the seconds that the forward pass took."""
    began = time.perf_counter()
    logits = smollm2.forward(model, tokens, start, attention)
    return logits, time.perf_counter() - began


def prefill(model: Any, reading: Reading, tokens: Tensor, start: int, stop: int) -> None:
    """Reads tokens[start:stop] and scores each prediction that the prompt itself answers."""
    logits, seconds = timed(model, tokens[start:stop], start, reading.attention)
    following = tokens[start + 1 : stop + 1]
    reading.prefill_seconds.append(seconds)
    reading.nll.append(torch.nn.functional.cross_entropy(logits[: len(following)], following, reduction="none"))
    reading.predicted.append(logits[: len(following)].argmax(-1))
    reading.answer = [int(logits[-1].argmax())]


def decode(model: Any, reading: Reading, position: int) -> None:
    """One greedy step. It goes on behind an end-of-text token, so that all are timed over the same lengths."""
    logits, seconds = timed(model, torch.tensor(reading.answer[-1:]), position, reading.attention)
    reading.decode_seconds.append(seconds)
    reading.answer.append(int(logits[-1].argmax()))


def score(reading: Reading, dense: Reading, prompt: Prompt, tokenizer: Any) -> Score:
    """Perplexity and agreement count the document's tokens, the fact's included; chat template and question are out."""
    predicts = slice(prompt.document.start - 1, prompt.document.stop - 1)
    nll = torch.cat(reading.nll)[predicts]
    same = torch.cat(reading.predicted)[predicts] == torch.cat(dense.predicted)[predicts]
    end = tokenizer.eos_token_id
    answer = reading.answer[: reading.answer.index(end)] if end in reading.answer else reading.answer
    return Score(
        reading.name,
        nll.mean().exp().item(),
        same.float().mean().item(),
        len(prompt.tokens) / sum(reading.prefill_seconds),
        1.0 / statistics.median(reading.decode_seconds),
        tokenizer.decode(answer).strip(),
    )


def fact_blocks(prompt: Prompt, block_size: int) -> tuple[int, int]:
    """The first and the last block that hold a token of the fact."""
    return prompt.fact.start // block_size, (prompt.fact.stop - 1) // block_size


def reads_per_step(attention: smollm2.SelectedAttention, prompt: Prompt) -> Reads:
    """Counts the keys behind the decode steps' indices, which follow those of the prompt in `attention.selected`."""
    blocks, prompt_tokens = attention.blocks, len(prompt.tokens)
    first, last = fact_blocks(prompt, blocks.block_size)
    compressed, selected, fact, lengths = [], [], [], []
    for calls in attention.selected:
        indices = torch.cat(calls)[prompt_tokens:]  # [steps, Hk, topk]
        end = prompt_tokens + len(indices)
        counts = count_reads(indices, VarlenLayout.from_lengths([len(indices)], [end]), blocks)
        compressed.append(counts.cmp.float().mean().item())
        selected.append(counts.slc.float().mean().item())
        fact.append(((indices >= first) & (indices <= last)).any(-1).float().mean().item())
        lengths = list(range(prompt_tokens + 1, end + 1))
    mean = statistics.fmean
    return Reads(
        topk=blocks.topk,
        compressed=mean(compressed),
        selected=mean(selected),
        budget=mean(blocks.reads(n) for n in lengths),
        window=mean(min(blocks.window_size, n) for n in lengths),
        dense=mean(lengths),
        fact=mean(fact),
    )


def quality_table(scores: Sequence[Score]) -> Table:
    """One row per attention."""
    table = Table(title="Reading and answering")
    table.add_column("attention")
    for column in ("perplexity", "agrees with\ndense", "prefill\ntokens/s", "decode\ntokens/s"):
        table.add_column(column, justify="right")
    table.add_column("fact")
    for s in scores:
        numbers = (f"{s.perplexity:.2f}", f"{s.agreement:.3f}", f"{s.prefill_rate:.0f}", f"{s.decode_rate:.1f}")
        table.add_row(s.name, *numbers, "found" if needle.ANSWER in s.answer else "MISSED")
    return table


def reads_table(rows: Sequence[Reads]) -> Table:
    """Actual reads beside the budget, which bounds them and also counts a window that this mode never reads."""
    table = Table(title="Keys read per decode step, layer and kv head (means)")
    counted = ("cmp", "slc", "win", "read", "budget\n- win", "budget", "dense")
    for column in ("topk", *counted, "read /\ndense", "fact\nchosen"):
        table.add_column(column, justify="right")
    for r in rows:
        read = r.compressed + r.selected
        counts = (r.compressed, r.selected, 0.0, read, r.budget - r.window, r.budget, r.dense)
        table.add_row(str(r.topk), *(f"{c:,.0f}" for c in counts), f"{read / r.dense:.0%}", f"{r.fact:.0%}")
    return table


def plot(attention: smollm2.SelectedAttention, prompt: Prompt, path: Path) -> None:
    """Left: which key blocks prefill's queries selected. Right: what the decode steps selected, layer by layer."""
    size, total = attention.blocks.block_size, len(prompt.tokens)
    rows, columns = -(-total // size), -(-sum(len(c) for c in attention.selected[0]) // size)
    prefill = np.zeros((rows, columns))
    decode = np.zeros((len(attention.selected), columns))
    for layer, calls in enumerate(attention.selected):
        indices = torch.cat(calls).long()  # [T, Hk, topk]
        hits = torch.zeros(*indices.shape[:2], columns + 1)
        hits.scatter_(2, indices.masked_fill(indices < 0, columns), 1.0)
        share = hits[..., :columns].mean(1).numpy()  # [T, columns], over kv heads
        edges = np.arange(0, total, size)
        per_block = np.diff([*edges, total])[:, None]
        prefill += np.add.reduceat(share[:total], edges) / per_block / len(attention.selected)
        decode[layer] = share[total:].mean(0)

    prefill[np.arange(columns)[None, :] > np.arange(rows)[:, None]] = np.nan  # keys of the future

    figure = Figure(figsize=(15, 7), layout="constrained")
    axes = figure.subplots(1, 2)
    style = {"cmap": "cividis", "vmin": 0.0, "vmax": 1.0, "interpolation": "nearest", "aspect": "auto"}
    image = axes[0].imshow(prefill, **style)
    axes[0].set_facecolor("lightgray")
    axes[1].imshow(decode, **style)
    axes[0].set_title("Reading: share of layers and kv heads that selected a block", pad=20)
    axes[0].set_ylabel(f"query block ({size} tokens)")
    axes[1].set_title("Answering: share of decode steps and kv heads that selected a block", pad=20)
    axes[1].set_ylabel("layer")
    first, last = fact_blocks(prompt, size)
    for axis in axes:
        axis.set_xlabel(f"key block ({size} tokens)")
        for edge in (first - 0.5, last + 0.5):
            axis.axvline(edge, color="white", linewidth=1, linestyle="--")
        axis.text((first + last) / 2, 1.01, "the fact", transform=axis.get_xaxis_transform(), ha="center")
    figure.colorbar(image, ax=axes, label="share selected", shrink=0.9)
    model = f"{smollm2.NAME}, topk {attention.blocks.topk}, {total:,} tokens"
    figure.suptitle(f"Blocks selected by training-free NSA: {model}", fontsize=15)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(
    tokens: Annotated[int, typer.Option(help="Length of the prompt; the model's context is 8,192.", min=512)] = 4096,
    topk: Annotated[
        list[int], typer.Option(help="Blocks per query; repeat for more; the last is plotted.", min=3)
    ] = BLOCKS_PER_QUERY,
    needle_depth: Annotated[float, typer.Option(help="Where the fact is planted, 0 to 1.", min=0.0, max=1.0)] = 0.35,
    steps: Annotated[int, typer.Option(help="Decode steps, timed alike for all.", min=1)] = 32,
    chunk: Annotated[int, typer.Option(help="Tokens per prefill call.", min=1)] = 1024,
    threads: Annotated[int | None, typer.Option(help="CPU threads; on busy cores, 1 is fastest.", min=1)] = None,
    png: Annotated[Path, typer.Option(help="Where the figure goes.")] = Path("out/long_document.png"),
) -> None:
    """Reads Python's documentation with dense attention and with training-free NSA, and compares the two."""
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console()
    model, tokenizer = smollm2.load()
    room = model.config.max_position_embeddings
    if tokens + steps > room:
        raise typer.BadParameter(f"tokens + steps must fit the model's context of {room}, got {tokens} + {steps}")
    prompt = write_prompt(tokenizer, tokens, needle_depth)
    total = len(prompt.tokens)
    console.print(f"{smollm2.NAME}, fp32, CPU threads: {torch.get_num_threads()}")
    console.print(f"docstrings of Python {platform.python_version()}: {total:,} tokens")
    console.print(f"planted at depth {needle_depth:.0%}, token {prompt.fact.start:,}: {needle.FACT}")
    console.print(f"asked at the end: {needle.QUESTION}\n")

    dense = Reading("dense", smollm2.DenseAttention(model.config, total + steps))
    sparse = [smollm2.SelectedAttention(model.config, total + steps, BlockGeometry(topk=k)) for k in topk]
    readings = [dense, *(Reading(f"NSA topk {attention.blocks.topk}", attention) for attention in sparse)]
    bar = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeElapsedColumn(),
    )
    with torch.inference_mode(), Progress(*bar, console=console) as progress:
        timed(
            model, prompt.tokens[:chunk], 0, smollm2.DenseAttention(model.config, chunk)
        )  # a process's first pass is slow
        tasks = [progress.add_task(reading.name, total=total + steps) for reading in readings]
        for start in range(0, total, chunk):
            for reading, task in zip(readings, tasks, strict=True):
                prefill(model, reading, prompt.tokens, start, start + chunk)
                progress.update(task, completed=min(start + chunk, total))
        for position in range(total, total + steps):
            for reading, task in zip(readings, tasks, strict=True):
                decode(model, reading, position)
                progress.advance(task)

    scores = [score(reading, dense, prompt, tokenizer) for reading in readings]
    console.print(quality_table(scores))
    for s in scores:
        console.print(f"{s.name} answers: {s.answer!r}", markup=False, highlight=False)
    console.print(reads_table([reads_per_step(attention, prompt) for attention in sparse]))
    plot(sparse[-1], prompt, png)
    console.print(f"figure of topk {topk[-1]}: {png}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
