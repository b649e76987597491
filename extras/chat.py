"""A conversation: turn after turn with one KV cache and one drafter.

``Conversation.answer`` gives the answer to a message, in pieces. The chat template is asked for the
*whole* conversation each time, and what the cache holds already, the longest common prefix of the
token ids, does not go through the model again. So a template that rewrites earlier turns stays
right, and costs time only. The drafter keeps what it learned; its text is all that was said.

``talk`` is the loop over messages, on a terminal or from a file.
"""
import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import takewhile

from extras.memory import is_out_of_memory
from model import KVCache, Llama, ModelError
from speculative import (
    Drafter,
    SettingsError,
    Stats,
    autoregressive,
    decode,
    require_readable,
)

HELP = "/new starts over, /quit or Ctrl-D ends, Ctrl-C stops an answer, /help says this"
SIGN = "> "                   # asks for a message
BYTE_ORDER_MARK = "\ufeff"    # files of some editors begin with it


class UnanswerableError(SettingsError):
    """A message that cannot be answered, for example since the context is full.

    The conversation is as it was.
    """


class Conversation:
    """What was said, and what the model's cache holds of it."""

    def __init__(
        self,
        model: Llama,
        tokenizer,
        drafter: Drafter | None,
        max_new_tokens: int,
        passes: dict[str, int] | None = None,
        **sampling,
    ):
        """tokenizer: a ``checkpoint.Tokenizer``, with a chat template. drafter: None is plain
        decoding. max_new_tokens: of an answer. The rest: see ``speculative.new_text``.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.drafter = drafter
        self.max_new_tokens = max_new_tokens
        self.passes = passes or {}
        self.sampling = sampling
        self.scratch = max(self.passes.get("width", 1), drafter.scratch if drafter else 0)
        self.cache = KVCache(model, 1, self.scratch)
        self.start_over()
        tokenizer.encode(["Hello"], chat=True)           # refuses a model without a template

    def start_over(self):
        self.messages: list[str] = []                    # the user's and the model's in turn
        self.known: list[int] = []                       # the tokens that the cache holds
        self.stats = Stats()                             # of the last answer
        self.prefilled = 0                               # tokens that its prefill computed

    def answer(self, message: str) -> Iterator[str]:
        """The answer in pieces. If the caller stops early, what was said so far is kept; then close
        it (``contextlib.closing``) before the next: they share one cache.

        The stop token that ends an answer is no part of it, though it were not special: a template
        has its own.

        Raises UnanswerableError if the context or the memory has no room for an answer, the
        template refuses the message, or it has tokens that the model does not know.
        """
        self.stats = Stats()                             # first, since Ctrl-C may come any time
        self.prefilled = 0
        try:
            prompt = self.tokenizer.encode([*self.messages, message], chat=True)
            count = self.room_after(prompt)
            require_readable(self.model.config, prompt)
            self.make_room(len(prompt) + count)
        except (ModelError, SettingsError) as error:
            raise UnanswerableError(str(error)) from None
        shared = common_prefix(self.known, prompt[:-1])
        self.known = prompt[:shared]                     # more, once it is computed
        self.cache.length = shared
        self.prefilled = len(prompt) - 1 - shared
        said = []
        try:
            spoken = takewhile(self.goes_on, self.tokens(prompt, count))
            for piece in self.tokenizer.stream(prompt, spoken):
                said.append(piece)
                yield piece
        finally:
            if self.stats.tokens:
                self.known = [*prompt, *self.stats.tokens[:-1]]
                self.messages += [message, "".join(said)]

    def tokens(self, prompt: list[int], count: int) -> Iterator[int]:
        settings = {"stats": self.stats, "cache": self.cache, **self.sampling}
        if self.drafter is None:
            return autoregressive(self.model, prompt, count, **settings)
        return decode(self.model, prompt, count, self.drafter, **self.passes, **settings)

    def goes_on(self, token: int) -> bool:
        return token not in self.sampling.get("stop", ())

    def room_after(self, prompt: list[int]) -> int:
        """How many tokens the answer may have."""
        context = self.model.config.max_position_embeddings
        left = context - len(prompt)
        if left < 1:
            raise SettingsError(
                f"no room for an answer: with this message the conversation has {len(prompt)} "
                f"tokens, and the model's context {context}; /new starts over, a shorter message "
                "may fit")
        return min(self.max_new_tokens, left)

    def make_room(self, tokens: int):
        """A larger cache, if need be, with what the old one holds."""
        if tokens <= self.cache.tokens:
            return
        context = self.model.config.max_position_embeddings
        try:
            larger = KVCache(self.model, min(context, 2 * tokens), self.scratch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise SettingsError(f"no memory for {tokens} tokens; /new starts over") from None
        held = len(self.known)
        larger.slots[..., :held, :] = self.cache.slots[..., :held, :]
        larger.length = held
        self.cache = larger


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens two lists share at their beginning."""
    pairs = zip(a, b)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


