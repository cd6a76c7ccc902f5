"""OpenAI's older /v1/completions: a text, or several, continued as they stand."""

from typing import TYPE_CHECKING, Any

from ..runtime.answer import Generation
from .asked import SAMPLING, Asked, check_count, include_usage, sampling_options, shape_of
from .errors import invalid
from .fields import Field, flag, read, whole
from .openai_chat import FINISH
from .reader import Event, Told
from .usage import openai_usage

if TYPE_CHECKING:
    from .service import Service

FIELDS = {
    **SAMPLING,
    "prompt": Field((str, list), required=True),
    "max_tokens": whole(16, 0),
    "echo": flag(False),
    "logprobs": Field((int, bool), low=0),
    "best_of": whole(None, 1, 128),
}
IGNORED = frozenset({"service_tier", "metadata", "store"})
REFUSED = {"suffix": (lambda value: value != "", "this model continues a text, and does not fill gaps")}


def parse(body: object, service: "Service") -> Asked:
    its = read(body, FIELDS, ignored=IGNORED, refused=REFUSED)
    service.check_model(its["model"])
    prompts = prompts_of(its["prompt"])
    check_count(len(prompts), its["n"], service.limits)
    if its["best_of"] not in (None, its["n"]):
        raise invalid("Invalid 'best_of': answers are not ranked; leave it out, or give as many as 'n'.", "best_of")
    options = {**service.sampling_defaults, **sampling_options(its, service.limits)}
    top = int(its["logprobs"]) if its["logprobs"] is not None and its["logprobs"] is not False else None
    if top is not None:
        if top > service.limits.logprobs:
            raise invalid(
                f"Invalid value for 'logprobs': {top} is above the maximum of {service.limits.logprobs}.", "logprobs"
            )
        options |= {"logprobs": True, "top_logprobs": top}
    if its["max_tokens"] == 0 and not its["echo"]:
        raise invalid("Invalid value for 'max_tokens': 0 is below the minimum of 1 without 'echo'.", "max_tokens")
    return Asked(
        prompts,
        options,
        messages=False,
        n=its["n"],
        max_tokens=its["max_tokens"],
        stream=its["stream"],
        include_usage=include_usage(its),
        echo=its["echo"],
        score=top if its["echo"] and top is not None else None,
        shape=shape_of(its),
        user=its["user"],
    )


def prompts_of(given: str | list) -> list[Any]:
    """The prompts of a field that has one or several, as texts or token ids."""
    is_one = isinstance(given, str) or (given and all(type(one) is int for one in given))
    prompts: list[Any] = [given] if is_one else list(given)
    for place, one in enumerate(prompts):
        of_ids = isinstance(one, list) and all(type(token) is int and 0 <= token < 2**31 for token in one)
        if not isinstance(one, str) and not of_ids:
            raise invalid(
                f"Invalid type for 'prompt[{place}]': expected a string or an array of token ids.",
                "prompt",
                "invalid_type",
            )
    if not prompts or not all(prompts):
        raise invalid("Invalid 'prompt': empty. Expected at least one token.", "prompt")
    return prompts


class Answer:
    named_events = False

    def __init__(self, asked: Asked, service: "Service", identity: str) -> None:
        self.asked, self.service = asked, service
        self.head = {
            "id": f"cmpl-{identity}",
            "object": "text_completion",
            "created": service.now(),
            "model": service.name,
            "system_fingerprint": service.fingerprint,
        }
        self.offsets = [0] * (len(asked.prompts) * asked.n)  # in the text, of the next token
        self.echoed: list[str] = []  # the prompts' texts, by prompt
        self.scores: list[list] = []  # of the prompts' tokens, by prompt
        self.ids: list[list[int]] = []

    def whole(self, tolds: list[Told]) -> dict:
        choices = []
        for index, told in enumerate(tolds):
            prompt = index // self.asked.n
            text, logprobs = told.text, None
            if "logprobs" in self.asked.options:
                scored = self.scores[prompt] if self.asked.echo else []
                logprobs = self._logprobs(
                    index, self.ids[prompt] if self.asked.echo else [], scored, told.tokens, told.logprobs
                )
            if self.asked.echo:
                text = self.echoed[prompt] + text
            choices.append(
                {"index": index, "text": text, "logprobs": logprobs, "finish_reason": self._finish(told.last)}
            )
        return {**self.head, "choices": choices, "usage": openai_usage(tolds, self.asked.n)}

    def begin(self) -> list[dict]:
        return []

    def add(self, index: int, piece: Generation, events: list[Event], called: bool) -> list[dict]:
        prompt, first = index // self.asked.n, self.offsets[index] == 0
        text = "".join(str(value) for _, value in events)
        echo = self.asked.echo and first
        logprobs = None
        if "logprobs" in self.asked.options:
            ids, scored = (self.ids[prompt], self.scores[prompt]) if echo else ([], [])
            logprobs = self._logprobs(index, ids, scored, piece.tokens, piece.logprobs or [])
        elif echo:
            self.offsets[index] = 1
        text = self.echoed[prompt] + text if echo else text
        finish = self._finish(piece) if piece.finish_reason is not None else None
        if not (text or logprobs or finish):
            return []
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return [{**self.head, "choices": [choice], **({"usage": None} if self.asked.include_usage else {})}]

    def end(self, tolds: list[Told]) -> list[dict | str]:
        usage = {**self.head, "choices": [], "usage": openai_usage(tolds, self.asked.n)}
        return [*([usage] if self.asked.include_usage else []), "[DONE]"]

    def _finish(self, last: Generation | None) -> str:
        reason = last.finish_reason if last is not None and last.finish_reason else "length"
        return FINISH.get(reason, reason)

    def _logprobs(self, index: int, ids: list[int], scored: list, tokens: list[int], told: list) -> dict:
        """The log probabilities of a prompt's tokens, None for the first, and those of an answer."""
        texts, found = self.service.texts, [*scored, *told]
        keys = [texts.key_of(token) for token in (*ids, *tokens)]
        offsets = []
        for token in (*ids, *tokens):
            offsets.append(self.offsets[index])
            self.offsets[index] += len(texts.text_of(token))
        return {
            "tokens": keys,
            "token_logprobs": [None if one is None else max(one.logprob, -9999.0) for one in found],
            "top_logprobs": [None if one is None else self._top(one) for one in found]
            if self.asked.options["top_logprobs"]
            else None,
            "text_offset": offsets,
        }

    def _top(self, one) -> dict[str, float]:
        likeliest = (*one.top_logprobs, (one.token, one.logprob))
        return {self.service.texts.key_of(token): max(logprob, -9999.0) for token, logprob in reversed(likeliest)}
