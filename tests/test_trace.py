"""The page of a run (--trace): what is recorded is what happened, and the page shows it."""
import errno
import html
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import IN_ASCII, ROOT, random_model, tokens_of

import dp_skip
import extras.dp_table
import extras.skipping
import generate
import speculative
from checkpoint import BUNDLED, Tokenizer
from extras.auto import Auto
from extras.trace import Traced, page, record
from extras.worth import SHAPE
from speculative import Clasp, Drafter, SettingsError, Stats, decode, draft_by_skipping

CHROMIUM = shutil.which("chromium")
PROMPT = "Once upon a time there was a king"
NEW_TOKENS = 60


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(BUNDLED)


def run(model, drafter, prompt, **settings):
    """A traced run's tokens, statistics and record."""
    stats = Stats()
    traced = Traced(drafter)
    tokens = list(decode(model, prompt, NEW_TOKENS, traced, stats=stats, **settings))
    with torch.inference_mode():
        return tokens, stats, traced


def recorded(model, tokenizer, drafter, **settings):
    tokens, stats, traced = run(model, drafter, tokenizer.encode(PROMPT), **settings)
    return tokens, stats, record(traced, tokenizer, [], "")


def drafters(model):
    auto = Auto(model)
    auto.skipping.hopeful = True                       # so that it runs the DP at once
    return {
        "the paper's": Clasp(model, 12, 4, opt_interval=4, opt_tokens=1),
        "several tokens": Clasp(model, 12, 4, opt_interval=4, opt_tokens=4),
        "auto": auto,
        "auto with settings": Auto(model, clasp=Clasp(model, 12, 4, opt_interval=4, opt_tokens=4)),
    }


NAMES = ["the paper's", "several tokens", "auto", "auto with settings"]


def table_path(run: dict, budget: int) -> list[int]:
    """The layers left out by a recorded table, for a budget."""
    skip = []
    j = budget
    for i in range(len(run["table"]), 0, -1):
        if j == i or (j > 0 and not run["table"][i - 1][j - 1][0]):
            skip.append(i - 1)
            j -= 1
    return sorted(skip)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_traced_drafter_changes_no_token(temperature):
    model = random_model()
    prompt = tokens_of(model, 9)
    settings = {"temperature": temperature, "seed": 3}
    tokens, stats, _ = run(model, Clasp(model, 3, 3), prompt, **settings)
    plain = Stats()
    assert tokens == list(
        decode(model, prompt, NEW_TOKENS, Clasp(model, 3, 3), stats=plain, **settings))
    assert stats.skip_sets == plain.skip_sets
    assert stats.drafted == plain.drafted


