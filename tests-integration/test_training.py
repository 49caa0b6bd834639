"""Does a model learn the same with one backend as with another, step by step?"""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import nsa
import pytest
import torch
from nsa import NSAAttention, NSAConfig
from nsa_kernels_triton.contracts import interpreted
from nsa_routing import reset
from nsa_varlen import BlockGeometry, VarlenLayout
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]


class Run(NamedTuple):
    """Sizes of a training run.

    Fields:
        moved: choices of a block that a jittered run changes in each selection; see `train`.
    """

    steps: int
    batch: int
    length: int
    hidden: int = 32
    learning_rate: float = 3e-3
    device: str = "cpu"
    moved: int = 0


EARLY = Run(steps=12, batch=4, length=128)
LONG = Run(steps=300, batch=4, length=128)
FEW = Run(steps=2, batch=1, length=72, learning_rate=1e-2)  # for the interpreter: 10 s a step
ON_GPU = Run(steps=300, batch=1, length=1024, hidden=128, device="cuda", moved=1)

BRANCHES = ("compressed_attention", "selected_attention", "window_attention")
FACTOR = 4


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: NSAConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = NSAAttention(config)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class ByteModel(nn.Module):
    """A language model of bytes: two blocks, whose attention sees the order of tokens by RoPE."""

    def __init__(self, config: NSAConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, config.hidden_size)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(2)))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, 256)

    def forward(self, text: Tensor) -> Tensor:
        """text int64 [B, S + 1] -> mean negative log-likelihood of its last S bytes, in nats."""
        logits = self.head(self.norm(self.blocks(self.embedding(text[:, :-1]))))
        return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


