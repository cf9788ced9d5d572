//! Tests of the socket device, by a driver that plays a guest's kernel.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use proptest::prelude::*;

use super::connection::BUF_ALLOC;
use super::packet::{
    HEADER_LEN, Header, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op,
};
use super::{ConnectError, EVENT_QUEUE, RX_QUEUE, TX_QUEUE, VsockConfig, VsockDevice, VsockStream};
use crate::snapshot::Snapshot;
use crate::virtio::VirtioDevice;
use crate::virtio::testing::{Buffer, Driver, PATIENCE, RawDescriptor};

const GUEST_CID: u32 = 3;
const READY_PORT: u32 = 1024;
const AGENT_PORT: u32 = 77;
/// As Linux sizes its receive buffers.
const RX_BUFFER: usize = 3776;

struct Guest {
    device: VsockDevice,
    driver: Driver,
    ready: Receiver<()>,
}

/// The guest's side of a connection, and the host's.
struct Pair {
    local_port: u32,
    host: UnixStream,
    sent: u32,
    received: u32,
}

fn device() -> (VsockDevice, Receiver<()>) {
    let (tell, ready) = channel();
    let config = VsockConfig::new(GUEST_CID, READY_PORT).unwrap();
    let device = VsockDevice::new(config, move || tell.send(()).unwrap(), |_| Ok(())).unwrap();
    (device, ready)
}

impl Guest {
    fn boot() -> Self {
        let mut guest = Self::without_buffers();
        guest.refill();
        guest
    }

    fn without_buffers() -> Self {
        let (mut device, ready) = device();
        let driver = Driver::activate(&mut device);
        Self {
            device,
            driver,
            ready,
        }
    }

    /// Offers as many receive buffers as there are descriptors.
    fn refill(&mut self) {
        for _ in 0..self.driver.free_descriptors(RX_QUEUE) {
            self.driver
                .make_available(RX_QUEUE, &[Buffer::write(RX_BUFFER)]);
        }
        self.driver.kick_if_wanted(RX_QUEUE);
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        let chain = if payload.is_empty() {
            vec![Buffer::read(&header.encode())]
        } else {
            vec![Buffer::read(&header.encode()), Buffer::read(payload)]
        };
        assert_eq!(self.driver.submit(TX_QUEUE, &chain).written, 0);
    }

    fn receive(&mut self) -> (Header, Vec<u8>) {
        let used = self.driver.wait_any_used(RX_QUEUE);
        self.refill();
        let header: &[u8; HEADER_LEN] = used.bytes.first_chunk().expect("a header");
        let header = Header::decode(header);
        let payload = used.bytes[HEADER_LEN..].to_vec();
        assert_eq!(header.len as usize, payload.len());
        (header, payload)
    }

    fn receive_op(&mut self, op: u16) -> (Header, Vec<u8>) {
        let (header, payload) = self.receive();
        assert_eq!(header.op, op, "{header:?}");
        (header, payload)
    }

    fn connect(&mut self, port: u32) -> Receiver<Result<VsockStream, ConnectError>> {
        let (tell, told) = channel();
        self.device
            .handle()
            .connect(port, move |result| tell.send(result).unwrap());
        told
    }

    fn connected(&mut self) -> Pair {
        let told = self.connect(AGENT_PORT);
        let (request, _) = self.receive_op(op::REQUEST);
        assert_eq!(request.dst_port, AGENT_PORT);
        assert_eq!(request.buf_alloc, BUF_ALLOC);
        let pair = Pair {
            local_port: request.src_port,
            host: UnixStream::pair().unwrap().0,
            sent: 0,
            received: 0,
        };
        self.send(pair.header(op::RESPONSE), &[]);
        let stream = told.recv_timeout(PATIENCE).unwrap().unwrap();
        assert_eq!(stream.local_port, pair.local_port);
        stream.stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Pair {
            host: stream.stream,
            ..pair
        }
    }
}

impl Pair {
    fn header(&self, op: u16) -> Header {
        Header {
            src_cid: u64::from(GUEST_CID),
            dst_cid: 2,
            src_port: AGENT_PORT,
            dst_port: self.local_port,
            type_: TYPE_STREAM,
            op,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: self.received,
            ..Header::default()
        }
    }

