"""The weighted mean per tensor."""

import pytest
import torch

from fedexperts.algorithms.api import Algorithm, ClientFacts, ServerState
from fedexperts.messages import Upload


def state(**tensors: torch.Tensor) -> ServerState:
    return ServerState(round_number=4, tensors=tensors)


def average(start, uploads):
    return Algorithm().server_update(start, (("somebody", upload) for upload in uploads))


def test_each_tensor_is_averaged_over_those_who_sent_it_only():
    """a: (1·2 + 3·6)/4 = 5; b: from the second alone; c: from nobody, so it stays."""
    start = state(a=torch.zeros(1), b=torch.zeros(1), c=torch.full((1,), 7.0))
    uploads = [
        Upload(tensors={"a": torch.full((1,), 2.0)}, weights={"a": 1.0}),
        Upload(
            tensors={"a": torch.full((1,), 6.0), "b": torch.full((1,), 9.0)}, weights={"a": 3.0, "b": 2.0}
        ),
    ]
    after = average(start, iter(uploads))
    assert {name: tensor.item() for name, tensor in after.tensors.items()} == {"a": 5.0, "b": 9.0, "c": 7.0}
    assert after.round_number == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_upload_comes_back_bit_for_bit(dtype):
    value = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    after = average(
        state(a=torch.zeros(1000, dtype=dtype)), [Upload(tensors={"a": value}, weights={"a": 97.0})]
    )
    assert torch.equal(after.tensors["a"], value)


def test_uploads_are_taken_one_at_a_time():
    """The mean never asks for the next upload before it has done with the last."""
    alive = []

    def uploads():
        for value in range(3):
            alive.append(value)
            yield Upload(tensors={"a": torch.full((1,), float(value))}, weights={"a": 1.0})
            assert alive == list(range(value + 1))

    assert average(state(a=torch.zeros(1)), uploads()).tensors["a"].item() == 1.0


def test_clients_are_counted_through_once_for_the_places_of_all():
    class Watched(tuple):
        num_passes = 0

        def __iter__(self):
            Watched.num_passes += 1
            return super().__iter__()

    ids = [f"client-{place:03d}" for place in range(50)]
    facts = Watched(ClientFacts(client_id=client_id, num_train=1) for client_id in ids)
    server = ServerState(round_number=0, tensors={}, clients=facts)
    assert [server.position(client_id) for client_id in ids] == list(range(50))
    assert Watched.num_passes == 1
