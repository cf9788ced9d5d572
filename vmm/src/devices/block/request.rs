//! Requests (virtio 1.3, 5.2.6): from a descriptor chain to something checked.

use crate::virtio::queue::{Chain, ChainError, Readable, Writable};

use super::disk::SECTOR;

/// Most ranges in one DISCARD.
pub(super) const MAX_DISCARD_SEGMENTS: u32 = 16;
/// Most ranges in one WRITE_ZEROES; Linux never sends more.
pub(super) const MAX_ZEROES_SEGMENTS: u32 = 1;
/// Most sectors in one range: 4 GiB to give up, which is quick, and 64 MiB to zero, which may have to be written.
pub(super) const MAX_DISCARD_SECTORS: u32 = 8 * 1024 * 1024;
/// See [`MAX_DISCARD_SECTORS`].
pub(super) const MAX_ZEROES_SECTORS: u32 = 128 * 1024;

/// Length of a disk's serial number, as GET_ID answers it.
pub(super) const ID_LEN: usize = 20;

const HEADER_LEN: usize = 16;
const SEGMENT_LEN: usize = 16;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// Of WRITE_ZEROES: the blocks may be given up.
const FLAG_UNMAP: u32 = 1;

/// VIRTIO_BLK_S_*.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// Why a chain is returned unserved: there is nowhere to put a status.
#[derive(Debug, thiserror::Error)]
pub(super) enum RequestError {
    #[error("malformed chain")]
    Chain(#[from] ChainError),
    #[error("request of less than {HEADER_LEN} bytes")]
    NoHeader,
    #[error("no room for the status")]
    NoStatus,
}

/// What the driver asks, before the disk has been asked whether it has that much.
#[derive(Debug)]
pub(super) enum Operation<'m> {
    Read { sector: u64, room: Writable<'m> },
    Write { sector: u64, data: Readable<'m> },
    Flush,
    GetId { room: Writable<'m> },
    Discard { ranges: Readable<'m> },
    WriteZeroes { ranges: Readable<'m> },
    Unknown,
}

/// A request, with where its outcome goes.
#[derive(Debug)]
pub(super) struct Request<'m> {
    pub(super) operation: Operation<'m>,
    pub(super) outcome: Outcome<'m>,
}

/// The byte for the status of a request.
#[derive(Debug)]
pub(super) struct Outcome<'m> {
    status: Writable<'m>,
    /// Bytes before it that the device may write.
    room_len: usize,
}

impl Outcome<'_> {
    /// Writes the status. Returns how many bytes were written from the start of the room on, of which `filled` before.
    pub(super) fn tell(&mut self, filled: Result<usize, Status>) -> u32 {
        let code = filled.err().unwrap_or(Status::Ok);
        self.status.write(&[code as u8]);
        // The status is the last byte of the room, which counts only if what is before it was written too.
        let written = match filled {
            Ok(filled) if filled < self.room_len => filled,
            Err(_) if self.room_len > 0 => 0,
            _ => self.room_len + 1,
        };
        u32::try_from(written).unwrap_or(u32::MAX)
    }
}

impl<'m> Request<'m> {
    pub(super) fn parse(chain: Chain<'m>) -> Result<Self, RequestError> {
        let (mut data, mut status) = chain.buffers()?;
        let mut header = [0; HEADER_LEN];
        if data.read(&mut header) < HEADER_LEN {
            return Err(RequestError::NoHeader);
        }
        let room_len = status.len().checked_sub(1).ok_or(RequestError::NoStatus)?;
        let room = status.take(room_len);
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let operation = match u32::from_le_bytes([k0, k1, k2, k3]) {
            T_IN => Operation::Read { sector, room },
            T_OUT => Operation::Write { sector, data },
            T_FLUSH => Operation::Flush,
            T_GET_ID => Operation::GetId { room },
            T_DISCARD => Operation::Discard { ranges: data },
            T_WRITE_ZEROES => Operation::WriteZeroes { ranges: data },
            _ => Operation::Unknown,
        };
        Ok(Self {
            operation,
            outcome: Outcome { status, room_len },
        })
    }
}

/// A part of the disk, in bytes, that is known to lie on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) len: u64,
    /// Of WRITE_ZEROES.
    pub(super) unmap: bool,
}

/// The part of a disk of `capacity` sectors that starts at `sector` and is `len` bytes long.
pub(super) fn range(sector: u64, len: u64, capacity: u64) -> Result<Range, Status> {
    let sectors = len / SECTOR;
    let end = sector.checked_add(sectors).ok_or(Status::IoError)?;
    if !len.is_multiple_of(SECTOR) || end > capacity {
        return Err(Status::IoError);
    }
    Ok(Range {
        offset: sector.checked_mul(SECTOR).ok_or(Status::IoError)?,
        len,
        unmap: false,
    })
}

/// Limits of the ranges of DISCARD or WRITE_ZEROES.
#[derive(Debug, Clone, Copy)]
pub(super) struct RangeLimits {
    pub(super) segments: u32,
    pub(super) sectors: u32,
    /// Flags that may be set.
    pub(super) flags: u32,
}

/// Limits of DISCARD; a set `unmap` is an error there (virtio 1.3, 5.2.6.2).
pub(super) const DISCARD_LIMITS: RangeLimits = RangeLimits {
    segments: MAX_DISCARD_SEGMENTS,
    sectors: MAX_DISCARD_SECTORS,
    flags: 0,
};

/// Limits of WRITE_ZEROES.
pub(super) const ZEROES_LIMITS: RangeLimits = RangeLimits {
    segments: MAX_ZEROES_SEGMENTS,
    sectors: MAX_ZEROES_SECTORS,
    flags: FLAG_UNMAP,
};

/// Reads and checks all ranges before the first is touched: the request fails as a whole or not.
pub(super) fn ranges(
    mut from: Readable<'_>,
    limits: RangeLimits,
    capacity: u64,
) -> Result<Vec<Range>, Status> {
    let most = usize::try_from(limits.segments).map_err(|_| Status::IoError)? * SEGMENT_LEN;
    if from.is_empty() || !from.len().is_multiple_of(SEGMENT_LEN) || from.len() > most {
        return Err(Status::IoError);
    }
    let mut ranges = Vec::with_capacity(from.len() / SEGMENT_LEN);
    let mut segment = [0; SEGMENT_LEN];
    while from.read(&mut segment) == SEGMENT_LEN {
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = segment;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes(flags);
        if flags & !limits.flags != 0 {
            return Err(Status::Unsupported);
        }
        if sectors > limits.sectors {
            return Err(Status::IoError);
        }
        let checked = range(sector, u64::from(sectors) * SECTOR, capacity)?;
        ranges.push(Range {
            unmap: flags & FLAG_UNMAP != 0,
            ..checked
        });
    }
    Ok(ranges)
}
