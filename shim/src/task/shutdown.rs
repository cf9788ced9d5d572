//! `Shutdown`: ends the VM and the shim, once there are no containers.

use crate::sandbox::Sandbox;

impl Sandbox {
    /// Does nothing while there are containers, as runc's shim. One that is still being created is given up: containerd
    /// asks only when it has given up waiting for it, and asks but once.
    pub(crate) async fn shutdown(&self) {
        if self.has_containers() {
            return;
        }
        self.abandon();
        if self.is_empty() {
            self.stop_unused_vm().await;
            self.shut_down();
        }
    }
}
