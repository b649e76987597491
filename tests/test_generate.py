"""generate.py: the command line's contract, and one clear line for whatever a user can get wrong."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import generate
from conftest import BUNDLED, REAL, ROOT
from generate import Text, main
from model import load_model
from speculative import Stats, autoregressive

SHORT = ["--max-new-tokens", "12", "--device", "cpu"]


def answer(capsys, *argv) -> dict:
    assert main([*SHORT, "--json", *argv]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_first_command_works_offline_from_another_folder(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "generate.py", "--prompt", "Once upon a time", *SHORT], cwd=tmp_path,
                          capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0 and len(done.stdout) > 20
    assert "tokens/s" in done.stderr and "tau" in done.stderr


def test_json_has_the_fields_that_scripts_depend_on(capsys):
    out = answer(capsys, "--compare", "--temperature", "0")
    assert set(out) == {"text", "tokens", "prompt_tokens", "method", "model", "device", "dtype", "stats",
                        "autoregressive", "speedup", "identical"}
    assert set(out["stats"]) == {
        "new_tokens", "seconds", "prefill_seconds", "tokens_per_second", "cycles", "tau", "drafted", "accepted",
        "acceptance_rate", "optimizations", "draft_seconds", "verify_seconds", "optimize_seconds", "skipped_layers"}
    assert set(out["autoregressive"]) == {"tokens", "seconds", "tokens_per_second"}
    assert out["identical"] is True and out["autoregressive"]["tokens"] == out["tokens"]
    assert len(out["tokens"]) == out["stats"]["new_tokens"] == 12
    assert out["stats"]["accepted"] + out["stats"]["cycles"] == 12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_greedy_text_is_plain_decodings_in_every_precision(capsys, dtype):
    out = answer(capsys, "--compare", "--temperature", "0", "--dtype", dtype, "--max-new-tokens", "60")
    assert out["identical"] or out["difference"]["identical_at_same_width"]


def test_a_difference_from_one_row_decoding_is_explained(capsys, monkeypatch):
    """As in 16 bits, where one row and K+1 rows round differently; here a token is changed by hand."""
    def one_row_differs(*args, width=None, **settings):
        for i, token in enumerate(plain(*args, width=width, **settings)):
            yield token + (width is None and i == 5)
            if width is None and i == 5:
                settings["stats"].tokens[5] += 1

    plain = generate.autoregressive
    monkeypatch.setattr(generate, "autoregressive", one_row_differs)
    out = answer(capsys, "--compare", "--temperature", "0")
    assert not out["identical"] and out["difference"]["new_token"] == 5 and out["difference"]["identical_at_same_width"]
    assert out["difference"]["logit_gap"] >= 0
    assert main([*SHORT, "--compare", "--temperature", "0"]) == 0
    assert "no, from new token 5 on" in (err := capsys.readouterr().err) and err.endswith("same width: yes, so rounding chose\n")

    def always_wrong(*args, stats, **settings):
        for token in plain(*args, stats=stats, **settings):
            stats.tokens[-1] += 1
            yield token + 1

    monkeypatch.setattr(generate, "autoregressive", always_wrong)
    assert answer(capsys, "--compare", "--temperature", "0")["difference"]["identical_at_same_width"] is False


def test_the_gap_is_that_of_the_two_likeliest_tokens_where_the_texts_part(capsys, monkeypatch):
    prompt, model = Text(BUNDLED).encode("The king", chat=False), load_model(BUNDLED)
    monkeypatch.setattr(generate, "clasp", lambda *args, stats, **_: iter(stats.tokens))
    stats, plain = Stats(), list(autoregressive(model, prompt, 8))
    stats.tokens = [*plain[:6], plain[6] + 1, plain[7]]
    args = generate.arguments(["--max-new-tokens", "8", "--temperature", "0"])
    stats.seconds = 1.0
    out = generate.compare(args, model, generate.decoder(args, BUNDLED, model, set()), prompt, stats)
    top = model.logits(model(torch.tensor([[*prompt, *plain[:6]]]))[-1])[0, -1].topk(2).values
    assert out["difference"]["new_token"] == 6
    assert out["difference"]["logit_gap"] == pytest.approx((top[0] - top[1]).item(), abs=1e-4)


@pytest.mark.parametrize("flags, exact", [([], True), (["--exact"], True), (["--no-exact"], False)])
def test_exactness_is_a_choice(capsys, monkeypatch, flags, exact):
    seen = {}
    monkeypatch.setattr(generate, "clasp", lambda *args, **settings: seen.update(settings) or iter(()))
    assert main([*SHORT, *flags]) == 0 and seen["exact"] is exact


def test_text_and_json_say_the_same(capsys):
    for method in ("clasp", "autoregressive"):
        out = answer(capsys, "--method", method, "--temperature", "0")
        assert main([*SHORT, "--method", method, "--temperature", "0"]) == 0
        assert capsys.readouterr().out == out["text"] + "\n"


def test_a_seed_repeats_a_sample_and_another_does_not(capsys):
    first, again, other = (answer(capsys, "--temperature", "1", "--seed", seed)["tokens"] for seed in "112")
    assert first == again != other


def test_a_prompt_from_a_file_or_standard_input(capsys, tmp_path, monkeypatch):
    (tmp_path / "prompt").write_text("The old king")
    expected = answer(capsys, "--prompt", "The old king")["prompt_tokens"]
    assert answer(capsys, "--prompt-file", str(tmp_path / "prompt"))["prompt_tokens"] == expected
    monkeypatch.setattr("sys.stdin", open(tmp_path / "prompt"))
    assert answer(capsys, "--prompt-file", "-")["prompt_tokens"] == expected


def test_drafts_and_skips_can_be_seen(capsys):
    assert main([*SHORT, "--show-drafts", "--show-skips"]) == 0
    out, err = capsys.readouterr()
    assert "\033[32m" in out and "░" in err


# ---------------------------------------------------------------- text

@pytest.fixture
def folder(tmp_path):
    """A tokenizer's folder without weights, to be varied."""
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(BUNDLED / file, tmp_path)
    return tmp_path


