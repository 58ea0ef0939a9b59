"""An expert that moves from server to server, and from kind to kind, with all it has learnt."""

import signal

import pytest
import torch

import hosts
from calls import close, experts, within

pytestmark = pytest.mark.needs_skep

FLAGS = ("--hidden_dim", 32, "--optimizer", "adam", "--expert_uids", "moved.0")


def train(dht, first, steps):
    """What the expert answers before each step, and after the last."""
    (expert,) = experts(dht, "moved.0")
    outputs = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x, target = (torch.randn(8, 32, generator=generator) for _ in range(2))
        out = expert(x)
        (out - target).square().sum().backward()
        outputs.append(out.detach())
    return torch.stack([*outputs, expert(torch.ones(8, 32)).detach()])


def stop(host):
    host.signal(signal.SIGTERM)
    assert host.process.wait(timeout=30) == 0, host.errors()


def skep(*arguments):
    done = hosts.run_skep("checkpoint", *arguments)
    assert done.returncode == 0, done.stderr


def test_training_goes_on_where_it_stopped_whoever_hosts_the_expert(start, join, tmp_path):
    ours, theirs, back = (tmp_path / name for name in ("ours", "theirs", "back"))
    first = start.skep("serve", *FLAGS, "--checkpoint_dir", ours)
    train(join(first.address), 0, 3)
    stop(first)
    skep("export", ours, theirs)

    again = start.skep("serve", *FLAGS, "--checkpoint_dir", ours)
    python = start.hivemind("serve", *FLAGS, "--checkpoint_dir", theirs)
    # Adam's moments came along, or the steps would differ.
    assert close(train(join(again.address), 3, 3), train(join(python.address), 3, 3))
    stop(python)
    skep("import", theirs, back, *FLAGS[:-2])

    returned = start.skep("serve", *FLAGS, "--checkpoint_dir", back)
    assert close(train(join(again.address), 6, 3), train(join(returned.address), 6, 3))


def test_a_server_that_is_killed_goes_on_from_its_newest_checkpoint(start, join, tmp_path):
    kept = tmp_path / "kept"
    flags = (*FLAGS, "--checkpoint_dir", kept, "--checkpoint_period", 0.2)
    first = start.skep("serve", *flags)
    trained = train(join(first.address), 0, 3)[-1]
    assert within(20, lambda: "step 3 " in hosts.run_skep("checkpoint", "list", kept).stdout)
    first.kill()
    second = start.skep("serve", *flags)
    (expert,) = experts(join(second.address), "moved.0")
    assert close(expert(torch.ones(8, 32)), trained)
