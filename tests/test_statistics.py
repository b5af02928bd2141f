import json
import os
import pickle
import socket

import pytest
import torch
from torch import distributed, multiprocessing, nn

from modalmerge.checkpoint import Checkpoint, open_checkpoint, tensor_infos, write_folder, write_safetensors
from modalmerge.merge import collect
from modalmerge.merge.collect import FisherSum, GramCollector, evaluation_mode
from modalmerge.merge.statistics import (
    Statistics,
    identify_checkpoint,
    identify_tensors,
    open_statistics,
    write_statistics,
)

torch.set_num_threads(1)


class Toy(nn.Module):
    """Attention with separate projections and a feed-forward network, as any model of today has them."""

    def __init__(self, width=6):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.5)

    def forward(self, hidden, padding=None):
        scores = self.q(hidden) @ self.k(hidden).transpose(-1, -2)
        if padding is not None:
            scores = scores.masked_fill(padding[:, None], float("-inf"))
        hidden = hidden + self.out(scores.softmax(-1) @ self.v(hidden))
        return hidden + self.fc2(self.fc1(input=self.dropout(hidden)).relu())


INPUTS = {
    **dict.fromkeys("qkv", ("vision", "attention.q")),
    "out": ("vision", "attention.out"),
    "fc1": ("text", "ffn.fc1"),
    "fc2": ("text", "ffn.fc2"),
}


def toy(**options):
    torch.manual_seed(0)
    return Toy(**options).eval()


def hidden(batch=3, length=5, width=6, random_seed=1):
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(random_seed))


def gram(rows):
    rows = rows.double().reshape(-1, rows.shape[-1])
    return rows.T @ rows


def close(found, wanted):
    """Whether a Gram is right to the precision of float32, measured by its diagonal."""
    assert found.dtype == torch.float32 and torch.equal(found, found.T)
    norms = wanted.diag().sqrt()
    return bool(((found.double() - wanted).abs() <= 1e-6 * norms[:, None] * norms).all())


