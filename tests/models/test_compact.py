"""Compact models: equal from disk and in memory, put back bit for bit, and exported as plain checkpoints."""

from pathlib import Path

import pytest
import torch
from checkpoints import Damage
from transformers import AutoModelForCausalLM

from families import each_family
from fedexperts.errors import UserError
from fedexperts.models.checkpoint import Checkpoint
from fedexperts.models.compact import (
    compact_model,
    load_compact,
    merge_by_shares,
    restore_model,
)
from fedexperts.models.plain_checkpoint import export_model
from fedexperts.models.tiny import tiny_model
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.graft import GraftForm, graft
from fedexperts.moe.surgery.low_bit import LowBitForm
from fedexperts.moe.surgery.low_bit_bank import ExpertShapes, bank_of
from fedexperts.moe.surgery.slots import SlotPlan

PLANS = (
    SlotPlan(num_experts=6, kept=(1, 4), merged=((0, 5), (2, 3))),
    SlotPlan(num_experts=6, kept=(3,), merged=((0, 1, 2, 4, 5),)),
)
SHARES = (torch.tensor([3.0, 1, 1, 1, 1, 1]), torch.tensor([0.0, 2, 1, 1, 5, 1]))
MERGE = merge_by_shares(SHARES)
TOKENS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits


def saved(family: str, folder: Path, **overrides):
    model = tiny_model(family, **overrides).requires_grad_(False)
    model.save_pretrained(folder)
    seam.install_implementation(model)
    return model


