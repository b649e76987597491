"""checkpoints/tiny-stories/train.py: it trains, goes on, and refuses before hours are lost."""
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint import BUNDLED, Tokenizer, load_model

sys.path.insert(0, str(BUNDLED))
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
@pytest.mark.parametrize("state", [{"step": 1}, [], b"nothing that was saved", b""])
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
])
def test_options_that_make_no_sense(small, monkeypatch, capsys, options, said):
    assert said in refused(monkeypatch, capsys, *options).splitlines()[-1]


def test_a_folder_that_cannot_be_written(small, monkeypatch, capsys):
    shown = refused(monkeypatch, capsys, out="stories.txt")
    assert "cannot write to --out" in shown and shown.count("\n") == 1
