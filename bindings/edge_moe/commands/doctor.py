"""`edge-moe doctor`: examines this machine."""

from pathlib import Path

from ..terminal import show
from . import options
from .options import argument
from .output import print_json

Where = argument(str, "WHERE", "A bundle, or the directory that will hold one [default: the current one].")


def doctor(where: Where = ".", json_output: options.Json = False) -> None:
    """Show what this machine has, how fast it is, and what runs here.

    In a directory that is not a bundle, a file of 268 MB is written, read and removed. The measurements are kept for
    `edge-moe plan`.
    """
    from ..doctor import examination_text, examine
    from ..progress import progress_bar

    with progress_bar(quiet=json_output) as progress:
        found = examine(Path(where), progress)
    if json_output:
        print_json(found)
    else:
        show(examination_text(found))
