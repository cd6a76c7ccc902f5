"""The core under gcc's sanitizers: races between its threads, and accesses, shifts and sums that go wrong unseen.

Each builds a core of its own and runs on it those tests that reach most of the core in least time. Tests of how much
memory the process has are left out: a sanitizer's own counts there, and so are those of limits on addresses, of which
it takes terabytes.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_cuda import BINDINGS, BUILDS, TESTS, build

# Left out of the address sanitizer's: null pointers, which it finds itself, and what makes the kernels compile for
# minutes. Calls instead of code in place, and no scopes, make that 20 s for an instruction set instead of 110 s.
CHECKS = {
    "thread": "-fsanitize=thread",
    "address": "-fsanitize=address,undefined -fno-sanitize=null,object-size,pointer-overflow "
    "-fno-sanitize-address-use-after-scope --param=asan-instrumentation-with-call-threshold=0",
}
LIBRARIES = {"thread": ["libtsan.so"], "address": ["libasan.so", "libubsan.so"]}
# The interpreter keeps memory to its end, which is no leak of the core. The core has a handler of bus errors, which
# tests compare with the system's.
OPTIONS = "detect_leaks=0:handle_sigbus=0:print_stacktrace=1:log_path="
ARCHITECTURES = ("qwen3_moe", "deepseek_v3")  # attention over keys and over latents
TOGETHER = [
    f"test_sequences.py::test_requests_that_come_and_go_have_the_bits_that_each_has_alone[{name}-float16]"
    for name in ARCHITECTURES
]
BOTH = [
    "test_residency.py",
    *TOGETHER,
    *(
        f"test_delta_net.py::test_a_step_that_fails_leaves_the_states_as_they_were[{name}]"
        for name in ("qwen3_5_moe", "lfm2_moe", "nemotron_h", "qwen4_exp_text")
    ),
    "test_compressed.py::test_a_step_that_fails_leaves_rows_and_sums_as_they_were",
    "test_compressed.py::test_several_sequences_have_rows_of_their_own",
    "test_ngrams.py::test_rows_with_a_wrong_byte_are_refused_and_then_read_again",
    "test_indexer.py::test_kernels_steps_and_threads_change_no_bit[deepseek_v32-float16]",
    "test_faults.py::test_many_records_that_fail_at_once_and_for_good_give_one_error_a_call",
    "test_faults.py::test_records_that_still_load_when_another_fails_are_waited_for",
    "test_faults.py::test_a_read_that_a_failed_call_left_behind_fails_no_other_call",
    "test_faults.py::test_threads_that_wait_for_their_turn_get_it_when_the_one_before_fails",
    "test_faults.py::test_an_engine_that_met_errors_ends_with_all_its_threads",
    "test_map_guard.py::test_a_file_cut_short_while_it_is_being_computed_with_is_an_error",
    "test_batch.py::test_a_read_that_fails_once_is_nobodys_error_and_one_that_fails_for_good_is_everybodys",
]
RUN = {
    "thread": [*BOTH, "test_batch.py::test_streams_of_several_threads_share_steps"],
    "address": [
        *BOTH,
        "test_kernels.py",
        "test_trunk.py",
        "test_bundle_bounds.py",
        "test_router.py",
        "test_input_precision.py",
        "test_prune_engine.py",
        "test_kv_overflow.py",
        "test_sampling.py",
        "test_quantise.py",
        *(f"test_engine.py::test_every_kernel_set_gives_the_same_logits_at_mixed_widths[{n}]" for n in ARCHITECTURES),
    ],
}
LEFT_OUT = "not " + " and not ".join(
    ("given_up_is_the_systems", "cannot_be_had", "more_than_memory_holds", "the_least_size", "cost_nothing")
)


def library(name: str) -> str:
    """Its path; its name alone where g++ does not have it."""
    asked = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
    return asked.stdout.strip()


@functools.cache
def sanitizers() -> bool:
    """As .ci/run asks."""
    names = sum(LIBRARIES.values(), [])
    return sys.platform == "linux" and bool(shutil.which("g++")) and all(map(os.path.isabs, map(library, names)))


def launcher(environment: dict[str, str]) -> list[str]:
    """What Python starts under; fixed addresses where the thread sanitizer cannot do with random ones."""
    for command in ([], ["setarch", "-R"]):
        if not shutil.which([*command, "env"][0]):
            continue
        tried = subprocess.run(
            [*command, "env", *(f"{name}={value}" for name, value in environment.items()), sys.executable, "-c", ""],
            capture_output=True,
            text=True,
        )
        if tried.returncode == 0:
            return command
    pytest.skip(f"needs addresses that sanitizers can use: {tried.stderr}")


@BUILDS
@pytest.mark.skipif(not sanitizers(), reason="needs g++ with its sanitizers")
@pytest.mark.parametrize("check", CHECKS)
def test_the_core_passes_under_sanitizers(check, tmp_path):
    loaded = {"LD_PRELOAD": " ".join(map(library, [*LIBRARIES[check], "libstdc++.so.6"]))}
    command = [*launcher({**loaded, "ASAN_OPTIONS": OPTIONS + "stderr"}), "env"]
    build(
        BINDINGS,
        tmp_path / "core",
        "_core",
        CMAKE_CXX_COMPILER="g++",
        CMAKE_BUILD_TYPE="RelWithDebInfo",
        CMAKE_CXX_FLAGS=f"{CHECKS[check]} -D_GLIBCXX_ASSERTIONS",
        CMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1",
        Python_EXECUTABLE=sys.executable,
    )
    (core,) = (tmp_path / "core").glob("_core.*")
    environment = {
        **loaded,
        **{f"{name}_OPTIONS": f"{OPTIONS}{tmp_path / name}" for name in ("ASAN", "TSAN")},
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",  # so that a child ends with an error, too
        "EDGE_MOE_CORE": str(core),
        "PYTHONPATH": str(TESTS),
        "OPENBLAS_NUM_THREADS": "1",  # whose threads are not the core's
    }
    if check == "address":
        environment["PYTHONMALLOC"] = "malloc"  # so that arrays that the core is given have an end, too
    ran = subprocess.run(
        [*command, *(f"{name}={value}" for name, value in environment.items()), sys.executable, "-m", "pytest", "-q"]
        + [
            "-p",
            "other_core",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:faulthandler",
            "-k",
            LEFT_OUT,
            "--capture=sys",
            "--durations=20",
        ]
        + [f"--basetemp={tmp_path / 'temporary'}", *RUN[check]],
        cwd=TESTS,
        capture_output=True,
        text=True,
    )
    print(ran.stdout[-10_000:])
    found = "".join(Path(path).read_text(errors="replace") for path in sorted(tmp_path.glob("*SAN.*")))
    found += "".join(re.findall(".*runtime error: .*\n(?:    #.*\n)*", ran.stderr))  # that check has no log
    assert not found, found[:20_000]
    assert ran.returncode == 0, ran.stderr[-5000:]
    assert int(re.search(r"\b(\d+) passed\b.* in", ran.stdout)[1]) >= (25 if check == "thread" else 300), ran.stdout
