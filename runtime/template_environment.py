"""The environment in which chat templates are compiled and run: Jinja's sandbox, with limits on memory and work.

A template is an untrusted program. Jinja's sandbox denies it access to files and Python; this module limits memory and
work, by checking before each operation what its result may take. Everything that creates a value passes a check:
operators, calls, filters and tests through the sandbox's own hooks, and loops, comparisons, slices and `~`, which are
rewritten to filters before the template is compiled. The alternative would be a child process with limits of the
system: it takes 20 MB and 0.1 s for every turn, and a Python executable, which an embedding program may lack.
"""

import json
import re
import threading
from collections.abc import Iterator, Mapping, Sized
from datetime import datetime

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace, pass_eval_context
from jinja2.visitor import NodeTransformer

from .template_meter import Meter, TooMuch, listed

MOST_NODES = 10_000  # of a template's syntax tree; the largest in use have 3,000
NODE, MACRO = 7_000, 18_000  # upper bounds of the memory for compiling a node, and in addition for a macro
MOST_ARGUMENTS = 1000  # of a call
# Filters by the size of their result. Those of FREE take no memory, those of LAZY make one item after another.
FREE = frozenset(("abs", "attr", "count", "d", "default", "first", "float", "int", "items", "last", "length", "random"))
LAZY = frozenset(("map", "reject", "rejectattr", "select", "selectattr"))
LISTS = frozenset(("batch", "dictsort", "groupby", "list", "max", "min", "slice", "sort", "sum", "unique"))
PRODUCTS = frozenset(("urlize", "wordwrap", "xmlattr"))  # the length of one text times that of another
DIGITS = re.compile(r"\d+")


class PlainNamespace(Namespace):
    """Jinja's Namespace, without names that begin with an underscore."""

    def __init__(*args, **kwargs):
        self, args = args[0], args[1:]
        for name in (attrs := dict(*args, **kwargs)):
            PlainNamespace._check(name)  # through the class: attributes of the instance belong to the template
        Namespace.__init__(self, attrs)

    def __setitem__(self, name, value):
        PlainNamespace._check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot have the attribute {name!r}, which begins with an underscore")


class _Dict:
    """The object that templates see as `dict`."""

    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)

    def fromkeys(self, *args):
        return dict.fromkeys(*args)


class _Doors(NodeTransformer):
    """Rewrites operations without a hook in the sandbox to filters: loops, comparisons, slices and `~`."""

    def visit_For(self, node: nodes.For):
        self.generic_visit(node)
        node.iter = _through("each", node.iter)
        return node

    def visit_Compare(self, node: nodes.Compare):
        self.generic_visit(node)
        node.expr = _through("flat", node.expr)
        for operand in node.ops:
            operand.expr = _through("flat", operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem):
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _through("copied", node.node)
        return node

    def visit_Call(self, node):
        self.generic_visit(node)
        if node.dyn_args is not None:
            node.dyn_args = _through("few", node.dyn_args)
        return node

    visit_Filter = visit_Test = visit_Call

    def visit_Concat(self, node: nodes.Concat):
        self.generic_visit(node)
        return _through("glued", nodes.List(node.nodes, lineno=node.lineno))

    def visit_ScopedEvalContextModifier(self, node):
        raise TemplateError("autoescape is not supported")

    visit_EvalContextModifier = visit_ScopedEvalContextModifier


