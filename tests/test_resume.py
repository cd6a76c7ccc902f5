"""A run that is killed, wherever it is, goes on to the very bundle that it would have made."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bundles import run_python

from edge_moe.compressor.pipeline import compress
from edge_moe.runtime.bundle import Bundle

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs signals")

# model, out, options as JSON; tells each step of its progress on stdout
COMPRESS = """
import json, sys
from edge_moe import compress
compress(sys.argv[1], sys.argv[2], progress=lambda *now: print(*now, flush=True), **json.loads(sys.argv[3]))
"""

# The same, killed at every place where a file gets its name: just before one, just after
# the next. Each killed run is gone on with, and told of: where it was killed, exit codes, hashes of the bundle, what
# there is beside it.
KILLED_EVERYWHERE = """
import hashlib, json, os, shutil, signal, sys
from pathlib import Path
from edge_moe.compressor import pipeline
import scipy.linalg, scipy.optimize, scipy.cluster.vq  # once, not in every child

model, out, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])

def run(last: int, before: bool, resume: bool) -> int:
    child = os.fork()
    if child == 0:
        calls = 0
        def dying(call):
            def wrapped(*arguments):
                nonlocal calls
                calls += 1
                if calls == last and before:
                    os.kill(os.getpid(), signal.SIGKILL)
                call(*arguments)
                if calls == last:
                    os.kill(os.getpid(), signal.SIGKILL)
            return wrapped
        os.replace, os.rename = dying(os.replace), dying(os.rename)
        try:
            pipeline.compress(model, out, resume=resume, **options)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

runs = []
for last in range(1, 1000):
    before = last % 2 == 0  # after one is before the next, but for what happens between the two
    status = run(last, before, resume=False)
    killed = status == -signal.SIGKILL
    resumed = run(0, False, resume=True) if killed else 0
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(out.iterdir())}
    runs.append([last, before, status, resumed, hashes, sorted(file.name for file in out.parent.iterdir())])
    shutil.rmtree(out)
    if not killed:
        break
