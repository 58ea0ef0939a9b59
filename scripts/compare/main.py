"""Compares skep with hivemind and torch.distributed.rpc. See scripts/compare_peers."""

import argparse
import collections
import json
import os
import pathlib
import platform
import statistics
import sys
import time

import pages
from processes import ROOT, end_with_us
from works import Once, works


def main():
    parser = argparse.ArgumentParser(
        prog="scripts/compare_peers",
        description="Run the same work through skep, hivemind and torch.distributed.rpc, one after the other, round by "
        "round, and write docs/performance-table.md and docs/performance-*.svg.",
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each work (default: 3)")
    parser.add_argument("--quick", action="store_true", help="a tiny form that leaves docs alone: does it work?")
    parser.add_argument("--only", help="only works whose name has this in it; leaves docs alone")
    parser.add_argument("--into", type=pathlib.Path, help="write table and plots into this folder instead of docs")
    parser.add_argument("--json", type=pathlib.Path, help="also write all numbers into this file")
    options = parser.parse_args()
    end_with_us()
    began, results, failures = time.monotonic(), {}, []
    load = os.getloadavg()[0]
    for work in works(options.quick):
        if options.only and options.only not in work.name:
            continue
        rounds = 1 if options.quick or isinstance(work, Once) else options.rounds
        begun = time.monotonic()
        try:
            results[work.name] = {"unit": work.unit, "measures": measure(work, rounds, failures)}
        except RuntimeError as error:
            failures.append(f"{work.name}: {error}")
            print(failures[-1], file=sys.stderr)
        finally:
            for server in work.open:
                server.end()
        print(f"{time.monotonic() - begun:5.0f} s  {work.name}", file=sys.stderr)
    results = {
        "cores": os.cpu_count(),
        "processor": processor(),
        "load": load,
        "rounds": options.rounds,
        "seconds": round(time.monotonic() - began),
        "failures": failures,
        "works": results,
    }
    if options.json:
        options.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print(pages.table(results))
    if options.into or not (options.quick or options.only):
        pages.write(results, options.into or ROOT / "docs")
    sys.exit(1 if failures else 0)


def measure(work, rounds, failures):
    """Every party once a round, so that what disturbs the machine disturbs all of them."""
    measures = collections.defaultdict(list)
    parties = work.parties()
    for _ in range(rounds):
        for party in parties:
            try:
                taken = party()
            except (RuntimeError, AssertionError) as error:
                failures.append(f"{work.name}: {error}")
                print(failures[-1], file=sys.stderr)
                continue
            for name, value in taken.items():
                measures[name].append(value)
    spread = lambda values: {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: spread(values) for name, values in measures.items()}


def processor():
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