    fn data(&mut self, len: usize) -> Header {
        let len = u32::try_from(len).unwrap();
        self.sent = self.sent.wrapping_add(len);
        Header {
            len,
            ..self.header(op::RW)
        }
    }

    fn shutdown(&self, flags: u32) -> Header {
        Header {
            flags,
            ..self.header(op::SHUTDOWN)
        }
    }
}

/// Bytes that tell where they belong.
fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i ^ (i >> 8) ^ (i >> 16)).to_le_bytes()[0])
        .collect()
}

#[test]
fn configuration_space_holds_the_cid() {
    let (device, _) = device();
    let mut bytes = [0xff; 8];
    device.read_config(0, &mut bytes);
    assert_eq!(u64::from_le_bytes(bytes), u64::from(GUEST_CID));
    device.read_config(6, &mut bytes);
    assert_eq!(bytes, [0; 8]);
    assert!(VsockConfig::new(2, 1).is_err());
}

#[test]
fn guest_may_connect_to_the_ready_port_once() {
    let mut guest = Guest::boot();
    let request = Header {
        src_cid: u64::from(GUEST_CID),
        dst_cid: 2,
        src_port: 5000,
        dst_port: READY_PORT,
        type_: TYPE_STREAM,
        op: op::REQUEST,
        ..Header::default()
    };
    guest.send(request, &[]);
    let (response, _) = guest.receive_op(op::RESPONSE);
    assert_eq!((response.src_port, response.dst_port), (READY_PORT, 5000));
    assert_ne!(
        response.buf_alloc, 0,
        "connect(2) would not be seen to succeed"
    );
    guest.ready.recv_timeout(PATIENCE).unwrap();
    // It closes, and gets the RST that ends a connection.
    let close = Header {
        op: op::SHUTDOWN,
        flags: SHUTDOWN_BOTH,
        ..request
    };
    guest.send(close, &[]);
    guest.receive_op(op::RST);
    guest.send(request, &[]);
    guest.receive_op(op::RST);
    assert!(guest.ready.try_recv().is_err());
}

#[test]
fn other_ports_and_other_hosts_are_refused() {
    let mut guest = Guest::boot();
    for (dst_cid, dst_port, type_, op) in [
        (2, 22, TYPE_STREAM, op::REQUEST),
        (1, READY_PORT, TYPE_STREAM, op::REQUEST),
        (4, READY_PORT, TYPE_STREAM, op::REQUEST),
        (2, READY_PORT, 2, op::REQUEST),
        (2, READY_PORT, TYPE_STREAM, op::RW),
        (2, READY_PORT, TYPE_STREAM, op::RESPONSE),
        (2, READY_PORT, TYPE_STREAM, 999),
    ] {
        let packet = Header {
            src_cid: u64::from(GUEST_CID),
            dst_cid,
            src_port: 5000,
            dst_port,
            type_,
            op,
            ..Header::default()
        };
        guest.send(packet, &[]);
        let (reset, _) = guest.receive_op(op::RST);
        assert_eq!((reset.src_cid, reset.src_port), (dst_cid, dst_port));
        assert_eq!(reset.type_, type_);
    }
    assert!(guest.ready.try_recv().is_err());
}

#[test]
fn bytes_travel_both_ways() {
    let mut guest = Guest::boot();
    let mut pair = guest.connected();
    pair.host.write_all(b"to the guest").unwrap();
    let (header, payload) = guest.receive_op(op::RW);
    assert_eq!(
        (header.dst_port, payload.as_slice()),
        (AGENT_PORT, &b"to the guest"[..])
    );
    let data = pair.data(11);
    guest.send(data, b"to the host");
    let mut bytes = [0; 11];
    pair.host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"to the host");
}

