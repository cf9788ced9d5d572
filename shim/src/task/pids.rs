//! `Pids`: the processes in a container.

use husk_protocol::agent::Process;

use crate::error::Error;
use crate::sandbox::Sandbox;

impl Sandbox {
    /// The container's processes, with their pids in the guest.
    pub(crate) async fn pids(&self, id: &str) -> Result<Vec<Process>, Error> {
        let container = self.container(id)?;
        container.vm().agent().list_processes(id).await
    }
}
