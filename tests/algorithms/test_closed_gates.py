"""Gates that learn to stay closed off the task: their loss, whom it reaches, and what it does."""

import json
from itertools import islice

import pytest
import torch
from transformers import AutoTokenizer
from turns import make_parts

from fedexperts.algorithms.closed_gates import ClosedGates, closing_gradients
from fedexperts.data.batches import Batch
from fedexperts.data.prompts import PromptFormat
from fedexperts.data.tinyworld import CATEGORIES, make_exam, pretraining_texts
from fedexperts.errors import UserError
from fedexperts.federation.calibration import first_texts
from fedexperts.moe.surgery import graft as grafting
from fedexperts.moe.surgery.graft import GraftForm, grafts_of
from fedexperts.moe.surgery.undo import undone
from fedexperts.run_directory import read_lines
from fedexperts.running.experiment import run_experiment

OFF = ("algorithm.off_task=tinyworld", "algorithm.off_task_examples=8")


@pytest.fixture(scope="module")
def format(tiny_checkpoint):
    return PromptFormat(AutoTokenizer.from_pretrained(tiny_checkpoint), "chat", 64)


def make_batch(length=9):
    ids = torch.randint(3, 100, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return Batch(input_ids=ids, attention_mask=mask, labels=ids, num_examples=2, num_labels=length)


def test_the_gradient_is_that_of_the_mean_log_of_what_is_closed():
    parts = make_parts()
    with undone(parts.model, parts.layers):
        grafting.graft(parts.layers, [0, 1], GraftForm(gate_bias=0.5), seed=0)
        (one,) = grafts_of(parts.layers[0])
        hidden_TD = torch.randn(7, parts.layers[0].hidden_size, generator=torch.Generator().manual_seed(0))
        vector, bias = closing_gradients(one, hidden_TD, 2.0)
        # d/ds of -log(1 - sigmoid(s)) is sigmoid(s).
        opened_T1 = torch.sigmoid(hidden_TD @ one.gate_weight.unsqueeze(-1) + one.gate_bias).detach()
        torch.testing.assert_close(bias, 2 * opened_T1.mean(dim=0))
        torch.testing.assert_close(vector, 2 * (opened_T1 * hidden_TD).mean(dim=0))


def test_gates_alone_are_corrected_once_a_step_and_padding_does_not_count():
    parts = make_parts()
    with undone(parts.model, parts.layers):
        names = grafting.graft(parts.layers, [(0, 2), (1, 3)], GraftForm(), seed=0)
        gates = grafting.names_of_kind(names, is_gate=True)
        parameters = dict(parts.model.named_parameters())
        changed = {}
        for length in (9, 12):
            batch = make_batch(9)
            if length > 9:
                more = torch.zeros(2, 3, dtype=torch.long)
                batch = Batch(
                    input_ids=torch.cat([batch.input_ids, more], dim=1),
                    attention_mask=torch.cat([batch.attention_mask, more], dim=1),
                    labels=batch.labels,
                    num_examples=2,
                    num_labels=9,
                )
            correct = ClosedGates(parts.model, parts.layers, gates, [batch], 1.0, 0).as_correction().gradient
            with torch.no_grad():
                changed[length] = {
                    name: correct(name, parameters[name], torch.zeros_like(parameters[name]))
                    for name in names
                }
    found = {name for name, gradient in changed[9].items() if gradient is not None}
    assert found == set(gates)
    for name in gates:
        assert changed[9][name].abs().sum() > 0
        torch.testing.assert_close(changed[9][name], changed[12][name])


@pytest.mark.slow
def test_private_gates_close_off_the_task_and_the_shared_one_is_left_alone(make_config, tmp_path, quiet):
    steps = ("training.num_local_steps=4", "training.lr=0.03")
    opened = {}
    for name, more in (("open", ()), ("closed", OFF)):
        run_experiment(make_config("flex", *steps, *more), tmp_path / name, progress=quiet)
        lines = read_lines(tmp_path / name / "clients.jsonl")
        opened[name] = torch.tensor([line["algorithm"]["gate_mean"] for line in lines]).mean()
    assert opened["closed"] < opened["open"] - 0.02


def test_the_embedded_texts_are_instructions_of_the_corpus_and_no_exam_question(format):
    texts = [text for text in islice(pretraining_texts(0), 400) if text.kind in CATEGORIES]
    exam = {question.question for question in make_exam(seed=0, num_questions=200)}
    assert texts
    assert not exam & {text.prompt for text in texts}
    assert len(first_texts(format, "tinyworld", 5, "algorithm.off_task")) == 5


def test_a_file_may_have_texts_and_instructions(format, tmp_path):
    file = tmp_path / "public.jsonl"
    records = [{"text": "A river."}, {"instruction": "Name a river.", "response": "The Wend."}]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    text, instruction = first_texts(format, str(file), 9, "algorithm.off_task")
    assert text.prompt_length == 0 < instruction.prompt_length
    file.write_text('{"instruction": "Name a river."}\n')
    with pytest.raises(UserError, match=r"^algorithm\.off_task: public\.jsonl:1: the record has no text"):
        first_texts(format, str(file), 9, "algorithm.off_task")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            ("algorithm.off_task=tinyworld", "algorithm.num_grafts=0"),
            "there is no private gate",
        ),
        (("algorithm.off_task=tinyworld", "algorithm.graft.gate=none"), "there is no private gate"),
        (("algorithm.off_task=tinyworld", "algorithm.placement=in_place"), "there is no private gate"),
        (("algorithm.off_task_weight=2",), "off_task_weight is 2.0, but has no effect without off_task"),
        (("algorithm.off_task=tinyworld", "algorithm.off_task_weight=0"), "off_task_weight must be above 0"),
    ],
)
def test_settings_without_effect_are_refused(settings, sentence, make_config):
    with pytest.raises(UserError, match=sentence):
        make_config("flex", *settings)
