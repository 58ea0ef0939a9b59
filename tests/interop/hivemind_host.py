"""hivemind's own server and DHT node with skep's command line and standard output: `serve …` and `dht …`.

hivemind-server itself listens on all interfaces, splits its address options into letters, starts eight processes per
expert and does not say when its experts can be found.
"""

import argparse
import json
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import hivemind
import torch
from hivemind.moe.server.checkpoints import store_experts
from hivemind.moe.server.layers import name_to_block, name_to_input
from hivemind.moe.server.module_backend import ModuleBackend
from hivemind.proto.runtime_pb2 import CompressionType
from hivemind.utils.tensor_descr import BatchTensorDescriptor

import custom_modules
import forks

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
RATES = {"sgd": 0.01, "adam": 0.001}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=("serve", "dht"))
    parser.add_argument("--initial_peers", nargs="*", default=[])
    parser.add_argument("--host_maddrs", nargs="*", default=["/ip4/127.0.0.1/tcp/0"])
    parser.add_argument("--identity_path")
    parser.add_argument("--expert_cls", default="ffn")
    parser.add_argument("--hidden_dim", type=int, default=1024)
    parser.add_argument("--num_experts", type=int)
    parser.add_argument("--expert_pattern")
    parser.add_argument("--expert_uids", nargs="*")
    parser.add_argument("--optimizer", choices=(*OPTIMIZERS, "none"), default="sgd")
    parser.add_argument("--groups", type=Path, help="JSON: the sections [[experts]] of skep's configuration")
    parser.add_argument("--checkpoint_dir", type=Path)
    parser.add_argument("--copy_first_checkpoint", type=Path, help="where to keep the state before any training")
    parser.add_argument("--update_period", type=float, default=30)
    parser.add_argument("--expiration", type=float)
    options = vars(parser.parse_args())
    command, groups, first = (options.pop(name) for name in ("command", "groups", "copy_first_checkpoint"))
    node = {key: options[key] for key in ("initial_peers", "host_maddrs", "identity_path")}

    stop = threading.Event()
    if command == "dht":
        dht = hivemind.DHT(start=True, **forks.PATIENCE, **node)
        shutdown = dht.shutdown
    else:
        if groups is not None:
            experts = {}
            for group in json.loads(groups.read_text()):
                experts |= backends(**group)
            periods = {key: options[key] for key in ("update_period", "expiration", "checkpoint_dir")}
            dht = hivemind.DHT(start=True, **forks.PATIENCE, **node)
            server = hivemind.Server(dht, experts, num_connection_handlers=2, device="cpu", start=False, **periods)
        else:
            optimizer = optimizer_of(options.pop("optimizer"))
            server = hivemind.Server.create(
                **options, **forks.PATIENCE, optim_cls=optimizer, num_handlers=2, start=False
            )
        start_without_forking_under_locks(server)
        dht, shutdown = server.dht, server.shutdown
        if first is not None:
            store_experts(server.module_backends, first)
        wait_announced(dht, list(server.module_backends))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    for address in dht.get_visible_maddrs():
        print(address, flush=True)
    stop.wait()
    if command == "serve" and options["checkpoint_dir"] is not None:
        store_experts(server.module_backends, options["checkpoint_dir"])
    shutdown()


def start_without_forking_under_locks(server):
    """Announces only once all processes are forked.

    hivemind announces in a thread beside the one that forks. A child that is forked while that thread holds a lock of
    the standard library (tempfile's, seen in one start of eight) waits for it for ever, and the server never gets ready.
    """
    announcing = server.dht_handler_thread
    announce = announcing.run

    def announce_when_ready():
        server.ready.wait()
        announce()

    announcing.run = announce_when_ready
    server.run_in_background(await_ready=True)


def backends(
    expert_uids,
    expert_cls="ffn",
    hidden_dim=1024,
    dropout=None,
    compression="NONE",
    optimizer="sgd",
    seed=None,
    **numbers,
):
    """Experts of one group, as `Server.create` makes them."""
    codec = CompressionType.Value(compression)
    keywords = {}
    if expert_cls in custom_modules.CLASSES:
        inputs, keywords = custom_modules.samples(expert_cls)
    else:
        sample = name_to_input[expert_cls](1, hidden_dim)
        inputs = sample if isinstance(sample, tuple) else (sample,)
    schema = tuple(BatchTensorDescriptor.from_tensor(each, codec) for each in inputs)
    keywords = {key: BatchTensorDescriptor.from_tensor(each) for key, each in keywords.items()}
    make_optimizer = optimizer_of(optimizer, **numbers)
    made = {}
    for uid in expert_uids:
        if expert_cls in custom_modules.CLASSES:
            module = custom_modules.made(expert_cls, seed)
        else:
            if seed is not None:
                torch.manual_seed(seed)
            module = name_to_block[expert_cls](hidden_dim)
        if dropout is not None:
            set_dropout(module, dropout)
        trained_by = make_optimizer and make_optimizer(module.parameters())
        schemas = {"args_schema": schema, "kwargs_schema": keywords}
        made[uid] = ModuleBackend(uid, module, **schemas, optimizer=trained_by, max_batch_size=4096)
    return made


def optimizer_of(name, learning_rate=None, **numbers):
    if name == "none":
        return None
    return partial(OPTIMIZERS[name], lr=RATES[name] if learning_rate is None else learning_rate, **numbers)


def set_dropout(module, probability):
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = probability
        elif isinstance(part, torch.nn.MultiheadAttention):
            part.dropout = probability


def wait_announced(dht, uids):
    for _ in range(100):
        if all(dht.get(uid) is not None for uid in uids):
            return
        time.sleep(0.1)
    sys.exit("the experts were not announced within ten seconds")


if __name__ == "__main__":
    main()
