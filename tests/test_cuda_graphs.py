"""cuda_graphs.py: decoding through graphs is decoding.

On a CPU the same path runs without recording, see its header; ``Tape`` stands in for a recording.
"""
import collections
import copy
import gc
import itertools
import weakref
from functools import partial

import pytest
import torch
from conftest import (
    DEVICE,
    all_but,
    as_decoded,
    feed,
    model_that_overflows,
    random_model,
    same_bits,
    tokens_of,
    valid,
    width_for,
)
from test_exact import Stubborn, check_bits_of_rows, model_with_a_token_that_overflows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dp_skip import select_layers
from extras import cuda_graphs
from extras.auto import Auto
from extras.cuda_graphs import GraphedLlama
from model import ALIGNED, BLOCK, KVCache, round_up
from speculative import (
    OPT_TOKENS,
    FixedSet,
    Stats,
    autoregressive,
    clasp,
    decode,
    draft_by_skipping,
    full_pass,
    new_text,
    optimize,
    prefill,
)

LONG = BLOCK - 20             # tokens of a prompt whose text crosses into the next block


def pair(**shape):
    """The same model twice: as it is, and through graphs."""
    return random_model(**shape), GraphedLlama(random_model(**shape))


def close(a, b) -> bool:
    return torch.allclose(a, b, atol=1e-4, rtol=1e-4)


def counted(monkeypatch) -> tuple[collections.Counter, collections.Counter]:
    """Counts captures and replays from now on, by (rows, slots, part)."""
    captures = collections.Counter()
    replays = collections.Counter()
    play = GraphedLlama.play

    def counting(self, current, part=None):
        key = (current.at.rows, current.mask.shape[1], part)
        captures[key] += part not in current.graphs
        replays[key] += 1
        play(self, current, part)

    monkeypatch.setattr(GraphedLlama, "play", counting)
    return captures, replays


# ---------------------------------------------------------------- a recording, on a CPU

ASK_THE_DEVICE = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.lift_fresh")


class Tape(TorchDispatchMode):
    """A CUDA graph on a CPU: the operators that ran, run again on the very same tensors.

    Memory that was allocated on the way belongs to no one afterwards, so it is spoiled; the host
    may ask for nothing. With one graph that goes, PyTorch frees a workspace of all others captured
    on its stream, so they may not be replayed then.
    """
    alive = weakref.WeakSet()

    def __init__(self):
        super().__init__()
        self.calls = []
        self.broken = False
        self.alive.add(self)

    def __del__(self):
        for other in self.alive:
            other.broken = True

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        assert str(operator.overloadpacket) not in ASK_THE_DEVICE
        out = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, out))
        return out

    def replay(self):
        assert not self.broken
        temporary = []
        for operator, args, kwargs, out in self.calls:
            anew = operator(*args, **kwargs)
            for recorded, tensor in zip(tree_leaves(out), tree_leaves(anew)):
                is_new = recorded.data_ptr() != tensor.data_ptr()    # neither a view nor in place
                if recorded.numel() and is_new:
                    recorded.copy_(tensor)
                    temporary.append(recorded)
        for tensor in temporary:
            spoil(tensor)


def spoil(tensor: torch.Tensor):
    if tensor.is_floating_point():
        tensor.fill_(torch.nan)
    else:
        tensor.fill_(True if tensor.dtype == torch.bool else 10 ** 9)


@pytest.fixture
def taped(monkeypatch):
    """Graphs are tapes."""
    def capture(self, work, at):
        self.captures += 1
        x = at.x.clone()
        tape = Tape()
        with tape:
            work()
        at.x.copy_(x)
        return tape.replay

    if DEVICE != "cpu":
        pytest.skip("stands in for recording")
    gc.collect()
    Tape.alive.clear()
    monkeypatch.setattr(GraphedLlama, "capture", capture)


# ---------------------------------------------------------------- passes

