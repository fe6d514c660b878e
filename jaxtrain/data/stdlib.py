"""Data that every machine has: the Python standard library installed on it.  No download.

One pass over the sources (cached) feeds four sources.  Every docstring falls into a split by the hash of its
first sentence, and that one rule serves all of them: a held-out function is held out of the prose, the
instructions, the pairs and the prompts alike, and its docstring is cut out of the modules that train the code
domain.  The code domain itself holds out whole modules, by the hash of their source.

What the split does not promise: a held-out module contains docstrings that are prose to train on, a held-out
function's name and signature may occur in training code, and a comment may repeat what its docstring says.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import os
import re
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence

from jaxtrain.data.sources import Row, check_split, hash_int, split_of

# A constant, not an option: stages that chose different fractions would train on each other's held-out set.
HELDOUT_FRACTION = 0.08

# Other people's packages, tests and their fixtures (some do not parse), and the encodings' number tables.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "_bundled", "encodings"}
)

_INSTRUCTIONS = (
    "Describe what this does.",
    "What does this Python code do?",
    "Explain this in one sentence.",
    "Write the first line of the docstring.",
)

_MIN_WORDS, _MAX_WORDS = 3, 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Docstring:
    """name: dotted, from the module; title: name with its signature; text: dedented by ``inspect.cleandoc``.

    kind: 'module', 'class' or 'function'; start, end: byte offsets of the literal in the UTF-8 source.
    """

    name: str
    title: str
    text: str
    kind: str
    start: int
    end: int

    @property
    def heading(self) -> str:
        """The title, and below it the words of the name: ``os.path.isfile(path)``, ``os path isfile``.

        A tokenizer spells ``get_content`` and ``the content`` with different ids; a model of a few million
        parameters finds the one in the other only where they are the same.
        """
        words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+", self.name)
        return f"{self.title}\n{' '.join(dict.fromkeys(word.lower() for word in words))}"

    @property
    def summary(self) -> str:
        return first_sentence(self.text)

    @property
    def split(self) -> str:
        return split_of(self.summary, HELDOUT_FRACTION)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Module:
    """A module's dotted name, its source and its docstrings in order of appearance."""

    name: str
    source: str
    docstrings: tuple[Docstring, ...]


def first_sentence(text: str) -> str:
    """The first sentence of the first paragraph of ``text``, on one line."""
    paragraph = " ".join(re.split(r"\n\s*\n", text.strip(), maxsplit=1)[0].split())
    for match in re.finditer(r"[.!?](?=\s+\S)", paragraph):
        sentence = paragraph[: match.end()]
        following = paragraph[match.end() :].lstrip()[0]
        if not following.islower() and not re.search(r"\b(e\.g|i\.e|etc|vs|cf)\.$", sentence):
            return sentence
    return paragraph


