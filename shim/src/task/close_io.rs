//! `CloseIO`: ends the standard input of a process.

use crate::error::Error;
use crate::sandbox::Sandbox;

impl Sandbox {
    /// The process reads what is left, then the end. May be called more than once, and for a process without stdin.
    pub(crate) fn close_io(&self, id: &str, exec_id: &str) -> Result<(), Error> {
        self.container(id)?.process(exec_id)?.close_stdin();
        Ok(())
    }
}
