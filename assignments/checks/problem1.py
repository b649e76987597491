"""Checks of problem 1: each part alone on cases worked out by hand, then a layer as a whole against the reference."""
from unittest import mock

import torch

from checks.common import Scale, check, close, config, equal, golden, parts, random


@check(3, "RMSNorm")
def rms_norm():
    from model import RMSNorm
    for sentence, x, weight, eps, expected in (
            ("RMSNorm divides a row by the root of its mean square", [[3., 4.]], [1., 1.], 0., [[.848528, 1.131371]]),
            ("RMSNorm does not subtract the mean", [[1., 1.]], [1., 1.], 0., [[1., 1.]]),
            ("RMSNorm multiplies each dimension by its weight", [[3., 4.]], [2., .5], 0., [[1.697056, .565685]]),
            ("RMSNorm norms each row by itself", [[3., 4.], [30., 40.]], [1., 1.], 0., [[.848528, 1.131371]] * 2),
            ("RMSNorm adds eps to the mean square, under the root", [[1., 1.]], [1., 1.], 1., [[.707107, .707107]])):
        norm = RMSNorm(2, eps)
        norm.weight.data = torch.tensor(weight)
        close(norm(torch.tensor(x)), expected, sentence, f"x = {x}, weight {weight}, eps {eps:g}", ("row", "dimension"))
    norm = RMSNorm(2, 0.)
    close(norm(torch.tensor([[[[3., 4.]]]])), [[[[.848528, 1.131371]]]], "RMSNorm takes any number of axes before the last",
          "x of shape (1, 1, 1, 2)")


@check(3, "RoPE's table of angles")
def rope_table():
    from model import rope_table as table
    for name, changes in (("rope_scaling None", {}), ("rope_scaling of LLaMA 3.1", dict(rope_scaling=dict(
            factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=16)))):
        expected = golden()["rope"][name]
        example, axes = f"head_dim 4, rope_theta 100, {name}, 4 positions", ("position", "dimension")
        cos, sin = parts(table(config(head_dim=4, rope_theta=100., **changes), 4), "rope_table", "cos, sin", example)
        close(cos[:1], expected["cos"][:1], "Position 0 is not rotated: its cos is 1", f"cos, {example}", axes)
        close(sin[:1], expected["sin"][:1], "Position 0 is not rotated: its sin is 0", f"sin, {example}", axes)
        close(cos, expected["cos"], "Position p turns pair i by p * inverse_frequencies(config)[i], and dimension i + "
              "head_dim/2 has the angle of dimension i", f"cos, {example}", axes)
        close(sin.abs(), torch.tensor(expected["sin"]).abs(), "sin has the angles of cos", f"|sin|, {example}", axes)
        close(sin, expected["sin"], "The first half of sin is negated and the second is not", f"sin, {example}", axes)
    cos, _ = table(config(head_dim=4, rope_theta=100.), 302, dtype=torch.bfloat16)
    equal(cos.dtype, torch.bfloat16, "The table comes in the dtype asked for", "dtype bfloat16")
    close(cos[301:], golden()["rope"]["cos of 301"], "Angles are computed in float32 whatever dtype the table comes in, since "
          "bfloat16 has no 301", "cos in bfloat16, 302 positions, row 301", (None, "dimension"), tolerance=0.01)


@check(2, "Rotation")
def rotate():
    from model import rotate as turn
    c0, s0, c1, s1 = .877583, .479426, -.416147, .909297       # of the angles 0.5 and 2
    cos, sin = torch.tensor([[c0, c1, c0, c1]]), torch.tensor([[-s0, -s1, s0, s1]])
    for i, expected in enumerate(([c0, 0, s0, 0], [0, c1, 0, s1], [-s0, 0, c0, 0], [0, -s1, 0, c1])):
        x = torch.eye(4)[i][None, None, None]
        close(turn(x, cos, sin), [[[expected]]], "rotate turns dimension i together with dimension i + head_dim/2, by the angle "
              "of that pair, from the first towards the second",
              f"x = {show_row(x)}, angles (0.5, 2)", (None, None, None, "dimension"))
    x = random(2, 3, 2, 4)
    cos, sin = torch.stack((torch.ones(4), cos[0])), torch.stack((torch.zeros(4), sin[0]))
    got = turn(x, cos, sin)
    axes = ("batch", "head", "row", "dimension")
    close(got[:, :, :1], x[:, :, :1], "A row with angle 0 stays, whatever the angles of the others",
          "x (2, 3, 2, 4), row 0 at angle 0, row 1 at (0.5, 2)", axes)
    close(got.norm(dim=-1), x.norm(dim=-1), "A rotation keeps each row's length", "x (2, 3, 2, 4), lengths", axes)


