//! Several requests at a time: with an engine that does what the test says, and with the kernel's.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Condvar;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::devices::block::job::Pending;
use crate::virtio::testing::PATIENCE;

/// What an engine does when the test says so.
#[derive(Debug)]
struct Remote {
    state: Mutex<State>,
    changed: Condvar,
    /// Readable while something is done.
    ready: EventFd,
}

#[derive(Debug, Default)]
struct State {
    started: Vec<Pending>,
    done: VecDeque<(Pending, io::Result<usize>)>,
    /// Reads that the device did without the engine.
    read_here: usize,
    /// The device waits.
    waits: bool,
    /// No more can be had.
    broken: bool,
}

impl Default for Remote {
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            ready: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
        }
    }
}

impl Remote {
    #[track_caller]
    fn wait_until(&self, reached: impl Fn(&State) -> bool) {
        let state = self.state.lock().unwrap();
        let (_state, timeout) = self
            .changed
            .wait_timeout_while(state, PATIENCE, |state| !reached(state))
            .unwrap();
        assert!(!timeout.timed_out(), "{self:?}");
    }

    /// Waits until so many are in flight.
    #[track_caller]
    fn wait_for(&self, count: usize) {
        self.wait_until(|state| state.started.len() == count);
    }

    /// Ends the one that was started as the `index`th of those that are in flight.
    fn end(&self, index: usize, outcome: io::Result<usize>) {
        let mut state = self.state.lock().unwrap();
        let mut pending = state.started.remove(index);
        if let Ok(moved) = outcome {
            pending.consume(moved);
        }
        state.done.push_back((pending, outcome));
        self.ready.write(1).unwrap();
        self.changed.notify_all();
    }

    fn fail(&self, index: usize, errno: i32) {
        self.end(index, Err(io::Error::from_raw_os_error(errno)));
    }
}

#[derive(Debug)]
struct RemoteEngine {
    remote: Arc<Remote>,
    capacity: usize,
}

impl Engine for RemoteEngine {
    fn is_full(&self) -> bool {
        self.in_flight() >= self.capacity
    }

    fn start(&mut self, pending: Pending) {
        assert!(!self.is_full());
        assert!(pending.order().is_some());
        self.remote.state.lock().unwrap().started.push(pending);
        self.remote.changed.notify_all();
    }

    fn submit(&mut self) -> io::Result<()> {
        match self.remote.state.lock().unwrap().broken {
            true => Err(io::Error::from_raw_os_error(libc::ENOMEM)),
            false => Ok(()),
        }
    }

    fn take_done(&mut self) -> Option<(Pending, io::Result<usize>)> {
        let done = self.remote.state.lock().unwrap().done.pop_front();
        if done.is_none() {
            let _ = self.remote.ready.read();
        }
        done
    }

    fn wait(&mut self) -> io::Result<()> {
        self.submit()?;
        self.remote.state.lock().unwrap().waits = true;
        self.remote.changed.notify_all();
        self.remote.wait_until(|state| !state.done.is_empty());
        Ok(())
    }

    fn in_flight(&self) -> usize {
        let state = self.remote.state.lock().unwrap();
        state.started.len() + state.done.len()
    }

    fn descriptor(&self) -> RawFd {
        self.remote.ready.as_raw_fd()
    }
}

/// A disk whose reads, flushes and large writes are [`Remote`].
#[derive(Debug, Default)]
struct RemoteDisk {
    remote: Arc<Remote>,
    here: Volatile,
}

impl Storage for RemoteDisk {
    fn read(&self, room: &mut Writable<'_>, offset: u64) -> io::Result<usize> {
        self.remote.state.lock().unwrap().read_here += 1;
        self.remote.changed.notify_all();
        self.here.read(room, offset)
    }

