"""Checks of problem 6: a draft, the loop with a scripted drafter, and CLaSp's drafter by itself.

The model is a double whose cache holds token ids (``token_model`` of doubles.py), so a roll-back
that is off by one, a wrong position or a token never fed changes what is written. In the loop,
drafts and acceptance follow a script: whatever the script says, the loop has to write. CLaSp's
drafter is asked and told by the checks in the loop's place, over a DP that notes its calls.
"""
import contextlib
import itertools
import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

from checks.common import PropertyError, check, close, equal, is_int, show
from checks.doubles import (
    LAYERS,
    VOCABULARY,
    best,
    cache_of,
    logits_after,
    marked_rope,
    states_of,
    token_model,
)


def text_of(tokens: list[int], left: int = 20, **settings):
    """A text over the token model, whose cache holds all tokens but the pending one."""
    import speculative
    llama = token_model()
    fields = {
        "width": None,
        "temperature": 0.0,
        "top_p": 1.0,
        "rng": torch.Generator().manual_seed(0),
        "stop": (),
        "stats": speculative.Stats(),
    }
    return speculative.Text(
        model=llama,
        cache=cache_of(llama, tokens[:-1]),
        tokens=list(tokens),
        end=len(tokens) + left,
        **fields | settings)


def require_draft(got, function: str, example: str):
    import speculative
    if not isinstance(got, speculative.Draft):
        raise PropertyError(
            f"{function} returns a Draft(tokens, distributions)", f"{example}: got {show(got)}")
    equal(len(got.distributions), len(got.tokens),
          "A draft has a distribution, or None, for each of its tokens",
          f"{example}, number of distributions")


# ---------------------------------------------------------------------------- a draft

def run_draft(tokens, skip, most: int, *, threshold=None, choose=None, **settings):
    """The student's draft_by_skipping: what it returned, and what it did.

    threshold: of a go_on that wants such a confidence. ``asked``: what go_on was given.
    """
    from speculative import draft_by_skipping
    text = text_of(tokens, **settings)
    if choose is not None:
        text.choose = choose
    asked = []

    def go_on(confidence):
        asked.append(float(confidence))
        return asked[-1] >= threshold

    example = (f"cache holds {tokens[:-1]}, pending token {tokens[-1]}, "
               f"skip = {show(frozenset(skip))}, most = {most}")
    if threshold is not None:
        example += f", a go_on that wants {threshold:.4f}"
    draft = draft_by_skipping(
        text, frozenset(skip), most, None if threshold is None else go_on)
    require_draft(draft, "draft_by_skipping", example)
    equal(text.tokens, tokens,
          "A draft is proposed, not written: text.tokens stays", f"{example}, text.tokens after")
    return SimpleNamespace(
        tokens=draft.tokens, q=draft.distributions, source=draft.source,
        passes=text.model.passes, asked=asked,
        example=example)


def expected_draft(tokens: list[int], skip, most: int) -> list[int]:
    drafted = []
    for _ in range(most):
        drafted.append(best([*tokens, *drafted], skip))
    return drafted


@check(2, "A draft")
def drafts():
    for tokens, skip, most in (
        ([3], {1}, 1), ([3], {1}, 2), ([3, 4], {0, 2}, 3), ([3, 4, 5], set(), 4), ([3, 4], {1}, 0),
    ):
        ran = run_draft(tokens, skip, most)
        for one in ran.passes:
            equal((len(one.rows), one.skip), (1, frozenset(skip)),
                  "A draft step is one row through the layers not in skip",
                  f"{ran.example}, (rows, skip) of a pass")
        equal(len(ran.passes), most,
              "A drafted token costs one pass: what was drafted before it is in the cache already, "
              "and the last one is fed by nobody", f"{ran.example}, number of passes")
        for token in ran.tokens:
            is_int(token, "A drafted token", ran.example)
        equal(ran.tokens, expected_draft(tokens, skip, most),
              "Each drafted token is the draft model's choice after the pending token and those "
              "drafted before it", f"{ran.example}, tokens")
        if ran.tokens:
            equal(ran.source, "layers",
                  "The source of such a draft is \"layers\"", f"{ran.example}, source")

    marks = iter(torch.tensor([[1.0], [2.0], [3.0]]))

    def choose(logits):
        equal(tuple(logits.shape), (VOCABULARY,),
              "text.choose(logits) takes the logits of one row, (vocabulary,)", "shape of logits")
        return torch.tensor(5), next(marks)

    ran = run_draft([3, 4], {1}, 3, choose=choose)
    q = [mark if mark is None else float(mark) for mark in ran.q]
    equal((ran.tokens, q), ([5, 5, 5], [1.0, 2.0, 3.0]),
          "A draft takes each token and its distribution q from text.choose(logits)",
          "a choose that says token 5 and distributions marked 1, 2, 3")


