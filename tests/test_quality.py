"""The quality report: its rows are what compress() and `edge-moe eval` give, its verdicts follow from the figures."""

import json
import math
import os
import pickle
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from bundles import REFERENCE

from bench.laboratory.quality import forms, peers, report
from bench.laboratory.quality.forms import Form
from bench.laboratory.quality.study import make_and_score, open_study, run
from edge_moe.bench.texts import evaluate_texts, reference_logits
from edge_moe.compressor.choosing import allocate, targets
from edge_moe.compressor.choosing.sensitivity import LayerMeasure, Measures
from edge_moe.compressor.passes.texts import STDLIB_BYTES, stdlib_files
from edge_moe.compressor.pipeline import compress
from edge_moe.compressor.rounding import round_layers
from edge_moe.compressor.rounding.gptq import SWEEPS
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.compressor.writing.writer import Packing
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.bundle_records import record_alignment, record_bytes
from edge_moe.runtime.config_file import load_config
from edge_moe.runtime.runtime import Runtime
from edge_moe.runtime.score import LOGITS_ROWS

STDLIB = Path(sysconfig.get_paths()["stdlib"])
TEXTS = [STDLIB / "subprocess.py", STDLIB / "heapq.py"]
OPTIONS = {"calibration_tokens": 1024, "trunk_width": 8, "context": 128}
BITS = 2.5
CONFIG = load_config(REFERENCE)
CHOICES = [(width, group) for group in (64, 128) for width in (1, 2, 3, 4)]
BUDGET = BITS * CONFIG.expert_weights * CONFIG.expert_count / 8
UNIT = Packing((2, 2, 2), 64)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    work = tmp_path_factory.mktemp("quality")
    with open_study(REFERENCE, TEXTS, [STDLIB / "argparse.py"], work, 300, **OPTIONS) as made:
        made.prepare()
        yield made


def form(study, name: str) -> Form:
    return next(one for one in [*forms.methods(study, BITS), *forms.ablations(study, BITS, 0)] if one.name == name)


def records(bundle: Path, layer: int) -> list[bytes]:
    opened = Bundle.open(bundle)
    its = [expert for (at, _), expert in opened.experts.items() if at == layer]
    return [opened.files[e.file].read_bytes()[e.offset : e.offset + e.nbytes] for e in its]


# ---- rows are what the product makes


def test_the_pmq_row_is_the_bundle_that_compress_writes(study, tmp_path):
    forms.compressed(study, form(study, "pmq"), tmp_path / "row.emoe")
    theirs = compress(
        REFERENCE, tmp_path / "theirs.emoe", bits=BITS, method="pmq", **study.options | {"certificate": True}
    )
    for file in theirs.path.iterdir():
        assert (tmp_path / "row.emoe" / file.name).read_bytes() == file.read_bytes()


def test_scores_are_those_of_eval(study, tmp_path):
    forms.compressed(study, form(study, "rtn"), tmp_path / "row.emoe")
    scored = study.score(tmp_path / "row.emoe")
    source = compress(REFERENCE, tmp_path / "source.emoe", bits=16).path
    with (
        Runtime(tmp_path / "row.emoe", context=128, logits_rows=LOGITS_ROWS) as runtime,
        reference_logits(source, runtime, 128) as against,
    ):
        theirs = evaluate_texts(runtime, TEXTS, context=128, tokens=300, against=against)
    for mine, its in [(scored, theirs), *((scored["texts"][f.stem], theirs["texts"][f.name]) for f in TEXTS)]:
        assert {key: mine[key] for key in its if key != "texts"} == {key: its[key] for key in its if key != "texts"}
    windows = scored["texts"]["subprocess"]["windows"]  # 127, 127 and 43 positions
    assert np.average(windows, weights=[127, 127, 43]) == pytest.approx(scored["texts"]["subprocess"]["kld_mean"])


