"""Random graphs of experts, trained for two steps by both clients on both servers from the same weights: all four must end
with the weights that training in double precision ends with, where a lossy codec is used with its rounding (exact.py).

SKEP_INTEROP_GRAPHS says how many graphs; SKEP_INTEROP_SEED where they begin.
"""

import dataclasses
import itertools
import os
import random
import signal
import zlib

import hivemind
import pytest
import torch
from hivemind.moe.server.layers import name_to_block

import exact
import hosts
from calls import experts
from rust_client import RustClient

pytestmark = pytest.mark.needs_skep

FIRST = int(os.environ.get("SKEP_INTEROP_SEED", "0"))
GRAPHS = range(FIRST, FIRST + int(os.environ.get("SKEP_INTEROP_GRAPHS", "30")))
# A hivemind server needs two processes for every expert.
GRAPHS_AT_ONCE = 30
STEPS = 2
CLIENTS = ("rust", "python")
CODECS = ["NONE", "FLOAT16", "MEANSTD_16BIT"]
# How far from exact training: any two that came by the same roundings agree within 1e-5. Over 1000 graphs, what is left
# of float32's own noise is 3e-6 at most.
TOLERANCE = 5e-6
# Where a gradient is small, Adam multiplies its rounding by rate / eps, here 3, while a step is 300 times the tolerance.
ADAM = {"optimizer": "adam", "eps": 1e-3}


@dataclasses.dataclass
class Graph:
    seed: int
    width: int
    rows: int
    classes: list  # one by layer, or those of a grid
    k: int  # experts a row in a mixture; 0 for a chain
    codec: str
    optimizer: dict

    def uid(self, client, index):
        return f"graph{self.seed}{client}.{index}"

    def uids(self, client):
        return [self.uid(client, index) for index in range(len(self.classes))]

    def groups(self, client):
        """Sections [[experts]]; the same seed for both clients, so that both begin with the same weights."""
        common = {"hidden_dim": self.width, "compression": self.codec, **self.optimizer}
        for index, name in enumerate(self.classes):
            quiet = {"dropout": 0.0} if name == "transformer" else {}
            yield {
                **common,
                **quiet,
                "expert_cls": name,
                "expert_uids": [self.uid(client, index)],
                "seed": self.seed * 100 + index,
            }

    def inputs(self, step):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {step}".encode()))
        shape = (self.rows, 5, self.width) if self.classes[0] == "transformer" else (self.rows, self.width)
        inputs, grad = [torch.randn(shape, generator=generator)], torch.randn(shape, generator=generator)
        if self.classes[0] == "transformer":
            inputs.append(torch.arange(5).expand(self.rows, 5) > 3)
        if self.classes[0] == "det_dropout":
            inputs.append(torch.randint(0, 2, shape, generator=generator))
        return inputs, grad

    def gate(self):
        torch.manual_seed(self.seed)
        return torch.nn.Linear(self.width, len(self.classes))


def graph(seed):
    rng = random.Random(seed)
    kind = rng.choice(["chain", "chain", "transformer", "mixture"])
    if kind == "transformer":
        classes = ["transformer"]
    elif kind == "mixture":
        classes = ["ffn"] * 3
    else:
        classes = [rng.choice(["ffn", "ffn", "det_dropout"]), *rng.choices(["ffn", "nop"], k=rng.randrange(2))]
    return Graph(
        seed=seed,
        width=16 * rng.randint(1, 4),
        # In Python every row of a mixture is a training step of its own; with one row there is nothing to tell apart.
        rows=1 if kind == "mixture" else rng.randint(1, 9),
        classes=classes,
        k=rng.randint(1, 3) if kind == "mixture" else 0,
        codec=rng.choice(CODECS),
        optimizer=rng.choice([{"optimizer": "sgd", "learning_rate": 0.05}, {**ADAM, "learning_rate": 0.003}]),
    )


def train_by_rust(rust, graph):
    for step in range(STEPS):
        inputs, grad = graph.inputs(step)
        if graph.k:
            grid = rust.grid(f"graph{graph.seed}rust.", (3,), graph.k, graph.gate())
            layers = [{"moe": grid}]
        else:
            layers = [{"expert": uid} for uid in graph.uids("rust")]
        rust.forward_backward(layers, inputs, grad)


