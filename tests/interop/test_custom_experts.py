"""Experts of one's own, between both kinds of client and server: TorchScript files and a class in Rust served by skep,
Python classes served by hivemind; several inputs and outputs, keywords, integers, bools, bytes, bfloat16, structures.
"""

import os

import pytest
import torch

from calls import close, experts
from custom_modules import made, script
from rust_client import RustClient

pytestmark = pytest.mark.needs_skep

EXAMPLE = os.environ.get("SKEP_CUSTOM_BIN", "target/debug/examples/custom_expert")
SEED, RATE = 5, 0.1
CLIENTS = ("rust", "python")


@pytest.fixture(scope="module", params=["skep", "hivemind"])
def clients(request, session_hosts, join, tmp_path_factory):
    """Both clients of one server, which has an expert of each class for each client."""
    groups = []
    for name in ("Mixed", "Half", "Bytes"):
        group = {"expert_uids": [f"{name.lower()}{client}.0" for client in CLIENTS]}
        if name == "Bytes":
            group["optimizer"] = "none"
        else:
            group |= {"optimizer": "sgd", "learning_rate": RATE}
        if request.param == "skep":
            group |= script(name, SEED, session_hosts.folder / f"{name}.pt")
        else:
            group |= {"expert_cls": name, "seed": SEED}
        groups.append(group)
    host = session_hosts.groups(request.param, groups, ready_within=120)
    rust = RustClient(tmp_path_factory.mktemp("rust"), host.address)
    yield rust, join(host.address)
    rust.end()


def train_alike(call, twin, step, tolerance):
    """Two steps of an expert beside those of its twin in this process; `step` makes inputs and output gradients."""
    optimizer = torch.optim.SGD(twin.parameters(), lr=RATE)
    for number in range(3):
        inputs, grads = step(number)
        leaves = [each.clone().requires_grad_(each.is_floating_point()) for each in inputs]
        expected = twin(*leaves)
        expected = list(expected) if isinstance(expected, tuple) else [expected]
        torch.autograd.backward(expected, grads)
        outputs, input_grads = call(inputs, grads)
        floats = [leaf.grad for leaf in leaves if leaf.grad is not None]
        got = [each for each, leaf in zip(input_grads, leaves, strict=True) if leaf.grad is not None]
        for left, right in zip([*outputs, *got], [*expected, *floats], strict=True):
            assert left.dtype == right.dtype and left.shape == right.shape
            assert close(left.float(), right.float(), tolerance), (number, (left - right).abs().max())
        optimizer.step()
        optimizer.zero_grad()


def caller(clients, who, name, keywords=()):
    """A function from inputs and output gradients to outputs and input gradients."""
    rust, dht = clients
    uid = f"{name}{who}.0"
    if who == "rust":

        def call(inputs, grads):
            outputs, input_grads, _, _ = rust.forward_backward([{"expert": uid}], inputs, *grads)
            return outputs, input_grads

        return call
    (expert,) = experts(dht, uid)

    def call(inputs, grads):
        leaves = [each.clone().requires_grad_(each.is_floating_point()) for each in inputs]
        positional = len(leaves) - len(keywords)
        outputs = expert(*leaves[:positional], **dict(zip(keywords, leaves[positional:])))
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        torch.autograd.backward(outputs, grads)
        return [each.detach() for each in outputs], [leaf.grad for leaf in leaves]

    return call


@pytest.mark.parametrize("who", CLIENTS)
def test_several_inputs_and_outputs_a_keyword_integers_and_bools_train_as_in_one_process(clients, who):
    def step(_):
        keep = torch.tensor([True, False, True, True])
        return [torch.randn(4, 8), torch.randint(0, 10, (4,)), keep], [torch.randn(4, 3), torch.randn(4)]

    train_alike(caller(clients, who, "mixed", ["keep"]), made("Mixed", SEED), step, 1e-5)


