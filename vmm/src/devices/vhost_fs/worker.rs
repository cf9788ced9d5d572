//! The active device: doorbells and interrupts pass between KVM and the server, and no request passes this thread. What is left
//! to it is to tell the server where everything is, to take the queues back, and to notice when the server is gone.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::server::{Server, ServerError};
use crate::control::ExitReason;
use crate::end::End;
use crate::error::chain;
use crate::virtio::ActiveQueue;
use crate::virtio::queue::Virtqueue;
use crate::virtio::worker::{Poll, Serve};

/// The server's socket.
const SOCKET: u64 = 0;

/// A queue, and the eventfd that interrupts its driver.
#[derive(Debug)]
pub(super) struct Ring {
    pub(super) active: ActiveQueue,
    pub(super) call: EventFd,
}

/// What exists only while active.
#[derive(Debug)]
pub(super) struct FrontEnd {
    pub(super) server: Server,
    pub(super) memory: GuestMemoryMmap,
    /// What was negotiated with the driver.
    pub(super) features: u64,
    pub(super) rings: Vec<Ring>,
    pub(super) tag: String,
    /// Of the VM: what a guest could do without its files is nothing.
    pub(super) end: Arc<End>,
}

impl FrontEnd {
    pub(super) fn into_queues(self) -> impl Iterator<Item = ActiveQueue> {
        self.rings.into_iter().map(|ring| ring.active)
    }

    fn begin(&self, poll: &Poll) -> Result<(), ServerError> {
        poll.add(&self.server, SOCKET, EventSet::READ_HANG_UP)
            .map_err(ServerError::Poll)?;
        self.server.set_up(self.features, &self.memory)?;
        for ring in &self.rings {
            self.server.start(&ring.active, &ring.call)?;
            // A kick may have been lost while nobody served.
            ring.active.kick.write(1).map_err(ServerError::Start)?;
        }
        Ok(())
    }

    /// Ends the VM.
    fn fail(&self, err: &ServerError) {
        self.end.report(ExitReason::FileServer {
            tag: self.tag.clone(),
            message: chain(err),
        });
    }
}

impl Serve for FrontEnd {
    type Error = ServerError;

    fn queues(&self) -> Vec<&Virtqueue> {
        Vec::new()
    }

    fn start(&mut self, poll: &Poll) -> Result<(), ServerError> {
        self.begin(poll).inspect_err(|err| self.fail(err))
    }

    fn kicked(&mut self, _index: u16, _poll: &Poll) -> Result<(), ServerError> {
        Ok(())
    }

    fn ready(&mut self, _token: u64, _events: EventSet, _poll: &Poll) -> Result<(), ServerError> {
        self.fail(&ServerError::Gone);
        Err(ServerError::Gone)
    }

    fn stop(&mut self) {
        for ring in &mut self.rings {
            let ActiveQueue { index, queue, .. } = &mut ring.active;
            match self.server.stop(*index) {
                Ok(next_available) => queue.set_next_avail(next_available),
                Err(err) => {
                    log::warn!("the file server of {:?}: {}", self.tag, chain(&err));
                    return;
                }
            }
            // What it has begun it has answered, and the position is in the ring only.
            match queue.used_idx(&self.memory, Ordering::Acquire) {
                Ok(next_used) => queue.set_next_used(next_used.0),
                Err(err) => log::warn!("the used ring of a queue is gone: {err}"),
            }
        }
    }
}
