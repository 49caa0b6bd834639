"""A serving loop: sequences join and leave between steps, and one batch mixes chunks of prompts with decoded tokens.

    hatch run python docs/examples/continuous_batching.py
    hatch run python docs/examples/continuous_batching.py --pages 300 --overcommit    # the pool runs full

docs/decode-and-serving.md explains what the cache's calls promise.
"""

import random
from collections import deque
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Annotated

import torch
import typer
from byte_model import ByteModel
from nsa import CacheFull, DecodeGraph, NSACache, NSAConfig, PagePool, SharedPrefix
from nsa_varlen import VarlenLayout
from rich.console import Console
from rich.table import Table


@dataclass(eq=False)
class Sequence:
    """A request on its way: `tokens` are its prompt and what was sampled; the first `read` of them are in the caches.

    Until it is done there is always a token that was not read, of the prompt or the one just sampled: reading a prompt
    and decoding differ only in how many there are.
    """

    name: str
    tokens: list[int]
    prompt_tokens: int
    max_new_tokens: int
    stop: int | None  # a byte that ends it early
    slot: int = -1  # its place in the batch, while it runs
    read: int = 0

    @property
    def new(self) -> bytes:
        return bytes(self.tokens[self.prompt_tokens :])

    @property
    def done(self) -> bool:
        return len(self.new) == self.max_new_tokens or (self.new != b"" and self.new[-1] == self.stop)

    @property
    def longest(self) -> int:
        """Tokens in the caches at its end, if nothing stops it: the last one sampled is never read."""
        return self.prompt_tokens + self.max_new_tokens - 1


@dataclass
class Step:
    """What one step did."""

    counts: list[int]  # tokens of each slot
    waiting: int
    pages: int  # held, by all layers
    events: list[str] = field(default_factory=list)


