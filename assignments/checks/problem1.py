"""Checks of problem 1: each part alone on cases worked out by hand, then a layer as a whole."""
from unittest import mock

import torch

from checks.common import check, close, config, equal, golden, parts, random
from checks.doubles import Matrix, Scale

AXES = ("batch", "row", "dimension")


# ---------------------------------------------------------------------------- RMSNorm

NORMS = [                     # sentence, x, weight, eps, expected
    ("RMSNorm divides a row by the root of its mean square",
     [[3.0, 4.0]], [1.0, 1.0], 0.0, [[0.848528, 1.131371]]),
    ("RMSNorm does not subtract the mean",
     [[1.0, 1.0]], [1.0, 1.0], 0.0, [[1.0, 1.0]]),
    ("RMSNorm multiplies each dimension by its weight",
     [[3.0, 4.0]], [2.0, 0.5], 0.0, [[1.697056, 0.565685]]),
    ("RMSNorm norms each row by itself",
     [[3.0, 4.0], [30.0, 40.0]], [1.0, 1.0], 0.0, [[0.848528, 1.131371]] * 2),
    ("RMSNorm adds eps to the mean square, under the root",
     [[1.0, 1.0]], [1.0, 1.0], 1.0, [[0.707107, 0.707107]]),
]


@check(3, "RMSNorm")
def rms_norm():
    from model import RMSNorm
    for sentence, x, weight, eps, expected in NORMS:
        norm = RMSNorm(2, eps)
        norm.weight.data = torch.tensor(weight)
        example = f"x = {x}, weight {weight}, eps {eps:g}"
        close(norm(torch.tensor(x)), expected, sentence, example, ("row", "dimension"))
    got = RMSNorm(2, 0.0)(torch.tensor([[[[3.0, 4.0]]]]))
    close(got, [[[[0.848528, 1.131371]]]],
          "RMSNorm takes any number of axes before the last", "x of shape (1, 1, 1, 2)")
    got = RMSNorm(2, 0.0).bfloat16()(torch.tensor([[6.0, 8.0]], dtype=torch.bfloat16))
    equal(got.dtype, torch.bfloat16, "RMSNorm keeps the dtype of x", "x in bfloat16, dtype")
    got = RMSNorm(2, 0.0).half()(torch.tensor([[300.0, 400.0]], dtype=torch.float16))
    close(got, [[0.848528, 1.131371]],
          "RMSNorm takes the mean in float32 whatever dtype x has, since in float16 a square may "
          "overflow", "x = [[300, 400]] in float16, eps 0", ("row", "dimension"), tolerance=1e-3)
    norm, x = random_norm()
    close(norm(x), golden()["norm"],
          "RMSNorm is weight * x / sqrt(mean(x^2) + eps)",
          "random weight and x, eps 0.1, x (2, 8)", ("row", "dimension"))


def random_norm():
    """This and what follows: random inputs, on which golden numbers are the reference's."""
    from model import RMSNorm
    norm = RMSNorm(8, 0.1)
    norm.weight.data = random(8, seed=11)
    return norm, random(2, 8, seed=12)


# ---------------------------------------------------------------------------- RoPE

