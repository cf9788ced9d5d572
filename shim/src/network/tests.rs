//! The pure parts with messages made by hand, the rest with a real kernel in network namespaces of the tests' own. The
//! latter need root; without it they say so and stop.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;

use futures::TryStreamExt;
use husk_vmm::control::{self, Call, Reply, Request};
use rtnetlink::packet_route::link::{
    InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::packet_route::neighbour::{NeighbourMessage, NeighbourState};
use rtnetlink::packet_route::route::{
    RouteAttribute, RouteFlags, RouteMessage, RouteNextHop, RouteNextHopFlags, RouteProtocol,
    RouteScope, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAttribute, RuleMessage};
use rtnetlink::packet_route::{AddressFamily as RouteFamily, RouteNetlinkMessage};
use rtnetlink::{Handle, LinkUnspec, LinkVeth, RouteMessageBuilder};
use serde_json::json;

use super::scan::{Found, interfaces, links, name, usable};
use super::settings::messages;
use super::*;
use crate::vmm::Worker;
use crate::vmm::tests::{fake_worker, reply};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const POD: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const PEER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);

/// Bytes before each packet of a tap, as long as nobody has set another length.
const PACKET_HEADER: usize = 10;

fn link(index: u32, name: &str, kind: InfoKind) -> LinkMessage {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.link_layer_type = LinkLayerType::Ether;
    link.header.flags = LinkFlags::Up | LinkFlags::Broadcast;
    let last = u8::try_from(index).unwrap();
    link.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::Address(vec![2, 0, 0, 0, 0, last]),
        LinkAttribute::Mtu(1450),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]),
    ];
    link
}

#[test]
fn place_is_what_the_configuration_says() {
    let place = |namespaces| {
        let spec = json!({"ociVersion": "1.1.0", "linux": {"namespaces": namespaces}});
        Place::of(&serde_json::from_value(spec).unwrap())
    };
    assert_eq!(place(json!([{"type": "network"}])), Place::Nowhere);
    assert_eq!(place(json!([{"type": "pid"}])), Place::Host);
    assert_eq!(
        place(json!([{"type": "network", "path": "/run/netns/x"}])),
        Place::Namespace("/run/netns/x".into())
    );
}

#[test]
fn interfaces_that_are_up_are_the_guests() {
    let mut loopback = link(1, "lo", InfoKind::Veth);
    loopback.header.flags = LinkFlags::Up | LinkFlags::Loopback;
    let mut tunnel = link(3, "tunl0", InfoKind::IpIp);
    tunnel.header.link_layer_type = LinkLayerType::Tunnel;
    tunnel.header.flags = LinkFlags::Noarp;
    let mut macvlan = link(5, "net1", InfoKind::MacVlan);
    // What it lies on is in another namespace, where 2 is its number.
    macvlan
        .attributes
        .extend([LinkAttribute::Link(2), LinkAttribute::LinkNetNsId(0)]);
    let mut eth0 = link(2, "eth0", InfoKind::Veth);
    // The other end of a veth may be here: that is not on top of it.
    eth0.attributes.push(LinkAttribute::Link(5));
    let found = interfaces(&[loopback, tunnel, macvlan, eth0]).unwrap();
    let expected = Interface {
        index: 2,
        name: "eth0".to_owned(),
        mac: [2, 0, 0, 0, 0, 2],
        mtu: 1450,
    };
    assert_eq!(found.len(), 2);
    assert_eq!(found[0], expected);
    assert_eq!(found[1].name, "net1");
}

#[test]
fn later_interfaces_are_taken_beside_what_is_ours_and_what_no_vm_can_have() {
    let eth0 = link(2, "eth0", InfoKind::Veth);
    let tap = link(3, "tap0_husk", InfoKind::Tun);
    let mut down = link(4, "down", InfoKind::Veth);
    down.header.flags = LinkFlags::empty();
    let mut odd = link(5, "odd", InfoKind::IpVlan);
    odd.header.flags |= LinkFlags::Noarp;
    let mut twin = link(6, "twin", InfoKind::Veth);
    twin.attributes = eth0.attributes.clone();
    let (there, unusable) = usable(&[eth0, tap, down, odd, twin]);
    assert_eq!(there.len(), 1);
    assert_eq!(there[0].name, "eth0");
    let unusable: Vec<_> = unusable
        .iter()
        .map(|(index, reason)| (*index, reason.to_string()))
        .collect();
    assert_eq!(unusable.len(), 2);
    assert_eq!(unusable[0].0, 5);
    assert!(unusable[0].1.contains("it works on layer 3"));
    assert_eq!(unusable[1].0, 6);
    assert!(unusable[1].1.contains("the same MAC address as eth0"));
}

