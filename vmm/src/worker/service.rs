//! The main thread of the worker: it boots the VM once, then answers the shim and reports, until either is gone.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};

use super::inbox::{Inbox, Outlet, inbox};
use super::{WorkerError, one_line};
use crate::config::{DeviceConfig, DeviceId, VmConfig};
use crate::control::{self, Call, Event, ExitReason, FileChange, Message, Reply, Request, Resize};
use crate::devices::vsock::{ConnectError, VsockStream};

/// A VM as this thread sees it. Its descriptor is readable once the VM has ended.
pub(super) trait Machine: AsFd {
    /// How long its guest has to let go of a device.
    const REMOVE_LIMIT: Duration = control::REMOVE_LIMIT;

    /// Why it has ended, if it has.
    fn end_reason(&self) -> Option<ExitReason>;

    /// Tells the guest how large it shall be. The error is for the shim.
    fn resize(&self, size: Resize) -> Result<(), String>;

    /// Adds a device, and tells `done` how that ended, from any thread. An error, which is for the shim, comes instead.
    fn add(
        &self,
        device: DeviceConfig,
        files: Vec<OwnedFd>,
        done: impl FnOnce(Result<(), String>) + Send + 'static,
    ) -> Result<(), String>;

    /// Asks the guest to let go of a device, and tells `done` when it is gone, from any thread and however late. An error,
    /// which is for the shim, comes instead.
    fn remove(
        &self,
        device: &DeviceId,
        done: impl FnOnce(Result<(), String>) + Send + 'static,
    ) -> Result<(), String>;

    /// Ends a removal that the guest has not answered yet: `done` gets an error.
    fn keep(&self, device: &DeviceId);

    /// The first changes of files that nobody has taken, and whether there are more.
    fn take_changes(&self) -> (Vec<FileChange>, bool);

    /// All counters.
    fn metrics(&self) -> BTreeMap<String, u64>;

    /// Connects to a port of the guest, and tells `done` how that ended, from any thread and however late.
    fn connect(
        &self,
        port: u32,
        done: impl FnOnce(Result<VsockStream, ConnectError>) + Send + 'static,
    );
}

/// What the VM's threads tell the main thread.
#[derive(Debug)]
pub(super) enum Notice {
    /// The guest has connected to the ready port.
    Ready,
    /// There are changes of files to be taken.
    FilesChanged,
    /// The request with this id, to connect into the guest, has come to an end.
    Connected {
        id: u64,
        result: Result<VsockStream, ConnectError>,
    },
    /// The request with this id, to add or remove a device, has come to an end.
    Answered {
        id: u64,
        result: Result<Reply, String>,
    },
}

/// A device that the guest has been asked to let go of.
#[derive(Debug)]
struct Removal {
    /// Of the request.
    id: u64,
    device: DeviceId,
    deadline: Instant,
}

/// Waits for the order to boot, boots by `boot`, and serves until the VM or the shim is gone.
///
/// `boot` gets the description, the descriptors that came with it, and where to send notices.
pub(super) fn run<M: Machine>(
    control: OwnedFd,
    boot: impl FnOnce(&VmConfig, Vec<OwnedFd>, Outlet<Notice>) -> Result<M, String>,
) -> Result<(), WorkerError> {
    let shim = Shim(control);
    let (id, config, files) = loop {
        let Some((Request { id, call }, files)) = shim.receive()? else {
            return Ok(());
        };
        if let Call::Boot(config) = call {
            break (id, config, files);
        }
        shim.refuse(id, "no VM has been booted yet".to_owned())?;
    };
    let (outlet, inbox) = inbox().map_err(WorkerError::Wait)?;
    match boot(&config, files, outlet.clone()) {
        Ok(machine) => {
            shim.reply(id, Reply::Booted, None)?;
            let mut service = Service {
                shim,
                machine,
                outlet,
                inbox,
                removals: VecDeque::new(),
            };
            let result = service.serve();
            // The process ends now, and the VM with it. To take it apart first, binding by binding, is what the shim
            // would wait for.
            std::mem::forget(service.machine);
            result
        }
        Err(message) => {
            shim.refuse(id, message.clone())?;
            Err(WorkerError::NotBooted(message))
        }
    }
}

