"""Write a report's sentences: what ran, what is simulated, what came out, what went wrong."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from fedexperts.report.clients import main_metric, totals
from fedexperts.report.grouping import Method, settings_of, tasks_of
from fedexperts.report.quantities import Spread, finite, leaves, text, title_of
from fedexperts.report.reading import Run, Suite

_SIMULATED = {
    "inprocess": (
        "Simulated: one process on one machine plays the server and every client, who take turns. Bytes are "
        "counted from the serialised messages, but no network was crossed; times are this machine's and say "
        "nothing about a network or about clients that work side by side."
    ),
    "flower": (
        "Simulated: Flower's simulation engine plays the clients on one machine. Bytes are counted from the "
        "serialised messages; times are this machine's and say nothing about a network."
    ),
}
_NOT_SIMULATED = (
    "Clients were processes of their own that talked to the server through Flower; times contain that "
    "network, the loopback of one machine where nothing else was set up."
)
_BEFORE_AFTER = (
    "Each client's own model on its own test examples. Before: what the server sends after the last round, "
    "with what the client keeps; after: the same after one more turn of local steps. "
    "ROUGE-L, exact match and exam accuracy are in points of 100. Exam and neutral instructions measure what "
    "the model could do before: personalised is the mean over the clients' models, after. By choice, a model "
    "picks among given answers; free, it must write the right one and nothing else."
)
_ONE_SEED = "One seed only: there is no spread, and a difference from another run is no finding yet."
_FEW_SEEDS = "Fewer than three seeds for {}: the spread says little, and a difference is no finding yet."
_MAX_FAILURES = 25
_COUNTED = {
    "num_truncated": "truncated to the longest length allowed",
    "num_test_truncated": "of the test splits truncated to the longest length allowed",
    "num_without_label": "left out because no token of the response was left to learn",
    "num_test_without_label": "of the test splits in no loss, for the same reason",
    "num_test_trained_elsewhere": "of the test splits with a prompt that another client is trained on",
    "num_prompts_cut": "of the test prompts cut at their beginning to fit the model's positions",
}


def _among(values: Iterable[Any]) -> str:
    """The different values as one phrase: ``5``, ``5 or 10``, ``1, 5 or 10``."""
    texts = list(dict.fromkeys(str(value) for value in values))
    return " or ".join([", ".join(texts[:-1]), texts[-1]]) if len(texts) > 1 else "".join(texts)


def _plural(number: int, word: str) -> str:
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


def what_ran(methods: Sequence[Method]) -> str:
    """One sentence: methods, seeds, clients, rounds, data and model."""
    runs = [run for method in methods for run in method.runs]
    names = list(dict.fromkeys(method.name for method in methods))
    subject = names[0] if len(names) == 1 else f"{len(names)} methods ({', '.join(names)})"
    if len(runs) > 1:
        seeds = _plural(len({run.seed for run in runs}), "seed")
        subject += f", {seeds}, {_plural(len(runs), 'run')} in all"
    parts = [f"{_among(len(run.result['clients']) for run in runs)} clients"]
    parts += [f"{_among(run.result.get('rounds', '?') for run in runs)} rounds"]
    parts += _set(runs, "training.num_local_steps", "{} local steps")
    parts += _set(runs, "training.batch_size", "batches of {}")
    data = [*_set(runs, "data.source", "data {}"), *_set(runs, "data.partition.kind", "({} partition)")]
    about = [f"{subject}: {', '.join(parts)}", " ".join(data), *_set(runs, "model.name", "model {}")]
    return f"{'; '.join(part for part in about if part)}."


def _set(runs: Sequence[Run], key: str, words: str) -> list[str]:
    """The runs' values of a setting in words, or nothing; of a path its last part."""
    values = [settings[key] for run in runs if key in (settings := settings_of(run))]
    named = (
        PurePath(v).name if PurePath(v).is_absolute() or v.startswith(".") else v for v in map(str, values)
    )
    return [words.format(_among(named))] if values else []


def what_is_simulated(methods: Sequence[Method]) -> list[str]:
    """One sentence or two for each transport among the runs."""
    sentences: dict[str, str] = {}
    for result in (run.result for method in methods for run in method.runs):
        transport, is_simulated = str(result.get("transport", "")), result.get("simulated") is not False
        known = _SIMULATED.get(transport, _SIMULATED["inprocess"])
        sentences.setdefault(known if is_simulated else _NOT_SIMULATED, transport)
    if len(sentences) == 1:
        return list(sentences)
    return [f"Transport {transport}: {sentence}" for sentence, transport in sentences.items()]


