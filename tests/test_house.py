"""The house: who imports whom, how long things are, how docstrings begin, and what the documents say there is.

Everything is read from the source with ``ast`` and from the Markdown files; nothing of the program is imported.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = ("ablation_experiment", "autoencoders", "compare", "data", "predict", "representations")
FOLDERS = ("analysis", "experiment", "loras", "report", "training")
OURS = {*MODULES, *FOLDERS, "benchmarks", "tests"}
MAY_IMPORT = {
    "loras": set(),
    "training": set(),
    "analysis": set(),
    "report": set(),
    "representations": {"training"},
    "data": {"loras"},
    "autoencoders": {"training"},
    "experiment": {"data", "representations", "autoencoders", "loras", "training", "analysis"},
    "ablation_experiment": {"data", "representations", "loras", "training", "experiment", "report"},
    "compare": {"data", "representations", "loras", "training", "experiment", "report"},
    "predict": {"data", "loras", "experiment", "report"},
}
# The one exception: data.py as a program hands over to the command line, which knows the experiment. Only its function
# ``main`` does, and what runs where the file is the program: nothing that is imported as ``data`` depends on it.
HANDS_OVER = {"data": "experiment.command"}
ANY_WORDS = {"what", "how", "whether", "which", "where", "who", "why"}
FUNCTION_WORDS = ANY_WORDS | {"the", "a", "an", "all", "each", "every", "some", "many", "several"}
# A file has 600 lines, and room for what the README says one file suffices for: a row and its function.
FILE_LINES, CLASS_LINES, FUNCTION_LINES = 650, 200, 50
LONGER: dict[str, int] = {}  # "path:name" -> lines it may have; the reason of each stands in NOTES.md


def product_files() -> list[Path]:
    """Return the source files of the program, in a fixed order."""
    return [ROOT / f"{name}.py" for name in MODULES] + sorted(p for name in FOLDERS for p in (ROOT / name).glob("*.py"))


def source_files() -> list[Path]:
    """Return the source files of the program and of its benchmarks."""
    return product_files() + sorted((ROOT / "benchmarks").glob("*.py"))


def name_of(path: Path) -> str:
    """Return a file's path relative to the project."""
    return path.relative_to(ROOT).as_posix()


def parsed(path: Path) -> ast.Module:
    """Return the syntax tree of a source file."""
    return ast.parse(path.read_text(encoding="utf-8"), name_of(path))


def definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Yield the qualified name and the node of every class and function, nested ones too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node
            yield from definitions(node, f"{prefix}{node.name}.")
        else:
            yield from definitions(node, prefix)


# ----------------------------------------------------------------------------------------------------------------------
# The arrows
# ----------------------------------------------------------------------------------------------------------------------


def forbidden_imports(room: str, tree: ast.AST) -> list[str]:
    """Return the lines on which a module of a room imports what its room may not; imports inside functions count."""
    found, handing_over = [], handed_over(room, tree)
    for node in ast.walk(tree):
        if node in handing_over:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""] if node.level == 0 else [room]
        else:
            continue
        imported = {name.split(".")[0] for name in names} & OURS
        own = {room} if room in FOLDERS else set()
        found += [f"line {node.lineno}: {room} imports {name}" for name in sorted(imported - own - MAY_IMPORT[room])]
    return found


def handed_over(room: str, tree: ast.Module) -> list[ast.AST]:
    """Return the imports by which a program hands over, see ``HANDS_OVER``."""
    places = [
        node
        for node in tree.body
        if (isinstance(node, ast.FunctionDef) and node.name == "main")
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'")
    ]
    imports = [node for place in places for node in ast.walk(place) if isinstance(node, ast.ImportFrom)]
    return [node for node in imports if node.module == HANDS_OVER.get(room)]


def test_every_room_imports_only_what_the_table_allows():
    faults = []
    for path in product_files():
        room = path.parent.name if path.parent != ROOT else path.stem
        faults += [f"{name_of(path)}, {line}" for line in forbidden_imports(room, parsed(path))]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("room", "source", "faults"),
    [
        ("report", "from analysis.evidence import ALPHA", 1),
        ("report", "import json\nfrom report import wording", 0),
        ("data", "from loras.labels import Finding\nimport experiment.store", 1),
        ("data", "def main():\n    from experiment.command import main", 0),
        ("data", "def main():\n    from experiment.preflight import run", 1),
        ("data", "def late():\n    from experiment.command import main", 1),
        ("data", "from experiment.command import main", 1),
        ("loras", "def main():\n    from experiment.command import main", 1),
        ("loras", "def late():\n    import training", 1),
        ("representations", "import representations", 1),
        ("experiment", "import analysis, autoencoders\nfrom report.text import render_text", 1),
        ("ablation_experiment", "from tests.making import write_lora", 1),
    ],
)
def test_an_import_against_the_arrows_is_seen(room, source, faults):
    assert len(forbidden_imports(room, ast.parse(source))) == faults


def test_the_table_knows_every_room():
    assert set(MAY_IMPORT) == {*MODULES, *FOLDERS}
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(MODULES)


