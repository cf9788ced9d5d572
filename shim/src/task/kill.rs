//! `Kill`: sends a signal to a process, or to all of a container.

use crate::error::Error;
use crate::process::ProcessState;
use crate::sandbox::Sandbox;

impl Sandbox {
    /// Sends `signal`. An ended process is `NotFound`, as with runc.
    pub(crate) async fn kill(
        &self,
        id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), Error> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        let is_exec = !exec_id.is_empty();
        match process.state() {
            ProcessState::Stopped(_) => return Err(Error::ProcessFinished),
            // A created container has a process, that waits to be started; an exec has none before its start.
            ProcessState::Created | ProcessState::Starting if is_exec => {
                return Err(Error::ProcessNotStarted);
            }
            ProcessState::Created | ProcessState::Starting | ProcessState::Running => {}
        }
        let target = container.target(&process);
        let agent = container.vm().agent();
        match agent.signal_process(&target, signal, all && !is_exec).await {
            // The VM took the process with it; that its exit is published is a matter of moments.
            Err(Error::VmEnded(_)) => Err(Error::ProcessFinished),
            result => result,
        }
    }
}
