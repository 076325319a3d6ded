"""Differential privacy of clients: clipping, noise and epsilon as computed by hand or by the accountant."""

import math
import sys

import numpy as np
import pytest
import torch
from opacus.accountants import RDPAccountant

from fedexperts.algorithms.aggregation import norm_of
from fedexperts.algorithms.privacy import PrivacySettings, PrivateRounds, clipped, gaussian
from fedexperts.config.load import config_sha256
from fedexperts.costs.privacy import epsilon_of, privacy_of
from fedexperts.costs.stopwatch import Stopwatch
from fedexperts.doctor import examine
from fedexperts.errors import UserError
from fedexperts.federation.personal import PersonalStore
from fedexperts.federation.runtime import ClientRuntime
from fedexperts.integrity import rewind
from fedexperts.messages import Download, Upload
from fedexperts.releases import Releases, check_releases, read_releases, write_releases
from fedexperts.report import write_report
from fedexperts.run_directory import RunDirectory, read_json, read_lines
from fedexperts.running.checking import check_experiment
from fedexperts.running.experiment import run_experiment
from fedexperts.running.workbench import open_workbench

BEFORE = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([0.0])}
FAR = {"a": torch.tensor([4.0, 1.0]), "b": torch.tensor([4.0])}
"""A change of (3, 0) and 4, of norm 5 over both tensors."""
NEAR = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.0])}
"""A change of norm 1."""
PRIVATE = ("privacy.clip_norm=0.5", "privacy.noise_multiplier=2.0", "cohort.max_change_factor=0")


def test_a_long_change_is_scaled_over_all_tensors_together_and_a_short_one_stays():
    half = clipped(FAR, BEFORE, 2.5)
    assert half["a"].tolist() == [1.5, 0.0]
    assert half["b"].tolist() == [2.0]
    assert clipped(FAR, BEFORE, 5.0)["b"].tolist() == [4.0]
    assert clipped(NEAR, BEFORE, 2.5)["a"].tolist() == [0.0, 1.0]


def test_the_mean_weighs_all_alike_over_the_clients_asked_and_has_the_noise_once():
    settings = PrivacySettings(clip_norm=2.5, noise_multiplier=2.0, noise_seed=7)
    mean = PrivateRounds(settings=settings, cohort_size=4).start(BEFORE, 3)
    mean.add(FAR, {"a": 100.0, "b": 100.0})
    mean.add(NEAR, {"a": 1.0, "b": 1.0})
    generator = settings.generator(3)
    noise = {name: gaussian(BEFORE[name], 5.0, generator) for name in ("a", "b")}
    found = mean.mean(BEFORE)
    assert torch.equal(
        found["a"], (BEFORE["a"].double() + (noise["a"] + torch.tensor([1.5, 1.0])) / 4).float()
    )
    assert torch.equal(found["b"], ((noise["b"] + 2.0) / 4).float())
    assert torch.equal(mean.exact("b"), mean.exact("b")), "noise is drawn once"


def test_a_client_that_does_not_answer_counts_as_one_that_did_not_change():
    rounds = PrivateRounds(settings=PrivacySettings(clip_norm=2.5), cohort_size=2)
    mean = rounds.start(BEFORE, 1)
    mean.add(FAR, {})
    assert mean.mean(BEFORE)["b"].tolist() == [1.0]
    assert rounds.start(BEFORE, 1).mean(BEFORE)["a"].tolist() == [1.0, 1.0]


def test_noise_has_the_deviation_that_epsilon_is_computed_for():
    """The deviation of a million draws differs from that of the law by 0.2 % with probability 0.5 %."""
    found = float(gaussian(torch.empty(1_000_000), 3.0, np.random.default_rng(1)).std())
    assert found == pytest.approx(3.0, rel=2e-3)


def test_noise_comes_from_the_system_unless_a_seed_is_given():
    free, fixed = (
        PrivacySettings(clip_norm=1, noise_multiplier=1),
        PrivacySettings(clip_norm=1, noise_multiplier=1, noise_seed=0),
    )
    assert free.generator(1).random() != free.generator(1).random()
    assert fixed.generator(1).random() == fixed.generator(1).random()
    assert fixed.generator(1).random() != fixed.generator(2).random()


def test_secret_noise_cannot_be_found_by_trying_seeds():
    """Both words of the key are drawn: each is below 2^32 once in four billion keys."""
    key = PrivacySettings(clip_norm=1, noise_multiplier=1).generator(1).bit_generator.state["state"]["key"]
    assert len(key) == 2
    assert min(key) >= 2**32