@pytest.mark.parametrize("who", CLIENTS)
def test_bfloat16_trains_as_in_one_process(clients, who):
    def step(_):
        return [torch.randn(4, 8).bfloat16()], [torch.randn(4, 8).bfloat16()]

    # Seven bits of mantissa.
    train_alike(caller(clients, who, "half"), made("Half", SEED), step, 2e-2)


UNARY, CHUNK, LARGE = 2 << 20, 4 << 20, 64 << 20
SIZES = [1, 3, UNARY - 1, UNARY, UNARY + 1, CHUNK - 1, CHUNK, CHUNK + 1, LARGE - 1, LARGE, LARGE + 1]


@pytest.mark.parametrize("who", CLIENTS)
@pytest.mark.parametrize("size", SIZES)
def test_bytes_around_every_limit_of_the_wire_come_back(clients, who, size):
    rust, dht = clients
    x = (torch.arange(size) % 251).to(torch.uint8).reshape(1, size)
    if who == "rust":
        (output,), _, _, _ = rust.forward_backward([{"expert": "bytesrust.0"}], [x])
    else:
        (expert,) = experts(dht, "bytespython.0")
        output = expert(x)
    assert output.dtype == torch.uint8 and torch.equal(output, x)


class Gated(torch.nn.Module):
    """The class of examples/custom_expert.rs."""

    def __init__(self, scale):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(16) * scale)

    def forward(self, x, condition, shift, keep):
        gate = torch.sigmoid(condition @ self.weight.T)
        return gate, (x * gate + shift) * keep.unsqueeze(-1)


@pytest.fixture(scope="module")
def gated(session_hosts, join, tmp_path_factory):
    """Both clients of a server with a class that was written in Rust."""
    flags = f"--expert_cls gated --hidden_dim 16 --optimizer sgd --learning_rate {RATE} --expert_uids".split()
    host = session_hosts.program([EXAMPLE], "serve", *flags, *(f"gated{client}.0" for client in CLIENTS))
    rust = RustClient(tmp_path_factory.mktemp("rust"), host.address)
    yield rust, join(host.address)
    rust.end()


@pytest.mark.parametrize("who", CLIENTS)
def test_a_class_in_rust_with_a_tuple_in_and_a_dictionary_out_trains_as_in_one_process(gated, who):
    rust, dht = gated
    uid = f"gated{who}.0"
    # Its weight is the identity times a scale, which one gate tells.
    ones, keep = torch.ones(1, 16), torch.tensor([True])
    if who == "rust":
        first = rust.forward_backward([{"expert": uid}], [ones, ones, ones, keep])[0][0]
    else:
        (expert,) = experts(dht, uid)
        answer = expert(ones, (ones, ones), keep=keep)
        assert set(answer) == {"gate", "y"}
        first = answer["gate"]
    scale = round(100 * torch.logit(first[0, 0]).item()) / 100

    def call(inputs, grads):
        if who == "rust":
            outputs, input_grads, _, _ = rust.forward_backward([{"expert": uid}], inputs, *grads)
            return outputs, input_grads
        x, condition, shift = leaves = [each.clone().requires_grad_() for each in inputs[:3]]
        answer = expert(x, (condition, shift), keep=inputs[3])
        outputs = [answer["gate"], answer["y"]]
        torch.autograd.backward(outputs, grads)
        return [each.detach() for each in outputs], [*(leaf.grad for leaf in leaves), None]

    def step(_):
        keep = torch.tensor([True, False, True])
        return [*torch.randn(3, 3, 16), keep], [*torch.randn(2, 3, 16)]

    train_alike(call, Gated(scale), step, 1e-5)


def test_an_input_of_another_dtype_is_an_error_that_names_it(clients, request):
    _, dht = clients
    if "hivemind" in request.node.callspec.id:
        pytest.skip("a hivemind server leaves dtypes to torch")
    (expert,) = experts(dht, "mixedpython.0")
    x, keep = torch.randn(2, 8), torch.tensor([True, True])
    with pytest.raises(Exception, match=r"ValueError.*int64"):
        expert(x, torch.tensor([1.0, 2.0]), keep=keep)
    assert expert(x, torch.tensor([1, 2]), keep=keep)[0].isfinite().all()