@pytest.mark.parametrize("skip", [(), {0}, {5}, {1, 2, 4}, set(range(6))], ids=str)
@pytest.mark.parametrize("rows, slots", [(1, None), (4, None), (5, 512), (20, 512), (30, None)])
def test_hidden_states_logits_and_cache_are_those_without_graphs(rows, slots, skip):
    """In passes that are captured, replayed, and replayed elsewhere after a roll-back."""
    eager, graphed = pair(context=1024)
    a = KVCache(eager, 400, 32)
    b = KVCache(graphed, 400, 32)
    prompt = tokens_of(eager, 300)
    prefill(eager, a, prompt)
    prefill(graphed, b, prompt)
    for seed in range(3):
        tokens = torch.tensor([tokens_of(eager, rows, seed)], device=DEVICE)
        expected = eager(tokens, a, skip, slots)
        got = graphed(tokens, b, skip, slots)
        assert len(got) == len(expected) == 7
        for state, wanted in zip(got, expected):
            assert state.shape == wanted.shape
            assert close(state, wanted)
        assert close(graphed.logits(got[-1]), eager.logits(expected[-1]))
        assert a.length == b.length
        assert close(valid(b), valid(a))
        a.length -= rows - 1
        b.length -= rows - 1


def test_without_a_cache_the_model_is_itself():
    eager, graphed = pair()
    tokens = torch.tensor([tokens_of(eager, 9)], device=DEVICE)
    expected = eager(tokens, skip={2})
    got = graphed(tokens, skip={2})
    assert all(close(a, b) for a, b in zip(got, expected))
    assert close(graphed.logits(got[3][0, -1]), eager.logits(expected[3][0, -1]))


def test_only_the_logits_of_a_passs_last_state_come_from_a_graph():
    eager, graphed = pair()
    token = torch.tensor([[7]], device=DEVICE)
    last = graphed(token, KVCache(graphed, 20))[-1]
    captures = graphed.captures
    assert close(graphed.logits(last.clone()), eager.logits(last))
    assert graphed.captures == captures
    assert close(graphed.logits(last), eager.logits(last))
    assert graphed.captures == captures + 1


def test_a_skipped_layer_is_a_graph_not_replayed(monkeypatch):
    graphed = GraphedLlama(random_model())
    captures, replays = counted(monkeypatch)
    cache = KVCache(graphed, 40)
    parts = (None, *range(6))
    for skip in ({1, 2}, (), {0, 5}):
        replays.clear()
        graphed(torch.tensor([[7]], device=DEVICE), cache, skip)
        assert replays == {(1, BLOCK, part): 1 for part in parts if part not in skip}
    assert captures == {(1, BLOCK, part): 1 for part in parts}
    assert cache.length == 3


# ---------------------------------------------------------------- decoding

@pytest.mark.parametrize("chosen", [
    {"skip_layers": 3, "draft_length": 4, "opt_interval": 3},
    {"skip_layers": 0, "draft_length": 2},
    {"skip_layers": 5, "draft_length": 6, "opt_interval": 1},
    {"skip_layers": 2, "draft_length": 4, "opt_interval": 2, "exit_threshold": 0.3},
    {"skip_layers": 3, "draft_length": 20, "opt_interval": 1},
], ids=str)
@pytest.mark.parametrize("length", [1, 2, LONG])
def test_greedy_text_and_cache_are_plain_decodings_bit_for_bit(chosen, length):
    eager, graphed = pair(context=1024)
    prompt = tokens_of(eager, length, seed=length)
    width = width_for(graphed, chosen["draft_length"] + 1)
    plain = KVCache(graphed, 400, width)
    cache = KVCache(graphed, 400, width)
    stats = Stats()
    expected = list(autoregressive(graphed, prompt, 60, width=width, cache=plain))
    written = clasp(graphed, prompt, 60, width=width, cache=cache, stats=stats, **chosen)
    assert list(written) == expected
    assert stats.accepted
    assert cache.length == plain.length == length + 59
    assert same_bits(valid(cache), valid(plain))
    assert expected == list(autoregressive(graphed, prompt, 60))
    assert expected == list(autoregressive(eager, prompt, 60))
    assert expected == list(clasp(graphed, prompt, 60, **chosen))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [2, LONG])
