"""The README's speed table, measured again: random bundles with Qwen3-30B-A3B's layer shapes at several widths.

    python -m edge_moe.bench.cpu_report [--repeats 5] > report.md

Four layers and 4,096 tokens of vocabulary keep a bundle near 1 GB. Every row is a process of its own, so that its
peak memory is its own. The last rows run the 4-bit bundle under caps that hold only part of it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from edge_moe.bench.conditions import processor
from edge_moe.bench.synthetic import make_synthetic

CONFIG = Path(__file__).parent / "configs" / "qwen3-30b-a3b.json"
WIDTHS = (2, 3, 4, 8)
PAGED_WIDTH = 4
CAPS = ("400MB", "800MB")
COLUMNS = (
    "width",
    "bundle",
    "cap",
    "pp128 tok/s",
    "tg32 tok/s",
    "GB/s of weights",
    "hit rate",
    "MB read/token",
    "peak",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for width in WIDTHS:
            bundle = make_synthetic(CONFIG, Path(directory) / f"{width}.emoe", layers=4, width=width, vocab=4096).path
            caps = ("8GB", *CAPS) if width == PAGED_WIDTH else ("8GB",)
            rows += [(width, cap, measure(bundle, cap, repeats)) for cap in caps]
    first = rows[0][2]
    print(f"{processor()}, {first['rows'][0]['threads']} threads; means and deviations of {repeats} runs.")
    print(f"Memory reads at {first['memory_gbps']:.1f} GB/s, unbuffered reads of records at {disk(rows)}.\n")
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for width, cap, report in rows:
        print("| " + " | ".join(cells(width, cap, report)) + " |")


def measure(bundle: Path, cap: str, repeats: int) -> dict:
    command = [sys.executable, "-m", "edge_moe", "bench", bundle, "--ram", cap, "-p", "128", "-n", "32"]
    child = subprocess.run(
        [*map(str, command), "-r", str(repeats), "-o", "json"], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(child.stdout)


def cells(width: int, cap: str, report: dict) -> list[str]:
    prompt, generate = report["rows"]
    return [
        str(width),
        f"{generate['size_bytes'] / 1e9:.2f} GB",
        "none needed" if generate["resident"] else cap,
        f"{prompt['tps_mean']:.0f} ± {prompt['tps_sd']:.0f}",
        f"{generate['tps_mean']:.1f} ± {generate['tps_sd']:.1f}",
        f"{generate['weights_gbps']:.1f}",
        f"{generate['hit_rate']:.1%}",
        f"{generate['read_bytes_per_token'] / 1e6:.1f}",
        f"{generate['peak_memory_bytes'] / 1e6:.0f} MB",
    ]


def disk(rows) -> str:
    found = [report["disk_gbps"] for _, _, report in rows if report["disk_gbps"]]
    return f"{min(found):.2f} to {max(found):.2f} GB/s" if found else "an unknown speed (the file system has none)"


if __name__ == "__main__":
    main()
