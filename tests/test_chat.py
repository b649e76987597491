"""extras/chat.py: answers are those of one text each, and only what is new is computed."""
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import closing

import pytest
import torch
from conftest import DEVICE, ROOT, feed, valid, width_for
from folders import set_fields, small_folder

import speculative
from checkpoint import Tokenizer, load_model
from extras.auto import Auto
from extras.chat import Conversation, UnanswerableError, common_prefix
from extras.lookup import Lookup
from extras.worth import SHAPE
from model import KVCache
from speculative import Clasp, autoregressive

TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<assistant>"
LAST_TWO = ("{{ messages | length }} {% for m in messages[-2:] %}<{{ m.role }}> {{ m.content }}\n"
            "{% endfor %}<assistant>")
MESSAGES = ["Tell me of a king.", "And then?", "Why was the king sad?", "And then?", "The end?"]
TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = small_folder(tmp_path_factory.mktemp("chat") / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer(folder)


@pytest.fixture
def model(folder):
    return load_model(folder, DEVICE)


def new_conversation(model, tokenizer, drafter=None, count=TOKENS, **settings) -> Conversation:
    return Conversation(model, tokenizer, drafter, count, **settings)


def one_shot(model, tokenizer, messages: list[str], count=TOKENS, **settings) -> list[int]:
    """Plain decoding, from nothing, after a conversation."""
    prompt = tokenizer.encode(messages, chat=True)
    return list(autoregressive(model, prompt, count, **settings))


def say(conversation, message: str) -> str:
    return "".join(conversation.answer(message))


DRAFTERS = {
    "plain": lambda model: None,
    "layers": lambda model: Clasp(model, 1, opt_interval=2),
    "lookup": lambda model: Lookup(),
    "auto": lambda model: Auto(model, costs=SHAPE),
}


# ---------------------------------------------------------------- answers

@pytest.mark.parametrize("new_drafter", DRAFTERS.values(), ids=DRAFTERS)
def test_each_answer_is_that_of_one_text_after_the_same_messages(model, tokenizer, new_drafter):
    conversation = new_conversation(model, tokenizer, new_drafter(model))
    for message in MESSAGES:
        expected = one_shot(model, tokenizer, [*conversation.messages, message])
        text = say(conversation, message)
        assert conversation.stats.tokens == expected
        assert conversation.messages[-2:] == [message, text]
    assert len(conversation.messages) == 2 * len(MESSAGES)


def test_the_token_that_ends_an_answer_is_no_part_of_it(model, tokenizer):
    """Also where it is an ordinary one."""
    written = one_shot(model, tokenizer, MESSAGES[:1])
    stop = next(token for token in written[3:] if token not in written[:3])
    before = written[:written.index(stop)]
    conversation = new_conversation(model, tokenizer, Lookup(), stop={stop})
    assert say(conversation, MESSAGES[0]) == tokenizer.decode(before)
    assert conversation.messages[1] == tokenizer.decode(before)
    assert conversation.stats.tokens == [*before, stop]
    say(conversation, MESSAGES[1])
    turns = [MESSAGES[0], tokenizer.decode(before), MESSAGES[1]]
    assert conversation.stats.tokens == one_shot(model, tokenizer, turns, stop={stop})


def test_in_passes_of_one_shape_too(model, tokenizer):
    width = width_for(model, 5)
    conversation = new_conversation(model, tokenizer, Clasp(model, 1), passes={"width": width})
    for message in MESSAGES:
        expected = one_shot(model, tokenizer, [*conversation.messages, message], width=width)
        say(conversation, message)
        assert conversation.stats.tokens == expected


def test_a_seed_fixes_each_sampled_answer(model, tokenizer):
    sampling = {"temperature": 0.8, "seed": 3}
    conversation = new_conversation(model, tokenizer, **sampling)
    for message in MESSAGES:
        expected = one_shot(model, tokenizer, [*conversation.messages, message], **sampling)
        say(conversation, message)
        assert conversation.stats.tokens == expected


def test_where_memory_ends_the_conversation_stays_as_it_was(model, tokenizer, monkeypatch):
    conversation = new_conversation(model, tokenizer)
    say(conversation, MESSAGES[0])
    before = list(conversation.messages)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("extras.chat.KVCache", full)
    with pytest.raises(UnanswerableError, match="no memory"):
        say(conversation, 100 * "And then? ")
    assert conversation.messages == before
    say(conversation, "And then?")
    assert conversation.stats.tokens == one_shot(model, tokenizer, [*before, "And then?"])


def test_a_template_that_rewrites_earlier_turns_stays_right(folder, tokenizer, model, monkeypatch):
    monkeypatch.setitem(tokenizer.config, "chat_template", LAST_TWO)
    monkeypatch.setattr(Tokenizer, "template_file", folder / "none")
    conversation = new_conversation(model, tokenizer)
    for message in MESSAGES:
        expected = one_shot(model, tokenizer, [*conversation.messages, message])
        say(conversation, message)
        assert conversation.stats.tokens == expected


# ---------------------------------------------------------------- what goes through the model

def test_only_what_is_new_goes_through_the_model(model, tokenizer, monkeypatch):
    prefilled = []
    prefill = speculative.prefill

    def counted(model, cache, tokens):
        prefilled.append(len(tokens))
        return prefill(model, cache, tokens)

    monkeypatch.setattr(speculative, "prefill", counted)
    conversation = new_conversation(model, tokenizer)
    lengths = []
    for message in MESSAGES:
        prompt = tokenizer.encode([*conversation.messages, message], chat=True)
        new = len(prompt) - 1 - common_prefix(conversation.known, prompt[:-1])
        say(conversation, message)
        assert prefilled.pop() == conversation.prefilled == new
        lengths.append((len(prompt), new))
    # The conversation grows from turn to turn; what is new is a message and the answer before it,
    # whose text may be made of other tokens than it was written in.
    assert lengths[-1][0] > 4 * lengths[0][0]
    assert max(new for _, new in lengths[1:]) < 2 * lengths[0][0] + 2 * TOKENS


def test_the_cache_grows_with_the_conversation_and_keeps_what_it_holds(model, tokenizer):
    conversation = new_conversation(model, tokenizer)
    sizes = set()
    for _ in range(9):
        expected = one_shot(model, tokenizer, [*conversation.messages, "And then?"])
        say(conversation, "And then?")
        assert conversation.stats.tokens == expected
        sizes.add(conversation.cache.tokens)
    assert len(sizes) > 1
    assert conversation.prefilled < conversation.cache.length / 4


def test_the_cache_holds_the_tokens_it_is_said_to_hold(model, tokenizer):
    """Also after it has grown: keys and values as a prefill of these tokens computes them."""
    conversation = new_conversation(model, tokenizer, Lookup())
    for message in ["The king", "word " * 150, "Why?"]:
        say(conversation, message)
        held = conversation.known
        fresh = KVCache(model, len(held))
        feed(model, fresh, held)
        torch.testing.assert_close(valid(conversation.cache, len(held)), valid(fresh),
                                   atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- stopped answers

def test_of_an_answer_that_is_stopped_what_was_said_is_kept(model, tokenizer):
    conversation = new_conversation(model, tokenizer, Clasp(model, 1))
    with closing(conversation.answer(MESSAGES[0])) as pieces:
        said = "".join(next(pieces) for _ in range(5))
    assert conversation.messages == [MESSAGES[0], said]
    expected = one_shot(model, tokenizer, [*conversation.messages, MESSAGES[1]])
    say(conversation, MESSAGES[1])
    assert conversation.stats.tokens == expected


@pytest.mark.parametrize("passes", range(1, 12, 3))
def test_an_interrupt_within_a_pass_spoils_nothing(model, tokenizer, monkeypatch, passes):
    """At a layer in the middle of the prompt, a draft, a verify pass or the DP."""
    conversation = new_conversation(model, tokenizer, Clasp(model, 1, opt_interval=2))
    say(conversation, MESSAGES[0])
    calls = [0]

    def interrupt(module, given, out):
        calls[0] += 1
        if calls[0] == passes:
            raise KeyboardInterrupt

    hook = model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        say(conversation, MESSAGES[1])
    hook.remove()
    expected = one_shot(model, tokenizer, [*conversation.messages, MESSAGES[2]])
    say(conversation, MESSAGES[2])
    assert conversation.stats.tokens == expected


def test_an_interrupt_while_a_message_is_read_has_nothing_of_the_last_answer(
    model, tokenizer, monkeypatch
):
    conversation = new_conversation(model, tokenizer)
    say(conversation, MESSAGES[0])
    assert conversation.stats.tokens

    def interrupt(prompt, chat):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "encode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        say(conversation, MESSAGES[1])
    assert not conversation.stats.tokens and conversation.prefilled == 0


# ---------------------------------------------------------------- a full context

def test_where_the_context_is_full_it_says_so_and_nothing_is_lost(tokenizer, model):
    conversation = new_conversation(model, tokenizer, count=100)
    while True:
        before = list(conversation.messages)
        try:
            say(conversation, MESSAGES[0])
        except UnanswerableError as error:
            assert "/new starts over" in str(error)
            break
    assert len(before) > 4
    assert conversation.messages == before
    conversation.start_over()
    say(conversation, MESSAGES[0])
    assert conversation.stats.tokens == one_shot(model, tokenizer, MESSAGES[:1], 100)


ONE_TURN = "{% if messages[1:] %}{{ raise_exception('one turn only') }}{% endif %}Hello"


@pytest.mark.parametrize("template, messages, word", [
    (ONE_TURN, ["Hi", "Hi", "/new", "Hi"], "one turn only"),
    (TEMPLATE, ["Hi", "[PAD]", "Hi"], "tokens outside the model's vocabulary"),
])
def test_after_a_message_that_cannot_be_answered_the_talk_goes_on(
    folder, tmp_path, template, messages, word
):
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "chat_template.jinja").write_text(template)
    set_fields(other, "tokenizer_config.json", pad_token="[PAD]")      # with the next id
    done = chat(other, messages, "--json")
    assert done.returncode == 0
    first, refused, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert "text" in first
    assert word in refused["error"]
    assert "text" in last


def test_the_last_answer_takes_what_room_there_is(tokenizer, model):
    conversation = new_conversation(model, tokenizer, count=10 ** 6)
    say(conversation, MESSAGES[0])
    prompt = tokenizer.encode(MESSAGES[:1], chat=True)
    assert len(prompt) + conversation.stats.new_tokens == model.config.max_position_embeddings


# ---------------------------------------------------------------- the command line

COMMAND = [sys.executable, str(ROOT / "generate.py"), "--chat", "--temperature", "0",
           "--device", DEVICE]


def chat(folder, messages: list[str], *argv: str) -> subprocess.CompletedProcess:
    command = [*COMMAND, "--model", str(folder), "--max-new-tokens", str(TOKENS), *argv]
    return subprocess.run(command, input="\n".join(messages), capture_output=True, text=True)


def test_lines_of_a_file_are_messages_and_the_answers_are_lines(folder, model, tokenizer):
    done = chat(folder, ["\ufeffTell me.", "", "/new", "/help", "Tell me."])
    assert done.returncode == 0
    expected = tokenizer.decode(one_shot(model, tokenizer, ["Tell me."]))
    assert done.stdout == 2 * (expected + "\n")
    statistics = re.findall(r"\[12 tokens, .* tokens/s, tau .*written by .*\]", done.stderr)
    assert len(statistics) == 2
    assert "a new conversation" in done.stderr
    assert "/quit" in done.stderr                            # of /help


def test_no_sign_is_printed_among_answers_that_go_to_a_file(folder, tmp_path):
    keyboard, terminal = pty.openpty()
    command = [*COMMAND, "--model", str(folder), "--max-new-tokens", "3", "--json"]
    with open(tmp_path / "answers", "w") as answers:
        running = subprocess.Popen(
            command, stdin=terminal, stdout=answers, stderr=subprocess.DEVNULL)
        os.write(keyboard, b"Tell me.\n/quit\n")
        assert running.wait(timeout=120) == 0
    [line] = (tmp_path / "answers").read_text().splitlines()
    assert json.loads(line)["message"] == "Tell me."


def test_json_is_one_object_a_turn(folder, model, tokenizer):
    done = chat(folder, [*MESSAGES[:2], "/quit", "not asked"], "--json", "--drafter", "layers")
    turns = [json.loads(line) for line in done.stdout.splitlines()]
    assert [turn["message"] for turn in turns] == MESSAGES[:2]
    assert turns[1]["tokens"] == one_shot(
        model, tokenizer, [MESSAGES[0], turns[0]["text"], MESSAGES[1]])
    assert not turns[1]["interrupted"]
    assert sum(turns[1]["sources"].values()) == TOKENS


def test_without_a_terminal_ctrl_c_ends_the_program_after_what_was_said(tmp_path):
    folder = small_folder(tmp_path / "model", context=8192)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    command = [*COMMAND, "--model", str(folder), "--max-new-tokens", "6000"]
    run = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True, bufsize=0)
    run.stdin.write("Tell me.\nAnd then?\n")
    assert run.stdout.read(20)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert err.count("interrupted; [") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize("argv, word", [
    (["--trace", "run.html"], "--trace is for one text"),
    (["--compare"], "--compare is for one text"),
    (["--max-new-tokens", "0"], "at least 1"),
    (["--temperature", "-1"], "temperature"),
])
def test_what_cannot_be_is_refused(folder, argv, word):
    done = chat(folder, ["Hello"], *argv)
    assert done.returncode == 2
    assert word in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout.strip()


