"""extras/exact.py: in passes of one shape, greedy text is plain decoding's to the last bit."""
import itertools
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
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
from enumeration import NUCLEUS, PROMPT, Enumerated

import extras.exact
import speculative
from checkpoint import BUNDLED, load_model
from extras import attention
from extras.exact import exact_width, is_even, narrowest, passes_agree, trials
from extras.lookup import Lookup
from model import BLOCK, KVCache, ModelError
from speculative import (
    Draft,
    Drafter,
    Stats,
    autoregressive,
    clasp,
    decode,
    full_pass,
    prefill,
)

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


def check_bits_of_rows(model, start: int, end: int):
    """The tokens from ``start`` on, up to five in a pass or each in a pass by itself."""
    width = width_for(model, 5)
    text = tokens_of(model, end)
    together = KVCache(model, end, width)
    alone = KVCache(model, end, width)
    for cache in (together, alone):
        prefill(model, cache, text[:start])
    while together.length < end:
        n = together.length
        count = min(1 + n % 5, BLOCK - n % BLOCK, end - n)
        tokens = text[n:n + count]
        logits = full_pass(model, together, tokens, width)[1].clone()
        singly = [full_pass(model, alone, [token], width)[1].clone() for token in tokens]
        assert same_bits(logits, torch.cat(singly))
    assert same_bits(valid(together), valid(alone))


def test_the_bits_of_a_row_do_not_depend_on_how_many_rows_are_real(bundled):
    """On the bundled model, which is large enough for kernels to treat 1 row and 5 differently."""
    check_bits_of_rows(bundled, BLOCK - 6, BLOCK + 10)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bits_of_a_row_do_not_depend_on_its_pass_in_any_precision(all_threads, dtype):
    check_bits_of_rows(load_model(BUNDLED, DEVICE, dtype), BLOCK - 12, BLOCK + 20)


# ---------------------------------------------------------------- whole texts

def assert_exact(model, prompt: list[int], count: int, draft_length: int, **settings):
    """CLaSp's greedy text and cache are plain decoding's, bit for bit, padded or not."""
    width = width_for(model, draft_length + 1)
    for fewest in {width, narrowest(model, width)}:
        passes = {"width": width, "narrowest": fewest}
        plain = KVCache(model, len(prompt) + count, width)
        cache = KVCache(model, len(prompt) + count, width)
        expected = list(autoregressive(model, prompt, count, cache=plain, **passes))
        got = list(clasp(model, prompt, count, cache=cache, draft_length=draft_length, **passes,
                         **settings))
        assert got == expected
        assert cache.length == plain.length == len(prompt) + count - 1
        assert same_bits(valid(cache), valid(plain))


def test_a_text_of_the_bundled_model_is_exact(bundled):
    """From one block of the cache to the next."""
    prompt = tokens_of(bundled, BLOCK - 10)
    assert_exact(bundled, prompt, 20, 4, skip_layers=all_but(3, bundled))


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
    kernel = torch.nn.functional.scaled_dot_product_attention

    def uneven(q, k, v, **settings):
        out = kernel(q, k, v, **settings)
        if q.shape[2] == 5:
            out[:, :, 0, 0] *= 1 + 2 ** -7
        return out

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", uneven)
    assert exact_width(random_model().to(torch.bfloat16), 5) != 5


def test_attention_that_is_uneven_for_few_queries_is_found_too(monkeypatch):
    """Rounding shows for some numbers only, so many queries are asked."""
    kernel = torch.nn.functional.scaled_dot_product_attention
    calls = itertools.count(1)

    def rarely_uneven(q, k, v, **settings):
        out = kernel(q, k, v, **settings)
        if next(calls) % 20 == 0:
            out[:, :, 0, 0] *= 1 + 2 ** -7
        return out

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", rarely_uneven)
    assert not is_even(random_model().to(torch.bfloat16), 5)