def test_noise_by_the_client_is_on_the_upload_and_not_on_the_mean_again():
    settings = PrivacySettings(clip_norm=2.5, noise_multiplier=2.0, noise="client", noise_seed=7)
    upload = Upload(
        tensors=FAR, weights={"a": 9.0, "b": 9.0}, tables={"t": torch.ones(1)}, measured={"m": 1.0}
    )
    sent = settings.private(upload, BEFORE, "client-001", 3)
    generator = settings.generator("client-001", 3)
    noise = [gaussian(BEFORE[name], 5.0, generator) for name in ("a", "b")]
    assert torch.equal(sent.tensors["a"], (BEFORE["a"] + torch.tensor([1.5, 0.0]) + noise[0]).float())
    assert (sent.weights, sent.tables, sent.measured) == ({"a": 1.0, "b": 1.0}, {}, {})
    mean = PrivateRounds(settings=settings, cohort_size=4).start(BEFORE, 3)
    mean.add(sent.tensors, sent.weights)
    assert torch.equal(mean.mean(BEFORE)["a"], sent.tensors["a"])


# Epsilon


@pytest.mark.parametrize(("noise_multiplier", "num_turns"), [(1.0, 1), (2.0, 30), (0.7, 5)])
def test_epsilon_is_the_accountants_own(noise_multiplier, num_turns):
    """Ours takes the best of other orders than those of its defaults, which lie as close: within 0.1 %."""
    accountant = RDPAccountant()
    for _ in range(num_turns):
        accountant.step(noise_multiplier=noise_multiplier, sample_rate=1.0)
    its = accountant.get_epsilon(delta=1e-5)
    ours = epsilon_of(PrivacySettings(clip_norm=1.0, noise_multiplier=noise_multiplier), num_turns)
    assert ours == pytest.approx(its, rel=1e-3)


def test_epsilon_is_above_the_exact_one_of_a_gaussian():
    """Balle and Wang, ICML 2018: delta of the Gaussian mechanism with sensitivity 1, by its formula."""
    noise_multiplier = 2.0
    epsilon = epsilon_of(PrivacySettings(clip_norm=3.0, noise_multiplier=noise_multiplier), 1)

    def normal(value):
        return 0.5 * math.erfc(-value / math.sqrt(2))

    half, shift = 1 / (2 * noise_multiplier), epsilon * noise_multiplier
    delta = normal(half - shift) - math.exp(epsilon) * normal(-half - shift)
    assert 0 < delta < 1e-5


def test_without_the_accountant_noise_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus.accountants.analysis", None)
    with pytest.raises(UserError, match=r"package opacus: run pip install -e '\.\[privacy\]'"):
        epsilon_of(PrivacySettings(clip_norm=1.0, noise_multiplier=1.0), 1)


def test_only_the_turns_of_the_busiest_client_count():
    settings = PrivacySettings(clip_norm=1.0, noise_multiplier=2.0)
    found = privacy_of(settings, {"a": 2, "b": 3, "c": 1})
    assert found["turns_of_a_client"] == 3
    assert found["epsilon"] == epsilon_of(settings, 3) > epsilon_of(settings, 2)
    assert privacy_of(PrivacySettings(clip_norm=1.0), {"a": 1})["epsilon"] is None
    assert privacy_of(settings, {})["epsilon"] == 0.0


# Runs

SMALL = (
    "rounds=1",
    "data.partition.num_clients=2",
    "training.num_local_steps=1",
    "evaluation.matrix=false",
    "evaluation.max_test_examples=1",
    "evaluation.exam.num_questions=2",
)


@pytest.fixture
def sent(monkeypatch):
    """Every training upload, as it leaves a client."""
    found, handle = [], ClientRuntime.handle

    def record(self, client_id, download):
        upload = handle(self, client_id, download)
        if download.task == "train":
            found.append((download.sent.tensors, upload))
        return upload

    monkeypatch.setattr(ClientRuntime, "handle", record)
    return found


def test_without_a_clip_norm_nothing_changes_by_a_bit(make_config, tmp_path, quiet):
    for name, given in (("without", ()), ("off", ("privacy.clip_norm=0", "privacy.noise_multiplier=0"))):
        run_experiment(make_config("fedavg", *SMALL, *given), tmp_path / name, progress=quiet)
    plain, off = (read_json(tmp_path / name / "result.json") for name in ("without", "off"))
    assert plain["server_state_sha256"] == off["server_state_sha256"]
    assert plain["personal_sha256"] == off["personal_sha256"]
    assert "privacy" not in off
    assert not (tmp_path / "off" / "releases.json").exists()


