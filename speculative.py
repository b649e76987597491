"""The loop (arXiv 2505.24196, §3.1): a drafter proposes tokens, the whole model checks them.

One cycle, seen from a *pending* token t. It is part of the text, but not yet in the cache: its
position is n = cache.length.

    draft      the drafter proposes d1 .. dk after t. CLaSp: by the layers that it does not skip
    verify     feed t, d1 .. dk at positions n .. n+k through every layer; this overwrites what the
               draft has cached there
    accept     the longest prefix that the whole model agrees with, then one token of its own
    roll back  cache.length = n + accepted + 1: an integer, nothing is copied
    observe    the drafter sees what came of it. CLaSp: every few cycles the DP chooses layers anew

        text       once there was a king                    "king" is pending: not in the cache
        draft                            who  had  three
        verify                            ✓    ✓    ✗ → a   accepted 2, and the model's own "a"
        cache      ████████████████████████████████ three   rolled back to "had"; "a" is pending

Being lossless is the loop's business, being fast the drafter's: ``decode`` does not know which
drafter it has. Whatever that proposes, greedy text stays the whole model's, token for token but for
rounding (see ``Text.width``), and sampled text keeps its distribution.

How to read: skim what is shared, then ``decode`` and what it calls, then the drafters ``FixedSet``
and ``Clasp``, then acceptance. Other drafters are in extras/. ``autoregressive`` is the plain
decoding that all must agree with, and are timed against.
"""
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dp_skip import Measure, Selection, distances, relative_distances, select_layers
from model import BLOCK, Config, KVCache, Llama, ModelError, whole_blocks

PREFILL_ROWS = 512            # the prompt goes through in pieces, so that memory grows linearly
LIKELIEST = 256               # tokens among which top-p looks first
KEPT_STATES = 64              # a drafter is told the states of so many of the prompt's last tokens

# The defaults of CLaSp's settings, by measurement (see results/).
DRAFT_LENGTH = 4
EXIT_THRESHOLD = 0.0          # drafts never end early
OPT_INTERVAL = 128
OPT_TOKENS = 8


# ---------------------------------------------------------------------------- what is shared

@dataclass
class Stats:
    """What decoding did. Its own seconds: what the caller does between tokens is not in them."""
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0        # passes of the whole model; all that plain decoding does
    optimize_seconds: float = 0.0      # of the drafter's ``begin`` and ``observe``: the DP
    cycles: int = 0                    # passes of the whole model after the prefill
    drafted: int = 0
    accepted: int = 0
    optimizations: int = 0             # runs of the DP
    tokens: list[int] = field(default_factory=list)                 # the new ones
    sources: list[str] = field(default_factory=list)
    # (of each new token: the ``Draft.source`` that proposed it; "" if the whole model wrote it)
    skip_sets: list[tuple[int, frozenset[int]]] = field(default_factory=list)
    # (how many new tokens there were, the set of layers that was chosen then)

    @property
    def seconds(self) -> float:
        """All but the prefill."""
        return self.draft_seconds + self.verify_seconds + self.optimize_seconds

    @property
    def new_tokens(self) -> int:
        return len(self.tokens)

    @property
    def from_draft(self) -> list[bool]:
        """Of each new token: did a draft write it?"""
        return [source != "" for source in self.sources]

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


