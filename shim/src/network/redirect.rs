//! The two redirections that connect an interface with its tap, and taking them back. All that arrives at one leaves by
//! the other: `tc qdisc add dev A ingress; tc filter add dev A parent ffff: protocol all u32 match u8 0 0 action mirred
//! egress redirect dev B`.

use futures::TryStreamExt;
use nix::libc;
use rtnetlink::packet_route::link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute};
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle};
use rtnetlink::{Handle, LinkUnspec};

use super::error::{NetworkError, While, errno};
use super::scan::{Interface, links, name};
use super::tap;

/// The ingress qdisc, which has the same handle everywhere.
const INGRESS: TcHandle = TcHandle {
    major: 0xffff,
    minor: 0,
};

/// The priority of our filters, by which they are known.
const PRIORITY: u16 = 0x4855;

/// Connects `interface` with the tap, both ways.
pub(super) async fn connect(
    netlink: &Handle,
    interface: &Interface,
    tap: &str,
) -> Result<(), NetworkError> {
    let what = || format!("find {tap}");
    let message = netlink
        .link()
        .get()
        .match_name(tap)
        .execute()
        .try_next()
        .await
        .doing(what)?;
    let tap_index = message.map_or(0, |link| link.header.index);
    bring_up(netlink, tap_index, interface.mtu)
        .await
        .doing(|| format!("bring up {tap}"))?;
    add_ingress(netlink, tap_index)
        .await
        .doing(|| format!("add a queueing discipline to {tap}"))?;
    redirect(netlink, tap_index, interface.index)
        .await
        .doing(|| format!("redirect {tap} to {interface}"))?;
    match add_ingress(netlink, interface.index).await {
        // Left by a VM that was killed together with all that could have taken it back; or not ours.
        Err(err) if errno(&err) == Some(libc::EEXIST) => {
            if !remove_ours(netlink, interface.index).await? {
                return Err(NetworkError::Qdisc {
                    interface: interface.name.clone(),
                });
            }
            add_ingress(netlink, interface.index).await
        }
        other => other,
    }
    .doing(|| format!("add a queueing discipline to {interface}"))?;
    redirect(netlink, interface.index, tap_index)
        .await
        .doing(|| format!("redirect {interface} to {tap}"))
}

/// Takes the redirection of `interface` back. The tap goes with its descriptors.
pub(super) async fn disconnect(
    netlink: &Handle,
    interface: &Interface,
) -> Result<(), NetworkError> {
    remove_ours(netlink, interface.index).await.map(drop)
}

/// Removes every tap and every redirection of ours.
pub(super) async fn remove(netlink: &Handle) -> Result<(), NetworkError> {
    for link in links(netlink).await? {
        let index = link.header.index;
        if tap::is_ours(name(&link)) {
            let removed = netlink.link().del(index).execute().await;
            gone_is_removed(removed).doing(|| format!("remove {}", name(&link)))?;
        } else {
            remove_ours(netlink, index).await?;
        }
    }
    Ok(())
}

async fn bring_up(netlink: &Handle, index: u32, mtu: u16) -> Result<(), rtnetlink::Error> {
    // The host's kernel has nothing to say to the guest: no address of its own on the tap.
    let silent = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
    let silent = LinkUnspec::new_with_index(index)
        .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![silent]))
        .build();
    match netlink.link().set(silent).execute().await {
        // It cannot have one if there is no IPv6.
        Err(err) if errno(&err) == Some(libc::EAFNOSUPPORT) => {}
        other => other?,
    }
    let up = LinkUnspec::new_with_index(index).mtu(mtu.into()).up();
    netlink.link().set(up.build()).execute().await
}

async fn add_ingress(netlink: &Handle, index: u32) -> Result<(), rtnetlink::Error> {
    netlink
        .qdisc()
        .add(index.cast_signed())
        .ingress()
        .execute()
        .await
}

async fn redirect(netlink: &Handle, from: u32, to: u32) -> Result<(), rtnetlink::Error> {
    let all = u16::try_from(libc::ETH_P_ALL).expect("a protocol has 16 bits");
    netlink
        .traffic_filter(from.cast_signed())
        .add()
        .parent(INGRESS.into())
        .priority(PRIORITY)
        .protocol(all.to_be())
        .redirect(to)?
        .execute()
        .await
}

/// Removes the ingress qdisc of an interface unless it does something for somebody else; returns whether there was one to
/// remove.
async fn remove_ours(netlink: &Handle, index: u32) -> Result<bool, NetworkError> {
    let qdiscs: Vec<_> = netlink
        .qdisc()
        .get()
        .index(index.cast_signed())
        .ingress()
        .execute()
        .try_collect()
        .await
        .doing(|| format!("read the queueing disciplines of interface {index}"))?;
    // Not a clsact, which has the same handle. The kernel may tell those of other interfaces, too.
    let kind = TcAttribute::Kind("ingress".to_owned());
    if !qdiscs
        .iter()
        .any(|qdisc| qdisc.header.index == index.cast_signed() && qdisc.attributes.contains(&kind))
    {
        return Ok(false);
    }
    let filters: Vec<_> = netlink
        .traffic_filter(index.cast_signed())
        .get()
        .ingress()
        .execute()
        .try_collect()
        .await
        .doing(|| format!("read the filters of interface {index}"))?;
    // One without a filter does nothing for anybody: a shim was killed before it could give it one.
    let is_ours = |info: u32| info >> 16 == u32::from(PRIORITY);
    if !filters.iter().all(|filter| is_ours(filter.header.info)) {
        return Ok(false);
    }
    let mut request = netlink.qdisc().del(index.cast_signed());
    let message = request.message_mut();
    message.header.parent = TcHandle::INGRESS;
    message.header.handle = INGRESS;
    gone_is_removed(request.execute().await)
        .doing(|| format!("remove the redirection of interface {index}"))?;
    Ok(true)
}

fn gone_is_removed(removed: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    match removed {
        Err(err) if matches!(errno(&err), Some(libc::ENODEV | libc::ENOENT)) => Ok(()),
        other => other,
    }
}
