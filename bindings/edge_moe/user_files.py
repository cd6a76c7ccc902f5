"""The directories for a user's state and cache, where the system has them, which only that user can read."""

import os
import sys
from pathlib import Path


def state_directory() -> Path:
    """The directory for persistent state that is not configuration: the history of chats. Created if missing.

    Raises OSError if it cannot be created.
    """
    return _directory("XDG_STATE_HOME", ".local/state", "Library/Application Support")


def cache_directory() -> Path:
    """The directory for what can be measured again: the speed of this machine. Created if missing; raises OSError."""
    return _directory("XDG_CACHE_HOME", ".cache", "Library/Caches")


def _directory(variable: str, usual: str, on_mac: str) -> Path:
    named = os.environ.get(variable, "")
    base = Path(named) if os.path.isabs(named) else Path.home() / (on_mac if sys.platform == "darwin" else usual)
    directory = base / "edge-moe"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory
