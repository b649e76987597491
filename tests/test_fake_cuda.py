"""Decoding on a GPU that is not there (fake_cuda.py): where tensors are, and how often it waits.

LLaMA-3-8B's shapes in bfloat16, eager and through CUDA graphs; in the quick tier with few layers.
"""
from functools import partial

import pytest
import torch
from fake_cuda import fake_cuda, load_guard

from bench.target import SHAPES
from dp_skip import select_layers
from extras.auto import Auto
from extras.cuda_graphs import GraphedLlama
from extras.packed import pack
from model import KVCache, Llama
from speculative import (
    Draft,
    Drafter,
    FixedSet,
    accept,
    autoregressive,
    clasp,
    decode,
    draft_by_skipping,
    full_pass,
    new_text,
    optimize,
    prefill,
    require_finite,
)

LLAMA = SHAPES["llama3-8b"]
PROMPT = list(range(30))
COSTLY = {"mm", "bmm", "mul", "_scaled_dot_product_efficient_attention", "index_copy_", "silu"}
FEW_LAYERS = 5


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    load_guard(tmp_path_factory.mktemp("guard"))


@pytest.fixture
def gpu(guard, monkeypatch):
    """The ``Watch`` of a GPU that is there during the test."""
    with fake_cuda(monkeypatch) as watch:
        yield watch


def llama(layers: int) -> Llama:
    """LLaMA-3-8B on the fake GPU, with so many of its layers, as generate.py prepares it."""
    config = type(LLAMA)(**vars(LLAMA) | {"num_hidden_layers": layers})
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return pack(Llama(config))
    finally:
        torch.set_default_dtype(torch.float32)


def as_it_is(model):
    return model


@pytest.fixture(params=[as_it_is, GraphedLlama], ids=["eager", "graphs"])
def through(request):
    return request.param


SETTINGS = {
    "greedy": {},
    "exact": {"width": 5},
    "sampled": {"temperature": 0.7},
    "top-p": {"temperature": 0.7, "top_p": 0.9},
}


def decode_by_all(model, settings: dict):
    """CLaSp, auto and plain decoding all finish: no operator has tensors on two devices."""
    texts = [
        clasp(model, PROMPT, 8, exit_threshold=0.3, opt_interval=1, **settings),
        clasp(model, PROMPT, 8, draft_length=3, **settings),
        decode(model, PROMPT, 8, Auto(model), **settings),
        autoregressive(model, PROMPT, 8, **settings),
    ]
    for text in texts:
        assert len(list(text)) == 8


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_all_tensors_of_decoding_are_on_the_gpu(gpu, through, settings):
    decode_by_all(through(llama(FEW_LAYERS)), settings)


@pytest.mark.thorough
def test_all_tensors_of_decoding_are_on_the_gpu_at_full_depth(gpu, through):
    decode_by_all(through(llama(LLAMA.num_hidden_layers)), SETTINGS["sampled"])


def test_tensors_on_two_devices_are_found(gpu):
    class Elsewhere(Drafter):
        def propose(self, text, most):
            return Draft([1], [torch.ones(LLAMA.vocab_size)])

    with pytest.raises(RuntimeError, match="devices, cuda:0 and cpu"):
        list(decode(llama(1), PROMPT, 8, Elsewhere(), temperature=1.0))


# ---------------------------------------------------------------- waiting for the GPU

def counts(gpu, work) -> tuple[int, int]:
    """How often ``work`` reads from the device, and sends to it; the second time it is done."""
    work()
    gpu.reset()
    work()
    return gpu.reads, gpu.uploads


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_draft_is_read_once_however_long(gpu, through, temperature):
    model = through(llama(FEW_LAYERS))
    text, _ = new_text(model, PROMPT, 20, temperature=temperature)

    def draft(length: int):
        draft_by_skipping(text, {2, 3}, length)
        text.roll_back()

    for length in (1, 4, 8):
        assert counts(gpu, partial(draft, length)) == (1, 1)


def test_each_pass_and_each_dp_is_waited_for_a_fixed_number_of_times(gpu, through):
    model = through(llama(FEW_LAYERS))
    cache = KVCache(model, 60, 20)
    hidden = prefill(model, cache, PROMPT)
    text, _ = new_text(model, PROMPT, 20)
    sampled, _ = new_text(model, PROMPT, 20, temperature=0.7)
    q = torch.full((LLAMA.vocab_size,), 1 / LLAMA.vocab_size, device="cuda")

    def verify(text, draft):
        _, logits = full_pass(model, text.cache, [5, *draft.tokens], 5)
        require_finite(logits)
        accept(text, draft, logits)
        text.roll_back()

    def choose():
        optimize(model, cache, hidden[:, -4:], 2, partial(select_layers, smallest=2))

    # The tokens chosen, and whether the logits are finite.
    assert counts(gpu, partial(verify, text, Draft([1, 2], [None, None]))) == (2, 1)
    # Whether they are finite, how many are accepted, whether p - q is empty, the last token.
    assert counts(gpu, partial(verify, sampled, Draft([1, 2], [q, q]))) == (4, 2)
    # The table of choices and the cosines.
    assert counts(gpu, choose) == (2, 0)


# ---------------------------------------------------------------- graphs

def test_a_recorded_pass_is_replayed_and_asks_for_no_other_kernel_of_the_model(gpu):
    layers = FEW_LAYERS
    model = GraphedLlama(llama(layers))
    text, hidden = new_text(model, PROMPT, 20, scratch=20)
    skip = {1, 3}
    work = {
        "plain": (partial(full_pass, model, text.cache, [5], None), layers + 2),
        "verify": (partial(full_pass, model, text.cache, [5, 6, 7], 5), layers + 2),
        "draft": (partial(draft_by_skipping, text, skip, 3), 3 * (layers - len(skip) + 2)),
    }
    for do, replays in work.values():
        for _ in range(2):
            gpu.reset()
            do()
            text.roll_back()
        assert gpu.replays == replays                    # layers run, what is before, the head
        assert not gpu.outside.keys() & COSTLY
        assert not gpu.inside


def test_a_long_text_is_attended_to_in_pieces(gpu, through):
    model = through(llama(2))
    text, _ = new_text(model, [1] * 1300, 200)
    gpu.reset()
    full_pass(model, text.cache, [5, 6, 7], 5)
    calls = (gpu.outside + gpu.inside)["_scaled_dot_product_efficient_attention"]
    assert calls >= 2                                    # of each layer: pieces, and a rest perhaps


def test_layers_that_a_fixed_set_skips_are_not_replayed(gpu):
    model = GraphedLlama(llama(FEW_LAYERS))
    for _ in range(2):                                   # the first time they are recorded
        gpu.reset()
        list(decode(model, PROMPT, 9, FixedSet({0, 1, 2}, 2)))
    # The fake host reads 0 for each token, so all is accepted: 3 cycles of 2 drafts and a pass.
    assert gpu.replays == 3 * (2 * (FEW_LAYERS - 3 + 2) + FEW_LAYERS + 2)
