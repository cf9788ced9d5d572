//! `State` and `Connect`: what the shim knows, without asking the guest.

use crate::container::Status;
use crate::error::Error;
use crate::process::Exit;
use crate::sandbox::Sandbox;
use crate::streams::Stdio;

/// What containerd is told of a process.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) id: String,
    pub(crate) bundle: String,
    pub(crate) pid: u32,
    pub(crate) status: Status,
    pub(crate) stdio: Stdio,
    pub(crate) exit: Option<Exit>,
}

impl Sandbox {
    pub(crate) fn state(&self, id: &str, exec_id: &str) -> Result<State, Error> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        let status = container.status_of(&process);
        let has_process = exec_id.is_empty() || status != Status::Created;
        Ok(State {
            id: if exec_id.is_empty() { id } else { exec_id }.to_owned(),
            bundle: container.bundle().display().to_string(),
            pid: if has_process { container.vm().pid() } else { 0 },
            status,
            stdio: process.stdio().clone(),
            exit: process.exit(),
        })
    }

    /// The pid that stands for container `id` on the host; 0 if there is no such container, which is no error here.
    pub(crate) fn connect(&self, id: &str) -> u32 {
        self.container(id)
            .map_or(0, |container| container.vm().pid())
    }
}
