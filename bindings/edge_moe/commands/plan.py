"""`edge-moe plan`: shows the memory and speed of a model before it is loaded or even downloaded."""

from enum import Enum
from pathlib import Path

from ..terminal import show
from . import options
from .options import argument, option
from .output import print_json

_MODEL = "For a MODEL that is not a bundle yet"
GLOSSARY = """\b
Words:
  trunk        all weights but the routed experts: attention, embedding, head
  bits         of an expert weight, scales, biases and padding included
  width        bits of its code alone: width 2 in groups of 64 is 2.5 bits
  slot         memory for one expert that is paged in
  floor        the smallest cap that works; most experts of every token are read
  working set  the experts that one token uses in all layers together
  resident     in memory: nothing is read from storage"""


class Recipe(str, Enum):
    collaborative = "collaborative"


ModelOrBundle = argument(
    str, "MODEL|BUNDLE", "A bundle, a model's directory, config.json or GGUF file, or a name on the hub: ORG/NAME."
)
Bits = option(
    float | None, "--bits", metavar="B", section=_MODEL,
    help="Mean bits of an expert weight, as for compress; 16: no quantization [default: 2.5].",
)  # fmt: skip
Size = option(str | None, "--size", metavar="SIZE", section=_MODEL, help="Bytes of the whole bundle, such as 103GB.")
PlanWidth = option(int | None, "--width", metavar="B", section=_MODEL, help="One width for all experts.")
PlanWidths = option(
    str | None, "--widths", metavar="NAME=B,...", section=_MODEL,
    help="Widths by kind: gate, up, down, edge_gate, edge_up, edge_down (the first and last eighth of the layers), "
    "shared, attention, delta (delta nets), conv (short convolutions), mamba, dense, streams, embedding, head; other "
    "expert matrices have --width, or 4.",
)  # fmt: skip
PlanTrunkWidth = option(
    int | None, "--trunk-width", metavar="B", section=_MODEL, help="Width of all weights but the experts' [default: 8]."
)
KeepExperts = option(
    str | None, "--keep-experts", metavar="N|SHARE", section=_MODEL,
    help="Number or share of the experts that each layer keeps, such as 192 or 0.75 [default: all].",
)  # fmt: skip
PlanRecipe = option(
    Recipe | None, "--recipe", section=_MODEL,
    help="A published mix of widths in another program's format, for comparison; compress does not make it.",
)  # fmt: skip
Sequences = option(
    int, "--sequences", metavar="N", shown=True,
    help="Conversations, each with its own KV cache, as for Runtime(sequences=N).",
)  # fmt: skip
PlanDevice = option(str, "--device", metavar="NAME", shown=True, help="Where the model would run: cpu, cuda or mlx.")


def plan(
    model: ModelOrBundle,
    ram: options.Ram = "auto",
    context: options.Context = None,
    kv: options.Kv = options.KvType.float16,
    bits: Bits = None,
    size: Size = None,
    width: PlanWidth = None,
    widths: PlanWidths = None,
    trunk_width: PlanTrunkWidth = None,
    keep_experts: KeepExperts = None,
    recipe: PlanRecipe = None,
    sequences: Sequences = 1,
    device: PlanDevice = "cpu",
    threads: options.Threads = None,
    json_output: options.Json = False,
) -> None:
    """Show how a model would fit under a cap.

    Loads no weights: the tables of a bundle are enough, or a config.json before any download. Prints the memory plan
    and, once `edge-moe doctor` has measured this machine, the expected speed. Fails if the cap is below the floor. Of a
    directory that `edge-moe split` has written, it shows what each machine needs.
    """
    from ..compressor.choosing.estimate import estimate
    from ..runtime.bundle_part import parts_in
    from ..runtime.plan import BelowFloor

    as_made = {"bits": bits, "size": size, "width": width, "widths": widths_of(widths), "trunk_width": trunk_width}
    model_as = {"keep_experts": keep_experts_of(keep_experts), "recipe": recipe and recipe.value}
    run = {"context": context, "device": device, "threads": threads, "kv": kv.value, "sequences": sequences}
    if not Path(model, "bundle.json").is_file() and (parts := parts_in(Path(model))):
        each = {path.name: estimate(path, ram, **run, **as_made, **model_as) for path in parts}
        return _plan_parts(each, json_output)
    result = estimate(model, ram, **run, **as_made, **model_as)
    from ..bench.expectation import expected_speed  # after the estimate, which counts this process's memory
    from ..machine_file import disk_of, known_machine
    from ..plan_text import estimate_text

    where, machine = Path(model) if not result.parts else Path("."), known_machine()

    def speed_of(one):
        if machine is None or device != "cpu" or threads not in (None, machine.threads):
            return None  # doctor measured the CPU with its default threads
        return expected_speed(one, machine, disk_of(machine, where)[0])

    if json_output:
        speed = speed_of(result)
        print_json(result.as_dict() | {"expected_speed": speed and speed.as_dict()})
    else:
        show(estimate_text(result, speed_of, where))
    if result.plan.ram_bytes < result.plan.floor_bytes:
        raise BelowFloor(result.plan)


def _plan_parts(estimates: dict, json_output: bool) -> None:
    """Show what each rank needs. estimates: of the parts of a bundle, by name."""
    from ..runtime.plan import BelowFloor
    from ..runtime.plan_table import plan_text

    if json_output:
        print_json({"parts": {name: one.as_dict() for name, one in estimates.items()}})
    else:
        show("\n\n".join(f"{name}:\n{plan_text(one.plan)}" for name, one in estimates.items()))
    for one in estimates.values():
        if one.plan.ram_bytes < one.plan.floor_bytes:
            raise BelowFloor(one.plan)


def widths_of(text: str | None) -> dict[str, int] | None:
    """Parse widths such as gate=2,up=2,down=3."""
    try:
        return text and {name: int(bits) for name, bits in (item.split("=") for item in text.split(","))}
    except ValueError:
        raise ValueError(f"widths {text!r} are not NAME=BITS separated by commas, such as gate=2,down=3") from None


def keep_experts_of(text: str | None) -> int | float | None:
    """Parse a number of experts such as 192, or a share such as 0.75."""
    try:
        return text and (float(text) if "." in text else int(text))
    except ValueError:
        raise ValueError(
            f"keep-experts {text!r} is neither a number of experts such as 192 nor a share such as 0.75"
        ) from None
