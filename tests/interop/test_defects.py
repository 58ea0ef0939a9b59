"""Where hivemind loses data, hangs or leaves things behind, and skep must not (docs/wire.md §12)."""

import asyncio
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import hivemind
import pytest
import torch
from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import P2P, P2PDaemonError, P2PHandlerError
from hivemind.proto import dht_pb2, runtime_pb2
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from hivemind.utils import MSGPackSerializer, get_dht_time

import hosts
from calls import LIMIT, close, experts, forward_and_gradient, request, unary, within

pytestmark = pytest.mark.beyond_hivemind(why="one of its defects")

WIDE = 1 << 20


@pytest.fixture(scope="module")
def host(session_hosts):
    nops = {"expert_cls": "nop", "optimizer": "none"}
    groups = [
        {**nops, "hidden_dim": WIDE, "expert_uids": ["wide.0"]},
        {**nops, "hidden_dim": 32, "expert_uids": ["rounded.0"], "compression": "UNIFORM_8BIT"},
        {"expert_cls": "ffn", "hidden_dim": 32, "expert_uids": ["trained.0"]},
        {"expert_cls": "transformer", "hidden_dim": 32, "expert_uids": ["dropping.0"], "optimizer": "none"},
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


def test_a_gradient_that_is_not_finite_is_refused_and_those_beside_it_are_answered(host, join):
    (expert,) = experts(join(host.address), "trained.0")
    x = torch.randn(3, 32)
    grads = [torch.full((3, 32), float("nan")) if i % 4 == 1 else torch.randn(3, 32) for i in range(16)]

    async def all_at_once():
        calls = [expert.stub.rpc_backward(request("trained.0", x, grad)) for grad in grads]
        return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), LIMIT)

    for grad, answer in zip(grads, RemoteExpertWorker.run_coroutine(all_at_once())):
        if grad.isfinite().all():
            assert deserialize_torch_tensor(answer.tensors[0]).isfinite().all()
        else:
            assert isinstance(answer, P2PHandlerError) and "ValueError" in str(answer), answer
    assert expert(x).isfinite().all()


def test_gradients_belong_to_the_outputs_although_dropout_is_on(host, join):
    (expert,) = experts(join(host.address), "dropping.0")
    # Two equal rows come out unequal: it does drop.
    x, mask = torch.randn(1, 6, 32).repeat(2, 1, 1), torch.zeros(2, 6, dtype=torch.bool)
    direction, weights, step = torch.randn(2, 6, 32), torch.randn(2, 6, 32), 1e-2
    leaf = x.clone().requires_grad_()
    output = expert(leaf, mask)
    assert not close(output[0], output[1])
    (weights * output).sum().backward()
    with torch.no_grad():
        ends = [(weights * expert(x + sign * step * direction, mask)).double().sum() for sign in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * step)
    assert torch.isclose((leaf.grad * direction).double().sum(), slope, rtol=2e-2, atol=2e-2), slope


def test_an_expert_with_much_work_does_not_keep_another_from_its_turn(start, join, tmp_path):
    config = tmp_path / "skep.toml"
    nop = 'optimizer = "none"\nhidden_dim = 16\n'
    config.write_text(
        "[server]\nmax_batch_size = 1\nexecutors = 1\n"
        f'[[experts]]\nexpert_cls = "nop_delay"\nexpert_uids = ["hot.0"]\n{nop}'
        f'[[experts]]\nexpert_cls = "nop"\nexpert_uids = ["cold.0"]\n{nop}'
    )
    server = start.skep("serve", "--config", config)
    hot, cold = experts(join(server.address), "hot.0", "cold.0")
    x = torch.randn(1, 16)
    hot(x), cold(x)
    # Half a second each.
    with ThreadPoolExecutor(12) as callers:
        waiting = [callers.submit(hot, x) for _ in range(12)]
        assert within(LIMIT, lambda: any(each.done() for each in waiting))
        for _ in range(3):
            assert torch.equal(cold(x), x)
        assert not all(each.done() for each in waiting)


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


