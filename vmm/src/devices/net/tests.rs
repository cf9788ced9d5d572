//! Tests of the network device, by a driver that reads back what went through a tap, and one that means harm. The tap is
//! one end of a pair of sockets that keep packets apart.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use virtio_bindings::virtio_net::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::control::{Settings, tap_offloads};
use super::device::{FEATURES, HEADER_LEN, MAX_PACKET_LEN, USO_FEATURES};
use super::tap::Tap;
use super::{NetDevice, NetError, NetState, receive_queue, transmit_queue};
use crate::config::NicConfig;
use crate::snapshot::Snapshot;
use crate::virtio::testing::{Buffer, Driver, RawDescriptor, Used};
use crate::virtio::{ActivateError, VirtioDevice};
use crate::vmm::NicFiles;

const RX: u16 = receive_queue(0);
const TX: u16 = transmit_queue(0);

const OK: u8 = 0;
const ERR: u8 = 1;

const MRG_RXBUF: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

/// One end of a pair of sockets, and what was asked of the tap.
#[derive(Debug)]
struct FakeTap {
    socket: OwnedFd,
    asked: Mutex<Vec<Asked>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    Offloads(libc::c_uint),
    Enabled(bool),
}

impl FakeTap {
    fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            asked: Mutex::default(),
        }
    }

    fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    fn ask(&self, asked: Asked) -> io::Result<()> {
        self.asked.lock().unwrap().push(asked);
        Ok(())
    }
}

impl AsFd for FakeTap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Tap for FakeTap {
    fn set_offloads(&self, flags: libc::c_uint) -> io::Result<()> {
        self.ask(Asked::Offloads(flags))
    }

    fn set_enabled(&self, enabled: bool) -> io::Result<()> {
        self.ask(Asked::Enabled(enabled))
    }
}

struct Guest {
    device: NetDevice,
    driver: Driver,
    taps: Vec<Arc<FakeTap>>,
    /// The network behind each tap.
    peers: Vec<OwnedFd>,
}

fn config(pairs: usize) -> NicConfig {
    NicConfig {
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1400,
        queue_pairs: u8::try_from(pairs).unwrap(),
        vhost: false,
    }
}

fn sockets() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}

fn device(pairs: usize) -> (NetDevice, Vec<Arc<FakeTap>>, Vec<OwnedFd>) {
    let (sockets, peers): (Vec<_>, Vec<_>) = (0..pairs).map(|_| sockets()).unzip();
    let taps: Vec<_> = sockets
        .into_iter()
        .map(FakeTap::new)
        .map(Arc::new)
        .collect();
    let ends = taps.iter().map(|tap| Arc::clone(tap) as Arc<dyn Tap>);
    let device = NetDevice::with_taps(
        &config(pairs),
        ends.collect(),
        Vec::new(),
        FEATURES | USO_FEATURES,
        |_| Ok(()),
    );
    (device.unwrap(), taps, peers)
}

/// A packet that says how long it is and who it is.
fn packet(len: usize, seed: usize) -> Vec<u8> {
    let bytes = (0..len).map(|at| u8::try_from((at * 7 + seed) % 251).unwrap());
    let mut packet = vec![0; HEADER_LEN];
    packet.extend(bytes);
    packet
}

impl Guest {
    fn new() -> Self {
        Self::with(1, |features| features)
    }

    fn with(pairs: usize, choose: impl FnOnce(u64) -> u64) -> Self {
        let (mut device, taps, peers) = device(pairs);
        let offered = device.features() | 1 << VIRTIO_RING_F_EVENT_IDX;
        let driver = Driver::activate_with(&mut device, choose(offered));
        Self {
            device,
            driver,
            taps,
            peers,
        }
    }

    /// Sends from the guest.
    fn send(&mut self, pieces: &[&[u8]]) {
        let used = self.driver.request(TX, pieces, &[]);
        assert_eq!(used.written, 0);
    }

