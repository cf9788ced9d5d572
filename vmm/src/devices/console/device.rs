//! The driver puts what the guest prints into the transmit queue; the device writes it, byte by byte as it is, to a
//! descriptor that never blocks (a pipe to whoever keeps the log), on a thread of its own. A guest must not wait for a
//! reader of its log, so what the descriptor does not take is dropped and counted.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::metrics::ConsoleMetrics;
use crate::snapshot::{RestoreError, Snapshot};
use crate::virtio::queue::{Chain, ChainError, QueueError, Virtqueue, take_queues};
use crate::virtio::worker::{Poll, Serve, ThreadSetup, Worker};
use crate::virtio::{ActivateError, Activation, ActiveQueue, DeviceType, VirtioDevice};

/// Index of the queue of input to the guest, which there is none of.
pub const RECEIVE_QUEUE: u16 = 0;
/// Index of the queue of output from the guest.
pub const TRANSMIT_QUEUE: u16 = 1;

const QUEUE_SIZES: [u16; 2] = [16, 64];

/// Why the device cannot go on, or cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The queue is unusable.
    #[error("transmit queue")]
    Queue(#[from] QueueError),
    /// The descriptor for the output cannot be made non-blocking.
    #[error("cannot set up the console's output")]
    Output(#[source] io::Error),
    /// The thread cannot be made.
    #[error("cannot start the console device")]
    Start(#[source] io::Error),
}

/// A console device.
#[derive(Debug)]
pub struct ConsoleDevice {
    worker: Worker<ConsoleWorker>,
    output: Arc<OwnedFd>,
    metrics: Arc<ConsoleMetrics>,
}

impl ConsoleDevice {
    /// Makes the device and its thread. `output` becomes non-blocking. SIGPIPE must be ignored, as Rust's runtime does.
    ///
    /// # Errors
    /// When the descriptor is of no use, or the thread cannot be made.
    pub fn new(output: OwnedFd, setup: ThreadSetup) -> Result<Self, ConsoleError> {
        let flags = fcntl_getfl(&output).map_err(|err| ConsoleError::Output(err.into()))?;
        fcntl_setfl(&output, flags | OFlags::NONBLOCK)
            .map_err(|err| ConsoleError::Output(err.into()))?;
        Ok(Self {
            worker: Worker::spawn("console", DeviceType::Console, setup)
                .map_err(ConsoleError::Start)?,
            output: Arc::new(output),
            metrics: Arc::default(),
        })
    }

    /// The device's counters.
    pub fn metrics(&self) -> Arc<ConsoleMetrics> {
        Arc::clone(&self.metrics)
    }
}

impl VirtioDevice for ConsoleDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Console
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        // Every field of it belongs to a feature that is not offered.
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let interrupt = Arc::clone(&activation.interrupt);
        let [receive, transmit] = take_queues(activation, [RECEIVE_QUEUE, TRANSMIT_QUEUE])?;
        let serve = ConsoleWorker {
            receive,
            transmit,
            output: Arc::clone(&self.output),
            metrics: Arc::clone(&self.metrics),
        };
        self.worker.start(serve, interrupt)
    }

    fn pause(&mut self) -> Vec<ActiveQueue> {
        self.worker.stop().map_or_else(Vec::new, |served| {
            vec![served.receive.into_active(), served.transmit.into_active()]
        })
    }

    fn reset(&mut self) {
        self.worker.stop();
    }
}

impl Snapshot for ConsoleDevice {
    /// What was printed is printed.
    type State = ();

    fn save(&self) -> Self::State {}

    fn restore(&mut self, (): Self::State) -> Result<(), RestoreError> {
        Ok(())
    }
}

/// What exists only while active.
#[derive(Debug)]
struct ConsoleWorker {
    receive: Virtqueue,
    transmit: Virtqueue,
    output: Arc<OwnedFd>,
    metrics: Arc<ConsoleMetrics>,
}

impl Serve for ConsoleWorker {
    type Error = ConsoleError;

    /// Not the receive queue: nothing is to be done when the driver offers buffers for input.
    fn queues(&self) -> Vec<&Virtqueue> {
        vec![&self.transmit]
    }

