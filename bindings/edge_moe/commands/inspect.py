"""`edge-moe inspect`: what a bundle is."""

from edge_moe.commands import options
from edge_moe.commands.output import print_json
from edge_moe.terminal import show


def inspect(bundle: options.Bundle, json_output: options.Json = False) -> None:
    """Show a bundle's shapes, bytes and widths."""
    from edge_moe.report import bundle_text
    from edge_moe.runtime.bundle import Bundle
    from edge_moe.runtime.describe import describe_bundle

    about = describe_bundle(Bundle.open(bundle))
    if json_output:
        print_json(about)
    else:
        show(bundle_text(about))