    /// What came out of the tap.
    fn sent(&self, pair: usize) -> Vec<u8> {
        let mut bytes = vec![0; MAX_PACKET_LEN + 1];
        let len = rustix::io::read(&self.peers[pair], &mut bytes).unwrap();
        bytes.truncate(len);
        bytes
    }

    fn nothing_was_sent(&self) -> bool {
        rustix::io::read(&self.peers[0], &mut [0; 1]) == Err(rustix::io::Errno::AGAIN)
    }

    /// Sends to the guest.
    fn arrive(&self, packet: &[u8]) {
        assert_eq!(rustix::io::write(&self.peers[0], packet), Ok(packet.len()));
    }

    /// Gives the device `count` receive buffers.
    fn offer(&mut self, queue: u16, count: usize, len: usize) {
        for _ in 0..count {
            self.driver.make_available(queue, &[Buffer::write(len)]);
        }
        self.driver.kick_if_wanted(queue);
    }

    /// Puts the packet together that the device has given, and checks how it lies in the buffers.
    fn received(&mut self, queue: u16) -> Vec<u8> {
        let Used { written, mut bytes } = self.driver.wait_any_used(queue);
        assert_eq!(bytes.len(), written as usize);
        let count = u16::from_le_bytes([bytes[10], bytes[11]]);
        for _ in 1..count {
            // They were all there when the first was.
            let part = self.driver.try_any_used(queue).expect("the rest of it");
            assert_eq!(part.bytes.len(), part.written as usize);
            bytes.extend(part.bytes);
        }
        bytes[10..12].fill(0);
        bytes
    }

    fn command(&mut self, queue: u16, command: &[u8]) -> u8 {
        let used = self.driver.request(queue, &[command], &[1]);
        assert_eq!(used.written, 1);
        used.bytes[0]
    }

    /// Packets still pass in both directions.
    #[track_caller]
    fn assert_alive(&mut self) {
        let there = packet(90, 1);
        self.send(&[&there]);
        assert_eq!(self.sent(0), there);
        let back = packet(80, 2);
        self.arrive(&back);
        // As much as the largest packet needs.
        self.offer(RX, 1, MAX_PACKET_LEN);
        assert_eq!(self.received(RX), back);
    }
}

#[test]
fn configuration_space_says_who_it_is() {
    let (device, _, _peers) = device(3);
    let mut space = [0xee; 14];
    device.read_config(0, &mut space);
    assert_eq!(space, [2, 0, 0, 0, 0, 1, 1, 0, 3, 0, 0, 0, 0, 0]);
}

#[test]
fn several_queues_are_offered_only_where_there_are_some() {
    let mq = 1 << VIRTIO_NET_F_MQ;
    let (one, _, _peers) = device(1);
    assert_eq!(one.features() & mq, 0);
    assert_eq!(one.queue_max_sizes(), [256, 256, 64]);
    let (two, _, _peers) = device(2);
    assert_eq!(two.features() & mq, mq);
    assert_eq!(two.queue_max_sizes(), [256, 256, 256, 256, 64]);
}

#[test]
fn descriptors_of_something_else_are_refused() {
    let nothing = || File::open("/dev/null").unwrap().into();
    let files = NicFiles {
        taps: vec![nothing()],
        vhost: Vec::new(),
    };
    let err = NetDevice::new(&config(1), files, |_| Ok(())).unwrap_err();
    assert!(matches!(err, NetError::Tap(_)), "{err:?}");

    let (socket, _peer) = sockets();
    let tap = Arc::new(FakeTap::new(socket));
    let err = NetDevice::with_taps(&config(1), vec![tap], vec![nothing()], FEATURES, |_| Ok(()))
        .unwrap_err();
    assert_eq!(
        crate::error::chain(&err),
        "vhost-net cannot be used: vhost-net refuses to serve this process: \
         failure in vhost ioctl: Inappropriate ioctl for device (os error 25)"
    );
}

