"""The spectral methods: cases computed by hand, second versions in numpy, properties, noise, and the memo."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modalmerge.merge.methods import PER_MATRIX, spectral
from modalmerge.merge.methods.spectral import Memo, decompose, iso_c, iso_cts, tsv_m

METHODS = {"tsv_m": tsv_m, "iso_c": iso_c, "iso_cts": iso_cts}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
seeds = st.integers(0, 2**32 - 1)
shapes = st.sampled_from([(6, 6), (9, 6), (6, 9)])


def draw(seed, shape, num_experts=2, rank=None, dtype=torch.float64):
    """Draw a base, and experts whose changes are Gaussian, or products of two Gaussian matrices of a rank."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    base = normal(*shape)
    if rank is None:
        changes = normal(num_experts, *shape)
    else:
        changes = normal(num_experts, shape[0], rank) @ normal(num_experts, rank, shape[1])
    return base.to(dtype), (base + 0.1 * changes).to(dtype)


def noise_like(experts):
    return 1e-9 * torch.randn(experts.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def relative_change(base, one, other):
    return float((one - other).norm() / (other - base).norm())


@pytest.fixture
def memo(monkeypatch):
    """A memo that nothing else has used."""
    fresh = Memo(2**20)
    monkeypatch.setattr(spectral, "DECOMPOSITIONS", fresh)
    return fresh


class TestByHand:
    def test_tsv_m(self):
        """Two experts of 2 x 2 keep one direction each: 4 (1, 0) (1, 0)^T and 2 (0.6, 0.8) (0, 1)^T.

        The right vectors are orthogonal. The left ones are the columns of A = [[1, 0.6], [0, 0.8]]; the nearest
        rotation to a 2 x 2 matrix points along A + its cofactors = [[1.8, 0.6], [-0.6, 1.8]], which is
        [[3, 1], [-1, 3]] / sqrt(10) after normalising. Times diag(4, 2): [[12, 2], [-4, 6]] / sqrt(10).
        """
        base = torch.ones(2, 2)
        changes = torch.tensor([[[4.0, 0.0], [0.0, 0.0]], [[0.0, 1.2], [0.0, 1.6]]])
        expected = torch.tensor([[12.0, 2.0], [-4.0, 6.0]]) / math.sqrt(10)
        torch.testing.assert_close(tsv_m(base, base + changes), base + expected)
        torch.testing.assert_close(tsv_m(base, base + changes, scale=0.5), base + 0.5 * expected)

    def test_tsv_m_drops_all_but_its_share(self):
        """Of diag(4, 1) and diag(2, 3) each keeps one direction, 4 and 3, which do not overlap."""
        changes = torch.stack([torch.diag(torch.tensor(x)) for x in ([4.0, 1.0], [2.0, 3.0])])
        torch.testing.assert_close(tsv_m(torch.zeros(2, 2), changes), torch.diag(torch.tensor([4.0, 3.0])))

    def test_iso_c(self):
        """The sum is [[0, -3], [1, 0]]: singular values 3 and 1, their mean 2, and the rotation [[0, -1], [1, 0]]."""
        base = torch.ones(2, 2)
        changes = torch.tensor([[[0.0, -3.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]]])
        torch.testing.assert_close(iso_c(base, base + changes), base + torch.tensor([[0.0, -2.0], [2.0, 0.0]]))

    def test_iso_cts(self):
        """Changes diag(3, 2, 0) and diag(3, -2, 4), a common share of 0.4: int(1.2) = 1 common direction, 1 each.

        The sum is diag(6, 0, 4): common is the first axis with 6. Outside it the experts are diag(0, 2, 0) and
        diag(0, -2, 4), and give the second axis with 2 and the third with 4: the mean of 6, 2, 4 is 4, so 4 times
        the identity. Iso-C alone sees rank 2 and gives diag(5, 0, 5).
        """
        base = torch.ones(3, 3)
        experts = base + torch.stack([torch.diag(torch.tensor(x)) for x in ([3.0, 2.0, 0.0], [3.0, -2.0, 4.0])])
        torch.testing.assert_close(iso_cts(base, experts, common=0.4), base + 4 * torch.eye(3))
        torch.testing.assert_close(iso_c(base, experts), base + torch.diag(torch.tensor([5.0, 0.0, 5.0])))


def numpy_polar(matrix):
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right


def numpy_tsv_m(changes):
    num_kept = min(changes[0].shape) // len(changes)
    parts = [np.linalg.svd(change, full_matrices=False) for change in changes]
    left = np.concatenate([u[:, :num_kept] for u, _, _ in parts], axis=1)
    right = np.concatenate([v[:num_kept] for _, _, v in parts])
    return numpy_polar(left) @ np.diag(np.concatenate([s[:num_kept] for _, s, _ in parts])) @ numpy_polar(right)


def numpy_iso_c(changes):
    left, values, right = np.linalg.svd(sum(changes), full_matrices=False)
    return left @ np.diag(np.full_like(values, values.mean())) @ right


def numpy_iso_cts(changes, common=0.8):
    size = min(changes[0].shape)
    num_own = round((size - int(size * common)) / len(changes))
    num_common = size - num_own * len(changes)
    parts = [tuple(np.linalg.svd(sum(changes), full_matrices=False))]
    space = parts[0][0][:, :num_common]
    parts += [np.linalg.svd(change - space @ space.T @ change, full_matrices=False) for change in changes]
    counts = [num_common, *[num_own] * len(changes)]
    left = np.concatenate([u[:, :n] for (u, _, _), n in zip(parts, counts, strict=True)], axis=1)
    right = np.concatenate([v[:n] for (_, _, v), n in zip(parts, counts, strict=True)])
    mean = np.concatenate([s[:n] for (_, s, _), n in zip(parts, counts, strict=True)]).mean()
    return mean * numpy_polar(left) @ numpy_polar(right)


NUMPY = {"tsv_m": numpy_tsv_m, "iso_c": numpy_iso_c, "iso_cts": numpy_iso_cts}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(12, 12), (30, 14), (14, 30)])
@pytest.mark.parametrize("num_experts", [2, 3])
def test_second_version_in_numpy(name, shape, num_experts):
    base, experts = draw(2, shape, num_experts)
    expected = base + 0.7 * torch.from_numpy(NUMPY[name](list((experts - base).numpy())))
    torch.testing.assert_close(METHODS[name](base, experts, scale=0.7), expected, rtol=0, atol=1e-10)