def on_results(methods: Sequence[Method]) -> list[str]:
    """Say how to read the headline table, and how far to trust its spread."""
    few = [method.label for method in methods if len(method.runs) < 3]
    if max(len(method.runs) for method in methods) == 1:
        return [_ONE_SEED, _BEFORE_AFTER]
    names = "all methods" if len(few) == len(methods) else ", ".join(few)
    return [*([_FEW_SEEDS.format(names)] if few else []), _BEFORE_AFTER]


def at_a_glance(methods: Sequence[Method]) -> list[str]:
    """The few sentences that a reader in a hurry needs, made from the numbers alone."""
    sentences = []
    for task, group in tasks_of(methods).items():
        where = f"On {task}: " if task else ""
        sentences += [where + sentence for sentence in (*_scores(group), *_exams(group))]
    path = "bytes.upload_per_client_round"
    sizes = {m.name: text(path, size, has_std=False) for m in reversed(methods) if (size := m.spread(path))}
    listed = ", ".join(f"{name} {size}" for name, size in reversed(sizes.items()))
    uploads = [f"Upload of a client in a round: {listed}."] if sizes else []
    return [*sentences, *uploads, *_privacy(methods)]


def _privacy(methods: Sequence[Method]) -> list[str]:
    """Say of methods with ``[privacy]`` what is guaranteed, those with the same guarantee together."""
    whose: dict[str, dict[str, None]] = {}
    for method in methods:
        for run in method.runs:
            if own := run.result.get("privacy"):
                whose.setdefault(_guarantee(own), {})[method.name] = None
    return [f"{', '.join(names)}: {guarantee}." for guarantee, names in whose.items()]


def _guarantee(privacy: Mapping[str, Any]) -> str:
    epsilon, clip = finite(privacy.get("epsilon")), privacy.get("clip_norm")
    if epsilon is None:
        return f"changes are clipped to a norm of {clip}, without noise: no differential privacy"
    known = "" if privacy.get("noise_is_secret") else ", but none for those who know privacy.noise_seed"
    number = privacy.get("num_repeated_rounds")
    again = f", rounds begun again count each time: {number}" if number else ""
    return (
        f"differential privacy of clients with epsilon {epsilon:.3g} at delta {privacy.get('delta')} for the "
        f"shared tensors, not for scores and losses (noise by the {privacy.get('noise')}{known}{again})"
    )


def _scores(group: Sequence[Method]) -> list[str]:
    metric = main_metric(group)
    words = f"mean {'ROUGE-L' if metric == 'rougeL' else 'test loss'}"
    present = [(method, value) for method in group if (value := method.spread(f"mean.{metric}_after"))]
    if not present:
        return []
    sign = 1 if metric == "rougeL" else -1
    (best, value), *others = sorted(present, key=lambda pair: -sign * pair[1].mean)
    written = text(metric, value)
    if not others:
        before = best.spread(f"mean.{metric}_before")
        beside = f", {text(metric, before)} before them" if before else ""
        return [f"{best.name}: {words} {written} after local steps{beside}."]
    equal = [method.name for method, own in others if text(metric, own) == written]
    if equal:
        return [f"{', '.join([best.name, *equal])} have the best {words} after local steps, all {written}."]
    second, other = others[0]
    return [
        f"{best.name} has the best {words} after local steps, {written}; next is {second.name} with "
        f"{text(metric, other)}{_caution(value, other)}."
    ]


def _caution(first: Spread, second: Spread) -> str:
    if min(first.num_values, second.num_values) < 3:
        return " (fewer than three seeds: no finding yet)"
    is_within = abs(first.mean - second.mean) <= max(first.std or 0.0, second.std or 0.0)
    return " (a gap within one standard deviation: no finding)" if is_within else ""


_RETAINED = {
    "exam": "Exam accuracy",
    "retention.exam_free": "Exam in free answers",
    "retention.neutral_rougeL": "ROUGE-L on neutral instructions",
}


def _exams(group: Sequence[Method]) -> list[str]:
    return [sentence for path, words in _RETAINED.items() for sentence in _lost(group, path, words)]


def _lost(group: Sequence[Method], path: str, words: str) -> list[str]:
    parts = []
    for method in group:
        after = method.spread(f"{path}.personalised") or method.spread(f"{path}.global")
        base = method.spread(f"{path}.base")
        if after is not None and base is not None:
            points = f"{100 * (after.mean - base.mean):+.1f}".replace("-", "\N{MINUS SIGN}")
            parts.append(f"{method.name} {points}")
    listed = ", ".join(parts)
    return [f"{words} against the untouched model, in points: {listed}."] if parts else []


