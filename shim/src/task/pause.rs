//! `Pause` and `Resume`: of a container, by the guest's freezer.

use containerd_shim::protos::events::task::{TaskPaused, TaskResumed};

use crate::error::Error;
use crate::sandbox::Sandbox;

impl Sandbox {
    /// Freezes a running container.
    pub(crate) async fn pause(&self, id: &str) -> Result<(), Error> {
        let container = self.container(id)?;
        container.begin_pause()?;
        // From here on none begins.
        container.settle_execs().await;
        let paused = container.vm().agent().pause_container(id).await;
        container.end_pause(paused.is_ok());
        paused?;
        self.publish(TaskPaused {
            container_id: id.to_owned(),
            ..Default::default()
        });
        Ok(())
    }

    /// Thaws a paused container.
    pub(crate) async fn resume(&self, id: &str) -> Result<(), Error> {
        let container = self.container(id)?;
        container.begin_resume()?;
        let resumed = container.vm().agent().resume_container(id).await;
        container.end_pause(resumed.is_err());
        resumed?;
        self.publish(TaskResumed {
            container_id: id.to_owned(),
            ..Default::default()
        });
        Ok(())
    }
}
