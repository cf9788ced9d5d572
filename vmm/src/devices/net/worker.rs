//! The active device, as far as one thread serves it: a pair of queues, and with the first pair also the control queue and
//! the state of the link.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::epoll::EventSet;

use super::control::{Control, Settings};
use super::device::NetError;
use super::pair::Pair;
use super::tap::Tap;
use crate::virtio::queue::Virtqueue;
use crate::virtio::worker::{Poll, Serve};
use crate::virtio::{ActiveQueue, Interrupt};

/// The tap's descriptor.
const TAP: u64 = 0;

/// What the first pair's thread does beside moving packets.
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
    pair: Pair,
    tap: Arc<dyn Tap>,
    leader: Option<Leader>,
}

impl NetWorker {
    pub(super) fn new(pair: Pair, tap: Arc<dyn Tap>, leader: Option<Leader>) -> Self {
        Self { pair, tap, leader }
    }

    /// The queues, and what the driver has set if this was the first pair's.
    pub(super) fn into_parts(self) -> (Vec<ActiveQueue>, Option<Settings>) {
        let mut queues = Vec::from(self.pair.into_queues());
        let settings = self.leader.map(|leader| {
            let (queue, settings) = leader.control.into_parts();
            queues.extend(queue);
            settings
        });
        let queues = queues.into_iter().map(Virtqueue::into_active).collect();
        (queues, settings)
    }
}

impl Serve for NetWorker {
    type Error = NetError;

    fn queues(&self) -> Vec<&Virtqueue> {
        let control = self
            .leader
            .as_ref()
            .and_then(|leader| leader.control.queue());
        self.pair.queues().into_iter().chain(control).collect()
    }

    fn start(&mut self, poll: &Poll) -> Result<(), NetError> {
        if let Some(leader) = &self.leader {
            leader.control.apply().map_err(NetError::Tap)?;
        }
        let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        poll.add(&self.tap.as_fd(), TAP, events)
            .map_err(NetError::Poll)
    }

    fn kicked(&mut self, index: u16, _poll: &Poll) -> Result<(), NetError> {
        let [rx, tx] = self.pair.queues().map(Virtqueue::index);
        if index == rx {
            self.pair.receive()?;
        } else if index == tx {
            self.pair.transmit()?;
        } else if let Some(leader) = &mut self.leader {
            leader.control.serve()?;
        }
        Ok(())
    }

    fn ready(&mut self, _token: u64, events: EventSet, _poll: &Poll) -> Result<(), NetError> {
        // Of the other pairs' taps it may also mean that they are switched off.
        if events.intersects(EventSet::ERROR | EventSet::HANG_UP)
            && let Some(leader) = &self.leader
            && leader.link_up.swap(false, Ordering::AcqRel)
        {
            log::warn!("the tap of a network device is gone");
            leader.interrupt.config_change();
        }
        self.pair.tap_ready(events)?;
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(leader) = &self.leader
            && let Err(err) = leader.control.reset()
        {
            log::debug!("the tap cannot be reset: {err}");
        }
    }
}