#[test]
fn packets_leave_as_the_driver_made_them() {
    let mut guest = Guest::new();
    for len in [1, 60, 1400, 65535] {
        let packet = packet(len, len);
        guest.send(&[&packet]);
        assert_eq!(guest.sent(0), packet);
        // The header alone, and the rest in two pieces.
        let (header, rest) = packet.split_at(HEADER_LEN);
        let (first, second) = rest.split_at(len / 2);
        guest.send(&[header, first, second]);
        assert_eq!(guest.sent(0), packet);
    }
    let indirect = packet(1000, 3);
    let (first, second) = indirect.split_at(5);
    let head = guest
        .driver
        .make_indirect_available(TX, &[Buffer::read(first), Buffer::read(second)]);
    guest.driver.kick_if_wanted(TX);
    guest.driver.wait_used(TX, head);
    assert_eq!(guest.sent(0), indirect);
    let metrics = guest.device.metrics();
    assert_eq!(metrics.transmitted_packets.get(), 9);
    assert_eq!(
        metrics.transmitted_bytes.get(),
        2 * (1 + 60 + 1400 + 65535) + 1000
    );
}

#[test]
fn what_is_no_packet_is_not_sent() {
    let mut guest = Guest::new();
    for len in [0, HEADER_LEN, MAX_PACKET_LEN + 1] {
        guest.send(&[&vec![1; len]]);
        assert!(guest.nothing_was_sent(), "{len}");
    }
    // No room to read from at all.
    assert_eq!(guest.driver.request(TX, &[], &[100]).written, 0);
    assert_eq!(guest.device.metrics().bad_chains.get(), 4);
    guest.assert_alive();
}

#[test]
fn a_packet_arrives_in_one_buffer() {
    let mut guest = Guest::new();
    guest.offer(RX, 50, 1530);
    for len in [14, 60, 1514] {
        let packet = packet(len, len);
        guest.arrive(&packet);
        assert_eq!(guest.received(RX), packet);
    }
    let metrics = guest.device.metrics();
    assert_eq!(metrics.received_packets.get(), 3);
    assert_eq!(metrics.received_bytes.get(), 14 + 60 + 1514);
}

#[test]
fn a_large_packet_is_spread_over_buffers() {
    let mut guest = Guest::new();
    guest.offer(RX, 200, 1000);
    for len in [988, 989, 5000, 65536] {
        let packet = packet(len, len);
        guest.arrive(&packet);
        assert_eq!(guest.received(RX), packet);
    }
}

#[test]
fn without_mergeable_buffers_each_packet_gets_one() {
    let mut guest = Guest::with(1, |features| features & !MRG_RXBUF);
    guest.offer(RX, 2, 1530);
    // Both are larger than a buffer: they are lost, the buffers are not.
    guest.arrive(&packet(1519, 0));
    guest.arrive(&packet(60000, 0));
    for len in [1518, 70] {
        let packet = packet(len, len);
        guest.arrive(&packet);
        assert_eq!(guest.received(RX), packet);
    }
    assert_eq!(guest.device.metrics().received_dropped.get(), 2);
}

#[test]
fn packets_wait_for_buffers() {
    for drop in [0, 1 << VIRTIO_RING_F_EVENT_IDX, MRG_RXBUF] {
        let mut guest = Guest::with(1, |features| features & !drop);
        let packets: Vec<_> = (0..20).map(|seed| packet(500, seed)).collect();
        for packet in &packets {
            guest.arrive(packet);
        }
        for packet in &packets {
            guest.offer(RX, 1, MAX_PACKET_LEN);
            assert_eq!(&guest.received(RX), packet);
        }
    }
}

#[test]
fn a_ring_of_small_buffers_is_used_for_what_fits() {
    let mut guest = Guest::new();
    // All that the ring takes, and less than a packet can be.
    guest.offer(RX, 256, 20);
    guest.arrive(&packet(6000, 0));
    let fits = packet(100, 0);
    guest.arrive(&fits);
    assert_eq!(guest.received(RX), fits);
    assert_eq!(guest.device.metrics().received_dropped.get(), 1);
}

