"""`edge-moe plan`: what a model would take of memory, before it is loaded or downloaded."""

from enum import Enum

from edge_moe.commands import options
from edge_moe.commands.options import argument, option
from edge_moe.commands.output import print_json
from edge_moe.terminal import show


class Recipe(str, Enum):
    collaborative = "collaborative"


ModelOrBundle = argument(str, "MODEL|BUNDLE", "A bundle, a model's directory, or a config.json alone.")
PlanWidth = option(int | None, "--width", metavar="B", help="Bits of the experts, for a MODEL [default: 4].")
PlanWidths = option(
    str | None, "--widths", metavar="NAME=B,...",
    help="Bits by kind: gate, up, down, edge_gate, edge_up, edge_down (the first and last eighth of the layers), "
    "shared, attention, dense, embedding, head.",
)  # fmt: skip
PlanTrunkWidth = option(int | None, "--trunk-width", metavar="B", help="Bits of all weights but those [default: 8].")
KeepExperts = option(
    str | None, "--keep-experts", metavar="N|SHARE", help="Experts that a layer keeps, as 192 or 0.75 [default: all]."
)
PlanRecipe = option(Recipe | None, "--recipe", help="Instead of widths: a published mix of another format.")
PlanDevice = option(str, "--device", metavar="NAME", shown=True, help="Where it would compute: cpu or cuda.")


def plan(
    model: ModelOrBundle,
    ram: options.Ram = "auto",
    context: options.Context = None,
    kv: options.Kv = options.KvType.float16,
    width: PlanWidth = None,
    widths: PlanWidths = None,
    trunk_width: PlanTrunkWidth = None,
    keep_experts: KeepExperts = None,
    recipe: PlanRecipe = None,
    device: PlanDevice = "cpu",
    threads: options.Threads = None,
    json_output: options.Json = False,
) -> None:
    """Show where memory would go under a cap.

    Nothing is loaded: a bundle's tables are enough, or a config.json before any download; then also what each part
    would take at given widths, and the largest context. Fails when the cap is below the floor.
    """
    from edge_moe.compressor.estimate import estimate
    from edge_moe.report import estimate_text
    from edge_moe.runtime.plan import BelowFloor

    bits = {"width": width, "widths": widths_of(widths), "trunk_width": trunk_width}
    model_as = {"keep_experts": keep_experts_of(keep_experts), "recipe": recipe and recipe.value}
    run = {"context": context, "device": device, "threads": threads, "kv": kv.value}
    result = estimate(model, ram, **run, **bits, **model_as)
    if json_output:
        print_json(result.as_dict())
    else:
        show(estimate_text(result))
    if result.plan.ram_bytes < result.plan.floor_bytes:
        raise BelowFloor(result.plan)


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