#[test]
fn payload_may_be_spread_over_descriptors_or_share_the_header_s() {
    let mut guest = Guest::boot();
    let mut pair = guest.connected();
    let header = pair.data(9).encode();
    let scattered = [
        Buffer::read(&header[..10]),
        Buffer::read(&header[10..]),
        Buffer::read(b"abc"),
        Buffer::read(b""),
        Buffer::read(b"defghi"),
    ];
    guest.driver.submit(TX_QUEUE, &scattered);
    let mut whole = pair.data(9).encode().to_vec();
    whole.extend_from_slice(b"jklmnopqr, which is cut");
    guest.driver.submit(TX_QUEUE, &[Buffer::read(&whole)]);
    let mut bytes = [0; 18];
    pair.host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"abcdefghijklmnopqr");
}

#[test]
fn refused_connection_fails() {
    let mut guest = Guest::boot();
    let told = guest.connect(1);
    let (request, _) = guest.receive_op(op::REQUEST);
    guest.send(request.reset(), &[]);
    assert!(matches!(
        told.recv_timeout(PATIENCE).unwrap(),
        Err(ConnectError::Refused)
    ));
}

#[test]
fn answer_that_is_none_fails_the_connection() {
    let mut guest = Guest::boot();
    let told = guest.connect(1);
    let (request, _) = guest.receive_op(op::REQUEST);
    let nonsense = Header {
        op: op::SHUTDOWN,
        ..request.reset()
    };
    guest.send(nonsense, &[]);
    guest.receive_op(op::RST);
    assert!(matches!(
        told.recv_timeout(PATIENCE).unwrap(),
        Err(ConnectError::Protocol)
    ));
}

#[test]
fn request_before_the_driver_is_there_waits_for_it() {
    let (mut device, _ready) = device();
    let (tell, told) = channel();
    device.handle().connect(9, move |result| {
        tell.send(result.map(|s| s.local_port)).unwrap()
    });
    let mut driver = Driver::activate(&mut device);
    driver.make_available(RX_QUEUE, &[Buffer::write(RX_BUFFER)]);
    driver.kick_if_wanted(RX_QUEUE);
    let used = driver.wait_any_used(RX_QUEUE);
    assert_eq!(
        Header::decode(used.bytes.first_chunk().unwrap()).op,
        op::REQUEST
    );
    // The driver goes away instead of answering.
    device.reset();
    assert!(matches!(
        told.recv_timeout(PATIENCE).unwrap(),
        Err(ConnectError::Reset)
    ));
    drop(device);
}

#[test]
fn requests_of_a_device_that_is_gone_fail() {
    let (device, _ready) = device();
    let handle = device.handle();
    let (tell, told) = channel();
    let tell_too = tell.clone();
    handle.connect(9, move |result| tell.send(result.is_err()).unwrap());
    drop(device);
    assert!(told.recv_timeout(PATIENCE).unwrap());
    handle.connect(9, move |result| tell_too.send(result.is_err()).unwrap());
    assert!(told.recv_timeout(PATIENCE).unwrap());
}

#[test]
fn half_close_of_the_host_leaves_the_other_direction_open() {
    let mut guest = Guest::boot();
    let mut pair = guest.connected();
    pair.host.write_all(b"last words").unwrap();
    pair.host.shutdown(Shutdown::Write).unwrap();
    let (_, payload) = guest.receive_op(op::RW);
    assert_eq!(payload, b"last words");
    let (shutdown, _) = guest.receive_op(op::SHUTDOWN);
    assert_eq!(shutdown.flags, SHUTDOWN_SEND);
    let data = pair.data(6);
    guest.send(data, b"answer");
    let mut bytes = [0; 6];
    pair.host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"answer");
    // And then the rest.
    drop(pair.host);
    let (shutdown, _) = guest.receive_op(op::SHUTDOWN);
    assert_eq!(shutdown.flags, SHUTDOWN_BOTH);
}

#[test]
fn half_close_of_the_guest_is_the_end_of_file() {
    let mut guest = Guest::boot();
    let mut pair = guest.connected();
    let data = pair.data(4);
    guest.send(data, b"done");
    guest.send(pair.shutdown(SHUTDOWN_SEND), &[]);
    let mut bytes = Vec::new();
    pair.host.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, b"done");
    pair.host.write_all(b"still open").unwrap();
    assert_eq!(guest.receive_op(op::RW).1, b"still open");
    // A guest that will read no more breaks the host's pipe.
    guest.send(pair.shutdown(SHUTDOWN_RECEIVE), &[]);
    guest.receive_op(op::RST);
    assert_eq!(
        pair.host.write(b"x").unwrap_err().kind(),
        io::ErrorKind::BrokenPipe
    );
}