@dataclass
class Text:
    """A text while it is written: its tokens, and all that they are decoded with.

    A drafter may read everything here, and compute in the cache from ``cache.length`` on.

    width: most rows of a pass of the whole model after the prefill; None: as many as it has tokens.
    Matrix kernels round differently for 1 row and for 5. So a pass that checks four tokens does not
    compute quite what four plain steps compute, and where two tokens all but tie, greedy text may
    part. If every pass has one shape, it cannot (``full_pass``; extras/exact.py finds the width).

    narrowest: passes of this many rows to ``width`` round alike, so none is padded any further;
    None: all are padded to ``width``.
    """
    model: Llama
    cache: KVCache                     # holds ``tokens`` but for the last, the pending one
    tokens: list[int]                  # prompt and new ones
    end: int                           # how many tokens there may be
    width: int | None
    temperature: float
    top_p: float
    rng: torch.Generator
    stop: Collection[int]
    stats: Stats
    narrowest: int | None = None
    laps: dict[str, float] = field(default_factory=dict)   # the last seconds of each ``timed`` name

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """A token by these logits, and the distribution it was drawn from; see ``pick``."""
        return pick(logits, self.temperature, self.top_p, self.rng)

    def pass_width(self, tokens: int) -> int | None:
        """Rows of a pass with so many tokens, see ``full_pass``."""
        if self.width is None:
            return None
        return max(tokens, self.narrowest or self.width)

    @property
    def is_finished(self) -> bool:
        return len(self.tokens) == self.end or self.tokens[-1] in self.stop

    def roll_back(self):
        """Back to the cache's invariant: it holds all tokens but the pending one."""
        self.cache.length = len(self.tokens) - 1

    def add(self, token: int, source: str = ""):
        """Write the next token, which is pending from now on; the cache is rolled back to it.

        After a cycle's last token that is cache.length = n + accepted + 1.
        source: of the draft that proposed it, if one did.
        """
        self.tokens.append(token)
        self.roll_back()
        self.require_in_range(self.cache.length - 1)
        self.stats.sources.append(source)
        self.stats.tokens.append(token)                # last: from here on the token counts

    def require_in_range(self, start: int):
        """Refuse keys and values, from a slot on, that were too large for the dtype."""
        overflowed = self.cache.has_overflowed(start, self.cache.length)
        refuse_overflow(overflowed, self.cache.slots.dtype)

    @contextmanager
    def timed(self, name: str):
        """Add the seconds of a ``with`` block to ``stats.<name>_seconds``; note them in ``laps``.

        A GPU is waited for. ``laps`` is for drafters that weigh what a cycle cost, as Auto does.
        """
        now = clock(self.model)
        start = now()
        yield
        self.laps[name] = now() - start
        total = getattr(self.stats, f"{name}_seconds")
        setattr(self.stats, f"{name}_seconds", total + self.laps[name])


class Draft(NamedTuple):
    """Proposed tokens, and for each the distribution q (vocabulary,) it was drawn from."""
    tokens: list[int]
    distributions: list[Tensor | None]      # None when greedy
    source: str = "draft"                   # who drafted, for statistics: "layers", "lookup"


class Outcome(NamedTuple):
    """What came of a cycle."""
    draft: Draft
    accepted: int             # tokens of the draft
    hidden: Tensor            # (L+1, accepted + 1, hidden size): h_0 .. h_L of the cycle's tokens
                              # that stay in the cache: the pending one, then those accepted
    seconds: dict[str, float]           # of this "draft" and "verify", and the "optimize" before


NO_DRAFT = Draft([], [])


class Drafter:
    """Proposes tokens for the whole model to check. This one never does.

    Nothing that a drafter proposes can change the output's distribution, or greedy tokens, only the
    speed. When sampling, two things are asked of it: the distributions that it returns are those
    that its tokens were drawn from; and a token once drawn is proposed, since dropping it for being
    unlikely would bias what is left. Whether to draft, how, and whether to draw *another* token may
    depend on all that is known on the draft's side.

    One object drafts for one text at a time, from ``begin`` to the next.

    scratch: slots that it wants in the cache behind the text's, as the DP does for its candidates.
    A cache that the caller gave may have fewer.
    """
    scratch = 0

    def begin(self, text: Text, hidden: Tensor | None):
        """A text starts. hidden (L+1, n, hidden size): states of the last n tokens in the cache.

        n is KEPT_STATES at most, and as many as the prefill put there. None if there are none: the
        prompt has one token, or a cache that was given holds it.
        """

    def propose(self, text: Text, most: int) -> Draft:
        """At most ``most`` tokens to come after the pending one, ``text.tokens[-1]``."""
        return NO_DRAFT

    def observe(self, text: Text, outcome: Outcome):
        """What the whole model made of the draft, after its tokens were written."""


# ---------------------------------------------------------------------------- the loop

def clasp(
    model: Llama,
    prompt: list[int],
    max_new_tokens: int,
    *,
    skip_layers: int | None = None,
    draft_length: int = DRAFT_LENGTH,
    exit_threshold: float = EXIT_THRESHOLD,
    opt_interval: int = OPT_INTERVAL,
    opt_tokens: int = OPT_TOKENS,
    **settings,
) -> Iterator[int]:
    """CLaSp decoding: ``decode`` with the drafter ``Clasp``. settings: see ``new_text``."""
    drafter = Clasp(model, skip_layers, draft_length, exit_threshold, opt_interval, opt_tokens)
    return decode(model, prompt, max_new_tokens, drafter, **settings)


