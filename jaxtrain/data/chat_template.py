"""Chat templates: Jinja written by strangers, rendered in a sandbox that also bounds time and memory.

The settings are those of ``transformers``' ``apply_chat_template``, so a template gives the same text.
"""

from __future__ import annotations

import contextvars
import datetime
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame

MAX_SOURCE = 1 << 20  # characters of a template
MAX_VALUE = 1 << 24  # characters, or entries, of one value
MAX_WORK = 1 << 27  # characters made, in all, with what operations and loop rounds count as
MAX_SECONDS = 10.0
# What an operation, a loop round, or an entry of a list counts as.
_COST = 32
# A width, a count: what a string method or filter may be asked for.
_MAX_NUMBER = 10_000
_MAX_BITS = 4096  # of a computed integer

Messages = Sequence[Mapping[str, Any]]


class _Budget:
    """What is left for one rendering."""

    def __init__(self, source_size: int):
        self.source_size = source_size
        self.work = MAX_WORK
        self.deadline = time.monotonic() + MAX_SECONDS

    def spend(self, amount: int) -> None:
        self.work -= amount + _COST
        if self.work < 0:
            raise jinja2.sandbox.SecurityError(
                f"it does too much (more than {MAX_WORK:,} characters, or {MAX_WORK // _COST:,} operations)"
            )
        if time.monotonic() > self.deadline:
            raise jinja2.sandbox.SecurityError(f"it takes more than {MAX_SECONDS:.0f} seconds")

    def made(self, value: Any) -> Any:
        """``value``, after paying for its size."""
        self.spend(_size(value, MAX_VALUE))
        return value


_BUDGET: contextvars.ContextVar[_Budget] = contextvars.ContextVar("budget of the template that is being rendered")


def _size(value: Any, limit: int) -> int:
    """Characters and entries in ``value``, at any depth.  SecurityError beyond ``limit``."""
    size, rest = 0, [value]
    while rest:
        item = rest.pop()
        if isinstance(item, str | bytes):
            size += len(item)
        elif isinstance(item, Mapping):
            size += _COST * len(item)
            rest += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            size += _COST * len(item)
            rest += item
        if size > limit:
            raise jinja2.sandbox.SecurityError(f"it makes a value of more than {limit:,} characters")
    return size


def _check_numbers(what: str, values: Sequence[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > _MAX_NUMBER:
            raise jinja2.sandbox.SecurityError(f"it asks {what} for {value:.3g}, more than {_MAX_NUMBER:,}")


def _check_format(text: Any) -> None:
    """Refuses a field width that asks for a huge text, or that comes from the values."""
    if isinstance(text, str) and re.search(r"\d{5}|%[-+ #0]*\*|%[^a-zA-Z%]*\.\*|\{[^{}]*:[^{}]*\{", text):
        raise jinja2.sandbox.SecurityError(f"its format {text[:60]!r} has a width that could be huge")


def _bounded_filter(name: str, function: Callable) -> Callable:
    """The filter, refused where its arguments ask for a huge result, and its result paid for."""
    wants = getattr(function, "jinja_pass_arg", None)  # Jinja hands it the context, or the environment, first
    lead = 0 if wants is None else 1

    def apply(*args: Any, **kwargs: Any) -> Any:
        budget = _BUDGET.get()
        first, (value, *rest) = args[:lead], args[lead:]
        _check_numbers(name, [*rest, *kwargs.values()])
        if name == "format":
            _check_format(value)
        elif name == "replace":
            _check_replace(str(value), str(rest[0]), str(rest[1]))
        elif name == "join":
            value = list(value)
            joint = rest[0] if rest else kwargs.get("d", "")
            budget.spend(len(value) * len(str(joint)) + _size(value, MAX_VALUE))
        elif name == "indent":
            width = rest[0] if rest else kwargs.get("width", 4)
            budget.spend(str(value).count("\n") * (len(width) if isinstance(width, str) else width))
        # Lazy results (map, select) are paid for by the loop or filter that reads them.
        return budget.made(function(*first, value, *rest, **kwargs))

    if wants is not None:
        apply.jinja_pass_arg = wants  # type: ignore[attr-defined]
    return apply


def _check_replace(text: str, old: str, new: str) -> None:
    _BUDGET.get().spend(text.count(old) * len(new))


class _Generator(CodeGenerator):
    """Compiles ``a ~ b`` to a call, since a sandbox is not asked about it."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat_bounded((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what an assistant wrote; it changes nothing in the text."""

    tags = {"generation"}  # noqa: RUF012  (the base class declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """``namespace()`` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.sandbox.SecurityError(f"it stores {name!r}, a name that begins with an underscore")


def _rounds(value: Any, body: int) -> list[Any]:
    """What a loop runs over, paid for: its rounds, each with the text in its body."""
    items = []
    for item in value:
        _BUDGET.get().spend(body)
        items.append(item)
    return items


@jinja2.pass_context
def _shown(context: jinja2.runtime.Context, value: Any) -> Any:
    _BUDGET.get().made(value)
    return value


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            finalize=_shown,
            optimized=False,  # it would compute constants while it compiles, with no budget
            cache_size=0,
        )
        for name in ("urlize", "xmlattr", "pprint"):
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters["tojson"] = _to_json
        self.filters = {name: _bounded_filter(name, function) for name, function in self.filters.items()}
        self.filters["rounds of a loop"] = _rounds
        self.filters["size of a literal"] = lambda value: _BUDGET.get().made(value)
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda form: datetime.datetime.now().strftime(form),
            "namespace": _Namespace,
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            body = sum(len(text.data) for text in loop.find_all(nodes.TemplateData))
            loop.iter = nodes.Filter(loop.iter, "rounds of a loop", [nodes.Const(body)], [], None, None)
        return _Literals().visit(tree)

    def concat_bounded(self, parts: Sequence[Any]) -> str:
        budget = _BUDGET.get()
        budget.spend(sum(_size(part, MAX_VALUE) for part in parts))
        return budget.made("".join([str(part) for part in parts]))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for one, many in ((left, right), (right, left)):
                if isinstance(one, str | bytes | list | tuple) and isinstance(many, int):
                    _BUDGET.get().spend(_size(one, MAX_VALUE) * max(many, 0))
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > _MAX_BITS:
                raise jinja2.sandbox.SecurityError("it computes a huge number")
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > _MAX_BITS:
                raise jinja2.sandbox.SecurityError("it computes a huge number")
        elif operator == "%":
            _check_format(left)
        return _BUDGET.get().made(super().call_binop(context, operator, left, right))

    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _BUDGET.get()
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(__obj, jinja2.runtime.Macro):
            budget.spend(budget.source_size + 8 * _COST)  # at most what its body holds; and it is slow
        elif isinstance(owner, str):
            _check_numbers(f"str.{name}", args)
            if name in ("format", "format_map"):
                _check_format(owner)
            elif name == "replace" and len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], str):
                _check_replace(owner, args[0], args[1])
            elif name == "translate":
                raise jinja2.sandbox.SecurityError("it calls str.translate")
            elif name == "expandtabs":
                budget.spend(owner.count("\t") * max([8, *(a for a in args if isinstance(a, int))]))
            elif name == "join" and args:
                items = list(args[0])
                budget.spend(_size(items, MAX_VALUE) + len(items) * len(owner))
                args = (items,)
        elif isinstance(owner, int):
            _check_numbers(f"int.{name}", args)
        return budget.made(super().call(__context, __obj, *args, **kwargs))


