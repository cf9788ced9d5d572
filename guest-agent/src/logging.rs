//! The log: one line a record on the guest's console, which the host keeps. `husk.log=` on the kernel's command line sets
//! the level: off, error, warn, info (the default), debug or trace.

use std::fmt;
use std::fs::File;
use std::sync::Mutex;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;
use tracing_subscriber::layer::{Identity, Layer, SubscriberExt};
use tracing_subscriber::registry::Registry;
use tracing_subscriber::util::SubscriberInitExt;

/// The device that the kernel itself logs to.
pub(crate) const CONSOLE: &str = "/dev/console";

const DEFAULT: LevelFilter = LevelFilter::INFO;

/// Nobody but the console.
pub(crate) fn nobody() -> Identity {
    Identity::new()
}

/// The level that a kernel command line asks for.
pub(crate) fn level_of(cmdline: &str) -> &str {
    cmdline
        .split_ascii_whitespace()
        .filter_map(|word| word.strip_prefix("husk.log="))
        .next_back()
        .unwrap_or("info")
}

/// Starts logging to `console`, and showing everything to `also`. A level that does not exist counts as the default, and
/// is told.
pub(crate) fn start(level: &str, console: File, also: impl Layer<Registry> + Send + Sync) {
    let parsed = level.parse().unwrap_or(DEFAULT);
    // Their errors are in the answer to the request, and their warnings are of what is usual in a guest.
    let libraries = if parsed > DEFAULT {
        parsed
    } else {
        LevelFilter::OFF
    };
    let filter = Targets::new()
        .with_default(parsed)
        .with_targets(["libcontainer", "libcgroups", "pathrs"].map(|target| (target, libraries)));
    let console = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .with_timer(SinceBoot)
        .with_writer(Mutex::new(console))
        .with_filter(filter);
    tracing_subscriber::registry()
        .with(also)
        .with(console)
        .init();
    if level.parse::<LevelFilter>().is_err() {
        tracing::warn!(level, "husk.log= names no level");
    }
}

/// Stamps records as the kernel stamps its own, so that the two can be read together.
struct SinceBoot;

impl FormatTime for SinceBoot {
    fn format_time(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        write!(writer, "[{:5}.{:06}]", now.tv_sec, now.tv_nsec / 1000)
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
