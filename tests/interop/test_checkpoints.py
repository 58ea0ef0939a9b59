"""Checkpoints: those of hivemind's servers taken over, ours read by hivemind, training that goes on after a restart."""

import pytest
import torch
from hivemind.moe.server.checkpoints import load_experts, store_experts
from hivemind.moe.server.layers import name_to_block
from hivemind.moe.server.layers.lr_schedule import get_linear_schedule_with_warmup
from hivemind.moe.server.layers.optim import ClippingWrapper
from hivemind.moe.server.module_backend import ModuleBackend
from hivemind.utils.tensor_descr import BatchTensorDescriptor

import hosts
from calls import experts

WIDTH = 16
FFN = f"--expert_cls ffn --hidden_dim {WIDTH}".split()
LINEAR = {"scheduler": "linear", "num_warmup_steps": 2, "num_training_steps": 50}
# hivemind's optimizer, and the keys with which skep makes the same.
OPTIMIZERS = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.01), {"optimizer": "sgd"}),
    "momentum": (
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
        {"optimizer": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.001), {"optimizer": "adam"}),
    "adamw_linear": (
        lambda p: torch.optim.AdamW(p, lr=0.01),
        {"optimizer": "adamw", "learning_rate": 0.01, **LINEAR},
    ),
    "adam_clipped_linear": (
        lambda p: ClippingWrapper(torch.optim.Adam(p, lr=0.01, weight_decay=0.1), 0.5),
        {"optimizer": "adam", "learning_rate": 0.01, "weight_decay": 0.1, "clip_grad_norm": 0.5, **LINEAR},
    ),
}


def backend(kind):
    make, keys = OPTIMIZERS[kind]
    module = name_to_block["ffn"](WIDTH)
    optimizer = make(module.parameters())
    scheduled = getattr(optimizer, "optim", optimizer)
    scheduler = get_linear_schedule_with_warmup(scheduled, 2, 50) if "scheduler" in keys else None
    side = BatchTensorDescriptor(WIDTH)
    return ModuleBackend(
        "e.0", module, optimizer=optimizer, scheduler=scheduler, args_schema=(side,), outputs_schema=side, max_batch_size=64
    )


@pytest.fixture
def flags(start):
    def of(kind, *uids):
        """Those of the same optimizer; without uids of whatever has checkpoints."""
        group = {"hidden_dim": WIDTH, **OPTIMIZERS[kind][1], **({"expert_uids": uids} if uids else {})}
        return "--config", start.describe("skep", [group])

    return of


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.needs_skep
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_checkpoint_of_hivemind_comes_back_unchanged(tmp_path, flags, kind):
    theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    theirs.mkdir()
    trained = backend(kind)
    x, gradient = torch.randn(4, WIDTH), torch.randn(4, WIDTH)
    for _ in range(3):
        trained.backward(x, gradient)
    store_experts({"e.0": trained}, theirs)
    assert hosts.run_skep("checkpoint", "import", theirs, ours, *flags(kind)).returncode == 0
    assert hosts.run_skep("checkpoint", "export", ours, back).returncode == 0
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
def test_an_expert_moves_from_hivemind_to_us_and_back_while_it_trains(tmp_path, start, join, flags, kind):
    theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    theirs.mkdir()
    twin = backend(kind)
    x, gradient = torch.randn(4, WIDTH), torch.randn(4, WIDTH)
    twin.backward(x, gradient)
    store_experts({"e.0": twin}, theirs)
    assert hosts.run_skep("checkpoint", "import", theirs, ours, *flags(kind)).returncode == 0
    # Neither pattern nor uids: what has checkpoints is served.
    server = start.skep("serve", "--checkpoint_dir", ours, *flags(kind))
    (expert,) = experts(join(server.address), "e.0")
    for _ in range(2):
        there = x.clone().requires_grad_()
        expert(there).backward(gradient)
        assert torch.allclose(there.grad, twin.backward(x, gradient)[0], atol=1e-5)
    assert server.stop() == 0, server.errors()
    assert hosts.run_skep("checkpoint", "export", ours, back).returncode == 0
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


@pytest.mark.needs_skep
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_bit_by_bit_after_a_restart(tmp_path, start, join, flags, kind):
    begun = tmp_path / "begun"
    begun.mkdir()
    store_experts({"e.0": backend(kind)}, begun)
    steps = [(torch.randn(4, WIDTH), torch.randn(4, WIDTH)) for _ in range(4)]

    def trained(name, *parts):
        """State after these steps, with a restart between parts."""
        kept = tmp_path / name
        taken = hosts.run_skep("checkpoint", "import", begun, kept, *flags(kind))
        assert taken.returncode == 0, taken.stderr
        for part in parts:
            server = start.skep("serve", "--checkpoint_dir", kept, *flags(kind, "e.0"))
            (expert,) = experts(join(server.address), "e.0")
            for x, gradient in part:
                expert(x.clone().requires_grad_()).backward(gradient)
            assert server.stop() == 0, server.errors()
        given = hosts.run_skep("checkpoint", "export", kept, tmp_path / f"{name} exported")
        assert given.returncode == 0, given.stderr
        return torch.load(tmp_path / f"{name} exported" / "e.0" / "checkpoint_last.pt", weights_only=True)

    at_a_stretch, restarted = trained("one", steps), trained("two", steps[:2], steps[2:])
    first = torch.load(begun / "e.0" / "checkpoint_last.pt", weights_only=True)
    assert equal(at_a_stretch, restarted)
    assert not equal(at_a_stretch["module"], first["module"])


@pytest.mark.needs_skep
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before_of_those_that_are_kept(tmp_path, start, join):
    kept = tmp_path / "kept"
    arguments = ["serve", *FFN, "--checkpoint_dir", kept, "--keep_checkpoints", "2", "--expert_uids", "e.0"]
    x, answers = torch.randn(4, WIDTH), []
    for _ in range(4):
        server = start.skep(*arguments)
        (expert,) = experts(join(server.address), "e.0")
        expert(x.clone().requires_grad_()).sum().backward()
        answers.append(expert(x).detach())
        assert server.stop() == 0, server.errors()
    checkpoints = sorted((kept / "e.0").glob("*/state.safetensors")) or sorted(kept.rglob("*.safetensors"))
    assert len(checkpoints) == 2, list(kept.rglob("*"))
    damaged = bytearray(checkpoints[-1].read_bytes())
    damaged[-1] ^= 1
    checkpoints[-1].write_bytes(damaged)
    server = start.skep(*arguments)
    assert "WARN" in server.errors() and checkpoints[-1].parent.name in server.errors(), server.errors()
    (expert,) = experts(join(server.address), "e.0")
    with torch.no_grad():
        assert torch.equal(expert(x), answers[-2]) and not torch.equal(answers[-2], answers[-1])
