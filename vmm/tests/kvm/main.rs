//! The door of the VMM on real KVM. Where there is none, each test says so and ends; in the node, which has it, none may.

mod boot;
mod devices;
mod ends;
mod files;
mod memory;
mod net;
mod plug;
mod probe;
mod resize;
mod snapshot;
#[path = "../support/mod.rs"]
mod support;
mod window;
