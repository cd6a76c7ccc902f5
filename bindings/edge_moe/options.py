"""The command line's arguments and options: one name, one type, one line of help each."""

from enum import Enum
from typing import Annotated

import typer


class Method(str, Enum):
    pmq = "pmq"
    mc = "mc"
    uniform = "uniform"
    rtn = "rtn"


class Format(str, Enum):
    md = "md"
    json = "json"
    csv = "csv"


class Recipe(str, Enum):
    collaborative = "collaborative"


def _argument(kind, metavar: str, help: str):
    return Annotated[kind, typer.Argument(metavar=metavar, help=help, show_default=False)]


def _option(kind, *names: str, help: str, metavar: str | None = None, shown: bool = False):
    return Annotated[kind, typer.Option(*names, metavar=metavar, help=help, show_default=shown)]


Bundle = _argument(str, "BUNDLE", "A bundle's directory, NAME.emoe.")
BundleIfAny = _argument(str | None, "BUNDLE", "A bundle's directory, NAME.emoe.")
Model = _argument(str, "MODEL", "A checkpoint's directory: config.json and safetensors files.")
Out = _argument(str, "OUT", "The bundle to write, NAME.emoe.")
ModelOrBundle = _argument(str, "MODEL|BUNDLE", "A bundle, a model's directory, or a config.json alone.")

# Of most commands
Json = _option(bool, "--json", help="Print one JSON object and nothing else.")
Ram = _option(
    str, "--ram", metavar="SIZE", shown=True, help="Cap on all memory, as 8GB or 8GiB; auto: 80 % of what is free."
)
Context = _option(int | None, "--context", metavar="N", help="Tokens to hold [default: 4096 or the model's own].")
Threads = _option(int | None, "--threads", metavar="N", help="Threads of computation [default: all cores].")
Prune = _option(
    str, "--prune", metavar="off|bundle", shown=True, help="Leave out experts that a token hardly needs, as calibrated."
)

# Of generate and chat
Prompt = _option(str | None, "-p", "--prompt", metavar="TEXT", help="The text to go on from; - reads stdin.")
TokenIds = _option(str | None, "--tokens", metavar="1,2,3", help="Instead of a text: token ids; prints ids.")
MaxTokens = _option(int, "-n", "--max-tokens", metavar="N", shown=True, help="Most tokens of an answer.")
Temperature = _option(float, "--temp", metavar="T", shown=True, help="Sampling temperature; 0: the likeliest token.")
TopP = _option(
    float, "--top-p", metavar="P", shown=True, help="Sample from the likeliest tokens up to this probability."
)
TemperatureIfAny = _option(float | None, "--temp", metavar="T", help="Sampling temperature [default: the model's].")
TopPIfAny = _option(
    float | None, "--top-p", metavar="P", help="Likeliest tokens to sample from [default: the model's]."
)
SamplingSeed = _option(int | None, "--seed", metavar="N", help="The same seed gives the same text.")
Stop = _option(list[str] | None, "--stop", metavar="TEXT", help="End before this text; repeatable.")

# Of compress and demo
Bits = _option(
    float | None,
    "--bits",
    metavar="B",
    help="Mean bits of an expert weight, all included; 16: as it is [default: 2.5].",
)
Width = _option(int | None, "--width", metavar="B", help="Instead: one width for all experts (method uniform or rtn).")
Size = _option(str | None, "--size", metavar="SIZE", help="Instead: bytes of the whole bundle, as 103GB.")
HowToChoose = _option(
    Method | None, "--method", help="How widths are chosen; pmq: by one program over the whole model [default: pmq]."
)
CalibrationFiles = _option(
    list[str] | None, "--calibration", metavar="FILE",
    help="Text or .npy of token ids; repeatable [default: Python's standard library].",
)  # fmt: skip
CalibrationTokens = _option(int, "--tokens", metavar="N", shown=True, help="Tokens to calibrate on.")
Group = _option(int, "--group", metavar="N", shown=True, help="Inputs that share a scale: 32, 64 or 128.")
TrunkWidth = _option(int, "--trunk-width", metavar="B", shown=True, help="Bits of all weights but the experts'.")
CalibrationSeed = _option(int, "--seed", metavar="N", shown=True, help="Draws the default calibration text.")
KeepBundles = _option(str | None, "--keep", metavar="DIR", help="Keep the bundles in DIR.")

# Of plan
PlanWidth = _option(int | None, "--width", metavar="B", help="Bits of the experts, for a MODEL [default: 4].")
PlanTrunkWidth = _option(int | None, "--trunk-width", metavar="B", help="Bits of all weights but those [default: 8].")
PlanWidths = _option(
    str | None, "--widths", metavar="NAME=B,...",
    help="Bits by kind: gate, up, down, edge_gate, edge_up, edge_down (the first and last eighth of the layers), "
    "shared, attention, dense, embedding, head.",
)  # fmt: skip
KeepExperts = _option(
    str | None, "--keep-experts", metavar="N|SHARE", help="Experts that a layer keeps, as 192 or 0.75 [default: all]."
)
PlanRecipe = _option(Recipe | None, "--recipe", help="Instead of widths: a published mix of another format.")

# Of eval
Texts = _option(list[str], "--text", metavar="FILE", help="Text to score; repeatable.")
Against = _option(str | None, "--against", metavar="MODEL|BUNDLE", help="Compare predictions with this model's.")
Window = _option(int, "--context", metavar="N", shown=True, help="Tokens of a window; windows do not overlap.")
TextTokens = _option(int | None, "--tokens", metavar="N", help="Score the first N tokens of each text [default: all].")

# Of bench
Synthetic = _option(str | None, "--synthetic", metavar="CONFIG", help="Random weights of this config.json's shapes.")
Layers = _option(int | None, "--layers", metavar="N", help="Layers of the random model [default: the config's].")
SyntheticWidth = _option(int | None, "--width", metavar="B", help="Bits of the random model's experts [default: 4].")
Vocabulary = _option(int | None, "--vocab", metavar="N", help="Tokens of its vocabulary [default: the config's].")
KeepSynthetic = _option(str | None, "--keep", metavar="OUT", help="Keep the random bundle as OUT.")
PromptTest = _option(int, "-p", "--prompt", metavar="N", shown=True, help="Tokens of the prompt test; 0: none.")
GenerateTest = _option(int, "-n", "--generate", metavar="N", shown=True, help="Tokens of the generation test; 0: none.")
Repeats = _option(int, "-r", "--repeats", metavar="N", shown=True, help="Timed runs of each test.")
Output = _option(Format, "-o", "--output", shown=True, help="Table, one JSON object, or exact figures.")
