//! Reads a network namespace: the interfaces that a guest gets, and all that the kernel knows of them.

use std::fmt;

use futures::TryStreamExt;
use log::info;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::AddressMessage;
use rtnetlink::packet_route::link::{
    InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::packet_route::neighbour::NeighbourMessage;
use rtnetlink::packet_route::route::RouteMessage;
use rtnetlink::packet_route::rule::RuleMessage;
use rtnetlink::{Handle, IpVersion};

use super::error::{NetworkError, While};
use super::tap;

/// What IPv4 needs, and virtio.
const MIN_MTU: u16 = 68;

/// All of a namespace that matters to a guest, as the kernel tells it.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) interfaces: Vec<Interface>,
    pub(super) addresses: Vec<AddressMessage>,
    pub(super) routes: Vec<RouteMessage>,
    pub(super) rules: Vec<RuleMessage>,
    pub(super) neighbours: Vec<NeighbourMessage>,
}

/// An interface that the guest gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mac: [u8; 6],
    pub(super) mtu: u16,
}

impl fmt::Display for Interface {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.name)
    }
}

/// Reads the namespace of the netlink socket.
pub(super) async fn scan(netlink: &Handle) -> Result<Found, NetworkError> {
    let interfaces = interfaces(&links(netlink).await?)?;
    read(netlink, interfaces).await
}

/// Reads what is set in the namespace of the netlink socket, for a guest that has `interfaces`.
pub(super) async fn read(
    netlink: &Handle,
    interfaces: Vec<Interface>,
) -> Result<Found, NetworkError> {
    if interfaces.is_empty() {
        return Ok(Found::default());
    }
    // One after the other: a netlink socket does one dump at a time.
    let addresses = netlink.address().get().execute().try_collect().await;
    let addresses = addresses.doing(|| "read the addresses".to_owned())?;
    let mut routes = Vec::new();
    let mut rules = Vec::new();
    for (family, version) in [
        (AddressFamily::Inet, IpVersion::V4),
        (AddressFamily::Inet6, IpVersion::V6),
    ] {
        let mut all = RouteMessage::default();
        all.header.address_family = family;
        let found: Vec<_> = netlink
            .route()
            .get(all)
            .execute()
            .try_collect()
            .await
            .doing(|| "read the routes".to_owned())?;
        routes.extend(found);
        let found: Vec<_> = netlink
            .rule()
            .get(version)
            .execute()
            .try_collect()
            .await
            .doing(|| "read the routing rules".to_owned())?;
        rules.extend(found);
    }
    let neighbours = netlink.neighbours().get().execute().try_collect().await;
    Ok(Found {
        interfaces,
        addresses,
        routes,
        rules,
        neighbours: neighbours.doing(|| "read the neighbours".to_owned())?,
    })
}

/// Every interface of the namespace.
pub(super) async fn links(netlink: &Handle) -> Result<Vec<LinkMessage>, NetworkError> {
    let links = netlink.link().get().execute().try_collect().await;
    links.doing(|| "read the interfaces".to_owned())
}

pub(super) fn name(link: &LinkMessage) -> &str {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.as_str()),
            _ => None,
        })
        .unwrap_or_default()
}

/// The interfaces that a guest gets: all that are up, but loopback. One of these that a VM cannot have is an error, and so is
/// a tap of ours: the namespace is another VM's.
pub(super) fn interfaces(links: &[LinkMessage]) -> Result<Vec<Interface>, NetworkError> {
    if let Some(tap) = links.iter().map(name).find(|name| tap::is_ours(name)) {
        return Err(NetworkError::InUse {
            tap: tap.to_owned(),
        });
    }
    // Among those that are down are the ones that the kernel puts into every namespace: tunl0, sit0, ip6tnl0, …
    for link in links.iter().filter(|link| !is_up(link)) {
        info!("interface {} is down and not the guest's", name(link));
    }
    let (interfaces, unusable) = usable(links);
    match unusable.into_iter().next() {
        Some((_, err)) => Err(err),
        None => Ok(interfaces),
    }
}

/// The interfaces that are up, but loopback and our taps: those that a guest can have, and the indices of those that it
/// cannot, with the reason.
pub(super) fn usable(links: &[LinkMessage]) -> (Vec<Interface>, Vec<(u32, NetworkError)>) {
    let (mut interfaces, mut unusable) = (Vec::<Interface>::new(), Vec::new());
    for link in links {
        if link.header.flags.contains(LinkFlags::Loopback)
            || !is_up(link)
            || tap::is_ours(name(link))
        {
            continue;
        }
        let usable = interface(link, links).and_then(|interface| {
            match interfaces.iter().find(|other| other.mac == interface.mac) {
                Some(other) => Err(format!("it has the same MAC address as {other}")),
                None => Ok(interface),
            }
        });
        match usable {
            Ok(interface) => interfaces.push(interface),
            Err(reason) => unusable.push((link.header.index, unsupported(link, reason))),
        }
    }
    interfaces.sort_by_key(|interface| interface.index);
    (interfaces, unusable)
}

fn is_up(link: &LinkMessage) -> bool {
    link.header.flags.contains(LinkFlags::Up)
}

fn unsupported(link: &LinkMessage, reason: String) -> NetworkError {
    NetworkError::Unsupported {
        interface: name(link).to_owned(),
        kind: kind(link).map_or_else(|| "no virtual one".to_owned(), InfoKind::to_string),
        reason,
    }
}

fn kind(link: &LinkMessage) -> Option<&InfoKind> {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::LinkInfo(infos) => infos.iter().find_map(|info| match info {
                LinkInfo::Kind(kind) => Some(kind),
                _ => None,
            }),
            _ => None,
        })
}

/// What the guest needs to know of a link, or why it cannot have it.
fn interface(link: &LinkMessage, links: &[LinkMessage]) -> Result<Interface, String> {
    if link.header.link_layer_type != LinkLayerType::Ether {
        return Err("it does not carry Ethernet".to_owned());
    }
    if link.header.flags.contains(LinkFlags::Noarp) {
        // As ipvlan and netkit in their modes of layer 3: nothing in them goes by the MAC address.
        return Err("it works on layer 3, without ARP".to_owned());
    }
    let (mut mac, mut mtu, mut below, mut elsewhere) = (None, None, None, false);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::Address(address) => mac = <[u8; 6]>::try_from(address.as_slice()).ok(),
            LinkAttribute::Mtu(bytes) => mtu = u16::try_from(*bytes).ok(),
            LinkAttribute::Controller(index) => {
                return Err(format!("it is a port of {}", name_of(*index, links)));
            }
            LinkAttribute::Link(index) => below = Some(*index),
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            _ => {}
        }
    }
    // What arrives at the lower one would be redirected before it reached this one. The ends of a veth are no such pair.
    if let Some(index) = below
        && !elsewhere
        && index != 0
        && index != link.header.index
        && kind(link) != Some(&InfoKind::Veth)
    {
        return Err(format!(
            "it is on top of {}, which is in the same namespace",
            name_of(index, links)
        ));
    }
    Ok(Interface {
        index: link.header.index,
        name: name(link).to_owned(),
        mac: mac
            .filter(|mac| mac[0] & 1 == 0 && *mac != [0; 6])
            .ok_or("it has no MAC address")?,
        mtu: mtu
            .filter(|&mtu| mtu >= MIN_MTU)
            .ok_or("its MTU is not one of an Ethernet device")?,
    })
}

fn name_of(index: u32, links: &[LinkMessage]) -> String {
    links
        .iter()
        .find(|link| link.header.index == index)
        .map_or_else(
            || format!("interface {index}"),
            |link| name(link).to_owned(),
        )
}
