"""The entry point of the command line: the program, its subcommands in order, and the handling of their errors.

Results go to stdout, messages to stderr; `--json` prints one object on stdout and nothing else. An expected error is
one line on stderr. Each subcommand is a file of edge_moe.commands.
"""

import functools
import os
import sys
import warnings
from contextlib import suppress
from typing import Annotated

import typer
from typer.core import TyperCommand, TyperGroup

from . import __version__
from .commands import (
    bench,
    chat,
    compress,
    demo,
    doctor,
    eval,
    generate,
    inspect,
    plan,
    prune,
    serve,
    spelling,
    split,
    verify,
)
from .commands.output import fail

WITHOUT_VALUE = {"--sweep-ram": str(bench.SWEEP_CAPS)}  # options whose number may be omitted, and its default


def main() -> None:
    """The entry point of `edge-moe` and `python -m edge_moe`."""
    _open_standard_streams()
    warnings.showwarning = lambda message, *_: print(f"edge-moe: warning: {message}", file=sys.stderr)
    with suppress(AttributeError, ValueError):  # some hosts have a stdout that is not a text file
        sys.stdout.reconfigure(errors="replace")
    try:
        app(prog_name="edge-moe")
    except KeyboardInterrupt:
        sys.exit(130)


def _open_standard_streams() -> None:
    """Open /dev/null for streams that the caller closed (`>&-`): else the next file opened would take their number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))


class Door(TyperGroup):
    """Finds subcommands by name, hints at the equivalents of other tools' names, and takes `help COMMAND`."""

    def resolve_command(self, ctx, args: list[str]):
        if args[0] == "help":
            args = [*args[1:2], "-h"]
        if args[0] in ("-h", "version"):
            print(ctx.get_help() if args[0] == "-h" else f"edge-moe {__version__}")
            ctx.exit()
        if args[0] in spelling.COMMANDS:
            ctx.fail(f"No such command {args[0]!r}; {spelling.COMMANDS[args[0]]}")
        return super().resolve_command(ctx, args)


class SectionedCommand(TyperCommand):
    """A command whose help shows options in sections, in order of first appearance, with the others at the end.

    The help is plain text: typer's panels would import rich for every command. Options of WITHOUT_VALUE need no value.
    """

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spelling.respelled(args, self.params, WITHOUT_VALUE, ctx.fail))

    def format_options(self, ctx, formatter) -> None:
        sections = {}
        for parameter in self.get_params(ctx):
            title = "Arguments" if parameter.param_type_name == "argument" else parameter.rich_help_panel
            if (record := parameter.get_help_record(ctx)) is not None:
                sections.setdefault(title or "Options", []).append(record)
        for title in sorted(sections, key=lambda title: title == "Options"):
            with formatter.section(title):
                formatter.write_dl(sections[title])


app = typer.Typer(
    cls=Door,
    name="edge-moe",
    help="Compress Mixture-of-Experts models and run them inside a hard RAM cap.",
    epilog="Start with `edge-moe demo`: it needs no download. `edge-moe COMMAND -h` explains a command.",
    invoke_without_command=True,
    rich_markup_mode=None,  # otherwise every command imports rich
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _add(name: str, function, epilog: str | None = None) -> None:
    """Register a subcommand whose expected errors become one line and an exit code. epilog: the end of its help."""

    @app.command(name, cls=SectionedCommand, epilog=epilog)
    @functools.wraps(function)
    def run(*args, **given):
        try:
            function(*args, **given)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader closed the pipe: print no error, and discard what is still buffered
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            fail("interrupted", 130)
        except (ValueError, OSError, MemoryError) as error:
            fail(error)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"edge-moe {__version__}")
        raise typer.Exit()


@app.callback()
def global_options(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("-V", "--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


for _name, _function, *_epilog in (
    ("demo", demo.demo),
    ("compress", compress.compress),
    ("prune", prune.prune),
    ("plan", plan.plan, plan.GLOSSARY),
    ("inspect", inspect.inspect),
    ("verify", verify.verify),
    ("split", split.split),
    ("generate", generate.generate),
    ("chat", chat.chat),
    ("serve", serve.serve),
    ("eval", eval.evaluate),
    ("bench", bench.bench),
    ("doctor", doctor.doctor),
):
    _add(_name, _function, *_epilog)
