"""LLaMA 3 from scratch: the one model that both drafts and verifies.

Read top to bottom: the configuration, RoPE, attention, one decoder layer, the KV cache, the whole
model. How the files of a Hugging Face folder become such a model is checkpoint.py's business.

Three things are here for CLaSp (arXiv 2505.24196):

* ``forward(skip=...)`` leaves out decoder layers. The draft model *is* this model with a skip set.
* ``KVCache.length`` is an integer, and all that lies at or past it is scratch. So rolling back a
  rejected draft is one assignment.
* A layer takes any rows, their RoPE angles, the cache slots where they go and a mask over all
  slots. A draft step (1 row), a verify pass (K+1 rows, causal), the candidates of the DP (M rows at
  *one* position that must not see each other) and training (a batch, no cache) are the same code.

Shapes: ``batch`` is 1 except in training; ``rows`` are tokens, or the DP's candidates; ``slots``
are the places of the cache.
"""
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 128          # slots: the cache has whole blocks of them, and exact passes see whole blocks
ALIGNED = 8          # rows of masks begin at multiples of so many: GPUs' kernels copy others first


class ModelError(Exception):
    """A model that cannot be used, said in one line that is meant for the user."""


@dataclass(frozen=True)
class Config:
    """The fields of a LLaMA ``config.json`` that this project needs, by their names there."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: dict | None = None     # None, or the fields of rope_type "llama3"
    tie_word_embeddings: bool = False

    @property
    def layer_shapes(self) -> list[tuple[int, int]]:
        """Rows and columns of a layer's matrices."""
        hidden = self.hidden_size
        inner = self.intermediate_size
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        return [
            (queries + 2 * keys, hidden),                    # q, k and v in one
            (hidden, queries),                               # o
            (2 * inner, hidden),                             # gate and up in one
            (hidden, inner),                                 # down
        ]

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of one layer."""
        return sum(rows * columns for rows, columns in self.layer_shapes)


def inverse_frequencies(config: Config) -> Tensor:
    """RoPE's angle per position for each pair of dimensions: float32 (head_dim / 2,).

        theta_i = rope_theta ^ (-2 i / head_dim)

    With ``rope_scaling``, LLaMA 3.1's rule for contexts longer than the one that the model was
    first trained on, ``original_max_position_embeddings``: pairs that turn less than
    ``low_freq_factor`` times in that are slowed down by ``factor``, those that turn more than
    ``high_freq_factor`` times stay, and those between are blended.
    """
    even = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / config.rope_theta ** (even / config.head_dim)
    if config.rope_scaling is None:
        return frequencies
    scaling = config.rope_scaling
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * torch.pi)
    unchanged = ((turns - low) / (high - low)).clamp(0, 1)       # 1: a fast pair, kept as it is
    return frequencies * (unchanged + (1 - unchanged) / scaling["factor"])


def rope_table(
    config: Config, length: int, device=None, dtype=torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE's angles for positions 0 .. length-1, each (length, head_dim).

    The first half of ``sin`` is negated here, so that ``rotate`` is two products and a roll.
    """
    positions = torch.arange(length, dtype=torch.float32, device="cpu")
    angles = torch.outer(positions, inverse_frequencies(config))       # (length, head_dim / 2)
    cos = torch.cat((angles.cos(), angles.cos()), dim=-1)
    sin = torch.cat((-angles.sin(), angles.sin()), dim=-1)
    return cos.to(device, dtype), sin.to(device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: turn each pair of dimensions (a, b) by its position's angle t.

        (a, b)  ->  (a cos t - b sin t,  b cos t + a sin t)

    In Hugging Face's layout dimension i is paired with i + head_dim/2.
    x (batch, heads, rows, head_dim); cos, sin (rows, head_dim) from ``rope_table``.
    """
    half = x.shape[-1] // 2
    return x * cos + x.roll(half, dims=-1) * sin


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention: softmax(q k^T / sqrt(head_dim) + mask) v.

    q (batch, heads, rows, head_dim); k, v (batch, kv_heads, slots, head_dim); returns q's shape.
    Query head h reads key-value head h // (heads / kv_heads).

    mask (rows, slots): 0 where a row may look, -inf elsewhere. None: one row sees all slots;
    several rows, of just as many slots, are causal: row r sees slots 0 .. r.
    """
    causal = mask is None and q.shape[2] > 1
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps), each row by itself."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class DecoderLayer(nn.Module):
    """Attention and a SwiGLU feed-forward block, each behind an RMSNorm and added to its input.

    q, k, v are one matrix and so are gate and up: two large products are cheaper than five small.
    """
    attend = staticmethod(attention)     # extras exchange it for a faster form on some devices

    def __init__(self, config: Config):
        super().__init__()
        self.head_dim = config.head_dim
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        dim = config.hidden_size
        inner = config.intermediate_size
        self.attention_norm = RMSNorm(dim, config.rms_norm_eps)
        self.qkv = nn.Linear(dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.o = nn.Linear(self.heads * self.head_dim, dim, bias=False)
        self.mlp_norm = RMSNorm(dim, config.rms_norm_eps)
        self.gate_up = nn.Linear(dim, 2 * inner, bias=False)
        self.down = nn.Linear(inner, dim, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, store=None
    ) -> Tensor:
        """x (batch, rows, hidden) -> the same shape.

        cos, sin (rows, head_dim): RoPE at each row's position. mask (rows, slots): see
        ``attention``. ``store(k, v)`` puts the rows' keys and values into the cache and returns
        the cache's, of all slots; without it the rows see only each other.
        """
        x = self.attention_block(x, cos, sin, mask, store)
        return self.mlp_block(x)

    def attention_block(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, store=None
    ) -> Tensor:
        """x + o(attention of the normed x). Keys are cached after their rotation."""
        qkv = self.qkv(self.attention_norm(x))               # (batch, rows, all heads * head_dim)
        qkv = qkv.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        # each (batch, its heads, rows, head_dim)
        q, k = rotate(qk, cos, sin).split((self.heads, self.kv_heads), dim=1)
        if store is not None:
            k, v = store(k, v)                               # (batch, kv_heads, slots, head_dim)
        heads = self.attend(q, k, v, mask)                   # (batch, heads, rows, head_dim)
        return x + self.o(heads.transpose(1, 2).flatten(2))

    def mlp_block(self, x: Tensor) -> Tensor:
        """x + down(silu(gate) * up), gate and up made of the normed x."""
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class KVCache:
    """Keys and values of every layer, allocated once for a whole text, and RoPE of all positions.

    The first ``length`` slots are valid; those after them are scratch. Rolling back is
    ``cache.length = n``.

    There are slots for ``tokens``, in whole blocks, and behind them at least ``scratch`` more: for
    the padding of a wide pass, or for the DP, which needs M of each of its T tokens. One for each
    layer is always there. A slot takes 2 * layers * kv_heads * head_dim numbers.
    """

    def __init__(self, model: "Llama", tokens: int, scratch: int = 1):
        c = model.config
        weight = model.embed.weight
        self.tokens = whole_blocks(tokens)
        self.scratch = max(scratch, c.num_hidden_layers)
        capacity = round_up(self.tokens + self.scratch, ALIGNED)
        self.slots = weight.new_zeros(
            2, c.num_hidden_layers, 1, c.num_key_value_heads, capacity, c.head_dim)
        self.keys = self.slots[0].unbind()               # by layer: (1, kv_heads, slots, head_dim)
        self.values = self.slots[1].unbind()
        self.cos, self.sin = rope_table(c, capacity, weight.device, weight.dtype)
        self.length = 0

    def put(self, layer: int, slot: int, end: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (1, kv_heads, rows, head_dim) from ``slot`` on; return slots 0 .. end-1.

        Rows that are padding may lie past ``end``.
        """
        rows = k.shape[2]
        self.keys[layer][:, :, slot:slot + rows] = storable(k)
        self.values[layer][:, :, slot:slot + rows] = storable(v)
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def has_overflowed(self, start: int, end: int) -> bool:
        """Were keys or values of these slots too large for float16?  See ``storable``."""
        if self.slots.dtype != torch.float16 or start == end:
            return False
        return bool(self.slots[..., start:end, :].abs().amax() >= LARGEST_FLOAT16)


LARGEST_FLOAT16 = 65504.0


def storable(x: Tensor) -> Tensor:
    """Keys or values as they go into the cache: in float16 with its largest number for an overflow.

    A draft's wrong token may overflow where the text itself does not. Rows before it do not look
    there, but a masked NaN would spoil them all the same: -inf + NaN and 0 * NaN are NaN. If the
    text itself overflows, ``KVCache.has_overflowed`` tells.
    """
    if x.dtype != torch.float16:
        return x
    return x.nan_to_num(nan=LARGEST_FLOAT16, posinf=LARGEST_FLOAT16, neginf=-LARGEST_FLOAT16)


def whole_blocks(slots: int) -> int:
    """The least multiple of BLOCK that is at least ``slots``."""
    return round_up(slots, BLOCK)


def round_up(count: int, step: int) -> int:
    """The least multiple of ``step`` that is at least ``count``."""
    return -(-count // step) * step


class Llama(nn.Module):
    """Embedding, decoder layers, final norm and head. A tied head is the embedding's own matrix."""
    clock = None         # where several processes share a model: a function that shows one time

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        weight = torch.empty(config.vocab_size, config.hidden_size)
        if not weight.is_meta:           # else this would import torch._dynamo, for 1.5 s
            nn.init.normal_(weight)
        self.embed = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = None
        if not config.tie_word_embeddings:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        skip: Collection[int] = (),
        slots: int | None = None,
    ) -> list[Tensor]:
        """tokens (batch, rows) -> hidden states h_0 .. h_L, each (batch, rows, hidden).

        ``logits`` makes predictions of the last. Layers whose index is in ``skip`` are left out:
        the state stays as it was, and so do their slots.

        With a cache (batch 1) the rows continue it: they take the slots and positions from
        cache.length on, and move it forward. Attention reads the cache's first ``slots`` slots, and
        those after a row are masked; by default it reads just the filled ones. Rows that are
        padding may lie past ``slots``.
        """
        x = self.embed(tokens)                                            # (batch, rows, hidden)
        rows = tokens.shape[1]
        mask = None
        if cache is None:
            start, end = 0, rows
            cos, sin = rope_table(self.config, rows, x.device, x.dtype)
        else:
            start = cache.length
            end = slots or start + rows
            cos, sin = cache.cos[start:start + rows], cache.sin[start:start + rows]
            needs_no_mask = rows == 1 or start == 0                       # see ``attention``
            if slots or not needs_no_mask:
                mask = causal_mask(start, rows, end, x)
            cache.length = start + rows
        states = [x]
        for i, layer in enumerate(self.layers):
            if i not in skip:
                store = None if cache is None else partial(cache.put, i, start, end)
                x = layer(x, cos, sin, mask, store)
            states.append(x)
        return states

    def logits(self, state: Tensor) -> Tensor:
        """Final norm and head: (..., hidden) -> (..., vocabulary)."""
        state = self.norm(state)
        if self.head is None:
            return F.linear(state, self.embed.weight)
        return self.head(state)

    def candidate_layer(
        self, cache: KVCache, count: int, tokens: int = 1
    ) -> Callable[[int, Tensor], Tensor]:
        """A function layer(i, candidates): decoder layer i on candidate states of one token.

        This is what the DP (dp_skip.py) runs, §3.6: candidates (m, hidden) -> the same shape, for
        any m <= count. The token is the last in the cache, and all its candidates stand at its
        position p = cache.length - 1. Each sees the true keys and values before p. It does not see
        those at p, which belong to the true state. It sees its own: each has a scratch slot after
        the valid ones, which no other candidate sees.

                       slots  0 .. p-1   p   p+1 p+2 p+3
            candidate 0       █ █ █ █    ░    █   ░   ░
            candidate 1       █ █ █ █    ░    ░   █   ░        █ seen, ░ masked
            candidate 2       █ █ █ █    ░    ░   ░   █

        Of several ``tokens``, the last T in the cache: candidates (m, T, hidden). Each is T rows,
        and each row is as above, at its own token's position p, in a scratch slot of its own.
        """
        n = cache.length
        rows = count * tokens
        position = torch.arange(n - tokens, n, device=self.device).repeat(count)      # of each row
        cos, sin = cache.cos[position], cache.sin[position]               # (rows, head_dim)
        before = torch.arange(n, device=self.device) < position[:, None]
        mask = masked(rows, n + rows, cos)
        mask[:, :n].masked_fill_(before, 0)
        mask[:, n:].fill_diagonal_(0)

        def layer(i: int, candidates: Tensor) -> Tensor:
            x = candidates.flatten(end_dim=-2)                            # (m * T, hidden)
            m = len(x)
            store = partial(cache.put, i, n, n + m)
            x = self.layers[i](x[None], cos[:m], sin[:m], mask[:m, :n + m], store)
            return x.view_as(candidates)

        return layer


def causal_mask(start: int, rows: int, slots: int, x: Tensor) -> Tensor:
    """(rows, slots): row r, which lies in slot start + r, sees the slots up to its own.

    A row that lies past them all sees all.
    """
    return masked(rows, slots, x).triu_(start + 1)


def masked(rows: int, slots: int, x: Tensor) -> Tensor:
    """(rows, slots) of -inf, in x's dtype and on its device."""
    return x.new_full((rows, round_up(slots, ALIGNED)), -torch.inf)[:, :slots]
