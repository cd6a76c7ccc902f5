"""The interactive chat of the command line: commands, and streamed answers that can be interrupted.

Answers go to stdout, everything else to stderr. The whole conversation is passed for each answer: the Runtime computes
only what its KV cache does not hold. No message is dropped unless that was asked for: a full context is an error.
"""

import re
import sys
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from .conversation import Conversation, Turn, thoughts_in_prompts
from .line_input import LineInput, MessageTooLong
from .named_session import NamedSession
from .report import size, statistics_text
from .runtime.channels import opened_thought
from .runtime.prompt import PromptTooLong
from .runtime.runtime import Generation, Runtime
from .terminal import AnswerWriter, PromptProgress, printable, show

HELP = '''\
/clear          start a new conversation (also /reset); the system prompt stays
/undo           forget the last message and its answer
/retry          answer the last message again
/continue       continue an answer that was cut off
/drop [N]       forget the oldest N messages and their answers [default: 1]
/system [TEXT]  show or set the system prompt
/temp [T]       show or set the temperature
/ram [SIZE]     show or set the memory cap, effective at once
/save FILE      write the conversation to a file, as JSON messages if its name ends in .json
/stats          speed, hits and memory of the last answer
/exit           leave (also /bye, Ctrl-D)
/help           this list
Three quotes (""") begin a message of several lines and three more end it; a space before a / makes it a message.
Ctrl-C stops an answer and keeps its text so far; pressed twice at an empty prompt, it leaves.'''
LEAVE = ("/exit", "/quit", "/bye")
COMMAND = re.compile(r"/[a-z?]+(\s|$)")  # a path such as /usr/bin is not a command
MAKES_ROOM = "/drop N forgets the oldest messages, /clear all"
ROOM = 0.75  # maximum share of the context for the prompt after the oldest turns were dropped


