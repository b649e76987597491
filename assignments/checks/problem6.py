"""Checks of problem 6. The model is a double whose cache holds token ids, and acceptance is by a script.

The double's logits are a fixed random function of the tokens before, read from the cache, and of the skip set. So a
roll-back that is off by one, a wrong position or a token never fed changes what is written, with nothing of problems
1 to 5 in use; and whatever the scripted acceptance says, the loop has to write.
"""
import contextlib
import functools
import random
from types import SimpleNamespace
from unittest import mock

import torch

from checks.common import Wrong, check, close, config, equal, marked_rope, parts, show

VOCABULARY, LAYERS = 7, 4


@functools.lru_cache(maxsize=100_000)
def state(history: tuple[int, ...], skip: frozenset = frozenset(), layer: int = LAYERS) -> tuple[float, ...]:
    """Hidden state h_layer after these tokens. The last one is the logits."""
    chance = random.Random(f"{history} {sorted(skip)} {layer}")
    return tuple(chance.gauss(0, 1) for _ in range(VOCABULARY))


def double():
    """A Llama in all but what it computes, and ``passes``: (start, tokens, skip, slots, what the cache held before)."""
    import model

    class Double(model.Llama):
        def forward(self, tokens, cache=None, skip=(), slots=None):
            start, rows, held = cache.length, tokens[0].tolist(), cache.keys[0][0, 0, :, 0]
            if start + len(rows) > len(held):
                raise Wrong("No pass goes past the cache's last slot", f"{len(rows)} rows from slot {start} on, {len(held)} slots")
            self.passes.append(SimpleNamespace(start=start, rows=rows, skip=frozenset(skip), slots=slots, before=held[:start].int().tolist()))
            for r, token in enumerate(rows):
                held[start + r] = token
            cache.length = start + len(rows)
            ids = held.int().tolist()
            seen = [tuple(ids[:min(start + r + 1, slots or start + r + 1)]) for r in range(len(rows))]
            return [torch.tensor([[state(history, frozenset(skip), i) for history in seen]]) for i in range(LAYERS + 1)]

        def logits(self, state):
            return state

    with marked_rope():
        llama = Double(config(vocab_size=VOCABULARY))
    llama.passes = []
    return llama


def cache_of(llama, tokens=(), slots=60, rows=16):
    import model
    with marked_rope():
        cache = model.KVCache(llama, slots, rows)
    cache.keys[0][0, 0, :len(tokens), 0] = torch.tensor(tokens, dtype=torch.float32)
    cache.length = len(tokens)
    return cache


def states_of(tokens: list[int]) -> torch.Tensor:
    """h_0 .. h_L of the last of these tokens, (L+1, dim), by all layers."""
    return torch.tensor([state(tuple(tokens), frozenset(), i) for i in range(LAYERS + 1)])


def best(history, skip=frozenset()) -> int:
    logits = state(tuple(history), frozenset(skip))
    return logits.index(max(logits))


# ---------------------------------------------------------------------------- draft

def greedy(logits):
    return logits.argmax(), None


def expected_draft(text: list[int], skip, length: int) -> list[int]:
    tokens = []
    for _ in range(length):
        tokens.append(best([*text, *tokens], skip))
    return tokens


def run_draft(text: list[int], skip, length: int, *, threshold=0., choose=greedy, stop=()):
    """The student's draft on a double whose cache holds ``text`` but for its last token; ``asked``: what go_on was given."""
    from speculative import draft
    llama, asked = double(), []

    def go_on(confidence):
        asked.append(float(confidence))
        return asked[-1] >= threshold

    cache = cache_of(llama, text[:-1])
    example = (f"cache holds {text[:-1]}, token {text[-1]}, skip = {show(frozenset(skip))}, length {length}"
               + f", a go_on that wants {threshold:.4f}" * (threshold > 0))
    tokens, q = parts(draft(llama, cache, text[-1], frozenset(skip), length, go_on, choose, stop), "draft",
                      "drafted tokens, their distributions", example)
    return SimpleNamespace(tokens=tokens, q=q, passes=llama.passes, length=cache.length, asked=asked, example=example)


