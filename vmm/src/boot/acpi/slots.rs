//! The PCI slots into which devices may come while the guest runs ([`super::hotplug`]), and the methods that read the registers of
//! [`crate::platform::slots`]. Whether a device is there, the guest asks the bus; `_EJ0` lets go of it.

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::AmlSink;
use acpi_tables::aml::{
    self, Device, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, Method, Name,
    OpRegion, OpRegionSpace, Path, ResourceTemplate, Scope, Store,
};

use super::hotplug::{NotifyOne, Scan, numbered, path_of};
use super::{low_word, port_count};
use crate::layout::SLOT_PORTS;

/// The method that has to be called when the guest is interrupted.
pub(super) const SCAN: &str = "\\_SB_.SLTS.SCAN";

/// `_ADR` of a PCI function: the number of its device from this bit on (6.1.1).
const ADDRESS_SHIFT: u32 = 16;

/// The registers, with the methods that read them.
pub(super) struct SlotController(pub(super) Range<u8>);

impl Aml for SlotController {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let base = low_word(SLOT_PORTS.start);
        let count = port_count(&SLOT_PORTS);
        Device::new(
            "SLTS".into(),
            vec![
                &Name::new("_HID".into(), &aml::EISAName::new("PNP0A06")),
                &Name::new("_UID".into(), &"slots"),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&aml::IO::new(base, base, 0, count)]),
                ),
                &OpRegion::new("REGS".into(), OpRegionSpace::SystemIO, &base, &count),
                // The layout that `platform::slots` describes.
                &Field::new(
                    "REGS".into(),
                    FieldAccessType::Byte,
                    FieldLockRule::NoLock,
                    FieldUpdateRule::WriteAsZeroes,
                    vec![
                        FieldEntry::Named(*b"SINS", 8),
                        FieldEntry::Named(*b"SREM", 8),
                        FieldEntry::Named(*b"SEJE", 8),
                    ],
                ),
                &NotifyOne {
                    name: "SNTF",
                    devices: self
                        .0
                        .clone()
                        .map(|slot| (slot, path_of("\\_SB_.PCI0.", numbered(b'S', slot))))
                        .collect(),
                },
                &Scan {
                    name: "SCAN",
                    come: "SINS",
                    to_go: "SREM",
                    notify: "SNTF",
                },
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// What the host bridge says of the slots.
pub(super) struct Slots(pub(super) Range<u8>);

impl Aml for Slots {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let slots: Vec<_> = self.0.clone().map(Slot).collect();
        let slots = slots.iter().map(|slot| slot as &dyn Aml).collect();
        Scope::new("\\_SB_.PCI0".into(), slots).to_aml_bytes(sink);
    }
}

struct Slot(u8);

impl Aml for Slot {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let slot = self.0;
        let address = u32::from(slot) << ADDRESS_SHIFT;
        let eject = Path::new("\\_SB_.SLTS.SEJE");
        Device::new(
            path_of("", numbered(b'S', slot)),
            vec![
                &Name::new("_ADR".into(), &address),
                &Name::new("_SUN".into(), &slot),
                &Method::new("_EJ0".into(), 1, true, vec![&Store::new(&eject, &slot)]),
            ],
        )
        .to_aml_bytes(sink);
    }
}
