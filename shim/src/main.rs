//! containerd shim v2 for Husk.

fn main() {}