def test_shares_of_common_directions_in_numpy():
    base, experts = draw(3, (20, 12), 2)
    for common in (0.0, 0.25, 0.5, 1.0):
        expected = base + torch.from_numpy(numpy_iso_cts(list((experts - base).numpy()), common))
        torch.testing.assert_close(iso_cts(base, experts, common=common), expected, rtol=0, atol=1e-10)
    assert torch.equal(iso_cts(base, experts, common=1.0), iso_cts(base, experts, common=0.99))
    torch.testing.assert_close(iso_cts(base, experts, common=1.0), iso_c(base, experts), rtol=0, atol=1e-10)


class TestProperties:
    @every_method
    @given(seed=seeds, shape=shapes, num_experts=st.sampled_from([1, 2, 3]))
    @settings(max_examples=25, deadline=None)
    def test_rotating_the_weights_rotates_the_result(self, method, seed, shape, num_experts):
        base, experts = draw(seed, shape, num_experts)
        generator = torch.Generator().manual_seed(seed)
        left, right = (
            torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q for n in base.shape
        )
        expected = left @ method(base, experts) @ right
        torch.testing.assert_close(method(left @ base @ right, left @ experts @ right), expected, rtol=0, atol=1e-6)

    @every_method
    @given(seed=seeds, shape=shapes)
    @settings(max_examples=25, deadline=None)
    def test_the_order_of_experts_does_not_matter(self, method, seed, shape):
        base, experts = draw(seed, shape, 3)
        torch.testing.assert_close(method(base, experts[[2, 0, 1]]), method(base, experts), rtol=0, atol=1e-6)

    @every_method
    @given(seed=seeds, shape=shapes, scale=st.floats(-3, 3))
    @settings(max_examples=25, deadline=None)
    def test_the_change_grows_with_the_scale(self, method, seed, shape, scale):
        base, experts = draw(seed, shape, 3)
        change = method(base, experts) - base
        torch.testing.assert_close(method(base, experts, scale=scale), base + scale * change, rtol=0, atol=1e-12)

    @every_method
    @given(seed=seeds, shape=shapes, factor=st.sampled_from([1e-6, 1e-3, 1e3, 1e6]))
    @settings(max_examples=25, deadline=None)
    def test_the_change_grows_with_the_changes(self, method, seed, shape, factor):
        base, experts = draw(seed, shape, 2)
        base, changes = torch.zeros_like(base), experts - base
        expected = factor * method(base, changes)
        torch.testing.assert_close(method(base, factor * changes), expected, rtol=0, atol=1e-6 * factor)

    @given(seed=seeds, shape=shapes, num_experts=st.sampled_from([1, 2, 3]))
    @settings(max_examples=25, deadline=None)
    def test_isotropic_results_have_one_singular_value(self, seed, shape, num_experts):
        base, experts = draw(seed, shape, num_experts)
        values = torch.linalg.svdvals(iso_c(base, experts) - base)
        mean = torch.linalg.svdvals((experts - base).sum(0)).mean()
        torch.testing.assert_close(values, mean.expand(len(values)), rtol=1e-6, atol=0)


