//! `ResizePty`: the size of a process's terminal.

use crate::error::Error;
use crate::process::{ProcessState, TtySize};
use crate::sandbox::Sandbox;

impl Sandbox {
    /// Resizes a terminal; before the start of an exec, the size it is going to have. No terminal is no error, as with
    /// runc.
    pub(crate) async fn resize_pty(
        &self,
        id: &str,
        exec_id: &str,
        size: TtySize,
    ) -> Result<(), Error> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        if !process.stdio().terminal {
            return Ok(());
        }
        process.set_tty_size(size);
        match process.state() {
            ProcessState::Stopped(_) => Err(Error::WrongState {
                verb: "resize",
                state: "stopped",
                subject: "container",
            }),
            ProcessState::Created | ProcessState::Starting if !exec_id.is_empty() => Ok(()),
            ProcessState::Created | ProcessState::Starting | ProcessState::Running => {
                let target = container.target(&process);
                let agent = container.vm().agent();
                agent.resize_tty(&target, size.columns, size.rows).await
            }
        }
    }
}
