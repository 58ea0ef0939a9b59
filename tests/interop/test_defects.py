"""Where hivemind loses data, hangs or leaves things behind, and skep must not (docs/wire.md §12)."""

import os
import signal
import socket
import time

import hivemind
import pytest
import torch
from hivemind.compression import serialize_torch_tensor
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import P2PHandlerError
from hivemind.proto import dht_pb2, runtime_pb2
from hivemind.utils import MSGPackSerializer, get_dht_time

from calls import experts, forward_and_gradient, unary, within

pytestmark = pytest.mark.beyond_hivemind(why="one of its defects")

WIDE = 1 << 20


@pytest.fixture(scope="module")
def host(session_hosts):
    nops = {"expert_cls": "nop", "optimizer": "none"}
    groups = [
        {**nops, "hidden_dim": WIDE, "expert_uids": ["wide.0"]},
        {**nops, "hidden_dim": 32, "expert_uids": ["rounded.0"], "compression": "UNIFORM_8BIT"},
    ]
    return session_hosts.groups("skep", groups)


def test_a_unary_answer_that_is_too_large_is_an_error_and_no_silence(host, join):
    # One byte a value on the way there, four on the way back.
    x = serialize_torch_tensor(torch.randn(2, WIDE), runtime_pb2.UNIFORM_8BIT)
    request = runtime_pb2.ExpertRequest(uid="wide.0", tensors=[x])
    with pytest.raises(P2PHandlerError, match="rpc_forward_stream"):
        unary(join(host.address), host.peer_id, "ConnectionHandler.rpc_forward", request.SerializeToString())


def test_a_gradient_keeps_its_mean_through_a_rounding_codec(host, join):
    (expert,) = experts(join(host.address), "rounded.0")
    _, grad = forward_and_gradient(expert, torch.randn(64, 32), torch.randn(64, 32) + 5)
    assert abs(grad.mean().item() - 5) < 0.1


@pytest.fixture
def node(start, join):
    """A DHT node of skep's, and a client that knows no other."""
    host = start.skep("dht")
    return host, join(host.address)


def test_an_older_value_that_is_refused_does_not_shorten_the_life_of_the_newer_one(node):
    _, dht = node
    now = get_dht_time()
    assert dht.store("longer", "newer", now + 60)
    assert not dht.store("longer", "older", now + 2)
    time.sleep(2.5)  # past the end of the older value
    assert dht.get("longer").value == "newer"


def test_every_item_of_a_dictionary_is_tried_when_one_is_refused(node):
    host, dht = node
    now = get_dht_time()
    assert dht.store("by name", "kept", now + 100, subkey="first")
    whole = DictionaryDHTValue()
    # The first is older than what is there; the others are new.
    for subkey, until in (("first", now + 50), ("second", now + 60), ("third", now + 70)):
        whole.store(subkey, MSGPackSerializer.dumps(f"new {subkey}"), until)
    request = dht_pb2.StoreRequest(
        keys=[DHTID.generate(source="by name").to_bytes()],
        subkeys=[b""],
        values=[MSGPackSerializer.dumps(whole)],
        expiration_time=[now + 70],
        in_cache=[False],
        peer=dht_pb2.NodeInfo(),
    )
    answer = unary(dht, host.peer_id, "DHTProtocol.rpc_store", request.SerializeToString())
    assert list(dht_pb2.StoreResponse.FromString(answer).store_ok) == [False]
    found = {subkey: each.value for subkey, each in dht.get("by name", latest=True).value.items()}
    assert found == {"first": "kept", "second": "new second", "third": "new third"}


def test_nothing_is_left_of_a_server_that_is_killed(start, join):
    server = start.skep("serve", "--hidden_dim", 16, "--expert_uids", "gone.0", "gone.1")
    experts(join(server.address), "gone.0")
    os.kill(server.process.pid, signal.SIGKILL)  # the process alone, not its group
    server.process.wait(timeout=5)

    def port_is_free():
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", server.port)) != 0

    assert within(2, port_is_free)
    with pytest.raises(ProcessLookupError):
        os.killpg(server.process.pid, 0)


def test_a_server_listens_on_all_the_addresses_it_is_given(start, join):
    addresses = ["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.2/tcp/0"]
    server = start.skep("serve", "--hidden_dim", 16, "--expert_uids", "both.0", "--host_maddrs", *addresses)
    assert [address.rpartition("/tcp/")[0] for address in server.addresses] == ["/ip4/127.0.0.1", "/ip4/127.0.0.2"]
    for address in server.addresses:
        experts(join(address), "both.0")


def test_who_is_not_allowed_cannot_train_an_expert(start, join, tmp_path):
    allowed = tmp_path / "allowed"
    allowed.write_text("12D3KooWGC6TvWhfapngX6wvJHMYvKpDMXPb3ZnCZ6dMoaMtimQ5\n")
    server = start.skep("serve", "--hidden_dim", 16, "--expert_uids", "mine.0", "--allow_peers", allowed)
    with pytest.raises(Exception, match="(?i)failed|timeout|peer|exit"):
        join(server.address)
    assert server.is_running()
