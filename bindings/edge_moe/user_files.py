"""Where this program keeps what it learns of a user: directories of that user alone, as the system names them."""

import os
import sys
from pathlib import Path


def state_directory() -> Path:
    """For what should outlive a reboot and is no configuration: the history of chats. Made where it is missing.

    Raises OSError where it cannot be made.
    """
    return _directory("XDG_STATE_HOME", ".local/state", "Library/Application Support")


def cache_directory() -> Path:
    """For what can be measured again: how fast this machine is. Made where it is missing; raises OSError."""
    return _directory("XDG_CACHE_HOME", ".cache", "Library/Caches")


def _directory(variable: str, usual: str, on_mac: str) -> Path:
    named = os.environ.get(variable, "")
    base = Path(named) if os.path.isabs(named) else Path.home() / (on_mac if sys.platform == "darwin" else usual)
    directory = base / "edge-moe"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory
