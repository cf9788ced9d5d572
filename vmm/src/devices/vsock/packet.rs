//! The header of a packet (virtio 1.3, 5.10.6), in and out of guest memory.
//!
//! The layout is the virtio-vsock crate's. Its way from a descriptor chain to a packet is not used: it wants the payload
//! in one descriptor, and Linux spreads it over many (MSG_ZEROCOPY, and every large packet from 6.17 on).

use virtio_vsock::packet::{PKT_HEADER_SIZE, VsockPacket};

use crate::virtio::queue::{Readable, Writable};

/// Length of a header in bytes.
pub(super) const HEADER_LEN: usize = PKT_HEADER_SIZE;

/// VIRTIO_VSOCK_TYPE_STREAM.
pub(super) const TYPE_STREAM: u16 = 1;

/// The sender of VIRTIO_VSOCK_OP_SHUTDOWN will not receive any more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// The sender of VIRTIO_VSOCK_OP_SHUTDOWN will not send any more.
pub(super) const SHUTDOWN_SEND: u32 = 2;
/// Both.
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// Operations (virtio 1.3, 5.10.6).
pub(super) mod op {
    pub(in super::super) const REQUEST: u16 = 1;
    pub(in super::super) const RESPONSE: u16 = 2;
    pub(in super::super) const RST: u16 = 3;
    pub(in super::super) const SHUTDOWN: u16 = 4;
    pub(in super::super) const RW: u16 = 5;
    pub(in super::super) const CREDIT_UPDATE: u16 = 6;
    pub(in super::super) const CREDIT_REQUEST: u16 = 7;
}

/// A header, in the machine's byte order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) type_: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// Consumes a header. `None` if the buffers are too short for one.
    pub(super) fn read(from: &mut Readable<'_>) -> Option<Self> {
        let mut raw = [0; HEADER_LEN];
        (from.read(&mut raw) == HEADER_LEN).then(|| Self::decode(&raw))
    }

    /// Writes the header into room that is [`HEADER_LEN`] long.
    pub(super) fn write(&self, mut to: Writable<'_>) {
        to.write(&self.encode());
    }

    pub(super) fn decode(raw: &[u8; HEADER_LEN]) -> Self {
        let mut scratch = [0; HEADER_LEN];
        // SAFETY: `scratch` outlives `packet`, which does not leave this function, and nobody else accesses it.
        let packet = unsafe { VsockPacket::new(&mut scratch, None) };
        let mut packet = packet.expect("the slice has a header's length");
        packet
            .set_header_from_raw(raw)
            .expect("the slice has a header's length");
        Self {
            src_cid: packet.src_cid(),
            dst_cid: packet.dst_cid(),
            src_port: packet.src_port(),
            dst_port: packet.dst_port(),
            len: packet.len(),
            type_: packet.type_(),
            op: packet.op(),
            flags: packet.flags(),
            buf_alloc: packet.buf_alloc(),
            fwd_cnt: packet.fwd_cnt(),
        }
    }

    pub(super) fn encode(&self) -> [u8; HEADER_LEN] {
        let mut raw = [0; HEADER_LEN];
        // SAFETY: `raw` outlives `packet`, which does not leave this function, and is not accessed before its end.
        let packet = unsafe { VsockPacket::new(&mut raw, None) };
        packet
            .expect("the slice has a header's length")
            .set_src_cid(self.src_cid)
            .set_dst_cid(self.dst_cid)
            .set_src_port(self.src_port)
            .set_dst_port(self.dst_port)
            .set_len(self.len)
            .set_type(self.type_)
            .set_op(self.op)
            .set_flags(self.flags)
            .set_buf_alloc(self.buf_alloc)
            .set_fwd_cnt(self.fwd_cnt);
        raw
    }

    /// The RST that answers this packet.
    pub(super) fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            // The type of the answer is that of the question, or a driver does not take it.
            type_: self.type_,
            op: op::RST,
            ..Self::default()
        }
    }
}
