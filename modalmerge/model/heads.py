"""What sits on top of the transformer: projections, classifiers, the word predictor. Shared, never merged."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from modalmerge.model.configuration import ModalMergeConfig

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
    """Two-layer classifier on the pooled state, twice as wide inside."""

    def __init__(self, config: ModalMergeConfig, num_classes: int) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.norm = nn.LayerNorm(2 * config.hidden_size)  # torch's epsilon, as the authors have it
        self.decoder = nn.Linear(2 * config.hidden_size, num_classes)

    def forward(self, pooled: Float[Tensor, " B D"]) -> Float[Tensor, " B classes"]:
        return self.decoder(functional.gelu(self.norm(self.dense(pooled))))


def build_heads(config: ModalMergeConfig) -> nn.ModuleDict:
    """Build the heads that `config.heads` names."""
    makers = {
        "pooler": lambda: Pooler(config),
        "contrastive": lambda: Contrastive(config),
        "joint_contrastive": lambda: Contrastive(config),
        "matching": lambda: nn.Linear(config.hidden_size, 2),
        "masked_language": lambda: MaskedLanguage(config),
        "vqa": lambda: Classifier(config, config.num_answers),
    }
    return nn.ModuleDict({name: makers[name]() for name in makers if name in config.heads})
