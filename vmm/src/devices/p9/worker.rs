//! The active device: takes each chain's request out, has it served, and puts the answer into the chain's room.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::device::P9Error;
use super::message::{Header, SHORTEST_ROOM};
use super::metrics::P9Metrics;
use super::server::{MAX_MSIZE, Reply, Server};
use crate::virtio::ActiveQueue;
use crate::virtio::queue::{Chain, ChainError, Virtqueue, Writable};
use crate::virtio::worker::{Poll, Serve};

/// What exists only while active.
#[derive(Debug)]
pub(super) struct P9Worker {
    requests: Virtqueue,
    server: Arc<Mutex<Server>>,
    metrics: Arc<P9Metrics>,
}

/// Why one chain is returned unserved.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    #[error("malformed chain")]
    Chain(#[from] ChainError),
    #[error("message of more than {MAX_MSIZE} bytes")]
    TooLong,
    #[error("no 9P header")]
    NoHeader,
    #[error("no room for an answer")]
    NoRoom,
}

impl P9Worker {
    pub(super) fn new(
        requests: Virtqueue,
        server: Arc<Mutex<Server>>,
        metrics: Arc<P9Metrics>,
    ) -> Self {
        Self {
            requests,
            server,
            metrics,
        }
    }

    pub(super) fn into_queues(self) -> Vec<ActiveQueue> {
        vec![self.requests.into_active()]
    }
}

/// Nobody waits for it while the device serves: whoever saves the device has paused it.
pub(super) fn lock(server: &Mutex<Server>) -> MutexGuard<'_, Server> {
    server.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Serve for P9Worker {
    type Error = P9Error;

    fn queues(&self) -> Vec<&Virtqueue> {
        vec![&self.requests]
    }

    fn kicked(&mut self, _index: u16, _poll: &Poll) -> Result<(), P9Error> {
        let mut server = lock(&self.server);
        let metrics = &self.metrics;
        self.requests.drain(|chain| {
            let written = answer(chain, &mut server, metrics).unwrap_or_else(|err| {
                metrics.bad_chains.inc();
                log::debug!("9P request refused: {err}");
                0
            });
            count(&server, metrics);
            written
        })?;
        Ok(())
    }

    /// Closes all that the guest had open.
    fn reset(&mut self) {
        let mut server = lock(&self.server);
        server.reset();
        count(&server, &self.metrics);
    }
}

fn count(server: &Server, metrics: &P9Metrics) {
    let [fids, open_files] = [server.fids(), server.open_files()].map(|count| count as u64);
    metrics.fids.store(fids, Ordering::Relaxed);
    metrics.open_files.store(open_files, Ordering::Relaxed);
}

fn answer(chain: Chain<'_>, server: &mut Server, metrics: &P9Metrics) -> Result<u32, RequestError> {
    let (mut request, mut room) = chain.buffers()?;
    if request.len() > MAX_MSIZE {
        return Err(RequestError::TooLong);
    }
    if room.len() < SHORTEST_ROOM {
        return Err(RequestError::NoRoom);
    }
    let header = Header::take(&mut request).ok_or(RequestError::NoHeader)?;
    metrics.requests.inc();

    let mut front = room.take(SHORTEST_ROOM);
    let reply = header
        .request(&mut request)
        .and_then(|asked| server.serve(asked, request, &mut room));
    let written = reply.and_then(|reply| send(header, &reply, &mut front, &mut room));
    let written = written.unwrap_or_else(|err| {
        metrics.errors.inc();
        let error = header.error(err.raw_os_error().unwrap_or(libc::EIO));
        front.write(error.as_bytes())
    });
    Ok(u32::try_from(written).expect("an answer is at most as long as its room"))
}

/// Puts an answer into its room, of which `front` is what an error would need. Without an effect where it does not fit.
fn send(
    header: Header,
    reply: &Reply,
    front: &mut Writable<'_>,
    room: &mut Writable<'_>,
) -> io::Result<usize> {
    match reply {
        Reply::Data(len) => {
            let count = u32::try_from(*len).expect("at most what was asked for");
            let answer = header.answer(size_of::<u32>() + len).u32(count);
            Ok(front.write(answer.as_bytes()) + len)
        }
        Reply::Body(body) => {
            let answer = header.answer(body.as_bytes().len()).bytes(body.as_bytes());
            let bytes = answer.as_bytes();
            if bytes.len() > front.len() + room.len() {
                return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
            }
            let written = front.write(bytes);
            Ok(written + room.write(&bytes[written..]))
        }
    }
}
