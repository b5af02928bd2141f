"""The rules of which part imports from which, read from the source of every file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "modalmerge"

# part -> the parts it may import from, besides itself
ALLOWED = {
    "registry": set(),
    "records": {"registry"},
    "ranks": set(),
    "checkpoint": set(),
    "layouts": {"checkpoint", "registry"},
    "distance": {"checkpoint", "layouts", "records", "registry"},
    "inspection": {"checkpoint", "layouts", "merge"},
    "merge": {"checkpoint", "layouts", "distance", "ranks", "records", "registry"},
    "model": {"checkpoint", "layouts", "registry"},
    "data": {"ranks", "registry"},
    "tasks": {"model", "data", "checkpoint", "ranks", "registry", "records"},
    "train": {"tasks", "model", "data", "merge", "checkpoint", "ranks", "records", "registry"},
    "evaluate": {"tasks", "model", "data", "checkpoint", "ranks", "records", "registry"},
    "probes": {"tasks", "model", "data", "merge", "checkpoint", "records"},
    "outcomes": {"records", "registry"},
    "report": {"outcomes", "records"},
}
ALLOWED["study"] = {part for part in ALLOWED if part != "report"}
ALLOWED["bench"] = {
    "checkpoint", "data", "distance", "merge", "layouts", "model", "records", "registry", "tasks", "train",
}  # fmt: skip
# files that may do more than their part
EXTRA = {"modalmerge.merge.procedures": {"model", "data", "tasks"}}  # with its modules


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


# load names on first use, or commands: at their top they import light parts only
LAZY = {"modalmerge", *(module for module in FILES if module.split(".")[1:2] == ["cli"])}
HEAVY = {"torch", "transformers", "lightning", "datasets", "plotly", "numpy"}
STANDARD_LIBRARY_ONLY = {"registry", "records"}


def imports_of(module):
    """Every import of a file: full name, and whether it runs when the file is loaded."""
    tree = ast.parse(FILES[module].read_text())
    return [(name, top) for node, top in walk(tree, True) for name in names_of(node, module)]


def walk(node, top):
    for child in ast.iter_child_nodes(node):
        inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        typing_only = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, top
        yield from walk(child, top and not inside and not typing_only)


def names_of(node, module):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    source = node.module or ""
    if node.level:
        is_package = FILES[module].name == "__init__.py"
        parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
        source = ".".join([*parents, *([source] if source else [])])
    # `from package import module` imports the module, if there is one of that name
    return [f"{source}.{alias.name}" if f"{source}.{alias.name}" in FILES else source for alias in node.names]


def part_of(name):
    pieces = name.split(".")
    return pieces[1] if pieces[0] == "modalmerge" and len(pieces) > 1 else None


def test_the_files_are_found():
    assert {"modalmerge", "modalmerge.registry", "modalmerge.merge.methods.elementwise"} <= set(FILES)
    assert ("modalmerge.registry", True) in imports_of("modalmerge.records")
    assert ("modalmerge.merge.apply", False) in imports_of("modalmerge.merge")


@pytest.mark.parametrize("module", FILES)
def test_each_part_imports_from_its_row_only(module):
    if module in LAZY:
        forbidden = {
            name
            for name, top in imports_of(module)
            if top and part_of(name) and part_of(name) not in {*STANDARD_LIBRARY_ONLY, "cli"}
        }
        assert forbidden == set(), f"{module} must import these inside functions"
        return
    part = part_of(module)
    assert part in ALLOWED, f"{module}: the table of imports has no row {part!r}"
    extra = next((more for prefix, more in EXTRA.items() if f"{module}.".startswith(f"{prefix}.")), set())
    allowed = ALLOWED[part] | extra | {part, None}
    found = {name for name, _ in imports_of(module) if part_of(name) not in allowed}
    assert found == set(), f"{module} may import from {sorted(map(str, allowed))} only"


@pytest.mark.parametrize("module", FILES)
def test_heavy_packages_stay_where_they_belong(module):
    packages = {name.split(".")[0]: top for name, top in imports_of(module)}
    if part_of(module) in STANDARD_LIBRARY_ONLY:
        assert set(packages) - {"modalmerge"} <= set(sys.stdlib_module_names)
    if part_of(module) != "train":
        assert not set(packages) & {"lightning", "pytorch_lightning"}, "only train imports lightning"
    if rays := [top for name, top in imports_of(module) if name.split(".")[0] == "ray"]:
        assert module == "modalmerge.study.workers" and not any(rays), "an extra, imported where it is asked for"
    if part_of(module) == "report":
        assert "torch" not in packages
    if module in LAZY:
        assert not {name for name, top in imports_of(module) if top and name.split(".")[0] in HEAVY}
    if part_of(module) in ("checkpoint", "layouts", "merge", "distance"):
        assert "transformers" not in packages


def test_there_are_no_cycles():
    graph = {
        module: {name for name, top in imports_of(module) if top and name in FILES and name != module}
        for module in FILES
    }
    done = set()

    def visit(module, path):
        assert module not in path, f"cycle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])


def loaded_after(code):
    code += "; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    loaded = loaded_after("import modalmerge; modalmerge.__version__; dir(modalmerge)")
    assert not loaded & HEAVY
    assert "modalmerge" in loaded


def test_merging_files_loads_neither_transformers_nor_lightning():
    loaded = loaded_after("import modalmerge; modalmerge.METHODS; modalmerge.LAYOUTS; import modalmerge.merge.apply")
    assert "torch" in loaded
    assert not loaded & {"transformers", "lightning"}


def test_an_unknown_public_name_is_named():
    import modalmerge

    with pytest.raises(AttributeError, match="has no attribute 'mrege'; known: LAYOUTS, METHODS"):
        _ = modalmerge.mrege
    assert set(modalmerge.__all__) <= set(dir(modalmerge))
