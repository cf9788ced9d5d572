//! Text that comes from below: the guest's console and the worker's standard error. Each line goes to the log, and the
//! last ones are kept for error messages. The guest is not trusted: lines have a bound, more of them than a guest has
//! reason to say are left out of the log, and what is not UTF-8, or would move the reader's cursor, is replaced.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::{info, warn};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Longest line in bytes; what follows is logged as a line of its own.
const MAX_LINE: usize = 1024;

/// Lines that one source may log at once: a kernel's start with all that it has to say, and a panic.
const LINES_AT_ONCE: u32 = 2000;

/// How soon one more line may follow those. A guest that never stops talking shall not fill the host's disk.
const INTERVAL: Duration = Duration::from_millis(100);

/// Lines that are kept: the report of a panic, which has some thirty, and what came before it.
const KEPT_LINES: usize = 64;

/// Lines that an error message holds.
const EPILOGUE_LINES: usize = 16;

/// How the kernel begins its last report.
const PANIC: &str = "Kernel panic";

/// Lines before a panic that an error message holds: what the guest said last by itself.
const LINES_BEFORE_PANIC: usize = 3;

/// The last lines of one source.
#[derive(Debug, Clone, Default)]
pub(crate) struct LastLines(Arc<Mutex<VecDeque<String>>>);

impl LastLines {
    /// The lines as the end of an error message: empty, or `; <source> ends with: …`. They are the last ones, or, where
    /// the kernel panicked, those around the beginning of its report, which says why.
    pub(crate) fn epilogue(&self, source: &str) -> String {
        let lines = self.lock();
        if lines.is_empty() {
            return String::new();
        }
        let first = match lines.iter().rposition(|line| line.contains(PANIC)) {
            Some(panic) => panic.saturating_sub(LINES_BEFORE_PANIC),
            None => lines.len().saturating_sub(EPILOGUE_LINES),
        };
        let lines = lines.iter().skip(first).take(EPILOGUE_LINES);
        let lines: Vec<&str> = lines.map(String::as_str).collect();
        format!("; {source} ends with: {}", lines.join(" | "))
    }

