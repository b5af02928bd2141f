import contextlib
import dataclasses
import math
import resource
import signal
import time

import micro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modalmerge.data.batches import step_generator, step_samples
from modalmerge.model import ARCHITECTURES, load
from modalmerge.study.recipes import RECIPES
from modalmerge.train import stages
from modalmerge.train.loop import train
from modalmerge.train.objectives import draw_negatives, matching_loss
from modalmerge.train.optimiser import CLASSIFIERS, parameter_groups, rate_factor
from modalmerge.train.progress import plain_report
from modalmerge.train.settings import TrainSettings

torch.set_num_threads(1)

SETTINGS = TrainSettings(num_steps=8, batch_size=4, learning_rate=0.01, accelerator="cpu", checkpoint_steps=3)


def change(**changes):
    return dataclasses.replace(SETTINGS, **changes)


def pretrain(folder, *, fail_at=None, settings=SETTINGS, architecture="specific", data=None, **changes):
    """Pre-train the micro model; returns its tensors and the curve. `fail_at` interrupts after so many steps."""
    model = micro.model(architecture, **{"drop_path": 0.3, **changes})

    def report(step, num_steps, losses):
        if step == fail_at:
            raise InterruptedError(f"at {step}")

    data = data or micro.pairs()
    curve = stages.pretrain(model, data, micro.TOKENIZER, settings=settings, folder=folder, report=report)
    return model.state_dict(), curve


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *pretrain(folder)


