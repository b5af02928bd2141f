import micro
import pytest
import torch
from torch.nn import functional

from modalmerge.data.arrays import to_pixel_values
from modalmerge.layouts import load_layout
from modalmerge.merge.procedures import passes
from modalmerge.merge.procedures.passes import collect_statistics, contrastive_terms, own_inputs, run_pairs
from modalmerge.merge.statistics import identify_tensors
from modalmerge.model import Prefix

torch.set_num_threads(1)


def model(architecture="specific", **changes):
    """A model whose parameters are all drawn, so that nothing is zero by chance."""
    made = micro.model(architecture, **{"num_hidden_layers": 3, "experts": [made_of(architecture)] * 3, **changes})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return made.eval()


def made_of(architecture):
    return {"specific": ["attention", "ffn"], "ffn": ["ffn"], "norms": ["norms"], "agnostic": []}[architecture]


def batch(num=6):
    """Pairs whose texts have 3 to 6 tokens."""
    data = micro.pairs(num)
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor([3, 6, 4, 5, 3, 4] * 4)[:num]
    mask = (torch.arange(6) < lengths[:, None]).long()
    words = torch.randint(5, len(micro.TOKENIZER), mask.shape, generator=generator)
    return {"pixel_values": to_pixel_values(data.images), "input_ids": words * mask, "attention_mask": mask}


def by_hand(made, pair):
    """Run one pair without padding through plain formulas; yields (expert, input, rows) of every linear layer."""
    real = pair["attention_mask"].bool()
    ids = pair["input_ids"][real][None]
    text, image = made.begin_text(ids).hidden, made.begin_image(pair["pixel_values"]).hidden
    start, num_layers = made.config.fusion_start, made.config.num_hidden_layers
    early = {}
    for modality, hidden in (("text", text), ("vision", image)):
        for index in range(num_layers):
            if index == start:
                early[modality] = hidden
            hidden = yield from layer_by_hand(made, index, modality, hidden, length(modality, ids))
        early.setdefault(modality, hidden)
    hidden = torch.cat([early["text"], early["vision"]], 1)
    for index in range(start, num_layers):
        hidden = yield from layer_by_hand(made, index, "joint", hidden, (ids.shape[1], True))


def length(modality, ids):
    return (ids.shape[1], False) if modality == "text" else (0, True)


def layer_by_hand(made, index, modality, hidden, seen):
    layer = made.layers[index]
    (bias,) = made.position_bias(range(index, index + 1), text_length=seen[0], image=seen[1])
    attention, ffn = layer.expert("attention", modality), layer.expert("ffn", modality)
    normed = layer.expert("norm1", modality)(hidden)
    yield modality, f"layers.{index}.attention.qkv", normed
    heads = (layer.num_heads, -1)
    query, key, value = (x[None].unflatten(2, heads).transpose(1, 2) for x in attention(normed[0])[0].chunk(3, 1))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + bias
    attended = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    yield modality, f"layers.{index}.attention.output", attended
    hidden = hidden + layer.attention_scale * attention.output(attended)
    normed = layer.expert("norm2", modality)(hidden)
    yield modality, f"layers.{index}.ffn.fc1", normed
    inner = functional.gelu(ffn.fc1(normed))
    yield modality, f"layers.{index}.ffn.fc2", inner
    return hidden + layer.ffn_scale * ffn.fc2(inner)


@torch.no_grad()
def grams_by_hand(made, pairs, components=("attention", "ffn")):
    grams, counts = {}, {}
    for number in range(len(pairs["input_ids"])):
        pair = {name: values[number : number + 1] for name, values in pairs.items()}
        for expert, name, rows in by_hand(made, pair):
            if name.split(".")[2] in components:
                rows = rows[0].double()
                grams[expert, name] = grams.get((expert, name), 0) + rows.T @ rows
                counts[expert, name] = counts.get((expert, name), 0) + len(rows)
    return grams, counts


def check(found, counts, wanted, wanted_counts):
    assert set(found) == set(wanted) and counts == wanted_counts
    for key, matrix in wanted.items():
        norms = matrix.diag().sqrt()
        assert ((found[key].double() - matrix).abs() <= 2e-6 * norms[:, None] * norms).all(), key


# -- which modules ------------------------------------------------------------------------------------------


def test_every_experts_linear_input_is_found():
    inputs = own_inputs(model())
    assert inputs["layers.0.attention.vision"] == ("vision", "layers.0.attention.qkv")
    assert inputs["layers.2.ffn.joint.fc2"] == ("joint", "layers.2.ffn.fc2")
    assert len(inputs) == 4 * (2 + 3 + 3) == len(set(inputs.values()))
    layout = load_layout("modalmerge")
    names = [name for name in model().state_dict() if layout.linear_input(layout.place(name).merged)]
    assert {(layout.place(n).expert, layout.linear_input(layout.place(n).merged)) for n in names} == {*inputs.values()}


