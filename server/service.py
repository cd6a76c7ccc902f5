"""What all requests share: the Runtime, its names, the queue, and how a request's answers are prepared and read."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ..runtime.answer import Generation
from ..runtime.answer_text import AnswerText
from ..runtime.channels import opened_thought
from ..runtime.prompt import PromptTooLong
from ..runtime.prompt_scores import PromptScores
from ..runtime.request import Templating, stop_strings
from ..runtime.runtime import Runtime
from ..runtime.sampling import sampling_defaults
from ..runtime.tokenizer import Tokenizer
from .asked import Asked
from .call_formats import format_of
from .calls import CallReader
from .errors import ApiError, invalid, late, too_long, unsupported
from .limits import Limits
from .memory import Backlogs, Budget
from .metrics import Metrics
from .reader import Event, MessageReader, PlainReader, Told
from .scheduler import Answer, Inbox, Scheduler
from .shapes import Shapes, TooComplex
from .token_texts import TokenTexts

TEMPLATING = frozenset(Templating.__annotations__)


@dataclass
class Service:
    """names: of the model, the first of which answers tell."""

    runtime: Runtime
    names: tuple[str, ...]
    limits: Limits = field(default_factory=Limits)
    now: Callable[[], int] = lambda: int(time.time())
    closing: bool = False

    def __post_init__(self) -> None:
        runtime = self.runtime
        self.metrics = Metrics(self)
        self.scheduler = Scheduler(runtime, self.limits.queue, self.limits.queue_tokens, self.metrics.step)
        self.bodies, self.backlogs = Budget(self.limits.bodies_bytes), Backlogs(self.limits.answers_bytes)
        self.texts = TokenTexts(runtime.tokenizer)
        self.started = self.now()
        self.sampling_defaults = sampling_defaults(runtime.bundle.path)
        template = "" if runtime.tokenizer is None else "".join(runtime.tokenizer.chat_templates.values())
        self.call_format = format_of(template)
        tokenizer, ends = runtime.tokenizer, runtime._end_tokens
        self.shapes = None if tokenizer is None else Shapes(tokenizer, runtime.config.vocab, ends, self.limits)
        about = f"{runtime.bundle.trunk_checksum} {runtime.bundle.expert_bytes} {runtime.plan.kv}"
        self.fingerprint = f"fp_{hashlib.sha256(about.encode()).hexdigest()[:10]}"

    @property
    def name(self) -> str:
        return self.names[0]

    def check_model(self, name: str) -> None:
        if name not in self.names:
            message = f"The model `{name[:200]}` does not exist; this server has `{self.name}`."
            raise ApiError(404, message, "model_not_found", "model")

    def tokenizer_for_messages(self) -> Tokenizer:
        tokenizer = self.runtime.tokenizer
        if tokenizer is None or tokenizer.chat_template is None:
            raise unsupported("This model has no chat template: a conversation", "use /v1/completions", "messages")
        return tokenizer

    def prepare(self, asked: Asked, owner: str, inbox: Inbox) -> "Reading":
        """Check a request's options and encode its prompts; computes nothing. Raises ApiError."""
        made = None
        if asked.shape is not None:
            made = self._shapes().matcher(*asked.shape, self.call_format)
        answers: list[Answer] = []
        readers: list[PlainReader | MessageReader] = []
        for prompt in asked.prompts:
            first: Answer | None = None
            for choice in range(asked.n):
                request = self._request(
                    asked, prompt if first is None else first.request.ids, choice, first is not None
                )
                if asked.score is not None and first is None:
                    request.scores = PromptScores(asked.score)
                if asked.max_tokens == 0:
                    request.max_tokens = 0
                tokenizer = self.runtime.tokenizer
                opened = opened_thought(tokenizer, request.ids) if tokenizer and asked.messages else ""
                if made is not None:
                    mask = self._shapes().processor(made.deep_copy(), opened, asked.messages)
                    request.choose = replace(request.choose, processors=(mask,))
                readers.append(MessageReader(opened, self._call_reader(asked)) if asked.messages else PlainReader())
                answers.append(Answer(request, len(answers), owner, inbox, first))
                first = first or answers[-1]
        return Reading(self, asked, answers, readers, inbox)

    def _request(self, asked: Asked, prompt, choice: int, encoded: bool):
        options = {**asked.options, "timeout": self.limits.timeout_s}
        if "seed" in options:
            options["seed"] += choice
        if encoded or not asked.messages:
            options = {name: value for name, value in options.items() if name not in TEMPLATING}
        param = "messages" if asked.messages else "prompt"
        try:
            request = self.runtime._request(prompt, asked.max_tokens or (1 if asked.max_tokens == 0 else None), options)
            if asked.calls:
                stops = stop_strings(options.get("stop"))
                request.text = AnswerText(self.runtime.tokenizer, stops, self.call_format.marks)
            return request
        except PromptTooLong as error:
            context = self.runtime.plan.context
            raise too_long(f"This model's maximum context length is {context} tokens; {error}.", param) from None
        except (ValueError, TypeError) as error:
            raise invalid(self.told(error), None) from None

    def _shapes(self) -> Shapes:
        if self.shapes is None:
            raise unsupported("This bundle has no tokenizer: a shape of answers", "leave it out")
        return self.shapes

    def _call_reader(self, asked: Asked) -> CallReader | None:
        return CallReader(self.call_format, asked.options["tools"]) if asked.calls else None

    def told(self, error: Exception) -> str:
        """An error's message without the places of files on this machine."""
        path = str(self.runtime.bundle.path)
        return str(error).removeprefix(f"{path}: ").replace(path, self.name) or type(error).__name__

    def begin_close(self) -> None:
        """Refuse new requests; running ones go on."""
        self.closing = True

    def close(self) -> None:
        self.begin_close()
        self.scheduler.close()


