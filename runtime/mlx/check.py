"""What MLX has here: its device, and which of our kernels work on it.

python -m edge_moe.runtime.mlx.check {}      prints it as JSON, so that another process need not import MLX
"""

import mlx.core as mx

from ...devices.mlx.experts import ExpertShape, RecordKind, Router
from ...devices.mlx.working import operations
from ..child import answer
from ..codecs import encoding_of, record_layout

SIZE, WIDTHS = 64, (1, 2, 3, 4, 5, 6, 8, 16)  # of the planted experts


def examine() -> dict:
    """MLX's version and device, and what routing and experts are computed by; see Operations. Uses every kernel once,
    so that what Metal needs for them has been allocated."""
    info = mx.device_info()
    return {
        "version": mx.__version__,
        "metal": mx.metal.is_available(),
        "device": info.get("device_name", ""),
        "max_buffer_bytes": info.get("max_buffer_length"),
        "kernels": operations([Router(8, 2)], ExpertShape(SIZE, SIZE), planted_kinds()).name,
    }


def planted_kinds() -> list[RecordKind]:
    """Records of every width."""
    kinds = []
    for width in WIDTHS:
        three = (encoding_of(width, SIZE),) * 3
        layout = record_layout(SIZE, SIZE, three, False, True)
        kinds.append(RecordKind(tuple(map(tuple, three)), dict(layout.parts), layout.bytes))
    return kinds


if __name__ == "__main__":
    answer(examine)