@check(2, "The draft")
def drafts():
    for text, skip, length in (([3], {1}, 1), ([3], {1}, 2), ([3, 4], {0, 2}, 3), ([3, 4, 5], set(), 4), ([3, 4], {1}, 0)):
        ran = run_draft(text, skip, length)
        for one in ran.passes:
            equal((len(one.rows), one.skip), (1, frozenset(skip)), "A draft step is one row through the layers not in skip",
                  f"{ran.example}, (rows, skip) of a pass")
        equal(ran.tokens, expected_draft(text, skip, length), "Each drafted token is the draft model's choice after the token given and those "
              "drafted before it", f"{ran.example}, tokens")
        equal(len(ran.q), length, "draft returns what choose says of each token's distribution", f"{ran.example}, number of distributions")
        equal(ran.length, len(text) - 1, "draft puts cache.length back, so that the verifier starts over from there",
              f"{ran.example}, cache.length after")
    marks = iter(torch.tensor([[1.], [2.], [3.]]))
    ran = run_draft([3, 4], {1}, 3, choose=lambda logits: (torch.tensor(5), next(marks)))
    equal((ran.tokens, [float(x) for x in ran.q]), ([5, 5, 5], [1., 2., 3.]), "draft takes each token and its distribution q from "
          "choose(logits)", "a choose that says token 5 and distributions marked 1, 2, 3")


@check(3, "Where a draft ends")
def exits():
    text, skip = [3, 4], frozenset({1})
    tokens = expected_draft(text, skip, 4)
    sure = [torch.tensor(state((*text, *tokens[:i]), skip)).softmax(-1).max().item() for i in range(4)]
    for threshold in [confidence * factor for confidence in sure for factor in (.999, 1.001)]:
        kept = next((i + 1 for i, confidence in enumerate(sure) if confidence < threshold), 4)
        ran = run_draft(text, skip, 4, threshold=threshold)
        asked = ran.asked[:len(sure)]
        close(torch.tensor(asked), sure[:len(asked)], "go_on is asked once at each token drawn, about the draft model's top probability there",
              f"top probabilities {show([round(c, 4) for c in sure])}", ("token",))
        equal(ran.tokens, tokens[:kept], "A draft ends *after* the first token at which go_on(top probability) is false, and keeps that token",
              f"a go_on that wants {threshold:.4f}, top probabilities {show([round(c, 4) for c in sure])}, tokens")
    threshold = sure[0] * .999
    asked = run_draft(text, skip, 4, threshold=threshold, choose=lambda logits: (logits.argmin(), None)).asked
    close(torch.tensor(asked[:1]), sure[:1], "The confidence is the top probability, not that of the token drawn",
          f"top probability {sure[0]:.4f}, an unlikely token drawn: what go_on was asked", (None,))
    equal(run_draft(text, skip, 4, stop={tokens[1]}).tokens, tokens[:tokens.index(tokens[1]) + 1], "A draft ends after a token in stop",
          f"stop {{{tokens[1]}}}, tokens")


# ---------------------------------------------------------------------------- clasp

