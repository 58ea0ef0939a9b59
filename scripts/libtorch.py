"""Fetch libtorch from the PyPI wheels into the user's cache and link it as `.libtorch`.

Wheels, because PyTorch publishes no other archive of this build that package mirrors carry. Only the CPU half and the
headers are kept, unless the CUDA half is asked for; the layout stays that of site-packages (torch/ beside nvidia/)
because the libraries find each other by relative rpath.
"""

import argparse
import email
import os
import pathlib
import re
import shutil
import time
import zipfile

from fetching import ROOT, Trouble, cache_folder, check_disk, check_linux_x86_64, check_pip, making, pip, run, say

VERSION = "2.11.0"  # what tch 0.24 binds; torch-sys compares it with torch/build-version
WHEELS = """\
torch==2.11.0 --hash=sha256:7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a
nvidia-cuda-runtime==13.0.96 --hash=sha256:7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548
nvidia-cuda-cupti==13.0.85 --hash=sha256:4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8
"""
LIBRARIES = (
    "torch/lib/libtorch_cpu.so",
    "torch/lib/libc10.so",
    "torch/lib/libgomp.so.1",
    # libtorch_cpu.so links these two with versioned symbols, CUDA in use or not.
    "nvidia/cu13/lib/libcudart.so.13",
    "nvidia/cu13/lib/libcupti.so.13",
)
DOWNLOAD_MB = 543
# pip holds a second copy of the wheels for a moment; what is unpacked afterwards (500 MB) takes less than that copy.
NEEDED_MB = 1200
MARKER = "torch/build-version"
# The CUDA half, and the libraries of NVIDIA's that torch's wheel names, which fill about 4 GB unpacked.
CUDA_LIBRARY = "torch/lib/libtorch_cuda.so"
CUDA_DOWNLOAD_MB = 2900
CUDA_NEEDED_MB = 11000


def main():
    cache = cache_folder()
    parser = argparse.ArgumentParser(
        prog="scripts/libtorch",
        description=f"Fetch libtorch {VERSION} ({DOWNLOAD_MB} MB download, 500 MB on disk) into {cache} once, "
        "and link it as DIR/.libtorch. Without DIR it does nothing when LIBTORCH already names a libtorch of yours.",
    )
    parser.add_argument(
        "--cuda",
        action="store_true",
        help=f"the build with CUDA, for experts on a GPU: {CUDA_DOWNLOAD_MB} MB download, 5 GB on disk, in a folder of "
        "its own; the link then leads there",
    )
    parser.add_argument("dir", nargs="?", type=pathlib.Path, help="project to link it into (default: this repository)")
    arguments = parser.parse_args()

    project = (arguments.dir or ROOT).resolve()
    if not project.is_dir():
        raise Trouble(
            f"{project} is not a directory", "name the folder of the project that should get the .libtorch link"
        )
    own = os.environ.get("LIBTORCH")
    # cargo exports its own setting to tests, hence the comparison; a project named by hand always gets its link.
    if own and arguments.dir is None and pathlib.Path(own).absolute() != project / ".libtorch" / "torch":
        use_own(pathlib.Path(own))
        return

    cuda = arguments.cuda
    home = cache / f"libtorch-{VERSION}{'-cuda' if cuda else ''}"
    place = project / ".libtorch"
    if not cuda and arguments.dir is None and place.is_symlink() and is_whole(place, cuda=True):
        return  # `make` runs this again and again: what has CUDA serves the CPU, too
    if not is_whole(home, cuda):
        check_linux_x86_64(
            f"install PyTorch {VERSION} yourself and set LIBTORCH to its torch folder (untested there); "
            "`cargo light` tests the crates that need no libtorch"
        )
        check_pip()
        with making(home) as part:
            if not is_whole(home, cuda):  # another run may have made it while this one waited
                fetch(home, part, cuda)
    link(place, home)


