//! Tests of the device with a server that the test plays, honest or not, message by message.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, FromRawFd, IntoRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use command_fds::{CommandFdExt, FdMapping};
use fuse_backend_rs::abi::fuse_abi::{InHeader, InitIn, Opcode, OutHeader};
use fuse_backend_rs::api::filesystem::ROOT_ID;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::{
    ByteValued, Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion,
};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::VhostFsDevice;
use super::server::ServerError;
use crate::control::ExitReason;
use crate::devices::fs::{FsDevice, HIPRIO_QUEUE, REQUEST_QUEUE, Share, Tag};
use crate::end::End;
use crate::memory;
use crate::snapshot::Snapshot;
use crate::virtio::VirtioDevice;
use crate::virtio::testing::Driver;

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;

const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// MQ and REPLY_ACK.
const PROTOCOL: u64 = 1 | 1 << 3;

/// What the server says.
#[derive(Debug, Clone, Copy)]
struct Answers {
    features: u64,
    protocol: u64,
    queues: u64,
    /// What it refuses.
    refused: Option<u32>,
    /// Where it says that it has stopped, instead of where it has.
    base: Option<u32>,
}

/// With a queue less than the guest has vCPUs, and all features that there are.
const HONEST: Answers = Answers {
    features: u64::MAX,
    protocol: u64::MAX,
    queues: 2,
    refused: None,
    base: None,
};

#[derive(Debug)]
struct Ring {
    queue: Queue,
    kick: Option<EventFd>,
    call: Option<EventFd>,
    enabled: bool,
}

impl Default for Ring {
    fn default() -> Self {
        Self {
            queue: Queue::new(1024).unwrap(),
            kick: None,
            call: None,
            enabled: false,
        }
    }
}

/// The server: it returns what each request has, backwards.
#[derive(Debug)]
struct Server {
    socket: UnixStream,
    answers: Answers,
    memory: GuestMemoryMmap,
    /// The names of addresses: first one, length, address in the guest.
    names: Vec<[u64; 3]>,
    rings: BTreeMap<u32, Ring>,
    /// The requests that have come, each with the first word of its body.
    seen: Vec<(u32, u32)>,
}

fn word(body: &[u8], index: usize) -> u32 {
    u32::from_le_bytes(body[4 * index..][..4].try_into().unwrap())
}

fn long(body: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(body[at..][..8].try_into().unwrap())
}

