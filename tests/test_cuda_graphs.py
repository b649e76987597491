"""cuda_graphs.py: decoding through graphs is decoding. On a CPU the same path runs without recording, see its header."""
import collections
import copy
import functools
import gc
import itertools
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cuda_graphs
from auto import Auto
from conftest import DEVICE, feed, random_model, tokens_of
from cuda_graphs import GraphedLlama
from dp_skip import Selection, select_layers
from exact import exact_width, full_pass
from model import BLOCK, KVCache, attention
from packed import folded_attention, pack
from speculative import Stats, autoregressive, candidate_layer, clasp, draft, optimize, pick, prefill

GREEDY = functools.partial(pick, temperature=0, top_p=1, rng=None)
LONG = BLOCK - 20                      # a prompt from which a text of some dozens of tokens crosses into the next block


def pair(**shape):
    """The same model twice: as it is, and through graphs."""
    return random_model(**shape), GraphedLlama(random_model(**shape))


def close(a, b):
    return torch.allclose(a, b, atol=1e-4, rtol=1e-4)


def valid(cache, n):
    return cache.slots[..., :n, :]


def counted(monkeypatch):
    """Counts captures and replays, by (rows, slots, part)."""
    captures, replays, play = collections.Counter(), collections.Counter(), GraphedLlama.play

    def counting(self, this, part=None):
        key = this.at.rows, this.mask.shape[1], part
        captures[key] += part not in this.graphs
        replays[key] += 1
        play(self, this, part)

    monkeypatch.setattr(GraphedLlama, "play", counting)
    return captures, replays


class Tape(TorchDispatchMode):
    """A CUDA graph on a CPU: the operators that ran, run again on the very same tensors, whatever Python says by now.

    Memory that was allocated on the way belongs to no one afterwards, so it is spoiled; the host may ask for nothing. With
    one graph that goes, PyTorch frees a workspace of all others captured on its stream, so they may not be replayed then.
    """
    alive = weakref.WeakSet()

    def __init__(self):
        super().__init__()
        self.calls, self.broken = [], False
        self.alive.add(self)

    def __del__(self):
        for other in self.alive:
            other.broken = True

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        assert str(operator.overloadpacket) not in ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.lift_fresh")
        out = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, out))
        return out

    def replay(self):
        temporary = []
        assert not self.broken
        for operator, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(operator(*args, **kwargs))):
                if old.numel() and old.data_ptr() != new.data_ptr():       # neither a view nor in place
                    old.copy_(new)
                    temporary.append(old)
        for tensor in temporary:
            tensor.fill_(torch.nan if tensor.is_floating_point() else True if tensor.dtype == torch.bool else 10 ** 9)


@pytest.fixture
def taped(monkeypatch):
    def capture(self, work, at):
        self.captures += 1
        x, tape = at.x.clone(), Tape()
        with tape:
            work()
        at.x.copy_(x)
        return tape.replay

    gc.collect()
    Tape.alive.clear()
    monkeypatch.setattr(GraphedLlama, "capture", capture)


# ---------------------------------------------------------------- attention