#[test]
fn interface_that_cannot_be_a_vms_is_named_with_the_reason() {
    let refused = |change: fn(&mut LinkMessage)| {
        let eth0 = link(2, "eth0", InfoKind::Veth);
        let mut odd = link(3, "odd", InfoKind::IpVlan);
        change(&mut odd);
        interfaces(&[eth0, odd]).unwrap_err().to_string()
    };
    let prefix = "interface odd (ipvlan) cannot be a VM's: ";
    for (change, reason) in [
        (
            (|odd| odd.header.flags |= LinkFlags::Noarp) as fn(&mut LinkMessage),
            "it works on layer 3, without ARP",
        ),
        (
            |odd| odd.header.link_layer_type = LinkLayerType::None,
            "it does not carry Ethernet",
        ),
        (
            |odd| odd.attributes.push(LinkAttribute::Controller(2)),
            "it is a port of eth0",
        ),
        (
            |odd| odd.attributes.push(LinkAttribute::Link(2)),
            "it is on top of eth0, which is in the same namespace",
        ),
        (
            |odd| odd.attributes[1] = LinkAttribute::Address(vec![2, 0, 0, 0, 0, 2]),
            "it has the same MAC address as eth0",
        ),
        (
            |odd| odd.attributes[1] = LinkAttribute::Address(vec![0; 20]),
            "it has no MAC address",
        ),
        (
            |odd| odd.attributes[2] = LinkAttribute::Mtu(65_536),
            "its MTU is not one of an Ethernet device",
        ),
    ] {
        assert_eq!(refused(change), format!("{prefix}{reason}"));
    }
    assert_eq!(
        refused(|odd| odd.attributes[0] = LinkAttribute::IfName("tap0_husk".to_owned())),
        "another VM has it already, by tap0_husk"
    );
}

fn route(kind: RouteType, attributes: Vec<RouteAttribute>) -> RouteMessage {
    let mut route = RouteMessage::default();
    route.header.address_family = RouteFamily::Inet;
    route.header.table = 254;
    route.header.kind = kind;
    route.header.protocol = RouteProtocol::Boot;
    route.attributes = attributes;
    route
}

fn found() -> Found {
    Found {
        interfaces: vec![Interface {
            index: 2,
            name: "eth0".to_owned(),
            mac: MAC,
            mtu: 1500,
        }],
        ..Found::default()
    }
}

/// The routes that the guest gets.
fn routes_of(routes: Vec<RouteMessage>) -> Vec<RouteMessage> {
    let found = Found { routes, ..found() };
    let routes = messages(&found).into_iter().map(|message| match message {
        RouteNetlinkMessage::NewRoute(route) => route,
        other => panic!("{other:?}"),
    });
    routes.collect()
}

#[test]
fn routes_come_after_those_that_they_need() {
    let gateway = RouteMessageBuilder::<Ipv4Addr>::new()
        .gateway(PEER)
        .output_interface(2)
        .build();
    let mut onlink = route(RouteType::Unicast, vec![RouteAttribute::Oif(2)]);
    onlink.header.scope = RouteScope::Link;
    let plain = route(RouteType::Unicast, vec![RouteAttribute::Oif(2)]);
    assert_eq!(
        routes_of(vec![gateway.clone(), plain.clone(), onlink.clone()]),
        [onlink, plain, gateway]
    );
}

