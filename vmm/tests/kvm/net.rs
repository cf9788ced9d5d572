//! The guest's own network driver with our device and a real tap, packets moved by the worker and by the host's kernel.

#![expect(
    clippy::unwrap_used,
    reason = "a test ends where something of its own fails"
)]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

use husk_vmm::config::NicConfig;
use husk_vmm::control::ExitReason;

use crate::support::{self, Guest, net};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x11];
/// Of the metrics.
const NAME: &str = "net_02:00:00:00:00:11";

/// Sends busybox four times to the host's port 5000, then gets the same from port 5001.
const EXCHANGE: &str = "\
fail() { echo HUSK FAIL $*; }
cd /sys/class/net/eth0
echo HUSK nic $(cat address) $(cat mtu) $(ls queues | grep -c rx) $(ls queues | grep -c tx)
ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 up
echo HUSK link $(cat carrier)
ping -c 1 -s 1400 10.9.0.1 >/dev/null || fail ping
ping -c 1 -s 20000 10.9.0.1 >/dev/null || fail 'ping in fragments'
for i in 1 2 3 4; do cat /bin/busybox; done > /all
nc 10.9.0.1 5000 < /all || fail upload
echo HUSK uploaded
nc 10.9.0.1 5001 < /dev/null > /got || fail download
cmp /all /got || fail content
echo HUSK END; poweroff -f
";

fn guest(vcpus: u8, queue_pairs: u8, vhost: bool) -> Guest {
    let mut guest = Guest::new(EXCHANGE);
    (guest.config.vcpus, guest.config.max_vcpus) = (vcpus, vcpus);
    let config = NicConfig {
        mac: MAC,
        mtu: 1500,
        queue_pairs,
        vhost,
    };
    guest.nics = vec![net::open("tap0", "10.9.0.1/24", &config)];
    guest.config.nics = vec![config];
    guest
}

/// The host's side of [`EXCHANGE`]; calls `between` in the middle of the guest's download.
fn exchange(upload: &TcpListener, download: &TcpListener, between: impl FnOnce()) {
    let all = std::fs::read("/bin/busybox").unwrap().repeat(4);
    let (mut stream, _) = upload.accept().unwrap();
    let begin = Instant::now();
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    report("upload", &got, begin);
    assert!(got == all, "{} bytes of {} came", got.len(), all.len());
    drop(stream);
    let (mut stream, _) = download.accept().unwrap();
    let begin = Instant::now();
    let (first, second) = all.split_at(all.len() / 2);
    stream.write_all(first).unwrap();
    between();
    stream.write_all(second).unwrap();
    wait_for_end(stream);
    report("download", &all, begin);
}

/// Waits until the other end has got everything.
fn wait_for_end(mut stream: TcpStream) {
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    stream.read_to_end(&mut Vec::new()).unwrap();
}

fn report(what: &str, bytes: &[u8], begin: Instant) {
    let seconds = begin.elapsed().as_secs_f64();
    let mebibytes = f64::from(u32::try_from(bytes.len()).unwrap()) / f64::from(1 << 20);
    println!("{what}: {:.1} MiB/s", mebibytes / seconds);
}

/// A guest uses as many pairs of queues as it has processors.
fn passes(vcpus: u8, queue_pairs: u8, vhost: bool) {
    net::in_own_network(move || {
        let listen = |port| TcpListener::bind(("10.9.0.1", port)).unwrap();
        let guest = guest(vcpus, queue_pairs, vhost);
        let (upload, download) = (listen(5000), listen(5001));
        let running = guest.start();
        let vmm = &running.vmm;
        exchange(&upload, &download, || {
            // Nothing may get lost by this but time.
            vmm.pause().unwrap();
            vmm.start().unwrap();
        });
        let metrics = running.vmm.metrics();
        let (reason, output) = running.end();
        assert_eq!(reason, ExitReason::PowerOff, "{output}");
        let used = vcpus.min(queue_pairs);
        let nic = format!("HUSK nic 02:00:00:00:00:11 1500 {used} {used}\n");
        assert!(output.contains(&nic), "{output}");
        assert!(output.contains("HUSK link 1\n"), "{output}");
        assert!(!output.contains("FAIL"), "{output}");
        assert!(output.contains("HUSK END"), "{output}");
        let metric = |name: &str| metrics[&format!("{NAME}_{name}")];
        if !vhost {
            // Segmentation is left to the host, and to the guest's network beyond it.
            for direction in ["transmitted", "received"] {
                let bytes = metric(&format!("{direction}_bytes"));
                let packets = metric(&format!("{direction}_packets"));
                println!("{direction}: {} bytes a packet", bytes / packets);
            }
            let size = metric("transmitted_bytes") / metric("transmitted_packets");
            assert!(size > 1514, "{size} bytes a packet");
        }
        assert_eq!(metric("bad_chains") + metric("received_errors"), 0);
        assert_eq!(metric("refused_commands"), 0);
    });
}

#[test]
fn the_worker_moves_packets_both_ways() {
    support::require_kvm!();
    passes(1, 1, false);
}

#[test]
fn the_worker_moves_packets_of_several_queues() {
    support::require_kvm!();
    passes(2, 2, false);
}

#[test]
fn the_kernel_moves_packets_both_ways() {
    support::require_kvm!();
    passes(1, 1, true);
}

#[test]
fn the_kernel_moves_packets_of_several_queues() {
    support::require_kvm!();
    passes(2, 2, true);
}

#[test]
fn queues_that_the_driver_does_not_use_do_no_harm() {
    support::require_kvm!();
    passes(1, 2, false);
    passes(1, 2, true);
}
