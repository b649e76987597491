"""Two rivals that search for one set of layers to skip: Self-SD beforehand, SWIFT while decoding.

Both try sets of M layers, as many as CLaSp skips, and score each by how many greedy tokens of the
whole model the rest of the layers predicts. ``Search`` is what they share.
"""
import random
from collections.abc import Collection

import torch
from tqdm import tqdm  # comes with huggingface-hub

from bench import fixed
from bench.prompts import HELD_OUT
from bench.target import Target
from speculative import FixedSet, Outcome, Text, autoregressive

SELF_SD_TRIALS = 500
OPTUNAS_SEEDS = 2 ** 32
SWIFT_TRIALS = 200
SCORED = 64                   # tokens of each text on which Self-SD tries a set
CONTEXT = 64                  # last tokens of the text that SWIFT runs ...
SCORED_BY_SWIFT = 32          # ... and how many of them, at most, it scores
FIRST_TRIAL = 16              # new tokens of a text before SWIFT's first trial on it


class Search:
    """Sets of M layers: a third tried at random, then by optuna's Bayesian sampler (TPE).

    first: sets to be tried before all others.
    """

    def __init__(
        self, target: Target, seed: int, trials: int, first: Collection[frozenset[int]] = ()
    ):
        import optuna
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.model = target.model
        self.layers = range(target.layers)
        self.budget = target.settings["skip_layers"]
        self.left = trials
        self.best = random.Random(seed).sample(self.layers, self.budget)
        self.score = -1.0                                # of the best
        self.scores = []                                 # of all, in order: see ``resume``
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=trials // 3, multivariate=True, seed=seed % OPTUNAS_SEEDS)
        self.study = optuna.create_study(direction="maximize", sampler=sampler)
        for skip in first:
            self.study.enqueue_trial({f"layer {i}": float(i in skip) for i in self.layers})

    def step(self, texts: list[list[int]], scored: int):
        """Try one more set: those layers to which the sampler gives the highest values.

        texts: token ids, all of one length. The score is the share of the ``scored`` last tokens of
        each that the model without these layers predicts.
        """
        trial, skip = self.ask()
        self.tell(trial, skip, self.share_predicted(skip, texts, scored))

    def resume(self, scores: list[float]):
        """Go through the trials of a stopped run again, without the model.

        The sampler then knows what it knew, and goes on to the same sets.
        """
        for score in scores:
            self.tell(*self.ask(), score)

    def ask(self) -> tuple:
        """What the sampler tries next, as its trial and as a set."""
        trial = self.study.ask()
        values = [trial.suggest_float(f"layer {i}", 0, 1) for i in self.layers]
        by_value = sorted(self.layers, key=values.__getitem__)
        return trial, by_value[len(self.layers) - self.budget:]

    def tell(self, trial, skip: list[int], score: float):
        self.study.tell(trial, score)
        self.scores.append(score)
        if score > self.score:
            self.best = skip
            self.score = score
        self.left -= 1

    def share_predicted(self, skip: list[int], texts: list[list[int]], scored: int) -> float:
        tokens = torch.tensor(texts, device=self.model.device)           # (texts, length)
        states = self.model(tokens[:, :-1], skip=skip)
        predicted = self.model.logits(states[-1][:, -scored:]).argmax(-1)
        return (predicted == tokens[:, -scored:]).float().mean().item()


def self_sd(target: Target, seed: int, trials: int | None = None) -> Search:
    """Self-SD (Zhang et al. 2024): one set for all texts, found beforehand on held-out text.

    trials: None: SELF_SD_TRIALS.

    The text is the model's own. In the paper attention and MLP blocks are searched for the time
    that is saved; here, to compare at the same M, whole layers for the greedy tokens got right. The
    search starts from every block of neighbours and the DP's most frequent set.
    """
    prompts = [target.encode([text]) for text in HELD_OUT]
    length = max(len(prompt) for prompt in prompts) + SCORED
    texts = []
    for prompt in prompts:
        texts.append([*prompt, *autoregressive(target.model, prompt, length - len(prompt))])
    budget = target.settings["skip_layers"]
    first = [
        *fixed.blocks(target.layers, budget),
        fixed.most_frequent(held_out_texts(target), budget),
    ]
    trials = SELF_SD_TRIALS if trials is None else trials
    search = Search(target, seed, trials, first)
    for _ in tqdm(range(trials), desc="Self-SD searches", leave=False, disable=None):
        search.step(texts, SCORED)
    return search


def best_fixed(target: Target, seed: int) -> frozenset[int]:
    """The best set for all texts that is found on held-out ones, see fixed.py."""
    return fixed.best_fixed_set(held_out_texts(target), target.settings["skip_layers"], seed)


@torch.inference_mode()
def held_out_texts(target: Target) -> list[fixed.Written]:
    texts = []
    for text in HELD_OUT:
        prompt = target.encode([text])
        answer = list(autoregressive(target.model, prompt, 2 * SCORED))
        texts.append(fixed.Written(target.model, prompt, answer, target.draft_length))
    return texts


class Swift(FixedSet):
    """SWIFT (Xia et al. 2025): the set is searched for while decoding, on the text so far.

    One set is tried after each cycle until the trials are used up. The search, and what it found,
    go from text to text.
    """

    def __init__(self, search: Search, draft_length: int, exit_threshold: float):
        super().__init__(search.best, draft_length, exit_threshold)
        self.search = search

    def begin(self, text: Text, hidden):
        self.skip = self.search.best

    def observe(self, text: Text, outcome: Outcome):
        if not self.search.left or text.stats.new_tokens < FIRST_TRIAL:
            return
        recent = text.tokens[-CONTEXT:]
        self.search.step([recent], min(SCORED_BY_SWIFT, len(recent) - 2))
        self.skip = self.search.best
        text.stats.optimizations += 1
        text.stats.skip_sets.append((text.stats.new_tokens, frozenset(self.skip)))