#[test]
fn routes_that_are_no_setting_stay_on_the_host() {
    let eth0 = || vec![RouteAttribute::Oif(2)];
    let mut local = route(RouteType::Unicast, eth0());
    local.header.table = 0;
    local.attributes.push(RouteAttribute::Table(255));
    let mut learned = route(RouteType::Unicast, eth0());
    learned.header.protocol = RouteProtocol::Ra;
    let mut copy = route(RouteType::Unicast, eth0());
    copy.header.flags = RouteFlags::Cloned;
    let of_other = route(RouteType::Unicast, vec![RouteAttribute::Oif(3)]);
    let own = route(RouteType::Broadcast, eth0());
    assert_eq!(
        routes_of(vec![local, learned, copy, of_other, own]),
        Vec::<RouteMessage>::new()
    );
    // No interface, or that of each namespace.
    let blackhole = route(RouteType::BlackHole, Vec::new());
    let unreachable = route(RouteType::Unreachable, vec![RouteAttribute::Oif(1)]);
    let both = vec![blackhole, unreachable];
    assert_eq!(routes_of(both.clone()), both);
}

#[test]
fn state_of_the_host_is_taken_out_of_routes() {
    let mut hop = RouteNextHop::default();
    hop.interface_index = 2;
    hop.flags = RouteNextHopFlags::Linkdown | RouteNextHopFlags::Onlink;
    let mut found = route(
        RouteType::Unicast,
        vec![
            RouteAttribute::MultiPath(vec![hop.clone()]),
            RouteAttribute::NhId(4),
            RouteAttribute::Priority(5),
        ],
    );
    found.header.flags = RouteFlags::Linkdown | RouteFlags::Onlink;
    hop.flags = RouteNextHopFlags::Onlink;
    let [sent] = &routes_of(vec![found])[..] else {
        panic!("one route");
    };
    assert_eq!(sent.header.flags, RouteFlags::Onlink);
    assert_eq!(
        sent.attributes,
        [
            RouteAttribute::MultiPath(vec![hop]),
            RouteAttribute::Priority(5)
        ]
    );
}

#[test]
fn rules_and_neighbours_that_were_set_are_sent() {
    let mut default = RuleMessage::default();
    default
        .attributes
        .push(RuleAttribute::Protocol(RouteProtocol::Kernel));
    let mut rule = RuleMessage::default();
    rule.attributes.push(RuleAttribute::Priority(9));
    let mut neighbour = NeighbourMessage::default();
    neighbour.header.ifindex = 2;
    neighbour.header.state = NeighbourState::Permanent;
    let mut learned = neighbour.clone();
    learned.header.state = NeighbourState::Reachable;
    let mut of_other = neighbour.clone();
    of_other.header.ifindex = 3;
    let found = Found {
        rules: vec![default, rule.clone()],
        neighbours: vec![learned, neighbour.clone(), of_other],
        ..found()
    };
    assert_eq!(
        messages(&found),
        [
            RouteNetlinkMessage::NewNeighbour(neighbour),
            RouteNetlinkMessage::NewRule(rule)
        ]
    );
}

#[test]
fn queues_are_as_many_as_processors_and_fit_the_message() {
    assert_eq!(queue_pairs(1, 1, true), 1);
    assert_eq!(queue_pairs(4, 2, true), 4);
    assert_eq!(queue_pairs(255, 1, false), MAX_QUEUE_PAIRS);
    assert_eq!(queue_pairs(16, 3, true), 8);
    assert_eq!(queue_pairs(16, 60, true), 1);
}

/// A network namespace, which is there as long as this and what was made of it.
struct TestNamespace {
    path: PathBuf,
    _end: mpsc::Sender<()>,
}

impl TestNamespace {
    fn new() -> Self {
        let (end, ended) = mpsc::channel::<()>();
        let (ready, id) = mpsc::channel();
        std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            ready.send(nix::unistd::gettid()).unwrap();
            // Until the sender is dropped.
            let _ = ended.recv();
        });
        let id = id.recv().unwrap();
        Self {
            path: format!("/proc/self/task/{id}/ns/net").into(),
            _end: end,
        }
    }

    fn open(&self) -> Namespace {
        Namespace::open(&self.path).unwrap()
    }
}

/// A pod with an interface eth0, and a bridge or whatever is at the other end.
struct Pod {
    pod: TestNamespace,
    peer: TestNamespace,
    /// A socket in `pod`.
    netlink: Handle,
    dir: tempfile::TempDir,
}