LLAMA31 = {                   # of the three pairs here one is fast, one between, one slow
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SCALINGS = {"rope_scaling None": None, "rope_scaling of LLaMA 3.1": LLAMA31}


def table_config(scaling: dict | None = None):
    theta = 100.0 + golden()["seed"] % 100             # any more, and no pair is between
    return config(head_dim=6, rope_theta=theta, rope_scaling=scaling)


@check(3, "RoPE's table of angles")
def rope_table():
    from model import rope_table as table
    axes = ("position", "dimension")
    for name, scaling in SCALINGS.items():
        expected = golden()["rope"][name]
        example = f"head_dim 6, rope_theta {table_config().rope_theta:g}, {name}, 4 positions"
        got = table(table_config(scaling), 4)
        cos, sin = parts(got, "rope_table", "cos, sin", example)
        close(cos[:1], expected["cos"][:1],
              "Position 0 is not rotated: its cos is 1", f"cos, {example}", axes)
        close(sin[:1], expected["sin"][:1],
              "Position 0 is not rotated: its sin is 0", f"sin, {example}", axes)
        close(cos, expected["cos"],
              "Position p turns pair i by p * inverse_frequencies(config)[i], and dimension i + "
              "head_dim/2 has the angle of dimension i", f"cos, {example}", axes)
        close(sin.abs(), torch.tensor(expected["sin"]).abs(),
              "sin has the angles of cos", f"|sin|, {example}", axes)
        close(sin, expected["sin"],
              "The first half of sin is negated and the second is not", f"sin, {example}", axes)
    cos, sin = table(table_config(), 302, dtype=torch.bfloat16)
    for name, one in (("cos", cos), ("sin", sin)):
        equal(one.dtype, torch.bfloat16, "The table comes in the dtype asked for",
              f"dtype bfloat16, that of {name}")
    close(cos[301:], golden()["rope"]["cos of 301"],
          "Angles are computed in float32 whatever dtype the table comes in, since bfloat16 has no "
          "301", "cos in bfloat16, 302 positions, row 301", (None, "dimension"), tolerance=0.01)


COS = (0.877583, -0.416147)   # of the angles 0.5 and 2
SIN = (0.479426, 0.909297)
TURNED = [                    # each unit vector, turned by these angles
    [COS[0], 0, SIN[0], 0],
    [0, COS[1], 0, SIN[1]],
    [-SIN[0], 0, COS[0], 0],
    [0, -SIN[1], 0, COS[1]],
]


@check(2, "Rotation")
def rotate():
    from model import rotate as turn
    cos = torch.tensor([COS + COS])
    sin = torch.tensor([(-SIN[0], -SIN[1], *SIN)])
    for i, expected in enumerate(TURNED):
        x = torch.eye(4)[i]
        close(turn(x[None, None, None], cos, sin), [[[expected]]],
              "rotate turns dimension i together with dimension i + head_dim/2, by the angle of "
              "that pair, from the first towards the second",
              f"x = {x.int().tolist()}, angles (0.5, 2)", (None, None, None, "dimension"))
    equal(turn(*(one.bfloat16() for one in (torch.eye(4)[None, None, :1], cos, sin))).dtype,
          torch.bfloat16, "rotate keeps the dtype of x", "x, cos and sin in bfloat16: dtype")
    x = random(2, 3, 2, 4)
    cos = torch.stack((torch.ones(4), cos[0]))
    sin = torch.stack((torch.zeros(4), sin[0]))
    got = turn(x, cos, sin)
    axes = ("batch", "head", "row", "dimension")
    close(got[:, :, :1], x[:, :, :1],
          "A row with angle 0 stays, whatever the angles of the others",
          "x (2, 3, 2, 4), row 0 at angle 0, row 1 at (0.5, 2)", axes)
    close(got.norm(dim=-1), x.norm(dim=-1),
          "A rotation keeps each row's length", "x (2, 3, 2, 4), lengths", axes)
    close(turn(*random_rotation()), golden()["rotated"],
          "rotate turns (a, b) by t to (a cos t - b sin t, b cos t + a sin t)",
          "random x (1, 2, 3, 6) and angles", axes)


def random_rotation():
    angles = random(3, 3, seed=13).repeat(1, 2)
    sin = angles.sin() * torch.tensor([-1.0] * 3 + [1.0] * 3)
    return random(1, 2, 3, 6, seed=14), angles.cos(), sin


# ---------------------------------------------------------------------------- the cache

LARGEST = 65504.0                   # of float16
SLOTS = 6
KEY_FILL = -1.0
VALUE_FILL = -2.0


def empty_cache(dtype=torch.float32):
    """Two layers of 6 slots; without RoPE's table, which is another function's."""
    from model import KVCache
    cache = KVCache.__new__(KVCache)
    fill = torch.tensor([KEY_FILL, VALUE_FILL], dtype=dtype).reshape(2, 1, 1, 1, 1, 1)
    cache.slots = fill.repeat(1, 2, 1, 1, SLOTS, 1)
    cache.keys, cache.values = cache.slots[0].unbind(), cache.slots[1].unbind()
    cache.tokens, cache.scratch = SLOTS, 0
    cache.length = 1                                           # put is told the slot; not it
    return cache


@check(2, "The cache's slots")
def put():
    for layer, slot, end, rows in (
        (0, 0, 1, 1), (0, 2, 3, 1), (1, 2, 4, 2), (1, 1, 5, 2), (0, 2, 3, 3), (1, 4, 4, 2),
    ):
        cache = empty_cache()
        k = 10.0 + torch.arange(rows).reshape(1, 1, rows, 1)
        v = k + 10
        example = f"put(layer {layer}, slot {slot}, end {end}) of {tuple(k.shape)} into 6 slots"
        got = cache.put(layer, slot, end, k, v)
        keys, values = parts(got, "put", "keys, values", example)
        for name, held, returned, given, fill in (
            ("keys", cache.keys, keys, k, KEY_FILL),
            ("values", cache.values, values, v, VALUE_FILL),
        ):
            where = f"{example}, {name}"
            expected = torch.full((SLOTS,), fill)
            expected[slot:slot + rows] = given.flatten()
            close(held[layer].flatten(), expected,
                  "put writes the rows at slot .. slot+rows and leaves the other slots alone",
                  f"{where} held", ("slot",))
            close(held[1 - layer].flatten(), [fill] * SLOTS,
                  "put writes into one layer's slots only",
                  f"{where} of layer {1 - layer}", ("slot",))
            close(returned, expected[:end].reshape(1, 1, end, 1),
                  "put returns the slots before end, old and new",
                  f"{where} returned", (None, None, "slot"))
        equal(cache.length, 1, "put leaves cache.length to its caller", example)
    cache = empty_cache(torch.float16)                 # its largest number stands for an overflow
    overflowed = torch.tensor([1.0, torch.nan, torch.inf], dtype=torch.float16).reshape(1, 1, 3, 1)
    keys, values = cache.put(0, 0, 3, overflowed, overflowed)
    for name, got in (("keys", keys), ("values", values)):
        close(got.flatten(), [1.0, LARGEST, LARGEST],
              "What goes into the cache is what storable makes of it",
              f"1, NaN and infinity in float16, {name}", ("slot",))


# ---------------------------------------------------------------------------- attention

def column(*values: float):
    """Keys or values of one head with one dimension: (1, 1, slots, 1)."""
    return torch.tensor(values).reshape(1, 1, -1, 1)


@check(3, "Attention alone")
def attends():
    from model import attention
    k = torch.zeros(1, 2, 1, 1)
    v = torch.tensor([1.0, 10.0]).reshape(1, 2, 1, 1)
    for heads in (4, 6):
        half = heads // 2
        close(attention(torch.zeros(1, heads, 1, 1), k, v, None).flatten(),
              [1.0] * half + [10.0] * half,
              "Query head h reads key-value head h // (heads / kv_heads), so that neighbours share "
              "one", f"{heads} heads, 2 key-value heads with values 1 and 10, 1 row, 1 slot",
              ("head",))

    close(attention(column(0.0, 0.0), column(0.0, 0.0), column(1.0, 3.0), None).flatten(),
          [1.0, 2.0], "With no mask, row r of several sees rows 0 to r (with equal scores it takes "
          "the mean of their values)", "mask None, 2 rows whose values are 1 and 3", ("row",))
    k = column(0.0, 0.0, 0.0)
    v = column(1.0, 3.0, 8.0)
    close(attention(column(0.0, 0.0, 0.0), k, v, None).flatten(), [1.0, 2.0, 4.0],
          "With no mask, row r of several sees rows 0 to r (with equal scores it takes the mean of "
          "their values)", "mask None, 3 rows whose values are 1, 3 and 8", ("row",))
    close(attention(column(0.0), k, v, None).flatten(), [4.0],
          "With no mask a single row sees every slot",
          "mask None, 1 row, 3 slots with values 1, 3 and 8", ("row",))
    mask = torch.tensor([[0.0, -torch.inf, 0.0], [-torch.inf, 0.0, 0.0]])
    close(attention(column(0.0, 0.0), k, v, mask).flatten(), [4.5, 5.5],
          "The mask is added to the scores: a row sees the slots where it is 0",
          "2 rows, 3 slots with values 1, 3 and 8, row 0 may see slots 0 and 2, row 1 slots 1 and "
          "2", ("row",))
    close(attention(column(0.0), k, v, mask[:1]).flatten(), [4.5],
          "The mask is added to the scores of a single row, too",
          "1 row, 3 slots with values 1, 3 and 8, of which it may see slots 0 and 2", ("row",))

    q = torch.tensor([2.0, 0.0])[None, None, None]
    k = torch.tensor([[1.0, 0.0], [0.0, 0.0]])[None, None]
    close(attention(q, k, k.clone(), None)[0, 0, 0, :1], [0.804422],
          "A score is q.k / sqrt(head_dim), and the softmax goes over the slots",
          "query (2, 0), keys (1, 0) and (0, 0) with values 1 and 0, head_dim 2: the weight of the "
          "first", (None,))

    close(attention(100 * q, 100 * k, k.clone(), None)[0, 0, 0, :1], [1.0],
          "The softmax is of the scores less their largest, or large ones overflow",
          "query (200, 0), keys (100, 0) and (0, 0) with values 1 and 0: what is read", (None,))
    close(attention(column(200.0, -200.0), column(1.0, 1.0), column(1.0, 3.0), torch.zeros(2, 2))
          .flatten(), [2.0, 2.0],
          "The softmax is of a row's scores less the largest of that row",
          "2 rows with queries 200 and -200, 2 slots with keys 1 and 1, values 1 and 3", ("row",))
    close(attention(column(100.0), column(-2.0, 0.0), column(1.0, 3.0), mask[:1, :2]).flatten(),
          [1.0], "A masked slot counts nothing, however much larger its score is than the others",
          "query 100, keys -2 and 0, values 1 and 3, the second masked", ("row",))
    for dtype in (torch.bfloat16, torch.float16):
        narrow = [one.to(dtype) for one in random_attention()]
        equal(attention(*narrow).dtype, dtype,
              "Attention keeps the dtype of q", f"q, k, v and mask in {dtype}: dtype")
        rows = column(1.0, 2.0, 3.0).to(dtype)
        equal(attention(rows, rows, rows, None).dtype, dtype,
              "Attention keeps the dtype of q", f"mask None, 3 rows, q, k and v in {dtype}: dtype")

    close(attention(*random_attention()), golden()["attended"],
          "Attention is softmax(q k^T / sqrt(head_dim) + mask) v",
          "random q (2, 4, 3, 2), k and v (2, 2, 5, 2), mask (3, 5)",
          ("batch", "head", "row", "dimension"))


def random_attention():
    mask = torch.where(random(3, 5, seed=15) > 0.3, -torch.inf, 0.0)
    mask[:, 0] = 0
    k, v = random(2, 2, 2, 5, 2, seed=16)
    return random(2, 4, 3, 2, seed=17), k, v, mask


# ---------------------------------------------------------------------------- the blocks

def quarter_turn(x, cos, sin):
    """In rotate's place, right for the two rotations used here.

    None (cos 1), and a quarter turn (sin -1 and 1).
    """
    first, second = x.chunk(2, dim=-1)
    return torch.where(cos == 1, x, torch.cat((-second, first), dim=-1))


def bare_layer(norm: float = 1.0, **changes):
    """A layer whose weights are all 0 and whose norms just multiply."""
    import model
    layer = model.DecoderLayer(config(**changes))
    for weight in layer.parameters():
        weight.data.zero_()
    layer.attention_norm = Scale(norm)
    layer.mlp_norm = Scale(1.0)
    return layer


def still(rows: int, head_dim: int = 2):
    """RoPE's angles of so many rows that do not turn."""
    return torch.ones(rows, head_dim), torch.zeros(rows, head_dim)


def row(*values: float):
    """A state (1, 1, 8) that begins with these numbers and is 0 elsewhere."""
    x = torch.zeros(1, 1, 8)
    x[0, 0, :len(values)] = torch.tensor(values)
    return x


def run(layer, *args):
    """The student's attention block."""
    with mock.patch("model.rotate", quarter_turn):
        return layer.attention_block(*args)


@check(2, "The attention block: residual, heads and mask")
def block_attends():
    x = row(1.0, 3.0)
    close(run(bare_layer(norm=2.0), x, *still(1)), x,
          "The block adds to x what attention makes of the normed x; x itself is not normed",
          "a norm that doubles, attention making 0; x = (1, 3, 0 ...)", AXES)

    layer = bare_layer()
    layer.qkv.weight.data[12:] = torch.eye(8)[:4]      # value head 0 is (x0, x1), head 1 (x2, x3)
    layer.o.weight.data = torch.eye(8)
    x = row(1.0, 2.0, 3.0, 4.0)
    close(run(layer, x, *still(1)) - x, [[[1.0, 2, 1, 2, 3, 4, 3, 4]]],
          "qkv holds all query heads, then all key heads, then all value heads, and o gets the "
          "heads side by side",
          "4 heads of 2 dimensions, 2 key-value heads, whose values are (1, 2) and (3, 4); what "
          "attention adds to x (1, 1, 8)", AXES)
    x = torch.cat((x, row(5.0, 6.0, 7.0, 8.0)), dim=1)
    alone = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]])
    close((run(layer, x, *still(2), alone) - x)[:, 1:], [[[5.0, 6, 5, 6, 7, 8, 7, 8]]],
          "The block attends under the mask it is given, without a store, too",
          "the same, and a second row with values (5, 6) and (7, 8), each row seeing itself only: "
          "what is added to the second", AXES)

    slots = column(2.0, 4.0, 8.0, 12.0).expand(1, 2, 4, 2)
    mask = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf], [-torch.inf, 0.0, 0.0, 0.0]])

    def store(k, v):
        return slots, slots

    got = run(layer, torch.zeros(1, 2, 8), *still(2), mask, store)
    close(got[0, :, 0], [5.0, 8.0],
          "The block attends to what store returns, under the mask it is given",
          "scores all equal, 2 rows, 4 slots with values 2, 4, 8, 12, row 0 may see slots 0 and 2, "
          "row 1 slots 1, 2 and 3", ("row",))
    got = run(layer, torch.zeros(1, 1, 8), *still(1), mask[:1], store)
    close(got[0, :, 0], [5.0],
          "The block attends under the mask it is given, with a single row, too",
          "scores all equal, 1 row, 4 slots with values 2, 4, 8, 12, of which it may see 0 and 2",
          ("row",))

    layer = bare_layer(num_attention_heads=3, num_key_value_heads=1, head_dim=4)
    layer.qkv.weight.data[16:] = torch.eye(8)[:4]      # the value head is (x0 .. x3)
    layer.o.weight.data[:, :8] = torch.eye(8)
    x = row(1.0, 2.0, 3.0, 4.0)
    close(run(layer, x, *still(1, head_dim=4)) - x, [[[1.0, 2, 3, 4, 1, 2, 3, 4]]],
          "Numbers of heads and head_dim are the config's: the heads together may be wider than x",
          "3 heads of 4 dimensions, 1 key-value head, whose value is (1 .. 4), x (1, 1, 8), an o "
          "that takes the first two heads: what is added to x", AXES)

    layer = bare_layer()
    layer.o.weight.data = torch.eye(8)
    layer.qkv, layer.o = Matrix(layer.qkv), Matrix(layer.o)
    layer.attend = lambda q, k, v, mask: torch.ones_like(q)
    close(run(layer, torch.zeros(1, 2, 8), *still(2)), torch.ones(1, 2, 8),
          "The block attends by self.attend: the fast attention takes its place",
          "a self.attend that makes 1 of everything: what is added to x (1, 2, 8)", AXES)
    block_keeps_dtype()