class TestNoise:
    @every_method
    @pytest.mark.parametrize("num_experts", [1, 2, 3])
    def test_changes_of_low_rank(self, method, num_experts):
        base, experts = draw(4, (24, 16), num_experts, rank=2)
        noisy = method(base, experts + noise_like(experts))
        assert relative_change(base, noisy, method(base, experts)) < 1e-7

    @pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts"])
    def test_the_formulas_alone_would_answer_noise(self, name):
        """What the guard is for: the numpy versions, which have none, change by as much as their result."""
        base, experts = draw(4, (24, 16), 2, rank=2)
        noisy = NUMPY[name](list((experts + noise_like(experts) - base).numpy()))
        plain = NUMPY[name](list((experts - base).numpy()))
        assert np.linalg.norm(noisy - plain) > 0.2 * np.linalg.norm(plain)

    @every_method
    def test_an_expert_that_hardly_changed(self, method):
        base, experts = draw(5, (12, 12), 2)
        experts[1] = base
        noisy = method(base, experts + noise_like(experts))
        assert relative_change(base, noisy, method(base, experts)) < 1e-6

    @pytest.mark.parametrize("method", [tsv_m, iso_cts])
    def test_changes_that_cancel(self, method):
        base, experts = draw(6, (12, 12), 2, rank=3)
        experts[1] = 2 * base - experts[0]
        noisy = method(base, experts + noise_like(experts))
        assert (noisy - method(base, experts)).abs().max() < 1e-7

    @every_method
    def test_identical_experts_of_low_rank(self, method):
        """They have the same directions: TSV-M turns two copies of each into one, and gives the change once."""
        base, experts = draw(7, (12, 12), 1, rank=3)
        merged = method(base, experts.repeat(2, 1, 1))
        assert torch.linalg.matrix_rank(merged - base, rtol=1e-6) == 3
        if method is tsv_m:
            torch.testing.assert_close(merged, experts[0], rtol=0, atol=1e-10)

    @every_method
    def test_a_tolerance_for_the_rounding_of_sixteen_bits(self, method):
        base, experts = draw(8, (64, 48), 2, rank=2)
        exact = method(base, experts)
        rounded = base.bfloat16(), experts.bfloat16()
        far, near = (method(*rounded, rank_tolerance=x).double() for x in (1e-5, 0.02))
        assert relative_change(base, near, exact) < 0.1
        if method is not tsv_m:  # whose directions keep their size, that of noise
            assert relative_change(base, far, exact) > 0.5