def show_row(x):
    return [int(v) for v in x.flatten()]


@check(2, "The cache's slots")
def put():
    from model import KVCache
    for layer, slot, end, rows in ((0, 0, 1, 1), (0, 2, 3, 1), (1, 2, 4, 2), (1, 1, 5, 2)):
        cache = KVCache.__new__(KVCache)                       # without its RoPE table, which is another function's
        cache.keys, cache.values = ([torch.full((1, 1, 6, 1), fill) for _ in range(2)] for fill in (-1., -2.))
        cache.length = 5                                       # put is told the slot, and this is not it
        k = 10. + torch.arange(rows).reshape(1, 1, rows, 1)
        example = f"put(layer {layer}, slot {slot}, end {end}) of {tuple(k.shape)} into 6 slots"
        got = parts(cache.put(layer, slot, end, k, k + 10), "put", "keys, values", example)
        for name, row, held, back, fill in (("keys", k, cache.keys, got[0], -1.), ("values", k + 10, cache.values, got[1], -2.)):
            expected = torch.full((6,), fill)
            expected[slot:slot + rows] = row.flatten()
            close(held[layer].flatten(), expected, "put writes the rows at slot .. slot+rows and leaves the other slots alone",
                  f"{example}, {name} held", ("slot",))
            close(held[1 - layer].flatten(), [fill] * 6, "put writes into one layer's slots only",
                  f"{example}, {name} of layer {1 - layer}", ("slot",))
            close(back, expected[:end].reshape(1, 1, end, 1), "put returns the slots before end, old and new",
                  f"{example}, {name} returned", (None, None, "slot"))
    equal(cache.length, 5, "put leaves cache.length to its caller", example)


def quarter_turn(x, cos, sin):
    """In rotate's place, right for the two rotations used here: none (cos 1), and a quarter (sin -1 and 1)."""
    return torch.where(cos == 1, x, torch.stack((-x[..., 1], x[..., 0]), dim=-1))


def bare_layer(norm=1., mlp_norm=1.):
    """A layer whose weights are all 0 and whose norms just multiply; and RoPE's angles of n rows that do not turn."""
    import model
    layer = model.DecoderLayer(config())
    for weight in layer.parameters():
        weight.data.zero_()
    layer.attention_norm, layer.mlp_norm = Scale(norm), Scale(mlp_norm)
    return layer, lambda n: (torch.ones(n, 2), torch.zeros(n, 2))


def run(layer, *args):
    """The student's attention block."""
    with mock.patch("model.rotate", quarter_turn):
        return layer.attention_block(*args)


