"""Two processes with half a batch each against one with the whole batch."""

import pytest
import rank_runs
import torch
from rank_runs import CASES, MODELS, NUM_RANKS, OPTIMISERS, WANTED, weights, whole_rows

from modalmerge import ranks
from modalmerge.tasks.retrieval import contrastive_loss, contrastive_over_ranks, similarities

torch.set_num_threads(1)
HALVES = (slice(0, 3), slice(3, 6))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two ranks heard of the other, and the losses and gradients of the tasks."""
    return rank_runs.spawn(rank_runs.tell_and_learn, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """(curve, weights) of each rank, and of one process alone."""
    together = rank_runs.spawn(rank_runs.pretrain, tmp_path_factory.mktemp("pretrained"))
    return *together, rank_runs.pretrain()


# -- what ranks tell each other -----------------------------------------------------------------------------


def test_each_rank_knows_who_it_is(found):
    assert [own["who"] for own in found] == [(True, 0, 2, True, slice(0, 3)), (True, 1, 2, False, slice(3, 6))]


def test_an_uneven_batch_is_told(found):
    assert [own["message"] for own in found] == [
        "5 samples at once have no 2 equal parts, one for each process; choose a batch_size, or a micro_batch_size, "
        "that 2 divides, or another number of processes"
    ] * NUM_RANKS


def test_numbers_and_lists_of_all_ranks(found):
    for own in found:
        assert own["sum"].tolist() == [21, 3]
        assert own["lists"] == [[], [("of rank", 1)]]
        assert torch.equal(own["broadcast"], torch.arange(3)[:, None])
        assert torch.equal(own["broadcast a view"], torch.arange(6.0).view(2, 3).T)


def expected(results, rows):
    """Gradient of the ranks' losses together, where `results` says what each of them makes of all rows."""
    rows = rows.clone().requires_grad_()
    sum((result(rows) * weights(result(rows), rank)).sum() for rank, result in enumerate(results)).backward()
    return rows.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["gather", "exchange"])
def test_rows_and_their_gradients_travel(found, kind, dtype):
    rows = whole_rows(6, dtype)
    parts = [torch.arange(6)] * 2 if kind == "gather" else torch.tensor(WANTED["mixed"]).chunk(NUM_RANKS)
    gradient = expected([lambda x, part=part: x[part] for part in parts], rows)
    for own, part, half in zip(found, parts, HALVES, strict=True):
        result, own_gradient = own[kind, dtype]
        assert result.dtype == own_gradient.dtype == dtype
        assert torch.equal(result, rows[part])
        assert torch.equal(own_gradient, gradient[half])


@pytest.mark.parametrize("wanted", WANTED)
def test_samples_are_fetched_whoever_has_them(found, wanted):
    rows = whole_rows(6)
    parts = torch.tensor(WANTED[wanted]).chunk(NUM_RANKS)
    gradient = expected([lambda x, part=part: x[part] for part in parts], rows)
    for own, part, half in zip(found, parts, HALVES, strict=True):
        assert torch.equal(own["exchange", wanted][0], rows[part])
        torch.testing.assert_close(own["exchange", wanted][1], gradient[half], rtol=0, atol=1e-12)


def test_rows_without_gradients_are_gathered(found):
    for own in found:
        assert torch.equal(own["plain"], whole_rows(6).transpose(1, 2))
        assert not own["plain"].requires_grad
        assert torch.equal(own["numbers"], torch.arange(6))


def test_means_over_unequal_counts(found):
    """The ranks' means are 2 and 3: of 3 and 5 elements, of none and 4, of none at all."""
    assert [own["share", "both"] for own in found] == [(1.5, 0.75, 1.5), (3.75, 1.25, 3.75)]
    assert [own["share", "one"] for own in found] == [(0.0, 0.0, 0.0), (6.0, 2.0, 6.0)]
    assert [own["share", "none"] for own in found] == [(0.0, 0.0, 0.0)] * 2


def test_nothing_changes_for_a_process_alone():
    rows, wanted = whole_rows(6).requires_grad_(), torch.tensor([4, 0, 0, 5, 1, 4])
    assert not ranks.is_distributed()
    assert (ranks.rank(), ranks.num_ranks(), ranks.is_first(), ranks.own_rows(5)) == (0, 1, True, slice(0, 5))
    assert ranks.gather_rows(rows) is rows
    assert ranks.share_of_mean(rows[0, 0, 0], 0) == rows[0, 0, 0]
    assert ranks.broadcast(rows) is rows
    assert torch.equal(ranks.sum_over_ranks(rows), rows) and not ranks.sum_over_ranks(rows).requires_grad
    assert ranks.gather_lists(["a"]) == [["a"]]
    assert torch.equal(ranks.exchange(rows, wanted), rows[wanted])
    ranks.wait()


# -- losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_halves_of_a_batch_learn_as_the_whole(found, case):
    task, num_asked = CASES[case]
    loss = rank_runs.task_loss(task)
    value = loss(rank_runs.task_batch(task, num_asked, slice(None)))
    value.backward()
    alone = rank_runs.gradients(loss)
    assert sum(gradient.abs().max() > 1e-3 for gradient in alone.values()) > 10
    for own in found:
        mean, gradients = own[case]
        assert mean == pytest.approx(value.item(), rel=1e-9)
        assert gradients.keys() == alone.keys()
        for name, gradient in alone.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-9, msg=name)


def test_the_contrastive_loss_of_a_process_alone():
    image, text = whole_rows(6).flatten(1), whole_rows(7)[:6].flatten(1)
    scale = torch.tensor(0.5, dtype=torch.float64)
    scores, loss = contrastive_over_ranks(image, text, scale)
    assert torch.equal(scores, similarities(image, text, scale))
    assert loss == contrastive_loss(scores)
    by_hand = sum(-x.log_softmax(1).diagonal().mean() for x in (scores, scores.T)) / 2
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-12)


@pytest.mark.parametrize("dtype", OPTIMISERS, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_two_processes_pretrain_as_one(pretrained, model, dtype):
    *together, alone = (run[model, dtype] for run in pretrained)
    curve, state = alone
    assert {"contrastive", "matching", "masked_language", "loss"} == set(curve[0])
    for own_curve, own_state in together:
        for losses, whole in zip(own_curve, curve, strict=True):
            assert losses == pytest.approx(whole, abs=1e-5)
        if dtype == torch.float64:
            assert max((own_state[name] - state[name]).abs().max() for name in state) < 1e-6
    first, second = (own_state for _, own_state in together)
    assert all(torch.equal(first[name], second[name]) for name in first)
