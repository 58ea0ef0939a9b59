"""docs/migration.md against the hivemind that is installed: its options and its names."""

import ast
import importlib.util
import pathlib
import re

import hivemind.moe
import pytest

import hosts

pytestmark = pytest.mark.needs_skep

PAGE = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "migration.md").read_text()
NOT_THERE = {"use_ipfs"}


def options(module):
    """What a command of hivemind's takes, read from its source: it makes its parser where it starts."""
    source = pathlib.Path(importlib.util.find_spec(module).origin).read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            for name in node.args:
                if isinstance(name, ast.Constant) and name.value.startswith("--"):
                    yield name.value.removeprefix("--")


@pytest.mark.parametrize(
    ("module", "heading", "command"),
    [
        ("hivemind.hivemind_cli.run_server", "## `hivemind-server`", "serve"),
        ("hivemind.hivemind_cli.run_dht", "## `hivemind-dht`", "dht"),
    ],
)
def test_every_option_of_hiveminds_commands_is_taken_and_explained(module, heading, command):
    section = PAGE.split(heading)[1].split("\n## ")[0]
    known = hosts.run_skep(command, "--help").stdout
    found = set(options(module))
    assert len(found) > 5
    for name in found:
        assert f"`--{name}`" in section, f"docs/migration.md says nothing of --{name}"
        assert name in NOT_THERE or re.search(rf"--{name}\b", known), f"skep {command} does not take --{name}"


def test_every_name_that_hivemind_moe_exports_is_explained():
    names = {name for name in vars(hivemind.moe) if not name.startswith("_") and name not in ("client", "server", "expert_uid")}
    assert "RemoteMixtureOfExperts" in names
    missing = {name for name in names if not re.search(rf"\b{name}\b", PAGE)}
    assert not missing, f"docs/migration.md says nothing of {missing}"