def test_bits_count_experts_that_were_dropped(study, tmp_path):
    plain, fewer = form(study, "pmq"), form(study, "pmq, experts dropped by sensitivity")
    for one in (plain, fewer):
        result = make_and_score(study, one)
        assert BITS - 0.05 < result["true_bits"] <= BITS
        assert result["true_bits"] == 8 * result["expert_bytes"] / (CONFIG.expert_weights * CONFIG.expert_count)
    assert study.result(fewer.key)["bits_per_weight"] == pytest.approx(BITS / 0.75, abs=0.1)


def test_the_reference_scores_no_divergence(study):
    exact, trunk = (make_and_score(study, one) for one in forms.bases(study))
    assert exact["kld_mean"] == 0 and exact["top1_agreement"] == 1
    assert 0 < trunk["kld_mean"] < 0.01


def test_rtn_takes_the_width_and_group_of_uniform(study, tmp_path):
    for name in ("rtn", "uniform"):
        forms.compressed(study, form(study, name), tmp_path / name)
    packed = [{(e.widths, e.group) for e in Bundle.open(tmp_path / n).experts.values()} for n in ("rtn", "uniform")]
    assert packed[0] == packed[1] and len(packed[0]) == 1


def test_measures_that_another_form_left_are_used(study, tmp_path):
    one = form(study, "pmq")
    forms.compressed(study, one, tmp_path / "first.emoe")
    file, kept = one.measures_file(study), one.measures_file(study).read_bytes()
    measures = pickle.loads(kept)
    measures.layers[2].errors[:] *= 1e6
    file.write_bytes(pickle.dumps(measures))
    try:
        forms.compressed(study, one, tmp_path / "second.emoe")
    finally:
        file.write_bytes(kept)
    sizes = [sum(map(len, records(tmp_path / name, 2))) for name in ("first.emoe", "second.emoe")]
    assert sizes[1] > 1.2 * sizes[0]


def test_forms_share_measures_only_where_they_would_find_the_same(study):
    names = {f"{f.name} {bits:g}": f.measures for bits in (2.0, 2.5) for f in forms.methods(study, bits)}
    assert names["rtn 2"] is names["uniform 2"] is None
    assert names["mc 2"] == names["mc-release 2"] == names["mc 2.5"]
    assert names["pmq 2"] == names["random 0 2"] == names["error only 2"]
    assert len({names["mc 2"], names["pmq 2"], names["pmq 2.5"], names["pmq, experts dropped 2"]}) == 4
    other_text = [forms.ablations(study, 2.0, repeat)[0] for repeat in range(2)]
    assert [form.options["tokens"] for form in other_text] == [512, 512 - 256]
    assert len({*names.values(), *(form.measures for form in other_text)}) == len(set(names.values())) + 2
    assert len({form.key for form in [*other_text, *forms.methods(study, 2.0)]}) == len(forms.methods(study, 2.0)) + 2
    ablations = {f.name: f.measures for f in forms.ablations(replace(study, calibration=("a.txt",)), 2.0, 0)}
    own = ("groups of 64", "calibrated on Python alone")
    assert len({ablations["pmq"], *(ablations[name] for name in own)}) == 3
    assert ablations["calibrated on Python alone, without the unseen column"] == ablations[own[1]]


def test_mc_is_left_out_where_its_widths_cannot_spend_the_bits(study):
    padded = 1 / 3  # bits a weight for scales, biases and padding at group 128
    assert forms.published_bits(CONFIG) == pytest.approx((1 + 3 / 16 + padded, 3 + padded))
    for bits, there in ((1.4, False), (1.6, True), (3.0, True), (3.5, False)):
        assert ("mc" in [f.name for f in forms.methods(study, bits)]) == there


# ---- other ways to spend the bytes


@dataclass
class Run:
    """As much of a Compression as choosing packings reads."""

    config: object = CONFIG
    calibration: object = None


