"""Stop strings: found wherever tokens break, as a search of the whole text finds them, at a cost that does not grow."""

import random

from bundles import REFERENCE

from edge_moe.runtime.answer_text import AnswerText
from edge_moe.runtime.tokenizer import Tokenizer


class Letters:
    """A tokenizer whose tokens are letters, for strings of any shape."""

    def decode(self, ids) -> str:
        return "".join(map(chr, ids))

    def special_token(self, text: str) -> int | None:
        return None


def shown(text: str, stops: list[str]) -> tuple[str, bool]:
    answer, out = AnswerText(Letters(), stops), []
    for sign in text:
        out.append(answer.add(ord(sign)))
        if answer.stopped:
            break
    return "".join(out) + answer.finish(), answer.stopped


def test_what_is_shown_ends_where_a_search_finds_the_first_stop_string():
    rng = random.Random(3)
    for _ in range(3000):
        text = "".join(rng.choices("ab", k=rng.randrange(1, 40)))
        stops = ["".join(rng.choices("ab", k=rng.randrange(1, 7))) for _ in range(rng.randrange(1, 4))]
        # The first to be complete; of those complete at once the one that began first.
        complete = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        want = (text[: min(complete)[1]], True) if complete else (text, False)
        assert shown(text, stops) == want


def test_text_is_held_back_only_while_it_may_be_a_stop_string():
    answer = AnswerText(Letters(), ["aab", "xyz"])
    assert [answer.add(ord(sign)) for sign in "aaaxcxyq"] == ["", "", "a", "aa", "xc", "", "", "xyq"]


def test_long_stop_strings_that_almost_match_cost_a_step_or_two_a_letter():
    steps = 0

    class Counted(str):
        def __getitem__(self, at):
            nonlocal steps
            steps += 1
            return str.__getitem__(self, at)

    stops = [Counted("ab" * 10_000 + str(number)) for number in range(50)]
    answer = AnswerText(Letters(), stops)
    text = "ab" * 500 + "b" + "ab" * 500
    for sign in text:
        answer.add(ord(sign))
    assert steps < 8 * len(stops) * len(text)


def test_a_special_token_as_stop_string_is_a_token_to_stop_at():
    tokenizer = Tokenizer(REFERENCE)
    answer = AnswerText(tokenizer, ["<|im_end|>", "text", ""])
    assert answer.stop_tokens == {tokenizer.backend.token_to_id("<|im_end|>")}
    assert AnswerText(None, []).stop_tokens == set()