print(json.dumps(runs))
"""


@pytest.fixture(scope="module")
def model(golden) -> Path:
    return golden["qwen2_moe"][0]  # 3 layers, of which the second is dense


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict:
    file = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(file, np.random.default_rng(0).integers(0, 128, 2048))
    return {"bits": 6, "calibration": str(file), "tokens": 512, "threads": 1}


@pytest.fixture(scope="module")
def whole(model, options, tmp_path_factory) -> dict[str, str]:
    """Hashes of the files of a run that nothing interrupted."""
    return hashes(compress(model, tmp_path_factory.mktemp("whole") / "new.emoe", **options).path)


def hashes(bundle: Path) -> dict[str, str]:
    files = sorted(file for file in bundle.iterdir() if file.is_file())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def start(model, out, options) -> subprocess.Popen:
    command = [sys.executable, "-c", COMPRESS, str(model), str(out), json.dumps(options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill(child: subprocess.Popen) -> None:
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL


def killed_after(steps: int, model, out, options) -> None:
    """Kill a run from outside when it told of so many steps."""
    with start(model, out, options) as child:
        for _ in range(steps):
            assert child.stdout.readline(), child.stderr.read()
        kill(child)


def killed_at(file: str, model, out, options) -> None:
    """Kill a run from outside as soon as a file is in its work directory; again where it ended too soon."""
    for _ in range(5):
        with start(model, out, options) as child:
            while child.poll() is None and not (out.with_name(out.name + ".work") / file).exists():
                pass
            child.kill()
            error = child.communicate()[1]
        if child.returncode == -signal.SIGKILL:
            return
        assert child.returncode == 0, error
        shutil.rmtree(out)
    raise AssertionError(f"{file} was never seen")


# ---- killed


@pytest.mark.parametrize("changes", [{}, {"method": "uniform", "drop_experts": 0.25}], ids=["pmq", "dropping"])
def test_killed_wherever_a_file_gets_its_name(model, options, tmp_path, changes):
    options = {**options, **changes}
    want = hashes(compress(model, tmp_path / "whole.emoe", **options).path)
    (tmp_path / "out").mkdir()
    out = run_python(KILLED_EVERYWHERE, model, tmp_path / "out" / "new.emoe", json.dumps(options)).stdout
    runs = json.loads(out)
    assert len(runs) > 20
    for last, before, status, resumed, files, left in runs:
        assert (status, resumed) in ((-signal.SIGKILL, 0), (0, 0)), (last, before)
        assert files == want, (last, before)
        assert left == ["new.emoe"], (last, before)


@pytest.mark.parametrize(
    "file",
    ["identity.json", "measure-0000.npz", "measure-0001.source", "gain.json", "round-0001.json", "round-0002.json"],
)
def test_killed_as_soon_as_a_file_is_there(model, options, tmp_path, whole, file):
    out = tmp_path / "new.emoe"
    killed_at(file, model, out, options)
    assert hashes(compress(model, out, resume=True, **options).path) == whole
    assert [left.name for left in tmp_path.iterdir()] == ["new.emoe"]


def test_killed_again_and_again_at_random(model, options, tmp_path, whole):
    rng, out = np.random.default_rng(1), tmp_path / "new.emoe"
    steps = 3 * 8 * 2  # experts measured and rounded, those of the dense layer among them
    for kills in range(4):
        resumed = {**options, "resume": kills > 0}
        killed_after(int(rng.integers(1, steps // 5)), model, out, resumed)
    assert hashes(compress(model, out, resume=True, **options).path) == whole


def test_a_resumed_run_does_not_repeat_the_layers_that_were_done(model, options, tmp_path):
    out = tmp_path / "new.emoe"
    killed_at("round-0000.json", model, out, options)
    seen = []
    compress(model, out, resume=True, progress=lambda *now: seen.append(now), **options)
    assert {step for step, _, _ in seen} == {"round"}
    assert min(done for _, done, _ in seen) > 8


@pytest.mark.parametrize("threads", [1, 2])
def test_other_threads_may_go_on(model, options, tmp_path, whole, threads):
    killed_after(12, model, tmp_path / "new.emoe", options)
    bundle = compress(model, tmp_path / "new.emoe", resume=True, **{**options, "threads": threads})
    assert hashes(bundle.path) == whole


def test_resume_with_nothing_there_starts_anew(model, options, tmp_path, whole):
    assert hashes(compress(model, tmp_path / "new.emoe", resume=True, **options).path) == whole


def test_a_run_without_text_starts_anew(model, tmp_path):
    out = tmp_path / "new.emoe"
    killed_after(5, model, out, {"width": 3, "method": "rtn"})
    bundle = compress(model, out, width=3, method="rtn", resume=True)
    other = compress(model, tmp_path / "other.emoe", width=3, method="rtn")
    assert hashes(bundle.path) == hashes(other.path)


# ---- what is not gone on with


@pytest.fixture(scope="module")
def unfinished(model, options, tmp_path_factory):
    """A directory with what a run that was killed left of new.emoe."""
    directory = tmp_path_factory.mktemp("unfinished")
    killed_after(12, model, directory / "new.emoe", options)
    assert sorted(file.name for file in directory.iterdir()) == ["new.emoe.work"]
    return directory


@pytest.fixture
def out(unfinished, tmp_path) -> Path:
    """Its path, in the test's own copy of that directory."""
    shutil.copytree(unfinished, tmp_path / "out")
    return tmp_path / "out" / "new.emoe"


def refused(error, *arguments, **options) -> str:
    with pytest.raises(error) as caught:
        compress(*arguments, **options)
    return str(caught.value)


def test_an_unfinished_run_is_not_started_over_by_chance(model, options, out):
    before = hashes(out.with_name("new.emoe.work"))
    assert refused(FileExistsError, model, out, resume=False, **options) == (
        f"{out}.work: an unfinished run is there; --resume goes on with it, removing it starts anew"
    )
    assert hashes(out.with_name("new.emoe.work")) == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"bits": 7}, "bits was 6, is 7"),
        ({"bits": None, "size": 300_000}, "bits was 6, is None; size was None, is 300000"),
        ({"method": "uniform"}, "method was 'pmq', is 'uniform'"),
        ({"tokens": 768}, "text was ["),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"group": 32}, "group was None, is 32"),
        ({"certificate": False}, "certificate was True, is False"),
        ({"act_order": True}, "act_order was False, is True"),
        ({"drop_experts": 0.25}, "drop_experts was 0.0, is 0.25"),
    ],
)
def test_other_options_are_named(model, options, out, whole, changes, named):
    message = refused(ValueError, model, out, resume=True, **{**options, **changes})
    assert message.startswith(f"{out}.work: belongs to another run ({named}")
    assert message.endswith("); give the same options, or remove it to start anew")
    assert hashes(compress(model, out, resume=True, **options).path) == whole  # and the run is as good as before


def test_another_text_is_named(model, options, out, tmp_path):
    np.save(tmp_path / "other.npy", np.random.default_rng(5).integers(0, 128, 2048))
    message = refused(ValueError, model, out, resume=True, **{**options, "calibration": str(tmp_path / "other.npy")})
    assert message.startswith(f"{out}.work: belongs to another run (text was ['")


