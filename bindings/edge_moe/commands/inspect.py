"""`edge-moe inspect`: describes a bundle."""

from ..terminal import show
from . import options
from .output import print_json


def inspect(bundle: options.Bundle, json_output: options.Json = False) -> None:
    """Show a bundle's shapes, bytes and widths."""
    from ..report import bundle_text
    from ..runtime.bundle import Bundle
    from ..runtime.describe import describe_bundle

    about = describe_bundle(Bundle.open(bundle, parts=True))
    if json_output:
        print_json(about)
    else:
        show(bundle_text(about))
