//! What was found, and how it is told: one line a subject, and below a failure what to do about it.

use std::error::Error;
use std::io::{self, Write};

/// Something that keeps VMs from starting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem {
    /// What is wrong, one line.
    pub(crate) what: String,
    /// What to do about it; may have several lines.
    pub(crate) remedy: String,
}

impl Problem {
    pub(crate) fn new(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            remedy: remedy.into(),
        }
    }

    /// Tells `err` with all its sources.
    pub(crate) fn from_error(err: &dyn Error, remedy: impl Into<String>) -> Self {
        let mut what = err.to_string();
        let mut source = err.source();
        while let Some(err) = source {
            what.push_str(": ");
            what.push_str(&err.to_string());
            source = err.source();
        }
        Self::new(what, remedy)
    }
}

/// The outcome for one subject.
#[derive(Debug)]
pub(crate) struct Finding {
    subject: &'static str,
    outcome: Outcome,
}

#[derive(Debug)]
enum Outcome {
    Ok(String),
    Failed(Problem),
    /// Not looked at, and why that makes no sense.
    Skipped(&'static str),
}

impl Finding {
    /// `result` says what was found if it is as it should be.
    pub(crate) fn new(subject: &'static str, result: Result<String, Problem>) -> Self {
        let outcome = match result {
            Ok(detail) => Outcome::Ok(detail),
            Err(problem) => Outcome::Failed(problem),
        };
        Self { subject, outcome }
    }

    pub(crate) fn skipped(subject: &'static str, reason: &'static str) -> Self {
        Self {
            subject,
            outcome: Outcome::Skipped(reason),
        }
    }

    pub(crate) fn is_ok(&self) -> bool {
        matches!(self.outcome, Outcome::Ok(_))
    }
}

/// All findings.
#[derive(Debug)]
pub(crate) struct Report {
    findings: Vec<Finding>,
}

impl Report {
    pub(crate) fn new(findings: Vec<Finding>) -> Self {
        Self { findings }
    }

    /// Whether a VM would start.
    pub(crate) fn is_fit(&self) -> bool {
        self.findings.iter().all(Finding::is_ok)
    }

    pub(crate) fn print(&self, out: &mut impl Write) -> io::Result<()> {
        for Finding { subject, outcome } in &self.findings {
            match outcome {
                Outcome::Ok(detail) => writeln!(out, "ok    {subject}: {detail}")?,
                Outcome::Skipped(reason) => writeln!(out, "skip  {subject}: {reason}")?,
                Outcome::Failed(problem) => {
                    writeln!(out, "FAIL  {subject}: {}", problem.what)?;
                    for line in problem.remedy.lines() {
                        writeln!(out, "      {line}")?;
                    }
                }
            }
        }
        let verdict = if self.is_fit() {
            "This machine can run Husk."
        } else {
            "This machine cannot run Husk as it is."
        };
        writeln!(out, "{verdict}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn print(findings: Vec<Finding>) -> (String, bool) {
        let report = Report::new(findings);
        let mut out = Vec::new();
        report.print(&mut out).unwrap();
        (String::from_utf8(out).unwrap(), report.is_fit())
    }

    #[test]
    fn all_ok_is_fit() {
        let (text, fit) = print(vec![Finding::new("kvm", Ok("works".into()))]);
        assert_eq!(text, "ok    kvm: works\nThis machine can run Husk.\n");
        assert!(fit);
    }

    #[test]
    fn failure_tells_what_to_do_and_is_not_fit() {
        let (text, fit) = print(vec![
            Finding::new(
                "kvm",
                Err(Problem::new("is missing", "Do this.\nThen that.")),
            ),
            Finding::new("shim", Ok("is there".into())),
        ]);
        assert_eq!(
            text,
            "FAIL  kvm: is missing\n      Do this.\n      Then that.\nok    shim: is there\n\
             This machine cannot run Husk as it is.\n"
        );
        assert!(!fit);
    }

    #[test]
    fn what_was_not_looked_at_is_not_fit() {
        let (text, fit) = print(vec![Finding::skipped("guest", "needs KVM")]);
        assert!(text.starts_with("skip  guest: needs KVM\n"));
        assert!(!fit);
    }
}
