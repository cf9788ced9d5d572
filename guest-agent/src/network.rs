//! The pod's network in the guest: names the interfaces that the VM has been given, and sets what the host's kernel said of
//! the pod's interfaces, by the same messages (see UpdateNetwork in `proto/agent.proto`). It waits for interfaces that are
//! still to appear by the kernel's own notifications.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use futures::channel::mpsc::UnboundedReceiver;
use futures::{StreamExt, TryStreamExt};
use husk_protocol::agent::{Interface, UpdateNetworkRequest};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST,
    NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkLayerType, LinkMessage,
};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteNextHop};
use rtnetlink::packet_route::rule::{RuleAttribute, RuleMessage};
use rtnetlink::sys::SocketAddr;
use rtnetlink::{Handle, LinkUnspec, MulticastGroup};

use crate::error::{During, Error, Result};

/// How long an interface may take to appear.
const APPEARANCE_LIMIT: Duration = Duration::from_secs(10);

/// The loopback interface, which has this number everywhere.
const LOOPBACK: u32 = 1;

/// A MAC address, by which the host and the guest mean the same interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Mac([u8; 6]);

/// An interface of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Device {
    index: u32,
    name: String,
}

/// The guest's numbers of interfaces, by the host's.
type Indices = HashMap<u32, u32>;

/// What the kernel tells unasked.
type News = UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>;

/// Makes the guest's network what `request` says.
pub(crate) async fn update(request: &UpdateNetworkRequest) -> Result<()> {
    let wanted: Vec<(Mac, &Interface)> = request
        .interfaces
        .iter()
        .map(|interface| Ok((Mac::of(interface)?, interface)))
        .collect::<Result<_>>()?;
    let settings: Vec<RouteNetlinkMessage> = request
        .settings
        .iter()
        .map(|bytes| decode(bytes))
        .collect::<Result<_>>()?;

    // It listens from before the first look on, so that no interface can appear unseen.
    let (connection, netlink, mut news) =
        rtnetlink::new_multicast_connection(&[MulticastGroup::Link])
            .during("opening a netlink socket")?;
    tokio::spawn(connection);
    let mut devices = devices(&netlink).await?;
    tokio::time::timeout(
        APPEARANCE_LIMIT,
        appearance(&wanted, &mut devices, &mut news),
    )
    .await
    .map_err(|_| missing(&wanted, &devices))?;
    let pairs: Vec<(&Interface, &Device)> = wanted
        .iter()
        .filter_map(|(mac, interface)| Some((*interface, devices.get(mac)?)))
        .collect();

    for (mac, device) in &devices {
        let has_its_name = |(interface, _): &(&Interface, _)| interface.name == device.name;
        if !wanted.iter().any(|(one, _)| one == mac) && pairs.iter().any(has_its_name) {
            retire(&netlink, device).await?;
        }
    }
    rename(&netlink, &pairs).await?;
    let mut indices = Indices::from([(LOOPBACK, LOOPBACK)]);
    for (interface, device) in pairs {
        bring_up(&netlink, interface, device.index).await?;
        indices.insert(interface.index, device.index);
    }
    let mut places = Vec::new();
    // What cannot be set keeps nothing from being set that comes after it.
    let mut done = Ok(());
    for setting in settings {
        let what = describe(&setting);
        let set = apply(&netlink, setting, &indices, &mut places)
            .await
            .during(format!("setting {what} of the pod's network"));
        if let Err(error) = &set {
            tracing::warn!(error = crate::error::chain(error), "a setting is left out");
        }
        done = done.and(set);
    }
    done
}

impl Mac {
    fn of(interface: &Interface) -> Result<Self> {
        <[u8; 6]>::try_from(interface.mac.as_slice())
            .map(Self)
            .map_err(|_| {
                Error::Invalid(format!(
                    "interface {:?} has a MAC address of {} bytes",
                    interface.name,
                    interface.mac.len()
                ))
            })
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0.map(|byte| format!("{byte:02x}")).join(":"))
    }
}

fn decode(bytes: &[u8]) -> Result<RouteNetlinkMessage> {
    match NetlinkMessage::deserialize(bytes).map(|message| message.payload) {
        Ok(NetlinkPayload::InnerMessage(
            message @ (RouteNetlinkMessage::NewAddress(_)
            | RouteNetlinkMessage::NewRoute(_)
            | RouteNetlinkMessage::NewRule(_)
            | RouteNetlinkMessage::NewNeighbour(_)),
        )) => Ok(message),
        Ok(other) => Err(Error::Invalid(format!(
            "{other:?} is no setting of a network"
        ))),
        Err(err) => Err(Error::Invalid(format!(
            "a setting of the network cannot be understood: {err}"
        ))),
    }
}