def measures_of(error=1.0, frequency=0.25, rows=100, domains=2, gain=1.0) -> Measures:
    """Every expert alike: the error of a width is `error` / 4^width in each domain and in the unseen column."""
    curve = np.array([4.0**-width * (1 if group == 64 else 1.1) for width, group in CHOICES])
    errors = np.ones((CONFIG.experts, 3, 1, domains + 1)) * error * curve[:, None]
    shape = np.ones(CONFIG.experts)
    one = LayerMeasure(
        frequency * shape, 0.1 * shape, rows * shape, np.sqrt(errors[..., 0] * rows), errors, errors[:, 0, 0], None
    )
    layers = [replace(one, **{f: getattr(one, f).copy() for f in ("frequency", "rows", "norm_errors", "errors")})
              for _ in CONFIG.moe_layers]  # fmt: skip
    return Measures(layers, CHOICES, np.full((len(layers), domains + 1), gain))


def chosen(how, measures: Measures, run=None) -> np.ndarray:
    """Bytes of each expert, (layers, experts)."""
    packings = how(run or Run(), measures, BUDGET, UNIT)
    sizes = [record_bytes(CONFIG, p.widths, p.group, record_alignment(CONFIG)) for p in packings]
    assert sum(sizes) <= BUDGET
    return np.reshape(sizes, (-1, CONFIG.experts))


def pmq(run, measures, budget, unit):
    return allocate.mixed(CONFIG, measures, budget, unit)


def test_random_packings_fill_the_bytes_and_differ_by_seed():
    drawn = [chosen(partial(forms.at_random, seed=seed), measures_of()) for seed in range(3)]
    _, sizes = forms.by_size(CONFIG, allocate.packings(CHOICES))
    for sizes_drawn in drawn:
        left = BUDGET - sizes_drawn.sum()
        larger = [sizes[sizes > size].min() - size for size in sizes_drawn.reshape(-1) if size < sizes.max()]
        assert 0 <= left < min(larger)
    assert len({one.tobytes() for one in drawn}) == 3
    assert np.array_equal(drawn[0], chosen(partial(forms.at_random, seed=0), measures_of()))


def test_by_frequency_looks_at_nothing_but_frequency():
    measures = measures_of()
    measures.layers[1].frequency[3], measures.layers[1].frequency[4] = 25, 1e-4
    measures.layers[1].errors[5] *= 100  # one curve for all experts: what one of them costs is not seen
    measures.layers[1].errors[4] *= 100
    sizes = chosen(forms.by_frequency, measures)
    assert sizes[1, 3] > np.median(sizes) > sizes[1, 4]
    others = np.delete(sizes.reshape(-1), [16 + 3, 16 + 4])
    assert abs(sizes[1, 5] - np.median(others)) <= np.ptp(others) and sizes[1, 5] < sizes[1, 3]


def test_by_error_looks_at_the_error_of_one_use():
    measures = measures_of()
    layer = measures.layers[2]
    layer.norm_errors[3] *= 10  # a hundred times the squared error
    layer.norm_errors[4], layer.rows[4] = layer.norm_errors[4] * 10, 1e6  # but over 10,000 times as many uses
    layer.errors[5] *= 100
    sizes = chosen(forms.by_error, measures)
    assert sizes[2, 3] > np.median(sizes) > sizes[2, 4]
    assert sizes[2, 5] < sizes[2, 3]


def test_without_gain_a_layer_that_hardly_matters_counts_like_the_others():
    measures = measures_of()
    measures.gain[1] = 1e-6
    assert chosen(pmq, measures)[1].max() < chosen(pmq, measures)[0].min()
    assert chosen(forms.without_gain, measures)[1].sum() == pytest.approx(BUDGET / len(CONFIG.moe_layers), rel=0.05)


def test_without_the_unseen_column_an_expert_that_only_it_wants_is_starved():
    measures = measures_of()
    measures.layers[0].errors[7, ..., :-1] *= 1e-6
    measures.layers[0].errors[7, ..., -1] *= 100
    assert chosen(pmq, measures)[0, 7] > np.median(chosen(pmq, measures))
    sizes = chosen(forms.without_unseen, measures)
    assert sizes[0, 7] == sizes.min() < np.median(sizes)


