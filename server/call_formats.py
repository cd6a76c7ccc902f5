"""The forms in which models write calls of tools; which one, its chat template tells."""

import ast
import json
import re
import string
from collections.abc import Callable, Iterable
from functools import partial
from secrets import choice
from typing import Any

from .calls import Body, Call, Forced, Format, Take, Types, Unfinished

NAME = r"[\w.:-]+"
DSML = "｜DSML｜"
SHORT = string.ascii_letters + string.digits  # of the ids that Mistral's templates take: nine of these


def call(name: object, arguments: object, **identity: str) -> Call:
    """Raises ValueError for what is no name, or no object of arguments."""
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError(name)
    return Call(name, json.dumps(arguments, ensure_ascii=False), **identity)


def ends_with(begin: str, end: str, body: Body) -> Take:
    """Reads a body up to its end; a body that goes on there says so."""

    def take(text: str, types: Types) -> tuple[int, list[Call]] | None:
        at = text.find(end, len(begin))
        while at >= 0:
            try:
                return at + len(end), body(text[len(begin) : at], types)
            except Unfinished:
                at = text.find(end, at + len(end))
            except (ValueError, RecursionError, MemoryError):
                return at + len(end), []
        return None

    return take


def json_of(text: str) -> Any:
    """Raises Unfinished where the text ends within a string, as the end of a call may be in one."""
    try:
        return json.loads(text, strict=False)  # models write line breaks in strings
    except json.JSONDecodeError as error:
        if error.msg.startswith("Unterminated string"):
            raise Unfinished from None
        raise


def json_calls(text: str, types: Types) -> list[Call]:
    """{"name": ..., "arguments": {...}}, or a list of such."""
    value = json_of(text)
    found = value if isinstance(value, list) else [value]
    if not found or not all(isinstance(one, dict) for one in found):
        raise ValueError(text)
    return [call(one.get("name"), one.get("arguments", one.get("parameters", {}))) for one in found]


def matched(pattern: str, make: Callable[..., Call], text: str, types: Types) -> list[Call]:
    """A body of a pattern whose groups are the arguments of make(); group `json` is one."""
    found = re.fullmatch(pattern, text, re.DOTALL)
    if found is None:
        raise ValueError(text)
    groups = found.groupdict()
    return [make(**{**groups, "json": json_of(groups["json"])})]


def kimi(name: str, number: str, json: Any) -> Call:
    return call(name, json, identity=f"functions.{name}:{number}")


def plain(name: str, json: Any) -> Call:
    return call(name, json)


def tagged(head: str, opening: str, closing: str, text: str, types: Types) -> list[Call]:
    """A name, by the pattern `head`, and then parameters, each a key, by the pattern `opening`, and a value up to
    `closing`."""
    found = re.match(head, text, re.DOTALL)
    if found is None:
        raise ValueError(text)
    name, at, arguments = found["name"], found.end(), {}
    opened, whole = re.compile(opening), re.compile(rf"{opening}(?P<value>.*?){closing}\s*", re.DOTALL)
    while at < len(text.rstrip()):
        one = whole.match(text, at)
        if one is None:
            raise Unfinished if opened.match(text, at) else ValueError(text)
        is_text = one.groupdict().get("string")
        key, value, at = one["key"], one["value"], one.end()
        if is_text is not None:
            arguments[key] = value if is_text == "true" else json.loads(value)
        else:
            arguments[key] = typed(value, types.get(name, {}).get(key))
    return [call(name, arguments)]


def typed(text: str, schema: object) -> object:
    """A value that is written without its type, as its schema says."""
    wanted = set(types_of(schema))
    if wanted == {"string"} or (wanted == {"string", "null"} and text != "null"):
        return text
    try:
        value = (
            {"True": True, "False": False, "None": None}[text]
            if text in ("True", "False", "None")
            else json.loads(text)
        )
    except (ValueError, RecursionError):
        return text
    fits = not wanted or kind_of(value) in wanted or (kind_of(value) == "integer" and "number" in wanted)
    return value if fits or "string" not in wanted else text