def corpus() -> Tensor:
    """The licence and the documentation of this repository, as bytes."""
    pages = [ROOT / "LICENSE", ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
    return torch.frombuffer(bytearray(b"".join(page.read_bytes() for page in pages)), dtype=torch.uint8).long()


def config_of(run: Run) -> NSAConfig:
    """Blocks of 32, the smallest that the Triton kernels take: a query's own, and one by its score."""
    sizes = {"kernel_size": 16, "kernel_stride": 8, "block_size": 32, "topk": 2, "init_blocks": 0, "local_blocks": 1}
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": run.hidden // 4}
    return NSAConfig(run.hidden, **heads, window_size=16, **sizes)


def train(run: Run, jitter: int | None = None) -> Iterator[float]:
    """The loss of each step.

    `jitter` is the seed of what arithmetic that rounds otherwise may do: before each step every weight moves to a
    neighbouring fp32 number, up or down, and in each selection `run.moved` queries take another block.
    """
    torch.manual_seed(0)
    model, text = ByteModel(config_of(run)).to(run.device), corpus()
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate)
    windows, moves = (torch.Generator().manual_seed(seed) for seed in (1, jitter or 0))
    with pytest.MonkeyPatch.context() as patch:
        if jitter is not None and run.moved:
            patch.setattr(nsa.ops, "select_blocks", moving(nsa.ops.select_blocks, run.moved, moves))
        for _ in range(run.steps):
            if jitter is not None:
                for parameter in model.parameters():
                    up = torch.rand(parameter.shape, generator=moves).to(run.device) < 0.5
                    parameter.data = parameter.data.nextafter(torch.where(up, torch.inf, -torch.inf))
            starts = torch.randint(len(text) - run.length, (run.batch, 1), generator=windows)
            loss = model(text[starts + torch.arange(run.length + 1)].to(run.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()


def moving(select: Callable[..., Tensor], count: int, moves: torch.Generator) -> Callable[..., Tensor]:
    """`select`, but `count` queries with a choice of two or more blocks take the next one, in one head each."""

    def run(q: Tensor, k: Any, lse: Tensor, layout: VarlenLayout, blocks: BlockGeometry, **options: Any) -> Tensor:
        indices = select(q, k, lse, layout, blocks, **options).clone()
        own = layout.positions() // blocks.block_size
        queries = (own >= 2).nonzero()[:, 0]
        queries = queries[torch.randint(len(queries), (count,), generator=moves).to(q.device)]
        heads = torch.randint(indices.shape[1], (count,), generator=moves).to(q.device)
        indices[queries, heads, 0] = (indices[queries, heads, 0] + 1) % own[
            queries
        ].int()  # the second is its own block
        return indices

    return run


@cache
def expected(run: Run) -> list[tuple[float, float]]:
    """(loss, tolerance) of each step, by `sdpa`.

    Two sound backends differ as `sdpa` differs from itself when it is jittered: by how much, up to each step, three
    such runs tell, and one rounding of the loss. FACTOR times that is allowed: a kernel's sums of some hundred terms
    round several times where a jittered weight moves once.
    """
    reset()
    base, *jittered = (list(train(run, jitter)) for jitter in (None, 1, 2, 3))
    spread = [max(abs(x - loss) for x in others) for loss, *others in zip(base, *jittered, strict=True)]
    rounding = torch.finfo(torch.float32).eps
    return [(x, FACTOR * (most + rounding * x)) for x, most in zip(base, accumulate(spread, max), strict=True)]


def first_difference(run: Run) -> int | None:
    """The first step whose loss is not the expected one, up to its tolerance, with the routes in force."""
    for step, (got, (loss, tolerance)) in enumerate(zip(train(run), expected(run), strict=True)):
        if abs(got - loss) > tolerance:
            return step
    return None


def byte_frequencies() -> float:
    """Nats a byte of a model that knows how frequent each byte is, and nothing else."""
    share = corpus().bincount().double() / len(corpus())
    return -float(share.xlogy(share).sum())


@pytest.fixture
def use(install: Callable, flags: Callable) -> Callable[[Any], None]:
    """Run every operation on this backend."""

    def use(backend: Any) -> None:
        install(backend)
        flags(BACKEND=backend.name, CHECK_FINITE="off")

    return use


@pytest.fixture
def wide(delegate: type) -> Any:
    """sdpa in fp64: right, and rounded otherwise."""

    class Wide(delegate):
        def _run(self, op: str, *args: Any, **options: Any) -> Any:
            if op not in BRANCHES:
                return super()._run(op, *args, **options)
            out, lse = super()._run(op, *(x.double() if is_float(x) else x for x in args), **options)
            return out.to(args[0].dtype), lse

    return Wide("wide")


def is_float(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


@pytest.fixture
def wrong(delegate: type) -> Callable[[str, str, float], Any]:
    """sdpa with one gradient, of an operation's q, k or v, multiplied by a factor. Its results are right."""

    def make(op: str, argument: str, factor: float) -> Any:
        class Wrong(delegate):
            def _run(self, ran: str, *args: Any, **options: Any) -> Any:
                if ran == op:
                    q, k, v, *others = args
                    named = {"q": q, "k": k, "v": v}
                    x = named[argument]
                    named[argument] = x.detach() + factor * (x - x.detach())
                    args = *named.values(), *others
                return super()._run(ran, *args, **options)

        return Wrong("wrong")

    return make


def test_rounding_otherwise_is_no_difference(use: Callable, wide: Any) -> None:
    expected(EARLY)
    use(wide)
    assert first_difference(EARLY) is None
    assert {*BRANCHES, "select_blocks", "combine"} <= set(wide.ran)


@pytest.mark.parametrize("run", [EARLY, pytest.param(FEW, marks=pytest.mark.slow)], ids=["early", "few"])
@pytest.mark.parametrize("op", BRANCHES)
@pytest.mark.parametrize("argument, factor", [("q", 0.0), ("k", 0.0), ("v", 0.0), ("v", 0.99)])
def test_a_wrong_gradient_is_a_difference(
    argument: str, factor: float, op: str, run: Run, use: Callable, wrong: Callable
) -> None:
    """One that is dropped, and a hundredth of one."""
    expected(run)
    use(wrong(op, argument, 1.0))
    assert first_difference(run) is None, "not the factor makes the difference"
    use(wrong(op, argument, factor))
    assert first_difference(run) is not None


def test_moved_choices_allow_more_but_no_wrong_gradient(use: Callable, wrong: Callable) -> None:
    """As on a GPU, where among thousands of queries some scores are so near that rounding chooses."""
    moved = EARLY._replace(moved=1)
    assert expected(moved)[0][1] > 10 * expected(EARLY)[0][1]
    for op in BRANCHES:
        use(wrong(op, "v", 0.0))
        assert first_difference(moved) is not None


@pytest.mark.slow
@pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")
def test_triton_learns_the_same_in_the_interpreter(flags: Callable) -> None:
    expected(FEW)
    flags(BACKEND="triton")
    assert first_difference(FEW) is None


@pytest.mark.slow
def test_hundreds_of_steps_are_no_difference_and_teach_more_than_frequencies(use: Callable, wide: Any) -> None:
    losses = [loss for loss, _ in expected(LONG)]
    assert sum(losses[-20:]) / 20 < byte_frequencies() < sum(losses[:5]) / 5
    use(wide)
    assert first_difference(LONG) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_triton_learns_the_same_on_a_gpu(flags: Callable) -> None:
    losses = [loss for loss, _ in expected(ON_GPU)]
    assert sum(losses[-20:]) / 20 < byte_frequencies()
    flags(BACKEND="triton")
    assert first_difference(ON_GPU) is None
