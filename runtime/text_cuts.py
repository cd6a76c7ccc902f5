"""Finding places to cut a text so that its pieces, encoded separately, have the tokens of the whole text.

A cut is made only if it is proved correct. There are two proofs; both cut after a letter or digit x and before a
character y of MARKS:

1. The pre-tokenizer always ends a word between x and y. It does if it splits by regular expressions whose alternatives
   are all in ALTERNATIVES, and one of them matches x: none of these matches x followed by y, none looks behind, and
   only white space looks ahead, which a piece that ends in x does not end in. Words are encoded separately.
2. The whole text is one word (as in Llama and Mixtral), y is a space, and no token of the vocabulary has a letter or
   digit followed by the sign for a space. No merge can then join the two sides, and merges on either side do not depend
   on the other.

No cut is made inside a token that was added to the vocabulary, as these are matched in the text first.
"""

import json
import re
from collections.abc import Iterator

MARKS = ' \n\t\r.,;:!?()[]{}<>"=+*/\\|#@$%&~-_，。、；：？！「」『』（）《》…—'
# Letters that are the same in all versions of Unicode, and that only decomposing normalizers change.
ASCII_WORDS, WORDS = "A-Za-z", "A-Za-zÀ-ÖØ-öø-ɏΑ-ΡΣ-Ωα-ωА-яぁ-ゖァ-ヺ一-龥가-힣"
LETTERS = {  # alternatives that match words of letters
    r"\p{L}+",
    r" ?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
}
CASED = {  # the two alternatives of o200k, which together match the same as LETTERS
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
}
NUMBERS = {r"\p{N}", r"\p{N}+", r" ?\p{N}+", r"\p{N}{1,3}"}
OTHERS = {
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"),
    *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),
    *(r"\s+(?!\S)", r"\s+", r"\s*[\r\n]+", r"\s*[\r\n]", r"[一-龥぀-ゟ゠-ヿ]+", r" ?[\p{P}\p{S}]+[\r\n]*"),
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
}
ALTERNATIVES = LETTERS | CASED | NUMBERS | OTHERS
BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
COMPOSING = ("NFC", "NFD", "NFKC", "NFKD")  # normalizers that join neither x nor y with the other side
MOST_INSIDE = 20_000  # places in added tokens, each of which is checked at every cut; Llama 3 has 1,000
SPACE = "▁"  # how such vocabularies write a space