def hooks(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


# -- Gram matrices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inference", [True, False])
def test_grams_are_sums_of_outer_products_of_what_modules_see(inference):
    model, x = toy(), hidden()
    collector = GramCollector(model, INPUTS)
    for part in x.split(2):
        with collector, torch.inference_mode(inference):
            model(part)
    grams, counts = collector.result()
    attended = ((model.q(x) @ model.k(x).transpose(1, 2)).softmax(-1)) @ model.v(x)
    states = x + model.out(attended)
    wanted = {
        ("vision", "attention.q"): x,
        ("vision", "attention.out"): attended,
        ("text", "ffn.fc1"): states,
        ("text", "ffn.fc2"): model.fc1(states).relu(),
    }
    assert set(grams) == set(wanted) == set(counts)  # q, k and v once
    assert all(close(grams[key], gram(rows.detach())) for key, rows in wanted.items())
    assert set(counts.values()) == {15}
    assert not any(matrix.is_inference() or matrix.requires_grad for matrix in grams.values())
    assert hooks(model) == 0


@pytest.mark.parametrize("width", [1, 127, 128, 300])
def test_blocks_give_the_whole_matrix(width, monkeypatch):
    monkeypatch.setattr(collect, "FLOAT32_TOKENS", 50)
    x = hidden(4, 30, width)
    layer = nn.Linear(width, 1)
    collector = GramCollector(layer, {"": ("a", "b")})
    with collector:
        layer(x), layer(x[:, :7])
    grams, counts = collector.result()
    assert close(grams["a", "b"], gram(x) + gram(x[:, :7]))
    assert counts == {("a", "b"): 148}


def test_float32_sums_are_short(monkeypatch):
    monkeypatch.setattr(collect, "FLOAT32_TOKENS", 4)
    layer = nn.Linear(1, 1)
    collector = GramCollector(layer, {"": ("a", "b")})
    with collector:
        layer(torch.full((1, 1), 4096.0))  # 2 ** 24: in float32 nothing is changed by adding 1
        for _ in range(4):
            layer(torch.ones(4, 1))
    assert collector.result()[0]["a", "b"].item() == 2**24 + 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_summed_as_they_are(dtype):
    layer, x = nn.Linear(6, 2, dtype=dtype), hidden().to(dtype)
    collector = GramCollector(layer, {"": ("a", "b")})
    with collector, torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    assert close(collector.result()[0]["a", "b"], gram(x))


def test_padding_is_left_out():
    model, x = toy(), hidden()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    collector = GramCollector(model, INPUTS)
    with collector, torch.inference_mode(), collector.tokens(mask):
        model(x.masked_fill(~mask[..., None], 1e6), ~mask)
    grams, counts = collector.result()
    alone = GramCollector(model, INPUTS)
    for sample, real in zip(x, mask, strict=True):
        with alone:
            model(sample[real][None])
    wanted, _ = alone.result()
    assert set(counts.values()) == {8}
    assert all(torch.allclose(grams[key], wanted[key], rtol=1e-5, atol=1e-5) for key in wanted)


def test_experts_that_run_at_once_have_masks_of_their_own():
    model, x = toy(), hidden()
    vision, text = torch.zeros(3, 5).bool(), torch.zeros(3, 5).bool()
    vision[:, :2], text[0, 4] = True, True
    collector = GramCollector(model, INPUTS)
    with collector, torch.inference_mode():
        with collector.tokens({"vision": vision, "text": text}):
            model(x)
        with (
            collector.tokens({"vision": vision}),
            pytest.raises(ValueError, match="fc1: no mask was given for the tokens of text, only for vision"),
        ):
            model(x)
        with (
            collector.tokens(vision[:, :2]),
            pytest.raises(ValueError, match=r"q: the mask of tokens has shape \[3, 2\], the input \[3, 5\]"),
        ):
            model(x)
    counts = collector.num_tokens
    assert counts["text", "ffn.fc1"] == 1 and counts["vision", "attention.q"] == 12
    assert hooks(model) == 0


def test_a_share_of_the_tokens_is_drawn():
    model, x = toy(), hidden(8, 50)
    mask = torch.arange(50) < torch.tensor([10, 50, 30, 40, 50, 5, 15, 0])[:, None]

    def collected(random_seed):
        collector = GramCollector(model, INPUTS, token_fraction=0.25, random_seed=random_seed)
        with collector, torch.inference_mode():
            for _ in range(2):
                with collector.tokens(mask):
                    model(x)
        return collector.result()

    grams, counts = collected(3)
    assert set(counts.values()) == {100}
    whole = gram(x[mask])
    found = grams["vision", "attention.q"]
    assert found.diag().sum().item() == pytest.approx(0.5 * whole.diag().sum().item(), rel=0.2)  # not scaled back
    assert not torch.allclose(found.double(), 0.5 * whole, rtol=1e-3)
    assert all(torch.equal(matrix, collected(3)[0][key]) for key, matrix in grams.items())
    assert not torch.equal(found, collected(4)[0]["vision", "attention.q"])


def test_one_token_at_least_is_drawn_with_a_mask_and_without():
    layer, x = nn.Linear(6, 2), hidden()
    collector = GramCollector(layer, {"": ("a", "b")}, token_fraction=0.01)
    with collector:
        layer(x)
        with collector.tokens(torch.ones(3, 5).bool()):
            layer(x)
    assert collector.num_tokens == {("a", "b"): 2}


def test_hooks_are_gone_after_an_error():
    model = toy()
    with pytest.raises(RuntimeError), GramCollector(model, INPUTS):
        assert hooks(model) == 4
        model(torch.zeros(1, 2, 7))
    assert hooks(model) == 0


def test_a_module_of_torch_that_skips_its_parts_is_seen():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = hidden(2, 3, 8)
    collector = GramCollector(layer, {"linear1": ("a", "fc1"), "linear2": ("a", "fc2")})
    with collector, torch.inference_mode():
        layer(x)
    assert set(collector.result()[1].values()) == {6}


def test_what_collecting_refuses():
    model = toy()
    with pytest.raises(ValueError, match="the model has no module 'fc3'; nearest: 'fc[12]'"):
        GramCollector(model, {"fc3": ("a", "b")})
    for fraction in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"token_fraction must be in \(0, 1\], got"):
            GramCollector(model, INPUTS, token_fraction=fraction)
    collector = GramCollector(model, INPUTS)
    with collector:
        model.fc2(torch.ones(1, 12))
    with pytest.raises(ValueError, match="3 modules saw no token, such as 'q'; collect again on data that reach them"):
        collector.result()


