//! Devices by name. A specification names devices by path and by the numbers that they have on the host; what the
//! container gets is the guest's device of the same path, with the guest's numbers, in the file system and in the rules
//! of the device controller alike.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use oci_spec::runtime::{
    Linux, LinuxBlockIo, LinuxDeviceCgroup, LinuxDeviceType, LinuxThrottleDevice,
    LinuxThrottleDeviceBuilder,
};

use crate::error::{Error, Result};

/// What the guest has under a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) typ: LinuxDeviceType,
    pub(crate) major: i64,
    pub(crate) minor: i64,
}

/// The guest's own device at `path`.
pub(crate) fn lookup(path: &Path) -> Option<Node> {
    let metadata = fs::metadata(path).ok()?;
    let typ = match metadata.file_type() {
        kind if kind.is_char_device() => LinuxDeviceType::C,
        kind if kind.is_block_device() => LinuxDeviceType::B,
        _ => return None,
    };
    Some(Node {
        typ,
        major: i64::from(libc::major(metadata.rdev())),
        minor: i64::from(libc::minor(metadata.rdev())),
    })
}

/// Gives each device of the specification the numbers that the guest knows it by.
///
/// A device that the guest lacks is an error, unless the container may use every device: such a specification lists all
/// that the host happens to have, and means "whatever there is".
pub(crate) fn adapt(linux: &mut Linux, lookup: impl Fn(&Path) -> Option<Node>) -> Result<()> {
    let Some(mut devices) = linux.devices().clone() else {
        return Ok(());
    };
    let mut rules = linux
        .resources()
        .as_ref()
        .and_then(|resources| resources.devices().clone())
        .unwrap_or_default();
    // As the host numbers: what is a device's number there may be another one's in the guest.
    let of_host = rules.clone();
    // Rules count in their order: what matters is the last that is about every device.
    let may_use_all = rules
        .iter()
        .rfind(|rule| is_of_everything(rule))
        .is_some_and(LinuxDeviceCgroup::allow);
    let mut missing = None;
    let mut disks = HashMap::new();
    devices.retain_mut(|device| {
        // A FIFO has no numbers: it is made, not found.
        if device.typ() == LinuxDeviceType::P {
            return true;
        }
        let Some(node) = lookup(device.path()) else {
            if !may_use_all {
                missing.get_or_insert_with(|| device.path().display().to_string());
            }
            return false;
        };
        for (rule, host) in rules.iter_mut().zip(&of_host) {
            if host.typ() == Some(device.typ())
                && host.major() == Some(device.major())
                && host.minor() == Some(device.minor())
            {
                rule.set_typ(Some(node.typ));
                rule.set_major(Some(node.major));
                rule.set_minor(Some(node.minor));
            }
        }
        if device.typ() == LinuxDeviceType::B {
            let numbers = (device.major(), device.minor());
            disks.entry(numbers).or_insert_with(Vec::new).push(node);
        }
        device.set_typ(node.typ);
        device.set_major(node.major);
        device.set_minor(node.minor);
        true
    });
    if let Some(path) = missing {
        return Err(Error::NoDevice { path });
    }
    // A device may be named twice (all of the host's, and one of them by itself), but is made once.
    let mut paths = HashSet::new();
    devices.retain(|device| paths.insert(device.path().clone()));
    linux.set_devices(Some(devices));
    if let Some(resources) = linux.resources_mut().as_mut() {
        if !rules.is_empty() {
            resources.set_devices(Some(rules));
        }
        if let Some(block_io) = resources.block_io_mut() {
            limit_disks(block_io, &disks);
        }
    }
    Ok(())
}

/// Gives the limits of disks the numbers that the guest knows those by; `disks` are these by the host's. There is none for a
/// device that the container does not have.
fn limit_disks(block_io: &mut LinuxBlockIo, disks: &HashMap<(i64, i64), Vec<Node>>) {
    let translated = |limits: &Option<Vec<LinuxThrottleDevice>>| {
        let limits = limits.as_ref()?.iter();
        let translated = limits.flat_map(|limit| {
            let nodes = disks.get(&(limit.major(), limit.minor()));
            nodes.into_iter().flatten().map(|node| {
                let translated = LinuxThrottleDeviceBuilder::default()
                    .major(node.major)
                    .minor(node.minor)
                    .rate(limit.rate());
                translated.build().expect("it has all")
            })
        });
        Some(translated.collect::<Vec<_>>())
    };
    let read_bps = translated(block_io.throttle_read_bps_device());
    block_io.set_throttle_read_bps_device(read_bps);
    let write_bps = translated(block_io.throttle_write_bps_device());
    block_io.set_throttle_write_bps_device(write_bps);
    let read_iops = translated(block_io.throttle_read_iops_device());
    block_io.set_throttle_read_iops_device(read_iops);
    let write_iops = translated(block_io.throttle_write_iops_device());
    block_io.set_throttle_write_iops_device(write_iops);
}

