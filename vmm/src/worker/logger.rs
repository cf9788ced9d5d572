//! Log records as lines on standard error, which the shim reads and puts into its own log.

use std::io::Write;

use log::{LevelFilter, Log, Metadata, Record};

use super::LOG_LEVEL;

/// Targets of this crate.
const OWN: &str = env!("CARGO_CRATE_NAME");

/// They tell of what is usual.
const LIBRARIES: LevelFilter = LevelFilter::Warn;

/// They complain of what the guest sends, at any length and as often as it sends it. It is counted instead.
const FED_BY_THE_GUEST: [&str; 2] = ["fuse_backend_rs", "virtio_queue"];

struct StandardError;

impl Log for StandardError {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let target = metadata.target();
        let limit = if target.starts_with(OWN) {
            log::max_level()
        } else if FED_BY_THE_GUEST
            .iter()
            .any(|library| target.starts_with(library))
        {
            LevelFilter::Off
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
        log::set_max_level(level(std::env::var(LOG_LEVEL).ok().as_deref()));
    }
}

fn level(name: Option<&str>) -> LevelFilter {
    name.and_then(|name| name.parse().ok())
        .unwrap_or(LevelFilter::Info)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn level_is_the_parents_or_info() {
        assert_eq!(level(Some("DEBUG")), LevelFilter::Debug);
        assert_eq!(level(Some("all of it")), LevelFilter::Info);
        assert_eq!(level(None), LevelFilter::Info);
    }
}
