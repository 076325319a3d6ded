"""Weights by instance: against the formula by hand, padding, generation, and fixed weights elsewhere."""

import pytest
import torch
from torch.nn import functional

from fedexperts.data.batches import IGNORED_LABEL, Batch
from fedexperts.errors import UserError
from fedexperts.evaluation.generate import generate_greedily
from fedexperts.evaluation.loss import label_losses
from fedexperts.models.adapters import AdapterSettings, adapter_scales, add_adapter, add_lora, scale_adapters
from fedexperts.models.instance_weights import (
    InstanceForm,
    add_instance_weights,
    instance_weights_of,
    notes_of,
)
from fedexperts.models.prompts import prompts_are
from fedexperts.models.tiny import tiny_model
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.undo import undone

FORM = InstanceForm(averaged="default", local="own", largest=0.8, scale=4.0)
STORED = ((5, 6, 7), (20, 21, 22, 23, 24), (9, 9))


def make(targets=("attention",)):
    """A tiny model with two trained adapters and fixed weights of 0.5."""
    settings = AdapterSettings(rank=2, alpha=8.0, target_modules=targets)
    model = tiny_model("qwen2_moe")
    names = add_lora(model, settings, 0) + add_adapter(model, settings, 1, "own")
    generator = torch.Generator().manual_seed(3)
    parameters = dict(model.named_parameters())
    for name in names:
        parameters[name].data.normal_(std=0.3, generator=generator)
    scale_adapters(model, {"default": 2.0, "own": 2.0})
    return model.eval()


@pytest.fixture
def model():
    """The model of :func:`make` with three stored instances."""
    model = make()
    weights = add_instance_weights(model, FORM, len(STORED))
    weights.references.data.copy_(weights.embed(model, STORED))
    return model


def representation(plain, prompt):
    """The last layer's output at the last token, with the local adapter alone."""
    scale_adapters(plain, {"default": 0.0, "own": 4.0})
    with torch.no_grad():
        return plain.model(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1]


def weight_by_hand(plain, prompt):
    own = representation(plain, prompt)
    alike = [functional.cosine_similarity(own, representation(plain, one), dim=0) for one in STORED]
    return 0.8 * float(torch.stack(alike).mean())


def logits_with(plain, ids, local):
    scale_adapters(plain, {"default": 4.0 * (1 - local), "own": 4.0 * local})
    with torch.no_grad():
        return plain(input_ids=torch.tensor([ids])).logits[0]


def logits(model, ids, **options):
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids), **options).logits


@pytest.mark.parametrize("prompt", [(5, 6, 7), (30, 31, 32, 33)])
def test_a_prompt_is_weighed_by_its_likeness_to_the_stored_ones(model, prompt):
    plain = make()
    local = weight_by_hand(plain, prompt)
    torch.testing.assert_close(logits(model, [prompt])[0], logits_with(plain, prompt, local))
    assert adapter_scales(model) == {"default": 2.0, "own": 2.0}, "the fixed weights are back"