impl Server {
    /// Serves until its client is gone; returns what it has seen.
    fn serve(mut self) -> Vec<(u32, u32)> {
        loop {
            let (mut names, mut polled) = (
                vec![None],
                vec![PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)],
            );
            for (index, ring) in &self.rings {
                if let Some(kick) = ring.kick.as_ref().filter(|_| ring.enabled) {
                    names.push(Some(*index));
                    // SAFETY: the eventfd is open for as long as the ring is borrowed.
                    let kick = unsafe {
                        std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(kick))
                    };
                    polled.push(PollFd::new(kick, PollFlags::POLLIN));
                }
            }
            poll(&mut polled, PollTimeout::NONE).unwrap();
            let ready: Vec<_> = polled
                .iter()
                .zip(names)
                .filter(|(polled, _)| polled.any().unwrap_or(false))
                .map(|(_, name)| name)
                .collect();
            for name in ready {
                match name {
                    Some(index) => self.work(index),
                    None => match self.receive() {
                        Some((request, flags, body, file)) => {
                            self.answer(request, flags, &body, file);
                        }
                        None => return self.seen,
                    },
                }
            }
        }
    }

    fn receive(&mut self) -> Option<(u32, u32, Vec<u8>, Option<File>)> {
        let mut header = [0; 12];
        let (len, file) = self.socket.recv_with_fd(&mut header).unwrap();
        if len == 0 {
            return None;
        }
        let mut body = vec![0; word(&header, 2) as usize];
        self.socket.read_exact(&mut body).unwrap();
        Some((word(&header, 0), word(&header, 1), body, file))
    }

    fn answer(&mut self, request: u32, flags: u32, body: &[u8], file: Option<File>) {
        let index = if body.is_empty() { 0 } else { word(body, 0) };
        self.seen.push((request, index));
        let event = |file: Option<File>| {
            // SAFETY: the descriptor was received for this.
            file.map(|file| unsafe { EventFd::from_raw_fd(file.into_raw_fd()) })
        };
        let mut reply = None;
        match request {
            GET_FEATURES => reply = Some(self.answers.features),
            GET_PROTOCOL_FEATURES => reply = Some(self.answers.protocol),
            GET_QUEUE_NUM => reply = Some(self.answers.queues),
            SET_FEATURES => {
                let wanted = 1 << VIRTIO_F_VERSION_1
                    | 1 << VIRTIO_RING_F_EVENT_IDX
                    | 1 << VIRTIO_RING_F_INDIRECT_DESC
                    | 1 << 30;
                assert_eq!(long(body, 0), wanted);
            }
            SET_PROTOCOL_FEATURES => assert_eq!(long(body, 0), PROTOCOL),
            SET_MEM_TABLE => self.map(body, &file.unwrap()),
            SET_VRING_NUM => {
                let size = u16::try_from(word(body, 1)).unwrap();
                self.ring(index).queue.set_size(size);
            }
            SET_VRING_BASE => {
                let base = u16::try_from(word(body, 1)).unwrap();
                let queue = &mut self.ring(index).queue;
                queue.set_next_avail(base);
                queue.set_next_used(base);
            }
            SET_VRING_ADDR => {
                let [table, used, available] = [8, 16, 24].map(|at| self.named(long(body, at)));
                let queue = &mut self.ring(index).queue;
                queue.set_desc_table_address(Some(table), Some(0));
                queue.set_used_ring_address(Some(used), Some(0));
                queue.set_avail_ring_address(Some(available), Some(0));
                queue.set_event_idx(true);
                queue.set_ready(true);
            }
            SET_VRING_KICK => self.ring(index).kick = event(file),
            SET_VRING_CALL => self.ring(index).call = event(file),
            SET_VRING_ENABLE => self.ring(index).enabled = word(body, 1) == 1,
            GET_VRING_BASE => {
                let stopped = self.ring(index).queue.next_avail().into();
                let base = self.answers.base.unwrap_or(stopped);
                reply = Some(u64::from(base) << 32 | u64::from(index));
            }
            SET_OWNER => {}
            other => panic!("request {other}"),
        }
        if flags & NEED_REPLY != 0 && reply.is_none() {
            reply = Some((self.answers.refused == Some(request)).into());
        }
        if let Some(reply) = reply {
            let header = [request, VERSION | REPLY, 8].map(u32::to_le_bytes).concat();
            let message = [header, reply.to_le_bytes().to_vec()].concat();
            self.socket.write_all(&message).unwrap();
        }
    }

    /// There is one region, as the guest of the test has no more.
    fn map(&mut self, body: &[u8], file: &File) {
        assert_eq!(word(body, 0), 1);
        let [start, len, name, offset] = [0, 1, 2, 3].map(|field| long(body, 8 + 8 * field));
        assert_eq!((start, name), (0, 0), "nothing of the worker's addresses");
        let place = FileOffset::new(file.try_clone().unwrap(), offset);
        let mapping = MmapRegion::from_file(place, usize::try_from(len).unwrap()).unwrap();
        let region = GuestRegionMmap::new(mapping, GuestAddress(start)).unwrap();
        self.memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
        self.names = vec![[name, len, start]];
    }

    fn named(&self, name: u64) -> u32 {
        let in_it = |[first, len, _]: &&[u64; 3]| (*first..*first + *len).contains(&name);
        let [first, _, start] = self.names.iter().find(in_it).unwrap();
        u32::try_from(name - first + start).unwrap()
    }

    fn ring(&mut self, index: u32) -> &mut Ring {
        self.rings.entry(index).or_default()
    }

    fn work(&mut self, index: u32) {
        let ring = self.rings.get_mut(&index).unwrap();
        ring.kick.as_ref().unwrap().read().unwrap();
        while let Some(chain) = next_chain(&mut ring.queue, &self.memory) {
            let head = chain.head_index();
            let (mut text, mut written) = (Vec::new(), 0);
            for buffer in chain {
                if buffer.is_write_only() {
                    text.reverse();
                    self.memory.write_slice(&text, buffer.addr()).unwrap();
                    written = u32::try_from(text.len()).unwrap();
                } else {
                    let mut piece = vec![0; buffer.len() as usize];
                    self.memory.read_slice(&mut piece, buffer.addr()).unwrap();
                    text.extend(piece);
                }
            }
            ring.queue.add_used(&self.memory, head, written).unwrap();
        }
        ring.call.as_ref().unwrap().write(1).unwrap();
    }
}

