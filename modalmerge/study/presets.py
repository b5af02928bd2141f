"""Settings of a whole study, as functions that return them; the docstring says what to expect."""

import inspect
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modalmerge.data.scenes import SPLITS
from modalmerge.merge.methods import METHODS
from modalmerge.model import ARCHITECTURES, SIZES, ModalMergeConfig
from modalmerge.registry import find, unknown
from modalmerge.study.targets import BASIC_TARGETS, TARGETS
from modalmerge.train.settings import TrainSettings

# fields of the model's configuration that `Preset.model` may set, by their defaults; the others follow from the rest
_FOLLOWING = (
    "image_size", "max_text_length", "vocab_size", "experts", "heads", "num_answers", "answers", "num_classes",
    "classes",
)  # fmt: skip
_MODEL_FIELDS = {
    name: parameter.default
    for name, parameter in inspect.signature(ModalMergeConfig.__init__).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in _FOLLOWING
}

BASIC_METHODS = ("interpolation", "arithmetic")  # in every study
ALL = "all"  # in `methods`, `repairs`, `variants` or `tasks`: every one that there is
# what is done about naive merging, and to the recipe beside it, -> what is told of it
REPAIRS = {
    "aligned": "naive merging of experts that share no start, as they are and after their units were put in one order",
    "healed": "naive merging, then distilled from its experts",
    "continued": "naive merging, then pre-trained further at equal cost",
    "recipe-healed": "the recipe, distilled from its experts in the same way",
}
# other ways to merge the same experts by the paper's own mechanisms -> what is told of them
VARIANTS = {
    "naive-arithmetic": "naive merging by arithmetic: changes since the fresh weights that the experts share",
    "ancestor": "the recipe by arithmetic, with changes taken from an ancestor of the seed: its fresh weights",
    "used": "the recipe by interpolation, in the fusion layers of those experts alone that the task uses",
}
# what the very first weights are -> what is told of it
INITIALISATIONS = {
    "random": "fresh weights",
    "images": "a stand-in for BEiT: fresh weights that were trained to name what portraits show",
}
GRIDS = ("star", "cross")
# a study that is gone on with may have more of these
GROWING = (
    "random_seeds", "methods", "repairs", "variants", "keep_fractions", "architectures", "seed_fractions",
    "rate_factors", "initialisations", "set_methods", "finetuned", "finetuning_lengths", "length_tasks", "tasks",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Everything that decides the numbers of a study.

    Args:
        name: of the preset.
        size: model size, a key of `SIZES`.
        architecture: what is per modality in the experts' stage, a key of `ARCHITECTURES`.
        random_seeds: the study is repeated for each; the data are the same.
        data_seed: random seed of the embedded world.
        image_size: pixels per side.
        max_text_length: tokens, [CLS] and [SEP] included.
        num_scenes: how many scenes of each split are used.
        seed_fraction: share of the pre-training steps spent on the seed in the recipe, in (0, 1).
        pretraining: of the baseline and of the experts without a seed; the recipe's two stages share its steps.
        experts_rate_factor: factor on the learning rate when experts go on from a seed.
        finetuning: what is fine-tuned on, a key of `TARGETS` -> settings.
        ratios: vision shares that interpolation chooses from, on the validation split.
        scales: factors that modality arithmetic chooses from, on the validation split.
        num_predictions: test scenes whose predictions are shown.
        model: further fields of the model's configuration.
        methods: merge methods beside interpolation and arithmetic that the recipe's experts are merged with; `all`
            stands for every other one.
        repairs: what is done about naive merging, keys of `REPAIRS`; `all` stands for every one.
        keep_fractions: shares of what merging saves that may stay per modality, each in (0, 1], for the curve.
        healing: of models that are healed.
        continued_steps: of further pre-training with the settings of `healing`, as many as cost what healing costs.
        statistics_samples: pairs of the pre-training split that Grams, squared gradients and the like are taken on.
        architectures, seed_fractions, rate_factors: every combination is an expert set of its own, merged and compared
            with itself unmerged: what is per modality; share of the steps spent on the seed, in [0, 1), 0 for experts
            without one; factor on the learning rate of the experts. Where some name values, the recipe's stand for
            those that do not; where none does, there are no such sets.
        initialisations: what expert sets' first weights are, keys of `INITIALISATIONS`; another than `random` alone
            adds expert sets too. The models of every study start from fresh weights.
        images: of the first weights of `images`, on portraits, by classification.
        grid: `cross` for every combination, or `star`: each value beside the recipe's others alone. Each initialisation
            has the recipe's share of the seed and none in a star.
        set_methods: merge methods for expert sets, interpolation among them.
        variants: keys of `VARIANTS`, zero-shot; `all` stands for every one.
        finetuned: which of the methods, repairs and variants are fine-tuned on the tasks as well.
        finetuning_lengths: factors on the steps of fine-tuning, for curves; 1 is measured anyway.
        length_tasks: what those are for, among `tasks`.
        keeps_weights: whether finished jobs keep their models; else they go once no unfinished job needs them.
        gpus_per_job: how much of a GPU each job asks of a cluster for, in [0, 1]; 0 on CPUs.
        tasks: what the models are fine-tuned and measured on, keys of `finetuning`; `all` stands for every one. With
            more than one for each modality there is a forgetting sheet.
    """

    name: str
    size: str
    architecture: str
    random_seeds: tuple[int, ...]
    data_seed: int
    image_size: int
    max_text_length: int
    num_scenes: Mapping[str, int]
    seed_fraction: float
    pretraining: TrainSettings
    experts_rate_factor: float
    finetuning: Mapping[str, TrainSettings]
    ratios: tuple[float, ...]
    scales: tuple[float, ...]
    num_predictions: int
    model: Mapping[str, Any] = field(default_factory=dict)
    methods: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()
    keep_fractions: tuple[float, ...] = ()
    # On naive merging of `tiny` (27.4 recall on validation, one run) 60 steps at rates of 1e-3, 3e-3 and 5e-3 give
    # 64.6, 66.7 and 67.2, of further pre-training 63.0, 63.3 and 61.7.
    healing: TrainSettings = TrainSettings(num_steps=60, batch_size=64, learning_rate=3e-3, accelerator="cpu")
    continued_steps: int = 60  # a step of either costs about the same
    statistics_samples: int = 512
    architectures: tuple[str, ...] = ()
    seed_fractions: tuple[float, ...] = ()
    rate_factors: tuple[float, ...] = ()
    initialisations: tuple[str, ...] = ("random",)
    images: TrainSettings = TrainSettings(num_steps=300, batch_size=64, learning_rate=2e-3, accelerator="cpu")
    grid: str = "cross"
    set_methods: tuple[str, ...] = ("interpolation",)
    variants: tuple[str, ...] = ()
    finetuned: tuple[str, ...] = ()
    finetuning_lengths: tuple[float, ...] = ()
    length_tasks: tuple[str, ...] = BASIC_TARGETS
    keeps_weights: bool = True
    gpus_per_job: float = 0.0
    tasks: tuple[str, ...] = BASIC_TARGETS

    def __post_init__(self) -> None:
        find(SIZES, self.size, "model size")
        find(ARCHITECTURES, self.architecture, "architecture")
        if not self.random_seeds or len(set(self.random_seeds)) < len(self.random_seeds):
            raise ValueError(f"random_seeds must be distinct and at least one, got {list(self.random_seeds)}")
        if not all(0 <= random_seed < 2**32 for random_seed in self.random_seeds):
            raise ValueError(f"random_seeds must be in [0, 2**32), got {list(self.random_seeds)}")
        if not 0 < self.seed_fraction < 1:
            raise ValueError(f"seed_fraction must be in (0, 1), got {self.seed_fraction}")
        if not self.ratios or not self.scales:
            raise ValueError("ratios and scales must name at least one value each")
        if not self.experts_rate_factor > 0:
            raise ValueError(f"experts_rate_factor must be positive, got {self.experts_rate_factor}")
        if not 0 < self.seed_steps < self.pretraining.num_steps:
            raise ValueError(
                f"seed_fraction {self.seed_fraction} of {self.pretraining.num_steps} steps of pretraining leaves "
                f"{self.seed_steps} for the seed; it needs one at least, and so do the experts"
            )
        for target in self.finetuning:
            find(TARGETS, target, "task of finetuning")
        for key, value in self.model.items():
            default = find(_MODEL_FIELDS, key, "setting of the model")
            if type(value) is not type(default) and not (isinstance(default, float) and type(value) is int):
                raise ValueError(f"model.{key} must be {type(default).__name__}, got {value!r}")
        for split, count in self.num_scenes.items():
            most = find(SPLITS, split, "split")
            if not 1 <= count <= most:
                raise ValueError(f"num_scenes.{split} must be in [1, {most}], got {count}")
        missing = set(SPLITS) - set(self.num_scenes)
        if missing:
            raise ValueError(f"num_scenes lacks the split {min(missing)}")
        self._check_additions()

    def _check_additions(self) -> None:
        """Check what was added to the study, and spell out `all`."""
        further = tuple(name for name in METHODS if name not in BASIC_METHODS)
        lists = (
            ("methods", further, "further merge method"),
            ("repairs", tuple(REPAIRS), "repair"),
            ("variants", tuple(VARIANTS), "variant"),
            ("tasks", tuple(self.finetuning), "task of finetuning"),
        )
        for name, known, kind in lists:
            chosen = getattr(self, name)
            if ALL in chosen:
                object.__setattr__(self, name, known)
                continue
            for item in chosen:
                if item in BASIC_METHODS:
                    raise ValueError(f"{name}: {item} is in every study; leave it out")
                if item not in known:
                    raise unknown(item, (*known, ALL), kind)
            _check_distinct(name, chosen)
        added = (*self.methods, *self.repairs, *self.variants)
        for name in self.finetuned:
            if name not in added:
                raise ValueError(
                    f"finetuned: {name!r} is none of the study's methods, repairs and variants "
                    f"({', '.join(added) or 'there are none'}); add it there too"
                )
        _check_distinct("finetuned", self.finetuned)
        _check_distinct("keep_fractions", self.keep_fractions)
        if not all(0 < fraction <= 1 for fraction in self.keep_fractions):
            raise ValueError(f"keep_fractions must be in (0, 1], got {list(self.keep_fractions)}")
        _check_distinct("finetuning_lengths", tuple(f"{length:g}" for length in self.finetuning_lengths))
        _check_distinct("length_tasks", self.length_tasks)
        for target in self.length_tasks:
            find(TARGETS, target, "task of length_tasks")
        if not all(0 < length < math.inf and length != 1 for length in self.finetuning_lengths):
            raise ValueError(
                f"finetuning_lengths must be positive and not 1, which is measured anyway; got "
                f"{list(self.finetuning_lengths)}"
            )
        if not 0 <= self.gpus_per_job <= 1:
            raise ValueError(f"gpus_per_job must be in [0, 1], got {self.gpus_per_job}")
        if self.continued_steps < 1:
            raise ValueError(f"continued_steps must be at least 1, got {self.continued_steps}")
        if self.statistics_samples < 2:
            raise ValueError(f"statistics_samples must be at least 2, got {self.statistics_samples}")
        self._check_expert_sets()

    def _check_expert_sets(self) -> None:
        for name in ("architectures", "seed_fractions", "rate_factors"):
            _check_distinct(name, getattr(self, name))
        for architecture in self.architectures:
            find(ARCHITECTURES, architecture, "architecture")
        find(dict.fromkeys(GRIDS), self.grid, "grid")
        _check_distinct("initialisations", self.initialisations)
        for initialisation in self.initialisations:
            find(INITIALISATIONS, initialisation, "initialisation")
        if not self.initialisations:
            raise ValueError("initialisations must name at least one, got none")
        _check_distinct("set_methods", self.set_methods)
        for method in self.set_methods:
            find(METHODS, method, "merge method")
        if "interpolation" not in self.set_methods:
            raise ValueError(
                f"set_methods must hold interpolation, which others are compared with; got {list(self.set_methods)}"
            )
        total = self.pretraining.num_steps
        for fraction in self.seed_fractions:
            if not (fraction == 0 or (0 < fraction < 1 and 0 < round(fraction * total) < total)):
                raise ValueError(
                    f"seed_fractions must be 0 or leave a step for the seed and one for the experts, got {fraction} of "
                    f"{total} steps"
                )
        if not all(0 < factor < math.inf for factor in self.rate_factors):
            raise ValueError(f"rate_factors must be positive and finite, got {list(self.rate_factors)}")
        for expert_set in self.expert_sets:
            if not ARCHITECTURES[expert_set.architecture]:
                raise ValueError(f"architecture {expert_set.architecture} has no experts, so that no set can be merged")
        steps = [round(fraction * total) for fraction in self.seed_fractions]
        names = [expert_set.name for expert_set in self.expert_sets]
        if len(set(steps)) < len(steps) or len(set(names)) < len(names):
            raise ValueError(
                f"seed_fractions {list(self.seed_fractions)} and rate_factors {list(self.rate_factors)} are too "
                f"close to each other: some give the same steps (of {total}), or the same name (of six digits)"
            )

    @property
    def seed_steps(self) -> int:
        """Steps of seed pre-training in the recipe."""
        return round(self.seed_fraction * self.pretraining.num_steps)

    @property
    def expert_sets(self) -> tuple["ExpertSet", ...]:
        """The expert sets that are merged and compared with themselves unmerged."""
        if not (self.architectures or self.seed_fractions or self.rate_factors or self.initialisations != ("random",)):
            return ()
        own = ("random", self.architecture, self.seed_fraction, self.experts_rate_factor)  # the recipe's
        axes: tuple[tuple[Any, ...], ...] = (
            self.initialisations,
            self.architectures or own[1:2],
            self.seed_fractions or own[2:3],
            self.rate_factors or own[3:],
        )
        if self.grid == "cross":
            chosen: list[tuple[Any, ...]] = list(itertools.product(*axes))
        else:
            chosen = [own]
            for axis, values in enumerate(axes):
                chosen += [(*own[:axis], value, *own[axis + 1 :]) for value in values]
            chosen += [(initialisation, own[1], 0.0, own[3]) for initialisation in self.initialisations]
        return tuple(
            ExpertSet(initialisation=first, architecture=architecture, seed_fraction=fraction, rate_factor=factor)
            for first, architecture, fraction, factor in dict.fromkeys(chosen)
        )


@dataclass(frozen=True, kw_only=True)
class ExpertSet:
    """How the experts of one model came about; with a random seed, which ones they are.

    Args:
        architecture: what is per modality, a key of `ARCHITECTURES`.
        seed_fraction: share of the steps spent on the seed; 0 without one.
        rate_factor: factor on the learning rate of the experts.
        initialisation: what the first weights are, a key of `INITIALISATIONS`.
    """

    architecture: str
    seed_fraction: float
    rate_factor: float
    initialisation: str = "random"

    @property
    def name(self) -> str:
        """Short name, such as `attention-0.25-1`, or `images-attention-0.25-1`."""
        name = f"{self.architecture}-{self.seed_fraction:g}-{self.rate_factor:g}"
        return name if self.initialisation == "random" else f"{self.initialisation}-{name}"


def _check_distinct(name: str, values: tuple[Any, ...]) -> None:
    if len(set(values)) < len(values):
        raise ValueError(f"{name} must be distinct, got {list(values)}")


def _finetuning(accelerator: str) -> dict[str, TrainSettings]:
    """Return how models are fine-tuned on the embedded world.

    Chosen on validation by the baseline and by fresh weights alone, for what is learned and for what of it is owed to
    pre-training, within 40 s of a core. Layer decay decides for questions and pairs: at one rate for all layers what
    the lower ones knew is forgotten, and the baseline ends where fresh weights do.
    """

    def settings(num_steps: int, batch_size: int, learning_rate: float, **others: Any) -> TrainSettings:
        return TrainSettings(
            num_steps=num_steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            accelerator=accelerator,
            **others,
        )

    fused: dict[str, Any] = {"layer_decay": 0.5, "warmup_fraction": 0.05}
    return {
        "retrieval": settings(100, 64, 5e-4),
        "vqa": settings(520, 16, 1.5e-3, head_rate_factor=5.0, **fused),
        "nlvr2": settings(400, 32, 1.5e-3, head_rate_factor=2.0, **fused),
        "postcards": settings(100, 32, 1e-3),
        "segmentation": settings(80, 16, 1e-3, head_rate_factor=10.0, layer_decay=0.7),
        "classification": settings(60, 64, 1e-3, head_rate_factor=10.0),
    }


def tiny() -> Preset:
    """A study for two CPU cores: model size `nano` on the embedded world.

    Command: `modalmerge study tiny`; 10 to 12 minutes and 3.1 GB on two cores of an AMD EPYC, per random seed. With
    `--set tasks=all` about 10 minutes more.
    Expected zero-shot `recall_mean` (five random seeds): baseline 75.0, specific 73.9, naive 26.1, recipe 58.7
    (interpolation) and 57.1 (arithmetic); VQA after fine-tuning: baseline 64.1, from scratch 47.2; NLVR2 56.6 and 48.4.
    """
    return Preset(
        name="tiny",
        size="nano",
        architecture="specific",
        random_seeds=(0,),
        data_seed=0,
        image_size=72,
        max_text_length=24,
        num_scenes={"pretrain": 20000, "finetune": 8000, "validation": 1000, "test": 1000},
        seed_fraction=0.5,
        pretraining=TrainSettings(num_steps=900, batch_size=64, learning_rate=3.5e-3, accelerator="cpu"),
        experts_rate_factor=1.0,
        finetuning=_finetuning("cpu"),
        ratios=(0.3, 0.4, 0.5, 0.6, 0.7),
        scales=(0.3, 0.4, 0.5, 0.75, 1.0),
        num_predictions=8,
    )


def small() -> Preset:
    """A study for one GPU: eight layers of width 256 at 96 pixels, zero-shot on the full cross, in pieces.

    Command: `modalmerge study small --workers ray` (or `--workers 4`), or a piece on any machine, in any order:
    `modalmerge study small --piece 3/images -o runs/small-3-images`, then `modalmerge gather`.
    Time: a piece (one random seed, one initialisation) is 7,500 steps of pre-training (images: 6,900), made to end
    within 8 minutes with four jobs on one GPU; no GPU could be had to measure that, nor what to expect of it.
    The geometry of `tiny` is kept: patches of a third of the image.
    """

    def training(num_steps: int, learning_rate: float) -> TrainSettings:
        return TrainSettings(num_steps=num_steps, batch_size=256, learning_rate=learning_rate, accelerator="auto")

    return Preset(
        name="small",
        size="nano",
        architecture="specific",
        random_seeds=(0, 1, 2, 3, 4),
        data_seed=0,
        image_size=96,
        max_text_length=24,
        num_scenes={"pretrain": 40000, "finetune": 8000, "validation": 1000, "test": 1000},
        seed_fraction=0.5,
        pretraining=training(600, 2e-3),
        experts_rate_factor=1.0,
        finetuning=_finetuning("auto"),
        ratios=(0.3, 0.4, 0.5, 0.6, 0.7),
        scales=(0.3, 0.4, 0.5, 0.75, 1.0),
        num_predictions=8,
        model={
            "hidden_size": 256,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "fusion_start": 6,
            "patch_size": 32,
            "initializer_range": 0.06,
        },
        methods=(ALL,),
        variants=(ALL,),
        finetuned=("regmean",),
        healing=training(60, 2e-3),
        images=training(200, 1e-3),
        architectures=("specific", "attention", "ffn", "norms"),
        seed_fractions=(0.0, 0.25, 0.5, 0.75),
        initialisations=tuple(INITIALISATIONS),
        set_methods=("interpolation", "arithmetic", "regmean"),
        tasks=("retrieval", "vqa", "nlvr2", "postcards", "segmentation"),
        keeps_weights=False,
        gpus_per_job=0.25,
    )


PRESETS = {"tiny": tiny, "small": small}


def load_preset(name: str) -> Preset:
    """Return a preset by name.

    Raises:
        ValueError: unknown preset, with the nearest name.
    """
    return find(PRESETS, name, "preset")()