def test_attention_that_is_uneven_just_past_its_change_of_form_is_found_too(monkeypatch):
    """A product may be taken otherwise as soon as it adds up more than 1,024 numbers."""
    model = random_model(context=2000)
    by_form = model.layers[0].attend

    def uneven(q, k, v, mask):
        out = by_form(q, k, v, mask)
        if 1024 < k.shape[2] < 4096 and q.shape[2] == 5:
            out[:, :, 0, 0] += 1
        return out

    assert is_even(model, 5)
    monkeypatch.setattr(model.layers[0], "attend", uneven)
    assert not is_even(model, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_that_adds_up_in_another_order_for_the_last_row_is_found(monkeypatch, dtype):
    """In 16 bits that shows for one query of hundreds, unless what is added up cancels."""
    roundly(monkeypatch, set())
    by_row = torch.nn.functional.scaled_dot_product_attention
    model = random_model().to(dtype)
    assert is_even(model, 5)

    def uneven(q, k, v, attn_mask=None, **settings):
        out = by_row(q, k, v, attn_mask=attn_mask, **settings)
        if q.shape[2] == 5:
            first_head = [x[:, :1] for x in (q[:, :, -1:], k.flip(2), v.flip(2))]
            out[:, :1, -1:] = by_row(*first_head, attn_mask=attn_mask[-1:].flip(1))
        return out

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", uneven)
    assert not is_even(model, 5)


def test_where_no_width_is_even_there_is_none(monkeypatch):
    linear = torch.nn.functional.linear

    def uneven(x, weight, bias=None):
        out = linear(x, weight)
        out[..., -1, :] += 1e-3
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", uneven)
    assert exact_width(random_model(), 5) is None


def test_where_heads_are_no_whole_vectors_there_is_none():
    model = random_model()
    model.config = replace(model.config, head_dim=10)
    assert exact_width(model, 5) is None


def test_a_width_is_looked_for_once(monkeypatch):
    model = random_model()
    width = exact_width(model, 5)

    def fail(*_):
        raise AssertionError("asked again")

    monkeypatch.setattr("extras.exact.is_even", fail)
    assert exact_width(model, 5) == width
    with pytest.raises(AssertionError, match="asked again"):               # by other kernels
        exact_width(model.to(torch.bfloat16), 5)


def roundly(monkeypatch, uneven_rows: set[int]):
    """Products of a row are the same among any number of rows, but for these."""
    linear = torch.nn.functional.linear

    def by_row(x, weight, bias=None):
        rows = [linear(row, weight) for row in x.split(1, dim=-2)]
        out = torch.cat(rows, dim=-2)
        return out * (1 + 2 ** -20) if x.shape[-2] in uneven_rows else out

    attend = torch.nn.functional.scaled_dot_product_attention

    def attend_by_row(q, k, v, attn_mask=None, **settings):
        rows = range(q.shape[2])
        mask = [attn_mask if attn_mask is None else attn_mask[..., i:i + 1, :] for i in rows]
        out = [attend(q[:, :, i:i + 1], k, v, attn_mask=mask[i], **settings) for i in rows]
        return torch.cat(out, dim=2)

    monkeypatch.setattr(torch.nn.functional, "linear", by_row)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend_by_row)


@pytest.mark.parametrize("uneven_rows, fewest", [(set(), 1), ({1}, 2), ({3}, 4), ({1, 4}, 5)])
def test_the_narrowest_pass_is_the_last_that_rounds_alike(monkeypatch, uneven_rows, fewest):
    roundly(monkeypatch, uneven_rows)
    model = random_model()
    assert exact_width(model, 5) == 5
    assert narrowest(model, 5) == fewest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_that_add_up_in_another_order_for_one_row_are_found(monkeypatch, dtype):
    """In 16 bits that shows for one row of a hundred, unless what is added up cancels."""
    roundly(monkeypatch, set())
    by_row = torch.nn.functional.linear
    model = random_model().to(dtype)
    assert narrowest(model, 5) == 1

    def otherwise(x, weight, bias=None):
        if x.shape[-2] == 1:
            return by_row(x.float().flip(-1), weight.float().flip(-1)).to(x.dtype)
        return by_row(x.float(), weight.float()).to(x.dtype)

    monkeypatch.setattr(torch.nn.functional, "linear", otherwise)
    assert narrowest(random_model().to(dtype), 5) == 2


@pytest.mark.parametrize("context, longest", [(896, 384), (897, 1024), (1000, 1024), (4000, 4096)])
def test_all_forms_of_attention_are_tried_that_a_text_may_meet(context, longest):
    """Passes look over whole blocks, which may reach past the context's end."""
    assert max(slots for slots, _ in trials(random_model(context=context))) == longest


def test_keys_and_values_are_compared_too(monkeypatch):
    """In 16 bits a layer may add so little to its row that rounding hides that it is otherwise."""
    roundly(monkeypatch, set())
    model = random_model(residual=1e-4, vocabulary=2).bfloat16()
    qkv = model.layers[0].qkv.forward

    def otherwise(x):
        out = qkv(x)
        return out * 1.01 if x.shape[-2] == 3 else out

    for layer in model.layers:
        monkeypatch.setattr(layer.qkv, "forward", otherwise)
    assert narrowest(model, 5) == 4


def test_passes_are_padded_to_the_narrowest_and_no_further(monkeypatch):
    """And the text, keys and values are those of plain decoding in the narrowest passes."""
    roundly(monkeypatch, {1})
    model = random_model()
    widths = []

    def recorded(model, cache, tokens, width):
        widths.append((len(tokens), width))
        return full_pass(model, cache, tokens, width)

    monkeypatch.setattr(speculative, "full_pass", recorded)
    passes = {"width": 5, "narrowest": 2}
    plain, cache = KVCache(model, 80, 18), KVCache(model, 80, 18)
    prompt = tokens_of(model, 5)
    expected = list(autoregressive(model, prompt, 60, cache=plain, **passes))
    assert set(widths) == {(1, 2)}
    widths.clear()
    assert list(decode(model, prompt, 60, Lookup(4), cache=cache, **passes)) == expected
    assert same_bits(valid(cache), valid(plain))
    assert len(set(widths)) > 2
    assert all(width == max(count, 2) for count, width in widths)