/// The next chain; where there is none, the driver has been told to kick for it.
fn next_chain<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemoryMmap,
) -> Option<DescriptorChain<&'m GuestMemoryMmap>> {
    loop {
        let chain = queue.pop_descriptor_chain(memory);
        if chain.is_some() || !queue.enable_notification(memory).unwrap() {
            return chain;
        }
    }
}

struct Guest {
    device: Result<VhostFsDevice, ServerError>,
    end: Arc<End>,
    server: JoinHandle<Vec<(u32, u32)>>,
}

/// A guest of so many vCPUs, with a server that answers so.
fn guest(vcpus: u8, answers: Answers) -> Guest {
    guest_at(vcpus, answers, UnixStream::pair().unwrap())
}

fn guest_at(vcpus: u8, answers: Answers, (ours, theirs): (UnixStream, UnixStream)) -> Guest {
    let server = Server {
        socket: theirs,
        answers,
        memory: GuestMemoryMmap::new(),
        names: Vec::new(),
        rings: BTreeMap::new(),
        seen: Vec::new(),
    };
    let server = thread::spawn(|| server.serve());
    let end = Arc::new(End::new().unwrap());
    let tag = Tag::try_from("husk".to_owned()).unwrap();
    Guest {
        device: VhostFsDevice::new(tag, ours.into(), vcpus, Arc::clone(&end), |_| Ok(())),
        end,
        server,
    }
}

fn driver(device: &mut VhostFsDevice) -> Driver {
    let memory = memory::allocate_shared(256, 256).unwrap();
    let features = device.features() | 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX;
    Driver::activate_in(memory, device, features)
}

#[test]
fn requests_pass_by_the_server_and_queues_come_back_where_they_stand() {
    let Guest {
        device,
        end,
        server,
    } = guest(4, HONEST);
    let mut device = device.unwrap();
    let mut driver = driver(&mut device);
    for queue in [HIPRIO_QUEUE, REQUEST_QUEUE] {
        let used = driver.request(queue, &[b"on", b"ce"], &[8]);
        assert_eq!((used.written, &used.bytes[..]), (4, &b"ecno"[..]));
    }
    driver.request(REQUEST_QUEUE, &[b"twice"], &[5]);
    let paused = device.pause();
    let positions = paused.iter().map(|queue| {
        (
            queue.index,
            queue.queue.next_avail(),
            queue.queue.next_used(),
        )
    });
    assert_eq!(positions.collect::<Vec<_>>(), [(0, 1, 1), (1, 2, 2)]);

    driver.reactivate(&mut device, paused);
    let used = driver.request(REQUEST_QUEUE, &[b"again"], &[5]);
    assert_eq!(used.bytes, b"niaga");
    device.reset();
    assert!(device.pause().is_empty());
    assert_eq!(end.reason(), None);
    drop(device);
    let seen = server.join().unwrap();
    let taken = |ring| {
        [
            SET_VRING_NUM,
            SET_VRING_BASE,
            SET_VRING_ADDR,
            SET_VRING_CALL,
            SET_VRING_KICK,
            SET_VRING_ENABLE,
        ]
        .map(|request| (request, ring))
    };
    let back = |ring| [SET_VRING_ENABLE, GET_VRING_BASE].map(|request| (request, ring));
    let cycle = [&taken(0)[..], &taken(1), &back(0), &back(1)].concat();
    let mut cycles = 0;
    // After what is asked at the beginning.
    for piece in seen[5..].chunks(2 + cycle.len()) {
        assert_eq!((piece[0].0, piece[1].0), (SET_FEATURES, SET_MEM_TABLE));
        assert_eq!(piece[2..], cycle);
        cycles += 1;
    }
    assert_eq!(cycles, 2);
}