def unequal_bytes(run: Run, direction: str) -> int | None:
    """Counted less predicted bytes of a run, or None where either is absent."""
    counted, predicted = (run.numbers.get(f"bytes.{direction}_{kind}") for kind in ("counted", "predicted"))
    return None if counted is None or predicted is None else int(counted - predicted)


def warnings(suite: Suite, methods: Sequence[Method]) -> list[str]:
    """All that a reader must know before believing the numbers; empty where nothing went wrong."""
    found = [f"{name} is in no table: {reason}." for name, reason in suite.absent.items()]
    found += [
        f"{run.name} has the status {run.result['status']!r}."
        for run in suite.runs
        if run.result.get("status", "finished") != "finished"
    ]
    num_codes = len({run.environment.get("code_sha256") for run in suite.runs})
    if num_codes > 1:
        found.append(f"The runs are of {num_codes} different states of the code: figures may not compare.")
    labels: dict[str, list[str]] = {}
    for method in methods:
        for sentence in _method_warnings(method):
            labels.setdefault(sentence, []).append(method.label)
    for sentence, whose in labels.items():
        is_everywhere = len(whose) == len(methods) > 1
        found.append(f"{'All methods' if is_everywhere else ', '.join(whose)}: {sentence}")
    return [*found, *_failures(methods)]


def _failures(methods: Sequence[Method]) -> list[str]:
    """The turns of clients that were lost or refused, the first ones where there are very many."""
    every = [
        f"{method.label}, seed {run.seed}, round {one.get('round', '?')}, {one.get('client', '?')}: "
        f"{one.get('reason', 'no reason given')}"
        for method in methods
        for run in method.runs
        for one in run.result.get("failures") or ()
    ]
    more = [f"and {len(every) - _MAX_FAILURES:,} more"] if len(every) > _MAX_FAILURES else []
    return [*every[:_MAX_FAILURES], *more]


def _method_warnings(method: Method) -> list[str]:
    results = [run.result for run in method.runs]
    found = _unscored(method)
    num_failures = sum(len(result.get("failures") or ()) for result in results)
    if num_failures:
        found.append(f"{_plural(num_failures, 'turn')} of clients lost or refused (listed at the end).")
    sums = {words: totals(method, name) for name, words in _COUNTED.items()}
    found += [f"{_range(own)} {words}." for words, own in sums.items() if any(own)]
    num_forgotten = sum(len(result.get("forgotten") or ()) for result in results)
    if num_forgotten:
        found.append(
            f"{_plural(num_forgotten, 'client')} forgotten: in means of the runs, in no table by client."
        )
    if any(result.get("frozen_unchanged") is False for result in results):
        found.append("frozen parameters of the base model changed; the figures are void.")
    for direction in ("upload", "download"):
        differing = sum(bool(unequal_bytes(run, direction)) for run in method.runs)
        if differing:
            found.append(f"{direction}ed bytes differ from the prediction in {_plural(differing, 'run')}.")
    repeated = len(method.runs) - len({_seeds(run) for run in method.runs})
    if repeated:
        found.append(f"{_plural(repeated, 'run')} repeat a seed and add nothing to the spread.")
    return found


def _unscored(method: Method) -> list[str]:
    """Scores that some clients lack, such as one without a usable test example; means leave them out."""
    lacking: dict[str, list[str]] = {}
    for run in method.runs:
        clients = run.result["clients"]
        for name in dict.fromkeys(
            name for own in clients.values() for name in own if name.endswith("_after")
        ):
            num_without = sum(finite(own.get(name)) is None for own in clients.values())
            if num_without:
                lacking.setdefault(f"{num_without} of {_plural(len(clients), 'client')}", []).append(name)
    return [
        f"{number} without {', '.join(dict.fromkeys(map(title_of, names)))}: means are over the others."
        for number, names in lacking.items()
    ]


def _seeds(run: Run) -> str:
    seeds = {key: value for key, value in leaves(run.result["settings"]) if key.endswith("seed")}
    return repr((run.seed, sorted(seeds.items())))


def _range(sums: list[int]) -> str:
    if len(set(sums)) == 1:
        return _plural(sums[0], "example") + (" in each run" if len(sums) > 1 else "")
    return f"{min(sums):,} to {max(sums):,} examples a run"
