"""Records with owners: signed by either kind, believed by the other, and not to be forged."""

import json
import subprocess

import pytest
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.utils import get_dht_time
from hivemind.utils.crypto import RSAPrivateKey

import hosts

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
