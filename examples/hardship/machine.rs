//! What the machine did meanwhile, as Linux tells; nothing elsewhere.

use std::collections::BTreeMap;

use serde_json::{Value, json};

/// Seconds that all cores together have worked since the machine started.
pub fn busy_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let fields: Vec<f64> =
        stat.lines().next().unwrap_or_default().split_whitespace().skip(1).filter_map(|f| f.parse().ok()).collect();
    // user, nice, system; idle and iowait; irq, softirq. In hundredths of a second.
    [0, 1, 2, 5, 6].iter().filter_map(|&i| fields.get(i)).sum::<f64>() / 100.0
}

/// This process's threads by name: seconds they ran, seconds they waited for a core although they could have run, and how
/// long such a wait was on average, in milliseconds.
pub fn threads() -> Value {
    let mut by_name: BTreeMap<String, [f64; 3]> = BTreeMap::new();
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    for task in tasks.map(|task| task.path()) {
        // A thread that has just ended has no files.
        let (Ok(name), Ok(times)) =
            (std::fs::read_to_string(task.join("comm")), std::fs::read_to_string(task.join("schedstat")))
        else {
            continue;
        };
        let name = name.trim().trim_end_matches(|c: char| c.is_ascii_digit()).to_owned();
        for (sum, more) in by_name.entry(name).or_default().iter_mut().zip(times.split_whitespace()) {
            *sum += more.parse::<f64>().unwrap_or(0.0);
        }
    }
    let shown = by_name.into_iter().map(|(name, [ran, waited, runs])| {
        let row = json!({ "ran_s": ran / 1e9, "waited_s": waited / 1e9, "wait_ms": waited / 1e6 / runs.max(1.0) });
        (name, row)
    });
    Value::Object(shown.collect())
}
