"""What a request asks for, whichever API it came by."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..runtime.prompt import Prompt
from .errors import ApiError, invalid, unsupported
from .fields import Field, array, flag, number, object_, read, text, value_of, whole
from .limits import Limits

# Of an answer: "json", "regex", "choice", "grammar" or "call"; its schema, pattern...; and the field that asks for it.
Shape = tuple[str, Any, str]


@dataclass
class Asked:
    """prompts: one or several, each answered `n` times."""

    prompts: list[Prompt]
    options: dict[str, Any]  # of Runtime.generate()
    messages: bool  # whether the prompt is messages, so that thoughts and calls are told apart
    n: int = 1
    max_tokens: int | None = None
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    score: int | None = None  # the prompt's own log probabilities are wanted, with so many likeliest tokens
    calls: bool = False  # whether tools were given
    one_call: bool = False  # end the answer after the first call
    shape: Shape | None = None
    user: str = ""
    more: dict[str, Any] = field(default_factory=dict)  # what the API's answer repeats of the request


TEXTS = Field((str, list))
# Fields of both of OpenAI's older APIs.
SAMPLING = {
    "model": text(required=True),
    "n": whole(1, 1, 128),
    "stream": flag(False),
    "stream_options": object_(),
    "temperature": number(None, 0, 2),
    "top_p": number(None, 0, 1),
    "stop": TEXTS,
    "seed": whole(None, -(2**63), 2**63 - 1),
    "presence_penalty": number(None, -2, 2),
    "frequency_penalty": number(None, -2, 2),
    "logit_bias": object_(),
    "user": text(""),
    # not in OpenAI's API
    "top_k": whole(None, 0),
    "min_p": number(None, 0, 1),
    "repetition_penalty": number(None, 1e-3, 1e3),
    "prune": Field((float, str)),
    "grammar": text(),
    "guided_json": Field((dict, str)),
    "guided_regex": text(),
    "guided_choice": array(),
    "guided_grammar": text(),
}
STREAM_OPTIONS = {"include_usage": flag(False), "include_obfuscation": flag(False)}
GREATEST_BIAS = 100


def sampling_options(given: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """The options of Runtime.generate() that a request's fields set."""
    options = {
        name: given[name]
        for name in ("temperature", "seed", "presence_penalty", "frequency_penalty", "top_k", "min_p",
                     "repetition_penalty", "prune")
        if given.get(name) is not None
    }  # fmt: skip
    if given.get("top_p") is not None:
        options["top_p"] = max(given["top_p"], 1e-9)  # 0 means the likeliest token
    if "seed" in options:
        options["seed"] %= 2**63
    if given.get("logit_bias"):
        options["logit_bias"] = {
            token_of(token): value_of(bias, number(None, -GREATEST_BIAS, GREATEST_BIAS), f"logit_bias.{token}")
            for token, bias in given["logit_bias"].items()
        }
    if given.get("stop"):
        options["stop"] = stops_of(given["stop"], "stop", limits)
    return options


def stops_of(stop: str | list, name: str, limits: Limits) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop
    if len(stops) > limits.stops:
        raise invalid(f"Invalid '{name}': {len(stops)} texts, expected at most {limits.stops}.", name)
    return [value_of(one, text(required=True), f"{name}[{place}]") for place, one in enumerate(stops)]


def token_of(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise invalid(f"Invalid key in 'logit_bias': {key!r:.40} is not a token id.", "logit_bias")
    return int(key)


def shape_of(given: Mapping[str, Any]) -> Shape | None:
    """The shape that an answer must have, by the fields that are not in OpenAI's API."""
    asked = [
        name
        for name in ("grammar", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
        if given[name] is not None
    ]
    if not asked:
        return None
    if len(asked) > 1:
        raise invalid(f"'{asked[0]}' and '{asked[1]}' exclude each other.", asked[1])
    name, value = asked[0], given[asked[0]]
    if name == "guided_choice":
        choices = [value_of(one, text(required=True), f"guided_choice[{place}]") for place, one in enumerate(value)]
        if not choices:
            raise invalid("'guided_choice' is empty.", name)
        value = choices
    kind = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice"}.get(name, "grammar")
    return kind, value, name


def include_usage(given: Mapping[str, Any]) -> bool:
    if given["stream_options"] is None:
        return False
    if not given["stream"]:
        raise invalid("The 'stream_options' parameter is only allowed when 'stream' is enabled.", "stream_options")
    return read(given["stream_options"], STREAM_OPTIONS, where="stream_options")["include_usage"]


def check_count(prompts: int, n: int, limits: Limits) -> None:
    if prompts * n > limits.answers:
        raise invalid(
            f"{prompts} prompts with n = {n} are {prompts * n} answers, expected at most {limits.answers}.", "n"
        )


def refuse_media(kind: object, path: str) -> ApiError:
    return unsupported(f"{path}: a content part of type {kind!r:.40}", "this model reads text alone", path)
