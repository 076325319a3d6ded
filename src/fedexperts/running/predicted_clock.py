"""Predict the simulated seconds of a round before it is run, by a dry run of one local step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from rich.console import RenderableType

from fedexperts.config.schema import RunConfig
from fedexperts.costs.dry_run import BatchShape, peak_of_local_steps
from fedexperts.costs.traffic import PredictedBytes
from fedexperts.costs.work import MAIN_PHASE, PhaseWork, WorkMeter, counting
from fedexperts.federation.clock import Clock
from fedexperts.federation.fencing import first_in_time
from fedexperts.federation.runtime import ClientRuntime
from fedexperts.report.tables import make_table
from fedexperts.report.terminal import terminal_table
from fedexperts.running.predicted_steps import PredictedSteps, predict_steps
from fedexperts.running.workbench import Workbench

_PHASES = {"wait": " ", "download": "↓", MAIN_PHASE: "█", "upload": "↑"}
"""Phases of a turn in order, with the sign that a bar is drawn with."""
_BAR = 24


@dataclass(frozen=True, kw_only=True)
class PredictedClock:
    """Simulated seconds of the first round: downloads, local steps and uploads that come in time."""

    round_seconds: float
    run_seconds: float
    """Of all rounds, as if each were like the first; with hours of absence it may be another."""
    seconds_by_client: Mapping[str, float]
    """Of each client of the first round."""
    phases_by_client: Mapping[str, Mapping[str, float]]
    """The same by phase: download, local steps, upload, and a wait for the client's hours."""
    slowest: str | None
    """Client whose upload is the last that counts; None where no upload comes in time."""
    late: tuple[str, ...]
    """Clients of the first round whose uploads come after ``transport.round_seconds``."""
    short_of_memory: Mapping[str, str]
    """Device of each client of the first round on which one turn takes more memory than there is."""
    steps: PredictedSteps | None = None
    """All steps of an asynchronous server, of which the seconds above are; None where rounds wait."""

    def rows(self) -> list[list[str]]:
        """Return what a table of predicted costs says."""
        last = f"{self.slowest} is slowest" if self.slowest else "and no upload comes in time"
        return [
            ["simulated time of a round", f"about {self.round_seconds:,.3g} s, {last}"],
            ["simulated time of all rounds", f"about {self.run_seconds:,.3g} s"],
            *(self.steps.rows() if self.steps else []),
        ]

    def time_line(self) -> RenderableType:
        """Return a row for each client of the first round: seconds by phase, and a bar of them in order."""
        phases = [p for p in _PHASES if any(p in own for own in self.phases_by_client.values())]
        rows = [
            [client_id, *(f"{own.get(phase, 0.0):,.3g}" for phase in phases), self._bar(own)]
            for client_id, own in self.phases_by_client.items()
        ]
        end = "until the longest turn ends" if self.steps else "until the round ends"
        titles = ["client", *(f"{_PHASES[phase]} {phase}" for phase in phases), end]
        caption = "Time line of the first round, simulated; work beside local steps comes on top"
        return terminal_table(make_table(caption, titles, rows))

    def _bar(self, seconds: Mapping[str, float]) -> str:
        """Return a turn's phases in proportion to the round; dots from its upload to the round's end.

        Where rounds do not wait, the longest turn stands for the round.
        """
        longest = max(self.seconds_by_client.values()) if self.steps else self.round_seconds
        done, drawn, bar = 0.0, 0, ""
        # Where link and work run side by side, phases sum up to more than the turn lasts.
        scale = seconds["total"] / (sum(s for p, s in seconds.items() if p != "total") or 1.0)
        for phase, letter in _PHASES.items():
            done += seconds.get(phase, 0.0) * scale
            reached = round(_BAR * done / (longest or 1.0))
            bar, drawn = bar + letter * (reached - drawn), reached
        return bar.ljust(_BAR, "·")

    def warnings(self) -> list[str]:
        """Return a sentence for each client whose device is too small, or too slow."""
        short = [
            f"{client_id} takes its turn on {device}, which has less memory than the turn needs"
            for client_id, device in self.short_of_memory.items()
        ]
        return short + [
            f"the upload of {client_id} comes after {self.seconds_by_client[client_id]:,.3g} simulated "
            "seconds: transport.round_seconds refuses it"
            for client_id in self.late
        ]


