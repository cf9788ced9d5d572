//! `Update`: changes the limits of a container, in the guest's cgroup.

use oci_spec::runtime::LinuxResources;

use crate::container::Status;
use crate::error::Error;
use crate::sandbox::Sandbox;
use crate::spec::drop_host_resources;

impl Sandbox {
    /// Sets the limits that `resources` (OCI LinuxResources, JSON) names, and leaves the others.
    pub(crate) async fn update(&self, id: &str, resources: &[u8]) -> Result<(), Error> {
        let container = self.container(id)?;
        if container.status() == Status::Stopped {
            return Err(Error::WrongState {
                verb: "update",
                state: "stopped",
                subject: "container",
            });
        }
        let invalid = |source: serde_json::Error| Error::InvalidRequest {
            what: "OCI resources",
            source: source.into(),
        };
        let mut resources: LinuxResources = serde_json::from_slice(resources).map_err(invalid)?;
        drop_host_resources(&mut resources);
        let resources = serde_json::to_vec(&resources).map_err(invalid)?;
        container.vm().agent().update_container(id, resources).await
    }
}