class TestSpecialCases:
    @every_method
    @pytest.mark.parametrize("shape", [(), (5,)])
    def test_what_is_no_matrix_is_averaged(self, method, shape):
        base, experts = draw(9, shape, 3)
        expected = base + 0.5 * (experts - base).mean(0)
        torch.testing.assert_close(method(base, experts, scale=0.5), expected)

    @every_method
    @pytest.mark.parametrize("shape", [(0,), (4, 0), (0, 4), (3, 0, 2)])
    def test_empty(self, method, shape):
        merged = method(torch.zeros(shape), torch.zeros(2, *shape))
        assert merged.shape == shape

    @every_method
    def test_three_dimensions_are_a_matrix(self, method):
        base, experts = draw(10, (4, 3, 5), 2)
        expected = method(base.flatten(1), experts.flatten(2)).view(4, 3, 5)
        assert torch.equal(method(base, experts), expected)

    @every_method
    @pytest.mark.parametrize("num_experts", [1, 3])
    def test_no_change_gives_the_base(self, method, num_experts):
        base, _ = draw(11, (6, 4))
        assert torch.equal(method(base, base.repeat(num_experts, 1, 1)), base)

    def test_one_expert_is_kept_whole_by_tsv_m(self):
        base, experts = draw(12, (6, 4), 1)
        torch.testing.assert_close(tsv_m(base, experts), experts[0], rtol=0, atol=1e-15)

    @every_method
    def test_more_experts_than_dimensions(self, method):
        """Three experts of 2 x 2, each with one direction: two the first axis, one the second."""
        base = torch.zeros(2, 2)
        experts = torch.tensor([[[2.0, 0], [0, 0]], [[0, 0], [0, 2.0]], [[1.0, 0], [0, 0]]])
        merged = method(base, experts)
        assert merged.isfinite().all()
        if method is tsv_m:  # the first axis comes with 2 and 1, each copy turned to 1 / sqrt(2) on both sides
            torch.testing.assert_close(merged, torch.diag(torch.tensor([1.5, 2.0])))

    def test_experts_share_what_there_is(self):
        """Five directions, none common: three experts, for whom rounding would take six, get one each, the sum two."""
        base, experts = draw(13, (5, 5), 3)
        merged = iso_cts(base, experts, common=0.0)
        values = torch.linalg.svdvals(merged - base)
        torch.testing.assert_close(values, values[:1].expand(5), rtol=1e-6, atol=0)

    @every_method
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_matrices_are_rounded_once(self, method, dtype):
        base, experts = draw(14, (12, 8), 3, dtype=dtype)
        wide = method(base.double(), experts.double())
        merged = method(base, experts)
        if dtype == torch.float32:
            assert torch.equal(merged, wide.float())
        else:
            unit = 2.0 ** (torch.frexp(wide).exponent - {torch.bfloat16: 8, torch.float16: 11}[dtype]).double()
            assert torch.equal(merged.double(), torch.round(wide / unit) * unit)

    def test_their_matrices_are_not_fused(self):
        assert set(METHODS) <= PER_MATRIX


class TestErrors:
    @every_method
    def test_messages(self, method):
        base, experts = draw(15, (4, 4), 2)
        name = method.__name__
        with pytest.raises(ValueError, match=f"^{name}: there is no expert to merge; give at least one"):
            method(base, experts[:0])
        with pytest.raises(ValueError, match=f"^{name}: scale must be finite, got inf"):
            method(base, experts, scale=math.inf)
        for tolerance in (0.0, 1.0, math.nan):
            message = rf"^{name}: rank_tolerance must be in \[1e-07, 1\), got {tolerance}"
            with pytest.raises(ValueError, match=message):
                method(base, experts, rank_tolerance=tolerance)
        experts[1, 0, 0] = math.nan
        with pytest.raises(ValueError, match=f"^{name}: a matrix with NaN or infinite elements.*such as arithmetic"):
            method(base, experts)

    def test_the_common_share(self):
        base, experts = draw(15, (4, 4), 2)
        with pytest.raises(ValueError, match=r"^iso_cts: common .* must be in \[0, 1\], got 1.5"):
            iso_cts(base, experts, common=1.5)


class TestDecomposition:
    @pytest.mark.parametrize("shape", [(60, 40), (40, 60), (40, 40)])
    def test_graded_singular_values(self, shape):
        generator = torch.Generator().manual_seed(0)
        left, right = (torch.linalg.qr(torch.randn(n, 40, generator=generator, dtype=torch.float64)).Q for n in shape)
        values = torch.logspace(0, -5, 40, dtype=torch.float64)
        found = decompose(left * values @ right.T)
        torch.testing.assert_close(found.values, values, rtol=1e-5, atol=0)
        narrow_side = right if shape[0] >= shape[1] else left
        assert (found.vectors.T @ narrow_side).abs().diagonal().min() > 1 - 1e-9
        torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(40, dtype=torch.float64))


