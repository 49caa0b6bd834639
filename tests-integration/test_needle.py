"""Does a sentence among 65,536 tokens come back, found by scores alone, wherever it stands?

The text is nothing but sentences of 40 tokens. A sentence has, per kv head, a topic (a random direction) and an answer
(a random unit vector): its tokens' keys are the topic with noise, its tokens' values the answer. All are drawn alike:
every sentence is a needle among distractors of its own distribution, and what makes it the needle is that a query asks
for it. A query head is a sentence's topic, with noise of its own, SHARPNESS long. Every token asks, the heads of a
group not all the same: the last one asks for another sentence, and the group must find both.

**What must be selected.** A sentence begins at a multiple of 8 = d/2 and has 40 = l + d/2 tokens, so exactly one
compressed block lies wholly inside, its *core*. Each selection block that the core touches must be selected: one, or
two where the core straddles an edge. Eq. 9 counts that overlap at least once, so such a block's score is at least the
probability p that the asking head gives the core, weighed against the whole text; against a part of it, p only grows.
Let s be the probability of all compressed blocks that touch nothing of a head's sentence, over that of the core: at any
time, they have at most s. Those that touch a sentence (40 + 2 * 31 tokens) lie in at most 3 selection blocks. So for
one block of two sentences to be missed, 13 - 5 = 8 of the 13 places that are not forced must go to blocks outside these
6, each with p or more; but all that such blocks can share is 2 s of each of the G heads, as Eq. 9 counts a compressed
block l / d = 2 times in all. That takes 8 p <= 2 G s.

**What must come back.** Let e be the weight of all tokens outside the sentence over that of the core's tokens, as the
asking head weighs the whole text. Selection and causality only leave tokens outside away, never the core's. So the
output is (1 - a) answer + a x with a <= e / (1 + e) and |x| <= 1: off by a at most across the answer and by 2 a along
it, and its cosine is at least (1 + (a / (1 - 2 a))^2)^-1/2, which is 0.992 for e = 1/9.

`test_the_scores_can_tell_sentences_apart` computes p, s and e from the keys for every sentence and head; so the
other tests hold for any right implementation, by any choice between near-ties. One token alone could not be found: a
mean of 32 keys holds 1/32 of it, less than the noise of the 31 others.
"""

import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import pytest
import torch
from nsa import NSACache, NSAConfig, nsa_attention, ops
from nsa.compression import Pool
from nsa_varlen import BlockGeometry, PagedKV, VarlenLayout
from torch import Tensor

BLOCKS = BlockGeometry()
SENTENCE = BLOCKS.kernel_size + BLOCKS.kernel_stride // 2
SHARPNESS = 32.0  # of a query along a key: the logit of equal directions
KEY_NOISE = 0.5  # of a token's key beside its topic, which is 1 long
QUERY_NOISE = 0.3
MOST_OUTSIDE = 1 / 9  # e above
RETRIEVED = 0.99
ROOM = 128  # tokens after the prefill
SLC = (0.0, 1.0, 0.0)
ALL = (0.25, 0.5, 0.25)

