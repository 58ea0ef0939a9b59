"""One DHT with members of both kinds, whoever came first."""

import re
import socket
import sys
import time

import hivemind
import pytest
import torch
from hivemind.p2p import P2P, PeerID
from hivemind.utils import get_dht_time

import hosts
from calls import close, experts, within

FFN = "--expert_cls ffn --hidden_dim 32".split()


def test_a_python_node_can_be_the_bootstrap(start, join):
    bootstrap = start.hivemind("dht")
    start.skep(
        "serve", *FFN, "--num_experts", 2, "--expert_pattern", "guest.[0:2]", "--initial_peers", bootstrap.address
    )
    first, _ = experts(join(bootstrap.address), "guest.0", "guest.1")
    x = torch.randn(3, 32, requires_grad=True)
    first(x).sum().backward()
    assert x.grad is not None


def test_hivemind_dht_from_the_command_line_can_be_the_bootstrap(start, join, tmp_path):
    program = [sys.executable, "-m", "hivemind.hivemind_cli.run_dht"]
    bootstrap = hosts.Host(
        program, ["--host_maddrs", "/ip4/127.0.0.1/tcp/0"], tmp_path / "run_dht.log", ready_within=None
    )
    start.made.append(bootstrap)
    listening = re.compile(r"/ip4/127\.0\.0\.1/tcp/\d+/p2p/\w+")
    assert within(60, lambda: listening.search(bootstrap.errors())), bootstrap.errors()
    address = listening.search(bootstrap.errors()).group()
    start.skep("serve", *FFN, "--expert_uids", "cli.0", "--initial_peers", address)
    (expert,) = experts(join(address), "cli.0")
    assert expert(torch.randn(2, 32)).shape == (2, 32)


@pytest.mark.needs_skep
def test_a_server_waits_for_a_bootstrap_that_comes_later(start, tmp_path, join):
    identity = tmp_path / "identity"
    P2P.generate_identity(str(identity))
    peer_id = PeerID.from_identity(identity.read_bytes())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer_id}"
    server = start.skep("serve", *FFN, "--expert_uids", "patient.0", "--initial_peers", address, ready_within=None)
    assert within(20, lambda: str(peer_id) in server.errors()), server.errors()
    assert server.is_running() and not server.lines
    start.hivemind("dht", "--host_maddrs", f"/ip4/127.0.0.1/tcp/{port}", "--identity_path", identity)
    server.wait_ready(30)
    experts(join(address), "patient.0")


@pytest.mark.needs_skep
def test_a_server_whose_bootstrap_is_down_keeps_trying_and_names_the_step(start):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"/ip4/127.0.0.1/tcp/{probe.getsockname()[1]}"
        peer = f"{address}/p2p/QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC"
        server = start.skep("serve", *FFN, "--expert_uids", "patient.1", "--initial_peers", peer, ready_within=None)
        step = f"dialling failed: {address}: Connection refused"
        assert within(20, lambda: server.errors().count(step) >= 3), server.errors()
    assert server.is_running() and not server.lines
    assert server.stop() == 0, server.errors()


@pytest.mark.needs_skep
def test_a_skep_dht_node_brings_python_servers_and_clients_together(start, join):
    bootstrap = start.skep("dht")
    start.hivemind("serve", *FFN, "--expert_uids", "py.0", "--initial_peers", bootstrap.address)
    (expert,) = experts(join(bootstrap.address), "py.0")
    assert expert(torch.randn(2, 32)).shape == (2, 32)


@pytest.mark.parametrize("kind", ["skep", "hivemind"])
def test_a_client_that_joined_a_lone_node_reaches_those_that_join_later(start, join, kind):
    bootstrap = start.skep("dht")
    early = join(bootstrap.address)
    assert early.get("nothing") is None  # its daemon has met the node by now
    getattr(start, kind)("serve", *FFN, "--expert_uids", "later.0", "--initial_peers", bootstrap.address)
    (expert,) = experts(early, "later.0")
    assert expert(torch.randn(2, 32)).shape == (2, 32)


