"""`edge-moe demo`: compresses the embedded model and runs it under a cap."""

from ..terminal import show
from . import options
from .options import option
from .output import print_json

KeepBundles = option(str | None, "--keep", metavar="DIR", help="Keep the bundles in DIR.")


def demo(keep: KeepBundles = None, json_output: options.Json = False) -> None:
    """Compress the embedded model and run it under a cap.

    Compresses the model in four ways, scores each on text against the original, and runs one in a process with less
    memory than its experts need.
    """
    from ..demo import report_text, run_demo
    from ..progress import progress_bar

    with progress_bar(quiet=json_output) as progress:
        report = run_demo(keep, progress)
    if json_output:
        print_json(report)
    else:
        show(report_text(report))
