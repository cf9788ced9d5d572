//! The configuration space of one function: bytes, and which of their bits the guest may write (PCI 3.0, 6.1).

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::layout::PCI_WINDOW_32;

/// Bytes of configuration space; the rest of the 4 KiB of ECAM reads as zero: no extended capability.
const SIZE: usize = 256;

const VENDOR_ID: usize = 0x00;
const DEVICE_ID: usize = 0x02;
pub(super) const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
pub(super) const BAR0: usize = 0x10;
const BAR2: usize = 0x18;
const SUBSYSTEM_VENDOR_ID: usize = 0x2c;
const SUBSYSTEM_ID: usize = 0x2e;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const FIRST_CAPABILITY: usize = 0x40;

/// The function answers at the addresses of its BARs.
const COMMAND_MEMORY: u16 = 1 << 1;
/// Memory space, bus mastering, no INTx.
const COMMAND_WRITABLE: u16 = COMMAND_MEMORY | 1 << 2 | 1 << 10;
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Of a BAR: it has 64 bits, and reading has no side effects.
const BAR_64_PREFETCHABLE: u64 = 0b1100;

/// Who the function says it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Identity {
    pub(super) vendor: u16,
    pub(super) device: u16,
    pub(super) revision: u8,
    /// Base class, sub-class, programming interface.
    pub(super) class: [u8; 3],
    pub(super) subsystem: u16,
}

/// The registers.
#[derive(Debug)]
pub(super) struct ConfigSpace {
    bytes: [u8; SIZE],
    /// Bits that the guest may change.
    writable: [u8; SIZE],
    last_capability: usize,
    end: usize,
}