# -- settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
        ({"checkpoint_steps": -1}, "checkpoint_steps must be at least 0, got -1"),
        ({"random_seed": -1}, "random_seed must be at least 0, got -1"),
        ({"random_seed": 2**40}, "random_seed must be below 2"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be positive, got nan"),
        ({"warmup_fraction": 1.0}, r"warmup_fraction must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"clip_norm": -1.0}, "clip_norm must be at least 0, got -1.0"),
        ({"head_rate_factor": math.nan}, "head_rate_factor must be at least 0, got nan"),
        pytest.param({"betas": (0.9,)}, r"betas must be two numbers .*, got \[0.9\]", marks=pytest.mark.messages),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \[0.9, 1.0\]"),
        ({"precision": "8-mixed"}, "precision must be one of 32-true, bf16-mixed, 16-mixed, got '8-mixed'"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        change(**changes)


def test_the_largest_random_seed_trains():
    largest = change(random_seed=2**40 - 1).random_seed
    assert isinstance(step_generator(largest, 10**6), torch.Generator)
    assert torch.manual_seed(largest * 1_000_003 + 10**6).initial_seed() > 0
    torch.manual_seed(0)


def test_an_accelerator_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ValueError, match="accelerator.*abacus"):
        pretrain(tmp_path, settings=change(accelerator="abacus"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="accelerator 'cuda'"):
            pretrain(tmp_path, settings=change(accelerator="cuda"))


# -- learning rate and groups -------------------------------------------------------------------------------


@given(st.integers(1, 3000), st.floats(0, 0.99))
@settings(max_examples=200, deadline=None)
def test_the_learning_rate_rises_to_one_and_falls_to_nothing(num_steps, warmup_fraction):
    factors = [rate_factor(step, num_steps, warmup_fraction) for step in range(num_steps)]
    top = factors.index(max(factors))
    assert factors[top] == 1
    assert all(0 < factor <= 1 for factor in factors)
    assert abs(top + 1 - max(1, warmup_fraction * num_steps)) <= 0.5
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert factors[-1] == pytest.approx(1 / max(1, num_steps - top - 1))
    assert rate_factor(num_steps, num_steps, warmup_fraction) == 0


def test_the_curve_shows_the_learning_rate_of_each_step(whole):
    _, _, curve = whole
    assert [row["step"] for row in curve] == list(range(8))
    expected = [0.01 * rate_factor(step, 8, 0.1) for step in range(8)]
    assert [row["learning_rate"] for row in curve] == pytest.approx(expected)
    assert all(row["loss"] == pytest.approx(sum(row[n] for n in stages_losses(row))) for row in curve)


def stages_losses(row):
    return set(row) - {"step", "learning_rate", "loss"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_groups_hold_every_parameter_once(architecture):
    model = micro.task_model(architecture=architecture)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, change(weight_decay=0.3, head_rate_factor=7.0))
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(names)
    decaying = {names[id(p)] for group in groups for p in group["params"] if group["weight_decay"]}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm | nn.BatchNorm2d) for p in m.parameters()}
    for parameter in model.parameters():
        name = names[id(parameter)]
        free = id(parameter) in norms or name == "position_bias_table" or name.endswith(("bias",))
        assert (name in decaying) is not free, name
    fast = {names[id(p)] for group in groups for p in group["params"] if group["lr"] == pytest.approx(0.07)}
    assert fast == {name for name in names.values() if name.startswith(tuple(f"heads.{head}." for head in CLASSIFIERS))}


def test_norms_of_modalities_do_not_decay():
    model = micro.model("specific")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    still = {
        names[id(p)] for g in parameter_groups(model, change(weight_decay=0.1)) for p in g["params"]
        if g["weight_decay"] == 0
    }  # fmt: skip
    assert {"layers.1.norm1.joint.weight", "layers.0.norm2.text.weight", "layers.0.attention.vision.q_bias"} <= still
    assert "layers.1.attention_scale" not in still and "image_embeddings.cls_token" not in still


def test_without_decay_of_vectors_it_is_beits():
    model = micro.task_model(architecture="specific")
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def still(**changes):
        groups = parameter_groups(model, change(weight_decay=0.1, **changes))
        return {names[id(p)] for group in groups for p in group["params"] if group["weight_decay"] == 0}

    vectors = {name for name, parameter in model.named_parameters() if parameter.ndim == 1}
    more = still(decay_vectors=False) - still()
    assert still(decay_vectors=False) == vectors | {"image_embeddings.cls_token", "position_bias_table"}
    scales = {f"layers.{layer}.{part}_scale" for layer in (0, 1) for part in ("attention", "ffn")}
    assert more == scales | {"image_embeddings.cls_token"}
    segmentation = {name for name, recipe in RECIPES.items() if not recipe().training.decay_vectors}
    assert segmentation == {"ade20k-512", "ade20k-640"}


class Line(nn.Module):
    """Something small enough to work out by hand."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(3, 1)
        self.norm = nn.LayerNorm(1)
        with torch.no_grad():
            self.map.weight.copy_(torch.tensor([[0.5, -1.0, 2.0]]))
            self.norm.bias.fill_(0.3)


def test_three_steps_are_those_by_hand(tmp_path):
    """AdamW as in its paper: decay apart from the gradient, moments corrected, the rate of each step."""
    chosen = change(num_steps=3, weight_decay=0.2, learning_rate=0.1, warmup_fraction=0.5, checkpoint_steps=0)
    batches = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(0))

    def loss_of(weight, bias, batch):
        return ((batch @ weight.T + bias) ** 2).mean()

    model = Line()
    expected = [model.map.weight.detach().clone(), model.map.bias.detach().clone()]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in expected]
    for step, factor in enumerate([0.5, 1.0, 1.0]):  # two steps of warm-up, then 3 - 2 = 1 step from 1 to 0
        now = [p.clone().requires_grad_() for p in expected]
        gradients = torch.autograd.grad(loss_of(*now, batches[step]), now)
        for number, (gradient, decay) in enumerate(zip(gradients, (0.2, 0.0), strict=True)):
            first, second = moments[number]
            first.mul_(0.9).add_(gradient, alpha=0.1)
            second.mul_(0.98).add_(gradient**2, alpha=0.02)
            rate = 0.1 * factor
            update = (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.98 ** (step + 1))).sqrt() + 1e-8)
            expected[number] = expected[number] * (1 - rate * decay) - rate * update

    train(
        model,
        settings=chosen,
        make_batch=lambda step: batches[step],
        losses=lambda batch, _: {"loss": loss_of(model.map.weight, model.map.bias, batch)},
        folder=tmp_path,
    )
    assert torch.allclose(model.map.weight, expected[0], rtol=1e-5, atol=1e-7)
    assert torch.allclose(model.map.bias, expected[1], rtol=1e-5, atol=1e-7)
    assert model.norm.bias.item() == pytest.approx(0.3)  # no gradient, no decay
    assert not model.training


# -- the same again, interrupted and gone on ----------------------------------------------------------------


def test_the_same_command_gives_the_same_model(whole, tmp_path):
    _, tensors, curve = whole
    torch.manual_seed(99)  # what was drawn before must not matter
    again, curve_again = pretrain(tmp_path)
    assert same(tensors, again) and curve == curve_again


def test_another_random_seed_gives_another_model(whole, tmp_path):
    tensors, curve = pretrain(tmp_path, settings=change(random_seed=1))
    assert curve[0]["loss"] != whole[2][0]["loss"] and not same(tensors, whole[1])


@pytest.mark.parametrize("fail_at", [2, 3, 4, 7, 8])
def test_an_interrupted_run_goes_on_to_the_same_model(whole, tmp_path, fail_at):
    with pytest.raises(InterruptedError):
        pretrain(tmp_path, fail_at=fail_at)
    assert (tmp_path / "last.ckpt").exists() is (fail_at > 3)
    torch.manual_seed(99)
    tensors, curve = pretrain(tmp_path, settings=SETTINGS)
    assert same(whole[1], tensors) and whole[2] == curve


def test_a_run_goes_on_from_its_checkpoint_not_from_the_start(tmp_path):
    with pytest.raises(InterruptedError):
        pretrain(tmp_path, fail_at=7)
    model, seen = micro.model("specific", drop_path=0.3), []
    stages.pretrain(
        model, micro.pairs(), micro.TOKENIZER, settings=SETTINGS, folder=tmp_path,
        report=lambda step, num_steps, losses: seen.append((step, num_steps, set(losses))),
    )  # fmt: skip
    names = {"contrastive", "matching", "masked_language", "loss"}
    assert seen == [(7, 8, names), (8, 8, names)]


def test_ctrl_c_is_a_keyboard_interrupt(tmp_path):
    """Lightning turns it into an exit of its own; the command line answers the interrupt."""

    def report(step, num_steps, losses):
        if step == 5:
            raise KeyboardInterrupt

    model = micro.model()
    with pytest.raises(KeyboardInterrupt):
        stages.pretrain(model, micro.pairs(), micro.TOKENIZER, settings=SETTINGS, folder=tmp_path, report=report)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert (tmp_path / "last.ckpt").exists()


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    with pytest.raises(InterruptedError):
        pretrain(tmp_path, fail_at=5)
    before = (tmp_path / "last.ckpt").read_bytes()
    with pytest.raises(ValueError, match=r"(?s)other settings.*there .*num_steps=8.*now .*num_steps=9.*remove it"):
        pretrain(tmp_path, settings=change(num_steps=9))
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_fine_tuning_goes_on_to_the_same_model(tmp_path):
    def tuned(folder, fail_at=None):
        model = stages.with_task_head(micro.model(), "vqa", random_seed=3, classes=tuple(micro.COLOURS))

        def report(step, num_steps, losses):
            if step == fail_at:
                raise InterruptedError

        curve = stages.finetune(model, "vqa", micro.data("vqa"), settings=SETTINGS, folder=folder, report=report)
        return model.state_dict(), curve

    tensors, curve = tuned(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        tuned(tmp_path / "parts", fail_at=5)
    again, curve_again = tuned(tmp_path / "parts")
    assert same(tensors, again) and curve == curve_again


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_trains_weights_of_full_precision(tmp_path, precision, whole):
    tensors, curve = pretrain(tmp_path, settings=change(precision=precision, clip_norm=1.0))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert curve[0]["loss"] == pytest.approx(whole[2][0]["loss"], rel=0.05)
    assert curve[0]["loss"] != whole[2][0]["loss"]


@pytest.mark.parametrize("fail_at", [None, 2])
def test_a_model_keeps_what_is_inside_its_layers_again_after_training(tmp_path, whole, fail_at):
    model, seen = micro.model("specific", drop_path=0.3), []

    def report(step, num_steps, losses):
        seen.append(model.is_activation_checkpointing)
        if step == fail_at:
            raise InterruptedError

    expected = contextlib.nullcontext() if fail_at is None else pytest.raises(InterruptedError)
    with expected:
        stages.pretrain(
            model, micro.pairs(), micro.TOKENIZER, settings=change(activation_checkpointing=True), folder=tmp_path,
            report=report,
        )  # fmt: skip
    assert seen and all(seen) and not model.is_activation_checkpointing
    assert fail_at or same(model.state_dict(), whole[1])


def test_the_log_is_for_tensorboard(whole):
    events = list((whole[0] / "tensorboard").glob("events.out.tfevents.*"))
    assert len(events) == 1 and events[0].stat().st_size > 0


def test_a_clipped_gradient_is_another_step(whole, tmp_path):
    tensors, _ = pretrain(tmp_path, settings=change(clip_norm=1e-9, weight_decay=0.0))
    start = micro.model("specific", drop_path=0.3).state_dict()
    # Adam's step does not know the size of a gradient, but at 1e-9 its epsilon is as large
    assert not same(tensors, whole[1])
    assert max((tensors[n] - start[n]).abs().max() for n in start) < max(
        (whole[1][n] - start[n]).abs().max() for n in start
    )


# -- what goes wrong ----------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    model = Line()
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step 4 .*lower learning_rate"):
        train(
            model,
            settings=SETTINGS,
            make_batch=lambda step: torch.full((2, 3), 1.0 if step < 4 else math.inf),
            losses=lambda batch, _: {"loss": (model.map(batch) ** 2).mean()},
            folder=tmp_path,
        )


def test_a_model_that_does_not_fit_on_the_disk_leaves_nothing(tmp_path):
    """The limit on the size of a file stands for a full disk: safetensors answers both with an error of its own."""
    model, (soft, hard) = micro.model(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ValueError, match=r"model could not be written: .*MiB are free there"):
            stages.save(model, micro.TOKENIZER, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


# -- batches ------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_every_epoch_holds_every_sample_once(num_samples, batch_size, random_seed):
    steps = 3 * num_samples // batch_size + 1
    drawn = torch.cat([step_samples(num_samples, batch_size, step, random_seed) for step in range(steps)])
    assert len(drawn) == steps * batch_size
    for epoch in range(len(drawn) // num_samples):
        part = drawn[epoch * num_samples : (epoch + 1) * num_samples]
        assert part.sort().values.tolist() == list(range(num_samples))


def test_epochs_and_random_seeds_are_in_another_order():
    orders = {tuple(step_samples(30, 30, step, seed).tolist()) for step in range(3) for seed in range(3)}
    assert len(orders) == 9


def test_the_generator_knows_its_step_alone():
    def draw(random_seed, step):
        return torch.rand(3, generator=step_generator(random_seed, step)).tolist()

    torch.manual_seed(1)
    first = draw(7, 100)
    torch.rand(5)
    assert draw(7, 100) == first
    assert len({tuple(draw(seed, step)) for seed in range(5) for step in range(5)}) == 25


def test_pretraining_batches_repeat_and_hide_words():
    one, again, next_ = (stages.pretraining_batch(micro.pairs(), micro.TOKENIZER, SETTINGS, step) for step in (3, 3, 4))
    for field in dataclasses.fields(one):
        assert torch.equal(getattr(one, field.name), getattr(again, field.name))
    assert not torch.equal(one.pixel_values, next_.pixel_values)
    chosen = one.labels >= 0
    assert chosen.any(1).all() and torch.equal(one.labels[chosen], one.input_ids[chosen])
    assert torch.equal(one.masked_ids[~chosen], one.input_ids[~chosen])


# -- models that training starts from -----------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [name for name, parts in ARCHITECTURES.items() if parts])
def test_experts_start_equal_and_equal_to_the_model_without_them(architecture):
    state = torch.get_rng_state()
    shared, model = micro.model(random_seed=5), micro.model(architecture, random_seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    seed = shared.state_dict()
    for name, tensor in model.state_dict().items():
        plain = ".".join(word for word in name.split(".") if word not in ("vision", "text", "joint"))
        assert torch.equal(tensor, seed[name if name in seed else plain]), name
    assert not same(seed, micro.model(random_seed=6).state_dict())
    batch = stages.pretraining_batch(micro.pairs(), micro.TOKENIZER, SETTINGS, 0)
    for given_ in ({"input_ids": batch.input_ids}, {"pixel_values": batch.pixel_values}):
        assert torch.allclose(shared(**given_).pooled, model(**given_).pooled, atol=1e-6)


def test_experts_of_a_seed_are_copies_of_their_own():
    seed = micro.model(random_seed=1)
    before = {name: tensor.clone() for name, tensor in seed.state_dict().items()}
    model = stages.start_experts(seed, micro.config("specific").experts)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.layers[0].ffn["text"].fc1.weight.fill_(1.0)
    assert same(seed.state_dict(), before)
    assert model.layers[0].ffn["vision"].fc1.weight.abs().sum() == 0


def test_a_task_head_is_drawn_and_the_rest_kept():
    model = micro.model("specific", random_seed=1)
    kept = model.state_dict()
    state = torch.get_rng_state()
    tuned = stages.with_task_head(model, "vqa", random_seed=4, classes=tuple(micro.COLOURS))
    assert torch.equal(torch.get_rng_state(), state)
    assert set(tuned.heads) == {"pooler", "vqa"} and tuned.config.answers == list(micro.COLOURS)
    tensors = tuned.state_dict()
    assert all(torch.equal(tensors[name], kept[name]) for name in tensors if name in kept)
    drawn = {name for name in tensors if name not in kept}
    assert drawn == {name for name in tensors if name.startswith("heads.vqa.")} != set()
    other = micro.model("specific", random_seed=2)
    again = stages.with_task_head(other, "vqa", random_seed=4, classes=tuple(micro.COLOURS)).state_dict()
    assert all(torch.equal(tensors[name], again[name]) for name in drawn)
    differing = stages.with_task_head(model, "vqa", random_seed=5, classes=tuple(micro.COLOURS)).state_dict()
    assert any(not torch.equal(tensors[name], differing[name]) for name in drawn)
    retrieval = stages.with_task_head(tuned, "retrieval", random_seed=0)
    assert set(retrieval.heads) == {"contrastive"} and retrieval.config.num_answers == 0
    with pytest.raises(ValueError, match="unknown task 'vqaa'; nearest: 'vqa'"):
        stages.with_task_head(model, "vqaa", random_seed=0)


def test_a_saved_model_comes_back(tmp_path):
    model = stages.with_task_head(micro.model("ffn"), "vqa", random_seed=0, classes=tuple(micro.COLOURS))
    stages.save(model, micro.TOKENIZER, tmp_path / "model")
    loaded, tokenizer = load(tmp_path / "model")
    assert same(model.state_dict(), loaded.state_dict()) and loaded.config.answers == list(micro.COLOURS)
    assert tokenizer.get_vocab() == micro.TOKENIZER.get_vocab()
    with pytest.raises(ValueError, match="exists and is not overwritten"):
        stages.save(model, micro.TOKENIZER, tmp_path / "model")


@pytest.mark.parametrize("architecture", ["agnostic", "specific"])
def test_pretraining_learns_every_objective(tmp_path, architecture):
    chosen = change(num_steps=120, checkpoint_steps=0)
    _, curve = pretrain(tmp_path, settings=chosen, architecture=architecture, data=micro.pairs(4), drop_path=0.0)
    for name in stages_losses(curve[0]):
        first, last = (sum(row[name] for row in part) / 20 for part in (curve[:20], curve[-20:]))
        assert last < 0.75 * first, name


# -- objectives ---------------------------------------------------------------------------------------------


@given(st.integers(2, 9), st.sampled_from([0.0, 1.0, 1e4, 1e30, -1e30]), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_a_negative_is_never_the_own_partner(size, scale, random_seed):
    generator = torch.Generator().manual_seed(random_seed)
    scores = torch.randn(size, size, generator=generator) + scale * torch.eye(size)
    image, text = draw_negatives(scores, generator)
    own = torch.arange(size)
    for drawn in (image, text):
        assert drawn.shape == (size,) and not (drawn == own).any()
        assert ((drawn >= 0) & (drawn < size)).all()


def test_hard_negatives_are_drawn_by_their_scores():
    """Text 0 is likest image 1; image 0 is likest text 2: the two directions must not be mixed up."""
    scores = torch.zeros(3, 3)
    scores[1, 0], scores[0, 2] = 20.0, 20.0
    drawn = [draw_negatives(scores, torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert {image[0].item() for image, _ in drawn} == {1}
    assert {text[0].item() for _, text in drawn} == {2}
    assert {image[1].item() for image, _ in drawn} == {0, 2}


def test_matching_loss_by_hand():
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.5, 0.5]])
    expected = sum(math.log(math.exp(row[0]) + math.exp(row[1])) - row[right]
                   for row, right in zip(logits.tolist(), (1, 0, 0), strict=True)) / 3  # fmt: skip
    assert matching_loss(logits).item() == pytest.approx(expected)


# -- progress -----------------------------------------------------------------------------------------------


def test_lines_of_progress_come_now_and_then_and_at_the_end(monkeypatch):
    now, lines = [1000.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    report = plain_report("seed", lines.append, every_seconds=30.0)
    for step in range(1, 101):
        now[0] += 1
        report(step, 100, {"loss": 1 / step})
    assert [line.split(",")[0] for line in lines] == [f"seed: step {step} of 100" for step in (30, 60, 90, 100)]
    assert "loss 0.033" in lines[0] and lines[-1].endswith("0 s left")


def test_the_bar_goes_to_standard_error(tmp_path, capsys):
    model = micro.model()
    stages.pretrain(model, micro.pairs(), micro.TOKENIZER, settings=change(num_steps=2), folder=tmp_path, show_bar=True)
    assert capsys.readouterr().out == ""
