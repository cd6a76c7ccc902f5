"""A folder of what Runtimes computed of prompts, for later ones to go on from; see saved_session.py.

A file that cannot be used says so in the log, and changes nothing but the time until the first token.
"""

import hashlib
import json
import logging
import os
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .pruning import PruneRule
from .saved_session import SUFFIX, Saved, Unusable, load_saved, read_saved, write_saved
from .sequences import Sequence

if TYPE_CHECKING:
    from .. import _core
    from .runtime import Runtime
    from .session import Session

LEAST = 16  # tokens that are worth a file, and reading one
log = logging.getLogger(__name__)


class SessionFolder:
    """A folder of saved sessions of one bundle and others, of at most `limit` bytes; the least recently used go first.

    Several processes may use a folder. Raises OSError if it cannot be made.
    """

    def __init__(self, folder: Path, limit: int, identity: str):
        self.folder, self.limit, self.identity = folder, limit, identity
        folder.mkdir(parents=True, exist_ok=True)
        self._known: dict[Path, Saved | None] = {}  # None: not usable here

    def keep(self, session: "Session", sequence: Sequence) -> bool:
        """Write what a sequence knows, if that is not there yet, and return whether that was done.

        Of a model whose state cannot be rewound, that is up to the end of the last message, from which the next prompt
        of a conversation usually goes on."""
        count = len(sequence.tokens)
        if session.plan.snapshots and count:
            count = session.engine.restorable(count - 1, sequence=sequence.number) or count
        ids = sequence.tokens[:count]
        if count < LEAST or sequence.rule.protect or ids == sequence.saved[:count]:
            return False
        if not self.save(session.engine, sequence.number, ids, sequence.rule):
            return False
        sequence.saved = ids
        return True

    def fetch(self, session: "Session", sequence: Sequence, prompt: list[int], rule: PruneRule, shared: int) -> int:
        """Read a file into a sequence if it has a longer prefix of `prompt` than `shared`, which is in memory.

        Returns how many tokens of the prompt the sequence then has."""
        found, count = self.longest(prompt, rule, bool(session.plan.snapshots))
        if found is None or count < shared + LEAST or len(found.ids) > session.plan.context:
            return len(sequence.tokens)
        session.truncate(sequence, 0)
        if self.load(found, session.engine, sequence.number):
            sequence.tokens[:] = sequence.saved = found.ids.tolist()
            sequence.rule = rule
            session.truncate(sequence, count)
        return len(sequence.tokens)

    def longest(self, ids: list[int], rule: PruneRule, whole: bool) -> tuple[Saved | None, int]:
        """The file that shares the longest prefix with `ids`, and how many tokens of it.

        whole: only files all of whose tokens agree, as a recurrent state cannot be rewound.
        """
        asked, wanted = np.asarray(ids, np.int32), _as_json(rule)
        found, most = None, 0
        for saved in self._files():
            if saved.rule != wanted:
                continue
            shared = saved.shared(asked)
            if shared > most and (not whole or shared == len(saved.ids)):
                found, most = saved, shared
        return found, most

    def load(self, saved: Saved, engine: "_core.Engine", sequence: int) -> bool:
        """load_saved(), with a line in the log if it fails."""
        try:
            load_saved(saved, engine, sequence)
            os.utime(saved.path)
        except (Unusable, OSError) as error:
            log.warning("%s; it is not used", error)
            self._known[saved.path] = None
            return False
        return True

    def save(self, engine: "_core.Engine", sequence: int, ids: list[int], rule: PruneRule) -> bool:
        """write_saved() under a name of its own, and remove what it replaces or has no room; a line in the log if that
        fails. Returns whether it is there."""
        needed = engine.saved_bytes(len(ids)) + 4 * len(ids) + 4096
        if needed > self.limit:
            log.warning("%s: a session of %d bytes is not saved: the limit is %d", self.folder, needed, self.limit)
            return False
        array = np.asarray(ids, np.int32)
        name = hashlib.blake2b(array.tobytes() + json.dumps(_as_json(rule)).encode(), digest_size=10).hexdigest()
        path = self.folder / f"{self.identity[:8]}-{name}{SUFFIX}"
        try:
            self._make_room(needed, path)
            write_saved(path, engine, sequence, array, self.identity, rule)
        except OSError as error:
            log.warning("%s: %s; this session is not saved", error.filename or path, error.strerror or error)
            return False
        return True

    def _files(self) -> list[Saved]:
        """Those of this identity."""
        there = set(self.folder.glob(f"{self.identity[:8]}-*{SUFFIX}"))
        self._known = {path: saved for path, saved in self._known.items() if path in there}
        for path in there - self._known.keys():
            try:
                saved = read_saved(path)
                self._known[path] = saved if saved.identity == self.identity else None
            except (Unusable, OSError) as error:
                log.warning("%s; it is not used", error)
                self._known[path] = None
        return [saved for saved in self._known.values() if saved]

    def _make_room(self, needed: int, but: Path) -> None:
        found = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            with suppress(OSError):
                about = path.stat()
                found.append((about.st_mtime, about.st_size, path))
        total = sum(size for _, size, path in found if path != but)
        for _, size, path in sorted(found):
            if total + needed <= self.limit:
                break
            if path != but:
                path.unlink(missing_ok=True)
                total -= size