    fn push(&self, line: String) {
        let mut lines = self.lock();
        if lines.len() == KEPT_LINES {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads `source` to its end and logs each line as `<name>: <line>`.
pub(crate) async fn follow(mut source: impl AsyncRead + Unpin, name: &str, last: LastLines) {
    let mut line = Vec::with_capacity(MAX_LINE);
    let mut chunk = [0; MAX_LINE];
    let mut allowance = Allowance::new(Instant::now());
    let mut left_out: u64 = 0;
    let mut emit = |line: &mut Vec<u8>| {
        let text = printable(line);
        line.clear();
        if text.is_empty() {
            return;
        }
        if allowance.take(Instant::now()) {
            if left_out > 0 {
                warn!("{name}: {left_out} lines were left out, for it says too much");
                left_out = 0;
            }
            info!("{name}: {text}");
        } else {
            left_out += 1;
        }
        last.push(text);
    };
    // A read error is the end of the source as well.
    while let Ok(count @ 1..) = source.read(&mut chunk).await {
        for &byte in chunk.iter().take(count) {
            if byte == b'\n' {
                emit(&mut line);
                continue;
            }
            if line.len() == MAX_LINE {
                emit(&mut line);
            }
            line.push(byte);
        }
    }
    emit(&mut line);
    if left_out > 0 {
        warn!("{name}: the last {left_out} lines were left out");
    }
}

/// How many lines may be logged: [`LINES_AT_ONCE`], and one more each [`INTERVAL`] after they were used.
#[derive(Debug)]
struct Allowance {
    left: u32,
    /// Up to when the time has been turned into lines.
    counted: Instant,
}

impl Allowance {
    fn new(now: Instant) -> Self {
        Self {
            left: LINES_AT_ONCE,
            counted: now,
        }
    }

    /// Whether one may be logged now.
    fn take(&mut self, now: Instant) -> bool {
        let elapsed = now.saturating_duration_since(self.counted);
        let earned = elapsed.as_millis() / INTERVAL.as_millis();
        match u32::try_from(earned) {
            Ok(earned) if earned < LINES_AT_ONCE - self.left => {
                self.left += earned;
                self.counted += INTERVAL * earned;
            }
            _ => {
                self.left = LINES_AT_ONCE;
                self.counted = now;
            }
        }
        let may = self.left > 0;
        self.left = self.left.saturating_sub(1);
        may
    }
}

/// A text of the guest's as one line of a log or an error message.
pub(crate) fn printable(line: &[u8]) -> String {
    String::from_utf8_lossy(line)
        .trim_end()
        .chars()
        .map(|char| match char {
            '\t' => ' ',
            char if char.is_control() => char::REPLACEMENT_CHARACTER,
            char => char,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn lines_of(text: &[u8]) -> Vec<String> {
        let last = LastLines::default();
        follow(text, "test", last.clone()).await;
        last.lock().iter().cloned().collect()
    }

    #[tokio::test]
    async fn lines_are_split_and_cleaned() {
        assert_eq!(
            lines_of(b"one\r\n\n\xfftwo\x1b[2J\nlast").await,
            ["one", "\u{fffd}two\u{fffd}[2J", "last"]
        );
    }

    #[tokio::test]
    async fn endless_line_is_cut() {
        let lines = lines_of(&[b'x'; MAX_LINE * 2 + 1]).await;
        assert_eq!(
            lines.iter().map(String::len).collect::<Vec<_>>(),
            [MAX_LINE, MAX_LINE, 1]
        );
    }

    #[test]
    fn who_says_too_much_is_left_out_until_time_has_passed() {
        let start = Instant::now();
        let mut allowance = Allowance::new(start);
        assert!((0..LINES_AT_ONCE).all(|_| allowance.take(start)));
        assert!(!allowance.take(start));
        assert!(!allowance.take(start + INTERVAL / 2));
        assert!(allowance.take(start + INTERVAL));
        assert!(!allowance.take(start + INTERVAL));
        let much_later = start + INTERVAL * 2 * LINES_AT_ONCE;
        assert!((0..LINES_AT_ONCE).all(|_| allowance.take(much_later)));
        assert!(!allowance.take(much_later));
    }

    #[tokio::test]
    async fn only_the_last_lines_are_kept() {
        let text: String = (0..100).map(|n| format!("{n}\n")).collect();
        let lines = lines_of(text.as_bytes()).await;
        assert_eq!(lines.len(), KEPT_LINES);
        assert_eq!(lines.last().unwrap(), "99");
    }

    #[test]
    fn epilogue_holds_the_last_lines() {
        let last = LastLines::default();
        (0..40).for_each(|n| last.push(n.to_string()));
        let epilogue = last.epilogue("it");
        assert!(epilogue.starts_with("; it ends with: 24 | "), "{epilogue}");
        assert!(epilogue.ends_with(" | 39"), "{epilogue}");
    }

    #[test]
    fn epilogue_of_a_panic_begins_before_it() {
        let last = LastLines::default();
        last.push("why".into());
        last.push("[ 1.0] Kernel panic - not syncing".into());
        (0..30).for_each(|n| last.push(format!("trace {n}")));
        let epilogue = last.epilogue("it");
        assert!(
            epilogue.starts_with("; it ends with: why | [ 1.0] Kernel panic"),
            "{epilogue}"
        );
        assert!(epilogue.ends_with(" | trace 13"), "{epilogue}");
    }

    #[test]
    fn epilogue_is_empty_without_lines() {
        let last = LastLines::default();
        assert_eq!(last.epilogue("its console"), "");
        last.push("Kernel panic".into());
        assert_eq!(
            last.epilogue("its console"),
            "; its console ends with: Kernel panic"
        );
    }
}
