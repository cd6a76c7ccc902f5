"""What several subcommands share of their arguments and options: one name, one type, one line of help each."""

import json
import sys
from collections.abc import Callable
from enum import Enum
from typing import Annotated

import typer

_TEXT = "From what text"


class KvType(str, Enum):
    float16 = "float16"
    float32 = "float32"


def argument(kind, metavar: str, help: str):
    return Annotated[kind, typer.Argument(metavar=metavar, help=help, show_default=False)]


def option(
    kind,
    *names: str,
    help: str,
    metavar: str | None = None,
    shown: bool = False,
    section: str | None = None,
    parser: Callable | None = None,
):
    """An option's annotation. shown: its default, in the help. section: of the help. parser: from its text to `kind`,
    raising ValueError."""
    return Annotated[
        kind,
        typer.Option(*names, metavar=metavar, help=help, show_default=shown, rich_help_panel=section, parser=parser),
    ]


def tokens_of(text: str | int) -> int:
    """A number of tokens: 4096, 4,096 or 4k, which is 4 x 1024."""
    digits = str(text).strip().lower().replace(",", "")
    try:
        return int(float(digits[:-1]) * 1024) if digits.endswith("k") else int(digits)
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"{text!r} is not a number of tokens, as 4096 or 32k") from None


Bundle = argument(str, "BUNDLE", "A bundle's directory, NAME.emoe.")
Json = option(bool, "--json", help="Print one JSON object and nothing else.")
Ram = option(
    str, "--ram", metavar="SIZE", shown=True,
    help="Cap on all memory, as 8GB, 8GiB or 50% of what is free; auto: 80% of that, max: all of it.",
)  # fmt: skip
Context = option(
    int | None, "--context", metavar="N", parser=tokens_of,
    help="Tokens to hold, as 4096 or 32k [default: 4096 or the model's own].",
)  # fmt: skip
Kv = option(KvType, "--kv", shown=True, help="What the KV cache is kept in; float32 takes twice the memory.")
Device = option(
    str, "--device", metavar="NAME", shown=True,
    help="Where to compute: cpu, cuda, or auto, a GPU where this build has code for one; no Metal yet.",
)  # fmt: skip
Threads = option(int | None, "--threads", metavar="N", help="Threads of computation [default: all cores].")
Prune = option(
    str | None, "--prune", metavar="off|bundle|SHARE|RULE",
    help="Leave out experts that a token hardly needs: a share of their uses, as 0.2, or loss, otp, share or odp "
    "[default: off, where the bundle sets no other].",
)  # fmt: skip

# Of generate and chat
PROMPT_SECTION = "Prompt"
System = option(
    str | None,
    "--system",
    metavar="TEXT",
    section=PROMPT_SECTION,
    help="A system prompt, for a model with a chat template.",
)
Thinking = option(
    bool | None, "--thinking/--no-thinking", section=PROMPT_SECTION,
    help="Tell the chat template whether to let the model think first.",
)  # fmt: skip
TemplateKwargs = option(
    str | None, "--chat-template-kwargs", metavar="JSON", section=PROMPT_SECTION,
    help="Tell it more, as '{\"reasoning_effort\": \"low\"}'.",
)  # fmt: skip
# Of compress and prune
CalibrationFiles = option(
    list[str] | None, "--calibration", metavar="FILE", section=_TEXT,
    help="Text or .npy of token ids; repeatable [default: Python's standard library].",
)  # fmt: skip
HeldOutFiles = option(
    list[str] | None, "--held-out", metavar="FILE", section=_TEXT,
    help="Other text, to certify on; repeatable [default: the end of --calibration's].",
)  # fmt: skip
CalibrationTokens = option(int, "--tokens", metavar="N", shown=True, section=_TEXT, help="Tokens to calibrate on.")
CalibrationSeed = option(
    int, "--seed", metavar="N", shown=True, section=_TEXT, help="Draws the default calibration text."
)


def prune_of(text: str | None) -> float | str | None:
    """off, bundle, a rule's name, or a share of expert uses."""
    try:
        return text and float(text)
    except ValueError:
        return text


def given(**values) -> dict:
    """The options that were given, by name."""
    return {name: value for name, value in values.items() if value is not None}


def template_kwargs(thinking: bool | None, text: str | None) -> dict | None:
    """What the chat template is told beside the messages."""
    try:
        told = json.loads(text) if text else {}
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise ValueError(f'chat-template-kwargs {text!r} is not a JSON object, as {{"enable_thinking": false}}')
    return told | given(enable_thinking=thinking) or None


def system_messages(system: str | None) -> list[dict]:
    """What a conversation begins with."""
    return [] if system is None else [{"role": "system", "content": system}]


def stdin_has_text() -> bool:
    """Whether stdin is a pipe or a file, not a terminal that would be waited for."""
    return not sys.stdin.isatty()
