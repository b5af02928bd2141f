"""What a modality-specific transformer looks like: sizes, and which parts every modality has for itself."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from modalmerge.registry import find
from modalmerge.registry import unknown as unknown_name

MODALITIES = ("vision", "text", "joint")

# A component is what a layer can hold once per modality; its value is the modules it covers.
COMPONENTS: dict[str, tuple[str, ...]] = {
    "attention": ("norm1", "attention"),
    "ffn": ("norm2", "ffn"),
    "norms": ("norm1", "norm2"),
}

# Named architectures: the components that every layer has per modality (the paper's names in brackets).
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "agnostic": (),  # modality-agnostic, "full sharing", the authors' `ufo`
    "attention": ("attention",),  # "custom attention"
    "ffn": ("ffn",),  # "custom FFN"
    "norms": ("norms",),  # "custom LN"
    "specific": ("attention", "ffn"),  # modality-specific, "no sharing", the authors' `all_moe`
}

HEADS = (
    "pooler", "contrastive", "joint_contrastive", "matching", "masked_language", "vqa", "nlvr2", "segmentation",
    "classification",
)  # fmt: skip
PRETRAINING_HEADS = ("pooler", "contrastive", "joint_contrastive", "matching", "masked_language")

# Model sizes by name; image and vocabulary sizes come from the data.
SIZES: dict[str, dict[str, Any]] = {
    "nano": dict(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        fusion_start=3,
        patch_size=24,
        drop_path=0.0,
        layer_scale=1.0,  # BEiT's 0.1 is for depth; with it four layers learn four times slower
        position_initializer_range=1.0,  # large enough that heads tell positions apart from the first step
        initializer_range=0.1,  # about 1 / sqrt(hidden_size); 0.02 is that for a width of 2,500
    ),
    "vit-tiny": dict(hidden_size=192, num_hidden_layers=12, num_attention_heads=3, fusion_start=10, patch_size=16),
    "small": dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, fusion_start=10, patch_size=16),
    "base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, fusion_start=10, patch_size=16),
    "large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, fusion_start=21, patch_size=16),
}


def expert_map(architecture: str, num_layers: int) -> list[list[str]]:
    """Spell a named architecture out as the map layer -> components that are per modality.

    Raises:
        ValueError: `architecture` is none of `ARCHITECTURES`.
    """
    components = find(ARCHITECTURES, architecture, "architecture")
    return [list(components) for _ in range(num_layers)]


def architecture_name(experts: Sequence[Sequence[str]]) -> str:
    """Name the architecture that an expert map spells out, or `custom` where layers or components differ."""
    first = tuple(experts[0])
    if any(tuple(layer) != first for layer in experts):
        return "custom"
    return next((name for name, parts in ARCHITECTURES.items() if set(parts) == set(first)), "custom")


class ModalMergeConfig(PretrainedConfig):
    """Sizes and sharing of one model; saved as `config.json` beside the weights.

    Args:
        hidden_size: width of every token, a multiple of `num_attention_heads`.
        num_hidden_layers: number of blocks.
        num_attention_heads: heads per block.
        ffn_size: inner width of the feed-forward network; 0 means four times `hidden_size`.
        image_size: pixels per side, a multiple of `patch_size`.
        patch_size: pixels per side of one image token.
        vocab_size: rows of the word table.
        max_text_length: longest text in tokens, [CLS] and [SEP] included.
        text_position_range: longest text that the position table has rows for; VLMo and the authors: 196.
        num_token_types: rows of the token-type table; 0 text, 1 image, 2 the second image of a pair (`nlvr2`).
        fusion_start: first layer in which text and image tokens attend to each other and the joint expert
            works; `num_hidden_layers` means never.
        experts: for every layer the components (`COMPONENTS`) that each modality has for itself.
        early_attention: `separate`: before `fusion_start` a modality attends to itself only; `joint`: text
            and image tokens attend to each other from the first layer, each through its own experts.
        layer_scale: initial value of the factor on each residual branch (BEiT's gamma).
        drop_path: largest stochastic-depth rate; it grows linearly from 0 at the first layer.
        layer_norm_eps: of the blocks and the final norm.
        heads: which of `HEADS` exist.
        num_answers: classes of the `vqa` head; 0 without it.
        initializer_range: standard deviation of the initial weights.
        position_initializer_range: standard deviation of the initial position table; 0 in the source. From 0 an entry
            moves by at most the learning rate in a step, so that order is learned late in a short training.
        answers: the answer of each class of the `vqa` head, or none; the model itself does not read them.
        num_classes: classes of the `segmentation` or `classification` head; 0 without them.
        classes: the name of each of them, or none; the model itself does not read them.
        segmentation_blocks: four layers whose states the `segmentation` head reads, ascending from 0, one may come
            twice; () means those at a third, a half, two thirds and the end (BEiT's 3, 5, 7, 11 of 12).
        segmentation_channels: width of the `segmentation` head; 0 means `hidden_size` as in BEiT, but a quarter of
            it below 384, where the head would take more time than the layers.

    Raises:
        ValueError: a size that does not fit another, an unknown component, head or key.
    """

    model_type = "modalmerge"

    def __init__(
        self,
        *,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        ffn_size: int = 0,
        image_size: int = 224,
        patch_size: int = 16,
        vocab_size: int = 30522,
        max_text_length: int = 40,
        text_position_range: int = 196,
        num_token_types: int = 2,
        fusion_start: int = 10,
        experts: Sequence[Sequence[str]] | None = None,
        early_attention: str = "separate",
        layer_scale: float = 0.1,
        drop_path: float = 0.1,
        layer_norm_eps: float = 1e-6,
        heads: Sequence[str] = PRETRAINING_HEADS,
        num_answers: int = 0,
        answers: Sequence[str] = (),
        num_classes: int = 0,
        classes: Sequence[str] = (),
        segmentation_blocks: Sequence[int] = (),
        segmentation_channels: int = 0,
        initializer_range: float = 0.02,
        position_initializer_range: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.ffn_size = ffn_size or 4 * hidden_size
        self.image_size = image_size
        self.patch_size = patch_size
        self.vocab_size = vocab_size
        self.max_text_length = max_text_length
        self.text_position_range = text_position_range
        self.num_token_types = num_token_types
        self.fusion_start = fusion_start
        self.experts = [sorted(layer) for layer in (experts or [[] for _ in range(num_hidden_layers)])]
        self.early_attention = early_attention
        self.layer_scale = layer_scale
        self.drop_path = drop_path
        self.layer_norm_eps = layer_norm_eps
        self.heads = list(heads)
        self.num_answers = num_answers
        self.answers = list(answers)
        self.num_classes = num_classes
        self.classes = list(classes)
        self.segmentation_blocks = list(segmentation_blocks or _spread(num_hidden_layers))
        self.segmentation_channels = segmentation_channels or (
            hidden_size if hidden_size >= 384 else -(-hidden_size // 4)
        )
        self.initializer_range = initializer_range
        self.position_initializer_range = position_initializer_range
        self._check(kwargs)
        super().__init__(**kwargs)

    def _check(self, left_over: Mapping[str, Any]) -> None:
        unknown = sorted(set(left_over) - _TRANSFORMERS_KEYS)
        if unknown:
            raise unknown_name(unknown[0], _OWN_KEYS, "key of the model configuration")
        for key in _POSITIVE:
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        if len(self.experts) != self.num_hidden_layers:
            raise ValueError(f"experts names {len(self.experts)} layers, the model has {self.num_hidden_layers}")
        for layer, components in enumerate(self.experts):
            for component in components:
                find(COMPONENTS, component, f"component of experts in layer {layer}")
        if not 0 < self.fusion_start <= self.num_hidden_layers:
            raise ValueError(f"fusion_start must be in [1, {self.num_hidden_layers}], got {self.fusion_start}")
        if self.early_attention not in ("separate", "joint"):
            raise ValueError(f"early_attention must be 'separate' or 'joint', got {self.early_attention!r}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), got {self.drop_path}")
        if self.max_text_length > self.text_position_range:
            raise ValueError(
                f"max_text_length {self.max_text_length} is above text_position_range "
                f"{self.text_position_range}, the longest text the position table has rows for"
            )
        for head in self.heads:
            if head not in HEADS:
                raise unknown_name(head, HEADS, "head")
        self._check_tasks()

    def _check_tasks(self) -> None:
        if ("vqa" in self.heads) != (self.num_answers > 0):
            raise ValueError(f"num_answers must be positive with the vqa head and 0 without it: {self.num_answers}")
        if bool({"segmentation", "classification"} & set(self.heads)) != (self.num_classes > 0):
            raise ValueError(
                "num_classes must be positive with the segmentation or classification head and 0 without them: "
                f"{self.num_classes}"
            )
        for key in ("answers", "classes"):
            names, number = getattr(self, key), getattr(self, f"num_{key}")
            if names and len(names) != number:
                raise ValueError(f"{len(names)} {key} are named, num_{key} is {number}")
        if "nlvr2" in self.heads and self.num_token_types < 3:
            raise ValueError(
                f"num_token_types must be at least 3 with the nlvr2 head, got {self.num_token_types}: the second image "
                "of a pair has a type of its own"
            )
        if "segmentation" in self.heads:
            self._check_segmentation()

    def _check_segmentation(self) -> None:
        blocks = self.segmentation_blocks
        if len(blocks) != 4 or blocks != sorted(blocks) or not 0 <= blocks[0] <= blocks[-1] < self.num_hidden_layers:
            raise ValueError(
                f"segmentation_blocks must be four ascending layers in [0, {self.num_hidden_layers - 1}], got {blocks}"
            )
        if self.segmentation_channels < 1:
            raise ValueError(f"segmentation_channels must be at least 1, got {self.segmentation_channels}")
        if self.grid_size < 2:
            raise ValueError(
                f"segmentation needs at least 2 patches per side: image_size {self.image_size}, patch_size "
                f"{self.patch_size}"
            )
        if self.num_classes > 255:
            raise ValueError(
                f"num_classes must be at most 255 with the segmentation head, got {self.num_classes}: masks hold one "
                "byte, of which 255 is for pixels without a class"
            )

    @property
    def grid_size(self) -> int:
        """Image tokens per side, without [CLS]."""
        return self.image_size // self.patch_size

    @property
    def num_image_tokens(self) -> int:
        """Image tokens with [CLS]."""
        return self.grid_size**2 + 1

    def modalities(self, layer: int) -> tuple[str, ...]:
        """Modalities that have experts in `layer`: vision and text, joint too from `fusion_start` on."""
        return MODALITIES if layer >= self.fusion_start else MODALITIES[:2]

    def parts(self, layer: int) -> frozenset[str]:
        """Modules of `layer` (norm1, attention, norm2, ffn) that each modality has for itself."""
        return frozenset(part for component in self.experts[layer] for part in COMPONENTS[component])


def _spread(num_layers: int) -> list[int]:
    """Choose the layers at a third, a half, two thirds and the end of the depth."""
    return [max(1, num_layers // 3) - 1, max(1, num_layers // 2) - 1, -(-2 * num_layers // 3) - 1, num_layers - 1]


# asked of the signature, which stays the same when a shape checker wraps the function
_OWN_KEYS = tuple(
    name
    for name, parameter in inspect.signature(ModalMergeConfig.__init__).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
)
_POSITIVE = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_size", "image_size", "patch_size",
    "vocab_size", "max_text_length", "num_token_types",
)  # fmt: skip
# Whatever transformers itself writes into or reads from a config.json.
_TRANSFORMERS_KEYS = set(PretrainedConfig().to_dict()) | {
    "architectures", "transformers_version", "model_type", "torch_dtype", "dtype", "name_or_path",
    "attn_implementation", "_attn_implementation", "return_dict", "output_hidden_states", "_commit_hash",
    "use_cache", "output_attentions",
}  # fmt: skip


def change_config(config: ModalMergeConfig, **changes: Any) -> ModalMergeConfig:
    """Return a new configuration with some fields changed, checked like any other.

    Raises:
        ValueError: an unknown key, or a value that does not fit the others.
    """
    return ModalMergeConfig(**{**{key: getattr(config, key) for key in _OWN_KEYS}, **changes})


def size_config(size: str, **changes: Any) -> ModalMergeConfig:
    """Build the configuration of a named size; keyword arguments replace its fields.

    `architecture` may be given instead of `experts`.

    Raises:
        ValueError: unknown size or architecture.
    """
    fields = {**find(SIZES, size, "model size"), **changes}
    architecture = fields.pop("architecture", None)
    if architecture is not None:
        fields["experts"] = expert_map(architecture, fields["num_hidden_layers"])
    return ModalMergeConfig(**fields)
