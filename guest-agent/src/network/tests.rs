//! With a real kernel, in network namespaces of the tests' own threads. They need root; without it they say so and stop.

use std::net::{Ipv4Addr, Ipv6Addr};

use nix::sched::{CloneFlags, unshare};
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::AddressScope;
use rtnetlink::packet_route::neighbour::NeighbourState;
use rtnetlink::packet_route::route::{RouteProtocol, RouteScope, RouteType};
use rtnetlink::packet_route::rule::RuleAction;
use rtnetlink::{IpVersion, LinkVeth};

use super::*;

const FIRST: [u8; 6] = [2, 0, 0, 0, 0, 1];
const SECOND: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// Runs `test` in a network namespace of its own.
fn in_namespace<T: Future<Output = ()>>(test: impl FnOnce(Handle) -> T + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: a network namespace needs root");
        return;
    }
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime")
            .block_on(async {
                let (connection, netlink, _) = rtnetlink::new_connection().expect("a socket");
                tokio::spawn(connection);
                test(netlink).await;
            });
    });
    thread.join().expect("the test passes");
}

/// Two interfaces, which happen to be connected with each other.
async fn add_devices(netlink: &Handle) {
    let veth = LinkVeth::new("eth0", "eth1").address(FIRST.to_vec());
    let added = netlink.link().add(veth.build()).execute().await;
    added.expect("a veth");
    let second = LinkUnspec::new_with_name("eth1").address(SECOND.to_vec());
    let set = netlink.link().set(second.build()).execute().await;
    set.expect("an address");
}

fn interface(index: u32, name: &str, mac: [u8; 6]) -> Interface {
    Interface {
        index,
        name: name.to_owned(),
        mac: mac.to_vec(),
        mtu: 1400,
        ..Default::default()
    }
}

fn request(interfaces: &[Interface], settings: Vec<RouteNetlinkMessage>) -> UpdateNetworkRequest {
    let encode = |setting| {
        let mut message = NetlinkMessage::from(setting);
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    };
    UpdateNetworkRequest {
        interfaces: interfaces.to_vec(),
        settings: settings.into_iter().map(encode).collect(),
        ..Default::default()
    }
}

fn address(index: u32, address: impl Into<IpAddr>, length: u8) -> RouteNetlinkMessage {
    let address = address.into();
    let mut message = AddressMessage::default();
    message.header.family = match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    message.header.index = index;
    message.header.prefix_len = length;
    message.header.scope = AddressScope::Universe;
    message.attributes = vec![
        AddressAttribute::Local(address),
        AddressAttribute::Address(address),
    ];
    RouteNetlinkMessage::NewAddress(message)
}

fn route(family: AddressFamily, length: u8, attributes: Vec<RouteAttribute>) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family;
    message.header.destination_prefix_length = length;
    message.header.protocol = RouteProtocol::Static;
    message.header.kind = RouteType::Unicast;
    message.attributes = attributes;
    message
}

fn link_route(index: u32, destination: Ipv4Addr, length: u8) -> RouteNetlinkMessage {
    let attributes = vec![
        RouteAttribute::Destination(RouteAddress::Inet(destination)),
        RouteAttribute::Oif(index),
    ];
    let mut message = route(AddressFamily::Inet, length, attributes);
    message.header.scope = RouteScope::Link;
    RouteNetlinkMessage::NewRoute(message)
}

async fn routes(netlink: &Handle, family: AddressFamily) -> Vec<String> {
    let mut all = RouteMessage::default();
    all.header.address_family = family;
    let found: Vec<_> = netlink
        .route()
        .get(all)
        .execute()
        .try_filter(|route| std::future::ready(route.header.table != 255))
        .try_collect()
        .await
        .expect("routes");
    let describe = |route: &RouteMessage| {
        let device = route.attributes.iter().find_map(|one| match one {
            RouteAttribute::Oif(index) => Some(*index),
            _ => None,
        });
        format!("{} dev {}", describe_route(route), device.unwrap_or(0))
    };
    found.iter().map(describe).collect()
}

