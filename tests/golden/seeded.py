"""Draw weights, inputs and Grams from names alone: what the golden files in this folder were made with.

Their numbers are what the code released with arXiv 2304.14933 (vl-merging 13c3041) computes on these weights
and inputs, on a CPU in float32, in eval mode without dropout. Only torch is imported.
"""

import math
import zlib

import torch

# ------------------------------------------------------------------ name-seeded weights
GAMMA0, SCALE0 = 0.1, math.log(1 / 0.07)


def is_norm_weight(name):
    return name.endswith(".weight") and (
        "norm" in name.lower() or name in ("vqa_classifier.1.weight", "nlvr2_classifier.1.weight")
    )


def seeded_tensor(name, shape, salt=""):
    """float32 tensor that depends on (salt + name, shape) only."""
    if name in ("logit_scale", "logit_vl_scale"):
        return torch.full(tuple(shape), SCALE0, dtype=torch.float32)
    g = torch.Generator().manual_seed(zlib.crc32((salt + name).encode()))
    v = torch.randn(tuple(shape), generator=g, dtype=torch.float32) * 0.05
    if is_norm_weight(name):
        v = v + 1.0
    elif ".gamma_1" in name or ".gamma_2" in name:
        v = v + GAMMA0
    return v


@torch.no_grad()
def seed_weights(model, salt=""):
    """Every nn.Parameter gets seeded_tensor(name); buffers are left as the constructor made them."""
    for n, p in model.named_parameters():
        p.copy_(seeded_tensor(n, p.shape, salt))
    return model


# ------------------------------------------------------------------ deterministic inputs
PAD, CLS, SEP, MASK = 0, 1, 2, 3


def rand_images(n, size, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, size, size, generator=g) * 2 - 1


def rand_text(n, length, vocab, seed, lens=None):
    """[CLS]=1 w.. [SEP]=2 [PAD]=0 ; w in [5, vocab). Returns ids, masks, ids_mlm, labels_mlm (15% masked)."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, vocab, (n, length), generator=g)
    u = torch.rand(n, length, generator=g)
    if lens is None:
        lens = torch.randint(5, length + 1, (n,), generator=g).tolist()
    masks = torch.zeros(n, length, dtype=torch.long)
    for i in range(n):
        L = lens[i % len(lens)]
        masks[i, :L] = 1
        ids[i, 0], ids[i, L - 1] = CLS, SEP
        ids[i, L:] = PAD
    special = (ids == CLS) | (ids == SEP) | (ids == PAD)
    pick = (u < 0.15) & ~special
    pick[:, 1] = True  # at least one per row, always
    labels = torch.full_like(ids, -100)
    labels[pick] = ids[pick]
    ids_mlm = ids.clone()
    ids_mlm[pick] = MASK
    return ids, masks, ids_mlm, labels


VQA_LABELS = [[3, 7], [], [49], [0, 1, 2]]
VQA_SCORES = [[1.0, 0.3], [], [0.6], [0.3, 0.9, 1.0]]
NLVR2_ANSWERS = [True, False, False, True]
IMG_CLS_LABELS = [3, 0, 19, 7]
TEXT_LENS = [40, 12, 25, 7]


def make_batch(task="pretrain", n=4, size=64, vocab=1000, seed=1234, lens=TEXT_LENS, text_len=40):
    ids, masks, ids_mlm, labels_mlm = rand_text(n, text_len, vocab, seed + 1, lens)
    b = {
        "text_ids": ids,
        "text_masks": masks,
        "text_labels": torch.full_like(ids, -100),
        "text_ids_mlm": ids_mlm,
        "text_labels_mlm": labels_mlm,
    }
    if task == "nlvr2":
        b["image_0"] = [rand_images(n, size, seed)]
        b["image_1"] = [rand_images(n, size, seed + 2)]
        b["answers"] = [NLVR2_ANSWERS[i % 4] for i in range(n)]
        b["table_name"] = ["nlvr2_dev"] * n
    else:
        b["image"] = [rand_images(n, size, seed)]
    if task == "vqa":
        b["vqa_labels"] = [VQA_LABELS[i % 4] for i in range(n)]
        b["vqa_scores"] = [VQA_SCORES[i % 4] for i in range(n)]
    if task == "img_cls":
        b["class_label"] = torch.tensor([IMG_CLS_LABELS[i % 4] for i in range(n)])
    return b


def gram_batches(task, n_batches=8, n=16, size=64, vocab=1000):
    return [make_batch(task, n=n, size=size, vocab=vocab, seed=50000 + 100 * i, lens=None) for i in range(n_batches)]


def synthetic_grams(names, modules):
    """Exactly reproducible Grams: X ~ randn(2*d, d) float64 seeded by crc32('gram:'+name); G = X^T X.
    names: gram names; modules: name -> d"""
    out = {}
    for n in names:
        d = modules[n]
        g = torch.Generator().manual_seed(zlib.crc32(("gram:" + n).encode()))
        X = torch.randn(2 * d, d, generator=g, dtype=torch.float64)
        out[n] = X.T @ X
    return out


# ------------------------------------------------------------------ checksums
def checksum(t, k=8):
    """float64 sum, sum of squares, and k values at flat positions round(linspace(0, numel-1, k))"""
    f = t.detach().double().flatten()
    idx = [int(i) for i in torch.linspace(0, f.numel() - 1, k, dtype=torch.float64).round()] if f.numel() > 1 else [0]
    return {
        "shape": list(t.shape),
        "sum": f.sum().item(),
        "sumsq": (f * f).sum().item(),
        "at": [f[i].item() for i in idx],
    }
