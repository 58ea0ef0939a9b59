"""Tensors of four bytes to 64 MiB, around every limit of the wire, between both kinds of client and server."""

import concurrent.futures

import pytest
import torch

from calls import experts, forward_and_gradient
from rust_client import RustClient

pytestmark = pytest.mark.needs_skep

# float32 values. A request above 2 MiB is streamed; a message of a stream holds 4 MiB.
UNARY, CHUNK = 1 << 19, 1 << 20
WIDTHS = [1, UNARY - 1, UNARY, UNARY + 1, CHUNK - 1, CHUNK]
# Rows by width; the last is 64 MiB.
SIZES = [*((width, 1) for width in WIDTHS), (UNARY + 1, 2), (CHUNK, 2), (CHUNK, 16)]


@pytest.fixture(scope="module", params=["skep", "hivemind"])
def clients(request, session_hosts, join, tmp_path_factory):
    """A Rust client of a server whose experts answer what they get, and those experts by width, as a Python client found
    them at the start: hivemind's server announces late while it moves large tensors, and sizes are what is tested here."""
    nops = {"expert_cls": "nop", "optimizer": "none"}
    groups = [{**nops, "hidden_dim": width, "expert_uids": [f"wide.{width}"]} for width in WIDTHS]
    host = session_hosts.groups(request.param, groups, ready_within=120)
    rust = RustClient(tmp_path_factory.mktemp("rust"), host.address)
    found = experts(join(host.address), *(f"wide.{width}" for width in WIDTHS))
    yield rust, dict(zip(WIDTHS, found))
    rust.end()


def numbers(rows, width):
    """No two neighbours equal, and any two chunks different."""
    return (torch.arange(rows * width, dtype=torch.float32) % 65521).reshape(rows, width)


@pytest.mark.parametrize(("width", "rows"), SIZES)
def test_the_rust_client_gets_back_what_it_sent(clients, width, rows):
    rust, _ = clients
    x = numbers(rows, width)
    (output,), (grad,), _, _ = rust.forward_backward([{"expert": f"wide.{width}"}], [x], -x)
    assert torch.equal(output, x) and torch.equal(grad, -x)


@pytest.mark.parametrize(("width", "rows"), SIZES)
def test_the_python_client_gets_back_what_it_sent(clients, width, rows):
    _, found = clients
    x = numbers(rows, width)
    output, grad = forward_and_gradient(found[width], x, -x)
    assert torch.equal(output, x) and torch.equal(grad, -x)


def test_two_clients_stream_at_the_same_time(clients):
    rust, found = clients
    expert = found[CHUNK]
    x = numbers(2, CHUNK)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for _ in range(3):
            by_rust = pool.submit(rust.forward_backward, [{"expert": expert.uid}], [x], -x)
            output, grad = forward_and_gradient(expert, x, -x)
            assert torch.equal(output, x) and torch.equal(grad, -x)
            (output,), (grad,), _, _ = by_rust.result(timeout=60)
            assert torch.equal(output, x) and torch.equal(grad, -x)
