"""The report of a GPU: a failed check shows, and figures stand beside what the GPU can do."""

from dataclasses import asdict

import pytest

from bench.laboratory.cuda_report import MEMORY, markdown, verdicts
from edge_moe.bench.bench import measure


@pytest.fixture(scope="module")
def report(bundle_of):
    rows, _ = measure(bundle_of("reference", width=4), ram="2GB", prompt=8, generate=4, repeats=1, device="cpu")
    gpu = {"name": "Orin", "compute_capability": "8.7", "integrated": True, "multiprocessors": 16, "memory_bytes": 64e9}
    return {
        "conditions": {"gpu": gpu, "driver": "12.6", "nvcc": "12.6", "processor": "Cortex-A78AE", "quick": True},
        "parity": {"status": 0, "said": "755"},
        "sanitizer": {
            "memcheck": {"status": 9, "said": "========= Invalid __global__ read\n========= ERROR SUMMARY: 1 error"},
            "racecheck": {"status": 1, "said": "========= Error: Device not supported"},
            "synccheck": {"status": None, "said": "compute-sanitizer is not installed"},
        },
        "gates": {"status": 0, "said": "....\n38 passed in 9.00s"},
        "kernels": [
            {"what": "read", "gbps": 180.0, "share": 1.0},
            {"what": "tensor cores on bytes", "tops": 80.0, "share": 1.0},
            {"what": "4 bits, down", "gbps": 135.0, "share": 0.75},
        ],
        "memory": {"in_place": True, **dict.fromkeys(MEMORY, 12e6)},
        "models": [{"how": "resident", "width": 4, **asdict(rows[1]), "device": "cuda", "weights_gbps": 90.0}],
    }


def test_a_check_that_failed_is_told_from_one_that_could_not_run(report):
    assert verdicts(report) == {"parity": True, "gates": True, "memcheck": False}
    text = markdown(report)
    assert "| memcheck | **FAILED** | ========= ERROR SUMMARY: 1 error |" in text
    assert "| racecheck | not run | ========= Error: Device not supported |" in text
    assert "| gates | passed | 38 passed in 9.00s |" in text


def test_figures_stand_beside_the_gpus_own(report):
    text = markdown(report)
    assert "By `bench/gpu_check.sh --quick`." in text
    assert "# The cuda device on Orin\n" in text and "64 GB shared with the processor" in text
    assert "| 4 bits, down | 135.0 GB/s | 75% |" in text
    assert text.count(" | 12 MB |") == len(MEMORY)
    (row,) = [line for line in text.splitlines() if line.startswith("| 4 | resident | tg4 |")]
    assert row.split("|")[5].strip() == "50%"
