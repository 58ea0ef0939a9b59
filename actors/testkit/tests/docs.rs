//! Every public type shows how it is used.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// All files of source, without the crate's root, which has a page in the place of a type, and a private module.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let found = entries.flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] });
    found.filter(|path| !path.ends_with("services.rs") && !path.ends_with("lib.rs")).collect()
}

#[test]
fn every_public_type_shows_how_it_is_used() {
    let (mut types, mut bare) = (0, Vec::new());
    for path in sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src")) {
        let text = fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        for (number, line) in lines.iter().enumerate() {
            if !["pub struct ", "pub enum ", "pub trait "].iter().any(|kind| line.starts_with(kind)) {
                continue;
            }
            types += 1;
            let above =
                lines[..number].iter().rev().take_while(|line| line.starts_with("///") || line.starts_with('#'));
            if !above.into_iter().any(|line| *line == "/// ```") {
                bare.push(format!("{}: {line}", path.display()));
            }
        }
    }
    assert!(types > 30, "only {types} types were found");
    assert!(bare.is_empty(), "without an example in their documentation:\n{}", bare.join("\n"));
}
