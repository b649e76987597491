"""CLaSp decoding (arXiv 2505.24196, §3.1): a model drafts with some of its layers, then checks with all.

One cycle, seen from a *pending* token t, part of the text, but not yet in the cache: its position is n = cache.length.

    draft      feed t, d1, d2 ... one row each through the layers not skipped: k <= K tokens
    verify     feed t, d1 .. dk as rows n .. n+k through every layer; it overwrites what the draft cached
    accept     the longest prefix that the whole model agrees with, and one token of its own after it
    roll back  cache.length = n + accepted + 1: an integer, nothing is copied
    optimise   every few cycles, and after the prefill: the DP on the states of the last row accepted

Read ``clasp`` first, then what it calls in that order. ``autoregressive`` is the plain decoding that it must agree with
(to the last bit, see exact.py) and is timed against. Both are generators: they yield token ids and keep ``Stats``.
"""
import math
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from dp_skip import Layer, Selection, select_layers
from exact import as_row, exact_width, full_pass
from model import BLOCK, KVCache, Llama

PREFILL_ROWS = 512            # the prompt goes through in pieces, so that memory grows linearly with it
DRAFT_LENGTH = 4              # defaults by measurement, see README.md
EXIT_THRESHOLD = 0.0
OPT_INTERVAL = 32


