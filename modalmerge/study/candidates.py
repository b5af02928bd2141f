"""The settings that each merge method chooses from, zero-shot on the validation split."""

from collections.abc import Mapping, Sequence
from typing import Any

from modalmerge.registry import find
from modalmerge.study.presets import Preset

Settings = Mapping[str, Any]


def _scales(*scales: float, **others: Any) -> tuple[Settings, ...]:
    return tuple({**others, "scale": scale} for scale in scales)


_VISION_AND_TEXT = ["vision", "text"]
_REGMEAN = (
    {"off_diagonal": 1.0},
    {"off_diagonal": 0.9},
    {"off_diagonal": 0.9, "normalise": "tokens"},
    {"off_diagonal": 0.5, "normalise": "tokens"},
)

# About as many for each method, around its authors' values and, where changes of up to three experts are added up,
# around the 0.5 that modality arithmetic chooses here. Random masks follow the repetition's random seed.
CANDIDATES: Mapping[str, Sequence[Settings]] = {
    # the arc is between two experts; the joint one of the fusion layers is left out
    "slerp": tuple({"fraction": share, "use_experts": _VISION_AND_TEXT} for share in (0.3, 0.4, 0.5, 0.6, 0.7)),
    "arithmetic_as_released": _scales(0.3, 0.4, 0.5, 0.6, 0.75),
    "metagpt": ({},),
    "ties": (*_scales(1.0, 1.5, density=0.2), *_scales(1.0, 1.5, density=0.5), *_scales(1.0, density=1.0)),
    "dare": (*_scales(0.3, 0.5, 0.75, density=0.8), *_scales(0.3, 0.5, density=0.5)),
    "dare_ties": (*_scales(0.75, 1.0, 1.5, density=0.8), *_scales(0.75, 1.0, density=0.5)),
    "della": (*_scales(0.75, 1.1, 1.5, density=0.7), *_scales(0.75, 1.1, density=0.5)),
    "breadcrumbs": (
        *_scales(0.5, 1.0, drop_smallest=0.85),
        *_scales(0.3, 0.5, 0.75, drop_smallest=0.3),
    ),
    "magmax": _scales(0.5, 0.75, 1.0, 1.25),
    "fisher": tuple({"floor": floor} for floor in (1e-12, 1e-10, 1e-8, 1e-6)),
    "regmean": _REGMEAN,
    "regmean_plus": _REGMEAN,
    "wudi": tuple({"steps": steps} for steps in (30.0, 100.0, 300.0, 1000.0)),
    "tsv_m": _scales(0.5, 0.75, 1.0, 1.25, 1.5),
    "iso_c": _scales(0.75, 1.0, 1.5, 2.0, 3.0),
    "iso_cts": _scales(0.75, 1.0, 1.5, 2.0, 3.0),
    "learned": ({"initial": 0.3}, {"initial": 0.5}),
}


def candidates(method: str, preset: Preset) -> Sequence[Settings]:
    """List the settings that a merge method chooses from in a study.

    Raises:
        ValueError: there are none for this method.
    """
    chosen_by_preset: dict[str, Sequence[Settings]] = {
        "interpolation": [{"ratio": value} for value in preset.ratios],
        "arithmetic": [{"scale": value} for value in preset.scales],
    }
    return find({**CANDIDATES, **chosen_by_preset}, method, "merge method of the study")