#[test]
fn a_full_tap_is_waited_for() {
    const COUNT: usize = 2000;
    let mut guest = Guest::new();
    let mut seen = 0;
    let mut read = |guest: &Guest| {
        assert_eq!(guest.sent(0), packet(3000, seen));
        seen += 1;
    };
    let mut given = 0;
    while given < COUNT {
        let mut batch = 0;
        while given < COUNT && guest.driver.free_descriptors(TX) > 0 {
            guest
                .driver
                .make_available(TX, &[Buffer::read(&packet(3000, given))]);
            given += 1;
            batch += 1;
        }
        guest.driver.kick_if_wanted(TX);
        // The socket is full before they are all sent: each one that is taken out makes room.
        for _ in 0..batch {
            wait_readable(&guest.peers[0]);
            read(&guest);
        }
    }
    assert_eq!(seen, COUNT);
    assert_eq!(guest.device.metrics().transmitted_dropped.get(), 0);
}

fn wait_readable(fd: &OwnedFd) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let patience = Timespec {
        tv_sec: 20,
        tv_nsec: 0,
    };
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    assert_eq!(poll(&mut fds, Some(&patience)), Ok(1));
}

#[test]
fn a_flood_in_both_directions_passes() {
    let mut guest = Guest::new();
    // More than is done in one turn.
    for round in 0..10 {
        guest.offer(RX, 100 + MAX_PACKET_LEN / 2000 + 1, 2000);
        let mut heads = Vec::new();
        for seed in 0..100 {
            guest.arrive(&packet(200, seed + round));
            heads.push(
                guest
                    .driver
                    .make_available(TX, &[Buffer::read(&packet(300, seed))]),
            );
        }
        guest.driver.kick_if_wanted(TX);
        for seed in 0..100 {
            assert_eq!(guest.received(RX), packet(200, seed + round));
            wait_readable(&guest.peers[0]);
            assert_eq!(guest.sent(0), packet(300, seed));
        }
        for head in heads {
            guest.driver.wait_used(TX, head);
        }
        // Those that are left are taken back by a reset, not waited for.
        let features = guest.device.features() | 1 << VIRTIO_RING_F_EVENT_IDX;
        guest.device.reset();
        guest.driver = Driver::activate_with(&mut guest.device, features);
    }
}

#[test]
fn hostile_chains_come_back_and_nothing_else_is_harmed() {
    // The control queue, too.
    for queue in [TX, 2] {
        let mut guest = Guest::new();
        for chain in guest.driver.hostile_chains() {
            assert_eq!(guest.driver.submit_raw(queue, &chain).written, 0);
        }
        assert!(guest.nothing_was_sent());
        guest.assert_alive();
    }
}

#[test]
fn hostile_buffers_come_back_and_packets_wait_for_good_ones() {
    let mut guest = Guest::new();
    let waiting = packet(64, 0);
    guest.arrive(&waiting);
    for chain in guest.driver.hostile_chains() {
        assert_eq!(guest.driver.submit_raw(RX, &chain).written, 0);
    }
    assert_eq!(guest.device.metrics().bad_chains.get(), 13);
    guest.offer(RX, 1, MAX_PACKET_LEN);
    assert_eq!(guest.received(RX), waiting);
    guest.assert_alive();
}

#[test]
fn a_bad_buffer_behind_good_ones_does_not_hold_them_up() {
    let mut guest = Guest::new();
    for _ in 0..3 {
        guest.driver.make_available(RX, &[Buffer::write(100)]);
    }
    let bad = guest.driver.make_available(RX, &[Buffer::write(3)]);
    guest.driver.make_available(RX, &[Buffer::write(100)]);
    guest.driver.kick_if_wanted(RX);
    let first = packet(150, 1);
    guest.arrive(&first);
    assert_eq!(guest.received(RX), first);
    let second = packet(20, 2);
    guest.arrive(&second);
    assert_eq!(guest.received(RX), second);
    guest.arrive(&packet(20, 3));
    assert_eq!(guest.driver.wait_used(RX, bad).written, 0);
    assert_eq!(guest.device.metrics().bad_chains.get(), 1);
}