#[test]
fn the_guest_sees_the_device_that_the_worker_has_itself() {
    let folder = tempfile::tempdir().unwrap();
    let tag = || Tag::try_from("husk".to_owned()).unwrap();
    for (vcpus, queues, seen) in [(1, 2, 1), (4, 3, 2), (3, 100, 3), (255, 100, 4)] {
        let share = Share::new(folder.path(), crate::config::CachePolicy::Auto, false).unwrap();
        let own = FsDevice::new(tag(), share, seen, |_| Ok(())).unwrap();
        let other = guest(vcpus, Answers { queues, ..HONEST }).device.unwrap();
        let config = |device: &dyn VirtioDevice| {
            let mut config = [0xff; 48];
            device.read_config(0, &mut config);
            config
        };
        assert_eq!(config(&other), config(&own));
        assert_eq!(other.queue_max_sizes(), own.queue_max_sizes());
        assert_eq!(other.device_type(), own.device_type());
        assert_eq!(other.features(), own.features());
    }
    let features = !(1 << VIRTIO_RING_F_INDIRECT_DESC);
    let without = guest(1, Answers { features, ..HONEST }).device.unwrap();
    assert_eq!(without.features(), 0);
}

#[test]
fn a_server_that_lacks_something_is_refused() {
    let answers = |change: fn(&mut Answers)| {
        let mut answers = HONEST;
        change(&mut answers);
        guest(1, answers).device.unwrap_err().to_string()
    };
    let lacks = [
        answers(|answers| answers.features = !(1 << VIRTIO_F_VERSION_1)),
        answers(|answers| answers.features = !(1 << 30)),
        answers(|answers| answers.protocol = !1),
        answers(|answers| answers.protocol = 1),
    ];
    for lack in lacks {
        assert!(lack.starts_with("it lacks the features"), "{lack}");
    }
    assert_eq!(
        answers(|answers| answers.queues = 1),
        "it serves 1 queues, and a file system takes two"
    );
    assert_eq!(
        answers(|answers| answers.queues = u64::MAX),
        "it does not say how many queues it serves"
    );
}

#[test]
fn a_server_that_is_gone_ends_the_vm() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    let end = Arc::new(End::new().unwrap());
    let tag = Tag::try_from("husk".to_owned()).unwrap();
    VhostFsDevice::new(tag, ours.into(), 1, end, |_| Ok(())).unwrap_err();

    let (ours, theirs) = UnixStream::pair().unwrap();
    let held = theirs.try_clone().unwrap();
    let Guest { device, end, .. } = guest_at(1, HONEST, (ours, theirs));
    let mut device = device.unwrap();
    let mut driver = driver(&mut device);
    driver.request(REQUEST_QUEUE, &[b"once"], &[4]);
    held.shutdown(std::net::Shutdown::Both).unwrap();
    driver.wait_needs_reset();
    let Some(ExitReason::FileServer { tag, message }) = end.reason() else {
        panic!("{:?}", end.reason());
    };
    assert_eq!((tag.as_str(), message.as_str()), ("husk", "it is gone"));
    // Nobody waits for its answer.
    assert_eq!(device.pause().len(), 2);
}

#[test]
fn a_server_that_refuses_ends_the_vm() {
    for refused in [
        SET_FEATURES,
        SET_MEM_TABLE,
        SET_VRING_NUM,
        SET_VRING_BASE,
        SET_VRING_ADDR,
        SET_VRING_CALL,
        SET_VRING_KICK,
        SET_VRING_ENABLE,
    ] {
        let refused = Some(refused);
        let Guest { device, end, .. } = guest(1, Answers { refused, ..HONEST });
        let mut device = device.unwrap();
        driver(&mut device).wait_needs_reset();
        let Some(ExitReason::FileServer { message, .. }) = end.reason() else {
            panic!("{refused:?}: {:?}", end.reason());
        };
        assert!(message.starts_with("it does not "), "{message}");
        device.reset();
    }
}

