"""What the codes of quantised tensors stand for, and turning packed codes into float32.

Codes of less than eight bits form a little-endian stream of bits: the first code is in the lowest bits of the first
byte. Scales and what else makes weights of these values is left to reading.py.
"""

from functools import cache

import numpy as np

SPAN = 8  # codes that fill whole bytes at any number of bits
GGML = "GGML_"  # precedes the name of a type of GGUF's, whose blocks have scales of their own


def decode(kind: str, codes: np.ndarray, out: np.ndarray) -> None:
    """Write what packed codes stand for to `out`, a contiguous float32 array (rows, columns) of whole bytes of codes.

    kind: as for values(), or a type of GGUF's. codes: (bytes,), uint8.
    """
    if kind.startswith(GGML):
        from gguf.quants import dequantize

        out[...] = dequantize(codes.reshape(len(out), -1), _ggml_type(kind))
        return
    bits = bits_of(kind)
    if 8 % bits == 0:
        pairs = bits == 8 and codes.size % 2 == 0
        table = _table(kind, pairs)
        np.take(table, codes.view("<u2") if pairs else codes, axis=0, out=out.reshape(-1, table.shape[1]), mode="clip")
        return
    spans = np.zeros((codes.size // bits, 8), "u1")
    spans[:, :bits] = codes.reshape(-1, bits)
    index = spans.view("<u8") >> np.arange(SPAN, dtype="<u8") * np.uint64(bits) & np.uint64((1 << bits) - 1)
    np.take(values(kind), index.astype(np.intp), out=out.reshape(-1, SPAN), mode="clip")


def packed_bytes(kind: str, count: int) -> int:
    """The bytes of so many codes."""
    if kind.startswith(GGML):
        weights, nbytes = ggml_block(kind)
        return count // weights * nbytes
    return count * bits_of(kind) // 8


def ggml_block(kind: str) -> tuple[int, int]:
    """The weights and the bytes of a block of one of GGUF's types."""
    from gguf import GGML_QUANT_SIZES

    return GGML_QUANT_SIZES[_ggml_type(kind)]


def _ggml_type(kind: str):
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[kind.removeprefix(GGML)]


def bits_of(kind: str) -> int:
    """The bits of one code."""
    return values(kind).size.bit_length() - 1


@cache
def values(kind: str) -> np.ndarray:
    """What each code stands for, float32.

    kind: E8M0 (a power of two), E4M3, E2M1, or U2 to U8 and S2 to S8, whole numbers of that many bits, of which the
    code of S is the number plus half of the codes.
    """
    if kind == "E8M0":  # OCP MX specification 1.0: 2 to the code less 127; 255 is NaN
        code = np.arange(256)
        result = np.where(code == 255, np.nan, 2.0 ** (code - 127.0))
    elif kind == "E2M1":
        half = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        result = np.concatenate([half, -half])
    elif kind == "E4M3":  # as in OCP's FP8 specification: bias 7, no Inf, all ones is NaN
        code = np.arange(256)
        exponent, fraction = code >> 3 & 15, code & 7
        result = np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10))
        result = np.where(code & 127 == 127, np.nan, np.where(code < 128, result, -result))
    else:
        count = 1 << int(kind[1:])
        result = np.arange(count) - (count // 2 if kind[0] == "S" else 0)
    return result.astype(np.float32)


@cache
def _table(kind: str, pairs: bool) -> np.ndarray:
    """What each byte stands for, or each two bytes, which takes half as many look-ups: (bytes, values a byte)."""
    each = values(kind)
    bits, codes = bits_of(kind), 1 << (16 if pairs else 8)
    shifts = np.arange(0, codes.bit_length() - 1, bits)
    return each[np.arange(codes)[:, None] >> shifts & (each.size - 1)]
