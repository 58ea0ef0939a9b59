"""Checkpoints: those of hivemind's servers taken over, ours read by hivemind, training that goes on after a restart."""

import pytest
import torch
from hivemind.moe.server.checkpoints import load_experts, store_experts
from hivemind.moe.server.layers import name_to_block
from hivemind.moe.server.layers.lr_schedule import get_linear_schedule_with_warmup
from hivemind.moe.server.module_backend import ModuleBackend
from hivemind.utils.tensor_descr import BatchTensorDescriptor

import hosts
from calls import experts

WIDTH = 16
FFN = f"--expert_cls ffn --hidden_dim {WIDTH}".split()
OPTIMIZERS = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.01), False, []),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.001), False, []),
    "adamw_linear": (
        lambda p: torch.optim.AdamW(p, lr=0.01),
        True,
        "--learning_rate 0.01 --scheduler linear --num_warmup_steps 2 --num_training_steps 50".split(),
    ),
}


def backend(kind):
    optimizer, scheduled, _ = OPTIMIZERS[kind]
    module = name_to_block["ffn"](WIDTH)
    optimizer = optimizer(module.parameters())
    scheduler = get_linear_schedule_with_warmup(optimizer, 2, 50) if scheduled else None
    side = BatchTensorDescriptor(WIDTH)
    return ModuleBackend(
        "e.0", module, optimizer=optimizer, scheduler=scheduler, args_schema=(side,), outputs_schema=side, max_batch_size=64
    )


def flags(kind):
    return [*FFN, "--optimizer", kind.split("_")[0], *OPTIMIZERS[kind][2]]


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.needs_skep
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_checkpoint_of_hivemind_comes_back_unchanged(tmp_path, kind):
    theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    theirs.mkdir()
    trained = backend(kind)
    x, gradient = torch.randn(4, WIDTH), torch.randn(4, WIDTH)
    for _ in range(3):
        trained.backward(x, gradient)
    store_experts({"e.0": trained}, theirs)
    assert hosts.run_skep("checkpoint", "import", str(theirs), str(ours), *flags(kind)).returncode == 0
    assert hosts.run_skep("checkpoint", "export", str(ours), str(back)).returncode == 0
    loaded = backend(kind)
    load_experts({"e.0": loaded}, back)
    assert equal(loaded.module.state_dict(), trained.module.state_dict())
    assert equal(loaded.optimizer.state_dict()["state"], trained.optimizer.state_dict()["state"])
    # Both go on alike, to the last bit.
    for _ in range(3):
        assert torch.equal(trained.backward(x, gradient)[0], loaded.backward(x, gradient)[0])
    assert equal(loaded.module.state_dict(), trained.module.state_dict())
    if trained.scheduler:
        assert loaded.scheduler.get_last_lr() == trained.scheduler.get_last_lr()


@pytest.mark.needs_skep
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_expert_moves_from_hivemind_to_us_and_back_while_it_trains(tmp_path, start, join, kind):
    theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    theirs.mkdir()
    twin = backend(kind)
    x, gradient = torch.randn(4, WIDTH), torch.randn(4, WIDTH)
    twin.backward(x, gradient)
    store_experts({"e.0": twin}, theirs)
    assert hosts.run_skep("checkpoint", "import", str(theirs), str(ours), *flags(kind)).returncode == 0
    # Neither pattern nor uids: what has checkpoints is served.
    server = start.skep("serve", "--checkpoint_dir", str(ours), *flags(kind))
    (expert,) = experts(join(server.address), "e.0")
    for _ in range(2):
        there = x.clone().requires_grad_()
        expert(there).backward(gradient)
        assert torch.allclose(there.grad, twin.backward(x, gradient)[0], atol=1e-5)
    assert server.stop() == 0, server.errors()
    assert hosts.run_skep("checkpoint", "export", str(ours), str(back)).returncode == 0
    loaded = backend(kind)
    load_experts({"e.0": loaded}, back)
    for _ in range(2):
        here = loaded.backward(x, gradient)[0]
        assert torch.allclose(here, twin.backward(x, gradient)[0], atol=1e-5)


@pytest.mark.needs_skep
def test_a_restarted_server_hosts_what_it_has_checkpoints_of(tmp_path, start, join):
    arguments = ["serve", *FFN, "--checkpoint_dir", str(tmp_path / "kept")]
    x = torch.randn(4, WIDTH)

    def answers(server, uids):
        with torch.no_grad():
            return [expert(x) for expert in experts(join(server.address), *uids)]

    # Not wider: a listing under a bare name ends after 512 coordinates in a row that nobody has.
    server = start.skep(*arguments, "--expert_pattern", "e.[0:512]", "--num_experts", "3")
    (listed,) = [hosts.run_skep("experts", "e.", "--peer", server.address)]
    uids = sorted(line.split()[0] for line in listed.stdout.splitlines())
    assert len(uids) == 3
    for expert in experts(join(server.address), *uids):
        expert(x.clone().requires_grad_()).sum().backward()
    before = answers(server, uids)
    assert server.stop() == 0, server.errors()
    again = start.skep(*arguments, "--expert_pattern", "e.[0:512]", "--num_experts", "4")
    for one, other in zip(before, answers(again, uids)):
        assert torch.equal(one, other)
    listed = hosts.run_skep("experts", "e.", "--peer", again.address).stdout.splitlines()
    assert len(listed) == 4 and set(uids) < {line.split()[0] for line in listed}


@pytest.mark.needs_skep
def test_a_killed_server_goes_on_from_its_last_checkpoint(tmp_path, start, join):
    arguments = ["serve", *FFN, "--checkpoint_dir", str(tmp_path / "kept"), "--checkpoint_period", "0.2"]
    server = start.skep(*arguments, "--expert_uids", "e.0")
    (expert,) = experts(join(server.address), "e.0")
    x = torch.randn(4, WIDTH)
    expert(x.clone().requires_grad_()).sum().backward()
    with torch.no_grad():
        after = expert(x)
    for _ in range(100):
        listed = hosts.run_skep("checkpoint", "list", str(tmp_path / "kept")).stdout
        if "step 1 " in listed:
            break
    else:
        pytest.fail(listed)
    server.kill()
    again = start.skep(*arguments, "--expert_uids", "e.0")
    (expert,) = experts(join(again.address), "e.0")
    with torch.no_grad():
        assert torch.equal(expert(x), after)
