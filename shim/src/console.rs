//! Text that comes from below: the guest's console and the worker's standard error. Each line goes to the log, and the
//! last ones are kept for error messages. The guest is not trusted: lines have a bound, and what is not UTF-8, or would
//! move the reader's cursor, is replaced.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use log::info;
use tokio::io::{AsyncRead, AsyncReadExt};

/// Longest line in bytes; what follows is logged as a line of its own.
const MAX_LINE: usize = 1024;

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
    let emit = |line: &mut Vec<u8>| {
        let text = printable(line);
        line.clear();
        if !text.is_empty() {
            info!("{name}: {text}");
            last.push(text);
        }
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
