//! The disks that a VM has for one container: plugged in before the agent creates it, taken away after the agent has removed
//! it.

use std::sync::Arc;

use futures::future::join_all;
use husk_protocol::agent::{DiskDevice, RootDisk, RootLayers};
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
    slots: Option<Arc<OwnedSemaphorePermit>>,
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
                self.slots = Some(Arc::new(root.slots));
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

    /// Takes the disks away again. One that the guest does not let go of stays until the VM ends, and so do the slots of
    /// layers then.
    pub(crate) async fn unplug(&self, vm: &Vm) {
        let roots = self.root.iter().map(|root| &root.serial);
        let layers = self.layers.iter();
        let layers = layers.flat_map(|root| root.layers.iter().chain([&root.top]));
        let devices = self.devices.iter().map(|device| &device.serial);
        let serials = roots.chain(layers).chain(devices);
        // There may be no disk for what is written.
        let serials = serials.filter(|serial| !serial.is_empty());
        // All at the same time: a guest that ignores it holds each up as long as it may.
        let unplugged = join_all(serials.map(|serial| vm.unplug(serial))).await;
        if unplugged.contains(&false)
            && let Some(slots) = &self.slots
        {
            vm.keep_slots(slots.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use containerd_shim::protos::api::Mount;
    use husk_vmm::control::{self, Call, Reply, Request};
    use tokio::net::UnixStream;
    use tokio::sync::Semaphore;

    use super::*;
    use crate::agent::Agent;
    use crate::storage::{DeviceDisk, Disk, RootDisk as OpenRoot, RootLayers as OpenLayers};
    use crate::vm::End;
    use crate::vmm::tests::{fake_worker, reply};

    /// A disk that the guest of [`vm_with_room`] does not let go of.
    const HELD: &str = "disk-1";

    /// A VM that takes so many disks and no more, and what it was asked for.
    fn vm_with_room(mut room: usize, lets_go: bool) -> (Vm, Arc<Mutex<Vec<String>>>) {
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
                    Call::RemoveDisk { serial } if serial == HELD && !lets_go => {
                        (format!("!{serial}"), Err("in use".to_owned()))
                    }
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
        let (vm, calls) = vm_with_room(2, true);
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
        let (vm, calls) = vm_with_room(1, true);
        let err = Disks::plug(&vm, open_disks()).await.unwrap_err();
        assert!(err.chain().contains("full"), "{}", err.chain());
        assert_eq!(*calls.lock().unwrap(), ["+disk-0 rw", "?disk-1", "-disk-0"]);
    }
    /// Two layers and what is written on top, with three of as many slots.
    fn open_layers() -> (OpenDisks, Arc<Semaphore>) {
        let disk = |read_only| Disk::of_image(tempfile::tempfile().unwrap(), read_only);
        let slots = Arc::new(Semaphore::new(3));
        let root = OpenLayers {
            layers: vec![disk(true), disk(true)],
            top: Some(disk(false)),
            options: vec!["index=off".to_owned()],
            slots: slots.clone().try_acquire_many_owned(3).unwrap(),
        };
        let open = OpenDisks {
            root: Some(Root::Layers(root)),
            devices: Vec::new(),
        };
        (open, slots)
    }

    #[tokio::test]
    async fn layers_are_named_to_the_agent_and_give_their_slots_back() {
        let (vm, calls) = vm_with_room(3, true);
        let (open, slots) = open_layers();
        let disks = Disks::plug(&vm, open).await.unwrap();
        let layers = disks.layers.as_ref().unwrap();
        assert_eq!(layers.layers, ["disk-0", "disk-1"]);
        assert_eq!(
            (layers.top.as_str(), &layers.options[..]),
            ("disk-2", &["index=off".to_owned()][..])
        );
        assert_eq!(slots.available_permits(), 0);
        disks.unplug(&vm).await;
        drop(disks);
        assert_eq!(slots.available_permits(), 3);
        let expected = [
            "+disk-0 ro",
            "+disk-1 ro",
            "+disk-2 rw",
            "-disk-0",
            "-disk-1",
            "-disk-2",
        ];
        assert_eq!(*calls.lock().unwrap(), expected);
    }

    #[tokio::test]
    async fn slots_of_a_disk_that_the_guest_keeps_are_taken_until_the_vm_ends() {
        let (vm, calls) = vm_with_room(3, false);
        let (open, slots) = open_layers();
        let disks = Disks::plug(&vm, open).await.unwrap();
        disks.unplug(&vm).await;
        drop(disks);
        assert!(calls.lock().unwrap().contains(&"!disk-1".to_owned()));
        assert_eq!(slots.available_permits(), 0);
        drop(vm);
        assert_eq!(slots.available_permits(), 3);
    }
}