@check(3, "Where a draft ends")
def exits():
    tokens = [3, 4]
    skip = frozenset({1})
    drafted = expected_draft(tokens, skip, 4)
    sure = []
    for i in range(4):
        logits = torch.tensor(logits_after((*tokens, *drafted[:i]), skip))
        sure.append(logits.softmax(-1).max().item())
    given = f"top probabilities {show([round(confidence, 4) for confidence in sure])}"

    for threshold in [confidence * factor for confidence in sure for factor in (0.999, 1.001)]:
        unsure = [i for i, confidence in enumerate(sure) if confidence < threshold]
        kept = unsure[0] + 1 if unsure else 4
        ran = run_draft(tokens, skip, 4, threshold=threshold)
        asked = ran.asked[:len(sure)]
        close(torch.tensor(asked), sure[:len(asked)],
              "go_on is asked once at each token drawn, about the draft model's top probability "
              "there", given, ("token",))
        equal(ran.tokens, drafted[:kept],
              "A draft ends *after* the first token at which go_on(top probability) is false, and "
              "keeps that token", f"a go_on that wants {threshold:.4f}, {given}, tokens")

    def unlikely(logits):
        return logits.argmin(), None

    asked = run_draft(tokens, skip, 4, threshold=sure[0] * 0.999, choose=unlikely).asked
    close(torch.tensor(asked[:1]), sure[:1],
          "The confidence is the top probability, not that of the token drawn",
          f"top probability {sure[0]:.4f}, an unlikely token drawn: what go_on was asked", (None,))
    for sampling in ({"temperature": 3.0}, {"temperature": 1.0, "top_p": 0.5}):
        asked = run_draft(tokens, skip, 2, threshold=0.0, **sampling).asked
        close(torch.tensor(asked[:1]), sure[:1],
              "The confidence is the top probability before temperature and top-p",
              f"{show(sampling)}, top probability without {sure[0]:.4f}: what go_on was asked",
              (None,))
    ran = run_draft(tokens, skip, 1, stop={tokens[-1]})
    equal(ran.tokens, drafted[:1],
          "A pending token in text.stop, as a prompt's last may be, ends nothing",
          f"pending token {tokens[-1]}, stop {{{tokens[-1]}}}: tokens")
    goes_on = ((None, "no go_on"), (0.0, "a go_on that is always true"))
    for last, (threshold, given) in itertools.product(drafted[:2], goes_on):
        ran = run_draft(tokens, skip, 4, threshold=threshold, stop={last})
        equal(ran.tokens, drafted[:drafted.index(last) + 1],
              "A draft ends after a token in text.stop, its first one too, with a go_on and "
              "without", f"stop {{{last}}}, {given}, tokens")


# ---------------------------------------------------------------------------- room for a draft

def ask(length: int, left: int, *, extra: int = 0, moves=True, behind: int = 0, **settings):
    """The student's checked_draft, over a drafter that drafts what it may, and ``extra`` tokens.

    length: tokens in the cache. left: tokens still to write. moves: does the draft move
    cache.length? behind: so far has the drafter moved it earlier.
    """
    import speculative
    text = text_of([i % VOCABULARY for i in range(length + 1)], left, **settings)
    text.cache.length += behind
    seen = SimpleNamespace(most=None, draft=None, text=text)

    class Greedy(speculative.Drafter):
        def propose(self, text, most):
            seen.most = most
            tokens = [1] * (most + extra)
            if moves:
                text.cache.length += len(tokens)
            seen.draft = speculative.Draft(tokens, [None] * len(tokens))
            return seen.draft

    seen.got = speculative.checked_draft(Greedy(), text)
    return seen


