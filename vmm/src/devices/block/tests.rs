//! Tests of the block device, by a driver that reads back what it wrote, and one that means harm.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::disk::{Disk, Geometry, SECTOR, Storage};
use super::job::Step;
use super::request::{MAX_DISCARD_SECTORS, MAX_ZEROES_SECTORS};
use super::ring::{Engine, Ring};
use super::{BlockConfig, BlockDevice, REQUEST_QUEUE};
use crate::snapshot::Snapshot;
use crate::virtio::VirtioDevice;
use crate::virtio::queue::{Readable, Writable};
use crate::virtio::testing::{Buffer, Driver};

mod engine;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const F_RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

const SECTORS: u64 = 2048;
const LEN: usize = 1 << 20;

fn config(read_only: bool) -> BlockConfig {
    BlockConfig::new("husk-disk-0".to_owned(), read_only).unwrap()
}

/// A disk of 1 MiB in a file that is not sparse.
fn file() -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&vec![0xaa; LEN]).unwrap();
    file.sync_all().unwrap();
    file
}

/// How the disk's requests are done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Plain,
    Ring,
}

/// A disk without an engine.
#[derive(Debug)]
struct Plain(Disk);

impl Storage for Plain {
    fn read(&self, room: &mut Writable<'_>, offset: u64) -> io::Result<usize> {
        self.0.read(room, offset)
    }