def test_evaluation_mode_is_put_back():
    model = toy().train()
    with pytest.raises(KeyError), evaluation_mode(model):
        assert not model.dropout.training
        raise KeyError
    assert model.training and model.dropout.training


# -- Fisher information --------------------------------------------------------------------------------------


def log_likelihoods(model, x, classes):
    return model(x).mean(1).log_softmax(-1).gather(1, classes[:, None])[:, 0]


def test_fisher_is_the_mean_square_of_each_samples_gradient():
    model, x, classes = toy(), hidden(4), torch.tensor([0, 1, 2, 5])
    names = ["fc1.weight", "v.bias", "q.weight"]
    squares = FisherSum(model, names)
    for part in (slice(0, 3), slice(3, 4)):
        squares.add(log_likelihoods(model, x[part], classes[part]))
    found = squares.result()
    assert list(found) == names
    for name in names:
        parameter = model.get_parameter(name)
        alone = [
            torch.autograd.grad(log_likelihoods(model, x[i : i + 1], classes[i : i + 1])[0], parameter)[0]
            for i in range(4)
        ]
        wanted = torch.stack(alone).square().mean(0)
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-10)
        assert parameter.grad is None
    assert found["fc1.weight"].abs().max() > 0


def test_what_fisher_refuses():
    model, x = toy(), hidden()
    with pytest.raises(ValueError, match="the model has no parameter 'fc1.wight'; nearest: 'fc1.weight'"):
        FisherSum(model, ["fc1.wight"])
    squares = FisherSum(model, ["fc1.weight", "fc2.weight"])
    squares.add(model.fc1(x).sum((1, 2)))
    with pytest.raises(ValueError, match="all gradients of 1 parameters are zero, such as 'fc2.weight'; give log-"):
        squares.result()
    with pytest.raises(ValueError, match="a log-likelihood is NaN or infinite"):
        squares.add(model.fc2(model.fc1(x)).sum((1, 2)) * float("inf"))
    model.fc1.requires_grad_(False)
    with pytest.raises(ValueError, match=r"fc1.weight is frozen, so it has no gradient; unfreeze it"):
        FisherSum(model, ["fc1.weight"])


# -- several ranks -------------------------------------------------------------------------------------------