def test_what_python_stores_through_skep_others_read_there(start, join):
    bootstrap = start.skep("dht")
    writer, reader = join(bootstrap.address, client_mode=False), join(bootstrap.address)
    expiration = get_dht_time() + 60
    assert writer.store("plain", {"a": [1, 2.5, "x", None]}, expiration)
    for subkey, value in (("one", 1), ("two", (2, "zwei"))):
        assert writer.store("by name", value, expiration, subkey=subkey)
    for subkey, value in ((3, b"three"), (-1, None)):
        assert writer.store("by number", value, expiration, subkey=subkey)
    assert not writer.store("plain", "older", expiration - 10)
    assert reader.get("plain").value == {"a": [1, 2.5, "x", None]}
    assert reader.get("plain").expiration_time == expiration
    assert {key: item.value for key, item in reader.get("by name").value.items()} == {"one": 1, "two": (2, "zwei")}
    assert {key: item.value for key, item in reader.get("by number").value.items()} == {3: b"three", -1: None}
    assert reader.get("nothing") is None


def test_a_record_outlives_the_node_that_stored_it(start, join):
    bootstrap = start.skep("dht")
    writer = join(bootstrap.address, client_mode=False)
    assert writer.store("will", "mine", get_dht_time() + 60)
    writer.shutdown()
    assert join(bootstrap.address).get("will").value == "mine"


def test_a_server_keeps_the_identity_that_hivemind_made(start, tmp_path):
    identity = tmp_path / "identity"
    P2P.generate_identity(str(identity))
    server = start.skep("serve", *FFN, "--expert_uids", "known.0", "--identity_path", identity)
    assert server.peer_id == PeerID.from_identity(identity.read_bytes()).to_base58()
    assert server.peer_id.startswith("Qm")


@pytest.mark.beyond_hivemind(why="lets its records expire")
def test_experts_are_withdrawn_when_their_server_stops(start, join):
    bootstrap = start.skep("dht")
    server = start.skep("serve", *FFN, "--expert_uids", "leaver.0", "leaver.1", "--initial_peers", bootstrap.address)
    experts(join(bootstrap.address), "leaver.0", "leaver.1")
    assert server.stop() == 0
    assert hivemind.moe.get_experts(join(bootstrap.address), ["leaver.0", "leaver.1"]) == [None, None]


def test_experts_of_a_killed_server_expire(start, join):
    bootstrap = start.skep("dht")
    timing = "--update_period 1 --expiration 4".split()
    server = start.skep("serve", *FFN, *timing, "--expert_uids", "victim.0", "--initial_peers", bootstrap.address)
    client = join(bootstrap.address)
    time.sleep(5)  # past the first announcement's end: it must have been renewed
    experts(client, "victim.0")
    server.kill()
    assert within(8, lambda: hivemind.moe.get_experts(client, ["victim.0"]) == [None])


def test_a_mixture_goes_on_when_one_of_its_servers_is_killed(start, join):
    keeper = start.skep("serve", *FFN, "--expert_uids", "team.0", "team.1")
    victim = start.skep("serve", *FFN, "--expert_uids", "team.2", "team.3", "--initial_peers", keeper.address)
    dht = join(keeper.address)
    dmoe = hivemind.RemoteMixtureOfExperts(
        in_features=32,
        uid_prefix="team.",
        grid_size=(4,),
        dht=dht,
        k_best=4,
        k_min=2,
        forward_timeout=5,
        backward_timeout=5,
        timeout_after_k_min=1,
    )
    x = torch.randn(2, 32)
    dmoe(x).sum().backward()
    victim.kill()
    for _ in range(2):
        out = dmoe(x)
        assert out.isfinite().all()
        out.sum().backward()


def test_experts_on_a_grid_are_found_by_beam_search(start, join):
    server = start.skep(
        "serve", *FFN, "--num_experts", 9, "--expert_pattern", "grid.[0:3].[0:3]", "--optimizer", "none"
    )
    dht = join(server.address)
    dmoe = hivemind.RemoteMixtureOfExperts(in_features=32, uid_prefix="grid.", grid_size=(3, 3), dht=dht, k_best=3)
    x = torch.randn(2, 32)
    with torch.no_grad():
        rows, columns = dmoe.proj(x).split((3, 3), dim=-1)
        scores, best = (rows[:, :, None] + columns[:, None, :]).flatten(1).topk(3, dim=-1)
        answers = torch.stack(
            [expert(x) for expert in experts(dht, *(f"grid.{i}.{j}" for i in range(3) for j in range(3)))]
        )
        expected = (torch.softmax(scores, dim=-1)[..., None] * answers[best, torch.arange(2)[:, None]]).sum(1)
    assert close(dmoe(x), expected, 1e-4)
