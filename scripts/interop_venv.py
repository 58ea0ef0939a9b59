"""Make the Python environment of tests/interop in the user's cache, and print its Python.

`pip install --target` and a wrapper that sets PYTHONPATH, since Debian's python3 comes without the venv module. torch's
wheel from the index links the whole of CUDA, 2 GB of packages that a CPU never enters; stubs with the same symbols take
their place.
"""

import argparse
import collections
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import time

from fetching import ROOT, Trouble, cache_folder, check_disk, check_linux_x86_64, check_pip, making, pip, run, say

INTEROP = ROOT / "tests" / "interop"
LOCK, CONSTRAINTS = INTEROP / "requirements.lock", INTEROP / "build-constraints.txt"
PYTHONS = (
    (3, 11),
    (3, 13),
)  # what the locked versions have wheels for; from 3.14 on processes are not forked, which hivemind relies on
DOWNLOAD_MB = 711
NEEDED_MB = 4000
# First match wins, so a longer prefix comes before a shorter one.
STUBS = {
    "cublasLt": "libcublasLt.so.13",
    "cublas": "libcublas.so.13",
    "cudnn": "libcudnn.so.9",
    "cufft": "libcufft.so.12",
    "cuFile": "libcufile.so.0",
    "curand": "libcurand.so.10",
    "cusparseLt": "libcusparseLt.so.0",
    "cusparse": "libcusparse.so.12",
    "nccl": "libnccl.so.2",
    "nvshmem": "libnvshmem_host.so.3",
}
WRAPPER = """\
#!/bin/sh
# CUDA stays hidden: the CUDA libraries here are stubs.
site="$(cd "$(dirname "$0")/../site" && pwd)"
export PYTHONPATH="$site" PYTHONNOUSERSITE=1 CUDA_VISIBLE_DEVICES=
exec {python} "$@"
"""
# The p2pd binary, torch and hivemind's own processes have all had to work for this to print.
PROOF = """\
import hivemind
node = hivemind.DHT(start=True)
assert node.get_visible_maddrs()
node.shutdown()
print("works")
"""


def main():
    parser = argparse.ArgumentParser(
        prog="scripts/interop-venv",
        description=f"Make the Python environment of tests/interop ({DOWNLOAD_MB} MB download) in {cache_folder()}, "
        "once for each version of tests/interop/requirements.lock. Prints the path of its Python.",
    )
    parser.parse_args()
    check_linux_x86_64("hivemind's p2pd binary exists for Linux x86_64 only; run the interop tests there")
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        wanted = "{}.{} to {}.{}".format(*PYTHONS[0], *PYTHONS[1])
        raise Trouble(
            f"python3 here is {sys.version.split()[0]}, the locked versions exist for {wanted}",
            f"put a Python {wanted} first in PATH",
        )

    key = hashlib.sha256()
    for part in (
        LOCK.read_bytes(),
        CONSTRAINTS.read_bytes(),
        pathlib.Path(__file__).read_bytes(),
        sys.executable.encode(),
    ):
        key.update(hashlib.sha256(part).digest())
    home = cache_folder() / f"interop-{key.hexdigest()[:12]}"
    if not home.exists():
        check_pip()
        for tool in ("gcc", "nm"):
            if shutil.which(tool) is None:
                raise Trouble(f"{tool} is needed and was not found", "apt-get install g++")
        with making(home) as part:
            if not home.exists():  # another run may have made it while this one waited
                make(home, part)
    print(home / "bin" / "python")


def make(home, part):
    check_disk(part, NEEDED_MB)
    started = time.monotonic()
    say(f"installing hivemind 1.1.12 and what it needs, {DOWNLOAD_MB} MB, once for all clones")
    tree, scratch = part / "tree", part / "scratch"
    site = tree / "site"
    scratch.mkdir()
    build = {"PIP_CONSTRAINT": str(CONSTRAINTS), "PIP_BUILD_CONSTRAINT": str(CONSTRAINTS)}
    pip(["install", "--no-deps", "--no-compile", "--target", str(site), "--requirement", str(LOCK)], part, **build)
    stub_cuda(site, scratch)
    wrapper = tree / "bin" / "python"
    wrapper.parent.mkdir()
    wrapper.write_text(WRAPPER.format(python=sys.executable))
    wrapper.chmod(0o755)
    say("trying it: a hivemind DHT node")
    prove(wrapper)
    os.replace(tree, home)
    say(f"ready in {home} after {time.monotonic() - started:.0f} s")


def stub_cuda(site, scratch):
    """Python loads torch with RTLD_NOW, so every symbol must exist; versions too, or the loader's own checks fail."""
    torch, stubs = site / "torch" / "lib", site / "nvidia" / "cu13" / "lib"
    users = [
        str(torch / f"{name}.so") for name in ("libtorch_cuda", "libc10_cuda", "libtorch_nvshmem", "libtorch_python")
    ]
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", *users], check=True, capture_output=True, text=True
    ).stdout
    wanted = collections.defaultdict(lambda: collections.defaultdict(set))
    for line in listing.splitlines():
        symbol = line.split()[-1] if line.startswith(" ") else ""
        name, _, version = symbol.partition("@")
        for prefix, library in STUBS.items():
            if name.startswith(prefix):
                wanted[library][version].add(name)
                break
    source, versions = scratch / "stub.c", scratch / "stub.map"
    for library in STUBS.values():
        names = sorted(name for group in wanted[library].values() for name in group)
        source.write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name in names))
        groups = [
            f"{version} {{ global: {'; '.join(sorted(group))}; }};\n"
            for version, group in wanted[library].items()
            if version
        ]
        versions.write_text("".join(groups))
        command = ["gcc", "-shared", "-fPIC", "-w", "-o", str(stubs / library), str(source), f"-Wl,-soname,{library}"]
        subprocess.run(command + ([f"-Wl,--version-script,{versions}"] if groups else []), check=True)


def prove(python):
    try:
        proof = subprocess.run([python, "-c", PROOF], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired as error:
        raise Trouble(
            "a hivemind DHT node did not start within two minutes", "try again on a less busy machine"
        ) from error
    if proof.stdout.strip() != "works":
        tail = "".join(f"\n    python: {line[:160]}" for line in proof.stderr.strip().splitlines()[-6:])
        raise Trouble(
            "the environment was installed but hivemind does not start in it" + tail, "read Python's words above"
        )


run(main)
