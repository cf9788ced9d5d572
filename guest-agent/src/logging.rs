//! The log: one line a record on the guest's console, which the host keeps. `husk.log=` on the kernel's command line sets
//! the level: off, error, warn, info (the default), debug or trace.

use std::fs::File;
use std::sync::Mutex;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// The device that the kernel itself logs to.
pub(crate) const CONSOLE: &str = "/dev/console";

const DEFAULT: LevelFilter = LevelFilter::INFO;

/// The level that a kernel command line asks for.
pub(crate) fn level_of(cmdline: &str) -> &str {
    cmdline
        .split_ascii_whitespace()
        .filter_map(|word| word.strip_prefix("husk.log="))
        .next_back()
        .unwrap_or("info")
}

/// Starts logging to `console`. A level that does not exist counts as the default, and is told.
pub(crate) fn start(level: &str, console: File) {
    let parsed = level.parse().unwrap_or(DEFAULT);
    // They warn of what is usual in a guest.
    let libraries = if parsed > DEFAULT {
        parsed
    } else {
        parsed.min(LevelFilter::ERROR)
    };
    let filter = Targets::new()
        .with_default(parsed)
        .with_targets(["libcontainer", "libcgroups", "pathrs"].map(|target| (target, libraries)));
    let console = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .with_timer(tracing_subscriber::fmt::time::uptime())
        .with_writer(Mutex::new(console));
    tracing_subscriber::registry()
        .with(filter)
        .with(console)
        .init();
    if level.parse::<LevelFilter>().is_err() {
        tracing::warn!(level, "husk.log= names no level");
    }
}

#[cfg(test)]
mod tests {
    use super::level_of;

    #[test]
    fn last_level_counts() {
        assert_eq!(
            level_of("console=hvc0 husk.log=debug quiet husk.log=warn"),
            "warn"
        );
        assert_eq!(level_of("console=hvc0"), "info");
    }
}
