"""A preset is another algorithm's class with other defaults."""

import pickle
from dataclasses import FrozenInstanceError, fields

import pytest

from fedexperts.algorithms.fedavg import FedAvg
from fedexperts.algorithms.presets import preset


@pytest.fixture
def all_experts():
    return preset(FedAvg, "FedAvg with all routed experts", experts=True)


def test_a_preset_differs_in_its_defaults_alone(all_experts):
    assert issubclass(all_experts, FedAvg)
    assert all_experts.__doc__ == "FedAvg with all routed experts"
    assert (all_experts.__name__, all_experts.__module__) == ("FedAvg", FedAvg.__module__)
    own, others = ({item.name: item.default for item in fields(cls)} for cls in (all_experts, FedAvg))
    assert own == others | {"experts": True}
    types = [{item.name: item.type for item in fields(cls)} for cls in (all_experts, FedAvg)]
    assert types[0] == types[1]


def test_a_preset_goes_to_another_process_with_its_settings(all_experts):
    settings = all_experts(experts=False)
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert type(pickle.loads(pickle.dumps(settings))) is all_experts


def test_a_preset_takes_settings_by_name_and_is_frozen(all_experts):
    assert all_experts(experts=False) == all_experts(experts=False) != all_experts()
    with pytest.raises(TypeError):
        all_experts(False)
    with pytest.raises(FrozenInstanceError):
        all_experts().experts = False


def test_a_default_of_a_setting_that_is_none_is_refused():
    with pytest.raises(AssertionError, match=r"FedAvg has no \{'rank'\}"):
        preset(FedAvg, "with a rank", rank=3)
