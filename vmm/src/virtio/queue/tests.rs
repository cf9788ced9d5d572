//! The rings as a driver reads them, and packets cut to the room for them.

use std::os::fd::{AsFd, OwnedFd};

use proptest::prelude::*;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::*;
use crate::virtio::testing::FakeInterrupt;

const SIZE: u16 = 8;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const DATA: u64 = 0x8000;

struct Scene {
    queue: Virtqueue,
    memory: Arc<GuestMemoryMmap>,
    interrupt: Arc<FakeInterrupt>,
}

impl Scene {
    fn new(event_idx: bool) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let memory = Arc::new(memory);
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_desc_table_address(Some(0), Some(0));
        queue.set_avail_ring_address(Some(u32::try_from(AVAILABLE).unwrap()), Some(0));
        queue.set_used_ring_address(Some(u32::try_from(USED).unwrap()), Some(0));
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        let queue = ActiveQueue {
            index: 3,
            queue,
            kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
        };
        let interrupt = Arc::<FakeInterrupt>::default();
        Self {
            queue: Virtqueue::new(queue, Arc::clone(&memory), interrupt.clone()),
            memory,
            interrupt,
        }
    }

    fn used_index(&self) -> u16 {
        self.memory.read_obj(GuestAddress(USED + 2)).unwrap()
    }

    fn used(&self, position: u16) -> (u32, u32) {
        let at = USED + 4 + u64::from(position % SIZE) * 8;
        (
            self.memory.read_obj(GuestAddress(at)).unwrap(),
            self.memory.read_obj(GuestAddress(at + 4)).unwrap(),
        )
    }

    /// The driver asks to be told when the used ring grows past this position.
    fn tell_after(&self, position: u16) {
        let at = AVAILABLE + 4 + u64::from(SIZE) * 2;
        self.memory.write_obj(position, GuestAddress(at)).unwrap();
    }
}

#[test]
fn chains_are_returned_in_order_and_around_the_end() {
    let mut scene = Scene::new(false);
    scene
        .queue
        .push_used_together(&[(1, 10), (2, 20), (3, 30)])
        .unwrap();
    assert_eq!(scene.used_index(), 3);
    for head in 0..6 {
        scene.queue.push_used(head, 1).unwrap();
    }
    assert_eq!(scene.used_index(), 9);
    assert_eq!((scene.used(1), scene.used(2)), ((2, 20), (3, 30)));
    assert_eq!(scene.used(8), (5, 1));
}

#[test]
fn a_head_that_is_none_returns_nothing() {
    let mut scene = Scene::new(false);
    assert!(
        scene
            .queue
            .push_used_together(&[(0, 1), (SIZE, 1)])
            .is_err()
    );
    assert_eq!(scene.used_index(), 0);
}

#[test]
fn the_driver_is_told_once_and_without_event_index_always() {
    let mut scene = Scene::new(false);
    scene.queue.notify_if_needed().unwrap();
    assert_eq!(scene.interrupt.count(3), 0);
    scene.queue.push_used(0, 0).unwrap();
    scene.queue.notify_if_needed().unwrap();
    scene.queue.notify_if_needed().unwrap();
    assert_eq!(scene.interrupt.count(3), 1);
}

#[test]
fn a_driver_that_waits_for_any_of_the_chains_is_told() {
    for (tell_after, told) in [(0, 1), (1, 1), (2, 1), (3, 0), (0xffff, 0), (100, 0)] {
        let mut scene = Scene::new(true);
        scene.tell_after(tell_after);
        scene
            .queue
            .push_used_together(&[(1, 10), (2, 20), (3, 30)])
            .unwrap();
        scene.queue.notify_if_needed().unwrap();
        assert_eq!(scene.interrupt.count(3), told, "{tell_after}");
    }
}

#[test]
fn slow_requests_are_served_a_turn_at_a_time() {
    let mut scene = Scene::new(false);
    let available = GuestAddress(AVAILABLE + 2);
    scene.memory.write_obj(3_u16, available).unwrap();
    for served in 1..=3 {
        let slow = |_: Chain<'_>| {
            std::thread::sleep(MAX_TURN);
            0
        };
        scene.queue.drain(slow).unwrap();
        assert_eq!(scene.used_index(), served);
        scene.queue.kick().read().expect("it goes on");
    }
}

#[test]
fn positions_wrap_around() {
    let mut scene = Scene::new(true);
    for _ in 0..0xffff {
        scene.queue.push_used(0, 0).unwrap();
    }
    scene.queue.notify_if_needed().unwrap();
    let before = scene.interrupt.count(3);
    scene.tell_after(0);
    scene.queue.push_used(1, 7).unwrap();
    scene.queue.notify_if_needed().unwrap();
    assert_eq!((scene.used_index(), scene.interrupt.count(3)), (0, before));
    scene.queue.push_used(2, 8).unwrap();
    scene.queue.notify_if_needed().unwrap();
    assert_eq!(scene.interrupt.count(3), before + 1);
}

/// Two ends that keep packets apart.
fn packet_sockets() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}

fn rooms<'m>(memory: &'m GuestMemoryMmap, lengths: &[usize]) -> Vec<Writable<'m>> {
    let mut at = DATA;
    let place = |&len: &usize| {
        let slice = memory.get_slice(GuestAddress(at), len).unwrap();
        at += len as u64;
        let mut segments = Segments::default();
        segments.push(slice);
        Writable(segments)
    };
    lengths.iter().map(place).collect()
}

proptest! {
    #[test]
    fn a_packet_is_read_whole_or_not_at_all(
        lengths in prop::collection::vec(1_usize..100, 1..8),
        packet in prop::collection::vec(any::<u8>(), 1..500),
    ) {
        let scene = Scene::new(false);
        let (tap, peer) = packet_sockets();
        rustix::io::write(&peer, &packet).unwrap();
        rustix::io::write(&peer, b"next").unwrap();
        let rooms = rooms(&scene.memory, &lengths);
        let room = lengths.iter().sum::<usize>();
        let read = read_packet(tap.as_fd(), &rooms).unwrap();
        if packet.len() <= room {
            prop_assert_eq!(read, Some(packet.len()));
            let mut seen = vec![0; packet.len()];
            scene.memory.read_slice(&mut seen, GuestAddress(DATA)).unwrap();
            prop_assert_eq!(seen, packet);
        } else {
            prop_assert_eq!(read, None);
        }
        if room >= 4 {
            prop_assert_eq!(read_packet(tap.as_fd(), &rooms).unwrap(), Some(4));
        }
    }
}

#[test]
fn no_packet_is_an_error_of_its_own() {
    let scene = Scene::new(false);
    let (tap, _peer) = packet_sockets();
    let err = read_packet(tap.as_fd(), &rooms(&scene.memory, &[64])).unwrap_err();
    assert_eq!(err.kind(), io::ErrorKind::WouldBlock);
}
