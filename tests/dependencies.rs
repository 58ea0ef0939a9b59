//! `docs/dependencies.md` has one line of reason for each direct dependency of each crate, and no other line.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::Command,
};

use serde_json::Value;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const PAGE: &str = "docs/dependencies.md";
/// Headings of the page's tables, with the kind that `cargo metadata` has for each.
const TABLES: &[(&str, &str)] =
    &[("In the program", "normal"), ("In tests and examples", "dev"), ("In build scripts", "build")];

/// The crates of the workspace that have a dependency, by kind and name of the dependency.
type Uses = BTreeMap<(String, String), BTreeSet<String>>;

fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(ROOT)
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("cargo prints JSON")
}

fn declared() -> Uses {
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    let mut uses = Uses::new();
    for package in metadata()["packages"].as_array().expect("a list of packages") {
        let user = text(&package["name"]).trim_start_matches("skep-").to_owned();
        for dependency in package["dependencies"].as_array().expect("a list of dependencies") {
            let name = text(&dependency["name"]);
            if !name.starts_with("skep-") {
                let kind = dependency["kind"].as_str().unwrap_or("normal").to_owned();
                uses.entry((kind, name)).or_default().insert(user.clone());
            }
        }
    }
    uses
}

/// Reads the rows "| `name` | users | reason |" under the headings of [`TABLES`].
fn documented() -> Uses {
    let page = std::fs::read_to_string(format!("{ROOT}/{PAGE}")).expect("the page exists");
    let mut uses = Uses::new();
    let mut kind = None;
    for line in page.lines() {
        if let Some(heading) = line.strip_prefix("## ") {
            kind = TABLES.iter().find(|(title, _)| *title == heading).map(|(_, kind)| *kind);
        }
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let (Some(kind), ["", name, users, reason, ""]) = (kind, &cells[..]) else { continue };
        let Some(name) = name.strip_prefix('`').and_then(|name| name.strip_suffix('`')) else { continue };
        assert!(reason.len() >= 10, "{PAGE}: `{name}` has no reason");
        let users = users.split_whitespace().map(str::to_owned).collect();
        let earlier = uses.insert((kind.to_owned(), name.to_owned()), users);
        assert!(earlier.is_none(), "{PAGE}: two {kind} lines for `{name}`");
    }
    uses
}

fn lines(uses: &Uses, missing_in: &Uses) -> String {
    let differ = uses.iter().filter(|(dependency, users)| missing_in.get(dependency) != Some(users));
    let line = |((kind, name), users): (&(String, String), &BTreeSet<String>)| {
        let users: Vec<&str> = users.iter().map(String::as_str).collect();
        format!("  {kind}: `{name}` | {}\n", users.join(" "))
    };
    differ.map(line).collect()
}

#[test]
fn every_direct_dependency_has_its_line_of_reason_and_no_line_is_superfluous() {
    let (declared, documented) = (declared(), documented());
    let (missing, superfluous) = (lines(&declared, &documented), lines(&documented, &declared));
    assert!(
        missing.is_empty() && superfluous.is_empty(),
        "{PAGE} and the manifests differ\nin the manifests only:\n{missing}on the page only:\n{superfluous}"
    );
}
