"""Five nodes of each kind in one DHT: whoever came first, and whoever is left."""

import hivemind
import numpy
import pytest
import torch
from hivemind.dht.routing import DHTID
from hivemind.moe.client.beam_search import MoEBeamSearcher
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2
from hivemind.utils import get_dht_time

import hosts
from calls import experts, unary, within
from rust_client import CallFailed, RustClient

pytestmark = pytest.mark.needs_skep

KEYS = [f"key {i}" for i in range(12)]


class Mixed:
    """Ten nodes, the first of which is the only one that the others are told of."""

    def __init__(self, first, start, join):
        self.rust, self.python = [], []
        if first == "skep":
            self.rust.append(start.skep("dht"))
            address = self.rust[0].address
        else:
            # Ten replicas: every node holds every record, so none is lost with either half.
            self.python.append(join(client_mode=False, num_replicas=10))
            address = str(self.python[0].get_visible_maddrs()[0])
        while len(self.rust) < 5:
            self.rust.append(start.skep("dht", "--initial_peers", address))
        while len(self.python) < 5:
            self.python.append(join(address, client_mode=False, num_replicas=10))
        self.join = join

    def readers(self, rust=True, python=True):
        """A client of each living node."""
        addresses = [node.address for node in self.rust] if rust else []
        addresses += [str(node.get_visible_maddrs()[0]) for node in self.python] if python else []
        return [self.join(address) for address in addresses]

    def store(self):
        until = get_dht_time() + 300
        for node, key in zip(self.python * len(KEYS), KEYS):
            assert node.store(key, f"value of {key}", until)
            for subkey in range(3):
                assert node.store(f"{key}, dictionary", (key, subkey), until + subkey, subkey=f"subkey {subkey}")


def assert_all_there(reader):
    for key in KEYS:
        assert reader.get(key, latest=True).value == f"value of {key}"
        found = reader.get(f"{key}, dictionary", latest=True).value
        assert {subkey: each.value for subkey, each in found.items()} == {f"subkey {i}": (key, i) for i in range(3)}


@pytest.fixture(params=["skep", "hivemind"])
def mixed(request, start, join):
    return Mixed(request.param, start, join)


def test_records_outlive_either_half_of_the_nodes(mixed, request):
    mixed.store()
    for reader in mixed.readers():
        assert_all_there(reader)
    # The kind that came first dies as a whole.
    if "skep" in request.node.callspec.id:
        for host in mixed.rust:
            host.kill()
        survivors = mixed.readers(rust=False)
    else:
        for node in mixed.python:
            node.shutdown()
        survivors = mixed.readers(python=False)
    for reader in survivors:
        assert_all_there(reader)


def found_at(dht, host, keys):
    """What a node answers from its own storage and routing table, by key."""
    ids = [DHTID.generate(source=key).to_bytes() for key in keys]
    request = dht_pb2.FindRequest(keys=ids, peer=dht_pb2.NodeInfo())
    answer = unary(dht, host.peer_id, "DHTProtocol.rpc_find", request.SerializeToString())
    return dht_pb2.FindResponse.FromString(answer).results


def held_by(dht, host, keys):
    """How many of these keys a node has records of."""
    return sum(each.type != dht_pb2.NOT_FOUND for each in found_at(dht, host, keys))


def test_a_newcomer_is_handed_the_records_that_are_its_to_keep(start, join):
    node = join(client_mode=False)
    until = get_dht_time() + 300
    keys = [*KEYS, *(f"{key}, dictionary" for key in KEYS)]
    for key in KEYS:
        assert node.store(key, f"value of {key}", until)
        assert node.store(f"{key}, dictionary", (key, 0), until, subkey="subkey 0")
    address = str(node.get_visible_maddrs()[0])
    # Of two nodes each is among the five nearest of every key.
    newcomer = start.skep("dht", "--initial_peers", address)
    caller = join(address)
    assert within(20, lambda: held_by(caller, newcomer, keys) == len(keys)), held_by(caller, newcomer, keys)


def test_a_newcomer_of_hivemind_is_handed_what_skep_keeps(start, join):
    keeper = start.skep("dht")
    writer = join(keeper.address)
    until = get_dht_time() + 300
    for key in KEYS:
        assert writer.store(key, f"value of {key}", until)
    newcomer = start.hivemind("dht", "--initial_peers", keeper.address)
    caller = join(keeper.address)
    assert within(20, lambda: held_by(caller, newcomer, KEYS) == len(KEYS)), held_by(caller, newcomer, KEYS)


def test_what_hivemind_notes_as_absent_hides_no_expert_from_skep(start, join, tmp_path):
    bootstrap = start.skep("dht")
    dht = join(bootstrap.address, client_mode=False)
    searcher = MoEBeamSearcher(dht, "late.", (4,), negative_caching=True)
    assert searcher.batch_find_best_experts([numpy.array([[0.0, 1.0, 2.0, 3.0]])], 2) == [[]]
    start.skep("serve", "--hidden_dim", 16, "--expert_uids", "late.0", "late.2", "--initial_peers", bootstrap.address)
    listing = hosts.run_skep("experts", "late.", "--peer", bootstrap.address, "--json")
    assert listing.returncode == 0, listing.stderr
    assert "late.0" in listing.stdout and "late.2" in listing.stdout
    assert all(experts(join(bootstrap.address), "late.0", "late.2"))
    rust = RustClient(tmp_path / "rust", bootstrap.address)
    try:
        assert len(rust.many("late.2", [torch.zeros(1, 16)])[0]) == 1
    finally:
        rust.end()


def test_client_mode_nodes_of_both_kinds_are_in_no_table_and_leave_their_records_with_others(start, join, tmp_path):
    ours = start.skep("dht")
    theirs = start.hivemind("dht", "--initial_peers", ours.address)
    python, rust = join(theirs.address), RustClient(tmp_path / "rust", ours.address, theirs.address)
    try:
        until = get_dht_time() + 300
        for key in KEYS:
            assert python.store(key, f"value of {key}", until)
        with pytest.raises(CallFailed, match="nobody.0"):
            rust.forward_backward([{"expert": "nobody.0"}], [torch.zeros(1, 16)])
        for node, other in ((ours, theirs), (theirs, ours)):
            found = found_at(python, node, KEYS)
            assert all(each.type != dht_pb2.NOT_FOUND for each in found)
            neighbours = {PeerID(peer).to_base58() for each in found for peer in each.nearest_peer_ids}
            assert neighbours == {other.peer_id}
    finally:
        rust.end()