def test_without_domains_an_expert_of_a_rare_kind_of_text_counts_by_its_tokens():
    measures = measures_of()
    measures.layers[0].errors[7, ..., 0] *= 1e-6
    measures.layers[0].errors[7, ..., 2] *= 1e-6
    measures.layers[0].errors[..., 1] *= 0.01  # little is lost on the rare kind in all, most of it by this expert
    measures.layers[0].errors[7, ..., 1] *= 100
    for other in measures.layers[1:]:
        other.errors[..., 1] *= 0.01
    calibration = type("", (), {"domains": np.array([0] * 99 + [1])})
    sizes, merged = chosen(pmq, measures), chosen(forms.without_domains, measures, Run(calibration=calibration))
    assert sizes[0, 7] > np.median(sizes)
    assert merged[0, 7] < np.median(merged)


def test_an_ablation_of_the_options_leaves_the_others():
    measures = measures_of()
    alike = forms.without_projections(Run(), measures, BUDGET, UNIT)
    assert all(len(set(p.widths)) == 1 for p in alike)
    assert any(len(set(p.widths)) > 1 for p in pmq(Run(), measures, BUDGET, UNIT))


# ---- other ways to round


def rounded(study, tmp_path, name: str, rounding: type, first_width: int) -> Path:
    """A bundle at width 2 but for layer 0, with an exact trunk."""

    def widths(run, measures, budget, unit):
        return [Packing((first_width if at < CONFIG.experts else 2,) * 3, 64) for at in range(CONFIG.expert_count)]

    out = tmp_path / f"{name}-{first_width}.emoe"
    exact = replace(study, trunk_width=16)
    forms.compressed(exact, Form(name, BITS, {"method": "pmq", "bits": BITS}, widths, rounding), out)
    return out


def test_clean_inputs_do_not_depend_on_how_earlier_layers_were_rounded(study, tmp_path):
    make = partial(rounded, study, tmp_path)
    clean = [make("clean", forms.CleanInputs, width) for width in (1, 4)]
    track = [make("track", round_layers.Rounding, width) for width in (1, 4)]
    for layer in (1, 2, 3):
        assert records(clean[0], layer) == records(clean[1], layer)
        assert records(track[0], layer) != records(track[1], layer)


def test_nothing_is_lacking_in_the_first_layer_alone(study, tmp_path):
    make = partial(rounded, study, tmp_path)
    clean, without = make("clean", forms.CleanInputs, 2), make("without", forms.NothingLacking, 2)
    whole = make("whole", round_layers.Rounding, 2)
    assert records(clean, 0) == records(without, 0)
    for layer in (1, 2, 3):
        assert len({tuple(records(bundle, layer)) for bundle in (clean, without, whole)}) == 3


def test_gptq_alone_is_not_refined(study, tmp_path, monkeypatch):
    seen, its = [], round_layers.gptq
    spy = lambda *args, **given: seen.append(given["sweeps"]) or its(*args, **given)  # noqa: E731
    monkeypatch.setattr(round_layers, "gptq", spy)
    for name, sweeps, tracks in (("pmq", SWEEPS, 2), ("GPTQ alone, without refinement", 0, 1)):  # one is certified
        seen.clear()
        forms.compressed(study, form(study, name), tmp_path / f"{sweeps}.emoe")
        assert set(seen) == {sweeps} and len(seen) == tracks * 3 * CONFIG.expert_count


# ---- keeping what is done


def test_only_rows_without_figures_are_made(study):
    made, left = (Form(f"row {n}", BITS, {"method": "rtn", "width": 2}) for n in range(2))
    study.keep(made.key, {"kld_mean": 1.0})
    said = []
    run(study, [made, left, left], 1, said.append)
    assert len(said) == 1 and said[0].startswith("1/1 row-1-2.5: KLD ")
    assert study.result(made.key) == {"kld_mean": 1.0}
    assert 0 < study.result(left.key)["kld_mean"] < 1 and study.result(left.key)["true_bits"] == 2.5
    assert not [file for file in study.work.iterdir() if file.name.startswith("row") and file.suffix != ".json"]


