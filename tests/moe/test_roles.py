"""Roles: eq. 4, its growth, the linear program with coverage, and the slots of a role."""

import itertools
import random

import pytest
import torch
from installed import Installed

from fedexperts.moe.choosing.roles import covering, drawn_from, exploit_share, most_useful
from fedexperts.moe.compressing.role_slots import any_merge


def test_the_share_grows_evenly_and_stops():
    shares = [exploit_share(done, 9, first=0.3, last=0.9, growth=1 / 3) for done in (0, 1, 2, 3, 8)]
    assert shares == pytest.approx([0.3, 0.5, 0.7, 0.9, 0.9])
    assert exploit_share(0, 0, first=0.3, last=0.9, growth=1 / 3) == 0.9, "nobody knows the rounds"


def test_the_most_useful_are_taken_and_of_equals_the_first():
    utility = torch.tensor([[1.0, 3.0, 3.0, -torch.inf], [2.0, 2.0, 2.0, 2.0]])
    assert most_useful(utility, [1, 3]).tolist() == [[False, True, False, False], [True, True, True, False]]


def test_draws_are_of_those_that_may_be_and_no_more_than_there_are():
    may_be = torch.tensor([True, False, True, True])
    drawn = drawn_from(may_be, 2, random.Random(0))
    assert int(drawn.sum()) == 2
    assert not drawn[1]
    assert torch.equal(drawn_from(may_be, 9, random.Random(0)), may_be)


def test_without_need_and_with_loose_loads_the_program_is_eq_4():
    utility = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)).double()
    nothing = {"counts_CN": torch.ones(3, 8).bool(), "need_N": torch.zeros(8).long()}
    found = covering(utility, [2, 3, 8], **nothing, most_N=torch.full((8,), 3))
    assert torch.equal(found, most_useful(utility, [2, 3, 8]))


def value(taken, utility, need, counts):
    """Met need first, then utility."""
    met = torch.minimum((taken & counts).sum(0), need).sum()
    return int(met), float(utility[taken].sum())


@pytest.mark.parametrize("seed", range(12))
def test_the_program_is_the_best_of_all_assignments(seed):
    generator = torch.Generator().manual_seed(seed)
    utility = torch.rand(2, 4, generator=generator).double()
    counts = torch.rand(2, 4, generator=generator) < 0.7
    need = torch.randint(0, 3, (4,), generator=generator)
    most = torch.randint(1, 3, (4,), generator=generator)
    rooms = torch.randint(1, 4, (2,), generator=generator).tolist()
    found = covering(utility, rooms, counts_CN=counts, need_N=need, most_N=most)
    assert (found.sum(1) <= torch.tensor(rooms)).all()
    assert (found.sum(0) <= most).all()
    every = (torch.tensor(bits).reshape(2, 4).bool() for bits in itertools.product((0, 1), repeat=8))
    allowed = [
        one for one in every if (one.sum(1) <= torch.tensor(rooms)).all() and (one.sum(0) <= most).all()
    ]
    best = max(value(one, utility, need, counts) for one in allowed)
    mine = value(found, utility, need, counts)
    assert mine[0] == best[0]
    assert mine[1] == pytest.approx(best[1], abs=1e-4)  # a millionth for each expert, so that room is used


def test_experts_that_do_not_exist_are_never_taken():
    utility = torch.tensor([[0.0, -torch.inf, 0.0]]).double()
    found = covering(
        utility,
        [3],
        counts_CN=torch.ones(1, 3).bool(),
        need_N=torch.ones(3).long(),
        most_N=torch.ones(3).long(),
    )
    assert found.tolist() == [[True, False, True]]


def test_slots_of_an_open_merge_have_its_size_and_every_expert_once(qwen: Installed) -> None:
    roles = [((0, 5), (1,)), ((2,), ())]
    plans = [plan.slots for plan in any_merge(qwen.layers, roles, 4)]
    assert [(plan.tuned, plan.kept, plan.dropped) for plan in plans] == [((0, 5), (1,), ()), ((2,), (), ())]
    assert [len(plan.merged) for plan in plans] == [2, 2]
    for plan in plans:
        assert sorted([*plan.tuned, *plan.kept, *itertools.chain.from_iterable(plan.merged)]) == list(
            range(6)
        )