def test_in_16_bits_greedy_text_and_cache_are_plain_decodings_bit_for_bit(dtype, length):
    graphed = GraphedLlama(as_decoded(random_model(context=1024).to(dtype)))
    prompt = tokens_of(graphed, length)
    width = width_for(graphed, 5)
    plain = KVCache(graphed, 400, width)
    cache = KVCache(graphed, 400, width)
    stats = Stats()
    settings = {"width": width, "cache": cache, "stats": stats}
    expected = list(autoregressive(graphed, prompt, 60, width=width, cache=plain))
    assert list(clasp(graphed, prompt, 60, opt_interval=3, **settings)) == expected
    assert stats.accepted
    assert same_bits(valid(cache), valid(plain))


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU records nothing")
def test_every_part_of_a_pass_is_a_recording():
    graphed = GraphedLlama(random_model())
    cache = KVCache(graphed, 60)
    prefill(graphed, cache, [1, 2, 3])
    full_pass(graphed, cache, [4, 5], None)
    [current] = graphed.in_use[cache].passes.values()
    parts = [*current.graphs.values(), current.at.head]
    assert len(parts) == 1 + 6 + 1
    assert all(isinstance(part.__self__, torch.cuda.CUDAGraph) for part in parts)


def test_verify_logits_are_plain_decodings_bit_for_bit(bundled):
    """On a model that is large enough for kernels to round differently for 4 rows and for 5."""
    graphed = GraphedLlama(copy.deepcopy(bundled))
    check_bits_of_rows(graphed, BLOCK - 4, BLOCK + 4)


@pytest.mark.thorough
def test_verify_logits_are_plain_decodings_bit_for_bit_at_length(bundled):
    graphed = GraphedLlama(copy.deepcopy(bundled))
    check_bits_of_rows(graphed, LONG, LONG + 39)


def test_sampled_text_is_that_without_graphs():
    eager, graphed = pair()
    for seed in range(5):
        sampling = {"temperature": 0.8, "top_p": 0.9, "seed": seed}
        for method in (clasp, autoregressive):
            expected = list(method(eager, [1, 2, 3], 60, **sampling))
            assert list(method(graphed, [1, 2, 3], 60, **sampling)) == expected


@pytest.mark.thorough
def test_the_bundled_model_drafts_the_same_on_graphs(bundled):
    graphed = GraphedLlama(copy.deepcopy(bundled))
    skip_layers = all_but(3, bundled)
    chosen = {"skip_layers": skip_layers, "draft_length": 3, "opt_interval": 5}
    with_graphs = Stats()
    without = Stats()
    expected = list(autoregressive(bundled, [5, 6, 7], 80))
    assert list(clasp(graphed, [5, 6, 7], 80, stats=with_graphs, **chosen)) == expected
    list(clasp(bundled, [5, 6, 7], 80, stats=without, **chosen))
    assert with_graphs.skip_sets == without.skip_sets
    assert with_graphs.from_draft == without.from_draft


def test_auto_decides_on_graphs_as_without():
    costs = {"draft": 1.0, "plain": 1.0, "verify": 1.0, "optimize": 0.5}
    texts = []
    for model in pair(residual=0.1):
        stats = Stats()
        list(decode(model, [1, 2, 3], 60, Auto(model, 4, costs), stats=stats))
        texts.append(stats)
    without, with_graphs = texts
    assert without.drafted > 0
    assert with_graphs.tokens == without.tokens
    assert with_graphs.drafted == without.drafted
    assert with_graphs.skip_sets == without.skip_sets


def test_decoding_may_stop_anywhere_and_go_on():
    eager, graphed = pair()
    expected = list(autoregressive(eager, [1, 2, 3], 30))
    for taken in (1, 2, 5, 11):
        cache = KVCache(graphed, 60, 8)
        written = clasp(graphed, [1, 2, 3], 30, opt_interval=2, cache=cache)
        got = list(itertools.islice(written, taken))
        got += autoregressive(graphed, [1, 2, 3, *got], 4, cache=cache)
        got += clasp(graphed, [1, 2, 3, *got], 26 - taken, cache=cache)
        assert got == expected


# ---------------------------------------------------------------- what overflows