def test_other_texts_options_or_code_start_anew(study, tmp_path):
    def directory(texts=TEXTS, tokens=300, **options):
        with open_study(REFERENCE, texts, [STDLIB / "argparse.py"], tmp_path, tokens, **OPTIONS | options) as other:
            return other.work.name

    assert directory() == study.work.name
    others = [directory(texts=TEXTS[:1]), directory(tokens=299), directory(trunk_width=16), directory(context=64)]
    assert len({study.work.name, *others}) == 5


def test_one_report_at_a_time_has_a_work_directory(tmp_path):
    with (
        open_study(REFERENCE, TEXTS, [], tmp_path, 300, **OPTIONS),
        pytest.raises(BlockingIOError, match="another report is being made there; give another --work$"),
        open_study(REFERENCE, TEXTS, [], tmp_path, 300, **OPTIONS),
    ):
        pass


def test_without_texts_it_is_of_modules_that_calibration_leaves(tmp_path):
    with open_study(REFERENCE, [], [], tmp_path, 1024, **OPTIONS) as plain:
        (ids,) = plain.texts.values()
    assert len(ids) == 1024
    from edge_moe.runtime.tokenizer import Tokenizer

    modules, read = [file.read_text(encoding="utf-8", errors="ignore") for file in stdlib_files(0)], 0
    while read < STDLIB_BYTES:
        read += len(modules.pop(0))
    tokenizer = Tokenizer(REFERENCE)
    assert tokenizer.decode(ids[:64].tolist()) in "\n".join(modules)


@pytest.mark.parametrize("which", ["text", "calibration"])
def test_a_missing_file_is_refused(which, tmp_path):
    files = {"text": TEXTS, "calibration": [], which: [tmp_path / "gone.txt"]}
    with (
        pytest.raises(FileNotFoundError, match="gone.txt: no such text file$"),
        open_study(REFERENCE, files["text"], files["calibration"], tmp_path, 300, **OPTIONS),
    ):
        pass


# ---- the report


def row(*windows: list[float], bits=2.5) -> dict:
    """Figures of a row with these divergences by window of each text."""
    texts = {f"t{i}": {"kld_mean": float(np.mean(its)), "windows": its} for i, its in enumerate(windows)}
    total = {"kld_mean": float(np.mean([text["kld_mean"] for text in texts.values()])), "texts": texts}
    rest = {"true_bits": bits, "expert_bytes": 1_500_000, "bundle_bytes": 2_000_000, "perplexity": 36.0}
    return total | rest | {"kld_p99": 0.5, "top1_agreement": 0.9}


def test_the_ratios_error_is_over_windows_by_text():
    value, error = report.ratio(row([0.2, 0.4], [0.1, 0.5]), row([0.1, 0.2], [0.2, 0.1]))
    assert value == pytest.approx(0.3 / 0.15)
    # differences from twice the other: 0, 0 and -0.3, 0.3, variance 0.18 over 2 windows
    assert error == pytest.approx(math.sqrt(0.18 / 2) / 2 / 0.15)
    assert report.ratio(row([0.2, 0.4]), row([0.1, 0.2])) == (pytest.approx(2), pytest.approx(0, abs=1e-12))


