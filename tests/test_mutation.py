"""A fixed sample of changes to the code, each of which some test notices."""

from pathlib import Path

import pytest

from mutation import NOTICED, PACKAGE, ROOT, can_be_noticed, mutants_of, plain_functions, run

TESTS = (
    "tests/algorithms/test_fedopt.py",
    "tests/algorithms/test_mean.py",
    "tests/data/test_partition.py",
    "tests/data/test_batches.py",
    "tests/evaluation/test_load_exam.py",
    "tests/evaluation/test_loss.py",
    "tests/evaluation/test_multiple_choice.py",
    "tests/evaluation/test_routing.py",
    "tests/federation/test_cohort.py",
    "tests/moe/test_budget.py",
    "tests/moe/test_cluster.py",
    "tests/moe/test_merge.py",
    "tests/moe/test_subsets.py",
    "tests/training/test_local_steps.py",
)

SAMPLE = {
    "tensors.py": [
        ("weighted = tensor.double() * weights[name]", "weighted = tensor.double() / weights[name]"),
        ("self._weights[name] += weights[name]", "self._weights[name] = weights[name]"),
    ],
    "algorithms/api.py": [
        (
            'return upload.weights if weighting == "examples" else dict.fromkeys(upload.tensors, 1.0)',
            'return upload.weights if weighting != "examples" else dict.fromkeys(upload.tensors, 1.0)',
        ),
    ],
    "federation/cohort.py": [
        ("if number > len(client_ids):", "if number >= len(client_ids):"),
    ],
    "training/local_steps.py": [
        (
            "norm = torch.nn.utils.clip_grad_norm_(list(parameters), largest if largest > 0 else math.inf)",
            "norm = torch.nn.utils.clip_grad_norm_(list(parameters), largest if largest > 1 else math.inf)",
        ),
        ("optimizer.zero_grad(set_to_none=True)", "optimizer.zero_grad(set_to_none=False)"),
    ],
    "data/partition.py": [
        ('if settings.kind == "natural":', 'if settings.kind != "natural":'),
        ("if len(large) < max(1, num_clients):", "if len(large) <= max(1, num_clients):"),
        ("if len(large) < len(groups):", "if len(large) <= len(groups):"),
        ("heapq.heappush(largest, (size + 1, giver))", "heapq.heappush(largest, (size - 1, giver))"),
        ("if num_examples < needed:", "if num_examples <= needed:"),
        ("if len(own) < min_examples:", "if len(own) <= min_examples:"),
    ],
    "data/batches.py": [
        (
            "kept = [each for each in encoded if each.num_labels > 0]",
            "kept = [each for each in encoded if each.num_labels > 1]",
        ),
        ("attention_mask[row, :length] = 1", "attention_mask[row, :length] = 2"),
        (
            "num_without_label=len(encoded) - len(kept),",
            "num_without_label=len(encoded) + len(kept),",
        ),
    ],
    "evaluation/loss.py": [
        ("num_bad = int((~torch.isfinite(losses)).sum())", "num_bad = int(torch.isfinite(losses).sum())"),
        (
            "loss_M = _token_losses(logits, row_M, column_M, labels[row_M, first + column_M])",
            "loss_M = _token_losses(logits, row_M, column_M, labels[row_M, first - column_M])",
        ),
    ],
    "evaluation/multiple_choice.py": [
        ('if source == "auto":', 'if source != "auto":'),
        ("if settings.num_questions == 0:", "if settings.num_questions != 0:"),
        ("num_left_out=len(questions) - len(scored),", "num_left_out=len(questions) + len(scored),"),
    ],
    "evaluation/routing.py": [
        ('assert total > 0, "no token was counted"', 'assert total >= 0, "no token was counted"'),
    ],
    "moe/compressing/cluster.py": [
        ("size_N[kept] += size_N[joined]", "size_N[kept] = size_N[joined]"),
        (
            "centred_NX = piece_NX - piece_NX.mean(dim=0)",
            "centred_NX = piece_NX - piece_NX.mean(dim=1)",
        ),
    ],
    "moe/compressing/merge.py": [
        (
            "parts = [share / total for share in shares] if total > 0 else [1 / len(shares)] * len(shares)",
            "parts = [share / total for share in shares] if (total > 0) and False"
            " else [1 / len(shares)] * len(shares)",
        ),
    ],
    "moe/choosing/subsets.py": [
        (
            "best_E, leaving = min(swaps, key=lambda swap: float(swap[0].min()))",
            "best_E, leaving = min(swaps, key=lambda swap: float(swap[1].min()))",
        ),
        ("yield batch.rows(slice(start, start + step))", "yield batch.rows(slice(start, start - step))"),
    ],
}
"""By file the lines before and after the change; ``python -m tests.mutation`` draws others."""


def test_the_fixed_sample_is_of_lines_that_the_code_has():
    gone = [
        (path, before)
        for path, changes in SAMPLE.items()
        for before, _ in changes
        if before not in " ".join((ROOT / PACKAGE / path).read_text().split())
    ]
    assert gone == [], "change the sample with the code"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_fixed_sample_of_changes_is_noticed(tmp_path):
    drawn = []
    for path, changes in SAMPLE.items():
        mutants = {(mutant.before, mutant.after): mutant for mutant in mutants_of(Path(path))}
        missing = [change for change in changes if change not in mutants]
        assert missing == [], f"{path} has no such line: change the sample with the code"
        drawn += [mutants[change] for change in changes]
    status = run(drawn, TESTS, tmp_path)
    assert [str(mutant) for mutant in drawn if status[mutant] not in NOTICED] == []


def test_a_wrapped_function_is_the_same_unwrapped():
    source = "import functools\n\nclass A:\n    @property\n    def x(self):\n        return 1\n\n    y = 2\n"
    source += "\n@functools.cache\ndef f(n):\n    return [n]\n\n@staticmethod\ndef g():\n    return 3\n"
    made = {}
    exec(plain_functions(source), made)
    assert (made["A"]().x, made["A"].y, made["f"](1) is made["f"](1), made["g"]()) == (1, 2, True, 3)
    assert "@functools.cache" not in plain_functions(source)
    assert "@staticmethod" in plain_functions(source)


def test_wording_devices_and_looser_zips_are_not_drawn():
    left_out = [
        mutant.after for mutant in mutants_of(Path("data/partition.py")) if not can_be_noticed(mutant)
    ]
    assert any("strict=False" in line for line in left_out)
    assert any("XXNo client holds the label" in line for line in left_out)
    assert not any("!=" in line or "<=" in line for line in left_out)
