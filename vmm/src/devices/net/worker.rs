//! The active device, as far as one thread serves it: a pair of queues, or all that the host's kernel serves; and on the
//! first thread also the control queue and the state of the link.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::epoll::EventSet;

use super::control::{Control, Settings};
use super::device::NetError;
use super::pair::Pair;
use super::tap::Tap;
use super::vhost::{KernelPair, VhostError};
use crate::virtio::queue::Virtqueue;
use crate::virtio::worker::{Poll, Serve};
use crate::virtio::{ActiveQueue, Interrupt};

/// The tap's descriptor.
const TAP: u64 = 0;
/// What vhost-net gives up by.
const VHOST_ERROR: u64 = 1;

/// Who moves the packets.
#[derive(Debug)]
pub(super) enum Path {
    /// The device's thread.
    Worker(Pair),
    /// The host's kernel (vhost-net), for all pairs.
    Kernel(Vec<KernelPair>),
}

/// What the first thread does beside moving packets.
#[derive(Debug)]
pub(super) struct Leader {
    pub(super) control: Control,
    /// Shared with the configuration space.
    pub(super) link_up: Arc<AtomicBool>,
    pub(super) interrupt: Arc<dyn Interrupt>,
}

/// What exists only while active.
#[derive(Debug)]
pub(super) struct NetWorker {
    path: Path,
    /// The tap of this thread's first pair.
    tap: Arc<dyn Tap>,
    leader: Option<Leader>,
}

impl NetWorker {
    pub(super) fn new(path: Path, tap: Arc<dyn Tap>, leader: Option<Leader>) -> Self {
        Self { path, tap, leader }
    }

    /// The queues, and what the driver has set if this was the first thread's.
    pub(super) fn into_parts(self) -> (Vec<ActiveQueue>, Option<Settings>) {
        let mut queues: Vec<_> = match self.path {
            Path::Worker(pair) => pair.into_queues().map(Virtqueue::into_active).into(),
            Path::Kernel(pairs) => pairs
                .into_iter()
                .flat_map(KernelPair::into_queues)
                .collect(),
        };
        let settings = self.leader.map(|leader| {
            let (queue, settings) = leader.control.into_parts();
            queues.extend(queue.map(Virtqueue::into_active));
            settings
        });
        (queues, settings)
    }
}

impl Serve for NetWorker {
    type Error = NetError;

    fn queues(&self) -> Vec<&Virtqueue> {
        let mut queues = match &self.path {
            Path::Worker(pair) => Vec::from(pair.queues()),
            Path::Kernel(_) => Vec::new(),
        };
        queues.extend(
            self.leader
                .as_ref()
                .and_then(|leader| leader.control.queue()),
        );
        queues
    }

    fn start(&mut self, poll: &Poll) -> Result<(), NetError> {
        let events = match &self.path {
            Path::Worker(_) => EventSet::IN | EventSet::OUT,
            Path::Kernel(pairs) => {
                for pair in pairs {
                    poll.add(pair.error(), VHOST_ERROR, EventSet::IN)
                        .map_err(NetError::Poll)?;
                    pair.start()?;
                }
                // That the tap is gone is told unasked.
                EventSet::empty()
            }
        };
        // After vhost-net has all queues of the tap: it takes none that is switched off.
        if let Some(leader) = &self.leader {
            leader.control.apply().map_err(NetError::Tap)?;
        }
        poll.add(&self.tap.as_fd(), TAP, events | EventSet::EDGE_TRIGGERED)
            .map_err(NetError::Poll)
    }

    fn kicked(&mut self, index: u16, _poll: &Poll) -> Result<(), NetError> {
        if let Path::Worker(pair) = &mut self.path {
            let [rx, tx] = pair.queues().map(Virtqueue::index);
            if index == rx {
                return Ok(pair.receive()?);
            }
            if index == tx {
                return Ok(pair.transmit()?);
            }
        }
        if let Some(leader) = &mut self.leader {
            leader.control.serve()?;
        }
        Ok(())
    }

    fn ready(&mut self, token: u64, events: EventSet, _poll: &Poll) -> Result<(), NetError> {
        if token == VHOST_ERROR {
            return Err(VhostError::Rings.into());
        }
        // Of the other pairs' taps it may also mean that they are switched off.
        if events.intersects(EventSet::ERROR | EventSet::HANG_UP)
            && let Some(leader) = &self.leader
            && leader.link_up.swap(false, Ordering::AcqRel)
        {
            log::warn!("the tap of a network device is gone");
            leader.interrupt.config_change();
        }
        match &mut self.path {
            Path::Worker(pair) => Ok(pair.tap_ready(events)?),
            Path::Kernel(_) => Ok(()),
        }
    }

    fn stop(&mut self) {
        if let Path::Kernel(pairs) = &mut self.path {
            pairs.iter_mut().for_each(KernelPair::stop);
        }
    }

    fn reset(&mut self) {
        if let Some(leader) = &self.leader
            && let Err(err) = leader.control.reset()
        {
            log::debug!("the tap cannot be reset: {err}");
        }
    }
}