@pytest.mark.parametrize("method", [pytest.param("flex", marks=pytest.mark.slow), "fedadam"])
def test_a_private_run_clips_equalises_and_says_its_epsilon(method, make_config, tmp_path, quiet, sent):
    config = make_config(method, *SMALL, *PRIVATE, *(["algorithm.server_lr=0.1"] * (method == "fedadam")))
    result = run_experiment(config, tmp_path / "run", progress=quiet)
    assert result["failures"] == []
    assert result["bytes"]["upload_counted"] == result["bytes"]["upload_predicted"]
    assert {weight for _, upload in sent for weight in upload.weights.values()} == {1.0}
    assert all(upload.tables == upload.measured == {} for _, upload in sent)
    assert result["privacy"]["epsilon"] == epsilon_of(config.privacy, 1)
    assert result["privacy"]["noise_is_secret"] is True
    written = [path.read_text() for path in write_report(tmp_path / "run") if path.suffix in (".md", ".html")]
    assert written
    assert all("differential privacy of clients with epsilon" in text for text in written)
    if method == "flex":  # whose tables do not travel
        checked = check_experiment(config).as_json()
        assert checked["privacy"] == result["privacy"]
        told = {line["upload"] for line in checked["bytes_by_client_of_round_1"]}
        assert told == {line["upload_bytes"] for line in read_lines(tmp_path / "run" / "clients.jsonl")}


def test_with_noise_by_the_client_the_server_never_sees_a_change_as_it_is(make_config, tmp_path, quiet, sent):
    given = ("privacy.noise=client", "privacy.noise_seed=5", *PRIVATE[:2])
    results = [
        run_experiment(make_config("fedavg", *SMALL, *given), tmp_path / name, progress=quiet)
        for name in ("one", "two")
    ]
    assert results[0]["server_state_sha256"] == results[1]["server_state_sha256"]
    came, upload = sent[0]
    change = torch.cat([(upload.tensors[name] - came[name]).flatten() for name in came])
    # Noise of deviation 1 a value on a change of norm 0.5; the deviation's own is 1 / sqrt(2 n), here taken
    # six times, and rounding to float32 is far below it.
    assert float(change.std()) == pytest.approx(1.0, abs=6 / math.sqrt(2 * len(change)))


@pytest.mark.parametrize("given", [(), ("algorithm.form=lora",)])
def test_a_change_is_measured_from_the_model_where_nothing_travels_in_the_first_round(
    given, make_config, tmp_path
):
    """Noise of deviation 0.005 a value, of which a norm of six times the root of their number is the most."""
    noised = ("privacy.clip_norm=0.01", "privacy.noise_multiplier=0.5", "privacy.noise=client")
    config = make_config("fmq", *SMALL, *given, *noised)
    with open_workbench(config, Stopwatch()) as bench:
        runtime = bench.scorer(PersonalStore(tmp_path)).runtime
        start = config.algorithm.init(runtime.parts, runtime.facts())
        download = Download(
            round_number=1,
            task="train",
            sent=config.algorithm.download(start, "client-000"),
            config_sha256=config_sha256(config),
        )
        upload = runtime.handle("client-000", download)
    assert download.sent.tensors == {}
    changes = {name: upload.tensors[name] - tensor for name, tensor in start.tensors.items()}
    number = sum(map(torch.numel, changes.values()))
    assert norm_of(changes.values()) < 0.01 + 6 * 0.005 * math.sqrt(number)


@pytest.mark.parametrize(
    ("method", "given", "sentence"),
    [
        ("scaffold", PRIVATE, r"\[privacy\] does not cover this algorithm"),
        ("flora", PRIVATE, r"\[privacy\] does not cover this algorithm"),
        ("fedavg", PRIVATE[:2], r"cohort\.max_change_factor is 1000, but must be 0 with \[privacy\]"),
        ("fedavg", ("privacy.noise_multiplier=1",), "noise_multiplier is 1, but clip_norm is 0"),
        ("fedavg", ("privacy.clip_norm=-1",), r"privacy\.clip_norm must be 0 or more and finite, not -1"),
        ("fedavg", ("privacy.noise=client", "privacy.clip_norm=1"), "noise is client, but has no effect"),
        ("fedavg", (*PRIVATE, "privacy.delta=1"), r"privacy\.delta must be above 0 and below 1, not 1"),
        (
            "fedavg",
            (*PRIVATE, "aggregation.kind=median"),
            r'aggregation\.kind is "median", but has no effect',
        ),
    ],
)
def test_settings_that_protect_nothing_are_refused(method, given, sentence, make_config):
    with pytest.raises(UserError, match=sentence):
        make_config(method, *given)


