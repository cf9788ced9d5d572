//! The control queue (virtio 1.3, 5.1.6.5): a command, its data, and a byte for the answer.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MAC,
    VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET,
    VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI, VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_ERR,
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_MQ, VIRTIO_NET_OK,
};

use super::metrics::NetMetrics;
use super::tap::Tap;
use crate::virtio::queue::{Chain, QueueError, Readable, Virtqueue};

/// The features by which a driver says what packets it takes, and which a command may take back.
pub(super) const GUEST_OFFLOADS: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_GUEST_USO4
    | 1 << VIRTIO_NET_F_GUEST_USO6;

/// Bytes of an address in a filter table.
const ADDRESS_LEN: usize = 6;

/// What the driver may change while the device is active.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Settings {
    /// Pairs of queues in use, the first ones.
    pub(super) pairs: u16,
    /// Some of [`GUEST_OFFLOADS`].
    pub(super) offloads: u64,
}

impl Settings {
    /// What holds before the first command (5.1.6.5.6 and 5.1.6.5.7).
    pub(super) fn initial(features: u64) -> Self {
        Self {
            pairs: 1,
            offloads: features & GUEST_OFFLOADS,
        }
    }
}

/// What the taps are told, and by whom.
#[derive(Debug)]
pub(super) struct Control {
    /// If the driver has one.
    queue: Option<Virtqueue>,
    commands: Commands,
}

/// All but the queue.
#[derive(Debug)]
pub(super) struct Commands {
    /// One for each pair that there is.
    pub(super) taps: Vec<Arc<dyn Tap>>,
    /// Pairs of which the driver has enabled both queues.
    pub(super) usable_pairs: u16,
    /// What was negotiated.
    pub(super) features: u64,
    pub(super) settings: Settings,
    pub(super) metrics: Arc<NetMetrics>,
}

impl Control {
    pub(super) fn new(queue: Option<Virtqueue>, commands: Commands) -> Self {
        Self { queue, commands }
    }

    pub(super) fn queue(&self) -> Option<&Virtqueue> {
        self.queue.as_ref()
    }

    pub(super) fn into_parts(self) -> (Option<Virtqueue>, Settings) {
        (self.queue, self.commands.settings)
    }

    /// Brings the taps to what the settings say.
    pub(super) fn apply(&self) -> io::Result<()> {
        let Commands { taps, settings, .. } = &self.commands;
        self.commands.set_offloads(settings.offloads)?;
        // One queue alone cannot be switched off.
        for (tap, pair) in taps.iter().zip(0..).skip(1) {
            tap.set_enabled(pair < settings.pairs)?;
        }
        Ok(())
    }

    /// Leaves the taps as a new driver expects them.
    pub(super) fn reset(&self) -> io::Result<()> {
        self.commands.set_offloads(0)
    }

    /// Obeys the commands that wait.
    pub(super) fn serve(&mut self) -> Result<(), QueueError> {
        let Self { queue, commands } = self;
        match queue {
            Some(queue) => queue.drain(|chain| commands.answer(chain)),
            None => Ok(()),
        }
    }
}

impl Commands {
    /// Obeys one command, or says that it is refused.
    fn answer(&mut self, chain: Chain<'_>) -> u32 {
        let Some((command, mut answer)) = chain.buffers().ok().filter(|(_, room)| !room.is_empty())
        else {
            self.metrics.bad_chains.inc();
            return 0;
        };
        let code = if self.obey(command).is_some() {
            VIRTIO_NET_OK
        } else {
            self.metrics.refused_commands.inc();
            VIRTIO_NET_ERR
        };
        answer.write(&[code.to_le_bytes()[0]]);
        1
    }

    /// `None` if the command is none that this device offers, is malformed, or cannot be obeyed.
    fn obey(&mut self, mut command: Readable<'_>) -> Option<()> {
        let [class, code] = command.read_obj::<[u8; 2]>()?.map(u32::from);
        let has = |feature: u32| self.features & 1 << feature != 0;
        match (class, code) {
            // The tap passes every packet, and a filter is the best that can be done, not a promise (5.1.6.5.1).
            (VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC | VIRTIO_NET_CTRL_RX_ALLMULTI)
                if has(VIRTIO_NET_F_CTRL_RX) =>
            {
                (command.len() == 1).then_some(())
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET) if has(VIRTIO_NET_F_CTRL_RX) => {
                // Unicast, then multicast.
                take_table(&mut command)?;
                take_table(&mut command)?;
                command.is_empty().then_some(())
            }
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) if has(VIRTIO_NET_F_MQ) => {
                let pairs = u16::from_le_bytes(command.read_obj()?);
                self.set_pairs(pairs)
            }
            (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET)
                if has(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS) =>
            {
                let offloads = u64::from_le_bytes(command.read_obj()?);
                let known = self.features & GUEST_OFFLOADS;
                if offloads & !known != 0 {
                    return None;
                }
                self.set_offloads(offloads).map_err(refused).ok()?;
                self.settings.offloads = offloads;
                Some(())
            }
            _ => None,
        }
    }

    fn set_pairs(&mut self, pairs: u16) -> Option<()> {
        if !(1..=self.usable_pairs).contains(&pairs) {
            return None;
        }
        for (tap, pair) in self.taps.iter().zip(0..).skip(1) {
            tap.set_enabled(pair < pairs).map_err(refused).ok()?;
        }
        self.settings.pairs = pairs;
        Some(())
    }

    fn set_offloads(&self, offloads: u64) -> io::Result<()> {
        match self.taps.first() {
            Some(tap) => tap.set_offloads(tap_offloads(offloads)),
            None => Ok(()),
        }
    }
}

/// The host has a reason to refuse, which the guest cannot provoke.
#[expect(clippy::needless_pass_by_value, reason = "map_err hands it over")]
fn refused(err: io::Error) {
    log::warn!("a tap does not do what the guest's driver asks: {err}");
}

/// A filter table: a count, and as many addresses.
fn take_table(command: &mut Readable<'_>) -> Option<()> {
    let count = usize::try_from(u32::from_le_bytes(command.read_obj()?)).ok()?;
    let len = count.checked_mul(ADDRESS_LEN)?;
    (command.take(len).len() == len).then_some(())
}

/// The same as flags of TUNSETOFFLOAD, less what depends on something that is missing (5.1.3.1): the kernel refuses that.
pub(super) fn tap_offloads(offloads: u64) -> libc::c_uint {
    let has = |feature: u32| offloads & 1 << feature != 0;
    if !has(VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let (tso4, tso6) = (has(VIRTIO_NET_F_GUEST_TSO4), has(VIRTIO_NET_F_GUEST_TSO6));
    // The kernel has both or none.
    let uso = has(VIRTIO_NET_F_GUEST_USO4) && has(VIRTIO_NET_F_GUEST_USO6);
    [
        (true, libc::TUN_F_CSUM),
        (tso4, libc::TUN_F_TSO4),
        (tso6, libc::TUN_F_TSO6),
        (
            has(VIRTIO_NET_F_GUEST_ECN) && (tso4 || tso6),
            libc::TUN_F_TSO_ECN,
        ),
        (uso, libc::TUN_F_USO4 | libc::TUN_F_USO6),
    ]
    .into_iter()
    .filter(|(wanted, _)| *wanted)
    .fold(0, |flags, (_, flag)| flags | flag)
}
