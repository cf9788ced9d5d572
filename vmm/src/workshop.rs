//! The thread that makes threads while the guest runs.
//!
//! A thread inherits the filter of system calls of the one that makes it, and the filters of the others do not allow to
//! make any. So this one is made, and confined, while the VM is built, and waits for jobs that need more than the thread
//! has that wants them done. It touches nothing of the guest's itself.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use crate::error::Error;

type Job = Box<dyn FnOnce() + Send>;

/// The handle of the thread. Dropping it ends the thread.
#[derive(Debug)]
pub(crate) struct Workshop {
    /// `None` only while dropping: its end is the thread's order to finish.
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
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
                    log::error!("the thread that makes vCPUs cannot be confined: {err}");
                    return;
                }
                for job in orders {
                    job();
                }
            })
            .map_err(|source| Error::SpawnThread { name, source })?;
        Ok(Self {
            jobs: Some(jobs),
            thread: Some(thread),
        })
    }

    /// Has a job done on the thread, and waits for what comes of it.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        let (done, outcome) = channel();
        let jobs = self.jobs.as_ref().expect("present until dropped");
        let job = Box::new(move || {
            // Whoever asked has waited.
            let _ = done.send(job());
        });
        jobs.send(job).map_err(|_| Error::WorkshopClosed)?;
        outcome.recv().map_err(|_| Error::WorkshopClosed)
    }
}

impl Drop for Workshop {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread that makes vCPUs panicked");
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
    fn job_for_a_thread_that_is_not_confined_is_refused() {
        let workshop = Workshop::open(|| Err(io::ErrorKind::PermissionDenied.into())).unwrap();
        assert!(matches!(workshop.run(|| ()), Err(Error::WorkshopClosed)));
    }
}
