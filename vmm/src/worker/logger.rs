//! Log records as lines on standard error, which the shim reads and puts into its own log.

use std::io::Write;

use log::{LevelFilter, Log, Metadata, Record};

/// Targets of this crate.
const OWN: &str = env!("CARGO_CRATE_NAME");

/// They tell of what is usual.
const LIBRARIES: LevelFilter = LevelFilter::Warn;

struct StandardError;

impl Log for StandardError {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let limit = if metadata.target().starts_with(OWN) {
            log::max_level()
        } else {
            LIBRARIES.min(log::max_level())
        };
        metadata.level() <= limit
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        // One write a record, so that those of several threads stay apart. There is nobody to tell when it fails.
        let line = format!("{} {}\n", record.level(), record.args());
        let _ = std::io::stderr().write_all(line.as_bytes());
    }

    fn flush(&self) {}
}

/// Makes it the logger of the process, unless there is one.
pub(super) fn install() {
    if log::set_logger(&StandardError).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}
