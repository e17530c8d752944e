"""The rules of the house that no linter knows."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from lines_of_code import LIMIT, lines_below, lines_of_code
from mmgraft.grafts.registry import built_in

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "mmgraft").rglob("*.py"))
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
EVERY_SOURCE = [*SOURCES, *EXAMPLES]

FILES, LINES, FUNCTION = 15, 700, 50
"""Largest number of files in a folder, of lines in a file, and of lines in a function."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


every_source = pytest.mark.parametrize("path", EVERY_SOURCE, ids=name_of)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


# Imports

MODEL = "mmgraft.model.modeling"
ONE_CIRCLE = {f"mmgraft.model.files.{name}" for name in ("create", "load", "save")}
"""``GraftedModel.graft``, ``from_pretrained`` and ``save_pretrained`` import what makes, reads and
writes one."""


def imports(modules: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Modules that each module imports, at its top or when a function is called.

    What stands under ``if TYPE_CHECKING`` is not imported.
    """
    found: dict[str, set[str]] = {}
    for name, module in modules.items():
        nodes: list[ast.AST] = [module]
        found[name] = set()
        while nodes:
            node = nodes.pop()
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
            nodes += ast.iter_child_nodes(node)
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names} & modules.keys()
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names} & modules.keys()
                found[name] |= inner or ({node.module} & modules.keys())
    return found


def circles(graph: dict[str, set[str]]) -> set[str]:
    """Modules that lead back to themselves or to a circle, once all others are taken away."""
    left = {name: set(others) for name, others in graph.items()}
    while ends := {name for name, others in left.items() if not others}:
        left = {name: others - ends for name, others in left.items() if name not in ends}
    return set(left)


def test_files_import_in_no_circle() -> None:
    def module(path: Path) -> str:
        return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")

    graph = imports({module(path): parsed(path) for path in SOURCES})
    assert graph[MODEL] >= ONE_CIRCLE
    graph[MODEL] -= ONE_CIRCLE
    assert circles(graph) == set()


@pytest.mark.parametrize(
    ("b", "circle"),
    [
        ("import a", {"a", "b"}),
        ("def f():\n    from a import x", {"a", "b"}),
        ("if TYPE_CHECKING:\n    import a", set()),
        ("import os", set()),
    ],
)
def test_circles_are_found(b: str, circle: set[str]) -> None:
    modules = {"a": "from b import y", "b": b, "c": "import os"}
    assert circles(imports({name: ast.parse(text) for name, text in modules.items()})) == circle


# Sizes


@every_source
def test_no_file_and_no_function_is_too_long_to_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES
    long = {
        f"{node.name}: {length} lines"
        for node in ast.walk(parsed(path))
        if isinstance(node, Function)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION
    }
    assert not long, f"longer than {FUNCTION} lines"


def test_tests_and_benchmarks_are_no_longer_either() -> None:
    files = [path for name in ("tests", "benchmarks") for path in (ROOT / name).rglob("*.py")]
    lengths = {name_of(path): len(path.read_text("utf-8").splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > LINES} == {}


def test_no_folder_has_too_many_files_to_find_one() -> None:
    count = Counter(path.parent for path in SOURCES if path.stem != "__init__")
    count.pop(ROOT / "mmgraft/cli")  # one thin file a command
    assert {name_of(folder): n for folder, n in count.items() if n > FILES} == {}


def test_the_package_does_not_grow() -> None:
    assert lines_below(ROOT / "mmgraft") <= LIMIT


def test_lines_of_code_are_lines_of_code() -> None:
    text = '"""Say.\n\nWhy.\n"""\n\n# no code\nx = """\ntext\n"""\n\n\ndef f():\n    """Do."""\n'
    assert lines_of_code(text) == 4


# Names


def test_no_file_is_named_after_nothing() -> None:
    empty = {"utils", "common", "helpers", "misc", "util", "helper"}
    assert not [name_of(path) for path in EVERY_SOURCE if path.stem in empty]
    assert not [name_of(path) for path in EVERY_SOURCE if path.stem.startswith("mm_")]


# Words

BARRED = {
    "picture": "image",
    "pictures": "images",
    "evening": "padding the last batch",
    "sitting": "session",
    "sittings": "sessions",
    "lockstep": "in step, across ranks",
    "is told": "is called with",
    "are told": "are called with",
    "told what": "called with what",
    "Told when": "Called when",
    "learned tokens": "supervised tokens",
    "learned positions": "supervised tokens",
    "is learned": "is supervised",
    "are learned": "are supervised",
    "drawn at random": "sampled, random",
    "are drawn": "are sampled",
    "is asked twice": "is answered twice",
    "entering": "hidden states in",
    "insertion places": "insertion points",
    "kind of a position": "token type",
}
"""Words that this house does not write, and the ones that it writes instead."""

RIDDLES = ("what", "how", "whether", "where", "of", "who", "which", "that")
"""Words with which no docstring, help text or description of a setting begins."""


def strings(source: str) -> Iterator[str]:
    """Docstrings, and comments and strings that say what a value is."""
    for comment in re.finditer(r"^ *#: .+(\n *#: .+)*", source, re.M):
        yield re.sub(r"^ *#: ", "", comment[0], flags=re.M)
    for node in ast.walk(ast.parse(source)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str) and value.value.strip():
            yield value.value


def explanations(source: str) -> Iterator[str]:
    """Docstrings, comments on values, and help texts and descriptions in calls."""
    yield from strings(source)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        named = {str(one.arg): one.value for one in node.keywords}
        if getattr(node.func, "id", "") in ("option", "argument", "Option", "about", "given"):
            named |= {str(at): one for at, one in enumerate(node.args)}
        for name, value in named.items():
            text = value.value if isinstance(value, ast.Constant) else None
            shown = name in ("description", "help") or name.isdigit()
            if shown and isinstance(text, str) and " " in text:
                yield text


@every_source
def test_explanations_say_what_a_thing_is_without_riddles(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    first = [text.split(maxsplit=1) for text in explanations(source)]
    found = [" ".join(words)[:60] for words in first if words[0].lower() in RIDDLES]
    assert not found, "begin with a verb or with the thing itself"


def test_docstrings_elsewhere_have_none_either() -> None:
    folders = ("tests", "benchmarks", "plugins", "examples")
    found = [
        f"{name_of(path)}: {text.splitlines()[0][:60]}"
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        for text in strings(path.read_text(encoding="utf-8"))
        if text.split(maxsplit=1)[0].lower() in RIDDLES
    ]
    assert found == [], "begin with a verb or with the thing itself"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_comment_says_what_a_value_is(path: Path) -> None:
    below = [
        one.lineno
        for node in ast.walk(parsed(path))
        if isinstance(body := getattr(node, "body", None), list)
        for one in body[1:]
        if isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant)
        if isinstance(one.value.value, str)
    ]
    assert below == [], "``#:`` before a value says what it is, no string below it"


def test_a_riddle_is_found() -> None:
    text = "#: Who\n#: is.\nX = 1\n'Of it.'\nY = option('How many.')\nZ = f(description='of it')"
    assert [one.split()[0] for one in explanations(text)] == ["Who", "Of", "How", "of"]


_BARRED = re.compile(rf"\b({'|'.join(BARRED)})\b")


@every_source
def test_words_are_those_of_the_field(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    text = text.replace("\n", " ").replace('"sittings"', "")  # a key of earlier files
    found = Counter(match[1] for match in _BARRED.finditer(text))
    assert not found, {word: BARRED[word] for word in found}


def test_pages_have_the_same_words() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    found = {name_of(page): _BARRED.findall(without_code(page)) for page in pages}
    assert {name: words for name, words in found.items() if words} == {}


def without_code(page: Path) -> str:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"`[^`]*`", "", text).replace("\n", " ")


# Docstrings

_OPENING = re.compile(
    r"(What|Whether|Of|How|Where|Tells|Gives|Finds|Reads|Writes|Makes|Builds|Checks|Returns|Keeps|"
    r"Copies|Puts|Takes|Names)\b"
)
_CODE = re.compile(r"(?<![`:\w])`[^`\n]+`(?!`)")
_SECTION = re.compile(r"^( *)(Args|Attributes|Raises):$")
_ENTRY = re.compile(r"[\w.`*, ]{1,40}: [a-z](?!\w*[_(.=])")


def docstrings(path: Path) -> Iterator[tuple[ast.AST, str, bool]]:
    """Every node with its docstring, and whether it is the help text of a command."""
    in_cli = path.parent.name == "cli"
    for node in ast.walk(parsed(path)):
        if isinstance(node, Function | ast.ClassDef | ast.Module):
            text = ast.get_docstring(node)
            public = isinstance(node, Function) and not node.name.startswith("_")
            if text:
                yield node, text, in_cli and public


def small_entries(text: str) -> Iterator[str]:
    """Entries of a section that begin with a small letter."""
    indent = -1
    for line in text.splitlines():
        section = _SECTION.match(line)
        here = len(line) - len(line.lstrip())
        if section:
            indent = len(section[1]) + 4
        elif line.strip() and here < indent:
            indent = -1
        elif here == indent and _ENTRY.match(line.strip()):
            yield line.strip()


@every_source
def test_docstrings_are_of_one_dialect(path: Path) -> None:
    wrong = []
    for node, text, is_help in docstrings(path):
        first = text.splitlines()[0]
        if _OPENING.match(first) and not isinstance(node, ast.ClassDef):
            wrong.append(f"an imperative verb begins: {first}")
        if not is_help:
            wrong += [f"code stands in double backticks: {code}" for code in _CODE.findall(text)]
        wrong += [f"an entry begins with a capital: {entry}" for entry in small_entries(text)]
    assert not wrong


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("Do.\n\nArgs:\n    a: the one.\n    b: The other.", ["a: the one."]),
        ("Do.\n\nArgs:\n    a: ``x`` or\n        not: at all.\nMore: text.", []),
    ],
)
def test_entries_of_a_docstring_are_found(text: str, entries: list[str]) -> None:
    assert list(small_entries(text)) == entries


# Methods

NAMES = "|".join({method.name for method in built_in()} - {"expert", "llava", "lora"})
"""Methods by name; these three are words for formats of files and for parts of a base too."""
CLASSES = {method.config_class.__name__ for method in built_in()}
HOMES = {".".join(method.config_class.__module__.split(".")[:3]) for method in built_in()}
MAY_NAME = (
    "mmgraft/__init__.py",
    "mmgraft/published/",
    "mmgraft/grafts/registry.py",
    *(f"{home.replace('.', '/')}/" for home in HOMES),
)
_NAMED = re.compile(rf"(?<![\w-])({NAMES}|official)(?![\w-])", re.I)
_EXAMPLES = re.compile(r"(--method|estimate|recipes show) iaa\b|AIDC-AI/Wings-[\w.-]+")
"""Commands to copy in help texts and errors; folders such as ``qwen2-7b-iaa`` are no names."""


def knows_methods(module: ast.Module) -> list[str]:
    """Find what a module knows of single methods: names, imports, classes of settings.

    Docstrings may say which paper something comes from.
    """
    sources = {id(node.body[0].value) for node in ast.walk(module)
               if isinstance(node, Function | ast.ClassDef | ast.Module)
               and node.body and isinstance(node.body[0], ast.Expr)}  # fmt: skip
    found: list[str] = []
    for node in ast.walk(module):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in sources
        ):
            found += [
                f"line {node.lineno}: {m[0]!r}"
                for m in _NAMED.finditer(_EXAMPLES.sub("", node.value))
            ]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mmgraft"):
            names = {alias.name for alias in node.names} & CLASSES
            if names or ".".join(str(node.module).split(".")[:3]) in HOMES:
                found.append(f"line {node.lineno}: {node.module}: {names}")
    return found


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if not name_of(path).startswith(MAY_NAME)],
    ids=name_of,
)
def test_no_file_outside_its_folder_knows_a_method(path: Path) -> None:
    assert knows_methods(parsed(path)) == []


@pytest.mark.parametrize(
    ("text", "knows"),
    [
        ('x = "wings"', 1),
        ('help = "IAA: the base layers"', 1),
        ('x = f"{y} of Wings alone"', 1),
        ('"""Wings, section 4."""', 0),
        ('x = "llava"', 0),
        ('x = "chat qwen2-7b-iaa; graft BASE --method iaa"', 0),
        ('y == "official"', 1),
        ("from mmgraft import IAAConfig", 1),
        ("from mmgraft.grafts.llava.config import LlavaConfig", 1),
        ("from transformers import LlavaConfig", 0),
        ("from mmgraft.published.wings import METHOD", 1),
        ("from mmgraft.published.importer import import_checkpoint", 0),
        ("wings = 3", 0),
    ],
)
def test_a_file_that_knows_a_method_is_found(text: str, knows: int) -> None:
    assert len(knows_methods(ast.parse(text))) == knows
