//! `Shutdown`: ends the VM and the shim, once there are no containers.

use crate::sandbox::Sandbox;

impl Sandbox {
    /// Does nothing while there are containers, as runc's shim.
    pub(crate) async fn shutdown(&self) {
        if !self.is_empty() {
            return;
        }
        self.stop_unused_vm().await;
        self.shut_down();
    }
}
