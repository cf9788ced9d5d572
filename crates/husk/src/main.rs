//! The husk command-line tool.

fn main() {}
