//! The thread of a device: one way for all.
//!
//! A [`Worker`] is made with its device, confined at once, and parked. [`Worker::start`] moves what is active (an
//! implementation of [`Serve`]) into the thread; [`Worker::stop`] moves it out again. The thread is not made at
//! activation because that runs on a vCPU's thread, whose seccomp filter and capabilities a new thread would inherit.
//!
//! ```text
//! spawn ─► parked ──start──► serving ──stop──► parked ─► … ─► dropped: joined
//!                               └─ error: DEVICE_NEEDS_RESET, waits for stop
//! ```
//!
//! It waits by epoll itself. The crate event-manager is for one thread that serves many subscribers, none of which can fail:
//! here a thread has one device, which can, and a failure is to end its loop.

use std::error::Error;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::queue::{QueueError, Virtqueue};
use super::{ActivateError, DeviceType, Interrupt};

/// What the thread of a device does before anything else: the VMM confines it here, by the kind of the device. A thread
/// that fails here ends, and its device cannot be activated.
pub type ThreadSetup = fn(DeviceType) -> io::Result<()>;

/// Events taken from epoll at once.
const EVENTS_PER_WAIT: usize = 32;

/// Marks the tokens that are the worker's own; those of backends are below.
const RESERVED: u64 = 1 << 63;
const STOP: u64 = RESERVED | (1 << 62);

/// What a device does on its thread while it is active.
pub trait Serve: Send + fmt::Debug + 'static {
    /// Why the device cannot go on without a reset.
    type Error: Error + From<QueueError> + 'static;

    /// The queues whose kicks the thread waits for.
    fn queues(&self) -> Vec<&Virtqueue>;

    /// Adds the descriptors of the backend to `poll`. Called once, first.
    ///
    /// # Errors
    /// When the device cannot work.
    fn start(&mut self, _poll: &Poll) -> Result<(), Self::Error> {
        Ok(())
    }

    /// Serves queue `index`: the driver has kicked it, or the device starts.
    ///
    /// # Errors
    /// When the device cannot go on.
    fn kicked(&mut self, index: u16, poll: &Poll) -> Result<(), Self::Error>;

    /// Serves a descriptor of the backend, known by the token it was added with.
    ///
    /// # Errors
    /// When the device cannot go on.
    fn ready(&mut self, _token: u64, _events: EventSet, _poll: &Poll) -> Result<(), Self::Error> {
        Ok(())
    }

    /// Takes the queues back from whoever serves them beside the thread. Called once before the thread gives itself
    /// back: whoever stops it is a vCPU's thread, whose seccomp filter knows no device.
    fn stop(&mut self) {}

    /// Gives up what is held for the driver, which has reset the device: called after [`Self::stop`], for the same reason.
    fn reset(&mut self) {}
}

/// The descriptors that the thread waits for.
#[derive(Debug)]
pub struct Poll {
    epoll: Epoll,
}

impl Poll {
    /// Waits for `events` on `fd` as well, and calls them `token`, which is below 2^62.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn add(&self, fd: &impl AsRawFd, token: u64, events: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Add, fd.as_raw_fd(), token, events)
    }

    /// Waits for other `events` on `fd`, added before.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn modify(&self, fd: &impl AsRawFd, token: u64, events: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Modify, fd.as_raw_fd(), token, events)
    }

    /// Waits for `fd` no more.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn remove(&self, fd: &impl AsRawFd) -> io::Result<()> {
        self.control(
            ControlOperation::Delete,
            fd.as_raw_fd(),
            0,
            EventSet::empty(),
        )
    }

    fn control(
        &self,
        operation: ControlOperation,
        fd: RawFd,
        token: u64,
        events: EventSet,
    ) -> io::Result<()> {
        self.epoll
            .ctl(operation, fd, EpollEvent::new(events, token))
    }
}

/// An order to the thread.
#[derive(Debug)]
struct Start<S> {
    serve: S,
    interrupt: Arc<dyn Interrupt>,
}

