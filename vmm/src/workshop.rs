//! The thread that makes threads while the guest runs, and takes them apart.
//!
//! A thread inherits the filter of system calls of the one that makes it, and the filters of the others do not allow to
//! make any. So this one is made, and confined, while the VM is built, and waits for jobs that need more than the thread
//! has that wants them done, or that a vCPU shall not wait for. It touches nothing of the guest's itself. It does one job
//! after the other.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use crate::error::Error;

type Job = Box<dyn FnOnce() + Send>;

/// The handle of the thread. Dropping it ends the thread.
#[derive(Debug)]
pub(crate) struct Workshop {
    orders: Orders,
    thread: Option<JoinHandle<()>>,
}

/// The way to give jobs to the thread. It keeps nobody alive.
#[derive(Debug, Clone)]
pub(crate) struct Orders {
    /// `None` once the handle is dropped: the end of the channel is the thread's order to finish.
    jobs: Arc<Mutex<Option<Sender<Job>>>>,
}

impl Orders {
    /// Has a job done on the thread, some time. The job is lost if the VM ends before.
    pub(crate) fn post(&self, job: impl FnOnce() + Send + 'static) -> Result<(), Error> {
        let jobs = self.lock();
        let jobs = jobs.as_ref().ok_or(Error::WorkshopClosed)?;
        jobs.send(Box::new(job)).map_err(|_| Error::WorkshopClosed)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Sender<Job>>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Workshop {
    /// Starts the thread, which confines itself by `setup` first.
    pub(crate) fn open(
        setup: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> Result<Self, Error> {
        let (jobs, orders): (_, Receiver<Job>) = channel();
        let name = "workshop".to_owned();
        let thread = thread::Builder::new()
            .name(name.clone())
            .spawn(move || {
                if let Err(err) = setup() {
                    log::error!("the workshop cannot be confined: {err}");
                    return;
                }
                for job in orders {
                    job();
                }
            })
            .map_err(|source| Error::SpawnThread { name, source })?;
        Ok(Self {
            orders: Orders {
                jobs: Arc::new(Mutex::new(Some(jobs))),
            },
            thread: Some(thread),
        })
    }

    /// The way to give it jobs without waiting.
    pub(crate) fn orders(&self) -> Orders {
        self.orders.clone()
    }

    /// Has a job done on the thread, and waits for what comes of it.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        let (done, outcome) = channel();
        self.orders.post(move || {
            // Whoever asked has waited.
            let _ = done.send(job());
        })?;
        outcome.recv().map_err(|_| Error::WorkshopClosed)
    }
}

impl Drop for Workshop {
    fn drop(&mut self) {
        *self.orders.lock() = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the workshop panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_are_done_on_the_one_thread() {
        let workshop = Workshop::open(|| Ok(())).unwrap();
        let first = workshop.run(|| thread::current().id()).unwrap();
        let second = workshop.run(|| thread::current().id()).unwrap();
        assert_eq!(first, second);
        assert_ne!(first, thread::current().id());
    }

    #[test]
    fn jobs_are_done_before_the_thread_ends_and_refused_after() {
        let workshop = Workshop::open(|| Ok(())).unwrap();
        let orders = workshop.orders();
        let (done, outcome) = channel();
        orders.post(move || done.send(()).unwrap()).unwrap();
        drop(workshop);
        assert_eq!(outcome.try_recv(), Ok(()));
        assert!(matches!(orders.post(|| ()), Err(Error::WorkshopClosed)));
    }

    #[test]
    fn job_for_a_thread_that_is_not_confined_is_refused() {
        let workshop = Workshop::open(|| Err(io::ErrorKind::PermissionDenied.into())).unwrap();
        assert!(matches!(workshop.run(|| ()), Err(Error::WorkshopClosed)));
    }
}