# ----------------------------------------------------------------------------------------------------------------------
# Docstrings and sizes
# ----------------------------------------------------------------------------------------------------------------------


def is_property(node: ast.AST) -> bool:
    """Return whether a function is read like an attribute."""
    names = {ast.unparse(decorator).split(".")[-1].split("(")[0] for decorator in node.decorator_list}
    return bool(names & {"property", "cached_property"})


def docstring_faults(tree: ast.Module) -> list[str]:
    """Return the docstrings that begin with a word that theirs may not."""
    faults = []
    for name, node in [("module", tree), *definitions(tree)]:
        words = re.findall(r"[A-Za-z]+", ast.get_docstring(node) or "")
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_property(node)
        if words and words[0].lower() in (FUNCTION_WORDS if is_function else ANY_WORDS):
            faults.append(f"{name}: {(ast.get_docstring(node) or '').splitlines()[0]}")
    return faults


def test_a_docstring_begins_with_a_verb_or_a_noun():
    faults = [f"{name_of(path)}, {line}" for path in source_files() for line in docstring_faults(parsed(path))]
    assert not faults, f"{len(faults)} docstrings:\n" + "\n".join(faults)


def test_a_docstring_that_begins_otherwise_is_seen():
    source = '''
class Shape:
    """The sides of a matrix."""
    @property
    def rows(self):
        """The number of rows."""
    def area(self):
        """The product of both."""
    def told(self):
        """Return it."""
        def inner():
            """How it is."""
class Why:
    """Why it is."""
'''
    assert [fault.split(":")[0] for fault in docstring_faults(ast.parse(source))] == [
        "Shape.area",
        "Shape.told.inner",
        "Why",
    ]


@pytest.mark.parametrize("path", [f"{name}.py" for name in MODULES] + [f"{name}/__init__.py" for name in FOLDERS])
def test_every_room_says_what_it_holds(path):
    assert ast.get_docstring(parsed(ROOT / path))


def too_long(path: Path) -> dict[str, int]:
    """Return the lines of the file, the classes and the functions that are longer than they may be."""
    lines = {name_of(path): path.read_text(encoding="utf-8").count("\n")}
    found = {name: count for name, count in lines.items() if count > FILE_LINES}
    for name, node in definitions(parsed(path)):
        count = node.end_lineno - node.lineno + 1
        if count > (CLASS_LINES if isinstance(node, ast.ClassDef) else FUNCTION_LINES):
            found[f"{name_of(path)}:{name}"] = count
    return found


def test_nothing_is_longer_than_it_may_be():
    found = {name: count for path in source_files() for name, count in too_long(path).items()}
    faults = [f"{name}: {count} lines" for name, count in found.items() if count > LONGER.get(name, 0)]
    assert not faults, "\n".join(faults)
    assert set(LONGER) <= set(found), "exceptions that are no longer needed"
    notes = (ROOT / "NOTES.md").read_text(encoding="utf-8")
    assert not [name for name in LONGER if name.split(":")[-1] not in notes], "exceptions without a reason"


# ----------------------------------------------------------------------------------------------------------------------
# The documents
# ----------------------------------------------------------------------------------------------------------------------


def test_the_tree_names_every_module_and_no_other():
    document = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
    tree = re.search(r"```\n(.*?)```", document, re.DOTALL)[1]
    folder, named = "", set()
    for line in tree.splitlines():
        if not line.startswith(" "):
            folder = line.split()[0] if line.split()[0].endswith("/") else ""
        named |= {folder + name for name in re.findall(r"\b\w+\.py\b", line)}
    modules = {name_of(path) for path in source_files() if path.name != "__init__.py"}
    assert modules == named, f"not named: {sorted(modules - named)}; not there: {sorted(named - modules)}"


def test_the_readme_is_short():
    assert readme().count("\n") <= 200


def readme() -> str:
    """Return the text of README.md."""
    return (ROOT / "README.md").read_text(encoding="utf-8")