def set_config(folder: Path, file: str, **fields):
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))


def test_streaming_never_breaks_a_character(folder):
    text = Text(folder)
    for written in ("Grüße, 日本語 and 🙂🙂!", "plain", "🙂"):
        prompt, tokens = text.encode("A ", chat=False), text.tokenizer.encode(written, add_special_tokens=False).ids
        pieces = list(text.stream(prompt, iter(tokens)))
        assert "".join(pieces) == written and "\ufffd" not in "".join(pieces)
        assert len(pieces) == len(tokens)


def test_streaming_survives_bytes_that_are_no_text(folder):
    text, random_bytes = Text(folder), torch.Generator().manual_seed(0)
    for _ in range(50):
        tokens = torch.randint(2, 300, (40,), generator=random_bytes).tolist()
        assert len(list(text.stream([0], iter(tokens)))) == 40


def test_special_tokens_are_not_printed(folder):
    text = Text(folder)
    end = text.tokenizer.token_to_id("<|end_of_text|>")
    tokens = text.tokenizer.encode("the end", add_special_tokens=False).ids
    assert "".join(text.stream([0], iter([*tokens, end]))) == "the end"


@pytest.mark.parametrize("add_begin, begins", [(None, 1), (True, 1), (False, 0)])
def test_begin_of_text_comes_once_or_as_the_files_say(folder, add_begin, begins):
    if add_begin is not None:
        set_config(folder, "tokenizer_config.json", add_bos_token=add_begin)
    assert Text(folder).encode("a king", chat=False).count(0) == begins


@pytest.mark.parametrize("fields, stop", [({}, {1}), ({"eos_token_id": 7}, {7}), ({"eos_token_id": [7, 9]}, {7, 9})])
def test_stop_tokens_are_one_or_a_list_and_generation_config_comes_first(folder, fields, stop):
    set_config(folder, "generation_config.json", **fields)
    assert Text(folder).stop == stop


TEMPLATE = ("{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | tojson }}\n{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}")


def test_the_models_own_chat_template_is_used(folder):
    expected = '<|begin_of_text|>[user] "hé"\n[assistant]'
    set_config(folder, "tokenizer_config.json", chat_template=TEMPLATE)
    assert Text(folder).render(["hé"]) == expected and Text(folder).encode("hé", chat=True).count(0) == 1
    set_config(folder, "tokenizer_config.json", chat_template=[{"name": "default", "template": TEMPLATE}])
    assert Text(folder).render(["hé"]) == expected
    set_config(folder, "tokenizer_config.json", chat_template="not this")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    assert Text(folder).render(["hé"]) == expected


@pytest.mark.parametrize("template", [
    "{{ raise_exception('no') }}", "{% if %}", "{{ 1 + 'a' }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"])
def test_a_bad_or_hostile_template_is_refused(folder, template):
    from model import ModelError
    set_config(folder, "tokenizer_config.json", chat_template=template)
    with pytest.raises(ModelError, match="chat template failed"):
        Text(folder).render(["x"])


@pytest.mark.skipif(not REAL, reason="CLASP_REAL_MODEL is not set")
def test_a_real_chat_model_answers(capsys):
    out = answer(capsys, "--model", REAL, "--chat", "--prompt", "What is the capital of France?",
                 "--temperature", "0", "--compare")
    assert out["text"] == "The capital of France is Paris." and out["identical"]
    assert main([*SHORT, "--model", REAL, "--prompt", "x", "--skip-layers", "30"]) == 2
