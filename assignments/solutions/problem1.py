"""Problem 1 once more."""
import math

import torch

import model
from solutions.common import solves


@solves("model.RMSNorm.forward")
def rms_norm(self, x):
    wide = x.float()
    square = wide.pow(2).mean(-1, keepdim=True)
    scaled = wide / (square + self.eps).sqrt()
    return scaled.type_as(x) * self.weight


rms_norm.mistake(
    "mean subtracted",
    ("square =", "wide = wide - wide.mean(-1, keepdim=True)\n    square ="))
rms_norm.mistake(
    "eps outside the root",
    ("(square + self.eps).sqrt()", "(square.sqrt() + self.eps)"))
rms_norm.mistake(
    "sum in place of the mean",
    ("mean(-1, keepdim=True)", "sum(-1, keepdim=True)"))
rms_norm.mistake(
    "weight forgotten",
    (" * self.weight", ""))
rms_norm.mistake(
    "in float32 for good",
    (".type_as(x)", ""))
rms_norm.mistake(
    "squares in the dtype of x",
    ("wide = x.float()", "wide = x"))
rms_norm.mistake(
    "mean over all axes",
    ("mean(-1, keepdim=True)", "mean()"))


def scaled_frequencies(config, least, most):
    """Those of model.py, with other bounds on the share of a frequency that stays."""
    unscaled = config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return unscaled
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * unscaled / (2 * torch.pi)
    stays = ((turns - low) / (high - low)).clamp(least, most)
    return unscaled * (stays + (1 - stays) / scaling["factor"])


