//! The active device: requests go straight between the disk and the guest's memory.
//!
//! With an [`Engine`] the requests of a queue are in flight together, and are answered as they are done. Without one, each is
//! done when the one before it is. What an engine is not for is done that way in either case.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use vmm_sys_util::epoll::EventSet;

use super::device::BlockError;
use super::disk::{Storage, is_unsupported};
use super::job::{Job, Kind, Pending, Step};
use super::metrics::BlockMetrics;
use super::request::{self, DISCARD_LIMITS, ID_LEN, Operation, Request, Status, ZEROES_LIMITS};
use super::ring::Engine;
use crate::virtio::ActiveQueue;
use crate::virtio::queue::{Chain, MAX_SILENCE, MAX_TURN, QueueError, Virtqueue};
use crate::virtio::worker::{Poll, Serve};

/// The engine's descriptor.
const ENGINE: u64 = 0;

/// Largest write that the thread does by itself. It is a copy into the host's page cache, for which the kernel's rings wake
/// another thread, and that takes longer than the copy.
const MAX_COPY_LEN: usize = 64 << 10;

/// Largest request that is in flight with others. A driver asks for a megabyte or so at once; it may ask for gigabytes, of
/// which whoever stops the device would have to wait for as many as the queue has descriptors.
const MAX_SHARED_LEN: usize = 4 << 20;

/// Requests of that many bytes are handed over, and what is done of them answered, before more are looked at.
const BATCH_LEN: usize = 256 << 10;

/// What the driver and the device have agreed on, and what the disk is.
#[derive(Debug, Clone)]
pub(super) struct Terms {
    /// Sectors of the disk.
    pub(super) capacity: u64,
    pub(super) read_only: bool,
    pub(super) id: [u8; ID_LEN],
    /// Without FLUSH a driver has no way to ask for durability, and so each write has to be durable when it is done
    /// (virtio 1.3, 5.2.6.2).
    pub(super) write_through: bool,
    pub(super) discard: bool,
    pub(super) write_zeroes: bool,
}

/// What exists only while active.
#[derive(Debug)]
pub(super) struct BlockWorker {
    queue: Virtqueue,
    server: Server,
    engine: Option<Box<dyn Engine>>,
    /// Bytes that were given to the engine and not yet handed over.
    batch_len: usize,
}

/// What knows what a request means.
#[derive(Debug)]
struct Server {
    storage: Arc<dyn Storage>,
    terms: Terms,
    metrics: Arc<BlockMetrics>,
}

/// What there is instead of a request that takes the disk's time.
#[derive(Debug)]
enum Popped {
    Nothing,
    /// A request that is answered.
    Answered {
        head: u16,
        written: u32,
    },
    Failed(QueueError),
}

impl BlockWorker {
    pub(super) fn new(
        queue: Virtqueue,
        storage: Arc<dyn Storage>,
        engine: Option<Box<dyn Engine>>,
        terms: Terms,
        metrics: Arc<BlockMetrics>,
    ) -> Self {
        let server = Server {
            storage,
            terms,
            metrics,
        };
        Self {
            queue,
            server,
            engine,
            batch_len: 0,
        }
    }

    pub(super) fn into_parts(self) -> (ActiveQueue, Option<Box<dyn Engine>>) {
        (self.queue.into_active(), self.engine)
    }

    /// Begins the next request that the driver has made available. False if there is none.
    fn serve_next(&mut self) -> Result<bool, BlockError> {
        let Self { queue, server, .. } = self;
        let popped = Pending::try_new(queue.memory(), |memory| {
            let chain = queue
                .pop(memory)
                .map_err(Popped::Failed)?
                .ok_or(Popped::Nothing)?;
            let head = chain.head();
            server
                .begin(chain)
                .map_err(|written| Popped::Answered { head, written })
        });
        match popped {
            Ok(pending) => self.go_on(pending)?,
            Err(Popped::Nothing) => return Ok(false),
            Err(Popped::Answered { head, written }) => self.queue.push_used(head, written)?,
            Err(Popped::Failed(err)) => return Err(err.into()),
        }
        if self.batch_len >= BATCH_LEN {
            self.hand_over()?;
        }
        Ok(true)
    }

