"""Formatting the report as Markdown: tables of figures, the bars that they must clear, ablations and times."""

import math

import numpy as np

from ..markdown import table
from .forms import DROPPED
from .study import Study

LLAMA_CPP_BARS = {"IQ3_S": 3.5, "Q4_K": 4.5}  # pmq must have a lower KLD than these types, at about these bits
NEAR = 0.1  # bits
BELOW_RTN = 0.4  # of rtn's divergence, below RTN_BITS
RTN_BITS = 4.0
BELOW_UNIFORM = 0.85  # of uniform's divergence, from 2.5 to 3.5 bits
SIGNIFICANT = 2.0  # standard errors


def ratio(one: dict, other: dict) -> tuple[float, float]:
    """The mean divergence of one row over that of another on the same windows, and the ratio's standard error.

    The error is over windows, stratified by text: how much the figure would vary with other text of the same kind.
    """
    value, variance = one["kld_mean"] / other["kld_mean"], 0.0
    for name, text in one["texts"].items():
        difference = np.array(text["windows"]) - value * np.array(other["texts"][name]["windows"])
        variance += difference.var(ddof=1) / len(difference) if len(difference) > 1 else math.nan
    return value, math.sqrt(variance) / len(one["texts"]) / other["kld_mean"]


def conditions(study: Study, bases: dict[str, dict]) -> str:
    """The description of the model, the texts, and the measurement."""
    config, exact = study.config, bases["bfloat16"]
    source = ", ".join(file.rpartition("/")[2] for file in study.calibration) or "Python's standard library"
    trunk = "bfloat16"
    if study.trunk_width < 16:
        alone = bases["trunk alone"]["kld_mean"]
        trunk = f"{study.trunk_width} bits in every row, which alone costs a KLD of {alone:.5f}"
    return (
        f"Model: {study.model.name}, {config.layer_count} layers of {config.experts} experts, top {config.top_k}, each "
        f"of {config.dim} x {config.expert_hidden}. Text: {exact['tokens']:,} positions of {', '.join(study.texts)}, "
        f"in windows of {study.context} tokens that do not overlap, every position but a window's first. Calibration: "
        f"{study.calibration_tokens:,} tokens of {source}. Trunk: {trunk}.\n\n"
        "The engine runs each bundle. KLD is the divergence from the predictions of the bfloat16 model in nats a "
        "token, p99 its 99th percentile, top-1 the share of positions with the same first token: means over texts. "
        "PPL, perplexity, is their geometric mean. Bits are true ones: codes, scales, biases and padding of the "
        "experts over all of their weights, dropped ones included. MB are 10^6 bytes. / pmq: KLD over pmq's, with "
        "the standard error of that ratio over windows. "
        f"The bfloat16 model has perplexity {exact['perplexity']:.3f}; its bundle, scored alike, a KLD of "
        f"{exact['kld_mean']:.1g}."
    )


def method_table(results: dict[str, dict], texts: list[str]) -> str:
    """Rows of one size."""
    head = ["", "bits", "experts, MB", "bundle, MB", "PPL", "KLD", "/ pmq", *texts, "p99", "top-1"]
    rows = []
    for name, result in results.items():
        against = ""
        if "pmq" in results:
            value, error = ratio(result, results["pmq"])
            against = "1" if name == "pmq" else f"{value:.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")
        rows.append(
            [
                name,
                f"{result['true_bits']:.3f}",
                f"{result['expert_bytes'] / 1e6:.3f}",
                f"{result['bundle_bytes'] / 1e6:.3f}",
                f"{result['perplexity']:.3f}",
                f"{result['kld_mean']:.5f}",
                against,
                *(f"{result['texts'][text]['kld_mean']:.4f}" for text in texts),
                f"{result['kld_p99']:.3f}",
                f"{result['top1_agreement']:.4f}",
            ]
        )
    return table(head, rows, right=True)


