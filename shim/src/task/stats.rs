//! `Stats`: the counters of a container, in the type that goes with the host's cgroup version.

use containerd_shim::protos::protobuf::well_known_types::any::Any;

use crate::error::Error;
use crate::sandbox::Sandbox;
use crate::stats::{HostCgroups, encode};

impl Sandbox {
    pub(crate) async fn stats(&self, id: &str) -> Result<Any, Error> {
        let container = self.container(id)?;
        let stats = container.vm().agent().stats_container(id).await?;
        encode(&stats, HostCgroups::detect())
    }
}