def train_by_python(dht, graph):
    if graph.k:
        layer = hivemind.RemoteMixtureOfExperts(
            in_features=graph.width, uid_prefix=f"graph{graph.seed}python.", grid_size=(3,), dht=dht, k_best=graph.k
        )
        layer.proj = graph.gate()
        layers = [layer]
    else:
        layers = experts(dht, *graph.uids("python"))
    for step in range(STEPS):
        inputs, grad = graph.inputs(step)
        out = layers[0](*inputs)
        for layer in layers[1:]:
            out = layer(out)
        out.backward(grad)


def train_and_stop(host, folder, join, graphs):
    rust = RustClient(folder, host.address)
    try:
        for each in graphs:
            train_by_rust(rust, each)
    finally:
        rust.end()
    dht = join(host.address)
    for each in graphs:
        train_by_python(dht, each)
    host.signal(signal.SIGTERM)
    assert host.process.wait(timeout=60) == 0, host.errors()


def weights(folder, uid):
    return torch.load(folder / uid / "checkpoint_last.pt", weights_only=True)["module"]


@pytest.fixture(scope="module")
def trained(session_hosts, join, tmp_path_factory):
    """Folders of checkpoints in hivemind's format: where all began, and where each server's experts ended."""
    folder = tmp_path_factory.mktemp("graphs")

    def run(graphs):
        groups = [group for each in graphs for client in CLIENTS for group in each.groups(client)]
        here = folder / str(graphs[0].seed)
        begun, ended, ours, exported = (here / name for name in ("begun", "hivemind", "skep", "exported"))
        for each in (begun, ended):
            each.mkdir(parents=True)
        flags = ("--checkpoint_dir", ended, "--copy_first_checkpoint", begun, "--update_period", 1000)
        theirs = session_hosts.groups("hivemind", groups, *flags, ready_within=300)
        train_and_stop(theirs, here / "rust with hivemind", join, graphs)

        config = session_hosts.describe("skep", groups)
        taken = hosts.run_skep("checkpoint", "import", begun, ours, "--config", config)
        assert taken.returncode == 0, taken.stderr
        mine = session_hosts.skep("serve", "--config", config, "--checkpoint_dir", ours)
        train_and_stop(mine, here / "rust with skep", join, graphs)
        given = hosts.run_skep("checkpoint", "export", ours, exported)
        assert given.returncode == 0, given.stderr
        return begun, ended, exported

    return run


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", GRAPHS[::GRAPHS_AT_ONCE])
def test_both_clients_train_experts_on_both_servers_to_the_same_weights(trained, first):
    graphs = [graph(seed) for seed in range(first, min(first + GRAPHS_AT_ONCE, GRAPHS.stop))]
    begun, *folders = trained(graphs)
    moved = 0
    for each in graphs:
        begins, other_begins = ([weights(begun, uid) for uid in each.uids(client)] for client in CLIENTS)
        assert exact.difference(begins, other_begins) == (0, 0)
        for folder, client in itertools.product(folders, CLIENTS):
            ends = [weights(folder, uid) for uid in each.uids(client)]
            apart, turned = exact.apart(each, begins, STEPS, ends, TOLERANCE)
            assert apart <= TOLERANCE, (each, client, folder.name, apart, turned)
            if turned:
                print(f"graph {each.seed}, {client} with {folder.name}: {apart:.1e} apart with turned roundings {turned}")
            moved += exact.difference(begins, ends)[1] > 0
    assert moved > len(graphs), "hardly any weight was trained"


@pytest.mark.parametrize("seed", range(6))
def test_a_rate_that_is_off_by_one_percent_is_told_from_any_choice_of_roundings(seed):
    right = graph(seed)
    begins = []
    for index, name in enumerate(right.classes):
        torch.manual_seed(index)
        begins.append(name_to_block[name](right.width).state_dict())
    rate = right.optimizer["learning_rate"] * 1.01
    wrong = dataclasses.replace(right, optimizer={**right.optimizer, "learning_rate": rate})
    ends, _ = exact.train(wrong, begins, STEPS)
    assert exact.apart(right, begins, STEPS, ends, TOLERANCE)[0] > 2 * TOLERANCE