#[test]
fn close_of_the_host_reaches_a_guest_that_no_longer_receives() {
    let mut guest = Guest::boot();
    let mut pair = guest.connected();
    guest.send(pair.shutdown(SHUTDOWN_RECEIVE), &[]);
    let data = pair.data(2);
    guest.send(data, b"ok");
    let mut bytes = [0; 2];
    pair.host.read_exact(&mut bytes).unwrap();
    drop(pair.host);
    let (shutdown, _) = guest.receive_op(op::SHUTDOWN);
    assert_eq!(shutdown.flags, SHUTDOWN_BOTH);
}

#[test]
fn host_that_closes_with_bytes_unread_shuts_both_directions() {
    let mut guest = Guest::boot();
    let mut pair = guest.connected();
    let data = pair.data(4);
    guest.send(data, b"lost");
    drop(pair.host);
    let (shutdown, _) = guest.receive_op(op::SHUTDOWN);
    assert_eq!(shutdown.flags, SHUTDOWN_BOTH);
}

#[test]
fn bytes_for_a_host_that_reads_no_more_are_dropped_and_the_guest_learns_it() {
    let mut guest = Guest::boot();
    let mut pair = guest.connected();
    pair.host.shutdown(Shutdown::Read).unwrap();
    let data = pair.data(4);
    guest.send(data, b"lost");
    let (shutdown, _) = guest.receive_op(op::SHUTDOWN);
    assert_eq!(shutdown.flags, SHUTDOWN_RECEIVE);
    // The other direction goes on.
    pair.host.write_all(b"still here").unwrap();
    assert_eq!(guest.receive_op(op::RW).1, b"still here");
}

#[test]
fn close_of_the_guest_is_confirmed_and_what_it_sent_is_delivered() {
    let mut guest = Guest::boot();
    let mut pair = guest.connected();
    // More than the socket takes, so that some of it has to wait in the device.
    let sent = pattern(BUF_ALLOC as usize);
    for chunk in sent.chunks(64 * 1024) {
        let data = pair.data(chunk.len());
        guest.send(data, chunk);
    }
    guest.send(pair.shutdown(SHUTDOWN_BOTH), &[]);
    while guest.receive().0.op == op::CREDIT_UPDATE {}
    assert_eq!(guest.device.metrics().resets.get(), 1);
    let mut bytes = Vec::new();
    pair.host.read_to_end(&mut bytes).unwrap();
    assert!(bytes == sent);
}

#[test]
fn reset_of_the_guest_ends_the_stream() {
    let mut guest = Guest::boot();
    let mut pair = guest.connected();
    guest.send(pair.header(op::RST), &[]);
    assert_eq!(pair.host.read(&mut [0; 8]).unwrap(), 0);
    // It is unknown from now on.
    let data = pair.data(1);
    guest.send(data, b"x");
    guest.receive_op(op::RST);
}

#[test]
fn guest_that_exceeds_its_credit_is_reset() {
    let mut guest = Guest::boot();
    let mut pair = guest.connected();
    let chunk = vec![7; 64 * 1024];
    // Nobody reads. The socket takes something, the buffer its limit, and then it is over.
    let mut sent = 0;
    while guest.device.metrics().credit_abuses.get() == 0 {
        let data = pair.data(chunk.len());
        guest.send(data, &chunk);
        sent += chunk.len();
        assert!(sent < 4 << 20, "the device takes any amount");
    }
    while guest.receive().0.op != op::RST {}
    let mut bytes = Vec::new();
    // What the socket had taken is still there, then it ends.
    let _ = pair.host.read_to_end(&mut bytes);
    assert!(bytes.len() < sent);
}

