"""`edge-moe verify`: checks every byte of a bundle against its checksums."""

from ..terminal import show
from . import options


def verify(bundle: options.Bundle) -> None:
    """Read all of a bundle and check it."""
    import time

    from ..progress import progress_bar
    from ..report import unlisted_text
    from ..runtime import bundle as bundles
    from ..runtime.plan_table import size

    opened, checked, began = bundles.Bundle.open(bundle, parts=True), 0, time.perf_counter()
    with progress_bar() as progress:
        for part, (_, count) in enumerate(bundles.verify(opened), start=1):
            checked += count
            if progress:
                progress("verify", part, bundles.parts_to_verify(opened))
    part = f" ({opened.part})" if opened.part else ""
    show(f"{bundle}: OK{part}, {size(checked)} at {checked / (time.perf_counter() - began) / 1e9:.2f} GB/s")
    if opened.unlisted:
        show(unlisted_text(opened.unlisted))
