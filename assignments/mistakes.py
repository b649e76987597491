"""A second solution of every problem, with the mistakes that students make: what the grader is tested with.

    python assignments/mistakes.py         the table: mistake, problem, what the grader says

Each assigned function is written here once more, differently from the core, as ``name(wrong)``: with wrong = "" it is
right, and the whole solution must get every point (the grader asks for no particular way of writing); with one of its
mistakes it must lose points in that problem and in no other. None of this goes into a student's repository.
"""
import contextlib
import functools
import math
import sys
from pathlib import Path
from unittest import mock

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import dp_skip  # noqa: E402
import model as model_module  # noqa: E402
import speculative  # noqa: E402
from checks import CHECKS, Wrong, problem5  # noqa: E402
from grade import PROBLEMS, Result, explain  # noqa: E402

SOLUTIONS, MISTAKES = {}, []             # by name of the function; (function, mistake)


def solves(name: str, *mistakes: str):
    def declare(make):
        SOLUTIONS[name] = make
        MISTAKES.extend((name, mistake) for mistake in mistakes)
        return make
    return declare


# ---------------------------------------------------------------------------- problem 1

@solves("model.RMSNorm.forward", "mean subtracted", "eps outside the root", "sum in place of the mean", "weight forgotten",
        "mean over all axes")
def rms_norm(wrong):
    def forward(self, x):
        if wrong == "mean subtracted":
            x = x - x.mean(-1, keepdim=True)
        square = x.pow(2).mean() if wrong == "mean over all axes" else x.pow(2).mean(-1, keepdim=True)
        if wrong == "sum in place of the mean":
            square = square * x.shape[-1]
        out = x / (square.sqrt() + self.eps) if wrong == "eps outside the root" else x / (square + self.eps).sqrt()
        return out if wrong == "weight forgotten" else out * self.weight
    return forward


@solves("model.rope_table", "RoPE off by one", "sin not negated", "angles in bfloat16", "rope_scaling forgotten",
        "angles interleaved")
