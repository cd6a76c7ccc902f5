"""Elementary functions of the reference forward pass, float32, with numpy or mlx.core as `xp`."""

import math

import numpy as np

EXP_MOST = np.float32(87)  # its exponential is still a float32


def array(value, xp):
    """Convert a NumPy array, or what is one of `xp` already, to an array of `xp`."""
    return value if xp is np or isinstance(value, xp.array) else xp.array(value)


def product(weights, name: str, x, xp=np):
    """x (..., inputs) times the transposed matrix `name` (outputs, inputs) of the trunk."""
    its_own = getattr(weights, "product", None)
    return its_own(name, x) if its_own else x @ array(weights.trunk(name), xp).T


def grouped_product(weights, name: str, x, xp=np):
    """The product of a matrix (outputs, inputs) whose rows are in groups, each with inputs of its own.

    x: (..., groups, inputs) -> (..., groups, outputs / groups).
    """
    its_own = getattr(weights, "grouped_product", None)
    return its_own(name, x) if its_own else grouped(x, array(weights.trunk(name), xp), xp)


def grouped(x, matrix, xp=np):
    """The same for a matrix."""
    groups, inputs = x.shape[-2:]
    rows = x.reshape(-1, groups, inputs).swapaxes(0, 1)  # (groups, rows, inputs)
    y = rows @ matrix.reshape(groups, -1, inputs).swapaxes(1, 2)
    return y.swapaxes(0, 1).reshape(*x.shape[:-1], -1)


def rms_norm(x, weight, eps: float, xp=np):
    """Scale the last axis to a root mean square of one, then by weight."""
    y = x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + eps)
    y *= array(weight, xp)
    return y


def l2_norm(x, eps: float, xp=np):
    """Scale the last axis to a sum of squares of one."""
    return x / xp.sqrt(xp.sum(x * x, axis=-1, keepdims=True) + eps)


def layer_norm(x, weight, bias, eps: float, xp=np):
    """Shift the last axis to a mean of zero, scale it to a variance of one, then by weight, and add bias."""
    y = x - xp.mean(x, axis=-1, keepdims=True)
    y = y / xp.sqrt(xp.mean(y * y, axis=-1, keepdims=True) + eps)
    y *= array(weight, xp)
    y += array(bias, xp)
    return y


def softmax(x, xp=np, sink=None):
    """Softmax over the last axis. sink: (..., 1), a logit that takes part and is left out of the result."""
    top = xp.max(x, axis=-1, keepdims=True)
    top = top if sink is None else xp.maximum(top, sink)
    e = xp.exp(x - top)
    whole = xp.sum(e, axis=-1, keepdims=True)
    return e / (whole if sink is None else whole + xp.exp(sink - top))


def sigmoid(x, xp=np):
    if xp is not np:
        return xp.sigmoid(x)
    y = np.minimum(np.negative(x), EXP_MOST)
    np.exp(y, out=y)  # in place: takes a sixteenth of the time of new arrays and a choice between two forms
    y += 1
    return np.reciprocal(y, out=y)


def softplus(x, xp=np):
    """log(1 + exp(x))."""
    return xp.logaddexp(x, array(np.float32(0), xp))


def silu(x, xp=np):
    y = sigmoid(x, xp)
    y *= x
    return y


def gelu_tanh(x, xp=np):
    return 0.5 * x * (1 + xp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def clamped_swiglu(gate, up, alpha: float, limit: float, shift: float, xp=np):
    """SwiGLU of a gate up to `limit`, whose sigmoid is `alpha` times as steep, and of shift + up within +-limit."""
    gate = xp.minimum(gate, limit)
    return gate * sigmoid(alpha * gate, xp) * (xp.clip(up, -limit, limit) + shift)


ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh}  # whose product with up is the input of the down projection