class TestMemo:
    @every_method
    def test_other_scales_decompose_nothing(self, method, memo):
        base, experts = draw(16, (8, 6), 3)
        method(base, experts)
        num_misses, num_hits = memo.num_misses, memo.num_hits
        assert num_misses > 0
        for scale in (0.5, 1.5, 2.0):
            method(base, experts, scale=scale)
        assert memo.num_misses == num_misses
        assert memo.num_hits > num_hits

    def test_methods_share_it(self, memo):
        base, experts = draw(17, (8, 6), 2)
        iso_c(base, experts)
        assert memo.num_misses == 1  # the sum
        tsv_m(base, experts)
        assert memo.num_misses == 5  # both changes, and both sides of their directions
        iso_cts(base, experts, common=0.5)
        assert memo.num_misses == 9  # both changes outside the common directions, and both sides

    @every_method
    def test_results_are_the_same_with_and_without(self, method, memo):
        base, experts = draw(18, (8, 6), 3)
        first, second = method(base, experts), method(base, experts)
        memo.limit_bytes = 0
        assert torch.equal(first, second)
        method(base, experts + 1)  # nothing is kept from here on
        assert memo.num_bytes == 0
        assert torch.equal(method(base, experts), first)

    def test_contents_and_shapes_are_told_apart(self):
        memo = Memo(2**20)
        matrix = torch.arange(12, dtype=torch.float64)
        assert memo.decompose(matrix.view(3, 4)).values.shape == (3,)
        assert memo.decompose(matrix.view(6, 2)).values.shape == (2,)
        assert torch.equal(memo.decompose(2 * matrix.view(3, 4)).values, decompose(2 * matrix.view(3, 4)).values)
        memo.decompose(matrix.view(4, 3).t().contiguous().t())  # other strides, and new contents
        memo.decompose(matrix.view(4, 3).clone())
        assert (memo.num_misses, memo.num_hits) == (4, 1)

    def test_the_bound(self):
        matrices = [torch.full((4, 4), float(n), dtype=torch.float64) for n in range(4)]
        size = 8 * (4 + 16)
        memo = Memo(2 * size + 1)
        for matrix in matrices[:2]:
            memo.decompose(matrix)
        memo.decompose(matrices[0])  # used last, so the other one has to go
        memo.decompose(matrices[2])
        assert memo.num_bytes == 2 * size
        memo.decompose(matrices[0])
        assert (memo.num_hits, memo.num_misses) == (2, 3)
        memo.decompose(matrices[1])
        assert memo.num_misses == 4
        memo.decompose(torch.eye(5, dtype=torch.float64))  # larger than the rest of one
        assert memo.num_bytes <= memo.limit_bytes
        memo.decompose(torch.eye(20, dtype=torch.float64))  # larger than all of it: not kept, and nothing lost
        assert 0 < memo.num_bytes <= memo.limit_bytes

    def test_threads(self, monkeypatch):
        """Eight threads, more matrices than there is room for: results as by one, and the books in order."""
        inputs = [draw(seed, (8, 6), 2) for seed in range(12)]
        expected = [tsv_m(*pair) for pair in inputs]
        memo = Memo(20 * 8 * (6 + 36))
        monkeypatch.setattr(spectral, "DECOMPOSITIONS", memo)
        start = threading.Barrier(8)

        def run(number):
            start.wait()
            return [tsv_m(*inputs[(number + i) % 12]) for i in range(24)]

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(run, range(8)))
        for number, merged in enumerate(found):
            assert all(torch.equal(x, expected[(number + i) % 12]) for i, x in enumerate(merged))
        assert 0 < memo.num_bytes <= memo.limit_bytes
        assert memo.num_bytes == sum(spectral._num_bytes(x) for x in memo._kept.values())
        assert memo.num_hits + memo.num_misses == 8 * 24 * 4
