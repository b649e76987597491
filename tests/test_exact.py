"""extras/exact.py: in passes of one shape, greedy text is plain decoding's to the last bit."""
import os
import subprocess
import sys

import pytest
import torch

import speculative
from checkpoint import BUNDLED, load_model
from conftest import (
    DEVICE,
    ROOT,
    all_but,
    random_model,
    same_bits,
    tokens_of,
    valid,
    width_for,
)
from extras.exact import exact_width
from model import BLOCK, KVCache
from speculative import Stats, autoregressive, clasp, full_pass, prefill

# ---------------------------------------------------------------- one shape

def test_every_pass_of_a_text_has_one_shape(monkeypatch):
    """As many rows as the width, over whole blocks, however many tokens are real."""
    model = random_model()
    seen = []
    forward = model.forward

    def recorded(tokens, cache=None, skip=(), slots=None):
        if not skip and slots is not None:
            seen.append((tokens.shape[1], slots, cache.length))
        return forward(tokens, cache, skip, slots)

    model.forward = recorded
    stats = Stats()
    prompt = tokens_of(model, BLOCK - 20)
    written = clasp(model, prompt, 60, skip_layers=3, draft_length=4, width=7, stats=stats)
    assert len(list(written)) == 60
    assert len(seen) == stats.cycles
    for rows, slots, start in seen:
        assert rows == 7
        assert slots == (start // BLOCK + 1) * BLOCK
    assert {slots for _, slots, _ in seen} == {BLOCK, 2 * BLOCK}


def test_a_draft_ends_with_its_block(monkeypatch):
    """All tokens of a pass lie in one block, so that none of them needs another number of slots."""
    passes = []

    def recorded(model, cache, tokens, width):
        passes.append((cache.length, len(tokens)))
        return full_pass(model, cache, tokens, width)

    monkeypatch.setattr(speculative, "full_pass", recorded)
    model = random_model(residual=0.01)
    prompt = tokens_of(model, BLOCK - 10)
    list(clasp(model, prompt, 40, skip_layers=3, draft_length=4, width=5))
    assert any(count == 5 for _, count in passes)
    for start, count in passes:
        assert start // BLOCK == (start + count - 1) // BLOCK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bits_of_a_row_do_not_depend_on_how_many_rows_are_real(all_threads, dtype):
    """On the bundled model, which is large enough for kernels to treat 1 row and 5 differently."""
    model = load_model(BUNDLED, DEVICE, dtype)
    width = width_for(model, 5)
    start = BLOCK - 12
    end = BLOCK + 20
    text = tokens_of(model, end)
    together = KVCache(model, end, width)
    alone = KVCache(model, end, width)
    for cache in (together, alone):
        prefill(model, cache, text[:start])
    while together.length < end:
        n = together.length
        count = min(1 + n % 5, BLOCK - n % BLOCK, end - n)
        tokens = text[n:n + count]
        _, logits = full_pass(model, together, tokens, width)
        singly = [full_pass(model, alone, [token], width)[1] for token in tokens]
        assert same_bits(logits, torch.cat(singly))
    assert same_bits(valid(together), valid(alone))


# ---------------------------------------------------------------- whole texts

def assert_exact(model, prompt: list[int], count: int, draft_length: int, **settings):
    """CLaSp's greedy text and cache are plain decoding's, bit for bit."""
    width = width_for(model, draft_length + 1)
    plain = KVCache(model, len(prompt) + count, width)
    cache = KVCache(model, len(prompt) + count, width)
    expected = list(autoregressive(model, prompt, count, width=width, cache=plain))
    got = list(clasp(model, prompt, count, width=width, cache=cache,
                     draft_length=draft_length, **settings))
    assert got == expected
    assert cache.length == plain.length == len(prompt) + count - 1
    assert same_bits(valid(cache), valid(plain))


def test_a_text_of_the_bundled_model_is_exact(all_threads, bundled):
    """From one block of the cache to the next."""
    prompt = tokens_of(bundled, BLOCK - 20)
    assert_exact(bundled, prompt, 50, 4, skip_layers=all_but(3, bundled))


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bundled_model_is_exact_in_every_precision(all_threads, dtype):
    model = load_model(BUNDLED, DEVICE, dtype)
    assert_exact(model, [5, 6, 7], 280, 4, skip_layers=all_but(3, model))


@pytest.mark.thorough
@pytest.mark.skipif(DEVICE != "cpu", reason="kernels of a CPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_text_is_exact_on_an_older_cpu(dtype):
    """MKL and oneDNN told to take a CPU with AVX2 only, whose kernels treat 7 rows unevenly."""
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
from checkpoint import BUNDLED, load_model
from conftest import THREADS, all_but
from test_exact import assert_exact
torch.set_grad_enabled(False)
torch.set_num_threads(THREADS)
model = load_model(BUNDLED, dtype=torch.{dtype})
for prompt in ([5, 6, 7], [9, 300, 21, 8]):
    assert_exact(model, prompt, 100, 6, skip_layers=all_but(4, model))
"""
    old = {
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
    }
    done = subprocess.run([sys.executable, "-c", code],
                          capture_output=True, text=True, env=os.environ | old)
    assert done.returncode == 0, done.stderr


def test_a_real_model_is_exact(real):
    assert_exact(real, tokens_of(real, 20), 40, 4)


# ---------------------------------------------------------------- how wide

def test_a_pass_is_as_wide_as_the_kernels_want_it(monkeypatch):
    """Of widths at which the last row comes out differently, the next that is even is taken."""
    linear = torch.nn.functional.linear

    def uneven(x, weight, bias=None):
        out = linear(x, weight)
        if x.shape[-2] in (5, 6):
            out[..., -1, :] += 1e-3
        return out

    asked = (4, 5, 6, 7)
    even = [width for width in range(4, 16) if exact_width(random_model(), width) == width]
    expected = [min(width for width in even if width >= rows and width not in (5, 6))
                for rows in asked]
    monkeypatch.setattr(torch.nn.functional, "linear", uneven)
    model = random_model()
    assert [exact_width(model, rows) for rows in asked] == expected


def test_uneven_attention_is_found_too(monkeypatch):
    attention = torch.nn.functional.scaled_dot_product_attention

    def uneven(q, k, v, **settings):
        out = attention(q, k, v, **settings)
        if q.shape[2] == 5:
            out[:, :, 0, 0] *= 1 + 2 ** -7
        return out

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", uneven)
    assert exact_width(random_model().to(torch.bfloat16), 5) != 5


def test_where_no_width_is_even_there_is_none(monkeypatch):
    linear = torch.nn.functional.linear

    def uneven(x, weight, bias=None):
        out = linear(x, weight)
        out[..., -1, :] += 1e-3
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", uneven)
    assert exact_width(random_model(), 5) is None


def test_a_width_is_looked_for_once(monkeypatch):
    model = random_model()
    width = exact_width(model, 5)

    def fail(*_):
        raise AssertionError("asked again")

    monkeypatch.setattr("extras.exact.is_even", fail)
    assert exact_width(model, 5) == width