@torch.inference_mode()
def decode(
    model: Llama, prompt: list[int], max_new_tokens: int, drafter: Drafter, **settings
) -> Iterator[int]:
    """Yield up to max_new_tokens tokens of the whole model's own distribution.

    prompt: at least one token id. settings: see ``new_text``. Ends after a token in ``stop``. At
    every yield the cache holds all tokens so far but the last. So a caller may stop anywhere, and
    go on later by giving that cache, and the text so far as the prompt.

    Raises, when the first token is asked for, SettingsError for settings outside their range and if
    prompt and new tokens do not fit the context or the cache; and ModelError if the model computes
    NaN or infinity.
    """
    text, hidden = new_text(model, prompt, max_new_tokens, scratch=drafter.scratch, **settings)
    with text.timed("optimize"):
        drafter.begin(text, hidden)
    while True:
        with text.timed("draft"):
            draft = checked_draft(drafter, text)
        with text.timed("verify"):
            pending = text.tokens[-1]
            tokens = [pending, *draft.tokens]
            states, logits = full_pass(model, text.cache, tokens, text.pass_width(len(tokens)))
            accepted, own = accept(text, draft, logits)
            require_finite(logits[:accepted + 1])
            hidden = torch.stack([state[0, :accepted + 1] for state in states])
        text.stats.cycles += 1
        text.stats.drafted += len(draft.tokens)
        text.stats.accepted += accepted
        for i, token in enumerate([*draft.tokens[:accepted], own]):
            text.add(token, draft.source if i < accepted else "")
            yield token
            if text.is_finished:
                return
        with text.timed("optimize"):
            drafter.observe(text, Outcome(draft, accepted, hidden, dict(text.laps)))


@torch.inference_mode()
def autoregressive(
    model: Llama, prompt: list[int], max_new_tokens: int, **settings
) -> Iterator[int]:
    """Plain decoding, one token per pass of the whole model. settings: see ``new_text``.

    Fastest with one row a pass, the default. With the widths that ``decode`` is given it writes the
    very same greedy text, and computes the same logits bit for bit.
    """
    text, _ = new_text(model, prompt, max_new_tokens, **settings)
    while True:
        with text.timed("verify"):
            _, logits = full_pass(model, text.cache, text.tokens[-1:], text.pass_width(1))
            require_finite(logits)
            token = int(text.choose(logits[0])[0])
        text.stats.cycles += 1
        text.add(token)
        yield token
        if text.is_finished:
            return


def new_text(
    model: Llama,
    prompt: list[int],
    max_new_tokens: int,
    *,
    width: int | None = None,
    narrowest: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Collection[int] = (),
    stats: Stats | None = None,
    cache: KVCache | None = None,
    scratch: int = 0,
) -> tuple[Text, Tensor | None]:
    """A text with its prompt in the cache, all but the pending token; and the last states there.

    width: most rows of a pass of the whole model, see ``Text``; None: as many as it has tokens.
    narrowest: fewest rows of one; None: all have ``width``.
    temperature: 0 is greedy. top_p: sample from the most likely tokens that reach it together.
    stop: token ids that end a text. stats: new ones, to be filled.
    cache: may hold the prompt's first cache.length tokens already.
    scratch: slots that the drafter wants in a new one, see ``Drafter``.
    """
    stats = stats or Stats()
    require_possible(model, prompt, max_new_tokens, temperature, top_p, seed, stats)
    require(width is None or 1 <= (narrowest or width) <= width,
            "the width must be at least 1, and the narrowest pass no wider")
    end = len(prompt) + max_new_tokens
    cache = cache or KVCache(model, end, max(width or 1, scratch))
    require_room(cache, prompt, end, width or 1)
    rng = torch.Generator(model.device).manual_seed(int(seed))
    text = Text(model, cache, list(prompt), end, width, temperature, top_p, rng, stop, stats,
                narrowest)
    with text.timed("prefill"):
        known = cache.length
        hidden = prefill(model, cache, prompt[known:-1])
        text.require_in_range(known)
    return text, hidden


