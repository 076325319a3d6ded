"""Recompute an asynchronous run in process from its record of whose uploads came when, and nothing else."""

from dataclasses import replace

from fedexperts.config.load import config_sha256
from fedexperts.costs.stopwatch import Stopwatch
from fedexperts.federation.checkpoint import state_sha256
from fedexperts.federation.personal import PersonalStore
from fedexperts.messages import Download
from fedexperts.run_directory import read_lines
from fedexperts.running.workbench import open_workbench


def hashes_of_states(run):
    """Record of the server's state after each step."""
    return [line["server_state_sha256"] for line in read_lines(run / "rounds.jsonl")]


def replayed(config, run, folder):
    """The same by hand: each turn from the state that its age tells, each mean from changes weighed by age.

    ``config`` is the run's, or differs in where the data is; ``folder`` is where clients keep what is theirs.
    """
    lines, algorithm = read_lines(run / "clients.jsonl"), config.algorithm
    with open_workbench(config, Stopwatch()) as bench:
        runtime = bench.scorer(PersonalStore(folder)).runtime
        first = algorithm.init(bench.parts, runtime.facts())
        states = [replace(first, seed=config.seed, num_rounds=config.rounds)]
        kept_rounds = {}
        for number in range(1, config.rounds + 1):
            uploads = []
            for line in (one for one in lines if one["round"] == number):
                client, began = line["client"], number - line["staleness"]
                received = states[began - 1]
                download = Download(
                    round_number=began,
                    task="train",
                    sent=algorithm.download(received, client),
                    kept_round=kept_rounds.get(client, 0),
                    config_sha256=config_sha256(config),
                )
                upload = runtime.handle(client, download)
                assert not upload.failure
                kept_rounds[client] = began
                uploads.append((client, weighed(upload, line["staleness"], received, states[-1], config)))
            states.append(algorithm.server_update(states[-1], uploads))
    return [state_sha256(state) for state in states[1:]]


def weighed(upload, age, received, present, config):
    if not age:
        return upload
    weight = (1 + age) ** -config.asynchronous.staleness_exponent
    tensors = {
        name: (
            present.tensors[name].double() + weight * (tensor.double() - received.tensors[name].double())
        ).to(tensor.dtype)
        for name, tensor in upload.tensors.items()
    }
    return replace(upload, tensors=tensors)
