"""The command line's arguments and options: one name, one type, one line of help each."""

from enum import Enum
from typing import Annotated

import typer
from typer.core import TyperCommand

SWEEP_CAPS = 6
WITHOUT_VALUE = {"--sweep-ram": str(SWEEP_CAPS)}  # options that need no number, and what they then mean


class Method(str, Enum):
    pmq = "pmq"
    mc = "mc"
    mc_release = "mc-release"
    uniform = "uniform"
    rtn = "rtn"


class DropScores(str, Enum):
    mixture = "mixture"
    weight = "weight"
    frequency = "frequency"
    mean_weight = "mean-weight"


class DropCountsBy(str, Enum):
    equal = "equal"
    sensitivity = "sensitivity"


class Format(str, Enum):
    md = "md"
    json = "json"
    csv = "csv"


class KvType(str, Enum):
    float16 = "float16"
    float32 = "float32"


class DeviceName(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Recipe(str, Enum):
    collaborative = "collaborative"


def _argument(kind, metavar: str, help: str):
    return Annotated[kind, typer.Argument(metavar=metavar, help=help, show_default=False)]


def _option(kind, *names: str, help: str, metavar: str | None = None, shown: bool = False, section: str | None = None):
    return Annotated[
        kind, typer.Option(*names, metavar=metavar, help=help, show_default=shown, rich_help_panel=section)
    ]


class SectionedCommand(TyperCommand):
    """A command whose help has its options in sections, in the order in which they first appear; the rest at the end.

    Plain text: typer's own panels would import rich for every command. An option of WITHOUT_VALUE may stand alone.
    """

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        given, own = [], {name for parameter in self.params for name in parameter.opts}
        for at, argument in enumerate(args):
            given.append(argument)
            if argument in WITHOUT_VALUE.keys() & own and not "".join(args[at + 1 : at + 2]).isdigit():
                given.append(WITHOUT_VALUE[argument])
        return super().parse_args(ctx, given)

    def format_options(self, ctx, formatter) -> None:
        sections = {}
        for parameter in self.get_params(ctx):
            title = "Arguments" if parameter.param_type_name == "argument" else parameter.rich_help_panel
            if (record := parameter.get_help_record(ctx)) is not None:
                sections.setdefault(title or "Options", []).append(record)
        for title in sorted(sections, key=lambda title: title == "Options"):
            with formatter.section(title):
                formatter.write_dl(sections[title])


Bundle = _argument(str, "BUNDLE", "A bundle's directory, NAME.emoe.")
BundleIfAny = _argument(str | None, "BUNDLE", "A bundle's directory, NAME.emoe.")
Model = _argument(str, "MODEL", "A checkpoint's directory: config.json and safetensors files.")
Out = _argument(str, "OUT", "The bundle to write, NAME.emoe.")
Where = _argument(str, "WHERE", "A bundle, or the directory that will hold one [default: the current one].")
ModelOrBundle = _argument(str, "MODEL|BUNDLE", "A bundle, a model's directory, or a config.json alone.")

# Of most commands
Json = _option(bool, "--json", help="Print one JSON object and nothing else.")
Ram = _option(
    str, "--ram", metavar="SIZE", shown=True, help="Cap on all memory, as 8GB or 8GiB; auto: 80 % of what is free."
)
Context = _option(int | None, "--context", metavar="N", help="Tokens to hold [default: 4096 or the model's own].")
Kv = _option(KvType, "--kv", shown=True, help="What the KV cache is kept in; float32 takes twice the memory.")
Device = _option(
    DeviceName, "--device", metavar="NAME", shown=True,
    help="Where to compute: cpu, cuda, or auto, a GPU where this build has code for one.",
)  # fmt: skip
PlanDevice = _option(DeviceName, "--device", metavar="NAME", shown=True, help="Where it would compute: cpu or cuda.")
Threads = _option(int | None, "--threads", metavar="N", help="Threads of computation [default: all cores].")
Prune = _option(
    str | None, "--prune", metavar="off|bundle|SHARE|RULE",
    help="Leave out experts that a token hardly needs: a share of their uses, as 0.2, or loss, otp, share or odp "
    "[default: bundle, where it is calibrated].",
)  # fmt: skip

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

# Of compress
_SMALL, _TEXT, _HOW = "How small (one of these; default: --bits 2.5)", "From what text", "How"
Bits = _option(
    float | None,
    "--bits",
    metavar="B",
    section=_SMALL,
    help="Mean bits of an expert weight, all included; 16: as it is.",
)
Width = _option(int | None, "--width", metavar="B", section=_SMALL, help="One width for all experts.")
Size = _option(str | None, "--size", metavar="SIZE", section=_SMALL, help="Bytes of the whole bundle, as 103GB.")
CompressRam = _option(
    str | None, "--ram", metavar="SIZE", section=_SMALL,
    help="Memory to run in, and to compress in; beside another target, to compress in alone.",
)  # fmt: skip
Paged = _option(
    bool,
    "--paged",
    section=_SMALL,
    help="With --ram: experts that answer nine uses in ten fit, the others are paged in.",
)
RunContext = _option(
    int | None, "--context", metavar="N", section=_SMALL,
    help="With --ram: tokens to hold [default: 4096 or the model's own].",
)  # fmt: skip
CalibrationFiles = _option(
    list[str] | None, "--calibration", metavar="FILE", section=_TEXT,
    help="Text or .npy of token ids; repeatable [default: Python's standard library].",
)  # fmt: skip
HeldOutFiles = _option(
    list[str] | None, "--held-out", metavar="FILE", section=_TEXT,
    help="Other text, to certify on; repeatable [default: the end of --calibration's].",
)  # fmt: skip
CalibrationTokens = _option(int, "--tokens", metavar="N", shown=True, section=_TEXT, help="Tokens to calibrate on.")
CalibrationSeed = _option(
    int, "--seed", metavar="N", shown=True, section=_TEXT, help="Draws the default calibration text."
)
HowToChoose = _option(
    Method | None, "--method", metavar="NAME", section=_HOW,
    help="pmq: each expert its width; mc, mc-release; uniform; rtn: no text [default: pmq; with --width: uniform].",
)  # fmt: skip
Group = _option(
    int | None, "--group", metavar="N", section=_HOW,
    help="Inputs that share a scale: 32, 64 or 128 [default: the method's choice].",
)  # fmt: skip
TrunkWidth = _option(
    int | None, "--trunk-width", metavar="B", section=_HOW,
    help="Bits of all weights but the experts' [default: pmq: each kind its own, else 8].",
)  # fmt: skip
DropExperts = _option(
    float, "--drop-experts", metavar="SHARE", section=_HOW, help="Leave out this share of the experts, as 0.25."
)
DropScore = _option(
    DropScores, "--drop-score", metavar="NAME", shown=True, section=_HOW,
    help="Which, with equal counts: lowest mixture, weight, frequency or mean-weight.",
)  # fmt: skip
DropCounts = _option(
    DropCountsBy, "--drop-counts", metavar="NAME", shown=True, section=_HOW,
    help="Equal in every layer, or by sensitivity: those missed least in all layers.",
)  # fmt: skip
AdjustTopK = _option(
    bool, "--adjust-top-k", section=_HOW, help="With --drop-experts: fewer experts a token, where that is nearer."
)
ActOrder = _option(bool, "--act-order", section=_HOW, help="Round the inputs that matter most first.")
NoCertificate = _option(bool, "--no-certificate", section=_HOW, help="Do not compare with the source on held-out text.")
Resume = _option(bool, "--resume", help="Go on with a run that was ended.")

# Of prune
Cut = _option(float, "--cut", metavar="SHARE", shown=True, help="Expert uses that a run without --prune leaves out.")
Rules = _option(
    list[str] | None, "--rule", metavar="NAME",
    help="loss, otp, share or odp; repeatable, the first for plain cuts [default: all, loss first].",
)  # fmt: skip
PruneRam = _option(str, "--ram", metavar="SIZE", shown=True, help="Memory of hidden states and of runs, as 8GB.")

# Of demo
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
_TESTS, _RANDOM = "Tests", "Instead of a BUNDLE"
PromptTest = _option(
    int, "-p", "--prompt", metavar="N", shown=True, section=_TESTS, help="Tokens of the prompt test; 0: none."
)
GenerateTest = _option(
    int, "-n", "--generate", metavar="N", shown=True, section=_TESTS, help="Tokens of the generation test; 0: none."
)
Depths = _option(
    list[str] | None, "-d", "--depth", metavar="N", section=_TESTS,
    help="Tokens in the context before either test; repeatable, or as 0,4096 [default: 0].",
)  # fmt: skip
PruneTests = _option(
    list[str] | None, "--prune", metavar="off|bundle|SHARE|RULE", section=_TESTS,
    help="Also measure it pruned; repeatable [default: off, and bundle where it is calibrated].",
)  # fmt: skip
Repeats = _option(int, "-r", "--repeats", metavar="N", shown=True, section=_TESTS, help="Timed runs of each test.")
SweepRam = _option(
    int | None, "--sweep-ram", metavar="[N]", section=_TESTS,
    help=f"Run the tests at N caps, from the smallest that works to every expert in memory or to --ram, and find the "
    f"knee; N is {SWEEP_CAPS} where it is left out.",
)  # fmt: skip
Synthetic = _option(
    str | None, "--synthetic", metavar="CONFIG", section=_RANDOM, help="Random weights of this config.json's shapes."
)
Layers = _option(
    int | None, "--layers", metavar="N", section=_RANDOM, help="Layers of the random model [default: the config's]."
)
SyntheticWidth = _option(
    int | None, "--width", metavar="B", section=_RANDOM, help="Bits of the random model's experts [default: 4]."
)
Vocabulary = _option(
    int | None, "--vocab", metavar="N", section=_RANDOM, help="Tokens of its vocabulary [default: the config's]."
)
KeepSynthetic = _option(str | None, "--keep", metavar="OUT", section=_RANDOM, help="Keep the random bundle as OUT.")
Output = _option(Format, "-o", "--output", shown=True, help="Table, one JSON object, or exact figures.")


# What the text of an option stands for


def token_ids_of(text: str) -> list[int]:
    try:
        return [int(token) for token in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"tokens {text!r} are not whole numbers with commas between them") from None


def depths_of(texts: list[str] | None) -> list[int]:
    """Each text one depth or several with commas between."""
    try:
        return [int(depth) for text in texts or ["0"] for depth in text.split(",")]
    except ValueError:
        raise ValueError(f"depth {','.join(texts)!r} is not a number of tokens, or several as 0,4096") from None


def widths_of(text: str | None) -> dict[str, int] | None:
    """gate=2,up=2,down=3 as a dictionary."""
    try:
        return text and {name: int(bits) for name, bits in (item.split("=") for item in text.split(","))}
    except ValueError:
        raise ValueError(f"widths {text!r} are not NAME=BITS with commas between, as gate=2,down=3") from None


def keep_experts_of(text: str | None) -> int | float | None:
    """192, or 0.75 of them."""
    try:
        return text and (float(text) if "." in text else int(text))
    except ValueError:
        raise ValueError(
            f"keep-experts {text!r} is neither a number of experts, as 192, nor a share, as 0.75"
        ) from None


def prune_of(text: str | None) -> float | str | None:
    """off, bundle, a rule's name, or a share of expert uses."""
    try:
        return text and float(text)
    except ValueError:
        return text
