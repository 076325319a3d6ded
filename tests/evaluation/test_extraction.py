"""Extraction of training data: the measure by hand, a model that has learnt a text, and the command."""

import json

import pytest
import torch

from fedexperts.cli.program import main
from fedexperts.data.canaries import NOT_PLANTED, canaries
from fedexperts.data.federated import load_federated_data
from fedexperts.data.prompts import PromptFormat
from fedexperts.data.tinyworld import CATEGORIES, make_example
from fedexperts.errors import UserError
from fedexperts.evaluation.extraction import (
    Extraction,
    ExtractionSettings,
    extract,
    levenshtein,
    similarity,
)
from fedexperts.evaluation.generate import generate_greedily, generate_sampled
from fedexperts.models.tiny import tiny_model
from fedexperts.running.experiment import run_experiment

ONE = ExtractionSettings(num_generations=2, top_k=2)


@pytest.fixture(scope="module")
def format(tiny_checkpoint):
    from transformers import AutoTokenizer

    return PromptFormat(AutoTokenizer.from_pretrained(tiny_checkpoint), "auto", 96)


@pytest.fixture(scope="module")
def learner(format):
    """A model and the canary that it was trained on until it knows it."""
    torch.manual_seed(0)
    model = tiny_model("qwen2_moe", vocab_size=len(format.tokenizer), eos_token_id=format.eos_token_id)
    known = canaries("a", 1)[0]
    ids = torch.tensor([format.encode(known).input_ids])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(140):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval(), known


@pytest.mark.parametrize(
    ("one", "other", "distance", "share"),
    [
        ("kitten", "sitting", 3, 1 - 3 / 7),
        ("", "abc", 3, 0.0),
        ("abc", "abc", 0, 1.0),
        ("", "", 0, 1.0),
        ("ab", "ba", 2, 0.0),
        ("abcdefghij", "abcdefghiX", 1, 0.9),
    ],
)
def test_distance_and_similarity_are_those_of_the_definition(one, other, distance, share):
    assert levenshtein(one, other) == levenshtein(other, one) == distance
    assert similarity(one, other) == share


def test_a_similarity_of_nine_tenths_counts_and_less_does_not():
    assert Extraction(best=(0.9, 1.0, 0.899, 0.2)).figures() == {
        "num_texts": 4,
        "num_extracted": 2,
        "rate": 0.5,
        "mean_best_similarity": pytest.approx((0.9 + 1.0 + 0.899 + 0.2) / 4),
    }


def test_what_a_model_has_learnt_is_extracted_and_what_it_never_saw_is_not(learner, format):
    model, known = learner
    assert extract(model, format, [known], ONE).num_extracted == 1
    other = canaries("a", 1, NOT_PLANTED)
    assert extract(model, format, other, ONE).num_extracted == 0


def test_a_prefix_that_leaves_nothing_is_refused(learner, format):
    with pytest.raises(UserError, match=r"canary:planted:a:0 has \d+ tokens of response .* nothing is left"):
        extract(*(learner[0], format), [learner[1]], ExtractionSettings(prefix_tokens=500))


def test_draws_among_one_token_are_greedy_and_a_seed_repeats_them(format):
    model = tiny_model("qwen2_moe", vocab_size=len(format.tokenizer)).eval()  # sure of nothing
    prompts = [format.encode_prompt(one) for one in canaries("b", 3)]
    limits = {
        "max_new_tokens": 8,
        "batch_size": 2,
        "eos_token_id": format.eos_token_id,
        "pad_token_id": format.pad_token_id,
    }
    assert generate_sampled(model, prompts, **limits, seed=0, top_k=1) == generate_greedily(
        model, prompts, **limits
    )
    first, again, other = (
        generate_sampled(model, prompts, **limits, seed=seed, top_k=300) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_words_of_canaries_are_words_that_the_embedded_model_was_trained_on():
    said = (
        make_example(seed=0, category=category, index=index)
        for category in CATEGORIES
        for index in range(200)
    )
    known = {word for e in said for word in f"{e.instruction} {e.context} {e.response}".lower().split()}
    own = {word for canary in canaries("a", 20) for word in canary.response.split()}
    assert len(own) == 64
    assert own - {word.strip(".,;:!?'") for word in known} == set()


def test_canaries_are_made_again_from_the_name_alone_and_no_two_are_alike():
    every = [*canaries("a", 3), *canaries("b", 3), *canaries("a", 3, NOT_PLANTED)]
    assert canaries("a", 2) == canaries("a", 3)[:2]
    assert len({one.response for one in every}) == 9


def test_canaries_are_planted_in_training_alone_and_change_nothing_else(make_config):
    plain = load_federated_data(make_config().data, 3)
    given = ("data.num_canaries=2", "data.canary_copies=3")
    with plain, load_federated_data(make_config("flex", *given).data, 3) as planted:
        assert plain.counts == planted.counts
        for client_id in plain.client_ids:
            own = plain.examples(client_id, "train") + canaries(client_id, 2) * 3
            assert planted.examples(client_id, "train") == own
            for split in ("validation", "test"):
                assert planted.examples(client_id, split) == plain.examples(client_id, split)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("data.canary_copies=2", r"data\.canary_copies is 2, but has no effect with data\.num_canaries = 0"),
        ("data.num_canaries=-1", r"data\.num_canaries is -1; it must be at least 0"),
        ("data.canary_copies=0", r"data\.canary_copies is 0; it must be at least 1"),
    ],
)
def test_settings_of_canaries_that_cannot_be_are_refused(given, sentence, make_config):
    with pytest.raises(UserError, match=sentence):
        make_config("flex", given)


SMALL = (
    "rounds=1",
    "data.partition.num_clients=2",
    "training.num_local_steps=1",
    "evaluation.matrix=false",
    "evaluation.max_test_examples=1",
)


@pytest.mark.slow
def test_the_command_tests_every_model_of_a_run(make_config, tmp_path, quiet, capsys):
    folder = tmp_path / "run"
    config = make_config("flex", *SMALL, "evaluation.exam.num_questions=2", "data.num_canaries=1")
    run_experiment(config, folder, progress=quiet)
    assert main(["extract", str(folder), "--generations", "1", "--prefix", "40"]) == 0
    assert "client-001" in capsys.readouterr().out
    found = json.loads((folder / "extraction.json").read_text())
    assert [row["model"] for row in found["models"]] == ["client-000", "client-001", "server", "base"]
    assert [row["planted"]["num_texts"] for row in found["models"]] == [1, 1, 2, 2]
    assert found["settings"]["prefix_tokens"] == 40
    assert all(row["planted"]["num_extracted"] == 0 for row in found["models"]), "one step teaches nothing"


def test_a_run_without_canaries_or_result_is_refused_in_a_sentence(make_config, tmp_path, capsys):
    assert main(["extract", str(tmp_path)]) == 2
    assert "is not finished" in capsys.readouterr().err
