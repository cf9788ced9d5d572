//! The driver puts device-writable buffers into the request queue; the device fills each with bytes from the kernel's
//! random number generator and returns it. The backend is getrandom(2), which the device's own thread calls.

use std::io;
use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};

use super::metrics::RngMetrics;
use crate::snapshot::{RestoreError, Snapshot};
use crate::virtio::queue::{Chain, ChainError, QueueError, Virtqueue, take_queues};
use crate::virtio::worker::{Poll, Serve, ThreadSetup, Worker};
use crate::virtio::{ActivateError, Activation, ActiveQueue, DeviceType, VirtioDevice};

/// Index of the only queue.
pub const REQUEST_QUEUE: u16 = 0;

const QUEUE_SIZES: [u16; 1] = [64];

/// Most bytes for one request. Linux asks for 64 to 4096; a driver that offers more gets this much, as it may
/// (virtio 1.3, 5.4.6.1: one or more bytes), and cannot have us work for gigabytes.
const MAX_REQUEST: usize = 4096;

/// Why the device cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum RngError {
    /// The queue is unusable.
    #[error("request queue")]
    Queue(#[from] QueueError),
}

/// An entropy device.
#[derive(Debug)]
pub struct RngDevice {
    worker: Worker<RngWorker>,
    metrics: Arc<RngMetrics>,
}

impl RngDevice {
    /// Makes the device and its thread.
    ///
    /// # Errors
    /// When the thread cannot be made.
    pub fn new(setup: ThreadSetup) -> io::Result<Self> {
        Ok(Self {
            worker: Worker::spawn("rng", DeviceType::Rng, setup)?,
            metrics: Arc::default(),
        })
    }

    /// The device's counters.
    pub fn metrics(&self) -> Arc<RngMetrics> {
        Arc::clone(&self.metrics)
    }
}

impl VirtioDevice for RngDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let interrupt = Arc::clone(&activation.interrupt);
        let [queue] = take_queues(activation, [REQUEST_QUEUE])?;
        let metrics = Arc::clone(&self.metrics);
        self.worker.start(RngWorker { queue, metrics }, interrupt)
    }

    fn pause(&mut self) -> Vec<ActiveQueue> {
        self.worker
            .stop()
            .map(|served| served.queue.into_active())
            .into_iter()
            .collect()
    }

    fn reset(&mut self) {
        self.worker.stop();
    }
}

impl Snapshot for RngDevice {
    /// Randomness has no memory.
    type State = ();

    fn save(&self) -> Self::State {}

    fn restore(&mut self, (): Self::State) -> Result<(), RestoreError> {
        Ok(())
    }
}

/// What exists only while active.
#[derive(Debug)]
struct RngWorker {
    queue: Virtqueue,
    metrics: Arc<RngMetrics>,
}

/// Why one request is returned unserved.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    #[error("malformed request")]
    Chain(#[from] ChainError),
    #[error("cannot get random bytes")]
    Random(#[source] io::Error),
}

impl Serve for RngWorker {
    type Error = RngError;

    fn queues(&self) -> Vec<&Virtqueue> {
        vec![&self.queue]
    }

    fn kicked(&mut self, _index: u16, _poll: &Poll) -> Result<(), RngError> {
        let Self { queue, metrics } = self;
        queue.drain(|chain| {
            answer(chain, metrics).unwrap_or_else(|err| {
                metrics.bad_chains.inc();
                log::debug!("entropy request refused: {err}");
                0
            })
        })?;
        Ok(())
    }
}

fn answer(chain: Chain<'_>, metrics: &RngMetrics) -> Result<u32, RequestError> {
    let (_, mut room) = chain.buffers()?;
    let mut bytes = [0; MAX_REQUEST];
    let wanted = room.len().min(MAX_REQUEST);
    // Up to 256 bytes come whole; more may be cut short by a signal, which the driver copes with.
    let got = getrandom(&mut bytes[..wanted], GetRandomFlags::empty())
        .map_err(|err| RequestError::Random(err.into()))?;
    let written = room.write(&bytes[..got]);
    metrics.requests.inc();
    metrics.bytes.add_len(written);
    Ok(u32::try_from(written).expect("at most MAX_REQUEST"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Buffer, Driver};

    fn device() -> RngDevice {
        RngDevice::new(|_| Ok(())).unwrap()
    }

    #[test]
    fn request_is_filled_with_random_bytes() {
        let mut device = device();
        let mut driver = Driver::activate(&mut device);
        let used = driver.request(REQUEST_QUEUE, &[], &[64]);
        assert_eq!(used.written, 64);
        assert!(used.bytes.iter().any(|byte| *byte != 0));
        let other = driver.request(REQUEST_QUEUE, &[], &[64]);
        assert_ne!(used.bytes, other.bytes);
    }

    #[test]
    fn huge_request_gets_its_cap() {
        let mut device = device();
        let mut driver = Driver::activate(&mut device);
        let used = driver.request(REQUEST_QUEUE, &[], &[60_000, 60_000]);
        assert_eq!(used.written as usize, MAX_REQUEST);
    }

    #[test]
    fn hostile_chains_are_returned_and_serving_goes_on() {
        let mut device = device();
        let metrics = device.metrics();
        let mut driver = Driver::activate(&mut device);
        for chain in driver.hostile_chains() {
            assert_eq!(
                driver.submit_raw(REQUEST_QUEUE, &chain).written,
                0,
                "{chain:?}"
            );
        }
        assert!(metrics.bad_chains.get() > 0);
        assert_eq!(driver.request(REQUEST_QUEUE, &[], &[16]).written, 16);
    }

    #[test]
    fn indirect_chain_is_filled() {
        let mut device = device();
        let mut driver = Driver::activate(&mut device);
        let head =
            driver.make_indirect_available(REQUEST_QUEUE, &[Buffer::write(10), Buffer::write(20)]);
        driver.kick_if_wanted(REQUEST_QUEUE);
        assert_eq!(driver.wait_used(REQUEST_QUEUE, head).written, 30);
    }

    #[test]
    fn zero_length_request_returns_nothing() {
        let mut device = device();
        let mut driver = Driver::activate(&mut device);
        assert_eq!(driver.submit(REQUEST_QUEUE, &[Buffer::write(0)]).written, 0);
    }

    #[test]
    fn paused_device_goes_on_where_it_stopped() {
        let mut device = device();
        let mut driver = Driver::activate(&mut device);
        driver.request(REQUEST_QUEUE, &[], &[8]);
        let queues = device.pause();
        assert!(device.pause().is_empty());
        let pending = driver.make_available(REQUEST_QUEUE, &[Buffer::write(8)]);
        let mut restored = self::device();
        restored.restore(()).unwrap();
        driver.reactivate(&mut restored, queues);
        assert_eq!(driver.wait_used(REQUEST_QUEUE, pending).written, 8);
    }

    #[test]
    fn broken_ring_needs_a_reset_and_recovers_by_it() {
        let mut device = device();
        let driver = Driver::activate(&mut device);
        driver.set_avail_index(REQUEST_QUEUE, 1000);
        driver.kick(REQUEST_QUEUE);
        driver.wait_needs_reset();
        device.reset();
        let mut driver = Driver::activate(&mut device);
        assert_eq!(driver.request(REQUEST_QUEUE, &[], &[8]).written, 8);
    }
}
