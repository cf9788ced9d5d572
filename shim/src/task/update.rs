//! `Update`: changes the limits of a container, in the guest's cgroup, and the size of the VM with them.

use oci_spec::runtime::LinuxResources;

use crate::container::Status;
use crate::error::Error;
use crate::growth::Demand;
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
        let before = self.demanded(id).await;
        let after = Demand {
            limits: before.limits.updated(&resources),
            ..before
        };
        // Which disks the guest has is said when the container is created.
        drop_host_resources(&mut resources, &[]);
        let resources = serde_json::to_vec(&resources).map_err(invalid)?;
        // There is never less than what is allowed: the VM grows before, and shrinks after.
        let vm = container.vm();
        let larger = Demand {
            limits: before.limits.or_larger(after.limits),
            ..before
        };
        self.demand(vm, id, larger).await?;
        let updated = vm.agent().update_container(id, resources).await;
        let now = if updated.is_ok() { after } else { before };
        self.demand_only(vm, id, now).await;
        if container.status() == Status::Stopped {
            // It may have ended meanwhile.
            self.demand_nothing(vm, id).await;
        }
        updated
    }
}
