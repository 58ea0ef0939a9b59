"""What is compared: each work with the parties that can do it."""

import socket
from dataclasses import dataclass, field

from processes import host, peer, skep, together


@dataclass
class Calls:
    """Calls of several client processes to experts of one server; the measure is calls per second of all clients."""

    name: str
    expert_cls: str
    hidden: int
    batch: int
    clients: int = 1
    backward: bool = False
    in_flight: int = 1
    seconds: float = 2.0
    # In which our calls and libtorch alone take turns; fewer where one call takes long.
    turns: int = 4
    experts: int = 4
    unit: str = "calls/s"
    open: list = field(default_factory=list)

    def parties(self):
        shared = dict(rows=self.batch, hidden=self.hidden, backward=self.backward, in_flight=self.in_flight)
        experts = 1 if self.expert_cls == "nop" else self.experts
        uids = [f"bench.{n}" for n in range(experts)]
        options = ["--expert_cls", self.expert_cls, "--hidden_dim", self.hidden, "--expert_uids", *uids]
        options += ["--optimizer", "none" if self.expert_cls == "nop" else "sgd"]

        def own():
            words = ["--preset", "ffn_small_batch", "--expert_cls", self.expert_cls, "--experts", experts]
            words += ["--hidden", self.hidden, "--batch", self.batch, "--clients", self.clients]
            words += ["--in_flight", self.in_flight, "--seconds", self.seconds, "--rounds", self.turns]
            report = skep("throughput", *words, "--backward" if self.backward else "--forward")
            measures = {"skep": report["calls_per_second"], "skep p50 µs": report["latency_us"]["p50"]}
            if report["limit"]:
                measures["libtorch alone"] = report["limit"]["calls_per_second"]
            return measures

        def python(address):
            jobs = [
                dict(shared, address=address, uids=uids[n % experts :] + uids[: n % experts], seconds=self.seconds)
                for n in range(self.clients)
            ]
            results = together([peer("hivemind_client", **job) for job in jobs])
            return sum(each["rate"] for each in results), max(each["p50_us"] for each in results)

        def python_to(kind, name):
            server, address = host(kind, *options)
            self.open.append(server)

            def measure():
                rate, p50 = python(address)
                return {name: rate, f"{name} p50 µs": p50}

            return measure

        def rpc():
            world, port = self.clients + 1, free_port()
            server = peer(
                "rpc_server", expert_cls=self.expert_cls, hidden=self.hidden, experts=experts, world=world, port=port
            )
            jobs = [
                dict(shared, rank=n + 1, world=world, port=port, experts=experts, seconds=self.seconds)
                for n in range(self.clients)
            ]
            clients = [peer("rpc_client", **job) for job in jobs]
            try:
                results = together(clients)
            finally:
                server.end()
            rate = sum(each["rate"] for each in results)
            return {"torch rpc": rate, "torch rpc p50 µs": max(each["p50_us"] for each in results)}

        return [
            own,
            python_to("hivemind", "hivemind"),
            python_to("skep", "hivemind client, skep server"),
            rpc,
        ]


@dataclass
class Moe:
    """Steps of one mixture."""

    name: str
    hidden: int
    seconds: float = 3.0
    unit: str = "steps/s"
    open: list = field(default_factory=list)

    def parties(self):
        uids = [f"bench.{row}.{column}" for row in range(4) for column in range(4)]
        options = ["--hidden_dim", self.hidden, "--expert_uids", *uids]

        def own():
            report = skep("moe", "--hidden", self.hidden, "--seconds", self.seconds)
            calls = {"skep calls per chosen expert": report["calls_per_chosen"]}
            return {"skep": report["steps_per_second"], "libtorch alone": report["limit"]["steps_per_second"], **calls}

        def python_to(kind, name):
            server, address = host(kind, *options)
            self.open.append(server)

            def measure():
                job = dict(address=address, hidden=self.hidden, rows=32, seconds=self.seconds)
                return {name: together([peer("hivemind_moe", **job)])[0]["rate"]}

            return measure

        return [own, python_to("hivemind", "hivemind"), python_to("skep", "hivemind client, skep server")]


@dataclass
class Once:
    """Something that is measured in one round only, because it takes long."""

    name: str
    unit: str
    measures: list
    open: list = field(default_factory=list)

    def parties(self):
        return self.measures


def start_of(experts, hidden):
    def own():
        report = skep("startup", "--experts", experts, "--hidden", hidden, "--idle", 3)
        used = report["used"]
        return {"skep": report["start_seconds"], "skep MiB": used["rss"] / 2**20, "skep processes": 1}

    def theirs():
        server, _ = host("hivemind", "--hidden_dim", hidden, "--expert_uids", *(f"bench.{n}" for n in range(experts)))
        try:
            import time

            seconds = time.monotonic() - server.started
            processes, held = server.group()
        finally:
            server.end()
        return {"hivemind": seconds, "hivemind MiB": held / 2**20, "hivemind processes": processes}

    return Once(f"start {experts} experts, h={hidden}", "s", [own, theirs])


def dht(nodes, experts, batch):
    def named(party, report):
        measures = {party: report["stores_per_second"], f"{party} lookups/s": report["gets_per_second"]}
        return {**measures, f"{party} join s": report["join_seconds"], f"{party} found": report["found"]}

    def own():
        options = ["--num_peers", nodes, "--num_experts", experts, "--expert_batch_size", batch]
        return named("skep", skep("dht", *options))

    def theirs():
        return named("hivemind", together([peer("hivemind_dht", nodes=nodes, experts=experts, batch=batch)])[0])

    return Once(f"DHT of {nodes} nodes", "stores/s", [own, theirs])


def network():
    def own():
        size = 8 << 20
        report = skep("network", "--sizes", size, "--seconds", 2)["sizes"][0]
        return {"skep": 1e6 / report["call_us"]["p50"], "TLS alone": 1e6 / report["tls_us"]["p50"], "TCP alone": 1e6 / report["tcp_us"]["p50"]}

    return own


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def works(quick):
    if quick:
        return [
            Calls("nop, batch 1, one client", "nop", 64, 1, seconds=0.5),
            Calls("FFN h=64, batch 4, forward and backward, two clients", "ffn", 64, 4, clients=2, backward=True, seconds=0.5),
            Moe("MoE 4×4, k=4, batch 32, h=64", 64, seconds=0.5),
            dht(3, 8, 4),
        ]
    return [
        Calls("nop, batch 1, one client", "nop", 64, 1),
        Calls("nop, batch 1, 64 in flight", "nop", 64, 1, in_flight=64),
        Calls("FFN h=512, batch 32, forward, four clients", "ffn", 512, 32, clients=4),
        Calls("FFN h=512, batch 32, forward and backward, four clients", "ffn", 512, 32, clients=4, backward=True),
        Calls("FFN h=1024, batch 2048, forward and backward, four clients", "ffn", 1024, 2048, clients=4, backward=True, seconds=8, turns=2),
        Calls("nop, 8 MiB, one client", "nop", 8192, 256),
        Moe("MoE 4×4, k=4, batch 32, h=64", 64),
        Moe("MoE 4×4, k=4, batch 32, h=512", 512),
        Once("nop call of 8 MiB beside bare streams", "calls/s", [network()]),
        start_of(256, 64),
        dht(32, 256, 32),
    ]
