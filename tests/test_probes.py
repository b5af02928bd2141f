"""Probes: CKA against its definition, losses on a path against models built by hand, and the command `barrier`."""

import copy
import json
import math

import micro
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import modalmerge.cli.probes  # registers the command
from modalmerge.data.arrays import CaptionArrays
from modalmerge.data.batches import drawn_batches
from modalmerge.data.text import scenes_tokenizer
from modalmerge.merge.procedures.alignment import align_experts
from modalmerge.merge.procedures.passes import contrastive_terms
from modalmerge.model import COMPONENTS, PRETRAINING_HEADS
from modalmerge.probes import CKASums, Path, evaluation_loss, expert_similarity, linear_cka, loss_barriers
from modalmerge.study.jobs import model_config
from modalmerge.tasks.retrieval import contrastive_loss, similarities
from modalmerge.train.stages import initial_model, save

torch.set_num_threads(1)

SPARK = modalmerge.cli.probes._sparkline


def drawn(*shape, random_seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(random_seed), dtype=torch.float64)


def rotation(width, random_seed=0):
    return torch.linalg.qr(drawn(width, width, random_seed=random_seed))[0]


def hsic_cka(first, second):
    """CKA as it is defined, by centred kernels of samples."""
    centre = np.eye(len(first)) - 1 / len(first)
    kernels = [centre @ (x.numpy() @ x.numpy().T) @ centre for x in (first, second)]
    products = [[np.trace(one @ other) for other in kernels] for one in kernels]
    return products[0][1] / np.sqrt(products[0][0] * products[1][1])


def streamed(first, second, batch_size=7):
    sums = CKASums()
    for one, other in zip(first.split(batch_size), second.split(batch_size), strict=True):
        sums.add(one, other)
    return sums.value()


# -- CKA ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cka", [linear_cka, streamed])
@pytest.mark.parametrize("num_samples", [5, 40])  # products of samples, of features
def test_a_rotated_shifted_scaled_copy_is_the_same(cka, num_samples):
    first = drawn(num_samples, 12)
    assert cka(first, -3 * first @ rotation(12) + 100 * drawn(12, random_seed=2)) == pytest.approx(1, abs=1e-12)
    stretched = first * torch.linspace(0.1, 3, 12, dtype=torch.float64)  # not one common scale
    assert cka(first, stretched) < 0.98


@pytest.mark.parametrize("cka", [linear_cka, streamed])
@pytest.mark.parametrize("shapes", [((30, 4), (30, 9)), ((6, 4), (6, 9)), ((8, 1), (8, 20)), ((2, 3), (2, 3))])
def test_it_is_the_definition(cka, shapes):
    first, second = (drawn(*shape, random_seed=number) for number, shape in enumerate(shapes))
    second = second + first[:, :1]
    assert cka(first, second) == pytest.approx(hsic_cka(first, second), abs=1e-12)


def test_by_hand():
    """Centred columns (1, -1, 0) and (1, 0, -1): inner product 1, squared norms 2."""
    assert linear_cka(torch.tensor([[2.0], [0.0], [1.0]]), torch.tensor([[1.0], [0.0], [-1.0]])) == pytest.approx(1 / 4)


def test_unrelated_activations_come_near_0_with_samples():
    values = [linear_cka(drawn(n, 10), drawn(n, 40, random_seed=1)) for n in (20, 200, 20_000)]
    assert values[0] > 0.5 > 0.2 > values[1] and values[2] == pytest.approx(20 / 20_000, rel=0.3)


def test_what_all_samples_share_costs_no_digits():
    first, second = drawn(50, 6), drawn(50, 6, random_seed=1)
    wanted = linear_cka(first, second)
    for cka in (linear_cka, streamed):
        assert cka(first + 1e5, second - 1e5) == pytest.approx(wanted, abs=1e-9)
        assert cka((first + 100).float(), second.float()) == pytest.approx(wanted, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    random_seed=st.integers(0, 2**30),
    num_samples=st.integers(3, 25),
    widths=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    scale=st.floats(1e-6, 1e6),
)
def test_properties(random_seed, num_samples, widths, scale):
    first, second = (drawn(num_samples, width, random_seed=random_seed + i) for i, width in enumerate(widths))
    value = linear_cka(first, second)
    assert 0 <= value <= 1
    assert linear_cka(second, first) == pytest.approx(value, abs=1e-12)
    assert linear_cka(first @ rotation(widths[0], random_seed), second) == pytest.approx(value, abs=1e-9)
    assert linear_cka(first, -scale * second) == pytest.approx(value, abs=1e-9)
    assert linear_cka(first + scale, second) == pytest.approx(value, abs=1e-6)
    assert streamed(first, second, 4) == pytest.approx(value, abs=1e-9)
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(random_seed))
    assert linear_cka(first[order], second[order]) == pytest.approx(value, abs=1e-9)