def types_of(schema: object) -> Iterable[str]:
    if not isinstance(schema, dict):
        return
    own = schema.get("type")
    yield from [own] if isinstance(own, str) else own if isinstance(own, list) else ()
    if own is None and isinstance(schema.get("enum"), list):
        yield from {kind_of(one) for one in schema["enum"]}
    for name in ("anyOf", "oneOf"):
        for one in schema.get(name) or ():
            yield from types_of(one)


def kind_of(value: object) -> str:
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "null")


def mistral(text: str, types: Types) -> tuple[int, list[Call]] | None:
    """[TOOL_CALLS]name[ARGS]{...}, or [TOOL_CALLS][{"name": ..., "arguments": ...}]: JSON says where it ends."""
    begin = len("[TOOL_CALLS]")
    head = re.compile(rf"\s*(?P<name>{NAME})(?:\[CALL_ID\][^\[]*)?\[ARGS\]\s*").match(text, begin)
    at = head.end() if head else begin + len(text[begin:]) - len(text[begin:].lstrip())
    try:
        value, end = json.JSONDecoder(strict=False).raw_decode(text, at)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, int | float):  # whose end is not known before what follows; nor is it a call
        return None
    try:
        found = [call(head["name"], value)] if head else json_calls(text[at:end], types)
        return end, [Call(one.name, one.arguments, "".join(choice(SHORT) for _ in range(9))) for one in found]
    except ValueError:
        return end, []


def python_calls(text: str, types: Types) -> list[Call]:
    """[f(a="b"), g(c=1)]"""
    try:
        value = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise (Unfinished if "unterminated" in str(error.msg) else ValueError) from None
    found = value.elts if isinstance(value, ast.List) else [value]
    calls = []
    for one in found:
        if not isinstance(one, ast.Call) or one.args or not all(keyword.arg for keyword in one.keywords):
            raise ValueError(text)
        calls.append(call(ast.unparse(one.func), {word.arg: ast.literal_eval(word.value) for word in one.keywords}))
    if not calls:
        raise ValueError(text)
    return calls


QUOTE = '<|"|>'
GEMMA = re.compile(
    rf"{re.escape(QUOTE)}(?P<text>.*?){re.escape(QUOTE)}|(?P<key>[^\s{{}}\[\],:<]+)(?=\s*:)|(?P<bare>[^\s{{}}\[\],:<][^{{}}\[\],:<]*)",
    re.DOTALL,
)


def gemma(text: str, types: Types) -> list[Call]:
    """name{key:<|"|>a text<|"|>,other:[1,true]}; a text without commas may stand without its quotes."""
    name, brace, _ = text.partition("{")
    if text.count(QUOTE) % 2:
        raise Unfinished
    if not brace:
        raise ValueError(text)

    def quoted(found: re.Match) -> str:
        if found["bare"] is None:
            return json.dumps(found["key"] if found["text"] is None else found["text"])
        try:
            return json.dumps(json.loads(found["bare"]))
        except ValueError:
            return json.dumps(found["bare"])

    return [call(name.strip(), json.loads(GEMMA.sub(quoted, text[len(name) :])))]


def form(name: str, template: tuple[str, ...], begin: str, end: str, body: Body, **more: Any) -> Format:
    section = more.get("section")
    marks = (begin, end, *(section or ()), *more.pop("marks", ()))
    return Format(name, template, begin, ends_with(begin, end, body), marks=marks, **more)


