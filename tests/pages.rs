//! The pages that promise something name tests that exist.

use std::{collections::BTreeMap, path::Path};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const PAGES: [&str; 2] = ["docs/semantics.md", "docs/wire.md"];

/// What stands between backticks, outside fenced code.
fn quoted(page: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut fenced = false;
    for (number, line) in page.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if !fenced {
            found.extend(line.split('`').skip(1).step_by(2).map(|quote| (number + 1, quote.to_owned())));
        }
    }
    found
}

/// A test is a sentence: at least four words.
fn is_test(quote: &str) -> bool {
    quote.split('_').count() >= 4 && quote.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

fn read(file: &str) -> Option<String> {
    let below = if file.starts_with("tests/") || file.starts_with("src/") { "" } else { "actors/" };
    std::fs::read_to_string(Path::new(ROOT).join(below).join(file)).ok()
}

/// All tests in Python, in one text.
fn interop() -> String {
    let folder = std::fs::read_dir(Path::new(ROOT).join("tests/interop")).expect("the folder is there");
    let files = folder.map(|entry| entry.expect("it can be listed").path());
    let python = files.filter(|file| file.extension().is_some_and(|extension| extension == "py"));
    python.map(|file| std::fs::read_to_string(file).expect("a text")).collect()
}

#[test]
fn every_test_that_a_page_names_is_where_it_says() {
    let interop = interop();
    let mut wrong = Vec::new();
    for page in PAGES {
        let text = std::fs::read_to_string(Path::new(ROOT).join(page)).expect("the page is there");
        let mut files: BTreeMap<String, Option<String>> = BTreeMap::new();
        let mut file = String::new();
        let mut count = 0;
        for (line, quote) in quoted(&text) {
            if quote.ends_with(".rs") && quote.contains("/") {
                file = quote;
                let content = files.entry(file.clone()).or_insert_with(|| read(&file));
                if content.is_none() && file.contains("tests/") {
                    wrong.push(format!("{page}:{line}: no file {file}"));
                }
            } else if is_test(&quote) {
                count += 1;
                let function = format!("fn {quote}(");
                let here = files.get(&file).and_then(Option::as_ref).is_some_and(|text| text.contains(&function));
                let python = quote.starts_with("test_") && interop.contains(&format!("def {quote}("));
                if !here && !python {
                    wrong.push(format!("{page}:{line}: no test {quote} in {file}"));
                }
            }
        }
        assert!(count > 20, "{page} names only {count} tests: is it read as it is written?");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
