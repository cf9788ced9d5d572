//! husk-agent, the init of the guest.

fn main() {}
