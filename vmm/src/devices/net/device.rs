//! The driver fills receive queues with buffers and transmit queues with packets, each packet behind a header that says
//! what is left to do of checksum and segmentation; a tap of the host takes and gives packets in the same form. Each pair
//! of queues has its queue of the tap. Packets are moved by a thread for each pair, or by the host's kernel (vhost-net),
//! which one thread looks after. The first thread, or the only one, also serves the control queue.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use vm_memory::GuestMemoryMmap;

use super::control::{Commands, Control, GUEST_OFFLOADS, Settings, tap_offloads};
use super::metrics::NetMetrics;
use super::pair::{Layout, Pair};
use super::tap::{KernelTap, Tap};
use super::vhost::{KernelPair, KernelQueue, Vhost, VhostError};
use super::worker::{Leader, NetWorker, Path};
use super::{receive_queue, transmit_queue};
use crate::config::NicConfig;
use crate::snapshot::{RestoreError, Snapshot};
use crate::virtio::queue::{QueueError, Virtqueue, take_queue};
use crate::virtio::worker::{ThreadSetup, Worker};
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, DeviceType, Interrupt, VirtioDevice, read_config_space,
};
use crate::vmm::NicFiles;

/// Length of a packet's header (virtio 1.3, 5.1.6): with VIRTIO_F_VERSION_1 it always has the number of buffers.
pub(super) const HEADER_LEN: usize = 12;
/// What Ethernet adds to a packet of layer 3, with a VLAN tag.
const ETHERNET_LEN: usize = 18;
/// The largest packet with its header: one that is not segmented yet has up to 64 KiB.
pub(super) const MAX_PACKET_LEN: usize = HEADER_LEN + ETHERNET_LEN + (1 << 16);

/// Descriptors of a queue for packets.
const PACKET_QUEUE_SIZE: u16 = 256;
/// Descriptors of the control queue, whose driver waits for each answer.
const CONTROL_QUEUE_SIZE: u16 = 64;

/// What every tap can do. Not MTU: Linux takes that for the largest that the interface may ever have, and a pod's interface
/// may be given a larger one while the guest runs.
pub(super) const FEATURES: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS
    | 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_CTRL_VQ
    | 1 << VIRTIO_NET_F_CTRL_RX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// What a tap can do since Linux 6.2.
pub(super) const USO_FEATURES: u64 =
    1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6 | 1 << VIRTIO_NET_F_HOST_USO;