@pytest.mark.parametrize("width", [None, 8])
def test_a_draft_that_overflows_leaves_no_trace(width):
    graphed = GraphedLlama(model_that_overflows())
    expected = list(autoregressive(model_that_overflows(), [1, 2, 3], 30))
    cache = KVCache(graphed, 40, 8)
    stats = Stats()
    settings = {"width": width, "cache": cache, "stats": stats}
    assert list(decode(graphed, [1, 2, 3], 30, FixedSet({3}), **settings)) == expected
    assert stats.drafted and not stats.accepted
    assert valid(cache).isfinite().all()


def test_what_a_draft_overflows_to_lies_behind_the_texts_slots():
    graphed = GraphedLlama(model_that_overflows())
    text, _ = new_text(graphed, [1, 2, 3], 20)
    n = text.cache.length
    draft_by_skipping(text, {3}, 4)
    assert valid(text.cache, n).isfinite().all()
    assert not text.cache.slots[:, 4, ..., n, :].isfinite().any()


@pytest.mark.parametrize("width", [None, "exact"])
def test_a_drafted_token_that_overflows_float16_leaves_text_as_it_is(width):
    graphed = GraphedLlama(model_with_a_token_that_overflows(61))
    width = width and width_for(graphed, 3)
    expected = list(autoregressive(graphed, [1, 2, 3], 40, width=width))
    stats = Stats()
    cache = KVCache(graphed, 60, 8)
    settings = {"width": width, "cache": cache, "stats": stats}
    assert list(decode(graphed, [1, 2, 3], 40, Stubborn(60), **settings)) == expected
    assert stats.drafted > 40 and not stats.accepted
    assert valid(cache).isfinite().all()


# ---------------------------------------------------------------- the DP

def test_chosen_sets_are_those_without_graphs():
    eager, graphed = pair(layers=10, context=1024)
    asked = [(budget, least) for budget in (0, 1, 5, 9) for least in (0, budget)]
    for n in (1, 2, 17, BLOCK - 3, BLOCK, BLOCK + 1, 300):
        tokens = tokens_of(eager, n, seed=n)
        found = []
        for model in (eager, graphed):
            cache = KVCache(model, 301)
            hidden = feed(model, cache, tokens)
            before = valid(cache).clone()
            for budget, least in asked:
                select = partial(select_layers, smallest=least)
                found.append(optimize(model, cache, hidden, budget, select))
            assert cache.length == n
            assert same_bits(valid(cache), before)
            assert not cache.slots[..., n:n + 9, :].any()
        for without, with_graphs in zip(found, found[len(asked):]):
            assert with_graphs.skip_sets == without.skip_sets
            assert with_graphs.cosines == pytest.approx(without.cosines, abs=1e-5)


def test_the_dp_runs_on_graphs_of_one_shape(monkeypatch):
    graphed = GraphedLlama(random_model())
    captures, replays = counted(monkeypatch)
    stats = Stats()
    list(clasp(graphed, [1, 2, 3], 40, skip_layers=3, opt_interval=1, stats=stats))
    assert stats.optimizations > 1
    rows = 3 * OPT_TOKENS                                # of candidates, once there are 8 tokens
    assert replays[rows, BLOCK, None] > stats.optimizations // 2
    assert replays[rows, BLOCK, 3]
    assert set(captures.values()) <= {0, 1}


@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_sets_chosen_by_several_tokens_are_those_without_graphs(tokens):
    eager, graphed = pair(layers=10)
    found = []
    for model in (eager, graphed):
        cache = KVCache(model, 50, 10 * tokens)
        hidden = prefill(model, cache, tokens_of(eager, 40))[:, -tokens:]
        before = valid(cache).clone()
        found.append(optimize(model, cache, hidden, 9))
        assert same_bits(valid(cache), before)
    assert found[1].skip_sets == found[0].skip_sets
    assert found[1].cosines == pytest.approx(found[0].cosines, abs=1e-5)


def test_candidates_do_not_see_what_was_in_their_rows_before():
    eager, graphed = pair()
    tokens = tokens_of(eager, 9)
    cache = KVCache(eager, 40)
    hidden = feed(eager, cache, tokens)
    expected = eager.candidate_layer(cache, 4)(1, hidden[:2])

    cache = KVCache(graphed, 40)
    hidden = feed(graphed, cache, tokens)
    layer = graphed.candidate_layer(cache, 4)
    layer(0, torch.full((4, 32), torch.inf, device=DEVICE))
    kept = layer(1, hidden[:2])
    assert close(kept, expected)
    layer(2, hidden[:4])
    assert close(kept, expected)                         # and stays what it was