@pytest.mark.messages
@pytest.mark.parametrize("cka", [linear_cka, lambda first, second: streamed(first, second, 1000)])
@pytest.mark.parametrize(
    "first, second, message",
    [
        (torch.ones(3, 2), torch.ones(4, 2), "compares the same samples: first has 3, second has 4"),
        (torch.ones(1, 2), torch.ones(1, 2), "needs at least 2 samples, got 1"),
        (torch.full((3, 2), 0.1), torch.eye(3), "not defined: first is the same for every sample"),
        (torch.eye(3), torch.full((3, 2), 0.1), "not defined: second is the same for every sample"),
        (torch.eye(3), torch.tensor([[0.0], [1.0], [math.nan]]), "second has elements that are NaN or infinite"),
    ],
)
def test_what_has_no_cka_is_said(cka, first, second, message):
    with pytest.raises(ValueError, match=message):
        cka(first, second)


# -- experts on the same tokens -----------------------------------------------------------------------------


def experts_model(**changes):
    return micro.task_model(architecture="specific", **{"heads": PRETRAINING_HEADS, "num_answers": 0, **changes})


def make_batches(num=24, batch_size=8):
    data = micro.pairs(num)
    return list(drawn_batches(data, num_samples=num, batch_size=batch_size, random_seed=0))


def with_tensors(model, changes):
    """A copy of a model with some tensors of its own."""
    made = copy.deepcopy(model)
    made.load_state_dict({**model.state_dict(), **changes})
    return made


def expert_tensors(model, expert, part=""):
    """The tensors of an expert, by the name that each has with `{}` in the place of the expert's."""
    return {
        name.replace(f".{expert}.", ".{}."): tensor.clone()
        for name, tensor in model.state_dict().items()
        if name.startswith("layers.") and f".{part}" in name and f".{expert}." in name
    }


def as_one(model, *, source="vision", experts=("text", "joint")):
    """A model whose experts all have the weights of one."""
    own = expert_tensors(model, source)
    names = set(model.state_dict())
    changes = {name.format(e): tensor for name, tensor in own.items() for e in experts if name.format(e) in names}
    return with_tensors(model, changes)


@pytest.mark.parametrize("changes", [{}, {"early_attention": "joint"}], ids=["separate", "joint"])
def test_equal_experts_act_alike(changes):
    found = expert_similarity(as_one(experts_model(**changes)), make_batches())
    places = [(one.layer, one.component, one.experts, one.on) for one in found]
    first = [(0, c, ("vision", "text"), on) for c in ("attention", "ffn") for on in ("vision", "text")]
    assert places[:4] == first and len(places) == 4 + 2 * 3 * 2
    assert [one.cka for one in found] == pytest.approx([1.0] * len(found), abs=1e-9)
    num_real = sum(int(batch["attention_mask"].sum()) for batch in make_batches())
    images = 24 * 5  # of 2 x 2 patches and [CLS]
    counts = {one.on: one.num_tokens for one in found}
    assert counts == {"vision": images, "text": num_real, "joint": images + num_real}