/// The handle of a device's thread.
#[derive(Debug)]
pub struct Worker<S: Serve> {
    /// `None` only while dropping: its end is the thread's order to end.
    orders: Option<Sender<Start<S>>>,
    given_back: Receiver<S>,
    stop: Arc<EventFd>,
    /// The next stop is for a reset.
    resets: Arc<AtomicBool>,
    active: bool,
    thread: Option<JoinHandle<()>>,
}

impl<S: Serve> Worker<S> {
    /// Starts the thread, which sets itself up and waits.
    ///
    /// # Errors
    /// When the thread or its eventfd cannot be made.
    pub fn spawn(
        name: &str,
        device: DeviceType,
        setup: impl FnOnce(DeviceType) -> io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let stop = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let resets = Arc::new(AtomicBool::new(false));
        let (orders, received) = channel();
        let (give_back, given_back) = channel();
        let (seen_stop, seen_resets) = (Arc::clone(&stop), Arc::clone(&resets));
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                if let Err(err) = setup(device) {
                    log::error!("cannot set up the thread of the {device:?} device: {err}");
                    return;
                }
                park(device, &received, &give_back, &seen_stop, &seen_resets);
            })?;
        Ok(Self {
            orders: Some(orders),
            given_back,
            stop,
            resets,
            active: false,
            thread: Some(thread),
        })
    }

    /// Whether the thread has something to serve.
    pub fn is_active(&self) -> bool {
        self.active
    }

    /// Hands `serve` to the thread. Never while active.
    ///
    /// # Errors
    /// When the thread is gone, because its set-up failed.
    pub fn start(&mut self, serve: S, interrupt: Arc<dyn Interrupt>) -> Result<(), ActivateError> {
        debug_assert!(!self.active, "a device is activated once");
        let orders = self.orders.as_ref().expect("present until dropped");
        if orders.send(Start { serve, interrupt }).is_err() {
            return Err(ActivateError::Worker(io::ErrorKind::BrokenPipe.into()));
        }
        self.active = true;
        Ok(())
    }

    /// Stops serving, and takes back what was served, between two requests. `None` while inactive.
    pub fn stop(&mut self) -> Option<S> {
        if !std::mem::take(&mut self.active) {
            return None;
        }
        self.stop.write(1).expect("an eventfd takes a one");
        // The thread ends without giving back only if its set-up failed after the order was sent.
        let served = self.given_back.recv().ok();
        // The thread has seen it, unless it never waited.
        let _ = self.stop.read();
        served
    }

    /// Stops serving because the driver has reset the device; [`Serve::reset`] is called on the thread before.
    pub fn reset(&mut self) -> Option<S> {
        self.resets.store(true, Ordering::Release);
        let served = self.stop();
        self.resets.store(false, Ordering::Release);
        served
    }
}

impl<S: Serve> Drop for Worker<S> {
    fn drop(&mut self) {
        self.stop();
        self.orders = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of a device panicked");
        }
    }
}

/// The thread's life.
fn park<S: Serve>(
    device: DeviceType,
    orders: &Receiver<Start<S>>,
    give_back: &Sender<S>,
    stop: &EventFd,
    resets: &AtomicBool,
) {
    while let Ok(Start {
        mut serve,
        interrupt,
    }) = orders.recv()
    {
        if let Err(failure) = serve_until_stopped(&mut serve, stop) {
            log::error!(
                "the {device:?} device needs a reset: {}",
                chain_of(&failure)
            );
            interrupt.needs_reset();
            wait_for(stop);
        }
        serve.stop();
        if resets.load(Ordering::Acquire) {
            serve.reset();
        }
        if give_back.send(serve).is_err() {
            return;
        }
    }
}