# ---------------------------------------------------------------- what is recorded

def check_recordings(length: int, texts: int):
    """Texts, skip sets, places and blocks change; operators and addresses stay."""
    eager, graphed = pair(context=1024)
    width = width_for(graphed, 5)
    chosen = {"skip_layers": 3, "draft_length": 4, "opt_interval": 2, "width": width}
    for seed in range(texts):
        prompt = tokens_of(eager, length, seed)
        expected = list(autoregressive(eager, prompt, 35))
        without = Stats()
        stats = Stats()
        eager_cache, plain, cache = (KVCache(model, 300, 3 * OPT_TOKENS)
                                     for model in (eager, graphed, graphed))
        written = clasp(eager, prompt, 35, stats=without, cache=eager_cache, **chosen)
        assert list(written) == expected
        assert list(autoregressive(graphed, prompt, 35)) == expected
        one_shape = autoregressive(graphed, prompt, 35, width=width, cache=plain)
        assert list(one_shape) == expected
        assert list(clasp(graphed, prompt, 35, stats=stats, cache=cache, **chosen)) == expected
        assert same_bits(valid(cache), valid(plain))
        assert stats.skip_sets == without.skip_sets
        assert stats.drafted == without.drafted
        assert len(set(stats.skip_sets)) > 2


@pytest.mark.parametrize("length", [2, LONG])
def test_what_is_recorded_knows_nothing_of_the_pass_it_was_recorded_in(taped, length):
    check_recordings(length, texts=2)


def test_what_is_recorded_in_float16_asks_the_device_for_nothing(taped):
    """There, keys and values go into the cache without what overflowed."""
    graphed = GraphedLlama(model_with_a_token_that_overflows(61))
    expected = list(autoregressive(model_with_a_token_that_overflows(61), [1, 2, 3], 12))
    assert list(decode(graphed, [1, 2, 3], 12, Stubborn(60))) == expected


def test_graphs_are_dropped_together_or_not_at_all(taped, monkeypatch):
    """A longer text drops the memory of a shorter one, while another text is being written."""
    monkeypatch.setattr(cuda_graphs, "MOST_PASSES", 5)
    eager, graphed = pair(context=1024)
    expected = list(autoregressive(eager, [1, 2, 3], 30))
    alive = autoregressive(graphed, [1, 2, 3], 30, cache=KVCache(graphed, 300, 8))
    for i, length in enumerate((20, 250, 20, 240, 10)):
        prompt = tokens_of(eager, length, i)
        written = clasp(graphed, prompt, 20, opt_interval=2)
        assert list(written) == list(autoregressive(eager, prompt, 20))
        assert next(alive) == expected[i]
        gc.collect()


def test_passes_and_the_dp_run_outside_inference_mode_too():
    """Graphs keep their tensors from pass to pass, whatever mode the first pass was made in."""
    eager, graphed = pair()
    chosen = []
    for model in (eager, graphed):
        with torch.inference_mode(False), torch.no_grad():
            cache = KVCache(model, 40)
            hidden = prefill(model, cache, [1, 2, 3])
            chosen.append(optimize(model, cache, hidden[:, -1], 3).skip_sets)
            model(torch.tensor([[4]], device=DEVICE), cache)
    assert chosen[0] == chosen[1]


# ---------------------------------------------------------------- how much is captured

def test_a_second_text_needs_no_captures():
    eager, graphed = pair(context=1024)
    prompt = tokens_of(graphed, LONG)
    chosen = {"skip_layers": 3, "draft_length": 4, "opt_interval": 2, "width": 5}
    first = list(clasp(graphed, prompt, 60, **chosen))
    captures = graphed.captures
    # In two blocks, of 1, K + 1 and M rows: what comes before the layers, and 6 layers; two heads.
    assert 30 < captures <= 2 * 3 * (1 + 6) + 2
    assert list(clasp(graphed, prompt, 60, **chosen)) == first
    assert graphed.captures == captures
    # A shorter text fits into the memory of the first; perhaps with a layer skipped so far.
    shorter = list(clasp(graphed, prompt[:100], 60, **chosen))
    assert shorter == list(clasp(eager, prompt[:100], 60, **chosen))
    # And the DP's rows, which reached into a second block, may now lie in the first.
    assert graphed.captures <= captures + 6 + (1 + 6)
    assert len(graphed.empty) == 1


