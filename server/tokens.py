"""/tokenize and /detokenize: what a text or a conversation is in tokens, and back."""

from typing import TYPE_CHECKING

from ..runtime.prompt import PromptTooLong
from .errors import invalid, too_long, unsupported
from .fields import array, flag, object_, read, text
from .messages import messages_of, template_arguments, tools_of

if TYPE_CHECKING:
    from .service import Service

TOKENIZE = {
    "model": text(),
    "prompt": text(),
    "content": text(),
    "messages": array(),
    "tools": array(),
    "add_special_tokens": flag(True),
    "add_generation_prompt": flag(True),
    "chat_template_kwargs": object_(),
}
DETOKENIZE = {"model": text(), "tokens": array(required=True)}


def tokenize(body: object, service: "Service") -> dict:
    """The tokens of `prompt` (or `content`), or of `messages` as the chat template renders them."""
    its = read(body, TOKENIZE)
    if its["model"] is not None:
        service.check_model(its["model"])
    runtime = service.runtime
    given = [its[name] for name in ("prompt", "content", "messages") if its[name] is not None]
    if len(given) != 1:
        raise invalid("Give one of 'prompt', 'content' and 'messages'.", "prompt", "missing_required_parameter")
    if runtime.tokenizer is None:
        raise unsupported("This bundle has no tokenizer: text", "give token ids as prompts")
    try:
        if its["messages"] is None:
            found = runtime.tokenizer._encode(given[0], its["add_special_tokens"], None, runtime._text_room_bytes())
        else:
            tokenizer = service.tokenizer_for_messages()
            found = runtime._prompt_ids(
                messages_of(given[0], tokenizer),
                tools=tools_of(its["tools"], service.limits),
                chat_template_kwargs=template_arguments(tokenizer, None, its["chat_template_kwargs"]),
            )
    except PromptTooLong as error:
        raise too_long(f"{error}.", "messages") from None
    except ValueError as error:
        raise invalid(service.told(error)) from None
    return {"tokens": found, "count": len(found), "max_model_len": runtime.plan.context}


def detokenize(body: object, service: "Service") -> dict:
    its = read(body, DETOKENIZE)
    if its["model"] is not None:
        service.check_model(its["model"])
    runtime, tokens = service.runtime, its["tokens"]
    for place, token in enumerate(tokens):
        if type(token) is not int or not 0 <= token < runtime.config.vocab:
            raise invalid(f"Invalid 'tokens[{place}]': expected a token id, 0 to {runtime.config.vocab - 1}.", "tokens")
    if runtime.tokenizer is None:
        raise unsupported("This bundle has no tokenizer: text", "use token ids")
    prompt = runtime.tokenizer.decode(tokens)
    return {"prompt": prompt, "content": prompt}