    fn write(&self, data: &mut Readable<'_>, offset: u64) -> io::Result<usize> {
        self.here.write(data, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.here.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.here.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.here.write_zeroes(offset, len, unmap)
    }

    fn engine(&self, capacity: u16) -> io::Result<Box<dyn Engine>> {
        Ok(Box::new(RemoteEngine {
            remote: Arc::clone(&self.remote),
            capacity: capacity.into(),
        }))
    }
}

const GEOMETRY: Geometry = Geometry {
    sectors: SECTORS,
    logical_block: 512,
    physical_block: 512,
};

fn remote() -> (BlockDevice, Arc<RemoteDisk>) {
    let disk = Arc::new(RemoteDisk::default());
    let device = BlockDevice::with_storage(config(false), disk.clone(), GEOMETRY, |_| Ok(()));
    (device.unwrap(), disk)
}

/// More than is written without an engine.
const LARGE: usize = 128 << 10;

fn begin(driver: &mut Driver, kind: u32, sector: u64, data: Buffer) -> u16 {
    let header = Buffer::read(&header(kind, sector));
    let head = driver.make_available(REQUEST_QUEUE, &[header, data, Buffer::write(1)]);
    driver.kick_if_wanted(REQUEST_QUEUE);
    head
}

fn begin_read(driver: &mut Driver, sector: u64) -> u16 {
    begin(driver, IN, sector, Buffer::write(1024))
}

fn begin_write(driver: &mut Driver) -> u16 {
    begin(driver, OUT, 0, Buffer::read(&[1; LARGE]))
}

fn begin_flush(driver: &mut Driver) -> u16 {
    begin(driver, FLUSH, 0, Buffer::read(&[]))
}

/// The length that is returned for a read of 1024 bytes which succeeds.
const READ: u32 = 1025;

#[test]
fn requests_are_returned_in_the_order_in_which_they_are_done() {
    let (mut device, disk) = remote();
    let mut driver = Driver::activate(&mut device);
    let first = begin_read(&mut driver, 0);
    let second = begin_read(&mut driver, 2);
    let third = begin_write(&mut driver);
    disk.remote.wait_for(3);
    disk.remote.end(1, Ok(1024));
    assert_eq!(driver.wait_used(REQUEST_QUEUE, second).written, READ);
    disk.remote.end(1, Ok(LARGE));
    assert_eq!(driver.wait_used(REQUEST_QUEUE, third).bytes, [OK]);
    // What needs no engine waits for none.
    assert_eq!(send(&mut driver, OUT, 1, &[&[0; 512]]), OK);
    assert_eq!(send(&mut driver, OUT, SECTORS, &[&[0; 512]]), IO_ERROR);
    disk.remote.end(0, Ok(1024));
    assert_eq!(driver.wait_used(REQUEST_QUEUE, first).written, READ);
    assert_eq!(device.metrics().reads.get(), 2);
    assert_eq!(device.metrics().writes.get(), 2);
    assert_eq!(device.metrics().read_bytes.get(), 2048);
}

#[test]
fn what_is_done_in_part_goes_on_where_it_stopped() {
    let (mut device, disk) = remote();
    let mut driver = Driver::activate(&mut device);
    let read = begin_read(&mut driver, 4);
    for (at, moved) in [(2048, 1), (2049, 1000), (3049, 23)] {
        disk.remote.wait_for(1);
        let state = disk.remote.state.lock().unwrap();
        let order = format!("{:?}", state.started[0].job().step);
        assert!(order.contains(&format!("offset: {at}")), "{order}");
        drop(state);
        disk.remote.end(0, Ok(moved));
    }
    assert_eq!(driver.wait_used(REQUEST_QUEUE, read).written, READ);
    // The file has become shorter in between, or the disk is full.
    let read = begin_read(&mut driver, 4);
    for moved in [1023, 0] {
        disk.remote.wait_for(1);
        disk.remote.end(0, Ok(moved));
    }
    assert_eq!(driver.wait_used(REQUEST_QUEUE, read).written, 0);
    let write = begin_write(&mut driver);
    for moved in [LARGE - 1, 0] {
        disk.remote.wait_for(1);
        disk.remote.end(0, Ok(moved));
    }
    assert_eq!(driver.wait_used(REQUEST_QUEUE, write).bytes, [IO_ERROR]);
    assert_eq!(device.metrics().reads.get(), 1);
    assert_eq!(device.metrics().writes.get(), 0);
    assert_eq!(device.metrics().errors.get(), 2);
}

#[test]
fn failures_are_told_and_refusals_made_good() {
    let (mut device, disk) = remote();
    let mut driver = Driver::activate(&mut device);
    for (errno, status) in [
        (libc::EIO, IO_ERROR),
        (libc::ENOSPC, IO_ERROR),
        (libc::EOPNOTSUPP, UNSUPPORTED),
        (libc::ECANCELED, OK),
        (libc::EAGAIN, OK),
        (libc::EINTR, OK),
    ] {
        let write = begin_write(&mut driver);
        let flush = begin_flush(&mut driver);
        disk.remote.wait_for(2);
        disk.remote.fail(0, errno);
        let answer = driver.wait_used(REQUEST_QUEUE, write).bytes;
        assert_eq!(answer, [status], "{errno}");
        disk.remote.fail(0, errno);
        let answer = driver.wait_used(REQUEST_QUEUE, flush).bytes;
        assert_eq!(answer, [status], "{errno}");
    }
    assert_eq!(device.metrics().flushes.get(), 3);
    assert_eq!(disk.here.state.lock().unwrap().durable, [0, 0, 0]);
}

#[test]
fn write_of_a_driver_that_cannot_flush_is_done_when_it_is_durable() {
    let (mut device, disk) = remote();
    let features = (device.features() | 1 << VIRTIO_RING_F_EVENT_IDX) & !F_FLUSH;
    let mut driver = Driver::activate_with(&mut device, features);
    let durable = |disk: &RemoteDisk| {
        disk.remote.wait_for(1);
        let state = disk.remote.state.lock().unwrap();
        assert!(matches!(state.started[0].job().step, Step::Flush));
    };
    let write = begin_write(&mut driver);
    disk.remote.wait_for(1);
    disk.remote.end(0, Ok(LARGE));
    durable(&disk);
    assert_eq!(driver.try_any_used(REQUEST_QUEUE), None);
    disk.remote.end(0, Ok(0));
    assert_eq!(driver.wait_used(REQUEST_QUEUE, write).bytes, [OK]);
    // What is written, or zeroed, without the engine; nothing is something, too.
    for (kind, data) in [
        (OUT, &[1; 512][..]),
        (OUT, &[]),
        (WRITE_ZEROES, &segment(2, 1, 0)),
    ] {
        let head = begin(&mut driver, kind, 1, Buffer::read(data));
        durable(&disk);
        assert_eq!(driver.try_any_used(REQUEST_QUEUE), None);
        disk.remote.fail(0, libc::EIO);
        assert_eq!(driver.wait_used(REQUEST_QUEUE, head).bytes, [IO_ERROR]);
    }
    assert_eq!(device.metrics().writes.get(), 1);
}

/// Ends what is in flight once the device waits for it. True if it did.
fn end_when_awaited(disk: &Arc<RemoteDisk>, outcomes: &'static [usize]) -> impl Fn() -> bool {
    let ended = Arc::new(AtomicBool::new(false));
    let (disk, seen) = (Arc::clone(disk), Arc::clone(&ended));
    thread::spawn(move || {
        disk.remote.wait_until(|state| state.waits);
        for moved in outcomes {
            disk.remote
                .wait_until(|state| !state.started.is_empty() && state.done.is_empty());
            seen.store(true, Ordering::Release);
            disk.remote.end(0, Ok(*moved));
        }
    });
    move || ended.load(Ordering::Acquire)
}

#[test]
fn reset_waits_for_what_is_in_flight() {
    let (mut device, disk) = remote();
    let mut driver = Driver::activate(&mut device);
    begin_read(&mut driver, 0);
    begin_write(&mut driver);
    begin_flush(&mut driver);
    disk.remote.wait_for(3);
    let ended = end_when_awaited(&disk, &[1024, LARGE, 0]);
    device.reset();
    assert!(ended());
    let state = disk.remote.state.lock().unwrap();
    assert_eq!(state.started.len() + state.done.len(), 0);
    drop(state);
    // The next driver finds the engine as it should be.
    let mut driver = Driver::activate(&mut device);
    let read = begin_read(&mut driver, 0);
    disk.remote.wait_for(1);
    disk.remote.end(0, Ok(1024));
    assert_eq!(driver.wait_used(REQUEST_QUEUE, read).written, READ);
}

#[test]
fn pause_answers_what_is_in_flight_to_its_end() {
    let (mut device, disk) = remote();
    let mut driver = Driver::activate(&mut device);
    let read = begin_read(&mut driver, 0);
    disk.remote.wait_for(1);
    let ended = end_when_awaited(&disk, &[1000, 24]);
    let queues = device.pause();
    assert!(ended());
    assert_eq!(driver.wait_used(REQUEST_QUEUE, read).written, READ);
    driver.reactivate(&mut device, queues);
    assert_eq!(send(&mut driver, OUT, 1, &[&[0; 512]]), OK);
}

#[test]
fn engine_that_breaks_is_not_used_again() {
    let (mut device, disk) = remote();
    let mut driver = Driver::activate(&mut device);
    begin_read(&mut driver, 0);
    disk.remote.wait_for(1);
    disk.remote.state.lock().unwrap().broken = true;
    begin_read(&mut driver, 0);
    driver.wait_needs_reset();
    device.reset();
    let mut driver = Driver::activate(&mut device);
    let read = begin_read(&mut driver, 0);
    assert_eq!(driver.wait_used(REQUEST_QUEUE, read).written, READ);
    assert_eq!(send(&mut driver, FLUSH, 0, &[]), OK);
}

#[test]
fn no_more_is_in_flight_than_there_is_room_for() {
    let (mut device, disk) = remote();
    let mut driver = Driver::activate(&mut device);
    let header = header(IN, 0);
    let request = [Buffer::read(&header), Buffer::write(512), Buffer::write(1)];
    let head = driver.make_indirect_available(REQUEST_QUEUE, &request);
    // A driver that means harm offers it again and again while it is served. Those that are too many are done at once.
    let offer = |driver: &mut Driver, count| {
        for _ in 0..count {
            driver.offer_again(REQUEST_QUEUE, head);
        }
        driver.kick(REQUEST_QUEUE);
    };
    offer(&mut driver, 255);
    disk.remote.wait_for(256);
    offer(&mut driver, 100);
    disk.remote.wait_until(|state| state.read_here == 100);
    disk.remote.wait_for(256);
    disk.remote.state.lock().unwrap().broken = true;
}

/// A disk that is a pipe: what is read comes when the test says so, and the kernel waits for it.
#[derive(Debug)]
struct Pipe {
    reader: Arc<OwnedFd>,
}

impl Storage for Pipe {
    fn read(&self, _room: &mut Writable<'_>, _offset: u64) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn write(&self, data: &mut Readable<'_>, _offset: u64) -> io::Result<usize> {
        Ok(data.take(usize::MAX).len())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _unmap: bool) -> io::Result<()> {
        Ok(())
    }

