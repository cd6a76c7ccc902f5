"""What several subcommands share of their arguments and options: one name, one type, one line of help each."""

from enum import Enum
from typing import Annotated

import typer

_TEXT = "From what text"


class KvType(str, Enum):
    float16 = "float16"
    float32 = "float32"


class DeviceName(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def argument(kind, metavar: str, help: str):
    return Annotated[kind, typer.Argument(metavar=metavar, help=help, show_default=False)]


def option(kind, *names: str, help: str, metavar: str | None = None, shown: bool = False, section: str | None = None):
    return Annotated[
        kind, typer.Option(*names, metavar=metavar, help=help, show_default=shown, rich_help_panel=section)
    ]


Bundle = argument(str, "BUNDLE", "A bundle's directory, NAME.emoe.")
Json = option(bool, "--json", help="Print one JSON object and nothing else.")
Ram = option(
    str, "--ram", metavar="SIZE", shown=True, help="Cap on all memory, as 8GB or 8GiB; auto: 80 % of what is free."
)
Context = option(int | None, "--context", metavar="N", help="Tokens to hold [default: 4096 or the model's own].")
Kv = option(KvType, "--kv", shown=True, help="What the KV cache is kept in; float32 takes twice the memory.")
Device = option(
    DeviceName, "--device", metavar="NAME", shown=True,
    help="Where to compute: cpu, cuda, or auto, a GPU where this build has code for one.",
)  # fmt: skip
Threads = option(int | None, "--threads", metavar="N", help="Threads of computation [default: all cores].")
Prune = option(
    str | None, "--prune", metavar="off|bundle|SHARE|RULE",
    help="Leave out experts that a token hardly needs: a share of their uses, as 0.2, or loss, otp, share or odp "
    "[default: bundle, where it is calibrated].",
)  # fmt: skip

# Of generate and chat
MaxTokens = option(int, "-n", "--max-tokens", metavar="N", shown=True, help="Most tokens of an answer.")
SamplingSeed = option(int | None, "--seed", metavar="N", help="The same seed gives the same text.")

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