def test_a_rotated_output_is_alike_and_another_expert_is_not():
    model, batches = experts_model(), make_batches()
    names = [f"layers.0.ffn.{{}}.{kind}" for kind in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")]
    norms = [f"layers.0.norm2.{{}}.{kind}" for kind in ("weight", "bias")]
    state = model.state_dict()
    planted = {name.format("text"): state[name.format("vision")] for name in names + norms}
    turn = rotation(16).float()
    planted["layers.0.ffn.text.fc2.weight"] = 2 * turn @ state["layers.0.ffn.vision.fc2.weight"]
    planted["layers.0.ffn_scale"] = torch.full((16,), 0.3)  # one for all channels, or it would be no rotation
    rotated = {
        (one.layer, one.component): one.cka
        for one in expert_similarity(with_tensors(model, planted), batches)
        if one.experts == ("vision", "text") and one.on == "vision"
    }
    assert rotated[0, "ffn"] == pytest.approx(1, abs=1e-6)
    assert rotated[0, "attention"] < 0.9 and rotated[1, "ffn"] < 0.9


@pytest.mark.parametrize("component", ["attention", "ffn"])
def test_it_is_what_the_residual_stream_gains(component):
    """States of the first layer on text after the component, less those before it, by text's own and by vision's."""
    scale = torch.linspace(0.01, 3, 16)  # of each channel, which no rotation makes up for
    model = with_tensors(experts_model(), {f"layers.0.{part}_scale": scale for part in ("attention", "ffn")})
    parts = [f"0.{part}." for part in COMPONENTS[component]]
    planted = {name: tensor for part in parts for name, tensor in expert_tensors(model, "vision", part).items()}
    other = with_tensors(model, {name.format("text"): tensor for name, tensor in planted.items()})
    batches, gained = make_batches(), {}
    for expert, made in (("vision", other), ("text", copy.deepcopy(model))):
        states = {"entered": [], "between": [], "left": []}
        layer = made.layers[0]
        layer.register_forward_pre_hook(lambda layer, inputs, to=states: to["entered"].append(inputs[0][0][1]))
        layer.norm2["text"].register_forward_pre_hook(lambda norm, inputs, to=states: to["between"].append(inputs[0]))
        layer.register_forward_hook(lambda layer, inputs, outputs, to=states: to["left"].append(outputs[0]))
        with torch.inference_mode():
            for batch in batches:
                made.before_fusion(made.begin_text(batch["input_ids"], batch["attention_mask"]))
        before, after = ("entered", "between") if component == "attention" else ("between", "left")
        gained[expert] = torch.cat([new - old for old, new in zip(states[before], states[after], strict=True)])
    (found,) = (
        one.cka
        for one in expert_similarity(model, batches)
        if (one.layer, one.component, one.on, one.experts) == (0, component, "text", ("vision", "text"))
    )
    assert found == pytest.approx(linear_cka(gained["vision"], gained["text"]), abs=1e-5)


def test_only_what_is_per_modality_is_compared():
    found = expert_similarity(experts_model(experts=[["ffn"], []]), make_batches())
    assert {(one.layer, one.component) for one in found} == {(0, "ffn")}
    norms = expert_similarity(experts_model(experts=[["norms"], ["norms"]]), make_batches())
    assert {one.component for one in norms} == {"attention", "ffn"} and all(0 < one.cka < 1 for one in norms)


def test_an_expert_that_adds_the_same_to_all_has_no_cka():
    model = experts_model()
    nothing = torch.zeros_like(model.state_dict()["layers.0.ffn.text.fc2.weight"])
    found = expert_similarity(with_tensors(model, {"layers.0.ffn.text.fc2.weight": nothing}), make_batches())
    assert {(one.layer, one.component) for one in found if one.cka is None} == {(0, "ffn")}


def test_comparing_changes_nothing_and_leaves_no_hook():
    model = experts_model().train()
    before = copy.deepcopy(model.state_dict())
    seen = []
    first = expert_similarity(model, make_batches(), report=seen.append)
    assert seen == [8, 16, 24] and model.training
    assert first == expert_similarity(model, make_batches())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_nothing_to_compare_is_said():
    with pytest.raises(ValueError, match="the model has no experts, so there are none to compare"):
        expert_similarity(micro.task_model(), make_batches())
    with pytest.raises(ValueError, match="there is no batch to compare experts on"):
        expert_similarity(experts_model(), [])


# -- loss barrier -------------------------------------------------------------------------------------------


def path_of(experts, by_loss):
    return Path(experts=experts, layers=(0,), num_elements=1, positions=(0.0, 0.25, 0.5, 0.75, 1.0), by_loss=by_loss)


def test_the_barrier_is_the_rise_above_the_straight_line():
    losses = {"both": (1.0, 3.5, 2.0, 4.0, 3.0), "vision": (1.0, 1.0, 1.0, 2.0, 3.0), "text": (1.0, 1.0, 2.0, 2.0, 2.0)}
    path = path_of(("vision", "text"), {"uni-modal": losses})
    assert path.name == "vision-text" and path.losses == losses
    assert path.excess() == (0.0, 2.0, 0.0, 1.5, 0.0) and path.barrier() == 2.0
    assert path.barrier("vision") == 0.0 and path.barrier("text") == 0.5
    assert path.lowest() == (0.0, 1.0) and path.lowest("vision") == (0.0, 1.0)


def test_a_loss_that_cannot_move_halves_no_barrier():
    """Only the joint path has the joint expert in it; the mean of both losses rises by half of what it does there."""
    still, up = (1.0,) * 5, (1.0, 1.0, 3.0, 2.0, 1.0)
    joint = {"both": up, "vision": still, "joint": up}
    path = path_of(("vision", "joint"), {"uni-modal": {"both": up, "vision": up, "joint": still}, "joint": joint})
    assert path.losses == {"both": up, "vision": (1.0, 1.0, 2.0, 1.5, 1.0), "joint": (1.0, 1.0, 2.0, 1.5, 1.0)}
    assert [path.barrier(moved) for moved in ("both", "vision", "joint")] == [2.0, 2.0, 2.0]
    assert path.moving() == ("uni-modal", "joint") and path.moving("vision") == ("uni-modal",)
    assert path.barriers() == {
        "uni-modal": {"both": 2.0, "vision": 2.0, "joint": None},
        "joint": {"both": 2.0, "vision": None, "joint": 2.0},
    }


def test_the_cost_is_of_the_best_average_and_no_barrier_shows_it():
    bowl, first, second = (5.0, 3.0, 2.5, 3.0, 4.0), (1.0, 2.0, 3.0, 3.5, 4.0), (5.0, 4.0, 3.0, 2.0, 1.0)
    path = path_of(("vision", "text"), {"uni-modal": {"both": bowl, "vision": first, "text": second}})
    assert path.barrier() == 0.0 and path.cost == 1.5


@pytest.mark.parametrize("fusion_start, losses", [(1, ["uni-modal", "joint"]), (2, ["uni-modal"])])
def test_each_loss_is_that_of_one_path_both_directions(fusion_start, losses):
    model, (batch,) = experts_model(fusion_start=fusion_start), make_batches(8, 8)
    with torch.inference_mode():
        image, text = (
            model.image_features(batch["pixel_values"]),
            model.text_features(batch["input_ids"], batch["attention_mask"]),
        )
        alone = contrastive_loss(similarities(image, text, model.head("contrastive").logit_scale))
        terms = -contrastive_terms(model, batch)
        found = evaluation_loss(model, [batch])
    assert list(found) == losses and found["uni-modal"] == pytest.approx(float(alone), rel=1e-6)
    assert list(found.values()) == pytest.approx([float(part.mean()) for part in terms.split(16)], rel=1e-6)


def test_every_curve_is_that_of_models_built_by_hand():
    model, batches = experts_model(), make_batches()
    result = loss_barriers(model, batches, num_points=5)
    assert [path.name for path in result.paths] == ["vision-text", "vision-joint", "text-joint"]
    assert [path.layers for path in result.paths] == [(0, 1), (1,), (1,)]

    def by_hand(changes):
        with torch.inference_mode():
            return evaluation_loss(with_tensors(model, changes), batches)

    assert result.unchanged_by_loss == by_hand({})
    assert result.unchanged == pytest.approx(sum(by_hand({}).values()) / 2)
    for path in result.paths:
        first, second = (expert_tensors(model, expert) for expert in path.experts)
        shared = sorted(set(first) & set(second))
        assert path.num_elements == sum(first[name].numel() for name in shared)
        for number, position in enumerate(path.positions):
            mixed = {name: (1 - position) * first[name] + position * second[name] for name in shared}
            places = {"both": path.experts, **{expert: (expert,) for expert in path.experts}}
            for moved, experts in places.items():
                found = {loss: curves[moved][number] for loss, curves in path.by_loss.items()}
                losses = by_hand({name.format(e): tensor for name, tensor in mixed.items() for e in experts})
                assert found == pytest.approx(losses, abs=1e-5)
                if position in (0, 1):
                    assert found == losses
                assert path.losses[moved][number] == pytest.approx((found["uni-modal"] + found["joint"]) / 2)
        assert path.losses[path.experts[0]][0] == path.losses[path.experts[1]][-1] == result.unchanged
        assert len(set(path.losses["both"])) == 5
        moving = [path.moving(moved) for moved in path.losses]
        if "joint" in path.experts:  # the joint path ends in joint experts, the other has none of them
            assert moving == [("uni-modal", "joint"), ("uni-modal",), ("joint",)]
        else:
            assert moving == [("uni-modal", "joint")] * 3


def test_equal_experts_have_no_barrier():
    result = loss_barriers(as_one(experts_model()), make_batches(), num_points=4)
    for path in result.paths:
        for moved, losses in path.losses.items():
            assert losses == pytest.approx([result.unchanged] * 4, abs=1e-5)
            assert path.barrier(moved) == pytest.approx(0, abs=1e-5)


def test_a_planted_permutation_is_a_barrier_that_alignment_takes_away():
    """Equal experts, the hidden units of one in another order: every end is the same model, what lies between not."""
    model = as_one(experts_model())
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    planted = {}
    for layer in (0, 1):
        stem = f"layers.{layer}.ffn.text"
        state = model.state_dict()
        planted |= {f"{stem}.{name}": state[f"{stem}.{name}"][order] for name in ("fc1.weight", "fc1.bias")}
        planted[f"{stem}.fc2.weight"] = state[f"{stem}.fc2.weight"][:, order]
    permuted = with_tensors(model, planted)
    aligned = with_tensors(permuted, align_experts(permuted.state_dict(), permuted.config)[0])
    before, after = (loss_barriers(one, make_batches(), num_points=5).paths[0] for one in (permuted, aligned))
    ends = [before.losses[moved][number] for moved in before.losses for number in (0, -1)]
    assert ends == pytest.approx([ends[0]] * 6, abs=1e-5)
    assert before.barrier() > 0.1 and before.barrier("text") > 0.1
    for moved in after.losses:
        assert after.barrier(moved) == pytest.approx(0, abs=1e-5)


def test_a_pair_moves_only_what_it_shares():
    result = loss_barriers(experts_model(experts=[["ffn"], []]), make_batches(), num_points=3)
    assert [path.name for path in result.paths] == ["vision-text"]  # joint ones are in layer 1 alone
    (path,) = result.paths
    assert path.layers == (0,) and path.num_elements == 2 * 16 * 64 + 64 + 16 + 2 * 16


def test_measuring_changes_nothing_and_repeats():
    model, batches = experts_model().train(), make_batches()
    before = copy.deepcopy(model.state_dict())
    parameters = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    seen = []
    first = loss_barriers(model, batches, num_points=3, report=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 1 + 3 * 5) for done in range(1, 17)]
    assert loss_barriers(model, batches, num_points=3) == first
    assert model.training and {n: p.data_ptr() for n, p in model.named_parameters()} == parameters
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_batches_weigh_by_their_pairs():
    model, data = experts_model(), micro.pairs(20)
    batches = [data.train_batch(torch.arange(*ends), torch.Generator().manual_seed(0)) for ends in ((0, 4), (4, 20))]
    result = loss_barriers(model, batches, num_points=3)
    assert result.guessing == pytest.approx((4 * math.log(4) + 16 * math.log(16)) / 20)
    with torch.inference_mode():
        few, many = (evaluation_loss(model, [batch]) for batch in batches)
    for loss, value in result.unchanged_by_loss.items():
        assert value == pytest.approx((4 * few[loss] + 16 * many[loss]) / 20)