def rope_table(wrong):
    def table(config, length, device=None, dtype=torch.float32):
        frequencies = model_module.inverse_frequencies(config)
        if wrong == "rope_scaling forgotten":
            frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
        positions = torch.arange(length).float() + (wrong == "RoPE off by one")
        if wrong == "angles in bfloat16":
            positions = positions.to(dtype).float()
        angles = positions[:, None] * frequencies
        half = angles.repeat_interleave(2, -1) if wrong == "angles interleaved" else torch.cat((angles, angles), -1)
        sign = torch.ones(config.head_dim)
        if wrong != "sin not negated":
            sign[:config.head_dim // 2] = -1
        return half.cos().to(device, dtype), (half.sin() * sign).to(device, dtype)
    return table


@solves("model.rotate", "neighbouring dimensions paired", "halves not swapped", "turned the other way")
def rotate(wrong):
    def turn(x, cos, sin):
        first, second = x.chunk(2, dim=-1)
        swapped = torch.cat((second, first), dim=-1)
        if wrong == "neighbouring dimensions paired":
            swapped = torch.stack((x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        if wrong == "halves not swapped":
            swapped = x
        return x * cos + swapped * (-sin if wrong == "turned the other way" else sin)
    return turn


@solves("model.KVCache.put", "only the new rows returned", "written at cache.length", "all slots returned", "values into the keys")
def put(wrong):
    def put(self, layer, slot, end, k, v):
        rows = k.shape[2]
        if wrong == "written at cache.length":
            slot = self.length - rows + 1
        places = torch.arange(slot, slot + rows)
        self.keys[layer].index_copy_(2, places, v if wrong == "values into the keys" else k)
        self.values[layer].index_copy_(2, places, v)
        if wrong == "only the new rows returned":
            return k, v
        shown = slice(None) if wrong == "all slots returned" else slice(end)
        return self.keys[layer][:, :, shown], self.values[layer][:, :, shown]
    return put


@solves("model.attention", "key-value heads in the wrong order", "scores not scaled", "no causal mask", "a single row sees itself only",
        "mask forgotten", "softmax over the rows")
def attention(wrong):
    def attention(q, k, v, mask):
        rows, groups = q.shape[2], q.shape[1] // k.shape[1]
        if wrong == "key-value heads in the wrong order":
            k, v = k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1)
        else:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = q @ k.transpose(-1, -2) / (1 if wrong == "scores not scaled" else math.sqrt(q.shape[-1]))
        if mask is not None and wrong != "mask forgotten":
            scores = scores + mask
        elif mask is None and rows > 1 and wrong != "no causal mask":
            later = torch.ones(rows, rows, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        elif mask is None and wrong == "a single row sees itself only":
            scores[..., :-1] = -math.inf
        return scores.softmax(-2 if wrong == "softmax over the rows" else -1) @ v
    return attention


@solves("model.DecoderLayer.attention_block", "keys before queries in qkv", "keys cached before rotation", "values rotated", "query not rotated",
        "mask not handed on", "what store returns not used", "no residual around attention", "norm on the residual too", "no norm")
def attention_block(wrong):
    def block(self, x, cos, sin, mask=None, store=None):
        h, kv, d = self.heads, self.kv_heads, self.head_dim
        normed = x if wrong == "no norm" else self.attention_norm(x)
        if wrong == "norm on the residual too":
            x = normed
        if wrong == "keys before queries in qkv":
            k, q, v = self.qkv(normed).split((kv * d, h * d, kv * d), dim=-1)
        else:
            q, k, v = self.qkv(normed).split((h * d, kv * d, kv * d), dim=-1)
        q, k, v = (t.reshape(*t.shape[:2], -1, d).permute(0, 2, 1, 3) for t in (q, k, v))
        unturned = k
        if wrong != "query not rotated":
            q = model_module.rotate(q, cos, sin)
        k = model_module.rotate(k, cos, sin)
        if wrong == "values rotated":
            v = model_module.rotate(v, cos, sin)
        if store is not None:
            kept = store(unturned if wrong == "keys cached before rotation" else k, v)
            k, v = (k, v) if wrong == "what store returns not used" else kept
        seen = self.attend(q, k, v, None if wrong == "mask not handed on" else mask)
        heads = self.o(seen.permute(0, 2, 1, 3).reshape(*x.shape[:2], -1))
        return heads if wrong == "no residual around attention" else x + heads
    return block


@solves("model.DecoderLayer.mlp_block", "SiLU on up", "gate and up interleaved", "no residual around the MLP", "norm on the residual too",
        "no norm", "the attention's norm", "sigmoid in place of SiLU")
def mlp_block(wrong):
    def block(self, x, *_):
        normed = {"no norm": x, "the attention's norm": self.attention_norm(x)}.get(wrong, self.mlp_norm(x))
        both = self.gate_up(normed)
        gate, up = (both[..., ::2], both[..., 1::2]) if wrong == "gate and up interleaved" else both.tensor_split(2, dim=-1)
        if wrong == "SiLU on up":
            gate, up = up, gate
        inner = self.down(gate.sigmoid() * up * (1 if wrong == "sigmoid in place of SiLU" else gate))
        return {"no residual around the MLP": 0, "norm on the residual too": normed}.get(wrong, x) + inner
    return block


# ---------------------------------------------------------------------------- problem 2

@solves("model.Llama.forward", "skipped layers counted from 1", "no state for a skipped layer", "positions from 0 with a cache",
        "cache.length moved on in every layer", "a row does not see itself", "new rows see each other", "cache.length not moved",
        "slots past a row not masked", "a skipped layer run for its cache", "one skip too many")
def forward(wrong):
    def forward(self, tokens, cache=None, skip=(), slots=None):
        rows, x = tokens.shape[1], self.embed(tokens)
        start = cache.length if cache else 0
        end = slots or start + rows
        if cache:
            begin = 0 if wrong == "positions from 0 with a cache" else start
            cos, sin = cache.cos[begin:begin + rows], cache.sin[begin:begin + rows]
        else:
            cos, sin = model_module.rope_table(self.config, rows, x.device, x.dtype)
        slot, row = torch.arange(end), start + torch.arange(rows)[:, None]
        hidden = slot >= row if wrong == "a row does not see itself" else slot > row
        if wrong == "new rows see each other":
            hidden = slot.expand(rows, end) >= start + rows
        if wrong == "slots past a row not masked" and slots:
            hidden = torch.zeros(rows, end, dtype=torch.bool)
        mask = torch.zeros(rows, end).masked_fill(hidden, -math.inf)
        states = [x]
        for i, layer in enumerate(self.layers):
            left_out = (i + 1 in skip) if wrong == "skipped layers counted from 1" else i in skip
            if wrong == "one skip too many" and skip:
                left_out = left_out or i == max(skip) + 1
            if wrong == "cache.length moved on in every layer" and cache:
                cache.length += rows
            store = (lambda k, v, i=i: cache.put(i, start, end, k, v)) if cache else None
            if not left_out:
                x = layer(x, cos, sin, mask, store)
            elif wrong == "a skipped layer run for its cache" and cache:
                layer(x, cos, sin, mask, store)
            if not (left_out and wrong == "no state for a skipped layer"):
                states.append(x)
        if cache and wrong not in ("cache.length not moved", "cache.length moved on in every layer"):
            cache.length = start + rows
        return states
    return forward


@solves("model.Llama.logits", "no final norm", "tied head forgotten")
def logits(wrong):
    def logits(self, state):
        if wrong != "no final norm":
            state = self.norm(state)
        return self.head(state) if self.head is not None or wrong == "tied head forgotten" else state @ self.embed.weight.T
    return logits


# ---------------------------------------------------------------------------- problem 3

@solves("dp_skip.distances", "from a float32 cosine", "the cosine itself", "1 - cosine", "lengths not divided out", "bfloat16 kept")
def distances(wrong):
    def distances(rows, target):
        if wrong == "from a float32 cosine":
            return (2 - 2 * torch.cosine_similarity(rows.float(), target.float()[None], dim=-1)).clamp(min=0).sqrt()
        if wrong == "bfloat16 kept":
            return (rows / rows.norm(dim=-1, keepdim=True) - target).norm(dim=-1)
        cosine = (rows.double() @ target.double()) / rows.double().norm(dim=-1)
        if wrong in ("the cosine itself", "1 - cosine"):
            return (cosine if wrong == "the cosine itself" else 1 - cosine).float()
        length = 1 if wrong == "lengths not divided out" else rows.double().norm(dim=-1, keepdim=True)
        return (rows.double() / length - target.double()).pow(2).sum(-1).sqrt().float()
    return distances


@solves("dp_skip.walk_back", "layers counted from 1", "j not lowered at a skip", "walked from the first layer")
def walk_back(wrong):
    def walk(skipped, layers, budget):
        def path(i, j):
            if i == 0:
                return []
            if skipped(i, j):
                return path(i - 1, j if wrong == "j not lowered at a skip" else j - 1) + [i - (wrong != "layers counted from 1")]
            return path(i - 1, j)
        if wrong == "walked from the first layer":
            chosen, j = [], 0
            for i in range(1, layers + 1):
                if j < budget and skipped(i, j + 1):
                    chosen, j = [*chosen, i - 1], j + 1
            return frozenset(chosen)
        return frozenset(path(layers, budget))
    return walk


def programme(run_columns):
    """The programme over whole columns of lists; ``run_columns`` makes the candidates that ran layer i."""
    def make(wrong):
        def select(layer, states, budget, smallest=0):
            layers = dp_skip.layer_count(states, budget, smallest)
            survivors, choice, units = {0: states[0]}, {}, dp_skip.unit(states)
            for i in range(1, layers + 1):
                target = units[{"compared with h_(i-1)": i - 1, "compared with h_L": layers}.get(wrong, i)]
                least = 0 if wrong == "smallest ignored but for the lists" else max(0, smallest - layers + i)
                column, cells = {}, range(least, min(i, budget) + 1)
                ran = run_columns(wrong, layer, i, {j: survivors[j] for j in cells if j < i}, states)
                for j in cells:
                    if j == 0:
                        choice[i, j], column[j] = False, ran[0]
                    elif j == i:
                        choice[i, j], column[j] = True, states[0]
                    else:
                        skip = survivors[j if wrong == "skipping does not raise j" else j - 1]
                        a, b = dp_skip.distances(torch.stack((ran[j], skip)), target).tolist()
                        choice[i, j] = {"a tie skips": b <= a, "min in place of max": b > a, "NaN run": b < a}.get(wrong, not a <= b)
                        column[j] = skip if choice[i, j] else ran[j]
                survivors = column
            last = dp_skip.cosines(torch.stack([survivors[m] for m in range(smallest, budget + 1)]), units[0 if wrong == "cosines with h_0" else -1])
            sets = [dp_skip.walk_back(lambda i, j: choice[i, j], layers, m) for m in range(smallest, budget + 1)]
            return dp_skip.Selection(sets[1:] if wrong == "no set for m = 0" else sets, last)
        return select
    return make


def one_by_one(wrong, layer, i, survivors, states):
    ran = {j: layer(i - 1, row[None])[0] for j, row in survivors.items() if j > 0 or wrong == "g(i, 0) run, not the true state"}
    return {0: states[i]} | ran


def packed(wrong, layer, i, survivors, states):
    if wrong == "a call for each row":
        return one_by_one(wrong, layer, i, survivors, states)
    chosen = [j for j in survivors if j > 0 or wrong == "the true state packed as well"]
    index = min(i, len(states) - 2) if wrong == "layers shifted by one" else i - 1
    return {0: states[i]} | (dict(zip(chosen, layer(index, torch.stack([survivors[j] for j in chosen])))) if chosen else {})


solves("dp_skip.select_layers_plain", "min in place of max", "a tie skips", "NaN run", "g(i, 0) run, not the true state",
       "compared with h_(i-1)", "compared with h_L", "skipping does not raise j", "no set for m = 0", "cosines with h_0")(programme(one_by_one))


# ---------------------------------------------------------------------------- problem 4

solves("dp_skip.select_layers", "min in place of max", "a tie skips", "NaN run", "the true state packed as well", "a call for each row",
       "layers shifted by one", "skipping does not raise j", "smallest ignored but for the lists")(programme(packed))


@solves("speculative.candidate_layer", "candidates see each other", "slot p seen", "true keys and values overwritten",
        "position counted from the slot", "own keys not seen", "mask for the announced rows only", "position of the next token",
        "cache.length moved")
def candidate_layer(wrong):
    def candidate_layer(model, cache, rows):
        n = cache.length
        p = n if wrong == "position of the next token" else n - 1

        def layer(i, candidates):
            m = len(candidates)
            width = rows if wrong == "mask for the announced rows only" else m
            slot = n - 1 if wrong == "true keys and values overwritten" else n
            mask = torch.full((width, slot + m), -math.inf)
            for r in range(width):
                mask[r, :n if wrong == "slot p seen" else n - 1] = 0
                if wrong == "candidates see each other":
                    mask[r, slot:slot + r + 1] = 0
                elif wrong != "own keys not seen" and r < m:
                    mask[r, slot + r] = 0
            cos, sin = cache.cos[p].expand(m, -1), cache.sin[p].expand(m, -1)
            if wrong == "position counted from the slot":
                cos, sin = cache.cos[n:n + m], cache.sin[n:n + m]
            if wrong == "cache.length moved":
                cache.length += m
            return model.layers[i](candidates[None], cos, sin, mask, lambda k, v: cache.put(i, slot, slot + m, k, v))[0]
        return layer
    return candidate_layer


# ---------------------------------------------------------------------------- problem 5

@solves("speculative.accept_greedy", "all agreeing tokens counted, not the prefix", "own token from the last row",
        "own token from the row after", "never all of the draft")
def accept_greedy(wrong):
    def accept(drafted, logits):
        choices = [int(row.argmax()) for row in logits]
        agree = [a == b for a, b in zip(drafted, choices)]
        accepted = (agree + [False]).index(False)
        if wrong == "all agreeing tokens counted, not the prefix":
            accepted = sum(agree)
        if wrong == "never all of the draft":
            accepted = min(accepted, max(len(drafted) - 1, 0))
        if wrong == "own token from the last row":
            return accepted, choices[-1]
        return accepted, choices[min(accepted + 1, len(drafted))] if wrong == "own token from the row after" else choices[accepted]
    return accept


@solves("speculative.accept_sampled", "accepted when p < q", "accepted with probability p", "accepted when p >= q only",
        "goes on after a rejection", "residual not normalised", "residual from the wrong row", "no residual: drawn from p", "|p - q| as residual",
        "q - p as residual", "bonus token from the draft", "bonus token from p's row before", "always accepted", "p's rows shifted by one",
        "dice of its own", "greedy token in place of the rejected one")
def accept_sampled(wrong):
    def draw(weights, rng, total=None):
        """By inverting the distribution function, which needs the weights' sum."""
        u = torch.rand((), generator=rng) * (weights.sum() if total is None else total)
        return int((weights.cumsum(0) > u).float().argmax())

    def accept(drafted, q, p, rng):
        if wrong == "dice of its own":
            rng = None
        k, accepted = len(drafted), 0
        if wrong == "p's rows shifted by one":
            p = p.roll(1, dims=0)
        for i, d in enumerate(drafted):
            ratio = p[i][d] / q[i][d]
            if wrong == "accepted when p < q":
                ratio = q[i][d] / p[i][d]
            if wrong == "accepted with probability p":
                ratio = p[i][d]
            if wrong == "accepted when p >= q only":
                ratio = (p[i][d] >= q[i][d]).float()
            if torch.rand((), generator=rng) < ratio or wrong == "always accepted":
                accepted += 1
            elif wrong != "goes on after a rejection":
                break
        if accepted == k:
            last = q[-1] if wrong == "bonus token from the draft" and k else p[k - 1 if wrong == "bonus token from p's row before" and k else k]
            return k, draw(last, rng)
        i = min(accepted + 1, k - 1) if wrong == "residual from the wrong row" else accepted
        left = {"no residual: drawn from p": p[i], "|p - q| as residual": (p[i] - q[i]).abs(),
                "q - p as residual": (q[i] - p[i]).clamp(min=0)}.get(wrong, (p[i] - q[i]).clamp(min=0))
        if wrong == "greedy token in place of the rejected one":
            return accepted, int(p[i].argmax())
        return accepted, draw(left, rng, 1. if wrong == "residual not normalised" else None)
    return accept


# ---------------------------------------------------------------------------- problem 6

@solves("speculative.draft", "cache.length not put back", "the token below the threshold dropped", "confidence of the token drawn",
        "the same token fed again", "go_on heeded one token later", "go_on asked of the logit", "go_on not asked", "stop ignored",
        "a tensor looked up in stop", "drafted by the whole model", "one token too many")
def draft(wrong):
    def draft(model, cache, token, skip, length, go_on, choose, stop):
        n, tokens, q, fed, sure = cache.length, [], [], token, True
        for _ in range(length + (wrong == "one token too many")):
            states = model(speculative.as_row(model, [fed]), cache, () if wrong == "drafted by the whole model" else skip)
            row = model.logits(states[-1])[0, -1]
            drawn, distribution = choose(row)
            view, was_sure = row if wrong == "go_on asked of the logit" else row.softmax(-1), sure
            sure = wrong == "go_on not asked" or go_on(view[drawn if wrong == "confidence of the token drawn" else row.argmax()].item())
            if not sure and wrong == "the token below the threshold dropped":
                break
            tokens.append(int(drawn))
            q.append(distribution)
            last = drawn if wrong == "a tensor looked up in stop" else int(drawn)
            if not (was_sure if wrong == "go_on heeded one token later" else sure) or last in stop and wrong != "stop ignored":
                break
            if wrong != "the same token fed again":
                fed = drawn
        if wrong != "cache.length not put back":
            cache.length = n
        return tokens, q
    return draft


@solves("speculative.clasp", "rolled back by one too many", "rolled back by one too few", "not rolled back", "pending token from the draft",
        "DP on the last drafted row", "DP on the row before", "DP on the draft's row 0", "interval counted in tokens", "DP in every cycle",
        "DP only after the prefill", "drafts past the end", "no token of the verifier's own", "stop ignored", "logits for probabilities",
        "the set of a smaller budget", "rows as many as drafted", "a cycle across two blocks", "counts the bonus as accepted",
        "a draft by no choice of layers", "greedy rule when sampling", "the threshold itself handed on", "drafts on while unsure",
        "ends at the threshold itself", "threshold ignored")
def clasp(wrong):
    def go_on(threshold, confidence):
        if wrong == "drafts on while unsure":
            return confidence < threshold
        return confidence > threshold if wrong == "ends at the threshold itself" else confidence >= threshold or wrong == "threshold ignored"

    def clasp(model, prompt, max_new_tokens, *, skip_layers=None, draft_length=4, exit_threshold=0., opt_interval=16, exact=True,
              temperature=0., top_p=1., seed=0, stop=(), stats=None, cache=None, optimizer=None, drafter=None):
        s = speculative
        budget = len(model.layers) // 2 if skip_layers is None else skip_layers
        stats, rng = stats or s.Stats(), torch.Generator().manual_seed(seed)
        s.require_possible(model, prompt, max_new_tokens, temperature, top_p, seed, stats)
        width = s.exact_width(model, draft_length + 1) if exact else None
        cache = cache or model_module.KVCache(model, len(prompt) + max_new_tokens, width or draft_length + 1)
        hidden, text, skip, since = s.prefill(model, cache, prompt[cache.length:-1]), list(prompt), None, 0
        while stats.new_tokens < max_new_tokens:
            if hidden is not None:
                chosen = (optimizer or s.optimize)(model, cache, hidden, budget).skip_sets
                skip = chosen[-2 if wrong == "the set of a smaller budget" else -1]
                stats.skip_sets.append((stats.new_tokens, skip))
                stats.optimizations += 1
            n, drafted, q = cache.length, [], []
            if skip is not None or wrong == "a draft by no choice of layers":
                length = draft_length if wrong == "drafts past the end" else min(draft_length, max_new_tokens - stats.new_tokens - 1)
                if exact and wrong != "a cycle across two blocks":
                    length = min(length, s.BLOCK - 1 - n % s.BLOCK)
                asked = exit_threshold if wrong == "the threshold itself handed on" else functools.partial(go_on, exit_threshold)
                drafted, q = (drafter or s.draft)(model, cache, text[-1], skip or (), length, asked,
                                                  functools.partial(s.pick, temperature=temperature, top_p=top_p, rng=rng), stop)
            states, logits = s.full_pass(model, cache, [text[-1], *drafted], None if wrong == "rows as many as drafted" else width)
            if temperature == 0 or wrong == "greedy rule when sampling":
                accepted, own = s.accept_greedy(drafted, logits)
            else:
                p = logits if wrong == "logits for probabilities" else s.distribution(logits, temperature, top_p)
                accepted, own = s.accept_sampled(drafted, q, p, rng)
            stats.cycles += 1
            stats.drafted += len(drafted)
            stats.accepted += accepted + (wrong == "counts the bonus as accepted")
            since += accepted + 1 if wrong == "interval counted in tokens" else 1
            due, row = skip is None or since >= opt_interval, accepted
            if skip is None and wrong != "interval counted in tokens":
                since = stats.cycles
            if wrong == "interval counted in tokens":
                since = 0 if due else since
            elif stats.cycles % opt_interval == 0:
                since = 0
            due = {"DP in every cycle": True, "DP only after the prefill": False}.get(wrong, due)
            row = {"DP on the last drafted row": len(drafted), "DP on the row before": max(accepted - 1, 0), "DP on the draft's row 0": 0}.get(wrong, row)
            hidden = torch.stack([state[0, row] for state in states]) if due else None
            new = [*drafted[:accepted], *([] if wrong == "no token of the verifier's own" and accepted else [own])]
            for i, token in enumerate(new):
                if stats.new_tokens == max_new_tokens:
                    return
                stats.tokens.append(token)
                stats.from_draft.append(i < accepted)
                text.append(token)
                cache.length = n + i + 1 + {"rolled back by one too many": -1, "rolled back by one too few": 1}.get(wrong, 0) * (i == len(new) - 1)
                if wrong == "not rolled back":
                    cache.length = n + 1 + len(drafted)
                yield token
                if token in stop and wrong != "stop ignored":
                    return
            if wrong == "pending token from the draft" and drafted:
                text[-1] = drafted[-1]
    return clasp


# ---------------------------------------------------------------------------- running the checks on one

@contextlib.contextmanager
def planted(chosen: dict[str, str]):
    """Put solutions in the core functions' places: {function: mistake, or ""}."""
    with contextlib.ExitStack() as stack:
        for name, wrong in chosen.items():
            solution = SOLUTIONS[name](wrong)
            stack.enter_context(mock.patch(name, solution))
            if name == "model.attention":                      # a layer has a name of its own for it
                stack.enter_context(mock.patch("model.DecoderLayer.attend", staticmethod(solution)))
        yield


def problem_of(name: str) -> int:
    return next(number for number, problem in PROBLEMS.items() if name in problem.functions)


def run(chosen: dict[str, str]) -> list[Result]:
    """Every check of every problem, in this process, on the core with these functions exchanged."""
    results, draws = [], problem5.DRAWS if "speculative.accept_sampled" in chosen else 50
    with planted(chosen), mock.patch.object(problem5, "DRAWS", draws), torch.inference_mode():
        for check in (check for number in PROBLEMS for check in CHECKS[number]):
            message = ""
            try:
                check.run()
            except Wrong as wrong:
                message = str(wrong)
            except Exception as error:
                message = explain(error.with_traceback(error.__traceback__.tb_next), str(HERE))       # without this frame
            results.append(Result(check.number, check.title, check.points, not message, message))
    return results


def main() -> int:
    missed = 0
    print("| mistake | in | loses | says |\n|---|---|---|---|")
    for name, mistake in MISTAKES:
        failed = [r for r in run({name: mistake}) if not r.passed]
        missed += {r.number[0] for r in failed} != {str(problem_of(name))}
        says = failed[0].message.replace("\n", " ").replace("|", "\\|") if failed else "nothing: not found"
        print(f"| {mistake.replace('|', chr(92) + '|')} | `{name}` | {', '.join(r.number for r in failed) or '-'} | {says} |", flush=True)
    print(f"\n{len(MISTAKES) - missed} of {len(MISTAKES)} found in the problem where they are, and nowhere else")
    return missed > 0


if __name__ == "__main__":
    sys.exit(main())
