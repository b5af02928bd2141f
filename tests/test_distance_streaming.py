"""Which tensors are compared, and the sums of their distances from pieces of files."""

import contextlib
import itertools
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from modalmerge.checkpoint import ShardWriter, TensorInfo, open_checkpoint
from modalmerge.distance import measures, pieces, streaming, tally, thresholds
from modalmerge.distance.groups import Tensors, list_groups
from modalmerge.distance.streaming import measure_groups
from modalmerge.distance.sums import subsets
from modalmerge.distance.thresholds import Cut
from modalmerge.layouts import load_layout

torch.set_num_threads(1)
SIXTEEN_BITS = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Make pieces, samples and their runs small, so that small tensors have many."""
    monkeypatch.setattr(streaming, "PIECE", 1000)
    monkeypatch.setattr(streaming, "NULL_SAMPLE", 512)
    monkeypatch.setattr(streaming, "RUN", 16)


ZERO = ": beside one that is not zero cosine is 1 there, and norm_ratio infinite (no value)"


def measure(tensors, base=None, **settings):
    """Measure one parameter of several checkpoints in memory."""
    inputs = [Tensors({"w": tensor}) for tensor in tensors]
    names = [f"e{number}" for number in range(len(tensors))]
    seed = None if base is None else Tensors({"w": base})
    groups, _ = list_groups([x.infos for x in inputs], experts=names, base=None if seed is None else seed.infos)
    sums, notes = measure_groups(groups, [*inputs, *([seed] if seed else [])], **settings)
    return (sums[0] if sums else None), notes


def draw(num, shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(num, *shape, generator=generator, dtype=torch.float64).to(dtype))


def in_numpy(changes, density=0.5):
    """The ten lines of numpy: products, squared differences, opposite signs, conflict, truncated conflict."""
    x = np.stack([change.double().numpy().ravel() for change in changes])
    sizes = np.sort(np.abs(x), axis=1)
    least = sizes[:, x.shape[1] - max(1, int(density * x.shape[1]))][:, None]
    pairs = list(itertools.combinations(range(len(x)), 2))

    def conflicts(y):
        groups = [(y[list(members)].sum(0), np.abs(y[list(members)]).sum(0)) for members in subsets(len(y))]
        return np.array([((1 - np.abs(a[b > 0]) / b[b > 0]).sum(), (b > 0).sum()) for a, b in groups])

    differences = np.array([((x[i] - x[j]) ** 2).sum() for i, j in pairs])
    opposite = np.array([(np.sign(x[i]) * np.sign(x[j]) < 0).sum() for i, j in pairs])
    return x @ x.T, differences, opposite, conflicts(x), conflicts(np.where(np.abs(x) >= least, x, 0))


def assert_agrees(sums, changes, tolerance, density=0.5):
    products, differences, opposite, conflict, truncated = in_numpy(changes, density)
    norms = np.sqrt(products.diagonal())
    assert (np.abs(sums.products - products) <= tolerance * np.outer(norms, norms)).all()
    np.testing.assert_allclose(sums.squared_differences, differences, rtol=tolerance)
    np.testing.assert_array_equal(sums.opposite_signs, opposite)
    for found, wanted in ((sums.conflict, conflict), (sums.truncated, truncated)):
        np.testing.assert_array_equal(found[:, 1], wanted[:, 1])
        np.testing.assert_allclose(found[:, 0], wanted[:, 0], rtol=tolerance, atol=tolerance * 1e-3)


# -- the numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *SIXTEEN_BITS], ids=str)
@pytest.mark.parametrize("num_experts", [2, 3])
@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("shape, density", [((57, 100), 0.5), ((57, 100), 0.2), ((9, 7), 0.5), ((1,), 0.5), ((), 1.0)])
def test_sums_agree_with_numpy(dtype, num_experts, with_base, shape, density):
    *experts, base = draw(num_experts + 1, shape, dtype)
    sums, notes = measure(experts, base if with_base else None, density=density)
    changes = [x.double() - base.double() for x in experts] if with_base else experts
    assert_agrees(sums, changes, 1e-6 if dtype in SIXTEEN_BITS else 1e-12, density)
    assert (sums.num_elements, notes) == (math.prod(shape), [])


ADVERSARIAL = {
    "sorted": lambda x: x.sort().values,
    "few values": lambda x: x.round(),
    "mostly zeros": lambda x: x * (x > 1.5),
    "signs": lambda x: x.sign(),
    "one value": lambda x: torch.ones_like(x),
    "half zeros": lambda x: x.clamp(min=0),
    "large at the end": lambda x: torch.cat([x[:-100] * 1e-3, x[-100:] * 1e3]),
    "large in stripes": lambda x: x * (1 + 100 * (torch.arange(len(x)) % 97 == 0)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", ADVERSARIAL.values(), ids=ADVERSARIAL)
@pytest.mark.parametrize("density", [0.5, 0.1, 1e-9, 1.0])
def test_truncation_is_exact_whatever_the_sample_says(make, density, dtype):
    experts = [make(x).to(dtype) for x in draw(2, (20_011,))]
    sums, _ = measure(experts, density=density)
    assert_agrees(sums, experts, 1e-6 if dtype == torch.bfloat16 else 1e-12, density)


@pytest.mark.parametrize("wrong", [Cut(1, 2), Cut(2**62 - 1, 2**62), None], ids=str)
def test_a_sample_that_misled_costs_a_second_pass(monkeypatch, wrong):
    experts = draw(3, (20_011,))
    real, calls = thresholds.likely_cut, []
    monkeypatch.setattr(streaming, "likely_cut", lambda *args, **kwargs: wrong or real(*args, **kwargs))
    if wrong is None:
        monkeypatch.setattr(streaming, "OPEN_BYTES", 1000)  # too little room for what is open
    add = tally.Tally.add
    monkeypatch.setattr(tally.Tally, "add", lambda *args: calls.append(1) or add(*args))
    sums, _ = measure(experts)
    assert_agrees(sums, experts, 1e-12)
    assert len(calls) == 2 * 21


def test_bad_guesses_at_every_turn_still_end_exactly(monkeypatch):
    experts = draw(2, (20_011,))
    for module in (streaming, tally):
        monkeypatch.setattr(module, "likely_cut", lambda *args, **kwargs: Cut(1, 2))
    assert_agrees(measure(experts)[0], experts, 1e-12)


TIED = {
    "half zeros": lambda x, y: (x > 0) * y.sign(),
    "three sizes": lambda x, y: (1 + (x > -0.5) + (x > 0.5)) * 0.37,
    "ties within a spread": lambda x, y: torch.where(x.abs() < 0.5, y, y.sign()),
    "no ties": lambda x, y: x,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", TIED.values(), ids=TIED)
def test_what_waits_for_the_end_of_a_pass_stays_under_its_limit(monkeypatch, make, dtype):
    limit, held, passes = 2000, [], []
    monkeypatch.setattr(streaming, "OPEN_BYTES", limit)
    add, init = tally.Tally.add, tally.Tally.__init__

    def watched(self, *args):
        found = add(self, *args)
        held.append(sum(own.nbytes for own in self._open))
        return found

    monkeypatch.setattr(tally.Tally, "add", watched)
    monkeypatch.setattr(tally.Tally, "__init__", lambda *args, **kwargs: passes.append(1) or init(*args, **kwargs))
    one, two, three, four = draw(4, (100_000,))
    experts = [make(one, two).to(dtype), make(three, four).to(dtype)]
    assert_agrees(measure(experts)[0], experts, 1e-6 if dtype == torch.bfloat16 else 1e-12)
    assert max(held) <= limit and len(passes) <= 2


def test_a_limit_that_the_sample_did_not_see_holds_too(monkeypatch):
    monkeypatch.setattr(streaming, "OPEN_BYTES", 2000)
    monkeypatch.setattr(streaming, "share_between", lambda *args: 0.0)
    held, add = [], tally.Tally.add
    monkeypatch.setattr(
        tally.Tally, "add", lambda self, *args: (add(self, *args), held.append(sum(x.nbytes for x in self._open)))[0]
    )
    experts = draw(2, (100_000,))
    assert_agrees(measure(experts)[0], experts, 1e-12)
    assert 0 < max(held) <= 2000


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64])
@pytest.mark.parametrize("num_kept", [1, 700, 2500, 4999, 5000])
def test_counting_between_edges_finds_where_the_threshold_is(dtype, num_kept):
    random = np.random.default_rng(0)
    sizes = random.integers(0, np.iinfo(dtype).max, 5000, dtype=dtype)
    sizes[random.random(5000) < 0.4] = sizes[0]
    sizes[random.random(5000) < 0.1] = 0
    whole = Cut(1, np.iinfo(dtype).max)
    edges = thresholds.edges_within(whole, sizes[::10])
    assert (edges[0], edges[-1]) == whole and (np.diff(edges) > 0).all()
    within = sizes[(sizes >= 1) & (sizes < whole.high)]
    counts = thresholds.count_within(within, edges)
    assert counts.sum() == len(within)
    cut, number = thresholds.cut_at(edges, counts, int((sizes >= whole.high).sum()), num_kept=num_kept)
    least = max(1, np.sort(sizes)[5000 - num_kept])
    assert cut.low <= least < cut.high
    between = ((sizes >= cut.low) & (sizes < cut.high)).sum()
    assert number == (0 if cut.is_exact else between) and number < 50


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=40, max_size=40), min_size=2, max_size=3),
    st.floats(0.01, 1),
)
def test_sums_of_any_numbers_are_those_of_measures(numbers, density):
    streaming.PIECE, before = 16, streaming.PIECE
    try:
        changes = torch.tensor(numbers, dtype=torch.float64)
        sums, _ = measure(list(changes), density=density)
    finally:
        streaming.PIECE = before
    kept = measures.truncate(changes, density=density)
    for row, members in enumerate(subsets(len(changes))):
        np.testing.assert_allclose(sums.conflict[row], measures.conflict(changes[list(members)]), atol=1e-12)
        np.testing.assert_allclose(sums.truncated[row], measures.conflict(kept[list(members)]), atol=1e-12)
    np.testing.assert_array_equal(sums.opposite_signs, measures.opposite_signs(changes))
    np.testing.assert_allclose(sums.squared_differences, measures.squared_differences(changes), rtol=1e-12)


def test_the_angle_between_experts_that_hardly_differ_is_not_rounded_away():
    base, noise = draw(2, (5000,))
    experts = [base.bfloat16(), (base + 1e-3 * noise).bfloat16()]
    sums, _ = measure(experts)
    exact = in_numpy(experts)[0]
    angles = [1 - p[0, 1] / math.sqrt(p[0, 0] * p[1, 1]) for p in (sums.products, exact)]
    assert angles[1] < 1e-5 and angles[0] == pytest.approx(angles[1], rel=1e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-6), (torch.float32, 1e-14)], ids=str)
@pytest.mark.parametrize("ratio", [1, 1.9, 2.1, 100, 1e4, 1e6])
def test_products_are_right_whatever_the_norms(monkeypatch, ratio, dtype, tolerance):
    monkeypatch.setattr(streaming, "PIECE", 2**18)
    one, noise = draw(2, (2**18 + 4321,))
    experts = [(one / ratio).to(dtype), (one + 0.05 * noise).to(dtype)]
    for order in (experts, experts[::-1]):
        sums, _ = measure(order)
        exact = in_numpy(order)[0]
        norms = np.sqrt(exact.diagonal())
        assert (np.abs(sums.products - exact) <= tolerance * np.outer(norms, norms)).all()
        found, wanted = (1 - p[0, 1] / math.sqrt(p[0, 0] * p[1, 1]) for p in (sums.products, exact))
        assert wanted == pytest.approx(0.00125, rel=0.01) and found == pytest.approx(wanted, abs=2 * tolerance)


@pytest.mark.parametrize("scale", [1e30, 1e-17, 1e-25, 1e-37])
def test_16_bit_numbers_whose_squares_are_beyond_float32_count(scale):
    experts = [x.bfloat16() * scale for x in draw(2, (3000,))]
    sums, notes = measure(experts)
    assert_agrees(sums, experts, 1e-6)
    assert notes == []
    large = draw(1, (3000,), torch.bfloat16, seed=1)[0]
    assert_agrees(measure([large, experts[0]])[0], [large, experts[0]], 1e-6)
    assert_agrees(measure(experts, 0 * large)[0], experts, 1e-6)


def test_a_difference_too_small_for_float32_squares_counts():
    (one,) = draw(1, (3000,), torch.bfloat16)
    one[7] = 1e-25
    two = one.clone()
    two[7] = 3e-25
    assert_agrees(measure([one, two])[0], [one, two], 1e-6)


# -- nulls --------------------------------------------------------------------------------------------------


def test_a_null_forgets_which_coordinates_belong_together(monkeypatch):
    monkeypatch.setattr(streaming, "NULL_SAMPLE", 2**14)
    (x,) = draw(1, (40_000,))
    sums, _ = measure([x, x])
    assert sums.num_sampled == 2**14
    assert sums.conflict[0, 0] == 0 and sums.null_conflict[0, 1] == 40_000
    assert sums.null_conflict[0, 0] / 40_000 == pytest.approx(0.279, abs=0.01)
    assert sums.null_truncated[0, 0] / sums.null_truncated[0, 1] == pytest.approx(0.134, abs=0.01)
    assert sums.null_opposite_signs[0] / 40_000 == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("length, error", [(16, 0.05), (2, 0.1), (1, 1e-12)])
def test_a_small_parameter_is_shuffled_until_its_null_is_no_chance(length, error):
    (x,) = draw(1, (length,), torch.float32)
    pairs = torch.cartesian_prod(x.double(), x.double()).T  # a shuffle is as likely to bring any two together
    opposite, conflict = measures.opposite_signs(pairs) / length, measures.conflict(pairs)[0] / length
    found = [measure([x, x], random_seed=seed)[0] for seed in range(20)]
    assert {sums.num_sampled for sums in found} == {length}
    assert all(sums.null_conflict[0, 1] == length for sums in found)
    for name, wanted in (("null_opposite_signs", opposite), ("null_conflict", conflict)):
        values = np.array([getattr(sums, name).ravel()[0] for sums in found])
        assert np.sqrt(np.mean((values - wanted.item()) ** 2)) <= error * length


def test_nulls_follow_the_random_seed_and_the_name():
    experts = draw(2, (5000,))
    one, again, other = (measure(experts, random_seed=seed)[0].null_conflict for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_runs_are_from_all_over():
    runs = streaming._runs(5000, torch.Generator().manual_seed(0))
    assert len(runs) == 32 and all(end - begin == 16 for begin, end in runs)
    assert all(
        number * 5000 // 32 <= begin and end <= (number + 1) * 5000 // 32 for number, (begin, end) in enumerate(runs)
    )
    assert streaming._runs(512, torch.Generator()) == [(0, 512)]


# -- files --------------------------------------------------------------------------------------------------


class Counting:
    """A checkpoint that counts the bytes that are read."""

    def __init__(self, checkpoint):
        self.infos, self._checkpoint, self.bytes_read, self.largest = checkpoint.infos, checkpoint, 0, 0

    def read_into(self, name, offset_bytes, view):
        self.bytes_read += view.nbytes
        self.largest = max(self.largest, view.nbytes)
        self._checkpoint.read_into(name, offset_bytes, view)


def write(folder, tensors, kind):
    """Write a checkpoint as a safetensors file, as shards or as a pickle."""
    folder.mkdir(parents=True)
    if kind == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    elif kind == "pickle":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        with contextlib.closing(ShardWriter(folder, infos, metadata={}, shard_bytes=30_000)) as writer:
            for name, tensor in tensors.items():
                writer.write(name, 0, tensor.reshape(-1).view(torch.uint8).numpy().data)
    return open_checkpoint(folder)


def named(dtype=torch.float32, seed=0):
    return dict(zip("abcd", draw(4, (60, 50), dtype, seed), strict=True)) | {"bias": draw(1, (3,), dtype, seed)[0]}


@pytest.mark.parametrize("kind", ["safetensors", "pickle", "shards"])
def test_files_of_any_kind_give_what_tensors_in_memory_do(tmp_path, kind):
    tensors = [named(seed=seed) for seed in (1, 2)]
    files = [write(tmp_path / str(number), own, kind) for number, own in enumerate(tensors)]
    if kind == "shards":
        assert len(files[0].files) > 1
    results = []
    for inputs in (files, [Tensors(own) for own in tensors]):
        groups, _ = list_groups([x.infos for x in inputs], experts=("one", "two"))
        results.append(measure_groups(groups, inputs)[0])
    assert [x.name for x in results[0]] == ["a", "b", "bias", "c", "d"]
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one.truncated, two.truncated)
        np.testing.assert_array_equal(one.products, two.products)


def test_one_pass_and_a_sample_are_read(tmp_path):
    files = [
        Counting(write(tmp_path / str(seed), {"w": draw(1, (400, 100), seed=seed)[0]}, "shards")) for seed in (1, 2)
    ]
    groups, _ = list_groups([x.infos for x in files], experts=("one", "two"))
    reports = []
    measure_groups(groups, files, report=lambda done, total: reports.append((done, total)))
    for file in files:
        assert file.bytes_read == 8 * (40_000 + 512)
        assert file.largest == 8 * 1000
    assert reports[-1] == (2 * 8 * 40_000,) * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_no_bit(dtype):
    inputs = [Tensors(named(dtype, seed)) for seed in (1, 2, 3)]
    groups, _ = list_groups([x.infos for x in inputs[:2]], experts=("one", "two"), base=inputs[2].infos)
    one, two = (measure_groups(groups, inputs, num_threads=num)[0] for num in (1, 2))
    for first, second in zip(one, two, strict=True):
        for field in ("products", "squared_differences", "conflict", "truncated", "null_conflict", "null_truncated"):
            np.testing.assert_array_equal(getattr(first, field), getattr(second, field))


def test_memory_is_that_of_a_few_pieces(monkeypatch):
    inputs = [Tensors({"w": x}) for x in draw(2, (300_000,))]
    groups, _ = list_groups([x.infos for x in inputs], experts=("one", "two"))
    readers = []
    monkeypatch.setattr(pieces, "PIECE", 1000)
    init = pieces.Reader.__init__
    monkeypatch.setattr(pieces.Reader, "__init__", lambda self, inputs: (init(self, inputs), readers.append(self))[0])
    measure_groups(groups, inputs, num_threads=1)
    held = sum(x.nbytes for x in readers[0]._memory.values())
    assert 0 < held <= 8 * 1000 * 8


def test_what_fails_is_named():
    class Broken(Tensors):
        def read_into(self, name, offset_bytes, view):
            raise ValueError("the file became shorter")

    inputs = [Tensors({"w": draw(1, (5,))[0]}), Broken({"w": draw(1, (5,))[0]})]
    groups, _ = list_groups([x.infos for x in inputs], experts=("one", "two"))
    with pytest.raises(ValueError, match="the file became shorter") as error:
        measure_groups(groups, inputs)
    assert error.value.__notes__ == ["while measuring w"]
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\], got 0.0"):
        measure_groups(groups, inputs, density=0.0)


def test_transposed_tensors_in_memory_are_read_in_order():
    one, two = draw(2, (40, 30))
    assert_agrees(measure([one.T, two.T])[0], [one.T, two.T], 1e-12)


def test_alignment_is_measured_on_request():
    experts, base = draw(2, (40, 30)), draw(1, (40, 30), seed=9)[0]
    sums, _ = measure(experts, base, subspace=True)
    np.testing.assert_allclose(sums.aligned, measures.aligned_squares(torch.stack(experts) - base), rtol=1e-10)
    assert measure(experts)[0].aligned is None
    assert measure(draw(2, (30,)), subspace=True)[0].aligned is None


def test_progress_waits_for_alignment(monkeypatch):
    def slow(*args):
        time.sleep(0.5)
        return measures.aligned_squares(*args)

    monkeypatch.setattr(streaming, "aligned_squares", slow)
    reports = []
    measure(draw(2, (40, 30)), subspace=True, report=lambda *numbers: reports.append(numbers))
    num_bytes = 2 * 8 * 40 * 30
    assert (num_bytes, 2 * num_bytes) in reports[:-1]
    assert reports[-1] == (2 * num_bytes, 2 * num_bytes)


def test_progress_knows_of_every_further_pass(monkeypatch):
    reports = []
    (one,) = draw(1, (3000,), torch.bfloat16)
    measure([one, one * math.inf], report=lambda *numbers: reports.append(numbers))
    assert reports[-1][1] == 2 * 2 * 2 * 3000
    measure([one, one * 1e30], report=lambda *numbers: reports.append(numbers))
    assert reports[-1][1] == 3 * 2 * 2 * 3000


def test_one_matrix_at_a_time_is_held_whole(monkeypatch):
    present, most = [], []

    def aligned(changes):
        present.append(1)
        most.append(len(present))
        time.sleep(0.02)
        present.pop()
        return measures.aligned_squares(changes)

    monkeypatch.setattr(streaming, "aligned_squares", aligned)
    inputs = [Tensors(named(seed=seed)) for seed in (1, 2)]
    groups, _ = list_groups([x.infos for x in inputs], experts=("one", "two"))
    measure_groups(groups, inputs, num_threads=4, subspace=True)
    assert most == [1] * 4


# -- edge cases ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_parameter_that_is_not_finite_is_left_out_and_named(dtype):
    one, two = draw(2, (57, 100), dtype)
    one[50, 3], two[50, 3], two[56, 99] = math.nan, math.inf, -math.inf
    sums, notes = measure([one, two])
    assert sums is None
    assert notes == ["w is left out: 2 of its 5700 coordinates are NaN or infinite"]


def test_squares_that_are_too_large_are_said():
    assert measure([x * 1e200 for x in draw(2, (30,))])[1] == [
        "w is left out: squares of its elements are too large for float64"
    ]


def test_no_change_is_said():
    base, one = draw(2, (30,))
    sums, notes = measure([base, one], base)
    assert notes == [f"e0 did not change in 1 parameter, such as w{ZERO}"]
    assert sums.conflict[0].tolist() == [0, 30] and sums.opposite_signs.tolist() == [0]
    sums, notes = measure([base, base], base)
    assert sums.conflict.tolist() == sums.truncated.tolist() == [[0, 0]] and len(notes) == 2
    assert measure([0 * one, one])[1] == [f"e0 is zero in 1 parameter, such as w{ZERO}"]


# -- what is compared ---------------------------------------------------------------------------------------


def ffn(layer, experts, shape=(4, 3), dtype=torch.float32):
    """One weight of a layer under vl-merging's names, as each of these experts has it."""
    return {f"transformer.blocks.{layer}.mlp.{x}.fc1.weight": TensorInfo(dtype, shape) for x in experts}