def prefill(model: Llama, cache: KVCache, tokens: list[int]) -> Tensor | None:
    """Put tokens into the cache; return the hidden states of the last ones, if any.

    They are (L+1, n, hidden size), of n <= KEPT_STATES tokens.
    """
    hidden = None
    for i in range(0, len(tokens), PREFILL_ROWS):
        states = model(as_row(model, tokens[i:i + PREFILL_ROWS]), cache)
        piece = torch.stack([state[0, -KEPT_STATES:] for state in states])
        hidden = piece if hidden is None else torch.cat((hidden, piece), 1)[:, -KEPT_STATES:]
    return hidden


def checked_draft(drafter: Drafter, text: Text) -> Draft:
    """The drafter's proposal, of no more tokens than there is room for.

    Raises ValueError for more, which is a mistake in the drafter.
    """
    most = text.end - len(text.tokens) - 1           # the verifier adds a token of its own
    if text.width is not None:
        left_in_block = BLOCK - 1 - text.cache.length % BLOCK
        most = min(most, text.width - 1, left_in_block)      # see ``full_pass``
    draft = drafter.propose(text, most)
    if len(draft.tokens) > most:
        raise ValueError(f"a {type(drafter).__name__} proposed {len(draft.tokens)} tokens where "
                         f"there is room for {most}")
    text.roll_back()                                 # over what the draft left in the cache
    return draft


def full_pass(
    model: Llama, cache: KVCache, tokens: list[int], width: int | None
) -> tuple[list[Tensor], Tensor]:
    """The whole model on tokens: h_0 .. h_L (1, rows, hidden) each, logits (tokens, vocabulary).

    Without a ``width``: as many rows as tokens, over the filled slots of the cache.

    With one, it has that many rows; those left over are padding. It looks over whole blocks of the
    cache, up to the end of the one in which the tokens lie. If all passes have one width, no shape
    depends on how many tokens there are, and a row's bits depend only on its token and on the keys
    and values before.
    """
    n = cache.length
    padding = []
    slots = None
    if width is not None:
        padding = tokens[:1] * (width - len(tokens))
        slots = whole_blocks(n + 1)
    states = model(as_row(model, tokens + padding), cache, slots=slots)
    logits = model.logits(states[-1])[0, :len(tokens)]
    cache.length = n + len(tokens)
    return states, logits


def as_row(model: Llama, tokens: list[int]) -> Tensor:
    return torch.tensor([tokens], device=model.device)


# ---------------------------------------------------------------------------- CLaSp's drafter

class SkippingDrafter(Drafter):
    """Drafts with the model itself, but for the layers in ``skip``. Subclasses choose these."""

    def __init__(
        self, draft_length: int = DRAFT_LENGTH, exit_threshold: float = EXIT_THRESHOLD
    ):
        """draft_length K: most tokens drafted per cycle.

        exit_threshold: a draft ends after a token at which the draft model's top probability
        (before temperature and top-p) was lower (§5.3.3).
        """
        require_draft_length(draft_length)
        require(0 <= exit_threshold <= 1, "the exit threshold must lie between 0 and 1")
        self.skip: Collection[int] | None = None         # no layers are chosen yet: no drafts
        self.draft_length = draft_length
        self.exit_threshold = exit_threshold

    def propose(self, text: Text, most: int) -> Draft:
        """At most K tokens, by the layers that are not in ``skip``; none before it is chosen."""
        if self.skip is None:
            return NO_DRAFT
        go_on = self.is_sure if self.exit_threshold > 0 else None
        most = min(most, self.draft_length)
        return draft_by_skipping(text, self.skip, most, go_on)

    def is_sure(self, confidence: float) -> bool:
        return confidence >= self.exit_threshold


class FixedSet(SkippingDrafter):
    """Always leaves out the same layers."""

    def __init__(
        self,
        skip: Collection[int],
        draft_length: int = DRAFT_LENGTH,
        exit_threshold: float = EXIT_THRESHOLD,
    ):
        super().__init__(draft_length, exit_threshold)
        self.skip = skip

    def begin(self, text: Text, hidden: Tensor | None):
        last = len(text.model.layers) - 1
        require(all(0 <= i <= last for i in self.skip),
                f"the layers to skip lie between 0 and {last}, not {sorted(self.skip)}")


