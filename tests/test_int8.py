"""Eight bits: what is kept, that products are as said, rows by themselves, and decoding on it."""
import copy
import subprocess
import sys

import pytest
import torch
from conftest import DEVICE, ROOT, random_model, same_bits, tokens_of
from folders import small_folder

from checkpoint import load_model
from extras import int8
from extras.int8 import Int8Linear, in_int8, plain_product, quantise
from extras.packed import bytes_read, pack
from model import ModelError
from speculative import autoregressive, clasp

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def matrix(rows: int = 50, columns: int = 64) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, columns, device=DEVICE)


# ---------------------------------------------------------------- what is kept

def test_a_weight_is_off_by_half_a_step_at_most(monkeypatch):
    monkeypatch.setattr(int8, "CHUNK", 16)                         # several, and a rest
    weight = matrix()
    codes, scales = quantise(weight)
    scales = scales.float()[:, None]
    error = (codes * scales - weight).abs()
    inside = weight.abs() <= int8.LARGEST * scales
    assert (error[inside] <= (0.5001 * scales).expand_as(error)[inside]).all()
    assert error.max() <= 0.01 * weight.abs().max()                # a scale may be rounded down


def test_one_large_weight_costs_only_its_own_row_digits():
    weight = matrix()
    before = weight.clone()
    codes, scales = quantise(weight)
    assert torch.equal(weight, before)
    weight[7, 3] = 1e6
    again, new_scales = quantise(weight)
    others = torch.arange(len(weight)) != 7
    assert torch.equal(codes[others], again[others])
    assert torch.equal(scales[others], new_scales[others])


def test_rows_of_zeros_stay_zeros():
    linear = Int8Linear(torch.zeros(5, 8, device=DEVICE))
    assert not linear(matrix(3, 8)).any()


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_refused(garbage):
    weight = matrix()
    weight[3, 4] = garbage
    with pytest.raises(ModelError, match="NaN or infinity"):
        quantise(weight)


def test_the_codes_are_all_that_is_approximate():
    """For weights that are codes times a scale already, nothing is lost."""
    codes = torch.randint(-127, 128, (50, 64), device=DEVICE).float()
    codes[:, 0] = 127
    weight = codes * 2.0 ** -9
    x = matrix(5, 64)
    torch.testing.assert_close(Int8Linear(weight)(x), x @ weight.T)


# ---------------------------------------------------------------- products

@pytest.mark.parametrize("rows", [1, 2, 5, 16, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_those_of_codes_and_scales(dtype, rows):
    linear = Int8Linear(matrix().to(dtype))
    x = matrix(rows, 64).to(dtype)
    expected = x.double() @ (linear.codes * linear.scales.double()[:, None]).T
    torch.testing.assert_close(linear(x[None])[0], expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_have_any_number_of_axes_and_lie_anyhow(dtype):
    """As nn.Linear has it. PyTorch's kernel for a CPU crashes where rows lie apart."""
    linear = Int8Linear(matrix().to(dtype))
    x = matrix(24, 64).to(dtype).view(2, 3, 4, 64)
    expected = linear(x)
    for index in ((0, 0, 0), (0, 0), (0,), (slice(0, 1), 0)):
        torch.testing.assert_close(linear(x[index]), expected[index])
    assert linear(x[:0]).shape == (0, 3, 4, 50)
    wide = torch.cat((x, x[..., :7]), dim=-1)
    torch.testing.assert_close(linear(wide[..., :64]), expected)
    torch.testing.assert_close(linear(x.mT.contiguous().mT), expected)


@pytest.mark.parametrize("columns", [17, 24, 172, 344])
def test_columns_may_be_any_number(columns):
    """PyTorch's kernel for a CPU crashes where it is no multiple of 16."""
    linear = Int8Linear(matrix(50, columns).bfloat16())
    x = matrix(3, columns).bfloat16()
    torch.testing.assert_close(linear(x), plain_product(x, linear.codes, linear.scales))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_bits_do_not_depend_on_the_others(dtype):
    linear = Int8Linear(matrix(300, 256).to(dtype))
    for width in range(2, int8.FEW + 1):
        x = matrix(1, 256).to(dtype).repeat(width, 1)
        x[0] = 100
        product = linear(x)
        assert same_bits(product[1:], product[1:2].expand(width - 1, -1))
        if linear.product is not plain_product:                    # which MKL rounds as it likes
            assert same_bits(product[1:2], linear(x[1:2]))


IN_INTERPRETER = """
import sys, torch
from extras.int8 import plain_product, quantise
from extras.int8_cuda import product
torch.manual_seed(0)
for dtype in (torch.float32, torch.float16):
    for out, columns, rows in ((70, 200, 5), (32, 128, 16), (33, 7, 1)):
        codes, scales = quantise(torch.randn(out, columns))
        x = torch.randn(rows, columns).to(dtype)
        expected = plain_product(x, codes, scales)
        torch.testing.assert_close(product(x, codes, scales), expected)
print("equal")
"""


@pytest.mark.thorough
def test_the_kernel_for_gpus_makes_the_same_products():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", IN_INTERPRETER], cwd=ROOT, capture_output=True, text=True,
        env={"TRITON_INTERPRET": "1", "PATH": ""})
    assert done.stdout == "equal\n", done.stderr


# ---------------------------------------------------------------- decoding

def in_eight_bits(model):
    for layer in model.layers:
        for name in ("qkv", "o", "gate_up", "down"):
            setattr(layer, name, in_int8(getattr(layer, name)))
    model.head = in_int8(model.head or model.embed)
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("skip", [0, 3])
def test_text_is_that_of_the_eight_bit_models_plain_decoding(dtype, skip):
    model = pack(in_eight_bits(random_model().to(dtype)))
    prompt = tokens_of(model, 12)
    expected = list(autoregressive(model, prompt, 40, width=5))
    assert list(clasp(model, prompt, 40, skip_layers=skip, width=5)) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_folder_is_loaded_in_eight_bits(tmp_path, dtype):
    """Matrix by matrix; and nothing else is put in their place afterwards."""
    folder = small_folder(tmp_path / "small")
    model = pack(load_model(folder, DEVICE, dtype, in_int8))
    expected = in_eight_bits(load_model(folder, DEVICE, dtype))
    for layer, other in zip(model.layers, expected.layers):
        for name in ("qkv", "o", "gate_up", "down"):
            assert torch.equal(getattr(layer, name).codes, getattr(other, name).codes)
    assert torch.equal(model.head.codes, expected.head.codes)


def test_a_byte_is_read_of_each_weight_and_two_of_each_row():
    plain = random_model()
    model = in_eight_bits(copy.deepcopy(plain))
    matrices = [weight for weight in [*plain.layers.parameters(), plain.head.weight]
                if weight.ndim == 2]
    assert bytes_read(model) == sum(weight.numel() + 2 * len(weight) for weight in matrices)