@dataclass
class Stats:
    """What decoding did. Seconds are the decoder's own: what the caller does between tokens is not in them."""
    prefill_seconds: float = 0.0
    seconds: float = 0.0               # all but the prefill: draft, verify and optimise
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    optimize_seconds: float = 0.0
    cycles: int = 0                    # passes of the whole model
    drafted: int = 0
    accepted: int = 0
    optimizations: int = 0
    tokens: list[int] = field(default_factory=list)                             # the new ones
    from_draft: list[bool] = field(default_factory=list)                        # for each: did the draft write it?
    skip_sets: list[tuple[int, frozenset[int]]] = field(default_factory=list)   # (new tokens before it, set)

    @property
    def new_tokens(self) -> int:
        return len(self.tokens)

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def tau(self) -> float:
        """Acceptance length: tokens gained per pass of the whole model (1 for plain decoding)."""
        return self.new_tokens / self.cycles if self.cycles else 0.0

    @property
    def acceptance_rate(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0


@torch.inference_mode()
def clasp(model: Llama, prompt: list[int], max_new_tokens: int, *, skip_layers: int | None = None,
          draft_length: int = DRAFT_LENGTH, exit_threshold: float = EXIT_THRESHOLD, opt_interval: int = OPT_INTERVAL,
          exact: bool = True, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, stop: Collection[int] = (),
          stats: Stats | None = None, cache: KVCache | None = None, optimizer: Callable | None = None,
          drafter: Callable | None = None, auto=None) -> Iterator[int]:
    """Yield up to max_new_tokens tokens, distributed exactly as the whole model's own.

    prompt: at least one token id. skip_layers M: layers, or blocks worth them, left out of the draft, default half.
    draft_length K: most tokens drafted per cycle. exit_threshold: a draft ends after a token at which the draft model's
    top probability (before temperature and top-p) was lower (§5.3.3). opt_interval: cycles between optimisations
    (§3.7). exact: verify in passes of one shape, bit for bit what plain decoding in that shape computes; False saves
    the padding, and greedy text may part where two tokens tie. temperature 0: greedy. Ends after a token in ``stop``.
    cache: may hold the prompt's first cache.length tokens, and must have scratch rows for a pass (``exact_width``)
    and the programme. At every yield it holds all tokens so far but the last, so a caller may stop and go on with it.
    optimizer, drafter: others in place of ``optimize`` and ``draft``, called as they are. The output stays the whole
    model's whatever they do, as long as a draft's distributions are those its tokens were drawn from.
    auto: an ``Auto`` (auto.py) to decide in place of skip_layers, exit_threshold, opt_interval; it drafts K at most.
    Raises SettingsError (at the first token) for settings outside their range, and if prompt and new tokens do not
    fit the context or the cache; ModelError if the model computes something that is no number.
    """
    layers = len(model.layers)
    skip_layers = layers - 1 if auto else layers // 2 if skip_layers is None else skip_layers
    budget = skip_layers * sum(model.block_costs or (1,))
    require(0 <= skip_layers < layers, f"the skipped layers must be fewer than the model's {layers}, and at least 0")
    require(1 <= draft_length < BLOCK, f"the draft length must lie between 1 and {BLOCK - 1}")
    require(0 <= exit_threshold <= 1, "the exit threshold must lie between 0 and 1")
    require(opt_interval >= 1, "the optimisation interval must be at least 1")
    require(not auto or layers > 1 and not optimizer and not drafter, "auto needs two layers, and no other optimizer or drafter")
    stats, now, rng = stats or Stats(), clock(model), torch.Generator(model.embed.weight.device).manual_seed(seed % 2 ** 63)
    require_possible(model, prompt, max_new_tokens, temperature, top_p, seed, stats)
    one_set = partial(select_layers, smallest=budget, costs=model.block_costs and model.block_costs * layers)
    optimizer = optimizer or (auto.optimize if auto else partial(optimize, select=one_set))
    go_on = auto.go_on if auto else lambda confidence: confidence >= exit_threshold
    choose = partial(pick, temperature=temperature, top_p=top_p, rng=rng)

    width = exact_width(model, draft_length + 1) if exact else None
    rows = max(width or draft_length + 1, budget)                     # of a pass, and of the programme
    start = now()
    cache = cache or KVCache(model, len(prompt) + max_new_tokens, rows)
    require_room(cache, prompt, max_new_tokens, rows)
    hidden = prefill(model, cache, prompt[cache.length:-1])
    stats.prefill_seconds = now() - start
    pending, skip, most = prompt[-1], None, draft_length
    if auto and not auto.begin(draft_length, exact):
        hidden = None
    while stats.new_tokens < max_new_tokens:
        start = now()
        if hidden is not None:                                        # an optimisation is due
            skip = optimizer(model, cache, hidden, budget).skip_sets[-1]
            stats.skip_sets.append((stats.new_tokens, skip))
            stats.optimizations += 1
        optimized = now()
        drafted, q = [], []
        if auto:
            skip, most = auto.plan()
            if most and skip != (stats.skip_sets or [(0, None)])[-1][1]:        # another, without a run of the programme
                stats.skip_sets.append((stats.new_tokens, skip))
        if skip is not None:       # else the prompt was one token: no state yet to choose layers from
            length = min(most, draft_length, max_new_tokens - stats.new_tokens - 1)   # the verifier adds one of its own
            if exact:
                length = min(length, BLOCK - 1 - cache.length % BLOCK)          # and its rows lie in one block
            drafted, q = (drafter or draft)(model, cache, pending, skip, length, go_on, choose, stop)
        was_drafted, n = now(), cache.length
        states, logits = full_pass(model, cache, [pending, *drafted], width)
        if temperature == 0:
            accepted, own = accept_greedy(drafted, logits)
        else:
            accepted, own = accept_sampled(drafted, q, distribution(logits, temperature, top_p), rng)
        stats.cycles += 1
        due = skip is None or stats.cycles % opt_interval == 0
        if auto:
            due = auto.learn(accepted, optimized - start, was_drafted - optimized, now() - was_drafted)
        hidden = torch.stack([state[0, accepted] for state in states]) if due else None    # (L+1, dim)
        end = now()
        stats.optimize_seconds += optimized - start
        stats.draft_seconds += was_drafted - optimized
        stats.verify_seconds += end - was_drafted
        stats.seconds += end - start
        stats.drafted += len(drafted)
        stats.accepted += accepted
        for i, token in enumerate([*drafted[:accepted], own]):
            stats.tokens.append(token)
            stats.from_draft.append(i < accepted)
            cache.length = n + i + 1      # the roll-back, token by token, since the caller may take no more
            yield token
            if token in stop:
                return
        pending = own


@torch.inference_mode()
def autoregressive(model: Llama, prompt: list[int], max_new_tokens: int, *, width: int | None = None,
                   temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, stop: Collection[int] = (),
                   stats: Stats | None = None, cache: KVCache | None = None) -> Iterator[int]:
    """Plain decoding, one token per pass of the whole model. Arguments as for ``clasp``.

    width: None, one row a pass, is fastest; K + 1 computes as clasp's verify passes do, the other rows being padding.
    """
    stats, now, rng = stats or Stats(), clock(model), torch.Generator(model.embed.weight.device).manual_seed(seed % 2 ** 63)
    require_possible(model, prompt, max_new_tokens, temperature, top_p, seed, stats)
    width = width and exact_width(model, width)
    start = now()
    cache = cache or KVCache(model, len(prompt) + max_new_tokens, width or 1)
    require_room(cache, prompt, max_new_tokens, width or 1)
    prefill(model, cache, prompt[cache.length:-1])
    stats.prefill_seconds = now() - start
    token = prompt[-1]
    while stats.new_tokens < max_new_tokens:
        start = now()
        _, logits = full_pass(model, cache, [token], width)
        token = int(pick(logits[0], temperature, top_p, rng)[0])
        stats.seconds += now() - start
        stats.cycles += 1
        stats.tokens.append(token)
        stats.from_draft.append(False)
        yield token
        if token in stop:
            return


def prefill(model: Llama, cache: KVCache, tokens: list[int]) -> Tensor | None:
    """Put tokens into the cache; return the last one's hidden states (L+1, dim), None if there is none."""
    states = []
    for i in range(0, len(tokens), PREFILL_ROWS):
        states = model(as_row(model, tokens[i:i + PREFILL_ROWS]), cache)
    return torch.stack([state[0, -1] for state in states]) if states else None


def optimize(model: Llama, cache: KVCache, hidden: Tensor, budget: int, select=select_layers) -> Selection:
    """Choose the layers to skip by the DP over the last token in the cache, whose states are ``hidden``.

    hidden (L+1, dim). ``select`` is either reading of Algorithm 1 in dp_skip.py. The cache's valid part
    is only read; the ``budget`` slots behind it are used, and left clean: masked as they are for the next pass,
    a NaN there, from a candidate that overflowed, would be one in every sum it is multiplied by 0 into.
    """
    selection = select(candidate_layer(model, cache, budget), hidden, budget)
    cache.slots[..., cache.length:cache.length + budget, :] = 0
    return selection


def candidate_layer(model: Llama, cache: KVCache, rows: int) -> Layer:
    """Decoder layers on candidate states of the last cached token, as dp_skip.py wants them (§3.6).

    A candidate stands at that token's position p. It sees the true keys and values before p, not those at
    p, which belong to the true state, and its own: each has a slot to itself behind the valid ones.
    """
    if hasattr(model, "candidate_layer"):                             # cuda_graphs.py has its own
        return model.candidate_layer(cache, rows)
    n, parts = cache.length, model.parts
    cos, sin = cache.cos[n - 1:n], cache.sin[n - 1:n]                 # one position for all rows
    mask = torch.full((rows, n + rows), -torch.inf, dtype=cos.dtype, device=cos.device)
    mask[:, :n - 1] = 0
    mask[:, n:].fill_diagonal_(0)

    def layer(i: int, candidates: Tensor) -> Tensor:
        m = len(candidates)
        return parts[i](candidates[None], cos, sin, mask[:m, :n + m], partial(cache.put, model.layer_of(i), n, n + m))[0]

    return layer


def draft(model: Llama, cache: KVCache, token: int, skip: Collection[int], length: int,
          go_on: Callable[[float], bool], choose: Callable, stop: Collection[int]) -> tuple[list[int], list[Tensor | None]]:
    """Up to ``length`` tokens after ``token`` by the model without the layers in ``skip``.

    Returns them and, when sampling, the distributions q they were drawn from. cache.length is put back:
    the verifier starts over from there.

    Whether to draw *another* token, ``go_on`` says from the confidence at the last, its top probability; a token once
    drawn is kept. Dropping it for being unlikely would bias what is left: it was drawn from another distribution than q.
    """
    start, tokens, distributions = cache.length, [], []
    try:
        while len(tokens) < length:
            logits = model.logits(model(as_row(model, [token]), cache, skip)[-1])[0, 0]
            drawn, q = choose(logits)
            drawn, confidence = torch.stack((drawn, logits.float().softmax(-1).max())).tolist()    # waits for the device
            if math.isnan(confidence):                 # fewer layers may overflow float16 where all do not
                break
            tokens.append(token := int(drawn))
            distributions.append(q)
            if not go_on(confidence) or token in stop:
                break
    finally:
        cache.length = start
    return tokens, distributions


def accept_greedy(drafted: list[int], logits: Tensor) -> tuple[int, int]:
    """How many drafted tokens are the whole model's own choice, and its choice after them.

    logits (k+1, vocabulary): row i follows the first i drafted tokens.
    """
    best = logits.argmax(-1).tolist()
    accepted = 0
    while accepted < len(drafted) and drafted[accepted] == best[accepted]:
        accepted += 1
    return accepted, best[accepted]


def accept_sampled(drafted: list[int], q: list[Tensor], p: Tensor, rng: torch.Generator) -> tuple[int, int]:
    """Speculative sampling (Leviathan et al. 2023, Chen et al. 2023): the same, for distributions.

    q: k distributions (vocabulary,) the draft drew from; p (k+1, vocabulary) the whole model's. Token d is
    accepted with probability min(1, p(d) / q(d)); in place of the first rejected one a token is drawn from
    max(p - q, 0), normalised, which is just what p has and accepting has not yet given. After a draft
    accepted whole, one more comes from p.
    """
    k, tail = len(drafted), p[-1]
    accepted = k
    if k:
        i, d = torch.arange(k, device=p.device), torch.tensor(drafted, device=p.device)
        q = torch.stack(q)
        keep = (p[i, d] / q[i, d].clamp(min=torch.finfo(q.dtype).tiny)).clamp(max=1)
        kept = torch.bernoulli(keep, generator=rng)
        accepted = int(torch.cat((kept, kept.new_zeros(1))).argmin())        # the first rejected, or k
        if accepted < k:
            tail = (p[accepted] - q[accepted]).clamp(min=0)
            tail = torch.where(tail.sum() > 0, tail, p[accepted])     # p = q but for rounding: nothing is left
    return accepted, int(torch.multinomial(tail, 1, generator=rng))


def pick(logits: Tensor, temperature: float, top_p: float, rng: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """One token () from logits (vocabulary,), and the distribution it was drawn from (None when greedy)."""
    if temperature == 0:
        return logits.argmax(), None
    q = distribution(logits.nan_to_num(), temperature, top_p)         # a draft may overflow, and is then dropped
    return torch.multinomial(q, 1, generator=rng)[0], q


def distribution(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Logits (..., vocabulary) -> probabilities in float32 after temperature and nucleus (top-p) filtering.

    Nucleus: the fewest most likely tokens whose probabilities reach top_p together, renormalised.
    """
    logits = logits.float()
    p = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)      # no overflow, however cold
    if top_p < 1:
        ordered, token = p.sort(dim=-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0            # those before it reach top_p already
        p = torch.zeros_like(p).scatter(-1, token, ordered)
        p /= p.sum(-1, keepdim=True)
    return p


def clock(model: Llama) -> Callable[[], float]:
    """Seconds now, after all work given to the device is done."""
    device = model.embed.weight.device
    if device.type == "cpu":
        return time.perf_counter
    synchronize = torch.mps.synchronize if device.type == "mps" else partial(torch.cuda.synchronize, device)
    return lambda: synchronize() or time.perf_counter()


class SettingsError(ValueError):
    """A request that cannot be carried out, said in one line that is meant for the user."""


def require(condition: bool, message: str):
    if not condition:
        raise SettingsError(message)


def require_possible(model: Llama, prompt: list[int], max_new_tokens: int, temperature: float, top_p: float, seed: int,
                     stats: Stats):
    context = model.config.max_position_embeddings
    require(len(prompt) >= 1, "the prompt is empty")
    require(max_new_tokens >= 1, "the number of new tokens must be at least 1")
    require(len(prompt) + max_new_tokens <= context,
          f"{len(prompt)} prompt tokens and {max_new_tokens} new ones do not fit the model's context of {context}")
    require(0 <= min(prompt) and max(prompt) < model.config.vocab_size, "the prompt has tokens outside the model's vocabulary")
    require(not stats.tokens, "these statistics are of another text: take new ones")
    require(temperature == 0 or temperature >= 1e-6, "the temperature must be 0 (greedy) or at least 1e-6")
    require(0 <= seed < 2 ** 63, "the seed must lie between 0 and 2^63 - 1")
    require(1e-6 <= top_p <= 1, "top-p must lie between 1e-6 and 1")


def require_room(cache: KVCache, prompt: list[int], max_new_tokens: int, width: int):
    require(cache.length < len(prompt), f"the cache holds {cache.length} tokens, and the prompt has only {len(prompt)}")
    require(cache.tokens >= len(prompt) + max_new_tokens and cache.rows >= width,
            f"the cache has no room for {len(prompt)} + {max_new_tokens} tokens in passes of {width} rows")
