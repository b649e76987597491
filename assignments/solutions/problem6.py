"""Problem 6 once more."""
import contextlib
import functools
from unittest import mock

import torch

import dp_skip
import speculative
from solutions.common import solves

# ---------------------------------------------------------------------------- a draft


@solves("speculative.draft_by_skipping")
def draft_by_skipping(text, skip, most, go_on=None):
    drafted = []
    marks = []
    fed = text.tokens[-1]
    sure = True
    for _ in range(most):
        row = speculative.as_row(text.model, [fed])
        states = text.model(row, text.cache, skip)
        logits = text.model.logits(states[-1])[0, -1]
        drawn, q = text.choose(logits)
        chances = logits.softmax(-1)
        drafted.append(int(drawn))
        marks.append(q)
        if go_on:
            sure = go_on(chances.max().item())
        if int(drawn) in text.stop or not sure:
            break
        fed = int(drawn)
    return speculative.Draft(drafted, marks, "layers")


draft_by_skipping.mistake(
    "the token below the threshold dropped",
    ("        drafted.append(int(drawn))\n        marks.append(q)\n", ""),
    ("        fed =", "        drafted.append(int(drawn))\n        marks.append(q)\n        fed ="))
draft_by_skipping.mistake(
    "norm and head forgotten",
    ("text.model.logits(states[-1])[0, -1]", "states[-1][0, -1]"))
draft_by_skipping.mistake(
    "the last drafted token fed as well",
    ("    return speculative.Draft(drafted",
     "    if drafted:\n"
     "        text.model(speculative.as_row(text.model, [fed]), text.cache, skip)\n"
     "    return speculative.Draft(drafted"))
draft_by_skipping.mistake(
    "logits with an axis of rows",
    ("[0, -1]", "[0]"))
draft_by_skipping.mistake(
    "its source not said",
    (", \"layers\")", ")"))
draft_by_skipping.mistake(
    "confidence of the token drawn",
    ("chances.max()", "chances[drawn]"))
draft_by_skipping.mistake(
    "the same token fed again",
    ("fed = int(drawn)", "pass"))
draft_by_skipping.mistake(
    "go_on heeded one token later",
    ("        if go_on:", "        was_sure = sure\n        if go_on:"),
    ("not sure", "not was_sure"))
draft_by_skipping.mistake(
    "go_on asked of the logit",
    ("logits.softmax(-1)", "logits"))
draft_by_skipping.mistake(
    "go_on not asked",
    ("if go_on:", "if False:"))
draft_by_skipping.mistake(
    "go_on always asked",
    ("if go_on:", "if True:"))
draft_by_skipping.mistake(
    "stop ignored",
    ("int(drawn) in text.stop or ", ""))
draft_by_skipping.mistake(
    "stop ignored at the first drafted token",
    ("int(drawn) in text.stop", "drafted[1:] and int(drawn) in text.stop"))
draft_by_skipping.mistake(
    "a tensor looked up in stop",
    ("int(drawn) in text.stop", "drawn in text.stop"))
draft_by_skipping.mistake(
    "drafted tokens left tensors",
    ("drafted.append(int(drawn))", "drafted.append(drawn)"))
draft_by_skipping.mistake(
    "stop ignored where go_on is given",
    ("int(drawn) in text.stop or not sure", "not sure if go_on else int(drawn) in text.stop"))
draft_by_skipping.mistake(
    "confidence after temperature",
    ("logits.softmax(-1)", "(logits / (text.temperature or 1)).softmax(-1)"))
draft_by_skipping.mistake(
    "confidence after top-p",
    ("chances = logits.softmax(-1)",
     "chances = speculative.distribution(logits[None], 1.0, text.top_p)[0]"))
draft_by_skipping.mistake(
    "nothing drafted after a prompt that ends in stop",
    ("for _ in range(most):", "for _ in range(0 if fed in text.stop else most):"))
draft_by_skipping.mistake(
    "confidence by what the token was drawn from",
    ("logits.softmax(-1)", "logits.softmax(-1) if q is None else q"))
draft_by_skipping.mistake(
    "drafted by the whole model",
    ("text.cache, skip)", "text.cache)"))
draft_by_skipping.mistake(
    "one token too many",
    ("range(most)", "range(most + 1)"))
draft_by_skipping.mistake(
    "drafted tokens written into the text",
    ("marks.append(q)", "marks.append(q)\n        text.tokens.append(int(drawn))"))
