"""The straight flow against this project's: the same losses and gradients, and how many tokens either evaluates."""

import micro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from modalmerge.bench.counting import counted, needed
from modalmerge.bench.straight import StraightFlow, straight_losses
from modalmerge.model import ARCHITECTURES, PRETRAINING_HEADS, ModalMergeModel, expert_map, size_config
from modalmerge.tasks import TASKS
from modalmerge.train.objectives import PretrainingBatch, pretraining_losses

torch.set_num_threads(1)

LAYERS, SHORTEST, LONGEST = 3, 2, 8
EXPERTS = {name: expert_map(name, LAYERS) for name in ARCHITECTURES}
EXPERTS["custom"] = [["ffn"], ["attention"], ["norms"]]
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.float64: (1e-12, 1e-9)}  # of losses; of gradients, relative


def make_model(experts, dtype, **changes):
    """A model none of whose parameters is zero."""
    changes = dict(heads=list(PRETRAINING_HEADS)) | changes
    config = micro.config(num_hidden_layers=LAYERS, experts=experts, **changes)
    torch.manual_seed(0)
    model = ModalMergeModel(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.to(dtype).train()


def make_batch(config, lengths, dtype, random_seed=0):
    """Pairs with texts of the given lengths, and wrong partners; of every text but the shortest words are hidden."""
    generator = torch.Generator().manual_seed(random_seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, config.vocab_size, mask.shape, generator=generator) * mask
    words = mask.bool() & (torch.arange(max(lengths)) > 0)
    chosen = words & (torch.rand(mask.shape, generator=generator) < 0.4)
    chosen[lengths.index(max(lengths)), 1] = True
    batch = PretrainingBatch(
        pixel_values=torch.randn(len(lengths), 3, *(config.image_size,) * 2, generator=generator).to(dtype),
        input_ids=ids,
        attention_mask=mask,
        masked_ids=torch.where(chosen, 4, ids),
        labels=torch.where(chosen, ids, -100),
    )
    steps = torch.randint(1, len(lengths), (2, len(lengths)), generator=generator)
    wrong_image, wrong_text = (torch.arange(len(lengths)) + steps) % len(lengths)
    return batch, (wrong_image, wrong_text)


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def assert_equal(model, losses, straight):
    """Compare losses, and gradients of every parameter by the norm of their difference."""
    of_losses, of_gradients = TOLERANCES[next(model.parameters()).dtype]
    assert losses.keys() == straight.keys()
    for name, value in straight.items():
        error, value = abs(losses[name].item() - value.item()), value.item()
        assert error <= of_losses * max(1, abs(value)), name
    wanted, found = gradients(model, straight["loss"]), gradients(model, losses["loss"])
    whole = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    assert whole > 0
    for name, gradient in wanted.items():
        # what cancels to nearly nothing, such as the bias of all answers, is known to rounding of the whole only
        allowed = of_gradients * (gradient.norm() + 1e-3 * whole)
        assert (found[name] - gradient).norm() <= allowed, name


def check_pretraining(model, lengths, random_seed=0):
    dtype = next(model.parameters()).dtype
    batch, negatives = make_batch(model.config, lengths, dtype, random_seed)
    losses = pretraining_losses(model, batch, generator=torch.Generator(), negatives=negatives)
    assert_equal(model, losses, straight_losses(model, batch, negatives=negatives))


@pytest.mark.parametrize(
    "fusion_start, dtype", [(2, torch.float32), (1, torch.float64), (2, torch.float64), (LAYERS, torch.float64)]
)
@pytest.mark.parametrize("early_attention", ["separate", "joint"])
@pytest.mark.parametrize("experts", EXPERTS)
def test_pretraining_is_the_straight_flow(experts, early_attention, fusion_start, dtype):
    model = make_model(EXPERTS[experts], dtype, early_attention=early_attention, fusion_start=fusion_start)
    check_pretraining(model, [5, LONGEST, SHORTEST, 3])


MODELS = {name: make_model(experts, torch.float64) for name, experts in EXPERTS.items()}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(MODELS)),
    lengths=st.lists(st.integers(SHORTEST, LONGEST), min_size=2, max_size=5),
    random_seed=st.integers(0, 2**20),
)
def test_any_lengths_give_the_straight_flow(name, lengths, random_seed):
    check_pretraining(MODELS[name], lengths, random_seed)


# -- fine-tuning: every sample passes of its own ---------------------------------------------------------------------


def vqa_logits(flow, batch):
    hidden = flow.joint(batch["input_ids"], batch["attention_mask"], batch["pixel_values"][batch["owner"]])
    return flow.model.head("vqa")(flow.model.head("pooler")(hidden[:, 0]))


def vqa(flow, batch):
    logits, targets = vqa_logits(flow, batch), batch["targets"].to(batch["pixel_values"].dtype)
    return functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(logits)


def nlvr2(flow, batch):
    firsts = [
        flow.joint(batch["input_ids"], batch["attention_mask"], batch["pixel_values"][:, place], token_type=1 + place)
        for place in (0, 1)
    ]
    pooled = torch.cat([flow.model.head("pooler")(hidden[:, 0]) for hidden in firsts], 1)
    return functional.cross_entropy(flow.model.head("nlvr2")(pooled), batch["labels"])