#[test]
fn slow_reader_stalls_the_guest_and_then_gets_everything() {
    let mut guest = Guest::boot();
    let mut pair = guest.connected();
    let sent = pattern(BUF_ALLOC as usize);
    for chunk in sent.chunks(60_000) {
        let data = pair.data(chunk.len());
        guest.send(data, chunk);
    }
    let mut bytes = vec![0; sent.len()];
    pair.host.read_exact(&mut bytes).unwrap();
    assert!(bytes == sent);
    loop {
        let (header, _) = guest.receive_op(op::CREDIT_UPDATE);
        if pair.sent.wrapping_sub(header.fwd_cnt) < BUF_ALLOC / 2 {
            break;
        }
    }
}

#[test]
fn credit_request_is_answered() {
    let mut guest = Guest::boot();
    let pair = guest.connected();
    guest.send(pair.header(op::CREDIT_REQUEST), &[]);
    let (update, _) = guest.receive_op(op::CREDIT_UPDATE);
    assert_eq!((update.buf_alloc, update.fwd_cnt), (BUF_ALLOC, 0));
}

#[test]
fn credit_of_the_guest_is_respected() {
    let mut guest = Guest::boot();
    let mut pair = guest.connected();
    let small = Header {
        buf_alloc: 1000,
        ..pair.header(op::CREDIT_UPDATE)
    };
    guest.send(small, &[]);
    let sent = pattern(2500);
    pair.host.write_all(&sent).unwrap();
    pair.host.shutdown(Shutdown::Write).unwrap();
    let mut received = Vec::new();
    for expected in [1000, 1000, 500] {
        let (header, payload) = guest.receive_op(op::RW);
        assert_eq!(payload.len(), expected, "{header:?}");
        received.extend(payload);
        pair.received += header.len;
        // Without this there is silence: the next packet would be seen above.
        let update = Header {
            buf_alloc: 1000,
            ..pair.header(op::CREDIT_UPDATE)
        };
        guest.send(update, &[]);
    }
    guest.receive_op(op::SHUTDOWN);
    assert_eq!(received, sent);
}

#[test]
fn absurd_credit_counts_do_no_harm() {
    let mut guest = Guest::boot();
    let mut pair = guest.connected();
    for (buf_alloc, fwd_cnt) in [
        (u32::MAX, u32::MAX),
        (0, 1 << 31),
        (u32::MAX, 5),
        (1, u32::MAX),
    ] {
        let update = Header {
            buf_alloc,
            fwd_cnt,
            ..pair.header(op::CREDIT_UPDATE)
        };
        guest.send(update, &[]);
        pair.host.write_all(b"x").unwrap();
    }
    let honest = Header {
        fwd_cnt: 0,
        ..pair.header(op::CREDIT_UPDATE)
    };
    guest.send(honest, &[]);
    let mut received = 0;
    while received < 4 {
        received += guest.receive_op(op::RW).1.len();
    }
}