def assert_same_tensors(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", each_family())
def test_compact_from_disk_is_compact_in_place_and_exports(family: str, tmp_path: Path) -> None:
    live = saved(family, tmp_path / "full")
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    compact_model(live, PLANS, MERGE)
    loaded = load_compact(Checkpoint(tmp_path / "full"), PLANS, MERGE)
    assert_same_tensors(loaded.state_dict(), live.state_dict())
    wanted = logits(live)
    assert torch.equal(logits(loaded), wanted)
    assert not any(buffer.is_meta for buffer in loaded.buffers())

    export_model(loaded, tmp_path / "plain")
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    # float32: rows of a slot are multiplied together or apart, and sums run in another order
    torch.testing.assert_close(logits(plain), wanted, rtol=1e-4, atol=1e-5)

    restore_model(loaded, Checkpoint(tmp_path / "full"))
    assert_same_tensors(loaded.state_dict(), before)


def test_restoring_from_memory_gives_every_bit_back(tmp_path: Path) -> None:
    model = saved("qwen2_moe", tmp_path)
    before, wanted = {name: t.clone() for name, t in model.state_dict().items()}, logits(model)
    originals = compact_model(model, PLANS, MERGE, is_keeping_originals=True)
    assert not torch.equal(logits(model), wanted)
    restore_model(model, originals)
    assert_same_tensors(model.state_dict(), before)
    assert torch.equal(logits(model), wanted)
    model.save_pretrained(tmp_path / "again")


def test_merged_experts_are_the_weighted_mean_by_hand(tmp_path: Path) -> None:
    model = saved("qwen2_moe", tmp_path)
    weights = [
        {name: weight.clone() for name, weight in seam.find_moe_layers(model)[0].expert(e).items()}
        for e in range(6)
    ]
    layer = seam.find_moe_layers(load_compact(Checkpoint(tmp_path), PLANS, MERGE))[0]
    for name, weight in weights[0].items():
        assert torch.equal(layer.expert(1)[name], weights[1][name])
        by_hand = (3 * weight.double() + weights[5][name].double()) / 4
        torch.testing.assert_close(layer.expert(0)[name].double(), by_hand, rtol=1e-6, atol=1e-7)
        assert torch.equal(layer.expert(0)[name], layer.expert(5)[name])


def test_ready_weights_are_taken_as_they_are(tmp_path: Path) -> None:
    saved("qwen2_moe", tmp_path)
    zeros = {"gate_up_proj": torch.zeros(32, 32), "down_proj": torch.zeros(32, 16)}
    model = load_compact(Checkpoint(tmp_path), PLANS, lambda layer, group, members: zeros)
    layer = seam.find_moe_layers(model)[1]
    assert all((weight == 0).all() for weight in layer.expert(5).values())


def test_one_expert_is_read_at_a_time(tmp_path: Path) -> None:
    saved("qwen2_moe", tmp_path)
    asked = []

    def merge(layer, group, members):
        taken = iter(members)
        asked.append((layer, group))
        return next(taken)

    load_compact(Checkpoint(tmp_path), PLANS, merge)
    assert asked == [(0, (0, 5)), (0, (2, 3)), (1, (0, 1, 2, 4, 5))]


def test_tuned_experts_train_in_float32_and_nothing_else_does(tmp_path: Path) -> None:
    saved("qwen2_moe", tmp_path, dtype=torch.bfloat16)
    plans = [SlotPlan(num_experts=6, tuned=(2,), kept=(1,), merged=((0, 3, 4, 5),))] * 2
    model = load_compact(Checkpoint(tmp_path), plans, MERGE)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {".".join(name.rsplit(".", 3)[1:3]) for name in trained} == {"tuned.weights"}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if n not in trained} == {torch.bfloat16}
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad is not None for parameter in trained.values())


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "nemotron_h"])
def test_dropped_experts_are_exported_as_nothing(family: str, tmp_path: Path) -> None:
    saved(family, tmp_path / "full")
    plans = [SlotPlan(num_experts=6, kept=(1, 4), dropped=(0, 2, 3, 5))] * 2
    compact = load_compact(Checkpoint(tmp_path / "full"), plans, MERGE)
    export_model(compact, tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(plain), logits(compact), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_moe", "granitemoe"])
def test_export_of_all_kept_has_the_tensors_of_the_full_one(family: str, tmp_path: Path) -> None:
    full = saved(family, tmp_path / "full")
    plans = [SlotPlan(num_experts=6, kept=(5, 0, 1, 2, 3, 4))] * 2
    export_model(load_compact(Checkpoint(tmp_path / "full"), plans, MERGE), tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert_same_tensors(again.state_dict(), full.state_dict())


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    saved("qwen2_moe", tmp_path / "full", tie_word_embeddings=True)
    compact = load_compact(Checkpoint(tmp_path / "full"), PLANS, MERGE)
    assert compact.lm_head.weight is compact.model.embed_tokens.weight
    export_model(compact, tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(plain), logits(compact), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_from_disk_is_quantised_in_place(bits: int, tmp_path: Path) -> None:
    saved("qwen2_moe", tmp_path)
    form = LowBitForm(bits=bits, group_size=16)
    plain, few = (load_compact(Checkpoint(tmp_path), PLANS, MERGE, form=one) for one in (None, form))
    for dense, packed in zip(seam.find_moe_layers(plain), seam.find_moe_layers(few), strict=True):
        for expert in range(6):
            weights = dense.expert(expert)
            bank = bank_of([weights], 1, ExpertShapes.of_layer(dense), form, name="x")
            for name, weight in packed.expert(expert).items():
                assert torch.equal(weight, bank.expert(0)[name])
    restore_model(few, Checkpoint(tmp_path))
    assert torch.equal(logits(few), logits(saved("qwen2_moe", tmp_path)))


def test_weights_that_are_not_finite_are_not_quantised(damaged: Damage) -> None:
    folder = damaged("bad", lambda t: t["model.layers.1.mlp.experts.3.down_proj.weight"].fill_(float("nan")))
    with pytest.raises(UserError, match=r"slot 0 of layer model\.layers\.1.*NaN or infinite"):
        load_compact(Checkpoint(folder), PLANS, MERGE, form=LowBitForm())


def test_compact_models_refuse_to_be_saved(tmp_path: Path) -> None:
    saved("qwen2_moe", tmp_path)
    model = load_compact(Checkpoint(tmp_path), PLANS, MERGE)
    with pytest.raises(UserError, match="has slots instead of its experts, for which a plain"):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_adapters_and_grafts_are_not_exported(tmp_path: Path) -> None:
    saved("qwen2_moe", tmp_path)
    model = load_compact(Checkpoint(tmp_path), PLANS, MERGE)
    graft(seam.find_moe_layers(model), [1, 4], GraftForm(), 0)
    with pytest.raises(UserError, match=r"tensor model\.layers\.0\.mlp\.experts\.graft.* has no place"):
        export_model(model, tmp_path / "plain")


def test_plans_of_another_model_are_refused(tmp_path: Path) -> None:
    model = saved("qwen2_moe", tmp_path)
    with pytest.raises(UserError, match="1 plans for a model of 2 MoE layers"):
        load_compact(Checkpoint(tmp_path), PLANS[:1], MERGE)
    with pytest.raises(UserError, match=r"plan for 2 experts, but layer .* has 6"):
        compact_model(model, [SlotPlan(num_experts=2, kept=(0, 1))] * 2, MERGE)
    compact_model(model, PLANS, MERGE)
    with pytest.raises(UserError, match="has slots already"):
        compact_model(model, PLANS, MERGE)


def test_tensors_missing_from_the_rest_are_named(damaged: Damage) -> None:
    folder = damaged("lost", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(UserError, match=r"has no tensor model\.norm\.weight"):
        load_compact(Checkpoint(folder), PLANS, MERGE)
    folder = damaged("small", lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:-1].clone()}))
    with pytest.raises(UserError, match=r"tensor model\.norm\.weight .* has another shape"):
        load_compact(Checkpoint(folder), PLANS, MERGE)


def test_a_checkpoint_of_another_model_restores_nothing(tmp_path: Path) -> None:
    saved("qwen2_moe", tmp_path / "small", moe_intermediate_size=8)
    model = saved("qwen2_moe", tmp_path / "full")
    compact_model(model, PLANS, MERGE)
    with pytest.raises(UserError, match="are not of the sizes of the model"):
        restore_model(model, Checkpoint(tmp_path / "small"))


def test_how_the_model_generates_is_loaded_too(tmp_path: Path) -> None:
    model = tiny_model("qwen2_moe")
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path)
    compact = load_compact(Checkpoint(tmp_path), PLANS, MERGE)
    assert compact.generation_config.max_new_tokens == 7
    assert compact.generate(TOKENS).shape == (2, TOKENS.shape[1] + 7)


def test_the_example_in_the_documentation_runs(tmp_path: Path, monkeypatch, capsys) -> None:
    full = saved("qwen2_moe", tmp_path / "model")
    text = (Path(__file__).parents[2] / "docs" / "compact_models.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    live = seam.find_moe_layers(full)[1].expert(3)
    assert all(torch.equal(names["one"][name], live[name]) for name in live)
    assert "quantised 12 of 12 experts" in capsys.readouterr().out
