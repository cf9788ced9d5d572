//! The driver sends FUSE requests in the request queues, and those that cannot wait in the hiprio queue, to a process that
//! answers them out of this one's sight. One thread looks after that process.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::server::{Server, ServerError};
use super::worker::{FrontEnd, Ring};
use crate::devices::fs::{
    CONFIG_LEN, HIPRIO_QUEUE, MAX_REQUEST_QUEUES, REQUEST_QUEUE, Tag, config_space, queue_sizes,
};
use crate::end::End;
use crate::snapshot::{RestoreError, Snapshot};
use crate::virtio::worker::{ThreadSetup, Worker};
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, DeviceType, VirtioDevice, read_config_space,
};

/// A file system device whose requests another process serves.
pub(crate) struct VhostFsDevice {
    tag: Tag,
    config: [u8; CONFIG_LEN],
    queue_sizes: Vec<u16>,
    server: Server,
    end: Arc<End>,
    worker: Worker<FrontEnd>,
}

impl fmt::Debug for VhostFsDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhostFsDevice")
            .field("tag", &self.tag)
            .field("server", &self.server)
            .finish_non_exhaustive()
    }
}

impl VhostFsDevice {
    /// Makes the device for a guest of so many vCPUs, and its thread. `socket` is connected to the server, whose first answers
    /// are waited for. If it fails later, the VM ends.
    ///
    /// # Errors
    /// When the server is gone or cannot do what is needed, or the thread cannot be made.
    pub(crate) fn new(
        tag: Tag,
        socket: OwnedFd,
        vcpus: u8,
        end: Arc<End>,
        setup: ThreadSetup,
    ) -> Result<Self, ServerError> {
        let wanted = vcpus.clamp(1, MAX_REQUEST_QUEUES);
        let server = Server::new(socket, u64::from(REQUEST_QUEUE) + u64::from(wanted))?;
        let served = server.queues() - u64::from(REQUEST_QUEUE);
        let queues = u8::try_from(served).expect("no more than were wanted");
        Ok(Self {
            config: config_space(&tag, queues),
            tag,
            queue_sizes: queue_sizes(queues),
            server,
            end,
            worker: Worker::spawn("vhost-fs", DeviceType::Fs, setup).map_err(ServerError::Start)?,
        })
    }
}

impl VirtioDevice for VhostFsDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Fs
    }

    fn features(&self) -> u64 {
        self.server.features()
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            memory,
            features,
            queues,
            interrupt,
        } = activation;
        for index in [HIPRIO_QUEUE, REQUEST_QUEUE] {
            if !queues.iter().any(|queue| queue.index == index) {
                return Err(ActivateError::MissingQueue { index });
            }
        }
        let rings = queues.into_iter().map(|active| {
            let call = interrupt.call(active.index)?;
            Ok(Ring { active, call })
        });
        let front_end = FrontEnd {
            server: self.server.clone(),
            memory,
            features,
            rings: rings
                .collect::<Result<_, _>>()
                .map_err(ActivateError::Worker)?,
            tag: self.tag.as_str().to_owned(),
            end: Arc::clone(&self.end),
        };
        self.worker.start(front_end, interrupt)
    }

    fn pause(&mut self) -> Vec<ActiveQueue> {
        let stopped = self.worker.stop();
        stopped
            .into_iter()
            .flat_map(FrontEnd::into_queues)
            .collect()
    }

    fn reset(&mut self) {
        self.worker.reset();
    }
}

/// What is saved of the device. What the server knows of its guest is not, so nothing can be restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct VhostFsState {
    tag: String,
}

impl Snapshot for VhostFsDevice {
    type State = VhostFsState;

    fn save(&self) -> VhostFsState {
        VhostFsState {
            tag: self.tag.as_str().to_owned(),
        }
    }

    fn restore(&mut self, _state: VhostFsState) -> Result<(), RestoreError> {
        Err(RestoreError {
            device: "fs",
            reason: "its server knows nothing of the guest".to_owned(),
        })
    }
}
