"""One absurd upload is refused by its norm, whoever sends it first, and honest ones never are."""

import math
import statistics

import pytest
import torch

from fedexperts.errors import UserError
from fedexperts.federation.cohort import CohortSettings
from fedexperts.federation.norm_guard import Norms, guarded, norms_of
from fedexperts.federation.transport import Delivery
from fedexperts.messages import Upload


def said(changes, *, start=0.0, factor=10.0, beside=None):
    """The reasons of uploads with these norms of change, by their place; a text is refused already."""
    beside = beside or [0.0] * len(changes)
    judged = []
    for place, (change, other) in enumerate(zip(changes, beside, strict=True)):
        delivery = Delivery(client_id=str(place), upload=Upload(), download_bytes=0, upload_bytes=0)
        if isinstance(change, str):
            judged.append((delivery, change, None))
        else:
            judged.append((delivery, "", Norms(change=change, start=start, beside=other)))
    return [(delivery.client_id, reason) for delivery, reason in guarded(judged, factor)]


def refused(*args, **named):
    return [client_id for client_id, reason in said(*args, **named) if reason]


@pytest.mark.parametrize("place", range(4))
def test_the_absurd_one_is_refused_wherever_it_stands(place):
    changes = [1.0, 2.0, 3.0]
    changes.insert(place, 31.0)
    assert refused(changes) == [str(place)], "the median is 2 or 3, of three or of four uploads"


def test_the_limit_itself_is_allowed():
    assert refused([1.0, 2.0, 20.0]) == []
    (reason,) = [reason for _, reason in said([1.0, 2.0, 20.5]) if reason]
    assert reason == (
        "upload refused: its change has norm 20.5, more than cohort.max_change_factor = 10 times "
        "the median of the round's uploads, 2"
    )


def test_of_two_uploads_each_is_held_against_where_it_started_alone():
    assert refused([1.0, 1e9]) == []
    assert refused([1.0, 1e9], start=1.0) == ["1"]
    assert "times that of the tensors it started from, 1" in said([1e9], start=1.0)[0][1]


def test_a_median_of_nothing_judges_nothing():
    assert refused([0.0, 0.0, 5.0]) == []


def test_what_stands_beside_is_judged_alike():
    assert refused([1.0] * 4, beside=[1.0, 2.0, 1e9, 3.0]) == ["2"]


def test_refused_answers_are_told_at_once_and_count_for_no_median():
    given = [1.0, "is away", 2.0, 3.0]
    assert [client_id for client_id, _ in said(given)] == ["1", "0", "2", "3"]


def test_uploads_keep_their_order():
    assert [client_id for client_id, _ in said([1.0] * 5)] == ["0", "1", "2", "3", "4"]


def test_norms_are_of_all_tensors_from_what_the_client_had():
    upload = Upload(
        tensors={"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([5.0])},
        beside={"variate": torch.tensor([6.0, 8.0]), "count": torch.tensor([1000])},
    )
    found = norms_of(upload, {"b": torch.tensor([1.0])})
    assert found == Norms(change=5.0, start=1.0, beside=10.0)


@pytest.mark.parametrize("factor", [-1.0, 1.0, float("nan"), float("inf")])
def test_a_factor_that_is_no_limit_is_refused(factor):
    with pytest.raises(UserError, match=r"max_change_factor must be 0 \(no limit\) or above 1"):
        CohortSettings(max_change_factor=factor)


class Compared(float):
    """A number that counts its comparisons by order."""

    count = 0

    def __lt__(self, other):
        Compared.count += 1
        return float(self) < other


@pytest.mark.parametrize("number", [101, 102])
def test_the_median_of_many_uploads_is_kept_and_not_made_anew_for_each(number):
    changes = [Compared(1 + 7 * place % number) for place in range(number - 1)]
    Compared.count = 0
    (reason,) = [reason for _, reason in said([*changes, Compared(1e6)]) if reason]
    assert Compared.count <= number * math.ceil(math.log2(number)), "a search among those before, for each"
    assert reason.endswith(f"the median of the round's uploads, {statistics.median([*changes, 1e6]):.6g}")