def predict_clock(
    bench: Workbench,
    runtime: ClientRuntime,
    trained: Sequence[str],
    bytes_by_client: Mapping[str, PredictedBytes],
    turn_bytes: int,
) -> PredictedClock | None:
    """Return the prediction for the model as it stands, with its method installed; None without a clock.

    Args:
        bench: of the run.
        runtime: draws the first round's batches, whose mean shape is counted.
        trained: names of the parameters that local steps train.
        bytes_by_client: messages of the first round's clients.
        turn_bytes: memory of one client's turn.
    """
    config = bench.config
    if config.clock is None:
        return None
    clock = Clock(settings=config.clock, client_ids=bench.data.client_ids, seed=config.seed)
    meter = WorkMeter()
    shape = _mean_shape(runtime, list(bytes_by_client))
    peak_of_local_steps(bench.parts.model, trained, shape, config.training, counting(meter))
    asked = {
        client_id: _turn(client_id, sizes, meter.work(bench.devices[client_id])[MAIN_PHASE], config)
        for client_id, sizes in bytes_by_client.items()
    }
    turns = {client_id: clock.foreseen(**turn) for client_id, turn in asked.items()}
    devices = clock.describe()["devices"]
    totals = {client_id: told["total"] for client_id, told in turns.items()}
    steps = predict_steps(config.asynchronous, clock, asked, config.rounds) if config.asynchronous else None
    in_time, first = (list(turns), steps.first) if steps else _first_round(config, clock, asked, totals)
    round_seconds = first["seconds"]["total"]
    return PredictedClock(
        round_seconds=round_seconds,
        run_seconds=steps.run_seconds if steps else round_seconds * config.rounds,
        seconds_by_client=totals,
        phases_by_client=turns,
        slowest=first["slowest"],
        late=tuple(client_id for client_id in turns if client_id not in in_time),
        short_of_memory={
            client_id: devices[client_id]
            for client_id in bytes_by_client
            if bench.devices[client_id].memory_bytes < turn_bytes
        },
        steps=steps,
    )


def _first_round(
    config: RunConfig,
    clock: Clock,
    asked: Mapping[str, Mapping[str, Any]],
    totals: Mapping[str, float],
) -> tuple[list[str], Mapping[str, Any]]:
    """Return whose uploads come in time in a round that waits, and the clock's figures of it."""
    waits = config.transport.name == "inprocess"
    wanted, limit = (config.cohort.wanted, config.transport.round_seconds) if waits else (0, 0.0)
    in_time = first_in_time(totals, clock, wanted=wanted, limit=limit)
    for client_id in in_time[: wanted or None]:
        clock.turn(**asked[client_id])
    return in_time, clock.end_round()


def _turn(client_id: str, sizes: PredictedBytes, step: PhaseWork, config: RunConfig) -> dict[str, Any]:
    """Return what the clock needs to time a turn of so many local steps."""
    steps = replace(step, seconds=step.seconds * config.training.num_local_steps)
    return {
        "client_id": client_id,
        "work": {MAIN_PHASE: steps},
        "download_bytes": sizes.download,
        "upload_bytes": sizes.upload,
    }


def _mean_shape(runtime: ClientRuntime, client_ids: Sequence[str]) -> BatchShape:
    """Return the mean shape of the batches that these clients draw in the first round."""
    batches = [batch for client_id in client_ids for batch in runtime.draw(client_id, 1)]
    return BatchShape(
        examples=batches[0].input_ids.shape[0],
        length=round(fmean(batch.input_ids.shape[1] for batch in batches)),
        labels=max(1, round(fmean(batch.num_labels for batch in batches))),
    )