def save_last(session: "Session", path: Path) -> int:
    """Write what the sequence that was used last knows, and return how many tokens that are.

    Raises ValueError if there is nothing that can be used again, and OSError."""
    sequence = max(session.sequences.all, key=lambda one: (bool(one.tokens), one.used))
    if not sequence.tokens:
        raise ValueError("there is nothing to save: no prompt was computed")
    if sequence.rule.protect:
        raise ValueError("what was computed under a rule that protects tokens of a prompt cannot be used again")
    ids = np.asarray(sequence.tokens, np.int32)
    write_saved(path, session.engine, sequence.number, ids, identity_of(session.runtime), sequence.rule)
    return len(ids)


def load_into(session: "Session", path: Path) -> int:
    """Read a file into the sequence that was used least recently, and return how many tokens it has; 0, with a line in
    the log, if it cannot be used here. Raises FileNotFoundError."""
    try:
        saved = read_saved(path)
        if saved.identity != identity_of(session.runtime) or len(saved.ids) > session.plan.context:
            raise Unusable(f"{path}: is of another bundle, context, type of cache or version")
        rule = PruneRule(**{**saved.rule, "threshold": tuple(saved.rule["threshold"])})
        sequence = min(session.sequences.all, key=lambda one: (one.call is not None, one.used))
        session.truncate(sequence, 0)
        load_saved(saved, session.engine, sequence.number)
    except FileNotFoundError:
        raise
    except (Unusable, OSError, KeyError, TypeError) as error:
        log.warning("%s; it is not used", error)
        return 0
    sequence.tokens[:], sequence.rule = saved.ids.tolist(), rule
    return len(saved.ids)


def identity_of(runtime: "Runtime") -> str:
    """What must agree for results to be the same: the bundle's weights, the model as planned, the cache's type and the
    version of this package; and whether MLX computed it, which arranges it otherwise."""
    bundle, about = runtime.bundle, hashlib.blake2b(digest_size=16)
    model, of_mlx = repr(bundle.config.planned(runtime.plan.context)), ["mlx"] if runtime.device == "mlx" else []
    for part in (version("edge-moe"), runtime.plan.kv, model, str(bundle.trunk_checksum), *of_mlx):
        about.update(part.encode() + b"\0")
    about.update(np.array([expert.checksum for expert in bundle.experts.values()], np.uint32).tobytes())
    return about.hexdigest()


def _as_json(rule: PruneRule) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(rule)))
