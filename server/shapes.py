"""Answers of a given shape: a JSON schema, a regular expression, a grammar, one of some texts, or a call of a tool.

llguidance says which tokens may come next, and a logits processor forbids the others. A thought has no shape: the mask
begins behind it. What llguidance takes in memory is reserved in the plan (limits.py).
"""

import json
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runtime.channels import MESSAGE, ChannelText, detokenizer_of
from ..runtime.tokenizer import Tokenizer
from .calls import Forced, Format
from .errors import invalid, unsupported
from .fields import depth_of
from .limits import Limits
from .thoughts import ThoughtSplit
from .token_texts import TokenTexts

STATES = 5_000  # of a grammar's lexer at most, each of 1 to 2 kB
SYMBOLS = 50_000  # in a grammar's productions
SPACE = r"[ \n\t\r]{0,16}"  # between the tokens of JSON: a model that writes nothing else would never end
SHOWN = 300  # characters of an error


class TooComplex(ValueError):
    """A shape whose next token could not be told within llguidance's limits."""


class Words:
    """A vocabulary as llguidance takes it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab: int, ends: list[int]) -> None:
        self.backend: Any = tokenizer.backend
        texts, added = TokenTexts(tokenizer), self.backend.get_added_tokens_decoder()
        self.special_token_ids = sorted({*ends, *(index for index, token in added.items() if token.special)})
        self.tokens = [texts.bytes_of(token) for token in range(vocab)]
        self.eos_token_id = ends[0]

    def __call__(self, text: str | bytes) -> list[int]:
        text = text if isinstance(text, str) else text.decode(errors="ignore")
        return self.backend.encode(text, add_special_tokens=False).ids


class Shapes:
    """Makes masks for a model's vocabulary. ends: tokens that end an answer."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, ends: Iterable[int], limits: Limits) -> None:
        self.tokenizer, self.vocab, self.limits = tokenizer, vocab, limits
        self.ends = sorted(end for end in ends if 0 <= end < vocab)
        self._words: Any = None
        self._making = threading.Lock()

    def words(self) -> Any:
        """llguidance's form of the vocabulary, made when it is first needed. Raises ApiError where there is none."""
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise unsupported("This server's llguidance is not installed: a shape of answers", "install it") from None
        if not self.ends:
            raise unsupported("This model has no token that ends an answer: a shape of answers", "leave it out")
        with self._making:
            if self._words is None:
                words: Any = Words(self.tokenizer, self.vocab, self.ends)
                self._words = LLTokenizer(words, n_vocab=self.vocab, eos_token=self.ends)
            return self._words

    def matcher(self, kind: str, value: Any, param: str, form: Format) -> Any:
        """A matcher of a shape. Raises ApiError for one that is not understood, or too large."""
        from llguidance import LLMatcher, LLParserLimits

        words = self.words()
        if len(json.dumps(value)) > self.limits.schema_bytes:
            raise invalid(f"'{param}' has more than {self.limits.schema_bytes:,} bytes.", param, "invalid_schema")
        if depth_of(value, self.limits.schema_depth) > self.limits.schema_depth:
            raise invalid(f"'{param}' is nested deeper than {self.limits.schema_depth}.", param, "invalid_schema")
        try:
            grammar = self._grammar(kind, value, form, LLMatcher)
        except (ValueError, RecursionError) as error:
            raise invalid(f"Invalid '{param}': {_shown(error)}", param, "invalid_schema") from None
        made = LLMatcher(
            words,
            grammar,
            log_level=0,
            limits=LLParserLimits(max_lexer_states=STATES, max_grammar_size=SYMBOLS, verbose_errors=False),
        )
        if made.is_error():
            raise invalid(f"Invalid '{param}': {_shown(made.get_error())}", param, "invalid_schema")
        return made

    def _grammar(self, kind: str, value: Any, form: Format, matcher: Any) -> str:
        if kind == "json":
            schema = json.loads(value) if isinstance(value, str) else value
            return matcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": SPACE})
        if kind == "regex":
            return matcher.grammar_from_regex(value)
        if kind == "choice":
            return matcher.grammar_from_lark("start: " + " | ".join(self.literal(one) for one in value))
        if kind == "call":
            return matcher.grammar_from_lark(self.call(value, form))
        from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

        try:
            return matcher.grammar_from_lark(any_to_lark(value))
        except GbnfToLarkError as error:
            raise ValueError(str(error)) from None

    def call(self, tools: list[dict], form: Format) -> str:
        """The grammar of a call of one of these tools. Raises ApiError for a form that has none."""
        forced = form.forced
        if forced is None:
            raise unsupported(
                f"A call that must be made, in {form.name}'s form", "give tool_choice 'auto'", "tool_choice"
            )
        before, after = forced.before, forced.after
        if form.section:
            before, after = form.section[0] + before, after + form.section[1]
        calls = [self._one(tool["function"], forced) for tool in tools]
        return f"start: {self.literal(before)} ({' | '.join(calls)}) {self.literal(after)}"

    def _one(self, function: dict, forced: Forced) -> str:
        schema = {"type": "object", **(function.get("parameters") or {})}
        name = self.literal(function["name"] + forced.named)
        if forced.parameter is None:
            return f"{name} {_json(schema)}"
        opening, text_value, json_value, closing = forced.parameter
        parts = []
        for key, its in (schema.get("properties") or {}).items():
            is_text = isinstance(its, dict) and its.get("type") == "string"
            named = self.literal(opening + key + (text_value if is_text else json_value))
            if not is_text:
                value = f"{_json(its)} {self.literal(closing)}"
            elif "enum" in its:
                value = f"({' | '.join(self.literal(str(one)) for one in its['enum'])}) {self.literal(closing)}"
            else:
                value = self._text_until(closing)
            part = f"{named} {value}"
            parts.append(part if key in (schema.get("required") or ()) else f"({part})?")
        return " ".join([name, *parts])

    def _text_until(self, closing: str) -> str:
        """A text without a < and what closes it: one expression, as a text that takes all it can would never let the
        closing's white space begin; two where the closing has a special token, which is no text."""
        if any(one in closing for one in self.tokenizer._special_ids):
            return f"/[^<]*/ {self.literal(closing)}"
        return f"/[^<]*{re.escape(closing).replace('/', chr(92) + '/').replace(chr(10), 'n')}/"

    def literal(self, text: str) -> str:
        """A text in a lark grammar, where special tokens stand apart."""
        special = sorted(self.tokenizer._special_ids, key=len, reverse=True)
        found = next((one for one in special if one in text), None)
        if found is None:
            return json.dumps(text) if text else ""
        before, _, after = text.partition(found)
        token = f"<[{self.tokenizer.special_token(found)}]>"
        return " ".join(part for part in (self.literal(before), token, self.literal(after)) if part)

    def processor(self, made: Any, opened: str, messages: bool) -> "Mask":
        """The logits processor of an answer. opened: the tag of a thought that its prompt opens."""
        return Mask(made, self.tokenizer, self.ends, opened, messages)


