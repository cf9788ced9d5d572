//! The active device: hands FUSE requests to the library, and makes sure that each chain is worth handing over before,
//! and answered after.

use std::fmt;
use std::io;
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{InHeader, Opcode, OutHeader};
use fuse_backend_rs::api::filesystem::FileSystem;
use fuse_backend_rs::api::server::{MAX_BUFFER_SIZE, Server};
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use vm_memory::ByteValued;
use vmm_sys_util::epoll::EventSet;

use super::device::{FsError, HIPRIO_QUEUE};
use super::metrics::FsMetrics;
use super::share::Share;
use crate::virtio::ActiveQueue;
use crate::virtio::queue::{Chain, ChainError, Virtqueue, Writable};
use crate::virtio::worker::{Poll, Serve};

/// Most bytes that a request, or an answer, may have: the payload that is agreed on, and headers. Memory for an answer is
/// allocated by the room that the chain offers.
const MAX_MESSAGE: usize = MAX_BUFFER_SIZE as usize + 8192;

/// What the thread waits for beside its queues.
const HOST_EVENTS: u64 = 0;

/// What exists only while active.
pub(super) struct FsWorker {
    queues: Vec<Virtqueue>,
    server: Arc<Server<Arc<Share>>>,
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
        queues: Vec<Virtqueue>,
        server: Arc<Server<Arc<Share>>>,
        share: Arc<Share>,
        metrics: Arc<FsMetrics>,
    ) -> Self {
        Self {
            queues,
            server,
            share,
            metrics,
        }
    }

    pub(super) fn into_queues(self) -> Vec<ActiveQueue> {
        let queues = self.queues.into_iter();
        queues.map(Virtqueue::into_active).collect()
    }
}

impl Serve for FsWorker {
    type Error = FsError;

    fn queues(&self) -> Vec<&Virtqueue> {
        self.queues.iter().collect()
    }

    /// The first queue's thread follows what the host does to mapped files as well.
    fn start(&mut self, poll: &Poll) -> Result<(), FsError> {
        let is_first = self
            .queues
            .iter()
            .any(|queue| queue.index() == HIPRIO_QUEUE);
        if let Some(events) = self.share.host_events().filter(|_| is_first) {
            poll.add(events, HOST_EVENTS, EventSet::IN)
                .map_err(FsError::Watch)?;
        }
        Ok(())
    }

    fn ready(&mut self, _token: u64, _events: EventSet, _poll: &Poll) -> Result<(), FsError> {
        self.share.follow_host();
        Ok(())
    }

    fn kicked(&mut self, index: u16, _poll: &Poll) -> Result<(), FsError> {
        let Self {
            queues,
            server,
            share,
            metrics,
        } = self;
        let Some(queue) = queues.iter_mut().find(|queue| queue.index() == index) else {
            return Ok(());
        };
        queue.drain(|chain| {
            answer(chain, server, share, metrics).unwrap_or_else(|err| {
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
    share: &Share,
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

    if !share.may_serve(&header) {
        metrics.requests.inc();
        let refusal = Err(io::Error::from_raw_os_error(libc::EPERM));
        return Ok(write_answer(&mut room, header.unique, refusal));
    }
    if let Some(answer) = share.serve_newer(&header, &mut request) {
        metrics.requests.inc();
        if header.opcode == Opcode::SetupMapping as u32 && answer.is_ok() {
            metrics.mappings.inc();
        }
        return Ok(write_answer(&mut room, header.unique, answer));
    }
    let agreed = share.agree(&header, &mut request);

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
        Ok(written) => {
            if let Some(agreed) = agreed {
                agreed.add_to(&mut room, written);
            }
            Ok(u32::try_from(written).unwrap_or(u32::MAX))
        }
        Err(err) => {
            metrics.bad_requests.inc();
            log::debug!("bad file system request: {err:?}");
            if !expects_answer(header.opcode) {
                return Ok(0);
            }
            // Without this the guest's caller would wait for ever.
            let refusal = Err(io::Error::from_raw_os_error(libc::EIO));
            Ok(write_answer(&mut room, header.unique, refusal))
        }
    }
}

/// Answers the request `unique`. Returns how many bytes that took.
fn write_answer(room: &mut Writable<'_>, unique: u64, answer: io::Result<Vec<u8>>) -> u32 {
    let (error, body) = match answer {
        Ok(body) => (0, body),
        Err(err) => (-err.raw_os_error().unwrap_or(libc::EIO), Vec::new()),
    };
    let header = OutHeader {
        len: u32::try_from(size_of::<OutHeader>() + body.len()).expect("an answer is short"),
        error,
        unique,
    };
    let written = room.write(&[header.as_slice(), &body].concat());
    u32::try_from(written).expect("an answer is short")
}

fn expects_answer(opcode: u32) -> bool {
    [Opcode::Forget, Opcode::BatchForget, Opcode::Interrupt]
        .iter()
        .all(|silent| *silent as u32 != opcode)
}
