"""The daemon's manners: what it prints, how it takes strangers, how it ends."""

import re
import signal
import socket
import threading
import time

import pytest
import torch

import calls
import hosts
from calls import experts

FFN = "--expert_cls ffn --hidden_dim 32".split()
ADDRESS = re.compile(r"/ip[46]/[0-9a-f.:]+/(tcp|udp)/\d+(/quic-v1)?/p2p/[1-9A-HJ-NP-Za-km-z]+")


def test_standard_output_is_addresses_and_nothing_else(first):
    assert first.lines and all(ADDRESS.fullmatch(line) for line in first.lines), first.lines
    assert first.lines[0].startswith("/ip4/127.0.0.1/tcp/")


def test_it_says_what_it_hosts(first):
    for number in range(5):
        assert re.search(rf"expert\.{number}\b.*\b2100736 parameters", first.errors()), first.errors()


HELLO = b"\x13/multistream/1.0.0\n"
GARBAGE = {
    "nothing": b"",
    "text": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "zeros": bytes(4096),
    "a huge length": HELLO + b"\xff\xff\xff\xff\x0f" + b"x" * 1000,
    "an endless length": HELLO + b"\xff" * 100,
    "an unknown security protocol": HELLO + b"\x09/nothing\n",
    "a broken handshake": HELLO + b"\x07/noise\n" + b"\x00\x20" + b"z" * 32,
    "a tls hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"q" * 500,
}


@pytest.mark.parametrize("what", GARBAGE)
def test_foreign_bytes_on_the_listen_port_hurt_nobody(dht, first, what):
    for _ in range(10):
        with socket.create_connection(("127.0.0.1", first.port), timeout=5) as stranger:
            stranger.settimeout(0.05)
            try:
                stranger.sendall(GARBAGE[what])
                stranger.recv(1000)
            except OSError:
                pass  # it may answer, wait for more, or hang up
    (expert,) = experts(dht, "expert.3")
    assert expert(torch.randn(2, 512)).shape == (2, 512)
    assert first.is_running()


def test_silent_connections_do_not_keep_others_out(dht, first):
    strangers = [socket.create_connection(("127.0.0.1", first.port), timeout=5) for _ in range(100)]
    try:
        (expert,) = experts(dht, "expert.3")
        assert expert(torch.randn(2, 512)).shape == (2, 512)
    finally:
        for stranger in strangers:
            stranger.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.needs_skep
def test_a_signal_ends_it_within_five_seconds_with_code_zero(start, number):
    server = start.skep("serve", *FFN, "--expert_uids", "brief.0")
    server.signal(number)
    assert server.process.wait(timeout=5) == 0, server.errors()


class Busy:
    """A server with calls in line, half a second for each on any machine, and the callers who wait for them."""

    def __init__(self, start, join, count):
        slow = [{"expert_cls": "nop_delay", "hidden_dim": 16, "optimizer": "none", "expert_uids": ["busy.0"]}]
        counted = hosts.Counted(start, slow, "--max_batch_size", 1, sections="[limits]\nmailbox_rows = 64\n")
        self.server = counted.host
        (expert,) = experts(join(self.server.address), "busy.0")
        self.outcomes = []
        work = [torch.randn(1, 16) for _ in range(count)]
        self.callers = threading.Thread(target=lambda: self.outcomes.extend(calls.at_once(expert, work)), daemon=True)
        self.callers.start()

        def all_accepted():
            (status,) = counted.experts()
            return status["forward_tasks"] + status["waiting_rows"] == count

        assert calls.within(10, all_accepted), str(counted.experts())
        assert not self.outcomes, "the work was too little for this test"

    def answers(self):
        self.callers.join(timeout=10)
        assert not self.callers.is_alive(), "a caller still waits"
        return [outcome for outcome in self.outcomes if isinstance(outcome, torch.Tensor)]


@pytest.mark.needs_skep
def test_a_signal_in_the_middle_of_calls_lets_them_finish(start, join):
    busy = Busy(start, join, 4)
    assert busy.server.stop() == 0, busy.server.errors()
    assert len(busy.answers()) == 4, busy.outcomes


@pytest.mark.needs_skep
def test_a_signal_before_more_work_than_five_seconds_allow_leaves_no_caller_waiting(start, join):
    busy = Busy(start, join, 40)
    assert busy.server.stop() == 1
    answers = busy.answers()
    assert len(busy.outcomes) == 40 and 0 < len(answers) < 40, busy.outcomes
    assert f"error: {40 - len(answers)} accepted tasks were not finished" in busy.server.errors()


@pytest.mark.needs_skep
def test_a_second_signal_ends_it_at_once(start, join):
    busy = Busy(start, join, 40)
    busy.server.signal(signal.SIGTERM)
    time.sleep(0.1)
    busy.server.signal(signal.SIGTERM)
    busy.server.process.wait(timeout=1)
