"""What plans say of models that people run, before any download, as the report bench/reports/plans.md.

    python -m bench.laboratory.plan_report [--bits 2.5] [--disk DIR] > bench/reports/plans.md

Each model of bench/configs is planned for caps of 8 to 128 GB, with the speeds that this measures first, as
`edge-moe doctor` does: of memory and kernels, and of the disk of DIR. No weights are needed.
"""

import argparse
from pathlib import Path

import numpy as np

from edge_moe.bench import CONFIGS
from edge_moe.bench.expectation import HITS_IN_TEXT, SHARES, expected_speed
from edge_moe.bench.machine import Machine, measure_machine
from edge_moe.compressor.choosing.estimate import Estimate, estimate
from edge_moe.runtime.plan_table import size

from .markdown import table

CAPS = (8, 16, 24, 64, 128)  # GB
MODELS = (
    *("qwen3.6-35b-a3b", "qwen3-next-80b-a3b", "gpt-oss-20b", "gpt-oss-120b", "gemma-4-26b-a4b", "glm-4.5-air"),
    *("glm-4.7-flash", "minimax-m2", "kimi-k2", "deepseek-v3", "deepseek-v3.2", "deepseek-v4-flash", "glm-5"),
)
HEAD = ["cap", "bundle", "floor", "experts in memory", "hits", "read a token", "tok/s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bits", type=float, default=2.5)
    parser.add_argument("--disk", type=Path, default=Path("."))
    asked = parser.parse_args()
    machine = measure_machine(asked.disk)
    disk_gbps = list(machine.disks.values())[-1]
    print(f"# Plans of models that people run\n\n{_about(machine, disk_gbps, asked.bits)}")
    for model in MODELS:
        rows = [
            _row(estimate(CONFIGS / f"{model}.json", f"{cap}GB", bits=asked.bits), machine, disk_gbps) for cap in CAPS
        ]
        print(
            f"\n## {model}\n\n"
            + table(HEAD, [[f"{cap} GB", *row] for cap, row in zip(CAPS, rows, strict=True)], right=True)
        )


def _about(machine: Machine, disk_gbps: float | None, bits: float) -> str:
    kernels = ", ".join(f"{gbps:.1f} at {width}" for width, gbps in machine.kernel_gbps.items())
    disk = f"{disk_gbps:.2f} GB/s" if disk_gbps else "of unknown speed"
    return (
        f"At {bits:g} bits of an expert weight, 8 of all others, 4,096 tokens of context, on {machine.processor}, "
        f"{machine.threads} threads: memory {machine.memory_gbps:.1f} GB/s; kernels (GB/s, by width) {kernels}; disk "
        f"{disk}.\n\nHits: if experts are used evenly, the worst case, to what text makes of it with the embedded "
        "model's use. The speed's lower bound belongs to the first, its upper one to the second; both include what "
        "recorded runs differed from their plans by. `read a token` is of even use."
    )


def _row(made: Estimate, machine: Machine, disk_gbps: float | None) -> list[str]:
    plan, speed = made.plan, expected_speed(made, machine, disk_gbps)
    bundle, floor = size(made.disk_bytes), size(plan.floor_bytes)
    if plan.ram_bytes < plan.floor_bytes:
        return [bundle, floor, "below the floor", "", "", ""]
    if plan.resident:
        return [bundle, floor, "all", "100 %", "0", _range(speed)]
    share = plan.experts_bytes / plan.all_experts_bytes
    hits = float(np.interp(share, SHARES, HITS_IN_TEXT))
    read = (1 - made.hit_rate) * plan.working_set_bytes
    return [bundle, floor, f"{share:.0%}", f"{made.hit_rate:.0%} to {hits:.0%}", size(read), _range(speed)]


def _range(speed) -> str:
    if speed is None:
        return "not known"
    digits = 1 if speed.low < 10 else 0
    return f"{speed.low:.{digits}f} to {speed.high:.{digits}f}"


if __name__ == "__main__":
    main()
