//! Which blocks of the range the guest uses: the rules of the requests (virtio 1.3, 5.15.6), without queues and memory.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// What is plugged and unplugged at once: a large page, so that what is given back is one.
pub const BLOCK_SIZE: u64 = 2 << 20;

/// How a request is answered (5.15.6.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Answer {
    /// Done.
    Ack = 0,
    /// Not now: the guest shall not have that much.
    Nack = 1,
    /// The guest erred.
    Error = 3,
}

/// What a range of blocks is (5.15.6.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Usage {
    Plugged = 0,
    Unplugged = 1,
    Mixed = 2,
}

/// The state of the device as data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegionState {
    /// Bytes that the guest shall use.
    requested: u64,
    /// Blocks that it uses: runs of them, by number, in ascending order.
    plugged: Vec<Range<usize>>,
}

/// The range and its blocks.
#[derive(Debug)]
pub(super) struct Region {
    range: Range<u64>,
    requested: u64,
    plugged: Vec<bool>,
    plugged_blocks: u64,
}

impl Region {
    /// With nothing plugged and nothing asked for. Both ends are multiples of [`BLOCK_SIZE`].
    pub(super) fn new(range: Range<u64>) -> Self {
        let blocks = (range.end - range.start) / BLOCK_SIZE;
        let blocks = usize::try_from(blocks).expect("x86-64 has 64-bit pointers");
        Self {
            range,
            requested: 0,
            plugged: vec![false; blocks],
            plugged_blocks: 0,
        }
    }

    pub(super) fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// Bytes that the guest shall use.
    pub(super) fn requested(&self) -> u64 {
        self.requested
    }

    /// Bytes that the guest uses.
    pub(super) fn plugged(&self) -> u64 {
        self.plugged_blocks * BLOCK_SIZE
    }

    /// Asks for as many whole blocks as `size` bytes have room for, and the range. True if that is something else than before.
    pub(super) fn request(&mut self, size: u64) -> bool {
        let room = self.range.end - self.range.start;
        let size = size.min(room) / BLOCK_SIZE * BLOCK_SIZE;
        std::mem::replace(&mut self.requested, size) != size
    }

    /// VIRTIO_MEM_REQ_PLUG (5.15.6.3).
    pub(super) fn plug(&mut self, address: u64, count: u16) -> Answer {
        let Some(blocks) = self.blocks(address, count) else {
            return Answer::Error;
        };
        if self.usage(&blocks) != Usage::Unplugged {
            return Answer::Error;
        }
        if self.plugged() + u64::from(count) * BLOCK_SIZE > self.requested {
            return Answer::Nack;
        }
        self.set(blocks, true);
        Answer::Ack
    }

    /// VIRTIO_MEM_REQ_UNPLUG (5.15.6.4). The pieces are free once `discard` has seen their addresses.
    pub(super) fn unplug(
        &mut self,
        address: u64,
        count: u16,
        discard: impl FnOnce(Range<u64>),
    ) -> Answer {
        let Some(blocks) = self.blocks(address, count) else {
            return Answer::Error;
        };
        if self.usage(&blocks) != Usage::Plugged {
            return Answer::Error;
        }
        discard(address..address + u64::from(count) * BLOCK_SIZE);
        self.set(blocks, false);
        Answer::Ack
    }

    /// VIRTIO_MEM_REQ_UNPLUG_ALL (5.15.6.5).
    pub(super) fn unplug_all(&mut self, discard: impl FnOnce(Range<u64>)) -> Answer {
        if self.plugged_blocks != 0 {
            discard(self.range());
        }
        self.plugged.fill(false);
        self.plugged_blocks = 0;
        Answer::Ack
    }

    /// VIRTIO_MEM_REQ_STATE (5.15.6.6). `None` if the guest asks for what is not there.
    pub(super) fn state(&self, address: u64, count: u16) -> Option<Usage> {
        Some(self.usage(&self.blocks(address, count)?))
    }