@pytest.mark.parametrize(
    "num_samples, batch_size, sizes",
    [(3, 2, [3]), (5, 2, [3, 2]), (4, 2, [2, 2]), (7, 3, [3, 2, 2]), (9, 8, [5, 4]), (3, 1, [1, 1, 1]), (1, 8, [1])],
)
def test_no_drawn_sample_is_alone_where_two_fit(num_samples, batch_size, sizes):
    parts = []

    class Kept(CaptionArrays):
        def train_batch(self, samples, generator):
            parts.append(samples)
            return super().train_batch(samples, generator)

    data = Kept(**vars(micro.pairs(12)))
    settings = {"num_samples": num_samples, "batch_size": batch_size, "random_seed": 1}
    batches = list(drawn_batches(data, **settings))
    assert [len(part) for part in parts] == [len(batch["input_ids"]) for batch in batches] == sizes
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.cat(parts), order[:num_samples])


@pytest.mark.parametrize(
    "changes, given, message",
    [
        ({"experts": [[], []]}, {}, "the model has no experts, so there is no path between any"),
        ({}, {"num_points": 2}, "num_points of a loss barrier must be at least 3, .*; got 2"),
        ({}, {"batches": []}, "needs at least one batch of data, got none"),
        ({}, {"batches": make_batches(1, 1)}, "need at least 2 pairs in a batch, got 1"),
        ({"heads": ["contrastive"]}, {}, "the model has no head 'joint_contrastive'"),
    ],
)
def test_what_has_no_barrier_is_said(changes, given, message):
    with pytest.raises(ValueError, match=message):
        loss_barriers(experts_model(**changes), **{"batches": make_batches(), **given})