#[test]
fn broken_rings_ask_for_a_reset() {
    for queue in [TX, 2] {
        let mut guest = Guest::new();
        guest.driver.set_avail_index(queue, 5000);
        guest.driver.kick(queue);
        guest.driver.wait_needs_reset();
        guest.device.reset();
        let features = guest.device.features();
        guest.driver = Driver::activate_with(&mut guest.device, features);
        guest.assert_alive();
    }
}

#[test]
fn commands_are_obeyed_or_refused() {
    let mut guest = Guest::new();
    let offloads = |bits: u64| [&[5, 0], &bits.to_le_bytes()[..]].concat();
    let unicast = [&[1, 0, 1, 0, 0, 0][..], &[2, 0, 0, 0, 0, 9]].concat();
    let table = [&unicast[..], &[2, 0, 0, 0], &[0x33; 12]].concat();
    let csum = 1 << VIRTIO_NET_F_GUEST_CSUM;
    for (command, answer) in [
        // Receive modes.
        (&[0, 0, 1][..], OK),
        (&[0, 1, 0], OK),
        (&[0, 0], ERR),
        (&[0, 0, 1, 1], ERR),
        (&[0, 2, 1], ERR),
        // Filter tables: two, whole, and nothing behind them.
        (&table, OK),
        (&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0], OK),
        (&unicast, ERR),
        (&table[..table.len() - 1], ERR),
        (&[&table[..], &[0]].concat(), ERR),
        (&[1, 0, 0xff, 0xff, 0xff, 0xff], ERR),
        (&[1, 1, 2, 0, 0, 0, 0, 1], ERR),
        // Offloads.
        (&offloads(csum), OK),
        (&offloads(csum | 1 << VIRTIO_NET_F_GUEST_TSO4), OK),
        (&offloads(1 << VIRTIO_NET_F_MAC), ERR),
        (&[5, 0, 0], ERR),
        // There is one pair of queues.
        (&[4, 0, 1, 0], ERR),
        (&[2, 0, 1, 0], ERR),
        (&[255, 255], ERR),
        (&[0], ERR),
    ] {
        assert_eq!(guest.command(2, command), answer, "{command:?}");
    }
    assert_eq!(guest.device.metrics().refused_commands.get(), 14);
    let asked = guest.taps[0].asked();
    assert_eq!(
        asked[1..],
        [
            Asked::Offloads(libc::TUN_F_CSUM),
            Asked::Offloads(libc::TUN_F_CSUM | libc::TUN_F_TSO4)
        ]
    );
    // Nowhere to put an answer.
    assert_eq!(guest.driver.request(2, &[&[0, 0, 1]], &[]).written, 0);
    assert_eq!(guest.device.metrics().bad_chains.get(), 1);
    guest.assert_alive();
}

#[test]
fn offloads_are_told_as_far_as_they_hold_together() {
    let all = FEATURES | USO_FEATURES;
    let without = |features: &[u32]| {
        let bits = features.iter().fold(0_u64, |bits, bit| bits | 1 << bit);
        tap_offloads(all & !bits)
    };
    use libc::{TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUN_F_USO4, TUN_F_USO6};
    let tso = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
    assert_eq!(without(&[]), tso | TUN_F_USO4 | TUN_F_USO6);
    assert_eq!(without(&[VIRTIO_NET_F_GUEST_CSUM]), 0);
    assert_eq!(without(&[VIRTIO_NET_F_GUEST_USO4]), tso);
    assert_eq!(
        without(&[VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6]),
        TUN_F_CSUM | TUN_F_USO4 | TUN_F_USO6
    );
    assert_eq!(tap_offloads(0), 0);
}

