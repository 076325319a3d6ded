"""Settings of local steps: ranges, settings without effect, and learning rates by hand."""

import pytest

from fedexperts.errors import UserError
from fedexperts.training.settings import TrainingSettings, learning_rate_share, step_share


def test_the_rate_is_a_cosine_over_rounds():
    settings = TrainingSettings(lr_final_share=0.025)
    assert learning_rate_share(1, 100, settings) == 1.0
    assert learning_rate_share(100, 100, settings) == pytest.approx(0.025)
    assert learning_rate_share(101, 100, settings) == pytest.approx(0.025)
    assert learning_rate_share(1, 1, settings) == 1.0
    assert learning_rate_share(3, 5, settings) == pytest.approx((1 + 0.025) / 2)


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("linear", [1.0, 0.8, 0.6, 0.4, 0.2]),
        # 0.2 + 0.8 * (1 + cos(x)) / 2 at x = 0, 45, 90, 135 and 180 degrees.
        ("cosine", [1.0, 0.8828427, 0.6, 0.3171573, 0.2]),
    ],
)
def test_the_rate_within_a_round_falls_to_its_final_share(schedule, shares):
    settings = TrainingSettings(step_schedule=schedule, step_final_share=0.2)
    assert [step_share(step, 5, settings) for step in range(1, 6)] == pytest.approx(shares)
    assert step_share(1, 1, settings) == 1.0


def test_a_flat_rate_is_exactly_one():
    assert {step_share(step, 5, TrainingSettings()) for step in range(1, 6)} == {1.0}


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        *((key, 0) for key in ("num_local_steps", "batch_size", "accumulation", "lr")),
        *((key, -0.1) for key in ("weight_decay", "gradient_clip", "router_aux_loss", "momentum")),
        *((key, wrong) for key in ("lr_final_share", "step_final_share") for wrong in (-0.1, 1.1)),
        ("lr", float("nan")),
    ],
)
def test_numbers_out_of_range_are_refused(key, wrong):
    with pytest.raises(UserError, match=rf"^{key} must (be|not be) .*{wrong}$"):
        TrainingSettings(**{key: wrong})


@pytest.mark.parametrize(
    "keys",
    [
        {"num_local_steps": 1, "batch_size": 1, "lr": 1e-9, "gradient_clip": 0.0, "lr_final_share": 0.0},
        {"accumulation": 8, "weight_decay": 0.5, "lr_final_share": 1.0, "router_aux_loss": 0.5},
        {"num_local_steps": 2, "step_schedule": "linear", "step_final_share": 0.0},
        {"optimizer": "sgd", "momentum": 0.5, "optimizer_state": "kept"},
        {"optimizer": "adafactor", "optimizer_state": "kept"},
    ],
)
def test_the_ends_of_each_range_are_taken(keys):
    settings = TrainingSettings(**keys)
    assert {key: getattr(settings, key) for key in keys} == keys


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"momentum": 1.0, "optimizer": "sgd"}, "momentum must be from 0 to below 1, not 1.0"),
        (
            {"step_final_share": 1.5, "step_schedule": "linear"},
            "step_final_share must be from 0 to 1, not 1.5",
        ),
        ({"momentum": 0.9}, 'momentum is 0.9, but has no effect with optimizer "adamw"'),
        ({"replay_texts": 5}, "replay_texts is 5, but has no effect without replay"),
        ({"accumulation": 9}, "accumulation is 9, but must be at most batch_size, which is 8"),
        ({"optimizer": "sgd", "optimizer_state": "kept"}, 'optimizer_state is "kept", but "sgd"'),
        ({"step_final_share": 0.1}, 'step_final_share is 0.1, but step_schedule is "flat"'),
        ({"step_schedule": "linear"}, 'step_schedule is "linear", but step_final_share is 1'),
        (
            {"step_schedule": "cosine", "step_final_share": 0.1, "num_local_steps": 1},
            'step_schedule is "cosine", but num_local_steps is 1',
        ),
    ],
)
def test_settings_without_effect_are_refused(keys, message):
    with pytest.raises(UserError, match=f"^{message}"):
        TrainingSettings(**keys)
