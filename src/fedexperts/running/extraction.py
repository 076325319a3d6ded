"""Measure what the models of a run give away of the canaries that their clients trained on."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedexperts.config.load import load_config
from fedexperts.costs.stopwatch import Stopwatch
from fedexperts.data.canaries import NOT_PLANTED, canaries
from fedexperts.data.examples import Example
from fedexperts.data.federated import no_data
from fedexperts.errors import UserError
from fedexperts.evaluation.extraction import SIMILARITY, ExtractionSettings, extract
from fedexperts.federation.snapshot import install_snapshot
from fedexperts.moe.surgery.undo import undone
from fedexperts.run_directory import RunDirectory, write_json
from fedexperts.running.export import BASE, SERVER, model_of_run
from fedexperts.running.workbench import Workbench, open_workbench
from fedexperts.seals import read_sealed

Json = dict[str, Any]


def extract_from_run(run_directory: Path, settings: ExtractionSettings) -> Json:
    """Test each client's own model, the server's and the pretrained one; write ``extraction.json``.

    A client's model is asked for that client's canaries, the other two for those of all clients. Beside them
    stand as many canaries that nobody trained on.

    Raises:
        UserError: the run is not finished, or no canaries were planted.
    """
    run = RunDirectory(run_directory)
    if not run.result.exists():
        raise UserError(f"run {run.path} is not finished: it has no result to test")
    config = load_config(run.config)
    number = config.data.num_canaries
    if not number:
        raise UserError(
            f"run {run.path} has data.num_canaries = 0: nothing was planted, so nothing can be extracted"
        )
    clients = list(read_sealed(run.result)["clients"])
    own = [client_id for client_id in clients if (run.client_folders / client_id).is_dir()]
    asked = [(client_id, [client_id]) for client_id in own] + [(SERVER, clients), (BASE, clients)]
    with open_workbench(config, Stopwatch(), data=no_data()) as bench:
        rows = [_row(run, bench, who, owners, number, settings) for who, owners in asked]
    found: Json = {
        "similarity": SIMILARITY,
        "settings": asdict(settings),
        "canaries_per_client": number,
        "copies": config.data.canary_copies,
        "models": rows,
    }
    write_json(run.extraction, found, is_private=True)
    return found


def _row(
    run: RunDirectory,
    bench: Workbench,
    who: str,
    owners: Sequence[str],
    number: int,
    settings: ExtractionSettings,
) -> Json:
    planted = [one for owner in owners for one in canaries(owner, number)]
    control = [one for owner in owners for one in canaries(owner, number, NOT_PLANTED)]
    snapshot = model_of_run(run, bench, who, "after")
    parts = bench.parts
    with undone(parts.model, parts.layers, parts.originals):
        install_snapshot(parts, snapshot)

        def asked(texts: Sequence[Example]) -> dict[str, float]:
            return extract(parts.model, bench.format, texts, settings).figures()

        return {"model": who, "planted": asked(planted), "not_planted": asked(control)}
