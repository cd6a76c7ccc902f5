"""Names of commands and options from other tools: aliases of ours, and hints where there is no equivalent.

The help shows only our names.
"""

COMMANDS = {  # hints for commands that do not exist
    "run": "edge-moe chat BUNDLE talks with a model, edge-moe generate BUNDLE TEXT answers once",
    **dict.fromkeys(("convert", "quantize", "quantise"), "edge-moe compress MODEL OUT.emoe makes a bundle"),
    "server": "edge-moe serve BUNDLE answers over HTTP",
    **dict.fromkeys(
        ("pull", "download", "get"),
        "edge-moe downloads nothing: `hf download ORG/NAME --local-dir DIR`, then edge-moe compress DIR OUT.emoe",
    ),
    **dict.fromkeys(("perplexity", "ppl", "score"), "edge-moe eval BUNDLE --text FILE scores a bundle"),
    **dict.fromkeys(("info", "show"), "edge-moe inspect BUNDLE describes a bundle"),
    **dict.fromkeys(("check", "test"), "edge-moe verify BUNDLE checks a bundle, edge-moe doctor this machine"),
}

OPTIONS = {  # aliases; a name that a command itself has takes precedence
    "--temperature": "--temp",
    **dict.fromkeys(("-c", "--ctx-size", "--ctx", "--max-kv-size"), "--context"),
    "-t": "--threads",
    **dict.fromkeys(("--n-predict", "--predict", "--max-new-tokens"), "--max-tokens"),
    "--repeat-penalty": "--repetition-penalty",
    **dict.fromkeys(("--system-prompt", "-sys"), "--system"),
    "--overwrite": "--force",
}
FIRST = ("-m", "--model", "--bundle", "--hf-path")  # options for the first argument
SECOND = ("-o", "--out", "--output", "--outfile", "--mlx-path")  # for the second, if the command writes OUT

BITS = "--bits B is the mean of true bits a weight: what others call 4-bit, with a scale for 64 weights, is 4.5"
HINTS = {  # option: (an option that the command must have for the hint to apply, the hint)
    **dict.fromkeys(("-ngl", "--n-gpu-layers", "--gpu-layers"), ("--device", "a GPU computes every layer or none")),
    **dict.fromkeys(("-q", "--quantize", "--q-bits"), ("--bits", BITS)),
    **dict.fromkeys(
        ("--mlock", "--no-mmap", "--mmap"), ("--ram", "only --ram SIZE determines how much memory is used")
    ),
}


def respelled(arguments: list[str], parameters, without_value: dict[str, str], fail) -> list[str]:
    """The arguments of a command with aliases replaced.

    parameters: of the command. without_value: options whose value may be omitted, and its default. fail: called with
    one line for an option in HINTS.
    """
    own = {name: parameter for parameter in parameters for name in parameter.opts if name.startswith("-")}
    writes = any(parameter.name == "out" for parameter in parameters)
    given, places, rest = [], {}, list(arguments)
    while rest and rest[0] != "--":
        argument = rest.pop(0)
        name, glued, value = _split(argument, own)
        name = _own_name(name, own)
        place = 0 if name in FIRST else 1 if name in SECOND and writes else None
        if name not in own and place is not None and (glued or rest):
            places[place] = value if glued else rest.pop(0)
            continue
        if name not in own and name in HINTS and HINTS[name][0] in own:
            fail(f"No such option: {name}; {HINTS[name][1]}")
        given.append(name + ("=" if name.startswith("--") else "") + value if glued else name)
        if name in without_value and name in own and not glued and not "".join(rest[:1]).isdigit():
            given.append(without_value[name])
        elif name in own and not glued and not getattr(own[name], "is_flag", False) and rest:
            given.append(rest.pop(0))  # the option's value, even if it looks like an option
    first, second = ([places[place]] if place in places else [] for place in (0, 1))
    return [*first, *given, *second, *rest]


def _split(argument: str, own: dict) -> tuple[str, bool, str]:
    """Split an argument into the option, whether a value is attached (--name=value, -t4), and that value."""
    if argument.startswith("--"):
        name, equals, value = argument.partition("=")
        return name, bool(equals), value
    if argument[:1] == "-" and argument not in own and argument[:2] in OPTIONS and argument[2:].isdigit():
        return argument[:2], True, argument[2:]
    return argument, False, ""


def _own_name(name: str, own: dict) -> str:
    """The command's own name for an option, or `name` if it has none."""
    if name in own or not name.startswith("-"):
        return name
    dashed = name.replace("_", "-")
    meant = dashed if dashed in own else OPTIONS.get(dashed, dashed)
    return meant if meant in own or meant in HINTS else name