def test_a_message_that_is_no_text_is_refused(folder):
    command = [*COMMAND, "--model", str(folder)]
    done = subprocess.run(command, input=b"caf\xe9\n", capture_output=True)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1


def test_a_conversation_goes_on_where_standard_error_is_closed(folder, tokenizer, model):
    command = shlex.join([*COMMAND, "--model", str(folder), "--max-new-tokens", str(TOKENS)])
    done = subprocess.run(f"echo 'Tell me.' | {command} 2>&-", shell=True, capture_output=True)
    assert done.returncode == 0
    assert done.stdout.decode() == tokenizer.decode(one_shot(model, tokenizer, ["Tell me."])) + "\n"


def test_a_model_without_a_chat_template_is_refused(tmp_path):
    done = chat(small_folder(tmp_path / "plain"), ["Hello"])
    assert done.returncode == 2
    assert "no chat template" in done.stderr
    assert done.stderr.count("\n") == 1


# ---------------------------------------------------------------- a terminal

class Terminal:
    """The program on a pseudo-terminal: what is typed, and all that is shown."""

    def __init__(self, *argv: str):
        self.screen, inside = pty.openpty()
        self.run = subprocess.Popen([*COMMAND, *argv], stdin=inside, stdout=inside, stderr=inside,
                                    preexec_fn=os.setsid)
        os.close(inside)
        self.shown = ""

    def type(self, text: str):
        os.write(self.screen, text.encode())

    def wait_for(self, pattern: str) -> str:
        """Read until a pattern is shown; what was shown up to its end."""
        while not (found := re.search(pattern, self.shown)):
            self.shown += os.read(self.screen, 4096).decode(errors="replace")
        before = self.shown[:found.end()]
        self.shown = self.shown[found.end():]
        return before