def test_the_prompt_alone_decides_and_not_the_answer(model):
    prompt, answer, plain = (30, 31, 32, 33), (40, 41, 42), make()
    with prompts_are(lambda: [prompt]):
        found = logits(model, [prompt + answer])[0]
    torch.testing.assert_close(found, logits_with(plain, prompt + answer, weight_by_hand(plain, prompt)))
    assert not torch.allclose(found, logits(model, [prompt + answer])[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_nowhere(model, side):
    """A row alone and in a batch; the tolerance is for sums in another order."""
    long, short = [30, 31, 32, 33, 34, 35], [5, 6, 7]
    padding, mask = [1] * 3, torch.ones(2, 6, dtype=torch.int64)
    row = short + padding if side == "right" else padding + short
    mask[1] = torch.tensor(row) != 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = logits(model, [long, row], attention_mask=mask, position_ids=positions)[1][mask[1].bool()]
    torch.testing.assert_close(found, logits(model, [short])[0], rtol=1e-4, atol=1e-5)


def batch_of(rows):
    """Rows of (prompt, answer), padded on the right."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(p + a) for p, a in rows], batch_first=True)
    labels, mask = torch.full_like(ids, IGNORED_LABEL), torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt + answer)
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = ids[row, len(prompt) : end]
    num_labels = int((labels != IGNORED_LABEL).sum())
    return Batch(
        input_ids=ids, attention_mask=mask, labels=labels, num_examples=len(rows), num_labels=num_labels
    )


ROWS = [((30, 31, 32, 33), (40, 41)), ((5, 6), (50, 51, 52, 53)), ((60, 61, 62), (63,))]


def test_a_batch_knows_its_prompts():
    assert batch_of(ROWS).prompts() == [prompt for prompt, _ in ROWS]
    plain = batch_of([((), (4, 5, 6)), ((7, 8), ())])
    assert plain.prompts() == [(4,), (7, 8)]


def test_losses_are_scored_with_the_weight_of_each_prompt(model):
    losses, plain = label_losses(model, batch_of(ROWS)), make()
    for loss, (prompt, answer) in zip(losses.tolist(), ROWS, strict=True):
        scored = logits_with(plain, prompt + answer, weight_by_hand(plain, prompt))[len(prompt) - 1 : -1]
        by_hand = functional.cross_entropy(scored, torch.tensor(answer), reduction="sum")
        assert loss == pytest.approx(float(by_hand), rel=1e-4)


def answers(model, prompts, batch_size):
    found = generate_greedily(
        model, prompts, max_new_tokens=5, batch_size=batch_size, eos_token_id=2, pad_token_id=0
    )
    return [answer.token_ids for answer in found]


def test_an_answer_is_generated_with_the_weight_of_its_prompt(model):
    prompts, plain = [prompt for prompt, _ in ROWS], make()
    found = answers(model, prompts, batch_size=3)
    for prompt, answer in zip(prompts, found, strict=True):
        local = weight_by_hand(plain, prompt)
        scale_adapters(plain, {"default": 4.0 * (1 - local), "own": 4.0 * local})
        assert answers(plain, [prompt], batch_size=1) == [answer]


def test_transformers_own_generation_keeps_the_weight_of_the_prompt(model):
    prompt = [30, 31, 32, 33]
    ids = torch.tensor([prompt])
    theirs = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    assert tuple(theirs[0, 4:].tolist()) == answers(model, [prompt], batch_size=1)[0]


def test_modules_that_see_all_rows_as_one_list_are_weighed_too():
    targets = ("shared_expert.up_proj",)
    model, plain = make(targets), make(targets)
    weights = add_instance_weights(model, FORM, len(STORED))
    weights.references.data.copy_(weights.embed(model, STORED))
    rows = [[30, 31, 32], [5, 6, 7]]
    for row, found in zip(rows, logits(model, rows), strict=True):
        expected = logits_with(plain, tuple(row), weight_by_hand(plain, tuple(row)))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_training_keeps_the_fixed_weights_bit_for_bit(model):
    model.train()
    assert torch.equal(logits(model, [[30, 31, 32]]), logits(make().train(), [[30, 31, 32]]))


def test_a_prompt_that_is_stored_alone_has_the_largest_weight():
    model = make()
    weights = add_instance_weights(model, FORM, 1)
    weights.references.data.copy_(weights.embed(model, [(30, 31, 32)]))
    torch.testing.assert_close(logits(model, [[30, 31, 32]])[0], logits_with(make(), (30, 31, 32), 0.8))


def test_other_stored_instances_are_noticed(model):
    before = logits(model, [[30, 31, 32]])
    instance_weights_of(model).references.data.neg_()
    assert not torch.allclose(logits(model, [[30, 31, 32]]), before)


def test_a_prompt_is_weighed_once(model):
    """The second pass of the same prompts runs the model once, not twice."""
    calls = []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with prompts_are(lambda: [(30, 31)]):
        logits(model, [[30, 31, 32]])
        logits(model, [[30, 31, 33]])
    assert len(calls) == 3


def test_the_weights_are_undone():
    model = make()
    before = logits(model, [[30, 31, 32]])
    with undone(model, seam.find_moe_layers(model)):
        add_instance_weights(model, FORM, 2)
        assert notes_of(model)["num_instances"] == 2
        assert not torch.equal(logits(model, [[30, 31, 32]]), before)
    assert instance_weights_of(model) is None
    assert notes_of(model) == {}
    assert torch.equal(logits(model, [[30, 31, 32]]), before)


def test_embeddings_without_tokens_are_refused(model):
    with pytest.raises(UserError, match="needs input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 8))