async fn devices(netlink: &Handle) -> Result<HashMap<Mac, Device>> {
    let links: Vec<LinkMessage> = netlink
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(system_error)
        .during("reading the interfaces")?;
    Ok(links.iter().filter_map(device).collect())
}

fn device(link: &LinkMessage) -> Option<(Mac, Device)> {
    let (mut mac, mut name) = (None, None);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::Address(address) => mac = <[u8; 6]>::try_from(address.as_slice()).ok(),
            LinkAttribute::IfName(text) => name = Some(text.clone()),
            _ => {}
        }
    }
    let device = Device {
        index: link.header.index,
        name: name?,
    };
    // Loopback has an address of zeros.
    (link.header.link_layer_type == LinkLayerType::Ether).then_some((Mac(mac?), device))
}

/// Returns when all that is wanted is there.
async fn appearance(
    wanted: &[(Mac, &Interface)],
    devices: &mut HashMap<Mac, Device>,
    news: &mut News,
) {
    while !wanted.iter().all(|(mac, _)| devices.contains_key(mac)) {
        // The connection lives as long as the caller's handle.
        let Some((message, _)) = news.next().await else {
            return std::future::pending().await;
        };
        if let NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) = message.payload {
            devices.extend(device(&link));
        }
    }
}

fn missing(wanted: &[(Mac, &Interface)], devices: &HashMap<Mac, Device>) -> Error {
    let missing: Vec<String> = wanted
        .iter()
        .filter(|(mac, _)| !devices.contains_key(mac))
        .map(|(mac, interface)| format!("{} ({mac})", interface.name))
        .collect();
    Error::NoInterface {
        names: missing.join(", "),
        seconds: APPEARANCE_LIMIT.as_secs(),
    }
}

/// Takes an interface out of use that another one replaces.
async fn retire(netlink: &Handle, device: &Device) -> Result<()> {
    let down = LinkUnspec::new_with_index(device.index).down().build();
    let set = netlink.link().set(down).execute().await;
    set.map_err(system_error)
        .during(format!("setting down {}, which is gone", device.name))?;
    let_go_of_name(netlink, device).await
}

async fn let_go_of_name(netlink: &Handle, device: &Device) -> Result<()> {
    set_name(netlink, device.index, &format!("husk{}", device.index)).await
}

/// Gives the interfaces their names. One may have the name that another is to have: so all let go of theirs first.
async fn rename(netlink: &Handle, pairs: &[(&Interface, &Device)]) -> Result<()> {
    let other: Vec<_> = pairs
        .iter()
        .filter(|(interface, device)| interface.name != device.name)
        .collect();
    for (_, device) in &other {
        let_go_of_name(netlink, device).await?;
    }
    for (interface, device) in &other {
        set_name(netlink, device.index, &interface.name).await?;
    }
    Ok(())
}

async fn set_name(netlink: &Handle, index: u32, name: &str) -> Result<()> {
    let link = LinkUnspec::new_with_index(index).name(name).build();
    let set = netlink.link().set(link).execute().await;
    set.map_err(system_error)
        .during(format!("naming an interface {name}"))
}

async fn bring_up(netlink: &Handle, interface: &Interface, index: u32) -> Result<()> {
    // Its addresses are those of the pod's interface, and no others.
    let none = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
    let none = LinkUnspec::new_with_index(index)
        .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![none]))
        .build();
    let name = &interface.name;
    match netlink
        .link()
        .set(none)
        .execute()
        .await
        .map_err(system_error)
    {
        // The MTU is too small for IPv6.
        Err(err) if err.raw_os_error() == Some(libc::EAFNOSUPPORT) => {}
        other => other.during(format!("leaving the addresses of {name} to the host"))?,
    }
    let up = LinkUnspec::new_with_index(index).mtu(interface.mtu).up();
    let up = netlink.link().set(up.build()).execute().await;
    up.map_err(system_error).during(format!(
        "bringing up {name} with an MTU of {}",
        interface.mtu
    ))
}

/// What a route is found by: where it leads nothing is said of.
fn place_of(route: &RouteMessage) -> RouteMessage {
    let mut place = RouteMessage::default();
    place.header.address_family = route.header.address_family;
    place.header.destination_prefix_length = route.header.destination_prefix_length;
    place.header.table = route.header.table;
    place.header.tos = route.header.tos;
    let found_by = route.attributes.iter().filter(|attribute| {
        matches!(
            attribute,
            RouteAttribute::Destination(_) | RouteAttribute::Table(_) | RouteAttribute::Priority(_)
        )
    });
    place.attributes = found_by.cloned().collect();
    place
}

