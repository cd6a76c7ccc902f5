"""Arguments and options that several subcommands share, each with its name, type and help."""

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
    """The annotation of an option. shown: show the default in the help. section: of the help. parser: converts text to
    `kind`, or raises ValueError."""
    return Annotated[
        kind,
        typer.Option(*names, metavar=metavar, help=help, show_default=shown, rich_help_panel=section, parser=parser),
    ]


def tokens_of(text: str | int) -> int:
    """Parse a number of tokens: 4096, 4,096 or 4k, which is 4 x 1024."""
    digits = str(text).strip().lower().replace(",", "")
    try:
        return int(float(digits[:-1]) * 1024) if digits.endswith("k") else int(digits)
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"{text!r} is not a number of tokens such as 4096 or 32k") from None


Bundle = argument(str, "BUNDLE", "A bundle's directory, NAME.emoe, or its name on the hub, ORG/NAME[@REVISION].")
Json = option(bool, "--json", help="Print one JSON object and nothing else.")
Ram = option(
    str, "--ram", metavar="SIZE", shown=True,
    help="Cap on all memory of the process: 8GB, 8GiB, or 50% of free memory; max: all of it; auto: 80% of it, which "
    "chat and serve lower while other programs need memory.",
)  # fmt: skip
RamShare = option(
    str | None, "--ram-share", metavar="NAME",
    help="Share --ram with the other processes that name this share: each has what it needs at the least, and an equal "
    "part of the rest.",
)  # fmt: skip
Context = option(
    int | None, "--context", metavar="N", parser=tokens_of,
    help="Tokens of context, such as 4096 or 32k [default: 4096, or the model's own if smaller].",
)  # fmt: skip
Kv = option(KvType, "--kv", shown=True, help="Type of the KV cache; float32 takes twice the memory.")
Device = option(
    str, "--device", metavar="NAME", shown=True,
    help="Where to compute: cpu, cuda, mlx (a Mac's GPU), or auto: a GPU if this build has code for it, and on a Mac "
    "MLX if it is installed.",
)  # fmt: skip
Threads = option(int | None, "--threads", metavar="N", help="Compute threads [default: all cores].")
Prune = option(
    str | None, "--prune", metavar="off|bundle|SHARE|RULE",
    help="Leave out experts that a token hardly needs: a share of all expert uses, such as 0.2, or a rule: loss, otp, "
    "share or odp [default: the bundle's, which is off unless set].",
)  # fmt: skip

# Of generate and chat
PROMPT_SECTION = "Prompt"
System = option(
    str | None,
    "--system",
    metavar="TEXT",
    section=PROMPT_SECTION,
    help="System prompt, for a model with a chat template.",
)
THINKING_VARIABLES = ("enable_thinking", "thinking")  # of chat templates, which have one of them
Thinking = option(
    bool | None, "--thinking/--no-thinking", section=PROMPT_SECTION,
    help="Tell the chat template whether to let the model think first.",
)  # fmt: skip
TemplateKwargs = option(
    str | None, "--chat-template-kwargs", metavar="JSON", section=PROMPT_SECTION,
    help="Further arguments of the chat template, such as '{\"reasoning_effort\": \"low\"}'.",
)  # fmt: skip
# Of compress and prune
CalibrationFiles = option(
    list[str] | None, "--calibration", metavar="FILE", section=_TEXT,
    help="Text to calibrate on, or token ids (.npy); repeatable [default: Python's standard library].",
)  # fmt: skip
HeldOutFiles = option(
    list[str] | None, "--held-out", metavar="FILE", section=_TEXT,
    help="Other text, to certify on; repeatable [default: the last part of each calibration text].",
)  # fmt: skip
CalibrationTokens = option(int, "--tokens", metavar="N", shown=True, section=_TEXT, help="Tokens to calibrate on.")
CalibrationSeed = option(
    int, "--seed", metavar="N", shown=True, section=_TEXT, help="Random seed, which also selects the default text."
)


def prune_of(text: str | None) -> float | str | None:
    """Parse off, bundle, the name of a rule, or a share of expert uses."""
    try:
        return text and float(text)
    except ValueError:
        return text


def given(**values) -> dict:
    """The options that were given, by name."""
    return {name: value for name, value in values.items() if value is not None}


def template_kwargs(thinking: bool | None, text: str | None) -> dict | None:
    """The arguments of the chat template beside the messages."""
    try:
        told = json.loads(text) if text else {}
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise ValueError(f'chat-template-kwargs {text!r} is not a JSON object such as {{"enable_thinking": false}}')
    return told | given(**dict.fromkeys(THINKING_VARIABLES, thinking)) or None


def thinking_note(tokenizer, thinking: bool | None) -> str | None:
    """What to say where the chat template has no variable for --thinking and --no-thinking."""
    if thinking is None or tokenizer is None or tokenizer.chat_template is None:
        return None
    variables = tokenizer.template_variables()
    if not variables.isdisjoint(THINKING_VARIABLES):
        return None
    other = "; it has reasoning_effort, for --chat-template-kwargs" if "reasoning_effort" in variables else ""
    return f"this model's chat template cannot be told whether to think{other}"


def system_messages(system: str | None) -> list[dict]:
    """The messages at the start of a conversation."""
    return [] if system is None else [{"role": "system", "content": system}]


def stdin_has_text() -> bool:
    """Whether stdin is a pipe or a file, not a terminal, where reading would wait for input."""
    return not sys.stdin.isatty()