def heading_anchor(heading: str) -> str:
    """Return the anchor that a Markdown renderer gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def leads_somewhere(document: Path, target: str) -> bool:
    """Return whether a link of a document leads to a file, or a heading, that is there; the web is not asked."""
    if "://" in target:
        return True
    name, _, anchor = target.partition("#")
    file = document.parent / name if name else document
    if not file.exists():
        return False
    return not anchor or anchor in map(heading_anchor, re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.M))


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=name_of)
def test_every_link_between_documents_leads_somewhere(path):
    targets = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    assert not [target for target in targets if not leads_somewhere(path, target)]


# ----------------------------------------------------------------------------------------------------------------------
# The schema of results.json
# ----------------------------------------------------------------------------------------------------------------------

JSON_TYPES = {
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "object": dict,
    "list": list,
}


@dataclass
class Key:
    """One place of the documented tree: the types of its value (empty: a container) and the places below it.

    A place below is a key, ``*`` for keys that vary, or ``[]`` for the items of a list.
    """

    types: tuple[str, ...] = ()
    optional: bool = False
    below: dict[str, Key] = field(default_factory=dict)


def documented(heading: str, document: str = "results.md") -> Key:
    """Return the tree of keys that the tables under a heading of a document of docs/ describe.

    A row reads ``| `path.of.keys[]` | type | unit | meaning |``; the type is one of ``JSON_TYPES``, perhaps followed by
    ``or null``, or by ``, optional``.
    """
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.M | re.DOTALL)[1]
    root = Key()
    for path, kind in re.findall(r"^\| `([^`]+)` \| ([^|]+?) \|", section, re.M):
        place = root
        for step in re.findall(r"\[\]|[^.\[\]]+", path):
            place = place.below.setdefault(step, Key())
        assert not place.types, f"{path} is documented twice"
        assert not (step == "[]" and kind.endswith("optional")), f"{path}: an item cannot be optional, its list can"
        kind, place.optional = kind.removesuffix(", optional"), kind.endswith(", optional")
        place.types = tuple(kind.split(" or "))
        assert set(place.types) <= {*JSON_TYPES, "null"}, f"{path}: {kind}"
    return root


def check_schema(results: object, heading: str = "results.json", document: str = "results.md") -> list[str]:
    """Return the differences between the content of a result file and what docs/results.md says of it.

    Keys that are not documented, documented ones that are missing without being optional, and values of another type.
    Keys of an object that may be null are looked for where it is there.

    Args:
        results: The content of the file.
        heading: The heading that describes it.
        document: The document of docs/ that has it.
    """
    return sorted(set(_differences(results, documented(heading, document), "")))


def _differences(value: object, key: Key, path: str) -> Iterator[str]:
    """Yield what is wrong with a value and all below it; ``path`` is as documented."""
    shown = path or "the whole"
    if value is None:
        if "null" not in key.types:
            yield f"{shown}: null is not documented"
        return
    names = {*key.types} - {"null"}
    if not names:  # a container without a row of its own
        names = {"list" if "[]" in key.below else "object"}
    if not any(has_type(value, name) for name in names):
        yield f"{shown}: {type(value).__name__}, not {' or '.join(sorted(names))}"
    elif isinstance(value, list):
        for item in value:
            yield from _differences(item, key.below["[]"], f"{path}[]")
    elif isinstance(value, dict):
        dotted = f"{path}." if path else ""
        for name, below in key.below.items():
            if name != "*" and name not in value and not below.optional:
                yield f"{dotted}{name}: missing"
        for name, item in value.items():
            step = name if name in key.below else "*"
            if step in key.below:
                yield from _differences(item, key.below[step], f"{dotted}{step}")
            else:
                yield f"{dotted}{name}: not documented"


def has_type(value: object, name: str) -> bool:
    """Return whether a JSON value has a documented type; true and false are no numbers."""
    return isinstance(value, JSON_TYPES[name]) and (name == "boolean" or not isinstance(value, bool))


def undocumented_arrays(shapes: dict[str, tuple[str, int]]) -> list[str]:
    """Return the differences between the arrays of predictions.npz and the table of docs/results.md.

    Args:
        shapes: The dtype's kind as numpy writes it (``i``, ``u``, ``f``, ``b``, ``U``) and the number of dimensions of
            each array.
    """
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    section = re.search(r"^## predictions.npz\n(.*?)(?=^## |\Z)", text, re.M | re.DOTALL)[1]
    rows = re.findall(r"^\| `([^`]+)` \| (\w+)[^|]* \| \(([^)]*)\) \|", section, re.M)
    kinds = {"integer": "iu", "float32": "f", "boolean": "b", "string": "U"}
    faults = []
    for name, (kind, dimensions) in shapes.items():
        for pattern, dtype, shape in rows:
            if re.fullmatch(re.escape(pattern).replace(r"\*", "[^/]+"), name):
                if kind not in kinds[dtype] or dimensions != len(shape.strip(", ").split(",")):
                    faults.append(f"{name}: {kind}, {dimensions} dimensions; not {dtype} ({shape})")
                break
        else:
            faults.append(f"{name}: not documented")
    return faults


def test_the_schema_can_be_read():
    """Every documented type is known, no key is documented twice, and the sections are there."""
    sections = {
        *("schema_version", "dataset", "config", "environment", "chance", "layer_ranking", "top_layers"),
        *("ablation_results", "baseline_results", "representations_not_run", "not_done", "analysis", "splits"),
        *("figures", "model", "timing"),
    }
    assert set(documented("results.json").below) == sections
    assert "[]" in documented("top_layers.json").below


def test_a_difference_from_the_schema_is_seen(monkeypatch):
    number, text = Key(("number",)), Key(("string", "null"))
    tree = Key(
        below={"a": number, "b": Key(below={"[]": Key(below={"name": text, "*": number})}), "c": Key(("object",), True)}
    )
    monkeypatch.setattr(sys.modules[__name__], "documented", lambda *_: tree)
    assert check_schema({"a": 1, "b": [{"name": None, "x": 2.5}]}) == []
    assert check_schema({"a": True, "b": [{"name": "n"}, {}]}) == ["a: bool, not number", "b[].name: missing"]
    assert check_schema({"a": None, "b": {}, "d": 1}) == [
        "a: null is not documented",
        "b: dict, not list",
        "d: not documented",
    ]
