"""The Python parties: clients of hivemind, its DHT nodes, and torch.distributed.rpc. Started by main.py, one role each.

Each says "ready" when it is prepared, starts at a word on standard input, and prints its result as one line of JSON.
"""

import asyncio
import json
import os
import random
import sys
import threading
import time

import torch

torch.set_num_threads(1)
LIMIT = 280  # seconds for one call


def start():
    print("ready", flush=True)
    if not sys.stdin.readline():
        sys.exit(1)


def tell(result):
    print(json.dumps(result), flush=True)


def report(times, begun):
    """Rate and latency; every time is a call's."""
    times = sorted(times)
    at = lambda part: times[min(len(times) - 1, int(len(times) * part))] * 1e6
    rate = len(times) / (time.perf_counter() - begun)
    tell({"calls": len(times), "rate": rate, "p50_us": at(0.5), "p99_us": at(0.99)})


def until(seconds, call):
    times, begun = [], time.perf_counter()
    while not times or time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        call(len(times))
        times.append(time.perf_counter() - started)
    report(times, begun)


def found(address, uids):
    import hivemind

    dht = hivemind.DHT(initial_peers=[address], start=True, client_mode=True)
    experts = hivemind.moe.get_experts(dht, uids)
    assert all(experts), experts
    return dht, experts


def hivemind_client(address, uids, rows, hidden, backward, seconds, in_flight=1):
    from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
    from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
    from hivemind.proto import runtime_pb2

    _, experts = found(address, uids)
    x = torch.randn(rows, hidden)

    def call(number):
        y = experts[number % len(experts)](x)
        if backward:
            y.sum().backward()

    async def one(expert):
        request = runtime_pb2.ExpertRequest(uid=expert.uid, tensors=[serialize_torch_tensor(x)])
        answer = await asyncio.wait_for(expert.stub.rpc_forward(request), LIMIT)
        return deserialize_torch_tensor(answer.tensors[0])

    async def many():
        times, begun = [], time.perf_counter()

        async def caller():
            while time.perf_counter() - begun < seconds:
                started = time.perf_counter()
                await one(experts[0])
                times.append(time.perf_counter() - started)

        await asyncio.gather(*(caller() for _ in range(in_flight)))
        return times, begun

    for number in range(len(experts)):
        call(number)
    start()
    if in_flight == 1:
        until(seconds, call)
    else:
        report(*RemoteExpertWorker.run_coroutine(many()))


def hivemind_moe(address, hidden, rows, seconds):
    import hivemind

    dht = hivemind.DHT(initial_peers=[address], start=True, client_mode=True)
    layer = hivemind.RemoteMixtureOfExperts(
        in_features=hidden, grid_size=(4, 4), dht=dht, k_best=4, uid_prefix="bench.", k_min=1, forward_timeout=60
    )
    x = torch.randn(rows, hidden)

    def step(_):
        layer(x).square().sum().backward()

    step(0)
    start()
    until(seconds, step)


def hivemind_dht(nodes, experts, batch):
    import hivemind
    from hivemind.moe.server.dht_handler import declare_experts, get_experts
    from hivemind.utils import get_dht_time

    start()
    begun, peers = time.perf_counter(), []
    for _ in range(nodes):
        neighbours = random.choice(peers).get_visible_maddrs() if peers else []
        peers.append(hivemind.DHT(initial_peers=neighbours, start=True))
    joined = time.perf_counter() - begun
    uids = [f"expert.{random.randrange(1000)}.{random.randrange(1000)}.{n}" for n in range(experts)]
    batches = [uids[at : at + batch] for at in range(0, experts, batch)]
    begun, stored, got = time.perf_counter(), 0, 0
    for each in batches:
        stored += sum(declare_experts(peers[-2], each, get_dht_time() + 300).values())
    store_seconds, begun = time.perf_counter() - begun, time.perf_counter()
    for each in batches:
        got += sum(expert is not None for expert in get_experts(peers[-1], each))
    get_seconds = time.perf_counter() - begun
    tell(
        {
            "join_seconds": joined,
            "stores_per_second": experts / store_seconds,
            "gets_per_second": experts / get_seconds,
            "stored": stored,
            "found": got,
        }
    )


# torch.distributed.rpc: the same modules behind functions that are called remotely.
modules, locks = [], []


def rpc_forward(number, x):
    with torch.no_grad():
        return modules[number][0](x)


def rpc_backward(number, x, grad):
    module, optimizer = modules[number]
    with locks[number]:
        x = x.requires_grad_()
        optimizer.zero_grad()
        module(x).backward(grad)
        optimizer.step()
        return x.grad


def rpc_join(name, rank, world, port):
    import torch.distributed.rpc as rpc

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", TP_SOCKET_IFNAME="lo")
    options = rpc.TensorPipeRpcBackendOptions(num_worker_threads=16, rpc_timeout=LIMIT)
    rpc.init_rpc(name, rank=rank, world_size=world, rpc_backend_options=options)
    return rpc


def rpc_server(expert_cls, hidden, experts, world, port):
    from hivemind.moe.server.layers import name_to_block

    for _ in range(experts):
        module = name_to_block[expert_cls](hidden)
        parameters = list(module.parameters())
        modules.append((module, torch.optim.SGD(parameters, lr=0.01) if parameters else None))
        locks.append(threading.Lock())
    rpc_join("server", 0, world, port)
    start()
    threading.Event().wait()


def rpc_client(rank, world, port, experts, rows, hidden, backward, seconds, in_flight=1):
    rpc = rpc_join(f"client{rank}", rank, world, port)
    x, grad = torch.randn(rows, hidden), torch.randn(rows, hidden)

    def call(number):
        number %= experts
        rpc.rpc_sync("server", rpc_forward, args=(number, x))
        if backward:
            rpc.rpc_sync("server", rpc_backward, args=(number, x, grad))

    for number in range(experts):
        call(number)
    start()
    if in_flight == 1:
        return until(seconds, call)
    times, begun = [], time.perf_counter()
    line = []
    send = lambda: line.append((time.perf_counter(), rpc.rpc_async("server", rpc_forward, args=(0, x))))
    for _ in range(in_flight):
        send()
    while time.perf_counter() - begun < seconds:
        sent, future = line.pop(0)
        future.wait()
        times.append(time.perf_counter() - sent)
        send()
    report(times, begun)


if __name__ == "__main__":
    # The functions that are called remotely must have the same name in all processes.
    import peers

    getattr(peers, sys.argv[1])(**json.loads(sys.argv[2]))
    sys.stdout.flush()
    # Nothing is to be tidied up: whoever started this ends the whole session.
    sys.stdin.read()
    os._exit(0)
