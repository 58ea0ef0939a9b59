"""What skep does not start with: it says what is wrong, where, and what to do."""

import socket

import pytest

import hosts

pytestmark = pytest.mark.needs_skep
SERVE = "serve --hidden_dim 32 --expert_uids a.0".split()
PEER = "/p2p/QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC"
FAILED, USAGE = 1, 2


def refusal(*arguments, code):
    end = hosts.run_skep(*arguments)
    assert end.returncode == code and not end.stdout, (end.returncode, end.stdout, end.stderr)
    assert "panicked" not in end.stderr
    return " ".join(end.stderr.replace("│", " ").split())


WRONG_FLAGS = {
    "an address": (["--initial_peers", "somewhere"], ["somewhere", "initial_peers", "/ip4/"]),
    "an address without its end": (["--host_maddrs", "/ip4/127.0.0.1/tcp"], ["/ip4/127.0.0.1/tcp", "host_maddrs"]),
    "nobody at an address": (["--initial_peers", "/ip4/127.0.0.1/tcp/1"], ["/ip4/127.0.0.1/tcp/1", "/p2p/"]),
    "a class": (["--expert_cls", "mlp"], ["mlp", "ffn"]),
    "an optimizer": (["--optimizer", "lion"], ["lion", "sgd"]),
    "a uid": (["--expert_uids", "a..0"], ["a..0", "expert.3"]),
    "a flag": (["--hiden_dim", "7"], ["--hiden_dim", "--hidden_dim"]),
    "a file": (["--config", "nowhere.toml"], ["nowhere.toml", "--config"]),
}


@pytest.mark.parametrize(("flags", "said"), WRONG_FLAGS.values(), ids=WRONG_FLAGS.keys())
def test_a_wrong_flag_is_named_with_the_remedy(flags, said):
    text = refusal(*SERVE, *flags, code=USAGE)
    assert all(word in text for word in said), text


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("max_batchsize = 3", ["max_batchsize", "max_batch_size"]),
        ("max_batch_size = 'many'", ["max_batch_size", "many"]),
    ],
)
def test_a_wrong_line_of_the_configuration_is_shown(tmp_path, line, said):
    config = tmp_path / "skep.toml"
    config.write_text(f"[server]\n{line}\n")
    text = refusal(*SERVE, "--config", config, code=USAGE)
    assert all(word in text for word in [*said, "skep.toml:2:"]), text


def test_a_pattern_with_too_few_places_is_refused():
    text = refusal("serve", "--num_experts", 3, "--expert_pattern", "x.[0:2]", code=USAGE)
    assert "x.[0:2]" in text and "3" in text


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        text = refusal(*SERVE, "--host_maddrs", address, code=FAILED)
    assert address in text and "in use" in text


def test_a_key_that_others_can_read_is_refused(tmp_path):
    key = tmp_path / "key"
    assert hosts.run_skep("identity", "new", key).returncode == 0
    key.chmod(0o640)
    text = refusal(*SERVE, "--identity_path", key, code=FAILED)
    assert str(key) in text and "chmod" in text


def test_a_key_file_without_a_key_is_named(tmp_path):
    key = tmp_path / "key"
    key.write_text("no key")
    key.chmod(0o600)
    assert str(key) in refusal(*SERVE, "--identity_path", key, code=FAILED)
    assert str(tmp_path) in refusal(*SERVE, "--identity_path", tmp_path, code=FAILED)
    missing = tmp_path / "missing" / "key"
    assert str(missing) in refusal(*SERVE, "--identity_path", missing, code=FAILED)


@pytest.mark.parametrize("command", [["experts", "a."], ["call", "a.0"]])
def test_a_peer_that_is_down_is_named_in_time(command):
    text = refusal(*command, "--peer", f"/ip4/127.0.0.1/tcp/9{PEER}", "--timeout", 3, code=75)
    assert "127.0.0.1/tcp/9" in text and "refused" in text
