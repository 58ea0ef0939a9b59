"""Calls to experts below RemoteExpert: several at once, with deadlines, and malformed ones."""

import asyncio
import time

import hivemind
import torch
from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2

LIMIT = 30  # seconds; nothing here may wait for ever


def experts(dht, *uids):
    found = hivemind.moe.get_experts(dht, list(uids))
    missing = [uid for uid, expert in zip(uids, found) if expert is None]
    assert not missing, f"not found: {missing}"
    return found


def request(uid, *tensors):
    return runtime_pb2.ExpertRequest(uid=uid, tensors=[serialize_torch_tensor(tensor) for tensor in tensors])


def at_once(expert, inputs):
    """Forward every input at the same moment; results and exceptions in the inputs' order."""

    async def all_calls():
        calls = [asyncio.wait_for(expert.stub.rpc_forward(request(expert.uid, x)), LIMIT) for x in inputs]
        return await asyncio.gather(*calls, return_exceptions=True)

    answers = RemoteExpertWorker.run_coroutine(all_calls())
    return [each if isinstance(each, BaseException) else deserialize_torch_tensor(each.tensors[0]) for each in answers]


def unary(dht, peer_id, name, data):
    """A call by handler name with any bytes as its body."""

    async def call():
        p2p = await dht.replicate_p2p()
        return await asyncio.wait_for(p2p._client.call_unary_handler(PeerID.from_base58(peer_id), name, data), LIMIT)

    return RemoteExpertWorker.run_coroutine(call())


def forward_and_gradient(expert, x, weights):
    """f(x), and the gradient of sum(weights * f(x)) at x."""
    x = x.clone().requires_grad_()
    y = expert(x)
    (weights * y).sum().backward()
    return y.detach(), x.grad


def close(left, right, tolerance=1e-5):
    return torch.allclose(left, right, rtol=tolerance, atol=tolerance)


def raw(dht, peer_id, name, data, wait=True):
    """Writes bytes to a handler's stream and leaves its write side open; what came back up to the stream's end."""

    async def exchange():
        p2p = await dht.replicate_p2p()
        _, reader, writer = await p2p._client.stream_open(PeerID.from_base58(peer_id), [name])
        writer.write(data)
        await writer.drain()
        try:
            return await asyncio.wait_for(reader.read(), LIMIT) if wait else b""
        finally:
            writer.close()

    return RemoteExpertWorker.run_coroutine(exchange())


def within(seconds, happened):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if happened():
            return True
        time.sleep(0.1)
    return False
