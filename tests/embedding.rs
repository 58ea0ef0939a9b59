//! What the README tells a user of the library works as it is written there, in a project outside this repository.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const REPOSITORY: &str = env!("CARGO_MANIFEST_DIR");

/// The text of the first fenced block of a language that contains a marker.
fn block(readme: &str, language: &str, marker: &str) -> String {
    let fences = readme.split("```").skip(1).step_by(2);
    let mut blocks = fences.filter_map(|fence| fence.split_once('\n'));
    let found = blocks.find(|(info, body)| info.split(',').next() == Some(language) && body.contains(marker));
    found.unwrap_or_else(|| panic!("the README has a {language} block with {marker:?}")).1.to_owned()
}

/// A folder that goes with the test.
struct Project(PathBuf);

impl Project {
    fn new() -> Self {
        let folder = std::env::temp_dir().join(format!("skep-embedding-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("the temporary folder can be written");
        Self(folder)
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.0.join(path);
        fs::create_dir_all(path.parent().expect("a file lies in a folder")).expect("a folder can be made");
        fs::write(path, text).expect("a file can be written");
    }
}

impl Drop for Project {
    fn drop(&mut self) {
        // What remains in the temporary folder hurts nobody.
        let _remains = fs::remove_dir_all(&self.0);
    }
}

/// A command without what the cargo that runs this test has set.
fn clean(program: &str, folder: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(folder);
    for (name, _) in std::env::vars() {
        let ours = name.starts_with("CARGO_") && !["CARGO_HOME", "CARGO_NET_RETRY"].contains(&name.as_str());
        if ours || ["LD_LIBRARY_PATH", "LIBTORCH", "OMP_WAIT_POLICY", "RUSTFLAGS"].contains(&name.as_str()) {
            command.env_remove(name);
        }
    }
    command
}

fn run(mut command: Command) -> String {
    let output = command.output().expect("the command starts");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{stderr}", output.status);
    String::from_utf8(output.stdout).expect("it prints text")
}

#[test]
fn the_program_of_the_readme_builds_and_runs_in_a_project_of_ones_own() {
    let readme = fs::read_to_string(format!("{REPOSITORY}/README.md")).expect("the README can be read");
    let project = Project::new();
    let dependencies = block(&readme, "toml", "[dependencies]");
    assert!(dependencies.contains("\"../skep\""), "the README names the path of the clone");
    let dependencies = dependencies.replace("../skep", REPOSITORY);
    let package = "[package]\nname = \"embedding\"\nversion = \"0.1.0\"\nedition = \"2024\"\n";
    project.write("Cargo.toml", &format!("{package}\n{dependencies}\n[profile.dev]\ndebug = false\n"));
    project.write(".cargo/config.toml", &block(&readme, "toml", "LIBTORCH"));
    project.write("src/main.rs", &block(&readme, "rust", "fn main()"));
    // The versions that the workspace is tested with, and no look into the registry.
    fs::copy(format!("{REPOSITORY}/Cargo.lock"), project.0.join("Cargo.lock")).expect("the lock file can be copied");

    let mut set_up = clean(&format!("{REPOSITORY}/scripts/libtorch"), &project.0);
    set_up.arg(".");
    run(set_up);
    let mut cargo = clean(env!("CARGO"), &project.0);
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("embedding");
    cargo.args(["run", "--quiet", "--offline", "--target-dir"]).arg(target);
    assert_eq!(run(cargo), "[8, 512]\n");
}