def play(prompt, count, script, *, drafts=None, **settings):
    """Run the student's clasp with scripted acceptance: ``script`` says how many of each draft are accepted.

    Returns what happened: tokens, cache.length at each yield, drafts asked for, verify passes, optimisations, Stats.
    """
    import speculative
    from dp_skip import Selection
    llama, chance = double(), random.Random(1)
    seen = SimpleNamespace(tokens=[], lengths=[], asked=[], optimized=[], judged=[], expected=[], stats=speculative.Stats())
    turns = iter(script)

    def judge(drafted):
        accepted = min(next(turns, 0), len(drafted))
        token = chance.randrange(VOCABULARY)
        seen.expected += [*drafted[:accepted], token]
        return accepted, token

    def accept_greedy(drafted, logits):
        seen.judged.append((list(drafted), logits))
        return judge(drafted)

    def accept_sampled(drafted, q, p, rng):
        seen.judged.append((list(drafted), list(q), p))
        return judge(drafted)

    def drafter(model, cache, token, skip, length, go_on, choose, stop):
        seen.asked.append(SimpleNamespace(at=cache.length, token=token, skip=skip, length=length, go_on=go_on, stop=stop))
        tokens = [chance.randrange(VOCABULARY) for _ in range(min(length, drafts) if drafts is not None else length)]
        for x in cache.keys + cache.values:                    # what a draft leaves behind is scratch
            x[:, :, cache.length:cache.length + length] = 6.
        return tokens, [torch.full((VOCABULARY,), float(token)) for token in tokens]

    def optimizer(model, cache, hidden, budget, *_, **__):
        if not isinstance(hidden, torch.Tensor):
            raise Wrong("The optimizer gets the hidden states of a token, (L+1, dim)", f"optimisation {len(seen.optimized)}: got {show(hidden)}")
        seen.optimized.append(SimpleNamespace(at=cache.length, hidden=hidden.clone(), budget=budget, written=len(seen.tokens)))
        return Selection([frozenset(range(m)) for m in range(budget + 1)], [1.] * (budget + 1))

    with contextlib.ExitStack() as stack:
        for name, value in (("accept_greedy", accept_greedy), ("accept_sampled", accept_sampled), ("draft", drafter),
                            ("optimize", optimizer), ("exact_width", lambda model, rows: rows + 2)):
            stack.enter_context(mock.patch.object(speculative, name, value))
        cache = settings.pop("cache", None) or cache_of(llama)
        settings = dict(skip_layers=2, draft_length=3, opt_interval=2) | settings
        for token in speculative.clasp(llama, list(prompt), count, stats=seen.stats, cache=cache, **settings):
            seen.tokens.append(int(token))
            seen.lengths.append(cache.length)
            if len(seen.tokens) > count + 5:
                break
    if not seen.judged:
        raise Wrong(f"Every cycle's draft, be it empty, is judged by {'accept_sampled' if settings.get('temperature') else 'accept_greedy'}",
                    f"prompt {prompt}, {count} new tokens: it was never called")
    seen.verified = [one for one in llama.passes[1 if len(prompt) > 1 else 0:] if not one.skip]
    return seen


SCRIPTS = ([0, 0, 0], [3, 3, 3], [1, 0, 2, 3, 0, 1], [2, 2, 1, 1, 3, 0, 0])


@check(3, "What is written")
def written():
    for prompt in ([1], [1, 2, 3]):
        for script in SCRIPTS:
            for count in (1, 2, 9):
                seen = play(prompt, count, script)
                example = f"prompt {prompt}, {count} new tokens, K = 3, accepted by cycle {script}"
                equal(len(seen.tokens), count, "Just max_new_tokens tokens are written", f"{example}: number")
                equal(seen.tokens, seen.expected[:count], "A cycle writes the accepted tokens of the draft and then the verifier's own "
                      "token", f"{example}, tokens")
    for stop in range(VOCABULARY):
        seen = play([1, 2, 3], 9, [1, 2, 3], stop={stop})
        place = seen.expected.index(stop) + 1 if stop in seen.expected else 9
        equal(seen.tokens, seen.expected[:min(place, 9)], "Decoding ends after a token in stop, drafted or the verifier's own",
              f"stop {{{stop}}}, 9 tokens asked for, tokens")


@check(4, "Verify and roll back")
def rolls_back():
    for prompt in ([1], [1, 2, 3]):
        for script in SCRIPTS:
            seen = play(prompt, 9, script)
            example = f"prompt {prompt}, K = 3, accepted by cycle {script}"
            for i, length in enumerate(seen.lengths):
                equal(length, len(prompt) + i, "At every yield the cache holds all tokens so far but the last: after a cycle that is "
                      "n + accepted + 1", f"{example}, new token {i}: cache.length")
            text, at = list(prompt), 0
            for cycle, (one, (drafted, *_)) in enumerate(zip(seen.verified, seen.judged)):
                where = f"{example}, cycle {cycle}"
                equal(one.start, len(text) - 1, "A verify pass starts at the slot of the pending token", f"{where}: cache.length at its start")
                equal(one.before, text[:-1], "Before a verify pass the cache holds the text but its pending token", f"{where}: tokens in the cache")
                equal(one.rows[:1 + len(drafted)], [text[-1], *drafted], "A verify pass is the pending token and the draft, in order",
                      f"{where}: its first rows")
                accepted = min(script[cycle] if cycle < len(script) else 0, len(drafted))
                text += seen.expected[at:at + accepted + 1]
                at += accepted + 1


