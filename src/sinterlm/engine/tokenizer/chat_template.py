"""Chat templates: code from a checkpoint, run in jinja2's immutable sandbox and under limits.

No attribute leads out of the sandbox and nothing can be mutated. Source size, executed lines, CPU
time and the size of every value are bounded; what is not is the time that one single built-in
operation takes on values within those sizes.
"""

from __future__ import annotations

import datetime
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from types import FrameType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.sandbox
from jinja2.compiler import CodeGenerator, Frame

from sinterlm.errors import UsageError

MAX_SOURCE_CHARS = 1 << 20
MAX_EVENTS = 2_000_000  #: Python lines and calls of one rendering
MAX_SECONDS = 5.0  #: CPU time of one rendering
MAX_SIZE = 4 << 20  #: characters of a string, elements of a value with all that it nests
MAX_INT_BITS = 4096

#: String and integer methods that allocate by a number, or lead to types that have such methods.
_DENIED_METHODS = {
    "center", "ljust", "rjust", "zfill", "expandtabs", "translate", "maketrans", "encode",
    "to_bytes",
}  # fmt: skip
_FORMAT_SPEC = re.compile(r"\{[^{}]*:")  # "{:>9999}"; plain "{}" and "{name}" are harmless
_PERCENT_WIDTH = re.compile(r"%(\([^)]*\))?[-+ #0]*[\d*.]")


class ChatTemplate:
    """One compiled template. Raises UsageError when the source is too long or no valid jinja."""

    def __init__(self, source: str) -> None:
        if not isinstance(source, str):
            raise UsageError(f"chat_template must be a text, not {type(source).__name__}")
        if len(source) > MAX_SOURCE_CHARS:
            raise UsageError(
                f"the chat template has {len(source)} characters, more than {MAX_SOURCE_CHARS}"
            )
        try:
            self._template = _Sandbox().from_string(source)
        except (jinja2.TemplateError, _Refused, RecursionError, SyntaxError, ValueError) as exc:
            raise UsageError(f"the chat template does not compile: {exc}") from exc

    def render(self, variables: Mapping[str, Any]) -> str:
        """The prompt text. Raises UsageError with the template's own message, or the limit."""
        # A loop in a template can only be stopped from inside its own thread: by its trace.
        previous = sys.gettrace()
        sys.settrace(_work_limit())
        try:
            return self._template.render(variables)
        except Exception as exc:  # a template may fail in any way Python code can
            raise UsageError(f"the chat template refused these messages: {exc}") from exc
        finally:
            sys.settrace(previous)


class _Refused(Exception):
    """A template broke a limit or called raise_exception; its text goes to the user."""