    fn engine(&self, capacity: u16) -> io::Result<Box<dyn Engine>> {
        Ok(Box::new(Ring::new(Arc::clone(&self.reader), capacity)?))
    }
}

/// With a guest that reads from a pipe, whose other end it is given; unless there is no io_uring.
fn with_pipe(test: impl FnOnce(BlockDevice, Driver, io::PipeWriter)) {
    if ways().contains(&Way::Ring) {
        let (reader, writer) = io::pipe().unwrap();
        let reader = Arc::new(OwnedFd::from(reader));
        let storage = Arc::new(Pipe { reader });
        let device = BlockDevice::with_storage(config(false), storage, GEOMETRY, |_| Ok(()));
        let mut device = device.unwrap();
        let driver = Driver::activate(&mut device);
        test(device, driver, writer);
    }
}

#[test]
fn kernel_does_several_requests_at_a_time() {
    with_pipe(|_device, mut driver, mut pipe| {
        let read = begin_read(&mut driver, 0);
        // Answered while the read waits: what a pipe cannot do, and what the thread does itself.
        let flush = begin_flush(&mut driver);
        assert_eq!(driver.wait_used(REQUEST_QUEUE, flush).bytes, [IO_ERROR]);
        assert_eq!(send(&mut driver, OUT, 0, &[&[0; 512]]), OK);
        // The kernel returns what there is: the device asks for the rest.
        pipe.write_all(&[5; 100]).unwrap();
        assert_eq!(send(&mut driver, OUT, 0, &[&[0; 512]]), OK);
        assert_eq!(driver.try_any_used(REQUEST_QUEUE), None);
        pipe.write_all(&[6; 924]).unwrap();
        let used = driver.wait_used(REQUEST_QUEUE, read);
        let expected = [&[5; 100][..], &[6; 924], &[OK]].concat();
        assert_eq!(used.bytes, expected);
    });
}

#[test]
fn kernel_is_done_with_the_memory_when_the_device_is_stopped() {
    with_pipe(|mut device, mut driver, mut pipe| {
        let heads = [begin_read(&mut driver, 0), begin_read(&mut driver, 0)];
        let writer = thread::spawn(move || pipe.write_all(&[7; 2048]).map(|()| pipe));
        let queues = device.pause();
        for head in heads {
            let used = driver.wait_used(REQUEST_QUEUE, head);
            assert_eq!(used.bytes, [&[7; 1024][..], &[OK]].concat());
        }
        driver.reactivate(&mut device, queues);
        let mut pipe = writer.join().unwrap().unwrap();
        begin_read(&mut driver, 0);
        let writer = thread::spawn(move || pipe.write_all(&[8; 1024]));
        device.reset();
        writer.join().unwrap().unwrap();
    });
}

#[test]
fn end_of_the_disk_s_file_is_an_error() {
    with_pipe(|_device, mut driver, mut pipe| {
        let read = begin_read(&mut driver, 0);
        pipe.write_all(&[5; 1023]).unwrap();
        drop(pipe);
        assert_eq!(driver.wait_used(REQUEST_QUEUE, read).written, 0);
    });
}

#[test]
fn batch_of_large_requests_is_done() {
    each_way(false, |mut guest| {
        let driver = &mut guest.driver;
        let content = |turn: u8| vec![turn; LARGE];
        let writes: Vec<u16> = (0..8_u8)
            .map(|turn| {
                let buffers = [
                    Buffer::read(&header(OUT, u64::from(turn) * 256)),
                    Buffer::read(&content(turn)),
                    Buffer::write(1),
                ];
                driver.make_indirect_available(REQUEST_QUEUE, &buffers)
            })
            .collect();
        driver.kick(REQUEST_QUEUE);
        for head in writes {
            assert_eq!(driver.wait_used(REQUEST_QUEUE, head).bytes, [OK]);
        }
        let reads: Vec<u16> = (0..8_u8)
            .map(|turn| {
                let buffers = [
                    Buffer::read(&header(IN, u64::from(turn) * 256)),
                    Buffer::write(LARGE + 1),
                ];
                driver.make_available(REQUEST_QUEUE, &buffers)
            })
            .collect();
        driver.kick(REQUEST_QUEUE);
        for (turn, head) in (0..).zip(reads) {
            let used = driver.wait_used(REQUEST_QUEUE, head);
            assert_eq!(used.bytes.split_last(), Some((&OK, &content(turn)[..])));
        }
        assert_eq!(guest.device.metrics().written_bytes.get(), 1 << 20);
        assert_eq!(guest.device.metrics().read_bytes.get(), 1 << 20);
    });
}

#[test]
fn host_that_forbids_io_uring_is_done_without() {
    thread::spawn(|| {
        let eperm = u32::try_from(libc::EPERM).unwrap();
        let filter = SeccompFilter::new(
            [(libc::SYS_io_uring_setup, Vec::new())].into(),
            SeccompAction::Allow,
            SeccompAction::Errno(eperm),
            TargetArch::x86_64,
        );
        let program: BpfProgram = filter.unwrap().try_into().unwrap();
        seccompiler::apply_filter(&program).unwrap();
        let refused = Ring::new(Arc::new(file().into()), 1).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        let mut guest = Guest::with(Way::Ring, false);
        assert_eq!(send(&mut guest.driver, OUT, 0, &[&[1; LARGE]]), OK);
        let bytes = read(&mut guest.driver, 0, LARGE, LARGE).unwrap();
        assert_eq!(bytes, [1; LARGE]);
        assert_eq!(send(&mut guest.driver, FLUSH, 0, &[]), OK);
    })
    .join()
    .unwrap();
}
