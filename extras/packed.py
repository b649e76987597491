"""Products of a few rows as fast as this CPU reads the weights.

Decoding multiplies 1 row (plain, draft), K+1 (verify) or up to M (the DP) with each matrix, and
the time should be that of reading the matrix, whatever the number. ``nn.Linear`` is far from it:
several rows cost two to four times what one does, and that is what speculative decoding lives on.
Remedies, with their measurements in docs/speed.md:

* Weights that were saved in 16 bits, as nearly all are, lie here in float16 whatever the model's
  dtype: half the bytes of float32. FBGEMM widens them in registers; products and sums are float32.
  Rows of tiny or huge bfloat16 weights are scaled by a power of two, which rounds nothing.
* In bfloat16 on a CPU that computes in it, matrices are packed into oneDNN's own order, once, after
  loading; oneDNN would otherwise rearrange them at every call.
* Of true float32 weights, large matrices are packed so too. Small ones, where oneDNN's overhead of
  some 20 us a call shows, stay as they are but stand on the left: MKL computes (W x^T)^T up to
  twice as fast as x W^T.

All that is not on an x86 CPU stays with nn.Linear. Attention is exchanged too (attention.py).

Read ``choose_form`` first.
"""
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extras.attention import attend_by, choose
from model import Llama, ModelError, RMSNorm

LARGE = 2 ** 18               # numbers in a float32 matrix from which on oneDNN is faster than MKL
FEW = 12                      # rows up to which MKL is faster with the weight on the left
THREADED = 3 * 2 ** 18        # numbers in a matrix from which on threads are worth their start
ROUNDED = 2.0 ** -19          # of a row's largest weight: what float16 may round away
ROW_EXPONENT = 14             # rows that are scaled have their largest weight in 2^14 .. 2^15
CHUNK = 4096                  # rows looked at together, so that no large matrix is held thrice
MATRICES = ("qkv", "o", "gate_up", "down")               # of a layer


def pack(model: Llama) -> Llama:
    """The same model, made faster in place for inference with batch 1; elsewhere untouched.

    Matrices that have a form of their own already, by ``load_model``, keep it. A packed layer has
    no weight to look at or save. A tied head becomes a matrix of its own beside the embedding.
    """
    device = model.embed.weight.device
    if device.type == "cuda" or is_x86(device):
        attend_by(model, choose(model))
    if not is_x86(device):
        return model
    put_into(model, choose_form(device, model.embed.weight.dtype))
    for layer in model.layers:
        layer.attention_norm = quick(layer.attention_norm)
        layer.mlp_norm = quick(layer.mlp_norm)
    return model


def put_into(model: Llama, form: Callable[[nn.Module], nn.Module]):
    """Exchange each matrix of a model for its form, also a tied head."""
    for layer in model.layers:
        for name in MATRICES:
            setattr(layer, name, form(getattr(layer, name)))
    head = form(model.head or model.embed)
    model.head = head if head is not model.embed else None


def is_x86(device: torch.device) -> bool:
    """A CPU with oneDNN and MKL?"""
    has_libraries = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    return device.type == "cpu" and has_libraries


def choose_threads(model: Llama):
    """One thread, in this whole process, for a model on a CPU whose layers are too small to share.

    More are no faster there, and where other programs want the cores they wait for each other: a
    pass of the bundled model beside one busy program took 100 times as long with two.
    """
    c = model.config
    largest = c.hidden_size * max(2 * c.intermediate_size, c.num_attention_heads * c.head_dim)
    if model.device.type == "cpu" and largest < THREADED:
        torch.set_num_threads(1)


def choose_form(device: torch.device, dtype: torch.dtype) -> Callable[[nn.Module], nn.Module]:
    """A function that exchanges a linear layer (or embedding) for its fastest form there."""
    if not is_x86(device):
        return lambda linear: linear
    has_fbgemm = "fbgemm" in torch.backends.quantized.supported_engines
    small = unthreaded_product()

    def form(linear: nn.Module) -> nn.Module:
        if not isinstance(linear, nn.Linear | nn.Embedding):
            return linear                                # it has one
        weight = linear.weight
        if has_arithmetic(dtype):
            return PackedLinear(weight)
        if has_fbgemm and all(saved_in_16_bits(part) for part in weight.split(CHUNK)):
            return Float16Linear(weight, small)
        if dtype != torch.float32:
            return linear
        return PackedLinear(weight) if weight.numel() >= LARGE else WeightFirstLinear(weight)

    return form


