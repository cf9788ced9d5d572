//! Devices by name. A specification names devices by path and by the numbers that they have on the host; what the
//! container gets is the guest's device of the same path, with the guest's numbers, in the file system and in the rules
//! of the device controller alike.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use oci_spec::runtime::{Linux, LinuxDeviceCgroup, LinuxDeviceType};

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
    if let Some(resources) = linux.resources_mut().as_mut()
        && !rules.is_empty()
    {
        resources.set_devices(Some(rules));
    }
    Ok(())
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