@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (6, 1), (3, 3)])
def test_folded_attention_is_attention(rows, heads, kv_heads):
    torch.manual_seed(rows)
    q, kv = torch.randn(1, heads, rows, 16, device=DEVICE), torch.randn(2, 1, kv_heads, 32, 16, device=DEVICE)
    mask = torch.full((rows, 32), -torch.inf, device=DEVICE).masked_fill(torch.rand(rows, 32, device=DEVICE) < 0.5, 0)
    mask[:, 0] = 0
    assert torch.allclose(folded_attention(q, *kv, mask), attention(q, *kv, mask), atol=1e-5)
    assert torch.allclose(folded_attention(q, *kv, mask.repeat(heads // kv_heads, 1)), attention(q, *kv, mask), atol=1e-5)
    slots = 32 if rows == 1 else rows                          # without a mask: one row sees all, several are causal
    k, v = kv[:, :, :, :slots]
    assert torch.allclose(folded_attention(q, k, v, None), attention(q, k, v, None), atol=1e-5)


def test_on_cuda_pack_exchanges_attention_and_keeps_cudnns_out():
    layer, embed = SimpleNamespace(), SimpleNamespace(weight=SimpleNamespace(device=torch.device("cuda")))
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        pack(SimpleNamespace(layers=[layer], embed=embed))
        assert layer.attend is folded_attention and not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


def test_folded_attention_repeats_no_keys_or_values(monkeypatch):
    given, kernel = [], torch.nn.functional.scaled_dot_product_attention

    def seen(q, k, v, **settings):
        given.append((q.shape, k.data_ptr(), settings))
        return kernel(q, k, v, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    q, kv = torch.randn(1, 8, 3, 16, device=DEVICE), torch.randn(2, 1, 2, 32, 16, device=DEVICE)
    folded_attention(q, *kv, torch.zeros(3, 32, device=DEVICE))
    (shape, address, settings), = given
    assert shape == (1, 2, 12, 16) and address == kv.data_ptr() and not settings.get("enable_gqa")


# ---------------------------------------------------------------- passes

@pytest.mark.parametrize("skip", [(), {0}, {5}, {1, 2, 4}, set(range(6))])
@pytest.mark.parametrize("rows, slots", [(1, None), (4, None), (5, 512), (20, 512), (30, None)])
def test_hidden_states_logits_and_cache_are_those_without_graphs(rows, slots, skip):
    eager, graphed = pair(context=1024)
    caches, prompt = [KVCache(model, 400, 32) for model in (eager, graphed)], tokens_of(eager, 300)
    for model, cache in zip((eager, graphed), caches):
        prefill(model, cache, prompt)
    for seed in range(3):                              # captured, replayed, replayed elsewhere
        tokens = torch.tensor([tokens_of(eager, rows, seed)], device=DEVICE)
        expected, got = (model(tokens, cache, skip, slots) for model, cache in zip((eager, graphed), caches))
        assert len(got) == len(expected) == 7 and all(a.shape == b.shape and close(a, b) for a, b in zip(got, expected))
        assert close(graphed.logits(got[-1]), eager.logits(expected[-1]))
        assert caches[0].length == caches[1].length and close(*(valid(cache, cache.length) for cache in caches))
        for cache in caches:
            cache.length -= rows - 1                   # a roll-back


def test_without_a_cache_and_for_other_states_the_model_is_itself():
    eager, graphed = pair()
    tokens = torch.tensor([tokens_of(eager, 9)], device=DEVICE)
    expected, got = eager(tokens, skip={2}), graphed(tokens, skip={2})
    assert all(close(a, b) for a, b in zip(got, expected)) and close(graphed.logits(got[3][0, -1]), eager.logits(expected[3][0, -1]))
    cache = KVCache(graphed, 20)
    last = graphed(tokens[:, :1], cache)[-1]
    captures = graphed.captures
    assert close(graphed.logits(last.clone()), eager.logits(last)) and graphed.captures == captures
    assert close(graphed.logits(last), eager.logits(last)) and graphed.captures == captures + 1


def test_a_skipped_layer_is_a_graph_not_replayed(monkeypatch):
    graphed, cache = GraphedLlama(random_model()), None
    captures, replays = counted(monkeypatch)
    cache = KVCache(graphed, 40)
    for skip in ({1, 2}, (), {0, 5}):
        replays.clear()
        graphed(torch.tensor([[7]], device=DEVICE), cache, skip)
        assert replays == {(1, BLOCK, part): 1 for part in (None, *range(6)) if part not in skip}
    assert captures == {(1, BLOCK, part): 1 for part in (None, *range(6))} and cache.length == 3


# ---------------------------------------------------------------- decoding

@pytest.mark.parametrize("settings", [
    dict(skip_layers=3, draft_length=4, opt_interval=3), dict(skip_layers=0, draft_length=2), dict(skip_layers=5, draft_length=6, opt_interval=1),
    dict(skip_layers=2, draft_length=4, opt_interval=2, exit_threshold=0.3), dict(skip_layers=3, draft_length=20, opt_interval=1)], ids=str)
@pytest.mark.parametrize("length", [1, 2, LONG])
def test_greedy_text_and_cache_are_plain_decodings_bit_for_bit(settings, length):
    eager, graphed = pair(context=1024)
    prompt, stats = tokens_of(eager, length, seed=length), Stats()
    width = exact_width(graphed, settings["draft_length"] + 1)
    plain, cache = KVCache(graphed, 400, width), KVCache(graphed, 400, width)
    expected = list(autoregressive(graphed, prompt, 60, width=width, cache=plain))
    assert list(clasp(graphed, prompt, 60, cache=cache, stats=stats, **settings)) == expected
    assert torch.equal(valid(cache, length + 59), valid(plain, length + 59))
    assert expected == list(autoregressive(graphed, prompt, 60)) == list(autoregressive(eager, prompt, 60)) and stats.accepted
    assert expected == list(clasp(graphed, prompt, 60, exact=False, **settings))


def test_verify_logits_are_plain_decodings_bit_for_bit(bundled):
    graphed = GraphedLlama(copy.deepcopy(bundled))     # large enough for kernels to round differently for 4 rows and for 5
    width, text = exact_width(graphed, 5), tokens_of(graphed, LONG + 40)
    at_once, singly, narrow = KVCache(graphed, 400, width), KVCache(graphed, 400, width), 0
    for cache in (at_once, singly):
        prefill(graphed, cache, text[:LONG])
    while at_once.length < LONG + 39:
        n = at_once.length
        tokens = text[n:min(n + 1 + n % 5, (n // BLOCK + 1) * BLOCK, LONG + 39)]
        together = full_pass(graphed, at_once, tokens, width)[1].clone()
        alone = [full_pass(graphed, singly, [token], width)[1][0].clone() for token in tokens]
        assert torch.equal(together, torch.stack(alone))
        narrow += len(tokens) < 5
    assert narrow and torch.equal(valid(at_once, LONG + 39), valid(singly, LONG + 39))


def test_sampled_text_is_that_without_graphs():
    eager, graphed = pair()
    for seed in range(5):
        settings = dict(temperature=0.8, top_p=0.9, seed=seed)
        assert list(clasp(graphed, [1, 2, 3], 60, **settings)) == list(clasp(eager, [1, 2, 3], 60, **settings))
        assert list(autoregressive(graphed, [1, 2, 3], 60, **settings)) == list(autoregressive(eager, [1, 2, 3], 60, **settings))


def test_the_bundled_model_too(bundled):
    graphed = GraphedLlama(copy.deepcopy(bundled))
    stats, expected = Stats(), list(autoregressive(bundled, [5, 6, 7], 80))
    assert expected == list(clasp(graphed, [5, 6, 7], 80, skip_layers=14, draft_length=3, opt_interval=5, stats=stats))
    without = Stats()
    list(clasp(bundled, [5, 6, 7], 80, skip_layers=14, draft_length=3, opt_interval=5, stats=without))
    assert stats.skip_sets == without.skip_sets and stats.from_draft == without.from_draft


def test_a_draft_that_overflows_leaves_no_trace():
    """Layer 4 makes NaN of all that has not passed layer 3; a draft without it gets no further than NaN in the cache."""
    def model_that_overflows(graphs: bool):
        model = random_model()
        sign = torch.zeros(32, device=DEVICE)
        sign[0] = 1e4
        model.layers[3].register_forward_hook(lambda module, given, out: out + sign)
        model.layers[4].register_forward_pre_hook(
            lambda module, given: (torch.where(given[0][..., :1] > 5e3, given[0] - sign, torch.nan), *given[1:]))
        return GraphedLlama(model) if graphs else model

    eager, graphed = model_that_overflows(False), model_that_overflows(True)
    expected = list(autoregressive(eager, [1, 2, 3], 30))
    for exact in (True, False):
        cache, stats = KVCache(graphed, 40, 8), Stats()
        written = clasp(graphed, [1, 2, 3], 30, exact=exact, stats=stats, cache=cache,
                        optimizer=lambda *_: Selection([frozenset({3})], []))
        assert list(written) == expected and stats.drafted == 0
        assert valid(cache, cache.length).isfinite().all()
    assert draft(graphed, cache, 5, {3}, 4, bool, GREEDY, ()) == ([], [])
    assert not cache.slots[:, 4, ..., cache.length, :].isfinite().any()


@pytest.mark.skipif(DEVICE != "cpu", reason="stands in for recording")
@pytest.mark.parametrize("length", [2, LONG])
def test_what_is_recorded_knows_nothing_of_the_pass_it_was_recorded_in(taped, length):
    """Texts, skip sets, places and blocks change; operators and addresses stay."""
    eager, graphed = pair(context=1024)
    settings, width = dict(skip_layers=3, draft_length=4, opt_interval=2), exact_width(graphed, 5)
    for seed in range(2):
        prompt, stats, without = tokens_of(eager, length, seed), Stats(), Stats()
        expected = list(autoregressive(eager, prompt, 35))
        assert expected == list(clasp(eager, prompt, 35, stats=without, **settings)) == list(autoregressive(graphed, prompt, 35))
        plain, cache = KVCache(graphed, 300, width), KVCache(graphed, 300, width)
        assert expected == list(autoregressive(graphed, prompt, 35, width=width, cache=plain))
        assert expected == list(clasp(graphed, prompt, 35, stats=stats, cache=cache, **settings))
        assert torch.equal(valid(cache, length + 34), valid(plain, length + 34))
        assert stats.skip_sets == without.skip_sets and stats.drafted == without.drafted and len(set(stats.skip_sets)) > 2


# ---------------------------------------------------------------- the dynamic programme

def test_chosen_sets_are_those_without_graphs():
    eager, graphed = pair(layers=10, context=1024)
    for n in (1, 2, 17, BLOCK - 3, BLOCK, BLOCK + 1, 300):
        text, found = tokens_of(eager, n, seed=n), []
        for model in (eager, graphed):
            cache = KVCache(model, 301)
            hidden = feed(model, cache, text)
            before = valid(cache, n).clone()
            found.append([optimize(model, cache, hidden, budget, functools.partial(select_layers, smallest=smallest))
                          for budget in (0, 1, 5, 9) for smallest in (0, budget)])
            assert torch.equal(valid(cache, n), before) and cache.length == n and not cache.slots[..., n:n + 9, :].any()
        assert [f.skip_sets for f in found[0]] == [f.skip_sets for f in found[1]]
        assert all(a.cosines == pytest.approx(b.cosines, abs=1e-5) for a, b in zip(*found))


def test_the_programme_runs_on_graphs_of_one_shape(monkeypatch):
    graphed = GraphedLlama(random_model())
    captures, replays = counted(monkeypatch)
    list(clasp(graphed, [1, 2, 3], 40, skip_layers=3, draft_length=4, opt_interval=1, stats=(stats := Stats())))
    slots = min(BLOCK, KVCache(graphed, 43, 5).slots.shape[-2])
    assert replays[3, slots, None] >= stats.optimizations and replays[3, slots, 3] and set(captures.values()) <= {0, 1}


def test_candidates_do_not_see_what_was_in_their_rows_before():
    eager, graphed = pair()
    caches, text = [KVCache(model, 40) for model in (eager, graphed)], tokens_of(eager, 9)
    hidden = [feed(model, cache, text) for model, cache in zip((eager, graphed), caches)]
    expected = candidate_layer(eager, caches[0], 4)(1, hidden[0][:2])
    layer = graphed.candidate_layer(caches[1], 4)
    layer(0, torch.full((4, 32), torch.inf, device=DEVICE))
    kept = layer(1, hidden[1][:2])
    assert close(kept, expected)
    layer(2, hidden[1][:4])
    assert close(kept, expected)                       # and stays what it was


# ---------------------------------------------------------------- captures, and caches that come and go

def test_a_second_text_needs_no_captures():
    graphed = GraphedLlama(random_model(context=1024))
    prompt, settings = tokens_of(graphed, LONG), dict(skip_layers=3, draft_length=4, opt_interval=2)
    first = list(clasp(graphed, prompt, 60, **settings))
    captures = graphed.captures
    assert 30 < captures <= 2 * 3 * (1 + 6) + 2             # for two blocks and rows 1, K+1, M: start and 6 layers; two heads
    assert list(clasp(graphed, prompt, 60, **settings)) == first and graphed.captures == captures
    shorter = list(clasp(graphed, prompt[:100], 60, **settings))               # fits into the memory of the first
    assert graphed.captures <= captures + 6 and len(graphed.empty) == 1        # a layer that all drafts skipped so far
    assert shorter == list(clasp(random_model(context=1024), prompt[:100], 60, **settings))


def test_a_long_text_asks_for_few_kinds_of_passes():
    graphed = GraphedLlama(random_model(layers=2, context=8192))
    cache, slots = KVCache(graphed, 8192), set()
    for end in range(1, 8193, 61):
        slots.add(looked := graphed.begin(cache, 1, end).mask.shape[1])
        assert end <= looked < max(1.3 * end, end + BLOCK)
    assert len(slots) == 20 and graphed.captures == 20


def test_each_cache_alive_has_its_own_memory():
    graphed = GraphedLlama(random_model())
    a, b = KVCache(graphed, 60), KVCache(graphed, 60)
    first, second = tokens_of(graphed, 9, 1), tokens_of(graphed, 9, 2)
    expected = [list(autoregressive(random_model(), prompt, 30)) for prompt in (first, second)]
    both = [autoregressive(graphed, prompt, 30, cache=cache) for prompt, cache in ((first, a), (second, b))]
    assert list(zip(*both)) == list(zip(*expected))
    assert a.slots.data_ptr() != b.slots.data_ptr() and len(graphed.homes) == 2 and not graphed.empty


def test_a_new_cache_takes_the_place_of_one_that_is_gone_with_what_it_holds():
    eager, graphed = pair()
    text = tokens_of(eager, 40)
    cache = KVCache(graphed, 200)
    feed(graphed, cache, text)
    graphed(torch.tensor([[1]], device=DEVICE), cache)
    address, captures = cache.slots.data_ptr(), graphed.captures
    cache.slots[..., 100:, :] = torch.nan
    del cache
    gc.collect()
    assert len(graphed.empty) == 1 and not graphed.homes
    filled, check = KVCache(graphed, 60), KVCache(eager, 60)
    feed(eager, filled, text[:20])                     # before it meets the graphs
    for token in text[20:30]:
        got = feed(graphed, filled, [token])
    assert filled.slots.data_ptr() == address and graphed.captures == captures and not graphed.empty
    assert close(got, [feed(eager, check, [token]) for token in text[:30]][-1]) and filled.slots.isfinite().all()


def test_a_cache_that_is_too_small_is_not_kept():
    graphed = GraphedLlama(random_model(context=1024))
    list(autoregressive(graphed, [1, 2], 20))
    assert [home.capacity for home in graphed.empty] == [BLOCK + 6]
    prompt = tokens_of(graphed, 20)
    assert list(autoregressive(graphed, prompt, BLOCK + 40)) == list(autoregressive(random_model(context=1024), prompt, BLOCK + 40))
    assert [home.capacity for home in graphed.empty] == [2 * BLOCK + 6]


def test_no_more_than_so_many_kinds_of_passes_are_kept(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MOST_PASSES", 2)
    graphed, cache = GraphedLlama(random_model()), None
    expected = list(autoregressive(random_model(), [1, 2, 3], 40))
    cache = KVCache(graphed, 60, 8)
    assert list(clasp(graphed, [1, 2, 3], 40, opt_interval=2, cache=cache)) == expected
    assert len(graphed.homes[cache].passes) <= 2


@pytest.mark.skipif(DEVICE != "cpu", reason="stands in for recording")
def test_graphs_are_dropped_together_or_not_at_all(taped, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MOST_PASSES", 5)
    eager, graphed = pair(context=1024)
    kept = KVCache(graphed, 300, 8)
    alive, text = autoregressive(graphed, [1, 2, 3], 30, cache=kept), list(autoregressive(eager, [1, 2, 3], 30))
    for i, length in enumerate((20, 250, 20, 240, 10)):        # a longer text drops the memory of a shorter one
        prompt = tokens_of(eager, length, i)
        assert list(clasp(graphed, prompt, 20, opt_interval=2)) == list(autoregressive(eager, prompt, 20))
        assert next(alive) == text[i]
        gc.collect()


def test_decoding_may_stop_anywhere_and_go_on():
    graphed = GraphedLlama(random_model())
    expected = list(autoregressive(random_model(), [1, 2, 3], 30))
    for taken in (1, 2, 5, 11):
        cache = KVCache(graphed, 60, 8)
        got = list(itertools.islice(clasp(graphed, [1, 2, 3], 30, opt_interval=2, cache=cache), taken))
        got += autoregressive(graphed, [1, 2, 3, *got], 4, cache=cache)
        assert got + list(clasp(graphed, [1, 2, 3, *got], 26 - taken, cache=cache)) == expected


def test_auto_decides_on_graphs_as_without():
    costs = dict(draft=1.0, plain=1.0, verify=1.0, optimize=0.5)
    texts = []
    for model in (random_model(residual=0.1), GraphedLlama(random_model(residual=0.1))):
        stats = Stats()
        list(clasp(model, [1, 2, 3], 60, draft_length=4, auto=Auto(model, costs), stats=stats))
        texts.append((stats.tokens, stats.drafted, stats.skip_sets))
    assert texts[0] == texts[1] and texts[0][1] > 0
