"""gin at the edge: turns gin files into one tree of frozen dataclasses, strictly.  The only gin import.

gin's own parser reads gin's own grammar; what the statements mean is decided here, because gin accepts in
silence what a run must not: wrong types, unused bindings, dead macros, includes of any file, imports that run
code.

The rules are gin's.  A binding ``a/Name.field`` holds wherever a ``Name`` is built while the scopes begin
with ``a``; a longer scope wins over a shorter one, a later binding over an earlier one.  ``@b/Name()``
builds under scope ``b`` instead of the current one, ``@Name()`` keeps the current one; ``%macro`` evaluates
its value under the scope ``macro``.  Nothing is registered with gin, so one load leaves nothing behind for
the next.
"""

from __future__ import annotations

import dataclasses
import importlib.util  # noqa: F401  gin 0.5.0 uses importlib.util without importing it
import tokenize
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gin import config_parser

from jaxtrain import config_build, config_text


class Loaded(typing.NamedTuple):
    """config: the root dataclass.  text: gin that builds an equal one, every default written out."""

    config: Any
    text: str


class _Delegate(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name, evaluate):
        scope, _, name = scoped_configurable_name.rpartition("/")
        return config_build.Reference(scope, name, evaluate)

    def macro(self, macro_name):
        return config_build.Macro(macro_name)


def config_roots() -> tuple[Path, ...]:
    """The folders of shipped gin files: inside an installed package, or beside it in a source checkout."""
    package = Path(__file__).resolve().parent
    roots = [package / "configs"]
    if (package.parent / "pyproject.toml").is_file():
        roots.append(package.parent / "configs")
    return tuple(root for root in roots if root.is_dir())


def load(
    root: type,
    configurables: Iterable[type],
    files: Sequence[str | Path] = (),
    bindings: Sequence[str] = (),
    roots: Sequence[Path] | None = None,
) -> Loaded:
    """Builds ``root`` from gin files, then from bindings such as ``'pretrain/Stage.steps = 10'``, which win.

    Args:
        root: the dataclass to build, under no scope.
        configurables: the frozen dataclasses that gin files may name; ``root`` is one of them anyhow.
        files: gin files; one that is not there as given is looked for in ``roots``.
        bindings: single statements, ``Name.field = value`` or ``macro = value``.
        roots: where shipped gin files lie; ``config_roots()`` by default.  A file may include files from here
            and from its own folder, and from nowhere else.

    Raises:
        ValueError: anything wrong in the files or bindings, naming the culprit and the file and line.
    """
    classes = {cls.__name__: cls for cls in (root, *configurables)}
    for cls in (root, *configurables):
        assert classes[cls.__name__] is cls, f"two configurables are called {cls.__name__}"
        assert dataclasses.is_dataclass(cls), f"{cls} is no dataclass"
        assert cls.__dataclass_params__.frozen, f"{cls} is not frozen"
    reader = _Reader(tuple(classes), config_roots() if roots is None else tuple(Path(r) for r in roots))
    for file in files:
        reader.read_file(reader.find(str(file), folder=Path(), included_by=""), chain=())
    for text in bindings:
        reader.read_binding(text)
    builder = config_build.Builder(classes, reader.bindings)
    config = builder.build("", root.__name__, "the root of the configuration")
    builder.refuse_unused()
    names = {id(value): name for name, value in builder.built.items()}
    return Loaded(config, config_text.write(config, names))


class _Reader:
    """Collects the bindings of gin files in order.  A later one of the same key replaces an earlier one."""

    def __init__(self, class_names: tuple[str, ...], roots: tuple[Path, ...]):
        self.class_names, self.roots = class_names, roots
        self.bindings: dict[config_build.Key, config_build.Binding] = {}

    def find(self, name: str, folder: Path, included_by: str) -> Path:
        tried = [folder / name, *(root / name for root in self.roots)]
        for candidate in dict.fromkeys(path.resolve() for path in tried):
            if candidate.is_file():
                allowed = [folder.resolve(), *(root.resolve() for root in self.roots)]
                if included_by and not any(candidate.is_relative_to(place) for place in allowed):
                    folders = ", ".join(map(str, allowed))
                    raise ValueError(
                        f"{included_by}: include {name!r} leads to {candidate}, outside the folders "
                        f"that may be included from ({folders}); move the file into one of them"
                    )
                return candidate
        places = ", ".join(dict.fromkeys(str(path) for path in tried))
        raise ValueError(f"{included_by + ': ' if included_by else ''}no gin file {name!r}; looked for {places}")

    def read_file(self, path: Path, chain: tuple[Path, ...]) -> None:
        if path in chain:
            raise ValueError("include cycle: " + " -> ".join(map(str, (*chain, path))))
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not valid UTF-8 at byte {error.start} ({error.reason})") from error
        for statement in self.parse(text, str(path)):
            where = f"{path}:{statement.location.line_num}"
            if isinstance(statement, config_parser.IncludeStatement):
                included = self.find(statement.filename, folder=path.parent, included_by=where)
                self.read_file(included, (*chain, path))
            else:
                self.bind(statement, where)

    def read_binding(self, text: str) -> None:
        where = f"--gin {text!r}"
        statements = list(self.parse(text, where))
        if len(statements) != 1 or not isinstance(statements[0], config_parser.BindingStatement):
            raise ValueError(f"{where}: expected one 'Name.field = value' or 'macro = value'")
        self.bind(statements[0], where)

    def parse(self, text: str, origin: str) -> Iterable[Any]:
        # tokenize wants a last newline to close a block.
        try:
            yield from config_parser.ConfigParser(text + "\n", _Delegate())
        except SyntaxError as error:
            place = f"{origin}:{error.lineno}" if error.lineno and not origin.startswith("--gin") else origin
            line = f" in {error.text.strip()!r}" if error.text and error.text.strip() else ""
            message = error.msg.strip()
            if "Failed to parse token" in message:  # gin prints the address of a syntax tree before it
                token = message.rpartition("Failed to parse token ")[2]
                message = f"{token} is no value (strings need quotes)"
            raise ValueError(f"{place}: not gin: {message}{line}") from error
        except tokenize.TokenError as error:
            raise ValueError(f"{origin}: not gin: {error.args[0]} at line {error.args[1][0]}") from error

    def bind(self, statement: Any, where: str) -> None:
        if isinstance(statement, config_parser.ImportStatement):
            raise ValueError(f"{where}: {statement.format()!r}: a configuration cannot import Python modules")
        macro = isinstance(statement, config_parser.BindingStatement) and not statement.arg_name
        if not macro and statement.selector not in self.class_names:
            nearest = config_build.nearest(statement.selector, self.class_names)
            raise ValueError(f"{where}: unknown name {statement.selector!r}{nearest}")
        if isinstance(statement, config_parser.BindingStatement):
            key = (statement.scope, statement.selector, statement.arg_name)
            self.bindings[key] = config_build.Binding(statement.value, where)
