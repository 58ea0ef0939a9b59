"""Every class and every codec, on servers of both kinds and called by clients of both, beside the same expert of hivemind's
in this process.
"""

import pytest
import torch
from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.moe.server.checkpoints import store_experts
from hivemind.proto import runtime_pb2

import hosts
from calls import close, experts
from hivemind_host import backends
from rust_client import RustClient

pytestmark = pytest.mark.needs_skep

# More values than codes of eight bits.
WIDTH, ROWS = 32, 20
SGD = {"optimizer": "sgd", "learning_rate": 0.002}
# Where a gradient is small, Adam with its usual eps makes a whole step of its rounding.
ADAM = {"optimizer": "adam", "learning_rate": 0.003, "eps": 1e-3}
NONE = {"optimizer": "none"}
TRAINED = {"ffn": ADAM, "transformer": SGD, "det_dropout": ADAM, "nop": NONE, "nop_delay": NONE}
LOSSY = [
    *(("ffn", codec) for codec in ("FLOAT16", "MEANSTD_16BIT", "QUANTILE_8BIT", "UNIFORM_8BIT", "BLOCKWISE_8BIT")),
    *(("transformer", codec) for codec in ("UNIFORM_8BIT", "BLOCKWISE_8BIT")),
]
CLIENTS = ("rust", "python")


def group(name, codec="NONE", **more):
    quiet = {"dropout": 0.0} if name == "transformer" else {}
    uid = f"{name}{codec.lower()}.0"
    common = {"expert_uids": [uid], "expert_cls": name, "hidden_dim": WIDTH, "compression": codec, "seed": 3}
    return {**common, **quiet, **more}


GROUPS = [
    *(group(name, **optimizer) for name, optimizer in TRAINED.items()),
    *(group(name, codec, **NONE) for name, codec in LOSSY),
]


class Side:
    """Both clients of one server, and twins of its experts, which take every step that those take."""

    def __init__(self, kind, rust, dht, twins):
        self.kind, self.rust, self.dht, self.twins = kind, rust, dht, twins

    def call(self, who, uid, inputs, grad):
        """The output and gradients of the inputs that are floats."""
        if who == "rust":
            (output,), grads, _, _ = self.rust.forward_backward([{"expert": uid}], inputs, grad)
        else:
            leaves = [each.clone().requires_grad_(each.is_floating_point()) for each in inputs]
            (expert,) = experts(self.dht, uid)
            output = expert(*leaves)
            output.backward(grad)
            output, grads = output.detach(), [leaf.grad for leaf in leaves]
        return output, [each for each in grads if each is not None]

    def twin(self, uid, inputs, grad):
        """The same, here."""
        (output,), grads = self.twins[uid].forward(*inputs), self.twins[uid].backward(*inputs, grad)
        return output, [each for each, x in zip(grads, inputs) if x.is_floating_point()]


@pytest.fixture(scope="module", params=["skep", "hivemind"])
def side(request, session_hosts, join, tmp_path_factory):
    twins = {uid: twin for each in GROUPS for uid, twin in backends(**each).items()}
    if request.param == "skep":
        begun, taken = (tmp_path_factory.mktemp(name) for name in ("begun", "taken"))
        store_experts(twins, begun)
        config = session_hosts.describe("skep", GROUPS)
        imported = hosts.run_skep("checkpoint", "import", begun, taken, "--config", config)
        assert imported.returncode == 0, imported.stderr
        host = session_hosts.skep("serve", "--config", config, "--checkpoint_dir", taken)
    else:
        host = session_hosts.groups("hivemind", GROUPS, ready_within=120)
    rust = RustClient(tmp_path_factory.mktemp("rust"), host.address)
    yield Side(request.param, rust, join(host.address), twins)
    rust.end()


def inputs_of(name):
    if name == "transformer":
        # Any length is taken, also another than the schema's 128.
        return [torch.randn(ROWS, 7, WIDTH), torch.arange(7).expand(ROWS, 7) > 4]
    masks = [torch.randint(0, 2, (ROWS, WIDTH))] if name == "det_dropout" else []
    return [torch.randn(ROWS, WIDTH), *masks]


@pytest.mark.parametrize("uid", [uid for each in GROUPS for uid in each["expert_uids"]])
def test_an_expert_describes_itself_as_hiveminds_does(side, uid):
    (expert,) = experts(side.dht, uid)
    assert expert.info == side.twins[uid].get_info()


@pytest.mark.parametrize("who", CLIENTS)
@pytest.mark.parametrize("name", TRAINED)
def test_every_class_computes_and_trains_as_in_one_process(side, name, who):
    for step in range(1 if name == "nop_delay" else 3):
        inputs = inputs_of(name)
        grad = torch.randn_like(inputs[0])
        output, (x_grad,) = side.call(who, f"{name}none.0", inputs, grad)
        expected, (expected_grad,) = side.twin(f"{name}none.0", inputs, grad)
        assert close(output, expected) and close(x_grad, expected_grad), step


def sent(x, codec):
    return deserialize_torch_tensor(serialize_torch_tensor(x, runtime_pb2.CompressionType.Value(codec)))


@pytest.mark.parametrize("who", CLIENTS)
@pytest.mark.parametrize(("name", "codec"), LOSSY)
def test_a_lossy_codec_costs_its_own_error_and_no_more(side, name, codec, who):
    uid, (x, *others) = f"{name}{codec.lower()}.0", inputs_of(name)
    grad = torch.randn_like(x)
    exact, (exact_grad,) = side.twin(uid, [x, *others], grad)
    rounded, (grad_there,) = side.twin(uid, [sent(x, codec), *others], grad)
    output, (x_grad,) = side.call(who, uid, [x, *others], grad)
    for got, other, true in ((output, rounded, exact), (x_grad, sent(grad_there, codec), exact_grad)):
        own = (other - true).norm()
        if (side.kind, codec) == ("hivemind", "UNIFORM_8BIT") and true is exact_grad:
            # A hivemind server loses a gradient's mean with it (docs/wire.md §12).
            got, true = got - got.mean(), true - true.mean()
        assert own / 2 < (got - true).norm() < 2 * own, ((got - true).norm(), own)
