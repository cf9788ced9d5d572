//! The driver puts pieces of memory that the guest does not use into the reporting queue, as device-writable buffers, and
//! waits; the device's thread gives their pages back to the host and returns the chain. Linux reports blocks of 2 MiB or
//! more, a few seconds after they were freed, at most 32 at once.

use std::io;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::metrics::BalloonMetrics;
use crate::memory;
use crate::snapshot::{RestoreError, Snapshot};
use crate::virtio::queue::{Chain, QueueError, Virtqueue, take_queues};
use crate::virtio::worker::{Poll, Serve, ThreadSetup, Worker};
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, DeviceType, VirtioDevice, read_config_space,
};

/// Index of the queue of pages that go into the balloon.
pub const INFLATE_QUEUE: u16 = 0;
/// Index of the queue of pages that come out of it.
pub const DEFLATE_QUEUE: u16 = 1;
/// Index of the queue of memory that is not used.
pub const REPORTING_QUEUE: u16 = 2;

const QUEUE_SIZES: [u16; 3] = [128; 3];

/// VIRTIO_BALLOON_F_PAGE_REPORTING (5.5.3).
const PAGE_REPORTING: u64 = 1 << 5;

/// `num_pages` and `actual` (5.5.4).
const CONFIG_LEN: usize = 8;

/// Why the device cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum BalloonError {
    /// A queue is unusable.
    #[error("a queue of the balloon")]
    Queue(#[from] QueueError),
}

/// A memory balloon.
#[derive(Debug)]
pub struct BalloonDevice {
    worker: Worker<BalloonWorker>,
    metrics: Arc<BalloonMetrics>,
}

impl BalloonDevice {
    /// Makes the device and its thread.
    ///
    /// # Errors
    /// When the thread cannot be made.
    pub fn new(setup: ThreadSetup) -> io::Result<Self> {
        Ok(Self {
            worker: Worker::spawn("balloon", DeviceType::Balloon, setup)?,
            metrics: Arc::default(),
        })
    }

    /// The device's counters.
    pub fn metrics(&self) -> Arc<BalloonMetrics> {
        Arc::clone(&self.metrics)
    }
}

impl VirtioDevice for BalloonDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn features(&self) -> u64 {
        PAGE_REPORTING
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// An empty balloon. The driver writes to `actual` how large it has made it, which is of no interest.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&[0; CONFIG_LEN], offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let interrupt = Arc::clone(&activation.interrupt);
        // A driver without the feature leaves the last queue out.
        let reports = activation.features & PAGE_REPORTING != 0;
        let queues = if reports {
            take_queues(activation, [INFLATE_QUEUE, DEFLATE_QUEUE, REPORTING_QUEUE])?.into()
        } else {
            take_queues(activation, [INFLATE_QUEUE, DEFLATE_QUEUE])?.into()
        };
        let metrics = Arc::clone(&self.metrics);
        self.worker
            .start(BalloonWorker { queues, metrics }, interrupt)
    }

    fn pause(&mut self) -> Vec<ActiveQueue> {
        let served = self.worker.stop();
        served
            .into_iter()
            .flat_map(|served| served.queues)
            .map(Virtqueue::into_active)
            .collect()
    }

    fn reset(&mut self) {
        self.worker.stop();
    }
}

impl Snapshot for BalloonDevice {
    /// An empty balloon has none.
    type State = ();

    fn save(&self) -> Self::State {}

    fn restore(&mut self, (): Self::State) -> Result<(), RestoreError> {
        Ok(())
    }
}

/// What exists only while active.
#[derive(Debug)]
struct BalloonWorker {
    queues: Vec<Virtqueue>,
    metrics: Arc<BalloonMetrics>,
}

impl Serve for BalloonWorker {
    type Error = BalloonError;

    fn queues(&self) -> Vec<&Virtqueue> {
        self.queues.iter().collect()
    }

    fn kicked(&mut self, index: u16, _poll: &Poll) -> Result<(), BalloonError> {
        let Self { queues, metrics } = self;
        let Some(queue) = queues.iter_mut().find(|queue| queue.index() == index) else {
            return Ok(());
        };
        let memory = queue.memory();
        queue.drain(|chain| {
            // No page goes in or out: a driver that says so gets its pages back as they were.
            if index == REPORTING_QUEUE {
                take_back(&memory, chain, metrics);
            }
            0
        })?;
        Ok(())
    }
}