def test_a_method_without_uploads_is_refused_at_its_start_and_by_a_check(make_config, tmp_path, quiet):
    config, sentence = make_config("local_only", *SMALL, *PRIVATE), r"\[privacy\] .* send no tensors"
    with pytest.raises(UserError, match=sentence):
        run_experiment(config, tmp_path / "run", progress=quiet)
    with pytest.raises(UserError, match=sentence):
        check_experiment(config)


# Releases

REPEATABLE = ("privacy.noise_seed=5", "evaluation.exam.source=none", "evaluation.metrics=['loss']")


class Killed(Exception):
    pass


@pytest.fixture
def killed_after_an_upload(monkeypatch):
    """A run whose server ends in round 2, once client-000 has answered."""
    handle = ClientRuntime.handle

    def answer(self, client_id, download):
        if (download.task, download.round_number, client_id) == ("train", 2, "client-001"):
            raise Killed
        return handle(self, client_id, download)

    def run(config, folder, progress):
        with monkeypatch.context() as patched:
            patched.setattr(ClientRuntime, "handle", answer)
            with pytest.raises(Killed):
                run_experiment(config, folder, progress=progress)

    return run


@pytest.mark.parametrize("noise", ["client", pytest.param("server", marks=pytest.mark.slow)])
def test_a_round_that_is_asked_again_counts_again_and_going_back_takes_nothing_off(
    noise, make_config, tmp_path, quiet, killed_after_an_upload, monkeypatch
):
    config = make_config("fedavg", *SMALL, *PRIVATE, f"privacy.noise={noise}", *REPEATABLE, "rounds=2")
    whole = run_experiment(config, tmp_path / "whole", progress=quiet)
    assert whole["privacy"] == privacy_of(config.privacy, {"client-000": 2, "client-001": 2})
    run = RunDirectory(tmp_path / "cut")
    killed_after_an_upload(config, run.path, quiet)
    told = []
    monkeypatch.setattr(quiet, "message", told.append)
    again = run_experiment(config, run.path, progress=quiet, resume=True)
    assert f"epsilon {epsilon_of(config.privacy, 3):.3g} at" in told[0], "before anybody is asked"
    assert again["privacy"] == privacy_of(config.privacy, {"client-000": 3, "client-001": 3}, 1)
    assert again["privacy"]["epsilon"] == epsilon_of(config.privacy, 3) > whole["privacy"]["epsilon"]
    spent = [line["privacy"] for line in read_lines(run.rounds)]
    assert [(one["turns_of_a_client"], one["num_repeated_rounds"]) for one in spent] == [(1, 0), (3, 1)]
    assert spent[-1]["epsilon"] == again["privacy"]["epsilon"]
    assert "rounds begun again count each time: 1" in write_report(run.path)[1].read_text()
    rewind(run, 1)
    once_more = run_experiment(config, run.path, progress=quiet, resume=True)
    assert once_more["privacy"]["epsilon"] == epsilon_of(config.privacy, 4)
    # With the seed of the noise known, all else is the run that nobody interrupted, bit for bit.
    for result in (again, once_more):
        assert result["server_state_sha256"] == whole["server_state_sha256"]
        assert result["mean"] == whole["mean"]


def test_a_journal_of_releases_that_is_lost_old_or_damaged_is_named(
    make_config, tmp_path, quiet, killed_after_an_upload
):
    config = make_config("fedavg", *SMALL, *PRIVATE, *REPEATABLE, "rounds=2")
    run = RunDirectory(tmp_path / "run")
    killed_after_an_upload(config, run.path, quiet)
    journal = run.releases.read_bytes()
    assert read_releases(run.releases) == Releases(
        turns={"client-000": 2, "client-001": 2}, rounds={"1": 1, "2": 1}
    )
    assert examine(run.path).problems == ()
    write_releases(run.releases, Releases(turns={"client-000": 1}, rounds={"1": 1}))
    old = "counts 1 uploads asked for, but there were 2: it is an older copy"
    for change, reason in (
        (lambda: None, old),
        (lambda: run.releases.write_bytes(journal.replace(b"2", b"1", 1)), "is damaged"),
        (run.releases.unlink, "does not exist"),
    ):
        change()
        with pytest.raises(UserError, match=reason):
            run_experiment(config, run.path, progress=quiet, resume=True)
        assert any(reason in problem for problem in examine(run.path).problems)
    with pytest.raises(UserError, match="does not exist"):
        check_releases(run.releases, 0)
