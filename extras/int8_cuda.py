"""Products with weights in eight bits on an NVIDIA GPU: one Triton kernel. See int8.py.

Each program makes a tile of the product: OUT of the weight's rows, for all (few) rows of x. It goes
over the columns from left to right in steps of IN, adding up in float32. Tiles have fixed sizes and
no sum is split, so a row's bits depend neither on the other rows nor on how many there are.

Not yet run on a GPU. The tests run it in Triton's interpreter, but for bfloat16, which that lacks.
"""
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16                     # of x in a tile: what a GPU's matrix units take at least
OUT = 32
IN = 128


@triton.jit
def kernel(
    x, codes, scales, product, rows, out, columns,
    tile_rows: tl.constexpr, tile_out: tl.constexpr, tile_in: tl.constexpr
):
    row = tl.arange(0, tile_rows)[:, None]                                   # of x
    unit = (tl.program_id(0) * tile_out + tl.arange(0, tile_out))[None, :]   # row of the weight
    total = tl.zeros((tile_rows, tile_out), tl.float32)
    for start in range(0, columns, tile_in):
        column = start + tl.arange(0, tile_in)
        across = column[None, :]
        down = column[:, None]
        a = tl.load(x + row * columns + across, (row < rows) & (across < columns), 0.0)
        b = tl.load(codes + unit.to(tl.int64) * columns + down, (unit < out) & (down < columns), 0)
        total = tl.dot(a, b.to(a.dtype), total, input_precision="ieee")
    scale = tl.load(scales + unit, unit < out, 0.0).to(tl.float32)
    tl.store(product + row * out + unit, total * scale, (row < rows) & (unit < out))


def product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """x (rows, in), codes (out, in), scales (out,) -> x (codes * scales)^T, (rows, out)."""
    rows, columns = x.shape
    out = len(codes)
    result = x.new_empty(rows, out)
    kernel[(triton.cdiv(out, OUT),)](
        x.contiguous(), codes, scales, result, rows, out, columns, ROWS, OUT, IN)
    return result
