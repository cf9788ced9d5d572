//! The vCPUs that may come and go ([`super::hotplug`]), and the methods that read the registers of
//! [`crate::platform::hotplug`]: `_STA` whether one is there, `_MAT` its local APIC, and `_EJ0` lets go of it.

use acpi_tables::Aml;
use acpi_tables::AmlSink;
use acpi_tables::aml::{
    self, BufferData, Device, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule,
    If, Method, Name, OpRegion, OpRegionSpace, Path, ResourceTemplate, Return, Store,
};
use acpi_tables::madt::{EnabledStatus, ProcessorLocalApic};

use super::hotplug::{NotifyOne, Scan, numbered, path_of};
use super::{low_word, port_count};
use crate::layout::HOTPLUG_PORTS;
use crate::platform::hotplug::PRESENT_BYTES;

/// The method that has to be called when the guest is interrupted.
pub(super) const SCAN: &str = "\\_SB_.HPLG.SCAN";

/// `_STA` of a device that is there: present, enabled, shown, working (6.3.7).
const STATUS_PRESENT: u8 = 0xf;

/// The registers, with the methods that read them.
pub(super) struct ProcessorController {
    pub(super) max_vcpus: u8,
}

impl Aml for ProcessorController {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let base = low_word(HOTPLUG_PORTS.start);
        let count = port_count(&HOTPLUG_PORTS);
        Device::new(
            "HPLG".into(),
            vec![
                &Name::new("_HID".into(), &aml::EISAName::new("PNP0A06")),
                &Name::new("_UID".into(), &"hotplug"),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&aml::IO::new(base, base, 0, count)]),
                ),
                &OpRegion::new("REGS".into(), OpRegionSpace::SystemIO, &base, &count),
                &self.registers(),
                &NotifyOne {
                    name: "CNTF",
                    devices: (0..self.max_vcpus)
                        .map(|index| (index, path_of("\\_SB_.", numbered(b'C', index))))
                        .collect(),
                },
                &Scan {
                    name: "SCAN",
                    come: "CINS",
                    to_go: "CREM",
                    notify: "CNTF",
                },
            ],
        )
        .to_aml_bytes(sink);
    }
}

impl ProcessorController {
    /// The layout that [`crate::platform::hotplug`] describes.
    fn registers(&self) -> Field {
        let vcpus = usize::from(self.max_vcpus);
        let mut fields: Vec<_> = (0..self.max_vcpus)
            .map(|index| FieldEntry::Named(numbered(b'P', index), 1))
            .collect();
        fields.push(FieldEntry::Reserved(PRESENT_BYTES * 8 - vcpus));
        fields.extend([
            FieldEntry::Named(*b"CINS", 8),
            FieldEntry::Named(*b"CREM", 8),
            FieldEntry::Named(*b"CEJE", 8),
        ]);
        Field::new(
            "REGS".into(),
            FieldAccessType::Byte,
            FieldLockRule::NoLock,
            FieldUpdateRule::WriteAsZeroes,
            fields,
        )
    }
}

/// A device for each vCPU that there may be.
pub(super) struct Processors {
    pub(super) count: u8,
}

impl Aml for Processors {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        for index in 0..self.count {
            processor(index, sink);
        }
    }
}

fn processor(index: u8, sink: &mut dyn AmlSink) {
    let mut apic = Vec::new();
    ProcessorLocalApic::new(index, index, EnabledStatus::Enabled).to_aml_bytes(&mut apic);
    let is_present = path_of("\\_SB_.HPLG.", numbered(b'P', index));
    let eject = Path::new("\\_SB_.HPLG.CEJE");
    let device = path_of("", numbered(b'C', index));
    let id = Name::new("_HID".into(), &"ACPI0007");
    let unique = Name::new("_UID".into(), &index);
    let there = Return::new(&STATUS_PRESENT);
    let if_present = If::new(&is_present, vec![&there]);
    let absent = Return::new(&aml::ZERO);
    let status = Method::new("_STA".into(), 0, false, vec![&if_present, &absent]);
    let entry = BufferData::new(apic);
    let entry = Name::new("_MAT".into(), &entry);
    let store = Store::new(&eject, &index);
    let let_go = Method::new("_EJ0".into(), 1, true, vec![&store]);
    let mut content: Vec<&dyn Aml> = vec![&id, &unique, &status, &entry];
    // The first vCPU cannot go: Linux runs on it what runs nowhere else.
    if index != 0 {
        content.push(&let_go);
    }
    Device::new(device, content).to_aml_bytes(sink);
}
