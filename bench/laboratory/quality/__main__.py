"""The quality report: compares compression methods at equal true bytes, on texts that were not calibrated on.

    python -m bench.laboratory.quality --text A.txt B.txt --calibration C.txt > quality.md

The default texts are Python's standard library. Rows are kept in --work, so a killed run can be resumed. The rows of
mlx_lm and llama.cpp are left out if mlx_lm, or llama_cpp and gguf, are not installed. Progress goes to stderr.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from edge_moe.compressor.choosing.targets import DEFAULT_TOKENS
from edge_moe.devices.probe import default_threads

from ..options import add_texts
from . import cost, llama_types, peers, report
from .forms import Form, ablations, bases, methods
from .study import Study, open_study, run

PARTS = ("methods", "ablation", "time")
QUICK = {"bits": [2.5], "ablate": [2.5], "repeats": 1, "tokens": 1024, "calibration_tokens": 4096}
QUICK_SIZES = (256, 512)


def main() -> None:
    arguments = parse()
    options = {key: getattr(arguments, key) for key in ("tokens", "calibration_tokens", "trunk_width", "context")}
    with open_study(arguments.model, arguments.text, arguments.calibration, arguments.work, **options) as study:
        text = make_report(study, arguments, lambda line: print(line, file=sys.stderr, flush=True))
    if arguments.out is None:
        print(text)
    else:
        arguments.out.write_text(text + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.laboratory.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_texts(parser, tokens=12_288, calibration_tokens=DEFAULT_TOKENS)
    add = parser.add_argument
    add("--context", type=int, default=256, help="tokens of a window")
    add("--trunk-width", type=int, default=8, choices=(8, 16), help="bits of the trunk in every row")
    add("--bits", type=float, nargs="+", default=[1.6, 2.0, 2.5, 3.0, 3.5, 4.5], help="true bits of an expert weight")
    add("--methods", nargs="+", help="names of rows or their first words, such as rtn pmq llama.cpp; by default all")
    add("--ablate", type=float, nargs="*", default=[2.5], help="bits of the ablation")
    add("--repeats", type=int, default=2, help="samples of calibration text in the ablation")
    add("--parts", nargs="+", default=PARTS, choices=PARTS)
    add("--processes", type=int, default=default_threads(), help="rows at a time")
    add("--work", type=Path, default=Path(tempfile.gettempdir()) / "edge-moe-quality", help="where figures are kept")
    add("--out", type=Path, help="file for the report; by default stdout")
    add("--quick", action="store_true", help="one size and few tokens, as a smoke test")
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    return arguments


def make_report(study: Study, arguments: argparse.Namespace, tell) -> str:
    """Run what has not been run yet, and return the report as Markdown."""
    study.prepare()
    if "time" in arguments.parts:  # timed first, while nothing else runs
        timed(study, "whole-run", lambda: cost.whole_run(study), tell)
        timed(study, "sizes", lambda: {"sizes": cost.by_size(study, *[QUICK_SIZES] * arguments.quick)}, tell)
    by_bits = {
        bits: rows_at(study, bits, arguments.methods) for bits in arguments.bits * ("methods" in arguments.parts)
    }
    ablated = {
        bits: [ablations(study, bits, repeat) for repeat in range(arguments.repeats)]
        for bits in arguments.ablate * ("ablation" in arguments.parts)
    }
    together = [form for repeats in ablated.values() for forms in repeats for form in forms]
    run(study, [*bases(study), *(f for forms in by_bits.values() for f in forms), *together], arguments.processes, tell)

    sections = ["# Quality of compressed experts", report.conditions(study, figures(study, bases(study)))]
    results, texts = {bits: figures(study, forms) for bits, forms in by_bits.items()}, list(study.texts)
    if results:
        sections += ["## Bars", report.bar_table(report.bars(results, study))]
        for bits, rows in results.items():
            sections += [f"## {bits:g} bits", report.method_table(rows, texts)]
        missing = "" if peers.installed() else " mlx_lm's rows are left out: it is not installed here."
        sections += [report.NOTES + missing, report.MLX_NOTES] if peers.installed() else [report.NOTES + missing]
        sections += [report.LLAMA_CPP_NOTES] if llama_types.installed() else []
        if certificates := report.certificate_table(results, texts):
            sections += ["## Certificates", report.CERTIFICATE_NOTES, certificates]
    for bits, repeats in ablated.items():
        rows = [figures(study, forms) for forms in repeats]
        sections += [f"## Ablation at {bits:g} bits", report.ablation_table(rows, texts)]
    sections += [report.ABLATION_NOTES] if ablated else []
    if "time" in arguments.parts:
        sections += ["## Time", report.run_text(study.result("whole-run"))]
        sections += [report.size_table(study.result("sizes")["sizes"]), report.SIZE_NOTES]
    return "\n\n".join(sections)


def rows_at(study: Study, bits: float, wanted: list[str] | None) -> list[Form]:
    forms = methods(study, bits) + (peers.mlx_forms(bits) if peers.installed() else [])
    forms += llama_types.forms(bits) if llama_types.installed() else []
    return [form for form in forms if wanted is None or {form.name, form.name.split()[0]} & set(wanted)]


def figures(study: Study, forms: list[Form]) -> dict[str, dict]:
    """The results by name of the row."""
    return {form.name: study.result(form.key) for form in forms}


def timed(study: Study, key: str, measure, tell) -> None:
    if study.result(key) is None:
        tell(f"timing: {key}")
        study.keep(key, measure())


if __name__ == "__main__":
    main()
