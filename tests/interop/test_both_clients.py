"""One expert, two clients: skep's and hivemind's must see the same outputs and gradients, whoever hosts it."""

import pytest
import torch

import hosts
from calls import close, experts
from rust_client import CallFailed, RustClient

pytestmark = pytest.mark.needs_skep

WIDTH = 32
ROWS = 5
# Experts that do not train, so that both clients meet the same weights.
CLASSES = {
    "ffn": lambda: [torch.randn(ROWS, WIDTH)],
    "transformer": lambda: [torch.randn(ROWS, 7, WIDTH), torch.arange(7).expand(ROWS, 7) > 4],
    "nop": lambda: [torch.randn(ROWS, WIDTH)],
    "nop_delay": lambda: [torch.randn(ROWS, WIDTH)],
    "det_dropout": lambda: [torch.randn(ROWS, WIDTH), torch.randint(0, 2, (ROWS, WIDTH))],
}
# How far a value may be off after one encoding, as a share of the tensor's standard deviation.
CODECS = {"NONE": 0, "FLOAT16": 0.005, "MEANSTD_16BIT": 0.005, "QUANTILE_8BIT": 0.2, "UNIFORM_8BIT": 0.1}
CODECS["BLOCKWISE_8BIT"] = 0.2


@pytest.fixture(scope="module", params=["skep", "hivemind"])
def kind(request):
    return request.param


def serve(session_hosts, kind, *flags):
    return getattr(session_hosts, kind)("serve", "--hidden_dim", WIDTH, "--optimizer", "none", *flags)


@pytest.fixture(scope="module")
def clients(session_hosts, join, tmp_path_factory):
    """Both clients of one server."""
    made = []

    def both(host):
        rust = RustClient(tmp_path_factory.mktemp("rust"), host.address)
        made.append(rust)
        return rust, join(host.address)

    yield both
    for rust in made:
        rust.end()


def by_python(dht, uid, inputs, grad):
    (expert,) = experts(dht, uid)
    leaves = [each.clone().requires_grad_(each.is_floating_point()) for each in inputs]
    output = expert(*leaves)
    output.backward(grad)
    return output.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_looks_the_same_to_both(session_hosts, clients, kind, name):
    quiet = ["--dropout", 0] if name == "transformer" else []
    host = serve(session_hosts, kind, "--expert_cls", name, "--expert_uids", f"{name}.0", *quiet)
    rust, dht = clients(host)
    inputs = CLASSES[name]()
    grad = torch.randn_like(inputs[0])
    (output,), grads, _, _ = rust.forward_backward([{"expert": f"{name}.0"}], inputs, grad)
    expected, expected_grads = by_python(dht, f"{name}.0", inputs, grad)
    assert close(output, expected)
    for got, wanted in zip(grads, expected_grads, strict=True):
        assert (got is None) == (wanted is None)
        assert got is None or close(got, wanted)