    /// The blocks that a request names: at least one, all of them in the range.
    fn blocks(&self, address: u64, count: u16) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.range.start)?;
        if !offset.is_multiple_of(BLOCK_SIZE) || count == 0 {
            return None;
        }
        let first = usize::try_from(offset / BLOCK_SIZE).ok()?;
        let end = first.checked_add(count.into())?;
        (end <= self.plugged.len()).then_some(first..end)
    }

    fn usage(&self, blocks: &Range<usize>) -> Usage {
        let blocks = &self.plugged[blocks.clone()];
        match blocks.iter().filter(|plugged| **plugged).count() {
            0 => Usage::Unplugged,
            count if count == blocks.len() => Usage::Plugged,
            _ => Usage::Mixed,
        }
    }

    /// Blocks that were all of the other kind.
    fn set(&mut self, blocks: Range<usize>, plugged: bool) {
        let count = blocks.len() as u64;
        self.plugged[blocks].fill(plugged);
        if plugged {
            self.plugged_blocks += count;
        } else {
            self.plugged_blocks -= count;
        }
    }

    pub(super) fn save(&self) -> RegionState {
        let mut plugged: Vec<Range<usize>> = Vec::new();
        for (index, _) in self.plugged.iter().enumerate().filter(|(_, used)| **used) {
            match plugged.last_mut() {
                Some(run) if run.end == index => run.end += 1,
                _ => plugged.push(index..index + 1),
            }
        }
        RegionState {
            requested: self.requested,
            plugged,
        }
    }

    /// `None`, and nothing changed, if the state is that of another range.
    pub(super) fn restore(&mut self, state: RegionState) -> Option<()> {
        let mut restored = Self::new(self.range());
        restored.request(state.requested);
        for run in state.plugged {
            let blocks = restored.plugged.get_mut(run)?;
            blocks.fill(true);
        }
        if restored.requested != state.requested {
            return None;
        }
        let count = restored.plugged.iter().filter(|plugged| **plugged).count();
        restored.plugged_blocks = count as u64;
        *self = restored;
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BASE: u64 = 4 << 30;
    const BLOCKS: u64 = 10;

    fn region() -> Region {
        Region::new(BASE..BASE + BLOCKS * BLOCK_SIZE)
    }

    fn at(block: u64) -> u64 {
        BASE + block * BLOCK_SIZE
    }

    fn never(range: Range<u64>) {
        panic!("{range:?} is in use");
    }

    #[test]
    fn guest_plugs_what_is_asked_for_and_no_more() {
        let mut region = region();
        assert_eq!(region.plug(at(0), 1), Answer::Nack);
        assert!(region.request(3 * BLOCK_SIZE + 1));
        assert!(!region.request(3 * BLOCK_SIZE));
        assert_eq!(region.plug(at(4), 2), Answer::Ack);
        assert_eq!(region.plug(at(6), 2), Answer::Nack);
        assert_eq!(region.plug(at(9), 1), Answer::Ack);
        assert_eq!(region.plugged(), region.requested());
        region.request(u64::MAX);
        assert_eq!(region.requested(), BLOCKS * BLOCK_SIZE);
    }

    #[test]
    fn what_is_not_as_the_guest_says_is_an_error() {
        let mut region = region();
        region.request(BLOCKS * BLOCK_SIZE);
        region.plug(at(2), 2);
        for (address, count) in [
            (at(2), 1),
            (at(1), 2),
            (at(9), 2),
            (at(10), 1),
            (at(0) + 1, 1),
            (at(0), 0),
            (BASE - BLOCK_SIZE, 1),
            (u64::MAX, 1),
            (0, u16::MAX),
        ] {
            assert_eq!(region.plug(address, count), Answer::Error, "{address:#x}");
        }
        for (address, count) in [(at(0), 1), (at(1), 2), (at(9), 2), (at(2), 3), (0, 1)] {
            assert_eq!(region.unplug(address, count, never), Answer::Error);
        }
        assert_eq!(region.plugged(), 2 * BLOCK_SIZE);
    }

    #[test]
    fn what_is_unplugged_is_discarded() {
        let mut region = region();
        region.request(BLOCKS * BLOCK_SIZE);
        region.plug(at(2), 4);
        let mut discarded = None;
        let answer = region.unplug(at(3), 2, |range| discarded = Some(range));
        assert_eq!(
            (answer, discarded.take()),
            (Answer::Ack, Some(at(3)..at(5)))
        );
        assert_eq!(region.state(at(2), 4), Some(Usage::Mixed));
        assert_eq!(region.state(at(3), 2), Some(Usage::Unplugged));
        assert_eq!(region.state(at(5), 1), Some(Usage::Plugged));
        assert_eq!(region.state(at(5), 6), None);
        region.unplug_all(|range| discarded = Some(range));
        assert_eq!(discarded, Some(region.range()));
        assert_eq!(region.plugged(), 0);
        assert_eq!(region.unplug_all(never), Answer::Ack);
    }

    #[test]
    fn state_is_put_back_where_it_fits() {
        let mut first = region();
        first.request(7 * BLOCK_SIZE);
        first.plug(at(0), 2);
        first.plug(at(5), 4);
        let state = first.save();
        let mut second = region();
        second.restore(state.clone()).unwrap();
        assert_eq!(second.save(), state);
        assert_eq!(second.plugged(), 6 * BLOCK_SIZE);
        let mut small = Region::new(BASE..at(8));
        assert!(small.restore(state).is_none());
        assert_eq!(small.plugged(), 0);
        let inside_out = Range { start: 5, end: 4 };
        for plugged in [inside_out, 0..11, 10..usize::MAX] {
            let state = RegionState {
                requested: 0,
                plugged: vec![plugged],
            };
            assert!(region().restore(state).is_none());
        }
    }

    proptest! {
        /// The count of plugged blocks is that of the map, and never grows beyond what was asked for at the time.
        #[test]
        fn no_request_breaks_the_count(
            requests in prop::collection::vec((0..4u8, 0..12u64, 0..12u16, 0..12u64), 0..60),
        ) {
            let mut region = region();
            for (kind, block, count, size) in requests {
                let before = region.plugged();
                match kind {
                    0 => {
                        region.request(size * BLOCK_SIZE);
                    }
                    1 => {
                        region.plug(at(block), count);
                        prop_assert!(region.plugged() <= before.max(region.requested()));
                    }
                    2 => {
                        region.unplug(at(block), count, |_| ());
                    }
                    _ => {
                        region.state(at(block), count);
                    }
                }
                let used = region.plugged.iter().filter(|used| **used).count() as u64;
                prop_assert_eq!(used * BLOCK_SIZE, region.plugged());
                let state = region.save();
                let mut other = super::tests::region();
                prop_assert!(other.restore(state.clone()).is_some());
                prop_assert_eq!(other.save(), state);
            }
        }
    }
}