impl ConfigSpace {
    pub(super) fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            last_capability: CAPABILITIES,
            end: FIRST_CAPABILITY,
        };
        space.set_u16(VENDOR_ID, identity.vendor);
        space.set_u16(DEVICE_ID, identity.device);
        space.set_u16(STATUS, STATUS_CAPABILITIES);
        space.bytes[REVISION] = identity.revision;
        let [base, sub, interface] = identity.class;
        space.bytes[CLASS..CLASS + 3].copy_from_slice(&[interface, sub, base]);
        space.set_u16(SUBSYSTEM_VENDOR_ID, identity.vendor);
        space.set_u16(SUBSYSTEM_ID, identity.subsystem);
        space.writable[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_WRITABLE.to_le_bytes());
        space.writable[INTERRUPT_LINE] = 0xff;
        space
    }

    /// Makes BAR 0 a window of `size` bytes (a power of two) in 32-bit memory, placed at `address`. The guest finds the
    /// size as PCI wants it: the low bits of the register cannot be written.
    pub(super) fn set_memory_bar(&mut self, address: u32, size: u32) {
        debug_assert!(size.is_power_of_two() && address.is_multiple_of(size));
        self.bytes[BAR0..BAR0 + 4].copy_from_slice(&address.to_le_bytes());
        self.writable[BAR0..BAR0 + 4].copy_from_slice(&(!(size - 1)).to_le_bytes());
    }

    /// Makes BARs 2 and 3 a window of `size` bytes (a power of two) in 64-bit memory that may be prefetched, placed at
    /// `address`.
    pub(super) fn set_memory_bar_64(&mut self, address: u64, size: u64) {
        debug_assert!(size.is_power_of_two() && address.is_multiple_of(size));
        let bar = BAR2..BAR2 + size_of::<u64>();
        self.bytes[bar.clone()].copy_from_slice(&(address | BAR_64_PREFETCHABLE).to_le_bytes());
        self.writable[bar].copy_from_slice(&(!(size - 1)).to_le_bytes());
    }

    /// Adds a capability: `body` is what follows the id and the pointer to the next, `writable` its bits that the guest may
    /// change (missing bytes: none). Returns its offset.
    pub(super) fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.end;
        self.bytes[self.last_capability] = u8::try_from(at).expect("256 bytes");
        self.last_capability = at + 1;
        self.bytes[at] = id;
        self.bytes[at + 2..at + 2 + body.len()].copy_from_slice(body);
        self.writable[at + 2..at + 2 + writable.len()].copy_from_slice(writable);
        self.end = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// A load of the guest.
    pub(super) fn read(&self, offset: usize, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// A store of the guest.
    pub(super) fn write(&mut self, offset: usize, data: &[u8]) {
        for (at, value) in (offset..).zip(data) {
            if let (Some(byte), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = *byte & !mask | value & mask;
            }
        }
    }

    pub(super) fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    pub(super) fn u32(&self, at: usize) -> u32 {
        u32::from(self.u16(at)) | u32::from(self.u16(at + 2)) << 16
    }

    fn set_u16(&mut self, at: usize, value: u16) {
        self.bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    /// Where BAR 0 lies, if it is switched on.
    pub(super) fn bar_address(&self) -> Option<u64> {
        (self.u16(COMMAND) & COMMAND_MEMORY != 0).then(|| u64::from(self.u32(BAR0)))
    }

    /// A copy of all registers.
    pub(super) fn save(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Takes the writable bits of a copy. `None` if the others differ: then it is a copy of something else.
    pub(super) fn restore(&mut self, bytes: &[u8]) -> Option<()> {
        let same_function = bytes.len() == SIZE
            && bytes
                .iter()
                .zip(self.bytes)
                .zip(self.writable)
                .all(|((saved, own), writable)| (saved ^ own) & !writable == 0);
        same_function.then(|| self.bytes.copy_from_slice(bytes))
    }
}

/// Where a function's BAR is decoded: read at each access without a lock, changed when the guest programs the BAR.
#[derive(Debug)]
pub(super) struct Window {
    size: u64,
    /// [`Self::OFF`] while the function answers nowhere.
    base: AtomicU64,
}

impl Window {
    const OFF: u64 = u64::MAX;

    pub(super) fn new(size: u64) -> Self {
        Self {
            size,
            base: AtomicU64::new(Self::OFF),
        }
    }

    /// Moves it, and returns where it is decoded now: nowhere, if the host bridge does not forward those addresses.
    pub(super) fn place(&self, address: Option<u64>) -> Option<u64> {
        let Range { start, end } = PCI_WINDOW_32;
        let base = address
            .filter(|address| *address >= start && end.saturating_sub(*address) >= self.size);
        self.base
            .store(base.unwrap_or(Self::OFF), Ordering::Relaxed);
        base
    }

    /// The offset of an access that lies inside.
    pub(super) fn offset_of(&self, address: u64, len: usize) -> Option<u64> {
        let base = self.base.load(Ordering::Relaxed);
        if base == Self::OFF {
            return None;
        }
        let offset = address.checked_sub(base)?;
        let end = offset.checked_add(u64::try_from(len).ok()?)?;
        (end <= self.size).then_some(offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1044,
            revision: 1,
            class: [0xff, 0, 0],
            subsystem: 0x40,
        });
        space.set_memory_bar(0xc000_8000, 0x8000);
        space
    }

    fn read_u32(space: &ConfigSpace, at: usize) -> u32 {
        let mut data = [0; 4];
        space.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn identity_is_read_only() {
        let mut space = space();
        space.write(0, &[0xff; 4]);
        assert_eq!(read_u32(&space, 0), 0x1044_1af4);
        assert_eq!(read_u32(&space, 8), 0xff00_0001);
    }

    #[test]
    fn a_bar_tells_its_size_and_keeps_its_address() {
        let mut space = space();
        space.write(BAR0, &[0xff; 4]);
        assert_eq!(read_u32(&space, BAR0), 0xffff_8000);
        space.write(BAR0, &0xd000_1234u32.to_le_bytes());
        assert_eq!(read_u32(&space, BAR0), 0xd000_0000);
        assert_eq!(space.bar_address(), None, "memory space is off");
        space.write(COMMAND, &[0xff, 0xff]);
        assert_eq!(space.u16(COMMAND), COMMAND_WRITABLE);
        assert_eq!(space.bar_address(), Some(0xd000_0000));
        assert_eq!(read_u32(&space, BAR0 + 4), 0, "no other BAR");
    }

    #[test]
    fn a_bar_of_64_bits_tells_its_size_and_kind() {
        let mut space = space();
        space.set_memory_bar_64(0x10_8000_0000, 1 << 30);
        assert_eq!(read_u32(&space, BAR2), 0x8000_000c);
        assert_eq!(read_u32(&space, BAR2 + 4), 0x10);
        space.write(BAR2, &[0xff; 4]);
        space.write(BAR2 + 4, &[0xff; 4]);
        assert_eq!(read_u32(&space, BAR2), 0xc000_000c);
        assert_eq!(read_u32(&space, BAR2 + 4), 0xffff_ffff);
        assert_eq!(read_u32(&space, BAR0), 0xc000_8000, "the other one stays");
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = space();
        let first = space.add_capability(9, &[4, 0xaa], &[]);
        let second = space.add_capability(0x11, &[0, 0, 1], &[0xff]);
        assert_eq!(space.bytes[CAPABILITIES] as usize, first);
        assert_eq!(space.bytes[first + 1] as usize, second);
        assert_eq!(space.bytes[second + 1], 0);
        assert_eq!(second % 4, 0);
        space.write(second, &[0xff; 5]);
        assert_eq!(space.bytes[second..second + 5], [0x11, 0, 0xff, 0, 1]);
    }

    #[test]
    fn accesses_at_the_end_do_no_harm() {
        let mut space = space();
        for offset in [0xfd, 0x100, 0xfff] {
            let mut data = [0xee; 8];
            space.read(offset, &mut data[..1]);
            space.write(offset, &data[..1]);
        }
        let mut data = [0xee; 8];
        space.read(0xfc, &mut data);
        assert_eq!(data[4..], [0; 4]);
        space.write(0xfc, &data);
    }

    #[test]
    fn a_copy_restores_only_the_same_function() {
        let mut space = space();
        space.write(COMMAND, &[6, 0]);
        let saved = space.save();
        let mut other = self::space();
        other.restore(&saved).unwrap();
        assert_eq!(other.save(), saved);
        let mut wrong = saved.clone();
        wrong[DEVICE_ID] ^= 1;
        assert!(other.restore(&wrong).is_none());
        assert!(other.restore(&saved[1..]).is_none());
    }

    #[test]
    fn a_window_outside_of_the_host_bridge_is_not_decoded() {
        let window = Window::new(0x8000);
        for address in [
            0,
            0x10_0000,
            0xfee0_0000,
            0xdfff_f000,
            0xe000_0000,
            u64::MAX,
        ] {
            assert_eq!(window.place(Some(address)), None, "{address:#x}");
            assert_eq!(window.offset_of(address, 4), None);
        }
        assert_eq!(window.place(Some(0xdfff_8000)), Some(0xdfff_8000));
        assert_eq!(window.offset_of(0xdfff_8000, 4), Some(0));
        assert_eq!(window.offset_of(0xdfff_fffc, 4), Some(0x7ffc));
        assert_eq!(window.offset_of(0xdfff_fffd, 4), None);
        window.place(None);
        assert_eq!(window.offset_of(0xdfff_8000, 4), None);
        assert_eq!(window.offset_of(u64::MAX, 4), None);
    }
}