def test_shared_parts_have_none():
    inputs = own_inputs(model("ffn"))
    assert {name.split(".")[2] for name in inputs} == {"ffn"} and len(inputs) == 2 * 8
    assert own_inputs(model("norms")) == own_inputs(model("agnostic")) == {}


# -- Gram matrices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture, changes",
    [
        ("specific", {}),
        ("specific", {"fusion_start": 3}),
        ("ffn", {}),
        ("specific", {"num_attention_heads": 4, "drop_path": 0.5}),
    ],
)
def test_grams_are_those_of_each_experts_own_tokens(architecture, changes):
    made, pairs = model(architecture, **changes).train(), batch()
    done = []
    batches = [{name: values[part] for name, values in pairs.items()} for part in (slice(0, 4), slice(4, 6))]
    found = collect_statistics(made, batches, report=done.append)
    made.eval()
    wanted, counts = grams_by_hand(made, pairs, made_of(architecture))
    check(found.grams, found.num_tokens, wanted, counts)
    num_words, num_patches = int(pairs["attention_mask"].sum()), 6 * made.config.num_image_tokens
    expected = {"text": num_words, "vision": num_patches, "joint": num_words + num_patches}
    assert all(count == expected[expert] for (expert, _), count in found.num_tokens.items())
    assert done == [4, 6] and found.num_samples == 6 and found.fisher == {}
    assert found.model == identify_tensors(made.state_dict())
    assert not any(module._forward_pre_hooks for module in made.modules())


def test_the_training_mode_and_the_gradients_stay_as_they_are():
    made = model().train()
    collect_statistics(made, [batch()], fisher=contrastive_terms)
    assert made.training and all(parameter.grad is None for parameter in made.parameters())


def test_experts_that_attend_to_each_other_early_are_counted_alone_and_together():
    made, pairs = model(early_attention="joint"), batch()
    found = collect_statistics(made, [pairs])
    num_words, num_patches = int(pairs["attention_mask"].sum()), 6 * made.config.num_image_tokens
    assert found.num_tokens["text", "layers.0.ffn.fc1"] == 2 * num_words
    assert found.num_tokens["vision", "layers.0.ffn.fc1"] == 2 * num_patches
    assert found.num_tokens["text", "layers.1.ffn.fc1"] == num_words
    assert found.num_tokens["joint", "layers.1.ffn.fc1"] == num_words + num_patches
    with torch.no_grad():
        text = made.begin_text(pairs["input_ids"], pairs["attention_mask"])
        text, image = made.begin_joint(text, made.begin_image(pairs["pixel_values"]))
        rows = made.layers[1].expert("norm1", "joint")(torch.cat([text.hidden, image.hidden], 1))
        real = torch.cat([pairs["attention_mask"].bool(), torch.ones(image.hidden.shape[:2]).bool()], 1)
        rows = rows[real].double()
    torch.testing.assert_close(
        found.grams["joint", "layers.1.attention.qkv"].double(), rows.T @ rows, rtol=1e-4, atol=1e-4
    )


def test_what_lies_before_the_fusion_is_computed_once():
    made, calls = model(), []
    made.layers[0].register_forward_pre_hook(lambda module, args: calls.append([m for m, _ in args[0]]))
    states = run_pairs(made, batch())
    assert calls == [["vision"], ["text"]]
    with torch.no_grad():
        pairs = batch()
        alone = made.finish_alone(made.before_fusion(made.begin_text(pairs["input_ids"], pairs["attention_mask"])))
    torch.testing.assert_close(states[1], alone)
    assert [state.shape[1] for state in states] == [5, 6, 11]


def test_no_padding_goes_through_a_layer():
    made, pairs, seen = model(), batch(), []
    for layer in made.layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append([(m, len(rows)) for m, rows in args[0]]))
    states = run_pairs(made, pairs)
    num_words, num_patches = int(pairs["attention_mask"].sum()), 6 * 5
    alone = [[("vision", num_patches)], [("text", num_words)]]
    assert seen == [*alone, *(x for x in alone for _ in range(2)), *[[("joint", num_words + num_patches)]] * 2]
    padding = ~pairs["attention_mask"].bool()
    assert padding.any() and not states[1][padding].any() and not states[2][:, :6][padding].any()


