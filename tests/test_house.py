"""How the files hang together: who imports whom."""

import ast
from pathlib import Path

import train
from rawaudio.families import FILES

ROOT = Path(train.__file__).parent
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.glob("**/*.py")
    if not {"tests", "build", ".venv"} & set(path.relative_to(ROOT).parts)
}
# Who may know a family: the compiled engine serves one; entry points are of certain ones.
MAY_NAME = {"sashimi.realtime", "hubconf"}


def imports(name, with_types=False):
    """The modules of this repository that a module imports, anywhere in it; with_types: those for
    annotations alone, too."""
    skipped, found = set(), set()
    tree = ast.parse(SOURCES[name].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped and not with_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            package = SOURCES[name].parent.relative_to(ROOT).parts
            package = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join([*package, *filter(None, [node.module])])
            inner = [f"{base}.{alias.name}" for alias in node.names]
            found |= {module if module in SOURCES else base for module in inner}
    if name == "rawaudio.families":
        found |= set(FILES)
    return found & SOURCES.keys()


def test_only_these_files_name_a_family():
    """A family is one file and one line: nothing else needs to know it."""
    assert set(FILES) < SOURCES.keys()
    naming = {name for name in SOURCES if imports(name, with_types=True) & set(FILES)}
    assert naming <= MAY_NAME | {"rawaudio.families"}, naming - MAY_NAME


def test_no_file_imports_one_that_imports_it():
    """Directly or by others; what is imported for annotations alone does not count."""
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(imports(name)):
            visit(other)
        done.add(path.pop())

    for name in SOURCES:
        visit(name)
    assert len(done) == len(SOURCES) > 40