@dataclass(slots=True)
class Chat:
    """A conversation with a Runtime. options: for Runtime.stream(). template: arguments of the chat template beside the
    messages. drop_oldest: drop the oldest turns if the context is full."""

    runtime: Runtime
    options: dict
    conversation: Conversation
    template: dict | None = None
    drop_oldest: bool = False
    session: NamedSession | None = None  # where the turns are kept
    said_later: list[str] = field(default_factory=list)  # to be said before the next message, by any thread
    last: Generation | None = None  # the last piece of the last answer

    def answer(self, message: str) -> None:
        """Stream the answer to a message, and add both to the conversation."""
        said = self.conversation
        try:
            dropped = self._to_drop(message)
            ids = self._ids(said.prompt(message, dropped))
        except PromptTooLong as error:
            return _say(f"{error}; this message was not kept: {MAKES_ROOM}")
        except ValueError as error:  # the chat template refuses the message, or it is not text
            return _say(f"{error}; this message was not kept")
        if (turn := self._stream(message, ids)) is not None:
            if dropped:
                _say(f"the context was full; dropped from the conversation: the oldest {_messages(dropped)}")
            said.turns = [*said.turns[dropped:], turn]

    def continue_answer(self) -> None:
        """Continue the last answer as if it had not been cut off."""
        turns = self.conversation.turns
        if not turns or turns[-1].complete:
            return _say("the last answer is complete" if turns else "nothing was said yet")
        message, before = turns[-1].message, turns[-1]
        said = replace(self.conversation, turns=turns[:-1])
        ids = self._ids(said.prompt(message)) + before.tokens
        if len(ids) >= self.runtime.plan.context:
            return _say(f"the context of {self.runtime.plan.context:,} tokens is full: {MAKES_ROOM}")
        if (turn := self._stream(message, ids, before)) is not None:
            turns[-1] = turn

    def _ids(self, prompt) -> list[int]:
        return self.runtime._prompt_ids(prompt, chat_template_kwargs=self.template)

    def _to_drop(self, message: str) -> int:
        """The number of oldest turns to leave out of the prompt."""
        turns, context = self.conversation.turns, self.runtime.plan.context
        for dropped in range(len(turns) + 1 if self.drop_oldest else 0):
            try:
                tokens = len(self._ids(self.conversation.prompt(message, dropped)))
            except PromptTooLong:
                continue
            if tokens <= (context if dropped == 0 else ROOM * context):
                return dropped
        return 0

    def _stream(self, message: str, ids: list[int], before: Turn | None = None) -> Turn | None:
        """Stream the continuation of ids, which end with the answer of `before` if given.

        Returns None if Ctrl-C came before the first piece."""
        tokenizer = self.runtime.tokenizer
        opened = "" if before or not self.conversation.templated else opened_thought(tokenizer, ids)
        said, tokens = (before.answer, list(before.tokens)) if before else (opened, [])
        writer, last, interrupted = AnswerWriter(sys.stdout, bool(opened)), None, False
        try:
            with (
                PromptProgress() as progress,
                closing(self.runtime.stream(ids, progress=progress, **self.options)) as pieces,
            ):
                for piece in pieces:
                    text = piece.text
                    if last is None and before:  # a token's text may depend on the one before it
                        text = tokenizer.decode(tokens + piece.tokens)[len(tokenizer.decode(tokens)) :]
                    last, tokens, said = piece, tokens + piece.tokens, said + text
                    writer.write(text)
        except KeyboardInterrupt:
            if self.runtime.rank_count > 1:  # mlx.launch has ended, and with it the input of all ranks
                writer.end()
                raise
            interrupted = True
        except BaseException:
            writer.end()  # ends dim text
            raise
        if last is None:
            _say("stopped before an answer" + ("" if before else "; this message was not kept"))
            return None
        writer.end()
        self.last = last
        full = last.prompt_tokens + last.generation_tokens > self.runtime.plan.context
        if interrupted:
            _say("stopped")
        elif last.finish_reason == "length":
            _say(
                f"the context of {self.runtime.plan.context:,} tokens is full and the answer was cut: {MAKES_ROOM}"
                if full
                else f"stopped after {last.generation_tokens:,} tokens; /continue goes on, -n raises that"
            )
        return Turn(message, said, tokens, last.finish_reason == "stop")

    def keep(self) -> None:
        """Write the turns to the session's file."""
        if self.session is None:
            return
        try:
            self.session.keep(self.conversation)
        except OSError as error:
            _say(f"{error.filename or self.session.directory}: {error.strerror}; the session is not saved")

    # Commands; the argument is the text after the command's name

    def clear(self, _: str) -> None:
        self.runtime.reset()
        self.conversation.turns = []
        _say("a new conversation")

    def undo(self, _: str) -> None:
        if not self.conversation.turns:
            return _say("nothing was said yet")
        _say(f"forgotten: {_beginning(self.conversation.turns.pop().message)}")

    def retry(self, _: str) -> None:
        if not self.conversation.turns:
            return _say("nothing was said yet")
        turn = self.conversation.turns.pop()
        kept = len(self.conversation.turns)
        self.answer(turn.message)
        if len(self.conversation.turns) == kept:  # not answered: nothing is lost
            self.conversation.turns.append(turn)

    def drop(self, given: str) -> None:
        turns = self.conversation.turns
        if not (given or "1").isdigit() or not 1 <= int(given or "1") <= len(turns):
            return _say(f"/drop N takes 1 to {len(turns):,}" if turns else "nothing was said yet")
        del turns[: int(given or "1")]
        _say(f"{_messages(len(turns))} left")

    def system(self, given: str) -> None:
        if not self.conversation.templated:
            return _say("this model has no chat template and takes no system prompt")
        if given:
            self.conversation.system = given
        _say(f"system prompt: {printable(self.conversation.system or 'none')}")

    def temp(self, given: str) -> None:
        if given:
            try:
                changed = {**self.options, "temperature": float(given)}
                self.runtime.stream("x", **changed).close()  # checks it
            except ValueError:
                return _say(f"temperature is {given!r}, expected 0 or more")
            self.options = changed
        _say(f"temperature {self.options['temperature']:g}")

    def ram(self, given: str) -> None:
        if given:
            try:
                self.runtime.set_ram(given)
            except (MemoryError, ValueError) as error:  # BelowFloor is one
                return _say(str(error))
        plan = self.runtime.plan
        share = min(plan.experts_bytes / plan.all_experts_bytes, 1)
        _say(f"cap {size(plan.ram_bytes)}, with memory for {share:.0%} of the experts")

    def save(self, given: str) -> None:
        if not given:
            return _say("name a file: /save FILE")
        if self.runtime.rank:
            return None  # the first rank saves it
        try:
            self.conversation.save(Path(given).expanduser())
        except FileExistsError:
            return _say(f"{given} exists already; choose another name")
        except OSError as error:
            return _say(f"{given}: {error.strerror}")
        _say(f"{given}: {_messages(len(self.conversation.turns))} and what was answered")

    def stats(self, _: str) -> None:
        if self.last is None:
            return _say("nothing was generated yet")
        context = self.runtime.plan.context
        used = min(self.last.prompt_tokens + self.last.generation_tokens, context)
        _say(f"{statistics_text(self.last)}\ncontext {used:,} of {context:,} tokens")

    def run(self, line: str) -> None:
        """Run a command line such as `/drop 2`."""
        name, _, given = line.strip().partition(" ")
        commands = {
            "/clear": self.clear,
            "/reset": self.clear,
            "/undo": self.undo,
            "/retry": self.retry,
            "/continue": lambda _: self.continue_answer(),
            "/drop": self.drop,
            "/system": self.system,
            "/temp": self.temp,
            "/ram": self.ram,
            "/save": self.save,
            "/stats": self.stats,
            "/help": lambda _: _say(HELP),
            "/?": lambda _: _say(HELP),
        }
        if name in commands:
            commands[name](given.strip())
            self.keep()
        else:
            _say(f"no command {name}; /help lists them, and a space before it makes it a message")