@pytest.mark.parametrize("name", NAMES)
def test_the_cycles_are_those_that_the_statistics_count(bundled, tokenizer, name):
    tokens, stats, found = recorded(bundled, tokenizer, drafters(bundled)[name])
    cycles = found["cycles"]
    assert len(cycles) == stats.cycles
    assert sum(len(cycle["draft"]) for cycle in cycles) == stats.drafted
    assert found["ids"] == tokens
    shown = []
    for cycle in cycles:
        assert cycle["first"] == len(shown)
        kept = cycle["draft"][:cycle["accepted"]]
        own = tokens[len(shown) + len(kept):len(shown) + cycle["count"]]
        shown += kept + own
    assert shown == tokens
    seconds = sum(sum(c["seconds"][x] for x in ("draft", "verify", "optimize")) for c in cycles)
    assert seconds == pytest.approx(stats.seconds, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_path_through_the_recorded_table_is_the_skip_set(bundled, tokenizer, name):
    _, stats, found = recorded(bundled, tokenizer, drafters(bundled)[name])
    assert len(found["dp"]) >= 1
    chosen = [set(skip) for _, skip in stats.skip_sets]
    for run in found["dp"]:
        assert table_path(run, len(run["skip"])) == run["skip"]
        assert set(run["skip"]) in chosen
    if name != "auto":                                 # which also changes its set between runs
        assert [set(run["skip"]) for run in found["dp"]] == chosen[:len(found["dp"])]


def test_each_draft_is_shown_with_the_layers_that_it_left_out(bundled, tokenizer, monkeypatch):
    """Auto goes from one set to another without a run of the DP."""
    used = []

    def noted(text, skip, *rest):
        used.append(sorted(skip))
        return draft_by_skipping(text, skip, *rest)

    monkeypatch.setattr(extras.skipping, "draft_by_skipping", noted)
    auto = Auto(bundled, costs=SHAPE | {"verify": 1.0, "optimize": 0.5})
    auto.skipping.hopeful = True                       # so that it runs the DP at once
    _, _, found = recorded(bundled, tokenizer, auto, temperature=0.8, seed=7)
    by_layers = [cycle for cycle in found["cycles"] if cycle["source"] == "layers"]
    assert [found["sets"][cycle["set"]]["skip"] for cycle in by_layers] == used
    assert len(found["sets"]) > len(found["dp"]) > 0
    for shown in found["sets"]:
        assert table_path(found["dp"][shown["run"]], len(shown["skip"])) == shown["skip"]


class Handing(Drafter):
    """Hands all on to CLaSp, which nobody from outside sees."""
    scratch = 12

    def __init__(self, model):
        clasp = Clasp(model, 12, opt_tokens=1)
        self.begin, self.propose, self.observe = clasp.begin, clasp.propose, clasp.observe


def test_each_cycle_keeps_its_own_seconds(bundled, tokenizer, monkeypatch):
    """Also of a loop that tells the drafter of one dictionary in all cycles."""
    outcome = speculative.Outcome
    seconds = {}

    def with_one_dictionary(draft, accepted, hidden, laps):
        seconds.clear()
        seconds.update(laps)
        return outcome(draft, accepted, hidden, seconds)

    monkeypatch.setattr(speculative, "Outcome", with_one_dictionary)
    traced = Traced(Clasp(bundled, 16))
    list(decode(bundled, tokenizer.encode("Once"), 30, traced))
    kept = [cycle.seconds for cycle in traced.cycles[:-1]]       # of the last nobody is told
    assert len({tuple(times.items()) for times in kept}) == len(kept) > 2


def test_a_drafter_of_ones_own_is_traced_without_tables(bundled, tokenizer):
    _, stats, found = recorded(bundled, tokenizer, Handing(bundled))
    assert stats.optimizations > 0
    assert [set(chosen["skip"]) for chosen in found["sets"]] == [s for _, s in stats.skip_sets]
    assert found["dp"] == []
    assert found["cycles"][-1]["set"] == len(found["sets"]) - 1


def plain_in_its_place(layer, states, budget, smallest, measure):
    found = dp_skip.select_layers_plain(layer, states, budget, measure)
    return dp_skip.Selection(found.skip_sets[smallest:], found.cosines[smallest:])


def skipping_measured_first(*call, **settings):
    source = inspect.getsource(dp_skip.select_layers)
    other = source.replace("measure(run, states[i]) <= measure(skip, states[i])",
                           "measure(skip, states[i]) >= measure(run, states[i])")
    assert other != source
    names = dict(vars(dp_skip))
    exec(other, names)
    return names["select_layers"](*call, **settings)


@pytest.mark.parametrize("select", [plain_in_its_place, skipping_measured_first])
def test_a_dp_that_is_written_otherwise_is_traced_without_tables(
    bundled, tokenizer, monkeypatch, select
):
    monkeypatch.setattr(extras.dp_table, "select_layers", select)
    _, stats, found = recorded(bundled, tokenizer, Clasp(bundled, 12, 4, opt_interval=4))
    assert [set(chosen["skip"]) for chosen in found["sets"]] == [s for _, s in stats.skip_sets]
    assert {chosen["run"] for chosen in found["sets"]} == {-1}
    assert found["dp"] == []


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_a_draft_token_was_kept_if_the_recorded_number_is_below_p_over_q(
    bundled, tokenizer, top_p
):
    drafter = Clasp(bundled, 12, 4)
    _, _, found = recorded(
        bundled, tokenizer, drafter, temperature=0.8, top_p=top_p, seed=1)
    verdicts = []
    for cycle in found["cycles"]:
        numbers = zip(cycle.get("p", []), cycle.get("q", []), cycle.get("u", []))
        for i, (p, q, u) in enumerate(numbers):
            assert (u < p / q) == (i < cycle["accepted"])
            verdicts.append(i < cycle["accepted"])
    assert True in verdicts and False in verdicts


def test_text_is_recorded_token_by_token(bundled, tokenizer):
    prompt = tokenizer.encode(PROMPT)
    tokens, _, found = recorded(bundled, tokenizer, Clasp(bundled, 17))
    assert len(found["pieces"]) == len(tokens)
    text = tokenizer.decode(prompt + tokens)
    assert found["prompt"] + "".join(found["pieces"]) == text


def test_a_run_left_early_is_recorded_as_far_as_it_came(bundled, tokenizer):
    traced = Traced(Clasp(bundled, 17))
    stats = Stats()
    writing = decode(bundled, tokenizer.encode(PROMPT), NEW_TOKENS, traced, stats=stats)
    tokens = [next(writing) for _ in range(7)]
    found = record(traced, tokenizer, [], "")
    assert found["ids"] == tokens
    assert sum(cycle["count"] for cycle in found["cycles"]) == 7


class Full(list):
    """What holds six and then is interrupted."""

    def append(self, one):
        if len(self) == 6:
            raise KeyboardInterrupt
        super().append(one)


@pytest.mark.parametrize("where", ["tokens", "sources"])
def test_a_run_interrupted_while_a_token_is_noted_is_recorded_as_far_as_it_came(
        bundled, tokenizer, where):
    traced = Traced(Clasp(bundled, 17))
    stats = Stats(**{where: Full()})
    prompt = tokenizer.encode(PROMPT)
    with pytest.raises(KeyboardInterrupt):
        list(decode(bundled, prompt, NEW_TOKENS, traced, stats=stats))
    found = record(traced, tokenizer, [], "")
    assert found["prompt"] == tokenizer.decode(prompt)
    assert found["ids"] == stats.tokens
    assert len(found["ids"]) == len(found["pieces"]) == 6
    assert [cycle["first"] for cycle in found["cycles"]][:1] == [0]
    assert sum(cycle["count"] for cycle in found["cycles"]) == 6


def test_no_text_can_end_the_record_within_the_page():
    found = {"pieces": ["</script><!--"]}
    written = page(found)
    assert "</script><!--" not in written
    assert record_in(written) == found


def record_in(written: str) -> dict:
    return json.loads(re.search('id="record">(.*?)</script>', written, re.DOTALL).group(1))


def test_the_command_line_writes_the_page_of_its_run(tmp_path, capsys):
    file = tmp_path / "run.html"
    flags = ["--json", "--compare", "--trace", str(file), "--max-new-tokens", "200"]
    assert generate.main(flags) == 0
    out = json.loads(capsys.readouterr().out)
    found = record_in(file.read_text(encoding="utf-8"))
    assert found["ids"] == out["tokens"]
    assert len(found["plain"]) == len(out["autoregressive"]["tokens"])
    assert file.stat().st_size < 1_000_000
    assert "http" not in file.read_text(encoding="utf-8").replace("http://www.w3.org/", "")


def test_the_page_is_the_same_whatever_the_machines_encoding(tmp_path):
    file = tmp_path / "run.html"
    done = subprocess.run(
        [sys.executable, "generate.py", "--max-new-tokens", "5", "--trace", file],
        cwd=ROOT, env=IN_ASCII, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "↵" in file.read_text(encoding="utf-8")


@pytest.mark.parametrize("flags", [
    ["--trace", "run.txt"],
    ["--trace", "no/such/folder/run.html"],
    ["--trace", "run.html", "--method", "autoregressive"],
])
def test_a_page_that_cannot_be_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys, flags
):
    monkeypatch.chdir(tmp_path)
    assert generate.main(flags) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert len(out.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_leaves_the_one_that_was_there(tmp_path, monkeypatch):
    file = tmp_path / "run.html"
    file.write_text("before")
    (tmp_path / "run.html.new").write_text("somebody's")

    def full(path, text, **settings):
        path.write_bytes(text[:3].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SettingsError, match="cannot write --trace .*run.html: No space left"):
        generate.write_whole(file, "after")
    assert file.read_bytes() == b"before"
    assert sorted(tmp_path.iterdir()) == [file, tmp_path / "run.html.new"]


def test_a_name_that_leaves_no_room_for_the_file_beside_it_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="cannot write --trace .*: File name too long"):
        generate.write_whole(tmp_path / ("x" * 245 + ".html"), "text")


def test_a_pipe_is_no_page(tmp_path, capsys):
    file = tmp_path / "run.html"
    os.mkfifo(file)
    assert generate.main(["--trace", str(file)]) == 2
    assert "is no file" in capsys.readouterr().err


# ---------------------------------------------------------------------------- in a browser

# Steps through the page as a reader would, and writes down what is to be seen.
DRIVER = """
<script>
const seen = {errors: [], ids: [], paths: [], lit: [], drafted: []}
window.onerror = (message) => seen.errors.push(message)
const press = (key) => document.body.dispatchEvent(
  new KeyboardEvent("keydown", {key, bubbles: true}))
const tokens = [...document.querySelectorAll("#text .token")]
const visible = () => tokens.filter(
  (token) => getComputedStyle(token).visibility === "visible")
press("Home")
seen.atFirst = visible().length
for (const _ of R.cycles) press("ArrowRight")
seen.atLast = visible().map((token) => token.textContent)
for (const token of tokens)
  seen.ids.push(Number(token.title.match(/id (\\d+)/)[1]))
document.querySelectorAll(".strip").forEach((strip, r) => {
  strip.click()
  strip.onmouseenter()
  seen.lit.push(document.querySelectorAll("#text .lit").length)
  seen.drafted.push(sum(R.cycles.map((cycle) =>
    cycle.source === "layers" && cycle.set === r ? cycle.accepted : 0)))
  seen.paths.push($("table").firstChild.dataset.skip)
  for (const b of [0, 1, Number($("budget").max)]) { $("budget").value = b; $("budget").oninput() }
})
for (const key of ["ArrowUp", "ArrowLeft", "ArrowDown", "ArrowRight", "x"])
  $("table").dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}))
seen.cost = !$("cost").hidden
for (const id of seen.cost ? ["a", "c", "k", "zoom"] : ["zoom"]) {
  $(id).value = $(id).max
  $(id).oninput()
}
seen.overflow = document.documentElement.scrollWidth - innerWidth
document.body.replaceChildren(Object.assign(document.createElement("pre"),
  {id: "seen", textContent: JSON.stringify(seen)}))
</script>
"""


def browse(file, width: int) -> dict:
    """What the driver saw; and fails if anything went to the console."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
               f"--window-size={width},900", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    return json.loads(html.unescape(re.search('id="seen">(.*?)</pre>', done.stdout).group(1)))


@pytest.mark.thorough
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("flags", [
    ["--compare"],
    ["--drafter", "auto", "--temperature", "0"],
    ["--drafter", "lookup"],
    ["--skip-layers", "12", "--opt-interval", "4", "--opt-tokens", "1"],
], ids=" ".join)
@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_shows_the_whole_run_without_an_error(tmp_path, capsys, flags, width):
    file = tmp_path / "run.html"
    flags = ["--json", "--trace", str(file), "--max-new-tokens", "200", *flags]
    assert generate.main(flags) == 0
    written = file.read_text(encoding="utf-8")
    found = record_in(written)
    file.write_text(written.replace("</html>", DRIVER + "</html>"), encoding="utf-8")
    seen = browse(file, width)
    assert seen["errors"] == []
    assert seen["atFirst"] == 0
    assert seen["atLast"] == found["pieces"]
    assert seen["ids"] == found["ids"]
    assert seen["cost"] == ("--compare" in flags)        # else no plain step was timed
    assert seen["paths"] == [",".join(map(str, chosen["skip"])) for chosen in found["sets"]]
    assert seen["lit"] == seen["drafted"]                # each draft by its own set
    assert seen["overflow"] <= 0


@pytest.mark.thorough
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_an_error_on_the_page_is_noticed(tmp_path):
    file = tmp_path / "run.html"
    file.write_text("<script>nothing.at_all</script>")
    with pytest.raises(AssertionError):
        browse(file, 500)
