import pathlib

import hivemind
import pytest
import torch

import forks
import hosts


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0xBEE)


@pytest.fixture(scope="session")
def session_hosts(tmp_path_factory):
    made = hosts.Hosts(tmp_path_factory.mktemp("hosts"))
    yield made
    made.end()


@pytest.fixture
def start(tmp_path):
    """Hosts of one test."""
    made = hosts.Hosts(tmp_path)
    yield made
    made.end()


@pytest.fixture(scope="session")
def first(session_hosts):
    """The tutorial's first server."""
    flags = "serve --expert_cls ffn --hidden_dim 512 --num_experts 5 --expert_pattern".split()
    return session_hosts.skep(*flags, "expert.[0:5]")


@pytest.fixture(scope="session")
def second(session_hosts, first):
    """The tutorial's second server, which joins the first."""
    flags = "serve --expert_cls ffn --hidden_dim 512 --num_experts 10 --expert_pattern".split()
    return session_hosts.skep(*flags, "expert.[5:250]", "--initial_peers", first.address)


@pytest.fixture(scope="session")
def frozen(session_hosts, first):
    """Experts that do not train: what they answer now they answer later, so answers can be compared."""
    flags = "serve --expert_cls ffn --hidden_dim 512 --optimizer none --expert_uids frozen.0 frozen.1".split()
    return session_hosts.skep(*flags, "--initial_peers", first.address)


@pytest.fixture(scope="session")
def living_nodes():
    """hivemind DHT nodes that live. Each is a process that takes along a copy of this one."""
    living = []
    yield living
    end(living, 0)


@pytest.fixture(autouse=True)
def nodes_of_a_test_end_with_it(living_nodes):
    """Those of fixtures that outlive a test are made before this one, and stay."""
    kept = len(living_nodes)
    yield
    end(living_nodes, kept)


def end(nodes, kept):
    while len(nodes) > kept:
        nodes.pop().shutdown()


@pytest.fixture(scope="session")
def join(living_nodes):
    """Makes hivemind DHT nodes."""

    def node(*addresses, client_mode=True, **options):
        options |= {"client_mode": client_mode, **forks.PATIENCE}
        living_nodes.append(hivemind.DHT(initial_peers=list(addresses), start=True, **options))
        return living_nodes[-1]

    return node


@pytest.fixture(scope="session")
def dht(join, first, second):
    return join(first.address)


def pytest_collection_modifyitems(items):
    if not hosts.HIVEMIND_STANDS_IN:
        return
    for item in items:
        for mark in ("beyond_hivemind", "needs_skep"):
            found = item.get_closest_marker(mark)
            if found:
                item.add_marker(pytest.mark.skip(reason=f"{mark}: {found.kwargs.get('why', 'a command of skep')}"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    """A failure shows what the servers had to say."""
    report = (yield).get_result()
    if report.failed:
        for host in hosts.running:
            report.sections.append((f"standard error of {host.name}", tail(host.log)))


def tail(log: pathlib.Path, lines=25):
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