class Reading:
    """Reads the pieces of one request's answers, as events, until the last; then `tolds` are the whole answers."""

    def __init__(self, service: Service, asked: Asked, answers: list[Answer], readers: list, inbox: Inbox) -> None:
        self.service, self.asked, self.answers, self.readers, self.inbox = service, asked, answers, readers, inbox
        self.tolds = [Told() for _ in answers]
        self.left = len(answers)

    def submit(self) -> None:
        if self.service.closing:
            raise ApiError(503, "the server is shutting down", "shutting_down")
        self.service.scheduler.submit(self.answers)

    def cancel(self) -> None:
        """End what nobody waits for any more."""
        self.inbox.close()
        self.service.scheduler.cancel([one for one in self.answers if not one.over])

    async def next(self, timeout: float = 3600.0) -> tuple[int, Generation, list[Event]] | None:
        """The next piece of an answer, by its index, and its events; None if there is none for `timeout` seconds.
        Raises ApiError."""
        while True:
            try:
                found = await self.inbox.next(timeout)
            except ApiError:
                self.cancel()
                raise
            except TooComplex as error:
                raise invalid(
                    f"too complex: {error}", self.asked.shape and self.asked.shape[2], "invalid_schema"
                ) from None
            except (ValueError, MemoryError, OSError, RuntimeError) as error:
                raise ApiError(500, self.service.told(error), "engine_error") from None
            if found is None:
                return None
            answer, piece = found
            told = self.tolds[answer.index]
            if told.last_finish() is None:
                break
        reader = self.readers[answer.index]
        if piece.finish_reason == "cancelled" and self.service.closing:  # a part of an answer would look like a whole
            raise ApiError(503, "the server is shutting down", "shutting_down")
        if piece.finish_reason == "cancelled" and not told.begun:
            raise late(self.service.limits.timeout_s)
        events = reader.add(piece)
        if self.asked.one_call and reader.called and piece.finish_reason is None:
            self.service.scheduler.cancel([answer])
            piece = replace(piece, finish_reason="stop")
        told.add(piece, events, reader, keeps=not self.asked.stream)
        told.stop = answer.request.text.stop
        self.left -= piece.finish_reason is not None
        return answer.index, piece, events
