"""Pretraining, on a micro setting; and the shipped model as it lies in the package."""

import json
import warnings
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedexperts
from fedexperts.data.tinyworld import CATEGORIES, STYLES, make_example, pretraining_texts
from fedexperts.errors import UserError
from fedexperts.pretrain import PretrainSettings, pretrain
from fedexperts.pretrain.rows import encode, pack
from fedexperts.pretrain.scores import score_pretrained
from fedexperts.pretrain.tokenizer import train_tokenizer
from fedexperts.pretrain.training import build_model, segment_mask

MICRO = PretrainSettings(
    threads=1,
    num_steps=5,
    rows_per_step=4,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_experts=4,
    num_experts_per_token=2,
    expert_size=16,
    shared_expert_size=16,
    vocabulary_size=600,
    num_tokenizer_texts=1000,
    row_tokens=256,
    num_exam_questions=18,
    num_test_prompts=1,
)
SHIPPED = Path(fedexperts.__file__).parent / "assets" / "tinyworld"


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain") / "micro"
    lines = []
    return folder, pretrain(MICRO, folder, lines.append), lines


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED)


def weights(folder):
    return (folder / "model.safetensors").read_bytes(), (folder / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_the_same_settings_give_the_same_bytes(micro, tmp_path):
    folder, report, _ = micro
    again = pretrain(MICRO, tmp_path / "again", lambda line: None)
    assert weights(tmp_path / "again") == weights(folder)
    assert again.scores == report.scores


def test_another_seed_gives_other_weights(micro):
    folder, _, _ = micro
    tokenizer = AutoTokenizer.from_pretrained(folder)
    models = [build_model(PretrainSettings(seed=seed), tokenizer) for seed in (0, 1)]
    assert not torch.equal(*(model.model.embed_tokens.weight for model in models))


def test_the_report_lies_beside_the_weights(micro):
    folder, report, lines = micro
    written = json.loads((folder / "pretrain.json").read_text())
    assert written["settings"]["num_steps"] == 5
    assert written["loss"] == report.loss
    assert set(written["scores"]["rougeL"]) == set(CATEGORIES)
    assert written["num_tokens"] > 0
    assert any(line.startswith("step 5/5") for line in lines)


def test_an_interrupt_leaves_nothing(tmp_path):
    def interrupt(line):
        if line.startswith("step"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(MICRO, tmp_path / "model", interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "precious").write_text("kept")
    with pytest.raises(UserError, match="not an empty folder"):
        pretrain(MICRO, tmp_path, lambda line: None)
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.parametrize(
    "setting",
    [
        {"num_steps": 0},
        {"threads": 10**9},
        {"learning_rate": float("nan")},
        {"hidden_size": 100, "num_heads": 3},
        {"num_experts_per_token": 99},
        {"vocabulary_size": 100},
    ],
)
def test_a_setting_that_cannot_work_is_refused(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        PretrainSettings(**setting)


def test_packed_texts_do_not_see_each_other():
    """A text's logits are the same alone and as the second of a row."""
    tokenizer = train_tokenizer(MICRO)
    model = build_model(MICRO, tokenizer).eval()
    encoded = encode(tokenizer, list(islice(pretraining_texts(0), 2)))
    (row,) = pack(encoded, 448, tokenizer.pad_token_id)
    with torch.no_grad():
        packed = model(
            input_ids=torch.tensor([row.ids]),
            position_ids=torch.tensor([row.positions]),
            attention_mask=segment_mask(torch.tensor([row.segments])),
        ).logits[0]
        start = 0
        for ids, _ in sorted(encoded, key=lambda text: len(text[0]), reverse=True):
            alone = model(input_ids=torch.tensor([ids])).logits[0]
            # A longer row sums in another order: 1e-5 is some ten float32 roundings of logits near 1.
            torch.testing.assert_close(packed[start : start + len(ids)], alone, atol=1e-5, rtol=1e-5)
            start += len(ids)


def test_only_answers_are_learnt():
    tokenizer = train_tokenizer(MICRO)
    text = next(text for text in pretraining_texts(0) if text.kind == "closed_qa")
    ((_, labels),) = encode(tokenizer, [text])
    learnt = tokenizer.decode([label for label in labels if label != -100])
    assert learnt == f"{text.answer}<|end|>"


@pytest.mark.parametrize(
    "text", ["Zürich 東京 🦊", "  two  spaces\n\tand a tab", "", "Mira's cat.", "<|user|>"]
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("style", ["neutral", *STYLES])
def test_every_answer_fits_64_new_tokens(tokenizer, style):
    for category in CATEGORIES:
        for index in range(40):
            example = make_example(seed=0, category=category, index=index, style=style)
            assert len(tokenizer(example.response)["input_ids"]) < 64


def test_the_prompt_is_a_prefix_of_the_conversation(tokenizer):
    user = {"role": "user", "content": "Where does Mira live?"}
    reply = {"role": "assistant", "content": "Oslem"}
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([user, reply], tokenize=False)
    assert whole == prompt + "Oslem<|end|>"
    ids = [tokenizer(text)["input_ids"] for text in (prompt, whole)]
    assert ids[1][: len(ids[0])] == ids[0]


def test_the_tokenizer_has_distinct_end_and_padding(tokenizer):
    assert tokenizer.pad_token_id is not None
    assert tokenizer.eos_token_id is not None
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_shipped_model_loads_without_a_warning(capfd, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoModelForCausalLM.from_pretrained(SHIPPED)
        AutoTokenizer.from_pretrained(SHIPPED)
    assert model.config.model_type == "qwen2_moe"
    assert model.config.norm_topk_prob is False
    assert model.config.num_experts >= 16
    assert model.dtype == torch.bfloat16
    assert not caplog.records
    assert "warn" not in capfd.readouterr().err.lower()


def test_the_shipped_folder_is_under_12_megabytes():
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 12_000_000


def test_the_shipped_model_knows_the_world():
    """The scores written at pretraining; what the issue asks of the shipped model."""
    scores = json.loads((SHIPPED / "pretrain.json").read_text())["scores"]
    assert scores["exam_accuracy"] >= 0.9
    assert sum(scores["rougeL"].values()) / len(CATEGORIES) >= 0.8
    assert scores["expert_distance"] > 2 * scores["expert_distance_random"]


def test_the_shipped_scores_are_the_models():
    """A part of the exam and of the prompts, measured again on the shipped weights."""
    scores = score_pretrained(SHIPPED, seed=0, num_questions=40, num_prompts=2)
    assert scores.exam_accuracy >= 0.9
    assert sum(scores.rougeL.values()) / len(CATEGORIES) >= 0.8
