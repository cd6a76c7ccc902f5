"""The sampling options of generate and chat, defined once; a command gets only those that were given."""

import inspect
import re
from collections.abc import Callable
from functools import wraps

from .options import given, option

# By default, an answer to a message is sampled as the model's generation_config.json says.
_SECTION = "Sampling (default: as the model's generation_config.json says; --temp 0 for a raw text)"


def _sampling(kind, *names: str, metavar: str, help: str):
    return option(kind | None, *names, metavar=metavar, section=_SECTION, help=help)


OPTIONS = {  # by keyword of Sampler
    "temperature": _sampling(float, "--temp", metavar="T", help="Temperature; 0: always the likeliest token."),
    "top_p": _sampling(float, "--top-p", metavar="P", help="Sample from the likeliest tokens that together reach P."),
    "top_k": _sampling(int, "--top-k", metavar="N", help="Sample from the N likeliest tokens; 0: all."),
    "min_p": _sampling(
        float, "--min-p", metavar="P", help="Sample from tokens with at least P times the highest probability."
    ),
    "repetition_penalty": _sampling(
        float,
        "--repetition-penalty",
        metavar="X",
        help="Above 1: makes tokens less likely that are in the prompt or the answer already.",
    ),
    "presence_penalty": _sampling(
        float, "--presence-penalty", metavar="X", help="Subtract X from the logits of tokens in the answer."
    ),
    "frequency_penalty": _sampling(
        float, "--frequency-penalty", metavar="X", help="Subtract X for each time that a token is in the answer."
    ),
    "logit_bias": _sampling(
        list[str],
        "-l",
        "--logit-bias",
        metavar="ID+X",
        help="Add to a token's logit: 15043+1, 15043-2.5, or 15043-inf, which forbids it; repeatable.",
    ),
    "seed": _sampling(int, "--seed", metavar="N", help="The same seed gives the same text."),
}


def takes_sampling(command: Callable) -> Callable:
    """Replace a command's parameter `sampling` by these options, and call it with a dict of those that were given."""

    @wraps(command)
    def with_sampling(**values):
        sampling = given(**{name: values.pop(name) for name in OPTIONS})
        if "logit_bias" in sampling:
            sampling["logit_bias"] = dict(_biased(text) for text in sampling["logit_bias"])
        return command(**values, sampling=sampling)

    signature = inspect.signature(command)
    parameters = []
    for parameter in signature.parameters.values():
        if parameter.name == "sampling":
            parameters += [
                inspect.Parameter(name, parameter.kind, default=None, annotation=kind) for name, kind in OPTIONS.items()
            ]
        else:
            parameters.append(parameter)
    with_sampling.__signature__ = signature.replace(parameters=parameters)
    with_sampling.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_sampling


def _biased(text: str) -> tuple[int, float]:
    """Parse a token id and the bias of its logit: 15043+1, 15043-inf."""
    found = re.fullmatch(r"\s*(\d+)\s*([+-])\s*(\d+\.?\d*|\.\d+|inf)\s*", text)
    if not found:
        raise ValueError(f"logit-bias {text!r} is not a token id, + or -, and a number, such as 15043+1 or 15043-inf")
    return int(found[1]), float(found[2] + found[3])