def list_inside(infos, base=None):
    return list_groups([infos], layout=load_layout("vl-merging"), base=base)


def test_experts_inside_a_checkpoint_are_found():
    infos = ffn(0, ["l", "v"]) | ffn(1, ["v", "l", "vl"]) | {"pooler.weight": TensorInfo(torch.float32, (3,))}
    base = {f"transformer.blocks.{layer}.mlp.fc1.weight": TensorInfo(torch.bfloat16, (4, 3)) for layer in (0, 1)}
    (first, second), notes = list_inside(infos, base)
    assert (first.name, first.part, first.layer) == ("transformer.blocks.0.mlp.fc1.weight", "ffn", 0)
    assert first.experts == ("vision", "text") and second.experts == ("vision", "text", "joint")
    assert first.sources[1] == (0, "transformer.blocks.0.mlp.l.fc1.weight")
    assert first.base == (1, first.name) and first.shape == (4, 3)
    assert first.dtypes == (torch.float32, torch.bfloat16)
    assert notes == ("1 parameter has no expert joint; they count for vision, text only",)


def test_what_is_left_out_is_said():
    infos = (
        ffn(0, ["v", "l"]) | ffn(1, ["vl"]) | ffn(2, ["v", "l"], dtype=torch.int64) | ffn(3, ["v", "l"], shape=(0, 3))
    )
    groups, notes = list_inside(infos)
    assert [group.layer for group in groups] == [0]
    assert notes == (
        "1 parameter has one expert only, so no distance, such as transformer.blocks.1.mlp.fc1.weight",
        "transformer.blocks.2.mlp.fc1.weight is left out: int64 has no distance",
        "1 parameter has no elements and no distance, such as transformer.blocks.3.mlp.fc1.weight",
    )


