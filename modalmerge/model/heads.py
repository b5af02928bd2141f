"""What sits on top of the transformer: projections, classifiers, the word predictor. Shared, never merged."""

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

from modalmerge.model.configuration import ModalMergeConfig

AUXILIARY_CHANNELS = 256  # BEiT's
INITIAL_TEMPERATURE = 0.07  # of the contrastive similarities, as in CLIP and the authors' code


class Pooler(nn.Module):
    """Linear map and tanh of the first token's state."""

    def __init__(self, config: ModalMergeConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first: Float[Tensor, " B D"]) -> Float[Tensor, " B D"]:
        return torch.tanh(self.dense(first))


class Contrastive(nn.Module):
    """Project texts and images into one space; `logit_scale` is the logarithm of the inverse temperature."""

    def __init__(self, config: ModalMergeConfig) -> None:
        super().__init__()
        self.text = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.vision = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.reset_logit_scale()

    def reset_logit_scale(self) -> None:
        nn.init.constant_(self.logit_scale, math.log(1 / INITIAL_TEMPERATURE))

    def project(self, state: Float[Tensor, " B D"], modality: str) -> Float[Tensor, " B D"]:
        """Return unit vectors of a normed first-token state; `modality` is `text` or `vision`."""
        return functional.normalize(getattr(self, modality)(state), dim=-1)


class MaskedLanguage(nn.Module):
    """BERT's word predictor; its word matrix is not tied to the embeddings, as the authors have it."""

    def __init__(self, config: ModalMergeConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=1e-12)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden: Float[Tensor, " *tokens D"]) -> Float[Tensor, " *tokens V"]:
        return self.decoder(self.norm(functional.gelu(self.dense(hidden))))


class Classifier(nn.Module):
    """Two-layer classifier on the pooled states of one passage or of two, twice as wide as the model inside."""

    def __init__(self, config: ModalMergeConfig, num_classes: int, *, num_passages: int = 1) -> None:
        super().__init__()
        self.dense = nn.Linear(num_passages * config.hidden_size, 2 * config.hidden_size)
        self.norm = nn.LayerNorm(2 * config.hidden_size)  # torch's epsilon, as the authors have it
        self.decoder = nn.Linear(2 * config.hidden_size, num_classes)

    def forward(self, pooled: Float[Tensor, " B inputs"]) -> Float[Tensor, " B classes"]:
        return self.decoder(functional.gelu(self.norm(self.dense(pooled))))


class Segmentation(nn.Module):
    """UPerNet on image tokens of four layers, and a plain convolutional head on those of the third for training.

    The four are brought to strides of a quarter, a half, one and two patches: 4, 8, 16 and 32 pixels at a patch of 16.

    Source: BEiT (arXiv 2106.08254) with UPerNet (arXiv 1807.10221). Departures: no dropout before the classifiers, and
        batch norms see one device.
    """

    def __init__(self, config: ModalMergeConfig) -> None:
        super().__init__()
        size, channels = config.hidden_size, config.segmentation_channels
        finest = OrderedDict(first=_double(size), norm=nn.BatchNorm2d(size), gelu=nn.GELU(), second=_double(size))
        self.scales = nn.ModuleList([nn.Sequential(finest), _double(size), nn.Identity(), nn.MaxPool2d(2)])
        settings = UperNetConfig(
            hidden_size=channels, pool_scales=[1, 2, 3, 6], auxiliary_channels=min(AUXILIARY_CHANNELS, channels)
        )
        settings.num_labels = config.num_classes
        self.decoder = UperNetHead(settings, [size] * 4)
        self.auxiliary = UperNetFCNHead(settings, [size] * 4)  # its input is the third

    def pyramid(self, states: Sequence[Float[Tensor, " B T D"]]) -> list[Float[Tensor, " B D _ _"]]:
        """Lay the image tokens of four layers, [CLS] left out, on grids of four sizes, the finest first."""
        side = math.isqrt(states[0].shape[1])
        grids = (state.transpose(1, 2).unflatten(2, (side, side)) for state in states)
        return [scale(grid) for scale, grid in zip(self.scales, grids, strict=True)]


def _double(size: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(size, size, 2, 2)


def build_heads(config: ModalMergeConfig) -> nn.ModuleDict:
    """Build the heads that `config.heads` names."""
    makers = {
        "pooler": lambda: Pooler(config),
        "contrastive": lambda: Contrastive(config),
        "joint_contrastive": lambda: Contrastive(config),
        "matching": lambda: nn.Linear(config.hidden_size, 2),
        "masked_language": lambda: MaskedLanguage(config),
        "vqa": lambda: Classifier(config, config.num_answers),
        "nlvr2": lambda: Classifier(config, 2, num_passages=2),
        "segmentation": lambda: Segmentation(config),
        "classification": lambda: nn.Linear(config.hidden_size, config.num_classes),
    }
    return nn.ModuleDict({name: makers[name]() for name in makers if name in config.heads})