/// What epoll waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
enum Source {
    Shim,
    Inbox,
    End,
}

/// Events taken from epoll at once: as many as there are sources.
const EVENTS_PER_WAIT: usize = 3;

/// The worker, once the VM runs.
#[derive(Debug)]
struct Service<M> {
    shim: Shim,
    machine: M,
    outlet: Outlet<Notice>,
    inbox: Inbox<Notice>,
    /// The first to be given up first.
    removals: VecDeque<Removal>,
}

impl<M: Machine> Service<M> {
    /// Epoll itself rather than event-manager, whose subscribers do not know of each other: here the end of one source is the
    /// end of all, the order of what is told counts, and there is a deadline.
    fn serve(&mut self) -> Result<(), WorkerError> {
        let epoll = self.watch().map_err(|err| WorkerError::Wait(err.into()))?;
        let mut events = Vec::with_capacity(EVENTS_PER_WAIT);
        loop {
            events.clear();
            rustix::io::retry_on_intr(|| {
                let limit = self.until_next_deadline();
                epoll::wait(
                    &epoll,
                    rustix::buffer::spare_capacity(&mut events),
                    limit.as_ref(),
                )
            })
            .map_err(|err| WorkerError::Wait(err.into()))?;
            self.give_removals_up();
            let is_due =
                |source: Source| events.iter().any(|event| event.data.u64() == source as u64);
            if is_due(Source::End)
                && let Some(reason) = self.machine.end_reason()
            {
                // What came before the end is told before it.
                self.tell_notices()?;
                return self.shim.event(Event::Exited(reason));
            }
            if is_due(Source::Inbox) {
                self.tell_notices()?;
            }
            if is_due(Source::Shim) {
                let Some((request, files)) = self.shim.receive()? else {
                    return Ok(());
                };
                self.answer(request, files)?;
            }
        }
    }

    fn watch(&self) -> rustix::io::Result<OwnedFd> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let sources: [(BorrowedFd<'_>, Source); EVENTS_PER_WAIT] = [
            (self.shim.0.as_fd(), Source::Shim),
            (self.inbox.as_fd(), Source::Inbox),
            (self.machine.as_fd(), Source::End),
        ];
        for (fd, source) in sources {
            let data = epoll::EventData::new_u64(source as u64);
            epoll::add(&epoll, fd, data, epoll::EventFlags::IN)?;
        }
        Ok(epoll)
    }

    fn until_next_deadline(&self) -> Option<Timespec> {
        let next = self.removals.front()?;
        let left = next.deadline.saturating_duration_since(Instant::now());
        // Of milliseconds, as epoll counts: not one too few, which would be a turn for nothing.
        let left = Duration::from_millis(left.as_micros().div_ceil(1000).try_into().ok()?);
        Timespec::try_from(left).ok()
    }

    /// Keeps the devices whose time to go is over. That is answered as any end of a removal.
    fn give_removals_up(&mut self) {
        let now = Instant::now();
        while let Some(removal) = self.removals.front()
            && removal.deadline <= now
        {
            self.machine.keep(&removal.device);
            self.removals.pop_front();
        }
    }