/// Gives what the chain names back to the host. Nothing is written: the buffers are the memory itself.
fn take_back(memory: &GuestMemoryMmap, chain: Chain<'_>, metrics: &BalloonMetrics) {
    let unused = match chain.buffers() {
        Ok((_, unused)) => unused,
        Err(err) => {
            metrics.bad_chains.inc();
            log::debug!("report of unused memory refused: {err}");
            return;
        }
    };
    metrics.reports.inc();
    for piece in unused.pieces() {
        match memory::give_back(memory, piece) {
            Ok(len) => metrics.reported_bytes.add_len(len),
            Err(err) => {
                metrics.failures.inc();
                log::debug!("the host does not take memory back: {err}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Buffer, Driver, RawDescriptor};

    const WRITE: u16 = 2;
    const PIECE: u64 = 64 << 20;
    const LEN: usize = 2 << 20;

    fn device() -> BalloonDevice {
        BalloonDevice::new(|_| Ok(())).unwrap()
    }

    fn report(at: u64, len: usize) -> [RawDescriptor; 1] {
        [RawDescriptor {
            addr: at,
            len: u32::try_from(len).unwrap(),
            flags: WRITE,
            next: 0,
        }]
    }

    #[test]
    fn reported_memory_is_empty_and_usable_and_its_neighbours_are_as_they_were() {
        let mut device = device();
        let mut driver = Driver::activate(&mut device);
        driver.fill(PIECE - 4096, LEN + 8192, 7);
        let used = driver.submit_raw(REPORTING_QUEUE, &report(PIECE, LEN));
        assert_eq!(used.written, 0);
        assert_eq!(driver.bytes_at(PIECE - 1, 2), [7, 0]);
        let end = PIECE + LEN as u64;
        assert_eq!(driver.bytes_at(end - 1, 2), [0, 7]);
        assert_eq!(device.metrics().reported_bytes.get(), LEN as u64);
        driver.fill(PIECE, 1, 9);
        assert_eq!(driver.bytes_at(PIECE, 2), [9, 0]);
    }

    #[test]
    fn parts_of_pages_are_kept() {
        let mut device = device();
        let mut driver = Driver::activate(&mut device);
        driver.fill(PIECE, 8192, 7);
        driver.submit_raw(REPORTING_QUEUE, &report(PIECE + 1, 8190));
        assert_eq!(driver.bytes_at(PIECE, 8192), [7; 8192]);
    }

    #[test]
    fn pages_of_the_balloon_are_returned_as_they_were() {
        let mut device = device();
        let mut driver = Driver::activate(&mut device);
        let frame = u32::try_from(PIECE / 4096).unwrap();
        driver.fill(PIECE, 4096, 7);
        for queue in [INFLATE_QUEUE, DEFLATE_QUEUE] {
            let used = driver.submit(queue, &[Buffer::read(&frame.to_le_bytes())]);
            assert_eq!(used.written, 0);
        }
        assert_eq!(driver.bytes_at(PIECE, 4096), [7; 4096]);
    }

    #[test]
    fn hostile_chains_are_returned_and_serving_goes_on() {
        let mut device = device();
        let metrics = device.metrics();
        let mut driver = Driver::activate(&mut device);
        for chain in driver.hostile_chains() {
            assert_eq!(driver.submit_raw(REPORTING_QUEUE, &chain).written, 0);
        }
        assert!(metrics.bad_chains.get() > 0);
        let before = metrics.reported_bytes.get();
        driver.submit_raw(REPORTING_QUEUE, &report(PIECE, LEN));
        assert_eq!(metrics.reported_bytes.get(), before + LEN as u64);
    }

    #[test]
    fn driver_without_the_feature_has_two_queues() {
        let mut device = device();
        let driver = Driver::activate_with(&mut device, 0);
        let queues = device.pause();
        assert_eq!(queues.len(), 2);
        driver.reactivate(&mut device, queues);
    }

    #[test]
    fn paused_device_goes_on_where_it_stopped() {
        let mut device = device();
        let mut driver = Driver::activate(&mut device);
        driver.submit_raw(REPORTING_QUEUE, &report(PIECE, LEN));
        let queues = device.pause();
        let pending = driver.make_available(INFLATE_QUEUE, &[Buffer::read(&[0; 4])]);
        let mut restored = self::device();
        restored.restore(()).unwrap();
        driver.reactivate(&mut restored, queues);
        assert_eq!(driver.wait_used(INFLATE_QUEUE, pending).written, 0);
        let mut config = [0xee; 12];
        restored.read_config(0, &mut config);
        assert_eq!(config, [0; 12]);
    }
}