def test_a_twin_of_zeros_counts_as_zeros():
    module = "model.layers.1.self_attn"
    (bias,) = draw(1, (2500,), torch.bfloat16)
    matrices = {
        f"{module}.{x}_expert_query_key_value.weight": torch.ones(3, 2).bfloat16() for x in ("vision", "language")
    }
    tensors = Tensors({f"{module}.vision_expert_query_key_value.bias": bias, **matrices})
    groups, notes = list_groups([tensors.infos], layout=load_layout("cogvlm2"))
    sums, further = measure_groups(groups, [tensors])
    assert [x.experts for x in sums] == [("vision", "text")] * 2 and notes == ()
    assert_agrees(sums[0], [bias, 0 * bias], 1e-6)
    assert further == [f"text is zero in 1 parameter, such as {module}.query_key_value.bias{ZERO}"]


@pytest.mark.parametrize(
    "infos, base, message",
    [
        (ffn(0, ["v"]), None, "no parameter has two experts that can be compared: 1 have one expert only"),
        ({"pooler.weight": TensorInfo(torch.float32, (3,))}, None, "none of the 1 tensors is an expert's"),
        (ffn(0, ["v", "l"]), {"x": TensorInfo(torch.float32, (4, 3))}, "the base lacks 'transformer.blocks.0.mlp.fc1"),
        (ffn(0, ["v", "l"]), ffn(0, ["v", "l"]), "it has experts itself: merge them first"),
        (
            ffn(0, ["v", "l"]),
            {"transformer.blocks.0.mlp.fc1.weight": TensorInfo(torch.float32, (3, 4))},
            r"is \[3, 4\] float32 in the base and \[4, 3\] float32 in the experts",
        ),
        (
            ffn(0, ["v"]) | ffn(0, ["l"], shape=(3, 4)),
            None,
            r"its experts differ: .*\[4, 3\].*they must have one shape",
        ),
    ],
)
def test_what_cannot_be_compared_is_answered(infos, base, message):
    with pytest.raises(ValueError, match=message):
        list_inside(infos, base)