def block_keeps_dtype():
    given = []

    def store(k, v):
        given.extend((k.dtype, v.dtype))
        return k, v

    def attend(q, k, v, mask):
        given.append(q.dtype)
        return torch.ones_like(q)

    layer = bare_layer().bfloat16()
    layer.attend = attend
    x = row(1.0).bfloat16()
    got = run(layer, x, *(angles.bfloat16() for angles in still(1)), None, store)
    example = "layer, x, cos and sin in bfloat16"
    equal(given, [torch.bfloat16] * 3,
          "Queries, keys and values have the dtype of x",
          f"{example}: dtypes of k and v in store, and of q in self.attend")
    equal(got.dtype, torch.bfloat16, "The block keeps the dtype of x", f"{example}: dtype")


class Slots:
    """A store of two slots in two heads, which notes what is put into it. Slot 1 is all 0."""

    def __init__(self, key: list[float], value: list[float]):
        self.calls = []
        self.keys = torch.zeros(1, 2, 2, 2)
        self.values = torch.zeros(1, 2, 2, 2)
        self.keys[0, 0, 0] = torch.tensor(key)
        self.values[0, 0, 0] = torch.tensor(value)

    def store(self, k, v):
        self.calls.append((k, v))
        return self.keys, self.values


def one_head_layer():
    """Query head 0, key head 0 and value head 0 are (x0, x1) of the normed, which is halved."""
    layer = bare_layer(norm=0.5)
    for first in (0, 8, 12):
        layer.qkv.weight.data[first:first + 2] = torch.eye(8)[:2]
    layer.o.weight.data = torch.eye(8)
    return layer


