//! The disks that a VM has for one container: plugged in before the agent creates it, taken away after the agent has removed
//! it.

use futures::future::join_all;
use husk_protocol::agent::{DiskDevice, RootDisk, RootLayers};
use log::warn;
use tokio::sync::OwnedSemaphorePermit;

use crate::error::Error;
use crate::storage::{OpenDisks, Root};
use crate::vm::Vm;

/// As the agent is told of them.
#[derive(Debug, Default)]
pub(crate) struct Disks {
    pub(crate) root: Option<RootDisk>,
    pub(crate) layers: Option<RootLayers>,
    pub(crate) devices: Vec<DiskDevice>,
    /// What the layers take of the pod's slots.
    slots: Option<OwnedSemaphorePermit>,
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
        match open.root {
            None => {}
            Some(Root::Disk(root)) => {
                self.root = Some(RootDisk {
                    serial: vm.plug(root.disk).await?,
                    fstype: root.fstype,
                    options: root.options,
                    ..RootDisk::default()
                });
            }
            Some(Root::Layers(root)) => {
                self.slots = Some(root.slots);
                let layers = self.layers.insert(RootLayers {
                    options: root.options,
                    ..RootLayers::default()
                });
                for disk in root.layers {
                    layers.layers.push(vm.plug(disk).await?);
                }
                if let Some(disk) = root.top {
                    layers.top = vm.plug(disk).await?;
                }
            }
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
        let layers = self.layers.iter();
        let layers = layers.flat_map(|root| root.layers.iter().chain([&root.top]));
        let devices = self.devices.iter().map(|device| &device.serial);
        let serials = roots.chain(layers).chain(devices);
        // There may be no disk for what is written.
        let serials = serials.filter(|serial| !serial.is_empty());
        // All at the same time: a guest that ignores it holds each up as long as it may.
        join_all(serials.map(|serial| async move {
            match vm.unplug(serial).await {
                // With the VM its disks are closed.
                Ok(()) | Err(Error::VmEnded(_)) => {}
                Err(err) => warn!("the guest keeps {serial}: {}", err.chain()),
            }
        }))
        .await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use containerd_shim::protos::api::Mount;
    use husk_vmm::control::{self, Call, Reply, Request};
    use tokio::net::UnixStream;

    use super::*;
    use crate::agent::Agent;
    use crate::storage::{DeviceDisk, RootDisk as OpenRoot};
    use crate::vm::End;
    use crate::vmm::tests::{fake_worker, reply};

    /// A VM that takes so many disks and no more, and what it was asked for.
    fn vm_with_room(mut room: usize) -> (Vm, Arc<Mutex<Vec<String>>>) {
        let calls = Arc::new(Mutex::new(Vec::new()));
        let seen = calls.clone();
        let (worker, _events) = fake_worker(move |socket| {
            while let Ok(Some((request, files))) = control::recv::<Request>(&socket) {
                let (call, answer) = match request.call {
                    Call::AddDisk(disk) if room > 0 && files.len() == 1 => {
                        room -= 1;
                        let mode = if disk.read_only { "ro" } else { "rw" };
                        (format!("+{} {mode}", disk.serial), Ok(Reply::Added))
                    }
                    Call::AddDisk(disk) => (format!("?{}", disk.serial), Err("full".to_owned())),
                    Call::RemoveDisk { serial } => (format!("-{serial}"), Ok(Reply::Removed)),
                    other => panic!("{other:?}"),
                };
                seen.lock().unwrap().push(call);
                reply(&socket, request.id, answer, &[]);
            }
        });
        let (_sender, end) = End::channel();
        let agent = Agent::new(UnixStream::pair().unwrap().0, end.clone());
        (Vm::fake(worker, agent, end, 1), calls)
    }

    fn open_disks() -> OpenDisks {
        let root = |options: &[&str]| {
            let image = tempfile::NamedTempFile::new().unwrap();
            let mount = Mount {
                type_: "ext4".to_owned(),
                source: image.path().display().to_string(),
                options: options.iter().map(|&option| option.to_owned()).collect(),
                ..Mount::default()
            };
            OpenRoot::of(&[mount]).unwrap().unwrap()
        };
        OpenDisks {
            root: Some(Root::Disk(root(&["noatime"]))),
            devices: vec![DeviceDisk {
                disk: root(&["ro"]).disk,
                path: "/dev/data".into(),
            }],
        }
    }

    #[tokio::test]
    async fn disks_are_named_to_the_agent_and_taken_away() {
        let (vm, calls) = vm_with_room(2);
        let disks = Disks::plug(&vm, open_disks()).await.unwrap();
        let root = disks.root.as_ref().unwrap();
        assert_eq!(
            (root.serial.as_str(), root.fstype.as_str()),
            ("disk-0", "ext4")
        );
        assert_eq!(root.options, ["noatime", "rw"]);
        let device = &disks.devices[0];
        assert_eq!(
            (device.serial.as_str(), device.path.as_str()),
            ("disk-1", "/dev/data")
        );
        disks.unplug(&vm).await;
        let expected = ["+disk-0 rw", "+disk-1 ro", "-disk-0", "-disk-1"];
        assert_eq!(*calls.lock().unwrap(), expected);
    }

    #[tokio::test]
    async fn disk_that_finds_no_room_leaves_none() {
        let (vm, calls) = vm_with_room(1);
        let err = Disks::plug(&vm, open_disks()).await.unwrap_err();
        assert!(err.chain().contains("full"), "{}", err.chain());
        assert_eq!(*calls.lock().unwrap(), ["+disk-0 rw", "?disk-1", "-disk-0"]);
    }
}
