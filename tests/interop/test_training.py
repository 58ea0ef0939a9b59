"""Whole training runs in Python against a server of skep: what hivemind's own tests of its mixtures are about."""

import gzip
import os
import pathlib

import hivemind
import numpy
import pytest
import torch
import torch.nn.functional as F
from hivemind.moe.client.expert import DUMMY
from hivemind.moe.client.moe import _RemoteCallMany

from calls import LIMIT, close, experts

DIGITS = pathlib.Path(__file__).resolve().parents[2] / "examples" / "data" / "digits.csv.gz"
# Each of these runs once on every change; a large number looks for hangs.
AGAIN = pytest.mark.parametrize("run", range(int(os.environ.get("SKEP_INTEROP_REPEAT", "1"))))


@pytest.fixture(scope="module")
def host(session_hosts):
    cube = [f"cube.{i}.{j}.{k}" for i in range(4) for j in range(4) for k in range(4)]
    groups = [
        {"expert_uids": ["digits.0", "digits.1"], "hidden_dim": 64, "learning_rate": 0.05},
        {"expert_uids": [f"grid.{i}.{j}" for i in range(2) for j in range(2)], "hidden_dim": 64},
        {"expert_uids": cube, "hidden_dim": 16, "optimizer": "none"},
    ]
    return session_hosts.groups("skep", groups)


@pytest.fixture(scope="module")
def nodes(host, join):
    return join(host.address)


@pytest.fixture(scope="module")
def digits():
    table = torch.from_numpy(numpy.loadtxt(gzip.open(DIGITS, "rt"), delimiter=",", dtype=numpy.float32))
    return table[:, :-1] / 16, table[:, -1].long()


def train(model, parameters, digits, steps, rate=0.05):
    """Accuracy on the batches of the last steps, before each was learnt."""
    inputs, labels = digits
    opt = torch.optim.SGD(parameters, lr=rate, momentum=0.9)
    right = []
    for step in range(steps):
        rows = torch.randint(0, len(inputs), (64,))
        scores, extra = model(inputs[rows])
        loss = F.cross_entropy(scores, labels[rows]) + extra
        opt.zero_grad()
        loss.backward()
        opt.step()
        if step >= steps - 10:
            right.append((scores.argmax(1) == labels[rows]).float().mean().item())
    return sum(right) / len(right)


@AGAIN
def test_two_experts_behind_each_other_learn_digits(nodes, digits, run):
    first, second = experts(nodes, "digits.0", "digits.1")
    head = torch.nn.Linear(64, 10)
    accuracy = train(lambda x: (head(second(first(x))), 0.0), head.parameters(), digits, 60)
    assert accuracy > 0.8, accuracy


@AGAIN
def test_a_mixture_learns_digits(nodes, digits, run):
    layer = hivemind.RemoteMixtureOfExperts(
        in_features=64, uid_prefix="grid.", grid_size=(2, 2), dht=nodes, k_best=2, k_min=1, forward_timeout=LIMIT
    )
    head = torch.nn.Linear(64, 10)
    parameters = [*layer.parameters(), *head.parameters()]
    accuracy = train(lambda x: (head(layer(x)), 0.0), parameters, digits, 40)
    assert accuracy > 0.7, accuracy


@AGAIN
def test_a_switch_mixture_learns_digits(nodes, digits, run):
    layer = hivemind.RemoteSwitchMixtureOfExperts(
        in_features=64, uid_prefix="grid.", grid_size=(2, 2), dht=nodes, k_best=1, forward_timeout=LIMIT
    )
    head = torch.nn.Linear(64, 10)

    def model(x):
        out, balance = layer(x)
        return head(out), 0.01 * balance

    accuracy = train(model, [*layer.parameters(), *head.parameters()], digits, 40)
    assert accuracy > 0.7, accuracy


def call_many(nodes, chosen, x, **options):
    settings = {"k_min": 1, "backward_k_min": 1, "after": 5.0, "anomalies": False, **options}
    info = next(expert for row in chosen for expert in row).info
    return _RemoteCallMany.apply(
        DUMMY,
        chosen,
        settings["k_min"],
        settings["backward_k_min"],
        settings["after"],
        LIMIT,
        LIMIT,
        settings["anomalies"],
        False,
        info,
        x,
    )


@AGAIN
def test_many_are_called_and_one_that_is_not_there_leaves_a_gap(nodes, run):
    good, other = experts(nodes, "cube.0.0.0", "cube.1.1.1")
    gone = hivemind.moe.RemoteExpert(good._info._replace(uid="cube.9.9.9"), good.p2p)
    x = torch.randn(2, 16, requires_grad=True)
    mask, outputs = call_many(nodes, [[good, gone], [other, good]], x)
    assert mask.tolist() == [[True, False], [True, True]]
    assert close(outputs[0, 0], good(x[:1])[0]) and outputs[0, 1].eq(0).all() and close(outputs[1, 1], good(x[1:])[0])
    outputs.sum().backward()
    (expected,) = torch.autograd.grad(good(x[:1]).sum() + other(x[1:]).sum() + good(x[1:]).sum(), x)
    assert close(x.grad, expected)


@AGAIN
def test_anomalies_are_refused_where_the_client_looks_for_them(nodes, run):
    (good,) = experts(nodes, "cube.0.0.0")
    x = torch.randn(1, 16)
    x[0, 3] = float("nan")
    with pytest.raises(ValueError, match="nan"):
        call_many(nodes, [[good]], x, anomalies=True)
    x = torch.randn(1, 16, requires_grad=True)
    _, outputs = call_many(nodes, [[good]], x, anomalies=True)
    with pytest.raises(ValueError, match="nan"):
        (outputs * float("inf") * 0).sum().backward()


@AGAIN
def test_a_cube_of_experts_is_searched_and_called(nodes, run):
    layer = hivemind.RemoteMixtureOfExperts(
        in_features=16, uid_prefix="cube.", grid_size=(4, 4, 4), dht=nodes, k_best=3, k_min=1, forward_timeout=LIMIT
    )
    x = torch.randn(4, 16)
    scores = layer.proj(x).split_with_sizes((4, 4, 4), dim=-1)
    # Every place is taken, so the best expert is where each dimension scores best.
    found = layer.beam_search.batch_find_best_experts([each.detach().numpy() for each in scores], 3)
    for row, chosen in enumerate(found):
        best = ".".join(str(each[row].argmax().item()) for each in scores)
        assert chosen[0].uid == f"cube.{best}"
    assert layer(x).shape == (4, 16) and layer(x).isfinite().all()


def test_a_thousand_pairs_of_sample_and_expert_are_under_way_at_once(nodes):
    layer = hivemind.RemoteMixtureOfExperts(
        in_features=64, uid_prefix="grid.", grid_size=(2, 2), dht=nodes, k_best=4, k_min=4, forward_timeout=100
    )
    x = torch.randn(250, 64, requires_grad=True)
    with torch.no_grad():
        expected = torch.cat([layer(part) for part in x.split(50)])
    out = layer(x)
    assert close(out, expected, 1e-4)
    out.sum().backward()
    assert x.grad.isfinite().all()