class Server:
    """Serves requests out of one pool of pages, which the caches of all layers share.

    Args:
        model: the caches have the dtype and device of its weights.
        num_pages: of the pool.
        slots: sequences that run at once, the batch size of the caches.
        budget: tokens of a step, at least `slots`: how long decoding may have to wait for a prompt.
        max_tokens: capacity per sequence.
        system: what every prompt begins with.
        share: it is read once and its pages are shared; otherwise every sequence reads it.
        overcommit: admit what has room for its prompt: more sequences run at once, and some may have to begin anew.
            Otherwise what has room for its longest answer too, and none ever has to.
    """

    def __init__(
        self,
        model: ByteModel,
        num_pages: int,
        *,
        slots: int = 4,
        budget: int = 64,
        max_tokens: int = 1024,
        page_size: int = 64,
        system: bytes = b"",
        share: bool = True,
        overcommit: bool = False,
    ) -> None:
        if budget < slots:
            raise ValueError(f"budget: expected a token for each of slots={slots}, got {budget}")
        self.model, self.slots, self.budget, self.system, self.overcommit = model, slots, budget, system, overcommit
        config, weight = model.config, model.head.weight
        options = {"page_size": page_size, "device": weight.device, "dtype": weight.dtype}
        self.pool = PagePool.for_config(config, num_pages, **options)
        self.caches = [NSACache(config, slots, max_tokens, pool=self.pool, page_size=page_size) for _ in model.blocks]
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order in which they joined
        self.graph = None
        if weight.device.type == "cuda":  # captured once: sequences come, go and grow between its replays
            tokens = torch.zeros(slots, 1, dtype=torch.int64, device=weight.device)
            self.graph = DecodeGraph(lambda x, counts: model.decode(x, counts, self.caches), self.caches, tokens)
        self.prefixes = self._read_system() if share and system else []
        self.shared = len(system) if self.prefixes else 0  # tokens that nobody reads again
        self.room = self.pool.num_free  # pages that sequences may hold together, beside the shared ones

    @torch.no_grad()
    def _read_system(self) -> list[SharedPrefix]:
        for start in range(0, len(self.system), self.budget):
            self._forward([[*self.system[start : start + self.budget]], *[[]] * (self.slots - 1)])
        prefixes = [cache.share(0) for cache in self.caches]
        for cache in self.caches:
            cache.free(0)  # the slot is empty again; the prefixes hold the pages
        return prefixes

    def submit(self, name: str, prompt: bytes, max_new_tokens: int, stop: int | None = None) -> Sequence:
        """Queue a request. Its answer is `Sequence.new`, complete once it is `Sequence.done`."""
        if not prompt or max_new_tokens < 1:
            raise ValueError(f"{name}: expected a prompt and at least one new token, got {prompt!r}, {max_new_tokens}")
        tokens = [*self.system, *prompt]
        sequence = Sequence(name, tokens, len(tokens), max_new_tokens, stop)
        if sequence.longest > self.caches[0].max_tokens:
            raise ValueError(f"{name}: expected at most {self.caches[0].max_tokens} tokens, got {sequence.longest}")
        if (pages := self._pages(sequence.longest, self.budget)) > self.room:  # it would wait for ever
            raise ValueError(f"{name}: expected at most {self.room} pages, got {pages}")
        self.waiting.append(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Forget a request, wherever it is; its pages are returned."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self._leave(sequence)

    def close(self) -> None:
        """Cancel everything, and hold the system prompt no longer."""
        for sequence in [*self.waiting, *self.running]:
            self.cancel(sequence)
        for prefix in self.prefixes:
            prefix.drop()

    @torch.no_grad()
    def step(self) -> Step:
        """Let sequences join, run the model once, let those that are done leave. Somebody has to be there."""
        events: list[str] = []
        self._admit(events)
        counts = self._reserve(events)
        chunks: list[list[int]] = [[] for _ in range(self.slots)]
        for s in self.running:
            chunks[s.slot] = s.tokens[s.read : s.read + counts[s.slot]]
        best = self._forward(chunks)
        step = Step(counts, len(self.waiting), self.pool.num_pages - self.pool.num_free, events)
        for s in [*self.running]:
            s.read += counts[s.slot]
            if s.read == len(s.tokens):
                s.tokens.append(best[s.slot])
                if s.done:
                    self._leave(s)
                    events.append(f"{s.name} done")
        return step

    def _pages(self, tokens: int, chunk: int) -> int:
        """The most pages that a sequence takes from the pool while it grows to `tokens`, for all layers."""
        cache, kept = self.caches[0], (self.model.config.blocks.num_compressed(self.shared), self.shared)
        # Of the compressed and the selected stream, the system prompt's full pages stay shared. The last one is copied
        # when it is written, and the window's are left behind for pages of the sequence's own.
        shared = sum(rows // self.pool.page_size for rows in kept)
        return len(self.caches) * (cache.pages_for(tokens, chunk) - shared)

    def _promised(self, s: Sequence) -> int:
        """Pages that admission counts for a sequence: all that it may need, and then CacheFull cannot happen."""
        if self.overcommit:
            return self._pages(len(s.tokens), chunk=1)  # of the tokens that it has, once they are read
        return self._pages(s.longest, chunk=self.budget)

    def _admit(self, events: list[str]) -> None:
        """First come, first served, while there is a slot and room."""
        while self.waiting and len(self.running) < self.slots:
            s = self.waiting[0]
            if sum(map(self._promised, [*self.running, s])) > self.room:
                return
            s.slot = min({*range(self.slots)} - {other.slot for other in self.running})
            self.running.append(self.waiting.popleft())
            if self.prefixes:
                for cache, prefix in zip(self.caches, self.prefixes, strict=True):
                    cache.adopt(s.slot, prefix)
            s.read = self.shared
            events.append(f"{s.name} joins")

    def _reserve(self, events: list[str]) -> list[int]:
        """Tokens of each slot in this step, with pages for them in all layers.

        They are taken before the first layer runs: a full pool never leaves one layer ahead of another.
        """
        while True:
            counts = self._share_out()
            try:
                for cache in self.caches:
                    cache.reserve(counts)
                return counts
            except CacheFull:
                # What some layers did reserve stays with its sequences, which use it later. The youngest gives its
                # pages back and reads its tokens anew when there is room; the oldest never does, and gets done.
                youngest = self.running[-1]
                if len(self.running) == 1:
                    raise  # it fits alone: somebody else took pages of this pool
                self._leave(youngest)
                self.waiting.appendleft(youngest)
                events.append(f"{youngest.name} preempted")

    def _share_out(self) -> list[int]:
        """One token for all that decode, then the rest of the budget to the prompts, oldest first."""
        counts, left = [0] * self.slots, self.budget
        for s in sorted(self.running, key=lambda s: len(s.tokens) - s.read > 1):
            counts[s.slot] = min(len(s.tokens) - s.read, left)
            left -= counts[s.slot]
        return counts

    def _leave(self, s: Sequence) -> None:
        for cache in self.caches:
            cache.free(s.slot)
        self.running.remove(s)
        s.slot, s.read = -1, 0

    def _forward(self, chunks: list[list[int]]) -> list[int]:
        """Append chunks[b] to slot b. Returns the likeliest next token of each slot, and anything for empty chunks."""
        counts, device = [len(chunk) for chunk in chunks], self.pool.k_pages.device
        if max(counts) > 1:
            tokens = torch.tensor([token for chunk in chunks for token in chunk], device=device)
            layout = VarlenLayout.from_lengths(counts, device=device)
            last = torch.tensor([*accumulate(counts)], device=device) - 1
            logits = self.model.extend(tokens, layout, self.caches, last)
        else:  # all decode: the same shapes in every step, which a graph can hold
            tokens = torch.tensor([chunk or [0] for chunk in chunks], device=device)
            if self.graph is not None:
                logits = self.graph.replay(tokens, counts)[:, 0]
            else:  # what a replay does
                for cache in self.caches:
                    cache.reserve(counts)
                there = torch.tensor(counts, dtype=torch.int32, device=device)
                logits = self.model.decode(tokens, there, self.caches)[:, 0]
                for cache in self.caches:
                    cache.advance(counts)
        return logits.argmax(-1).tolist()


def steps_table(steps: list[Step], num_pages: int) -> Table:
    """A row per step; consecutive ones in which all decode and nobody comes or goes make one row."""
    table = Table(title=f"Steps of a pool of {num_pages} pages")
    for column in ("step", "running", "waiting", "decoded\ntokens", "prompts'\ntokens", "pages"):
        table.add_column(column, justify="right")
    table.add_column("events")
    plain = [max(step.counts) == 1 and not step.events for step in steps]
    for _, group in groupby(range(len(steps)), lambda i: -1 if plain[i] else i):
        first, *_ = rows = [*group]
        step, decoded = steps[rows[-1]], sum(steps[i].counts.count(1) for i in rows)
        running = sum(count > 0 for count in step.counts)
        numbers = (running, step.waiting, decoded, sum(step.counts) - step.counts.count(1), step.pages)
        number = f"{first + 1}" if len(rows) == 1 else f"{first + 1}-{rows[-1] + 1}"
        table.add_row(number, *map(str, numbers), ", ".join(step.events))
    return table


def main(
    requests: Annotated[int, typer.Option(help="How many, of random prompts and lengths.", min=1)] = 8,
    slots: Annotated[int, typer.Option(help="Sequences at once.", min=1)] = 4,
    budget: Annotated[int, typer.Option(help="Tokens per step, at least one per slot.", min=1)] = 64,
    pages: Annotated[int, typer.Option(help="Pages of the pool.", min=1)] = 400,
    share: Annotated[bool, typer.Option(help="Read the common system prompt once.")] = True,
    overcommit: Annotated[bool, typer.Option(help="Admit by what is to be read now, and preempt.")] = False,
    device: Annotated[str, typer.Option(help="On cuda a CUDA graph decodes.")] = "cpu",
) -> None:
    """Serves random requests with a random model, and prints what each step did."""
    torch.manual_seed(0)
    rng = random.Random(0)
    config = NSAConfig(64, 4, 2, 16, kernel_size=16, kernel_stride=8, block_size=16, topk=6, window_size=64)
    system = b"You are a model of bytes. Answer politely, at random. " * 3
    model = ByteModel(config).to(device)
    options = {"slots": slots, "budget": budget, "page_size": 16}
    server = Server(model, pages, **options, system=system, share=share, overcommit=overcommit)
    sequences = [
        server.submit(f"r{number}", rng.randbytes(rng.randint(20, 300)), rng.randint(8, 60))
        for number in range(requests)
    ]
    steps = []
    while server.waiting or server.running:
        steps.append(server.step())
    console = Console()
    console.print(steps_table(steps, pages))
    for s in sequences:
        answer = s.new.decode("latin-1").encode("unicode_escape").decode()[:40]
        console.print(f"{s.name}: {s.prompt_tokens} + {len(s.new)} tokens: {answer}", markup=False, highlight=False)
    held = pages - server.pool.num_free
    server.close()
    console.print(f"pages held at the end: {held} of the system prompt, then {pages - server.pool.num_free}")


if __name__ == "__main__":
    typer.run(main)