# ---------------------------------------------------------------------------- messages, one by one

def talk(conversation: Conversation, as_json: bool, say: Callable[[str], None]):
    """Answer messages until there are no more. say: prints a line to standard error.

    On a terminal there are a sign, line editing and history; else, or if what is printed goes to a
    file, each line is a message. With ``as_json`` an answer is one JSON object.
    """
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()     # the sign goes to standard output
    if on_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing and history for input()
        say(HELP)
    while (message := read_message(on_terminal, say)) != "/quit":
        if message == "/new":
            conversation.start_over()
            say("a new conversation")
        elif message == "/help":
            say(HELP)
        elif message:
            interrupted = take_turn(conversation, message, as_json, say)
            if interrupted and not on_terminal:
                raise KeyboardInterrupt


def read_message(on_terminal: bool, say: Callable[[str], None]) -> str:
    """A line without the white space around it; /quit at the end of the input.

    Raises SettingsError for bytes that are no UTF-8; on a terminal it says so, and the line is "".
    """
    if not on_terminal:
        line = sys.stdin.readline()
        require_text(line)
        return line.removeprefix(BYTE_ORDER_MARK).strip() if line else "/quit"
    try:
        line = input(SIGN)
        require_text(line)
        return line.strip()
    except SettingsError as error:
        say(str(error))
        return ""
    except EOFError:
        print()
        return "/quit"
    except KeyboardInterrupt:                            # drops the line that was begun
        print()
        return ""


def require_text(line: str):
    try:
        line.encode()                                    # bytes that are no UTF-8 were read so far
    except UnicodeEncodeError as error:
        raise SettingsError(f"cannot read a message: {error}") from None


def take_turn(
    conversation: Conversation, message: str, as_json: bool, say: Callable[[str], None]
) -> bool:
    """Answer a message, and print it all; did Ctrl-C end it?"""
    said = []
    interrupted = False
    try:
        with contextlib.closing(conversation.answer(message)) as pieces:
            for piece in pieces:
                said.append(piece)
                if not as_json:
                    print(piece, end="", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    except UnanswerableError as error:
        say(str(error))
        if as_json:
            print(json.dumps({"message": message, "error": str(error)}), flush=True)
        return False
    if as_json:
        print(json.dumps(turn_as_json(conversation, message, "".join(said), interrupted)),
              flush=True)
    else:
        print(flush=True)
    say(("interrupted; " if interrupted else "") + summary(conversation))
    return interrupted


def summary(conversation: Conversation) -> str:
    """Statistics of the last answer in a line: speed, tau, and who wrote its tokens."""
    stats = conversation.stats
    wrote = Counter(source or "the whole model" for source in stats.sources)
    shares = ", ".join(f"{name} {count}" for name, count in wrote.most_common())
    return (f"[{stats.new_tokens} tokens, {stats.tokens_per_second:.1f} tokens/s, tau "
            f"{stats.tau:.2f}; written by {shares or 'nobody'}; prefill: {conversation.prefilled} "
            f"tokens in {stats.prefill_seconds:.2f} s]")


def turn_as_json(
    conversation: Conversation, message: str, text: str, interrupted: bool
) -> dict:
    stats = conversation.stats
    return {
        "message": message,
        "text": text,
        "tokens": stats.tokens,
        "interrupted": interrupted,
        "prefilled": conversation.prefilled,
        "prefill_seconds": stats.prefill_seconds,
        "seconds": stats.seconds,
        "tokens_per_second": stats.tokens_per_second,
        "tau": stats.tau,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "sources": Counter(source or "model" for source in stats.sources),
    }