@check(2, "Room for a draft")
def room():
    for length, left in ((0, 1), (3, 2), (3, 9)):
        seen = ask(length, left)
        example = f"{length} tokens in the cache, {left} still to write"
        if seen.most is None:
            raise PropertyError(
                "The drafter is asked in every cycle, also where there is room for no draft: it "
                "may count on that", f"{example}: not asked")
        equal(seen.most, left - 1,
              "A draft is at most one token shorter than what is left to write, since the verifier "
              "adds one of its own", f"{example}: most")
        equal(seen.text.cache.length, length,
              "After a draft the cache is as before: what the draft left there is scratch",
              f"{example}: cache.length")
        if seen.got != seen.draft:
            raise PropertyError("checked_draft returns the drafter's draft as it is", example)
    for length, left, width in ((3, 9, 2), (3, 9, 5), (0, 9, 1), (3, 2, 8), (0, 1, 8)):
        equal(ask(length, left, width=width).most, min(left, width) - 1,
              "With a width the pending token and the draft fill one pass at most, and the draft "
              "is still shorter than what is left to write",
              f"{length} tokens in the cache, {left} still to write, width {width}: most")
    equal(ask(3, 9, width=5, narrowest=1).most, 4,
          "With a width the pending token and the draft fill one pass at most",
          "3 tokens in the cache, 9 still to write, width 5, narrowest 1: most")
    for moves, behind, extra, drafter in (
        (False, 0, 0, "leaves cache.length alone"),
        (True, 2, 0, "had moved cache.length by 2 before it was asked"),
        (False, 2, -8, "had moved cache.length by 2 before it was asked, and drafts nothing"),
        (False, -2, 0, "had moved cache.length back by 2 before it was asked"),
    ):
        seen = ask(3, 9, moves=moves, behind=behind, extra=extra)
        equal(seen.text.cache.length, 3,
              "After a draft the cache holds all tokens but the pending one, whatever the drafter "
              "did with it",
              f"3 tokens in the cache, a drafter that {drafter}: cache.length")
    with mock.patch("speculative.BLOCK", 8), mock.patch("model.BLOCK", 8):
        for length in (0, 5, 6, 7, 8, 13):
            block = length // 8
            inside = [k for k in range(8) if (length + k) // 8 == block]
            equal(ask(length, 20, width=12).most, max(inside),
                  "With a width a cycle's tokens, from the pending one's slot on, lie in one block "
                  "of BLOCK slots",
                  f"BLOCK = 8, {length} tokens in the cache, 20 still to write, width 12: most")
            equal(ask(length, 20).most, 19,
                  "Without a width a cycle's tokens may lie in several blocks",
                  f"BLOCK = 8, {length} tokens in the cache, 20 still to write: most")
    try:
        ask(3, 4, extra=1)
    except ValueError:
        return
    raise PropertyError(
        "A draft of more tokens than there is room for is refused with a ValueError",
        "room for 3 tokens, 4 drafted: nothing was raised")


# ---------------------------------------------------------------------------- the loop

K = 3                         # tokens that the scripted drafter proposes, if there is room
SCRATCH = 30                  # slots that it wants
TAKES = {"begin": 7.0, "propose": 10.0, "observe": 3.0}        # seconds, by the checks' clock
CALLER_TAKES = 1000.0         # with each token


@dataclass
class Played:
    """What happened while the student's decode wrote a text."""
    stats: object
    tokens: list = field(default_factory=list)         # as they were yielded
    lengths: list = field(default_factory=list)        # cache.length at each yield
    counts: list = field(default_factory=list)         # what ``COUNTED`` says, at each
    begun: list = field(default_factory=list)          # what begin was given, and when
    drafts: list = field(default_factory=list)         # of each cycle
    judged: list = field(default_factory=list)         # what each acceptance was given
    accepted: list = field(default_factory=list)       # what the script said
    expected: list = field(default_factory=list)       # the text that follows from the script
    observed: list = field(default_factory=list)       # what observe was given, and when
    passes: list = field(default_factory=list)         # of the model
    refused: bool = False                              # by a ModelError
    prefills: int = 0                                  # so many of these are the prefill's
    seconds: float = 0.0                               # by the clock that the doubles move on
    text: object = None                                # as the drafter sees it

    @property
    def verified(self) -> list:
        return self.passes[self.prefills:]

    def clock(self, model):
        """In the clock's place: a pass takes 100 seconds."""
        return lambda: self.seconds + 100 * len(model.passes)


def scripted_drafter(played: Played, chance: random.Random, k: int):
    """A drafter that proposes k tokens at random, if there is room, and notes what it is told."""
    import speculative

    class Scripted(speculative.Drafter):
        scratch = SCRATCH

        def begin(self, text, hidden):
            played.text = text
            played.seconds += TAKES["begin"]
            played.begun.append(SimpleNamespace(
                length=text.cache.length, hidden=hidden, cycles=len(played.drafts)))

        def propose(self, text, most):
            played.seconds += TAKES["propose"]
            tokens = [chance.randrange(VOCABULARY) for _ in range(min(most, k))]
            start = text.cache.length
            for slots in text.cache.keys + text.cache.values:  # what a draft leaves is scratch
                slots[:, :, start:start + K] = 6.0
            text.cache.length += len(tokens)
            marks = [torch.full((VOCABULARY,), float(token)) for token in tokens]
            played.drafts.append(speculative.Draft(tokens, marks, "script"))
            return played.drafts[-1]

        def observe(self, text, outcome):
            played.seconds += TAKES["observe"]
            if not isinstance(outcome, speculative.Outcome):
                raise PropertyError(
                    "The drafter is told an Outcome", f"observe got {show(outcome)}")
            played.observed.append(SimpleNamespace(
                outcome=outcome,
                seconds=dict(outcome.seconds),
                length=text.cache.length,
                written=len(played.tokens),
                drafts=len(played.drafts),
                cycles=text.stats.cycles))

    return Scripted()


@contextlib.contextmanager
def scripted(played: Played, count: int, script: list[int], chance: random.Random):
    """Acceptance by a script, and checked_draft without its checks."""
    import speculative
    turns = iter(script)

    def judge(drafted):
        accepted = min(next(turns, 0), len(drafted))
        token = chance.randrange(VOCABULARY)
        played.accepted.append(accepted)
        played.expected += [*drafted[:accepted], token]
        return accepted, token

    def accept_greedy(drafted, logits):
        played.judged.append(SimpleNamespace(drafted=list(drafted), q=None, p=logits, seed=None))
        return judge(drafted)

    def accept_sampled(drafted, q, p, rng):
        played.judged.append(SimpleNamespace(
            drafted=list(drafted), q=list(q), p=p, seed=rng.initial_seed(),
            chance=torch.rand(1, generator=rng).item()))
        return judge(drafted)

    def checked_draft(drafter, text):
        length = text.cache.length
        left = count - len(played.tokens)
        draft = drafter.propose(text, max(left - 1, 0))
        text.cache.length = length
        return draft

    with contextlib.ExitStack() as stack:
        for double in (accept_greedy, accept_sampled, checked_draft):
            stack.enter_context(mock.patch.object(speculative, double.__name__, double))
        stack.enter_context(mock.patch.object(speculative, "clock", played.clock))
        stack.enter_context(marked_rope())             # if a cache is made
        yield


def play(
    prompt: list[int],
    count: int,
    script: list[int],
    *,
    broken: tuple[int, int, float] | None = None,
    known: int | None = 0,
    k: int = K,
    dtype=torch.float32,
    **settings,
) -> Played:
    """The student's decode with a scripted drafter.

    script: how many tokens of each draft are accepted; 0 from its end on. broken: a cycle, the row
    of its verify pass whose logits are no numbers, and what they are. known: tokens of the prompt
    that the cache given holds; None: no cache is given. k: tokens that are drafted. dtype: of the
    model's states.
    """
    import speculative
    from model import ModelError
    chance = random.Random(1)
    played = Played(stats=speculative.Stats())
    llama = token_model()
    llama.dtype = dtype
    played.passes = llama.passes
    drafter = scripted_drafter(played, chance, k)
    if known is not None:
        settings["cache"] = cache_of(llama, prompt[:known])
    played.prefills = int(len(prompt) - (known or 0) > 1)
    if broken is not None:
        cycle, *broken_row = broken
        llama.broken = played.prefills + cycle, *broken_row
    with scripted(played, count, script, chance):
        tokens = speculative.decode(
            llama, list(prompt), count, drafter, stats=played.stats, **settings)
        try:
            read(tokens, played, count + 5, told(prompt, count, script))
        except ModelError:
            if broken is None:
                raise
            played.refused = True
            return played
    equal(len(played.drafts), len(played.judged),
          "Every cycle asks the drafter for a draft and has it judged, by accept_greedy or, with a "
          "temperature above 0, by accept_sampled",
          f"{told(prompt, count, script)}: drafts and those judged")
    return played


def read(tokens, played: Played, most: int, example: str):
    """Take the tokens as a caller does, and note how things are at each."""
    for token in itertools.islice(tokens, most):
        played.tokens.append(int(token))
        played.seconds += CALLER_TAKES
        if played.text is None:
            raise PropertyError(
                "begin is called once, before the first draft",
                f"{example}: not called before the first token")
        played.lengths.append(played.text.cache.length)
        stats = played.stats
        played.counts.append((stats.cycles, stats.drafted, stats.accepted,
                              len(stats.tokens), len(stats.sources)))


def told(prompt, count: int, script) -> str:
    return f"prompt {prompt}, {count} new tokens, accepted by cycle {script}"


PROMPTS = ([1], [1, 2, 3])
SCRIPTS = ([0, 0, 0], [3, 3, 3], [1, 0, 2, 3, 0, 1], [2, 2, 1, 1, 3, 0, 0])


@check(2, "The loop: what is written")
def written():
    for prompt in PROMPTS:
        for script in SCRIPTS:
            for count in (1, 2, 9):
                played = play(prompt, count, script)
                example = told(prompt, count, script)
                equal(len(played.tokens), count,
                      "Just max_new_tokens tokens are written", f"{example}: number")
                equal(played.tokens, played.expected[:count],
                      "A cycle writes the accepted tokens of the draft and then the verifier's own "
                      "token", f"{example}, tokens")
                before = 0
                for cycle, one in enumerate(played.judged):
                    if len(one.drafted) >= count - before:
                        raise PropertyError(
                            "The drafter is asked, by checked_draft, for no more than there is "
                            "room for",
                            f"{example}, cycle {cycle}: {count - before} tokens left to write, "
                            f"{len(one.drafted)} drafted")
                    before += played.accepted[cycle] + 1
    for stop in range(VOCABULARY):
        played = play([1, 2, 3], 9, [1, 2, 3], stop={stop})
        if not played.tokens:
            raise PropertyError(
                "A token in stop that the prompt ends in ends nothing",
                f"prompt [1, 2, 3], stop {{{stop}}}, 9 tokens asked for: none were written")
        expected = played.expected[:9]
        if stop in expected:
            expected = expected[:expected.index(stop) + 1]
        equal(played.tokens, expected,
              "Decoding ends after a token in stop, drafted or the verifier's own",
              f"stop {{{stop}}}, 9 tokens asked for, tokens")
    overflows()


def overflows():
    """NaN or infinity in the logits: refused where they decide what is written, and only there.

    Before any token of that cycle goes out.
    """
    cases = (                 # script, new tokens, (cycle, row), refused
        ([1], 9, (0, 0), True), ([1], 9, (0, 1), True), ([1], 9, (0, 2), False),
        ([0, 0, 1], 9, (1, 1), False), ([0, 0, 1], 9, (2, 1), True), ([3], 9, (0, 1), True),
        ([], 1, (0, 0), True),
    )
    for (script, count, broken, is_refused), number in itertools.product(
            cases, (torch.nan, torch.inf)):
        cycle, row = broken
        played = play([1, 2, 3], count, script, broken=(cycle, row, number))
        example = (f"{told([1, 2, 3], count, script)}, {number} in row {row} of the verify pass of "
                   f"cycle {cycle}")
        equal(played.refused, is_refused,
              "Logits that are NaN or infinite are a ModelError (require_finite) in the pending "
              "token's row and those of accepted tokens, and do not matter in those of rejected "
              "ones", f"{example}: refused")
        if is_refused:
            equal(len(played.tokens), sum(accepted + 1 for accepted in script[:cycle]),
                  "Nothing that such logits decided is written", f"{example}: tokens written")


@check(2, "The loop: verify and roll back")
def rolls_back():
    for prompt in PROMPTS:
        for script in SCRIPTS:
            played = play(prompt, 9, script)
            example = told(prompt, 9, script)
            for i, length in enumerate(played.lengths):
                equal(length, len(prompt) + i,
                      "At every yield the cache holds all tokens so far but the last: after a "
                      "cycle that is n + accepted + 1", f"{example}, new token {i}: cache.length")
            text = list(prompt)
            at = 0
            for cycle, (one, judged) in enumerate(zip(played.verified, played.judged)):
                verifies(one, text, judged.drafted, f"{example}, cycle {cycle}")
                end = at + played.accepted[cycle] + 1
                text += played.expected[at:end]
                at = end


def verifies(one, text: list[int], drafted: list[int], example: str):
    """Is this the verify pass of such a draft, after such a text?"""
    equal(one.start, len(text) - 1,
          "A verify pass starts at the slot of the pending token",
          f"{example}: cache.length at its start")
    equal(one.before, text[:-1],
          "Before a verify pass the cache holds the text but its pending token",
          f"{example}: tokens in the cache")
    equal(one.rows[:1 + len(drafted)], [text[-1], *drafted],
          "A verify pass is the pending token and the draft, in order",
          f"{example}: its first rows")


@check(2, "The loop: what the drafter is told")
def drafter_is_told():
    for prompt in PROMPTS:
        for script, k in [*((script, K) for script in SCRIPTS), ([], 0)]:
            played = play(prompt, 9, script, k=k)
            example = f"{told(prompt, 9, script)}, drafts of {k} tokens"
            equal([one.cycles for one in played.begun], [0],
                  "begin is called once, before the first draft",
                  f"{example}: drafts before each call")
            begins(played.begun[0], prompt)
            equal([one.written for one in played.observed], ends(played)[:-1],
                  "observe is called after each cycle's tokens were written, but not after the "
                  "text's last", f"{example}: new tokens before each call")
            for cycle, one in enumerate(played.observed):
                observes(one, cycle, played, list(prompt), f"{example}, cycle {cycle}")
    script = [1, 0, 2]
    padded = play([1, 2, 3], 9, script, width=K + 3)
    for cycle, one in enumerate(padded.observed):
        observes(one, cycle, padded, [1, 2, 3],
                 f"{told([1, 2, 3], 9, script)}, width {K + 3}, cycle {cycle}")
    for one in play([1, 2, 3], 9, script, dtype=torch.bfloat16).observed:
        equal(one.outcome.hidden.dtype, torch.bfloat16,
              "A drafter is given the states in the model's own dtype",
              "states in bfloat16: dtype of an Outcome's hidden")


def ends(played: Played) -> list[int]:
    """New tokens after each cycle."""
    totals = []
    for accepted in played.accepted:
        before = totals[-1] if totals else 0
        totals.append(before + accepted + 1)
    return totals


def begins(one, prompt: list[int]):
    equal(one.length, len(prompt) - 1,
          "When a text begins the cache holds the prompt but its last token, the first pending one",
          f"prompt {prompt}: cache.length in begin")
    if len(prompt) == 1:
        equal(one.hidden, None,
              "With a prompt of one token the cache is empty, and begin is given None",
              f"prompt {prompt}: hidden")
    else:
        are_states_of(one.hidden, prompt[:-1], len(prompt) - 1, f"prompt {prompt}: hidden in begin")


def observes(one, cycle: int, played: Played, prompt: list[int], example: str):
    outcome = one.outcome
    cached = [*prompt, *played.expected[:one.written - 1]]
    equal(list(outcome.draft.tokens), played.drafts[cycle].tokens,
          "An Outcome holds the cycle's draft", f"{example}: draft.tokens")
    equal(outcome.accepted, played.accepted[cycle],
          "An Outcome says how many of the draft's tokens were accepted", f"{example}: accepted")
    equal(one.length, len(cached),
          "When observe is called, the cache holds all tokens but the pending one",
          f"{example}: cache.length")
    equal(one.drafts, cycle + 1,
          "observe is called before the next draft is asked for", f"{example}: drafts so far")
    equal(one.cycles, cycle + 1,
          "When observe is called, stats.cycles counts the cycle", f"{example}: stats.cycles")
    are_states_of(outcome.hidden, cached, outcome.accepted + 1,
                  f"{example}: hidden of the Outcome")
    expected = {
        "draft": TAKES["propose"],
        "verify": 100.0,
        "optimize": TAKES["observe"] if cycle else TAKES["begin"],
    }
    got = {name: one.seconds.get(name) for name in expected}
    equal(got, expected,
          "An Outcome has the seconds of the cycle's draft and verify, and of what the drafter was "
          "told before: text.laps, which text.timed keeps",
          f"{example}, a clock by which a draft takes 10 s, a pass 100, begin 7 and observe 3")


def are_states_of(hidden, tokens: list[int], count: int, example: str):
    """Is it h_0 .. h_L of the last ``count`` of these tokens?"""
    if not isinstance(hidden, Tensor):
        raise PropertyError(
            "A drafter is given hidden states, (L+1, n, dim)",
            f"{example}: got {show(hidden)}")
    equal(tuple(hidden.shape), (LAYERS + 1, count, VOCABULARY),
          "A drafter is given h_0 .. h_L of the last n tokens in the cache, (L+1, n, dim): in "
          "begin of the prompt's, then of those that the last cycle put there (the pending one, "
          "and the drafted ones accepted)", f"{example}: shape")
    for i in range(count):
        before = tokens[:len(tokens) - count + i + 1]
        if not torch.allclose(hidden[:, i], states_of(before)):
            raise PropertyError(
                "A drafter is given h_0 .. h_L of the last tokens in the cache, in their order",
                f"{example}: states number {i} of {count} are not those after {before}")


@check(1, "The loop: sampling, and passes of one width")
def sampling():
    import speculative
    script = [1, 0, 2]
    played = play([1, 2, 3], 8, script, temperature=0.7, top_p=0.9)
    text = [1, 2, 3]
    for cycle, one in enumerate(played.judged):
        example = f"temperature 0.7, top_p 0.9, accepted by cycle {script}, cycle {cycle}"
        drafted = one.drafted
        if one.q is None:
            raise PropertyError(
                "With a temperature above 0 a draft is judged by accept_sampled",
                "temperature 0.7: expected accept_sampled, got accept_greedy")
        rows = [logits_after((*text, *drafted[:i])) for i in range(len(drafted) + 1)]
        close(one.p, speculative.distribution(torch.tensor(rows), 0.7, 0.9),
              "accept_sampled gets p = distribution(logits, temperature, top_p) of the pending "
              "token's row and of each drafted one", example, ("row", "token"))
        equal([float(x[0]) for x in one.q], [float(t) for t in drafted],
              "accept_sampled gets the draft's distributions as they came with it",
              f"{example}: marks of q")
        text = [1, 2, 3, *played.expected[:ends(played)[cycle]]]
    if play([1, 2, 3], 4, [1]).judged[0].q is not None:
        raise PropertyError(
            "At temperature 0 a draft is judged by accept_greedy",
            "temperature 0: expected accept_greedy, got accept_sampled")
    for width, narrowest in ((6, None), (None, None), (6, 2), (6, 3)):
        played = play([1, 2, 3], 12, [3, 0, 1], width=width, narrowest=narrowest)
        for cycle, (one, judged) in enumerate(zip(played.verified, played.judged)):
            rows = 1 + len(judged.drafted)
            equal(len(one.rows), max(rows, narrowest or width or 0),
                  "A verify pass has text.width rows, or text.narrowest where there is one and "
                  "the tokens are no more; without a width, as many as there are tokens: "
                  "text.pass_width of these tokens says which",
                  f"width {width}, narrowest {narrowest}, {len(judged.drafted)} tokens drafted, "
                  f"cycle {cycle}: rows")


IMPOSSIBLE = [                # prompt, new tokens, settings
    ([], 3, {}),
    ([1], 0, {}),
    ([1, VOCABULARY], 3, {}),
    ([1] * 60, 5, {}),
    ([1], 3, {"temperature": -1.0}),
    ([1], 3, {"temperature": 1.0, "top_p": 0.0}),
    ([1], 3, {"temperature": 1.0, "seed": -1}),
    ([1], 3, {"width": 40}),
]


@check(1, "The loop: its settings")
def settings():
    for prompt, count, given in IMPOSSIBLE:
        example = f"prompt of {len(prompt)} tokens, {count} new ones, {given}, a context of 64"
        try:
            play(prompt, count, [1], **given)
        except ValueError:
            continue
        raise PropertyError(
            "Settings that cannot be are a SettingsError, when the first token is asked for: "
            "new_text sees to that", f"{example}: nothing was raised")
    for seed in (0, 5):
        equal(play([1, 2], 3, [1], temperature=1.0, seed=seed).judged[0].seed, seed,
              "All chance comes from the seed: accept_sampled gets text.rng",
              f"seed {seed}: initial_seed of its rng")
    chances = [one.chance for one in play([1, 2], 6, [0, 0, 0], temperature=1.0).judged]
    equal(len(set(chances)), len(chances),
          "A text has one generator, which goes on from cycle to cycle",
          f"temperature 1, {len(chances)} cycles, in each of which accept_sampled draws a number: "
          "different numbers")
    for known in (0, 1, 2):
        first = play([1, 2, 3, 4], 2, [1], known=known).passes[0]
        equal((first.start, first.rows), (known, [1, 2, 3][known:]),
              "What a given cache holds is not computed again",
              f"prompt [1, 2, 3, 4], of which the cache holds {known}: start and tokens of the "
              "first pass")
    played = play([1, 2, 3], 4, [1], known=None)
    equal(played.tokens, played.expected[:4],
          "Without a cache, one is made", f"{told([1, 2, 3], 4, [1])}, no cache given: tokens")
    if played.text.cache.scratch < SCRATCH:
        equal(played.text.cache.scratch, SCRATCH,
              "A cache that is made has the scratch slots that the drafter wants: new_text is "
              "given drafter.scratch", f"scratch {SCRATCH}: cache.scratch")


@check(1, "The loop: statistics")
def statistics():
    script = [1, 0, 2, 3]
    played = play([1, 2, 3], 10, script)
    flags = []
    for accepted in played.accepted:
        flags += ["script"] * accepted + [""]
    drafted = sum(len(judged.drafted) for judged in played.judged)
    example = told([1, 2, 3], 10, script)
    for name, meaning, expected in (
        ("tokens", "holds the new tokens", played.tokens),
        ("cycles", "counts the passes of the whole model but the prefill", len(played.judged)),
        ("drafted", "counts the tokens drafted", drafted),
        ("accepted", "counts the drafted tokens accepted, without the verifier's own",
         sum(played.accepted)),
        ("sources", "has the draft's source of each new token that came from one, else \"\"",
         flags[:10]),
        ("draft_seconds", "has the seconds of drafting, by a clock by which each takes 10",
         10.0 * len(played.drafts)),
        ("verify_seconds", "has the seconds of the passes, of which each takes 100, and not those "
         "of the caller, who takes 1000 with each token",
         100.0 * len(played.verified)),
        ("optimize_seconds", "has the seconds of begin, here 7, and of observe, 3 each",
         7.0 + 3 * len(played.observed)),
    ):
        equal(getattr(played.stats, name), expected,
              f"stats.{name} {meaning}", f"{example}: {name}")
    equal(played.counts, counts(played),
          "stats are up to date at every yield, as the caller may stop there: a cycle is counted "
          "before its first token goes out, and a token before it does",
          f"{example}: {COUNTED} at each new token")


COUNTED = "(cycles, drafted, accepted, number of tokens, of sources)"


def counts(played: Played) -> list[tuple[int, ...]]:
    """What ``COUNTED`` says, as it should be at each yield."""
    drafts = itertools.accumulate(len(judged.drafted) for judged in played.judged)
    totals = zip(itertools.count(1), drafts, itertools.accumulate(played.accepted))
    at_yields = [total for total, accepted in zip(totals, played.accepted)
                 for _ in range(accepted + 1)]
    return [(*total, n, n) for n, total in enumerate(at_yields[:len(played.tokens)], 1)]


# ---------------------------------------------------------------------------- CLaSp's drafter

M = 2                         # layers that the drafter is to skip
ACCEPTED = (0, 1, 2, 0, 1, 0, 2, 1)                    # drafted tokens, by cycle
CYCLES = len(ACCEPTED)
NO_ROOM = 6                   # the cycle in which there is none for a draft


@contextlib.contextmanager
def noted():
    """The DP and the draft exchanged for doubles that note their calls.

    ``runs``: of the DP, whose n-th run chooses layers n, n+1, ... ``drafts``: of the draft.
    ``measures``: the name of what each run of the DP was to measure by.
    """
    import dp_skip
    import speculative
    from dp_skip import Selection
    seen = SimpleNamespace(
        runs=[], measures=[], drafts=[], draft=speculative.Draft([4, 5], [None, None]))

    def select_layers(layer, states, budget, smallest=0, measure=None):
        first = len(seen.runs)
        told = (measure or distances)(torch.zeros(1, 2), torch.zeros(2)).item()
        seen.measures.append("relative_distances" if told else "distances")
        sets = []
        for m in range(smallest, budget + 1):
            sets.append(frozenset((first + i) % LAYERS for i in range(m)))
        return Selection(sets, [1.0] * len(sets))

    def select_layers_plain(layer, states, budget, measure=None):
        return select_layers(layer, states, budget, 0, measure)

    def distances(candidates, state):
        return torch.zeros(len(candidates))

    def relative_distances(candidates, state):
        return torch.ones(len(candidates))

    def optimize(model, cache, hidden, budget, select=select_layers):
        selection = select(None, hidden, budget)
        hidden = hidden if hidden.dim() == 3 else hidden[:, None]    # of one token
        seen.runs.append(SimpleNamespace(model=model, cache=cache, hidden=hidden, budget=budget))
        return selection

    def draft_by_skipping(text, skip, most, go_on=None):
        seen.drafts.append(SimpleNamespace(text=text, skip=skip, most=most, go_on=go_on))
        return seen.draft if most else speculative.NO_DRAFT

    with contextlib.ExitStack() as stack:
        doubles = (select_layers, select_layers_plain, distances, relative_distances, optimize,
                   draft_by_skipping)
        for double, module in itertools.product(doubles, (speculative, dp_skip)):
            if hasattr(module, double.__name__):
                stack.enter_context(mock.patch.object(module, double.__name__, double))
        yield seen


@check(1, "The drafter: what it drafts")
def drafted():
    import speculative
    with noted() as seen:
        for most, length, expected in ((9, 3, 3), (2, 3, 2), (3, 3, 3), (9, 1, 1)):
            drafter = speculative.FixedSet(frozenset({1, 2}), length, 0.5)
            text = text_of([1, 2])
            got = drafter.propose(text, most)
            example = f"skip {{1, 2}}, K = {length}, room for {most}"
            if got is not seen.draft:
                raise PropertyError(
                    "SkippingDrafter.propose returns what draft_by_skipping does", example)
            one = seen.drafts[-1]
            if one.text is not text:
                raise PropertyError(
                    "draft_by_skipping is given the text itself",
                    f"{example}: got a {type(one.text).__name__}")
            equal(one.skip, frozenset({1, 2}),
                  "The draft leaves out the drafter's set", f"{example}: skip")
            equal(one.most, expected,
                  "A draft is at most K tokens, and at most what there is room for",
                  f"{example}: most")
            if not callable(one.go_on):
                raise PropertyError(
                    "With an exit threshold draft_by_skipping is given a function go_on that tells "
                    "from a confidence whether to draw another token",
                    f"{example}: got {show(one.go_on)}")
            equal([bool(one.go_on(confidence)) for confidence in (0.499, 0.5, 0.501)],
                  [False, True, True],
                  "go_on(confidence) is true unless the confidence is below exit_threshold",
                  f"{example}, exit_threshold 0.5: go_on at 0.499, 0.5 and 0.501")
        speculative.FixedSet(frozenset(), 3, 0.5).propose(text_of([1, 2]), 9)
        equal([one.skip for one in seen.drafts[4:]], [frozenset()],
              "With an empty set to skip, as M = 0 has it, the draft is by all layers",
              "skip {}: what each call of draft_by_skipping was to skip")
        speculative.FixedSet(frozenset({1}), 3, 0.0).propose(text_of([1, 2]), 9)
        equal([one.most for one in seen.drafts[5:]], [3],
              "A draft is at most K tokens, with an exit threshold or without",
              "K = 3, room for 9, exit_threshold 0: most, of each call of draft_by_skipping")
        drafter = speculative.SkippingDrafter(3, 0.0)
        got = drafter.propose(text_of([1]), 9)
        require_draft(got, "propose", "skip None")
        equal((got.tokens, len(seen.drafts)), ([], 6),
              "While no layers are chosen (skip is None) nothing is drafted",
              "skip None: tokens, and calls of draft_by_skipping")


def live(drafter, text, states: Tensor | None, seen) -> SimpleNamespace:
    """Begin a text and go through some cycles, as the loop would. See ``ACCEPTED`` and ``marks``.

    ``due``: cycles before each run of the DP. ``skips``: what each draft left out, None where there
    was none; but for the cycle ``NO_ROOM``.
    """
    import speculative
    seen.runs.clear()
    seen.drafts.clear()
    happened = SimpleNamespace(due=[], skips=[])
    drafter.begin(text, states)
    happened.due += [0] * len(seen.runs)
    for cycle in range(1, CYCLES + 1):
        drafts = len(seen.drafts)
        draft = drafter.propose(text, 0 if cycle == NO_ROOM else 9)
        proposed = len(seen.drafts) > drafts
        if cycle != NO_ROOM:
            happened.skips.append(seen.drafts[-1].skip if proposed else None)
        told = marked_states(*marks(cycle))
        text.stats.cycles += 1
        text.stats.tokens += [0] * len(marks(cycle))
        runs = len(seen.runs)
        drafter.observe(text, speculative.Outcome(draft, ACCEPTED[cycle - 1], told, {}))
        happened.due += [cycle] * (len(seen.runs) - runs)
    return happened


def marks(cycle: int) -> list[float]:
    """Of the states of a cycle's tokens, the pending one and those accepted: c, c + 1/4, ..."""
    return [cycle + i / 4 for i in range(ACCEPTED[cycle - 1] + 1)]


def new_tokens(cycles: int) -> int:
    return cycles + sum(ACCEPTED[:cycles])


def due(hidden: Tensor | None, interval: int) -> list[int]:
    """Cycles after which the DP is to run."""
    cycles = [cycle for cycle in range(1, CYCLES + 1) if cycle % interval == 0]
    first = 1 if hidden is None else 0
    return cycles if first in cycles else [first, *cycles]


def marked_states(*marks: float) -> Tensor:
    """States h_0 .. h_L of so many tokens, which are all a token's mark, in bfloat16."""
    return torch.tensor(marks, dtype=torch.bfloat16)[:, None].repeat(LAYERS + 1, 1, VOCABULARY)


BEGUN = [-1.0, -0.5, 0.0]     # marks of the prompt's tokens, where there are states
STATES = marked_states(*BEGUN)
LIVES = [(STATES, 1), (STATES, 2), (STATES, 3), (None, 1), (None, 2), (None, 3)]


def life(hidden: Tensor | None, interval: int) -> str:
    begin = "a prompt of one token" if hidden is None else "a longer prompt"
    return f"{begin}, opt_interval {interval}, cycles that accept {show(list(ACCEPTED))} tokens"


@check(2, "The drafter: when the DP runs")
def when():
    import speculative
    for hidden, interval in LIVES:
        with noted() as seen:
            drafter = speculative.Clasp(token_model(), M, 3, 0.0, interval, 1)
            happened = live(drafter, text_of([1, 2]), hidden, seen)
            example = life(hidden, interval)
            equal(happened.due, due(hidden, interval),
                  "The DP runs when a text begins (with a prompt of one token: after the first "
                  "cycle) and then after every opt_interval cycles",
                  f"{example}: cycles before each run")
            happened = live(drafter, text_of([1, 2]), None, seen)
            equal(happened.due, due(None, interval),
                  "A drafter may go from text to text: one that begins with no states has no "
                  "layers chosen, whatever the last text's were",
                  f"{example}, then {life(None, interval)}: cycles before each run")
            happened = live(drafter, text_of([1, 2]), STATES, seen)
            equal(happened.due, due(STATES, interval),
                  "A drafter may go from text to text: the DP runs when each of them begins",
                  f"the third text, {life(STATES, interval)}: cycles before each run")


@check(1, "The drafter: on what the DP runs, and what comes of it")
def on_what():
    import speculative
    for (hidden, interval), tokens, budget in itertools.product(LIVES, (1, 2, 5), (M, 0)):
        with noted() as seen:
            llama = token_model()
            text = text_of([1, 2])
            drafter = speculative.Clasp(llama, budget, 3, 0.0, interval, tokens)
            happened = live(drafter, text, hidden, seen)
            example = f"{life(hidden, interval)}, opt_tokens {tokens}, skip_layers {budget}"
            cycles = due(hidden, interval)
            equal(happened.due, cycles,
                  "The DP runs only when it is due, also with skip_layers 0, where the set chosen "
                  "is empty", f"{example}: cycles before each run")
            for cycle, run in zip(cycles, seen.runs):
                where = f"{example}, run after {cycle} cycles"
                equal(run.budget, budget, "The DP's budget is skip_layers", f"{where}: budget")
                if run.model is not text.model or run.cache is not text.cache:
                    raise PropertyError("The DP runs on the text's model and cache", where)
                expected = [] if hidden is None else list(BEGUN)
                for before in range(1, cycle + 1):
                    expected += marks(before)
                expected = expected[-tokens:]
                equal(tuple(run.hidden.shape), (LAYERS + 1, len(expected), VOCABULARY),
                      "The DP gets h_0 .. h_L of the last opt_tokens tokens in the cache, "
                      "(L+1, T, dim), or of all that the drafter was told if these are fewer",
                      f"{where}: shape")
                equal(run.hidden.dtype, torch.bfloat16,
                      "The DP gets the states in the dtype that they came in",
                      f"{where}, states in bfloat16: dtype")
                equal(run.hidden[0, :, 0].tolist(), expected,
                      "The DP gets the states that the drafter was told last, of several cycles if "
                      "opt_tokens are more than one has",
                      f"{where}, states of cycle c's tokens all c, c + 1/4, ..., those of the "
                      f"prompt's {show(BEGUN)}: states given")
            for measure in seen.measures:
                equal(measure, "distances" if tokens == 1 else "relative_distances",
                      "The DP measures by distances if opt_tokens is 1, else by relative_distances",
                      f"{example}: measure")
            sets = [
                frozenset((n + i) % LAYERS for i in range(budget)) for n in range(len(cycles))]
            expected = []
            for before in range(CYCLES):
                so_far = sum(1 for run in cycles if run <= before)
                if before + 1 != NO_ROOM:
                    expected.append(sets[so_far - 1] if so_far else None)
            equal([show(skip) for skip in happened.skips], [show(skip) for skip in expected],
                  "A draft leaves out the set that the last run of the DP chose for budget M",
                  f"{example}, a DP whose n-th run chooses layers n, n+1 ...: skip set by cycle")
            equal(text.stats.optimizations, len(cycles),
                  "stats.optimizations counts the runs of the DP", f"{example}: optimizations")
            equal([(n, frozenset(skip)) for n, skip in text.stats.skip_sets],
                  [(new_tokens(cycle), chosen) for cycle, chosen in zip(cycles, sets)],
                  "stats.skip_sets holds each set that was chosen, after how many new tokens",
                  f"{example}: skip_sets")
    with noted() as seen:
        drafter = speculative.Clasp(token_model(), M, 3, 0.0, CYCLES, 3)
        text = text_of([1, 2])
        text.cache.scratch = 2 * M + 1
        live(drafter, text, STATES, seen)
        equal(tuple(seen.runs[0].hidden.shape), (LAYERS + 1, 2, VOCABULARY),
              "The DP goes by fewer tokens if cache.scratch has no slots for M of each",
              f"M = {M}, opt_tokens 3, cache.scratch {2 * M + 1}: shape")
    states_of_the_last_text()


def states_of_the_last_text():
    """When the first run is due is the last check's; here, that it has the new text's states."""
    import speculative
    for states, interval, prompt in ((None, CYCLES, "one token"), (STATES[:, -1:], 1, "two")):
        with noted() as seen:
            drafter = speculative.Clasp(token_model(), M, 3, 0.0, interval, 4)
            live(drafter, text_of([1, 2]), STATES, seen)
            first = live(drafter, text_of([1, 2]), states, seen).due[0]
            told = 1 if states is None else 1 + new_tokens(first)
            equal(tuple(seen.runs[0].hidden.shape), (LAYERS + 1, told, VOCABULARY),
                  "A drafter may go from text to text: it forgets the states of the last one",
                  f"a longer prompt, then a prompt of {prompt}, opt_tokens 4, its first run, after "
                  f"{first} cycles: shape")
