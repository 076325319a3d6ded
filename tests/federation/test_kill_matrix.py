"""A federation of real processes, killed with SIGKILL at named points: it ends as the one left alone."""

import itertools
from functools import partial

import pytest
from deployment import (
    NODE,
    SERVER_APP,
    SITE,
    SITES,
    SUPERLINK,
    WORKER,
    Point,
    committed,
    deployed,
    named,
    points_of_run,
)

ROUNDS = (1, 2, 3)
AT_THE_SITES = {"source": "site", "max_tokens": 192, "partition": {"kind": "site", "num_clients": 2}}


def config_of(make_config, method="flex"):
    small = ("rounds=3", "training.num_local_steps=1", "evaluation.max_test_examples=1")
    over = ("transport.name=flower", "transport.connection=sites", "evaluation.exam.num_questions=2")
    return make_config(method, *small, *over, data=AT_THE_SITES)


def of_server_app():
    """Twenty moments of the server app, from its first import to the result, at which it dies."""
    trained = f"{WORKER} of {SITES[0]}"
    return points_of_run(SERVER_APP, "fedexperts.federation.flower_transport", trained)


def of_superlink():
    """Twenty moments of the server and of both sites at which the SuperLink dies."""
    alder, birch = (f"{WORKER} of {site}" for site in SITES)
    server = partial(Point, at=SERVER_APP)
    start = [
        Point("import", "fedexperts.federation.flower_site", at=alder),
        server("os.rename", "run/base.json"),
        server("os.rename", "run/checkpoint.json"),
    ]
    rounds = [
        (
            Point("os.rename", "alder/received", at=alder, after=committed(number - 1)),
            Point("os.rename", named(number, "personal"), at=alder),
            Point("os.rename", named(number, "personal"), at=birch),
            server("open", "run/clients.jsonl", after=committed(number - 1)),
            server("os.rename", "run/checkpoint.json", after=committed(number)),
        )
        for number in ROUNDS
    ]
    end = [Point("os.rename", "adapted.safetensors", at=birch), server("os.rename", "run/result.json")]
    return [*start, *itertools.chain(*rounds), *end]


def of_site(site):
    """Twenty moments of a site at which it dies: its worker, its program, its node, or the whole machine."""
    worker = f"{WORKER} of {site}"
    start = [
        Point("import", "fedexperts.federation.flower_site", at=worker),
        Point("os.rename", "config.toml", at=worker),
        Point("os.rename", f"{site}/received", at=worker),
        Point("os.rename", "base.json", at=worker),
    ]
    rounds = [
        (
            Point("os.rename", f"{site}/received", at=worker, after=committed(number - 1)),
            Point("os.rename", named(number, "personal"), at=worker),
            Point("open", "clients.jsonl", at=worker, after=f"site-{site}/**/{named(number, 'personal')}"),
            Point("open", "rounds.jsonl", at=worker, after=f"site-{site}/**/{named(number, 'personal')}"),
        )
        for number in ROUNDS
    ]
    end = [
        Point("os.rename", f"{site}/received", at=worker, after=committed(3)),
        Point("os.rename", "adapted.safetensors", at=worker),
        Point("os.rename", "environment.json", at=worker),
        Point("os.rename", "result.json", at=worker),
    ]
    machine = [f"{program} of {site}" for program in (SITE, NODE, WORKER)]
    victims = itertools.cycle([machine[2:], machine[:1], machine[2:], machine[:1], machine[1:]])
    plans = [(point, next(victims)) for point in [*start, *itertools.chain(*rounds), *end]]
    return [*plans[:12], (plans[12][0], machine), *plans[13:]]


@pytest.fixture(scope="module")
def whole(make_config, tmp_path_factory):
    """Return what the federation ends with when nobody dies."""
    with deployed(config_of(make_config), tmp_path_factory.mktemp("whole") / "federation") as federation:
        federation.go_on({}, 300)
        return federation.identity()


VICTIMS = {
    "server app": lambda: {"server": [(point, [SERVER_APP]) for point in of_server_app()]},
    "SuperLink": lambda: {"server": [(point, [SUPERLINK]) for point in of_superlink()]},
    "each site": lambda: {site: of_site(site) for site in SITES},
}


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("victim", VICTIMS)
def test_a_federation_that_is_killed_at_twenty_points_ends_in_the_same_bits(
    victim, make_config, tmp_path, whole
):
    plans = VICTIMS[victim]()
    assert {len(own) for own in plans.values()} == {20}
    with deployed(config_of(make_config), tmp_path / "federation") as federation:
        # Others go on while the SuperLink is down: some of the points come before it is back.
        federation.go_on(plans, 2300, least=0.4 if victim == "SuperLink" else 1.0)
        print(f"{victim}: started {federation.num_starts}")
        assert federation.identity() == whole
