"""Where a bundle is split: contiguous layers for each part, so that the fullest part is as empty as can be."""

import math
from collections.abc import Sequence
from itertools import accumulate

from ...runtime.bundle import Bundle
from ...runtime.bundle_part import MOST_PARTS
from ...runtime.codecs import trunk_parts
from ...runtime.config import trunk_shapes
from ...runtime.tensorfile import bytes_of


def first_layers(bundle: Bundle, shares: Sequence[float]) -> list[int]:
    """The first layer of each part, for parts that are to have such shares of the bytes kept in memory.

    Each part has a layer with experts. Raises ValueError if there are not as many.
    """
    config, parts = bundle.config, len(shares)
    if not 2 <= parts <= min(MOST_PARTS, len(config.moe_layers)):
        raise ValueError(
            f"parts is {parts}, expected 2 to {min(MOST_PARTS, len(config.moe_layers))}: each part has a layer with "
            f"experts, of which there are {len(config.moe_layers)}"
        )
    begin, each, end = layer_bytes(bundle)
    sums = [0, *accumulate(each)]
    routed = [0, *accumulate(config.has_experts(layer) for layer in range(config.layer_count))]
    fullness = {0: (0.0, [])}  # by the layer that comes next: of the fullest part so far, and their first layers
    for number, share in enumerate(shares):
        is_last, found = number == parts - 1, {}
        fixed = begin * (number == 0) + end * is_last
        for first, (before, firsts) in fullness.items():
            for after in [config.layer_count] if is_last else range(first + 1, config.layer_count):
                if routed[after] == routed[first]:
                    continue
                full = max(before, (fixed + sums[after] - sums[first]) / share)
                if full < found.get(after, (math.inf, []))[0]:
                    found[after] = full, [*firsts, first]
        fullness = found
    return fullness[config.layer_count][1]


def layer_bytes(bundle: Bundle) -> tuple[int, list[int], int]:
    """Bytes of what comes before the layers, of each layer, and of what comes after them; a head that is the embedding
    counts there, too."""
    config, encodings = bundle.config, {one.name: one.encoding for one in bundle.trunk}
    begin, each, end = 0, [0] * config.layer_count, 0
    for name, shape in trunk_shapes(config).items():
        nbytes = sum(bytes_of(dtype, of) for _, _, dtype, of in trunk_parts(name, shape, encodings[name]))
        if name.startswith("layers."):
            each[int(name.split(".")[1])] += nbytes
        elif name == "embedding":
            begin, end = nbytes, end + nbytes * config.tied_head
        else:
            end += nbytes
    for expert in bundle.experts.values():
        each[expert.layer] += expert.nbytes
    return begin, each, end
