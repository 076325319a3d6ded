"""What a report says in sentences: what ran, what is simulated, what came out, what went wrong."""

from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any

from fedexperts.report import quantities
from fedexperts.report.clients import main_metric, total
from fedexperts.report.grouping import Method, flatten, tasks_of
from fedexperts.report.quantities import Spread, lookup
from fedexperts.report.reading import Suite

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


def among(values: Iterable[Any]) -> str:
    """The different values as one phrase: ``5``, ``5 or 10``, ``1, 5 or 10``."""
    texts = list(dict.fromkeys(str(value) for value in values))
    return " or ".join([", ".join(texts[:-1]), texts[-1]]) if len(texts) > 1 else "".join(texts)


def _plural(number: int, word: str) -> str:
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


def what_ran(methods: Sequence[Method]) -> str:
    """One sentence: methods, seeds, clients, rounds, data and model."""
    runs = [run for method in methods for run in method.runs]
    flat = [flatten(run.result["settings"]) for run in runs]
    names = list(dict.fromkeys(method.name for method in methods))
    seeds = sorted({run.seed for run in runs})
    subject = names[0] if len(names) == 1 else f"{len(names)} methods ({', '.join(names)})"
    if len(runs) > 1:
        subject += f", {_plural(len(seeds), 'seed')}, {_plural(len(runs), 'run')} in all"
    parts = [
        f"{among(len(run.result['clients']) for run in runs)} clients",
        f"{among(_rounds(run.result, settings) for run, settings in zip(runs, flat, strict=True))} rounds",
    ]
    for key, words in (
        ("training.num_local_steps", "{} local steps"),
        ("training.batch_size", "batches of {}"),
    ):
        values = [settings[key] for settings in flat if key in settings]
        if values:
            parts.append(words.format(among(values)))
    about = [f"{subject}: {', '.join(parts)}"]
    sources = among(_last_part(settings["data.source"]) for settings in flat if "data.source" in settings)
    kinds = among(settings["data.partition.kind"] for settings in flat if "data.partition.kind" in settings)
    models = among(_last_part(settings["model.name"]) for settings in flat if "model.name" in settings)
    partition = f" ({kinds} partition)" if kinds else ""
    about += [f"data {sources}{partition}"] if sources else []
    about += [f"model {models}"] if models else []
    return f"{'; '.join(about)}."


def _last_part(name: Any) -> str:
    """A path's last part; a name of the hub (``owner/name``) as it is."""
    text = str(name)
    return PurePath(text).name if PurePath(text).is_absolute() or text.startswith(".") else text


def _rounds(result: dict[str, Any], settings: dict[str, Any]) -> Any:
    return result.get("rounds", settings.get("rounds", "?"))


def what_is_simulated(methods: Sequence[Method]) -> tuple[str, ...]:
    """One sentence or two for each transport among the runs."""
    kinds = dict.fromkeys(
        (str(result.get("transport", "")), result.get("simulated") is not False)
        for method in methods
        for result in method.results
    )
    sentences = {_simulated_text(*kind): kind[0] for kind in kinds}
    if len(sentences) == 1:
        return tuple(sentences)
    return tuple(f"Transport {transport}: {text}" for text, transport in sentences.items())


def _simulated_text(transport: str, is_simulated: bool) -> str:
    return _SIMULATED.get(transport, _SIMULATED["inprocess"]) if is_simulated else _NOT_SIMULATED


def at_a_glance(methods: Sequence[Method]) -> tuple[str, ...]:
    """The few sentences that a reader in a hurry needs, made from the numbers alone."""
    sentences = []
    for task, group in tasks_of(methods).items():
        where = f"On {task}: " if task else ""
        sentences += [where + sentence for sentence in (*_scores(group), *_exams(group))]
    sentences += _bytes(methods)
    return tuple(sentences)


def _scores(group: Sequence[Method]) -> list[str]:
    metric = main_metric(group)
    words = "ROUGE-L" if metric == "rougeL" else "test loss"
    found = [(method, method.spread(f"mean.{metric}_after")) for method in group]
    present = [(method, value) for method, value in found if value is not None]
    if not present:
        return []
    sign = 1 if metric == "rougeL" else -1
    ranked = sorted(present, key=lambda pair: -sign * pair[1].mean)
    best, value = ranked[0]
    text = quantities.metric_spread(metric, value)
    if len(ranked) == 1:
        before = best.spread(f"mean.{metric}_before")
        beside = f", {quantities.metric_spread(metric, before)} before them" if before else ""
        return [f"{best.name}: mean {words} {text} after local steps{beside}."]
    equal = [method.name for method, own in ranked if quantities.metric_spread(metric, own) == text]
    if len(equal) > 1:
        return [f"{', '.join(equal)} have the best mean {words} after local steps, all {text}."]
    second, other = ranked[1]
    sentence = (
        f"{best.name} has the best mean {words} after local steps, {text}; next is {second.name} with "
        f"{quantities.metric_spread(metric, other)}{_caution(value, other)}."
    )
    return [sentence]


