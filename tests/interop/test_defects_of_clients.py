"""Where hivemind's client loses rows, raises or calls too often, and skep's must not (docs/wire.md §12)."""

import hivemind
import pytest
import torch

import hosts
from calls import close, experts, within
from rust_client import CallFailed, RustClient

pytestmark = pytest.mark.needs_skep

WIDTH = 32
SPARSE = ["sparse.0.0", "sparse.0.2", "sparse.2.1"]
GROUPS = [
    {"expert_uids": SPARSE, "hidden_dim": WIDTH, "optimizer": "none"},
    {"expert_uids": [f"line.{i}" for i in range(4)], "hidden_dim": WIDTH, "optimizer": "none"},
    {"expert_uids": ["deep.0.0.0"], "hidden_dim": WIDTH, "optimizer": "none"},
    {"expert_uids": ["nop.0"], "expert_cls": "nop", "hidden_dim": WIDTH, "optimizer": "none"},
]


@pytest.fixture(scope="module", params=["skep", "hivemind"])
def clients(request, session_hosts, join, tmp_path_factory):
    """Both clients of one server."""
    host = session_hosts.groups(request.param, GROUPS, ready_within=120)
    rust = RustClient(tmp_path_factory.mktemp("rust"), host.address)
    yield rust, join(host.address)
    rust.end()


def gate(*grid):
    return torch.nn.Linear(WIDTH, sum(grid))


def test_k_larger_than_what_is_alive_takes_what_is_alive(clients):
    rust, dht = clients
    layer = hivemind.RemoteMixtureOfExperts(
        in_features=WIDTH, uid_prefix="sparse.", grid_size=(3, 3), dht=dht, k_best=6, k_min=1
    )
    x, grad = torch.randn(4, WIDTH), torch.randn(4, WIDTH)
    layers = [{"moe": rust.grid("sparse.", (3, 3), 6, layer.proj)}]
    (output,), (x_grad,), _, _ = rust.forward_backward(layers, [x], grad)
    leaf = x.clone().requires_grad_()
    expected = layer(leaf)
    expected.backward(grad)
    assert close(output, expected.detach(), 1e-4) and close(x_grad, leaf.grad, 1e-4)


def test_a_grid_where_nobody_is_says_so(clients):
    rust, _ = clients
    for grid in [(3,), (2, 2), (2, 2, 2)]:
        with pytest.raises(CallFailed, match="0 of 1|no expert|too few|TooFew|enough|answers"):
            rust.forward_backward([{"moe": rust.grid("nobody.", grid, 2, gate(*grid))}], [torch.randn(2, WIDTH)])


def test_a_deep_grid_with_hardly_anybody_in_it_is_searched_to_its_end(clients):
    rust, dht = clients
    x = torch.randn(3, WIDTH)
    (expert,) = experts(dht, "deep.0.0.0")
    # One expert in 64 places; wherever the gate points, it is the best that there is.
    (output,), _, _, _ = rust.forward_backward([{"moe": rust.grid("deep.", (4, 4, 4), 2, gate(4, 4, 4))}], [x])
    assert close(output, expert(x))


def test_a_batch_of_any_size_passes_a_server_that_takes_4096_rows(clients):
    rust, _ = clients
    x = torch.randn(5000, WIDTH)
    (output,), (grad,), _, _ = rust.forward_backward([{"expert": "nop.0"}], [x], -x)
    assert torch.equal(output, x) and torch.equal(grad, -x)


def test_a_batch_without_rows_ends_soon_and_hurts_nobody(clients):
    rust, _ = clients
    try:
        (output,), _, _, _ = rust.forward_backward([{"expert": "nop.0"}], [torch.randn(0, WIDTH)])
        assert output.shape == (0, WIDTH)
    except CallFailed as refusal:
        assert "rows" in str(refusal) or "0" in str(refusal)
    x = torch.randn(2, WIDTH)
    assert torch.equal(rust.forward_backward([{"expert": "nop.0"}], [x])[0][0], x)


def test_the_balancing_loss_moves_the_gate_by_its_closed_form(clients):
    rust, dht = clients
    layer = hivemind.RemoteSwitchMixtureOfExperts(
        in_features=WIDTH, uid_prefix="line.", grid_size=(4,), dht=dht, k_best=1, jitter_eps=0.0
    )
    x, zeros = torch.randn(6, WIDTH), torch.zeros(6, WIDTH)
    layers = [{"switch": rust.grid("line.", (4,), 1, layer.proj)}]
    _, (x_grad,), (gates,), (loss,) = rust.forward_backward(layers, [x], zeros, balance=1.0)
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        layer(leaf.clone())  # for its utilization, which is the same; its loss has no gradient
    shares = torch.softmax(layer.proj(leaf), dim=-1).mean(0)
    expected = 16 * (shares * layer.grid_utilization).mean()
    expected.backward()
    assert layer.proj.weight.grad.abs().max() > 1e-3
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    assert close(gates["proj.weight"], layer.proj.weight.grad) and close(x_grad, leaf.grad)


def test_a_mixture_makes_one_call_for_each_expert_with_all_its_rows(start, tmp_path):
    server = hosts.Counted(start, GROUPS[1:2])
    rust = RustClient(tmp_path / "rust", server.host.address)
    try:
        layers = [{"moe": rust.grid("line.", (4,), 2, gate(4))}]
        rust.forward_backward(layers, [torch.randn(100, WIDTH)], torch.randn(100, WIDTH))
        asked = server.experts()
        assert sum(expert["rows"] for expert in asked) == 2 * 2 * 100, asked
        for expert in asked:
            assert expert["forward_tasks"] <= 1 and expert["backward_tasks"] <= 1, expert
        rust.forward_backward([{"expert": "line.0"}], [torch.randn(5000, WIDTH)])
        (before,), (after,) = ([e for e in each if e["uid"] == "line.0"] for each in (asked, server.experts()))
        assert after["forward_tasks"] - before["forward_tasks"] == 3, after  # 2048 + 2048 + 904 rows
    finally:
        rust.end()


def test_rows_of_a_killed_server_go_to_other_experts_within_the_same_pass(start, tmp_path):
    group = {"hidden_dim": WIDTH, "expert_cls": "nop", "optimizer": "none"}
    keeper = start.groups("skep", [{**group, "expert_uids": ["pair.0"]}])
    victim = start.groups("skep", [{**group, "expert_uids": ["pair.1"]}], "--initial_peers", keeper.address)
    rust = RustClient(tmp_path / "rust", keeper.address)
    try:
        only_one = gate(2)
        with torch.no_grad():
            only_one.bias.copy_(torch.tensor([-100.0, 100.0]))
        layers, x = [{"moe": rust.grid("pair.", (2,), 1, only_one)}], torch.randn(3, WIDTH)
        assert torch.equal(rust.forward_backward(layers, [x])[0][0], x)
        victim.kill()
        assert torch.equal(rust.forward_backward(layers, [x])[0][0], x)
    finally:
        rust.end()


def test_a_step_of_the_rust_client_is_made_once(start, tmp_path):
    server = hosts.Counted(start, [{"hidden_dim": WIDTH, "expert_uids": ["once.0"]}])
    rust = RustClient(tmp_path / "rust", server.host.address)
    try:
        for _ in range(5):
            rust.forward_backward([{"expert": "once.0"}], [torch.randn(3, WIDTH)], torch.randn(3, WIDTH))
        assert within(5, lambda: server.experts()[0]["steps"] == 5), server.experts()
    finally:
        rust.end()
