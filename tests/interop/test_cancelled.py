"""Calls whose callers give them up, or die: they cost little, and whoever remains is served."""

import asyncio
import concurrent.futures
import time

import pytest
import torch
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker

import hosts
from calls import LIMIT, experts, request
from rust_client import RustClient

pytestmark = pytest.mark.needs_skep

# Half a second a batch.
SLOW = [{"expert_cls": "nop_delay", "hidden_dim": 16, "optimizer": "none", "expert_uids": ["slow.0"]}]


def test_what_a_python_caller_gives_up_is_not_computed(start, join):
    server = hosts.Counted(start, SLOW, "--max_batch_size", 1)
    (expert,) = experts(join(server.host.address), "slow.0")
    x = torch.randn(1, 16)

    async def give_up_all_but_the_first():
        calls = [asyncio.create_task(expert.stub.rpc_forward(request("slow.0", x))) for _ in range(12)]
        answered, others = await asyncio.wait(calls, timeout=LIMIT, return_when=asyncio.FIRST_COMPLETED)
        for call in others:
            call.cancel()
        return len(answered)

    answered = RemoteExpertWorker.run_coroutine(give_up_all_but_the_first())
    assert torch.equal(expert(x), x)
    (counted,) = server.experts()
    # One more may have begun, and ours came last.
    assert answered + 1 <= counted["forward_tasks"] <= answered + 3, counted


@pytest.mark.parametrize("kind", ["skep", "hivemind"])
def test_a_rust_client_that_dies_in_the_middle_of_calls_hurts_nobody(start, join, tmp_path, kind):
    server = start.groups(kind, SLOW)
    (expert,) = experts(join(server.address), "slow.0")
    x = torch.randn(1, 16)
    dying = RustClient(tmp_path / "dying", server.address)
    assert dying.many("slow.0", [x])[1] == [""]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        calls = pool.submit(dying.many, "slow.0", [x] * 20)
        time.sleep(0.3)
        assert not calls.done()
        dying.process.kill()
        assert calls.exception(LIMIT) is not None
    assert torch.equal(expert(x), x)
    living = RustClient(tmp_path / "living", server.address)
    try:
        assert living.many("slow.0", [x] * 3)[1] == [""] * 3
    finally:
        living.end()