def _json(schema: object, lenient: bool = True) -> str:
    guided = {"whitespace_pattern": SPACE, "lenient": lenient}
    return "%json " + json.dumps({**(schema if isinstance(schema, dict) else {}), "x-guidance": guided})


def _shown(error: object) -> str:
    return " ".join(str(error).split())[:SHOWN]


@dataclass
class Mask:
    """Forbids tokens that a shape does not allow, from the end of the answer's thought on."""

    matcher: Any
    tokenizer: Tokenizer
    ends: list[int]
    opened: str
    messages: bool

    def __post_init__(self) -> None:
        self.text: Any = detokenizer_of(self.tokenizer)
        self.split = ThoughtSplit(self.opened)
        channels = self.messages and isinstance(self.text, ChannelText)
        self.active = not self.opened and not channels
        self.message = self.tokenizer.special_token(MESSAGE) if channels else None
        self.at: int | None = None  # tokens that were seen, with the prompt

    def __call__(self, tokens: list[int], logits: np.ndarray) -> np.ndarray:
        for token in tokens[self.at :] if self.at is not None else ():
            self._see(token)
        self.at = len(tokens)
        if not self.active:
            return logits
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        if self.matcher.is_error():
            raise TooComplex(_shown(self.matcher.get_error()))
        allowed = np.unpackbits(bits, bitorder="little", count=len(logits)).astype(bool)
        logits[~allowed] = -np.inf
        return logits

    def _see(self, token: int) -> None:
        if self.active:
            self.matcher.consume_token(token)
            return
        text = self.text.add(token)
        if self.message is not None:
            self.active = token == self.message and not self.text.thinking
        else:
            self.split.add(text)
            self.active = not self.split.thinking
