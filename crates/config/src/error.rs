//! What is wrong with a configuration, and where.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::{Spanned, Value};

/// Why a configuration is not used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read, or is not UTF-8.
    #[error("cannot read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The text is not TOML, or has a key that does not exist.
    #[error("{}:{line}: {}{message}", origin.display(), before(key.as_deref()))]
    NotUnderstood {
        /// The file.
        origin: PathBuf,
        /// The line, counted from one.
        line: usize,
        /// The key with its table, as in `vm.vcpus`, if the line has or continues one.
        key: Option<String>,
        /// What the parser said: one line.
        message: String,
    },
    /// A key has a value that it may not have.
    #[error("{}:{line}: {key} is {found}; allowed is {allowed}", origin.display())]
    NotAllowed {
        /// The file.
        origin: PathBuf,
        /// The line, counted from one.
        line: usize,
        /// The key with its table, as in `vm.vcpus`.
        key: &'static str,
        /// The value, as TOML.
        found: String,
        /// What is allowed.
        allowed: String,
    },
    /// A pod asks for something that the node does not leave to pods.
    #[error(
        "the pod's annotation {name} is not allowed on this node: \
         annotations.allow of its configuration has {}",
        if allowed.is_empty() { "nothing" } else { allowed.as_str() }
    )]
    AnnotationRefused {
        /// The annotation.
        name: String,
        /// The keys that are allowed.
        allowed: String,
    },
}

/// The text of a configuration and where it is from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Text<'a> {
    text: &'a str,
    origin: &'a Path,
}

impl<'a> Text<'a> {
    pub(crate) fn new(text: &'a str, origin: &'a Path) -> Self {
        Self { text, origin }
    }

    pub(crate) fn as_str(&self) -> &'a str {
        self.text
    }

    pub(crate) fn not_understood(&self, err: &toml::de::Error) -> ConfigError {
        let line = self.line(err.span());
        ConfigError::NotUnderstood {
            origin: self.origin.to_owned(),
            line,
            key: self.key(line),
            message: err.message().trim_end().replace('\n', ", "),
        }
    }

    pub(crate) fn not_allowed(
        &self,
        key: &'static str,
        value: &Spanned<Value>,
        allowed: String,
    ) -> ConfigError {
        ConfigError::NotAllowed {
            origin: self.origin.to_owned(),
            line: self.line(Some(value.span())),
            key,
            found: one_line(value.get_ref()),
            allowed,
        }
    }

    /// The line in which `span` begins; the first one if the parser did not say.
    fn line(&self, span: Option<Range<usize>>) -> usize {
        let start = span.map_or(0, |span| span.start.min(self.text.len()));
        1 + self
            .text
            .bytes()
            .take(start)
            .filter(|&byte| byte == b'\n')
            .count()
    }

    /// The key to which the line belongs. The parser names none, and the text may be no TOML, so this goes by how lines
    /// look.
    fn key(&self, line: usize) -> Option<String> {
        let (mut table, mut key) = ("", "");
        for text in self.text.lines().take(line) {
            let text = text.split('#').next().unwrap_or_default().trim();
            if let Some(header) = text.strip_prefix('[') {
                table = header.trim_matches(['[', ']', ' ']);
                key = "";
            } else if let Some((name, _)) = text.split_once('=') {
                key = name.trim_end();
            } else if is_bare_key(text) {
                key = text;
            }
        }
        match (table, key) {
            ("", "") => None,
            ("", one) | (one, "") => Some(one.to_owned()),
            (table, key) => Some(format!("{table}.{key}")),
        }
    }
}

/// Whether a line is nothing but a key, without its value.
fn is_bare_key(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

/// A key as the beginning of a message.
fn before(key: Option<&str>) -> String {
    key.map_or_else(String::new, |key| format!("{key}: "))
}

/// A value as TOML, with its own line breaks escaped and its end left out if it is long.
fn one_line(value: &Value) -> String {
    const MAX_CHARS: usize = 80;
    let text = value.to_string().replace('\n', "\\n");
    match text.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
