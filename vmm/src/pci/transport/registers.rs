//! The registers of the common configuration structure that only vCPUs touch (virtio 1.3, 4.1.4.3).

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::GuestMemoryMmap;

/// What the driver has configured of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct QueueRegisters {
    pub(super) size: u16,
    pub(super) enabled: bool,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
    /// Positions of a queue that was paused; zero for a new one.
    pub(super) next_available: u16,
    pub(super) next_used: u16,
}

impl QueueRegisters {
    pub(super) fn new(max_size: u16) -> Self {
        Self {
            size: max_size,
            enabled: false,
            descriptors: 0,
            available: 0,
            used: 0,
            next_available: 0,
            next_used: 0,
        }
    }

    /// The queue to work with, if it is one.
    pub(super) fn build(
        &self,
        max_size: u16,
        event_idx: bool,
        memory: &GuestMemoryMmap,
    ) -> Option<Queue> {
        let state = QueueState {
            max_size,
            next_avail: self.next_available,
            next_used: self.next_used,
            event_idx_enabled: event_idx,
            size: self.size,
            ready: self.enabled,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
        };
        Queue::try_from(state)
            .ok()
            .filter(|queue| queue.is_valid(memory))
    }
}

/// All of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Registers {
    pub(super) device_feature_select: u32,
    pub(super) driver_feature_select: u32,
    pub(super) driver_features: u64,
    pub(super) queue_select: u16,
    pub(super) queues: Vec<QueueRegisters>,
}

impl Registers {
    pub(super) fn new(max_sizes: &[u16]) -> Self {
        Self {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: max_sizes
                .iter()
                .map(|max| QueueRegisters::new(*max))
                .collect(),
        }
    }

    /// The selected one.
    pub(super) fn queue(&mut self) -> Option<&mut QueueRegisters> {
        self.queues.get_mut(usize::from(self.queue_select))
    }
}

/// A store to one of the fields of the selected queue, at `offset` in the structure.
pub(super) fn write_queue(queue: &mut QueueRegisters, offset: u64, data: &[u8]) {
    match (offset, data) {
        (0x18, &[a, b]) => queue.size = u16::from_le_bytes([a, b]),
        // Once enabled, a queue stays so until the reset (4.1.4.3.2).
        (0x1c, &[1, 0]) => queue.enabled = true,
        (0x20 | 0x24, &[a, b, c, d]) => set_half(
            &mut queue.descriptors,
            u32::from(offset == 0x24),
            u32::from_le_bytes([a, b, c, d]),
        ),
        (0x28 | 0x2c, &[a, b, c, d]) => set_half(
            &mut queue.available,
            u32::from(offset == 0x2c),
            u32::from_le_bytes([a, b, c, d]),
        ),
        (0x30 | 0x34, &[a, b, c, d]) => set_half(
            &mut queue.used,
            u32::from(offset == 0x34),
            u32::from_le_bytes([a, b, c, d]),
        ),
        _ => {}
    }
}

/// The `select`-th 32 bits of a value; there are two.
pub(super) fn half_of(value: u64, select: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    match select {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

/// Replaces the `select`-th 32 bits of a value.
pub(super) fn set_half(value: &mut u64, select: u32, half: u32) {
    match select {
        0 => *value = *value & !0xffff_ffff | u64::from(half),
        1 => *value = *value & 0xffff_ffff | u64::from(half) << 32,
        _ => {}
    }
}