@check(1, "What is drafted")
def drafted():
    seen = play([1, 2, 3], 12, [3, 0, 1], draft_length=3, exit_threshold=0.5, stop={99})
    text = [1, 2, 3] + seen.expected
    for cycle, ask in enumerate(seen.asked):
        example = f"prompt [1, 2, 3], 12 new tokens, K = 3, M = 2, accepted by cycle [3, 0, 1], cycle {cycle}"
        equal(ask.token, text[ask.at], "A draft begins at the pending token: the verifier's own, which is not in the cache yet",
              f"{example}: token")
        equal(ask.skip, frozenset({0, 1}), "A draft skips the set that the optimizer chose for budget M", f"{example}: skip set")
        left = 12 - (ask.at - 2)
        equal(ask.length, min(3, left - 1), "A draft is at most K tokens, and one fewer than are left to write, since the verifier "
              "adds one of its own", f"{example}, {left} tokens left: length")
        if not callable(ask.go_on):
            raise Wrong("draft is given a function go_on that tells from a confidence whether to draw another token",
                        f"{example}: got {show(ask.go_on)}")
        equal([bool(ask.go_on(confidence)) for confidence in (.499, .5, .501)], [False, True, True], "go_on(confidence) is true unless the "
              "confidence is below exit_threshold", f"{example}, exit_threshold 0.5: go_on at 0.499, 0.5 and 0.501")
        equal(set(ask.stop), {99}, "The stop tokens are handed on to draft", f"{example}: stop")
    for prompt, expected in (([1, 2, 3], 0), ([1], 1)):
        seen = play(prompt, 12, [0, 0, 0])
        equal(seen.asked[0].at - len(prompt) + 1 if seen.asked else None, expected, "There is a draft in every cycle once layers are chosen: "
              "from the first on, or with a prompt of one token from the second", f"prompt {prompt}, nothing accepted: cycle of the first draft")


@check(3, "When and on what the DP runs")
def optimised():
    for prompt, interval, script in (([1, 2, 3], 1, [2, 0, 3]), ([1, 2, 3], 2, [0, 1, 2, 3]), ([1, 2, 3], 3, [3, 1, 0, 2]), ([1], 2, [0, 1, 2])):
        seen = play(prompt, 12, script, opt_interval=interval)
        text = list(prompt) + seen.expected
        ends, at = [], 0                                       # tokens written after each cycle
        for cycle, (drafted, *_) in enumerate(seen.judged):
            at += min(script[cycle] if cycle < len(script) else 0, len(drafted)) + 1
            ends.append(at)
        due = [0] * (len(prompt) > 1) + [end for cycle, end in enumerate(ends, 1)
                                         if (cycle % interval == 0 or cycle == 1 and len(prompt) == 1) and end < 12]
        example = f"prompt {prompt}, opt_interval {interval}, accepted by cycle {script}"
        equal([one.written for one in seen.optimized], due, "The DP runs after the prefill (with a prompt of one token: after the first "
              "cycle) and then every opt_interval cycles, before the next draft", f"{example}: new tokens before each run")
        for one in seen.optimized:
            last = len(prompt) + one.written - 1               # tokens in the cache
            where = f"{example}, run after {one.written} new tokens"
            equal(one.budget, 2, "The DP's budget is skip_layers", f"{where}: budget")
            equal(one.at, last, "When the DP runs, the last token in the cache is the last one accepted", f"{where}: cache.length")
            equal(tuple(one.hidden.shape), (LAYERS + 1, VOCABULARY), "The DP gets h_0 .. h_L of one token, (L+1, dim)", f"{where}: shape")
            held = [n for n in range(1, last + 1) if torch.allclose(one.hidden, states_of(text[:n]))]
            if last not in held:
                raise Wrong("The DP gets h_0 .. h_L of the last token in the cache: the last drafted token accepted, or the pending one "
                            "if none was", f"{where}: expected the states after {text[:last]}, got "
                            + (f"those after {text[:held[-1]]}" if held else "those of a token that was not accepted, or no token's"))
    equal([at for at, _ in seen.stats.skip_sets], due, "stats.skip_sets tells after how many new tokens each set was chosen", f"{example}")