class Cuts:
    """Finds the places where texts of one tokenizer may be cut; there are none if neither proof holds."""

    def __init__(self, backend):
        """backend: a `tokenizers.Tokenizer`."""
        self.pattern: re.Pattern | None = None  # a cut is at the end of a match
        self.drop = 0  # characters after a cut that the next piece omits: a space that the normalizer prepends
        added = list(backend.get_added_tokens_decoder().values())
        kinds = [kind["type"] for kind in parts(backend.normalizer, "normalizers")]
        if any(token.single_word for token in added):
            return  # whether such a token matches depends on the text before it
        if all(kind in COMPOSING for kind in kinds):
            taken = _taken(parts(backend.pre_tokenizer, "pretokenizers"))
            if "NFD" in kinds or "NFKD" in kinds:  # after these a letter may end with a combining mark
                taken = taken.replace(WORDS, ASCII_WORDS)
            if taken:
                self.pattern = re.compile(rf"[{taken}](?=[{re.escape(MARKS)}])")
        if self.pattern is None:
            self._cut_one_word(backend)
        # (content, number of its characters before the cut, how it is matched) for each cut that would split a token.
        self.inside = []
        for token in added if self.pattern else ():
            content = token.content
            ends = [at for at in range(1, len(content)) if content[at - 1].isalnum() and not content[at].isalnum()]
            ends += [len(content)] if token.rstrip or self.drop else []  # it includes the white space after it
            ends += [-self.drop] if self.drop else []
            self.inside += [(content, end, bool(kinds) and token.normalized) for end in ends]
        if len(self.inside) > MOST_INSIDE:
            self.pattern = None

    def pieces(self, text: str, length: int) -> Iterator[str]:
        """Yield pieces of at least `length` characters, except the last, each as short as the cuts allow."""
        begin = 0
        while len(text) - begin > length and self.pattern is not None:
            cut = self._next(text, begin + length)
            if cut is None:
                break
            yield text[begin:cut]
            begin = cut + self.drop
        yield text[begin:] if begin else text

    def _next(self, text: str, begin: int) -> int | None:
        for match in self.pattern.finditer(text, begin):
            if not any(self._is_inside(text, match.end(), *place) for place in self.inside):
                return match.end()
        return None

    def _is_inside(self, text: str, cut: int, content: str, before: int, normalized: bool) -> bool:
        begin = cut - before
        if normalized and not text[max(begin, 0) : begin + len(content)].isascii():
            return True  # it may become the token after normalization
        return begin >= 0 and text.startswith(content, begin)

    def _cut_one_word(self, backend) -> None:
        normalizers = parts(backend.normalizer, "normalizers")
        replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        prepends = {"type": "Prepend", "prepend": SPACE}
        splits = parts(backend.pre_tokenizer, "pretokenizers")
        if normalizers in ([replaces], [prepends, replaces]) and not splits:
            self.drop = 1 if prepends in normalizers else 0
        elif normalizers or [(kind["type"], kind.get("replacement")) for kind in splits] != [("Metaspace", SPACE)]:
            return
        model = backend.model
        if type(model).__name__ not in ("BPE", "Unigram") or backend.token_to_id(SPACE) is None:
            return
        joins = re.compile(rf"[^\W_]{SPACE}")
        for token in range(backend.get_vocab_size(with_added_tokens=False)):
            if (text := model.id_to_token(token)) is None or joins.search(text):
                return
        self.pattern = re.compile(r"[^\W_](?= [^\W_])")


def parts(component, inner: str) -> list[dict]:
    """The steps of a normalizer, pre-tokenizer or decoder as in tokenizer.json, flattened; none for None."""
    return [] if component is None else _flat(json.loads(component.__getstate__()), inner)


def _flat(step: dict, inner: str) -> list[dict]:
    if step["type"] != "Sequence":
        return [step]
    return [part for one in step[inner] for part in _flat(one, inner)]


def alternatives(pattern: str) -> list[str]:
    """The alternatives of a regular expression, split at bars outside of brackets."""
    found, depth, in_class, begin, at = [], 0, False, 0, 0
    while at < len(pattern):
        sign = pattern[at]
        if sign == "\\":
            at += 1
        elif in_class:
            in_class = sign != "]"
        elif sign == "[":
            in_class = True
        elif sign in "()":
            depth += 1 if sign == "(" else -1
        elif sign == "|" and depth == 0:
            found.append(pattern[begin:at])
            begin = at + 1
        at += 1
    return [*found, pattern[begin:]]


def _taken(splits: list[dict]) -> str:
    """The characters after which a word ends if a mark follows, as a class of `re` without brackets; "" if none."""
    letters = numbers = False
    for step, split in enumerate(splits):
        kind, seen = split["type"], set()
        if kind == "Digits":
            numbers = True
        elif kind == "Split":
            if split["behavior"] not in ("Isolated", "Removed") or split["invert"] or "Regex" not in split["pattern"]:
                return ""
            seen = set(alternatives(split["pattern"]["Regex"]))
        elif kind == "ByteLevel":
            if split["add_prefix_space"] and step == 0:
                return ""  # a space would be prepended to the second piece
            seen = set(alternatives(BYTE_LEVEL)) if split["use_regex"] else set()
        else:
            return ""
        if not seen <= ALTERNATIVES:
            return ""
        letters = letters or bool(seen & LETTERS) or seen >= CASED
        numbers = numbers or bool(seen & NUMBERS)
    return (WORDS if letters else "") + ("0-9" if numbers else "")
