"""The tokens that end answers and other messages: those that a model's files declare, and those of its chat template.

A template's are found by rendering a short conversation. The special token after an answer ends it also where the files
declare another one, as those of fine-tuned models may. The one after a user's message is where the next prompt of a
conversation departs from this one, if the template leaves thoughts out.
"""

from collections.abc import Iterable

from .tokenizer import Tokenizer

QUESTION, THOUGHT, ANSWER, NEXT = "qzvquestion", "qzvthought", "qzvanswer", "qzvnext"  # in no template


def end_tokens(
    tokenizer: Tokenizer | None, declared: Iterable[int], room_bytes: int | None = None
) -> tuple[set[int], set[int]]:
    """The ids of the tokens that end an answer, and of those that end any message.

    declared: ids that config.json and generation_config.json name. room_bytes: memory that rendering may take.
    """
    answer = set(declared)
    if tokenizer is None:
        return answer, answer
    if tokenizer.end_token is not None:
        answer.add(tokenizer.end_token)
    after_answer, after_message = _in_template(tokenizer, answer, room_bytes)
    return answer | after_answer, answer | after_answer | after_message


def _in_template(tokenizer: Tokenizer, ends: set[int], room_bytes: int | None) -> tuple[set[int], set[int]]:
    """The special tokens after an answer, unless one of `ends` is there, and after a user's message."""
    user, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
    reasoned = {**answer, "reasoning_content": THOUGHT}
    try:
        talk = tokenizer.render_chat([user, answer, {**user, "content": NEXT}], room_bytes=room_bytes)
        thought = tokenizer.render_chat([user, reasoned], add_generation_prompt=False, room_bytes=room_bytes)
    except ValueError:  # no template, or one for other conversations
        return set(), set()
    between, _, behind = talk.partition(ANSWER)[2].partition(NEXT)
    after_answer, after_message = tokenizer.special_token_at(between), tokenizer.special_token_at(behind)
    if tokenizer.has_special(ends, between):
        after_answer = set()
    # What also ends a thought, as in harmony, does not end an answer; a template may leave the thought out.
    _, is_shown, rest = thought.partition(THOUGHT)
    if tokenizer.reads_reasoning() and (not is_shown or tokenizer.has_special(after_answer, rest.partition(ANSWER)[0])):
        after_answer = set()
    return after_answer, after_message
