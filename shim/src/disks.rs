//! The disks that a VM has for one container: plugged in before the agent creates it, taken away after the agent has removed
//! it.

use husk_protocol::agent::{DiskDevice, RootDisk};
use log::warn;

use crate::error::Error;
use crate::storage::OpenDisks;
use crate::vm::Vm;

/// As the agent is told of them.
#[derive(Debug, Default)]
pub(crate) struct Disks {
    pub(crate) root: Option<RootDisk>,
    pub(crate) devices: Vec<DiskDevice>,
}

impl Disks {
    /// Gives `vm` the disks that are `open`. On failure it has none of them.
    pub(crate) async fn plug(vm: &Vm, open: OpenDisks) -> Result<Self, Error> {
        let mut disks = Self::default();
        match disks.add(vm, open).await {
            Ok(()) => Ok(disks),
            Err(err) => {
                disks.unplug(vm).await;
                Err(err)
            }
        }
    }

    async fn add(&mut self, vm: &Vm, open: OpenDisks) -> Result<(), Error> {
        if let Some(root) = open.root {
            self.root = Some(RootDisk {
                serial: vm.plug(root.disk).await?,
                fstype: root.fstype,
                options: root.options,
                ..RootDisk::default()
            });
        }
        for device in open.devices {
            self.devices.push(DiskDevice {
                path: device.path.display().to_string(),
                serial: vm.plug(device.disk).await?,
                ..DiskDevice::default()
            });
        }
        Ok(())
    }

    /// Takes the disks away again. One that the guest does not let go of stays until the VM ends.
    pub(crate) async fn unplug(&self, vm: &Vm) {
        let roots = self.root.iter().map(|root| &root.serial);
        for serial in roots.chain(self.devices.iter().map(|device| &device.serial)) {
            match vm.unplug(serial).await {
                // With the VM its disks are closed.
                Ok(()) | Err(Error::VmEnded(_)) => {}
                Err(err) => warn!("the guest keeps {serial}: {}", err.chain()),
            }
        }
    }
}