def test_a_layout_without_experts_says_why():
    with pytest.raises(ValueError, match="layout vilt: there are no distances to measure: "):
        list_groups([{}], layout=load_layout("vilt"))


@pytest.mark.parametrize(
    "two, names, message",
    [
        ({"weigth": (4, 3)}, ("a", "b"), "a holds the tensor 'weight', which b lacks; nearest there: 'weigth'"),
        (
            {"weight": (3, 4)},
            ("a", "b"),
            r"weight: its experts differ: .*\[3, 4\] float32 in b; they must have one shape",
        ),
        ({"weight": (4, 3)}, ("a", "a"), "2 checkpoints need as many different names, got a, a"),
        ({"weight": (4, 3)}, (), "2 checkpoints need as many different names, got none"),
    ],
)
def test_checkpoints_that_do_not_match_are_answered(two, names, message):
    inputs = [{name: TensorInfo(torch.float32, shape) for name, shape in x.items()} for x in ({"weight": (4, 3)}, two)]
    with pytest.raises(ValueError, match=message):
        list_groups(inputs, experts=names)


def test_one_checkpoint_alone_needs_a_layout():
    with pytest.raises(ValueError, match="distances are between two checkpoints or more, got 1; or give a layout"):
        list_groups([{}], experts=("a",))


def test_many_parameters_with_nan_are_counted():
    names = [f"w{number:02}" for number in range(14)]
    bad = torch.tensor([1.0, math.nan, 2.0])
    tensors = {name: bad if name != "w13" else torch.tensor([1.0, 2.0, 3.0]) for name in names}
    inputs = [Tensors(tensors), Tensors({name: tensor + 1 for name, tensor in tensors.items()})]
    groups, _ = list_groups([x.infos for x in inputs], layout=None, experts=("a", "b"))
    sums, notes = measure_groups(groups, inputs, num_threads=1)
    assert [x.name for x in sums] == ["w13"]
    assert notes[0].startswith("w00 is left out: 1 of its 3 coordinates") and notes[9].startswith("w09")
    assert notes[10:] == ["3 more parameters are left out for the like"]