def test_bars_are_met_or_missed_by_the_figures(study):
    texts = replace(study, texts=dict.fromkeys(["brown", "code", "news", "reviews", "wiki"]))
    low = {"rtn": row([1.0], [1.0]), "uniform": row([0.40], [0.60]), "pmq": row([0.41], [0.35])}
    llama = {"llama.cpp IQ3_S": row([0.011], [0.011]), "llama.cpp Q4_K": row([0.009], [0.009])}
    high = {"uniform": row([0.02], [0.02]), "pmq": row([0.010], [0.010])} | llama
    found = {text: met for text, met, _ in report.bars({2.5: low, 3.5: high, 4.5: high}, texts)}
    assert found == {
        "2.5 bits: pmq at most 0.4 x rtn": True,
        "2.5 bits: pmq not above uniform": True,
        "2.5 bits: pmq not above uniform on any text": False,
        "2.5 bits: pmq at most 0.85 x uniform": True,
        "3.5 bits: pmq not above uniform": True,
        "3.5 bits: pmq not above uniform on any text": True,
        "3.5 bits: pmq at most 0.85 x uniform": True,
        "3.5 bits: pmq below llama.cpp's IQ3_S": True,
        "4.5 bits: pmq not above uniform": True,
        "4.5 bits: pmq not above uniform on any text": True,
        "4.5 bits: pmq below llama.cpp's Q4_K": False,
    }
    worse = low | {"pmq": row([0.5], [0.55])}
    assert [met for _, met, _ in report.bars({2.5: worse}, texts)] == [False, False, False, False]
    assert "| 2.5 bits: pmq not above uniform | **MISSED** | 1.050 ± nan |" in report.bar_table(
        report.bars({2.5: worse}, texts)
    )


def test_a_difference_counts_from_two_standard_errors():
    assert [report.verdict(*its) for its in ((1.1, 0.04), (1.1, 0.06), (0.9, 0.04), (1.1, math.nan))] == [
        "worse", "no difference", "better", "no difference",
    ]  # fmt: skip
    assert report.combined_error((1.0, 1.2), (0.06, 0.1)) == pytest.approx(math.hypot(0.08, 0.1))
    assert report.combined_error((1.0,), (0.06,)) == 0.06


def test_tables_have_a_row_a_form_and_a_column_a_text():
    lines = report.method_table({"rtn": row([0.2, 0.4], [0.1, 0.5]), "pmq": row([0.1, 0.2], [0.2, 0.1])}, ["t0", "t1"])
    head, rule, rtn, pmq = lines.splitlines()
    assert head.count("|") == rule.count("|") == rtn.count("|") == 12
    assert rtn == (
        "| rtn | 2.500 | 1.500 | 2.000 | 36.000 | 0.30000 | 2.00 ± 1.00 | 0.3000 | 0.3000 | 0.500 | 0.9000 |"
    )
    assert "| 0.15000 | 1 |" in pmq
    one, other = ({"pmq": row([0.1, 0.2]), "without": row([0.2, 0.4])} for _ in range(2))
    ablated = report.ablation_table([one, other], ["t0"]).splitlines()
    assert ablated[3] == "| without | 0.30000 | 0.30000 | 2.000 ± 0.000 | 2.00 | worse |"


def test_a_certificate_stands_beside_what_each_text_shows_of_it():
    said = {"bundle": {"kld_mean": 0.2, "kld_p99": 1.5, "top1_agreement": 0.75}}
    results = {2.5: {"rtn": row([1.0], [1.0]), "pmq": row([0.1, 0.2], [0.2, 0.1]) | {"certificate": said}}}
    lines = report.certificate_table(results, ["t0", "t1"]).splitlines()
    assert lines[2:] == ["| pmq | 2.500 | 0.20000 | 1.500 | 0.7500 | 0.75 | 0.75 | 0.9000 |"]
    assert report.certificate_table({2.5: {"rtn": row([1.0], [1.0])}}, ["t0"]) == ""


def command(*arguments) -> subprocess.CompletedProcess:
    given = [sys.executable, "-m", "bench.laboratory.quality", *map(str, arguments)]
    return subprocess.run(given, capture_output=True, text=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})