#[test]
fn sixty_four_mebibytes_arrive_whole_in_both_directions() {
    let mut guest = Guest::boot();
    let mut pair = guest.connected();
    let sent = pattern(64 << 20);
    let expected = sent.clone();
    let mut host = pair.host.try_clone().unwrap();
    let writer = thread::spawn(move || {
        host.write_all(&sent).unwrap();
        host.shutdown(Shutdown::Write).unwrap();
    });
    let mut received = Vec::new();
    let mut told = 0;
    loop {
        let (header, payload) = guest.receive();
        received.extend_from_slice(&payload);
        pair.received = pair.received.wrapping_add(header.len);
        if header.op == op::SHUTDOWN {
            break;
        }
        if pair.received.wrapping_sub(told) > BUF_ALLOC / 2 {
            told = pair.received;
            guest.send(pair.header(op::CREDIT_UPDATE), &[]);
        }
    }
    writer.join().unwrap();
    assert!(received == expected);

    let mut host = pair.host.try_clone().unwrap();
    let reader = thread::spawn(move || {
        let mut bytes = Vec::new();
        host.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let mut forwarded = 0;
    for chunk in expected.chunks(64 * 1024) {
        let len = u32::try_from(chunk.len()).unwrap();
        while pair.sent.wrapping_sub(forwarded) + len > BUF_ALLOC {
            forwarded = guest.receive_op(op::CREDIT_UPDATE).0.fwd_cnt;
        }
        let data = pair.data(chunk.len());
        guest.send(data, chunk);
    }
    guest.send(pair.shutdown(SHUTDOWN_SEND), &[]);
    assert!(reader.join().unwrap() == expected);
    // Granting credit must cost far fewer packets than the data.
    assert!(guest.device.metrics().credit_updates.get() <= 64 * 8 + 8);
}

#[test]
fn malformed_packets_are_returned_and_serving_goes_on() {
    let mut guest = Guest::boot();
    for chain in guest.driver.hostile_chains() {
        guest.driver.submit_raw(TX_QUEUE, &chain);
    }
    let mut pair = guest.connected();
    // Shorter than a header.
    guest
        .driver
        .submit(TX_QUEUE, &[Buffer::read(&[0; HEADER_LEN - 1])]);
    // From somebody else.
    let forged = Header {
        src_cid: 99,
        ..pair.header(op::RST)
    };
    guest.send(forged, &[]);
    assert!(guest.device.metrics().bad_chains.get() >= 10);
    let data = pair.data(2);
    guest.send(data, b"ok");
    let mut bytes = [0; 2];
    pair.host.read_exact(&mut bytes).unwrap();
    // A payload that is shorter than the header says ends its connection.
    let data = pair.data(1000);
    guest.send(data, b"too short");
    guest.receive_op(op::RST);
    assert_eq!(pair.host.read(&mut bytes).unwrap(), 0);
}

#[test]
fn malformed_receive_buffers_are_returned_and_skipped() {
    let mut guest = Guest::without_buffers();
    let told = guest.connect(AGENT_PORT);
    let bad = [
        vec![Buffer::write(HEADER_LEN - 1)],
        vec![Buffer::write(HEADER_LEN)],
        vec![Buffer::read(&[0; 4096])],
    ];
    for chain in &bad {
        assert_eq!(guest.driver.submit(RX_QUEUE, chain).written, 0);
    }
    for chain in guest.driver.hostile_chains() {
        let chain: Vec<RawDescriptor> = chain;
        assert_eq!(guest.driver.submit_raw(RX_QUEUE, &chain).written, 0);
    }
    guest.refill();
    let (request, _) = guest.receive_op(op::REQUEST);
    let accept = Header {
        op: op::RESPONSE,
        buf_alloc: 4096,
        ..request.reset()
    };
    guest.send(accept, &[]);
    told.recv_timeout(PATIENCE).unwrap().unwrap();
}

#[test]
fn malformed_buffer_between_good_ones_loses_nothing() {
    let mut guest = Guest::boot();
    let mut pair = guest.connected();
    let sent = pattern(RX_BUFFER * 600);
    let mut host = pair.host.try_clone().unwrap();
    let expected = sent.clone();
    let writer = thread::spawn(move || host.write_all(&sent).unwrap());
    let mut received = Vec::new();
    while received.len() < expected.len() {
        let used = guest.driver.wait_any_used(RX_QUEUE);
        if guest.driver.free_descriptors(RX_QUEUE) > 2 {
            guest.driver.make_available(RX_QUEUE, &[Buffer::write(9)]);
        }
        guest.refill();
        if used.written == 0 {
            continue;
        }
        received.extend_from_slice(&used.bytes[HEADER_LEN..]);
        pair.received = u32::try_from(received.len()).unwrap();
        guest.send(pair.header(op::CREDIT_UPDATE), &[]);
    }
    writer.join().unwrap();
    assert!(received == expected);
    assert!(guest.device.metrics().bad_chains.get() > 0);
}

#[test]
fn guest_that_gives_no_buffers_gets_no_memory() {
    let mut guest = Guest::without_buffers();
    let stray = Header {
        src_cid: u64::from(GUEST_CID),
        dst_cid: 2,
        src_port: 1,
        dst_port: 1,
        type_: TYPE_STREAM,
        op: op::REQUEST,
        ..Header::default()
    };
    // Each of these asks for an RST, for which there is no room. The device stops taking them at some point.
    for port in 0..256 {
        let header = Header {
            src_port: port,
            ..stray
        };
        guest
            .driver
            .make_available(TX_QUEUE, &[Buffer::read(&header.encode())]);
    }
    guest.driver.kick_if_wanted(TX_QUEUE);
    for _ in 0..256 {
        guest.driver.wait_any_used(TX_QUEUE);
    }
    let header = Header {
        src_port: 256,
        ..stray
    };
    guest
        .driver
        .make_available(TX_QUEUE, &[Buffer::read(&header.encode())]);
    guest.driver.kick_if_wanted(TX_QUEUE);
    // With buffers, all are answered, in order within what one interrupt brings.
    guest.refill();
    let mut ports: Vec<_> = (0..=256)
        .map(|_| guest.receive_op(op::RST).0.dst_port)
        .collect();
    ports.sort_unstable();
    assert_eq!(ports, (0..=256).collect::<Vec<_>>());
}

#[test]
fn paused_device_keeps_its_connections() {
    let mut guest = Guest::boot();
    let mut pair = guest.connected();
    let queues = guest.device.pause();
    assert_eq!(queues.len(), 3);
    pair.host.write_all(b"while paused").unwrap();
    guest.driver.reactivate(&mut guest.device, queues);
    assert_eq!(guest.receive_op(op::RW).1, b"while paused");
}

#[test]
fn restored_guest_learns_that_its_connections_are_gone() {
    let mut guest = Guest::boot();
    let pair = guest.connected();
    let event = guest
        .driver
        .make_available(EVENT_QUEUE, &[Buffer::write(4)]);
    guest.driver.kick_if_wanted(EVENT_QUEUE);
    let queues = guest.device.pause();
    let state = guest.device.save();
    let json = serde_json::to_string(&state).unwrap();
    let (mut restored, _ready) = device();
    restored
        .restore(serde_json::from_str(&json).unwrap())
        .unwrap();
    assert_eq!(restored.save(), state);
    guest.driver.reactivate(&mut restored, queues);
    guest.device = restored;
    let used = guest.driver.wait_used(EVENT_QUEUE, event);
    assert_eq!(used.bytes, 0_u32.to_le_bytes());
    guest.send(pair.header(op::CREDIT_UPDATE), &[]);
    guest.receive_op(op::RST);
}

#[test]
fn state_of_another_guest_is_refused() {
    let (mut device, _ready) = device();
    let mut state = device.save();
    state.guest_cid = 4;
    assert!(device.restore(state).is_err());
}

proptest! {
    #[test]
    fn headers_survive_encoding(raw in prop::array::uniform32(any::<u8>()), tail in prop::array::uniform12(any::<u8>())) {
        let mut bytes = [0; HEADER_LEN];
        bytes[..32].copy_from_slice(&raw);
        bytes[32..].copy_from_slice(&tail);
        prop_assert_eq!(Header::decode(&bytes).encode(), bytes);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Whatever a guest sends, the device answers the next honest connection.
    #[test]
    fn no_sequence_of_packets_stops_the_device(
        packets in prop::collection::vec((0_u16..9, any::<u32>(), 0_usize..5000, any::<bool>(), any::<u32>(), any::<u32>()), 1..60)
    ) {
        let mut guest = Guest::boot();
        let pair = guest.connected();
        for (op, flags, len, addressed, buf_alloc, fwd_cnt) in packets {
            let header = Header {
                op,
                flags,
                len: u32::try_from(len).unwrap(),
                dst_port: if addressed { pair.local_port } else { flags },
                buf_alloc,
                fwd_cnt,
                ..pair.header(op)
            };
            guest.send(header, &vec![0; len]);
        }
        let told = guest.connect(AGENT_PORT);
        let request = loop {
            let (header, _) = guest.receive();
            if header.op == op::REQUEST {
                break header;
            }
        };
        guest.send(Header { op: op::RESPONSE, ..request.reset() }, &[]);
        prop_assert!(told.recv_timeout(PATIENCE).unwrap().is_ok());
    }
}
