"""LLaMA 3 from scratch: the one model that both drafts and verifies.

Read top to bottom: the configuration, RoPE, one decoder layer, the KV cache, the whole model, and last
how Hugging Face files become weights. Three things are here for CLaSp (arXiv 2505.24196):

* ``forward(skip=...)`` leaves out decoder layers. The draft model *is* this model with a skip set.
* ``KVCache.length`` is an integer. Everything at or past it is scratch, so rolling back a rejected draft is one
  assignment, and the layer-selection DP may compute in the slots behind it.
* A layer takes any rows, their RoPE angles, the cache slot where they start and a mask over the slots. A draft step
  (1 row), a verify pass (K+1 rows, causal), the DP (M rows at *one* position that must not see each other) and training
  (a batch, no cache) are the same code with another mask.

Shapes: ``batch`` is 1 except in training; ``rows`` are tokens, or the DP's candidates; ``slots`` the places of the cache.
"""
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
         "model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
BLOCK = 128                   # slots: the cache is sized in such blocks, and verify passes look over whole ones


class ModelError(Exception):
    """A model that cannot be used, said in one line that is meant for the user."""


@dataclass(frozen=True)
class Config:
    """The fields of a LLaMA ``config.json`` that change what the model computes."""
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


def inverse_frequencies(config: Config) -> Tensor:
    """RoPE's angle per position for each pair of dimensions: float32 (head_dim / 2,).

    With ``rope_scaling`` LLaMA 3.1's rule: wavelengths longer than the old context are slowed by ``factor``, short ones
    stay, and those between are blended.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequencies = 1.0 / config.rope_theta ** exponent
    if config.rope_scaling is None:
        return frequencies
    s = config.rope_scaling
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    turns = s["original_max_position_embeddings"] * frequencies / (2 * torch.pi)  # in the old context
    keep = ((turns - low) / (high - low)).clamp(0, 1)                             # 1: fast, unchanged
    return frequencies * (keep + (1 - keep) / s["factor"])


def rope_table(config: Config, length: int, device=None, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """cos and sin for positions 0 .. length-1, each (length, head_dim).

    The first half of ``sin`` is negated here, so that ``rotate`` is two multiplications and a roll.
    """
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse_frequencies(config))
    cos, sin = angles.cos(), angles.sin()
    return (torch.cat((cos, cos), dim=-1).to(device, dtype), torch.cat((-sin, sin), dim=-1).to(device, dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in Hugging Face's layout, where dimension i is paired with i + head_dim/2.

    x (batch, heads, rows, head_dim); cos, sin (rows, head_dim) from ``rope_table``.
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention: q (batch, heads, rows, head_dim); k, v (batch, kv_heads, slots, head_dim) -> q's shape.

    mask (rows, slots) is added to the scores: 0 where a row may look, -inf elsewhere. None: a single row sees
    everything, and of several, which then start at slot 0, each sees those up to itself.
    """
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1, enable_gqa=True)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class DecoderLayer(nn.Module):
    """Attention and a SwiGLU feed-forward block, each behind an RMSNorm and a residual connection.

    q, k, v are one matrix and so are gate and up: two large products are cheaper than five small ones.
    """
    attend = staticmethod(attention)

    def __init__(self, config: Config):
        super().__init__()
        self.head_dim = config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        dim, inner = config.hidden_size, config.intermediate_size
        self.attention_norm = RMSNorm(dim, config.rms_norm_eps)
        self.qkv = nn.Linear(dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.o = nn.Linear(self.heads * self.head_dim, dim, bias=False)
        self.mlp_norm = RMSNorm(dim, config.rms_norm_eps)
        self.gate_up = nn.Linear(dim, 2 * inner, bias=False)
        self.down = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, store=None) -> Tensor:
        """x (batch, rows, hidden) -> the same shape.

        cos, sin (rows, head_dim): RoPE at each row's position. ``store(k, v)`` puts the rows' keys and values into the
        cache and returns those of all slots; without it the rows are all there is. mask (rows, slots): see ``attention``.
        """
        return self.mlp_block(self.attention_block(x, cos, sin, mask, store))

    def attention_block(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, store=None) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        # q, k and v are (batch, their heads, rows, head_dim); q and k are rotated as one
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        q, k = rotate(qk, cos, sin).split((self.heads, self.kv_heads), dim=1)
        if store is not None:
            k, v = store(k, v)                                 # (batch, kv_heads, slots, head_dim)
        return x + self.o(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))

    def mlp_block(self, x: Tensor, *_) -> Tensor:
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class KVCache:
    """Keys and values of every layer, allocated once for a whole generation, and the RoPE angles of all positions.

    ``length`` tokens are valid; what lies behind them is scratch. Rolling back is ``cache.length = n``.
    There are slots for ``tokens``, in whole blocks, and for scratch rows behind them: one for each layer, or ``rows`` (of
    a pass, or the DP's budget) if that is more. A slot takes 2 * layers * kv_heads * head_dim numbers.
    """

    def __init__(self, model: "Llama", tokens: int, rows: int = 1):
        c, like = model.config, model.embed.weight
        self.tokens, self.rows = -(-tokens // BLOCK) * BLOCK, max(rows, c.num_hidden_layers)
        capacity = self.tokens + self.rows
        self.slots = like.new_zeros(2, len(model.layers), 1, c.num_key_value_heads, capacity, c.head_dim)
        self.keys, self.values = self.slots[0].unbind(), self.slots[1].unbind()                        # by layer
        self.cos, self.sin = rope_table(c, capacity, like.device, like.dtype)
        self.length = 0

    def put(self, layer: int, slot: int, end: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (1, kv_heads, rows, head_dim) at slot .. slot+rows; return all slots before ``end``."""
        self.keys[layer][:, :, slot:slot + k.shape[2]] = k
        self.values[layer][:, :, slot:slot + k.shape[2]] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class Llama(nn.Module):
    """Embedding, decoder layers, final norm and head. The head shares the embedding's weights if tied."""
    block_costs: tuple[int, int] | None = None      # None: layers are skipped whole; else what skipping an attention and an
    # MLP block saves, two whole numbers, and these are skipped one by one

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False)
        if not self.embed.weight.is_meta:               # a random start there would import torch._dynamo: 1.5 s
            nn.init.normal_(self.embed.weight)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def parts(self) -> list:
        """What can be skipped, in order: the L layers, or their 2 L blocks. All are called as a layer is."""
        if self.block_costs is None:
            return list(self.layers)
        return [block for layer in self.layers for block in (layer.attention_block, layer.mlp_block)]

    def layer_of(self, part: int) -> int:
        return part if self.block_costs is None else part // 2

    def forward(self, tokens: Tensor, cache: KVCache | None = None, skip=(), slots: int | None = None) -> list[Tensor]:
        """tokens (batch, rows) -> hidden states h_0 .. h_L, each (batch, rows, hidden); see ``logits``.

        With a cache (batch 1) the rows continue it: they take the slots and positions from cache.length on, and move it
        forward. Attention reads ``slots`` slots, those past a row masked; by default just the filled ones. Layers
        (``parts``) whose index is in ``skip`` are left out; their slots keep what they held, and the state stays.
        """
        rows, x = tokens.shape[1], self.embed(tokens)
        if cache is None:
            start, end, mask = 0, rows, None
            cos, sin = rope_table(self.config, rows, x.device, x.dtype)
        else:
            start, end, mask = cache.length, slots or cache.length + rows, None     # one row sees all; from slot 0 on, causal
            cos, sin = cache.cos[start:start + rows], cache.sin[start:start + rows]
            if slots or (rows > 1 and start > 0):      # row r sees slots 0 .. start + r
                mask = torch.full((rows, end), -torch.inf, dtype=x.dtype, device=x.device).triu(start + 1)
            cache.length += rows
        states = [x]
        for i, part in enumerate(self.parts):
            if i not in skip:
                x = part(x, cos, sin, mask, None if cache is None else partial(cache.put, self.layer_of(i), start, end))
            states.append(x)
        return states

    def logits(self, state: Tensor) -> Tensor:
        """Final norm and head: (..., hidden) -> (..., vocabulary)."""
        state = self.norm(state)
        return F.linear(state, self.embed.weight) if self.head is None else self.head(state)


# ---------------------------------------------------------------------------- Hugging Face folders

def find_folder(name: str) -> Path:
    """A folder as it is; a Hugging Face repo id ("owner/name") is downloaded, or found in its cache. Else ModelError."""
    try:
        folder = Path(name).expanduser()
        if folder.is_dir():
            return folder
        is_file = folder.exists()
    except (OSError, RuntimeError) as error:                   # not allowed to look, name too long, ~nobody
        raise ModelError(f"no folder {name} ({error})") from None
    if is_file or name.startswith((".", "/", "~")) or name.count("/") != 1 or name.endswith("/"):
        raise ModelError(f"no folder {name}: --model takes a folder or a Hugging Face repo id, owner/name")
    from huggingface_hub import errors, snapshot_download      # a second to import, and only needed here
    try:
        read_config(Path(snapshot_download(name, allow_patterns=["config.json"])))    # before gigabytes follow
        return Path(snapshot_download(name, allow_patterns=FILES))
    except ModelError:
        raise
    except errors.GatedRepoError:
        raise ModelError(f"{name} is gated: accept its licence at huggingface.co, then log in with `hf auth login`") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise ModelError(f"{name} is neither a folder nor a model on huggingface.co (if private: `hf auth login`)") from None
    except Exception as error:                                 # its network layers raise many unrelated types
        raise ModelError(f"{name} is not a folder here and could not be downloaded ({type(error).__name__}): check "
                         "the network and HF_HUB_OFFLINE, or pass a folder") from None


def read_json(path: Path) -> dict:
    """A JSON object from a file; {} if there is none. Raises ModelError if it is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (ValueError, OSError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object")
    return value


def read_config(folder: Path) -> Config:
    """config.json -> Config. Refuses, by name, whatever this file would compute wrongly (ModelError)."""
    path = folder / "config.json"
    raw = read_json(path)
    if not raw:
        raise ModelError(f"{path} is missing or empty: a model folder holds config.json, *.safetensors, tokenizer.json")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}      # the new name, the old name
    if not isinstance(rope, dict):
        raise ModelError(f"{path}: the RoPE fields are no object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    for wrong, what in (
            (raw.get("model_type") != "llama", f"model_type {raw.get('model_type')!r}, not 'llama'"),
            (raw.get("attention_bias"), "attention biases"),
            (raw.get("mlp_bias"), "MLP biases"),
            (raw.get("hidden_act", "silu") != "silu", f"activation {raw.get('hidden_act')!r}, not 'silu'"),
            (raw.get("partial_rotary_factor", 1) != 1, "rotating only a part of each head"),
            (raw.get("quantization_config"), "quantised weights"),
            (kind not in ("default", "llama3"), f"rope_type {kind!r}, not 'default' or 'llama3'")):
        if wrong:
            raise ModelError(f"{path}: unsupported: {what}")
    try:
        sizes = {key: raw[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                           "num_attention_heads", "max_position_embeddings")}
        heads = sizes["num_attention_heads"]
        sizes["num_key_value_heads"] = raw.get("num_key_value_heads") or heads
        sizes["head_dim"] = raw.get("head_dim") or sizes["hidden_size"] // heads
        if not all(isinstance(size, int) and size > 0 for size in sizes.values()):
            raise ValueError(f"sizes must be positive integers, not {sizes}")
        if heads % sizes["num_key_value_heads"] or sizes["head_dim"] % 2:
            raise ValueError("key-value heads must divide the heads, and head_dim must be even")
        scaling = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return Config(**sizes, rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
                      rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
                      rope_scaling={key: float(rope[key]) for key in scaling} if kind == "llama3" else None,
                      tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)))
    except KeyError as error:
        raise ModelError(f"{path}: the field {error} is missing") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"{path}: {error}") from None


def named_weights(model: Llama) -> dict[str, Tensor]:
    """Hugging Face's tensor names -> views of the model's weights, to be filled or saved."""
    c = model.config
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    weights = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight}
    if model.head is not None:
        weights["lm_head.weight"] = model.head.weight
    for i, layer in enumerate(model.layers):
        views = dict(zip(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), layer.qkv.weight.split((q, kv, kv))))
        views |= dict(zip(("mlp.gate_proj", "mlp.up_proj"), layer.gate_up.weight.chunk(2)))
        views |= {"self_attn.o_proj": layer.o.weight, "mlp.down_proj": layer.down.weight,
                  "input_layernorm": layer.attention_norm.weight, "post_attention_layernorm": layer.mlp_norm.weight}
        weights |= {f"model.layers.{i}.{name}.weight": view for name, view in views.items()}
    return {name: view.detach() for name, view in weights.items()}


def load_model(folder: Path, device="cpu", dtype=torch.float32) -> Llama:
    """The model of a Hugging Face folder, on a device and in a dtype, ready for inference.

    Tensors are read from the memory-mapped files one by one, so the weights are never held twice. Raises ModelError for a
    missing, damaged or unsupported config.json or weight file, and for missing, unknown and wrongly shaped tensors.
    """
    with torch.device("meta"):
        model = Llama(read_config(folder))                     # no memory yet; ``to`` and ``to_empty`` would import for 0.5 s
    model = model._apply(lambda weight: torch.empty(weight.shape, dtype=dtype, device=device)).requires_grad_(False).eval()
    wanted = named_weights(model)
    index = read_json(folder / "model.safetensors.index.json")
    shards = index.get("weight_map") if index else {"": "model.safetensors"}
    if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
        raise ModelError(f"{folder / 'model.safetensors.index.json'}: no weight_map from names to files")
    files = sorted(set(shards.values()))
    for path in (folder / file for file in files):
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():
                    if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and model.head is None):
                        continue                               # derived; or tied, and then not used
                    if name not in wanted:
                        raise ModelError(f"{path}: unexpected tensor {name} (seen twice, or not a plain LLaMA?)")
                    tensor, place = tensors.get_tensor(name), wanted.pop(name)
                    if tensor.shape != place.shape or not tensor.is_floating_point():
                        raise ModelError(f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, "
                                         f"config.json implies floats {tuple(place.shape)}")
                    place.copy_(tensor)
        except FileNotFoundError:
            raise ModelError(f"{path} is missing") from None
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: damaged or truncated ({error})") from None
    if wanted:
        raise ModelError(f"{folder}: no weights for {next(iter(wanted))}" + f" and {len(wanted) - 1} more" * (len(wanted) > 1))
    return model