@check(2, "Sampling, in the loop")
def sampling():
    import speculative
    seen = play([1, 2, 3], 8, [1, 0, 2], temperature=0.7, top_p=0.9)
    text, at = [1, 2, 3], 0
    if len(seen.judged[0]) != 3:
        raise Wrong("With a temperature above 0 a draft is judged by accept_sampled", "temperature 0.7: expected accept_sampled, got accept_greedy")
    for cycle, (drafted, q, p) in enumerate(seen.judged):
        example = f"temperature 0.7, top_p 0.9, accepted by cycle [1, 0, 2], cycle {cycle}"
        logits = torch.tensor([state((*text, *drafted[:i])) for i in range(len(drafted) + 1)])
        close(p, speculative.distribution(logits, 0.7, 0.9), "accept_sampled gets p = distribution(logits, temperature, top_p) of the "
              "pending token's row and of each drafted one", example, ("row", "token"))
        equal([float(x[0]) for x in q], [float(t) for t in drafted], "accept_sampled gets the draft's distributions as draft returned them",
              f"{example}: marks of q")
        accepted = min([1, 0, 2][cycle] if cycle < 3 else 0, len(drafted))
        text += seen.expected[at:at + accepted + 1]
        at += accepted + 1
    seen = play([1, 2, 3], 4, [1])
    if len(seen.judged[0]) != 2:
        raise Wrong("At temperature 0 a draft is judged by accept_greedy", "temperature 0: expected accept_greedy, got accept_sampled")


@check(1, "Passes of one shape")
def one_shape():
    seen = play([1, 2, 3], 12, [3, 0, 1], draft_length=3, drafts=1)
    for cycle, one in enumerate(seen.verified):
        equal(len(one.rows), 6, "With exact every verify pass has exact_width(model, K + 1) rows, however many were drafted",
              f"K = 3, an exact_width that adds 2, 1 token drafted, cycle {cycle}: rows")
    seen = play([1, 2, 3], 12, [3, 0, 1], draft_length=3, drafts=1, exact=False)
    for cycle, (one, (drafted, *_)) in enumerate(zip(seen.verified, seen.judged)):
        equal(len(one.rows), 1 + len(drafted), "Without exact a verify pass has as many rows as there are tokens",
              f"K = 3, {len(drafted)} tokens drafted, cycle {cycle}: rows")
    with mock.patch("speculative.BLOCK", 8), mock.patch("exact.BLOCK", 8), mock.patch("model.BLOCK", 8):
        seen = play([1, 2, 3], 30, [3, 3, 2, 3, 1, 3, 3, 0, 3, 3], draft_length=3)
    for cycle, (one, (drafted, *_)) in enumerate(zip(seen.verified, seen.judged)):
        last = one.start + len(drafted)
        equal(last // 8, one.start // 8, "With exact a cycle's tokens lie in one block of BLOCK slots, so a draft ends at a block's end",
              f"BLOCK = 8, cycle {cycle}, {1 + len(drafted)} tokens from slot {one.start} on: block of the last one")


@check(1, "Statistics")
def statistics():
    script = [1, 0, 2, 3]
    seen = play([1, 2, 3], 10, script)
    example, drafted = "prompt of 3, 10 new tokens, K = 3, accepted by cycle [1, 0, 2, 3]", [len(judged[0]) for judged in seen.judged]
    accepted = [min(script[cycle] if cycle < 4 else 0, k) for cycle, k in enumerate(drafted)]
    flags = [flag for a in accepted for flag in [True] * a + [False]]
    for name, meaning, expected in (
            ("tokens", "holds the new tokens", seen.tokens), ("cycles", "counts the passes of the whole model but the prefill", len(drafted)),
            ("drafted", "counts the tokens drafted", sum(drafted)),
            ("accepted", "counts the drafted tokens accepted, without the verifier's own", sum(accepted)),
            ("optimizations", "counts the runs of the DP", len(seen.optimized)),
            ("from_draft", "tells of each new token whether the draft wrote it", flags[:10])):
        equal(getattr(seen.stats, name), expected, f"stats.{name} {meaning}", f"{example}: {name}")
