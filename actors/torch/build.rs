//! Makes whatever cargo starts find libtorch without an environment variable.
fn main() {}