@check(2, "Rotation, and what is cached")
def attention_scores():
    layer = one_head_layer()
    slots = Slots(key=[1.0, 0.0], value=[1.0, 0.0])
    x = row(4.0)
    got = run(layer, x, *still(1), None, slots.store) - x
    close(got[0, 0, :1], [0.804422],
          "What is added to x is what the query of the normed x reads from the keys and values "
          "that store returns",
          "normed query (2, 0), keys (1, 0) and (0, 0) with values 1 and 0, head_dim 2: the weight "
          "of the first", (None,))
    equal(len(slots.calls), 1, "store is called once in a block", "1 row: number of calls")

    slots = Slots(key=[-2.0, 1.0], value=[1.0, 0.0])
    x = row(2.0, 4.0).repeat(1, 2, 1)
    cos = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    sin = torch.tensor([[0.0, 0.0], [-1.0, 1.0]])
    got = run(layer, x, cos, sin, torch.zeros(2, 2), slots.store) - x
    k, v = slots.calls[0]
    example = "2 rows with normed keys and values (1, 2), row 1 turned by a quarter"
    axes = (None, "kv head", "row", "dimension")
    close(k[:, :1], [[[[1.0, 2.0], [-2.0, 1.0]]]],
          "What goes into the cache is the key after its rotation", f"{example}, keys", axes)
    close(v[:, :1], [[[[1.0, 2.0], [1.0, 2.0]]]],
          "Values are not rotated", f"{example}, values", axes)
    equal((tuple(k.shape), tuple(v.shape)), ((1, 2, 2, 2),) * 2,
          "store gets keys and values as (batch, kv_heads, rows, head_dim)",
          "2 rows, 2 key-value heads of 2 dimensions")
    close(got[0, :, 0], [0.5, 0.971673],
          "The query is rotated as the keys are",
          "2 rows with normed query (1, 2), row 1 turned by a quarter to (-2, 1), cached keys "
          "(-2, 1) and (0, 0): the first one's weight", ("row",))


