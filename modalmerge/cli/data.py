"""Commands about data: prepare the public sets, check them, and look at samples."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modalmerge.cli.app import AsJson, answer, app, count_columns, print_json, quieten, reporter
from modalmerge.registry import find

if TYPE_CHECKING:
    from modalmerge.data.prepare.engine import Progress

MOST_TOLD = 20  # problems, on a terminal

data_app = typer.Typer(help="Prepare, check and look at data.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")

Workers = Annotated[int, typer.Option(help="Processes that read and decode images.", min=1)]


@data_app.command("prepare", epilog="Example: modalmerge data prepare coco --root downloads/coco -o data/coco")
def data_prepare(
    name: Annotated[str, typer.Argument(help="Name of a public set (`modalmerge list datasets`).")],
    root: Annotated[Path, typer.Option(help="Folder that holds its files.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    splits: Annotated[str, typer.Option(help="Splits, by commas; all that there are files of by default.")] = "",
    form: Annotated[str, typer.Option(help="official, webdataset or authors; found out by default.")] = "",
    workers: Workers = 2,
    again: Annotated[
        bool, typer.Option("--again", help="Try once more what was left out, and make anew what differs by now.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Convert the official files of a public set; the same command goes on where it stopped.

    Images that are missing or broken are listed and left out, and numbers that differ from the known ones are told;
    exit 1 where a split ends empty.
    """
    quieten()
    from modalmerge.data.prepare import prepare
    from modalmerge.data.prepare.manifest import ALL_PROBLEMS, LISTED_PROBLEMS

    prepared = prepare(
        name,
        root,
        output,
        splits=[split.strip() for split in splits.split(",") if split.strip()],
        form=form,
        num_workers=workers,
        again=again,
        progress=splits_progress(name),
    )
    if as_json:
        print_json(
            {
                "name": name,
                "splits": {split: entry.num_samples for split, entry in prepared.splits.items()},
                "rows": {split: entry.num_rows for split, entry in prepared.splits.items()},
                "problems": [problem.to_json() for problem in prepared.problems],
                "num_problems": prepared.num_problems,
                "notes": [note.to_json() for note in prepared.notes],
                "output": str(output),
            }
        )
    else:
        for split, entry in prepared.splits.items():
            print(f"{split:14} {entry.num_rows:>9,} rows {entry.num_samples:>10,} samples")
        _tell("note", prepared.notes, len(prepared.notes), "--json lists them all")
        long = [split for split, entry in prepared.splits.items() if entry.num_problems > LISTED_PROBLEMS]
        lists = " and ".join(str(output / split / ALL_PROBLEMS) for split in long)
        where = f"{lists} list those of {', '.join(long)}" if long else "--json lists them all"
        _tell("problem", prepared.problems, prepared.num_problems, where)
        print(f"{name} in {output}")
    if not all(entry.num_rows for entry in prepared.splits.values()):
        raise typer.Exit(1)


@data_app.command("check", epilog="Example: modalmerge data check data/coco")
def data_check(
    folder: Annotated[Path, typer.Argument(help="Folder of a prepared set.")],
    fast: Annotated[bool, typer.Option("--fast", help="Do not decode the images.")] = False,
    workers: Workers = 2,
    as_json: AsJson = False,
) -> None:
    """Look whether a prepared set is whole: files, numbers, ids, labels and every image; exit 1 where it is not."""
    quieten()
    from modalmerge.data.prepare import check, read_manifest

    problems = check(
        folder,
        fast=fast,
        num_workers=workers,
        progress=splits_progress("check"),
    )
    prepared = read_manifest(folder)
    if as_json:
        splits = {split: entry.num_samples for split, entry in prepared.splits.items()}
        shown = {"name": prepared.name, "splits": splits, "problems": [problem.to_json() for problem in problems]}
        print_json({**shown, "left_out": prepared.num_problems})
    else:
        _tell("problem", problems, len(problems), "--json lists them all")
        if not problems:
            print(f"{prepared.name} in {folder} is whole: {', '.join(prepared.splits)}")
    if problems:
        raise typer.Exit(1)


@data_app.command("show", epilog="Example: modalmerge data show scenes -o scenes.html")
def data_show(
    data: Annotated[str, typer.Argument(metavar="NAME|FOLDER", help="Embedded data, or a folder of prepared data.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="HTML or PNG file to write.")],
    split: Annotated[str, typer.Option(help="Part of the data; test or the first one by default.")] = "",
    random_seed: Annotated[int, typer.Option(help="Random seed of the embedded world.")] = 0,
    num: Annotated[int, typer.Option(help="Samples to show.", min=1)] = 24,
    as_json: AsJson = False,
) -> None:
    """Write a sheet of samples to look at."""
    if Path(data).is_dir():
        quieten()
        from modalmerge.data.prepare.sheet import write_sheet

        split, num = write_sheet(Path(data), output, split=split, num=num)
    else:
        from modalmerge.data import DATASETS, kinds, scenes

        find({**DATASETS, **kinds.KINDS}, data, "data set")
        if data not in kinds.KINDS:
            raise ValueError(f"{data} is a public set: prepare it with `modalmerge data prepare`, then show its folder")
        split = split or "test"
        scenes.write_sheet(output, kind=data, split=split, random_seed=random_seed, num=num)
    shown = {"name": data, "split": split, "samples": num, "output": str(output)}
    answer(as_json, shown, f"{num} samples in {output}")


def splits_progress(name: str) -> "Progress":
    """Show how far each split is."""
    return lambda split: reporter(f"{name} {split}", lambda done, total: f"{done:,} of {total:,}", count_columns)


def _tell(what: str, problems: Sequence[Any], num: int, where: str) -> None:
    """Print the first of some problems or notes, of which there are `num`, and where all of them are."""
    if not num:
        return
    print(f"{num:,} {what}{'s' if num > 1 else ''}:")
    for problem in problems[:MOST_TOLD]:
        print(f"  {problem}")
    if num > MOST_TOLD:
        print(f"  and {num - MOST_TOLD:,} more; {where}")
