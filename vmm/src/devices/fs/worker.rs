//! The active device: hands FUSE requests to the library, and makes sure that each chain is worth handing over before,
//! and answered after.

use std::fmt;
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{InHeader, Opcode, OutHeader};
use fuse_backend_rs::api::filesystem::FileSystem;
use fuse_backend_rs::api::server::{MAX_BUFFER_SIZE, Server};
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use vm_memory::ByteValued;

use super::device::{FsError, HIPRIO_QUEUE};
use super::metrics::FsMetrics;
use super::share::Share;
use crate::virtio::ActiveQueue;
use crate::virtio::queue::{Chain, ChainError, Virtqueue};
use crate::virtio::worker::{Poll, Serve};

/// Most bytes that a request, or an answer, may have: the payload that is agreed on, and headers. Memory for an answer is
/// allocated by the room that the chain offers.
const MAX_MESSAGE: usize = MAX_BUFFER_SIZE as usize + 8192;

/// What exists only while active.
pub(super) struct FsWorker {
    hiprio: Virtqueue,
    requests: Virtqueue,
    server: Server<Arc<Share>>,
    share: Arc<Share>,
    metrics: Arc<FsMetrics>,
}

impl fmt::Debug for FsWorker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FsWorker").finish_non_exhaustive()
    }
}

/// Why one chain is returned unserved.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    #[error("malformed chain")]
    Chain(#[from] ChainError),
    #[error("message of more than {MAX_MESSAGE} bytes")]
    TooLong,
    #[error("no FUSE header")]
    NoHeader,
    #[error("descriptors changed while they were read")]
    Changed(#[source] fuse_backend_rs::transport::Error),
}

impl FsWorker {
    pub(super) fn new(
        hiprio: Virtqueue,
        requests: Virtqueue,
        share: Arc<Share>,
        metrics: Arc<FsMetrics>,
    ) -> Self {
        Self {
            hiprio,
            requests,
            server: Server::new(Arc::clone(&share)),
            share,
            metrics,
        }
    }

    pub(super) fn into_queues(self) -> Vec<ActiveQueue> {
        vec![self.hiprio.into_active(), self.requests.into_active()]
    }
}

impl Serve for FsWorker {
    type Error = FsError;

    fn queues(&self) -> Vec<&Virtqueue> {
        vec![&self.hiprio, &self.requests]
    }

    fn kicked(&mut self, index: u16, _poll: &Poll) -> Result<(), FsError> {
        let Self {
            hiprio,
            requests,
            server,
            metrics,
            ..
        } = self;
        let queue = if index == HIPRIO_QUEUE {
            hiprio
        } else {
            requests
        };
        queue.drain(|chain| {
            answer(chain, server, metrics).unwrap_or_else(|err| {
                metrics.bad_chains.inc();
                log::debug!("file system request refused: {err}");
                0
            })
        })?;
        Ok(())
    }

    /// Closes all that the guest had open.
    fn reset(&mut self) {
        self.share.destroy();
    }
}

fn answer(
    chain: Chain<'_>,
    server: &Server<Arc<Share>>,
    metrics: &FsMetrics,
) -> Result<u32, RequestError> {
    let descriptors = chain.descriptors();
    let memory = chain.memory();
    let (mut request, mut room) = chain.buffers()?;
    if request.len() > MAX_MESSAGE || room.len() > MAX_MESSAGE {
        return Err(RequestError::TooLong);
    }
    let mut raw = [0; size_of::<InHeader>()];
    if request.read(&mut raw) < raw.len() {
        return Err(RequestError::NoHeader);
    }
    let header = InHeader::from_slice(&raw)
        .copied()
        .ok_or(RequestError::NoHeader)?;

    // The library walks the chain again and may find another one, if the guest changes it meanwhile. It checks what it finds,
    // but allocates up to the length of that.
    let reader = Reader::from_descriptor_chain(memory, descriptors.clone())
        .map_err(RequestError::Changed)?;
    let writer = VirtioFsWriter::new(memory, descriptors).map_err(RequestError::Changed)?;
    if reader.available_bytes() > MAX_MESSAGE || writer.available_bytes() > MAX_MESSAGE {
        return Err(RequestError::TooLong);
    }
    metrics.requests.inc();
    match server.handle_message(reader, Writer::VirtioFs(writer), None, None) {
        Ok(written) => Ok(u32::try_from(written).unwrap_or(u32::MAX)),
        Err(err) => {
            metrics.bad_requests.inc();
            log::debug!("bad file system request: {err:?}");
            if !expects_answer(header.opcode) {
                return Ok(0);
            }
            // Without this the guest's caller would wait for ever.
            let refusal = OutHeader {
                len: u32::try_from(size_of::<OutHeader>()).expect("a header is short"),
                error: -libc::EIO,
                unique: header.unique,
            };
            let written = room.write(refusal.as_slice());
            Ok(u32::try_from(written).expect("a header is short"))
        }
    }
}

fn expects_answer(opcode: u32) -> bool {
    [Opcode::Forget, Opcode::BatchForget, Opcode::Interrupt]
        .iter()
        .all(|silent| *silent as u32 != opcode)
}