    fn answer(
        &mut self,
        Request { id, call }: Request,
        files: Vec<OwnedFd>,
    ) -> Result<(), WorkerError> {
        match call {
            Call::Boot(_) => self
                .shim
                .refuse(id, "a VM has been booted already".to_owned()),
            Call::Resize(size) => match self.machine.resize(size) {
                Ok(()) => self.shim.reply(id, Reply::Resized, None),
                Err(message) => self.shim.refuse(id, message),
            },
            Call::TakeChanges => {
                let (changes, more) = self.machine.take_changes();
                self.shim.reply(id, Reply::Changes { changes, more }, None)
            }
            Call::Metrics => self
                .shim
                .reply(id, Reply::Metrics(self.machine.metrics()), None),
            Call::AddDisk(disk) => self.add(id, DeviceConfig::Disk(disk), files),
            Call::AddNic(nic) => self.add(id, DeviceConfig::Nic(nic), files),
            Call::RemoveDisk { serial } => self.remove(id, DeviceId::Disk { serial }),
            Call::RemoveNic { mac } => self.remove(id, DeviceId::Nic { mac }),
            // The guest answers when it likes; nobody else waits for that.
            Call::VsockConnect { port } => {
                let outlet = self.outlet.clone();
                self.machine.connect(port, move |result| {
                    outlet.send(Notice::Connected { id, result });
                });
                Ok(())
            }
        }
    }

    fn add(&self, id: u64, device: DeviceConfig, files: Vec<OwnedFd>) -> Result<(), WorkerError> {
        let done = self.answers(id, Reply::Added);
        match self.machine.add(device, files, done) {
            Ok(()) => Ok(()),
            Err(message) => self.shim.refuse(id, message),
        }
    }

    fn remove(&mut self, id: u64, device: DeviceId) -> Result<(), WorkerError> {
        let done = self.answers(id, Reply::Removed);
        if let Err(message) = self.machine.remove(&device, done) {
            return self.shim.refuse(id, message);
        }
        self.removals.push_back(Removal {
            id,
            device,
            deadline: Instant::now() + M::REMOVE_LIMIT,
        });
        Ok(())
    }

    /// What answers the request `id`, from any thread.
    fn answers(
        &self,
        id: u64,
        reply: Reply,
    ) -> impl FnOnce(Result<(), String>) + Send + 'static + use<M> {
        let outlet = self.outlet.clone();
        move |result| {
            let result = result.map(|()| reply);
            outlet.send(Notice::Answered { id, result });
        }
    }

    fn tell_notices(&mut self) -> Result<(), WorkerError> {
        for notice in self.inbox.take() {
            match notice {
                Notice::Ready => self.shim.event(Event::Ready)?,
                Notice::FilesChanged => self.shim.event(Event::FilesChanged)?,
                Notice::Answered { id, result } => {
                    self.removals.retain(|removal| removal.id != id);
                    self.shim.send(&Message::Reply { id, result }, None)?;
                }
                Notice::Connected { id, result } => match result {
                    Ok(VsockStream { local_port, stream }) => self.shim.reply(
                        id,
                        Reply::VsockConnected { local_port },
                        Some(stream.as_fd()),
                    )?,
                    Err(err) => self.shim.refuse(id, one_line(&err))?,
                },
            }
        }
        Ok(())
    }
}

/// The control socket. It blocks: the shim always reads, and when it is gone, nothing blocks any more.
#[derive(Debug)]
struct Shim(OwnedFd);

impl Shim {
    fn receive(&self) -> Result<Option<(Request, Vec<OwnedFd>)>, WorkerError> {
        control::recv(&self.0).map_err(WorkerError::Control)
    }

    fn reply(&self, id: u64, reply: Reply, fd: Option<BorrowedFd<'_>>) -> Result<(), WorkerError> {
        let result = Ok(reply);
        self.send(&Message::Reply { id, result }, fd)
    }

    fn refuse(&self, id: u64, message: String) -> Result<(), WorkerError> {
        let result = Err(message);
        self.send(&Message::Reply { id, result }, None)
    }

    fn event(&self, event: Event) -> Result<(), WorkerError> {
        self.send(&Message::Event(event), None)
    }

    fn send(&self, message: &Message, fd: Option<BorrowedFd<'_>>) -> Result<(), WorkerError> {
        control::send(&self.0, message, fd.as_slice()).map_err(WorkerError::Control)
    }
}

#[cfg(test)]
mod tests;