def _caution(first: Spread, second: Spread) -> str:
    widest = max(first.std or 0.0, second.std or 0.0)
    if min(first.num_values, second.num_values) < 3:
        return " (fewer than three seeds: no finding yet)"
    return (
        " (a gap within one standard deviation: no finding)"
        if abs(first.mean - second.mean) <= widest
        else ""
    )


def _exams(group: Sequence[Method]) -> list[str]:
    parts = []
    for method in group:
        after = method.spread("exam.personalised") or method.spread("exam.global")
        base = method.spread("exam.base")
        if after is not None and base is not None:
            parts.append(f"{method.name} {_signed(100 * (after.mean - base.mean))}")
    if not parts:
        return []
    return [f"Exam accuracy against the untouched model, in points: {', '.join(parts)}."]


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "\N{MINUS SIGN}")


def _bytes(methods: Sequence[Method]) -> list[str]:
    sizes: dict[str, str] = {}
    for method in methods:
        value = method.spread("bytes.upload_per_client_round")
        if value is not None:
            sizes.setdefault(method.name, quantities.bytes_text(value.mean))
    if not sizes:
        return []
    return [f"Upload of a client in a round: {', '.join(f'{name} {size}' for name, size in sizes.items())}."]


def unequal_bytes(result: dict[str, Any], direction: str) -> int | None:
    """Counted less predicted bytes of a run, or None where either is absent."""
    counted = lookup(result, f"bytes.{direction}_counted")
    predicted = lookup(result, f"bytes.{direction}_predicted")
    return None if counted is None or predicted is None else int(counted - predicted)


def warnings(suite: Suite, methods: Sequence[Method]) -> tuple[str, ...]:
    """All that a reader must know before believing the numbers; empty where nothing went wrong."""
    found = [f"{run.name} is in no table: {run.reason}." for run in suite.absent]
    found += [
        f"{run.name} has the status {run.result['status']!r}."
        for run in suite.runs
        if run.result.get("status", "finished") != "finished"
    ]
    labels: dict[str, list[str]] = {}
    for method in methods:
        for text in _method_warnings(method):
            labels.setdefault(text, []).append(method.label)
    for text, whose in labels.items():
        is_everywhere = len(whose) == len(methods) > 1
        found.append(f"{'All methods' if is_everywhere else ', '.join(whose)}: {text}")
    return tuple(found)


def _method_warnings(method: Method) -> list[str]:
    found = []
    num_failures = sum(len(result.get("failures") or ()) for result in method.results)
    if num_failures:
        found.append(f"{_plural(num_failures, 'turn')} of clients lost or refused (listed below).")
    for field, words in (
        ("num_truncated", "truncated to the longest length allowed"),
        ("num_test_truncated", "of the test splits truncated to the longest length allowed"),
        ("num_without_label", "left out because no token of the response was left to learn"),
        ("num_test_without_label", "of the test splits in no loss, for the same reason"),
        ("num_prompts_cut", "of the test prompts cut at their beginning to fit the model's positions"),
    ):
        sums = total(method.results, field)
        if any(sums):
            found.append(f"{_range(sums)} {words}.")
    if any(result.get("frozen_unchanged") is False for result in method.results):
        found.append("frozen parameters of the base model changed; the figures are void.")
    for direction in ("upload", "download"):
        differing = sum(bool(unequal_bytes(result, direction)) for result in method.results)
        if differing:
            found.append(f"{direction}ed bytes differ from the prediction in {differing} runs.")
    repeated = len(method.runs) - len({_seed_key(result) for result in method.results})
    if repeated:
        found.append(f"{_plural(repeated, 'run')} repeat a seed and add nothing to the spread.")
    return found


def _seed_key(result: dict[str, Any]) -> str:
    seeds = {key: value for key, value in flatten(result["settings"]).items() if key.endswith("seed")}
    return repr((result["seed"], sorted(seeds.items())))


def _range(sums: list[int]) -> str:
    if len(set(sums)) == 1:
        return _plural(sums[0], "example") + (" in each run" if len(sums) > 1 else "")
    return f"{min(sums):,} to {max(sums):,} examples a run"


def failures_of(methods: Sequence[Method]) -> list[tuple[str, ...]]:
    """(method, seed, round, client, reason) of each client's turn that was lost or refused."""
    return [
        (
            method.label,
            str(run.seed),
            str(failure.get("round", "?")),
            str(failure.get("client", "?")),
            str(failure.get("reason", "no reason given")),
        )
        for method in methods
        for run in method.runs
        for failure in run.result.get("failures") or ()
        if isinstance(failure, dict)
    ]