#[test]
fn the_tap_is_told_what_the_driver_chose_and_forgets_it_at_a_reset() {
    let mut guest = Guest::with(1, |features| features & !USO_FEATURES);
    guest.assert_alive();
    guest.device.reset();
    use libc::{TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6};
    assert_eq!(
        guest.taps[0].asked(),
        [
            Asked::Offloads(TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN),
            Asked::Offloads(0)
        ]
    );
}

#[test]
fn pairs_are_used_when_the_driver_says_so() {
    const CONTROL: u16 = 6;
    let mut guest = Guest::with(3, |features| features);
    for (pairs, answer) in [(0_u16, ERR), (4, ERR), (3, OK), (2, OK)] {
        let command = [&[4, 0], &pairs.to_le_bytes()[..]].concat();
        assert_eq!(guest.command(CONTROL, &command), answer, "{pairs}");
    }
    // At the start, then by each command that was obeyed.
    let enabled = |on: [bool; 3]| on.map(Asked::Enabled).to_vec();
    assert_eq!(guest.taps[0].asked().len(), 1);
    assert_eq!(guest.taps[1].asked(), enabled([false, true, true]));
    assert_eq!(guest.taps[2].asked(), enabled([false, true, false]));

    let second = packet(111, 5);
    rustix::io::write(&guest.peers[1], &second).unwrap();
    guest.offer(receive_queue(1), 100, 1530);
    assert_eq!(guest.received(receive_queue(1)), second);
    let used = guest.driver.request(transmit_queue(1), &[&second], &[]);
    assert_eq!(used.written, 0);
    assert_eq!(guest.sent(1), second);
    guest.assert_alive();
}

#[test]
fn a_driver_that_knows_of_one_pair_finds_its_control_queue_behind_it() {
    let mut guest = Guest::with(2, |features| features & !(1 << VIRTIO_NET_F_MQ));
    assert_eq!(guest.command(2, &[0, 0, 1]), OK);
    assert_eq!(guest.command(2, &[4, 0, 1, 0]), ERR);
    guest.assert_alive();
}

#[test]
fn a_driver_without_the_first_pair_is_refused() {
    let (mut device, _, _peers) = device(1);
    let guest = Driver::activate_with(&mut device, 0);
    let mut queues = device.pause();
    queues.retain(|queue| queue.index != TX);
    assert!(matches!(
        guest.try_reactivate(&mut device, queues),
        Err(ActivateError::MissingQueue { index: TX })
    ));
}

#[test]
fn a_pause_loses_neither_packets_nor_settings() {
    let mut guest = Guest::with(2, |features| features);
    guest.offer(RX, 100, 1530);
    assert_eq!(guest.command(4, &[4, 0, 2, 0]), OK);
    let before = packet(70, 1);
    guest.arrive(&before);
    assert_eq!(guest.received(RX), before);
    let queues = guest.device.pause();
    assert_eq!(queues.len(), 5);
    let during = packet(71, 2);
    guest.arrive(&during);
    let asleep = guest
        .driver
        .make_available(TX, &[Buffer::read(&packet(72, 3))]);
    guest.driver.reactivate(&mut guest.device, queues);
    assert_eq!(guest.received(RX), during);
    guest.driver.wait_used(TX, asleep);
    assert_eq!(guest.sent(0), packet(72, 3));
    assert_eq!(
        guest.taps[1].asked(),
        [false, true, true].map(Asked::Enabled)
    );
}