#[test]
fn everything_is_set_and_may_be_set_again() {
    in_namespace(async |netlink| {
        add_devices(&netlink).await;
        let gateway = Ipv4Addr::new(10, 0, 0, 1);
        let mut far = route(
            AddressFamily::Inet,
            8,
            vec![
                RouteAttribute::Destination(RouteAddress::Inet(Ipv4Addr::new(10, 0, 0, 0))),
                RouteAttribute::Gateway(RouteAddress::Inet(gateway)),
                RouteAttribute::Oif(7),
                RouteAttribute::Table(1000),
                RouteAttribute::Priority(9),
            ],
        );
        far.header.table = 0;
        let default = vec![
            RouteAttribute::Gateway(RouteAddress::Inet(gateway)),
            RouteAttribute::Oif(7),
        ];
        // As each interface has one: the second must not take the first one's place.
        let link_local = |index| {
            let destination = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0);
            let attributes = vec![
                RouteAttribute::Destination(RouteAddress::Inet6(destination)),
                RouteAttribute::Oif(index),
                RouteAttribute::Priority(256),
            ];
            RouteNetlinkMessage::NewRoute(route(AddressFamily::Inet6, 64, attributes))
        };
        let mut rule = RuleMessage::default();
        rule.header.family = AddressFamily::Inet;
        rule.header.action = RuleAction::ToTable;
        rule.attributes = vec![
            RuleAttribute::Priority(50),
            RuleAttribute::Table(1000),
            RuleAttribute::FwMark(3),
        ];
        let mut neighbour = NeighbourMessage::default();
        neighbour.header.family = AddressFamily::Inet;
        neighbour.header.ifindex = 7;
        neighbour.header.state = NeighbourState::Permanent;
        neighbour.attributes = vec![
            NeighbourAttribute::Destination(NeighbourAddress::Inet(gateway)),
            NeighbourAttribute::LinkLayerAddress(SECOND.to_vec()),
        ];
        let request = request(
            // Each is to have the name that the other has.
            &[interface(7, "eth1", FIRST), interface(9, "eth0", SECOND)],
            vec![
                address(7, Ipv4Addr::new(10, 0, 0, 2), 24),
                address(7, Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2), 64),
                link_route(7, Ipv4Addr::new(10, 0, 0, 0), 24),
                link_local(7),
                link_local(9),
                RouteNetlinkMessage::NewRoute(route(AddressFamily::Inet, 0, default)),
                RouteNetlinkMessage::NewRoute(far),
                RouteNetlinkMessage::NewRule(rule),
                RouteNetlinkMessage::NewNeighbour(neighbour),
            ],
        );
        let mut seen = Vec::new();
        for _ in 0..2 {
            update(&request).await.expect("the network is set");

            let devices = devices(&netlink).await.expect("devices");
            let (first, second) = (&devices[&Mac(FIRST)], &devices[&Mac(SECOND)]);
            assert_eq!(
                (first.name.as_str(), second.name.as_str()),
                ("eth1", "eth0")
            );
            let of_first = |destination: &str| format!("{destination} dev {}", first.index);
            let v4 = routes(&netlink, AddressFamily::Inet).await;
            for expected in [
                "route default via 10.0.0.1 table 254",
                "route 10.0.0.0/24 table 254",
                "route 10.0.0.0/8 table 1000 metric 9 via 10.0.0.1",
            ] {
                // The kernel has an order of its own for what it tells.
                let words = |text: &str| {
                    let mut words: Vec<_> = text.split(' ').map(str::to_owned).collect();
                    words.sort();
                    words
                };
                let expected = of_first(expected);
                assert!(
                    v4.iter().any(|one| words(one) == words(&expected)),
                    "{v4:?}"
                );
            }
            let v6 = routes(&netlink, AddressFamily::Inet6).await;
            let of = |device: &Device| {
                let end = format!("dev {}", device.index);
                v6.iter()
                    .any(|one| one.contains("fe80::/64") && one.ends_with(&end))
            };
            assert!(of(first) && of(second), "{v6:?}");
            let rules: Vec<RuleMessage> = netlink
                .rule()
                .get(IpVersion::V4)
                .execute()
                .try_collect()
                .await
                .expect("rules");
            let ours = rules
                .iter()
                .filter(|rule| describe_rule(rule) == "routing rule 50");
            assert_eq!(ours.count(), 1, "{rules:?}");
            let addresses: Vec<AddressMessage> = netlink
                .address()
                .get()
                .set_link_index_filter(first.index)
                .execute()
                .try_collect()
                .await
                .expect("addresses");
            let addresses: Vec<_> = addresses.iter().map(describe_address).collect();
            assert_eq!(addresses, ["address 10.0.0.2/24", "address fd00::2/64"]);
            let neighbours: Vec<NeighbourMessage> = netlink
                .neighbours()
                .get()
                .execute()
                .try_collect()
                .await
                .expect("neighbours");
            assert!(
                neighbours.iter().any(|one| {
                    one.header.state == NeighbourState::Permanent
                        && describe_neighbour(one) == "neighbour 10.0.0.1"
                }),
                "{neighbours:?}"
            );
            seen.push((v4.len(), v6.len(), rules.len()));
        }
        assert_eq!(seen[0], seen[1], "what is set twice is there once");
    });
}