    /// Has the next step of a request done, and those after it, as far as that is a matter of waiting.
    fn go_on(&mut self, mut pending: Pending) -> Result<(), BlockError> {
        loop {
            let job = pending.job();
            match &mut self.engine {
                Some(engine) if may_be_shared(job) && !engine.is_full() => {
                    // Never nothing, by which `hand_over` sees that there is something.
                    self.batch_len += job.kind.len().max(1);
                    engine.start(pending);
                    return Ok(());
                }
                // The others need not wait for this one.
                Some(engine) => engine.submit().map_err(BlockError::Engine)?,
                None => {}
            }
            let outcome = pending.attempt(self.server.storage.as_ref());
            if let Some(result) = self.server.after(&mut pending, outcome) {
                return self.answer(pending, result);
            }
        }
    }

    /// Hands the engine what was begun, and answers what is done.
    fn hand_over(&mut self) -> Result<(), BlockError> {
        loop {
            self.batch_len = 0;
            let Some(engine) = &mut self.engine else {
                return Ok(());
            };
            engine.submit().map_err(BlockError::Engine)?;
            self.answer_done()?;
            // Of what was done in part, the rest was begun.
            if self.batch_len == 0 {
                return Ok(());
            }
        }
    }

    /// Answers what the engine has done, or begins what is left of it.
    fn answer_done(&mut self) -> Result<(), BlockError> {
        while let Some((mut pending, mut outcome)) =
            self.engine.as_mut().and_then(|engine| engine.take_done())
        {
            if outcome.as_ref().is_err_and(is_refused) {
                outcome = pending.attempt(self.server.storage.as_ref());
            }
            match self.server.after(&mut pending, outcome) {
                Some(result) => self.answer(pending, result)?,
                None => self.go_on(pending)?,
            }
        }
        Ok(())
    }

    fn answer(
        &mut self,
        mut pending: Pending,
        result: Result<(), Status>,
    ) -> Result<(), BlockError> {
        let filled = result.map(|()| self.server.count(pending.job().kind));
        if filled.is_err() {
            self.server.metrics.errors.inc();
        }
        let head = pending.job().head;
        let written = pending.tell(filled);
        Ok(self.queue.push_used(head, written)?)
    }
}

impl Serve for BlockWorker {
    type Error = BlockError;

    fn queues(&self) -> Vec<&Virtqueue> {
        vec![&self.queue]
    }

    fn start(&mut self, poll: &Poll) -> Result<(), BlockError> {
        if let Some(engine) = &self.engine {
            poll.add(&engine.descriptor(), ENGINE, EventSet::IN)
                .map_err(BlockError::Engine)?;
        }
        Ok(())
    }

    /// As [`Virtqueue::drain`], for requests of which not each is answered when the next is popped.
    fn kicked(&mut self, _index: u16, _poll: &Poll) -> Result<(), BlockError> {
        let begun = Instant::now();
        let mut told = begun;
        self.queue.suppress_kicks()?;
        loop {
            while self.serve_next()? {
                let now = Instant::now();
                if now - told >= MAX_SILENCE {
                    self.hand_over()?;
                    self.queue.notify_if_needed()?;
                    told = now;
                }
                if now - begun >= MAX_TURN {
                    self.queue.kick_self()?;
                    self.hand_over()?;
                    return Ok(self.queue.notify_if_needed()?);
                }
            }
            self.hand_over()?;
            if !self.queue.await_kicks()? {
                return Ok(self.queue.notify_if_needed()?);
            }
        }
    }

    fn ready(&mut self, _token: u64, _events: EventSet, _poll: &Poll) -> Result<(), BlockError> {
        self.hand_over()?;
        Ok(self.queue.notify_if_needed()?)
    }

    /// Waits for what is in flight, and answers it: the guest's memory is left alone from then on, and no request is lost.
    fn stop(&mut self) {
        while let Some(engine) = &mut self.engine
            && engine.in_flight() > 0
        {
            if let Err(err) = engine.wait() {
                log::error!("cannot wait for the requests to a disk: {err}");
                break;
            }
            if let Err(err) = self.answer_done() {
                log::debug!("cannot answer a request to a disk: {err}");
            }
        }
        if let Err(err) = self.queue.notify_if_needed() {
            log::debug!("cannot tell of the last requests to a disk: {err}");
        }
    }
}

/// Whether a request may be in flight with others.
fn may_be_shared(job: &Job<'_>) -> bool {
    let len = job.kind.len();
    match job.step {
        Step::Read { .. } | Step::Flush => len <= MAX_SHARED_LEN,
        Step::Write { .. } => len > MAX_COPY_LEN && len <= MAX_SHARED_LEN,
        Step::Discard { .. } | Step::Zero { .. } => false,
    }
}