NOTES = (
    "rtn: round to nearest, one width and group everywhere, those of uniform. uniform: one width everywhere, GPTQ "
    "with refinement. mc, mc-release: the Mixture Compressor's program as printed and as released, widths 1 to 3 at "
    "group 128, rounded as uniform is; left out where those widths cannot spend the bytes. pmq: ours. trunk too: "
    "with the widths of attention and embedding chosen as well, in as many bytes for the whole bundle. experts "
    f"dropped: {DROPPED:.0%} of them, the rest with {1 / (1 - DROPPED):.2f} times the bits, so that bytes are equal; "
    "the same number in each layer, or by sensitivity. random: a random choice of pmq's options that fills the same "
    "bytes. frequency only: one curve of cost for all experts, times the expert's frequency. error only: the measured "
    "error of an expert where it is used, without gain, frequency or kinds of text. All but rtn and mlx_lm's are "
    "rounded alike."
)

MLX_NOTES = (
    "mlx_lm: its own code, group 64, experts only. convert: 2, 3 and 4 bits. gptq: 2 and 4 bits, on the same "
    "calibration tokens. dynamic_quant: some matrices (of all experts of a layer together) one bit wider, by its "
    "sensitivities on 8,192 of the calibration tokens. Its DWQ is left out: a step on 512 tokens took 10 s of a "
    "core on MLX's CPU backend, its default of 2,048 samples of 1,025 tokens would take 11 hours."
)


def bars(results: dict[float, dict[str, dict]], study: Study) -> list[tuple[str, bool, str]]:
    """The requirements on the available sizes and rows: text, whether it is met, and the figures."""
    found = []

    def bar(text: str, met: bool, figures: str) -> None:
        found.append((text, met, figures))

    for bits, rows in results.items():
        pmq, rtn, uniform = (rows.get(name) for name in ("pmq", "rtn", "uniform"))
        if pmq and rtn and bits < RTN_BITS:
            value, error = ratio(pmq, rtn)
            bar(f"{bits:g} bits: pmq at most {BELOW_RTN} x rtn", value <= BELOW_RTN, f"{value:.3f} ± {error:.3f}")
        if pmq and uniform:
            value, error = ratio(pmq, uniform)
            bar(f"{bits:g} bits: pmq not above uniform", value <= 1, f"{value:.3f} ± {error:.3f}")
            by_text = {
                name: text["kld_mean"] / uniform["texts"][name]["kld_mean"] for name, text in pmq["texts"].items()
            }
            worst = max(by_text, key=by_text.get)
            bar(
                f"{bits:g} bits: pmq not above uniform on any text",
                by_text[worst] <= 1,
                f"at most {by_text[worst]:.3f}, on {worst}",
            )
            if 2.5 <= bits < 3.5 + NEAR:
                bar(
                    f"{bits:g} bits: pmq at most {BELOW_UNIFORM} x uniform",
                    value <= BELOW_UNIFORM,
                    f"{value:.3f} ± {error:.3f}",
                )
        for name, limit in LLAMA_CPP_BARS.items():
            if pmq and (its := rows.get(f"llama.cpp {name}")) and abs(bits - limit) < NEAR:
                value, error = ratio(pmq, its)
                bar(f"{bits:g} bits: pmq below llama.cpp's {name}", value < 1, f"{value:.3f} ± {error:.3f}")
    return found


def bar_table(found: list[tuple[str, bool, str]]) -> str:
    rows = [[text, "met" if met else "**MISSED**", figures] for text, met, figures in found]
    return table(["bar", "", "KLD"], rows, right=True)


LLAMA_CPP_NOTES = (
    "llama.cpp: types of its own quantiser on the experts, with an importance matrix from the same calibration tokens, "
    "read back by gguf and scored as bfloat16 by the same engine. Rows that are no multiple of 256 are laid end to "
    "end, where llama.cpp would take a wider type. The trunk is rounded to nearest, at the width of all rows."
)


def certificate_table(results: dict[float, dict[str, dict]], texts: list[str]) -> str:
    """The KLD in each certificate, which is independent of these texts, and the KLD on each text relative to it."""
    head, rows = ["", "bits", "certificate: KLD", "p99", "top-1", *texts, "top-1 of all"], []
    for by_name in results.values():
        for name, result in by_name.items():
            if said := (result.get("certificate") or {}).get("bundle"):
                shares = [f"{result['texts'][text]['kld_mean'] / said['kld_mean']:.2f}" for text in texts]
                figures = [f"{said['kld_mean']:.5f}", f"{said['kld_p99']:.3f}", f"{said['top1_agreement']:.4f}"]
                rows.append([name, f"{result['true_bits']:.3f}", *figures, *shares, f"{result['top1_agreement']:.4f}"])
    return table(head, rows, right=True) if rows else ""