def test_a_long_text_asks_for_few_kinds_of_passes():
    graphed = GraphedLlama(random_model(layers=2, context=8192))
    cache = KVCache(graphed, 8192)
    kinds = set()
    for end in range(1, 8193, 61):
        slots = graphed.begin(cache, 1, end).mask.shape[1]
        assert end <= slots < max(1.3 * end, end + BLOCK)
        kinds.add(slots)
    assert len(kinds) == graphed.captures == 20


def test_no_more_than_so_many_kinds_of_passes_are_kept(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MOST_PASSES", 2)
    eager, graphed = pair()
    cache = KVCache(graphed, 60, 8)
    written = clasp(graphed, [1, 2, 3], 40, opt_interval=2, cache=cache)
    assert list(written) == list(autoregressive(eager, [1, 2, 3], 40))
    assert len(graphed.in_use[cache].passes) <= 2


# ---------------------------------------------------------------- caches that come and go

def test_each_cache_alive_has_its_own_memory():
    eager, graphed = pair()
    a = KVCache(graphed, 60)
    b = KVCache(graphed, 60)
    texts = []
    expected = []
    for seed, cache in ((1, a), (2, b)):
        prompt = tokens_of(graphed, 9, seed)
        texts.append(autoregressive(graphed, prompt, 30, cache=cache))
        expected.append(autoregressive(eager, prompt, 30))
    assert list(zip(*texts)) == list(zip(*expected))     # token by token in turn
    assert a.slots.data_ptr() != b.slots.data_ptr()
    assert len(graphed.in_use) == 2
    assert not graphed.empty


def test_a_new_cache_takes_the_place_of_one_that_is_gone():
    """With what it holds already, and nothing that the old one held."""
    eager, graphed = pair()
    tokens = tokens_of(eager, 40)
    cache = KVCache(graphed, 200)
    feed(graphed, cache, tokens)
    feed(graphed, cache, [1])
    address = cache.slots.data_ptr()
    captures = graphed.captures
    cache.slots[..., 100:, :] = torch.nan
    del cache
    gc.collect()
    assert len(graphed.empty) == 1
    assert not graphed.in_use

    filled = KVCache(graphed, 60)
    check = KVCache(eager, 60)
    feed(eager, filled, tokens[:20])                     # before it meets the graphs
    feed(eager, check, tokens[:20])
    for token in tokens[20:30]:
        assert close(feed(graphed, filled, [token]), feed(eager, check, [token]))
    assert filled.slots.data_ptr() == address
    assert graphed.captures == captures
    assert not graphed.empty
    assert filled.slots.isfinite().all()


def test_a_cache_moves_in_with_what_lies_behind_its_length():
    """As the bench sets a text back, chooses layers there and goes on."""
    eager, graphed = pair()
    list(autoregressive(graphed, tokens_of(eager, 40), 60))
    gc.collect()
    cache = KVCache(graphed, 60)
    feed(eager, cache, tokens_of(eager, 50))             # before it meets the graphs
    expected = cache.slots[..., :50, :].clone()
    cache.length = 20
    assert graphed.empty
    feed(graphed, cache, [1])
    assert not graphed.empty
    assert torch.equal(cache.slots[..., 21:50, :], expected[..., 21:, :])


def test_a_cache_that_is_too_small_is_not_kept():
    eager, graphed = pair(context=1024)
    list(autoregressive(graphed, [1, 2], 20))
    assert [memory.capacity for memory in graphed.empty] == [round_up(BLOCK + 6, ALIGNED)]
    prompt = tokens_of(graphed, 20)
    written = list(autoregressive(graphed, prompt, BLOCK + 40))
    assert written == list(autoregressive(eager, prompt, BLOCK + 40))
    assert [memory.capacity for memory in graphed.empty] == [round_up(2 * BLOCK + 6, ALIGNED)]
