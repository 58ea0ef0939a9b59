"""skep's clients with hivemind's server."""

import json
import os

import pytest

import hosts

pytestmark = pytest.mark.needs_skep


@pytest.fixture(scope="module")
def server(session_hosts):
    return session_hosts.hivemind("serve", "--hidden_dim", 512, "--num_experts", 5, "--expert_pattern", "expert.[0:5]")


@pytest.fixture(scope="module")
def grid(session_hosts):
    uids = ["deep.0.1", "deep.0.3", "deep.2.0"]
    return session_hosts.hivemind("serve", "--hidden_dim", 32, "--expert_uids", *uids)


def test_skep_call_gets_an_answer(server):
    call = hosts.run_skep("call", "expert.1", "--peer", server.address)
    assert call.returncode == 0, call.stderr
    assert "512" in call.stdout + call.stderr


def test_skep_call_names_an_expert_that_nobody_announced(server):
    call = hosts.run_skep("call", "expert.9999", "--peer", server.address)
    assert call.returncode == 1, (call.returncode, call.stderr)
    assert "expert.9999" in call.stderr and "panicked" not in call.stderr


def test_skep_experts_lists_who_is_announced(grid):
    listing = hosts.run_skep("experts", "deep.0.", "--peer", grid.address, "--json")
    assert listing.returncode == 0, listing.stderr
    found = {entry["uid"]: entry["peer"] for entry in json.loads(listing.stdout)}
    assert found == {"deep.0.1": grid.peer_id, "deep.0.3": grid.peer_id}


def test_the_rust_tutorial_runs_against_it(server):
    program = [os.environ.get("SKEP_TUTORIAL_BIN", "target/debug/examples/tutorial")]
    tutorial = hosts.run_skep("--peer", server.address, "--prefix", "expert.", program=program, within=100)
    assert tutorial.returncode == 0, tutorial.stdout + tutorial.stderr


def test_the_rust_tutorial_runs_against_a_server_of_skep(first):
    program = [os.environ.get("SKEP_TUTORIAL_BIN", "target/debug/examples/tutorial")]
    tutorial = hosts.run_skep("--peer", first.address, "--prefix", "expert.", program=program, within=100)
    assert tutorial.returncode == 0, tutorial.stdout + tutorial.stderr