impl Pod {
    /// `None` without root.
    async fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: a network namespace needs root");
            return None;
        }
        let (pod, peer) = (TestNamespace::new(), TestNamespace::new());
        let netlink = pod.open().connect().await.unwrap();
        let add = LinkVeth::new("eth0", "peer")
            .address(MAC.to_vec())
            .mtu(1400)
            .up();
        netlink.link().add(add.build()).execute().await.unwrap();
        let file = std::fs::File::open(&peer.path).unwrap();
        let away = LinkUnspec::new_with_name("peer").setns_by_fd(file.as_raw_fd());
        netlink.link().set(away.build()).execute().await.unwrap();
        let pod = Self {
            pod,
            peer,
            netlink,
            dir: tempfile::tempdir().unwrap(),
        };
        pod.address(&pod.netlink, "eth0", POD).await;
        let peer = pod.peer.open().connect().await.unwrap();
        let up = LinkUnspec::new_with_name("peer").up().build();
        peer.link().set(up).execute().await.unwrap();
        pod.address(&peer, "peer", PEER).await;
        Some(pod)
    }

    async fn address(&self, netlink: &Handle, interface: &str, address: Ipv4Addr) {
        let index = self.find(netlink, interface).await.unwrap();
        let add = netlink.address().add(index, address.into(), 24);
        add.execute().await.unwrap();
    }

    async fn find(&self, netlink: &Handle, interface: &str) -> Option<u32> {
        let links = links(netlink).await.unwrap();
        let link = links.iter().find(|link| name(link) == interface)?;
        Some(link.header.index)
    }

    fn record(&self) -> PathBuf {
        self.dir.path().join("network")
    }

    async fn set_up(&self, vcpus: u8) -> Result<Network, Error> {
        Network::set_up(&Wanted {
            place: Place::Namespace(self.pod.path.clone()),
            config: husk_config::Network::default(),
            vcpus,
            record: &self.record(),
        })
        .await
    }

    /// Names of our taps, and how many filters eth0 has.
    async fn traces(&self) -> (Vec<String>, usize) {
        let links = links(&self.netlink).await.unwrap();
        let taps = links.iter().map(name).filter(|name| tap::is_ours(name));
        let taps = taps.map(str::to_owned).collect();
        let index = self.find(&self.netlink, "eth0").await.unwrap();
        let filters: Vec<_> = self
            .netlink
            .traffic_filter(index.cast_signed())
            .get()
            .ingress()
            .execute()
            .try_collect()
            .await
            .unwrap();
        (taps, filters.len())
    }
}

/// The next packet of this type that arrives at a tap.
async fn receive(tap: &OwnedFd, ether_type: u16) -> Vec<u8> {
    let file = std::fs::File::from(tap.try_clone().unwrap());
    tokio::task::spawn_blocking(move || {
        loop {
            let mut poll = [nix::poll::PollFd::new(
                file.as_fd(),
                nix::poll::PollFlags::POLLIN,
            )];
            assert_eq!(nix::poll::poll(&mut poll, 10_000u16).unwrap(), 1);
            let mut bytes = vec![0; 2048];
            let length = (&file).read(&mut bytes).unwrap();
            let packet = bytes[PACKET_HEADER..length].to_vec();
            if packet[12..14] == ether_type.to_be_bytes() {
                return packet;
            }
        }
    })
    .await
    .unwrap()
}

#[tokio::test]
async fn packets_pass_both_ways() {
    let Some(pod) = Pod::new().await else { return };
    let network = pod.set_up(1).await.unwrap();
    let tap = &network.nics[0].taps[0];
    let socket = pod.peer.open();
    let socket = socket.inside(|| {
        let socket = UdpSocket::bind((PEER, 0)).unwrap();
        socket.send_to(b"hello", (POD, 9)).unwrap();
        socket
    });
    let _socket = socket.await.unwrap();

    // Who is 10.0.0.2? The guest would answer.
    let question = receive(tap, 0x0806).await;
    assert_eq!(question[38..42], POD.octets());
    let asks = question[6..12].to_vec();
    let mut answer = vec![0; PACKET_HEADER];
    answer.extend_from_slice(&asks);
    answer.extend_from_slice(&MAC);
    answer.extend_from_slice(&question[12..20]);
    answer.extend_from_slice(&[0, 2]);
    answer.extend_from_slice(&MAC);
    answer.extend_from_slice(&POD.octets());
    answer.extend_from_slice(&asks);
    answer.extend_from_slice(&PEER.octets());
    let mut file = std::fs::File::from(tap.try_clone().unwrap());
    file.write_all(&answer).unwrap();

    let packet = receive(tap, 0x0800).await;
    assert_eq!(packet[..6], MAC);
    assert!(packet.ends_with(b"hello"), "{packet:?}");
}