/// Why the device cannot go on, or cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A queue is unusable.
    #[error("a queue of the network device")]
    Queue(#[from] QueueError),
    /// The descriptor is not that of a tap with packet headers, or the tap does not do what it is asked.
    #[error("cannot use the tap")]
    Tap(#[source] io::Error),
    /// The thread cannot wait for the tap.
    #[error("cannot wait for the tap")]
    Poll(#[source] io::Error),
    /// The host's kernel does not move the packets.
    #[error("vhost-net cannot be used")]
    Vhost(#[from] VhostError),
    /// A thread cannot be made.
    #[error("cannot start the network device")]
    Start(#[source] io::Error),
}

/// What all pairs get at an activation.
struct Common {
    memory: Arc<GuestMemoryMmap>,
    features: u64,
    interrupt: Arc<dyn Interrupt>,
    layout: Layout,
    metrics: Arc<NetMetrics>,
}

impl Common {
    fn virtqueue(&self, queue: ActiveQueue) -> Virtqueue {
        Virtqueue::new(queue, Arc::clone(&self.memory), Arc::clone(&self.interrupt))
    }

    fn kernel_queue(&self, active: ActiveQueue) -> io::Result<KernelQueue> {
        Ok(KernelQueue {
            call: self.interrupt.call(active.index)?,
            active,
        })
    }

    /// For the device's thread.
    fn pair(&self, tap: &Arc<dyn Tap>, [rx, tx]: [ActiveQueue; 2]) -> Pair {
        Pair::new(
            self.virtqueue(rx),
            self.virtqueue(tx),
            Arc::clone(tap),
            self.layout,
            Arc::clone(&self.metrics),
        )
    }

    /// For the host's kernel.
    fn kernel_pair(
        &self,
        vhost: &Arc<Vhost>,
        tap: &Arc<dyn Tap>,
        [rx, tx]: [ActiveQueue; 2],
    ) -> io::Result<KernelPair> {
        KernelPair::new(
            Arc::clone(vhost),
            Arc::clone(tap),
            Arc::clone(&self.memory),
            self.features,
            [self.kernel_queue(rx)?, self.kernel_queue(tx)?],
        )
    }
}

/// A network device.
#[derive(Debug)]
pub struct NetDevice {
    mac: [u8; 6],
    mtu: u16,
    features: u64,
    queue_sizes: Vec<u16>,
    /// One for each pair of queues.
    taps: Vec<Arc<dyn Tap>>,
    /// As many, if the host's kernel moves the packets.
    vhost: Vec<Arc<Vhost>>,
    /// As many, or one if the host's kernel moves the packets.
    workers: Vec<Worker<NetWorker>>,
    /// What the driver has set; `None` after a reset.
    settings: Option<Settings>,
    link_up: Arc<AtomicBool>,
    metrics: Arc<NetMetrics>,
}

impl NetDevice {
    /// Makes the device and its threads, from a configuration that was checked and the descriptors that it asks for.
    ///
    /// # Errors
    /// When a descriptor is not what it should be, or a thread cannot be made.
    pub fn new(config: &NicConfig, files: NicFiles, setup: ThreadSetup) -> Result<Self, NetError> {
        let multi_queue = files.taps.len() > 1;
        let taps = files
            .taps
            .into_iter()
            .map(|fd| KernelTap::new(fd, multi_queue))
            .collect::<Result<Vec<_>, _>>()
            .map_err(NetError::Tap)?;
        let mut features = FEATURES;
        if let Some(tap) = taps.first()
            && tap.has_uso().map_err(NetError::Tap)?
        {
            features |= USO_FEATURES;
        }
        let taps = taps
            .into_iter()
            .map(|tap| Arc::new(tap) as Arc<dyn Tap>)
            .collect();
        Self::with_taps(config, taps, files.vhost, features, setup)
    }

    pub(super) fn with_taps(
        config: &NicConfig,
        taps: Vec<Arc<dyn Tap>>,
        vhost: Vec<OwnedFd>,
        mut features: u64,
        setup: ThreadSetup,
    ) -> Result<Self, NetError> {
        if taps.len() > 1 {
            features |= 1 << VIRTIO_NET_F_MQ;
        }
        let mut queue_sizes = vec![PACKET_QUEUE_SIZE; 2 * taps.len()];
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        let vhost = vhost
            .into_iter()
            .map(|fd| Vhost::new(fd).map(Arc::new))
            .collect::<Result<Vec<_>, _>>()?;
        for vhost in &vhost {
            features &= !vhost.missing_features();
        }
        let threads = if vhost.is_empty() { taps.len() } else { 1 };
        let workers = (0..threads)
            .map(|_| Worker::spawn("net", DeviceType::Net, setup))
            .collect::<Result<_, _>>()
            .map_err(NetError::Start)?;
        Ok(Self {
            mac: config.mac,
            mtu: config.mtu,
            features,
            queue_sizes,
            taps,
            vhost,
            workers,
            settings: None,
            link_up: Arc::new(AtomicBool::new(true)),
            metrics: Arc::default(),
        })
    }

    /// The device's counters.
    pub fn metrics(&self) -> Arc<NetMetrics> {
        Arc::clone(&self.metrics)
    }

    fn pair_count(&self) -> u16 {
        u16::try_from(self.taps.len()).expect("queue_pairs is a byte")
    }

    /// The configuration space (virtio 1.3, 5.1.4), as far as the features reach.
    fn config_space(&self) -> [u8; CONFIG_LEN] {
        let mut space = [0; CONFIG_LEN];
        let link = u16::from(self.link_up.load(Ordering::Acquire)) * LINK_UP;
        space[..6].copy_from_slice(&self.mac);
        space[6..8].copy_from_slice(&link.to_le_bytes());
        space[8..].copy_from_slice(&self.pair_count().to_le_bytes());
        space
    }

    /// How packets lie in the buffers of a driver that has chosen `features`.
    fn layout(&self, features: u64) -> Layout {
        let takes_unsegmented = tap_offloads(features) & !libc::TUN_F_CSUM != 0;
        Layout {
            mergeable: features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0,
            largest: if takes_unsegmented {
                MAX_PACKET_LEN
            } else {
                HEADER_LEN + ETHERNET_LEN + usize::from(self.mtu)
            },
        }
    }
}

/// Up to and including the number of pairs.
const CONFIG_LEN: usize = 10;

#[expect(
    clippy::cast_possible_truncation,
    reason = "the bindings hold a 16-bit flag as u32"
)]
const LINK_UP: u16 = VIRTIO_NET_S_LINK_UP as u16;

impl VirtioDevice for NetDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config_space(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            memory,
            features,
            mut queues,
            interrupt,
        } = activation;
        // Without MQ the driver knows of one pair, and the control queue follows it (5.1.2).
        let known_pairs = if features & 1 << VIRTIO_NET_F_MQ == 0 {
            1
        } else {
            self.pair_count()
        };
        let common = Common {
            memory: Arc::new(memory),
            features,
            interrupt,
            layout: self.layout(features),
            metrics: Arc::clone(&self.metrics),
        };
        let control_queue = if features & 1 << VIRTIO_NET_F_CTRL_VQ == 0 {
            None
        } else {
            take_queue(&mut queues, 2 * known_pairs).map(|queue| common.virtqueue(queue))
        };
        let mut enabled = Vec::new();
        for pair in 0..known_pairs {
            let mut take = |index| take_queue(&mut queues, index).ok_or(index);
            match (take(receive_queue(pair)), take(transmit_queue(pair))) {
                (Ok(rx), Ok(tx)) => enabled.push([rx, tx]),
                (Err(index), _) | (_, Err(index)) if pair == 0 => {
                    return Err(ActivateError::MissingQueue { index });
                }
                // The driver does without this pair and those behind it.
                _ => break,
            }
        }
        let commands = Commands {
            taps: self.taps.clone(),
            usable_pairs: u16::try_from(enabled.len()).expect("no more than there are"),
            features,
            settings: self.settings.unwrap_or_else(|| Settings::initial(features)),
            metrics: Arc::clone(&self.metrics),
        };
        let mut leader = Some(Leader {
            control: Control::new(control_queue, commands),
            link_up: Arc::clone(&self.link_up),
            interrupt: Arc::clone(&common.interrupt),
        });
        let pairs = self.taps.iter().zip(enabled);
        let paths: Vec<_> = if self.vhost.is_empty() {
            pairs
                .map(|(tap, queues)| Path::Worker(common.pair(tap, queues)))
                .collect()
        } else {
            let pairs = self.vhost.iter().zip(pairs);
            let pairs = pairs
                .map(|(vhost, (tap, queues))| common.kernel_pair(vhost, tap, queues))
                .collect::<Result<_, _>>()
                .map_err(ActivateError::Worker)?;
            vec![Path::Kernel(pairs)]
        };
        for ((worker, tap), path) in self.workers.iter_mut().zip(&self.taps).zip(paths) {
            // The first thread is the one that gets the leader.
            let serve = NetWorker::new(path, Arc::clone(tap), leader.take());
            worker.start(serve, Arc::clone(&common.interrupt))?;
        }
        Ok(())
    }

    fn pause(&mut self) -> Vec<ActiveQueue> {
        let mut paused = Vec::new();
        for worker in &mut self.workers {
            if let Some(served) = worker.stop() {
                let (queues, settings) = served.into_parts();
                paused.extend(queues);
                self.settings = settings.or(self.settings);
            }
        }
        paused
    }

    fn reset(&mut self) {
        for worker in &mut self.workers {
            worker.reset();
        }
        self.settings = None;
    }
}

