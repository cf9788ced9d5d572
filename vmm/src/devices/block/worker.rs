//! The active device: one request after the other, straight between the disk and the guest's memory.

use std::io;
use std::sync::Arc;

use super::device::BlockError;
use super::disk::{Storage, is_unsupported};
use super::metrics::BlockMetrics;
use super::request::{
    self, DISCARD_LIMITS, ID_LEN, Operation, Request, RequestError, Status, ZEROES_LIMITS,
};
use crate::virtio::ActiveQueue;
use crate::virtio::queue::{Chain, Virtqueue};
use crate::virtio::worker::{Poll, Serve};

/// What the driver and the device have agreed on, and what the disk is.
#[derive(Debug, Clone)]
pub(super) struct Terms {
    /// Sectors of the disk.
    pub(super) capacity: u64,
    pub(super) read_only: bool,
    pub(super) id: [u8; ID_LEN],
    /// Without FLUSH a driver has no way to ask for durability, and so each write has to be durable when it is done
    /// (virtio 1.3, 5.2.6.2).
    pub(super) write_through: bool,
    pub(super) discard: bool,
    pub(super) write_zeroes: bool,
}

/// What exists only while active.
#[derive(Debug)]
pub(super) struct BlockWorker {
    queue: Virtqueue,
    server: Server,
}

/// All but the queue.
#[derive(Debug)]
struct Server {
    storage: Arc<dyn Storage>,
    terms: Terms,
    metrics: Arc<BlockMetrics>,
}

impl BlockWorker {
    pub(super) fn new(
        queue: Virtqueue,
        storage: Arc<dyn Storage>,
        terms: Terms,
        metrics: Arc<BlockMetrics>,
    ) -> Self {
        let server = Server {
            storage,
            terms,
            metrics,
        };
        Self { queue, server }
    }

    pub(super) fn into_queue(self) -> ActiveQueue {
        self.queue.into_active()
    }
}

impl Serve for BlockWorker {
    type Error = BlockError;

    fn queues(&self) -> Vec<&Virtqueue> {
        vec![&self.queue]
    }

    fn kicked(&mut self, _index: u16, _poll: &Poll) -> Result<(), BlockError> {
        let Self { queue, server } = self;
        queue.drain(|chain| {
            server.answer(chain).unwrap_or_else(|err| {
                server.metrics.bad_chains.inc();
                log::debug!("block request refused: {err}");
                0
            })
        })?;
        Ok(())
    }
}

impl Server {
    /// Serves a request and writes its status; returns the number of bytes written from the start of the room on.
    fn answer(&self, chain: Chain<'_>) -> Result<u32, RequestError> {
        let Request {
            operation,
            mut status,
            room_len,
        } = Request::parse(chain)?;
        let filled = self.serve(operation);
        let code = match &filled {
            Ok(_) => Status::Ok,
            Err(status) => {
                self.metrics.errors.inc();
                *status
            }
        };
        status.write(&[code as u8]);
        // The status is the last byte of the room, which counts only if what is before it was written too.
        let written = match filled {
            Ok(filled) if filled < room_len => filled,
            Err(_) if room_len > 0 => 0,
            _ => room_len + 1,
        };
        Ok(u32::try_from(written).unwrap_or(u32::MAX))
    }

    /// Returns how many bytes of the room were filled.
    fn serve(&self, operation: Operation<'_>) -> Result<usize, Status> {
        match operation {
            Operation::Read { sector, room } => {
                let len = room.len();
                let range = request::range(sector, len as u64, self.terms.capacity)?;
                self.storage.read(room, range.offset).map_err(failed)?;
                self.metrics.reads.inc();
                self.metrics.read_bytes.add_len(len);
                Ok(len)
            }
            Operation::Write { sector, data } => {
                self.check_writable()?;
                let len = data.len();
                let range = request::range(sector, len as u64, self.terms.capacity)?;
                self.storage.write(data, range.offset).map_err(failed)?;
                self.write_through()?;
                self.metrics.writes.inc();
                self.metrics.written_bytes.add_len(len);
                Ok(0)
            }
            Operation::Flush => {
                self.storage.flush().map_err(failed)?;
                self.metrics.flushes.inc();
                Ok(0)
            }
            Operation::GetId { mut room } => Ok(room.write(&self.terms.id)),
            Operation::Discard { ranges } if self.terms.discard => {
                self.check_writable()?;
                for range in request::ranges(ranges, DISCARD_LIMITS, self.terms.capacity)? {
                    self.storage
                        .discard(range.offset, range.len)
                        .map_err(failed)?;
                }
                self.metrics.discards.inc();
                Ok(0)
            }
            Operation::WriteZeroes { ranges } if self.terms.write_zeroes => {
                self.check_writable()?;
                for range in request::ranges(ranges, ZEROES_LIMITS, self.terms.capacity)? {
                    self.storage
                        .write_zeroes(range.offset, range.len, range.unmap)
                        .map_err(failed)?;
                }
                self.write_through()?;
                self.metrics.discards.inc();
                Ok(0)
            }
            Operation::Discard { .. } | Operation::WriteZeroes { .. } | Operation::Unknown => {
                Err(Status::Unsupported)
            }
        }
    }

    fn check_writable(&self) -> Result<(), Status> {
        if self.terms.read_only {
            return Err(Status::IoError);
        }
        Ok(())
    }

    fn write_through(&self) -> Result<(), Status> {
        if self.terms.write_through {
            self.storage.flush().map_err(failed)?;
        }
        Ok(())
    }
}

/// The status for an error of the host, which the guest may provoke at will, and which is therefore counted, not logged
/// for all to see.
#[expect(clippy::needless_pass_by_value, reason = "map_err hands it over")]
fn failed(err: io::Error) -> Status {
    log::debug!("block request failed: {err}");
    if is_unsupported(&err) {
        Status::Unsupported
    } else {
        Status::IoError
    }
}
