"""`edge-moe demo`: the embedded model, compressed and run under a cap."""

from edge_moe.commands import options
from edge_moe.commands.options import option
from edge_moe.commands.output import print_json
from edge_moe.terminal import show

KeepBundles = option(str | None, "--keep", metavar="DIR", help="Keep the bundles in DIR.")


def demo(keep: KeepBundles = None, json_output: options.Json = False) -> None:
    """Compress the embedded model and run it under a cap.

    The model is compressed four ways, each is scored on text against the original, and one then runs in a process
    with less memory than its experts need.
    """
    from edge_moe.demo import report_text, run_demo
    from edge_moe.progress import progress_bar

    with progress_bar(quiet=json_output) as progress:
        report = run_demo(keep, progress)
    if json_output:
        print_json(report)
    else:
        show(report_text(report))