def test_a_quarter_of_the_tokens_is_the_same_again():
    made = model()
    one, again = (collect_statistics(made, [batch()] * 2, token_fraction=0.25, random_seed=5) for _ in range(2))
    num_words = int(batch()["attention_mask"].sum())
    assert one.num_tokens["text", "layers.0.ffn.fc2"] == 2 * round(num_words / 4)
    assert one.num_tokens["vision", "layers.2.ffn.fc2"] == 2 * round(30 / 4)
    assert all(torch.equal(matrix, again.grams[key]) for key, matrix in one.grams.items())
    other = collect_statistics(made, [batch()] * 2, token_fraction=0.25, random_seed=6)
    assert not torch.equal(one.grams["text", "layers.0.ffn.fc2"], other.grams["text", "layers.0.ffn.fc2"])


# -- Fisher information -------------------------------------------------------------------------------------


def log_likelihood_by_hand(made, pairs, number):
    """Term by term with a forward pass of its own: path by path, images then texts."""
    path, place = divmod(number, 2 * len(pairs["input_ids"]))
    direction, sample = divmod(place, len(pairs["input_ids"]))
    name, joint_path = (("contrastive", False), ("joint_contrastive", True))[path]
    ends = []
    for prefix in (
        made.begin_image(pairs["pixel_values"]),
        made.begin_text(pairs["input_ids"], pairs["attention_mask"]),
    ):
        assert isinstance(prefix, Prefix)
        end = made.finish_alone(made.before_fusion(prefix), joint_path=joint_path)
        ends.append(made.head(name).project(made.norm(end)[:, 0], prefix.modality))
    scores = made.head(name).logit_scale.exp() * ends[0] @ ends[1].T
    own = (scores if direction == 0 else scores.T)[sample]
    return own[sample] - own.logsumexp(0)


def test_fisher_is_the_mean_square_of_each_terms_gradient():
    made, pairs = model(), batch(3)
    found = collect_statistics(made, [pairs], fisher=contrastive_terms)
    names = [name for name, _ in made.named_parameters() if load_layout("modalmerge").place(name).expert]
    assert sorted(found.fisher) == sorted(names)
    parameters = [made.get_parameter(name) for name in names]
    sums = [torch.zeros(parameter.shape) for parameter in parameters]
    for number in range(12):
        term = log_likelihood_by_hand(made, pairs, number)
        gradients = torch.autograd.grad(term, parameters, allow_unused=True)
        sums = [x if g is None else x + g.square() for x, g in zip(sums, gradients, strict=True)]
    for name, total in zip(names, sums, strict=True):
        assert found.fisher[name].abs().max() > 0, name
        torch.testing.assert_close(found.fisher[name], total / 12, rtol=1e-3, atol=1e-9)


def test_fisher_sees_small_parts_of_a_batch(monkeypatch):
    monkeypatch.setattr(passes, "FISHER_BATCH", 4)
    sizes = []

    def terms(made, part):
        sizes.append(len(part["input_ids"]))
        return contrastive_terms(made, part)

    collect_statistics(model(), [batch(9), batch(4)], fisher=terms)
    assert sizes == [3, 3, 3, 4]


def test_a_model_without_fusion_layers_has_one_path():
    made = model(fusion_start=3, heads=["contrastive"])
    assert contrastive_terms(made, batch(3)).shape == (6,)


# -- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture, changes, options, message",
    [
        (
            "agnostic",
            {},
            {},
            "the model has no experts, so there is nothing to collect; give the model as it was before",
        ),
        ("norms", {}, {}, "experts are norms alone, which have no Gram matrices; collect Fisher information"),
        ("specific", {"heads": ["pooler"]}, {"fisher": contrastive_terms}, "the model has no head 'contrastive'"),
        ("specific", {"heads": ["contrastive"]}, {"fisher": contrastive_terms}, "no head 'joint_contrastive'"),
        ("specific", {}, {"token_fraction": 2.0}, r"token_fraction must be in \(0, 1\], got 2.0"),
        (
            "specific",
            {},
            {"fisher": lambda made, part: contrastive_terms(made, part)[:6]},
            r"all gradients of .* parameters are zero, such as 'layers.1.norm1.joint.weight'",
        ),
    ],
)
def test_what_cannot_be_collected_is_said(architecture, changes, options, message):
    with pytest.raises(ValueError, match=message):
        collect_statistics(model(architecture, **changes), [batch(3)], **options)


def test_no_batch_and_one_pair_are_said():
    with pytest.raises(ValueError, match="there is no batch to collect statistics on"):
        collect_statistics(model(), [])
    with pytest.raises(ValueError, match="need at least 2 pairs in a batch, got 1; choose a larger batch size"):
        collect_statistics(model(), [batch(1)], fisher=contrastive_terms)


def test_experts_that_are_norms_have_fisher_information():
    found = collect_statistics(model("norms"), [batch(3)], fisher=contrastive_terms)
    assert found.grams == {} and "layers.1.norm2.joint.bias" in found.fisher