fn is_of_everything(rule: &LinuxDeviceCgroup) -> bool {
    let any = |number: Option<i64>| number.is_none_or(|number| number < 0);
    rule.typ().unwrap_or_default() == LinuxDeviceType::A && any(rule.major()) && any(rule.minor())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn linux(devices: &serde_json::Value, rules: &serde_json::Value) -> Linux {
        serde_json::from_value(json!({
            "devices": devices,
            "resources": { "devices": rules },
        }))
        .expect("a fair specification")
    }

    fn guest(path: &Path) -> Option<Node> {
        (path == Path::new("/dev/fuse")).then_some(Node {
            typ: LinuxDeviceType::C,
            major: 10,
            minor: 229,
        })
    }

    #[test]
    fn numbers_of_device_and_rule_become_the_guests() {
        let mut linux = linux(
            &json!([{ "path": "/dev/fuse", "type": "c", "major": 99, "minor": 1 }]),
            &json!([
                { "allow": false, "access": "rwm" },
                { "allow": true, "type": "c", "major": 99, "minor": 1, "access": "rw" },
            ]),
        );
        adapt(&mut linux, guest).expect("the guest has it");
        let device = &linux.devices().as_ref().expect("kept")[0];
        assert_eq!((device.major(), device.minor()), (10, 229));
        let rules = linux.resources().as_ref().and_then(|r| r.devices().clone());
        let rule = &rules.expect("kept")[1];
        assert_eq!((rule.major(), rule.minor()), (Some(10), Some(229)));
    }

    #[test]
    fn limits_are_those_of_the_guests_disks() {
        let mut linux: Linux = serde_json::from_value(json!({
            "devices": [
                { "path": "/dev/data", "type": "b", "major": 7, "minor": 3 },
                { "path": "/dev/again", "type": "b", "major": 7, "minor": 3 },
            ],
            "resources": { "blockIO": {
                "throttleReadBpsDevice": [
                    { "major": 7, "minor": 3, "rate": 1000 },
                    { "major": 8, "minor": 0, "rate": 2000 },
                ],
                "throttleWriteIOPSDevice": [{ "major": 7, "minor": 3, "rate": 30 }],
            } },
        }))
        .expect("a fair specification");
        // Under each name it is a disk of its own.
        let disk = |path: &Path| {
            Some(Node {
                typ: LinuxDeviceType::B,
                major: 254,
                minor: if path.ends_with("data") { 16 } else { 32 },
            })
        };
        adapt(&mut linux, disk).expect("the guest has it");
        let resources = linux.resources().as_ref().expect("kept");
        let block_io = serde_json::to_value(resources.block_io()).expect("it is JSON");
        assert_eq!(
            block_io["throttleReadBpsDevice"],
            json!([
                { "major": 254, "minor": 16, "rate": 1000 },
                { "major": 254, "minor": 32, "rate": 1000 },
            ])
        );
        assert_eq!(
            block_io["throttleWriteIOPSDevice"],
            json!([
                { "major": 254, "minor": 16, "rate": 30 },
                { "major": 254, "minor": 32, "rate": 30 },
            ])
        );
    }

    #[test]
    fn number_that_is_one_devices_on_the_host_and_anothers_in_the_guest_is_not_mixed_up() {
        let mut linux = linux(
            &json!([
                { "path": "/dev/a", "type": "b", "major": 7, "minor": 0 },
                { "path": "/dev/b", "type": "b", "major": 254, "minor": 0 },
            ]),
            &json!([
                { "allow": true, "type": "b", "major": 7, "minor": 0, "access": "r" },
                { "allow": true, "type": "b", "major": 254, "minor": 0, "access": "rw" },
            ]),
        );
        let guest = |path: &Path| {
            let minor = if path == Path::new("/dev/a") { 0 } else { 16 };
            Some(Node {
                typ: LinuxDeviceType::B,
                major: 254,
                minor,
            })
        };
        adapt(&mut linux, guest).expect("the guest has both");
        let rules = linux.resources().as_ref().and_then(|r| r.devices().clone());
        let minors: Vec<_> = rules
            .iter()
            .flatten()
            .map(LinuxDeviceCgroup::minor)
            .collect();
        assert_eq!(minors, [Some(0), Some(16)]);
    }

    #[test]
    fn device_that_the_guest_lacks_is_refused_by_name() {
        let mut linux = linux(
            &json!([{ "path": "/dev/sda", "type": "b", "major": 8, "minor": 0 }]),
            &json!([{ "allow": false, "access": "rwm" }]),
        );
        let error = adapt(&mut linux, guest).expect_err("the guest lacks it");
        assert_eq!(
            error.to_string(),
            "device /dev/sda does not exist in the guest, which has only devices of its own"
        );
    }

    #[test]
    fn container_that_may_use_every_device_gets_those_there_are() {
        let mut linux = linux(
            &json!([
                { "path": "/dev/sda", "type": "b", "major": 8, "minor": 0 },
                { "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229 },
            ]),
            &json!([{ "allow": false, "access": "rwm" }, { "allow": true, "access": "rwm" }]),
        );
        adapt(&mut linux, guest).expect("it is not about one device");
        let devices = linux.devices().as_ref().expect("kept");
        assert_eq!(devices.len(), 1);
        assert_eq!(devices[0].path(), Path::new("/dev/fuse"));
    }

    #[test]
    fn device_beside_all_others_is_made_once() {
        let mut linux = linux(
            &json!([
                { "path": "/dev/sda", "type": "b", "major": 8, "minor": 0 },
                { "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229 },
                { "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229 },
            ]),
            &json!([
                { "allow": false, "access": "rwm" },
                { "allow": true, "access": "rwm" },
                { "allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm" },
            ]),
        );
        adapt(&mut linux, guest).expect("every device may be used");
        let devices = linux.devices().as_ref().expect("kept");
        assert_eq!(devices.len(), 1);
        assert_eq!(devices[0].path(), Path::new("/dev/fuse"));
    }
}
