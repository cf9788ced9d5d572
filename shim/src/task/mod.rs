//! The verbs of the task service, one file each, in domain types.
//!
//! The order inside a verb: check the state, act, record the new state, publish the event, answer.

mod close_io;
pub(crate) mod create;
mod delete;
pub(crate) mod exec;
pub(crate) mod exit;
mod kill;
mod pause;
mod pids;
mod resize_pty;
mod shutdown;
mod start;
pub(crate) mod state;
mod stats;
mod stop;
mod update;
mod wait;