class _Literals(jinja2.visitor.NodeTransformer):
    """Pays for list and dictionary literals, so that nothing nests into an exponential size unseen."""

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return nodes.Filter(self.generic_visit(node), "size of a literal", [], [], None, None)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        node = self.generic_visit(node)
        if node.ctx != "load":  # the names of an assignment
            return node
        return nodes.Filter(node, "size of a literal", [], [], None, None)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    _check_numbers("tojson", [indent])
    _BUDGET.get().spend(_size(value, MAX_VALUE))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


# What a template's own mistakes raise, in Jinja or in Python's operations on the values.
_ERRORS = (
    *(jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError),
    *(RuntimeError, MemoryError, AssertionError, SyntaxError),
)


class ChatTemplate:
    """A compiled template.  variables: strings that it may use (``bos_token``, ``eos_token``)."""

    def __init__(self, source: str, variables: Mapping[str, str] | None = None):
        """Raises ValueError for a template that does not compile."""
        if len(source) > MAX_SOURCE:
            raise ValueError(f"the chat template has {len(source):,} characters; at most {MAX_SOURCE:,} are accepted")
        self.source = source
        self._variables = dict(variables or {})
        self._budget = lambda: _Budget(len(source))
        try:
            self._template = _Environment().from_string(source)
        except _ERRORS as error:
            raise ValueError(f"the chat template is not valid Jinja: {_tell(error)}") from None

    def render(self, messages: Messages, *, add_generation_prompt: bool = False, **variables: Any) -> str:
        """The text of ``messages``, each with ``role`` and ``content``.

        Raises ValueError for what the template refuses, and for a template that fails, reaches out of its sandbox, or
        wants too much time or memory.
        """
        plain = json.loads(json.dumps([dict(message) for message in messages]))
        values = {"tools": None, "documents": None, **self._variables, **variables}
        token = _BUDGET.set(self._budget())
        try:
            return "".join(self._pieces({**values, "messages": plain, "add_generation_prompt": add_generation_prompt}))
        except _ERRORS as error:
            raise ValueError(f"the chat template failed: {_tell(error)}") from None
        finally:
            _BUDGET.reset(token)

    def _pieces(self, values: Mapping[str, Any]) -> Iterator[str]:
        size = 0
        for piece in self._template.generate(values):
            size += len(piece)
            if size > MAX_VALUE:
                raise jinja2.sandbox.SecurityError(f"it writes more than {MAX_VALUE:,} characters")
            yield piece


def _tell(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if not isinstance(error, jinja2.TemplateError) else str(error)
