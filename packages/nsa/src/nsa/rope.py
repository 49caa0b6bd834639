"""Rotary position embedding, with the frequency scalings of long-context models."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from nsa_varlen.keeping import outside_inference
from torch import Tensor, nn

if TYPE_CHECKING:
    from nsa.config import NSAConfig

SCALINGS = ("default", "linear", "llama3", "yarn")
_tables: WeakValueDictionary[tuple[Any, ...], Tensor] = WeakValueDictionary()  # kept alive by those who use them


class RotaryEmbedding(nn.Module):
    """Rotates the pairs of each head's row by position * frequency, frequency[i] = theta^(-2i / D).

    Pairs are (i, i + D/2), or (2i, 2i + 1) if `interleaved`. Angles are computed in fp64, so that far positions stay
    as exact as near ones.

    Args:
        head_dim: D, even.
        theta: base of the frequencies.
        interleaved: which dimensions form a pair.
        scaling: None, or transformers' mapping: `rope_type` one of "default", "linear" (factor), "llama3" (factor,
            low_freq_factor, high_freq_factor, original_max_position_embeddings), "yarn" (factor,
            original_max_position_embeddings, beta_fast, beta_slow, attention_factor, mscale, mscale_all_dim,
            truncate).

    Raises:
        ValueError: an unknown rope_type ("dynamic" and "longrope" change the frequencies with the length, which keys
            already in a cache cannot follow), or a missing, unknown or unusable key.

    Example:
        >>> rope = RotaryEmbedding(2, theta=10_000.0)
        >>> x = torch.tensor([[[1.0, 0.0]]])
        >>> rope(x, torch.tensor([0])).flatten().tolist()
        [1.0, 0.0]
    """

    frequency: Tensor

    def __init__(
        self, head_dim: int, theta: float, interleaved: bool = False, scaling: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"head_dim: expected an even number, got {head_dim}")
        # On the CPU even where new tensors go elsewhere: a layer made on "meta" must know its frequencies later.
        frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
        frequency, self.attention_factor = scale_frequency(frequency, theta, scaling or {})
        self.interleaved = interleaved
        self._exact = tuple(frequency.tolist())
        self.register_buffer("frequency", torch.tensor(self._exact, dtype=torch.float64), persistent=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x [T, H, D] by integer `positions` [T]: the same shape and dtype."""
        cos, sin = self.turns(positions[:, None], x.dtype)
        first, second = (x[..., 0::2], x[..., 1::2]) if self.interleaved else x.chunk(2, dim=-1)
        rotated = (first * cos - second * sin, second * cos + first * sin)
        out = torch.stack(rotated, -1).flatten(-2) if self.interleaved else torch.cat(rotated, -1)
        return out.to(x.dtype)

    def turns(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cosines, sines) at integer `positions` [...] by which rows of `dtype` are rotated: [..., D / 2].

        fp64 for fp64, fp32 for all others.
        """
        angle = positions.double()[..., None] * self.frequency.to(positions.device, torch.float64)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        cos, sin = ((f * self.attention_factor).to(wide) for f in (angle.cos(), angle.sin()))
        return cos, sin

    @outside_inference
    def table(self, count: int, stride: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """`turns` at positions 0, stride, ..., (count - 1) * stride: [2, count, D / 2].

        Made once, as long as somebody holds it: the caches of all layers have the same.
        """
        key = self._exact, self.attention_factor, count, stride, device, dtype
        known = _tables.get(key)
        if known is None:
            positions = torch.arange(count, device=device) * stride
            _tables[key] = known = torch.stack(self.turns(positions, dtype))
        return known

    def _apply(self, fn: Any, recurse: bool = True) -> "RotaryEmbedding":
        # `.half()` converts and `.to_empty()` drops what it finds; frequencies stay exact and only follow the device.
        super()._apply(fn, recurse)
        self.frequency = torch.tensor(self._exact, dtype=torch.float64, device=self.frequency.device)
        return self


def make_rope(config: "NSAConfig") -> RotaryEmbedding | None:
    """The rotation that a configuration asks for."""
    if config.rope_theta is None:
        return None
    return RotaryEmbedding(config.head_dim, config.rope_theta, config.rope_interleaved, config.rope_scaling)


def scale_frequency(frequency: Tensor, theta: float, mapping: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Frequencies scaled as `RotaryEmbedding` says, and the factor on cos and sin."""
    scaling = dict(mapping)
    kind = scaling.pop("rope_type", scaling.pop("type", "default" if not scaling else None))
    stated_theta = scaling.pop("rope_theta", theta)
    if stated_theta != theta:
        raise ValueError(f"rope_scaling: expected rope_theta to be {theta}, got {stated_theta!r}")
    if kind == "default":
        scaled, factor = frequency, 1.0
    elif kind == "linear":
        scaled, factor = frequency / _number(scaling, "factor"), 1.0
    elif kind == "llama3":
        scaled, factor = _llama3(frequency, scaling), 1.0
    elif kind == "yarn":
        scaled, factor = _yarn(frequency, theta, scaling)
    else:
        raise ValueError(f"rope_scaling: expected rope_type to be one of {list(SCALINGS)}, got {kind!r}")
    if scaling:
        raise ValueError(f"rope_scaling: expected no other keys for rope_type {kind!r}, got {sorted(scaling)}")
    return scaled, factor


def _number(scaling: dict[str, Any], key: str, default: float | None = None) -> float:
    value = scaling.pop(key, None)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"rope_scaling: expected {key} to be a number above 0, got {value!r}")
    return float(value)


def _llama3(frequency: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Long wavelengths are divided by `factor`, short ones kept, those between blended."""
    factor, low, high, original = (
        _number(scaling, key)
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    if not high > low:
        raise ValueError(f"rope_scaling: expected high_freq_factor above low_freq_factor={low}, got {high}")
    turns = original * frequency / (2 * math.pi)  # rotations within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequency / factor + keep * frequency


def _yarn(frequency: Tensor, theta: float, scaling: dict[str, Any]) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): a ramp between interpolated and original frequencies, and a softmax temperature."""
    factor = _number(scaling, "factor")
    original = _number(scaling, "original_max_position_embeddings")
    fast, slow = _number(scaling, "beta_fast", 32.0), _number(scaling, "beta_slow", 1.0)
    if not fast > slow:
        raise ValueError(f"rope_scaling: expected beta_fast above beta_slow={slow}, got {fast}")
    truncate = scaling.pop("truncate", True)
    if type(truncate) is not bool:
        raise ValueError(f"rope_scaling: expected truncate to be a bool, got {truncate!r}")
    # A multiplier of 0 means none, as in transformers.
    mscale, mscale_all_dim = (
        _number(scaling, key) if scaling.get(key) else scaling.pop(key, None) for key in ("mscale", "mscale_all_dim")
    )
    temperature = _temperature(factor, 1.0)
    if mscale and mscale_all_dim:
        temperature = _temperature(factor, mscale) / _temperature(factor, mscale_all_dim)
    attention_factor = _number(scaling, "attention_factor", temperature)

    size = frequency.shape[0]

    def dimension_of(turns: float) -> float:
        return size * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    low, high = dimension_of(fast), dimension_of(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * size - 1)
    place = torch.arange(size, dtype=torch.float64, device=frequency.device)
    ramp = ((place - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequency / factor * ramp + frequency * (1 - ramp), attention_factor


def _temperature(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
