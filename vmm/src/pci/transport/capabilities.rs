//! How a driver finds the structures of the transport: the capabilities in configuration space (virtio 1.3, 4.1.4).

use super::{
    COMMON, COMMON_LEN, DEVICE, ISR, ISR_LEN, MSIX_PENDING, MSIX_TABLE, NOTIFY, NOTIFY_MULTIPLIER,
    PAGE,
};
use crate::pci::config_space::ConfigSpace;
use crate::pci::msix;

/// Vendor-specific capability, of which virtio has six kinds (4.1.4).
const CAPABILITY_ID: u8 = 0x09;
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_PCI: u8 = 5;
const CAP_SHARED_MEMORY: u8 = 8;
/// Where the window of the PCI configuration access capability has its BAR, offset, length and data.
pub(super) const PCI_CAP_BAR: usize = 4;
pub(super) const PCI_CAP_OFFSET: usize = 8;
pub(super) const PCI_CAP_LENGTH: usize = 12;
pub(super) const PCI_CAP_DATA: usize = 16;

/// Adds the capability of MSI-X and returns its offset.
pub(super) fn add_msix(config: &mut ConfigSpace, vectors: usize) -> usize {
    let last = u16::try_from(vectors - 1).expect("a few vectors");
    // The low bits of both offsets name the BAR, which is 0.
    let mut body = last.to_le_bytes().to_vec();
    body.extend(MSIX_TABLE.to_le_bytes().iter().take(4));
    body.extend(MSIX_PENDING.to_le_bytes().iter().take(4));
    let writable = (msix::CONTROL_ENABLE | msix::CONTROL_FUNCTION_MASK).to_le_bytes();
    config.add_capability(msix::CAPABILITY_ID, &body, &writable)
}

/// Adds the five structures and returns the offset of the last, the configuration access window.
pub(super) fn add_virtio(config: &mut ConfigSpace, queues: usize) -> usize {
    let notify_len = u32::try_from(queues).expect("a few queues") * NOTIFY_MULTIPLIER;
    let page = u32::try_from(PAGE).expect("a page");
    let mut add = |kind: u8, offset: u64, len: u32, more: &[u8], writable: &[u8]| {
        // Length of the capability, kind, BAR 0, id, padding.
        let cap_len = u8::try_from(16 + more.len()).expect("a few bytes");
        let mut body = vec![cap_len, kind, 0, 0, 0, 0];
        body.extend(offset.to_le_bytes().iter().take(4));
        body.extend(len.to_le_bytes());
        body.extend(more);
        config.add_capability(CAPABILITY_ID, &body, writable)
    };
    add(CAP_COMMON, COMMON, COMMON_LEN, &[], &[]);
    add(
        CAP_NOTIFY,
        NOTIFY,
        notify_len,
        &NOTIFY_MULTIPLIER.to_le_bytes(),
        &[],
    );
    add(CAP_ISR, ISR, ISR_LEN, &[], &[]);
    add(CAP_DEVICE, DEVICE, page, &[], &[]);
    // The driver may write BAR, offset, length and data.
    let mut writable = [0; 18];
    writable[PCI_CAP_BAR - 2] = 0xff;
    writable[PCI_CAP_OFFSET - 2..].fill(0xff);
    add(CAP_PCI, 0, 0, &[0; 4], &writable)
}

/// Adds shared memory region 0, which is all of BAR 2 or its beginning (4.1.4.7).
pub(super) fn add_shared_memory(config: &mut ConfigSpace, len: u64) {
    let (low, high) = (len & 0xffff_ffff, len >> 32);
    // Length of the capability, kind, BAR, id of the region, padding; the offset is zero.
    let mut body = vec![24, CAP_SHARED_MEMORY, 2, 0, 0, 0, 0, 0, 0, 0];
    body.extend(low.to_le_bytes().iter().take(4));
    body.extend([0; 4]);
    body.extend(high.to_le_bytes().iter().take(4));
    config.add_capability(CAPABILITY_ID, &body, &[]);
}
