//! The main thread of the worker: it boots the VM once, then answers the shim and reports, until either is gone.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll;

use super::inbox::{Inbox, Outlet, inbox};
use super::{WorkerError, one_line};
use crate::config::VmConfig;
use crate::control::{self, Call, Event, ExitReason, Message, Reply, Request, Resize};
use crate::devices::vsock::{ConnectError, VsockStream};

/// A VM as this thread sees it. Its descriptor is readable once the VM has ended.
pub(super) trait Machine: AsFd {
    /// Why it has ended, if it has.
    fn end_reason(&self) -> Option<ExitReason>;

    /// Tells the guest how large it shall be. The error is for the shim.
    fn resize(&self, size: Resize) -> Result<(), String>;

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
    /// The request with this id, to connect into the guest, has come to an end.
    Connected {
        id: u64,
        result: Result<VsockStream, ConnectError>,
    },
}

/// Waits for the order to boot, boots by `boot`, and serves until the VM or the shim is gone.
///
/// `boot` gets the description, the descriptors that came with it, and where to send [`Notice::Ready`].
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
            let service = Service {
                shim,
                machine,
                outlet,
                inbox,
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
}

impl<M: Machine> Service<M> {
    fn serve(&self) -> Result<(), WorkerError> {
        let epoll = self.watch().map_err(|err| WorkerError::Wait(err.into()))?;
        let mut events = Vec::with_capacity(EVENTS_PER_WAIT);
        loop {
            events.clear();
            rustix::io::retry_on_intr(|| {
                epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), None)
            })
            .map_err(|err| WorkerError::Wait(err.into()))?;
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
                let Some((request, _)) = self.shim.receive()? else {
                    return Ok(());
                };
                self.answer(request)?;
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

    fn answer(&self, Request { id, call }: Request) -> Result<(), WorkerError> {
        match call {
            Call::Boot(_) => self
                .shim
                .refuse(id, "a VM has been booted already".to_owned()),
            Call::Resize(size) => match self.machine.resize(size) {
                Ok(()) => self.shim.reply(id, Reply::Resized, None),
                Err(message) => self.shim.refuse(id, message),
            },
            Call::Metrics => self
                .shim
                .reply(id, Reply::Metrics(self.machine.metrics()), None),
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

    fn tell_notices(&self) -> Result<(), WorkerError> {
        for notice in self.inbox.take() {
            match notice {
                Notice::Ready => self.shim.event(Event::Ready)?,
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