@check(3, "Attention alone")
def attends():
    from model import attention
    v = torch.tensor([1., 10.]).reshape(1, 2, 1, 1)
    close(attention(torch.zeros(1, 4, 1, 1), torch.zeros(1, 2, 1, 1), v, None).flatten(), [1., 1., 10., 10.], "Query head h reads "
          "key-value head h // (heads / kv_heads), so that neighbours share one", "4 heads, 2 key-value heads with values 1 and 10, 1 row, "
          "1 slot", ("head",))
    v = torch.tensor([1., 3., 8.]).reshape(1, 1, 3, 1)
    close(attention(torch.zeros(1, 1, 3, 1), torch.zeros(1, 1, 3, 1), v, None).flatten(), [1., 2., 4.], "With no mask, row r of several "
          "sees rows 0 to r (with equal scores it takes the mean of their values)", "mask None, 3 rows whose values are 1, 3 and 8", ("row",))
    close(attention(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 3, 1), v, None).flatten(), [4.], "With no mask a single row sees every slot",
          "mask None, 1 row, 3 slots with values 1, 3 and 8", ("row",))
    mask = torch.tensor([[0., -torch.inf, 0.], [-torch.inf, 0., 0.]])
    close(attention(torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 3, 1), v, mask).flatten(), [4.5, 5.5], "The mask is added to the scores: a row "
          "sees the slots where it is 0", "2 rows, 3 slots with values 1, 3 and 8, row 0 may see slots 0 and 2, row 1 slots 1 and 2", ("row",))
    k, v = torch.tensor([[1., 0.], [0., 0.]])[None, None], torch.tensor([[1., 0.], [0., 0.]])[None, None]
    close(attention(torch.tensor([2., 0.])[None, None, None], k, v, None)[0, 0, 0, :1], [.804422], "A score is q.k / sqrt(head_dim), and "
          "the softmax goes over the slots", "query (2, 0), keys (1, 0) and (0, 0) with values 1 and 0, head_dim 2: the weight of the first", (None,))


@check(2, "The attention block: residual, heads and mask")
def block_attends():
    layer, angles = bare_layer(norm=2.)
    x = torch.tensor([[[1., 3, 0, 0, 0, 0, 0, 0]]])
    close(run(layer, x, *angles(1)), x, "The block adds to x what attention makes of the normed x; x itself is not normed",
          "a norm that doubles, attention making 0; x = (1, 3, 0 ...)", (None, "row", "dimension"))
    layer, angles = bare_layer()
    layer.qkv.weight.data[12:] = torch.eye(8)[:4]              # values: head 0 is (x0, x1), head 1 (x2, x3); scores all 0
    layer.o.weight.data = torch.eye(8)
    x = torch.tensor([[[1., 2, 3, 4, 0, 0, 0, 0]]])
    close(run(layer, x, *angles(1)) - x, [[[1., 2, 1, 2, 3, 4, 3, 4]]], "qkv holds all query heads, then all key heads, then all value "
          "heads, and o gets the heads side by side", "4 heads of 2 dimensions, 2 key-value heads, whose values are (1, 2) and (3, 4); what "
          "attention adds to x (1, 1, 8)", (None, "row", "dimension"))
    slots = torch.tensor([2., 4., 8., 12.]).reshape(1, 1, 4, 1).expand(1, 2, 4, 2)
    mask, x = torch.tensor([[0., -torch.inf, 0., -torch.inf], [-torch.inf, 0., 0., 0.]]), torch.zeros(1, 2, 8)
    close(run(layer, x, *angles(2), mask, lambda k, v: (slots, slots))[0, :, 0], [5., 8.], "The block attends to what store returns, under the "
          "mask it is given", "scores all equal, 2 rows, 4 slots with values 2, 4, 8, 12, row 0 may see slots 0 and 2, row 1 slots 1, 2 "
          "and 3", ("row",))


