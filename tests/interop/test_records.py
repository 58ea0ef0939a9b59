"""Records that one kind writes and the other reads; those with owners are believed, and not to be forged."""

import json
import subprocess

import pytest
import torch
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.utils import get_dht_time
from hivemind.utils.crypto import RSAPrivateKey

import hosts
from rust_client import RustClient

pytestmark = pytest.mark.needs_skep


@pytest.fixture(scope="module")
def node(session_hosts):
    return session_hosts.skep("dht")


def skep(*arguments):
    done = subprocess.run([*hosts.SKEP, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def values(node, key):
    found = json.loads(skep("dht", "get", key, "--peer", node.address, "--json"))
    return [entry["value"] for entry in found["entries"]]


def test_skep_believes_what_hivemind_signs_and_refuses_what_is_forged(node, join):
    validator = RSASignatureValidator(RSAPrivateKey())
    owner = join(node.address, record_validators=[validator])
    subkey = b"alice" + validator.local_public_key
    assert owner.store("hivemind's", subkey=subkey, value=[1, 2], expiration_time=get_dht_time() + 300)
    assert values(node, "hivemind's") == [[1, 2]]
    forger = join(node.address)
    forger.store("hivemind's", subkey=subkey, value="forged", expiration_time=get_dht_time() + 600)
    assert values(node, "hivemind's") == [[1, 2]]
    assert owner.store("hivemind's", subkey=subkey, value=[3], expiration_time=get_dht_time() + 900)
    assert values(node, "hivemind's") == [[3]]


def test_hivemind_believes_what_skep_signs(node, join, tmp_path):
    key = tmp_path / "key"
    skep("identity", "new", key, "--type", "rsa")
    signed = ("--subkey", "bob", "--sign", key, "--expiration", 300)
    skep("dht", "store", "skep's", '{"score": 0.5}', *signed, "--peer", node.address)
    reader = join(node.address, record_validators=[RSASignatureValidator(RSAPrivateKey())])
    ((subkey, found),) = reader.get("skep's", latest=True).value.items()
    assert subkey.startswith(b"bob[owner:ssh-rsa ")
    assert found.value == {"score": 0.5}


def test_skep_shows_what_hivemind_stores_with_all_its_subkeys(node, join):
    writer, until = join(node.address), get_dht_time() + 300
    assert writer.store("plain of hivemind", {"a": [1, 2.5, None]}, until)
    peer = ("--peer", node.address, "--json")
    assert json.loads(skep("dht", "get", "plain of hivemind", *peer))["value"] == {"a": [1, 2.5, None]}
    # hivemind sorts subkeys, and so takes one kind of them in a dictionary.
    for key, entries in (("by number", {3: "three", -1: None}), ("by name", {"x": [1, "zwei"], "y": 0.5})):
        for subkey, value in entries.items():
            assert writer.store(key, value, until, subkey=subkey)
            found = json.loads(skep("dht", "get", key, f"--subkey={json.dumps(subkey)}", *peer))
            assert found["value"] == value
        assert set(json.loads(skep("dht", "keys", key, *peer))) == set(entries)
        found = json.loads(skep("dht", "get", key, *peer))["entries"]
        assert {entry["subkey"]: entry["value"] for entry in found} == entries


def test_hivemind_reads_what_skep_stores_with_all_its_subkeys(node, join):
    peer = ("--peer", node.address, "--expiration", 300)
    skep("dht", "store", "plain of skep", '{"a": [1, 2.5, null]}', *peer)
    reader = join(node.address)
    assert reader.get("plain of skep").value == {"a": [1, 2.5, None]}
    for key, entries in (("numbers", {3: 0.5, -1: None}), ("names", {"x": "words", "y": [1, True]})):
        for subkey, value in entries.items():
            skep("dht", "store", key, json.dumps(value), f"--subkey={json.dumps(subkey)}", *peer)
        found = reader.get(key, latest=True).value
        assert {subkey: each.value for subkey, each in found.items()} == entries


def test_records_of_a_wrong_type_hide_no_expert(start, join, tmp_path):
    frozen = "--optimizer none --hidden_dim 16 --expert_uids line.0 line.2 plane.0.0".split()
    server = start.skep("serve", *frozen)
    dht, until = join(server.address), get_dht_time() + 300
    assert dht.store("line.1", 7, until)
    for key, subkey, value in (
        ("line.1.", -1, "no pair"),
        ("line.3.", -1, (5, 6)),
        ("plane.0.", 1, ("elsewhere", server.peer_id)),
        ("plane.2.", "text", ("plane.2.0", server.peer_id)),
        ("plane.1.", 0, ("plane.1.0", b"no text")),
    ):
        assert dht.store(key, value, until, subkey=subkey)
    for prefix, uids in (("line.", {"line.0", "line.2"}), ("plane.0.", {"plane.0.0"}), ("plane.1.", set()), ("plane.2.", set())):
        done = hosts.run_skep("experts", prefix, "--peer", server.address, "--json")
        listed = {entry["uid"] for entry in json.loads(done.stdout)} if done.stdout.strip() else set()
        assert listed == uids, done.stderr
    rust = RustClient(tmp_path / "rust", server.address)
    try:
        for prefix, grid in (("line.", (4,)), ("plane.", (3, 3))):
            layers = [{"moe": rust.grid(prefix, grid, 4, torch.nn.Linear(16, sum(grid)))}]
            (output,), _, _, _ = rust.forward_backward(layers, [torch.randn(2, 16)])
            assert output.isfinite().all()
    finally:
        rust.end()