draft_by_skipping.mistake(
    "temperature ignored",
    ("text.choose(logits)", "(logits.argmax(), None)"))
draft_by_skipping.mistake(
    "top-p ignored",
    ("text.choose(logits)", "speculative.pick(logits, text.temperature, 1.0, text.rng)"))
draft_by_skipping.mistake(
    "random numbers of its own",
    ("text.choose(logits)",
     "speculative.pick(logits, text.temperature, text.top_p, torch.Generator())"))
draft_by_skipping.mistake(
    "no distributions",
    ("Draft(drafted, marks", "Draft(drafted, [None] * len(drafted)"))


@solves("speculative.checked_draft")
def checked_draft(drafter, text):
    n = text.cache.length
    left = text.end - len(text.tokens)
    limits = [left - 1]
    if text.width is not None:
        limits.append(text.width - 1)
        behind = (n // speculative.BLOCK + 1) * speculative.BLOCK - n
        limits.append(behind - 1)
    most = min(limits)
    draft = drafter.propose(text, most)
    if not len(draft.tokens) <= most:
        raise ValueError("too long a draft")
    text.cache.length = len(text.tokens) - 1
    return draft


checked_draft.mistake(
    "not rolled back",
    ("text.cache.length = len(text.tokens) - 1", "pass"))
checked_draft.mistake(
    "not rolled back where nothing is drafted",
    ("    text.cache.length =",
     "    if not draft.tokens:\n        return draft\n    text.cache.length ="))
checked_draft.mistake(
    "in one block without a width too",
    ("        behind = (n // speculative.BLOCK + 1) * speculative.BLOCK - n\n"
     "        limits.append(behind - 1)\n",
     "    behind = (n // speculative.BLOCK + 1) * speculative.BLOCK - n\n"
     "    limits.append(behind - 1)\n"))
checked_draft.mistake(
    "nobody asked where there is no room",
    ("    draft = drafter.propose",
     "    if most <= 0:\n        return speculative.NO_DRAFT\n    draft = drafter.propose"))
checked_draft.mistake(
    "put back to what was found",
    ("text.cache.length = len(text.tokens) - 1", "text.cache.length = n"))
checked_draft.mistake(
    "never moved forward",
    ("text.cache.length = len(text.tokens) - 1",
     "text.cache.length = min(text.cache.length, len(text.tokens) - 1)"))
checked_draft.mistake(
    "moved back by what was drafted",
    ("text.cache.length = len(text.tokens) - 1", "text.cache.length -= len(draft.tokens)"))
checked_draft.mistake(
    "the narrowest pass taken for the widest",
    ("limits.append(text.width - 1)", "limits.append(text.pass_width(1) - 1)"))
checked_draft.mistake(
    "what is left to write forgotten where there is a width",
    ("[left - 1]", "[left - 1] if text.width is None else []"))
checked_draft.mistake(
    "drafts past the end",
    ("[left - 1]", "[left]"))
checked_draft.mistake(
    "a cycle across two blocks",
    ("limits.append(behind - 1)", "pass"))
checked_draft.mistake(
    "a block's last slot left free",
    ("behind - 1", "behind - 2"))
checked_draft.mistake(
    "more rows than the width",
    ("text.width - 1", "text.width"))
checked_draft.mistake(
    "too long a draft let through",
    ("<= most", "<= most + 1"))


# ---------------------------------------------------------------------------- the loop

@solves("speculative.decode")
def decode(model, prompt, max_new_tokens, drafter, **settings):
    settings["scratch"] = drafter.scratch
    text, hidden = speculative.new_text(model, prompt, max_new_tokens, **settings)
    stats = text.stats
    with text.timed("optimize"):
        drafter.begin(text, hidden)
    while not (stats.new_tokens and text.is_finished):
        if stats.cycles > 0:
            with text.timed("optimize"):
                drafter.observe(text, outcome)         # noqa: F821
        with text.timed("draft"):
            draft = speculative.checked_draft(drafter, text)
        with text.timed("verify"):
            n = text.cache.length
            rows = [text.tokens[-1], *draft.tokens]
            width = text.pass_width(len(rows))
            states, logits = speculative.full_pass(model, text.cache, rows, width)
            accepted, own = speculative.accept(text, draft, logits)
            checked = accepted + 1
            speculative.require_finite(logits[:checked])
            kept = slice(0, accepted + 1)
            hidden = torch.cat([state[:, kept] for state in states])
        stats.cycles += 1
        stats.drafted += len(draft.tokens)
        stats.accepted += accepted
        outcome = speculative.Outcome(draft, accepted, hidden, text.laps)  # noqa: F841
        new = [*draft.tokens[:accepted], own]
        for i, token in enumerate(new):
            text.tokens.append(token)
            text.cache.length = n + i + 1
            stats.tokens.append(token)
            stats.sources.append(draft.source if i < accepted else "")
            yield token
            if text.is_finished:
                break


decode.mistake(
    "finished before it began, by a prompt that ends in stop",
    ("stats.new_tokens and text.is_finished", "text.is_finished"))
decode.mistake(
    "a token counted after it went out",
    ("            stats.tokens.append(token)\n", ""),
    ("            yield token\n",
     "            yield token\n            stats.tokens.append(token)\n"),
    ("stats.new_tokens and text", "stats.cycles and text"))
decode.mistake(
    "its source noted after it went out",
    ("            stats.sources.append(draft.source if i < accepted else \"\")\n", ""),
    ("            yield token\n",
     "            yield token\n"
     "            stats.sources.append(draft.source if i < accepted else \"\")\n"))
decode.mistake(
    "nothing told of a cycle without a draft",
    ("if stats.cycles > 0:", "if stats.cycles > 0 and draft.tokens:  # noqa: F821"))
decode.mistake(
    "told of a cycle after the next draft",
    ("""        if stats.cycles > 0:
            with text.timed("optimize"):
                drafter.observe(text, outcome)         # noqa: F821
        with text.timed("draft"):
            draft = speculative.checked_draft(drafter, text)
""", """        with text.timed("draft"):
            draft = speculative.checked_draft(drafter, text)
        if stats.cycles > 0:
            with text.timed("optimize"):
                drafter.observe(text, outcome)         # noqa: F821
"""))
decode.mistake(
    "states of padding taken for those of tokens",
    ("kept = slice(0, accepted + 1)",
     "kept = slice(0, states[0].shape[1] - len(draft.tokens) + accepted)"))
decode.mistake(
    "logits looked at after their tokens went out",
    ("            speculative.require_finite(logits[:checked])\n", ""),
    ("            if text.is_finished:\n                break\n",
     "            if text.is_finished:\n                break\n"
     "        speculative.require_finite(logits[:accepted + 1])\n"))
decode.mistake(
    "infinite logits let through",
    ("speculative.require_finite(logits[:checked])",
     "speculative.require_finite(logits[:checked].clamp(-1e9, 1e9))"))
decode.mistake(
    "states in float32",
    ("state[:, kept] for", "state[:, kept].float() for"))
decode.mistake(
    "seeded anew in each cycle",
    ("            accepted, own =",
     "            text.rng.manual_seed(text.rng.initial_seed())\n            accepted, own ="))
decode.mistake(
    "passes always padded to the whole width",
    ("text.pass_width(len(rows))", "text.width"))
decode.mistake(
    "only the last row that decides asked to be finite",
    ("logits[:checked]", "logits[accepted]"))


def unchecked(*args, **settings):
    """new_text without its refusals."""
    with (mock.patch.object(speculative, "require_possible"),
          mock.patch.object(speculative, "require_room")):
        return speculative.new_text(*args, **settings)


@contextlib.contextmanager
def untimed(text, name):
    text.laps[name] = 0.0
    yield


decode.mistake(
    "settings not checked",
    ("speculative.new_text(", "unchecked("))
decode.mistake(
    "seed ignored",
    ("drafter.scratch", "drafter.scratch\n    settings.pop('seed', 0)"))
decode.mistake(
    "top-p ignored",
    ("drafter.scratch", "drafter.scratch\n    settings.pop('top_p', 1)"))
decode.mistake(
    "temperature 1 whatever it is",
    ("drafter.scratch",
     "drafter.scratch\n    settings['temperature'] = float(settings.get('temperature', 0) > 0)"))
decode.mistake(
    "a given cache's prefix prefilled again",
    ("drafter.scratch",
     "drafter.scratch\n    if settings.get('cache'):\n        settings['cache'].length = 0"))
decode.mistake(
    "given cache ignored",
    ("drafter.scratch", "drafter.scratch\n    settings['cache'] = None"))
decode.mistake(
    "given statistics ignored",
    ("drafter.scratch", "drafter.scratch\n    settings['stats'] = None"))
decode.mistake(
    "no scratch slots asked for",
    ("drafter.scratch", "0"))
decode.mistake(
    "given drafter ignored",
    ("    stats = text.stats\n", "    stats = text.stats\n    drafter = speculative.Drafter()\n"))
decode.mistake(
    "the caller's seconds taken for a pass's",
    ("            yield token\n",
     "            with text.timed(\"verify\"):\n                yield token\n"))
decode.mistake(
    "seconds never kept",
    ("    stats = text.stats\n",
     "    stats = text.stats\n    text.timed = functools.partial(untimed, text)\n"))
decode.mistake(
    "the drafter's seconds not kept",
    ("            with text.timed(\"optimize\"):\n                drafter.observe(text, outcome)",
     "            drafter.observe(text, outcome)"))
decode.mistake(
    "rolled back by one too many",
    ("n + i + 1", "n + i"))
decode.mistake(
    "rolled back by one too few",
    ("n + i + 1", "n + i + 2"))
decode.mistake(
    "rolled back by one too few at a cycle's end",
    ("n + i + 1", "n + i + 1 + (i == accepted)"))
decode.mistake(
    "not rolled back",
    ("text.cache.length = n + i + 1", "pass"))
decode.mistake(
    "pending token from the draft",
    ("text.tokens[-1], *", "outcome.draft.tokens[-1] if stats.cycles else prompt[-1], *"))
decode.mistake(
    "no token of the verifier's own",
    ("own]", "*([] if accepted else [own])]"))
decode.mistake(
    "stop ignored",
    ("while not (stats.new_tokens and text.is_finished)",
     "while stats.new_tokens < max_new_tokens"),
    ("if text.is_finished", "if stats.new_tokens == max_new_tokens"))
decode.mistake(
    "stop heeded at a cycle's end only",
    ("if text.is_finished", "if stats.new_tokens == max_new_tokens"))
decode.mistake(
    "tokens written past the end",
    ("if text.is_finished:\n                break", ""),
    ("speculative.checked_draft(drafter, text)", "drafter.propose(text, 9)"))
decode.mistake(
    "drafts past the end",
    ("speculative.checked_draft(drafter, text)", "drafter.propose(text, 9)"))
decode.mistake(
    "draft not judged",
    ("speculative.accept(text, draft, logits)", "0, int(logits[0].argmax())"))
decode.mistake(
    "greedy rule when sampling",
    ("speculative.accept(text, draft, logits)",
     "speculative.accept_greedy(draft.tokens, logits)"))
decode.mistake(
    "logits for probabilities",
    ("speculative.accept(text, draft, logits)",
     "(speculative.accept_sampled(draft.tokens, draft.distributions, logits, text.rng)\n"
     "                             if text.temperature\n"
     "                             else speculative.accept_greedy(draft.tokens, logits))"))
decode.mistake(
    "NaN written",
    ("speculative.require_finite(logits[:checked])", "pass"))
decode.mistake(
    "only the pending token's logits checked",
    ("checked = accepted + 1", "checked = 1"))
decode.mistake(
    "a rejected token's overflow refused",
    ("checked = accepted + 1", "checked = len(rows)"))
decode.mistake(
    "rows as many as drafted",
    ("text.pass_width(len(rows))", "None"))
decode.mistake(
    "states of rejected tokens too",
    ("slice(0, accepted + 1)", "slice(0, len(rows))"))
decode.mistake(
    "states of the last row accepted only",
    ("slice(0, accepted + 1)", "slice(accepted, accepted + 1)"))
decode.mistake(
    "states of the pending row only",
    ("slice(0, accepted + 1)", "slice(0, 1)"))
decode.mistake(
    "begin not called",
    ("drafter.begin(text, hidden)", "pass"))
decode.mistake(
    "begin called without the prompt's states",
    ("drafter.begin(text, hidden)", "drafter.begin(text, None)"))
decode.mistake(
    "begin called in every cycle",
    ("        with text.timed(\"draft\")",
     "        drafter.begin(text, hidden)\n        with text.timed(\"draft\")"))
decode.mistake(
    "the drafter told before the tokens are written",
    ("drafter.observe(text, outcome)", "pass"),
    ("        new = [", "        drafter.observe(text, outcome)\n        new = ["))
decode.mistake(
    "the drafter told nothing",
    ("drafter.observe(text, outcome)", "pass"))
decode.mistake(
    "the drafter told after the last token too",
    ("            if text.is_finished:",
     "            if text.is_finished:\n                drafter.observe(text, outcome)"))
decode.mistake(
    "the bonus counted in the Outcome",
    ("Outcome(draft, accepted,", "Outcome(draft, accepted + 1,"))
decode.mistake(
    "no times for the drafter",
    ("hidden, text.laps)", "hidden, {})"))
decode.mistake(
    "counts the bonus as accepted",
    ("stats.accepted += accepted", "stats.accepted += accepted + 1"))
decode.mistake(
    "all tokens of an accepted draft counted as the draft's",
    ("if i < accepted else", "if accepted else"))
decode.mistake(
    "every source called draft",
    ("draft.source if", "\"draft\" if"))
decode.mistake(
    "cycles counted once their tokens are out, so not where a drafted one ends the text",
    ("        stats.cycles += 1\n"
     "        stats.drafted += len(draft.tokens)\n"
     "        stats.accepted += accepted\n", ""),
    ("            yield token\n",
     "            yield token\n"
     "            if i == accepted:\n"
     "                stats.cycles += 1\n"
     "                stats.drafted += len(draft.tokens)\n"
     "                stats.accepted += accepted\n"))
decode.mistake(
    "cycles counted after the drafter is told",
    ("stats.cycles += 1\n", "first = stats.cycles == 0\n"),
    ("if stats.cycles > 0:", "if stats.new_tokens:"),
    ("observe(text, outcome)", "observe(text, outcome)\n                stats.cycles += 1"))


# ---------------------------------------------------------------------------- the drafter

@solves("speculative.SkippingDrafter.propose")
def skipping_propose(self, text, most):
    length = min(self.draft_length, most)
    if self.skip is None:
        return speculative.Draft([], [])

    def go_on(confidence):
        return not confidence < self.exit_threshold

    return speculative.draft_by_skipping(text, self.skip, length, go_on)


skipping_propose.mistake(
    "a draft by no choice of layers",
    ("        return speculative.Draft([], [])",
     "        return speculative.draft_by_skipping(text, (), length)"))
skipping_propose.mistake(
    "the model handed on in place of the text",
    ("speculative.draft_by_skipping(text,", "speculative.draft_by_skipping(text.model,"))
skipping_propose.mistake(
    "nothing drafted by an empty set",
    ("self.skip is None", "not self.skip"))
skipping_propose.mistake(
    "drafts to the end of the room",
    ("min(self.draft_length, most)", "most"))
skipping_propose.mistake(
    "drafts to the end of the room where there is no threshold",
    ("min(self.draft_length, most)",
     "min(self.draft_length, most) if self.exit_threshold else most"))
skipping_propose.mistake(
    "more than there is room for",
    ("min(self.draft_length, most)", "self.draft_length"))
skipping_propose.mistake(
    "the threshold itself handed on",
    ("length, go_on)", "length, self.exit_threshold)"))
skipping_propose.mistake(
    "drafts on while unsure",
    ("not confidence", "confidence"))
skipping_propose.mistake(
    "ends at the threshold itself",
    ("confidence < ", "confidence <= "))
skipping_propose.mistake(
    "threshold ignored",
    ("length, go_on)", "length)"))


@solves("speculative.Clasp.begin")
def begin(self, text, hidden):
    self.recent.clear()
    if hidden is None:
        self.skip = None
    else:
        self.recent += [hidden]
        self.choose_layers(text)


begin.mistake(
    "the last text's states kept",
    ("self.recent.clear()", "pass"))
begin.mistake(
    "the last text's set kept",
    ("self.skip = None", "pass"))
begin.mistake(
    "the last text's states kept beside the prompt's",
    ("    self.recent.clear()\n", ""),
    ("        self.skip = None", "        self.recent.clear()\n        self.skip = None"))
begin.mistake(
    "the first text's set kept where a later one begins with states",
    ("        self.choose_layers(text)",
     "        if self.skip is None:\n            self.choose_layers(text)"))
begin.mistake(
    "no DP after the prefill",
    ("self.choose_layers(text)", "self.skip = None"))


@solves("speculative.Clasp.observe")
def observe(self, text, outcome):
    cycles = text.stats.cycles
    self.recent += [outcome.hidden]
    due = not cycles % self.opt_interval
    if due or self.skip is None:
        self.choose_layers(text)


observe.mistake(
    "states in float32",
    ("[outcome.hidden]", "[outcome.hidden.float()]"))
observe.mistake(
    "no DP after a cycle without a draft",
    ("if due or self.skip is None:",
     "if (due and outcome.draft.tokens) or self.skip is None:"))
observe.mistake(
    "states kept only where something was accepted",
    ("    self.recent += [outcome.hidden]\n",
     "    if outcome.accepted:\n        self.recent += [outcome.hidden]\n"))
observe.mistake(
    "interval counted in tokens",
    ("text.stats.cycles", "text.stats.new_tokens"))
observe.mistake(
    "interval counted from the next cycle on",
    ("text.stats.cycles", "text.stats.cycles - 1"))
observe.mistake(
    "DP in every cycle",
    ("due = not cycles % self.opt_interval", "due = True"))
observe.mistake(
    "DP only after the prefill",
    ("due = not cycles % self.opt_interval", "due = False"))
observe.mistake(
    "an empty set taken for none",
    ("self.skip is None", "not self.skip"))
observe.mistake(
    "states kept only where the DP is due",
    ("    self.recent += [outcome.hidden]\n", ""),
    ("        self.choose", "        self.recent += [outcome.hidden]\n        self.choose"))
observe.mistake(
    "a prompt of one token forgotten",
    ("due or self.skip is None", "due"))


@solves("speculative.Clasp.choose_layers")
def choose_layers(self, text):
    room = text.cache.scratch // max(1, self.budget)
    hidden = torch.cat([*self.recent], dim=1)
    hidden = hidden[:, -min(room, self.opt_tokens):]
    measure = dp_skip.relative_distances if self.opt_tokens > 1 else dp_skip.distances
    select = functools.partial(
        speculative.select_layers, smallest=self.budget, measure=measure)
    selection = speculative.optimize(text.model, text.cache, hidden, self.budget, select)
    [self.skip] = selection.skip_sets
    text.stats.optimizations += 1
    text.stats.skip_sets.append((text.stats.new_tokens, self.skip))


choose_layers.mistake(
    "the measure by how many states there are",
    ("if self.opt_tokens > 1", "if hidden.shape[1] > 1"))
choose_layers.mistake(
    "the set of a smaller budget",
    (", self.budget, select)", ", self.budget)"),
    ("[self.skip] = selection.skip_sets", "self.skip = selection.skip_sets[-2]"))
choose_layers.mistake(
    "the set for budget 0",
    (", self.budget, select)", ", self.budget)"),
    ("[self.skip] = selection.skip_sets", "self.skip = selection.skip_sets[0]"))
choose_layers.mistake(
    "half the layers whatever M is",
    ("hidden, self.budget, select)", "hidden, len(hidden) // 2 - 1, select)"),
    ("smallest=self.budget", "smallest=len(hidden) // 2 - 1"))
choose_layers.mistake(
    "a set noted before it is chosen",
    ("    select =", "    before = self.skip\n    select ="),
    ("new_tokens, self.skip))", "new_tokens, before or frozenset()))"))
choose_layers.mistake(
    "runs not counted",
    ("text.stats.optimizations += 1", "pass"))
choose_layers.mistake(
    "sets noted by the cycle",
    ("text.stats.new_tokens", "text.stats.cycles"))
choose_layers.mistake(
    "divided by a budget of 0",
    ("max(1, self.budget)", "self.budget"))
choose_layers.mistake(
    "states of the last cycle only",
    ("torch.cat([*self.recent], dim=1)", "self.recent[-1]"))
choose_layers.mistake(
    "states averaged over the layers",
    ("hidden, self.budget, select)", "hidden.mean(0), self.budget, select)"))
choose_layers.mistake(
    "the two measures exchanged",
    ("self.opt_tokens > 1", "self.opt_tokens == 1"))
choose_layers.mistake(
    "the paper's measure for several tokens too",
    ("dp_skip.relative_distances if self.opt_tokens > 1 else dp_skip.distances",
     "dp_skip.distances"))
choose_layers.mistake(
    "more tokens than the cache has slots for",
    ("-min(room, self.opt_tokens):", "-self.opt_tokens:"))
choose_layers.mistake(
    "the first tokens' states",
    ("-min(room, self.opt_tokens):", ":min(room, self.opt_tokens)"))
choose_layers.mistake(
    "the last cycle's states, however many",
    ("hidden[:, -min(room, self.opt_tokens):]", "self.recent[-1]"))