@solves("model.rope_table")
def rope_table(config, length, device=None, dtype=torch.float32):
    frequencies = model.inverse_frequencies(config)
    positions = torch.arange(length).float()
    angles = positions[:, None] * frequencies
    both = torch.cat((angles, angles), -1)
    sign = torch.ones(config.head_dim)
    sign[:config.head_dim // 2] = -1
    sin = both.sin() * sign
    return both.cos().to(device, dtype), sin.to(device, dtype)


rope_table.mistake(
    "RoPE off by one",
    ("arange(length)", "arange(1, length + 1)"))
rope_table.mistake(
    "sin not negated",
    (" = -1", " = 1"))
rope_table.mistake(
    "angles in bfloat16",
    (".float()", ".to(dtype).float()"))
rope_table.mistake(
    "rope_scaling forgotten",
    ("model.inverse_frequencies(config)",
     "config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)"))
for _title, _bounds in (
    ("fast pairs made faster by rope_scaling", "0, math.inf"),
    ("slow pairs slowed down too much by rope_scaling", "-math.inf, 1"),
    ("rope_scaling without bounds", "-math.inf, math.inf"),
):
    rope_table.mistake(
        _title,
        ("model.inverse_frequencies(config)", f"scaled_frequencies(config, {_bounds})"))
rope_table.mistake(
    "sin left in float32",
    ("sin.to(device, dtype)", "sin.to(device)"))
rope_table.mistake(
    "angles interleaved",
    ("torch.cat((angles, angles), -1)", "angles.repeat_interleave(2, -1)"))


@solves("model.rotate")
def rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    return x * cos + swapped * sin


rotate.mistake(
    "neighbouring dimensions paired",
    ("torch.cat((second, first), dim=-1)",
     "torch.stack((x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)"))
rotate.mistake(
    "rolled by two, whatever head_dim is",
    ("torch.cat((second, first), dim=-1)", "x.roll(2, dims=-1)"))
rotate.mistake(
    "halves not swapped",
    ("(second, first)", "(first, second)"))
rotate.mistake(
    "in float32 for good",
    ("x.chunk(2", "x.float().chunk(2"))
rotate.mistake(
    "turned the other way",
    ("+ swapped", "- swapped"))


@solves("model.KVCache.put")
def put(self, layer, slot, end, k, v):
    rows = k.shape[2]
    places = torch.arange(slot, slot + rows)
    self.keys[layer].index_copy_(2, places, model.storable(k))
    self.values[layer].index_copy_(2, places, model.storable(v))
    keys = self.keys[layer].narrow(2, 0, end)
    values = self.values[layer].narrow(2, 0, end)
    return keys, values


put.mistake(
    "rows past the end taken for a fault",
    ("places =", "assert slot + rows <= end\n    places ="))
put.mistake(
    "rows past the end lost",
    ("places = torch.arange(slot, slot + rows)",
     "places = torch.arange(slot, min(slot + rows, end))\n"
     "    k, v = k[:, :, :len(places)], v[:, :, :len(places)]"))
put.mistake(
    "only the new rows returned",
    ("return keys, values", "return k, v"))
put.mistake(
    "written at cache.length",
    ("places =", "slot = self.length - rows + 1\n    places ="))
put.mistake(
    "all slots returned",
    ("return keys, values", "return self.keys[layer], self.values[layer]"))
put.mistake(
    "cache.length moved as well",
    ("places =", "self.length = max(self.length, slot + rows)\n    places ="))
put.mistake(
    "values into the keys",
    ("model.storable(k)", "model.storable(v)"))
put.mistake(
    "what overflowed put into the cache",
    ("model.storable(k)", "k"),
    ("model.storable(v)", "v"))


@solves("model.attention")
def attention(q, k, v, mask):
    rows = q.shape[2]
    groups = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(groups, dim=1)
    v = v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores + mask
    elif rows > 1:
        later = torch.ones(rows, rows, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    return scores.softmax(-1) @ v


attention.mistake(
    "key-value heads in the wrong order",
    ("k.repeat_interleave(groups, dim=1)", "k.repeat(1, groups, 1, 1)"),
    ("v.repeat_interleave(groups, dim=1)", "v.repeat(1, groups, 1, 1)"))
attention.mistake(
    "each key-value head repeated as often as there are such heads",
    ("q.shape[1] // k.shape[1]", "k.shape[1]"))
attention.mistake(
    "a softmax in float32 for good",
    ("scores.softmax(-1) @ v", "scores.softmax(-1, torch.float32) @ v.float()"))
attention.mistake(
    "a softmax without the shift",
    ("return scores.softmax(-1)",
     "weights = scores.exp()\n    return weights / weights.sum(-1, keepdim=True)"))
attention.mistake(
    "a softmax shifted by the largest of all scores",
    ("return scores.softmax(-1)",
     "weights = (scores - scores.max()).exp()\n    return weights / weights.sum(-1, keepdim=True)"))
attention.mistake(
    "a mask that is no more than large",
    ("scores = scores + mask", "scores = scores.masked_fill(mask < 0, -100.0)"))
attention.mistake(
    "a number that float16 has not, for what is not seen",
    ("(later, -math.inf)", "(later, -1e9)"))
attention.mistake(
    "a causal mask in float32",
    ("scores = scores.masked_fill(later, -math.inf)",
     "scores = scores + torch.zeros(rows, rows).masked_fill(later, -math.inf)"))
attention.mistake(
    "scores not scaled",
    (" / math.sqrt(q.shape[-1])", ""))
attention.mistake(
    "causal from three rows on",
    ("elif rows > 1:", "elif rows > 2:"))
attention.mistake(
    "no causal mask",
    ("elif rows > 1:", "elif False:"))
attention.mistake(
    "a single row sees itself only",
    ("return", "if mask is None and rows == 1:\n        scores[..., :-1] = -math.inf\n    return"))
attention.mistake(
    "mask forgotten",
    ("scores + mask", "scores"))
attention.mistake(
    "a single row's mask forgotten",
    ("if mask is not None:", "if mask is not None and rows > 1:"))
attention.mistake(
    "a batch's first text only",
    ("return scores.softmax(-1) @ v", "return (scores.softmax(-1) @ v)[:1].expand(q.shape)"))
attention.mistake(
    "softmax over the rows",
    ("softmax(-1)", "softmax(-2)"))


@solves("model.DecoderLayer.attention_block")
def attention_block(self, x, cos, sin, mask=None, store=None):
    normed = self.attention_norm(x)
    sizes = [heads * self.head_dim for heads in (self.heads, self.kv_heads, self.kv_heads)]
    q, k, v = self.qkv(normed).split(sizes, dim=-1)
    q = q.unflatten(-1, (self.heads, -1)).permute(0, 2, 1, 3)
    k = k.unflatten(-1, (self.kv_heads, -1)).permute(0, 2, 1, 3)
    v = v.unflatten(-1, (self.kv_heads, -1)).permute(0, 2, 1, 3)
    q = model.rotate(q, cos, sin)
    k = model.rotate(k, cos, sin)
    if store is not None:
        k, v = store(k, v)
    seen = self.attend(q, k, v, mask)
    seen = seen.permute(0, 2, 1, 3).reshape(*x.shape[:2], -1)
    return x + self.o(seen)


attention_block.mistake(
    "no mask without a store",
    ("seen = self.attend(q, k, v, mask)",
     "seen = self.attend(q, k, v, None if store is None else mask)"))
attention_block.mistake(
    "by the weight of o",
    ("self.o(seen)", "seen @ self.o.weight.T"))
attention_block.mistake(
    "keys before queries in qkv",
    ("q, k, v = self.qkv(normed).split(sizes, dim=-1)",
     "k, q, v = self.qkv(normed).split([sizes[1], sizes[0], sizes[2]], dim=-1)"))
attention_block.mistake(
    "head_dim taken from the hidden size",
    ("heads * self.head_dim for", "heads * (x.shape[-1] // self.heads) for"))
attention_block.mistake(
    "half of qkv taken for the queries",
    ("q, k, v = self.qkv(normed).split(sizes, dim=-1)",
     "q, k, v = self.qkv(normed).split([2 * sizes[1], sizes[1], sizes[2]], dim=-1)"))
attention_block.mistake(
    "the heads together as wide as x",
    ("reshape(*x.shape[:2], -1)", "reshape(x.shape)"))
attention_block.mistake(
    "a single row's mask forgotten",
    ("self.attend(q, k, v, mask)", "self.attend(q, k, v, mask if x.shape[1] > 1 else None)"))
attention_block.mistake(
    "its result in float32",
    ("return x + self.o(seen)", "return x.float() + self.o(seen)"))
attention_block.mistake(
    "rotated in float32, and left so",
    ("q = model.rotate(q, cos, sin)", "q = model.rotate(q.float(), cos.float(), sin.float())"),
    ("k = model.rotate(k, cos, sin)", "k = model.rotate(k.float(), cos.float(), sin.float())"),
    ("self.o(seen)", "self.o(seen.to(x.dtype))"))
attention_block.mistake(
    "by attention, whatever self.attend is",
    ("self.attend(q, k, v, mask)", "model.attention(q, k, v, mask)"))
attention_block.mistake(
    "keys cached before rotation",
    ("k = model.rotate(k, cos, sin)", "unturned = k\n    k = model.rotate(k, cos, sin)"),
    ("store(k, v)", "store(unturned, v)"))
attention_block.mistake(
    "a batch's first text only",
    ("return x + self.o(seen)", "return x + self.o(seen)[:1]"))
attention_block.mistake(
    "values rotated",
    ("if store", "v = model.rotate(v, cos, sin)\n    if store"))
attention_block.mistake(
    "query not rotated",
    ("q = model.rotate(q, cos, sin)", "pass"))
attention_block.mistake(
    "mask not handed on",
    ("k, v, mask)", "k, v, None)"))
attention_block.mistake(
    "what store returns not used",
    ("k, v = store(k, v)", "store(k, v)"))
attention_block.mistake(
    "no residual around attention",
    ("return x + ", "return "))
attention_block.mistake(
    "norm on the residual too",
    ("return x + ", "return normed + "))
attention_block.mistake(
    "no norm",
    ("self.attention_norm(x)", "x"))


@solves("model.DecoderLayer.mlp_block")
def mlp_block(self, x):
    normed = self.mlp_norm(x)
    gate, up = self.gate_up(normed).tensor_split(2, dim=-1)
    inner = gate * gate.sigmoid() * up
    return x + self.down(inner)


mlp_block.mistake(
    "by the weight of down",
    ("self.down(inner)", "inner @ self.down.weight.T"))
mlp_block.mistake(
    "inside in float32",
    ("gate * gate", "gate.float() * gate"))
mlp_block.mistake(
    "SiLU on up",
    ("gate, up =", "up, gate ="))
mlp_block.mistake(
    "gate and up interleaved",
    ("gate, up = self.gate_up(normed).tensor_split(2, dim=-1)",
     "both = self.gate_up(normed)\n    gate, up = both[..., ::2], both[..., 1::2]"))
mlp_block.mistake(
    "no residual around the MLP",
    ("x + self", "self"))
mlp_block.mistake(
    "norm on the residual too",
    ("x + self", "normed + self"))
mlp_block.mistake(
    "no norm",
    ("self.mlp_norm(x)", "x"))
mlp_block.mistake(
    "the attention's norm",
    ("self.mlp_norm(x)", "self.attention_norm(x)"))
mlp_block.mistake(
    "a batch's first text only",
    ("x + self.down(inner)", "x + self.down(inner)[:1]"))
mlp_block.mistake(
    "sigmoid in place of SiLU",
    ("gate * gate.sigmoid()", "gate.sigmoid()"))
