"""generate.py: the command line's contract."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REAL, ROOT
from folders import small_folder

import generate
from checkpoint import BUNDLED, Tokenizer, load_model
from extras.auto import Auto
from generate import Decoder, arguments, main, read_prompt
from speculative import Clasp, Stats, autoregressive

SHORT = ["--max-new-tokens", "12", "--device", "cpu"]
GREEDY = ["--temperature", "0"]
BY_HAND = ["--skip-layers", "2"]


def answer(capsys, *argv: str) -> dict:
    assert main([*SHORT, "--json", *argv]) == 0
    return json.loads(capsys.readouterr().out)


def skip_unless_exact(out: dict):
    if not out["exact"]:
        pytest.skip("no number of rows is exact on this machine")


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> str:
    """A small random model, faster to load than the bundled one."""
    return str(small_folder(tmp_path_factory.mktemp("models") / "model"))


def test_the_first_command_works_offline_from_another_folder(tmp_path):
    command = [sys.executable, ROOT / "generate.py", "--prompt", "Once upon a time", *SHORT]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0
    assert len(done.stdout) > 20
    assert "tokens/s" in done.stderr
    assert "tau" in done.stderr


# ---------------------------------------------------------------- JSON

STATS = {
    "new_tokens", "seconds", "prefill_seconds", "tokens_per_second", "cycles", "tau", "drafted",
    "accepted", "acceptance_rate", "optimizations", "draft_seconds", "verify_seconds",
    "optimize_seconds", "skipped_layers",
}
FIELDS = {
    "text", "tokens", "prompt_tokens", "method", "model", "device", "dtype", "exact", "stats",
}


def test_json_has_the_fields_that_scripts_depend_on(capsys):
    out = answer(capsys, *GREEDY, "--compare")
    assert set(out) - {"difference"} == FIELDS | {"autoregressive", "speedup", "identical"}
    assert set(out["stats"]) == STATS
    assert set(out["autoregressive"]) == {"tokens", "seconds", "tokens_per_second"}
    assert out["identical"] == (out["autoregressive"]["tokens"] == out["tokens"])
    assert len(out["tokens"]) == out["stats"]["new_tokens"] == 12
    assert out["stats"]["accepted"] + out["stats"]["cycles"] == 12
    assert out["model"] == str(BUNDLED)
    assert out["device"] == "cpu"
    assert out["dtype"] == "float32"


def test_without_a_comparison_there_is_nothing_about_one(capsys, folder):
    out = answer(capsys, "--model", folder)
    assert set(out) == FIELDS


@pytest.mark.parametrize("method", ["clasp", "autoregressive"])
def test_text_and_json_say_the_same(capsys, method):
    flags = [*GREEDY, "--method", method]
    out = answer(capsys, *flags)
    assert out["method"] == method
    assert main([*SHORT, *flags]) == 0
    assert capsys.readouterr().out == out["text"] + "\n"


def test_the_text_is_that_of_the_tokens(capsys, folder):
    """Also where a random model writes bytes that are no text."""
    out = answer(capsys, "--model", folder, "--prompt", "The king", "--max-new-tokens", "100")
    tokenizer = Tokenizer(BUNDLED)
    whole = tokenizer.decode(out["prompt_tokens"] + out["tokens"])
    assert whole == "The king" + out["text"]


@pytest.mark.parametrize("flags", [[], BY_HAND, ["--skip-layers", "auto"]], ids=" ".join)
def test_a_seed_repeats_a_sample_and_another_does_not(capsys, flags):
    sampling = ["--temperature", "1", *flags, "--seed"]
    first = answer(capsys, *sampling, "1")["tokens"]
    again = answer(capsys, *sampling, "1")["tokens"]
    other = answer(capsys, *sampling, "2")["tokens"]
    assert first == again
    assert first != other


# ---------------------------------------------------------------- exact passes

@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_greedy_text_is_plain_decodings_in_every_precision(capsys, dtype):
    out = answer(capsys, *GREEDY, "--compare", "--exact", "--dtype", dtype)
    skip_unless_exact(out)
    assert out["identical"] or out["difference"]["identical_at_same_width"]


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("flags", [[], BY_HAND, ["--skip-layers", "auto"]], ids=" ".join)
def test_long_greedy_text_is_plain_decodings_in_every_precision(capsys, dtype, flags):
    out = answer(capsys, *GREEDY, "--compare", "--exact", "--dtype", dtype, *flags,
                 "--max-new-tokens", "150")
    skip_unless_exact(out)
    assert out["identical"] or out["difference"]["identical_at_same_width"]


@pytest.mark.parametrize("flags, is_exact", [
    ([*BY_HAND, *GREEDY], True),
    ([*BY_HAND, *GREEDY, "--no-exact"], False),
    ([*BY_HAND], False),                           # a sample is compared with nothing
    ([*BY_HAND, "--exact"], True),
    (["--skip-layers", "auto"], False),
    (["--skip-layers", "auto", "--exact"], True),
    (["--skip-layers", "auto", "--no-exact"], False),
    ([], False),                                   # nothing typed: auto
], ids=str)
def test_exactness_is_a_choice_that_json_reports(capsys, monkeypatch, folder, flags, is_exact):
    decode = generate.decode
    widths = []

    def recorded(*args, width=None, **settings):
        widths.append(width)
        return decode(*args, width=width, **settings)

    monkeypatch.setattr(generate, "decode", recorded)
    monkeypatch.setattr(generate, "exact_passes", lambda model, rows: {"width": rows + 1})
    out = answer(capsys, "--model", folder, "--draft-length", "4", *flags)
    assert widths == [6 if is_exact else None]
    assert out["exact"] is is_exact


def test_plain_decoding_is_not_called_exact(capsys, folder):
    out = answer(capsys, "--model", folder, "--method", "autoregressive", "--exact")
    assert out["exact"] is False


@pytest.mark.parametrize("flags, said", [
    (["--exact"], True),
    ([*BY_HAND, *GREEDY], True),
    ([*BY_HAND, "--no-exact"], False),
    (["--skip-layers", "auto"], False),
    (["--exact", "--method", "autoregressive"], False),
], ids=str)
def test_where_no_width_is_exact_this_is_said(capsys, monkeypatch, folder, flags, said):
    monkeypatch.setattr(generate, "exact_passes", lambda model, rows: {})
    assert main([*SHORT, "--model", folder, "--json", *flags]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["exact"] is False
    assert ("not exact" in err) == said


def test_a_refusal_is_one_line_where_no_width_is_exact(capsys, monkeypatch, folder):
    monkeypatch.setattr(generate, "exact_passes", lambda model, rows: {})
    assert main([*SHORT, "--model", folder, "--exact", "--max-new-tokens", "99999"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("flags, drafter", [
    ([], Auto),
    (["--draft-length", "3"], Auto),
    (["--skip-layers", "auto"], Auto),
    (BY_HAND, Clasp),
    (["--opt-interval", "8"], Clasp),
    (["--opt-tokens", "1"], Clasp),
    (["--draft-exit-threshold", "0.5"], Clasp),
], ids=str)
def test_clasp_decodes_as_typed_and_auto_where_nothing_is(folder, flags, drafter):
    model = load_model(Path(folder))
    decoder = Decoder(arguments(flags), Path(folder), model, set())
    assert type(decoder.drafter) is drafter


# ---------------------------------------------------------------- comparing

def test_a_difference_from_one_row_decoding_is_explained(capsys, monkeypatch):
    """As in 16 bits, where one row and K+1 rows round differently; here a token is changed."""
    plain = generate.autoregressive

    def one_row_differs(*args, width=None, **settings):
        """Its new token 5 is another, where that is reported."""
        for i, token in enumerate(plain(*args, width=width, **settings)):
            yield token
            if width is None and i == 5 and "stats" in settings:
                settings["stats"].tokens[5] += 1

    monkeypatch.setattr(generate, "autoregressive", one_row_differs)
    out = answer(capsys, *GREEDY, "--compare", "--exact")
    skip_unless_exact(out)
    assert not out["identical"]
    assert out["difference"]["new_token"] == 5
    assert out["difference"]["identical_at_same_width"] is True
    assert out["difference"]["logit_gap"] >= 0

    assert main([*SHORT, *GREEDY, "--compare", "--exact"]) == 0
    err = capsys.readouterr().err
    assert "no, from new token 5 on" in err
    assert err.endswith("same width: yes, so rounding chose\n")


def wrong_from_the_first_token_on(plain):
    def wrong(*args, **settings):
        for token in plain(*args, **settings):
            if "stats" in settings:
                settings["stats"].tokens[-1] += 1
            yield token + 1
    return wrong


def test_a_difference_that_rounding_did_not_make_is_told_too(capsys, monkeypatch):
    wrong = wrong_from_the_first_token_on(generate.autoregressive)
    monkeypatch.setattr(generate, "autoregressive", wrong)
    out = answer(capsys, *GREEDY, "--compare", "--exact")
    skip_unless_exact(out)
    assert out["difference"]["identical_at_same_width"] is False
    assert main([*SHORT, *GREEDY, "--compare", "--exact"]) == 0
    assert capsys.readouterr().err.endswith("same width: no\n")


def test_without_one_width_the_difference_may_be_rounding(capsys, monkeypatch):
    wrong = wrong_from_the_first_token_on(generate.autoregressive)
    monkeypatch.setattr(generate, "autoregressive", wrong)
    out = answer(capsys, *GREEDY, "--compare", "--no-exact")
    assert out["difference"]["identical_at_same_width"] is None
    assert main([*SHORT, *GREEDY, "--compare", "--no-exact"]) == 0
    assert "round differently (see --exact)" in capsys.readouterr().err


def test_samples_are_not_compared_token_by_token(capsys, monkeypatch):
    wrong = wrong_from_the_first_token_on(generate.autoregressive)
    monkeypatch.setattr(generate, "autoregressive", wrong)
    assert main([*SHORT, "--temperature", "1", "--compare"]) == 0
    assert "samples share their distribution" in capsys.readouterr().err


def test_the_gap_is_that_of_the_two_likeliest_tokens_where_the_texts_part(bundled):
    prompt = Tokenizer(BUNDLED).encode("The king")
    plain = list(autoregressive(bundled, prompt, 8))
    args = arguments(["--max-new-tokens", "8", *GREEDY, "--no-exact"])
    stats = Stats(verify_seconds=1.0, tokens=[*plain[:6], plain[6] + 1, plain[7]])
    out = generate.compare(Decoder(args, BUNDLED, bundled, set()), prompt, stats, [])
    states = bundled(torch.tensor([[*prompt, *plain[:6]]], device=bundled.device))
    first, second = bundled.logits(states[-1])[0, -1].topk(2).values.tolist()
    assert out["difference"]["new_token"] == 6
    assert out["difference"]["logit_gap"] == pytest.approx(first - second, abs=1e-4)


# ---------------------------------------------------------------- prompts

def test_a_prompt_comes_from_the_line_a_file_or_standard_input(tmp_path, monkeypatch):
    path = tmp_path / "prompt"
    path.write_text("The old king")
    assert read_prompt(arguments(["--prompt", "The old king"])) == "The old king"
    assert read_prompt(arguments(["--prompt-file", str(path)])) == "The old king"
    with path.open() as file:
        monkeypatch.setattr("sys.stdin", file)
        assert read_prompt(arguments(["--prompt-file", "-"])) == "The old king"


def test_a_file_is_the_same_prompt_as_its_text(capsys, folder, tmp_path):
    path = tmp_path / "prompt"
    path.write_text("Grüße\n")
    in_file = answer(capsys, "--model", folder, "--prompt-file", str(path))
    typed = answer(capsys, "--model", folder, "--prompt", "Grüße\n")
    assert in_file["prompt_tokens"] == typed["prompt_tokens"]
    assert in_file["tokens"] == typed["tokens"]


@pytest.mark.parametrize("data, text", [
    (b"\xef\xbb\xbfThe king", "The king"),
    (b"The king\r\nand\rthe queen\r\n", "The king\r\nand\rthe queen\r\n"),
    (b"The\0king", "The\0king"),
], ids=["byte order mark", "line ends", "NUL"])
@pytest.mark.parametrize("source", ["file", "standard input"])
def test_a_prompt_is_read_byte_by_byte_but_for_a_byte_order_mark(
    tmp_path, monkeypatch, source, data, text
):
    path = tmp_path / "prompt"
    path.write_bytes(data)
    name = str(path) if source == "file" else "-"
    with path.open() as file:
        monkeypatch.setattr("sys.stdin", file)
        assert read_prompt(arguments(["--prompt-file", name])) == text


def test_a_prompt_with_nul_is_decoded(capsys, folder, tmp_path):
    path = tmp_path / "prompt"
    path.write_bytes(b"The\0king")
    out = answer(capsys, "--model", folder, "--prompt-file", str(path))
    assert len(out["tokens"]) == 12


# ---------------------------------------------------------------- what is shown

def test_drafts_and_skips_can_be_seen(capsys):
    assert main([*SHORT, *GREEDY, "--show-drafts", "--show-skips"]) == 0
    out, err = capsys.readouterr()
    for source in ("layers", ""):
        colour, _, _ = generate.SHOWN[source]
        assert colour in out
    assert "░" in err


def test_marks_and_colours_change_nothing_else(capsys):
    assert main([*SHORT, *GREEDY]) == 0
    plain = capsys.readouterr().out
    assert main([*SHORT, *GREEDY, "--show-drafts"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("[\033") == shown.count(generate.NORMAL + "]") > 0
    for colour, opened, closed in generate.SHOWN.values():
        shown = shown.replace(opened + colour, "").replace(colour, "")
        shown = shown.replace(generate.NORMAL + closed, "")
    assert shown == plain


def test_each_source_has_its_own_marks():
    """Colours are not needed to tell them apart. A piece without text opens nothing."""
    stats = Stats()

    def pieces():
        for piece, source in zip(["a", "b", "", "c", "d", "e"],
                                 ["layers", "layers", "lookup", "", "lookup", "lookup"]):
            stats.sources.append(source)
            yield piece

    shown = "".join(generate.marked(pieces(), stats))
    for colour, _, _ in generate.SHOWN.values():
        shown = shown.replace(colour, "")
    assert shown.replace(generate.NORMAL, "") == "[ab]c{de}"


# ---------------------------------------------------------------- a real model

@pytest.mark.skipif(not REAL, reason="CLASP_REAL_MODEL is not set")
def test_a_real_chat_model_answers(capsys):
    out = answer(capsys, "--model", REAL, "--chat", "--prompt", "What is the capital of France?",
                 *GREEDY, "--compare")
    assert out["text"] == "The capital of France is Paris."
    assert out["identical"]
    assert main([*SHORT, "--model", REAL, "--prompt", "x", "--skip-layers", "30"]) == 2