def test_weights_that_are_not_finite_are_said():
    model = experts_model()
    bias = torch.full_like(model.state_dict()["layers.0.ffn.text.fc2.bias"], math.nan)
    with pytest.raises(ValueError, match="the uni-modal contrastive loss is nan; check the weights"):
        loss_barriers(with_tensors(model, {"layers.0.ffn.text.fc2.bias": bias}), make_batches())


# -- the command --------------------------------------------------------------------------------------------

CHANGES = [word for key, value in micro.CHANGES.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models of the micro preset, each expert with fresh weights of its own."""
    made = tmp_path_factory.mktemp("models")
    for architecture in ("specific", "agnostic"):
        model = initial_model(model_config(micro.preset(), architecture), 0, shared_start=False)
        save(model, scenes_tokenizer(), made / architecture)
    return made


@pytest.fixture
def barrier(call, folder):
    """Run `barrier` on few samples."""

    def run(*words, model="specific"):
        given = {"--data": "scenes", "--num-samples": 12, "--batch-size": 6, "--points": 3}
        given |= dict(zip(words[::2], words[1::2], strict=True))
        options = [word for pair in given.items() for word in pair if word != ""]
        return call("barrier", folder / model, *options, *CHANGES)

    return run


def test_the_command_prints_one_document_twice_the_same(barrier, folder):
    code, out, err = barrier("--json", "", "--cka", "")
    assert code == 0, err
    shown = json.loads(out)
    assert list(shown["curves"]) == list(shown["barrier"]) == ["vision-text", "vision-joint", "text-joint"]
    curve = shown["curves"]["vision-joint"]
    assert curve["positions"] == [0.0, 0.5, 1.0] and list(curve["losses"]) == ["both", "vision", "joint"]
    first, middle, second = curve["losses"]["both"]
    assert shown["barrier"]["vision-joint"] == max(0.0, middle - (0.5 * first + 0.5 * second))
    by_loss, barriers = shown["by_loss"]["vision-joint"], shown["barrier_by_loss"]["vision-joint"]
    assert list(by_loss) == list(barriers) == list(shown["unchanged_by_loss"]) == ["uni-modal", "joint"]
    for moved, losses in curve["losses"].items():
        alone, joint = (one[moved] for one in by_loss.values())
        assert losses == pytest.approx([sum(pair) / 2 for pair in zip(alone, joint, strict=True)])
    assert by_loss["joint"]["vision"] == [shown["unchanged_by_loss"]["joint"]] * 3
    assert barriers["joint"]["vision"] is None is barriers["uni-modal"]["joint"]
    movable = {"vision": barriers["uni-modal"]["vision"], "joint": barriers["joint"]["joint"]}
    assert shown["barrier_by_modality"]["vision-joint"] == movable
    assert shown["cost"]["vision-joint"] == min(first, middle, second) - shown["unchanged"]
    assert shown["lowest"]["vision-joint"]["loss"] == min(first, middle, second)
    assert (shown["dataset"], shown["split"], shown["num_samples"]) == ("scenes", "validation", 12)
    assert (shown["loss"], shown["unit"], shown["batch_size"], shown["random_seed"]) == ("contrastive", "nats", 6, 0)
    assert shown["guessing"] == pytest.approx(math.log(6)) and shown["model"] == str(folder / "specific")
    assert shown["moved"]["vision-joint"]["layers"] == [3]
    assert shown["curves"]["vision-text"]["losses"]["text"][-1] == shown["unchanged"]
    assert len(shown["cka"]) == 3 * 2 * 2 + 2 * 3 * 2 and set(shown["cka"][0]) == {
        "layer", "component", "experts", "on", "num_tokens", "cka",
    }  # fmt: skip
    assert barrier("--json", "", "--cka", "")[1] == out
    assert barrier("--json", "", "--cka", "", "--random-seed", 1)[1] != out


def test_the_command_prints_a_table(barrier):
    code, out, err = barrier()
    assert (code, err) == (0, "")
    lines = out.splitlines()
    shown = json.loads(barrier("--json", "")[1])
    assert lines[0].startswith("contrastive loss in nats over 12 pairs of scenes (validation):")
    assert lines[0].endswith("1.792 by guessing")
    assert lines[3].split()[:2] == ["vision-text", "both"] and lines[4].split()[0] == "vision"
    assert all(set(line.split()[-1]) <= set("▁▂▃▄▅▆▇█") for line in lines[3:12])
    assert lines[2].split()[4:10] == ["moved", "cost", "barrier", "at", "uni-modal", "joint"]
    both, vision, joint = (line.split() for line in lines[6:9])
    assert both[:3] == ["vision-joint", "both", f"{shown['cost']['vision-joint']:+.3f}"]
    height = {moved: f"{value:.3f}" for moved, value in shown["barrier_by_modality"]["vision-joint"].items()}
    assert vision[:2] + vision[3:5] == ["vision", height["vision"], height["vision"], "-"]
    assert joint[:2] + joint[3:5] == ["joint", height["joint"], "-", height["joint"]]
    assert "what the best average of the two\ncosts before any training" in out
    assert "Barriers of `uni-modal` and `joint` are of the loss on that path alone" in out
    assert max(len(line) for line in lines) <= 120
    assert "A barrier is how far the loss rises above the straight line" in out and "CKA" not in out
    code, out, _ = barrier("--cka", "")
    rows = [line.split() for line in out.splitlines() if line.split()[1:2] == ["ffn"]]
    assert [len(row) for row in rows] == [5, 5, 5, 11] and "1 is the same up to rotation" in out


def test_an_odd_number_in_twos_leaves_no_pair_alone(barrier):
    code, out, err = barrier("--num-samples", 3, "--batch-size", 2, "--json", "")
    assert code == 0, err
    assert json.loads(out)["guessing"] == pytest.approx(math.log(3))


def test_a_curve_is_drawn_between_the_smallest_and_the_largest_loss():
    assert SPARK([1.0, 1.5, 8.0], 1.0, 8.0) == "▁▁█" and SPARK([2.0, 2.0], 2.0, 2.0) == "▁▁"


@pytest.mark.parametrize(
    "words, message",
    [
        (("--data", "scene"), "unknown data set 'scene'; nearest: 'scenes'"),
        (("--split", "valid"), "unknown split 'valid'; nearest: 'validation'"),
        (("--num-samples", 41), "num_samples must be in [1, 40], which the split holds; got 41"),
        (("--config", "tinny"), "unknown preset 'tinny'; nearest: 'tiny'"),
        (("--set", "image_size=48"), "takes images of 72 pixels, the preset's data have 48"),
    ],
)
def test_a_wrong_word_is_answered(barrier, words, message):
    code, out, err = barrier(*words)
    assert (code, out) == (1, "") and message in err


def test_a_model_without_experts_is_answered(barrier):
    code, out, err = barrier(model="agnostic")
    assert (code, out) == (1, "")
    assert "error: the model has no experts, so there is no path between any; give it as it was before merging" in err
    assert barrier("--points", 2)[0] == 2 and barrier("--batch-size", 1)[0] == 2