#[test]
fn interface_that_appears_later_is_waited_for() {
    in_namespace(async |netlink| {
        let request = request(&[interface(7, "net1", FIRST)], Vec::new());
        let (updated, ()) = tokio::join!(update(&request), async {
            // `update` has looked before this is done: it awaits an answer, and this task is next.
            add_devices(&netlink).await;
        });
        updated.expect("the interface came");
        let devices = devices(&netlink).await.expect("devices");
        assert_eq!(devices[&Mac(FIRST)].name, "net1");
    });
}

#[test]
fn interface_that_never_appears_is_named() {
    in_namespace(async |_| {
        tokio::time::pause();
        let request = request(&[interface(7, "net1", FIRST)], Vec::new());
        let error = update(&request).await.expect_err("it cannot come");
        assert_eq!(
            error.to_string(),
            "the guest has got no interface net1 (02:00:00:00:00:01) within 10 s"
        );
    });
}

#[test]
fn setting_that_fails_is_named() {
    in_namespace(async |netlink| {
        add_devices(&netlink).await;
        let unreachable = vec![
            RouteAttribute::Gateway(RouteAddress::Inet(Ipv4Addr::new(192, 0, 2, 1))),
            RouteAttribute::Oif(7),
        ];
        let unreachable = RouteNetlinkMessage::NewRoute(route(AddressFamily::Inet, 0, unreachable));
        let unknown = address(8, Ipv4Addr::new(10, 0, 0, 2), 24);
        for (setting, expected) in [
            (
                unreachable,
                "setting route default via 192.0.2.1 of the pod's network failed",
            ),
            (
                unknown,
                "setting address 10.0.0.2/24 of the pod's network failed",
            ),
        ] {
            let request = request(&[interface(7, "eth0", FIRST)], vec![setting]);
            let error = update(&request).await.expect_err("it cannot be set");
            assert_eq!(error.to_string(), expected);
        }
    });
}

#[test]
fn what_is_no_setting_is_refused() {
    let link = RouteNetlinkMessage::NewLink(LinkMessage::default());
    let [bytes] = &request(&[], vec![link]).settings[..] else {
        panic!("one message");
    };
    for bytes in [bytes.as_slice(), &[], &[0; 16]] {
        assert!(matches!(decode(bytes), Err(Error::Invalid(_))), "{bytes:?}");
    }
}
