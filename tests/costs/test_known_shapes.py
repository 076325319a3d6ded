"""Results that are remembered are those that torch works out: shapes, storages and aliases."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fedexperts.costs.known_shapes import KnownShapes, tensors_in

DEVICE = torch.ops.prim.device.default


class Asking(TorchDispatchMode):
    """Answers from what is remembered, and counts operations that reach torch."""

    def __init__(self, mode):
        super().__init__()
        self.known, self.num_calls, self.num_asked = KnownShapes(mode), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_calls += 1
        return self.known.answer(func if func is DEVICE else Counted(func, self), args, kwargs or {})


class Counted:
    """An operation that counts its calls."""

    def __init__(self, func, asking):
        self.func, self.asking = func, asking

    def __call__(self, *args, **kwargs):
        self.asking.num_asked += 1
        return self.func(*args, **kwargs)

    def __eq__(self, other):
        return self.func == other.func

    def __hash__(self):
        return hash(self.func)


def looks(*tensors):
    """Everything that a later operation or the count of bytes depends on."""
    places = {}
    return [
        (
            tuple(one.shape),
            one.stride(),
            one.dtype,
            one.device,
            one.storage_offset(),
            one.untyped_storage().nbytes(),
            places.setdefault(one.untyped_storage()._cdata, len(places)),
        )
        for one in tensors
    ]


OPERATIONS = {
    "product": lambda x: [x, x @ x.t()],
    "view of a slice": lambda x: [x, x[1:], x[1:].view(-1), x[1:, :2].t()],
    "parts": lambda x: [x, *x.split(2), *x[2:].unbind(1)],
    "in place": lambda x: [x, x.mul_(2), x[1].add_(1)],
    "a dtype": lambda x: [x, x.to(torch.bfloat16), x.to(torch.float32)],
    "several results": lambda x: [x, *torch.topk(x, 2), *torch.max(x, dim=0)],
    "numbers apart": lambda x: [x, x + 1, x + 1.5, x.to(torch.int64) + 1, x.to(torch.int64) + 1.0],
    "joined": lambda x: [x, torch.cat([x, x[:1]]), torch.stack([x, x])],
    "made": lambda x: [x, torch.zeros(3, dtype=x.dtype), torch.zeros_like(x), x.new_empty(2, 5)],
    "indexed": lambda x: [x, x.index_select(0, torch.tensor([0, 2])), x[:, torch.tensor([1])]],
    "written": lambda x: [x, x.index_add_(0, torch.tensor([0]), x[:1].clone()), x.zero_()],
    "expanded": lambda x: [x, x[:, :1].expand(4, 7), x[0].unsqueeze(0).expand(3, -1).contiguous()],
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("start", [0, 3])
def test_the_second_answer_is_as_the_first_and_torchs(name, start):
    mode, operations = FakeTensorMode(allow_non_fake_inputs=True), OPERATIONS[name]

    def one():
        return torch.empty(30)[start : start + 20].view(4, 5)

    with mode:
        expected = looks(*operations(one()))
        with Asking(mode) as asking:
            assert looks(*operations(one())) == expected
            first, before = asking.num_asked, asking.num_calls
            assert looks(*operations(one())) == expected
    assert asking.num_calls == 2 * before
    again = asking.num_asked - first
    assert again == 0 or (name in ("indexed", "written") and again < first), "results are remembered"


def test_a_slice_of_another_offset_is_not_taken_for_the_first():
    mode = FakeTensorMode()
    with mode, Asking(mode):
        base = torch.empty(10, 4)
        for offset in (2, 5):
            part = base[offset:]
            assert looks(part[1:].view(-1))[0][4] == 4 * (offset + 1)


def test_a_change_of_an_inputs_shape_is_made_each_time():
    mode = FakeTensorMode()
    with mode, Asking(mode) as asking:
        for _ in range(2):
            tensor = torch.empty(2, 3)
            tensor.unsqueeze_(0)
            assert tensor.shape == (1, 2, 3)
    assert asking.num_asked == 3, "making it is remembered, changing it is not"


def test_real_tensors_among_the_inputs_are_left_to_torch():
    real = torch.ones(2, 3)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, Asking(mode) as asking:
        for _ in range(2):
            assert looks(torch.empty(2, 3) + real)[0][0] == (2, 3)
    assert asking.num_asked == 3, "making the other is remembered, adding is not"


@pytest.mark.parametrize(
    "operation",
    [
        lambda: torch.empty(10)[2:],
        lambda: torch.empty(10)[:2],
        lambda: (made := torch.empty(4), made.view(2, 2)),
    ],
    ids=["a part from the middle", "the first part", "two looks at one storage"],
)
def test_results_that_are_not_whole_storages_of_their_own_are_left_to_torch(operation):
    mode = FakeTensorMode()
    with mode:
        known = KnownShapes(mode)
        first, again = (looks(*tensors_in([known.answer(operation, (), {})])) for _ in range(2))
    assert again == first


def test_tensors_are_found_in_nested_arguments():
    with FakeTensorMode():
        one, two, three = (torch.empty(size) for size in (1, 2, 3))
    nested = ([one, (two,)], {"x": [three, None]}, 4)
    assert [len(tensor) for tensor in tensors_in(nested)] == [1, 2, 3]