@check(2, "The feed-forward block")
def feed_forward():
    layer = bare_layer()
    layer.gate_up.weight.data[0, 0] = 1                # gate of unit 0: x0
    layer.gate_up.weight.data[3, 1] = 1                # its up: x1
    layer.down.weight.data[2, 0] = 1                   # into dimension 2
    layer.gate_up, layer.down = Matrix(layer.gate_up), Matrix(layer.down)
    x = row(2.0, 3.0)
    close(layer.mlp_block(x), row(2.0, 3.0, 5.284782),
          "mlp_block adds down(silu(gate) * up) to x, gate being the first half of gate_up",
          "x = (2, 3, 0 ...), gate 2, up 3, down into dimension 2", AXES)

    layer.mlp_norm = Scale(2.0)
    layer.attention_norm = Scale(3.0)
    close(layer.mlp_block(x), row(2.0, 3.0, 23.568331),
          "gate and up are made from x as mlp_norm gives it, and x itself is not normed",
          "mlp_norm doubles, attention_norm triples; x = (2, 3, 0 ...), gate 4, up 6", AXES)
    several = torch.cat((x, 2 * x, 0 * x), dim=1)
    expected = torch.cat((row(4.0, 6.0, 95.967806), row()), dim=1)
    close(layer.mlp_block(several)[:, 1:], expected,
          "mlp_block works on each row by itself",
          "rows (2, 3, 0 ...), (4, 6, 0 ...) and 0, mlp_norm doubles: the last two", AXES)
    equal(layer.bfloat16().mlp_block(x.bfloat16()).dtype, torch.bfloat16,
          "mlp_block keeps the dtype of x", "layer and x in bfloat16: dtype")

    layer, x = random_mlp()
    close(layer.mlp_block(x), golden()["mlp"],
          "mlp_block is x + down(silu(gate) * up)", "random weights and x (2, 5, 8)", AXES)


def random_mlp():
    layer, x, _, _ = whole_layer()
    layer.mlp_norm = Scale(0.7)
    return layer, x


# ---------------------------------------------------------------------------- the layer

def whole_layer():
    """A random layer and what it is given: the same for the reference and for a student.

    Returns layer, x, and RoPE's cos and sin of 5 rows.
    """
    import model
    layer = model.DecoderLayer(config())
    for seed, weight in enumerate(layer.parameters()):
        weight.data = random(*weight.shape, seed=seed) * 0.5
    angles = torch.arange(5.0)[:, None] * 0.7
    cos = angles.cos().expand(5, 2)
    sin = angles.sin() * torch.tensor([-1.0, 1.0])
    return layer, random(2, 5, 8, seed=9), cos, sin


@check(1, "A whole layer")
def whole():
    layer, x, cos, sin = whole_layer()
    close(layer(x, cos, sin), golden()["layer"],
          "Five rows of two texts through a random layer come out as the reference has them",
          "x (2, 5, 8)", AXES, tolerance=1e-3)