/// Why serving ended early.
#[derive(Debug, thiserror::Error)]
enum Failure<E: Error + 'static> {
    #[error("cannot wait for events")]
    Poll(#[source] io::Error),
    #[error("cannot serve")]
    Serve(#[source] E),
}

fn serve_until_stopped<S: Serve>(serve: &mut S, stop: &EventFd) -> Result<(), Failure<S::Error>> {
    let poll = Poll {
        epoll: Epoll::new().map_err(Failure::Poll)?,
    };
    poll.add(stop, STOP, EventSet::IN).map_err(Failure::Poll)?;
    let mut queues = Vec::new();
    for queue in serve.queues() {
        queues.push(queue.index());
        poll.add(
            queue.kick(),
            RESERVED | u64::from(queue.index()),
            EventSet::IN,
        )
        .map_err(Failure::Poll)?;
    }
    serve.start(&poll).map_err(Failure::Serve)?;
    for index in queues {
        serve.kicked(index, &poll).map_err(Failure::Serve)?;
    }

    let mut events = [EpollEvent::default(); EVENTS_PER_WAIT];
    loop {
        let count = match poll.epoll.wait(-1, &mut events) {
            Ok(count) => count,
            Err(err) if err.kind() == io::ErrorKind::Interrupted => continue,
            Err(err) => return Err(Failure::Poll(err)),
        };
        for event in events.iter().take(count) {
            let token = event.data();
            if token == STOP {
                return Ok(());
            }
            if token & RESERVED == 0 {
                serve
                    .ready(token, event.event_set(), &poll)
                    .map_err(Failure::Serve)?;
                continue;
            }
            let queues = serve.queues();
            let Some(queue) = queues
                .iter()
                .find(|queue| RESERVED | u64::from(queue.index()) == token)
            else {
                continue;
            };
            let index = queue.index();
            queue
                .acknowledge_kick()
                .map_err(|err| Failure::Serve(err.into()))?;
            serve.kicked(index, &poll).map_err(Failure::Serve)?;
        }
    }
}

/// Waits until `stop` is written to, however long that takes.
fn wait_for(stop: &EventFd) {
    let mut descriptor = libc::pollfd {
        fd: stop.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd, which outlives the call.
    while unsafe { libc::poll(&raw mut descriptor, 1, -1) } < 1 {}
}

/// An error with its sources, in one line.
fn chain_of(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(err) = source {
        text.push_str(": ");
        text.push_str(&err.to_string());
        source = err.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::thread::ThreadId;

    use super::*;

    /// Serves nothing, and notes on which thread it was stopped and reset.
    #[derive(Debug, Default)]
    struct Idle {
        stopped_by: Option<ThreadId>,
        reset_by: Option<ThreadId>,
    }

    impl Serve for Idle {
        type Error = QueueError;

        fn queues(&self) -> Vec<&Virtqueue> {
            Vec::new()
        }

        fn kicked(&mut self, _index: u16, _poll: &Poll) -> Result<(), QueueError> {
            Ok(())
        }

        fn stop(&mut self) {
            assert_eq!(self.reset_by, None);
            self.stopped_by = Some(thread::current().id());
        }

        fn reset(&mut self) {
            self.reset_by = Some(thread::current().id());
        }
    }

    #[derive(Debug)]
    struct NoInterrupt;

    impl Interrupt for NoInterrupt {
        fn queue(&self, _index: u16) {}
        fn call(&self, _index: u16) -> io::Result<EventFd> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn config_change(&self) {}
        fn needs_reset(&self) {}
    }

    #[test]
    fn reset_happens_on_the_device_s_thread_and_a_stop_is_none() {
        let mut worker = Worker::spawn("idle", DeviceType::Rng, |_| Ok(())).unwrap();
        let start = |worker: &mut Worker<Idle>| {
            worker
                .start(Idle::default(), Arc::new(NoInterrupt))
                .unwrap();
        };
        start(&mut worker);
        let stopped = worker.stop().unwrap();
        assert_eq!(stopped.reset_by, None);
        assert_ne!(stopped.stopped_by.expect("stopped"), thread::current().id());
        start(&mut worker);
        let reset = worker.reset().unwrap();
        assert_eq!(reset.reset_by.expect("reset"), reset.stopped_by.unwrap());
        assert!(worker.reset().is_none());
        start(&mut worker);
        assert_eq!(worker.stop().unwrap().reset_by, None);
    }
}