TAG, END_TAG = "<tool_call>", "</tool_call>"
D_BEGIN, D_SEP, D_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
D_SECTION = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
DSML_CALL = partial(
    tagged,
    rf'(?P<name>{NAME})">\s*',
    rf'<{DSML}parameter name="(?P<key>[^"]+)" string="(?P<string>true|false)">',
    f"</{DSML}parameter>",
)
# The first whose words are in a template is its form.
FORMATS = (
    form(
        "harmony", ("<|channel|>", "to=functions"), "<|channel|>commentary to=functions.", "<|call|>",
        partial(matched, rf"(?P<name>{NAME})<\|message\|>(?P<json>.*)", plain),
    ),
    *(
        form(
            name, (DSML, f"{section}>"), f'<{DSML}invoke name="', f"</{DSML}invoke>", DSML_CALL,
            section=(f"<{DSML}{section}>", f"</{DSML}{section}>"), marks=(DSML,),
            forced=Forced(
                f'<{DSML}invoke name="', '">\n', f"</{DSML}invoke>",
                (f'<{DSML}parameter name="', '" string="true">', '" string="false">', f"</{DSML}parameter>\n"),
            ),
        )
        for name, section in (("DeepSeek-V3.2", "function_calls"), ("DeepSeek-V4", "tool_calls"))
    ),
    form(
        "DeepSeek-V3", (D_SEP, "```json"), D_BEGIN, D_END,
        partial(matched, rf"function{D_SEP}(?P<name>{NAME})\n```json\n(?P<json>.*)\n```", plain),
        section=D_SECTION, marks=(D_SEP,), forced=Forced(f"{D_BEGIN}function{D_SEP}", "\n```json\n", f"\n```{D_END}"),
    ),
    form(
        "DeepSeek-V3.1", (D_SEP,), D_BEGIN, D_END, partial(matched, rf"(?P<name>{NAME}){D_SEP}(?P<json>.*)", plain),
        section=D_SECTION, marks=(D_SEP,), forced=Forced(D_BEGIN, D_SEP, D_END),
    ),
    form(
        "Kimi", ("<|tool_call_argument_begin|>",), "<|tool_call_begin|>", "<|tool_call_end|>",
        partial(
            matched,
            r"\s*(?:functions\.)?(?P<name>[\w.-]+):(?P<number>\d+)\s*<\|tool_call_argument_begin\|>(?P<json>.*)",
            kimi,
        ),
        section=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        marks=("<|tool_call_argument_begin|>",), ends_thought=True,
        forced=Forced("<|tool_call_begin|>functions.", ":0<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    ),
    form(
        "MiniMax", ("<minimax:tool_call>",), '<invoke name="', "</invoke>",
        partial(tagged, rf'(?P<name>{NAME})">\s*', r'<parameter name="(?P<key>[^"]+)">', "</parameter>"),
        section=("<minimax:tool_call>", "</minimax:tool_call>"),
        forced=Forced('<invoke name="', '">', "</invoke>", ('<parameter name="', '">', '">', "</parameter>")),
    ),
    Format(
        "Mistral", ("[TOOL_CALLS]",), "[TOOL_CALLS]", mistral, marks=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
        forced=Forced("[TOOL_CALLS]", "[ARGS]", ""),
    ),
    form(
        "GLM", ("<arg_key>",), TAG, END_TAG,
        partial(
            tagged, rf"\s*(?P<name>{NAME})\s*", r"<arg_key>(?P<key>[^<]*)</arg_key>\s*<arg_value>", "</arg_value>"
        ),
        marks=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        forced=Forced(
            TAG, "\n", END_TAG, ("<arg_key>", "</arg_key>\n<arg_value>", "</arg_key>\n<arg_value>", "</arg_value>\n")
        ),
    ),
    form(
        "Qwen3-Coder", ("<function=",), TAG, END_TAG,
        partial(
            tagged,
            rf"\s*<function=(?P<name>{NAME})>\s*(?:</function>\s*)?",
            r"<parameter=(?P<key>[^>]+)>\n?",
            r"\n?</parameter>\s*(?:</function>\s*)?",
        ),
        forced=Forced(
            "<tool_call>\n<function=", ">\n", "</function>\n</tool_call>",
            ("<parameter=", ">\n", ">\n", "\n</parameter>\n"),
        ),
    ),
    form("LFM2", ("<|tool_call_start|>",), "<|tool_call_start|>", "<|tool_call_end|>", python_calls),
    form("Gemma", ("<|tool_call>",), "<|tool_call>call:", "<tool_call|>", gemma, marks=("<|tool_call>", QUOTE)),
    form(
        "Hunyuan", ("<tool_calls>",), "<tool_calls>", "</tool_calls>", json_calls,
        forced=Forced('<tool_calls>[{"name": "', '", "arguments": ', "}]</tool_calls>"),
    ),
    form(
        "Hermes", (), TAG, END_TAG, json_calls,
        forced=Forced('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>"),
    ),
)  # fmt: skip


def format_of(template: str) -> Format:
    """The form of a chat template's calls; Hermes' for one that names none."""
    return next(one for one in FORMATS if all(word in template for word in one.template))