#[tokio::test]
async fn devices_are_like_the_interfaces_and_nothing_stays() {
    let Some(pod) = Pod::new().await else { return };
    let nothing = (Vec::new(), 0);
    for vcpus in [1, 3] {
        assert_eq!(pod.traces().await, nothing);
        let mut network = pod.set_up(vcpus).await.unwrap();
        let nics = network.nics();
        assert_eq!(nics.len(), 1);
        assert_eq!((nics[0].mac, nics[0].mtu), (MAC, 1400));
        assert_eq!(nics[0].queue_pairs, vcpus);
        let per_pair = if nics[0].vhost { 2 } else { 1 };
        assert_eq!(network.descriptors().count(), usize::from(vcpus) * per_pair);
        let guest = network.guest().unwrap();
        assert_eq!(guest.interfaces[0].name, "eth0");
        assert_eq!(guest.interfaces[0].mtu, 1400);
        assert!(!guest.settings.is_empty());
        let (taps, filters) = pod.traces().await;
        assert_eq!(taps.len(), 1);
        assert_ne!(filters, 0);
        let index = pod.find(&pod.netlink, &taps[0]).await.unwrap();
        let tap = links(&pod.netlink).await.unwrap();
        let tap = tap.iter().find(|link| link.header.index == index).unwrap();
        assert!(tap.header.flags.contains(LinkFlags::Up));
        assert!(tap.attributes.contains(&LinkAttribute::Mtu(1400)));

        // In use, it is nobody else's.
        let err = pod.set_up(1).await.unwrap_err().chain();
        assert!(
            err.ends_with("another VM has it already, by tap0_husk"),
            "{err}"
        );
        assert_eq!(pod.traces().await.0.len(), 1);

        assert!(pod.record().exists());
        network.remove().await;
        assert_eq!(pod.traces().await, nothing);
        assert!(!pod.record().exists());
        network.remove().await;
        network.close();
    }
}

#[tokio::test]
async fn what_a_killed_shim_left_is_removed_by_its_record_or_replaced() {
    let Some(pod) = Pod::new().await else { return };
    // The taps go with the worker. What was redirected to them stays.
    drop(pod.set_up(1).await.unwrap());
    let (taps, filters) = pod.traces().await;
    assert!(taps.is_empty(), "{taps:?}");
    assert_ne!(filters, 0);
    drop(pod.set_up(1).await.expect("what is left is replaced"));

    remove_recorded(&pod.record()).await;
    assert_eq!(pod.traces().await, (Vec::new(), 0));
    assert!(!pod.record().exists());
    // Without a record, or when the namespace has gone, there is nothing to do.
    remove_recorded(&pod.dir.path().join("absent")).await;
    std::fs::write(pod.record(), "/absent/netns").unwrap();
    remove_recorded(&pod.record()).await;
}

#[tokio::test]
async fn qdisc_of_somebody_else_is_respected() {
    let Some(pod) = Pod::new().await else { return };
    let index = pod.find(&pod.netlink, "eth0").await.unwrap().cast_signed();
    let add = pod.netlink.qdisc().add(index).ingress();
    add.execute().await.unwrap();
    let add = pod.netlink.traffic_filter(index).add().parent(0xffff_0000);
    let add = add.priority(1).protocol(0x0300).redirect(1).unwrap();
    add.execute().await.unwrap();
    let before = pod.traces().await;
    assert_ne!(before.1, 0);
    let err = pod.set_up(1).await.unwrap_err().chain();
    assert!(
        err.ends_with("interface eth0 has an ingress queueing discipline of somebody else's"),
        "{err}"
    );
    assert_eq!(pod.traces().await, before);
}

#[tokio::test]
async fn namespace_without_an_interface_that_is_up_gives_no_device() {
    let Some(pod) = Pod::new().await else { return };
    let down = LinkUnspec::new_with_name("eth0").down().build();
    pod.netlink.link().set(down).execute().await.unwrap();
    let network = pod.set_up(1).await.unwrap();
    assert!(network.nics().is_empty() && network.guest().is_none());
    // Something may come later.
    assert!(pod.record().exists());
    network.remove().await;
    assert!(!pod.record().exists());
}