def test_a_text_under_another_name_is_the_same_text(model, options, out, tmp_path):
    shutil.copy(options["calibration"], tmp_path / "copy.npy")
    bundle = compress(model, out, resume=True, **{**options, "calibration": str(tmp_path / "copy.npy")})
    assert bundle.table["calibration"]["source"] == "copy.npy"


def test_another_checkpoint_is_named(golden, model, options, out, tmp_path):
    changed = Path(shutil.copytree(model, tmp_path / "changed"))
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 2e-6}))
    for other in (changed, golden["olmoe"][0]):
        message = refused(ValueError, other, out, resume=True, **options)
        assert message.startswith(f"{out}.work: belongs to another run (checkpoint was '")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"version": "0"}', "\x00" * 300])
def test_an_identity_that_is_damaged_is_refused(model, options, out, content):
    (out.with_name("new.emoe.work") / "identity.json").write_text(content)
    message = refused(ValueError, model, out, resume=True, **options)
    assert message.startswith(f"{out}.work: belongs to another run (")
    assert "give the same options, or remove it to start anew" in message


def test_state_that_was_cut_is_refused(model, options, out):
    (state,) = out.with_name("new.emoe.work").glob("measure-*.source")
    size = state.stat().st_size
    os.truncate(state, size - 4)
    message = refused(ValueError, model, out, resume=True, **options)
    assert message == f"{state}: has {size - 4:,} bytes, expected {size:,}; start again"


def test_a_bundle_that_was_lost_meanwhile_is_not_taken_for_whole(model, options, tmp_path):
    """Records that the journal says are written, in a file that is not there any more."""
    out = tmp_path / "new.emoe"
    killed_at("round-0000.json", model, out, options)
    shutil.rmtree(tmp_path / "new.emoe.partial")
    for _ in range(2):
        message = refused(ValueError, model, out, resume=True, **options)
        assert message.startswith(f"{out}.partial/trunk.safetensors: what the unfinished run wrote is gone")
        assert not out.exists()


# ---- two at once


def test_two_processes_do_not_write_the_same_bundle(model, options, tmp_path, whole):
    code = COMPRESS.replace("print(*now, flush=True)", "(print(*now, flush=True), sys.stdin.readline())")
    out = tmp_path / "new.emoe"
    command = [sys.executable, "-c", code, str(model), str(out), json.dumps(options)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True) as child:
        assert child.stdout.readline().startswith("measure")
        assert refused(BlockingIOError, model, out, resume=True, **options) == (
            f"{out}: another process is writing it; wait for it or end it"
        )
        message = refused((BlockingIOError, FileExistsError), model, out, **options)
        assert message == f"{out}: another process is writing it; wait for it or end it"
        _, errors = child.communicate()  # which lets it go on
    assert child.returncode == 0, errors
    assert hashes(out) == whole


# ---- stopped


@pytest.mark.parametrize("sent", [signal.SIGINT])
def test_ctrl_c_before_the_first_layer_is_done_leaves_nothing(model, options, tmp_path, sent):
    code = COMPRESS.replace("print(*now, flush=True)", "(print(*now, flush=True), sys.stdin.readline())")
    command = [sys.executable, "-c", code, str(model), str(tmp_path / "out" / "new.emoe"), json.dumps(options)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True) as child:
        assert child.stdout.readline().startswith("measure")
        child.send_signal(sent)
        _, errors = child.communicate()
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("step", "layer"), [("measure", 1), ("round", 0), ("round", 1)])
def test_what_an_interrupt_leaves_later_can_be_gone_on_with(model, options, tmp_path, whole, step, layer):
    def stop(now: str, done: int, of: int) -> None:
        if now == step and done > 8 * layer + 1:
            raise KeyboardInterrupt

    out = tmp_path / "new.emoe"
    with pytest.raises(KeyboardInterrupt):
        compress(model, out, progress=stop, **options)
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {"new.emoe.work"} | ({"new.emoe.partial"} if step == "round" else set())
    assert hashes(compress(model, out, resume=True, **options).path) == whole
    assert [file.name for file in tmp_path.iterdir()] == ["new.emoe"]


def test_a_finished_bundle_is_kept(model, options, tmp_path, whole):
    out = tmp_path / "new.emoe"
    compress(model, out, **options)
    for resume in (False, True):
        assert refused(FileExistsError, model, out, resume=resume, **options) == (
            f"{out}: exists already; choose another name or remove it"
        )
    assert hashes(Bundle.open(out).path) == whole