def _docstrings(module: str, source: str) -> tuple[Docstring, ...]:
    encoded = source.encode()
    starts = [0]
    for line in encoded.split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    found = []

    def visit(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                continue  # no definitions inside expressions
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                add(child, f"{name}.{child.name}")
            else:
                visit(child, name)

    def add(node, name: str) -> None:
        first = node.body[0] if node.body else None
        literal = first.value if isinstance(first, ast.Expr) else None
        if isinstance(literal, ast.Constant) and isinstance(literal.value, str):
            kind, title = "module", name
            if isinstance(node, ast.ClassDef):
                bases = ", ".join(map(ast.unparse, node.bases))
                kind, title = "class", f"class {name}({bases})" if bases else f"class {name}"
            elif not isinstance(node, ast.Module):
                kind, title = "function", f"{name}({ast.unparse(node.args)})"
            found.append(
                Docstring(
                    name=name,
                    title=title,
                    text=inspect.cleandoc(literal.value).strip(),
                    kind=kind,
                    start=starts[literal.lineno - 1] + literal.col_offset,
                    end=starts[literal.end_lineno - 1] + literal.end_col_offset,
                )
            )
        visit(node, name)

    add(ast.parse(source), module)
    return tuple(found)


@functools.cache
def modules() -> tuple[Module, ...]:
    """Every module of the standard library that comes as source, in order of its path.

    Raises ValueError when there is none (a Python that ships only byte code).
    """
    root = sysconfig.get_paths()["stdlib"]
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(
            name for name in subfolders if name not in _SKIPPED_FOLDERS and not name.startswith("config-")
        )
        for file in sorted(files):
            # _sysconfigdata is this machine's build settings; topics are read as prose, by `topics`.
            if not file.endswith(".py") or file.startswith("_sysconfigdata") or file == "topics.py":
                continue
            path = os.path.join(folder, file)
            with tokenize.open(path) as stream:  # honours the file's coding line
                source = stream.read()
            parts = os.path.relpath(path, root)[: -len(".py")].split(os.sep)
            name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
            if source.strip():
                found.append(Module(name=name, source=source, docstrings=_docstrings(name, source)))
    if not found:
        raise ValueError(
            f"the Python standard library in {root} has no .py files; "
            f"install Python with its sources, or use TextFiles on text of your own"
        )
    return tuple(found)


@functools.cache
def topics() -> tuple[str, ...]:
    """The language reference's pages behind ``help()``, by topic; empty where Python ships without them."""
    path = os.path.join(sysconfig.get_paths()["stdlib"], "pydoc_data", "topics.py")
    if not os.path.exists(path):
        return ()
    with tokenize.open(path) as stream:
        tree = ast.parse(stream.read())
    values = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    tables = [ast.literal_eval(value) for value in values if isinstance(value, ast.Dict)]
    pages = tables[0] if tables else {}
    return tuple(text.strip() for _, text in sorted(pages.items()))


def without_heldout(module: Module) -> str:
    """The module's source with every held-out docstring replaced by ``...``."""
    encoded = module.source.encode()
    for docstring in reversed(module.docstrings):
        if docstring.split == "heldout":
            encoded = encoded[: docstring.start] + b"..." + encoded[docstring.end :]
    return encoded.decode()


@dataclasses.dataclass(frozen=True, kw_only=True)
class StdlibText:
    """Text of the standard library.

    domain: 'prose' is docstrings, each under its qualified name, signature and words of the name, and the pages of
        ``pydoc_data``; 'code' is the sources of the modules.
    """

    domain: str

    def __post_init__(self):
        if self.domain not in ("prose", "code"):
            raise ValueError(f"StdlibText.domain is {self.domain!r}; it must be 'prose' or 'code'")

    def documents(self, split: str) -> Iterator[str]:
        check_split(split)
        return self._prose(split) if self.domain == "prose" else self._code(split)

    def _prose(self, split: str) -> Iterator[str]:
        seen = set()
        for module in modules():
            for docstring in module.docstrings:
                # The same text again is an override that inherits its description: one copy is enough.
                if docstring.text not in seen and docstring.split == split and docstring.text:
                    seen.add(docstring.text)
                    yield f"{docstring.heading}\n\n{docstring.text}"
        for page in topics():
            if split_of(page, HELDOUT_FRACTION) == split:
                yield page

    def _code(self, split: str) -> Iterator[str]:
        for module in modules():
            if split_of(module.source, HELDOUT_FRACTION) == split:
                yield without_heldout(module) if split == "train" else module.source


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Description:
    prompt: str
    completion: str
    package: str
    split: str


@functools.cache
def _descriptions() -> tuple[_Description, ...]:
    """Classes and functions with their first sentence; each prompt and each sentence occurs once."""
    found, prompts, sentences = [], set(), set()
    for module in modules():
        for docstring in module.docstrings:
            sentence = docstring.summary
            if docstring.kind == "module" or not _MIN_WORDS <= len(sentence.split()) <= _MAX_WORDS:
                continue
            instruction = _INSTRUCTIONS[hash_int(docstring.title) % len(_INSTRUCTIONS)]
            prompt = f"{instruction}\n{docstring.heading}"
            if prompt in prompts or sentence in sentences:
                continue
            prompts.add(prompt)
            sentences.add(sentence)
            package = module.name.split(".")[0]
            found.append(_Description(prompt=prompt, completion=sentence, package=package, split=docstring.split))
    return tuple(found)


def _select(row: Row, columns: Sequence[str]) -> Row:
    missing = [name for name in columns if name not in row]
    if missing:
        raise ValueError(f"this source has no column {missing[0]!r}; it has {', '.join(map(repr, row))}")
    return row


@dataclasses.dataclass(frozen=True, kw_only=True)
class StdlibInstructions:
    """Instruction, input, output: prompt = one of a few instructions, below it name and signature of a
    class or function and the words of its name; completion = the first sentence of its docstring.
    """

    def rows(self, split: str, columns: Sequence[str] = ()) -> Iterator[Row]:
        check_split(split)
        for entry in _descriptions():
            if entry.split == split:
                yield _select({"prompt": entry.prompt, "completion": entry.completion}, columns)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StdlibPrompts(StdlibInstructions):
    """The prompts of StdlibInstructions, for RL; ``completion`` is the reference answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StdlibPairs:
    """Preferences: chosen = the right first sentence; rejected = one from another top-level package.

    negatives: how many rejected sentences a training prompt is paired with, each a row; held-out prompts have
        one.  They come from the same split, so a sentence is wrong as often as it is right, on average, and a
        scorer that does not read the prompt cannot win.
    """

    negatives: int = 4

    def __post_init__(self):
        if self.negatives < 1:
            raise ValueError(f"StdlibPairs.negatives is {self.negatives}; it must be at least 1")

    def rows(self, split: str, columns: Sequence[str] = ()) -> Iterator[Row]:
        check_split(split)
        entries = [entry for entry in _descriptions() if entry.split == split]
        for entry in entries:
            for rejected in self._rejected(entry, entries, self.negatives if split == "train" else 1):
                row = {"prompt": entry.prompt, "chosen": entry.completion, "rejected": rejected}
                yield _select(row, columns)

    @staticmethod
    def _rejected(entry: _Description, entries: list[_Description], count: int) -> list[str]:
        """``count`` different sentences of other packages (fewer if there are not so many)."""
        found: list[str] = []
        for attempt in range(50 * count):
            other = entries[hash_int(entry.prompt, str(attempt)) % len(entries)]
            if other.package != entry.package and other.completion not in found:
                found.append(other.completion)
                if len(found) == count:
                    break
        return found
