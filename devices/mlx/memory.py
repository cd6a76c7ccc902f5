"""Memory of MLX's that the core reads files into, in place."""

import mlx.core as mx
import numpy as np

from .experts import PAGE_BYTES, PAGE_WORDS, Arena


def allocate(nbytes: int) -> tuple[Arena, np.ndarray]:
    """Memory for at least `nbytes` bytes, as kernels see it and as the core does: uint8, from the first page on.

    Metal's memory begins at a page; the CPU backend's need not. The array has two dimensions, since MLX counts in 31
    bits along each.
    """
    pages = -(-nbytes // PAGE_BYTES)
    words = mx.zeros((pages + 1, PAGE_WORDS), mx.uint32)
    mx.eval(words)
    raw = np.array(words, copy=False).reshape(-1).view(np.uint8)
    before = -raw.ctypes.data % PAGE_BYTES
    return Arena(words, before // 4), raw[before : before + pages * PAGE_BYTES]


class SlotMemory:
    """The memory of all slots, which the core asks for when it begins and when the slots change their size."""

    def __init__(self) -> None:
        self.arena: Arena | None = None

    def __call__(self, nbytes: int) -> np.ndarray:
        self.arena = None  # the core has let go of it
        mx.clear_cache()
        self.arena, memory = allocate(nbytes)
        return memory