    fn kicked(&mut self, _index: u16, _poll: &Poll) -> Result<(), ConsoleError> {
        let Self {
            transmit,
            output,
            metrics,
            ..
        } = self;
        transmit.drain(|chain| {
            if let Err(err) = print(chain, output, metrics) {
                metrics.bad_chains.inc();
                log::debug!("console output refused: {err}");
            }
            0
        })?;
        Ok(())
    }
}

/// Writes what a chain holds, as far as the descriptor takes it now.
fn print(chain: Chain<'_>, output: &OwnedFd, metrics: &ConsoleMetrics) -> Result<(), ChainError> {
    let (mut text, _) = chain.buffers()?;
    while !text.is_empty() {
        match text.write_to(output.as_fd()) {
            Ok(0) => break,
            Ok(count) => metrics.bytes.add_len(count),
            // Full, or nobody reads it any more.
            Err(_) => break,
        }
    }
    metrics.dropped_bytes.add_len(text.len());
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{PipeReader, Read, pipe};

    use super::*;
    use crate::virtio::testing::{Buffer, Driver};

    fn device() -> (ConsoleDevice, PipeReader) {
        let (reader, writer) = pipe().unwrap();
        (
            ConsoleDevice::new(writer.into(), |_| Ok(())).unwrap(),
            reader,
        )
    }

    #[test]
    fn output_arrives_as_it_was_written() {
        let (mut device, mut reader) = device();
        let mut driver = Driver::activate(&mut device);
        // Input buffers, which nobody fills.
        driver.make_available(RECEIVE_QUEUE, &[Buffer::write(64)]);
        driver.kick(RECEIVE_QUEUE);
        let used = driver.request(TRANSMIT_QUEUE, &[b"\x1b[1mhel\0", b"lo\xff\r\n"], &[]);
        assert_eq!(used.written, 0);
        let mut bytes = [0; 13];
        reader.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"\x1b[1mhel\0lo\xff\r\n");
    }

    #[test]
    fn full_pipe_drops_and_the_guest_goes_on() {
        let (mut device, mut reader) = device();
        let metrics = device.metrics();
        let mut driver = Driver::activate(&mut device);
        let line = [b'x'; 4096];
        for _ in 0..100 {
            driver.request(TRANSMIT_QUEUE, &[&line], &[]);
        }
        let kept = metrics.bytes.get();
        assert!(kept >= 4096);
        assert_eq!(kept + metrics.dropped_bytes.get(), 100 * 4096);
        // With a reader again, it prints again.
        let mut bytes = vec![0; usize::try_from(kept).unwrap()];
        reader.read_exact(&mut bytes).unwrap();
        driver.request(TRANSMIT_QUEUE, &[b"again"], &[]);
        let mut bytes = [0; 5];
        reader.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"again");
    }

    #[test]
    fn closed_pipe_drops_and_the_guest_goes_on() {
        let (mut device, reader) = device();
        drop(reader);
        let mut driver = Driver::activate(&mut device);
        driver.request(TRANSMIT_QUEUE, &[b"nobody"], &[]);
        assert_eq!(device.metrics().dropped_bytes.get(), 6);
    }

    #[test]
    fn hostile_chains_are_returned_and_serving_goes_on() {
        let (mut device, mut reader) = device();
        let mut driver = Driver::activate(&mut device);
        for chain in driver.hostile_chains() {
            driver.submit_raw(TRANSMIT_QUEUE, &chain);
        }
        assert!(device.metrics().bad_chains.get() > 0);
        driver.request(TRANSMIT_QUEUE, &[b"ok"], &[]);
        let mut bytes = [0; 2];
        reader.read_exact(&mut bytes).unwrap();
    }

    #[test]
    fn paused_device_prints_what_came_meanwhile() {
        let (mut device, mut reader) = device();
        let mut driver = Driver::activate(&mut device);
        let queues = device.pause();
        assert_eq!(queues.len(), 2);
        let head = driver.make_available(TRANSMIT_QUEUE, &[Buffer::read(b"late")]);
        device.restore(()).unwrap();
        driver.reactivate(&mut device, queues);
        driver.wait_used(TRANSMIT_QUEUE, head);
        let mut bytes = [0; 4];
        reader.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"late");
    }
}
