"""Runtime: a bundle loaded for inference under a memory cap, with generate(), stream(), batch() and logits().

Loading has a fixed order: the tokenizer, then the plan, which counts the interpreter's memory with the tokenizer in it,
then the engine, which allocates everything. After that only the caller's results take more memory.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from .. import _core
from ..devices.probe import default_threads, usable_processors
from .agreement import agree
from .answer import Account, Generation, whole_of
from .answer_text import AnswerText
from .bundle import Bundle
from .device import begin_device, begin_ranks
from .elastic import ElasticCap, SharedCap
from .engine_config import KV_TYPES, engine_config
from .mlx.memory import CACHE_PART, widened_bytes
from .plan import READERS, BelowFloor, Plan, check_sequences, make_plan, parse_bytes, with_cap, with_slots
from .process import (
    add_runtime,
    loading,
    others_bytes,
    process_cap,
    taken_bytes,
    warn_of_threads,
)
from .prompt import Prompt, prompt_ids
from .pruning import PruneRule, prune_rule, read_mask_routers
from .ram_share import RamShare
from .request import Chooser, Options, Request, Sampling, Templating, check_options, options_of, stop_strings
from .sampling import Sampler, whole_number
from .session import ALL, LAST, NOTHING, Session
from .session_folder import SessionFolder, identity_of, load_into, save_last
from .tokenizer import ENCODING_ROOM, tokenizer_of
from .tokenizer_file import reading_bytes
from .turn_tokens import end_tokens
from .turns import AsyncStream, Stream, Wanted

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .mlx.engine import MlxEngine

    Engine = _core.Engine | MlxEngine

TEXT_COPIES = 8  # bytes of memory per byte of a prompt: as read, as characters of 4 bytes, and in a chat template
DEFAULT_CONTEXT = 4096  # tokens, if the model supports as many


class Runtime:
    """A bundle loaded for inference under a hard memory cap; a context manager.

    bundle: path of NAME.emoe.
    ram: upper bound of this process's peak memory: "8GB", "8GiB", a number of bytes, or "auto", 80 % of free memory.
    context: length of the KV cache in tokens, by default 4096, or the model's maximum if that is smaller.
        LongRoPE chooses its factors by it.
    device: "cpu", "cuda", "mlx", or "auto": an NVIDIA GPU if this build has code for one, and on a Mac with Apple
        silicon MLX if it is installed.
    threads: for computation, by default as many as the process may use.
    prune: which of its experts a token may skip, for calls that do not say: "off"; a share of expert uses, as 0.2;
        "bundle", the share that the bundle was calibrated for; a rule by name ("loss", "otp", "share", "odp"), as
        "otp:0.2" with a share. The default is the bundle's, or "off" if it has none. With a rule that protects
        important tokens of a prompt (odp), results depend on the length of the prompt's chunks.
    logits_rows: maximum number of rows of logits that a step returns; generate() needs one.
    sequences: number of KV caches, and so of answers that are computed together.
    kv: type of keys and values in the cache, "float16" or "float32", which takes twice the memory.
    reserve_bytes: memory under the cap that is left to the program which this Runtime is a part of.

    Raises ValueError for bad options or a damaged bundle, FileNotFoundError for a missing one, and MemoryError for a
    cap below the floor, which the message names.

    Any number of threads may use a Runtime; it computes one step at a time. With one sequence, calls wait for one
    another; with several, as many calls share their steps. A stream counts as a call until it is exhausted, closed or
    cancelled, or until nobody has read from it for a tenth of a second while others wait. Any thread may read from it.
    A forked child cannot use its parent's Runtime.

    In a program that mlx.launch has started several times, with device "mlx", each process has the layers of one part
    of a bundle that `edge-moe split` has divided, and `bundle` is that part, or the directory with all of them. `ram`
    is the cap of each. All must make the same calls in the same order, from one thread; an error of one is raised on
    all. Each gets the whole answer: print it where `rank` is 0.
    """

    def __init__(
        self,
        bundle: str | Path,
        ram: int | str = "auto",
        context: int | None = None,
        device: str = "auto",
        threads: int | None = None,
        prune: float | str | None = None,
        *,
        logits_rows: int = 1,
        sequences: int = 1,
        kv: str = KV_TYPES[0],
        reserve_bytes: int = 0,
        kernels: str = "",
    ):
        if threads is not None and not 1 <= threads <= 1024:
            raise ValueError(f"threads is {threads}, expected 1 to 1024")
        if logits_rows < 1:
            raise ValueError(f"logits_rows is {logits_rows}, expected at least 1")
        check_sequences(sequences)
        warn_of_threads(threads or 1)
        self.ranks = begin_ranks(device)
        with loading, self._together("load"):
            ram_bytes = process_cap(ram)
            if _core.peak_bytes() > ram_bytes:
                _core.reset_peak_bytes()  # memory that the process has freed again does not count under this cap
            peak_before = min(_core.peak_bytes(), ram_bytes)
            ranks = self.ranks
            self.bundle = Bundle.open_part(bundle, ranks.rank, ranks.count) if ranks else Bundle.open(bundle)
            self.config = self.bundle.config
            self._prune = prune_rule(self.bundle.pruning, prune, self.bundle.path)
            mask_routers = read_mask_routers(self.bundle.path, self.bundle.pruning, self.bundle.table)
            context = min(DEFAULT_CONTEXT, self.config.context) if context is None else context
            if not 1 <= context <= self.config.context:
                raise ValueError(f"context is {context}, expected 1 to {self.config.context}, the model's own")
            self.threads = threads or default_threads()
            self.logits_rows = max(min(logits_rows, context), sequences)
            self.device = begin_device(device)

            def plan(interpreter_bytes: int, loading_bytes: int, most_chunk: int | None = None) -> Plan:
                return make_plan(
                    self.bundle.sizes,
                    trunk_bytes=self.bundle.trunk_bytes
                    + (widened_bytes(self.bundle.trunk) if self.device == "mlx" else 0)
                    + _mask_bytes(mask_routers),
                    all_experts_bytes=self.bundle.expert_bytes,
                    slot_bytes=max(expert.nbytes for expert in self.bundle.experts.values()),
                    ram_bytes=ram_bytes,
                    context=context,
                    interpreter_bytes=interpreter_bytes,
                    loading_bytes=loading_bytes,
                    logits_rows=self.logits_rows,
                    reserve_bytes=reserve_bytes,
                    threads=self.threads,
                    kv=kv,
                    device=self.device,
                    sequences=sequences,
                    table_bytes=self.bundle.table_bytes,
                    ranks=self.rank_count,
                    most_chunk=most_chunk,
                )

            try:
                taken, reading = taken_bytes(), reading_bytes(self.bundle.path)
                if others_bytes() or taken < ram_bytes < taken + reading:
                    plan(
                        taken + reading, taken + reading
                    )  # refuses before the tokenizer takes more than the cap leaves
                self.tokenizer = tokenizer_of(self.bundle.path)
                if self.tokenizer is not None:
                    self.tokenizer.prepare_chat(ram_bytes - taken_bytes())
                self._end_tokens, self._turn_ends = end_tokens(self.tokenizer, self.config.eos_tokens, ENCODING_ROOM)
                peak = _core.peak_bytes()
                known = taken_bytes(), peak if peak > peak_before else 0
                self.plan = plan(*known)
                if self.ranks:
                    agreed = agree(self.ranks, self.bundle, self.plan, logits_rows=self.logits_rows, prune=prune)
                    self.plan = replace(plan(*known, agreed.chunk), snapshots=agreed.snapshots)
                    self._seeds = agreed.seeds
            except BelowFloor as error:
                if others := others_bytes():
                    about = f"; other Runtimes of this process have {others / 1e6:,.0f} MB of it"
                    raise BelowFloor(error.plan, about) from None
                raise
            load = self._load_mlx if self.device == "mlx" else self._load
            self._engine: Engine | None = load(mask_routers, kv, kernels)
        self._session = Session(self)
        self._elastic: ElasticCap | SharedCap | None = None
        self._process = os.getpid()
        add_runtime(self)

    def _load(self, mask_routers: dict[str, list[np.ndarray]], kv: str, kernels: str) -> "Engine":
        plan = self.plan
        config = engine_config(
            self.config, plan.context, plan.chunk, self.logits_rows, self.threads, kv, plan.sequences, plan.snapshots
        )
        config.spin = self.threads <= usable_processors()
        layouts, records, frequency = self.bundle.record_table()
        try:
            return _core.Engine(
                config,
                str(self.bundle.path / "trunk.safetensors"),
                self.bundle.trunk_bytes,
                self.bundle.trunk_checksum,
                self.bundle.trunk_table(),
                [str(path) for path in self.bundle.files],
                layouts,
                records,
                frequency,
                self.plan.resident and self.device == "cpu",
                self.plan.experts_bytes,
                READERS,
                kernels,
                device=self.device,
                tables=[table.as_row() for table in self.bundle.tables],
                graphs=os.environ.get("EDGE_MOE_CUDA_GRAPHS") != "0",  # to see what they are worth
                **mask_routers,
            )
        except (_core.DamagedFile, RuntimeError) as error:  # RuntimeErrors are a GPU's, which another device avoids
            raise ValueError(str(error)) from None

    def _load_mlx(self, mask_routers: dict[str, list[np.ndarray]], kv: str, kernels: str) -> "MlxEngine":
        from .mlx.engine import MlxEngine, Sizes, most_slot_bytes

        if kernels:
            raise ValueError(f"kernels is {kernels!r}, but device mlx has no kernel sets to choose from")
        plan = self.plan
        sizes = Sizes(
            plan.context,
            plan.chunk,
            self.logits_rows,
            kv,
            plan.sequences,
            plan.snapshots,
            readers=READERS,
            cache_bytes=plan.scratch_bytes // CACHE_PART,
            cap_bytes=plan.ram_bytes if sys.platform == "darwin" else 0,  # elsewhere nothing but the plan is taken
        )

        def slot_bytes() -> int:
            taken = plan.interpreter_bytes - plan.spare_bytes + plan.trunk_bytes + plan.kv_cache_bytes
            more = max(0, taken_bytes() - taken)  # than was planned: of Metal's driver, for example
            left = with_cap(plan, self.bundle.sizes, plan.ram_bytes, plan.interpreter_bytes + more, self.device)
            self.plan = with_slots(left, self.bundle.sizes, min(left.experts_bytes, most_slot_bytes()))
            return self.plan.experts_bytes

        try:
            return MlxEngine(self.bundle, sizes, mask_routers, slot_bytes, self.ranks)
        except _core.DamagedFile as error:
            raise ValueError(str(error)) from None

    @property
    def rank(self) -> int:
        """The number of this process among those that run the model together; 0 if it runs alone."""
        return self.ranks.rank if self.ranks else 0

    @property
    def rank_count(self) -> int:
        return self.ranks.count if self.ranks else 1

    def _together(self, what: str) -> AbstractContextManager[None]:
        """Raise an error of the block on all ranks; with one process nothing."""
        return self.ranks.together(what.encode()) if self.ranks else nullcontext()

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory, after the step that another thread may be computing; later calls raise ValueError."""
        self._engine = None
        if self._elastic:
            self._elastic.stop()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a Runtime cannot be copied or pickled; make another one from its bundle")

    @property
    def is_open(self) -> bool:
        return self._engine is not None

    @property
    def stats(self) -> dict:
        """The engine's counters since loading, with the cap (ram_bytes) and the peak of memory (peak_memory_bytes)."""
        counters = dict(self._open().counters)
        return {**counters, "ram_bytes": self.plan.ram_bytes, "peak_memory_bytes": self._peak_bytes(counters)}

    def set_ram(self, ram: int | str) -> Plan:
        """Lower or raise the cap between two steps of running calls, and return the new plan. Results do not change.

        When this returns, memory above the new cap has been given back to the system; added memory fills as experts are
        used. The context and the maximum length of a step stay. ram: as for Runtime(). Raises BelowFloor, and changes
        nothing, if the new cap is below the floor.
        """
        if self.ranks:
            with self._together("cap"):  # if one refuses, none changes anything
                self._with_cap(ram)
        return self.change_cap(ram)

    def change_cap(self, ram: int | str) -> Plan:
        """set_ram() on this rank alone, where several run the model."""
        with loading, self._session.turns.between():
            engine, before, plan = self._open(), self.plan, self._with_cap(ram)
            ram_bytes = plan.ram_bytes
            if plan.experts_bytes != before.experts_bytes or plan.resident != before.resident:
                engine.resize_slots(plan.experts_bytes)
            if sys.platform == "darwin" and self.device == "mlx":
                engine.cap_bytes = ram_bytes
            self.plan = plan
            if ram_bytes < before.ram_bytes:
                _core.return_freed_memory()
                _core.reset_peak_bytes()
            return plan

    def _with_cap(self, ram: int | str) -> Plan:
        self._open()
        ram_bytes, before = process_cap(ram, of=self), self.plan
        own = before.total_bytes - before.interpreter_bytes - before.io_buffers_bytes
        others = taken_bytes() - own - before.spare_bytes  # Python, and other Runtimes
        return with_cap(before, self.bundle.sizes, ram_bytes, max(before.interpreter_bytes, others), self.device)

    def generate(self, prompt: Prompt, max_tokens: int | None = 256, **options: "Unpack[Options]") -> Generation:
        """Complete a prompt and return the whole answer.

        prompt: a text, which is continued as it stands; chat messages, which the model's chat template turns into a
        text; or token ids, the only kind for a bundle without a tokenizer, whose answers have `tokens` alone.
        max_tokens: maximum length of the answer; None is the rest of the context. All options are keywords:

        temperature (0, the most likely token), top_p (1), top_k (0, all), min_p (0), repetition_penalty (1),
        presence_penalty (0), frequency_penalty (0), logit_bias, seed: how a token is sampled; see Sampler.
        logits_processors: functions (tokens, logits) -> logits, applied in order before sampling. tokens are the ids of
        the prompt and the answer so far; logits is a float32 array (vocab,), which may be changed in place; -inf
        forbids a token.
        logprobs, top_logprobs (0): return the log probability of each token, and of so many alternatives to it.
        stop: texts that end the answer, which does not include them; special tokens may be given by name.
        tools, documents, continue_final_message, chat_template_kwargs: arguments of Tokenizer.apply_chat_template().
        prune: which experts a token may skip, as for Runtime(), which has the default.
        timeout: in seconds, with the time spent waiting for other calls. stop_event: a threading.Event. When the
        timeout has passed, or the event is set, the answer ends there, with the finish_reason "cancelled".
        progress: called as progress("prompt", tokens read, tokens of the prompt) while the prompt is read.

        Tokens of the prompt that an earlier call left in the KV cache are not computed again; the result is the same.
        The answer ends after max_tokens, at an end token, at a stop text, or when the context is full. Raises
        ValueError for a prompt that is empty or longer than the context, ValueError or TypeError for an invalid option,
        and TypeError for an unknown one.
        """
        return whole_of(self.stream(prompt, max_tokens, **options))

    def stream(self, prompt: Prompt, max_tokens: int | None = 256, **options: "Unpack[Options]") -> Stream[Generation]:
        """generate(), yielding pieces of the answer as they are computed. The stream's cancel() ends the answer."""
        request = self._request(prompt, max_tokens, options)
        if self.plan.sequences == 1:
            return Stream(self._pieces(request), request.wanted, lambda: self._leave(request.wanted))
        return Stream(self._joined(request), request.wanted, lambda: self._session.leave(request))

    def stream_async(
        self, prompt: Prompt, max_tokens: int | None = 256, **options: "Unpack[Options]"
    ) -> AsyncStream[Generation]:
        """stream(), for use with `async for`.

        Streams that run at the same time are computed together, as many as the Runtime has `sequences`.
        """
        return AsyncStream(self.stream(prompt, max_tokens, **options))

    def batch(
        self,
        requests: Sequence[Prompt | Mapping[str, object]],
        max_tokens: int | None = 256,
        **options: "Unpack[Options]",
    ) -> list[Generation]:
        """Complete several prompts at once and return their answers in order.

        A request is a prompt, or a dict of generate()'s arguments, which override `max_tokens` and `options`, so each
        request can have its own pruning and sampling. As many requests are computed together as the Runtime has
        `sequences`, the others after them; each answer has the same bits as alone. Errors of generate() are raised
        before anything is computed.
        """
        asked = []
        for given in requests:
            own = {"max_tokens": max_tokens, **options, **(given if isinstance(given, Mapping) else {"prompt": given})}
            if "prompt" not in own:
                raise ValueError("a request has no prompt")
            asked.append(self._request(own.pop("prompt"), own.pop("max_tokens"), own))
        try:
            for request in asked:
                request.ahead = self.plan.context
                self._session.join(request)
            return [whole_of(self._pieces_together(request)) for request in asked]
        finally:
            for request in asked:
                self._session.leave(request)

    def _joined(self, request: Request) -> Iterator[Generation]:
        self._session.join(request)
        yield from self._pieces_together(request)

    def _pieces_together(self, request: Request) -> Iterator[Generation]:
        while True:
            self._open()
            piece = self._session.next(request)
            yield piece
            if piece.finish_reason is not None:
                return

    def _request(self, prompt, max_tokens, options: Mapping[str, Any]) -> Request:
        """Check the arguments of a call."""
        self._open()
        with self._together("request"):
            return self._checked(prompt, max_tokens, options)

    def _checked(self, prompt, max_tokens, options: Mapping[str, Any]) -> Request:
        check_options(options)
        rule = self._rule(options.get("prune"))
        wanted = self._wanted(options.get("timeout"), options.get("stop_event"))
        if max_tokens is not None and whole_number("max_tokens", max_tokens) < 1:
            raise ValueError(f"max_tokens is {max_tokens}, expected at least 1")
        stops = stop_strings(options.get("stop"))
        if stops and self.tokenizer is None:
            raise ValueError(f"{self.bundle.path}: this bundle has no tokenizer; stop strings need one")
        ids = self._prompt_ids(prompt, **options_of(Templating, options))
        sampling = options_of(Sampling, options)
        if self.ranks and sampling.get("seed") is None:
            sampling["seed"] = next(self._seeds)
        sampler = Sampler(**sampling, prompt=ids, vocab=self.config.vocab)
        return Request(
            ids,
            max_tokens or self.plan.context,
            self.plan.context,
            Chooser.of(sampler, options),
            AnswerText(self.tokenizer, stops),
            self._end_tokens,
            rule,
            wanted,
            Account(self, len(ids)),
            options.get("progress"),
        )

    def _wanted(self, timeout: float | None, stop_event: threading.Event | None) -> Wanted:
        """Until when a call is wanted. Of several ranks the first decides, by what it sends to the others."""
        wanted = Wanted(timeout, stop_event)
        if self.ranks and self.plan.sequences > 1 and (timeout is not None or stop_event is not None):
            raise ValueError("timeout and stop_event need one sequence where several ranks run a model")
        return wanted if self.rank == 0 else Wanted()

    def _pieces(self, request: Request) -> Iterator[Generation]:
        account, unwanted = request.account, self._unwanted(request.wanted)
        steps = self._steps(request)
        ended = False
        try:
            while not ended:
                with self._session.turns.take(request.wanted, unwanted), account.turn():
                    pieces = [next(steps)]
                    while pieces[-1].finish_reason is None and account.runs_ahead():
                        pieces.append(next(steps))
                ended = pieces[-1].finish_reason is not None
                yield from pieces
        except _core.Interrupted:
            yield request.cancelled()

    def _steps(self, request: Request) -> Iterator[Generation]:
        """Yield a piece per step; each step needs a turn of its own."""
        session, call, unwanted = self._session, request.wanted, self._unwanted(request.wanted)
        logits, computed, _ = session.prefill(call, request.ids, [], request.rule, unwanted, request.progress)
        request.account.prefilled(computed)
        while True:
            piece = request.take(logits)
            yield piece
            if piece.finish_reason is not None:
                return
            sequence = session.sequences.of(call)
            if sequence is not None:
                logits = session.step(sequence, request.tokens[-1:], LAST, unwanted)[-1]
            else:
                logits, _, seconds = session.prefill(call, request.ids, request.tokens, request.rule, unwanted)
                request.account.recomputed(seconds)

    def logits(self, token_ids, *, prune: float | str | None = None) -> np.ndarray:
        """Return the logits of every position of one sequence: token_ids (tokens,) -> float32 (tokens, vocab).

        The plan does not count the array. Raises ValueError for a sequence that is empty or longer than the context,
        and for an id outside the vocabulary.
        """
        return np.concatenate(list(self.logits_blocks(token_ids, prune=prune)))

    def logits_blocks(self, token_ids, *, prune: float | str | None = None) -> Iterator[np.ndarray]:
        """Yield logits() in blocks of at most `logits_rows` rows, so that not all need memory at once."""
        self._open()
        rule, call, session = self._rule(prune), Wanted(), self._session
        ids, rows = self._prompt_ids(np.asarray(token_ids).reshape(-1).tolist()), self.logits_rows
        try:
            for at in range(0, len(ids), rows):
                with session.turns.take(call, self._unwanted(call)):
                    sequence = session.sequences.of(call)
                    if sequence is None:
                        sequence = session.begin(call, ids, rule)
                        session.truncate(sequence, 0)
                        for before in range(0, at, rows):
                            session.step(sequence, ids[before : before + rows], NOTHING, self._unwanted(call))
                        sequence.call = call
                    block = session.step(sequence, ids[at : at + rows], ALL, self._unwanted(call))
                yield block
        finally:
            self._leave(call)

    def follow_memory(self, tell: Callable[[str], None] = lambda line: None) -> None:
        """Lower the cap while other programs need memory, and raise it again, up to what it is now, when they do not,
        until this Runtime is closed. tell: called with a sentence for each change and its reason, from a thread.

        See runtime/elastic.py for when and by how much. Results do not change.
        """
        self._elastic = ElasticCap(self, tell)
        self._elastic.start()

    def follow_share(self, share: RamShare, tell: Callable[[str], None] = lambda line: None) -> None:
        """Keep this Runtime's cap at its part of a share that it has joined, until it is closed; see RamShare. tell: as
        for follow_memory(). Results do not change."""
        self._elastic = SharedCap(self, share, tell)
        self._elastic.start()

    def keep_sessions(self, folder: str | Path, limit: int | str = "10GB") -> None:
        """Keep what was computed of prompts and answers in files of a folder, so that a prompt that goes on from one
        of them after a restart is not computed again. Results do not change.

        A file is written when another prompt takes its place in memory, and by save_sessions(); a prompt reads the file
        that has most of it. limit: of the folder's files together, whose least recently used ones make room. A file
        that is damaged, or of another bundle, rule of pruning or type of cache, is left aside with a line in the log.
        Files have what was said: keep the folder as private. Raises ValueError for a device that cannot do this, and
        OSError for a folder that cannot be made.
        """
        self._session.folder = SessionFolder(Path(folder), parse_bytes(limit), identity_of(self))

    @property
    def keeps_sessions(self) -> bool:
        """Whether keep_sessions() was called."""
        return self._session.folder is not None

    def save_sessions(self) -> int:
        """Write the sessions that are in memory to the folder of keep_sessions(), between two steps of running calls.

        Returns how many were written; failures are lines in the log. Raises ValueError without a folder.
        """
        session = self._session
        if (folder := session.folder) is None:
            raise ValueError("there is no folder for sessions; call keep_sessions() first")
        with session.turns.between():
            return sum(folder.keep(session, sequence) for sequence in session.sequences.all)

    def save_session(self, path: str | Path) -> int:
        """Write what was computed of the last prompt and its answer to one file, and return how many tokens it has.

        Raises ValueError if there is nothing, or the device cannot do this, and OSError if writing fails.
        """
        with self._session.turns.between():
            return save_last(self._session, Path(path))

    def load_session(self, path: str | Path) -> int:
        """Read a file of save_session(), for the next prompts to go on from, and return how many tokens it has; 0, with
        a line in the log, for a file that is damaged, or of another bundle or type of cache.

        Raises ValueError for a device that cannot do this, and FileNotFoundError for a missing file.
        """
        with self._session.turns.between():
            return load_into(self._session, Path(path))

    def reset(self) -> None:
        """Empty the KV caches of all sequences."""
        self._open()
        with self._session.turns.take(call := Wanted()):
            for sequence in self._session.sequences.all:
                self._session.truncate(sequence, 0)
        self._session.turns.leave(call)

    def _leave(self, call: object) -> None:
        self._session.sequences.leave(call)
        self._session.turns.leave(call)

    def _unwanted(self, wanted: Wanted) -> Callable[[], bool]:
        return lambda: wanted.is_over() or self._engine is None

    def _open(self) -> "Engine":
        if self._engine is None:
            raise ValueError("this Runtime is closed")
        if self._process != os.getpid():
            raise ValueError(
                f"this Runtime was made in process {self._process}, of which this one, {os.getpid()}, is a forked "
                "child without its threads; make a Runtime here"
            )
        return self._engine

    def _peak_bytes(self, counters: dict) -> int:
        """The process's peak, plus its memory on a GPU, which the peak does not include and which never grows."""
        return _core.peak_bytes() + counters["uncounted_bytes"]

    @property
    def prompt_bytes_limit(self) -> int:
        """Maximum size of a prompt in bytes of UTF-8: what may fit the context, and the memory left for text."""
        longest = self.tokenizer.longest_token_bytes if self.tokenizer else 1
        return min(self.plan.context * longest, self._text_room_bytes() // TEXT_COPIES)

    def _text_room_bytes(self) -> int:
        """Memory for encoding a prompt: what the plan spares for that, and what the cap leaves now."""
        return ENCODING_ROOM + max(0, self.plan.ram_bytes - taken_bytes())

    def _prompt_ids(self, prompt: Prompt, **chat) -> list[int]:
        return prompt_ids(
            prompt,
            self.tokenizer,
            context=self.plan.context,
            vocab=self.config.vocab,
            room_bytes=self._text_room_bytes,
            where=self.bundle.path,
            **chat,
        )

    def _rule(self, prune: float | str | None) -> PruneRule:
        return self._prune if prune is None else prune_rule(self.bundle.pruning, prune, self.bundle.path)


def _mask_bytes(mask_routers: dict[str, list[np.ndarray]]) -> int:
    """Bytes of the mask routers in the engine, with the alignment of each piece."""
    layers = [values for rule in mask_routers.values() for values in rule]
    return sum(4 * len(values) + 2 * _core.PART_ALIGNMENT for values in layers)