CERTIFICATE_NOTES = (
    "The certificate is measured on the last part of the calibration text, which nothing was fitted to. Texts: KLD "
    "there over the certificate's."
)


def ablation_table(repeats: list[dict[str, dict]], texts: list[str]) -> str:
    """pmq with one part changed. repeats: for each sample of calibration text, the rows by name."""
    head = ["", *(f"KLD, sample {i + 1}" for i in range(len(repeats))), "/ pmq", *texts, ""]
    rows = []
    for name in repeats[0]:
        values, errors = zip(*(ratio(rows_[name], rows_["pmq"]) for rows_ in repeats), strict=True)
        value, error = float(np.mean(values)), combined_error(values, errors)
        by_text = [
            np.mean([one[name]["texts"][text]["kld_mean"] / one["pmq"]["texts"][text]["kld_mean"] for one in repeats])
            for text in texts
        ]
        rows.append(
            [
                name,
                *(f"{one[name]['kld_mean']:.5f}" for one in repeats),
                "1" if name == "pmq" else f"{value:.3f} ± {error:.3f}",
                *(f"{of_text:.2f}" for of_text in by_text),
                "" if name == "pmq" else verdict(value, error),
            ]
        )
    return table(head, rows, right=True)


def combined_error(values, errors) -> float:
    """The error of a mean ratio: over windows, which repeats do not lower as they share them, and between samples."""
    between = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return math.hypot(float(np.mean(errors)), float(between))


def verdict(value: float, error: float) -> str:
    """Whether a ratio differs significantly from one."""
    if not abs(value - 1) > SIGNIFICANT * error:
        return "no difference"
    return "worse" if value > 1 else "better"


ABLATION_NOTES = (
    "Each row is pmq with one part changed, on half as many tokens of the same calibration text as above; the samples "
    "are windows of it that lie elsewhere. / pmq: the mean of the samples' ratios, with the standard error over "
    f"windows and between samples. A row is worse or better than pmq where the ratio is over {SIGNIFICANT:g} of these "
    "errors from 1. Texts: the ratio on each. Widths, gain, domains and the unseen column change what is chosen; the "
    "others how it is rounded. uniform: one width everywhere in place of a program. Activation order is an option, off "
    "by default. Of the parts without a difference over all texts, kinds of text are there for the text that is unlike "
    "the others: without them pmq would be above uniform on it. The unseen column is for calibration on one kind of "
    "text alone: the last two rows, of which the second is to be compared with the first. Its share of what is lacking "
    "and the track's inputs gain two or three per cent in the mean, on four texts of five."
)


def run_text(run: dict) -> str:
    steps = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in run["steps"].items())
    return (
        f"compress() at default settings, {run['bits']:.2f} bits, certificate included: {run['seconds']:.1f} s on "
        f"{run['threads']} threads ({run['cpu_seconds']:.0f} s of all cores; {steps}). {run['processor']}, "
        f"load {run['busy']:.1f} before it began; other machines on the same host took {run['stolen']:.0f} s of these "
        "cores meanwhile."
    )


def size_table(sizes: list[dict]) -> str:
    head = [
        "expert",
        "second moments",
        f"measuring, {sizes[0]['choices']} choices",
        "rounding",
        "together",
        "us a weight",
    ]
    rows = []
    for one in sizes:
        parts = [f"{one[part]:.2f} s" for part in ("moments", "measuring", "rounding", "seconds")]
        per_weight = 1e6 * one["seconds"] / (3 * one["dim"] * one["hidden"])
        rows.append([f"{one['dim']} x {one['hidden']}", *parts, f"{per_weight:.2f}"])
    return table(head, rows, right=True)


SIZE_NOTES = (
    "Seconds of one core for one expert, from random matrices and inputs through the compressor's second moments and "
    "GPTQ; running the model and reading it are not in them. Experts are worked on side by side, one a core."
)