/// What is saved of a network device. Packets on their way are not: networks lose some.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetState {
    /// The address, by which the guest knows the device.
    pub mac: [u8; 6],
    /// The largest packet of layer 3.
    pub mtu: u16,
    /// Pairs of queues.
    pub queue_pairs: u16,
    /// `None` if the driver has not come that far.
    pub(super) settings: Option<Settings>,
}

impl Snapshot for NetDevice {
    type State = NetState;

    fn save(&self) -> NetState {
        NetState {
            mac: self.mac,
            mtu: self.mtu,
            queue_pairs: self.pair_count(),
            settings: self.settings,
        }
    }

    fn restore(&mut self, state: NetState) -> Result<(), RestoreError> {
        let refuse = |reason| RestoreError {
            device: "net",
            reason,
        };
        let own = self.save();
        if (state.mac, state.mtu, state.queue_pairs) != (own.mac, own.mtu, own.queue_pairs) {
            return Err(refuse(format!("the device is {own:?}, not {state:?}")));
        }
        if let Some(Settings { pairs, offloads }) = state.settings
            && (!(1..=own.queue_pairs).contains(&pairs)
                || offloads & !(self.features & GUEST_OFFLOADS) != 0)
        {
            return Err(refuse(format!(
                "it uses {pairs} pairs of queues with the offloads {offloads:#x}"
            )));
        }
        self.settings = state.settings;
        Ok(())
    }
}