def chat(
    runtime: Runtime,
    options: dict,
    template: dict | None = None,
    *,
    system: str | None = None,
    drop_oldest: bool = False,
    keep_history: bool = True,
    session: NamedSession | None = None,
    said_later: list[str] | None = None,
) -> None:
    """Read messages from stdin until end of input or /exit. options: for Runtime.stream(); the rest is as for Chat.

    Raises ValueError at once for invalid options or a bundle that cannot chat.
    """
    path, tokenizer = runtime.bundle.path, runtime.tokenizer
    if tokenizer is None:
        raise ValueError(f"{path}: this bundle has no tokenizer; chat needs one")
    templated = tokenizer.chat_template is not None
    if system is not None and not templated:
        raise ValueError(f"{path}: this model has no chat template; --system needs one")
    runtime.stream("x", **options).close()  # checks the options
    _say(f"{path.name}, context {runtime.plan.context:,} tokens, {_residency(runtime.plan)}; /help lists commands")
    if not templated:
        _say("this model has no chat template: it continues the text of the whole conversation")
    conversation = Conversation(templated, system, thoughts=thoughts_in_prompts(tokenizer))
    later = [] if said_later is None else said_later
    talk = Chat(runtime, options, conversation, template, drop_oldest, session, later)
    if session:
        _say(session.resume(runtime, conversation))
    _converse(talk, keep_history)
    if session and runtime.keeps_sessions:
        runtime.save_sessions()


def _converse(talk: Chat, keep_history: bool) -> None:
    lines, leaving = LineInput(keep_history, talk.runtime.prompt_bytes_limit), False
    while True:
        while talk.said_later:
            _say(talk.said_later.pop(0))
        try:
            message = lines.message()
            leaving = False
        except MessageTooLong as error:
            _say(f"{error}; this message was not kept")
            continue
        except KeyboardInterrupt:
            _say("")
            if talk.runtime.rank_count > 1 or (leaving and not lines.half_typed()):
                return
            leaving = not lines.half_typed()
            if leaving:
                _say("Ctrl-C again, Ctrl-D or /exit leaves")
            continue
        if message is None or message.strip() in LEAVE:
            return
        if COMMAND.match(message):
            talk.run(message)
        elif message.strip():
            talk.answer(message)
            talk.keep()


def _residency(plan) -> str:
    if plan.resident:
        return "every expert in memory"
    share = f"{plan.experts_bytes / plan.all_experts_bytes:.0%} of the experts in memory"
    knee = f" (below {size(plan.working_set_cap_bytes)} every token reads from storage)"
    return share + ("" if plan.holds_working_set else knee)


def _messages(count: int) -> str:
    return "1 message" if count == 1 else f"{count:,} messages"


def _beginning(message: str) -> str:
    line = printable(message.strip().splitlines()[0])
    return line if len(line) <= 60 else line[:59] + "…"


def _say(text: str) -> None:
    show(text, sys.stderr)