def use_own(path):
    if not any((path / "lib" / f"libtorch_cpu.{suffix}").exists() for suffix in ("so", "dylib")):
        raise Trouble(
            f"LIBTORCH={path} holds no lib/libtorch_cpu.so",
            f"unset LIBTORCH to have libtorch {VERSION} fetched, or correct it",
        )
    say(f"using yours, LIBTORCH={path}")


def is_whole(home, cuda=False):
    wanted = (MARKER, *LIBRARIES) + ((CUDA_LIBRARY,) if cuda else ())
    return all((home / name).exists() for name in wanted)


def fetch(home, part, cuda):
    check_disk(part, CUDA_NEEDED_MB if cuda else NEEDED_MB)
    started = time.monotonic()
    say(f"fetching {VERSION}, {CUDA_DOWNLOAD_MB if cuda else DOWNLOAD_MB} MB, once for all clones")
    wheels, tree = part / "wheels", part / "tree"
    wheels.mkdir()
    download(wheels)
    if cuda:
        download_cuda(wheels)
    say("unpacking")
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tree, [name for name in archive.namelist() if is_wanted(name, cuda)])
    # The wheel's own libtorch.so needs libtorch_cuda.so; ours leaves CUDA to be loaded at run time.
    os.symlink("libtorch_cpu.so", tree / "torch/lib/libtorch.so")
    (tree / MARKER).write_text(VERSION + "\n")
    shutil.rmtree(home, ignore_errors=True)
    os.replace(tree, home)
    say(f"ready in {home} after {time.monotonic() - started:.0f} s")


def is_wanted(name, cuda):
    if name in LIBRARIES or name.startswith("torch/include/"):
        return True
    is_library = ".so" in pathlib.PurePosixPath(name).name
    of_torch = name.startswith("torch/lib/") and name not in ("torch/lib/libtorch.so", "torch/lib/libtorch_python.so")
    return cuda and is_library and (of_torch or name.startswith("nvidia/"))


def download_cuda(wheels):
    """Fetch what torch's own wheel says that its CUDA half needs. pip resolves it; only torch itself is pinned by a hash."""
    (torch,) = wheels.glob("torch-*.whl")
    with zipfile.ZipFile(torch) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    needs = [need.split(";")[0].strip() for need in metadata.get_all("Requires-Dist")]
    needs = [need for need in needs if re.match(r"nvidia-|cuda-toolkit", need)]
    requirements = wheels / "requirements.txt"
    requirements.write_text("\n".join(needs) + "\n")
    pip(download_command(wheels, requirements), wheels)


def download(wheels):
    requirements = wheels / "requirements.txt"
    requirements.write_text(WHEELS)
    pip([*download_command(wheels, requirements), "--no-deps"], wheels)


def download_command(wheels, requirements):
    # Tags named in full, so that the Python that runs this does not matter: the libraries are the same in every wheel.
    command = [
        "download",
        "--only-binary",
        ":all:",
        "--dest",
        str(wheels),
        "--requirement",
        str(requirements),
    ]
    command += ["--implementation", "cp", "--python-version", "311", "--abi", "cp311", "--abi", "none"]
    for tag in (*(f"manylinux_2_{minor}" for minor in range(28, 16, -1)), "manylinux2014"):
        command += ["--platform", f"{tag}_x86_64"]
    return command


def link(place, home):
    if place.is_symlink():
        if os.readlink(place) == str(home):
            return
    elif place.exists():
        if is_whole(place):
            say(f"{place} is a folder of your own with libtorch in it; kept")
            return
        raise Trouble(f"{place} is in the way: neither a link nor a libtorch", f"remove {place} and run this again")
    fresh = place.with_name(f"{place.name}.{os.getpid()}")
    try:
        os.symlink(home, fresh)
        os.replace(fresh, place)
    except OSError as error:
        raise Trouble(f"cannot link {place}: {error.strerror}", "make the project folder writable") from error
    say(f"linked {place}")


run(main)