/// Sets one thing. That it is set already is no error. `places` are those of the routes before.
async fn apply(
    netlink: &Handle,
    mut setting: RouteNetlinkMessage,
    indices: &Indices,
    places: &mut Vec<RouteMessage>,
) -> io::Result<()> {
    let flags = match &mut setting {
        RouteNetlinkMessage::NewAddress(message) => {
            translate(&mut message.header.index, indices)?;
            NLM_F_EXCL
        }
        RouteNetlinkMessage::NewRoute(message) => {
            translate_route(message, indices)?;
            let place = place_of(message);
            if places.contains(&place) {
                // In the host's order, where several have the same destination.
                NLM_F_APPEND
            } else {
                // The host may have replaced the one that was here.
                places.push(place);
                NLM_F_REPLACE
            }
        }
        RouteNetlinkMessage::NewNeighbour(message) => {
            translate(&mut message.header.ifindex, indices)?;
            // It may have been found by itself meanwhile.
            NLM_F_REPLACE
        }
        _ => NLM_F_EXCL,
    };
    let mut request = NetlinkMessage::from(setting);
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | flags;
    let mut answers = netlink.clone().request(request).map_err(system_error)?;
    while let Some(answer) = answers.next().await {
        match answer.payload {
            NetlinkPayload::Error(err) if err.raw_code() == -libc::EEXIST => {}
            // Without a code it is an acknowledgement.
            NetlinkPayload::Error(err) if err.code.is_some() => return Err(err.to_io()),
            _ => {}
        }
    }
    Ok(())
}

/// Makes the host's number of an interface that of the guest.
fn translate(index: &mut u32, indices: &Indices) -> io::Result<()> {
    *index = *indices
        .get(index)
        .ok_or_else(|| io::Error::other(format!("the pod has no interface {index}")))?;
    Ok(())
}

fn translate_route(route: &mut RouteMessage, indices: &Indices) -> io::Result<()> {
    for attribute in &mut route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => translate(index, indices)?,
            RouteAttribute::MultiPath(hops) => {
                for RouteNextHop {
                    interface_index, ..
                } in hops
                {
                    translate(interface_index, indices)?;
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// The system's error, if it is one.
fn system_error(err: rtnetlink::Error) -> io::Error {
    match err {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}

/// A setting as `ip` writes it, as far as it takes to know which one it is.
fn describe(setting: &RouteNetlinkMessage) -> String {
    match setting {
        RouteNetlinkMessage::NewAddress(message) => describe_address(message),
        RouteNetlinkMessage::NewRoute(message) => describe_route(message),
        RouteNetlinkMessage::NewRule(message) => describe_rule(message),
        RouteNetlinkMessage::NewNeighbour(message) => describe_neighbour(message),
        _ => "what is no setting".to_owned(),
    }
}

fn describe_address(message: &AddressMessage) -> String {
    let address = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(address.to_string()),
            _ => None,
        });
    let length = message.header.prefix_len;
    format!("address {}/{length}", address.unwrap_or_default())
}

fn describe_route(message: &RouteMessage) -> String {
    let mut destination = "default".to_owned();
    let mut more = String::new();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => {
                let length = message.header.destination_prefix_length;
                destination = format!("{}/{length}", ip(address));
            }
            RouteAttribute::Gateway(address) => more += &format!(" via {}", ip(address)),
            RouteAttribute::Table(table) => more += &format!(" table {table}"),
            RouteAttribute::Priority(metric) => more += &format!(" metric {metric}"),
            _ => {}
        }
    }
    format!("route {destination}{more}")
}

fn ip(address: &RouteAddress) -> String {
    match address {
        RouteAddress::Inet(address) => address.to_string(),
        RouteAddress::Inet6(address) => address.to_string(),
        other => format!("{other:?}"),
    }
}

fn describe_rule(message: &RuleMessage) -> String {
    let priority = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RuleAttribute::Priority(priority) => Some(*priority),
            _ => None,
        });
    format!("routing rule {}", priority.unwrap_or_default())
}

fn describe_neighbour(message: &NeighbourMessage) -> String {
    let address = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => {
                Some(IpAddr::from(*address))
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => {
                Some(IpAddr::from(*address))
            }
            _ => None,
        });
    match address {
        Some(address) => format!("neighbour {address}"),
        None => "a neighbour".to_owned(),
    }
}

#[cfg(test)]
mod tests;
