//! Compiles the C++ shim, and makes whatever cargo starts find libtorch without an environment variable.
use std::{
    env,
    path::{Path, PathBuf},
};

fn main() {
    println!("cargo:rerun-if-changed=cpp");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let lib = PathBuf::from(env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys is a direct dependency"));
    let include = lib.parent().map(|dir| dir.join("include")).unwrap_or_default();
    if !include.join("torch/library.h").is_file() {
        println!("cargo:warning=no libtorch in {}: run scripts/libtorch, or set LIBTORCH", lib.display());
        eprintln!("no libtorch headers in {}: run scripts/libtorch, or set LIBTORCH", include.display());
        std::process::exit(1);
    }
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .opt_level(1)
        .debug(false)
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .file("cpp/shim.cpp")
        .file("cpp/script.cpp")
        .file("cpp/random.cpp")
        .file("cpp/stream.cpp")
        .compile("skep_torch_shim");

    // cargo puts search paths inside the target folder on the loader's path of every program it runs, dependents included.
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets OUT_DIR")).join("libtorch");
    link_folder(&lib, &out);
    println!("cargo:rustc-link-search=native={}", out.display());
    // For the rpath of binaries: DEP_SKEP_TORCH_LIBTORCH_LIB in the build scripts of dependents.
    println!("cargo:libtorch_lib={}", lib.display());
}

#[cfg(unix)]
fn link_folder(from: &Path, to: &Path) {
    if std::fs::read_link(to).is_ok_and(|target| target == from) {
        return;
    }
    let _was_absent = std::fs::remove_file(to);
    std::os::unix::fs::symlink(from, to).expect("OUT_DIR is writable");
}

#[cfg(not(unix))]
fn link_folder(_from: &Path, _to: &Path) {}