def test_a_row_that_depends_on_the_tokens_beside_it_is_found(monkeypatch):
    """Equal rows come out equal there, but not the rows of a pass of different tokens."""
    linear = torch.nn.functional.linear

    def mixing(x, weight, bias=None):
        out = linear(x, weight)
        return out + 1e-3 * out.mean(dim=-2, keepdim=True)

    width = width_for(random_model(), 5)
    monkeypatch.setattr(torch.nn.functional, "linear", mixing)
    model = random_model()
    assert is_even(model, width)
    assert not passes_agree(model, width)
    assert exact_width(model, 5) is None


# ---------------------------------------------------------------- drafts that overflow

class Stubborn(Drafter):
    """Always proposes the same token."""

    def __init__(self, token: int):
        self.token = token

    def propose(self, text, most):
        count = min(most, 2)
        q = torch.zeros(text.model.config.vocab_size, device=DEVICE)
        q[self.token] = 1
        return Draft([self.token] * count, [q if text.temperature else None] * count)


def model_with_a_token_that_overflows(vocabulary: int, layers=3):
    """In float16. The text itself never has its last token, whose state is infinite from h_1 on."""
    model = random_model(layers, vocabulary, seed=1, residual=1.0, head_scale=0.6)
    model = model.to(torch.float16)
    model.embed.weight[-1] = 0
    model.embed.weight[-1, 0] = 6e4                      # float16 ends at 65504

    def double(module, given, out):
        return 2 * out

    def never_last(module, given, out):
        out[..., -1].fill_(-torch.inf)
        return out

    model.layers[0].register_forward_hook(double)
    model.head.register_forward_hook(never_last)
    return model


@pytest.mark.parametrize("width", [None, "exact"])
def test_a_drafted_token_that_overflows_leaves_greedy_text_as_it_is(width):
    model = model_with_a_token_that_overflows(61)
    states = model(torch.tensor([[60]], device=DEVICE))
    assert not states[-1].isfinite().all()
    width = width and width_for(model, 3)
    stats = Stats()
    cache = KVCache(model, 60, 8)
    written = decode(model, [1, 2, 3], 40, Stubborn(60), width=width, stats=stats, cache=cache)
    assert list(written) == list(autoregressive(model, [1, 2, 3], 40, width=width))
    assert stats.drafted > 40 and stats.accepted == 0
    assert valid(cache).isfinite().all()


@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize("prompt", [[1, 2, 3], [1]], ids=["prefill", "decoding"])
@pytest.mark.parametrize("decoding", [autoregressive, clasp])
def test_a_texts_own_keys_and_values_that_float16_cannot_hold_are_refused(part, prompt, decoding):
    """Also where the logits are finite all the same."""
    model = random_model(layers=3).to(torch.float16)
    layer = model.layers[1]
    rows = layer.kv_heads * layer.head_dim
    first = layer.heads * layer.head_dim + (rows if part == "values" else 0)
    layer.qkv.weight[first:first + rows] *= 3e4
    with pytest.raises(ModelError, match="too narrow"):
        list(decoding(model, prompt, 10))


@pytest.mark.thorough
def test_the_longest_draft_has_a_width_too(bundled):
    assert exact_width(bundled, BLOCK - 1) is None or exact_width(bundled, BLOCK) is not None


def test_a_token_that_overflows_does_not_hide_the_width():
    """The passes that are compared have random tokens, and such a one may be among them."""
    assert exact_width(model_with_a_token_that_overflows(vocabulary=4), 3) is not None


@pytest.mark.parametrize("width, error", [(None, 5e-3), ("exact", 1e-7)])
@pytest.mark.parametrize("nucleus", [{"temperature": 1.0}, NUCLEUS], ids=str)
def test_a_drafted_token_that_overflows_leaves_the_distribution_of_samples(width, error, nucleus):
    """Without a width, float16 rounds 1 row and 3 differently."""
    model = model_with_a_token_that_overflows(vocabulary=5)
    width = width and width_for(model, 3)
    settings = {"width": width, **nucleus}

    def plain():
        return autoregressive(model, PROMPT, 3, **settings)

    def drafted():
        return decode(model, PROMPT, 3, Stubborn(4), **settings)

    with pytest.MonkeyPatch.context() as patch:
        chance = Enumerated(patch)
        expected = chance.distribution(plain)
        got = chance.distribution(drafted)
    assert len(expected) > 8
    for text in expected | got:
        assert got[text] == pytest.approx(expected[text], abs=error)


def test_each_form_of_attention_is_asked():
    longs = {attention.LONG_BFLOAT16, attention.LONG_FLOAT32, attention.LONG_CUDA}
    assert set(extras.exact.LONG) == longs