def test_the_command_writes_the_report_and_goes_on_with_what_is_kept(tmp_path):
    small = ["--tokens", 300, "--context", 128, "--calibration-tokens", 1024, "--processes", 1, "--bits", 2.5]
    rows = ["--methods", "rtn", "uniform", "--parts", "methods", "--work", tmp_path / "work"]
    first = command("--text", TEXTS[0], "--calibration", STDLIB / "argparse.py", *small, *rows)
    assert first.returncode == 0, first.stderr
    assert "4/4" in first.stderr
    lines = first.stdout.splitlines()
    assert lines[0] == "# Quality of compressed experts"
    rows_of = lines[: lines.index("## Certificates")]
    assert [line.split("|")[1].strip() for line in rows_of if line.startswith(("| rtn", "| uniform"))] == [
        "rtn",
        "uniform",
    ]
    assert "1,024 tokens of argparse.py" in first.stdout
    certified = lines[lines.index("## Certificates") :]
    assert [line.split("|")[1].strip() for line in certified if line.startswith("| uniform")] == ["uniform"]
    again = command(
        "--text", TEXTS[0], "--calibration", STDLIB / "argparse.py", *small, *rows, "--out", tmp_path / "r.md"
    )
    assert again.returncode == 0 and again.stderr == again.stdout == ""
    assert (tmp_path / "r.md").read_text() == first.stdout


def test_a_killed_report_leaves_no_worker(tmp_path):
    given = ["--text", TEXTS[0], "--tokens", 300, "--context", 128, "--calibration-tokens", 8192, "--bits", 2.5]
    given += ["--processes", 2, "--parts", "methods", "--methods", "uniform", "rtn", "--work", tmp_path]
    command = [sys.executable, "-m", "bench.laboratory.quality", *map(str, given)]
    report = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (left := workers_of(report.pid)) and report.poll() is None:
        pass
    report.kill()
    report.wait()
    assert left
    while any(Path(f"/proc/{worker}").exists() for worker in left):  # else this does not end
        pass


def workers_of(pid: int) -> list[int]:
    """Processes that a process has started and that are at work."""
    file = Path(f"/proc/{pid}/task/{pid}/children")
    children = [int(child) for child in file.read_text().split()] if file.exists() else []
    return [c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]


def test_cost_is_of_the_choices_that_pmq_weighs(study):
    from bench.laboratory.quality import cost

    (size,) = cost.by_size(study, (256,))
    with Checkpoint(REFERENCE) as checkpoint:
        o = targets.check(targets.Options(bits=2.5), checkpoint.config)
        assert size["choices"] == len(cost.Compression(checkpoint, Path(), o, None).measured_choices())
    assert (size["dim"], size["hidden"]) == (256, 128)
    assert size["seconds"] == size["moments"] + size["measuring"] + size["rounding"] > 0
    timed = cost.whole_run(study)
    assert list(timed["steps"]) == ["text", "measure", "round"] and timed["bits"] <= 2.5
    assert sum(timed["steps"].values()) == pytest.approx(timed["seconds"])
    assert "measure" in report.run_text(timed) and "| 256 x 128 |" in report.size_table([size])


# ---- mlx_lm


def test_mlx_rows_are_at_the_sizes_that_it_makes():
    names = {bits: [one.name for one in peers.mlx_forms(bits)] for bits in (1.6, 2.0, 2.5, 3.0, 3.5, 4.5)}
    assert names == {
        1.6: [],
        2.0: [],
        2.5: ["mlx_lm convert", "mlx_lm gptq"],
        3.0: ["mlx_lm dynamic_quant"],
        3.5: ["mlx_lm convert"],
        4.5: ["mlx_lm convert", "mlx_lm gptq"],
    }


def test_an_mlx_row_is_what_mlx_lm_converts_to(study, tmp_path):
    pytest.importorskip("mlx_lm")
    import mlx.core as mx

    (convert,) = peers.mlx_forms(3.5)
    convert.make(study, convert, tmp_path / "row.emoe")
    bundle = Bundle.open(tmp_path / "row.emoe")
    assert bundle.bits_per_weight == 3.5 and len(records(bundle.path, 3)) == CONFIG.experts
    weights = mx.load(str(REFERENCE / "model.safetensors"))
    matrix = weights["model.layers.1.mlp.experts.5.gate_proj.weight"]
    codes, scales, _ = mx.quantize(matrix, 64, 3)
    record = records(bundle.path, 1)[5]
    assert record.startswith(np.array(codes).tobytes())
    assert np.array(scales.view(mx.uint16)).tobytes() in record
    assert json.loads((bundle.path / "bundle.json").read_text())["method"] == {"name": "mlx_lm"}