def has_arithmetic(dtype: torch.dtype) -> bool:
    """Is this a dtype of 16 bits that the CPU computes in by itself?"""
    return dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def saved_in_16_bits(weight: Tensor) -> bool:
    """Can float16 or bfloat16 hold these numbers? Raises ModelError for NaN or infinity."""
    require_numbers(weight)                              # FBGEMM would make large numbers of them
    in_float16 = torch.equal(weight.half().to(weight), weight)
    return in_float16 or torch.equal(weight.bfloat16().to(weight), weight)


def require_numbers(weight: Tensor):
    if not weight.abs().amax().isfinite():
        narrow = ", or float16 is too narrow for them" if weight.dtype == torch.float16 else ""
        raise ModelError(f"the model's weights are damaged: they hold NaN or infinity{narrow}")


def row_scales(weight: Tensor) -> Tensor | None:
    """Powers of two (rows,) by which to divide the rows, so that float16 holds them; None: by 1.

    bfloat16 has a wider range than float16, which has fewer and fewer digits below 2^-14. A power
    of two changes no digit, neither of a weight nor of a product.
    """
    scales = []
    needed = False
    for rows in weight.float().split(CHUNK):
        largest = rows.abs().amax(dim=1)
        rounded = (rows.half().float() - rows).abs().amax(dim=1)     # infinite from 2^16 on
        needed |= bool((rounded > ROUNDED * largest).any())
        _, exponent = torch.frexp(largest)                           # largest < 2^exponent
        scales.append(torch.exp2(exponent.clamp(min=-100) - (ROW_EXPONENT + 1.0)))
    return torch.cat(scales) if needed else None


def unthreaded_product() -> Callable | None:
    """FBGEMM's entrance without threads, if this torch still has it: it is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                  # which it says once
        try:
            multiply = torch.fbgemm_linear_fp16_weight_fp32_activation
            rows = torch.ones(8, 8)
            multiply(rows, torch.fbgemm_pack_gemm_matrix_fp16(rows), None)
            return multiply
        except (AttributeError, RuntimeError, TypeError):
            return None


# ---------------------------------------------------------------------------- the modules

class PackedLinear(nn.Module):
    """``nn.Linear`` without bias whose weight lies in oneDNN's order. torch.compile's operators."""
    ROWS = 8                  # that it may expect

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, self.ROWS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


class Float16Linear(nn.Module):
    """``nn.Linear`` without bias whose weight lies in float16, in FBGEMM's order.

    x and its products are float32. The same kernels have two entrances: one that uses all threads,
    for 35 us a call, and one that does not (``small``), for 3 us.
    """

    def __init__(self, weight: Tensor, small: Callable | None = None):
        super().__init__()
        self.nbytes = 2 * weight.numel()
        self.scales = row_scales(weight)
        weight = weight.float()
        if self.scales is not None:
            weight = weight / self.scales[:, None]
        if weight.numel() < THREADED and small:
            self.weight = torch.fbgemm_pack_gemm_matrix_fp16(weight)
            self.multiply = small
        else:
            self.weight = torch.ops.quantized.linear_prepack_fp16(weight, None)
            self.multiply = threaded_product

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 1:                                 # FBGEMM takes rows only
            return self(x[None])[0]
        product = self.multiply(x.float(), self.weight, None)
        if self.scales is not None:
            product = product * self.scales
        return product.to(x.dtype)


def threaded_product(x: Tensor, weight, bias) -> Tensor:
    return torch.ops.quantized.linear_dynamic_fp16(x, weight)


class WeightFirstLinear(nn.Module):
    """``nn.Linear`` without bias that multiplies a few rows as (W x^T)^T, if x is (1, rows, in)."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        is_sequence = x.dim() == 3 and len(x) == 1
        if not is_sequence or not 1 < x.shape[1] <= FEW:
            return F.linear(x, self.weight)
        return torch.mm(self.weight, x[0].t()).t().contiguous()[None]


def quick(norm: nn.Module) -> nn.Module:
    return norm if isinstance(norm, QuickNorm) else QuickNorm(norm)


class QuickNorm(nn.Module):
    """RMSNorm in 4 kernels, where a CPU's F.rms_norm takes 9; in float32.

        x / sqrt(|x|^2 + dim eps) * sqrt(dim) weight
    """

    def __init__(self, norm: RMSNorm):
        super().__init__()
        size = norm.weight.numel()
        self.weight = norm.weight.float() * size ** 0.5
        self.small = torch.tensor((size * norm.eps) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        return (wide / torch.hypot(length, self.small) * self.weight).to(x.dtype)


def bytes_read(model: Llama) -> int:
    """Of weights, for one token: all matrices but an untied embedding, as they lie in memory."""
    matrices = [getattr(layer, name) for layer in model.layers for name in MATRICES]
    matrices.append(model.head or model.embed)
    return sum(getattr(m, "nbytes", 0) or m.weight.nbytes for m in matrices)