#[test]
fn state_is_kept_and_checked() {
    let mut guest = Guest::with(2, |features| features);
    assert_eq!(guest.device.save().settings, None);
    let csum = 1_u64 << VIRTIO_NET_F_GUEST_CSUM;
    assert_eq!(guest.command(4, &[4, 0, 2, 0]), OK);
    assert_eq!(
        guest.command(4, &[&[5, 0], &csum.to_le_bytes()[..]].concat()),
        OK
    );
    guest.device.pause();
    let state = guest.device.save();
    let settings = Settings {
        pairs: 2,
        offloads: csum,
    };
    assert_eq!(state.settings, Some(settings));

    let (mut other, _, _peers) = device(2);
    other.restore(state.clone()).unwrap();
    assert_eq!(other.save(), state);
    let refused = |change: fn(&mut NetState)| {
        let (mut other, _, _peers) = device(2);
        let mut state = state.clone();
        change(&mut state);
        assert!(other.restore(state).is_err());
    };
    refused(|state| state.mac[5] = 2);
    refused(|state| state.mtu = 1500);
    refused(|state| state.queue_pairs = 1);
    refused(|state| state.settings.as_mut().unwrap().pairs = 3);
    refused(|state| state.settings.as_mut().unwrap().pairs = 0);
    refused(|state| state.settings.as_mut().unwrap().offloads = 1);
    let (mut single, _, _peers) = device(1);
    assert!(single.restore(state).is_err());
}

#[test]
fn a_tap_that_goes_takes_the_link_down_and_no_more() {
    let mut guest = Guest::new();
    guest.offer(RX, 50, 1530);
    let there = packet(60, 0);
    guest.send(&[&there]);
    assert_eq!(guest.sent(0), there);
    guest.peers.clear();
    guest.driver.wait_config_change();
    let mut status = [0xee; 2];
    guest.device.read_config(6, &mut status);
    assert_eq!(status, [0, 0]);
    guest.send(&[&packet(60, 1)]);
    assert_eq!(guest.device.metrics().transmitted_dropped.get(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a driver writes into its queues: each chain comes back, and the device lives.
    #[test]
    fn any_chain_comes_back(
        chains in prop::collection::vec(
            (
                0..3_u16,
                prop::collection::vec((any::<u8>(), 0..4096_u32, 0..8_u16, 0..4_u16), 1..5),
            ),
            1..20,
        ),
    ) {
        let mut guest = Guest::new();
        for (queue, descriptors) in chains {
            let chain: Vec<_> = descriptors
                .into_iter()
                .map(|(page, len, flags, next)| RawDescriptor {
                    addr: u64::from(page) << 20 | 0x10,
                    len,
                    // NEXT, WRITE and INDIRECT in every combination.
                    flags,
                    next,
                })
                .collect();
            let head = guest.driver.make_raw_available(queue, &chain, Vec::new());
            guest.driver.kick_if_wanted(queue);
            if queue == RX {
                // What is good of it comes back with a packet, not before there is room for the largest.
                guest.arrive(&packet(64, 0));
            } else {
                guest.driver.wait_used(queue, head);
            }
        }
        while rustix::io::read(&guest.peers[0], &mut [0; 16]).is_ok() {}
        let there = packet(90, 1);
        guest.send(&[&there]);
        prop_assert_eq!(guest.sent(0), there);
    }

    /// Whatever a command holds, it is answered.
    #[test]
    fn any_command_is_answered(command in prop::collection::vec(any::<u8>(), 0..64)) {
        let mut guest = Guest::new();
        let answer = guest.command(2, &command);
        prop_assert!(answer == OK || answer == ERR);
        guest.assert_alive();
    }

    /// Packets of any lengths arrive as they are in buffers of any lengths.
    #[test]
    fn any_packet_arrives(
        buffers in prop::collection::vec(12_usize..3000, 40..120),
        lengths in prop::collection::vec(1_usize..2000, 1..20),
    ) {
        let mut guest = Guest::new();
        for len in &buffers {
            guest.driver.make_available(RX, &[Buffer::write(*len)]);
        }
        // Enough for the last packet to have the room that the largest would need.
        guest.offer(RX, 2, MAX_PACKET_LEN);
        let mut room: usize = buffers.iter().sum();
        for (seed, len) in lengths.into_iter().enumerate() {
            let packet = packet(len, seed);
            // A packet takes whole buffers.
            let Some(left) = room.checked_sub(packet.len() + 3000) else {
                break;
            };
            room = left;
            guest.arrive(&packet);
            prop_assert_eq!(guest.received(RX), packet);
        }
    }
}
