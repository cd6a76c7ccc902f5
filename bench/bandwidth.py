"""Measuring the machine's bandwidth: memory reads, and unbuffered reads of a bundle's records.

It runs in a child process, so that its buffers do not count under a benchmark's cap:

    python -m edge_moe.bench.bandwidth BUNDLE THREADS
"""

import json
import mmap
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .. import _core
from ..devices.probe import memory_limit_bytes
from ..runtime.bundle import Bundle
from ..runtime.plan import READERS

MEMORY_BYTES = 1 << 29  # much larger than any cache
DISK_BYTES = 1 << 28  # maximum to read
DISK_SECONDS = 2.0
SYNCED_BYTES = 1 << 25  # written between syncs
BLOCK_BYTES = 1 << 21  # as large as an expert of a few million weights
REPEATS = 5
F_NOCACHE = 48  # macOS, fcntl.h


def machine_bandwidth(bundle: str | Path, threads: int) -> dict:
    """memory_gbps and disk_gbps (None if unbuffered reads are not supported), measured in a child process."""
    command = [sys.executable, "-m", "edge_moe.bench.bandwidth", str(bundle), str(threads)]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
        raise OSError(f"measuring bandwidth failed: {child.stderr.strip().splitlines()[-1:] or child.returncode}")
    return json.loads(child.stdout)


def memory_read_gbps(threads: int) -> float:
    """The best of a few passes in which each thread computes the maximum of its part of one array."""
    room = memory_limit_bytes(_core.free_bytes())
    data = np.ones(max(min(MEMORY_BYTES, room // 2) // 8, 1), np.uint64)
    parts, best = np.array_split(data, threads), 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(REPEATS):
            began = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, data.nbytes / (time.perf_counter() - began) / 1e9)
    return best


def disk_read_gbps(bundle: Bundle) -> float | None:
    """GB/s of reading records in random order with the Runtime's number of readers; None without unbuffered reads."""
    return _read_gbps(bundle.files, [(expert.file, expert.offset, expert.nbytes) for expert in bundle.experts.values()])


def directory_read_gbps(directory: Path, readers: int = READERS) -> float | None:
    """The same for blocks of a temporary file in a directory; None without unbuffered reads."""
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".edge-moe-") as file:
        for at in range(0, DISK_BYTES, BLOCK_BYTES):
            file.write(os.urandom(BLOCK_BYTES))  # a disk may compress zeros
            if at % SYNCED_BYTES == 0:  # Ctrl-C takes effect between syncs
                file.flush()
                os.fsync(file.fileno())
        file.flush()
        os.fsync(file.fileno())
        return _read_gbps(
            [Path(file.name)], [(0, at, BLOCK_BYTES) for at in range(0, DISK_BYTES, BLOCK_BYTES)], readers
        )


def _read_gbps(files: list[Path], reads: list[tuple[int, int, int]], readers: int = READERS) -> float | None:
    """GB/s of reads: (index of the file, offset, bytes), offsets and bytes being multiples of a page."""
    random.Random(0).shuffle(reads)
    handles = [_open_unbuffered(path) for path in files]
    if None in handles:
        return None
    block, interrupted = max(nbytes for _, _, nbytes in reads), False

    def read(part) -> int:
        buffer, done = mmap.mmap(-1, block), 0  # page-aligned, as O_DIRECT requires
        for file, offset, nbytes in part:
            if interrupted or done * readers >= DISK_BYTES or time.perf_counter() - began > DISK_SECONDS:
                break
            done += os.preadv(handles[file], [memoryview(buffer)[:nbytes]], offset)
        return done

    try:
        began = time.perf_counter()
        with ThreadPoolExecutor(readers) as pool:
            try:
                total = sum(pool.map(read, [reads[at::readers] for at in range(readers)]))
            except BaseException:  # Ctrl-C: threads end after their current block
                interrupted = True
                raise
        return total / (time.perf_counter() - began) / 1e9
    except OSError:
        return None
    finally:
        for handle in handles:
            os.close(handle)


def _open_unbuffered(path: Path) -> int | None:
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:  # tmpfs and some network file systems
        return None
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(handle, F_NOCACHE, 1)
    return handle


if __name__ == "__main__":
    opened = Bundle.open(sys.argv[1])
    print(json.dumps({"memory_gbps": memory_read_gbps(int(sys.argv[2])), "disk_gbps": disk_read_gbps(opened)}))
