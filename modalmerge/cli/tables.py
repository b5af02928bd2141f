"""The command that lists what there is."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from modalmerge.cli.app import AsJson, app, print_json
from modalmerge.registry import find


@app.command("list", epilog="Example: modalmerge list methods")
def list_table(
    what: Annotated[str, typer.Argument(help="methods, layouts, tasks, datasets, metrics or presets.")],
    as_json: AsJson = False,
) -> None:
    """List a table, one line each, with what each entry needs."""
    rows = find(TABLES, what, "table")()
    if as_json:
        print_json(rows)
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        needs = f" (needs {row['needs']})" if row["needs"] else ""
        print(f"{row['name']:{width}}  {row['summary']}{needs}")


def _rows(entries: Mapping[str, Any], about: Callable[[Any], tuple[str, str, str]]) -> list[dict[str, str]]:
    rows = []
    for name, entry in entries.items():
        summary, needs, source = about(entry)
        rows.append({"name": name, "summary": summary, "needs": needs, "source": source})
    return rows


def _source(function: Any) -> str:
    """Read where a function comes from in its docstring."""
    return " ".join(function.__doc__.partition("Source:")[2].split("\n\n")[0].split())


# what the user must give for a method's argument
_NEEDS = {"base": "a base", "gram": "Gram matrices", "fisher": "squared gradients", "coefficients": "data"}


def _methods() -> list[dict[str, str]]:
    from modalmerge.merge.methods import METHODS, needs
    from modalmerge.merge.supply import BEHIND_MERGED

    def about(method: Any) -> tuple[str, str, str]:
        needed = [_NEEDS[what] for what in needs(method) if what in _NEEDS]
        needed = ["data"] if method is METHODS[BEHIND_MERGED] else needed
        return method.__doc__.splitlines()[0], ", ".join(needed), _source(method)

    return _rows(METHODS, about)


def _layouts() -> list[dict[str, str]]:
    from modalmerge.layouts import LAYOUTS

    return _rows(LAYOUTS, lambda layout: (layout.summary, "", layout.source))


def _tasks() -> list[dict[str, str]]:
    from modalmerge.tasks import TASKS

    return _rows(TASKS, lambda task: (task.summary, "heads " + ", ".join(task.heads), "arXiv 2304.14933"))


def _datasets() -> list[dict[str, str]]:
    from modalmerge.data import DATASETS

    rows = _rows(DATASETS, lambda entry: (entry.summary, entry.needs, entry.source))
    for row in rows:
        entry = DATASETS[row["name"]]
        row |= {"kind": entry.kind, "tasks": ", ".join(entry.tasks), "licence": entry.licence}
    return rows


def _metrics() -> list[dict[str, str]]:
    from modalmerge.distance.measures import DISTANCES, subspace_alignment
    from modalmerge.tasks.metrics import METRICS

    distances = {**DISTANCES, "subspace_alignment": subspace_alignment}
    return [
        *_rows(METRICS, lambda metric: (f"{metric.summary} ({metric.unit}, {metric.direction} is better)", "", "")),
        *_rows(distances, lambda distance: (distance.__doc__.splitlines()[0], "experts", _source(distance))),
    ]


def _presets() -> list[dict[str, str]]:
    from modalmerge.study.paper import NAME, paper
    from modalmerge.study.presets import PRESETS
    from modalmerge.study.recipes import RECIPES, STARTS

    def needed(name: str) -> str:
        if name not in RECIPES:
            return "data and weights, see --dry-run" if name == NAME else ""
        recipe = RECIPES[name]()
        return ", ".join([*recipe.data, STARTS[recipe.start]])

    rows = _rows({**PRESETS, NAME: paper, **RECIPES}, lambda made: ((made.__doc__ or "").splitlines()[0], "", ""))
    return [{**row, "needs": needed(row["name"])} for row in rows]


TABLES = {
    "methods": _methods,
    "layouts": _layouts,
    "tasks": _tasks,
    "datasets": _datasets,
    "metrics": _metrics,
    "presets": _presets,
}
