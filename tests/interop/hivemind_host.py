"""hivemind's own server and DHT node with skep's command line and standard output: `serve …` and `dht …`.

hivemind-server itself listens on all interfaces, splits its address options into letters, starts eight processes per
expert and does not say when its experts can be found.
"""

import argparse
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import hivemind
import torch
from hivemind.proto.runtime_pb2 import CompressionType

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
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--eps", type=float)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--compression", default="NONE")
    parser.add_argument("--clip_grad_norm", type=float)
    parser.add_argument("--checkpoint_dir", type=Path)
    parser.add_argument("--max_batch_size", type=int, default=4096)
    parser.add_argument("--update_period", type=float, default=30)
    parser.add_argument("--expiration", type=float)
    options = vars(parser.parse_args())
    command, optimizer, dropout = options.pop("command"), optimizer_of(options), options.pop("dropout")

    stop = threading.Event()
    if command == "dht":
        dht = hivemind.DHT(
            start=True, **{key: options[key] for key in ("initial_peers", "host_maddrs", "identity_path")}
        )
        shutdown = dht.shutdown
    else:
        options["compression"] = CompressionType.Value(options["compression"])
        server = hivemind.Server.create(**options, optim_cls=optimizer, num_handlers=2, start=False)
        for backend in server.module_backends.values():
            set_dropout(backend.module, dropout)
        server.run_in_background(await_ready=True)
        dht, shutdown = server.dht, server.shutdown
        wait_announced(dht, list(server.module_backends))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    for address in dht.get_visible_maddrs():
        print(address, flush=True)
    stop.wait()
    shutdown()


def optimizer_of(options):
    name, rate, eps = (options.pop(key) for key in ("optimizer", "learning_rate", "eps"))
    if name == "none":
        return None
    settings = {"lr": RATES[name] if rate is None else rate, **({} if eps is None else {"eps": eps})}
    return partial(OPTIMIZERS[name], **settings)


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
