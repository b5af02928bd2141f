"""The model card of a merge: what was merged, how, and how to do it again."""

import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from modalmerge.layouts import LAYOUTS, Layout
from modalmerge.records import MergeRecord


def name_group(group: Mapping[str, Any]) -> str:
    """Name a group of a record's `kept`: its component and layer."""
    return group["component"] if group["layer"] is None else f"layer {group['layer']} {group['component']}"


def model_card(record: MergeRecord, layout: Layout | None) -> str:
    """Write the card in the form that model hubs read.

    Args:
        record: of the merge.
        layout: of the input; None for several checkpoints.

    Returns:
        Markdown with a YAML head.
    """
    head = {"tags": ["merge", "modalmerge"], "library_name": "modalmerge"}
    names = ", ".join(f"`{entry['name']}`" for entry in record.inputs)
    base = f" Changes are taken from the base `{record.base['name']}`." if record.base else ""
    what = "experts" if layout is not None else "checkpoints"
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=True).strip(),
        "---",
        "",
        "# A merge by modalmerge",
        "",
        f"The {what} {', '.join(record.experts)} of {names}, merged by {record.method}: {record.num_merged} parameters "
        f"merged, {record.num_copied} tensors carried over.{base}",
        "",
    ]
    if layout is not None and layout.target.model and not record.remaining and not record.recipe["tied"]:
        lines += [
            f"The result is {layout.target.model}; it is loaded by {layout.target.loaded_by}.",
            "",
        ]
    if record.recipe["tied"]:
        loaded_by = f" Loaded by {layout.tied}." if layout is not None and layout.tied else ""
        lines += [f"The merged weights are in every expert's place.{loaded_by}", ""]
    if record.kept:
        kept = [f"{name_group(group)} ({group['distance']:.3g})" for group in record.kept["groups"] if group["is_kept"]]
        lines += [
            f"Kept per expert, by the {record.kept['distance']} of their {record.kept['of']}: {len(kept)} of "
            f"{len(record.kept['groups'])} groups, with {record.kept['fraction']:.1%} of what merging would save"
            f"{': ' if kept else ''}{', '.join(kept)}.",
            "",
        ]
    for file, keys in record.config_changes.items():
        changed = ", ".join(f"`{key}` from `{before}` to `{after}`" for key, (before, after) in keys.items())
        lines += [f"In `{file}`, {changed}.", ""]
    lines += [f"- {warning}" for warning in record.warnings] + [""] * bool(record.warnings)
    recipe = yaml.safe_dump(record.recipe, sort_keys=True).strip()
    lines += ["Recipe:", "", "```yaml", recipe, "```", "", "Inputs:", ""]
    lines += ["| checkpoint | tensors read | bytes | content |", "|---|---:|---:|---|"]
    for entry in [*record.inputs, *([record.base] if record.base else [])]:
        lines.append(f"| {entry['name']} | {entry['num_tensors']} | {entry['bytes']} | `{entry['content']}` |")
    again = ["modalmerge", "merge", *(entry["name"] for entry in record.inputs)]
    again += ["--base", record.base["name"]] if record.base else []
    again += ["--layout", f"{layout.name}.yaml"] if layout is not None and layout.name not in LAYOUTS else []
    lines += [
        "",
        "Again:",
        "",
        "```bash",
        shlex.join([*again, "--recipe", "merge.json", "-o", "merged"]),
        "```",
    ]
    return "\n".join(lines) + "\n"