/// Whether the engine has had no means to do something, as opposed to has tried and failed: the plain way needs none.
fn is_refused(err: &io::Error) -> bool {
    matches!(
        err.raw_os_error(),
        Some(libc::EAGAIN | libc::ECANCELED | libc::EINTR)
    )
}

impl Server {
    /// Looks at a request: what it asks of the disk; or, where it asks nothing of it, answers it and says how many bytes were
    /// written from the start of the room on.
    fn begin<'m>(&self, chain: Chain<'m>) -> Result<Job<'m>, u32> {
        let head = chain.head();
        let Request {
            operation,
            mut outcome,
        } = Request::parse(chain).map_err(|err| {
            self.metrics.bad_chains.inc();
            log::debug!("block request refused: {err}");
            0_u32
        })?;
        if let Operation::GetId { mut room } = operation {
            return Err(outcome.tell(Ok(room.write(&self.terms.id))));
        }
        match self.first_step(operation) {
            Ok((kind, step)) => Ok(Job {
                head,
                kind,
                step,
                outcome,
            }),
            Err(status) => {
                self.metrics.errors.inc();
                Err(outcome.tell(Err(status)))
            }
        }
    }

    fn first_step<'m>(&self, operation: Operation<'m>) -> Result<(Kind, Step<'m>), Status> {
        let capacity = self.terms.capacity;
        match operation {
            Operation::Read { sector, room } => {
                let len = room.len();
                let offset = request::range(sector, len as u64, capacity)?.offset;
                Ok((Kind::Read { len }, Step::Read { room, offset }))
            }
            Operation::Write { sector, data } => {
                self.check_writable()?;
                let len = data.len();
                let offset = request::range(sector, len as u64, capacity)?.offset;
                Ok((Kind::Write { len }, Step::Write { data, offset }))
            }
            Operation::Flush => Ok((Kind::Flush, Step::Flush)),
            Operation::Discard { ranges } if self.terms.discard => {
                self.check_writable()?;
                let ranges = request::ranges(ranges, DISCARD_LIMITS, capacity)?;
                Ok((Kind::Discard, Step::Discard { ranges }))
            }
            Operation::WriteZeroes { ranges } if self.terms.write_zeroes => {
                self.check_writable()?;
                let ranges = request::ranges(ranges, ZEROES_LIMITS, capacity)?;
                Ok((Kind::Discard, Step::Zero { ranges }))
            }
            _ => Err(Status::Unsupported),
        }
    }

    fn check_writable(&self) -> Result<(), Status> {
        if self.terms.read_only {
            return Err(Status::IoError);
        }
        Ok(())
    }

    /// What comes after an attempt at the next step, which has moved that many bytes: the request is over, or, if `None`,
    /// there is something left to do.
    fn after(
        &self,
        pending: &mut Pending,
        outcome: io::Result<usize>,
    ) -> Option<Result<(), Status>> {
        let moved = match outcome {
            Ok(moved) => moved,
            Err(err) => return Some(Err(failed(err))),
        };
        match &pending.job().step {
            // Nothing moved: somebody has made the file shorter.
            Step::Read { room, .. } if !room.is_empty() => {
                (moved == 0).then(|| Err(failed(io::ErrorKind::UnexpectedEof.into())))
            }
            Step::Write { data, .. } if !data.is_empty() => {
                (moved == 0).then(|| Err(failed(io::ErrorKind::WriteZero.into())))
            }
            Step::Write { .. } | Step::Zero { .. } if self.terms.write_through => {
                pending.flush_next();
                None
            }
            _ => Some(Ok(())),
        }
    }

    /// Counts a request that is done. Returns how many bytes of its room were filled.
    fn count(&self, kind: Kind) -> usize {
        match kind {
            Kind::Read { len } => {
                self.metrics.reads.inc();
                self.metrics.read_bytes.add_len(len);
                return len;
            }
            Kind::Write { len } => {
                self.metrics.writes.inc();
                self.metrics.written_bytes.add_len(len);
            }
            Kind::Flush => self.metrics.flushes.inc(),
            Kind::Discard => self.metrics.discards.inc(),
        }
        0
    }
}

/// The status for an error of the host, which the guest may provoke at will, and which is therefore counted, not logged
/// for all to see.
#[expect(clippy::needless_pass_by_value, reason = "an error is handed over")]
fn failed(err: io::Error) -> Status {
    log::debug!("block request failed: {err}");
    if is_unsupported(&err) {
        Status::Unsupported
    } else {
        Status::IoError
    }
}
