//! `Wait`: answers when a process has ended.

use crate::error::Error;
use crate::process::Exit;
use crate::sandbox::Sandbox;

impl Sandbox {
    /// Waits for the end of a process; for one that has ended, answers at once, as often as it is asked.
    pub(crate) async fn wait(&self, id: &str, exec_id: &str) -> Result<Exit, Error> {
        let process = self.container(id)?.process(exec_id)?;
        Ok(process.wait().await)
    }
}