class Clasp(SkippingDrafter):
    """Leaves out those layers that the DP found to matter least at recent tokens (§3.4).

    The DP runs after the prefill, and then every ``opt_interval`` cycles (§3.7), on the states of
    the last ``opt_tokens`` tokens in the cache. Its set is kept until it runs again.
    """

    def __init__(
        self,
        model: Llama,
        skip_layers: int | None = None,
        draft_length: int = DRAFT_LENGTH,
        exit_threshold: float = EXIT_THRESHOLD,
        opt_interval: int = OPT_INTERVAL,
        opt_tokens: int = OPT_TOKENS,
    ):
        """skip_layers M: layers left out of the draft; default: half.

        opt_tokens T: 1 is the paper's DP, which goes by the cosine of one token's states. More
        tokens are less noisy, and are compared by ``relative_distances`` (docs/choosing.md).
        """
        layers = len(model.layers)
        self.budget = layers // 2 if skip_layers is None else skip_layers
        self.opt_interval = opt_interval
        self.opt_tokens = opt_tokens
        self.scratch = self.budget * opt_tokens
        require(0 <= self.budget < layers,
                f"the skipped layers must be fewer than the model's {layers}, and at least 0")
        require(opt_interval >= 1, "the optimisation interval must be at least 1")
        require(1 <= opt_tokens <= KEPT_STATES,
                f"the tokens that layers are chosen by must lie between 1 and {KEPT_STATES}")
        self.recent = deque(maxlen=opt_tokens)     # states (L+1, n, hidden), of a cycle each
        super().__init__(draft_length, exit_threshold)

    def begin(self, text: Text, hidden: Tensor | None):
        """Choose layers by the prompt's states, if they are known."""
        self.skip = None
        self.recent.clear()
        if hidden is not None:
            self.recent.append(hidden)
            self.choose_layers(text)

    def observe(self, text: Text, outcome: Outcome):
        """Choose layers anew every ``opt_interval`` cycles, or at once if ``begin`` could not."""
        self.recent.append(outcome.hidden)
        if self.skip is None or text.stats.cycles % self.opt_interval == 0:
            self.choose_layers(text)

    def choose_layers(self, text: Text):
        """Run the DP for the one budget M, and note its set in the statistics."""
        hidden = self.last_states(text.cache)
        measure = measure_of(self.opt_tokens)
        select = partial(select_layers, smallest=self.budget, measure=measure)
        self.skip = optimize(text.model, text.cache, hidden, self.budget, select).skip_sets[-1]
        text.stats.optimizations += 1
        text.stats.skip_sets.append((text.stats.new_tokens, self.skip))

    def last_states(self, cache: KVCache) -> Tensor:
        """Of the last T tokens, (L+1, T, hidden); of fewer if the cache has no slots for M each."""
        tokens = min(self.opt_tokens, cache.scratch // max(self.budget, 1))
        return torch.cat(tuple(self.recent), 1)[:, -tokens:]


def measure_of(opt_tokens: int) -> Measure:
    """How the DP compares: one token's states by the cosine, as in the paper, more by distance."""
    return distances if opt_tokens == 1 else relative_distances


def optimize(
    model: Llama, cache: KVCache, hidden: Tensor, budget: int, select=select_layers
) -> Selection:
    """Choose the layers to skip by the DP over the last T tokens in the cache.

    hidden (L+1, T, hidden size): their states; or (L+1, hidden size), of the last token only.
    ``select``: either reading of Algorithm 1 in dp_skip.py.

    The cache's valid part is only read. The ``budget`` * T slots after it are used, and left clean:
    a NaN there, from a candidate that overflowed, would spoil the next pass although it is masked,
    since 0 * NaN is NaN. Raises SettingsError if there are fewer.
    """
    tokens = hidden.shape[1:-1].numel()                              # T, or 1
    require(cache.length + budget * tokens <= cache.slots.shape[-2],
            f"the cache has no room for the DP's {budget} * {tokens} candidates: its scratch is "
            f"{cache.scratch}")
    selection = select(model.candidate_layer(cache, budget, tokens), hidden, budget)
    cache.slots[..., cache.length:cache.length + budget * tokens, :] = 0
    return selection


def draft_by_skipping(
    text: Text,
    skip: Collection[int],
    most: int,
    go_on: Callable[[float], bool] | None = None,
) -> Draft:
    """Up to ``most`` tokens by the model without the layers in ``skip``, one row a pass.

    It ends after a token at which ``go_on(confidence)`` is false. The confidence is the draft
    model's top probability there (NaN if the layers run overflow).

    It ends after a stop token too. But unless ``go_on`` asks, a token goes from pass to pass
    on the device, and all are read at the end, so that a GPU is not waited for in between. Then
    what was drafted after a stop token is cut off. If that is accepted, the text has ended anyway.
    """
    model = text.model
    row = as_row(model, text.tokens[-1:])                             # (1, 1)
    drawn = []
    distributions = []
    while len(drawn) < most:
        states = model(row, text.cache, skip)
        logits = model.logits(states[-1])[0, 0]                       # (vocabulary,)
        token, q = text.choose(logits)
        drawn.append(token)
        distributions.append(q)
        row = token.view(1, 1)
        if go_on:
            sure = go_on(logits.float().softmax(-1).max().item())
            if not sure or int(token) in text.stop:
                break
    tokens = torch.stack(drawn).tolist() if drawn else []
    end = next((i + 1 for i, token in enumerate(tokens) if token in text.stop), len(tokens))
    return Draft(tokens[:end], distributions[:end], source="layers")


# ---------------------------------------------------------------------------- acceptance

def accept(text: Text, draft: Draft, logits: Tensor) -> tuple[int, int]:
    """How many drafted tokens are kept, and the whole model's own token after them."""
    if text.temperature == 0:
        return accept_greedy(draft.tokens, logits)
    p = distribution(logits, text.temperature, text.top_p)
    return accept_sampled(draft.tokens, draft.distributions, p, text.rng)


def accept_greedy(drafted: list[int], logits: Tensor) -> tuple[int, int]:
    """How many drafted tokens are the whole model's own choice, and its choice after them.

    logits (k+1, vocabulary): row i follows the first i drafted tokens.
    """
    best = logits.argmax(-1).tolist()
    accepted = 0
    while accepted < len(drafted) and drafted[accepted] == best[accepted]:
        accepted += 1
    return accepted, best[accepted]


def accept_sampled(
    drafted: list[int], q: list[Tensor], p: Tensor, rng: torch.Generator
) -> tuple[int, int]:
    """Speculative sampling (Leviathan et al. 2023, Chen et al. 2023).

    Returns how many drafted tokens are kept, and the token after them, drawn here.

    q: k distributions (vocabulary,) that the drafted tokens were drawn from. p (k+1, vocabulary):
    the whole model's. Drafted token d is accepted with probability min(1, p(d) / q(d)). In place of
    the first rejected one a token is drawn from

        max(p - q, 0), normalised

    Accepting gives each token min(p, q), and this the rest: min(p, q) + max(p - q, 0) = p. After a
    draft accepted whole, one more token is drawn from p.
    """
    accepted = 0
    if drafted:
        row = torch.arange(len(drafted), device=p.device)
        token = torch.tensor(drafted, device=p.device)
        ratio = p[row, token] / torch.stack(q)[row, token]                # (k,)
        kept = torch.bernoulli(ratio.clamp(max=1), generator=rng)         # 1 or 0 each
        accepted = int(kept.cumprod(0).sum())                             # leading ones
    weights = p[accepted]
    if accepted < len(drafted):
        residual = (p[accepted] - q[accepted]).clamp(min=0)
        if residual.sum() > 0:           # else p = q but for rounding, and p will do
            weights = residual
    return accepted, int(torch.multinomial(weights, 1, generator=rng))


def pick(
    logits: Tensor, temperature: float, top_p: float, rng: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """One token () by logits (vocabulary,), and the distribution it was drawn from.

    Temperature 0 is greedy: the most likely token, and None.
    """
    if temperature == 0:
        return logits.argmax(), None
    q = distribution(logits, temperature, top_p)
    return torch.multinomial(q, 1, generator=rng)[0], q


def distribution(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Logits (..., vocabulary) -> probabilities, float32, after temperature and top-p filtering."""
    logits = logits.float().nan_to_num()         # a draft may overflow; a text's own row may not
    logits = logits - logits.amax(-1, keepdim=True)              # so that no division overflows
    p = (logits / temperature).softmax(-1)
    return p if top_p == 1 else nucleus(p, top_p)


def nucleus(p: Tensor, top_p: float) -> Tensor:
    """Top-p: the fewest most likely tokens whose probabilities reach top_p together, renormalised.

    Any that are as likely as the least of these are in it too. So a row's nucleus is its own
    affair: how equals happen to be ordered, which differs from pass to pass, plays no part.

    It is looked for among the LIKELIEST tokens first: to order a large vocabulary takes longer than
    a pass of a small model.
    """
    rows = p.reshape(-1, p.shape[-1])
    least, is_whole = least_likely(rows, top_p, min(LIKELIEST, p.shape[-1]))
    if not is_whole.all():
        least[~is_whole] = least_likely(rows[~is_whole], top_p, p.shape[-1])[0]
    rows = rows.masked_fill(rows < least[:, None], 0)
    return (rows / rows.sum(-1, keepdim=True)).view_as(p)


def least_likely(p: Tensor, top_p: float, count: int) -> tuple[Tensor, Tensor]:
    """Of each nucleus of p (rows, vocabulary), as far as it lies among the ``count`` likeliest.

    The probability of its last token (rows,), and whether it ends there.
    """
    ordered = p.topk(count, dim=-1).values
    before = ordered.cumsum(-1) - ordered                        # probability of those before it
    outside = before >= top_p
    return ordered.masked_fill(outside, 1).amin(-1), outside[:, -1]


# ---------------------------------------------------------------------------- clock and refusals

def clock(model: Llama) -> Callable[[], float]:
    """A function that returns seconds, after all work given to the model's device is done."""
    if model.clock:
        return model.clock
    if model.device.type == "cpu":
        return time.perf_counter
    if model.device.type == "mps":
        synchronize = torch.mps.synchronize
    else:
        synchronize = partial(torch.cuda.synchronize, model.device)

    def now() -> float:
        synchronize()
        return time.perf_counter()

    return now


class SettingsError(ValueError):
    """A request that cannot be carried out, said in one line that is meant for the user."""


def require(condition: bool, message: str):
    if not condition:
        raise SettingsError(message)


def require_possible(
    model: Llama,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    stats: Stats,
):
    require(len(prompt) >= 1, "the prompt is empty")
    require(all(isinstance(token, int) for token in prompt),
            "the prompt must be token ids, a list of integers")
    require(max_new_tokens >= 1, "the number of new tokens must be at least 1")
    require_readable(model.config, prompt, max_new_tokens)
    require_sampling(temperature, top_p, seed)
    require(not stats.tokens, "these statistics are of another text: take new ones")


def require_readable(config: Config, text: list[int], max_new_tokens: int = 0):
    context = config.max_position_embeddings
    require(len(text) + max_new_tokens <= context,
            f"{len(text)} prompt tokens and {max_new_tokens} new ones do not fit the model's "
            f"context of {context}")
    require(0 <= min(text) and max(text) < config.vocab_size,
            "the prompt has tokens outside the model's vocabulary")


def require_sampling(temperature: float, top_p: float = 1.0, seed: int = 0):
    require(temperature == 0 or temperature >= 1e-6,
            "the temperature must be 0 (greedy) or at least 1e-6")
    require(0 <= seed < 2 ** 63, "the seed must lie between 0 and 2^63 - 1")
    require(1e-6 <= top_p <= 1, "top-p must lie between 1e-6 and 1")


def require_draft_length(draft_length: int):
    require(1 <= draft_length < BLOCK, f"the draft length must lie between 1 and {BLOCK - 1}")


def require_room(cache: KVCache, prompt: list[int], end: int, width: int):
    require(cache.length < len(prompt),
            f"the cache holds {cache.length} tokens, and the prompt has only {len(prompt)}")
    require(cache.tokens >= end and cache.scratch >= width,
            f"the cache has no room for {end} tokens in passes of {width} rows")


def require_finite(logits: Tensor):
    """Refuse logits of the text's own rows that are NaN or infinite."""
    refuse_overflow(not logits.max().isfinite(), logits.dtype)   # NaN counts as the maximum


def refuse_overflow(overflowed: bool, dtype: torch.dtype):
    if not overflowed:
        return
    advice = ""
    if dtype != torch.float32:
        advice = f", or {dtype} is too narrow for it (then use float32)"
    raise ModelError(f"the model computes NaN or infinity: its weights are damaged{advice}")
