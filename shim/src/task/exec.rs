//! `Exec`: adds a process to a container, to be started by `Start`.

use std::sync::Arc;

use containerd_shim::protos::events::task::TaskExecAdded;
use oci_spec::runtime::Process as OciProcess;

use super::create::{check_id, tty_size};
use crate::container;
use crate::error::Error;
use crate::process::Process;
use crate::sandbox::Sandbox;
use crate::spec::drop_host_labels;
use crate::streams::Stdio;

/// What containerd asks for.
#[derive(Debug)]
pub(crate) struct Exec {
    pub(crate) id: String,
    pub(crate) exec_id: String,
    pub(crate) stdio: Stdio,
    /// OCI process, JSON.
    pub(crate) spec: Vec<u8>,
}

impl Sandbox {
    /// Adds a process.
    pub(crate) fn exec(&self, request: Exec) -> Result<(), Error> {
        let container = self.container(&request.id)?;
        check_id(&request.exec_id)?;
        let invalid = |source: serde_json::Error| Error::InvalidRequest {
            what: "OCI process",
            source: source.into(),
        };
        let mut spec: OciProcess = serde_json::from_slice(&request.spec).map_err(invalid)?;
        drop_host_labels(&mut spec);
        // The request decides, as in runc's shim.
        spec.set_terminal(Some(request.stdio.terminal));
        let size = tty_size(&spec);
        container.add_exec(container::Exec {
            spec: serde_json::to_vec(&spec).map_err(invalid)?,
            process: Arc::new(Process::new(request.exec_id.clone(), request.stdio, size)),
        })?;
        self.publish(TaskExecAdded {
            container_id: request.id,
            exec_id: request.exec_id,
            ..Default::default()
        });
        Ok(())
    }
}
