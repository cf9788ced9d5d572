//! What the agent is told: the interfaces, and the kernel's own messages about them, without what is a state of the host
//! and no setting. Pure functions.

use std::cmp::Reverse;
use std::collections::HashSet;

use husk_protocol::agent;
use rtnetlink::packet_core::NetlinkMessage;
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use rtnetlink::packet_route::neighbour::{
    NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAttribute, RouteFlags, RouteMessage, RouteNextHop, RouteNextHopFlags, RouteProtocol,
    RouteType,
};
use rtnetlink::packet_route::rule::{RuleAttribute, RuleFlags, RuleMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::scan::Found;

/// The loopback interface, in each namespace.
const LOOPBACK: u32 = 1;

/// The table that the kernel fills by itself as addresses come.
const LOCAL: u32 = 255;

/// The request that makes a guest's network what was found.
pub(super) fn request(found: &Found) -> agent::UpdateNetworkRequest {
    let interfaces = found
        .interfaces
        .iter()
        .map(|interface| agent::Interface {
            index: interface.index,
            name: interface.name.clone(),
            mac: interface.mac.to_vec(),
            mtu: interface.mtu.into(),
            ..Default::default()
        })
        .collect();
    agent::UpdateNetworkRequest {
        interfaces,
        settings: messages(found).into_iter().map(encode).collect(),
        ..Default::default()
    }
}

fn encode(message: RouteNetlinkMessage) -> Vec<u8> {
    let mut message = NetlinkMessage::from(message);
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

/// In an order in which they can be applied.
pub(super) fn messages(found: &Found) -> Vec<RouteNetlinkMessage> {
    let mut known: HashSet<u32> = found.interfaces.iter().map(|one| one.index).collect();
    known.insert(LOOPBACK);

    let addresses = found
        .addresses
        .iter()
        .filter_map(|message| address(message, &known))
        .map(RouteNetlinkMessage::NewAddress);
    let mut routes: Vec<_> = found
        .routes
        .iter()
        .filter_map(|message| route(message, &known))
        .collect();
    // A gateway has to be reachable before it can be one.
    routes.sort_by_key(|route| (has_gateway(route), Reverse(u8::from(route.header.scope))));
    let routes = routes.into_iter().map(RouteNetlinkMessage::NewRoute);
    let rules = found
        .rules
        .iter()
        .filter_map(rule)
        .map(RouteNetlinkMessage::NewRule);
    let neighbours = found
        .neighbours
        .iter()
        .filter_map(|message| neighbour(message, &known))
        .map(RouteNetlinkMessage::NewNeighbour);
    addresses
        .chain(neighbours)
        .chain(routes)
        .chain(rules)
        .collect()
}

/// An address that somebody has set: for ever, as far as the guest is told. Those that the kernel found by itself (SLAAC),
/// the guest's kernel finds too.
fn address(message: &AddressMessage, known: &HashSet<u32>) -> Option<AddressMessage> {
    let header = &message.header;
    let flags = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            AddressAttribute::Flags(flags) => Some(*flags),
            _ => None,
        })
        .unwrap_or(AddressFlags::from_bits_retain(header.flags.bits().into()));
    let is_loopbacks_own = header.index == LOOPBACK && header.scope == AddressScope::Host;
    if !known.contains(&header.index)
        || is_loopbacks_own
        // Of a router, or of the kernel's choice. By IPv4 it is somebody's who counts its time, too.
        || (header.family == AddressFamily::Inet6 && !flags.contains(AddressFlags::Permanent))
    {
        return None;
    }
    let mut message = message.clone();
    message.attributes.retain(|attribute| {
        !matches!(
            attribute,
            AddressAttribute::Flags(_) | AddressAttribute::CacheInfo(_)
        )
    });
    // That it is nobody else's was seen to on the host. Its route is among the routes, or somebody has removed it.
    let flags = match message.header.family {
        AddressFamily::Inet6 => AddressFlags::Noprefixroute | AddressFlags::Nodad,
        _ => AddressFlags::Noprefixroute,
    };
    message.header.flags = AddressHeaderFlags::empty();
    message.attributes.push(AddressAttribute::Flags(flags));
    Some(message)
}

/// A route that somebody has set, or that the kernel has made of an address.
fn route(message: &RouteMessage, known: &HashSet<u32>) -> Option<RouteMessage> {
    let header = &message.header;
    let mut table = u32::from(header.table);
    let mut devices = Vec::new();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Oif(index) => devices.push(*index),
            RouteAttribute::MultiPath(hops) => {
                devices.extend(hops.iter().map(|hop| hop.interface_index));
            }
            _ => {}
        }
    }
    let is_setting = match header.kind {
        RouteType::Unicast => true,
        RouteType::BlackHole
        | RouteType::Local
        | RouteType::Prohibit
        | RouteType::Throw
        | RouteType::Unreachable => header.protocol != RouteProtocol::Kernel,
        _ => false,
    };
    if table == LOCAL
        || !is_setting
        // Learned from a router, as the guest's kernel does too; or the copy of another.
        || header.protocol == RouteProtocol::Ra
        || header.flags.contains(RouteFlags::Cloned)
        || !devices.iter().all(|device| known.contains(device))
    {
        return None;
    }
    let mut message = message.clone();
    message.header.flags &= RouteFlags::Onlink | RouteFlags::Pervasive;
    // The object that an id names is not copied, but the kernel tells what is in it as well.
    message.attributes.retain(|attribute| {
        !matches!(
            attribute,
            RouteAttribute::CacheInfo(_) | RouteAttribute::NhId(_) | RouteAttribute::Expires(_)
        )
    });
    for attribute in &mut message.attributes {
        if let RouteAttribute::MultiPath(hops) = attribute {
            for RouteNextHop { flags, .. } in hops {
                *flags &= RouteNextHopFlags::Onlink | RouteNextHopFlags::Pervasive;
            }
        }
    }
    Some(message)
}

fn has_gateway(route: &RouteMessage) -> bool {
    route.attributes.iter().any(|attribute| {
        matches!(
            attribute,
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) | RouteAttribute::MultiPath(_)
        )
    })
}

/// A rule that is not one of those that every namespace begins with.
fn rule(message: &RuleMessage) -> Option<RuleMessage> {
    let of_kernel = RuleAttribute::Protocol(RouteProtocol::Kernel);
    if message.attributes.contains(&of_kernel) {
        return None;
    }
    let mut message = message.clone();
    message.header.flags &= RuleFlags::Invert;
    Some(message)
}

/// A neighbour that was set, not found.
fn neighbour(message: &NeighbourMessage, known: &HashSet<u32>) -> Option<NeighbourMessage> {
    if message.header.state != NeighbourState::Permanent || !known.contains(&message.header.ifindex)
    {
        return None;
    }
    let mut message = message.clone();
    message.header.flags &= NeighbourFlags::Router;
    message.attributes.retain(|attribute| {
        matches!(
            attribute,
            NeighbourAttribute::Destination(_)
                | NeighbourAttribute::LinkLayerAddress(_)
                | NeighbourAttribute::Protocol(_)
        )
    });
    Some(message)
}
