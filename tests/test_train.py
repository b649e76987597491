"""checkpoints/tiny-stories: what trains the model trains, and refuses before hours are lost."""
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint import BUNDLED, Tokenizer, load_model

sys.path.insert(0, str(BUNDLED))
import practise  # noqa: E402
import train  # noqa: E402

STORIES = "".join(f"A {animal} sat by the {place} and sang all day.\n<|endoftext|>\n"
                  for animal in ("cat", "dog", "bird", "frog") for place in ("tree", "sea", "fire"))


@pytest.fixture(autouse=True)
def no_gradients():
    """In place of the fixture of that name for other tests: here they are needed."""


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A model so small that a step takes no time, in a folder of its own."""
    config = replace(train.CONFIG, vocab_size=300, hidden_size=16, intermediate_size=16,
                     num_hidden_layers=14, num_attention_heads=1, head_dim=16,
                     max_position_embeddings=32)
    sizes = {"CONFIG": config, "LAYERS": 14, "LENGTH": 32, "WINDOW": 16, "ROWS": 4, "DRAFTS": 2}
    for name, value in sizes.items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.chdir(tmp_path)
    Path("stories.txt").write_text(STORIES, encoding="utf-8")


def run(monkeypatch, *options: str, stories: str = "stories.txt", out: str = "out"):
    command = ["train.py", stories, "--out", out, "--device", "cpu", *options]
    monkeypatch.setattr(sys, "argv", command)
    train.main()


def refused(monkeypatch, capsys, *options: str, **names: str) -> str:
    """What it says, with status 2."""
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *options, **names)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_training_goes_on_where_it_stopped(small, monkeypatch, capsys):
    """To the very weights of a run that did not stop."""
    settings = ["--steps", "6", "--save-every", "2"]
    run(monkeypatch, *settings, out="whole")
    save = train.save

    def stopped_at_4(model, tokenizer, optimizers, step, path):
        save(model, tokenizer, optimizers, step, path)
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save", stopped_at_4)
        run(monkeypatch, *settings)
    assert torch.load("out/state.pt", weights_only=True)["step"] == 4
    whole = load_file("whole/model.safetensors")
    before = load_file("out/model.safetensors")
    assert any(not torch.equal(before[name], whole[name]) for name in whole)
    capsys.readouterr()
    run(monkeypatch, *settings)
    shown = capsys.readouterr().out
    assert "step 6: held-out" in shown and "step 2: held-out" not in shown
    assert torch.load("out/state.pt", weights_only=True)["step"] == 6
    after = load_file("out/model.safetensors")
    assert all(torch.equal(after[name], whole[name]) for name in whole)
    assert "is at step 6" in refused(monkeypatch, capsys, *settings)


def test_what_is_trained_can_be_loaded(small, monkeypatch):
    run(monkeypatch, "--steps", "1")
    model = load_model(Path("out"), torch.device("cpu"))
    tokens = torch.tensor([Tokenizer(Path("out")).encode("A cat sat")])
    assert model.logits(model(tokens)[-1]).isfinite().all()


def test_a_mean_of_states_is_theirs(small, monkeypatch):
    """Of one state, with any share, it is that state."""
    run(monkeypatch, "--steps", "1")
    run(monkeypatch, "--average", "out/state.pt=3", out="mean")
    one, mean = load_file("out/model.safetensors"), load_file("mean/model.safetensors")
    assert all(torch.equal(one[name], mean[name]) for name in one)


@pytest.mark.parametrize("text, said", [
    (b"Once upon a time there was a cat.\n", "fewer than two stories"),
    (b"\xff\xfe", "cannot read"),
    (None, "cannot read"),
])
def test_text_that_cannot_be_learnt_from(small, monkeypatch, capsys, text, said):
    if text is not None:
        Path("other.txt").write_bytes(text)
    shown = refused(monkeypatch, capsys, stories="other.txt")
    assert said in shown and shown.count("\n") == 1


@pytest.mark.parametrize("options", [[], ["--average", "out/state.pt=1"]])
def test_a_state_of_another_text(small, monkeypatch, capsys, options):
    run(monkeypatch, "--steps", "1")
    Path("other.txt").write_text(STORIES.replace("sang", "slept"), encoding="utf-8")
    shown = refused(monkeypatch, capsys, *options, stories="other.txt")
    assert "was trained on another text" in shown.splitlines()[-1]


@pytest.mark.parametrize("options", [[], ["--average", "out/state.pt=1"]])
@pytest.mark.parametrize("state", [
    {"step": 1}, {"tokenizer": "{}", "model": {"norm.weight": torch.ones(3)}}, [], torch.ones(2),
    b"nothing that was saved", b""])
def test_a_file_that_is_no_state(small, monkeypatch, capsys, options, state):
    Path("out").mkdir()
    if isinstance(state, bytes):
        Path("out/state.pt").write_bytes(state)
    else:
        torch.save(state, "out/state.pt")
    assert "is not a state" in refused(monkeypatch, capsys, *options).splitlines()[-1]


@pytest.mark.parametrize("options, said", [
    (["--save-every", "0"], "must be at least 1"),
    (["--steps", "many"], "invalid"),
    (["--average", "stories.txt"], "a share is missing"),
    (["--average", "nowhere=1"], "there is no file"),
    (["--average", "stories.txt=0"], "above 0"),
    (["--average", "stories.txt=1e308"], "above 0"),
    (["--rate", "-1"], "must lie between"),
    (["--rate", "inf"], "must lie between"),
    (["--weight-decay", "nan"], "must lie between"),
    (["--device", "abacus"], "abacus cannot be used"),
])
def test_options_that_make_no_sense(small, monkeypatch, capsys, options, said):
    assert said in refused(monkeypatch, capsys, *options).splitlines()[-1]


def test_a_folder_that_cannot_be_written(small, monkeypatch, capsys):
    shown = refused(monkeypatch, capsys, out="stories.txt")
    assert "cannot write to --out" in shown and shown.count("\n") == 1


# ---------------------------------------------------------------------------- practise.py

def run_practise(monkeypatch, *options: str, start: str = "out", stories: str = "stories.txt"):
    command = ["practise.py", stories, "--start", start, "--out", "better", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*command, *options])
    practise.main()


def test_a_model_practises(small, monkeypatch, capsys):
    run(monkeypatch, "--steps", "1")
    capsys.readouterr()
    run_practise(monkeypatch, "--steps", "2")
    assert "held-out" in capsys.readouterr().out
    before, after = load_file("out/model.safetensors"), load_file("better/model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    model = load_model(Path("better"), torch.device("cpu"))
    tokens = torch.tensor([Tokenizer(Path("better")).encode("A cat sat")])
    assert model.logits(model(tokens)[-1]).isfinite().all()


def test_a_share_of_nothing_changes_nothing(small, monkeypatch):
    run(monkeypatch, "--steps", "1")
    run_practise(monkeypatch, "--steps", "2", "--share", "0")
    before, after = load_file("out/model.safetensors"), load_file("better/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("options", [
    ["--temperature", "1e-300"], ["--rate", "-1"], ["--repeating", "nan"], ["--share", "2"],
])
def test_options_of_practice_that_make_no_sense(small, monkeypatch, capsys, options):
    with pytest.raises(SystemExit) as ended:
        run_practise(monkeypatch, *options)
    assert ended.value.code == 2
    assert "must " in capsys.readouterr().err.splitlines()[-1]


def test_what_has_diverged_is_not_written_over_what_has_not(small, monkeypatch, capsys):
    run(monkeypatch, "--steps", "1")
    before = Path("out/state.pt").read_bytes(), Path("out/model.safetensors").read_bytes()
    monkeypatch.setattr(train, "set_rate", diverging)
    said = refused(monkeypatch, capsys, "--steps", "3")
    assert "nothing was written" in said.splitlines()[-1]
    assert before == (Path("out/state.pt").read_bytes(), Path("out/model.safetensors").read_bytes())
    with pytest.raises(SystemExit):
        run_practise(monkeypatch)
    assert not Path("better/model.safetensors").exists()


def diverging(optimizers, *args) -> float:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = math.inf
    return math.inf


@pytest.mark.parametrize("start, stories", [
    ("nowhere", "stories.txt"),                  # no model
    (str(BUNDLED), "stories.txt"),               # another one
    ("out", "other.txt"),                        # of another text
    ("out", "nothing.txt"),
    ("better", "stories.txt"),                   # where it would be written
])
def test_what_cannot_be_practised(small, monkeypatch, capsys, start, stories):
    run(monkeypatch, "--steps", "1")
    capsys.readouterr()
    Path("other.txt").write_text(STORIES.replace("sang", "slept"), encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        run_practise(monkeypatch, start=start, stories=stories)
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_writer_reads_as_the_model(small):
    torch.manual_seed(0)
    model = train.Llama(train.CONFIG).requires_grad_(False)
    rows = torch.randint(train.CONFIG.vocab_size, (3, 9))
    writer = practise.Writer(model, len(rows))
    read = torch.stack([writer.read(column.tolist()) for column in rows.T], 1)
    torch.testing.assert_close(read, model.logits(model(rows)[-1]), rtol=1e-4, atol=1e-4)


def test_own_rows_are_stories_behind_openings(small):
    """Of a model that knows nothing, so many of its stories end at once."""
    model = train.new_model("cpu")
    stories = [[0, 10 + i, 20 + i, 30 + i, 1] for i in range(5)]
    rows = practise.write(model, stories, 6, 1.0, random.Random(0))
    assert [len(row) for row in rows] == [train.LENGTH + 1] * 6
    openings = {tuple(story[:2]) for story in stories}
    for row in rows:
        begins = [i for i, token in enumerate(row) if i == 0 or row[i - 1] == practise.END]
        assert all(tuple(row[i:i + 2]) in openings for i in begins if i + 1 < len(row))
    assert any(practise.END in row[:-1] for row in rows)


def test_repetitions_are_within_a_story():
    row = [0, 5, 6, 7, 5, 6, 7, 5, 6, 1, 0, 5, 6, 7, 9]
    found = [i for i, repeats in enumerate(practise.repetitions(row, 4)) if repeats]
    assert found == [7, 8]                       # 5 6 7 5 and 6 7 5 6 are there for a second time


def test_what_repeats_becomes_unlikelier_and_the_rest_stays():
    logs = torch.tensor([[[0.2, 0.8], [0.4, 0.6]]]).log()
    before = torch.tensor([[[0.3, 0.7], [0.5, 0.5]]]).log()
    tokens = torch.tensor([[1, 0]])
    repeated = torch.tensor([[True, False]])
    unlike = practise.unlikelihood(logs, tokens, repeated)
    torch.testing.assert_close(unlike, -torch.tensor(1 - 0.8).log() / 2)
    divergence = 0.5 * torch.tensor(0.5 / 0.4).log() + 0.5 * torch.tensor(0.5 / 0.6).log()
    torch.testing.assert_close(practise.change(logs, before, repeated), divergence / 2)
