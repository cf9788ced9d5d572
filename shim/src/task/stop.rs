//! What the sandbox service does to all containers at once.

use std::sync::Arc;

use futures::future::join_all;
use log::warn;

use crate::error::Error;
use crate::process::KILL;
use crate::sandbox::Sandbox;

impl Sandbox {
    /// Kills every container and waits for their ends, which [`Sandbox::kill`] sees to; then the guest lets go of its volumes. May be
    /// called more than once.
    ///
    /// # Errors
    /// The first one; the other containers are killed all the same.
    pub(crate) async fn stop(self: &Arc<Self>) -> Result<(), Error> {
        let containers = self.containers();
        let mut failed = None;
        for container in &containers {
            match self.kill(container.id(), "", KILL, true).await {
                Ok(()) | Err(Error::ProcessFinished | Error::ContainerNotFound { .. }) => {}
                Err(err) => {
                    failed.get_or_insert(err);
                }
            }
        }
        if let Some(err) = failed {
            return Err(err);
        }
        join_all(containers.iter().map(|container| container.init().wait())).await;
        // containerd deletes the sandbox when the pod is removed, and others may be given its volumes' disks before.
        for container in containers.iter().filter(|one| one.is_sandbox()) {
            let removed = container.vm().agent().remove_container(container.id());
            match removed.await {
                Ok(()) => container.vm().unplug_volumes().await,
                Err(Error::VmEnded(_)) => {}
                Err(err) => warn!(
                    "the guest does not let go of {}: {}",
                    container.id(),
                    err.chain()
                ),
            }
        }
        Ok(())
    }

    /// Deletes every container, of which none may run: the one that stands for the pod after those that are in it.
    pub(crate) async fn delete_all(&self) -> Result<(), Error> {
        let mut containers = self.containers();
        containers.sort_by_key(|container| container.is_sandbox());
        for container in containers {
            match self.delete(container.id(), "").await {
                Ok(_) | Err(Error::ContainerNotFound { .. }) => {}
                Err(err) => return Err(err),
            }
        }
        Ok(())
    }
}
