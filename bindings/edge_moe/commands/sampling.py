"""The sampling options of generate and chat, defined once: a command is called with those that were given."""

import inspect
import re
from collections.abc import Callable
from functools import wraps

from .options import given, option

# An answer to a message is sampled as the model's makers advise where nothing else is said.
_SECTION = "Sampling (default: as the model's makers advise; of a raw text --temp 0)"


def _sampling(kind, *names: str, metavar: str, help: str):
    return option(kind | None, *names, metavar=metavar, section=_SECTION, help=help)


OPTIONS = {  # by Sampler's keyword
    "temperature": _sampling(float, "--temp", metavar="T", help="Temperature; 0: always the likeliest token."),
    "top_p": _sampling(float, "--top-p", metavar="P", help="The likeliest tokens that reach this probability."),
    "top_k": _sampling(int, "--top-k", metavar="N", help="The N likeliest tokens; 0: all."),
    "min_p": _sampling(
        float, "--min-p", metavar="P", help="Tokens of at least this share of the likeliest's probability."
    ),
    "repetition_penalty": _sampling(
        float,
        "--repetition-penalty",
        metavar="X",
        help="Above 1: less of what is in the prompt or the answer already.",
    ),
    "presence_penalty": _sampling(
        float, "--presence-penalty", metavar="X", help="Taken from logits of tokens in the answer."
    ),
    "frequency_penalty": _sampling(
        float, "--frequency-penalty", metavar="X", help="The same for each time that a token is there."
    ),
    "logit_bias": _sampling(
        list[str],
        "-l",
        "--logit-bias",
        metavar="ID+X",
        help="Added to a token's logit, as 15043+1, 15043-2.5 or 15043-inf, which forbids it; repeatable.",
    ),
    "seed": _sampling(int, "--seed", metavar="N", help="The same seed gives the same text."),
}


def takes_sampling(command: Callable) -> Callable:
    """Give a command these options in the place of its parameter `sampling`: a dict of those that were given."""

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
    """A token id and what is added to its logit: 15043+1, 15043-inf."""
    found = re.fullmatch(r"\s*(\d+)\s*([+-])\s*(\d+\.?\d*|\.\d+|inf)\s*", text)
    if not found:
        raise ValueError(f"logit-bias {text!r} is not a token id, + or - and a number, as 15043+1 or 15043-inf")
    return int(found[1]), float(found[2] + found[3])