def run_rank(rank, port, folder, first):
    """Collect on the first so many samples, or on the rest; none may be left."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    own = slice(0, first) if rank == 0 else slice(first, 5)
    torch.save(collected_on(own), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def collected_on(own):
    model, x, classes = toy(), hidden(5)[own], torch.arange(5)[own]
    collector, squares = GramCollector(model, INPUTS), FisherSum(model, ["fc2.weight"])
    if len(x):
        with collector, torch.inference_mode():
            model(x)
        squares.add(log_likelihoods(model, x, classes))
    return *collector.result(), squares.result()


@pytest.mark.slow
@pytest.mark.parametrize("first", [2, 5])
def test_ranks_add_up(first, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(run_rank, (port, str(tmp_path), first), nprocs=2)
    wanted, counts, fisher = collected_on(slice(0, 5))
    for rank in (0, 1):
        found, found_counts, found_fisher = torch.load(tmp_path / f"{rank}.pt")
        assert found_counts == counts and set(found) == set(wanted)
        assert all(torch.allclose(found[key], wanted[key], rtol=1e-5, atol=1e-5) for key in wanted)
        torch.testing.assert_close(found_fisher, fisher)


# -- which model ---------------------------------------------------------------------------------------------


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(40, 3, generator=generator).to(torch.bfloat16),
        "b": torch.tensor(5),
        "c": torch.zeros(0, 4),
        "d": torch.randn(7, generator=generator).to(torch.float8_e4m3fn),
        "e": torch.complex(torch.ones(2), torch.arange(2.0)),
    }


def test_an_identity_is_of_contents(tmp_path):
    write_folder(tmp_path / "model", tensors(), metadata={}, files={})
    identity = identify_checkpoint(open_checkpoint(tmp_path / "model"))
    assert identity == identify_tensors(tensors()) == identify_tensors(dict(reversed(tensors().items())))
    wide = {name: tensor.float() if name in "ad" else tensor for name, tensor in tensors().items()}
    assert identify_tensors(wide) == identity
    strided = {**tensors(), "a": tensors()["a"].T.contiguous().T}
    assert not strided["a"].is_contiguous() and identify_tensors(strided) == identity


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x["a"].view(-1)[15].add_(1),
        lambda x: x["e"][1].add_(1j),
        lambda x: x.update(b=torch.tensor([5])),
        lambda x: x.update(f=x.pop("a")),
        lambda x: x.update(c=torch.zeros(0, 5)),
        lambda x: x.pop("c"),
    ],
)
def test_an_identity_changes_with_contents(change):
    changed = tensors()
    change(changed)
    assert identify_tensors(changed) != identify_tensors(tensors())


# -- the file ------------------------------------------------------------------------------------------------


def statistics():
    matrix = gram(hidden())
    return Statistics(
        model="abc",
        num_samples=3,
        grams={("vision", "layers.0.ffn.fc1"): matrix, ("text", "a/b"): torch.eye(2)},
        num_tokens={("vision", "layers.0.ffn.fc1"): 15, ("text", "a/b"): 2**40},
        fisher={"layers.0.x/y": torch.ones(2, 3), "scalar": torch.tensor(0.5), "none": torch.ones(0)},
        coefficients={("vision", "layers.0.ffn.fc1.weight"): 0.25, ("text", "layers.0.ffn.fc1.weight"): -1},
        behind_merged=True,
        settings={"num_steps": 3},
    )


def test_a_file_gives_back_what_was_written(tmp_path):
    path = tmp_path / "made" / "statistics.safetensors"
    wanted = statistics()
    write_statistics(wanted, path)
    found = open_statistics(path)
    assert (found.model, found.num_samples) == ("abc", 3)
    assert dict(found.num_tokens) == wanted.num_tokens and dict(found.coefficients) == wanted.coefficients
    assert found.behind_merged and found.settings == {"num_steps": 3}
    assert set(found.grams) == set(wanted.grams) and set(found.fisher) == set(wanted.fisher)
    for key, matrix in wanted.grams.items():
        assert found.grams[key].dtype == torch.float32 and torch.equal(found.grams[key], matrix.float())
    for name, values in wanted.fisher.items():
        assert torch.equal(found.fisher[name], values)
    assert ("vision", "a/b") not in found.grams and "x" not in found.fisher and len(found.fisher) == 3
    with pytest.raises(KeyError):
        _ = found.grams["vision", "a/b"]
    write_statistics(found, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.messages  # a checker of types reads the first value of each mapping
def test_no_tensor_is_read_before_it_is_asked_for(tmp_path, monkeypatch):
    path = tmp_path / "statistics.safetensors"
    write_statistics(statistics(), path)
    read = []
    tensor = Checkpoint.tensor
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: read.append(name) or tensor(self, name))
    found = open_statistics(path)
    assert ("text", "a/b") in found.grams and list(found.fisher) and read == []
    assert torch.equal(found.grams["text", "a/b"], torch.eye(2)) and read == ["gram/text/a/b"]


def changed(**changes):
    return Statistics(**{**vars(statistics()), **changes})


KEY = ("vision", "x")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"grams": {KEY: torch.ones(2, 3)}, "num_tokens": {KEY: 1}}, r"shape \[2, 3\], a Gram matrix is square"),
        ({"grams": {KEY: torch.ones(2)}, "num_tokens": {KEY: 1}}, r"shape \[2\], a Gram matrix is square"),
        ({"grams": {KEY: torch.eye(2)}, "num_tokens": {}}, "'gram/vision/x' has no count in num_tokens"),
        ({"grams": {}, "num_tokens": {KEY: 1}}, "'gram/vision/x' has a count, but no Gram"),
        ({"grams": {KEY: torch.eye(2)}, "num_tokens": {KEY: 0}}, "must be a whole number of at least 1, got 0"),
        ({"grams": {("a/b", "x"): torch.eye(2)}, "num_tokens": {}}, "a word without '/', got 'a/b'"),
        ({"grams": {KEY: torch.eye(2) / 0}, "num_tokens": {KEY: 1}}, "'gram/vision/x' holds NaN or infinities"),
        ({"grams": {KEY: 1e39 * torch.eye(2).double()}, "num_tokens": {KEY: 1}}, "holds NaN or infinities"),
        ({"grams": {KEY: torch.ones(2, 2).tril()}, "num_tokens": {KEY: 1}}, "is not symmetric"),
        ({"fisher": {"x": torch.tensor([-1.0])}}, "'fisher/x' is negative somewhere"),
        ({"coefficients": {KEY: float("nan")}}, "coefficients: vision 'x' must be a finite number, got nan"),
        ({"num_samples": -1}, "num_samples must be a whole number of at least 0, got -1"),
    ],
)
def test_broken_statistics_are_not_written(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_statistics(changed(**changes), tmp_path / "statistics.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_not_overwritten(tmp_path):
    path = tmp_path / "statistics.safetensors"
    write_statistics(statistics(), path)
    with pytest.raises(ValueError, match="exists and is not overwritten; remove it or choose another name"):
        write_statistics(statistics(), path)
    with pytest.raises(ValueError, match=r"statistics are written to a file that ends in \.safetensors"):
        write_statistics(statistics(), tmp_path / "statistics.pt")


GOOD = {
    "modalmerge_statistics": "1",
    "model": "abc",
    "num_samples": "3",
    "num_tokens": '{"gram/vision/x": 3}',
    "coefficients": "{}",
    "behind_merged": "false",
    "settings": "{}",
}


def write(path, tensors=None, **metadata):
    tensors = {"gram/vision/x": torch.eye(2)} if tensors is None else tensors
    kept = {key: value for key, value in {**GOOD, **metadata}.items() if value is not None}
    write_safetensors(path, tensor_infos(tensors), read=tensors.__getitem__, metadata=kept)
    return path


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"modalmerge_statistics": "2"}, "statistics of version '2', this program reads '1'; collect them again"),
        ({"model": None}, "model is missing"),
        ({"num_samples": None}, "num_samples is missing"),
        ({"num_tokens": None}, "num_tokens is missing"),
        ({"coefficients": None}, "coefficients is missing"),
        ({"num_samples": "many"}, "num_samples is no JSON"),
        ({"num_samples": "1.5"}, "num_samples must be a whole number of at least 0, got 1.5"),
        ({"num_samples": "true"}, "num_samples must be a whole number of at least 0, got True"),
        ({"num_tokens": "{"}, "num_tokens is no JSON"),
        ({"num_tokens": "[" * 100_000}, "num_tokens is no JSON"),
        ({"num_tokens": "[]"}, "num_tokens must hold a count for every Gram"),
        ({"num_tokens": "{}"}, "'gram/vision/x' has no count in num_tokens"),
        ({"num_tokens": '{"gram/vision/x": -3}'}, "must be a whole number of at least 1, got -3"),
        ({"num_tokens": '{"gram/vision/x": 3, "gram/text/x": 3}'}, "'gram/text/x' has a count, but no Gram"),
        ({"settings": "3"}, "settings must be names and values, got 3"),
        ({"behind_merged": None}, "behind_merged is missing"),
        ({"behind_merged": "1"}, "behind_merged must be true or false, got 1"),
        ({"coefficients": "[1]"}, "coefficients must hold factors by expert and name"),
        ({"coefficients": '{"vision": 3}'}, "coefficients must hold factors by expert and name"),
        ({"coefficients": '{"vision": {"x": NaN}}'}, "coefficients: vision 'x' must be a finite number, got nan"),
        ({"coefficients": '{"vision": {"x": "1"}}'}, "coefficients: vision 'x' must be a finite number, got '1'"),
    ],
)
def test_metadata_are_not_believed(metadata, message, tmp_path):
    assert len(open_statistics(write(tmp_path / "good.safetensors")).grams) == 1
    path = write(tmp_path / "statistics.safetensors", **metadata)
    with pytest.raises(ValueError, match=message) as error:
        open_statistics(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"gram/vision/x": torch.ones(2, 3)}, r"'gram/vision/x' has shape \[2, 3\], a Gram matrix is square"),
        ({"gram/vision/x": torch.eye(2).double()}, r"'gram/vision/x' is of torch.float64, wanted torch.float32"),
        ({"gram/vision": torch.eye(2)}, "'gram/vision' is neither gram/EXPERT/INPUT nor fisher/NAME"),
        ({"fisher": torch.eye(2)}, "'fisher' is neither"),
        ({"layers.0.weight": torch.eye(2)}, "'layers.0.weight' is neither"),
    ],
)
def test_tensors_are_not_believed(tensors, message, tmp_path):
    with pytest.raises(ValueError, match=f"broken statistics: {message}"):
        open_statistics(write(tmp_path / "statistics.safetensors", tensors))


def test_values_are_checked_when_they_are_read(tmp_path):
    path = tmp_path / "statistics.safetensors"
    values = {
        "gram/vision/w": torch.eye(2),
        "gram/vision/x": torch.tensor([[1.0, float("nan")], [0, 1]]),
        "gram/vision/y": torch.tensor([[1.0, 2], [0, 1]]),
        "fisher/w": torch.ones(1),
        "fisher/x": torch.tensor([float("inf")]),
        "fisher/y": torch.tensor([-1.0]),
    }
    counts = {name: 1 for name in values if name.startswith("gram")}
    found = open_statistics(write(path, values, num_tokens=json.dumps(counts)))
    for read, message in (
        (lambda: found.grams["vision", "x"], "'gram/vision/x' holds NaN or infinities"),
        (lambda: found.grams["vision", "y"], "'gram/vision/y' is not symmetric"),
        (lambda: found.fisher["x"], "'fisher/x' holds NaN or infinities"),
        (lambda: found.fisher["y"], "'fisher/y' is negative somewhere"),
    ):
        with pytest.raises(ValueError, match=f"^{path}: {message}"):
            read()
    assert torch.equal(found.grams["vision", "w"], torch.eye(2))


def test_another_kind_of_file_is_named(tmp_path):
    path = write(tmp_path / "model.safetensors", {"layers.0.weight": torch.eye(2)}, modalmerge_statistics=None)
    with pytest.raises(
        ValueError, match="no file of statistics but a checkpoint: it holds tensors such as 'layers.0.w"
    ):
        open_statistics(path)
    with pytest.raises(ValueError, match="no such file of statistics; `modalmerge gram` writes one"):
        open_statistics(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="no such file of statistics"):
        open_statistics(tmp_path)
    (tmp_path / "text.json").write_text("{}")
    with pytest.raises(ValueError, match=r"text.json: not a checkpoint by its name"):
        open_statistics(tmp_path / "text.json")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"gram": 1}))
    with pytest.raises(ValueError, match="pickle.pt"):
        open_statistics(tmp_path / "pickle.pt")
    whole = write(tmp_path / "statistics.safetensors").read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut.safetensors: .*cut short"):
            open_statistics(tmp_path / "cut.safetensors")