#[tokio::test]
async fn missing_namespace_is_named() {
    let wanted = Wanted {
        place: Place::Namespace("/absent/netns".into()),
        config: husk_config::Network::default(),
        vcpus: 1,
        record: Path::new("/absent/record"),
    };
    assert_eq!(
        Network::set_up(&wanted).await.unwrap_err().chain(),
        "network namespace /absent/netns cannot be given to a VM: cannot open it: no such file or directory"
    );
}

#[tokio::test]
async fn network_of_the_host_is_refused_unless_isolation_will_do() {
    for place in [Place::Host, Place::Namespace("/proc/self/ns/net".into())] {
        let set_up = async |text: &str| {
            let config = husk_config::Config::from_toml(text, "test").unwrap();
            Network::set_up(&Wanted {
                place: place.clone(),
                config: config.network(),
                vcpus: 1,
                record: Path::new("/absent/record"),
            })
            .await
        };
        let err = set_up("").await.unwrap_err().chain();
        assert!(err.contains("network.host_network = \"isolate\""), "{err}");
        let network = set_up("[network]\nhost_network = \"isolate\"").await;
        assert!(network.unwrap().nics().is_empty());
    }
}

/// A worker whose guest's agent connects to no port but `open`, and sends back what it gets there once that has ended.
fn worker_with_port(open: u16) -> Worker {
    let (worker, _events) = fake_worker(move |socket| {
        while let Ok(Some((request, _))) = control::recv::<Request>(&socket) {
            let port = husk_protocol::FORWARD_PORT;
            assert_eq!(request.call, Call::VsockConnect { port });
            let (host, mut guest) = UnixStream::pair().unwrap();
            let connected = Ok(Reply::VsockConnected { local_port: 9 });
            reply(&socket, request.id, connected, &[host.as_fd()]);
            drop(host);
            let mut port = [0; 2];
            guest.read_exact(&mut port).unwrap();
            if u16::from_be_bytes(port) == open {
                guest
                    .write_all(&[husk_protocol::FORWARD_CONNECTED])
                    .unwrap();
                let mut text = Vec::new();
                guest.read_to_end(&mut text).unwrap();
                guest.write_all(&text).unwrap();
            }
        }
    });
    worker
}

#[tokio::test]
async fn ports_of_the_namespace_lead_to_the_guest() {
    let Some(pod) = Pod::new().await else { return };
    let forward = pod.set_up(1).await.unwrap().forward.unwrap();
    // It need not have been up before.
    let up = LinkUnspec::new_with_name("lo").up().build();
    pod.netlink.link().set(up).execute().await.unwrap();
    let serving = tokio::spawn(forward.serve(worker_with_port(8080)));
    let inside = pod.pod.open();
    let exchange = |address: (Ipv4Addr, u16)| {
        let inside = inside.clone();
        async move {
            let exchange = move || {
                let mut client = TcpStream::connect(address)?;
                client.write_all(b"hello")?;
                client.shutdown(Shutdown::Write)?;
                let mut text = String::new();
                client.read_to_string(&mut text).map(|_| text)
            };
            inside.inside(exchange).await.unwrap()
        }
    };
    assert_eq!(
        exchange((Ipv4Addr::LOCALHOST, 8080)).await.unwrap(),
        "hello"
    );
    // What refuses in the guest is not taken for an empty answer. The reset may come before the half-close.
    let refused = exchange((Ipv4Addr::LOCALHOST, 8081)).await.unwrap_err();
    assert!(
        matches!(
            refused.kind(),
            ErrorKind::ConnectionReset | ErrorKind::NotConnected | ErrorKind::BrokenPipe
        ),
        "{refused}"
    );
    // Only the loopback addresses are the guest's: others are asked for by nobody, and the namespace refuses them.
    let other = exchange((POD, 8080)).await.unwrap_err();
    assert_eq!(other.kind(), ErrorKind::ConnectionRefused);
    serving.abort();
    assert!(serving.await.unwrap_err().is_cancelled());
    let after = exchange((Ipv4Addr::LOCALHOST, 8080)).await.unwrap_err();
    assert_eq!(after.kind(), ErrorKind::ConnectionRefused);
}
