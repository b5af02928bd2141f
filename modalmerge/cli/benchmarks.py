"""Commands that measure this project against the stated alternative."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from modalmerge.cli.app import AsJson, app, command_line, print_json, quieten

bench_app = typer.Typer(
    help="Measure against the stated alternative, both in one call.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(bench_app, name="bench")

_MEMORY = Path("/dev/shm")
_LABELS = {
    "wall_seconds": "wall, s",
    "cpu_seconds": "processor, s",
    "work_seconds": "without start-up, s",
    "peak_anonymous_bytes": "own memory, MB",
    "peak_rss_bytes": "resident memory, MB",
}


@bench_app.command("merge", epilog="Example: modalmerge bench merge --size 2.2GB --floor -o merge.json")
def bench_merge(
    folder: Annotated[
        Path | None,
        typer.Option("--dir", help="Where the files lie meanwhile, five times the size; in memory by default."),
    ] = None,
    size: Annotated[str, typer.Option(help="About the size of each checkpoint.")] = "2.2GB",
    methods: Annotated[
        str, typer.Option(help="What to measure, mergekit's names.")
    ] = "linear,task_arithmetic,slerp,ties",
    rounds: Annotated[int, typer.Option(help="Runs of each, in turns; medians are shown.", min=1)] = 5,
    mergekit: Annotated[
        Path | None, typer.Option(help="A Python that has mergekit; by default one is made in a cache folder.")
    ] = None,
    tuned: Annotated[
        bool, typer.Option("--tuned", help="Give mergekit the settings with which it was fastest, not its defaults.")
    ] = False,
    floor: Annotated[
        bool, typer.Option("--floor", help="Also measure reading the inputs and writing the output, and no more.")
    ] = False,
    scaling: Annotated[
        str, typer.Option(metavar="GB,GB,...", help="Also measure this project alone at these sizes.")
    ] = "",
    disk: Annotated[
        Path | None, typer.Option(help="Also measure this project alone in this folder, the inputs not cached.")
    ] = None,
    as_json: AsJson = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="JSON file for everything measured.")] = None,
) -> None:
    """Measure merging against mergekit: time, memory, and whether the results agree."""
    from modalmerge.bench.merge import benchmark

    measured = benchmark(
        folder=_folder(folder),
        num_bytes=_bytes("--size", size),
        methods=[name for name in methods.split(",") if name],
        rounds=rounds,
        mergekit_python=mergekit,
        tuned=tuned,
        floor=floor,
        scaling=_sizes(scaling),
        disk=disk,
        say=_say,
    )
    measured = _keep(measured, output)
    print_json(measured) if as_json else _print_measured(measured)


@bench_app.command("gram", epilog="Example: modalmerge bench gram -o gram.json")
def bench_gram(
    size: Annotated[str, typer.Option(help="Model size, by name.")] = "base",
    image_size: Annotated[int, typer.Option(help="Pixels per side.", min=1)] = 224,
    batch_size: Annotated[int, typer.Option(help="Pairs of image and caption.", min=1)] = 8,
    batches: Annotated[int, typer.Option(help="Batches that are counted in one run.", min=1)] = 2,
    threads: Annotated[int, typer.Option(help="Threads of torch.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="Runs of each, in turns; medians are shown.", min=1)] = 5,
    as_json: AsJson = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="JSON file for everything measured.")] = None,
) -> None:
    """Measure collecting Gram matrices against the plain passes, and against naive hooks."""
    quieten()
    from modalmerge.bench.gram import Settings, benchmark

    settings = Settings(
        size=size, image_size=image_size, batch_size=batch_size, num_batches=batches, num_threads=threads
    )
    measured = _keep(benchmark(settings, rounds=rounds, say=_say), output)
    print_json(measured) if as_json else _print_gram(measured)


@bench_app.command("distance", epilog="Example: modalmerge bench distance --scaling 0.2,0.5,1,2,4 -o distance.json")
def bench_distance(
    folder: Annotated[
        Path | None,
        typer.Option("--dir", help="Where the files lie meanwhile, twice the size; in memory by default."),
    ] = None,
    size: Annotated[str, typer.Option(help="About the size of each of two checkpoints.")] = "2.2GB",
    rounds: Annotated[int, typer.Option(help="Runs of each, in turns; medians are shown.", min=1)] = 5,
    scaling: Annotated[
        str, typer.Option(metavar="GB,GB,...", help="Also measure the distances alone at these sizes.")
    ] = "",
    as_json: AsJson = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="JSON file for everything measured.")] = None,
) -> None:
    """Measure all default distances against the L2 distance alone: time and memory."""
    from modalmerge.bench.distance import benchmark

    measured = benchmark(
        folder=_folder(folder),
        num_bytes=_bytes("--size", size),
        rounds=rounds,
        scaling=_sizes(scaling),
        say=_say,
    )
    measured = _keep(measured, output)
    print_json(measured) if as_json else _print_distance(measured)


def _folder(chosen: Path | None) -> Path:
    return chosen or (_MEMORY if _MEMORY.is_dir() else Path(tempfile.gettempdir()))


def _sizes(scaling: str) -> list[int]:
    return [_bytes("--scaling", f"{number}GB") for number in scaling.split(",") if number]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _keep(measured: dict[str, Any], output: Path | None) -> dict[str, Any]:
    """Add the command and the version of the code, and write the file that was asked for."""
    from modalmerge.checkpoint import atomic_file
    from modalmerge.study.driver import code_version

    measured = {"command": command_line(), "commit": code_version(), **measured}
    if output is not None:
        with atomic_file(output) as partial:
            partial.write_text(json.dumps(measured, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return measured


def _bytes(option: str, text: str) -> int:
    from modalmerge.merge.recipe import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise ValueError(f"{option}: {text!r} is no size; sizes are such as 2.2GB or 500MB") from error


def _print_gram(measured: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    names = {
        "plain": "plain passes",
        "ours": "modalmerge",
        "quarter": "a quarter of the tokens",
        "other": "naive hooks",
    }
    table = Table("", "processor, s per batch", "over plain", "resident memory, MB")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, label in names.items():
        seconds, memory = measured["seconds_per_batch"][name], measured["peak_rss_bytes"][name]
        over = measured["over_plain"].get(name, 1.0)
        table.add_row(label, f"{seconds:.3g}", f"{over:.2f}", f"{memory / 1e6:.0f}")
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    settings, machine = measured["settings"], measured["machine"]
    console.print(
        f"{settings['size']}, {settings['image_size']} px, batch {settings['batch_size']}, threads "
        f"{settings['num_threads']}, medians of {measured['rounds']}; {machine['cpu']}, torch {machine['torch']}"
    )
    console.print(table)
    before, after = (measured["load_average"][when][0] for when in ("before", "after"))
    console.print(f"added by naive hooks / by modalmerge: {measured['ratio']:.2f}")
    console.print(f"load average {before:.2f} before, {after:.2f} after")


def _print_distance(measured: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    size, machine = measured["size"], measured["machine"]
    console.print(
        f"{size['bytes'] / 1e9:.3g} GB read from {measured['filesystem']}, medians of {measured['rounds']}; "
        f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}"
    )
    table = Table("", "all distances", "L2 alone", "all / L2")
    for key, label in _LABELS.items():
        scale = 1e-6 if key.endswith("bytes") else 1
        ours, other = (scale * measured[name][key] for name in ("ours", "other"))
        label = "without start-up, processor s" if key == "work_seconds" else label
        table.add_row(label, f"{ours:.2f}", f"{other:.2f}", f"{ours / other:.2f}")
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    console.print(f"processor seconds per GB read: {size['cpu_seconds_per_gb']:.2f}")
    for row in measured["scaling"]:
        console.print(
            f"{row['bytes'] / 2e9:.3g} GB each: {row['nanoseconds_per_element']:.2f} ns an element without start-up, "
            f"{row['ours']['median']['peak_rss_bytes'] / 1e6:.0f} MB"
        )
    before, after = (measured["load_average"][when][0] for when in ("before", "after"))
    console.print(f"load average {before:.2f} before, {after:.2f} after")


def _print_measured(measured: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    def table(title: str, *columns: str) -> Table:
        made = Table(*columns, title=title, title_justify="left")
        for column in made.columns[1:]:
            column.justify = "right"
        return made

    def cells(summary: dict[str, Any], *keys: str) -> list[str]:
        median = summary["median"]
        return [f"{median[key] / 1e6:.0f}" if key.endswith("bytes") else f"{median[key]:.2f}" for key in keys]

    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    machine, gigabytes = measured["machine"], measured["bytes"] / 1e9
    console.print(
        f"{gigabytes:.3g} GB a checkpoint on {measured['filesystem']}, medians of {measured['rounds']}; "
        f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, mergekit {machine['other']['mergekit']}"
    )
    names = {"ours": "modalmerge", "other": "mergekit", "floor": "floor"}
    for method, row in measured["methods"].items():
        present = [name for name in names if name in row]
        shown = table(method, "", *(names[name] for name in present), "mergekit / modalmerge")
        for key, label in _LABELS.items():
            shown.add_row(label, *(cells(row[name], key)[0] for name in present), f"{row['ratio'][key]:.2f}")
        console.print(shown)
        for pair, found in row["agreement"].items():
            console.print(
                f"{pair.replace('_', ' ').replace('ours', 'modalmerge').replace('other', 'mergekit')}: ", end=""
            )
            if method == "ties":  # which of equally large elements is kept is nobody's fault
                console.print(f"{found['share_equal']:.4%} of {found['num_elements']:,} elements are equal")
            elif found["num_different"] == 0:
                console.print(f"all {found['num_elements']:,} elements are equal")
            else:
                console.print(
                    f"{found['num_different']:,} of {found['num_elements']:,} elements differ, "
                    f"{found['num_beyond_one_unit']:,} by more than one unit in the last place"
                )
    measures = ("wall_seconds", "cpu_seconds", "work_seconds", "peak_anonymous_bytes")
    if measured["scaling"]:
        per_gb = ("processor, s/GB", "without start-up, s/GB")
        shown = table("modalmerge alone, average of two", "GB", *(_LABELS[key] for key in measures), *per_gb)
        for row in measured["scaling"]:
            rates = (f"{row[f'{key}_per_gb']:.2f}" for key in ("cpu_seconds", "work_seconds"))
            shown.add_row(f"{row['bytes'] / 1e9:.3g}", *cells(row["ours"], *measures), *rates)
        console.print(shown)
    if measured["disk"]:
        row = measured["disk"]
        shown = table(
            f"on {row['filesystem']}, {row['share_read_from_disk']:.0%} of the inputs not cached",
            "",
            *(_LABELS[key] for key in measures),
        )
        for name in ("ours", "floor"):
            shown.add_row(names[name], *cells(row[name], *measures))
        console.print(shown)
    before, after = (measured["load_average"][when][0] for when in ("before", "after"))
    console.print(f"load average {before:.2f} before, {after:.2f} after")


@bench_app.command("inference", epilog="Example: modalmerge bench inference --tasks retrieval,vqa -o inference.json")
def bench_inference(
    size: Annotated[str, typer.Option(help="Model size, by name.")] = "base",
    tasks: Annotated[str, typer.Option(metavar="TASK,TASK,...", help="By default all.")] = "",
    image_size: Annotated[
        int | None, typer.Option(help="Pixels per side for all tasks; by default each task's usual ones.", min=1)
    ] = None,
    batch_sizes: Annotated[str, typer.Option(metavar="N,N,...", help="Samples that are asked at once.")] = "1,8",
    batches: Annotated[int, typer.Option(help="Batches that are timed in one run.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="Runs of each, in turns; medians are shown.", min=1)] = 3,
    folder: Annotated[
        Path | None,
        typer.Option("--dir", help="Where the models lie meanwhile, up to 2.3 GB at size base; in memory by default."),
    ] = None,
    as_json: AsJson = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="JSON file for everything measured.")] = None,
) -> None:
    """Measure the merged against the modality-specific model in use: parameters, time and memory of every task."""
    quieten()
    from modalmerge.bench.inference import benchmark
    from modalmerge.tasks import TASKS

    measured = benchmark(
        folder=_folder(folder),
        size=size,
        tasks=[name for name in tasks.split(",") if name] or list(TASKS),
        image_size=image_size,
        batch_sizes=_counts("--batch-sizes", batch_sizes),
        rounds=rounds,
        num_batches=batches,
        say=_say,
    )
    measured = _keep(measured, output)
    print_json(measured) if as_json else _print_inference(measured)


def _counts(option: str, text: str) -> list[int]:
    """Read whole numbers from 1 on, with commas in between."""
    words = [word for word in text.split(",") if word]
    if not words or not all(word.isdecimal() and int(word) for word in words):
        raise ValueError(f"{option}: wanted whole numbers from 1 on, such as 1,8; got {text!r}")
    return [int(word) for word in words]


def _print_inference(measured: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    machine = measured["machine"]
    console.print(
        f"{measured['size']}, one thread, medians of {measured['rounds']}; merged / specific; {machine['cpu']}, "
        f"{machine['cores']} cores, torch {machine['torch']}"
    )
    columns = ("image", "parameters, M", "of these active, M", "batch", "processor, s", "ratio", "memory, MB", "ratio")
    table = Table("", *columns)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in measured["rows"]:
        parameters = row["parameters"]
        counts = ["/".join(f"{own[key] / 1e6:.0f}" for own in parameters.values()) for key in ("total", "active")]
        head = [row["name"], str(row["image_size"]), *counts]
        for batch in row["batches"]:
            medians, ratio = [batch[contender]["median"] for contender in parameters], batch["ratio"]
            table.add_row(
                *head,
                str(batch["batch_size"]),
                "/".join(f"{own['work_seconds']:.3g}" for own in medians),
                f"{ratio['work_seconds']:.2f}",
                "/".join(f"{own['peak_rss_bytes'] / 1e6:.0f}" for own in medians),
                f"{ratio['peak_rss_bytes']:.2f}",
            )
            head = [""] * len(head)
    console.print(table)
    before, after = (measured["load_average"][when][0] for when in ("before", "after"))
    console.print(f"ratio: specific over merged; load average {before:.2f} before, {after:.2f} after")


@bench_app.command("retrieval", epilog="Example: modalmerge bench retrieval -o retrieval.json")
def bench_retrieval(
    threads: Annotated[int, typer.Option(help="Threads of torch.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="Runs of each, in turns; medians are shown.", min=1)] = 3,
    as_json: AsJson = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="JSON file for everything measured.")] = None,
) -> None:
    """Measure ranking 5,000 images and 25,000 captions against sorting all their scores: time and memory."""
    quieten()
    from modalmerge.bench.retrieval import benchmark

    measured = _keep(benchmark(rounds=rounds, num_threads=threads, say=_say), output)
    print_json(measured) if as_json else _print_retrieval(measured)


def _print_retrieval(measured: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("gallery", "modalmerge, s", "sorting, s", "sorting / modalmerge", "modalmerge, MB", "sorting, MB")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, row in measured["galleries"].items():
        memory = (f"{row['peak_rss_bytes'][contender] / 1e6:.0f}" for contender in ("ours", "other"))
        table.add_row(name, f"{row['ours']:.3g}", f"{row['other']:.3g}", f"{row['ratio']:.2f}", *memory)
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    machine = measured["machine"]
    console.print(
        f"{measured['num_images']} images, {measured['num_captions']} captions, {measured['size']} numbers each; "
        f"threads {measured['num_threads']}, seconds of processor time, resident memory, medians of "
        f"{measured['rounds']}; {machine['cpu']}, torch {machine['torch']}"
    )
    console.print(table)
    before, after = (measured["load_average"][when][0] for when in ("before", "after"))
    console.print(f"load average {before:.2f} before, {after:.2f} after")


@bench_app.command("loading", epilog="Example: modalmerge bench loading -o loading.json")
def bench_loading(
    size: Annotated[str, typer.Option(help="Model size, by name.")] = "small",
    image_size: Annotated[int, typer.Option(help="Pixels per side.", min=1)] = 224,
    batch_size: Annotated[int, typer.Option(help="Pairs of image and caption.", min=2)] = 22,
    steps: Annotated[int, typer.Option(help="Steps of training that are counted in one run.", min=1)] = 2,
    batches: Annotated[int, typer.Option(help="Batches of the loader that are counted in one run.", min=1)] = 10,
    images: Annotated[int, typer.Option(help="Different pictures of each kind.", min=1)] = 64,
    rounds: Annotated[int, typer.Option(help="Runs of each, in turns; medians are shown.", min=1)] = 3,
    as_json: AsJson = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="JSON file for everything measured.")] = None,
) -> None:
    """Measure the loader of public data against a pre-training step, both with one thread."""
    quieten()
    from modalmerge.bench.loading import Settings, benchmark

    settings = Settings(
        size=size,
        image_size=image_size,
        batch_size=batch_size,
        num_steps=steps,
        num_batches=batches,
        num_images=images,
    )
    measured = _keep(benchmark(settings, rounds=rounds, say=_say), output)
    print_json(measured) if as_json else _print_loading(measured)


def _print_loading(measured: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "samples a second", "of the step's", "kB a picture", "resident memory, MB")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, rate in measured["samples_per_second"].items():
        loader = name in measured["ratio"]
        ratio = f"{measured['ratio'][name]:.1f}" if loader else ""
        size = f"{measured['picture_bytes'][name] / 1e3:.0f}" if loader else ""
        label = f"loader, {name}" if loader else "training step"
        table.add_row(label, f"{rate:.4g}", ratio, size, f"{measured['peak_rss_bytes'][name] / 1e6:.0f}")
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    settings, machine = measured["settings"], measured["machine"]
    console.print(
        f"{settings['size']}, {settings['image_size']} px, batch {settings['batch_size']}, one thread, seconds of "
        f"processor time, medians of {measured['rounds']}; {machine['cpu']}, torch {machine['torch']}"
    )
    console.print(table)
    before, after = (measured["load_average"][when][0] for when in ("before", "after"))
    console.print(
        f"wanted: {measured['wanted']:g} times the step's; load average {before:.2f} before, {after:.2f} after"
    )


@bench_app.command(
    "pretrain",
    epilog="Example: modalmerge bench pretrain --device cuda --precision bf16-mixed --batch-size 256 --compile",
)
def bench_pretrain(
    size: Annotated[str, typer.Option(help="Model size, by name.")] = "base",
    image_size: Annotated[int, typer.Option(help="Pixels per side.", min=1)] = 224,
    batch_size: Annotated[int, typer.Option(help="Pairs of image and caption, from 2 on.")] = 8,
    architecture: Annotated[str, typer.Option(help="Which parts modalities have for themselves.")] = "specific",
    threads: Annotated[int, typer.Option(help="Threads of torch.", min=1)] = 1,
    steps: Annotated[int, typer.Option(help="Steps that are counted in one run, behind one that is not.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="Runs of each, in turns; medians are shown.", min=1)] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    precision: Annotated[str, typer.Option(help="32-true or bf16-mixed.")] = "32-true",
    pad: Annotated[
        str, typer.Option(help="Texts to the longest of the batch, or to the max of the model.")
    ] = "longest",
    compiled: Annotated[bool, typer.Option("--compile", help="Compile this project's flow.")] = False,
    activation_checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="Compute the inside of layers again, in both flows.")
    ] = False,
    peak_tflops: Annotated[
        float | None,
        typer.Option(help="Peak of the device, where it is not known; in 10^12 FLOPs a second.", min=0.001),
    ] = None,
    as_json: AsJson = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="JSON file for everything measured.")] = None,
) -> None:
    """Measure a pre-training step against the straight flow, in which each loss makes full padded passes of its own.

    Utilisation is FLOPs needed / seconds of a step / peak of the device, for either flow. FLOPs needed are
    3 x (4 D^2 K + (4 D^2 + 4 D F) Q + 4 D A + heads), with width D, inner width F, K rows that give keys and values,
    Q rows that are read, A pairs of a query and a key.
    """
    quieten()
    from modalmerge.bench.pretrain import Settings, benchmark

    settings = Settings(
        size=size,
        image_size=image_size,
        batch_size=batch_size,
        architecture=architecture,
        num_threads=threads,
        num_steps=steps,
        device=device,
        precision=precision,
        pad=pad,
        compile=compiled,
        activation_checkpointing=activation_checkpointing,
    )
    measured = _keep(benchmark(settings, rounds=rounds, peak_tflops=peak_tflops, say=_say), output)
    print_json(measured) if as_json else _print_pretrain(measured)


def _print_pretrain(measured: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "modalmerge", "straight flow", "straight / modalmerge")
    for column in table.columns[1:]:
        column.justify = "right"
    settings, machine = measured["settings"], measured["machine"]
    for key, label, scale, form in (
        ("cpu_seconds", "processor, s a step", 1, ".3g"),
        ("wall_seconds", "wall, s a step", 1, ".3g"),
        ("peak_rss_bytes", "resident memory, MB", 1e-6, ".0f"),
        ("gpu_peak_bytes", "memory of the GPU, MB", 1e-6, ".0f"),
        ("block_calls", "calls of a layer", 1, ",.0f"),
        ("block_tokens", "block-tokens", 1, ",.0f"),
        ("feed_forward_rows", "rows of feed-forward networks", 1, ",.0f"),
        ("tokens_per_second", "real tokens a second", 1, ".4g"),
        ("utilisation", "utilisation, %", 100, ".3g"),
    ):
        if measured[key] is not None:
            ours, other = (scale * measured[key][name] for name in ("ours", "other"))
            table.add_row(label, f"{ours:{form}}", f"{other:{form}}", f"{other / ours:.2f}")
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    console.print(
        f"{settings['size']}, {settings['architecture']}, {settings['image_size']} px, batch {settings['batch_size']}, "
        f"{settings['precision']}, threads {settings['num_threads']}, medians of {measured['rounds']}; "
        f"{machine['gpu'] or machine['cpu']}, torch {machine['torch']}"
    )
    console.print(table)
    console.print(
        f"needed: {measured['block_tokens']['needed']:,} block-tokens, {measured['needed_flops']:.4g} FLOPs; "
        f"{measured['flops_formula']}"
    )
    if measured["utilisation"] is None:
        console.print("utilisation: the peak of this device and precision is not known; give --peak-tflops")
    agreement = measured["agreement"]
    console.print(
        f"losses of the batch differ by {measured['losses']['difference']:.2g}; on {agreement['num_pairs']} pairs in "
        f"float32 losses by {agreement['losses']:.2g}, gradients by {agreement['all_gradients']:.2g} of their norm, "
        f"that of {agreement['parameter']} by {agreement['gradients']:.2g}, the most"
    )
    before, after = (measured["load_average"][when][0] for when in ("before", "after"))
    console.print(f"load average {before:.2f} before, {after:.2f} after")