def _work_limit() -> Callable[[FrameType, str, Any], Any]:
    """A trace function that raises once the thread has done too much."""
    left = MAX_EVENTS
    deadline = time.thread_time() + MAX_SECONDS

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or (left % 256 == 0 and time.thread_time() > deadline):
            raise _Refused("it runs too long")
        return trace

    return trace


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}`` marks assistant text for training; renders as is."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # jinja2 only ever reads it

    def parse(self, parser: Any) -> Any:
        """Replace the tag by its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _BoundedGenerator(CodeGenerator):
    """Compiles ``a ~ b`` into a call that checks the size of the result."""

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: Frame) -> None:  # noqa: N802
        """Write the call."""
        self.write("environment.concat((")
        for operand in node.nodes:
            self.write("str(environment.finalize(")
            self.visit(operand, frame)
            self.write(")), ")
        self.write("))")


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Hugging Face's conventions for chat templates, with every way to grow a value bounded."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    code_generator_class = _BoundedGenerator

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
            finalize=_bounded,
        )
        for name in ("center", "wordwrap"):
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters = {name: _bounded_call(f) for name, f in self.filters.items()}
        self.filters |= {
            "tojson": _to_json, "join": _join, "replace": _replace, "indent": _indent,
            "format": _percent_format,
        }  # fmt: skip
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Join output; every template, block, macro and ``~`` passes through here."""
        return "".join(_bounded_parts(parts))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """As the sandbox decides, less what could allocate without bound."""
        if attr in _DENIED_METHODS and isinstance(obj, str | bytes | int):
            return False
        if attr in ("format", "format_map") and _FORMAT_SPEC.search(str(obj)):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        """The sandbox's safe ``str.format``, only where ``is_safe_attribute`` agrees."""
        if _FORMAT_SPEC.search(str(getattr(value, "__self__", ""))):
            return None
        return super().wrap_str_format(value)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """As the sandbox does, with sizes checked before and after."""
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str) and name == "replace":
            return _replace(owner, *args, **kwargs)
        if isinstance(owner, str) and name == "join":
            return _join(self, args[0], owner)
        for arg in (*args, *kwargs.values()):
            _bounded(arg)
        return _bounded(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Check what ``+ * ** %`` would make before it is made."""
        _check_binop(operator, left, right)
        return _bounded(super().call_binop(context, operator, left, right))


# -- bounds --------------------------------------------------------------------------------------


def _bounded(value: Any) -> Any:
    """Return ``value``; raise when it, with all that it nests, is larger than allowed."""
    if isinstance(value, str):
        _check_size(len(value))
    elif isinstance(value, list | tuple | dict):
        total = 0
        stack: list[Any] = [value]
        while stack:  # a shared element counts once per mention, as printing it would
            item = stack.pop()
            if isinstance(item, dict):
                stack.extend(item.values())
            elif isinstance(item, list | tuple):
                stack.extend(item)
            total += 1 + (len(item) if isinstance(item, str) else 0)
            _check_size(total + len(stack))
    return value


def _check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise _Refused(f"it makes a value of more than {MAX_SIZE} characters or elements")


def _bounded_parts(parts: Iterable[str]) -> Iterable[str]:
    total = 0
    for part in parts:
        total += len(part)
        _check_size(total)
        yield part


def _check_binop(operator: str, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits = {
            "**": left.bit_length() * max(0, right),
            "*": left.bit_length() + right.bit_length(),
        }
        if bits.get(operator, 0) > MAX_INT_BITS:
            raise _Refused(f"{operator} makes an integer of more than {MAX_INT_BITS} bits")
    elif operator == "*":
        for items, count in ((left, right), (right, left)):
            if isinstance(items, str | list | tuple) and isinstance(count, int):
                _check_size(len(items) * max(0, count))
    elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, type(left)):
        _check_size(len(left) + len(right))
    elif operator == "%" and isinstance(left, str):
        _check_percent_format(left)


def _check_percent_format(form: str) -> None:
    if _PERCENT_WIDTH.search(form):
        raise _Refused("%-formatting with a width or precision is not available")


def _bounded_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter with its arguments and its result checked."""

    @wraps(function)  # keeps jinja2's mark of which context the filter wants
    def checked(*args: Any, **kwargs: Any) -> Any:
        for arg in (*args, *kwargs.values()):
            _bounded(arg)
        return _bounded(function(*args, **kwargs))

    return checked


# -- functions of the template language ----------------------------------------------------------


@jinja2.pass_environment
def _join(environment: Any, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    items = value if attribute is None else (environment.getitem(v, attribute) for v in value)

    def separated() -> Iterable[str]:
        for i, item in enumerate(items):
            if i:
                yield str(d)
            yield str(_bounded(item))

    return "".join(_bounded_parts(separated()))


def _replace(text: str, old: str, new: str, count: int | None = None) -> str:
    text, old, new = str(_bounded(text)), str(_bounded(old)), str(_bounded(new))
    _check_size(len(text) + text.count(old) * max(0, len(new) - len(old)))
    return text.replace(old, new, -1 if count is None else count)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    lines = str(_bounded(text)).count("\n") + 2
    _check_size(lines * (len(width) if isinstance(width, str) else max(0, width)))
    return str(_bounded(jinja2.filters.do_indent(text, width, first, blank)))


def _percent_format(form: str, *args: Any, **kwargs: Any) -> str:
    _check_percent_format(str(form))
    for arg in (*args, *kwargs.values()):
        _bounded(arg)
    return str(_bounded(str(form) % (kwargs or args)))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Hugging Face's tojson: plain JSON, where jinja2's own escapes it for HTML.
    if indent is not None and not 0 <= int(indent) <= 16:
        raise _Refused(f"tojson(indent={str(indent)[:20]}) must be between 0 and 16")
    text = json.dumps(
        _bounded(value),
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
    return str(_bounded(text))


def _raise_exception(message: str) -> None:
    raise _Refused(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