#[test]
fn a_position_that_no_ring_has_is_not_taken() {
    let base = Some(0x1_0000);
    let mut device = guest(1, Answers { base, ..HONEST }).device.unwrap();
    let mut driver = driver(&mut device);
    driver.request(REQUEST_QUEUE, &[b"once"], &[4]);
    let paused = device.pause();
    assert_eq!(paused.len(), 2);
    assert!(paused.iter().all(|queue| queue.queue.next_avail() == 0));
}

#[test]
fn nothing_is_restored() {
    let mut device = guest(1, HONEST).device.unwrap();
    let state = device.save();
    device.restore(state).unwrap_err();
}

/// The real one, where the scripts of ci/ have fetched it.
#[test]
fn virtiofsd_serves() {
    let Some(program) = std::env::var_os("HUSK_TEST_VIRTIOFSD") else {
        let reason = "HUSK_TEST_VIRTIOFSD names no virtiofsd";
        let _ = writeln!(std::io::stderr(), "SKIPPED: {reason}");
        return;
    };
    if !rustix::process::geteuid().is_root() {
        let _ = writeln!(std::io::stderr(), "SKIPPED: virtiofsd needs root");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let share = folder.path().join("share");
    std::fs::create_dir(&share).unwrap();
    std::fs::write(share.join("there"), "").unwrap();
    let socket = folder.path().join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    let client = UnixStream::connect(&socket).unwrap();
    let mut server = Command::new(program)
        .args(["--fd=3", "--sandbox=chroot", "--no-announce-submounts"])
        .arg("--shared-dir")
        .arg(&share)
        .fd_mappings(vec![FdMapping {
            parent_fd: listener.into(),
            child_fd: 3,
        }])
        .unwrap()
        .spawn()
        .unwrap();
    let end = Arc::new(End::new().unwrap());
    let tag = Tag::try_from("husk".to_owned()).unwrap();
    let mut device =
        VhostFsDevice::new(tag, client.into(), 4, Arc::clone(&end), |_| Ok(())).unwrap();
    let queues = device.queue_max_sizes().len();
    assert_eq!(queues, 2, "it has one for requests");
    let mut driver = driver(&mut device);
    let init = InitIn {
        major: 7,
        minor: 38,
        ..InitIn::default()
    };
    assert_eq!(ask(&mut driver, 0, Opcode::Init, init.as_slice()), 0);
    let found =
        [&b"there\0"[..], b"not\0"].map(|name| ask(&mut driver, ROOT_ID, Opcode::Lookup, name));
    assert_eq!(found, [0, -libc::ENOENT]);
    let paused = device.pause();
    assert_eq!(paused[1].queue.next_used(), 3);
    driver.reactivate(&mut device, paused);
    assert_eq!(ask(&mut driver, ROOT_ID, Opcode::Getattr, &[0; 16]), 0);
    assert_eq!(end.reason(), None);

    server.kill().unwrap();
    driver.wait_needs_reset();
    let Some(ExitReason::FileServer { message, .. }) = end.reason() else {
        panic!("{:?}", end.reason());
    };
    assert_eq!(message, "it is gone");
    server.wait().unwrap();
}

/// Sends a FUSE request, and returns the error of its answer.
fn ask(driver: &mut Driver, node: u64, opcode: Opcode, body: &[u8]) -> i32 {
    let header = InHeader {
        len: u32::try_from(size_of::<InHeader>() + body.len()).unwrap(),
        opcode: opcode as u32,
        unique: 7,
        nodeid: node,
        ..InHeader::default()
    };
    let answer = driver.request(REQUEST_QUEUE, &[header.as_slice(), body], &[256]);
    let mut out = OutHeader::default();
    out.as_mut_slice()
        .copy_from_slice(&answer.bytes[..size_of::<OutHeader>()]);
    assert_eq!((out.len, out.unique), (answer.written, 7));
    out.error
}