gpu = [
    pytest.mark.gpu,
    pytest.mark.alone,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@dataclass(frozen=True)
class Scale:
    """How large a case is, and where it runs; `chunk` queries enter the cache together."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    chunk: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def group_size(self) -> int:
        return self.heads // self.kv_heads

    @property
    def sentences(self) -> int:
        """Whole sentences among the tokens of the prefill."""
        return self.tokens // SENTENCE

    def config(self) -> NSAConfig:
        heads = {"num_heads": self.heads, "num_kv_heads": self.kv_heads, "head_dim": self.head_dim}
        return NSAConfig(hidden_size=8, **heads, rope_theta=None)

    def cache(self, batch_size: int = 1) -> NSACache:
        room = self.tokens + ROOM
        return NSACache(self.config(), batch_size, room, dtype=self.dtype, device=self.device)


SMOKE = Scale(65_536, heads=4, kv_heads=2, head_dim=32, chunk=2048)
GROUPS = {"g16": (64, 4), "g4": (32, 8), "g1": (16, 16)}
# What a GPU does, at a length for a CPU: half precision, in one call and in several.
SHORT = {
    f"2k-{name}-{chunk}": Scale(2048, heads // 2, kv_heads // 2, 128, chunk, torch.bfloat16)
    for name, (heads, kv_heads) in GROUPS.items()
    for chunk in (2048, 600)
}
GRID = {
    f"cuda-64k-{name}-{chunk}": Scale(65_536, *heads, 128, chunk, torch.bfloat16, "cuda")
    for name, heads in GROUPS.items()
    for chunk in (65_536, 4096)
}
SCALES = [
    pytest.param(SMOKE, id="cpu-64k"),
    *(pytest.param(scale, id=name) for name, scale in SHORT.items()),
    *(pytest.param(scale, id=name, marks=gpu) for name, scale in GRID.items()),
]
# Decode steps do not know how the text came into the cache.
DECODED = [
    pytest.param(scale, backend, id=f"{name}-{backend}", marks=marks)
    for scales, backends, marks in (
        ({"cpu-64k": SMOKE} | SHORT, ["sdpa"], []),
        ({name: scale for name, scale in GRID.items() if scale.chunk < scale.tokens}, ["sdpa", "triton"], gpu),
    )
    for name, scale in scales.items()
    for backend in backends
]


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


class Text:
    """Sentences of `scale.tokens` tokens and ROOM more, and the questions that the heads may ask about them.

    keys, values [T, Hk, D]; questions [n, Hq, D] and answers [n, Hk, D], sentence by sentence.
    """

    def __init__(self, scale: Scale, seed: int = 0) -> None:
        self.scale = scale
        generator = torch.Generator().manual_seed(seed)
        kv_heads, dim, tokens = scale.kv_heads, scale.head_dim, scale.tokens + ROOM

        def directions(*sizes: int) -> Tensor:
            return unit(torch.randn(*sizes, dim, generator=generator).to(scale.device))

        self.count = -(-tokens // SENTENCE)
        topics = directions(self.count, kv_heads)
        self.answers = directions(self.count, kv_heads)
        own = topics.repeat_interleave(SENTENCE, 0)[:tokens]
        # Like a layer's rows, keys are sqrt(D) long: components of unit variance.
        self.keys = (unit(own + KEY_NOISE * directions(tokens, kv_heads)) * dim**0.5).to(scale.dtype)
        self.values = self.answers.repeat_interleave(SENTENCE, 0)[:tokens].to(scale.dtype)
        asked = topics.repeat_interleave(scale.group_size, 1)
        asked = unit(asked + QUERY_NOISE * directions(self.count, scale.heads))
        self.questions = (asked * SHARPNESS).to(scale.dtype)

    @cached_property
    def pooled(self) -> tuple[Tensor, Tensor]:
        """Keys and values of every compressed block, fp64 [Tc, Hk, D], rounded once as a cache stores them."""
        sizes = BLOCKS.kernel_size, BLOCKS.kernel_stride
        means = (x.double().unfold(0, *sizes).mean(-1) for x in (self.keys, self.values))
        k, v = (x.to(self.scale.dtype).double() for x in means)
        return k, v

    def asked(self, first: Tensor, last: Tensor) -> Tensor:
        """Queries [T, Hq, D]: of a group's heads all ask for sentence first [T] but the last, for last [T]."""
        group = self.scale.group_size
        about = wanted(first, last, group)  # [T, G]
        by_group = self.questions.unflatten(1, (-1, group))  # [n, Hk, G, D]
        return torch.stack([by_group[about[:, g], :, g] for g in range(group)], 2).flatten(1, 2)

    def cosines(self, out: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """Of each head's output [T, Hq, D] with the answer that it asked for: [T, Hk, G]."""
        about = wanted(first, last, self.scale.group_size)
        answers = self.answers.double()[about].transpose(1, 2)  # [T, Hk, G, D]
        return (unit(out.double()).unflatten(1, (self.scale.kv_heads, -1)) * answers).sum(-1)


def wanted(first: Tensor, last: Tensor, group_size: int) -> Tensor:
    """The sentence that each head of a group asks for: [T] and [T] -> [T, G]."""
    about = first[:, None].repeat(1, group_size)
    if group_size > 1:
        about[:, -1] = last
    return about


def core(sentence: Tensor) -> Tensor:
    """The compressed block that lies wholly inside each sentence."""
    stride = BLOCKS.kernel_stride
    return (sentence * SENTENCE + stride - 1) // stride


def required(sentence: Tensor) -> Tensor:
    """The first and the last selection block that each sentence's core touches: [..., 2]."""
    start = core(sentence) * BLOCKS.kernel_stride
    return torch.stack((start, start + BLOCKS.kernel_size - 1), -1) // BLOCKS.block_size


def places(sentences: int) -> dict[str, int]:
    """Where a needle stands, by name: a sentence among so many, of which the last ends where the queries begin."""
    last = sentences - 1
    middle = sentences // 2 // 8 * 8  # begins with a block: 8 sentences are 5 blocks
    edges = {
        "a block's first token": middle,
        "a block's last token": middle + 7,
        "both sides of an edge": middle + 1,
        "both sides, more on the right": middle + 6,
        "a tail in the block before": middle + 3,
        "a tail in the block after": middle + 2,
        "the end of the first block": 1,
        "after the first block": 2,
        "the window's start": last - (BLOCKS.window_size // SENTENCE - 1),
        "before the local blocks": last - 5,
        "the local blocks": last - 1,
    }
    return {f"{percent} %": round(percent / 100 * last) for percent in range(0, 101, 10)} | edges


@dataclass(frozen=True)
class Found:
    """What `nsa_attention` gave for the tokens of a step: out [T, Hq, D], block_indices [T, Hk, topk]."""

    out: Tensor
    block_indices: Tensor


def mean(k: Tensor, v: Tensor, _: Tensor, layout: VarlenLayout, __: Tensor) -> tuple[Tensor, Tensor]:
    return ops.compress_mean(k, layout, BLOCKS), ops.compress_mean(v, layout, BLOCKS)


def read(
    cache: NSACache,
    lengths: list[int],
    k: Tensor,
    v: Tensor,
    q: Tensor | None = None,
    gates: tuple[float, float, float] = SLC,
    blocks: BlockGeometry = BLOCKS,
) -> Found | None:
    """Append tokens to the cache, and attend from them with q, if there is one. Nobody says which blocks to take.

    Where the cache was empty the queries see no more than the new rows, which go to the operations as they are: so they
    reach kernels that take no pages.
    """
    whole, compressed = not any(cache.lengths), []

    def keep(*given: Tensor) -> tuple[Tensor, Tensor]:
        compressed[:] = mean(*given)
        return compressed[0], compressed[1]

    with cache.extend(lengths) as step:
        step.write_slc(k, v)
        step.write_win(k, v)
        step.write_cmp(k, v, keep)
        if q is None:
            return None
        branches = (*compressed, k, v, k, v) if whole and compressed else (*step.cmp, *step.slc, *step.win)
        open_gates = q.new_tensor(gates).expand(*q.shape[:2], 3)
        out, aux = nsa_attention(q, *branches, open_gates, step.layout, blocks, return_aux=True)
    return Found(out, aux.block_indices)


def decoded(
    cache: NSACache,
    k: Tensor,
    v: Tensor,
    q: Tensor,
    gates: tuple[float, float, float] = SLC,
    backend: str | None = None,
) -> Found:
    """`read` for one more token of each sequence, as a CUDA graph can hold it: one call stores, chooses and attends."""
    cache.reserve(1)
    step = cache.decode(1)
    rows = k[:, None], v[:, None]
    new = step.new_tokens(rows, rows, rows, Pool(None, None))
    open_gates = q.new_tensor(gates).expand(len(q), 1, q.shape[1], 3)
    pages = *step.cmp, *step.slc, *step.win
    out, listed = ops.decode_attention(q[:, None], *pages, open_gates, step.counts, BLOCKS, new=new, backend=backend)
    step.commit()
    cache.advance(1)
    return Found(out[:, 0], listed[:, 0])


def assert_selected(found: Found, sentence: Tensor, rows: Tensor) -> None:
    """Every group of the given rows selected each block that it must, and lists its blocks once, ascending."""
    listed = found.block_indices[rows].long()
    for block in required(sentence[rows]).unbind(-1):
        missed = ~(listed == block[:, None, None]).any(-1)
        assert not missed.any(), f"rows and kv heads that missed their block: {missed.nonzero()[:8].tolist()}"
    there = listed >= 0
    assert bool((listed.diff(dim=-1)[there[..., 1:]] > 0).all())


def answer_by_hand(text: Text, q: Tensor, position: int, gates: tuple[float, float, float]) -> tuple[Tensor, Tensor]:
    """(out [Hq, D], scores [Hk, Nb]) of one query in fp64 from the keys up to its position, equation by equation."""
    scale = text.scale
    end = position + 1
    keys, values = text.keys[:end].double(), text.values[:end].double()
    k_cmp, v_cmp = (x[: BLOCKS.num_compressed(end)] for x in text.pooled)
    heads = q.double().unflatten(0, (scale.kv_heads, -1)) * scale.head_dim**-0.5

    def attend(k: Tensor, v: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits = torch.einsum("hgd,shd->hgs", heads, k)
        if seen is not None:
            logits = logits.masked_fill(~seen[:, None], -torch.inf)
        p = logits.softmax(-1)
        return torch.einsum("hgs,shd->hgd", p, v), p

    o_cmp, p_cmp = attend(k_cmp, v_cmp)
    current = position // BLOCKS.block_size
    starts = torch.arange(len(k_cmp), device=q.device)[:, None] * BLOCKS.kernel_stride
    left = torch.arange(current + 1, device=q.device) * BLOCKS.block_size
    overlap = torch.minimum(starts + BLOCKS.kernel_size, left + BLOCKS.block_size) - torch.maximum(starts, left)
    scores = p_cmp.sum(1) @ (overlap.clamp_min(0) / BLOCKS.kernel_stride).double()
    number = torch.arange(current + 1, device=q.device)
    forced = (number < BLOCKS.init_blocks) | (number > current - BLOCKS.local_blocks)
    chosen = scores.masked_fill(forced, torch.inf).topk(min(BLOCKS.topk, current + 1)).indices
    listed = torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)
    o_slc, _ = attend(keys, values, listed.repeat_interleave(BLOCKS.block_size, 1)[:, :end])
    start = max(0, end - BLOCKS.window_size)
    o_win, _ = attend(keys[start:], values[start:])
    out = sum(gate * o for gate, o in zip(gates, (o_cmp, o_slc, o_win), strict=True))
    assert isinstance(out, Tensor)
    return out.flatten(0, 1), scores.masked_fill(forced, torch.inf)


def relative_error(scale: Scale) -> float:
    """How far a probability may be off, relative, beside that of `answer_by_hand`.

    A logit is a sum of D products, |q||k| = SHARPNESS at most in absolute terms, added in fp32: off by (D + 2) u
    SHARPNESS. A pooled key is a sum of l rows and rounded to the cache's type; the two computations may round it to
    neighbours: one unit in the last place, 2 u' of each component. The LSE is off by as much as a logit, and by
    (terms + SHARPNESS) u for its sum and logarithm; exp and the sums over the group and a block's 5 terms, 10 and G.
    """
    u, stored = 2.0**-24, torch.finfo(scale.dtype).eps / 2
    logit = SHARPNESS * ((scale.head_dim + BLOCKS.kernel_size + 2) * u + 2 * stored)
    terms = max(BLOCKS.num_compressed(scale.tokens + ROOM), BLOCKS.topk * BLOCKS.block_size)
    return float(torch.tensor(2 * logit + u * (terms + SHARPNESS + scale.group_size + 10)).expm1())


def assert_sums_of_the_group(text: Text, found: Found, scores: Tensor) -> None:
    """Each group's list holds the best blocks by the sum of its heads' probabilities, the forced ones included.

    Only where scores lie closer together than their errors may another block be chosen.
    """
    off = relative_error(text.scale)
    for listed, score in zip(found.block_indices[0].tolist(), scores, strict=True):
        chosen = torch.zeros_like(score, dtype=torch.bool)
        chosen[[block for block in listed if block >= 0]] = True
        assert int(chosen.sum()) == min(BLOCKS.topk, len(score))
        assert bool(chosen[score == torch.inf].all())
        if not bool(chosen.all()):
            assert score[chosen].min() * (1 + off) >= score[~chosen].max() * (1 - off)


def assert_answered(
    text: Text,
    found: Found,
    position: int,
    name: str,
    needle: Tensor,
    other: Tensor,
    gates: tuple[float, float, float],
) -> None:
    """One query, at `position`, found both sentences that its heads ask for, by the right scores, and read them."""
    scale = text.scale
    for sentence in (needle, other):
        assert_selected(found, sentence, torch.zeros_like(needle))
    expected, scores = answer_by_hand(text, text.asked(needle, other)[0], position, gates)
    assert_sums_of_the_group(text, found, scores)
    # A mean of vectors 1 long whose weights are off by that much, then rounded.
    rounding = torch.finfo(scale.dtype).eps
    assert (found.out[0].double() - expected).norm(dim=-1).max() <= 2 * relative_error(scale) + rounding, name
    if gates == SLC:
        assert text.cosines(found.out, needle, other).min() >= RETRIEVED, name


def steps_to(scale: Scale) -> Iterator[tuple[int, str, Tensor, Tensor, tuple[float, float, float]]]:
    """(position, its name, needle, the other sentence, gates) of a step for each of `places`, after the prefill."""
    where = places(scale.sentences)
    assert len(where) <= ROOM
    for position, (name, sentence) in enumerate(where.items(), scale.tokens):
        needle = torch.tensor([sentence], device=scale.device)
        other = scale.sentences - 1 - needle if scale.group_size > 1 else needle
        yield position, name, needle, other, ALL if name == "50 %" else SLC


def peak_before(device: str) -> int:
    """Bytes that `peak_memory` is to be compared with."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return peak_memory(device)


def peak_memory(device: str) -> int:
    """Bytes: on a CPU the most that this process ever had, which another test may have set; on a GPU, since reset."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_bound(scale: Scale) -> int:
    """Bytes that a case may take beside its text.

    On a CPU 512 MiB: 190 were taken at 65,536 tokens, and logits of one chunk against all tokens would take 2 GiB. On a
    GPU the 2 GiB that operations may work in; 16 times the keys in fp64, for the cache and `answer_by_hand`; and 12
    times a chunk's queries, for three branches, their sum and what kernels rearrange. Nothing grows as T^2.
    """
    if scale.device == "cpu":
        return 2**29
    keys = (scale.tokens + ROOM) * scale.kv_heads * scale.head_dim * 8
    queries = scale.chunk * scale.heads * scale.head_dim * scale.dtype.itemsize
    return 2**31 + 16 * keys + 12 * queries


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As CI's workers run: threads that wait for a busy core cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def perf(flags: Callable[..., None], scale: Scale) -> None:
    """On a GPU the plan of PRESET=perf, kernels and all; on a CPU the only plan there is."""
    flags(PRESET="perf" if scale.device == "cuda" else None)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.usefixtures("one_thread")
def test_the_scores_can_tell_sentences_apart(scale: Scale) -> None:
    """The premises of this file's head, for every sentence and head, of the keys as they are stored."""
    text, group = Text(scale), scale.group_size
    k_cmp, whole = text.pooled[0].float(), torch.arange(scale.sentences, device=scale.device)
    token = torch.arange(len(text.keys), device=scale.device)
    block = torch.arange(len(k_cmp), device=scale.device) * BLOCKS.kernel_stride
    surest, strayed = [], []
    for part in whole.split(64):
        begin = (part * SENTENCE)[:, None]
        outside = (token < begin) | (token >= begin + SENTENCE)
        touching = (block + BLOCKS.kernel_size > begin) & (block < begin + SENTENCE)
        start = core(part) * BLOCKS.kernel_stride
        inside = start[:, None] + torch.arange(BLOCKS.kernel_size, device=scale.device)
        for head in range(scale.heads):
            q = text.questions[part, head].float() * scale.head_dim**-0.5
            weight = (q @ text.keys[:, head // group].float().T - SHARPNESS).exp()
            e = (weight * outside).sum(1) / weight.gather(1, inside).sum(1)
            assert e.max() <= MOST_OUTSIDE
            p_cmp = (q @ k_cmp[:, head // group].T).softmax(-1)
            p = p_cmp.gather(1, core(part)[:, None])[:, 0]
            surest.append(p.min())
            strayed.append(((p_cmp * ~touching).sum(1) / p).max())
    assert 8 * min(surest) > 2 * group * max(strayed)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.usefixtures("one_thread", "perf")
def test_a_sentence_is_found_from_everywhere(scale: Scale) -> None:
    """First every token of the prefill asks for a sentence before it, then one decode step for each place."""
    text, cache = Text(scale), scale.cache()
    before = peak_before(scale.device)
    generator = torch.Generator().manual_seed(1)
    for start in range(0, scale.tokens, scale.chunk):
        end = min(start + scale.chunk, scale.tokens)
        # Sentences that are complete at each position; before the first one is, all ask for what nobody knows yet.
        complete = torch.arange(start + 1, end + 1) // SENTENCE
        first, last = (
            (torch.rand(end - start, generator=generator) * complete).long().to(scale.device) for _ in range(2)
        )
        if scale.group_size == 1:
            last = first
        new = slice(start, end)
        found = read(cache, [end - start], text.keys[new], text.values[new], text.asked(first, last))
        assert found is not None
        rows = complete.nonzero()[:, 0].to(scale.device)
        assert_selected(found, first, rows)
        assert_selected(found, last, rows)
        for part in rows.split(1024):
            assert text.cosines(found.out[part], first[part], last[part]).min() >= RETRIEVED

    for position, name, needle, other, gates in steps_to(scale):
        new = slice(position, position + 1)
        found = read(cache, [1], text.keys[new], text.values[new], text.asked(needle, other), gates)
        assert found is not None
        assert_answered(text, found, position, name, needle, other, gates)

    assert peak_memory(scale.device) - before <= memory_bound(scale)


@pytest.mark.parametrize("scale, backend", DECODED)
@pytest.mark.usefixtures("one_thread", "perf")
def test_a_decode_step_finds_a_sentence(scale: Scale, backend: str) -> None:
    """The last part of the test above by `decode_attention`, which stores the token and makes its blocks itself."""
    text, cache = Text(scale), scale.cache()
    before = peak_before(scale.device)
    fill(cache, 0, text, scale.tokens)
    for position, name, needle, other, gates in steps_to(scale):
        new = slice(position, position + 1)
        found = decoded(cache, text.keys[new], text.values[new], text.asked(needle, other), gates, backend)
        assert_answered(text, found, position, name, needle, other, gates)
    assert peak_memory(scale.device) - before <= memory_bound(scale)


def fill(cache: NSACache, sequence: int, text: Text, tokens: int) -> None:
    """Let a sequence be the first tokens of a text."""
    for part in torch.arange(tokens).split(text.scale.chunk):
        lengths = [len(part) if b == sequence else 0 for b in range(cache.batch_size)]
        read(cache, lengths, text.keys[part[0] : part[-1] + 1], text.values[part[0] : part[-1] + 1])


def assert_same(found: Found, expected: Found, rows: Tensor) -> None:
    assert torch.equal(found.block_indices[rows], expected.block_indices[rows])
    assert torch.equal(found.out[rows], expected.out[rows])


@pytest.mark.parametrize(
    "scale", [pytest.param(SMOKE, id="cpu-64k"), pytest.param(GRID["cuda-64k-g16-4096"], id="cuda-64k", marks=gpu)]
)
@pytest.mark.usefixtures("one_thread", "perf")
def test_no_later_edit_changes_an_answer(scale: Scale) -> None:
    """Bitwise: 64 tokens ask; those after them, another sequence and what is appended later try to talk them out of it.

    A lie has the keys of a sentence that is asked for and the values of another. Steps that are compared have the same
    shape, for a sum may depend on how the work is cut.
    """
    text, other = Text(scale), Text(scale, seed=2)
    asking, lies, beside = 64, 4 * SENTENCE, 1000
    start, end = scale.tokens - asking - lies, scale.tokens
    complete = start // SENTENCE
    first = torch.arange(asking + lies, device=scale.device) * 25 % complete
    first[-4:] = first[:4]  # behind the lies someone asks for what they are about
    last = complete - 1 - first
    q = torch.cat((text.asked(first, last), text.asked(first[:1], last[:1])))
    asked = torch.arange(asking, device=scale.device)
    within = torch.arange(SENTENCE, device=scale.device)
    lie_k = text.keys[(first[:4, None] * SENTENCE + within).flatten()]
    lie_v = text.values[(first[4:8, None] * SENTENCE + within).flatten()]

    def answered(cache: NSACache, edited: bool) -> Found:
        """Sequence 0's text up to its end, and beside it 1,000 tokens and one of another."""
        second = other if edited else text
        k, v = text.keys.clone(), text.values.clone()
        if edited:
            k[end - lies : end], v[end - lies : end] = lie_k, lie_v
        for begin in range(0, start, scale.chunk):
            stop = min(begin + scale.chunk, start)
            new, there = slice(begin, stop), slice(0, beside if begin == 0 else 0)
            rows = [torch.cat((x[new], y[there])) for x, y in ((k, second.keys), (v, second.values))]
            read(cache, [stop - begin, there.stop], *rows)
        new, there = slice(start, end), slice(beside, beside + 1)
        rows = [torch.cat((x[new], y[there])) for x, y in ((k, second.keys), (v, second.values))]
        found = read(cache, [end - start, 1], *rows, q)
        assert found is not None
        return found

    cache, edited = scale.cache(2), scale.cache(2)
    expected, changed = answered(cache, edited=False), answered(edited, edited=True)
    assert_same(changed, expected, asked)
    assert not torch.equal(changed.out[asking:-1], expected.out[asking:-1])  # those that the lies precede do see them
    assert text.cosines(expected.out[:asking], first[:asking], last[:asking]).min() >= RETRIEVED

    then = VarlenLayout.from_lengths([end - start, 1], list(cache.lengths), scale.device)
    for token in range(SENTENCE + 1):  # one by one: a whole sentence more, then what completes its compressed block
        rows = [x[token : token + 1].repeat(2, 1, 1) for x in (lie_k, lie_v)]
        read(cache, [1, 1], *rows, text.asked(first[1:3], last[1:3]))
    with cache.extend([0, 0]) as step:
        counts = [BLOCKS.num_compressed(length) for length in then.host.cu_seqlens_k.diff().tolist()]
        k_cmp, v_cmp = (as_of(x, counts) for x in step.cmp)
        k, v = (as_of(x, then.host.cu_seqlens_k.diff().tolist()) for x in step.slc)
        _, lse = ops.compressed_attention(q, k_cmp, v_cmp, then, BLOCKS)
        listed = ops.select_blocks(q, k_cmp, lse, then, BLOCKS)
        out, _ = ops.selected_attention(q, k, v, listed, then, BLOCKS)
    assert_same(Found(out, listed), expected, torch.arange(len(q), device=scale.device))


@pytest.mark.parametrize(
    "scale, backend",
    [
        pytest.param(SMOKE, "sdpa", id="cpu-64k-sdpa"),
        *(
            pytest.param(GRID["cuda-64k-g16-4096"], backend, id=f"cuda-64k-{backend}", marks=gpu)
            for backend in ("sdpa", "triton")
        ),
    ],
)
@pytest.mark.usefixtures("one_thread", "perf")
def test_no_later_edit_changes_a_decoded_answer(scale: Scale, backend: str) -> None:
    """Bitwise: a step; the same after lies, taken back, and beside another text; what it read, when more lies follow.

    The lies are those of the test above: keys of a sentence that is asked for, values of another.
    """
    text, other = Text(scale), Text(scale, seed=2)
    first = torch.tensor([scale.sentences // 3, 11], device=scale.device)
    last = torch.tensor([scale.sentences - 20, 3], device=scale.device)
    q, end, beside = text.asked(first, last), scale.tokens, 1000
    within = torch.arange(SENTENCE + 1, device=scale.device)
    lie_k = text.keys[first[0] * SENTENCE + within]
    lie_v = text.values[last[0] * SENTENCE + within]

    def answered(cache: NSACache, second: Text) -> Found:
        """Sequence 0 goes on with its text, sequence 1, of another length, with its own."""
        rows = [torch.stack((x[end], y[beside])) for x, y in ((text.keys, second.keys), (text.values, second.values))]
        return decoded(cache, *rows, q, backend=backend)

    def lied_to(cache: NSACache, token: int) -> Found:
        rows = (x[token].expand(2, -1, -1) for x in (lie_k, lie_v))
        return decoded(cache, *rows, q, backend=backend)

    found = {}
    for name, second in (("first", text), ("edited", other)):
        cache = scale.cache(2)
        fill(cache, 0, text, end)
        fill(cache, 1, second, beside)
        found[name] = answered(cache, second)
        for token in range(cache.rollback - 1):
            lied_to(cache, token)
        for sequence, length in enumerate((end, beside)):
            cache.truncate(sequence, length)
        assert_same(answered(cache, second), found[name], torch.arange(2, device=scale.device))
    assert_same(found["edited"], found["first"], torch.zeros_like(first[:1]))
    assert not torch.equal(found["edited"].out[1], found["first"].out[1])
    assert text.cosines(found["first"].out[:1], first[:1], last[:1]).min() >= RETRIEVED
    for sentence in (first, last):
        assert_selected(found["first"], sentence, torch.zeros_like(first[:1]))

    lengths = list(cache.lengths)

    def again() -> Found:
        """The same question to what the pages hold of these lengths."""
        with cache.extend([0, 0]) as step:
            compressed = [BLOCKS.num_compressed(length) for length in lengths]
            streams = (step.cmp, compressed), (step.slc, lengths), (step.win, lengths)
        pages = [as_of(x, rows) for both, rows in streams for x in both]
        gates, counts = q.new_tensor(SLC).expand(2, 1, scale.heads, 3), torch.ones_like(pages[2].lengths)
        out, listed = ops.decode_attention(q[:, None], *pages, gates, counts, BLOCKS, backend=backend)
        return Found(out[:, 0], listed[:, 0])

    before = again()
    for token in range(SENTENCE + 1):  # a whole sentence more, then what completes its compressed block
        lied = lied_to(cache, token)
    assert not torch.equal(lied.out[0], before.out[0])  # who comes after the lies does see them
    assert_same(again(), before, torch.arange(2, device=scale.device))


def as_of(stream: PagedKV, lengths: list[int]) -> PagedKV:
    """The stream as long as it was: the same pages, fewer rows."""
    return PagedKV(stream.pages, stream.block_table, torch.tensor(lengths, dtype=torch.int32).to(stream.device))


@pytest.mark.parametrize("scale", [pytest.param(replace(SMOKE, tokens=8192), id="cpu-8k")])
@pytest.mark.usefixtures("one_thread", "perf")
def test_what_nobody_scores_is_not_found(scale: Scale) -> None:
    """What the other tests see: without scored blocks, or without the head that asks, its sentence stays away."""
    text, cache = Text(scale), scale.cache()
    read(cache, [scale.tokens], text.keys[: scale.tokens], text.values[: scale.tokens])
    far = torch.arange(20, scale.sentences - 20, 9)
    first, last = far, far.flip(0) + 1
    k, v = (x[scale.tokens : scale.tokens + len(far)] for x in (text.keys, text.values))
    forced = replace(BLOCKS, topk=BLOCKS.init_blocks + BLOCKS.local_blocks)
    found = read(cache, [len(far)], k, v, text.asked(first, last), blocks=forced)
    assert found is not None
    assert text.cosines(found.out, first, last).max() < RETRIEVED

    k, v = (x[scale.tokens + len(far) :][: len(far)] for x in (text.keys, text.values))
    found = read(cache, [len(far)], k, v, text.asked(first, first))
    assert found is not None
    assert_selected(found, first, torch.arange(len(far)))
    assert text.cosines(found.out, first, first).min() >= RETRIEVED
    assert not bool((found.block_indices == required(last)[:, None, :1]).any(-1).all())