def retrieval(flow, batch):
    head, every, real = flow.model.head("contrastive"), range(LAYERS), batch["attention_mask"].bool()
    text = flow.model.norm(flow.alone("text", flow.embed_text(batch["input_ids"]), real, every))
    image = flow.model.norm(flow.alone("vision", flow.embed_image(batch["pixel_values"]), None, every))
    scores = head.logit_scale.exp() * head.project(image[:, 0], "vision") @ head.project(text[:, 0], "text").T
    target = torch.arange(len(scores))
    return (functional.cross_entropy(scores, target) + functional.cross_entropy(scores.T, target)) / 2


def classification(flow, batch):
    states = flow.alone("vision", flow.embed_image(batch["pixel_values"]), None, range(LAYERS))
    return functional.cross_entropy(flow.model.head("classification")(states.mean(1)), batch["labels"])


TASK_LOSSES = {"vqa": vqa, "nlvr2": nlvr2, "retrieval": retrieval, "classification": classification}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("early_attention", ["separate", "joint"])
@pytest.mark.parametrize("architecture", ["agnostic", "specific"])
@pytest.mark.parametrize("task", TASK_LOSSES)
def test_finetuning_is_full_padded_passes(task, architecture, early_attention, dtype):
    classes = {"vqa": "num_answers", "classification": "num_classes"}
    model = make_model(
        EXPERTS[architecture],
        dtype,
        early_attention=early_attention,
        fusion_start=2,
        heads=list(TASKS[task].heads),
        num_token_types=3,
        **({classes[task]: len(micro.COLOURS)} if task in classes else {}),
    )
    batch = micro.data(task).train_batch(torch.tensor([1, 4, 6]), torch.Generator().manual_seed(0))
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    if task in ("nlvr2", "retrieval"):  # those texts are of equal length
        batch["attention_mask"][1, 3:] = 0
        batch["input_ids"][1, 3:] = 0
    straight = {"loss": TASK_LOSSES[task](StraightFlow(model), batch)}
    assert_equal(model, {"loss": TASKS[task].loss(model, batch)}, straight)


# -- what either evaluates -------------------------------------------------------------------------------------------


def narrow_model(architecture="specific"):
    """Layers, experts and tokens of the sizes vit-tiny and base, the rest as narrow as it may be."""
    config = size_config(
        "base", architecture=architecture, hidden_size=4, num_attention_heads=1, ffn_size=4, vocab_size=100,
        drop_path=0.0,
    )  # fmt: skip
    return ModalMergeModel(config).train()


def test_the_straight_flow_makes_the_passes_of_the_authors_code():
    """The counts are those of their classes, seen by hooks on every block: 76 calls, 94,800 and 22,752 block-tokens."""
    model = narrow_model()
    batch, negatives = make_batch(model.config, [40] * 8, torch.float32)
    flow = StraightFlow(model)
    with torch.no_grad():
        flow.losses(batch, negatives=negatives)
    assert (flow.counts.calls, flow.counts.tokens, flow.counts.feed_forward) == (76, 94_800 + 22_752, 117_552)


@pytest.mark.parametrize("lengths", [[40] * 8, [8, 8, 9, 11, 20, 40], [2, 3]], ids=str)
@pytest.mark.parametrize("architecture", ["specific", "ffn"])
def test_no_position_is_wasted(architecture, lengths):
    """44,912 is what their classes evaluate where the layers before the fusion see each image and text once."""
    model = narrow_model(architecture)
    batch, negatives = make_batch(model.config, lengths, torch.float32)
    with counted(model) as counts, torch.no_grad():
        pretraining_losses(model, batch, generator=torch.Generator(), negatives=negatives)
    num_hidden = (batch.labels >= 0).sum(1).tolist()
    least = needed(model.config, lengths=lengths, num_hidden=num_hidden, wrong_text=negatives[1].tolist())
    assert (counts.tokens, counts.feed_forward) == (least.tokens, least.feed_forward)
    assert counts.calls <= 76 / 2 and (counts.tokens == 44_912 or lengths != [40] * 8)


def test_counting_ends_with_its_block():
    model = narrow_model()
    batch, negatives = make_batch(model.config, [40, 30], torch.float32)
    with counted(model) as counts:
        pass
    with torch.no_grad():
        pretraining_losses(model, batch, generator=torch.Generator(), negatives=negatives)
    assert (counts.calls, counts.tokens, counts.feed_forward) == (0, 0, 0)


def test_recomputing_changes_no_number():
    model = make_model(EXPERTS["specific"], torch.float64)
    batch, negatives = make_batch(model.config, [5, 3], torch.float64)
    plain = gradients(model, straight_losses(model, batch, negatives=negatives)["loss"])
    again = gradients(model, straight_losses(model, batch, negatives=negatives, recompute=True)["loss"])
    assert all(torch.equal(plain[name], again[name]) for name in plain)
