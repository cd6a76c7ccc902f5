"""The chat of the command line: a conversation that is kept, streamed answers, and a way out of each.

Answers go to stdout, everything else to stderr. The whole conversation is passed every time: the Runtime computes only
what its KV cache does not hold. Nothing is ever dropped from a conversation: a full context is said, not hidden.
"""

import sys
from contextlib import closing, suppress

from edge_moe.report import statistics_text

HELP = """\
/reset   start a new conversation
/stats   speed, hits and memory of the last answer
/exit    leave (also Ctrl-D)
/help    this list
Ctrl-C stops an answer and keeps what it said; twice at the prompt it leaves."""


class Conversation:
    """What was said so far: messages where the model has a chat template, else one running text."""

    def __init__(self, templated: bool):
        self.templated = templated
        self.messages: list[dict] = []
        self.text = ""

    def asked(self, line: str):
        """The prompt if `line` were said now; nothing changes before answered()."""
        if self.templated:
            return [*self.messages, {"role": "user", "content": line}]
        return self.text + ("\n" if self.text else "") + line

    def answered(self, line: str, answer: str) -> None:
        prompt = self.asked(line)
        if self.templated:
            self.messages = [*prompt, {"role": "assistant", "content": answer}]
        else:
            self.text = prompt + answer


def chat(runtime, options: dict) -> None:
    """Read lines from stdin until it ends or /exit; `options` are Runtime.stream()'s.

    Raises ValueError at once for options that are wrong or a bundle without a tokenizer.
    """
    if runtime.tokenizer is None:
        raise ValueError(f"{runtime.bundle.path}: this bundle has no tokenizer; chat needs one")
    conversation = Conversation(runtime.tokenizer.chat_template is not None)
    runtime.stream("x", **options).close()  # checks the options
    _say(f"{runtime.bundle.path.name}, context {runtime.plan.context:,} tokens; /help lists commands")
    if not conversation.templated:
        _say("this model has no chat template: it continues the text of the whole conversation")
    last, leaving, ask = None, False, _reader()
    while True:
        try:
            line = ask()
            leaving = False
        except KeyboardInterrupt:
            if leaving:
                return _say("")
            leaving = True
            _say("\nCtrl-C again, Ctrl-D or /exit leaves")
            continue
        if line is None or line.strip() in ("/exit", "/quit"):
            return
        if not line.strip():
            continue
        if line.startswith("/"):
            conversation, last = _run_command(line.strip(), runtime, conversation, last)
        else:
            last = _answer(runtime, conversation, line, options) or last


def _run_command(line: str, runtime, conversation: Conversation, last):
    if line == "/reset":
        runtime.reset()
        _say("a new conversation")
        return Conversation(conversation.templated), last
    if line == "/stats":
        if last is None:
            _say("nothing was generated yet")
        else:
            used = last.prompt_tokens + last.generation_tokens
            _say(f"{statistics_text(last)}\ncontext {used:,} of {runtime.plan.context:,} tokens")
    else:
        _say(HELP if line == "/help" else f"no command {line}; /help lists them")
    return conversation, last


def _answer(runtime, conversation: Conversation, line: str, options: dict):
    """Stream one answer and keep it; returns its last piece, None when there is none."""
    said, last, interrupted = [], None, False
    try:
        with closing(runtime.stream(conversation.asked(line), **options)) as pieces:
            for last in pieces:
                said.append(last.text)
                sys.stdout.write(last.text)
                sys.stdout.flush()
    except KeyboardInterrupt:
        interrupted = True
    except ValueError as error:  # too long for the context, or refused by the chat template
        _say(f"{error}; this message was not kept, /reset starts a new conversation")
        return None
    if last is not None:
        print(flush=True)
        conversation.answered(line, "".join(said))
    if interrupted:
        _say("stopped" if last else "stopped before an answer; this message was not kept")
    elif last.finish_reason == "length":
        full = last.prompt_tokens + last.generation_tokens > runtime.plan.context
        _say(
            f"the context of {runtime.plan.context:,} tokens is full and the answer was cut; /reset starts a new one"
            if full
            else f"stopped after {last.generation_tokens:,} tokens; -n raises that"
        )
    return last


def _reader():
    """A function that returns the next line, None at the end; with line editing where there is a terminal."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):

        def read() -> str | None:
            line = sys.stdin.readline()
            return line.rstrip("\n") if line else None

        return read
    with suppress(ImportError):
        import readline  # noqa: F401 (input() uses it once it is imported)

    def ask() -> str | None:
        try:
            return input("> ")
        except EOFError:
            _say("")
            return None

    return ask


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