def test_on_a_terminal_ctrl_c_stops_an_answer_and_the_talk_goes_on(tmp_path):
    folder = small_folder(tmp_path / "model", context=8192)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    terminal = Terminal("--model", str(folder), "--max-new-tokens", "6000")
    terminal.wait_for("/quit or Ctrl-D ends")
    terminal.wait_for("> ")
    terminal.type("Tell me.\r")
    terminal.wait_for(r"Tell me\.[^>]{80}")                  # the answer has begun
    terminal.run.send_signal(signal.SIGINT)
    terminal.wait_for(r"interrupted; \[\d+ tokens")
    terminal.wait_for("> ")
    terminal.type("/help\r")
    terminal.wait_for("/new starts over")
    terminal.wait_for("> ")
    terminal.type("And then?\r")
    terminal.wait_for(r"And then\?[^>]{80}")
    terminal.run.send_signal(signal.SIGINT)
    terminal.wait_for(r"interrupted; \[\d+ tokens")
    terminal.wait_for("> ")
    terminal.type("\x04")                                    # Ctrl-D
    assert terminal.run.wait(timeout=60) == 0
    os.close(terminal.screen)


def test_on_a_terminal_a_line_that_is_no_text_is_not_taken_and_the_talk_goes_on(folder):
    terminal = Terminal("--model", str(folder), "--max-new-tokens", str(TOKENS))
    terminal.wait_for("> ")
    os.write(terminal.screen, b"\xff\xfe\r")
    terminal.wait_for("cannot read a message")
    terminal.wait_for("> ")
    terminal.type("Tell me.\r")
    terminal.wait_for(r"\[12 tokens")
    terminal.wait_for("> ")
    terminal.type("/quit\r")
    assert terminal.run.wait(timeout=60) == 0
    os.close(terminal.screen)


def test_common_prefix():
    for a, b, shared in [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 5, 3], 1)]:
        assert common_prefix(a, b) == common_prefix(b, a) == shared
    assert common_prefix([1, 2], [1, 2]) == 2