def _through(door: str, node):
    if isinstance(node, nodes.Const) or (isinstance(node, nodes.Name) and door == "flat" and node.name == "loop"):
        return node
    return nodes.Filter(node, f"_{door}", [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """{% generation %}, with which templates mark the assistant's text: rendered without change."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    @pass_eval_context
    def _said(self, context, caller):
        return caller()


class Environment(ImmutableSandboxedEnvironment):
    """A sandboxed environment with transformers' settings, in which a meter checks every operation."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, room_bytes: int | None):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            finalize=self._finalized,
            cache_size=0,
        )
        self.lock, self.meter = threading.Lock(), Meter(room_bytes)
        self.variables: set[str] = set()  # names of variables in the template
        self.keys: set[str] = set()  # names of attributes, and texts, among which are the keys of messages
        self.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
        self.globals |= {"dict": _Dict(), "namespace": PlainNamespace}
        del self.globals["lipsum"]
        self.filters = {**self.filters, "tojson": _to_json}
        self.filters = {name: self._guarded(function, name) for name, function in self.filters.items()}
        self.filters |= {"_each": self._each, "_flat": self._flat, "_copied": self._copied}
        self.filters |= {"_glued": self._glued, "_few": self._few}
        self.tests = {name: self._guarded(function, None) for name, function in self.tests.items()}

    def _parse(self, source, name, filename):
        tree = super()._parse(source, name, filename)
        waiting, count, nbytes = [tree], 0, 0
        while waiting:
            node = waiting.pop()
            count += 1
            nbytes += NODE + (MACRO if isinstance(node, nodes.Macro | nodes.CallBlock) else 0)
            if isinstance(node, nodes.Name):
                self.variables.add(node.name)
            elif isinstance(node, nodes.Getattr):
                self.keys.add(node.attr)
            elif isinstance(node, nodes.Const) and isinstance(node.value, str):
                self.keys.add(node.value)
            waiting.extend(node.iter_child_nodes())
            if count > MOST_NODES:
                raise TooMuch(f"it has more than {MOST_NODES:,} parts")
        self.meter.allow(nbytes)
        return _Doors().visit(tree)

    # ---- checks as filters

    def _each(self, value) -> Iterator:
        if isinstance(value, str):
            self.meter.allow(len(value) * (8 if value.isascii() else 80))
        elif isinstance(value, Sized):
            self.meter.allow(8 * len(value))
        return self._counted(value)

    def _counted(self, value) -> Iterator:
        for item in value:
            self.meter.step()
            yield item

    def _flat(self, value):
        return self.meter.flat(value)

    def _copied(self, value):
        if isinstance(value, str):
            self.meter.new_text(len(value), value)
        elif isinstance(value, Sized):
            self.meter.allow(8 * len(value))
        return value

    def _few(self, values):
        """Check values that are unpacked into arguments."""
        if isinstance(values, Sized) and len(values) > MOST_ARGUMENTS:
            raise TooMuch(f"a call has more than {MOST_ARGUMENTS:,} arguments")
        return (
            values
            if isinstance(values, Sized)
            else [value for value, _ in zip(values, range(MOST_ARGUMENTS), strict=False)]
        )

    def _glued(self, parts: list) -> str:
        self.meter.new_text(sum(map(self.meter.text, parts)), *parts)
        return "".join(map(str, parts))

    def _finalized(self, value):
        if not isinstance(value, str):
            self.meter.new_text(self.meter.text(value))
        return value

    def concat(self, pieces) -> str:
        """Join the output of a template, macro or block."""
        kept, length = [], 0
        for piece in pieces:
            self.meter.step()
            kept.append(piece)
            length += len(piece)
        self.meter.new_text(length, *kept)
        return "".join(kept)

    # ---- checks in the sandbox's hooks

    def call_binop(self, context, operator, left, right):
        meter = self.meter
        meter.step()
        sizes = [len(value) if isinstance(value, Sized) else None for value in (left, right)]
        if operator == "+" and None not in sizes:
            if isinstance(left, str):
                meter.new_text(meter.text(left) + meter.text(right), left, right)
            else:
                meter.step(1 + sum(sizes) // 64)
                meter.allow(8 * sum(sizes))
        elif operator == "*" and sizes != [None, None]:
            size = next(size for size in sizes if size is not None)
            times = max(1, meter.number(right if sizes[1] is None else left))
            text = left if isinstance(left, str) else right
            meter.new_text(size * times, text) if isinstance(text, str) else meter.allow(8 * size * times)
        elif operator == "%" and isinstance(left, str):
            self._allow_format(left, left.count("%"), right, "*" in left)
        elif sizes != [None, None]:
            meter.flat(left)
            meter.flat(right)
            meter.allow(100 * sum(size or 0 for size in sizes))
        else:
            meter.bits(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context, __obj, *args, **kwargs):  # noqa: B902 (as jinja's: the template's names are its own)
        meter, owner = __self.meter, getattr(__obj, "__self__", None)
        meter.step()
        values = [*args, *(value for key, value in kwargs.items() if key not in ("_loop_vars", "_block_vars"))]
        numbers = sum(map(meter.number, values))
        if isinstance(__obj, LoopContext) and args:
            args = (__self._each(args[0]), *args[1:])
        elif isinstance(owner, str | bytes):
            args = __self._before_text_method(__obj.__name__, owner, args, kwargs, numbers)
        elif isinstance(owner, Mapping | list | tuple | range):
            if getattr(__obj, "__name__", "") in ("copy", "count", "index"):
                meter.flat(owner)
                meter.flat(list(args))
                meter.allow(8 * len(owner))
        elif isinstance(owner, int | float) or isinstance(__obj, _Dict) or isinstance(owner, _Dict):
            meter.allow(numbers + 100 * sum(len(value) for value in values if isinstance(value, Sized)))
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value):
        inner = super().wrap_str_format(value)
        if inner is None:
            return None

        def formatted(*args, **kwargs):
            form = value.__self__
            nested = re.search(r"[:!][^{}]*\{", form) is not None
            self._allow_format(form, form.count("{"), [list(args), kwargs], nested)
            return inner(*args, **kwargs)

        return formatted

    def _before_text_method(self, name: str, owner, args: tuple, kwargs: dict, numbers: int) -> tuple:
        meter, values = self.meter, [*args, *kwargs.values()]
        texts = [value for value in values if isinstance(value, str | bytes)]
        length = len(owner)
        if name == "replace" and len(texts) == 2:
            self._allow_replace(owner, *texts)
        elif name == "join" and args:
            args = (listed(args[0], meter), *args[1:])
            meter.new_text(sum(meter.text(item) + length for item in args[0]), owner, *args[0])
        elif name in ("split", "rsplit", "splitlines"):
            meter.step(1 + length // 256)
            meter.allow(4 * length + 70 * (1 + meter.count_parts(owner, texts[0] if texts else None, name)))
        elif name == "expandtabs":
            meter.new_text(length + owner.count("\t" if isinstance(owner, str) else b"\t") * (numbers or 8), owner)
        elif name == "translate":
            meter.new_text(length * max(1, meter.text(values)), owner)
        elif name in ("center", "ljust", "rjust", "zfill", "hex"):
            meter.new_text(3 * length + numbers, owner, *texts)
        elif name not in ("format", "format_map", "startswith", "endswith"):
            meter.new_text(3 * length + numbers, owner)
        return args

    def _allow_replace(self, text, old, new) -> None:
        count = text.count(old) if old else len(text) + 1
        self.meter.new_text(len(text) + count * max(0, len(new) - len(old)), text, new)

    def _allow_format(self, form: str, fields_: int, values, widths_from_values: bool) -> None:
        """Check an upper bound of the result of formatting `form` with `fields_` fields, each of which may show all
        values."""
        meter = self.meter
        widths = [int(digits) if len(digits) < 9 else 10**9 for digits in DIGITS.findall(form)]
        size = meter.text(values, quoted=True)
        if widths_from_values:
            widths += [int(digits) if len(digits) < 9 else 10**9 for digits in DIGITS.findall(str(values))]
        width = meter.number(max(widths, default=0))
        meter.new_text(len(form) + fields_ * (width + size))

    # ---- filters and tests

    def _guarded(self, function, name: str | None):
        passed = 1 if hasattr(function, "jinja_pass_arg") else 0

        def guarded(*args, **kwargs):
            given = list(args[passed:])
            self.meter.step()
            if name is None:
                self.meter.flat(given)
            elif name not in FREE | LAZY:
                given = [listed(value, self.meter) for value in given]
                self._before_filter(name, given, kwargs)
            return function(*args[:passed], *given, **kwargs)

        if passed:
            guarded.jinja_pass_arg = function.jinja_pass_arg
        return guarded

    def _before_filter(self, name: str, given: list, kwargs: dict) -> None:
        meter, subject, values = self.meter, given[0] if given else "", [*given[1:], *kwargs.values()]
        numbers = sum(map(meter.number, values))
        texts = [value for value in values if isinstance(value, str)]
        others = sum(map(len, texts))
        if name in LISTS:
            meter.flat(subject)
            size = len(subject) if isinstance(subject, Sized) else 100
            meter.allow(100 * (size + numbers))
            if name == "sum":  # of lists or texts: each addition copies the sum so far
                total = sum(len(item) for item in subject if isinstance(item, Sized)) if size else 0
                meter.step(1 + size * total // 64)
                meter.allow(16 * total)
            return
        if name == "round" and numbers > 1000:
            raise TooMuch(f"it rounds to {numbers:,} digits")
        if name == "join":
            items = subject if isinstance(subject, Sized) else ()
            meter.new_text(sum(meter.text(item) + others for item in items), *texts, *items)
            return
        length = meter.text(subject, quoted=name in ("tojson", "pprint"))
        lines = (subject.count("\n") if isinstance(subject, str) else 0) + 1
        if name == "replace" and isinstance(subject, str) and len(texts) >= 2:
            self._allow_replace(subject, texts[0], texts[1])
        elif name == "format":
            self._allow_format(str(subject), str(subject).count("%"), values, "*" in str(subject))
        elif name == "tojson":
            elements, depth = meter.shape(subject)
            meter.new_text(2 * length + elements * depth * (numbers + others) + 4 * elements)
        elif name in PRODUCTS:
            meter.new_text((length + 10) * (8 + others))
        elif name == "indent":
            meter.new_text(length + lines * (numbers + others + 8), subject)
        else:  # no longer than a few times the input plus a width
            meter.new_text(6 * length + numbers + others, subject)


def _raise(message: str):
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    if len(form) > 1000 or re.search(r"%[^a-zA-Z%]*\d{3}", form):
        raise TooMuch("it asks for too long a date")
    return datetime.now().strftime(form)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