    fn write(&self, data: &mut Readable<'_>, offset: u64) -> io::Result<usize> {
        self.0.write(data, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.0.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.0.write_zeroes(offset, len, unmap)
    }

    fn engine(&self, _capacity: u16) -> io::Result<Box<dyn Engine>> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Those that this machine has.
fn ways() -> Vec<Way> {
    let disk = Arc::new(OwnedFd::from(file()));
    match Ring::new(disk, 1) {
        Ok(_) => vec![Way::Plain, Way::Ring],
        Err(err) => {
            let _ = writeln!(
                io::stderr(),
                "SKIPPED for io_uring, which this machine does not have: {err}"
            );
            vec![Way::Plain]
        }
    }
}

fn device(way: Way, config: BlockConfig, file: &File) -> BlockDevice {
    let (disk, geometry) = Disk::new(file.try_clone().unwrap().into()).unwrap();
    let storage: Arc<dyn Storage> = match way {
        Way::Plain => Arc::new(Plain(disk)),
        Way::Ring => Arc::new(disk),
    };
    BlockDevice::with_storage(config, storage, geometry, |_| Ok(())).unwrap()
}

struct Guest {
    device: BlockDevice,
    driver: Driver,
    file: File,
}

/// Runs a test with a guest of each way.
fn each_way(read_only: bool, test: impl Fn(Guest)) {
    for way in ways() {
        println!("{way:?}");
        test(Guest::with(way, read_only));
    }
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

fn segment(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut segment = [0; 16];
    segment[..8].copy_from_slice(&sector.to_le_bytes());
    segment[8..12].copy_from_slice(&sectors.to_le_bytes());
    segment[12..].copy_from_slice(&flags.to_le_bytes());
    segment
}

/// Sends a request without data for the guest, and returns its status.
fn send(driver: &mut Driver, kind: u32, sector: u64, data: &[&[u8]]) -> u8 {
    let header = header(kind, sector);
    let request: Vec<&[u8]> = std::iter::once(&header[..])
        .chain(data.iter().copied())
        .collect();
    let used = driver.request(REQUEST_QUEUE, &request, &[1]);
    assert_eq!(used.written, 1);
    used.bytes[0]
}

/// Reads `len` bytes into buffers of at most `piece`.
fn read(driver: &mut Driver, sector: u64, len: usize, piece: usize) -> Result<Vec<u8>, u8> {
    let mut room: Vec<usize> = vec![piece; len / piece];
    room.push(len % piece);
    room.push(1);
    let header = header(IN, sector);
    let head = driver.make_available(
        REQUEST_QUEUE,
        &std::iter::once(Buffer::read(&header))
            .chain(room.iter().map(|len| Buffer::write(*len)))
            .collect::<Vec<_>>(),
    );
    driver.kick_if_wanted(REQUEST_QUEUE);
    let used = driver.wait_used(REQUEST_QUEUE, head);
    match used.bytes.split_last() {
        Some((&OK, bytes)) => Ok(bytes.to_vec()),
        // The status is behind room that was not filled, which the used length does not cover.
        _ => Err(IO_ERROR),
    }
}

impl Guest {
    fn with(way: Way, read_only: bool) -> Self {
        let file = file();
        let mut device = device(way, config(read_only), &file);
        let driver = Driver::activate(&mut device);
        Self {
            device,
            driver,
            file,
        }
    }

    fn content(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.file.seek(SeekFrom::Start(0)).unwrap();
        self.file.read_to_end(&mut bytes).unwrap();
        bytes
    }
}

#[test]
fn configuration_space_describes_the_disk() {
    each_way(false, |guest| {
        let mut space = [0xff; 64];
        guest.device.read_config(0, &mut space);
        assert_eq!(space[..8], SECTORS.to_le_bytes());
        assert_eq!(space[12..16], 254_u32.to_le_bytes());
        assert_eq!(space[20..24], 512_u32.to_le_bytes());
        assert_eq!(space[24], 3);
        assert_eq!(space[36..40], MAX_DISCARD_SECTORS.to_le_bytes());
        assert_eq!(space[48..52], MAX_ZEROES_SECTORS.to_le_bytes());
        assert_eq!(space[60..], [0; 4]);
        assert!(BlockConfig::new(String::new(), false).is_err());
        assert!(BlockConfig::new("x".repeat(21), false).is_err());
        assert!(BlockConfig::new("white space".to_owned(), false).is_err());
    });
}

#[test]
fn what_is_no_disk_is_refused() {
    let (reader, _writer) = io::pipe().unwrap();
    assert!(BlockDevice::new(config(false), reader.into(), |_| Ok(())).is_err());
}

#[test]
fn sectors_are_written_and_read() {
    each_way(false, |mut guest| {
        let data: Vec<u8> = (0..8192_u32).map(|i| (i / 7).to_le_bytes()[0]).collect();
        let pieces: Vec<&[u8]> = data.chunks(1000).collect();
        assert_eq!(send(&mut guest.driver, OUT, 100, &pieces), OK);
        assert_eq!(read(&mut guest.driver, 100, 8192, 3000).unwrap(), data);
        assert_eq!(guest.content()[100 * 512..100 * 512 + 8192], data);
        assert_eq!(guest.content()[..100 * 512], vec![0xaa; 100 * 512]);
    });
}

#[test]
fn serial_is_answered() {
    each_way(false, |mut guest| {
        let used = guest
            .driver
            .request(REQUEST_QUEUE, &[&header(GET_ID, 0)], &[20, 1]);
        assert_eq!(&used.bytes[..12], b"husk-disk-0\0");
        assert_eq!((used.written, used.bytes[20]), (21, OK));
        // Less room than there should be, and none.
        guest
            .driver
            .request(REQUEST_QUEUE, &[&header(GET_ID, 0)], &[4, 1]);
        assert_eq!(send(&mut guest.driver, GET_ID, 0, &[]), OK);
    });
}

#[test]
fn requests_beyond_the_end_fail_and_change_nothing() {
    each_way(false, |mut guest| {
        let sector = [0x55; 512];
        for start in [SECTORS, SECTORS + 1, u64::MAX, u64::MAX / 512, 1 << 55] {
            assert_eq!(send(&mut guest.driver, OUT, start, &[&sector]), IO_ERROR);
            assert_eq!(read(&mut guest.driver, start, 512, 512), Err(IO_ERROR));
            for kind in [DISCARD, WRITE_ZEROES] {
                let range = segment(start, 1, 0);
                assert_eq!(send(&mut guest.driver, kind, 0, &[&range]), IO_ERROR);
            }
        }
        // Half of it would fit.
        let two = [0x55; 1024];
        assert_eq!(send(&mut guest.driver, OUT, SECTORS - 1, &[&two]), IO_ERROR);
        let both = [segment(0, 1, 0), segment(SECTORS - 1, 2, 0)].concat();
        assert_eq!(send(&mut guest.driver, DISCARD, 0, &[&both]), IO_ERROR);
        // Lengths that are no sectors.
        assert_eq!(send(&mut guest.driver, OUT, 0, &[&sector[1..]]), IO_ERROR);
        assert_eq!(read(&mut guest.driver, 0, 100, 100), Err(IO_ERROR));
        assert_eq!(guest.content(), vec![0xaa; LEN]);
        assert_eq!(guest.file.metadata().unwrap().len(), LEN as u64);
    });
}

#[test]
fn discard_punches_holes_and_keeps_the_size() {
    each_way(false, |mut guest| {
        let before = guest.file.metadata().unwrap().blocks();
        let ranges = [segment(0, 1024, 0), segment(1536, 512, 0)].concat();
        assert_eq!(send(&mut guest.driver, DISCARD, 0, &[&ranges]), OK);
        let after = guest.file.metadata().unwrap();
        assert_eq!(after.len(), LEN as u64);
        assert!(
            after.blocks() < before,
            "{} of {before} blocks",
            after.blocks()
        );
        let content = guest.content();
        assert!(content[..1024 * 512].iter().all(|byte| *byte == 0));
        assert!(
            content[1024 * 512..1536 * 512]
                .iter()
                .all(|byte| *byte == 0xaa)
        );
        assert!(content[1536 * 512..].iter().all(|byte| *byte == 0));
    });
}

#[test]
fn write_zeroes_zeroes_with_and_without_unmap() {
    each_way(false, |mut guest| {
        let before = guest.file.metadata().unwrap().blocks();
        for (sector, flags) in [(8, 0), (1024, 1)] {
            let range = segment(sector, 512, flags);
            assert_eq!(send(&mut guest.driver, WRITE_ZEROES, 0, &[&range]), OK);
        }
        let content = guest.content();
        for (index, byte) in content.iter().enumerate() {
            let sector = index as u64 / SECTOR;
            let zeroed = (8..520).contains(&sector) || (1024..1536).contains(&sector);
            assert_eq!(*byte, if zeroed { 0 } else { 0xaa }, "sector {sector}");
        }
        assert!(guest.file.metadata().unwrap().blocks() < before);
    });
}

#[test]
fn limits_of_ranges_are_kept() {
    each_way(false, |mut guest| {
        let driver = &mut guest.driver;
        let one = segment(0, 1, 0);
        // Not a whole number of ranges, none, too many, too long.
        assert_eq!(send(driver, DISCARD, 0, &[&one[..15]]), IO_ERROR);
        assert_eq!(send(driver, DISCARD, 0, &[]), IO_ERROR);
        assert_eq!(send(driver, DISCARD, 0, &[&one.repeat(17)]), IO_ERROR);
        assert_eq!(send(driver, DISCARD, 0, &[&one.repeat(16)]), OK);
        assert_eq!(send(driver, WRITE_ZEROES, 0, &[&one.repeat(2)]), IO_ERROR);
        let long = segment(0, u32::MAX, 0);
        assert_eq!(send(driver, WRITE_ZEROES, 0, &[&long]), IO_ERROR);
        // Flags that are not defined; unmap is none of discard's.
        assert_eq!(send(driver, DISCARD, 0, &[&segment(0, 1, 1)]), UNSUPPORTED);
        assert_eq!(
            send(driver, WRITE_ZEROES, 0, &[&segment(0, 1, 2)]),
            UNSUPPORTED
        );
        assert_eq!(send(driver, WRITE_ZEROES, 0, &[&segment(0, 1, 1)]), OK);
        // Ranges in pieces.
        assert_eq!(send(driver, DISCARD, 0, &[&one[..7], &one[7..]]), OK);
    });
}

#[test]
fn what_was_not_agreed_on_is_unsupported() {
    let file = file();
    let mut device = BlockDevice::new(config(false), file.into(), |_| Ok(())).unwrap();
    let features = device.features() & !(F_DISCARD | F_WRITE_ZEROES);
    let mut driver = Driver::activate_with(&mut device, features);
    let one = segment(0, 1, 0);
    assert_eq!(send(&mut driver, DISCARD, 0, &[&one]), UNSUPPORTED);
    assert_eq!(send(&mut driver, WRITE_ZEROES, 0, &[&one]), UNSUPPORTED);
    for kind in [2, 3, 5, 7, 9, 10, 12, 14, 999, u32::MAX] {
        assert_eq!(send(&mut driver, kind, 0, &[]), UNSUPPORTED, "{kind}");
    }
}

#[test]
fn read_only_disk_refuses_all_changes() {
    each_way(true, |mut guest| {
        assert_eq!(
            guest.device.features() & (F_RO | F_DISCARD | F_WRITE_ZEROES),
            F_RO
        );
        let one = segment(0, 1, 0);
        assert_eq!(send(&mut guest.driver, OUT, 0, &[&[0; 512]]), IO_ERROR);
        assert_ne!(send(&mut guest.driver, DISCARD, 0, &[&one]), OK);
        assert_ne!(send(&mut guest.driver, WRITE_ZEROES, 0, &[&one]), OK);
        assert_eq!(send(&mut guest.driver, FLUSH, 0, &[]), OK);
        assert_eq!(
            read(&mut guest.driver, 0, 512, 512).unwrap(),
            vec![0xaa; 512]
        );
        // Nor does a driver change that which takes what it was not offered.
        guest.device.reset();
        let mut driver =
            Driver::activate_with(&mut guest.device, F_DISCARD | F_WRITE_ZEROES | F_FLUSH);
        for kind in [DISCARD, WRITE_ZEROES] {
            assert_eq!(send(&mut driver, kind, 0, &[&one]), IO_ERROR);
        }
        assert_eq!(guest.content(), vec![0xaa; LEN]);
    });
}

#[test]
fn file_that_became_shorter_is_an_error() {
    each_way(false, |mut guest| {
        guest.file.set_len(512).unwrap();
        assert_eq!(read(&mut guest.driver, 0, 1024, 1024), Err(IO_ERROR));
        assert_eq!(
            read(&mut guest.driver, 0, 512, 512).unwrap(),
            vec![0xaa; 512]
        );
    });
}

#[test]
fn malformed_chains_are_returned_and_serving_goes_on() {
    each_way(false, |mut guest| {
        for chain in guest.driver.hostile_chains() {
            assert_eq!(guest.driver.submit_raw(REQUEST_QUEUE, &chain).written, 0);
        }
        // No header, half a header, no room for the status.
        for chain in [
            vec![Buffer::write(513)],
            vec![Buffer::read(&[0; 15]), Buffer::write(513)],
            vec![Buffer::read(&header(FLUSH, 0))],
            vec![Buffer::read(&header(FLUSH, 0)), Buffer::write(0)],
        ] {
            assert_eq!(
                guest.driver.submit(REQUEST_QUEUE, &chain).written,
                0,
                "{chain:?}"
            );
        }
        assert!(guest.device.metrics().bad_chains.get() > 10);
        assert_eq!(send(&mut guest.driver, FLUSH, 0, &[]), OK);
        assert_eq!(guest.content(), vec![0xaa; LEN]);
    });
}

/// A disk that forgets what was not flushed.
#[derive(Debug, Default)]
struct Volatile {
    state: Mutex<VolatileState>,
}

#[derive(Debug, Default)]
struct VolatileState {
    cached: Vec<u64>,
    durable: Vec<u64>,
    flush_fails: bool,
}

impl Storage for Volatile {
    fn read(&self, room: &mut Writable<'_>, _offset: u64) -> io::Result<usize> {
        Ok(room.take(usize::MAX).len())
    }

    fn write(&self, data: &mut Readable<'_>, offset: u64) -> io::Result<usize> {
        self.state.lock().unwrap().cached.push(offset);
        Ok(data.take(usize::MAX).len())
    }

    fn flush(&self) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        if state.flush_fails {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let cached = std::mem::take(&mut state.cached);
        state.durable.extend(cached);
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }

    fn write_zeroes(&self, offset: u64, _len: u64, _unmap: bool) -> io::Result<()> {
        self.state.lock().unwrap().cached.push(offset);
        Ok(())
    }

    fn engine(&self, _capacity: u16) -> io::Result<Box<dyn Engine>> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

fn volatile() -> (BlockDevice, Arc<Volatile>) {
    let storage = Arc::new(Volatile::default());
    let geometry = Geometry {
        sectors: SECTORS,
        logical_block: 512,
        physical_block: 512,
    };
    let device =
        BlockDevice::with_storage(config(false), storage.clone(), geometry, |_| Ok(())).unwrap();
    (device, storage)
}

#[test]
fn flush_is_answered_only_when_all_before_it_is_durable() {
    let (mut device, storage) = volatile();
    let mut driver = Driver::activate(&mut device);
    assert_eq!(send(&mut driver, OUT, 1, &[&[0; 512]]), OK);
    assert_eq!(send(&mut driver, OUT, 2, &[&[0; 512]]), OK);
    assert!(storage.state.lock().unwrap().durable.is_empty());
    assert_eq!(send(&mut driver, FLUSH, 0, &[]), OK);
    assert_eq!(storage.state.lock().unwrap().durable, [512, 1024]);
}

#[test]
fn flush_that_fails_is_an_error() {
    let (mut device, storage) = volatile();
    let mut driver = Driver::activate(&mut device);
    storage.state.lock().unwrap().flush_fails = true;
    assert_eq!(send(&mut driver, FLUSH, 0, &[]), IO_ERROR);
    assert_eq!(device.metrics().flushes.get(), 0);
}

#[test]
fn writes_are_durable_at_once_for_a_driver_that_cannot_flush() {
    let (mut device, storage) = volatile();
    let features = (device.features() | 1 << VIRTIO_RING_F_EVENT_IDX) & !F_FLUSH;
    let mut driver = Driver::activate_with(&mut device, features);
    assert_eq!(send(&mut driver, OUT, 1, &[&[0; 512]]), OK);
    let zeroes = segment(2, 1, 0);
    assert_eq!(send(&mut driver, WRITE_ZEROES, 0, &[&zeroes]), OK);
    assert_eq!(storage.state.lock().unwrap().durable, [512, 1024]);
    storage.state.lock().unwrap().flush_fails = true;
    assert_eq!(send(&mut driver, OUT, 3, &[&[0; 512]]), IO_ERROR);
}

#[test]
fn discard_that_the_host_cannot_do_is_unsupported() {
    let (mut device, _) = volatile();
    let mut driver = Driver::activate(&mut device);
    assert_eq!(
        send(&mut driver, DISCARD, 0, &[&segment(0, 1, 0)]),
        UNSUPPORTED
    );
}

#[test]
fn paused_device_goes_on_and_its_state_fits_the_same_disk_only() {
    each_way(false, |mut guest| {
        assert_eq!(send(&mut guest.driver, OUT, 0, &[&[1; 512]]), OK);
        let queues = guest.device.pause();
        let state = guest.device.save();
        let json = serde_json::to_string(&state).unwrap();
        let disk = guest.file.try_clone().unwrap().into();
        let mut restored = BlockDevice::new(config(false), disk, |_| Ok(())).unwrap();
        restored
            .restore(serde_json::from_str(&json).unwrap())
            .unwrap();
        guest.driver.reactivate(&mut restored, queues);
        assert_eq!(read(&mut guest.driver, 0, 512, 512).unwrap(), vec![1; 512]);

        let disk = guest.file.try_clone().unwrap().into();
        let mut read_only = BlockDevice::new(config(true), disk, |_| Ok(())).unwrap();
        assert!(read_only.restore(state).is_err());
    });
}

/// Sends a write of one sector through a queue.
fn write_through(driver: &mut Driver, queue: u16, sector: u64, fill: u8) -> u8 {
    let used = driver.request(queue, &[&header(OUT, sector), &[fill; 512]], &[1]);
    used.bytes[0]
}

#[test]
fn every_queue_is_served_and_each_without_the_others() {
    let mut file = file();
    let disk = file.try_clone().unwrap();
    let config = config(false).for_vcpus(3);
    let mut device = BlockDevice::new(config.clone(), disk.into(), |_| Ok(())).unwrap();
    let mut count = [0; 2];
    device.read_config(34, &mut count);
    assert_eq!(count, [3, 0]);
    assert_ne!(device.features() & F_MQ, 0);
    let mut driver = Driver::activate(&mut device);
    for queue in [2_u16, 0, 1, 2] {
        let fill = queue.to_le_bytes()[0] + 1;
        assert_eq!(write_through(&mut driver, queue, queue.into(), fill), OK);
    }
    // What one queue has written, another reads and makes durable.
    assert_eq!(read(&mut driver, 2, 512, 512).unwrap(), vec![3; 512]);
    assert_eq!(send(&mut driver, FLUSH, 0, &[]), OK);
    let mut bytes = vec![0; 3 * 512];
    file.rewind().unwrap();
    file.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, [[1; 512], [2; 512], [3; 512]].concat());

    let mut queues = device.pause();
    assert_eq!(queues.len(), 3);
    let state = device.save();
    let disk = file.try_clone().unwrap();
    let mut other = BlockDevice::new(self::config(false), disk.into(), |_| Ok(())).unwrap();
    assert!(other.restore(state).is_err(), "it has one queue");
    // A driver that does without the last.
    queues.retain(|queue| queue.index != 2);
    driver.reactivate(&mut device, queues);
    assert_eq!(write_through(&mut driver, 1, 5, 9), OK);
    device.reset();
    assert!(device.pause().is_empty());
}

#[test]
fn driver_without_several_queues_has_the_first() {
    let config = config(false).for_vcpus(200);
    let mut device = BlockDevice::new(config, file().into(), |_| Ok(())).unwrap();
    assert_eq!(device.queue_max_sizes().len(), 4);
    let features = device.features() & !F_MQ;
    let mut driver = Driver::activate_with(&mut device, features);
    assert_eq!(send(&mut driver, OUT, 0, &[&[3; 512]]), OK);
    assert_eq!(device.pause().len(), 1);
    let one = BlockDevice::new(self::config(false), file().into(), |_| Ok(())).unwrap();
    assert_eq!(one.features() & F_MQ, 0);
}

#[test]
fn requests_are_answered_without_event_idx() {
    let file = file();
    let mut device = BlockDevice::new(config(false), file.into(), |_| Ok(())).unwrap();
    let features = device.features();
    let mut driver = Driver::activate_with(&mut device, features);
    for sector in 0..600 {
        assert_eq!(send(&mut driver, OUT, sector, &[&[3; 512]]), OK);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// The disk reads as a disk should, whatever was done to it in whatever pieces.
    #[test]
    fn disk_behaves_as_its_model(
        requests in prop::collection::vec(
            (0_usize..4, 0_u64..SECTORS + 8, 1_usize..200, 1_usize..9000, any::<u8>()),
            1..40,
        ),
        way in prop::sample::select(ways()),
    ) {
        let mut guest = Guest::with(way, false);
        let mut model = vec![0xaa; LEN];
        for (kind, sector, sectors, piece, fill) in requests {
            let fits = sector + sectors as u64 <= SECTORS;
            let start = usize::try_from(sector).unwrap() * 512;
            let range = start..start + sectors * 512;
            let expected = if fits { OK } else { IO_ERROR };
            let ranges = segment(sector, u32::try_from(sectors).unwrap(), 0);
            match kind {
                0 => {
                    let data = vec![fill; sectors * 512];
                    let pieces: Vec<&[u8]> = data.chunks(piece.max(1024)).collect();
                    prop_assert_eq!(send(&mut guest.driver, OUT, sector, &pieces), expected);
                    if fits {
                        model[range].fill(fill);
                    }
                }
                1 => {
                    let bytes = read(&mut guest.driver, sector, sectors * 512, piece.max(1024));
                    prop_assert_eq!(bytes.is_ok(), fits);
                    if let Ok(bytes) = bytes {
                        prop_assert!(bytes == model[range]);
                    }
                }
                // A hole in a file reads as zeroes, which is more than DISCARD promises.
                kind => {
                    let kind = if kind == 2 { DISCARD } else { WRITE_ZEROES };
                    prop_assert_eq!(send(&mut guest.driver, kind, 0, &[&ranges]), expected);
                    if fits {
                        model[range].fill(0);
                    }
                }
            }
        }
        prop_assert!(guest.content() == model);
    }

    /// Whatever a guest sends, the device answers the next honest request.
    #[test]
    fn no_sequence_of_requests_stops_the_device(
        requests in prop::collection::vec(
            (prop::collection::vec(any::<u8>(), 0..80), prop::collection::vec(0_usize..700, 0..4)),
            1..40,
        ),
        way in prop::sample::select(ways()),
    ) {
        let mut guest = Guest::with(way, false);
        for (bytes, room) in requests {
            if bytes.is_empty() && room.is_empty() {
                continue;
            }
            let pieces: Vec<&[u8]> = bytes.chunks(24).collect();
            guest.driver.request(REQUEST_QUEUE, &pieces, &room);
        }
        prop_assert_eq!(send(&mut guest.driver, FLUSH, 0, &[]), OK);
        prop_assert_eq!(guest.file.metadata().unwrap().len(), LEN as u64);
    }
}
