"""`edge-moe generate`: answers one prompt, or continues one text."""

import sys
from dataclasses import asdict
from pathlib import Path

import typer

from ..terminal import AnswerWriter, PromptProgress, has_colours, show
from . import options
from .options import argument, option
from .output import only_first, print_json
from .sampling import takes_sampling

CONTINUED_TOKENS = 64  # default maximum if a text is continued, as it need not end by itself
ONE = "an argument, -p TEXT, -f FILE or --tokens 1,2,3"

PromptArgument = argument(str | None, "PROMPT", "The prompt; - reads it from stdin, which is the default for a pipe.")
Prompt = option(str | None, "-p", "--prompt", metavar="TEXT", section=options.PROMPT_SECTION, help="The prompt.")
PromptFile = option(
    str | None, "-f", "--file", metavar="FILE", section=options.PROMPT_SECTION, help="Read the prompt from this file."
)
TokenIds = option(
    str | None,
    "--tokens",
    metavar="1,2,3",
    section=options.PROMPT_SECTION,
    help="Token ids instead of a prompt; the output is token ids too.",
)
Raw = option(
    bool,
    "--raw",
    section=options.PROMPT_SECTION,
    help="Continue the prompt as it is, without the model's chat template.",
)
MaxTokens = option(
    int | None, "-n", "--max-tokens", metavar="N", parser=options.tokens_of,
    help="Maximum tokens of the answer; -1: until the context is full [default: -1; without a chat template, 64].",
)  # fmt: skip
Logprobs = option(
    int | None, "--logprobs", metavar="N",
    help="With --json: the log probability of each token and of the N likeliest.",
)  # fmt: skip
Stop = option(list[str] | None, "--stop", metavar="TEXT", help="End the answer before this text; repeatable.")


@takes_sampling
def generate(
    bundle: options.Bundle,
    prompt: PromptArgument = None,
    text: Prompt = None,
    file: PromptFile = None,
    tokens: TokenIds = None,
    system: options.System = None,
    raw: Raw = False,
    thinking: options.Thinking = None,
    chat_template_kwargs: options.TemplateKwargs = None,
    max_tokens: MaxTokens = None,
    stop: Stop = None,
    logprobs: Logprobs = None,
    *,
    sampling: dict,
    ram: options.Ram = "auto",
    context: options.Context = None,
    kv: options.Kv = options.KvType.float16,
    device: options.Device = "auto",
    threads: options.Threads = None,
    prune: options.Prune = None,
    json_output: options.Json = False,
) -> None:
    """Answer a prompt.

    With a chat template, the prompt is a user message; without one, or with --raw, the model continues it as a text.
    """
    given = [one for one in (prompt, text, file, tokens) if one is not None]
    if len(given) > 1 or not (given or options.stdin_has_text()):
        raise typer.BadParameter(f"give one prompt: {ONE}" + ("" if given else ", or through a pipe"))
    if system is not None and (raw or tokens is not None):
        raise typer.BadParameter("--system needs a message as the prompt: leave --raw and --tokens out")
    if logprobs is not None and not json_output:
        raise typer.BadParameter("--logprobs needs --json")
    from ..report import default_pruning_text, statistics_text
    from ..runtime.channels import opened_thought
    from ..runtime.runtime import Runtime
    from ..runtime.sampling import sampling_defaults

    if file not in (None, "-") and not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file")
    start = None if tokens is None else token_ids_of(tokens)
    sampling |= options.given(stop=stop)
    if logprobs is not None:
        sampling |= {"logprobs": True, "top_logprobs": logprobs}
    told = options.template_kwargs(thinking, chat_template_kwargs)
    run = {"device": device, "threads": threads, "kv": kv.value}
    with (
        Runtime(bundle, ram, context, prune=options.prune_of(prune), **run) as runtime,
        only_first(runtime.rank),
        PromptProgress(quiet=json_output) as progress,
    ):
        if start is None:
            start = _text_of(prompt if text is None else text, file, runtime)
        templated = not raw and tokens is None and getattr(runtime.tokenizer, "chat_template", None) is not None
        if system is not None and not templated:
            raise ValueError(f"{bundle}: this model has no chat template; --system needs one")
        if templated:
            if said := options.thinking_note(runtime.tokenizer, thinking):
                show(said, sys.stderr)
            start = [*options.system_messages(system), {"role": "user", "content": start.removesuffix("\n")}]
            sampling = {**sampling_defaults(runtime.bundle.path), **sampling, "chat_template_kwargs": told}
        if max_tokens is None:
            max_tokens = -1 if templated else CONTINUED_TOKENS
        pieces = runtime.stream(start, None if max_tokens == -1 else max_tokens, progress=progress, **sampling)
        opened = False
        if templated and has_colours(sys.stdout):
            opened = bool(opened_thought(runtime.tokenizer, runtime._prompt_ids(start, chat_template_kwargs=told)))
        writer = AnswerWriter(sys.stdout, opened, apart=templated)
        generation, interrupted = _print_pieces(pieces, None if json_output else writer, ids=tokens is not None)
    if runtime.rank:
        pass  # the first rank has printed the same answer
    elif json_output:
        print_json({**asdict(generation), "logprobs": _json_logprobs(generation)})
    else:
        show(statistics_text(generation), sys.stderr)
        if said := default_pruning_text(runtime.bundle.pruning, prune):
            show(said, sys.stderr)
    if interrupted:
        raise typer.Exit(130)


def _json_logprobs(generation) -> list[dict] | None:
    """The log probabilities for JSON, which has no infinity: it becomes -9999, as in OpenAI's API."""
    if generation.logprobs is None:
        return None
    return [
        {**asdict(told), "top_logprobs": [(token, max(value, -9999.0)) for token, value in told.top_logprobs]}
        for told in generation.logprobs
    ]


def _print_pieces(pieces, writer: AnswerWriter | None, ids: bool):
    """Write pieces as they come if there is a writer; returns them as one Generation, and whether Ctrl-C ended them."""
    from ..runtime.answer import whole_of

    seen, interrupted = [], False
    try:
        for piece in pieces:
            seen.append(piece)
            if writer:
                writer.write("".join(f"{token} " for token in piece.tokens) if ids else piece.text)
    except KeyboardInterrupt:
        if not (seen and writer):
            raise
        interrupted = True
    finally:
        if writer and seen:
            writer.end()
    return whole_of(seen), interrupted


def _text_of(prompt: str | None, file: str | None, runtime) -> str:
    """The prompt as given, or read from stdin or a file.

    Raises ValueError for more bytes than the Runtime could take, without reading on, and for text that is not UTF-8.
    """
    if prompt not in (None, "-"):
        return prompt
    name, limit = "stdin" if file in (None, "-") else file, runtime.prompt_bytes_limit
    if name == "stdin" and runtime.rank_count > 1:
        raise ValueError(
            "stdin: mlx.launch does not end it; give the prompt as an argument, or in a file on each machine"
        )
    with open(sys.stdin.fileno() if name == "stdin" else name, "rb", closefd=name != "stdin") as handle:
        data = handle.read(limit + 1)
    if len(data) > limit:
        raise ValueError(
            f"{name}: more than {limit:,} bytes, which is more than the context of {runtime.plan.context:,} tokens and "
            "the memory under the cap can hold; shorten it, or raise --context and --ram"
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 text, from byte {error.start:,} on; convert it first") from None


def token_ids_of(text: str) -> list[int]:
    try:
        return [int(token) for token in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"tokens {text!r} are not whole numbers separated by commas") from None