def store_at(dht, host, key, value, until):
    """Stores with this node alone; hivemind's own way takes no large values. Whether it was taken."""
    store = dht_pb2.StoreRequest(
        keys=[DHTID.generate(source=key).to_bytes()],
        subkeys=[MSGPackSerializer.dumps(None)],
        values=[MSGPackSerializer.dumps(value)],
        expiration_time=[until],
        in_cache=[False],
        peer=dht_pb2.NodeInfo(),
    )
    answer = unary(dht, host.peer_id, "DHTProtocol.rpc_store", store.SerializeToString())
    (taken,) = dht_pb2.StoreResponse.FromString(answer).store_ok
    return taken


def kept_at(dht, host, key):
    """What this node itself answers, or None."""
    find = dht_pb2.FindRequest(keys=[DHTID.generate(source=key).to_bytes()], peer=dht_pb2.NodeInfo())
    answer = unary(dht, host.peer_id, "DHTProtocol.rpc_find", find.SerializeToString())
    (found,) = dht_pb2.FindResponse.FromString(answer).results
    return None if found.type == dht_pb2.NOT_FOUND else MSGPackSerializer.loads(found.value)


def test_a_record_is_stored_if_any_node_takes_it(node, start, join):
    first, dht = node
    second = start.skep("dht", "--initial_peers", first.address)
    # Only one of the two knows it, and so refuses what expires earlier.
    caller = join(second.address)
    assert store_at(caller, second, "contested", "newer", get_dht_time() + 600)
    for number in range(3):
        stored = hosts.run_skep("dht", "store", "contested", number, "--expiration", 60, "--peer", first.address)
        assert stored.returncode == 0, stored.stderr
        # The one who stored is gone, and counted itself as no replica.
        assert (kept_at(dht, first, "contested"), kept_at(caller, second, "contested")) == (number, "newer")
        time.sleep(0.1)  # so that the next one expires later


def test_one_peer_takes_one_place_in_a_routing_table(node):
    host, dht = node
    for _ in range(5):
        ping = dht_pb2.PingRequest(peer=dht_pb2.NodeInfo(node_id=DHTID.generate().to_bytes()))
        unary(dht, host.peer_id, "DHTProtocol.rpc_ping", ping.SerializeToString())
    find = dht_pb2.FindRequest(keys=[DHTID.generate().to_bytes()], peer=dht_pb2.NodeInfo())
    (found,) = dht_pb2.FindResponse.FromString(
        unary(dht, host.peer_id, "DHTProtocol.rpc_find", find.SerializeToString())
    ).results
    assert len(found.nearest_peer_ids) == 1


def test_a_peer_that_speaks_nothing_of_hiveminds_is_in_no_address_book(start, join):
    host = start.skep("dht")
    # Its daemon speaks Kademlia, as every node of IPFS does, and nothing else.
    stranger = RemoteExpertWorker.run_coroutine(P2P.create(initial_peers=[host.address]))
    try:
        friend, dht = join(host.address, client_mode=False), join(host.address)
        find = dht_pb2.FindRequest(keys=[DHTID.generate().to_bytes()], peer=dht_pb2.NodeInfo()).SerializeToString()

        def is_found(peer_id):
            try:
                return bool(unary(dht, peer_id.to_base58(), "DHTProtocol.rpc_find", find))
            except P2PDaemonError as error:
                assert "not found" in str(error) or "find any peer" in str(error), error
                return False

        # The caller knows only the node of skep's, and asks it for addresses.
        assert within(LIMIT, lambda: is_found(friend.peer_id))
        assert not is_found(stranger.peer_id)
    finally:
        RemoteExpertWorker.run_coroutine(stranger.shutdown())


def test_a_key_has_room_for_so_much_and_no_more(node):
    host, dht = node
    until = get_dht_time() + 60
    assert store_at(dht, host, "large", b"x" * 900_000, until)
    assert not store_at(dht, host, "too large", b"x" * 1_100_000, until)
    assert (kept_at(dht, host, "large"), kept_at(dht, host, "too large")) == (b"x" * 900_000, None)


def test_more_records_than_one_message_holds_are_handed_over(node, start, join):
    keeper, dht = node
    keys = [f"large {i}" for i in range(6)]
    for key in keys:
        assert store_at(dht, keeper, key, b"x" * 900_000, get_dht_time() + 300)
    newcomer = start.hivemind("dht", "--initial_peers", keeper.address)
    caller = join(keeper.address)
    assert within(20, lambda: all(kept_at(caller, newcomer, key) for key in keys))


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
