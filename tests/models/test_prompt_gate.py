"""A gate by prompt: the fitted line, closed rows bit for bit, open ones, and what it leaves alone."""

import pytest
import torch
from peft.tuners.lora import LoraLayer

from fedexperts.evaluation.generate import generate_greedily
from fedexperts.models import prompt_gate
from fedexperts.models.adapters import AdapterSettings, add_lora
from fedexperts.models.prompt_gate import PromptGateForm, add_prompt_gate, separate
from fedexperts.models.prompts import prompts_are
from fedexperts.models.tiny import tiny_model
from fedexperts.moe.surgery.graft import GraftForm, graft, grafts_of
from fedexperts.moe.surgery.seam import find_moe_layers, install_implementation
from fedexperts.moe.surgery.undo import undone

OWN, OTHER = [(5, 6, 7), (6, 7, 8, 5)], [(40, 41), (42, 43, 44, 41, 40)]


FORMS = [GraftForm(), GraftForm(mix="convex"), GraftForm(gate="none")]


def make(chosen=(0, 1), form=FORMS[0]):
    """A tiny model with LoRA that does something, and grafts unlike their experts."""
    model = tiny_model("qwen2_moe").eval()
    install_implementation(model)
    generator = torch.Generator().manual_seed(3)
    names = add_lora(model, AdapterSettings(rank=2, alpha=8.0, target_modules=("attention",)), 0)
    layers = find_moe_layers(model)
    names += graft(layers, chosen, form, 0) if chosen else ()
    parameters = dict(model.named_parameters())
    for name in names:
        noise = torch.randn(parameters[name].shape, generator=generator)
        parameters[name].data.add_(0.3 * noise)
    return model, layers


def gated(*, closes_lora=False, first_graft=0, **options):
    model, layers = make(**options)
    form = PromptGateForm(first_graft=first_graft, closes_lora=closes_lora)
    gate = add_prompt_gate(model, layers, form)
    gate.fit(model, OWN, OTHER)
    return model, layers, gate


def logits(model, ids, **options):
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids), **options).logits


def without(model, layers, *, lora=False):
    """The same weights with private grafts silent, and LoRA too if asked."""
    for layer in layers:
        for one in grafts_of(layer):
            one.opened = lambda hidden_TD: 0.0
    for module in model.modules() if lora else ():
        if isinstance(module, LoraLayer):
            module.scaling.update(dict.fromkeys(module.scaling, 0.0))
    return model


def test_the_line_is_the_best_of_all_by_its_loss():
    generator = torch.Generator().manual_seed(0)
    own, other = torch.randn(7, 3, generator=generator) + 1, 3 * torch.randn(20, 3, generator=generator)
    vector, bias = separate(own, other)
    rows = torch.cat([own, other]).double()
    weight = torch.tensor([0.5 / 7] * 7 + [0.5 / 20] * 20, dtype=torch.float64)
    scale = (weight @ (rows - weight @ rows) ** 2).sqrt()

    def loss(vector, bias):
        error = rows @ vector + bias - torch.tensor([1.0] * 7 + [-1.0] * 20)
        return (weight * error**2).sum() + prompt_gate.RIDGE * ((vector * scale) ** 2).sum()

    vector, bias = vector.requires_grad_(), bias.requires_grad_()
    gradients = torch.autograd.grad(loss(vector, bias), [vector, bias])
    assert max(float(one.abs().max()) for one in gradients) < 1e-9, "the loss is convex: no slope, no better"


def test_a_feature_that_never_changes_decides_nothing():
    own, other = torch.tensor([[1.0, 7.0], [2.0, 7.0]]), torch.tensor([[-1.0, 7.0], [-2.0, 7.0]])
    vector, bias = separate(own, other)
    assert vector[1] == 0
    assert (own.double() @ vector + bias > 0).all()
    assert (other.double() @ vector + bias < 0).all()


@pytest.mark.parametrize("closes_lora", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=["add", "convex", "no token gate"])
def test_a_closed_row_is_the_model_without_and_an_open_one_the_model_with(form, closes_lora):
    model, _, gate = gated(closes_lora=closes_lora, form=form)
    assert gate.numbers_of(model, OWN + OTHER).tolist() == [1, 1, 0, 0]
    own, other = logits(model, [OWN[1]]), logits(model, [OTHER[0]])
    plain, layers = make(form=form)
    assert torch.equal(own, logits(plain, [OWN[1]]))
    assert not torch.equal(other, logits(plain, [OTHER[0]]))
    assert torch.equal(other, logits(without(plain, layers, lora=closes_lora), [OTHER[0]]))


def test_rows_of_one_batch_are_decided_each_for_itself():
    model, _, _ = gated(closes_lora=True)
    rows, mask = [[*OWN[0], 1, 1], list(OTHER[1])], [[1, 1, 1, 0, 0], [1] * 5]
    found = logits(model, rows, attention_mask=torch.tensor(mask))
    # Sums over a padded batch are made in another order.
    torch.testing.assert_close(found[0, :3], logits(model, [OWN[0]])[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], logits(model, [OTHER[1]])[0], rtol=1e-4, atol=1e-5)


def test_the_prompt_decides_for_the_answer_too():
    model, _, _ = gated()
    with prompts_are(lambda: [OTHER[0]]):
        found = logits(model, [OTHER[0] + OWN[0] * 4])
    plain, layers = make()
    assert torch.equal(found, logits(without(plain, layers), [OTHER[0] + OWN[0] * 4]))
    options = {"max_new_tokens": 6, "batch_size": 2, "eos_token_id": 2, "pad_token_id": 0}
    answers = generate_greedily(model, [OWN[0], OTHER[0]], **options)
    opened, closed = make()[0], without(*make())
    assert answers[0] == generate_greedily(opened, [OWN[0]], **options)[0]
    assert answers[1] == generate_greedily(closed, [OTHER[0]], **options)[0]


def test_in_training_everything_is_open():
    model, _, _ = gated(closes_lora=True)
    logits(model, [OTHER[0]])
    plain, _ = make()
    assert torch.equal(logits(model.train(), [OTHER[0]]), logits(plain.train(), [OTHER[0]]))


def test_a_graft_that_others_share_stays_open():
    model, layers, _ = gated(chosen=((0, 1), (1, 2)), first_graft=1)
    closed = logits(model, [OTHER[0]])
    plain, layers = make(chosen=((0, 1), (1, 2)))
    for layer in layers:
        grafts_of(layer)[1].opened = lambda hidden_TD: 0.0
    assert torch.equal(closed, logits(plain, [OTHER[0]]))


def test_prompts_look_the_same_whatever_is_trained():
    model, layers, gate = gated()
    before = gate.represent(model, OWN + OTHER)
    for layer in layers:
        for one in grafts_of(layer):
            one.gate_bias.data.add_(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.mul_(-2)
    assert torch.equal(gate.represent(model, OWN + OTHER), before)


def test_after_the_turn_nothing_is_left_of_it():
    model, layers = make(chosen=())
    before = logits(model, [OTHER[0]])
    with undone(model, layers):
        graft(layers, (0, 1), GraftForm(), 0)
        add_prompt_gate(model, layers, PromptGateForm(first_graft=0, closes_lora=True)).fit(model, OWN, OTHER)
        logits(model, [OTHER[0]])
    assert prompt_gate.notes_of(model) == {}
    assert torch.equal(logits(model, [OTHER[0]]), before)