@check(2, "Rotation, and what is cached")
def attention_scores():
    layer, angles = bare_layer(norm=0.5)
    layer.qkv.weight.data[0:2] = torch.eye(8)[:2]              # query head 0, key head 0 and value head 0 are (x0, x1)
    layer.qkv.weight.data[8:10] = torch.eye(8)[:2]
    layer.qkv.weight.data[12:14] = torch.eye(8)[:2]
    layer.o.weight.data = torch.eye(8)
    x, calls = torch.tensor([[[4., 0, 0, 0, 0, 0, 0, 0]]]), []
    keys, values = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    keys[0, 0, 0], values[0, 0, 0] = torch.tensor([1., 0.]), torch.tensor([1., 0.])

    def store(k, v):
        calls.append((k, v))
        return keys, values

    close((run(layer, x, *angles(1), None, store) - x)[0, 0, :1], [.804422], "What is added to x is what the query of the normed x reads "
          "from the keys and values that store returns", "normed query (2, 0), keys (1, 0) and (0, 0) with values 1 and 0, head_dim 2: the weight of the "
          "first", (None,))
    equal(len(calls), 1, "store is called once in a block", "1 row: number of calls")
    x, calls[:] = torch.tensor([[[2., 4, 0, 0, 0, 0, 0, 0], [2., 4, 0, 0, 0, 0, 0, 0]]]), []
    cos, sin = torch.tensor([[1., 1.], [0., 0.]]), torch.tensor([[0., 0.], [-1., 1.]])
    keys[0, 0, 0] = torch.tensor([-2., 1.])
    got = run(layer, x, cos, sin, torch.zeros(2, 2), store)
    (k, v), = calls
    example, axes = "2 rows with normed keys and values (1, 2), row 1 turned by a quarter", (None, "kv head", "row", "dimension")
    close(k[:, :1], [[[[1., 2.], [-2., 1.]]]], "What goes into the cache is the key after its rotation", f"{example}, keys", axes)
    close(v[:, :1], [[[[1., 2.], [1., 2.]]]], "Values are not rotated", f"{example}, values", axes)
    equal((tuple(k.shape), tuple(v.shape)), ((1, 2, 2, 2),) * 2, "store gets keys and values as (batch, kv_heads, rows, head_dim)",
          "2 rows, 2 key-value heads of 2 dimensions")
    close((got - x)[0, :, 0], [.5, .971673], "The query is rotated as the keys are", "2 rows with normed query (1, 2), row 1 turned "
          "by a quarter to (-2, 1), cached keys (-2, 1) and (0, 0): the first one's weight", ("row",))


@check(2, "The feed-forward block")
def feed_forward():
    layer, _ = bare_layer()
    x = torch.tensor([[[2., 3, 0, 0, 0, 0, 0, 0]]])
    layer.gate_up.weight.data[0, 0] = 1                        # gate of unit 0: x0
    layer.gate_up.weight.data[3, 1] = 1                        # its up: x1
    layer.down.weight.data[2, 0] = 1                           # into dimension 2
    axes = (None, "row", "dimension")
    close(layer.mlp_block(x), [[[2., 3, 5.284782, 0, 0, 0, 0, 0]]], "mlp_block adds down(silu(gate) * up) to x, gate being "
          "the first half of gate_up", "x = (2, 3, 0 ...), gate 2, up 3, down into dimension 2", axes)
    layer.mlp_norm, layer.attention_norm = Scale(2.), Scale(3.)
    close(layer.mlp_block(x), [[[2., 3, 23.568331, 0, 0, 0, 0, 0]]], "gate and up are made from x as mlp_norm gives it, and x itself is not "
          "normed", "mlp_norm doubles, attention_norm triples; x = (2, 3, 0 ...), gate 4, up 6", axes)
    close(layer.mlp_block(torch.cat((x, 2 * x, 0 * x), dim=1))[:, 1:], [[[4., 6, 95.967806, 0, 0, 0, 0, 0], [0.] * 8]], "mlp_block works on "
          "each row by itself", "rows (2, 3, 0 ...), (4, 6, 0 ...) and 0, mlp_norm doubles: the last two", axes)


def whole_layer():
    """A random layer, its input, and RoPE's angles of 5 rows: the same for the reference and for a student."""
    import model
    layer = model.DecoderLayer(config())
    for seed, weight in enumerate(layer.parameters()):
        weight.data = random(*weight.shape, seed=seed) * 0.5
    positions = torch.arange(5.)[:, None] * 0.7
    return layer, random(1, 5, 8, seed=9), positions.cos().expand(5, 2), positions.sin() * torch.tensor([-1., 1.])


@check(1, "A whole layer")
def whole():
    layer, x, cos, sin = whole_layer()
    close(layer(x, cos, sin), golden()["layer"], "Five rows through a random layer come out as the reference has them",
          "x (1, 5, 8)", ("batch", "row", "dimension"), tolerance=1e-3)
